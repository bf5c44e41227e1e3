"""python -m megatron_rl <train|evaluate|plan> recipe.yaml section.key=value ...

Exit codes: 0 done, 2 a problem in recipe, data or model, 1 anything else.
"""

import argparse
import os
import sys
from pathlib import Path


def main() -> None:
    """Parse the command line and run the command."""
    parser = argparse.ArgumentParser(prog="megatron_rl", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, meaning in (
        ("train", "train a policy; start it with torchrun for more than one rank"),
        ("evaluate", "measure model.path on the recipe's benchmarks"),
        ("plan", "print layout, batch arithmetic, memory, passes and bytes; runs nothing"),
    ):
        command = commands.add_parser(name, help=meaning)
        command.add_argument("recipe", type=Path)
        command.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_args()
    sys.exit(_run(arguments.command, arguments.recipe, arguments.overrides))


def _run(command: str, recipe: Path, overrides: list[str]) -> int:
    from megatron_rl.config import load_config
    from megatron_rl.errors import ConfigErrors, InputError

    try:
        config = load_config(recipe, overrides)
        if command == "plan":
            from megatron_rl.plan import print_plan

            print_plan(config)
            return 0
        from megatron_rl.session import evaluate_session, train_session

        {"train": train_session, "evaluate": evaluate_session}[command](config)
    except (ConfigErrors, InputError) as error:
        # Every rank finds the same problem; one of them says it.
        if os.environ.get("RANK", "0") == "0":
            print(f"megatron_rl: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    main()
