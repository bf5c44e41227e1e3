"""A user's reward function: this program's workers beside a process pool of Python's.

    python benchmarks/user_rewards.py

Responses arrive while an engine is busy: the trainer looks at its workers every so many
milliseconds (once an engine step) and, when all have arrived, waits for the last. The pool has no
deadlines, no limit of memory, and ends with the first function that dies; it is what a trainer has
that hands responses on by itself (chunks of one, as responses come one by one). Both have two
workers and take turns; medians.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

from megatron_rl.reward.pool import WorkerPool

NUM_WORKERS = 2
RESPONSE, ANSWER = "step by step " * 300, "42"  # 4 KB
BATCH = 16  # responses that finish in one engine step


def immediate(response: str, answer: str) -> bool:
    return answer in response


def of_a_millisecond(response: str, answer: str) -> bool:
    start = time.process_time()
    while time.process_time() - start < 1e-3:
        pass
    return answer in response


FUNCTIONS = {"none": immediate, "1 ms": of_a_millisecond}


def by_workers(pool: WorkerPool, count: int, step_s: float) -> float:
    """Seconds that count responses take, the engine's steps included."""
    began, done = time.monotonic(), 0
    for number in range(count):
        pool.submit(number, RESPONSE, ANSWER)
        if number % BATCH == BATCH - 1:
            time.sleep(step_s)
            done += len(pool.poll())
    while done < count:
        done += len(pool.poll(1.0))
    return time.monotonic() - began


def by_executor(
    executor: ProcessPoolExecutor, function: Callable[..., bool], count: int, step_s: float
) -> float:
    began, futures = time.monotonic(), []
    for number in range(count):
        futures.append(executor.submit(function, RESPONSE, ANSWER))
        if number % BATCH == BATCH - 1:
            time.sleep(step_s)
    for future in futures:
        future.result()
    return time.monotonic() - began


def main() -> None:
    from measure import describe_machine  # brings torch, which has no place in a worker

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    print(json.dumps(describe_machine("cpu")))
    print("| function takes | engine step | workers here, s | process pool, s | pool / workers |")
    print("|---|---|---|---|---|")
    for takes, function in FUNCTIONS.items():
        name = f"user_rewards:{function.__name__}"
        pool = WorkerPool(
            num_workers=NUM_WORKERS, deadline_s=1.0, memory_bytes=1 << 30, function=name
        )
        with ProcessPoolExecutor(NUM_WORKERS) as executor:
            try:
                for step_s in (0.0, 0.02):
                    pairs = [
                        (
                            by_workers(pool, options.count, step_s),
                            by_executor(executor, function, options.count, step_s),
                        )
                        for _ in range(options.turns + 1)
                    ][1:]
                    found = [*map(statistics.median, zip(*pairs, strict=True))]
                    found.append(statistics.median(theirs / ours for ours, theirs in pairs))
                    cells = " | ".join(f"{value:.3f}" for value in found)
                    print(f"| {takes} | {step_s * 1e3:.0f} ms | {cells} |")
            finally:
                pool.close()


if __name__ == "__main__":
    main()
