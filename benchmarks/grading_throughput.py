"""Responses graded per second on two cores, beside math-verify used as other trainers use it.

    python benchmarks/grading_throughput.py --data ../shared/data

Responses are put together from published worked solutions up to 16 KiB (about 4096 tokens) and end
in a box: half right (half of those in another spelling), half wrong (a digit off, or another
problem's answer). Eight to a prompt, as rollouts come. All graders get the same responses in the
same process and take turns; the peers get a sample of them, since they need so long.
"""

import argparse
import json
import random
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from grading_data import BENCHMARKS, Case, load_cases
from grading_respell import near_miss, respell
from grading_table import same_number
from math_verify import parse, verify
from measure import describe_machine

from megatron_rl.reward.answers import decide
from megatron_rl.reward.config import RewardConfig
from megatron_rl.reward.math_grader import grade
from megatron_rl.reward.scorer import RewardScorer

CHARS = 16 * 1024
GROUP = 8
NUM_WORKERS = 2
MIXES = {  # numbers into BENCHMARKS; the exact layers decide arithmetic alone
    "competition and school (MATH-500, OlympiadBench, AIME, AMC, GSM8K)": (0, 2, 3, 5, 6),
    "expressions (MATH-500, Minerva, OlympiadBench)": (0, 1, 2),
}


@dataclass(frozen=True, slots=True)
class Response:
    """A text to grade, its gold, and whether it is right by construction."""

    text: str
    gold: str
    is_right: bool


def make_responses(cases: Sequence[Case], number: int, rng: random.Random) -> list[Response]:
    """Groups of eight to a prompt, prompts drawn without replacement as long as there are any."""
    solutions = [case.response.replace("\\boxed", "") for case in cases if case.is_solution]
    prompts = rng.sample(cases, len(cases)) * (number // (GROUP * len(cases)) + 1)
    responses = []
    for case in prompts[: number // GROUP]:
        for member in range(GROUP):
            body = ""
            while len(body) < CHARS:
                body += rng.choice(solutions) + "\n\n"
            answer, is_right = _answer(case, cases, member, rng)
            text = f"{body[: CHARS - 600]}\nSo the answer is $\\boxed{{{answer}}}$."
            responses.append(Response(text, case.gold, is_right))
    return responses


def _answer(case: Case, cases: Sequence[Case], member: int, rng: random.Random) -> tuple[str, bool]:
    if member < GROUP // 2:
        return (respell(case.gold, rng) if member % 2 else None) or case.gold, True
    wrong = near_miss(case.gold, rng) if member % 2 else None
    other = wrong or rng.choice(cases).gold
    return other, same_number(other, case.gold)


class Ours:
    """The scorer with two workers; everything submitted at once, so that nothing overlaps."""

    name = "ours, 2 workers"

    def __init__(self) -> None:
        self._scorer = RewardScorer(RewardConfig(num_workers=NUM_WORKERS))
        self.worker_seconds = 0.0  # CPU of the workers in the last call

    def __call__(self, responses: Sequence[Response]) -> list[bool]:
        for number, response in enumerate(responses):
            self._scorer.submit((number, 0), response.text, response.gold)
        scores = self._scorer.collect()
        by_pair = {
            pair: scores[number, 0].seconds
            for number, response in enumerate(responses)
            if (pair := grade(response.text, response.gold).pair) is not None
        }
        self.worker_seconds = sum(by_pair.values())
        return [str(scores[number, 0].verdict) == "correct" for number in range(len(responses))]

    def close(self) -> None:
        self._scorer.close()


class BareMathVerify:
    """math-verify as documented, one response after the other in this process."""

    name = "math-verify, one process"
    worker_seconds = 0.0

    def __call__(self, responses: Sequence[Response]) -> list[bool]:
        return [_math_verify(response) for response in responses]

    def close(self) -> None:
        pass


class PooledMathVerify:
    """One task per response in a pool of two processes, as trainers do it."""

    name = "math-verify, pool of 2"
    worker_seconds = float("nan")  # the pool does not tell

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(NUM_WORKERS)

    def __call__(self, responses: Sequence[Response]) -> list[bool]:
        return list(self._pool.map(_math_verify, responses, chunksize=1))

    def close(self) -> None:
        self._pool.shutdown()


def _math_verify(response: Response) -> bool:
    """Gold parsed, whole response parsed, its own time-outs."""
    return bool(verify(parse(f"${response.gold}$"), parse(response.text)))


def measure(responses: list[Response], args: argparse.Namespace) -> dict[str, object]:
    """Rates of all graders, in turns."""
    pairs = [grade(response.text, response.gold).pair for response in responses]
    needed = [pair for pair in pairs if pair is not None]
    sample = responses[:: max(1, len(responses) // args.peer_responses)]
    graders = [Ours(), BareMathVerify(), PooledMathVerify()]
    rounds: dict[str, list[tuple[float, float, float]]] = {each.name: [] for each in graders}
    for grader in graders:
        grader(sample[:8])  # warm
    for _ in range(args.rounds):
        decide.cache_clear()  # as if no iteration had been before
        for grader in graders:
            given = responses if isinstance(grader, Ours) else sample
            rounds[grader.name].append(_once(grader, given))
    for grader in graders:
        grader.close()
    columns = {name: zip(*values, strict=True) for name, values in rounds.items()}
    summary = {name: [median(column) for column in found] for name, found in columns.items()}
    return {
        "responses": len(responses),
        "need a worker": f"{len(needed) / len(responses):.1%}, {len(set(needed))} distinct pairs",
        "graders": {
            name: {
                "responses per second": round(rate),
                "CPU per response, us": None if cpu != cpu else round(1e6 * cpu),
                "verdicts as constructed": f"{agreement:.2%}",
            }
            for name, (rate, cpu, agreement) in summary.items()
        },
    }


def _once(
    grader: Ours | BareMathVerify | PooledMathVerify, responses: Sequence[Response]
) -> tuple[float, float, float]:
    """(responses per second, CPU seconds per response, share of verdicts as constructed)."""
    cpu, wall = time.process_time(), time.perf_counter()
    verdicts = grader(responses)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    agree = sum(a == r.is_right for a, r in zip(verdicts, responses, strict=True))
    number = len(responses)
    return number / wall, (cpu + grader.worker_seconds) / number, agree / number


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--responses", type=int, default=4096)
    parser.add_argument("--peer-responses", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    results: dict[str, object] = {"machine": describe_machine("cpu")}
    for name, numbers in MIXES.items():
        cases = [c for n in numbers for c in load_cases(BENCHMARKS[n], args.data)]
        responses = make_responses(cases, args.responses, random.Random(0))
        results[name] = measure(responses, args)
        print(json.dumps({name: results[name]}, indent=2), flush=True)
    if args.output:
        args.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
