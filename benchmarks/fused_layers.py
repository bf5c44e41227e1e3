"""Parts of a layer on a core: torch's, and those of ops/fused_layers.py; and drawing in blocks.

    OMP_NUM_THREADS=1 python benchmarks/fused_layers.py

Both of a row take turns; the median of all turns, in microseconds a call.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from measure import describe_machine
from torch import Tensor

from megatron_rl.ops import backend, fused_layers, sample
from megatron_rl.ops.vocab_parallel import Shard

# Tokens, hidden size, that of the FFN, heads and their size; in a step of the engine and in an
# update: of the quickstart's model, and of SmolLM2-135M.
SHAPES = (
    (128, 64, 256, 2, 32),
    (2800, 64, 256, 2, 32),
    (32, 576, 1536, 9, 64),
    (1408, 576, 1536, 9, 64),
)
CACHES = (  # sequences, heads, groups, size of a head, tokens
    (128, 2, 2, 32, 40),
    (32, 9, 3, 64, 40),
    (32, 9, 3, 64, 1024),
    (8, 32, 8, 128, 2048),
)
DRAWS = (  # rows, hidden, vocabulary
    (8, 128, 151936),
    (32, 128, 151936),
    (64, 128, 151936),
    (256, 128, 151936),
    (32, 576, 49152),
)
CALLS = 5


def parts(
    tokens: int, hidden: int, ffn: int, heads: int, size: int
) -> Iterator[tuple[str, Callable[[], object]]]:
    x, weight = torch.randn(tokens, 1, hidden), torch.randn(hidden)
    wide, grad = torch.randn(tokens, 1, 2 * ffn), torch.randn(tokens, 1, ffn)
    angles, turning = torch.randn(tokens, 1, size // 2), torch.randn(tokens, heads, size)
    given, of_weight = x.clone().requires_grad_(), weight.clone().requires_grad_()

    def norm_and_back() -> None:
        fused_layers.rms_norm(given, of_weight, 1e-6).backward(x)

    yield f"norm, {tokens} x {hidden}", lambda: fused_layers.rms_norm(x, weight, 1e-6)
    yield f"norm and its gradients, {tokens} x {hidden}", norm_and_back
    yield f"SwiGLU, {tokens} x {ffn}", lambda: fused_layers.swiglu(wide)
    yield f"its gradient, {tokens} x {ffn}", lambda: fused_layers.swiglu_backward(grad, wide)
    yield (
        f"rope, {tokens} x {heads} x {size}",
        lambda: fused_layers.turn(turning, angles, angles, 1),
    )


def next_tokens(
    sequences: int, heads: int, groups: int, size: int, tokens: int
) -> Callable[[], Tensor]:
    """What a step does with heads of one token each; half of a cache is filled."""
    query = torch.randn(sequences, heads, size)
    key, value = torch.randn(2, sequences, groups, size)
    keys, values = torch.zeros(2, sequences, groups, tokens, size)
    places, slots = torch.full((sequences,), tokens // 2), torch.arange(sequences)
    length = tokens // 2 + 1
    mask = torch.zeros(sequences, 1, 1, length)

    def attend() -> Tensor:
        if fused_layers.run_natively(query):
            return fused_layers.attend_next(
                query, key, value, (keys, values), places, scale=None, window=None
            )
        keys[slots, :, places], values[slots, :, places] = key, value
        return F.scaled_dot_product_attention(
            query.unflatten(1, (groups, -1)), keys[:, :, :length], values[:, :, :length], mask
        )

    return attend


def draws(rows: int, hidden: int, vocabulary: int) -> Iterator[Callable[[], object]]:
    """From all logits, from blocks of their columns, and from hidden states by one op."""
    states, weight = torch.randn(rows, hidden), 0.05 * torch.randn(vocabulary, hidden)
    asked = torch.arange(rows), torch.arange(rows), torch.ones(rows, dtype=torch.float64)
    shard = Shard(tp_group=None, vocab_start=0, valid_vocab=vocabulary, temperature=1.0)

    def draw(many_rows: int, most_states: int) -> None:
        sample.MANY_ROWS, sample.MOST_STATES = many_rows, most_states
        sample.sample_from_head(states, weight, shard, *asked)

    for way in ((rows + 1, 0), (0, 0), (0, states.numel())):
        yield lambda way=way: draw(*way)  # type: ignore[misc]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--turns", type=int, default=41)
    turns = parser.parse_args().turns
    torch.set_num_threads(1)
    print(json.dumps(describe_machine("cpu")))
    print("| | torch, us | fused, us | ratio |")
    print("|---|---|---|---|")
    for shape in SHAPES:
        for name, call in parts(*shape):
            print(_row(name, call, turns))
    for cache in CACHES:
        sequences, heads, groups, size, tokens = cache
        name = f"attention of {sequences} next tokens, {heads} heads in {groups} groups of {size}"
        print(_row(f"{name}, to {tokens // 2 + 1}", next_tokens(*cache), turns))
    print("\n| | all columns, ms | in blocks, ms | one op, ms |")
    print("|---|---|---|---|")
    for draw in DRAWS:
        name = "{} rows of {}, {:,} columns".format(*draw)
        times = _in_turns(tuple(draws(*draw)), turns // 4 + 1)
        print(f"| {name} | {' | '.join(f'{time / 1000:.1f}' for time in times)} |")


def _row(name: str, call: Callable[[], object], turns: int) -> str:
    def by(kind: str) -> None:
        backend.choose(kind, torch.device("cpu"))  # type: ignore[arg-type]
        for _ in range(CALLS):
            call()

    times = _in_turns((lambda: by("reference"), lambda: by("auto")), turns)
    torchs, fused = (time / CALLS for time in times)
    return f"| {name} | {torchs:,.0f} | {fused:,.0f} | {torchs / fused:.1f} |"


def _in_turns(calls: Sequence[Callable[[], object]], turns: int) -> list[float]:
    """The median of each, in microseconds."""
    taken: list[list[float]] = [[] for _ in calls]
    for turn in range(turns + 1):  # the first one is not counted
        for call, seconds in zip(calls, taken, strict=True):
            began = time.perf_counter()
            call()
            if turn:
                seconds.append(time.perf_counter() - began)
    return [1e6 * statistics.median(seconds) for seconds in taken]


if __name__ == "__main__":
    main()
