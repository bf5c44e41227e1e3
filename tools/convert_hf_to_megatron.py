"""Converts a Hugging Face model to a Megatron-Core checkpoint, which loads at any layout.

python tools/convert_hf_to_megatron.py --hf DIR|hub-name --output DIR
"""

import argparse
import sys
from pathlib import Path

from megatron_rl.conversion.command import DTYPES, progress_bar, run_command
from megatron_rl.conversion.to_megatron import convert_to_megatron
from megatron_rl.errors import ConfigErrors, InputError
from megatron_rl.megatron.refusals import model_problems
from megatron_rl.parallel.config import ParallelConfig
from megatron_rl.weights.families.registry import read_model_config
from megatron_rl.weights.model_source import find_model

SIZES = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hf", required=True, metavar="DIR|NAME", help="directory or hub name")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR")
    for name in SIZES:
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, default=1, help="checked; any layout loads it"
        )
    parser.add_argument(
        "--dtype", choices=sorted(DTYPES), help="of all weights; as stored if left out"
    )
    return run_command(lambda: convert(parser.parse_args(arguments)))


def convert(options: argparse.Namespace) -> int:
    source = find_model(options.hf, "--hf")
    if source.megatron_dir is not None:
        raise InputError(f"--hf={options.hf!r}: it is a Megatron-Core checkpoint already")
    arch = read_model_config(source.config_dir)
    sizes = {name: getattr(options, name) for name in SIZES}
    # As experts under tensor parallelism are trained; it is nothing to a checkpoint.
    parallel = ParallelConfig(**sizes, sequence_parallel=options.tensor_model_parallel_size > 1)
    problems = [str(problem) for problem in model_problems(arch, parallel)]
    if problems:
        raise ConfigErrors(problems)
    with progress_bar("to Megatron") as bar:
        made = convert_to_megatron(
            source.config_dir,
            options.output,
            arch,
            tp=parallel.tensor_model_parallel_size,
            dtype=DTYPES.get(options.dtype),
            progress=bar,
        )
    print(made)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
