"""Published sets of mathematics problems: where they are, and which column holds what."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_rl.errors import InputError
from megatron_rl.prompts.layouts import MISSING, Layout, find, no_layout, recognise
from megatron_rl.prompts.rows import column_list
from megatron_rl.prompts.source import HUB_NAME


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """One set; where several columns are named, the first that its rows have is read.

    Without any, the columns are known by their layout (prompts/layouts.py).
    """

    path: str  # "owner/name" or "owner/name:subset" on the Hugging Face hub, or local
    split: str  # of a hub data set
    prompt: tuple[str, ...] = ("problem", "question", "prompt")
    answer: tuple[str, ...] = ("answer", "final_answer")
    solution: tuple[str, ...] = ("solution",)  # read for its box where there is no answer
    joins: bool = False  # a list of several answers is one answer in parts


PUBLISHED: dict[str, Published] = {
    "numina_math": Published(path="ScaleML-RLHF/numina_math", split="train"),
    "math": Published(
        path="DigitalLearningGmbH/MATH-lighteval", split="train", answer=(), prompt=("problem",)
    ),
    "math500": Published(path="HuggingFaceH4/MATH-500", split="test"),
    "minerva_math": Published(path="math-ai/minervamath", split="test"),
    "olympiadbench": Published(
        path="Hothan/OlympiadBench:OE_TO_maths_en_COMP",
        split="train",
        prompt=("question",),
        answer=("final_answer",),
        solution=(),
        joins=True,
    ),
    "gsm8k": Published(
        path="openai/gsm8k:main", split="train", prompt=("question",), answer=("answer",)
    ),
    "aime24": Published(path="HuggingFaceH4/aime_2024", split="train"),
    "amc23": Published(path="math-ai/amc23", split="test"),
}
"""Name -> the hub's copy. A local file of the same columns is given as name=FILE."""


def find_published(dataset: str) -> tuple[str, Published]:
    """Name and columns of what --dataset gives: a name of the table, name=PATH, or a path."""
    name, equals, path = dataset.partition("=")
    if equals and name in PUBLISHED:
        known = PUBLISHED[name]
        return name, replace(known, path=path)
    if dataset in PUBLISHED:
        return dataset, PUBLISHED[dataset]
    if not (Path(dataset).expanduser().exists() or HUB_NAME.fullmatch(dataset)):
        near = difflib.get_close_matches(name, PUBLISHED, n=3)
        hint = f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(PUBLISHED)}."
        raise InputError(
            f"--dataset {dataset!r}: no known data set, no file and no owner/name of the hub. "
            f"{hint} A local file in a known format is given as NAME=FILE"
        )
    return dataset, Published(path=dataset, split="train", prompt=(), answer=(), solution=())


def layout_of(
    published: Published,
    first: Sequence[object],
    where: str,
    prompt_key: str | None,
    answer_key: str | None,
) -> Layout:
    """The columns to read: those that were named, else the set's own, else by their layout.

    Raises:
        InputError: the first rows have no such columns.
    """
    record = next((record for record in first if isinstance(record, Mapping)), {})
    for option, column in (("--prompt-key", prompt_key), ("--answer-key", answer_key)):
        if column is not None and find(record, column) is MISSING:
            raise _missing(where, option, (column,), record)
    if not published.prompt:
        layout = recognise(first, prompt_key, answer_key)
        if layout is None:
            raise no_layout(where, first, "Name the columns with --prompt-key and --answer-key")
        # A column that was named may still hold worked solutions, of which the answer is wanted.
        return replace(layout, as_it_stands=False)
    prompt = prompt_key or next((name for name in published.prompt if name in record), None)
    answer = answer_key or next((name for name in published.answer if name in record), None)
    solution = next((name for name in published.solution if name in record), None)
    if prompt is None:
        raise _missing(where, "--prompt-key", published.prompt, record)
    if answer is None and solution is None:
        raise _missing(where, "--answer-key", published.answer + published.solution, record)
    return Layout(
        name="its own",
        prompt=prompt,
        answers=() if answer is None else (answer,),
        solution=solution if answer_key in (None, *published.answer) else None,
        joins=published.joins,
    )


def _missing(
    where: str, option: str, tried: tuple[str, ...], first: Mapping[str, object]
) -> InputError:
    return InputError(
        f"{where}: no column {' or '.join(map(repr, tried))}; the first row has "
        f"{column_list(first)}. Name the column with {option}"
    )
