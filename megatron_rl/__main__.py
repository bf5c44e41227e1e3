"""python -m megatron_rl <train|evaluate|plan> recipe.yaml section.key=value ...
python -m megatron_rl grade FILE.jsonl --output OUT.jsonl reward.key=value ...

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
    _add_grade(commands.add_parser("grade", help="verify responses of a file; needs no model"))
    # argparse gives overrides that follow an option back as unknown.
    arguments, more = parser.parse_known_args()
    if any(text.startswith("-") for text in more):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    arguments.overrides += more
    sys.exit(_run(arguments))


def _add_grade(command: argparse.ArgumentParser) -> None:
    command.add_argument("file", type=Path, help="JSONL, one response and its answer per line")
    command.add_argument("--output", type=Path, required=True, help="JSONL, written as a whole")
    command.add_argument("--recipe", type=Path, help="take its section reward")
    command.add_argument("--reward", metavar="KIND", help="short for reward.kind=KIND")
    command.add_argument("--response-key", default="response", metavar="NAME")
    command.add_argument("--answer-key", default="answer", metavar="NAME")
    command.add_argument("--tokens-key", metavar="NAME", help="field with the response's length")
    command.add_argument("overrides", nargs="*", metavar="reward.key=value")


def _run(arguments: argparse.Namespace) -> int:
    from megatron_rl.errors import ConfigErrors, InputError

    try:
        _run_command(arguments)
    except (ConfigErrors, InputError) as error:
        # Every rank finds the same problem; one of them says it.
        if os.environ.get("RANK", "0") == "0":
            print(f"megatron_rl: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


def _run_command(arguments: argparse.Namespace) -> None:
    from megatron_rl.config import load_config, load_reward

    if arguments.command == "grade":
        from megatron_rl.grade import GradeFields, grade_file

        kind = [f"reward.kind={arguments.reward}"] if arguments.reward else []
        config = load_reward(arguments.recipe, [*kind, *arguments.overrides])
        fields = GradeFields(
            response=arguments.response_key,
            answer=arguments.answer_key,
            tokens=arguments.tokens_key,
        )
        grade_file(arguments.file, arguments.output, config, fields)
        return
    recipe = load_config(arguments.recipe, arguments.overrides)
    if arguments.command == "plan":
        from megatron_rl.plan import print_plan

        print_plan(recipe)
        return
    from megatron_rl.session import evaluate_session, train_session

    {"train": train_session, "evaluate": evaluate_session}[arguments.command](recipe)


if __name__ == "__main__":
    main()
