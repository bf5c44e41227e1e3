"""Published sets of mathematics problems: where they are, and which column holds what."""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_rl.errors import InputError
from megatron_rl.prompts.rows import column_list, preview
from megatron_rl.prompts.source import HUB_NAME
from megatron_rl.reward.extract import last_box
from megatron_rl.reward.gold import is_placeholder

_VALID = ("yes", "true", "valid", "1", "1.0")
# Each ends a worked solution, and the answer follows: in MATH as PRM800K splits it, in GSM8K.
_MARKERS = ("The answer is:", "####")


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """One set; where several columns are named, the first that its rows have is read."""

    path: str  # "owner/name" or "owner/name:subset" on the Hugging Face hub, or local
    split: str  # of a hub data set
    prompt: tuple[str, ...] = ("problem", "question", "prompt")
    answer: tuple[str, ...] = ("answer", "final_answer")
    solution: tuple[str, ...] = ("solution",)  # read for its box where there is no answer


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
        return name, Published(
            path=path,
            split=known.split,
            prompt=known.prompt,
            answer=known.answer,
            solution=known.solution,
        )
    if dataset in PUBLISHED:
        return dataset, PUBLISHED[dataset]
    if not (Path(dataset).expanduser().exists() or HUB_NAME.fullmatch(dataset)):
        near = difflib.get_close_matches(name, PUBLISHED, n=3)
        hint = f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(PUBLISHED)}."
        raise InputError(
            f"--dataset {dataset!r}: no known data set, no file and no owner/name of the hub. "
            f"{hint} A local file in a known format is given as NAME=FILE"
        )
    return dataset, Published(path=dataset, split="train")


def choose_columns(first: Mapping[str, object], published: Published, where: str) -> "Chosen":
    """The columns to read, by the first row; InputError where there is no such column."""
    prompt = next((name for name in published.prompt if name in first), None)
    answer = next((name for name in published.answer if name in first), None)
    solution = next((name for name in published.solution if name in first), None)
    if prompt is None:
        raise _missing(where, "--prompt-key", published.prompt, first)
    if answer is None and solution is None:
        raise _missing(where, "--answer-key", published.answer + published.solution, first)
    return Chosen(prompt=prompt, answer=answer, solution=solution)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """The columns that one set has."""

    prompt: str
    answer: str | None
    solution: str | None

    def answer_of(self, fields: Mapping[str, object]) -> str | None:
        """The final answer of a row: the column's, else the box of the solution, else None."""
        if self.answer is not None:
            answer = final_answer(fields.get(self.answer))
            if answer is not None and not is_placeholder(answer):
                return answer
        worked = fields.get(self.solution or "")
        return last_box(worked) if isinstance(worked, str) else None


def why_invalid(fields: Mapping[str, object]) -> str | None:
    """What the set itself says against a row; None where it says nothing.

    NuminaMath-1.5 has problem_is_valid and solution_is_valid ("Yes", "Incomplete", ...), and a
    question_type that may be "proof".
    """
    for name, value in fields.items():
        if isinstance(name, str) and name.endswith("is_valid") and value is not None:
            says = str(value).strip().casefold()
            if says not in _VALID:
                return f"{name}={preview(value)}"
    kind = fields.get("question_type")
    is_proof = isinstance(kind, str) and kind.strip().casefold() == "proof"
    return "question_type='proof'" if is_proof else None


def final_answer(value: object) -> str | None:
    r"""The answer in a column that may hold a worked solution; None where it holds none.

    Examples: 27.0 -> "27"; "9 * 2 = 18\n#### 18" -> "18"; ["$69$", "$84$"] -> "$69$, $84$";
    "So \boxed{x} is it." -> "x".
    """
    if isinstance(value, list | tuple):
        parts = [final_answer(item) for item in value]
        return ", ".join(filter(None, parts)) if parts and all(parts) else None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    if not isinstance(value, str):
        if not math.isfinite(value):
            return None
        return str(int(value)) if value == int(value) else str(value)
    for marker in _MARKERS:
        if marker in value:
            return value.rpartition(marker)[2].strip() or None
    if "\\boxed" in value:
        return last_box(value)
    return value.strip() or None


def _missing(
    where: str, option: str, tried: tuple[str, ...], first: Mapping[str, object]
) -> InputError:
    return InputError(
        f"{where}: no column {' or '.join(map(repr, tried))}; the first row has "
        f"{column_list(first)}. Name the column with {option}"
    )
