"""What the policy as engine saves by repeating recorded steps: with and without, in turns.

    OMP_NUM_THREADS=1 python benchmarks/repeated_steps.py
    OMP_NUM_THREADS=1 python benchmarks/repeated_steps.py --case vocabulary --turns 7
    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/repeated_steps.py --tp 2

Eight responses of 32 tokens to each prompt, which end there. The first calls, in which steps are
recorded, are not counted, but for the column that says how long a call with them took. Both ways
must give the same tokens and log-probs, to the bit.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from compare import CASES, _model
from measure import describe_machine
from update_time import make_policy

GROUP_SIZE, PROMPT_TOKENS, RESPONSE_TOKENS = 8, 12, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=CASES, default="tiny")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--turns", type=int, default=11)
    options = parser.parse_args()
    from megatron_rl.megatron.enter import enter
    from megatron_rl.parallel.groups import init_distributed
    from megatron_rl.platforms.base import detect

    platform = detect()
    enter(platform)
    init_distributed(platform)
    is_first = os.environ.get("RANK", "0") == "0"
    if is_first:
        print(json.dumps(describe_machine("cpu")))
        print("| case | responses | recorded in, s | repeated, s | run anew, s | anew / repeated |")
        print("|---|---|---|---|---|---|")
    line = measured(options.case, options.tp, options.turns)
    if is_first:
        print(line)


def measured(name: str, tp: int, turns: int) -> str:
    """A line of the table; every rank calls it."""
    from megatron_rl.rollout.recorded import Recordings

    def run_anew(self: Any, key: Any, function: Callable[..., Any], *inputs: Any) -> Any:
        return function(*inputs)

    case = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        engine = engine_of(_model(case, Path(folder)), tp)
    prompts = case.prompts // 2  # a rank's share of them, where two divide an iteration

    def timed() -> tuple[float, Any]:
        began = time.perf_counter()
        told = generate(engine, prompts)
        return time.perf_counter() - began, told

    warm = [timed()[0] for _ in range(4)]  # run, recorded, and repeated
    pairs = []
    for _ in range(turns):
        repeated, told = timed()
        with mock.patch.object(Recordings, "run", run_anew):
            anew, expected = timed()
        assert told == expected, "a repeated step gave something else"
        pairs.append((repeated, anew))
    ours, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(anew / repeated for repeated, anew in pairs)
    cells = f"{max(warm[1:]):.3f} | {ours:.3f} | {theirs:.3f} | {ratio:.2f}"
    return f"| {name} | {prompts * GROUP_SIZE} | {cells} |"


def engine_of(model: Path, tp: int) -> Any:
    from megatron_rl.rollout.megatron_engine import MegatronEngine

    policy = make_policy(model, tp)
    return MegatronEngine(
        policy,
        policy.groups,
        eos_ids=[],
        max_model_len=PROMPT_TOKENS + RESPONSE_TOKENS,
        max_num_seqs=1024,
        cache_bytes=1e9,
        token_bytes=2 * policy.arch.num_layers * policy.arch.hidden_size * 4,
    )


def generate(engine: Any, num_prompts: int) -> dict[tuple[int, int], Any]:
    from megatron_rl.rollout.engine import Request

    requests = [
        Request(
            key=(number, index),
            prompt_tokens=tuple(3 + (7 * number + place) % 90 for place in range(PROMPT_TOKENS)),
            temperature=1.0,
            max_tokens=RESPONSE_TOKENS,
            seed=1000 * number + index,
        )
        for number in range(num_prompts)
        for index in range(GROUP_SIZE)
    ]
    told: dict[tuple[int, int], Any] = {}
    engine.generate(
        requests,
        lambda one: told.update({one.key: (one.tokens.tolist(), one.logprobs.tolist())}),
        lambda: True,
    )
    return told


if __name__ == "__main__":
    main()
