"""What gated delta nets compute, in a process of its own: a JSON object of largest differences.

Expected is the recurrence as it is defined, in float64, token by token, of every sequence alone.
"""

import json
import sys
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_rl.megatron.enter import enter
from megatron_rl.platforms.base import CPU

enter(CPU)

from megatron_rl.megatron import faults  # noqa: E402
from megatron_rl.megatron.activations import Activations  # noqa: E402
from megatron_rl.megatron.delta_rule import (  # noqa: E402
    CHUNK,
    by_chunks,
    convolved,
    delta_row,
    next_token,
)
from megatron_rl.weights.arch import DeltaArch  # noqa: E402

HEADS, KEY, VALUE, ROWS = 2, 3, 5, 7
Inputs = list[Tensor]
# Heads of keys and of values, their entries, and the kernel: of Qwen3.5 but for the heads, and odd.
SIZES = ((2, 4, 128, 128, 4), (4, 4, 96, 160, 2), (1, 3, 64, 128, 3))
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
    if not faults.is_present("packed_delta_nets"):
        found["kept and counted"] = [kept_and_counted(*sizes) for sizes in SIZES]
    sys.stdout.write(json.dumps(found))


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
            for length, run in zip(lengths, whole_sequences(lengths, origins, mixed), strict=True)
        ]
    )
    found = torch.autograd.grad(out.sin().sum(), (mixed, weight))
    wanted = torch.autograd.grad(expected.sin().sum(), (mixed, weight))
    return max(off(out, expected), *(off(a, b) for a, b in zip(found, wanted, strict=True)))


def of_decay() -> float:
    """By next_token, token by token, against the chunks, where states die at once or never."""
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


def kept_and_counted(keys: int, values: int, key: int, value: int, kernel: int) -> list[float]:
    """Bytes that torch keeps of a net's core for its backward, and that memory is planned with."""
    from megatron_rl.megatron.delta_net import DeltaNet

    arch = SimpleNamespace(
        delta=DeltaArch(
            attention_layers=frozenset(),
            num_key_heads=keys,
            num_value_heads=values,
            key_dim=key,
            value_dim=value,
            kernel=kernel,
        )
    )
    rows, tokens = arch.delta.mixed_rows, 8 * CHUNK
    net = SimpleNamespace(
        conv1d=SimpleNamespace(weight=torch.randn(rows, 1, kernel, requires_grad=True)),
        num_k_heads_local_tp=keys,
        num_v_heads_local_tp=values,
        qk_dim_local_tp=arch.delta.key_rows,
        v_dim_local_tp=arch.delta.value_rows,
        key_head_dim=key,
        A_log=torch.zeros(values, requires_grad=True),
        dt_bias=torch.zeros(values, requires_grad=True),
    )
    net.heads = partial(DeltaNet.heads, net)
    row = delta_row([tokens], [None], kernel=kernel, device=torch.device("cpu"))
    inputs = [torch.randn(tokens, n, requires_grad=True) for n in (rows, values, values)]
    saved: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        DeltaNet.whole(net, *inputs, row=row)
    parallel = SimpleNamespace(tensor_model_parallel_size=1)
    layers = SimpleNamespace(arch=arch, parallel=parallel, itemsize=2)
    counted = Activations.of_one_net(layers, tokens)
    return [float(sum(t.untyped_storage().nbytes() for t in saved.values())), counted]


def off(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, of the largest entry; infinite where one is not a number."""
    error = (found - wanted).abs().max() / wanted.abs().max()
    return float(error.detach().nan_to_num(nan=torch.inf))


if __name__ == "__main__":
    main()
