"""`megatron-rl train | evaluate | plan`: the commands that a recipe describes."""

import argparse
from pathlib import Path

from megatron_rl.config import load_config
from megatron_rl.parallel.config import MAX_RANKS


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    if parser.prog.endswith(" plan"):
        parser.add_argument(
            "--rehearse",
            action="store_true",
            help="run an update of one rank of the layout without numbers: exact memory and bytes "
            "of a GPU that need not be there",
        )
        parser.add_argument(
            "--rank",
            type=int,
            metavar="R",
            help="the rank to rehearse (default: one of the first and one of the last stage)",
        )
        parser.add_argument(
            "--layouts",
            type=_ranks,
            metavar="N",
            help="print layouts of the model on N GPUs that fit, the one that should be fastest "
            "first, as settings for the recipe; its own layout is not looked at",
        )
        parser.add_argument(
            "--gpu-memory",
            type=_gib,
            metavar="GIB",
            help="GiB of the GPU that the plan is for, where none is here (default: 79.6, as one "
            "of 80 GB has)",
        )


def _gib(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 <= value <= 2**20:
        raise argparse.ArgumentTypeError(f"{text}: name the GiB of a GPU, for example 79.6")
    return value


def _ranks(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MAX_RANKS:
        raise argparse.ArgumentTypeError(f"{text}: name a number of GPUs, for example 64")
    return int(text)


def run(options: argparse.Namespace) -> int:
    """Read the recipe first: its problems are told before anything slow is imported."""
    config = load_config(options.recipe, options.overrides)
    if options.command == "plan":
        from megatron_rl.plan import (
            H100_GIB,
            print_inputs,
            print_plan,
            print_rehearsal,
            settled_plan,
        )

        gpu_gib = options.gpu_memory or H100_GIB
        if options.layouts:
            from megatron_rl.plan import print_layouts

            print_layouts(config, options.layouts, gpu_gib=gpu_gib)
            return 0
        config = settled_plan(config, gpu_gib=gpu_gib)
        print_plan(config, gpu_gib=gpu_gib)
        if options.rehearse:
            print_rehearsal(config, options.rank)
        print_inputs(config)
        return 0
    from megatron_rl import collector

    collector.look_seldom()  # before anything large is imported
    from megatron_rl.session import evaluate_session, train_session

    {"train": train_session, "evaluate": evaluate_session}[options.command](config)
    return 0
