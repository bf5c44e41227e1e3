"""`megatron-rl train | evaluate | plan`: the commands that a recipe describes."""

import argparse
from pathlib import Path

from megatron_rl.config import load_config


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")


def run(options: argparse.Namespace) -> int:
    """Read the recipe first: its problems are told before anything slow is imported."""
    config = load_config(options.recipe, options.overrides)
    if options.command == "plan":
        from megatron_rl.plan import print_inputs, print_plan

        print_plan(config)
        print_inputs(config)
        return 0
    from megatron_rl.session import evaluate_session, train_session

    {"train": train_session, "evaluate": evaluate_session}[options.command](config)
    return 0
