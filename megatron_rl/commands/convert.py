"""`megatron-rl convert`: a Hugging Face model to a Megatron-Core checkpoint, and back; or its text.

megatron-rl convert to-megatron --hf DIR|NAME --output DIR     any layout loads the result
megatron-rl convert to-hf --megatron DIR --output DIR          saved at any layout
megatron-rl convert to-text --hf DIR|NAME --output DIR         the text of one that reads images
"""

import argparse
import re
from pathlib import Path

from megatron_rl.commands.terminal import add_ignored_fields, positive, progress_bar
from megatron_rl.errors import ConfigErrors, InputError
from megatron_rl.parallel.config import ParallelConfig

ENDS = ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage")
COUNTS = ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")
SIZES = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size")
DTYPES = ("bfloat16", "float16", "float32")  # as torch spells them


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    directions = parser.add_subparsers(dest="direction", required=True, metavar="DIRECTION")
    into = directions.add_parser("to-megatron", help="Hugging Face to Megatron-Core")
    into.add_argument("--hf", required=True, metavar="DIR|NAME", help="directory or hub name")
    for name in SIZES:
        into.add_argument(
            f"--{name.replace('_', '-')}",
            type=positive,
            default=1,
            help="checked; any layout loads it",
        )
    for name in ENDS:
        into.add_argument(f"--{name.replace('_', '-')}", type=positive, help="checked")
    for name in COUNTS:
        into.add_argument(f"--{name.replace('_', '-')}", action="store_true", help="checked")
    back = directions.add_parser("to-hf", help="Megatron-Core to Hugging Face")
    back.add_argument("--megatron", required=True, metavar="DIR", help="checkpoint, or run's")
    back.add_argument(
        "--hf-config",
        metavar="DIR|NAME",
        help="config.json and tokenizer, if the checkpoint has none",
    )
    back.add_argument(
        "--main-weights",
        action="store_true",
        help="the optimizer's float32 weights instead of the model's",
    )
    text = directions.add_parser("to-text", help="Hugging Face, images and text, to its text")
    text.add_argument("--hf", required=True, metavar="DIR|NAME", help="directory or hub name")
    for direction in (back, text):
        direction.add_argument(
            "--file-mib", type=positive, default=4096, help="size of one safetensors file"
        )
    for direction in (into, back, text):
        direction.add_argument("--output", required=True, type=Path, metavar="DIR")
    for direction in (into, back):
        add_ignored_fields(direction)
        direction.add_argument(
            "--dtype", choices=DTYPES, help="of all weights; as stored if left out"
        )


def run(options: argparse.Namespace) -> int:
    directions = {"to-megatron": _to_megatron, "to-hf": _to_hf, "to-text": _to_text}
    print(directions[options.direction](options))
    return 0


def _to_megatron(options: argparse.Namespace) -> Path:
    import torch

    from megatron_rl.conversion.to_megatron import convert_to_megatron
    from megatron_rl.megatron.refusals import model_problems
    from megatron_rl.parallel.refusals import uneven_problems
    from megatron_rl.weights.families.registry import read_model_config
    from megatron_rl.weights.model_source import find_model

    source = find_model(options.hf, "--hf")
    if source.megatron_dir is not None:
        raise InputError(f"--hf={options.hf!r}: it is a Megatron-Core checkpoint already")
    arch = read_model_config(source.config_dir, options.ignore_config_field)
    sizes = {name: getattr(options, name) for name in (*SIZES, *ENDS, *COUNTS)}
    # Experts under tensor parallelism are trained so; a checkpoint is the same either way.
    parallel = ParallelConfig(**sizes, sequence_parallel=options.tensor_model_parallel_size > 1)
    found = [*uneven_problems(parallel), *model_problems(arch, parallel)]
    if found:
        raise ConfigErrors([_as_typed(str(problem)) for problem in found])
    with progress_bar("to Megatron") as bar:
        return convert_to_megatron(
            source.config_dir,
            options.output,
            arch,
            tp=parallel.tensor_model_parallel_size,
            dtype=getattr(torch, options.dtype) if options.dtype else None,
            progress=bar,
        )


def _as_typed(problem: str) -> str:
    """A layout's problem with the way out as options of this command, in place of settings."""

    def option(found: re.Match[str]) -> str:
        name, value = "--" + found[1].replace("_", "-"), found[2]
        if value in ("null", "false"):
            return f"no {name}"
        return name if value == "true" else f"{name} {value}"

    field, _, rest = problem.partition(": ")
    return f"{field}: " + re.sub(r"parallel\.(\w+)=(\w+)", option, rest)


def _to_hf(options: argparse.Namespace) -> Path:
    import torch

    from megatron_rl.conversion.to_hf import convert_to_hf
    from megatron_rl.megatron.stored_files import MegatronCheckpoint
    from megatron_rl.weights.families.registry import read_model_config
    from megatron_rl.weights.model_source import find_model

    source = find_model(options.megatron, "--megatron", options.hf_config)
    if source.megatron_dir is None:
        raise InputError(f"--megatron={options.megatron!r}: no Megatron-Core checkpoint is there")
    arch = read_model_config(source.config_dir, options.ignore_config_field)
    output: Path = options.output
    with progress_bar("to Hugging Face") as bar:
        convert_to_hf(
            MegatronCheckpoint(source.megatron_dir, arch, main_weights=options.main_weights),
            source.config_dir,
            output,
            arch,
            dtype=getattr(torch, options.dtype) if options.dtype else None,
            file_bytes=options.file_mib << 20,
            progress=bar,
        )
    return output


def _to_text(options: argparse.Namespace) -> Path:
    from megatron_rl.conversion.to_text import convert_to_text
    from megatron_rl.weights.model_source import find_model

    source = find_model(options.hf, "--hf")
    if source.megatron_dir is not None:
        raise InputError(f"--hf={options.hf!r}: it is a Megatron-Core checkpoint")
    output: Path = options.output
    with progress_bar("to text") as bar:
        convert_to_text(source.config_dir, output, file_bytes=options.file_mib << 20, progress=bar)
    return output
