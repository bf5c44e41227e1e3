"""`megatron-rl prepare`: a prompt file (prompt, answer, source, id) out of published problems.

megatron-rl prepare --dataset math500 --output data/math500.jsonl
megatron-rl prepare --dataset gsm8k=train.jsonl extra.parquet --output data/train.parquet

A set is one of the known names, which is read from the Hugging Face hub; NAME=FILE for a local file
in that format; a file, a directory; or owner/name[:subset] of the hub. docs/data.md has the table.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import track

from megatron_rl.commands.published import PUBLISHED
from megatron_rl.commands.terminal import positive
from megatron_rl.prompts.rows import Row
from megatron_rl.prompts.source import OpenedData
from megatron_rl.prompts.tokenizer import Tokenizer, load_tokenizer, local_tokenizer_dir

if TYPE_CHECKING:  # it imports torch, which help can do without
    from megatron_rl.commands.prompt_files import SourceReport


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.add_argument(
        "--dataset",
        nargs="+",
        required=True,
        metavar="SET",
        help=f"{', '.join(PUBLISHED)}; NAME=FILE; a file; owner/name[:subset]",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.jsonl|.parquet")
    parser.add_argument("--split", help="of hub data sets; default: each set's own")
    parser.add_argument("--prompt-key", metavar="COLUMN", help="column with the problem")
    parser.add_argument("--answer-key", metavar="COLUMN", help="column with the answer")
    parser.add_argument(
        "--answers",
        choices=("math", "text"),
        default="math",
        help="math: leave out answers that reward.kind=math could not match; text: take them all",
    )
    parser.add_argument(
        "--tokenizer", metavar="MODEL", help="directory or hub name; without it no length limit"
    )
    parser.add_argument("--max-prompt-tokens", type=positive, default=700, metavar="N")
    parser.add_argument("--max-problems", type=positive, metavar="N", help="a random subset")
    parser.add_argument(
        "--held-out",
        nargs="+",
        default=[],
        metavar="SET",
        help="sets, named as for --dataset, whose problems are left out: benchmarks of the run",
    )
    parser.add_argument("--seed", type=seed, default=0, help="of that subset")


def run(options: argparse.Namespace) -> int:
    from megatron_rl.commands.prompt_files import Preparation, manifest_path, prepare

    settings = Preparation(
        datasets=tuple(options.dataset),
        split=options.split,
        prompt_key=options.prompt_key,
        answer_key=options.answer_key,
        is_math=options.answers == "math",
        tokenizer=tokenizer_of(options.tokenizer),
        max_prompt_tokens=options.max_prompt_tokens,
        max_problems=options.max_problems,
        seed=options.seed,
        held_out=tuple(options.held_out),
    )
    reports = prepare(settings, options.output, progress)
    for report in reports:
        show(report)
    kept = sum(report.num_kept for report in reports)
    written = min(kept, options.max_problems or kept)
    print(f"{written} problems in {options.output}")
    print(f"manifest: {manifest_path(options.output)}")
    return 0


def tokenizer_of(model: str | None) -> Tokenizer | None:
    return None if model is None else load_tokenizer(local_tokenizer_dir(model))


def seed(text: str) -> int:
    number = int(text)
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 0 and less than 2**32")
    return number


def progress(rows: Iterable[Row | None], opened: OpenedData) -> Iterable[Row | None]:
    console = Console(stderr=True)
    return track(
        rows,
        description=opened.name,
        total=opened.num_records,
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def show(report: "SourceReport") -> None:
    where = report.where + (f" at {report.revision}" if report.revision else "")
    print(f"{report.name}: {report.num_kept} of {report.num_read} rows of {where}")
    print(f"  layout: {report.layout}")
    if report.note:
        print(f"  {report.note}")
    for reason, dropped in sorted(report.dropped.items(), key=lambda item: -item[1].count):
        print(f"  {dropped.count:6}  {reason}, such as {'; '.join(dropped.examples)}")
