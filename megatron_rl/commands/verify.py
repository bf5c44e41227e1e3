"""`megatron-rl verify`: compares two checkpoints of either kind.

megatron-rl verify A B     every tensor, then the logits on real tokens

Exit code 0: the same; 1: not the same; 2: they cannot be compared.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_rl.commands.terminal import (
    add_ignored_fields,
    not_negative,
    progress_bar,
    silence_libraries,
)
from megatron_rl.errors import InputError
from megatron_rl.files import read_text

if TYPE_CHECKING:  # it imports torch, which help can do without
    from megatron_rl.weights.arch import ModelArch
    from megatron_rl.weights.model_source import ModelSource

SAME, DIFFERENT = 0, 1


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.add_argument("a", metavar="A", help="directory or hub name")
    parser.add_argument("b", metavar="B", help="directory or hub name")
    parser.add_argument(
        "--tolerance",
        type=not_negative,
        help="largest difference of two elements; bits and dtypes must be equal if left out",
    )
    parser.add_argument("--skip-logits", action="store_true", help="compare the tensors only")
    parser.add_argument(
        "--logits-tolerance",
        type=not_negative,
        default=1e-4,
        help="largest difference of two logits, as a share of the largest logit if that is over 1",
    )
    parser.add_argument("--text", type=Path, metavar="FILE", help="what the models read")
    parser.add_argument(
        "--hf-config", metavar="DIR|NAME", help="config.json and tokenizer of Megatron checkpoints"
    )
    add_ignored_fields(parser)


def run(options: argparse.Namespace) -> int:
    from megatron_rl.conversion.compare import differences_of_arch
    from megatron_rl.weights.families.registry import read_model_config
    from megatron_rl.weights.model_source import find_model

    text = None if options.text is None else _read(options.text)
    sources = [
        find_model(path, name, options.hf_config)
        for name, path in (("A", options.a), ("B", options.b))
    ]
    ignored = options.ignore_config_field
    archs = [read_model_config(source.config_dir, ignored) for source in sources]
    differences = list(differences_of_arch(*archs))
    if differences:
        print(f"models   different: {'; '.join(differences)}")
        return DIFFERENT
    are_same = has_same_tensors(sources, archs[0], options.tolerance)
    if not options.skip_logits:
        are_same &= has_same_logits(sources, archs[0], text, options.logits_tolerance)
    return SAME if are_same else DIFFERENT


def _read(file: Path) -> str:
    try:
        return read_text(file)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--text {file}: cannot be read ({error})") from error


def has_same_tensors(
    sources: list["ModelSource"], arch: "ModelArch", tolerance: float | None
) -> bool:
    from megatron_rl.conversion.compare import compare_weights
    from megatron_rl.megatron.stored_files import open_weights

    with progress_bar("comparing") as bar:
        found = compare_weights(
            open_weights(sources[0], arch),
            open_weights(sources[1], arch),
            arch,
            tolerance=tolerance,
            progress=bar,
        )
    if not found.differing:
        how = "bit for bit" if tolerance is None else f"within {tolerance:g}"
        print(f"tensors  {found.num_tensors} equal {how}")
        return True
    print(
        f"tensors  {len(found.differing)} of {found.num_tensors} differ, by up to {found.largest:g}"
    )
    print(f"         first: {found.first}")
    return False


def has_same_logits(
    sources: list["ModelSource"], arch: "ModelArch", text: str | None, tolerance: float
) -> bool:
    silence_libraries()
    from megatron_rl.conversion.logits import logits_of, tokens_of

    tokens = tokens_of(sources[0], arch, text)
    one, other = (logits_of(source, arch, tokens) for source in sources)
    gap, largest = float((one - other).abs().max()), float(one.abs().max())
    changed = int((one.argmax(-1) != other.argmax(-1)).sum())
    print(
        f"logits   differ by up to {gap:.1e}, the largest being {largest:.1f}; the likeliest token "
        f"differs in {changed} of {len(tokens)} places"
    )
    return gap <= tolerance * max(1.0, largest)
