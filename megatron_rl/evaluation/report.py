"""An evaluation as people and programs read it: a table, JSON, and a line per question."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_rl.evaluation.measures import (
    NO_ANSWER,
    OF_VERDICTS,
    TOKENS,
    TRUNCATED,
    BenchmarkResult,
    Measured,
)
from megatron_rl.evaluation.question import Question
from megatron_rl.prompts.rows import json_line
from megatron_rl.types import Verdict

OVERALL = "overall"


MANY = 0.5
"""The share of responses without an answer from which on a person is told of it."""

NEARLY_ALL = 0.95
"""The same of the first responses that a run trains on, which has yet to learn the form."""

HOW_TO_ASK = (
    "The model may not have been asked for one in the form that the reward looks for: see the "
    "first prompt, prompts.system, prompts.instruction, prompts.template and reward.answer_in"
)

BECAME = {  # what became of a response, and the way out where most became that
    Verdict.NO_ANSWER: ("held no answer to grade", HOW_TO_ASK),
    Verdict.WRONG: (
        "were wrong",
        "Use easier prompts, more responses of each (rollout.group_size), or a model that is right "
        "now and then",
    ),
    Verdict.CORRECT: ("were correct", "Use harder prompts"),
    Verdict.TIMEOUT: ("took too long to grade", "Raise reward.deadline_s"),
    Verdict.ERROR: ("could not be graded", "See the failures above"),
}


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The result on every benchmark, and their average."""

    samples: int
    confidence: float
    benchmarks: Mapping[str, BenchmarkResult]
    overall: Mapping[str, Measured]  # the benchmarks' average; empty with one benchmark

    @classmethod
    def empty(cls) -> "Evaluation":
        """The result where there are no benchmarks."""
        return cls(samples=0, confidence=0.0, benchmarks={}, overall={})

    def metrics(self) -> dict[str, float]:
        """The results at k = samples as metrics of a run, by name."""
        k = self.samples
        of_k = {f"average_at_{k}", f"pass_at_{k}", f"majority_at_{k}"}
        shown = of_k | {TRUNCATED, TOKENS, *OF_VERDICTS.values()}
        return {
            f"evaluation/{name}/{key}": measured.value
            for name, columns in self._rows().items()
            for key, measured in columns.items()
            if key in shown
        }

    def table(self) -> list[str]:
        """The results as lines of text, and why they are low where hardly anything was graded."""
        k = self.samples
        measures = {
            f"average_at_{k}": f"average@{k}",
            f"pass_at_{k}": f"pass@{k}",
            f"majority_at_{k}": f"maj@{k}",
        }
        shares = {
            OF_VERDICTS[Verdict.WRONG]: "wrong",
            NO_ANSWER: "no answer",
            TRUNCATED: "truncated",
        }
        header = "".join(f"  {title:<18}" for title in measures.values())
        titles = "".join(f" {title:>9}" for title in (*shares.values(), "timeouts", "errors"))
        lines = [f"{'benchmark':24} {'problems':>8}{header}{titles}  tokens"]
        for name, row in self._rows().items():
            result = self.benchmarks.get(name)
            failures: Sequence[object] = ("", "")
            if result is not None:
                failures = (result.verdicts[Verdict.TIMEOUT], result.verdicts[Verdict.ERROR])
            cells = "".join(f"  {_percent(row.get(key)):<18}" for key in measures)
            parts = "".join(f" {100 * row[key].value:>9.1f}" for key in shares)
            counts = "".join(f" {count:>9}" for count in failures)
            problems = "" if result is None else result.num_questions
            lines.append(f"{name:24} {problems:>8}{cells}{parts}{counts}  {row[TOKENS].value:.0f}")
        lines.append(
            f"in brackets: {self.confidence:.0%} intervals, bootstrapped over problems; wrong, no "
            "answer, truncated: % of the responses; timeouts, errors: responses that could not be "
            "verified, counted as not correct"
        )
        return lines + self.warnings()

    def warnings(self) -> list[str]:
        """A line for each benchmark of which half of the responses or more hold no answer."""
        return [line for each in self.benchmarks.items() for line in _explained(*each)]

    def to_json(self) -> dict[str, object]:
        return {
            "samples": self.samples,
            "confidence": self.confidence,
            "benchmarks": {
                name: {
                    "num_problems": result.num_questions,
                    "num_failed": result.num_failed,
                    "verdicts": {str(verdict): n for verdict, n in result.verdicts.items()},
                    **{key: asdict(measured) for key, measured in result.measured.items()},
                }
                for name, result in self.benchmarks.items()
            },
            OVERALL: {key: asdict(measured) for key, measured in self.overall.items()},
        }

    def _rows(self) -> dict[str, Mapping[str, Measured]]:
        rows = {name: result.measured for name, result in self.benchmarks.items()}
        return rows | ({OVERALL: self.overall} if self.overall else {})


def _explained(name: str, result: BenchmarkResult) -> list[str]:
    """Why the accuracy on a benchmark says little, where half of the responses hold no answer."""
    share = result.measured[NO_ANSWER].value
    if share < MANY:
        return []
    without = f"{name}: {share:.0%} of the responses hold no answer to grade"
    if 2 * result.num_cut_short >= result.verdicts[Verdict.NO_ANSWER]:
        return [f"{without}, most of them cut at the limit. Raise evaluation.max_response_tokens"]
    return [f"{without}. {HOW_TO_ASK}"]


def unanswered(values: Mapping[str, float], iteration: int) -> list[str]:
    """A line after the first iteration of a run whose responses hold hardly any answer."""
    share = values.get(f"reward/verdict_{Verdict.NO_ANSWER}_frac", 0.0)
    if iteration > 1 or share < NEARLY_ALL:
        return []
    return [f"{share:.0%} of the responses hold no answer to grade. {HOW_TO_ASK}"]


def untrained(verdicts: Mapping[Verdict, int]) -> str:
    """Why a run took no optimizer step, by how often each verdict was passed in all of it."""
    drawn = sum(verdicts.values())
    told = "no optimizer step was taken in any iteration, so the model is the one it began with"
    if not drawn:
        return told
    often = sorted((one for one in BECAME if verdicts.get(one)), key=lambda one: -verdicts[one])
    became = ", ".join(f"{verdicts[one]} {BECAME[one][0]}" for one in often)
    return (
        f"{told}: nothing was left to train on. Of {drawn} responses {became}. "
        f"{BECAME[often[0]][1]}"
    )


def write_questions(questions: Sequence[Question], file: Path) -> None:
    """Write a line of JSON for each question; text stays readable, whatever its language."""
    _write(file, "".join(json_line(_fields(question)) for question in questions))


def write_summary(summary: Mapping[str, object], file: Path) -> None:
    _write(file, json.dumps(summary, indent=2) + "\n")


def _fields(question: Question) -> dict[str, object]:
    fields = asdict(question)
    texts = fields.pop("responses")  # last: they are long
    return fields | {"num_correct": question.num_correct, "responses": texts}


def _write(file: Path, text: str) -> None:
    """Write the file as a whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    # Half a surrogate pair cannot be encoded: it becomes \udXXX, which is how JSON writes it.
    partial.write_text(text, encoding="utf-8", errors="backslashreplace")
    partial.replace(file)


def _percent(measured: Measured | None) -> str:
    if measured is None:
        return "-"
    value, low, high = (100 * share for share in (measured.value, measured.low, measured.high))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"
