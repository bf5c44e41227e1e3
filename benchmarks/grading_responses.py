r"""The verifiers on responses of models that other people have labelled right or wrong.

    python benchmarks/grading_responses.py --data DIR \
        --output benchmarks/results/grading_responses.md

DIR holds two published files, of which either may be absent:

- example_model_solutions.jsonl of github.com/openai/grade-school-math: four models on GSM8K's test
  problems, each response labelled;
- mr-math_invalid_errors.json of github.com/GAIR-NLP/ReasonEval: four models on problems of MATH.
  People have read the responses; all of these answers are labelled right.

--answers FILE writes 1,000 of the answers alone, with gold answer and label, as the tests keep them
in tests/data/labelled_answers.jsonl. --verdicts FILE keeps every verdict; --before FILE, such a
file of another version of this program, lists what has changed since. Exit code 1 where a verdict
differs from a label that is right, or where a verdict that was right has become wrong.
"""

import argparse
import json
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rl.reward.config import RewardConfig
from megatron_rl.reward.extract import last_box
from megatron_rl.reward.gold import with_percent_sign
from megatron_rl.reward.scorer import RewardScorer

Row = dict[str, Any]
MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
ANSWER_LINE = re.compile(r"\nA: (.*)\Z")  # a response without it was cut
MATH_ANSWER = re.compile(
    r"(?:####|# Answer|The answer is:)\s*((?:(?!The answer is:).)+?)\.?\Z", re.S
)
WRONG_LABELS = {  # by hand
    "mr-math_invalid_errors.json:10 Abel13B-001": "csc x is not cot x",
    "mr-math_invalid_errors.json:50 Abel70B-001": "csc x is not cot x",
    "mr-math_invalid_errors.json:118 WizardMath13B-V1.0": "0.35625 does not recur: it is 57/160",
}

HEAD = """# Grading of labelled responses, measured

`python benchmarks/grading_responses.py --data DIR --output benchmarks/results/grading_responses.md`

Responses of models, whole and as published, with labels that do not come from this program. The
files are not in this repository; the script names them. Between the commits fc32745, before the
grader learned the spellings of typed mathematics, and this one no verdict on them has changed.

| | verifier | labelled right | said right | labelled wrong | said wrong |
|---|---|---|---|---|---|
"""


@dataclass(frozen=True, slots=True)
class Labelled:
    """One response, and whether its author's label says that it is right."""

    where: str  # file, line from 1, and model
    gold: str
    response: str
    is_right: bool


@dataclass(frozen=True, slots=True)
class Published:
    """A file, and the responses in a row of it."""

    name: str
    file: str
    responses: Callable[[Row], Iterator[tuple[str, str, str, bool]]]  # model, gold, text, label
    reward: dict[str, Any]

    def load(self, folder: Path) -> list[Labelled]:
        """Every response, in the order of the file."""
        lines = (folder / self.file).read_text(encoding="utf-8").splitlines()
        return [
            Labelled(f"{self.file}:{number} {model}", gold, text, is_right)
            for number, line in enumerate(lines, start=1)
            if line.strip()
            for model, gold, text, is_right in self.responses(json.loads(line))
        ]


def _gsm8k(row: Row) -> Iterator[tuple[str, str, str, bool]]:
    gold = row["ground_truth"].rsplit("A:", 1)[1].strip()
    for model in MODELS:
        yield model, gold, row[model]["solution"].rstrip(), row[model]["is_correct"]


def _gsm8k_in_lines(row: Row) -> Iterator[tuple[str, str, str, bool]]:
    for model, gold, text, is_right in _gsm8k(row):
        yield model, gold, ANSWER_LINE.sub(r"\nAnswer: \1", text), is_right


def _gsm8k_in_boxes(row: Row) -> Iterator[tuple[str, str, str, bool]]:
    for model, gold, text, is_right in _gsm8k(row):
        boxed = ANSWER_LINE.sub(lambda found: f"\nThe answer is $\\boxed{{{found[1]}}}$.", text)
        yield model, gold, boxed, is_right


def _mr_math(row: Row) -> Iterator[tuple[str, str, str, bool]]:
    gold = with_percent_sign(row["question"], row["ground_truth_answer"])
    text = MATH_ANSWER.sub(_as_box, row["model_output"].rstrip())
    yield row["generator"], gold, text, row["model_output_answer_correctness"] == "correct"


def _as_box(found: re.Match[str]) -> str:
    answer = found[1].strip().strip("$")
    return f"\nThe answer is $\\boxed{{{answer}}}$."


