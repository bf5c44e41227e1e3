"""Converts a Megatron-Core checkpoint, saved at any layout, to a Hugging Face directory.

python tools/convert_megatron_to_hf.py --megatron DIR --output DIR
"""

import argparse
import sys
from pathlib import Path

from megatron_rl.conversion.command import DTYPES, progress_bar, run_command
from megatron_rl.conversion.to_hf import convert_to_hf
from megatron_rl.errors import InputError
from megatron_rl.megatron.stored_files import MegatronCheckpoint
from megatron_rl.weights.families.registry import read_model_config
from megatron_rl.weights.model_source import find_model


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megatron", required=True, metavar="DIR", help="checkpoint, or run's")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR")
    parser.add_argument(
        "--hf-config",
        metavar="DIR|NAME",
        help="config.json and tokenizer, if the checkpoint has none",
    )
    parser.add_argument(
        "--dtype", choices=sorted(DTYPES), help="of all weights; as stored if left out"
    )
    parser.add_argument(
        "--main-weights",
        action="store_true",
        help="the optimizer's float32 weights instead of the model's",
    )
    parser.add_argument("--file-mib", type=int, default=4096, help="size of one safetensors file")
    return run_command(lambda: convert(parser.parse_args(arguments)))


def convert(options: argparse.Namespace) -> int:
    source = find_model(options.megatron, "--megatron", options.hf_config)
    if source.megatron_dir is None:
        raise InputError(f"--megatron={options.megatron!r}: no Megatron-Core checkpoint is there")
    arch = read_model_config(source.config_dir)
    with progress_bar("to Hugging Face") as bar:
        convert_to_hf(
            MegatronCheckpoint(source.megatron_dir, arch, main_weights=options.main_weights),
            source.config_dir,
            options.output,
            arch,
            dtype=DTYPES.get(options.dtype),
            file_bytes=options.file_mib << 20,
            progress=bar,
        )
    print(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
