"""`megatron-rl grade`: the options of grading a file of responses."""

import argparse
from pathlib import Path

from megatron_rl.config import load_reward


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="a response and its answer per line or row")
    parser.add_argument("--output", type=Path, required=True, help="JSONL, written as a whole")
    parser.add_argument("--recipe", type=Path, help="take its section reward")
    parser.add_argument("--reward", metavar="KIND", help="short for reward.kind=KIND")
    parser.add_argument("--response-key", default="response", metavar="NAME")
    parser.add_argument(
        "--answer-key", metavar="NAME", help="default: by the layout of the columns, else answer"
    )
    parser.add_argument("--tokens-key", metavar="NAME", help="field with the response's length")
    parser.add_argument(
        "--opens-thought",
        action="store_true",
        help="the prompts ended in <think>: an answer comes after the response's </think>",
    )
    parser.add_argument("overrides", nargs="*", metavar="reward.key=value")


def run(options: argparse.Namespace) -> int:
    kind = [f"reward.kind={options.reward}"] if options.reward else []
    reward = load_reward(options.recipe, [*kind, *options.overrides])
    from megatron_rl.grade import GradeFields, grade_file

    fields = GradeFields(
        response=options.response_key,
        answer=options.answer_key,
        tokens=options.tokens_key,
        opens_thought=options.opens_thought,
    )
    grade_file(options.file, options.output, reward, fields)
    return 0
