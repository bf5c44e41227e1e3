"""What gated delta nets compute, in a process of its own: a JSON object of largest differences.

Expected is the recurrence as it is defined, in float64, token by token, of every sequence alone.
"""

import json
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_rl.megatron.enter import enter
from megatron_rl.platforms.base import CPU

enter(CPU)

from megatron_rl.megatron.delta_rule import (  # noqa: E402
    CHUNK,
    by_chunks,
    convolved,
    delta_row,
    next_token,
)

HEADS, KEY, VALUE, ROWS = 2, 3, 5, 7
Inputs = list[Tensor]
# Lengths of runs, and the run that each follows: chunks that are full, cut and single tokens.
APART = ([2 * CHUNK + 3, 1, CHUNK, CHUNK - 1, 2], [None] * 5)
BEHIND = ([CHUNK + 6, 5, 130, 2, 1, CHUNK], [None, 0, None, 0, 2, 2])


def main() -> None:
    torch.manual_seed(0)
    found = {}
    for name, (lengths, origins) in {"apart": APART, "behind": BEHIND}.items():
        inputs = drawn(sum(lengths))
        for kernel in (1, 2, 4):
            found[f"convolution of {kernel}, {name}"] = of_convolution(lengths, origins, kernel)
        outputs, gradients, states = of_rule(lengths, origins, inputs)
        found |= {f"outputs, {name}": outputs, f"gradients, {name}": gradients}
        found[f"states, {name}"] = states
        narrow, *_ = of_rule(lengths, origins, inputs, dtype=torch.float32)
        found[f"float32, {name}"] = narrow
    found["dying and kept"] = of_decay()
    found["run on"] = of_one_run()
    print(json.dumps(found))


def drawn(length: int) -> Inputs:
    """Queries, keys of length one, values, decays, shares."""
    wide = {"dtype": torch.float64}
    return [
        torch.randn(length, HEADS, KEY, **wide),
        F.normalize(torch.randn(length, HEADS, KEY, **wide), dim=-1),
        torch.randn(length, HEADS, VALUE, **wide),
        -torch.rand(length, HEADS, **wide) * torch.tensor([0.05, 6.0]),
        torch.rand(length, HEADS, **wide),
    ]


def whole_sequences(lengths, origins, x: Tensor) -> list[Tensor]:
    """Of each run all of its sequence: behind the run that it follows."""
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    runs = [x[lo:hi] for lo, hi in pairwise(bounds)]
    return [
        run if origin is None else torch.cat([runs[origin], run])
        for run, origin in zip(runs, origins, strict=True)
    ]


def recurrence(inputs: Inputs) -> tuple[Tensor, Tensor]:
    query, key, value, decay, share = inputs
    state = torch.zeros(HEADS, KEY, VALUE, dtype=query.dtype)
    outputs = []
    for t in range(len(query)):
        state = decay[t].exp()[:, None, None] * state
        learnt = value[t] - torch.einsum("hkv,hk->hv", state, key[t])
        state = state + share[t, :, None, None] * torch.einsum("hk,hv->hkv", key[t], learnt)
        outputs.append(torch.einsum("hkv,hk->hv", state, query[t]))
    return torch.stack(outputs), state


def of_rule(
    lengths, origins, inputs: Inputs, dtype: torch.dtype = torch.float64
) -> tuple[float, float, float]:
    """Largest differences of outputs, gradients, and last states of runs that begin a sequence."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    row = delta_row(lengths, origins, kernel=2, device=torch.device("cpu"))
    out, last = by_chunks(*(x.to(dtype) for x in inputs), row)
    expected, states = [], {}
    sequences = zip(*(whole_sequences(lengths, origins, x) for x in inputs), strict=True)
    for number, (length, sequence) in enumerate(zip(lengths, sequences, strict=True)):
        outputs, states[number] = recurrence(list(sequence))
        expected.append(outputs[-length:])
    expected = torch.cat(expected)
    weights = torch.randn_like(expected)
    found = torch.autograd.grad((out * weights).sum(), inputs, retain_graph=True)
    wanted = torch.autograd.grad((expected * weights).sum(), inputs)
    firsts = torch.stack([states[run] for run in row.levels[0].runs])
    return (
        off(out, expected),
        max(off(a, b) for a, b in zip(found, wanted, strict=True)),
        off(last, firsts),
    )


def of_convolution(lengths, origins, kernel: int) -> float:
    """Outputs and gradients against torch's own convolution of every sequence."""
    mixed = torch.randn(sum(lengths), ROWS, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(ROWS, 1, kernel, dtype=torch.float64, requires_grad=True)
    out = convolved(
        mixed, weight, delta_row(lengths, origins, kernel=kernel, device=torch.device("cpu"))
    )
    expected = torch.cat(
        [
            F.conv1d(F.pad(run.T, (kernel - 1, 0))[None], weight, groups=ROWS)[0].T[-length:]
            for length, run in zip(
                lengths, whole_sequences(lengths, origins, mixed), strict=True
            )
        ]
    )
    found = torch.autograd.grad(out.sin().sum(), (mixed, weight))
    wanted = torch.autograd.grad(expected.sin().sum(), (mixed, weight))
    return max(off(out, expected), *(off(a, b) for a, b in zip(found, wanted, strict=True)))


def of_decay() -> float:
    """A token after another by next_token, against the chunks, where states die at once or never."""
    inputs = drawn(CHUNK + 9)
    inputs[3] = torch.stack([torch.full((CHUNK + 9,), -900.0), torch.zeros(CHUNK + 9)], 1).double()
    row = delta_row([CHUNK + 9], [None], kernel=1, device=torch.device("cpu"))
    out, last = by_chunks(*inputs, row)
    state = torch.zeros(1, HEADS, KEY, VALUE, dtype=torch.float64)
    outputs = []
    for t in range(CHUNK + 9):
        one, state = next_token(*(x[t][None] for x in inputs), state)
        outputs.append(one[0])
    return max(off(out, torch.stack(outputs)), off(last, state))


def of_one_run() -> float:
    """The mistake: a row of several sequences as if it were one."""
    lengths, origins = APART
    inputs = drawn(sum(lengths))
    rows = [
        delta_row(*runs, kernel=1, device=torch.device("cpu"))
        for runs in ((lengths, origins), ([sum(lengths)], [None]))
    ]
    apart, as_one = (by_chunks(*inputs, row)[0] for row in rows)
    return off(as_one, apart)


def off(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, of the largest entry; infinite where one is not a number."""
    error = (found - wanted).abs().max() / wanted.abs().max()
    return float(error.detach().nan_to_num(nan=torch.inf))


if __name__ == "__main__":
    main()