GSM8K = "example_model_solutions.jsonl"
IN_BOX: dict[str, Any] = {"kind": "math"}
PUBLISHED = (
    Published(
        "GSM8K, as written",
        GSM8K,
        _gsm8k,
        {"kind": "number", "answer_in": "response"},
    ),
    Published(
        "GSM8K, `A:` written `Answer:`",
        GSM8K,
        _gsm8k_in_lines,
        {"kind": "math", "answer_in": "answer_line"},
    ),
    Published("GSM8K, `A:` as a box", GSM8K, _gsm8k_in_boxes, IN_BOX),
    Published(
        "MATH, final line as a box",
        "mr-math_invalid_errors.json",
        _mr_math,
        IN_BOX,
    ),
)


def grade(responses: list[Labelled], reward: dict[str, Any]) -> list[str]:
    """The verdict of each response."""
    scorer = RewardScorer(RewardConfig(deadline_s=30.0, **reward))
    for number, each in enumerate(responses):
        scorer.submit((number, 0), each.response, each.gold)
    scores = scorer.collect()
    scorer.close()
    return [str(scores[number, 0].verdict) for number in range(len(responses))]


def sample(responses: list[Labelled], count: int) -> list[dict[str, Any]]:
    """What stands in the boxes of so many responses; answers that are no whole numbers first."""
    rows = [
        {"where": each.where, "gold": each.gold, "answer": box, "right": each.is_right}
        for each in responses
        if (box := last_box(each.response)) is not None and each.where not in WRONG_LABELS
    ]
    rows.sort(key=lambda row: (row["answer"].isdecimal(), zlib.crc32(row["where"].encode())))
    return sorted(rows[:count], key=lambda row: row["where"])


def changes(
    before: dict[str, str], now: dict[str, str], labels: dict[str, bool]
) -> tuple[list[str], list[str]]:
    """What has become right, and what has become wrong, as lines to read."""
    better, worse = [], []
    for where, verdict in now.items():
        was = before.get(where, verdict)
        if (was == "correct") != (verdict == "correct"):
            line = f"{where}: {was}, now {verdict}"
            (better if (verdict == "correct") == labels[where] else worse).append(line)
    return better, worse


def _argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    for name in ("--output", "--answers", "--verdicts", "--before"):
        parser.add_argument(name, type=Path)
    return parser


def _difference(where: str, each: Labelled, verdict: str) -> str:
    why, tail = WRONG_LABELS.get(each.where), " ".join(each.response[-60:].split())
    label = "right" if each.is_right else "wrong"
    line = f"- {where}: gold `{each.gold}`, labelled {label}, said {verdict}: `...{tail}`"
    return line + (f" The label is wrong: {why}." if why else "")


def _table_line(published: Published, counts: Counter[tuple[bool, bool]]) -> str:
    verifier = ", ".join(f"`{key}={value}`" for key, value in published.reward.items())
    cells = [
        f"{number:,}"
        for label in (True, False)
        for number in (counts[label, True] + counts[label, False], counts[label, label])
    ]
    return "| " + " | ".join([published.name, verifier, *cells]) + " |"


def main() -> None:
    """Write the table."""
    args = _argument_parser().parse_args()
    lines, different, worse = [], [], []
    in_boxes: list[Labelled] = []
    verdicts: dict[str, str] = {}
    labels: dict[str, bool] = {}
    bad = 0
    for published in PUBLISHED:
        if not (args.data / published.file).exists():
            print(f"{published.name}: no {published.file}")
            continue
        responses = published.load(args.data)
        in_boxes += responses if published.reward == IN_BOX else []
        counts: Counter[tuple[bool, bool]] = Counter()
        for each, verdict in zip(responses, grade(responses, published.reward), strict=True):
            where = f"{published.name}, {each.where}"
            verdicts[where], labels[where] = verdict, each.is_right
            counts[each.is_right, verdict == "correct"] += 1
            if (verdict == "correct") != each.is_right:
                bad += each.where not in WRONG_LABELS
                different.append(_difference(where, each, verdict))
        lines.append(_table_line(published, counts))
        print(lines[-1], flush=True)
    found = ["Every difference:", "", *different] if different else ["No differences."]
    print("\n".join(found))
    if args.answers:
        rows = sample(in_boxes, 1000)
        args.answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if args.verdicts:
        args.verdicts.write_text(json.dumps(verdicts, indent=0))
    if args.before:
        better, worse = changes(json.loads(args.before.read_text()), verdicts, labels)
        print(f"right now and not before: {len(better)}", *better, sep="\n")
        print(f"right before and not now: {len(worse)}", *worse, sep="\n")
    if args.output:
        args.output.write_text(HEAD + "\n".join([*lines, "", *found, ""]))
    sys.exit(bool(worse or bad))


if __name__ == "__main__":
    main()
