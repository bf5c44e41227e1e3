"""The fused loss beside what else computes it, in one process on one device.

    python benchmarks/fused_loss.py --device cpu
    python benchmarks/fused_loss.py --device cuda --rows 32768

Every provider gives loss and gradient. They take turns, so that a change of clock or load meets all
of them. Data is random and peaked, never zeros. In-place providers get fresh logits before every
sample, outside of the measured time. Bytes are the fewest that any method could move (logits read
once, their gradient written once), so that a method that moves more shows less bandwidth.

Liger is measured where it is installed (`pip install liger-kernel`) and runs on the device.
"""

import argparse
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from measure import Device, describe_machine, load_average
from peers import head_peers, loss_peers
from torch import Tensor

from megatron_rl.megatron.gradients import MainGrad
from megatron_rl.objectives.clipped_ratio import ClippedRatio
from megatron_rl.objectives.token_loss import linear_policy_loss, token_loss
from megatron_rl.ops import backend
from megatron_rl.ops.head import Head
from megatron_rl.ops.loss_spec import SharedTerms
from megatron_rl.ops.native_loss import loss_arguments
from megatron_rl.ops.vocab_parallel import Shard, merge_stats, shard_gradient, shard_stats
from megatron_rl.types import LossTokens

OBJECTIVE, SHARED = ClippedRatio(), SharedTerms()
OTHER_LOSS = ("three bare products (no loss)", "Liger fused linear GRPO")


@dataclass
class Problem:
    """Rows of logits, and of hidden states with a head; what a provider may read."""

    logits: Tensor
    targets: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    weights: Tensor
    hidden: Tensor
    weight: Tensor
    chunk_rows: int | None
    work: Tensor = field(init=False)  # logits that may be overwritten
    has_fresh_work: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.work = torch.empty_like(self.logits)

    def refresh(self) -> None:
        self.work.copy_(self.logits)

    @property
    def tokens(self) -> LossTokens:
        return LossTokens(
            at=torch.arange(len(self.targets), device=self.targets.device),
            targets=self.targets,
            old_logprobs=self.old_logprobs,
            advantages=self.advantages,
            weights=self.weights,
        )

    @property
    def shard(self) -> Shard:
        return Shard(None, 0, self.logits.size(1), 1.0)


def make_problem(rows: int, vocab: int, hidden_size: int, args: argparse.Namespace) -> Problem:
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    torch.manual_seed(0)
    # Peaked like a language model's: its own hidden states times its own head.
    weight = torch.randn(vocab, hidden_size, device=device, dtype=dtype) / hidden_size**0.5
    hidden = (3 * torch.randn(rows, hidden_size, device=device)).to(dtype)
    logits = hidden @ weight.T
    targets = torch.cat([part.float().softmax(-1).multinomial(1) for part in logits.split(1024)])[
        :, 0
    ]
    parts = zip(logits.split(1024), targets.split(1024), strict=True)
    logprobs = torch.cat(
        [part.float().log_softmax(-1).gather(1, t[:, None])[:, 0] for part, t in parts]
    )
    return Problem(
        logits=logits,
        targets=targets,
        old_logprobs=logprobs + 0.1 * torch.randn(rows, device=device),
        advantages=torch.randn(rows, device=device),
        weights=torch.full((rows,), 1 / rows, device=device),
        hidden=hidden,
        weight=weight,
        chunk_rows=args.chunk_rows,
    )


def our_losses(p: Problem) -> dict[str, Callable[[], Tensor]]:
    """Name -> call that returns the gradient of the logits."""
    *arguments, _ = loss_arguments(p.tokens.constants(torch.float32), OBJECTIVE.native, SHARED)
    ops, vocab = torch.ops.megatron_rl, p.work.size(1)

    def one_pass() -> Tensor:
        ops.policy_loss_onepass_(p.work, p.targets, *arguments, False, vocab, 1.0, 1.0)
        return p.work

    def params() -> Tensor:
        stats = ops.row_stats(p.work, p.targets, p.weights, 0, vocab, 1.0, False)
        result: Tensor = ops.token_loss(stats[None], *arguments, False, 1.0)[2]
        return result

    def two_passes() -> Tensor:
        ops.dlogits_(p.work, p.targets, params(), None, 0, vocab, 1.0)
        return p.work

    def logits_kept() -> Tensor:
        gradient: Tensor = ops.dlogits(p.work, p.targets, params(), None, 0, vocab, 1.0)
        return gradient

    def definition() -> Tensor:
        backend.choose("reference", p.logits.device)
        stats = shard_stats(p.work, p.targets, p.shard)
        logprobs, entropy, log_sum_exp = merge_stats(stats[None])
        leaf = logprobs.detach().requires_grad_()
        token_loss(leaf, None, p.tokens, OBJECTIVE, SHARED).loss.backward()
        return shard_gradient(p.work, p.targets, log_sum_exp, entropy, leaf.grad, None, p.shard)

    return {
        "native, one pass in place": one_pass,
        "native, two passes in place": two_passes,
        "native, logits kept": logits_kept,
        "our PyTorch definition": definition,
    }


def our_heads(p: Problem) -> dict[str, Callable[[], Tensor]]:
    """Name -> call that returns the gradient of the hidden states; the head's is computed too."""
    main_grad = torch.zeros_like(p.weight, dtype=torch.float32)

    def run(ops: str, *, into_main_grad: bool = False) -> Tensor:
        backend.choose(ops, p.hidden.device)  # type: ignore[arg-type]
        hidden = p.hidden.detach().requires_grad_()
        weight = p.weight.detach().requires_grad_()
        weight.main_grad = main_grad  # type: ignore[attr-defined]
        buffer = MainGrad(weight) if into_main_grad else None
        head = Head(hidden=hidden, head_weight=weight, shard=p.shard, gradient_buffer=buffer)
        result = linear_policy_loss(head, p.tokens, OBJECTIVE, SHARED, chunk_rows=p.chunk_rows)
        result.loss.backward()
        assert hidden.grad is not None
        return hidden.grad

    def three_products() -> Tensor:
        p.work.copy_(torch.mm(p.hidden, p.weight.T))
        torch.mm(p.work.T, p.hidden)
        return torch.mm(p.work, p.weight)

    return {
        "native": lambda: run("native"),
        "native, into main_grad": lambda: run("native", into_main_grad=True),
        "our PyTorch definition": lambda: run("reference"),
        "three bare products (no loss)": three_products,
    }


def exact_gradient(p: Problem) -> Tensor:
    """Of the first rows of logits, in float64."""
    rows = min(16, len(p.logits))
    leaf = p.logits[:rows].double().requires_grad_()
    logprobs = leaf.log_softmax(-1).gather(1, p.targets[:rows, None])[:, 0]
    ratio = (logprobs - p.old_logprobs[:rows]).exp()
    advantages = p.advantages[:rows]
    gains = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    (-(gains * p.weights[:rows])).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def errors_of(
    p: Problem, providers: dict[str, Callable[[], Tensor]], exact: Tensor
) -> dict[str, float]:
    """Relative error of the first rows of each gradient over that of the best rounding."""
    best = (exact.to(p.logits.dtype).double() - exact).norm().clamp(min=1e-7 * exact.norm())
    errors = {}
    for name, call in providers.items():
        p.refresh()
        errors[name] = ((call()[: len(exact)].double() - exact).norm() / best).item()
    return errors


def measure(
    p: Problem, providers: dict[str, Callable[[], Tensor]], device: Device, args: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Name -> milliseconds and MiB."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in providers}
    memory = {}
    for name, call in providers.items():
        for _ in range(args.warmups):
            p.refresh()
            call()
        p.refresh()
        memory[name] = device.peak_extra_mib(call)
    for sample in range(args.samples):
        names = list(providers)
        for name in names[sample % len(names) :] + names[: sample % len(names)]:
            p.refresh()
            times[name].append(device.milliseconds(providers[name]))
    results = {}
    for name, samples in times.items():
        values = sorted(wall for wall, _ in samples)
        results[name] = {
            "median_ms": median(values),
            "best_ms": values[0],
            "p80_ms": values[int(0.8 * (len(values) - 1))],
            "median_processor_ms": median(used for _, used in samples),
            "extra_mib": memory[name],
        }
    return results


def print_table(
    title: str,
    results: dict[str, dict[str, float]],
    nbytes: float | None,
    copy_ms: float,
    errors: dict[str, float],
) -> None:
    """One line a provider; ratios are to the first one."""
    print(f"\n{title}")
    header = f"  {'':38s}{'best ms':>10s}{'x first':>9s}{'median':>10s}{'x first':>9s}"
    header += f"{'processor':>11s}{'extra MiB':>11s}"
    print(header + ("" if nbytes is None else f"{'GB/s':>8s}{'of copy':>9s}{'error':>8s}"))
    first = next(iter(results.values()))
    for name, row in results.items():
        line = f"  {name:38s}"
        for kind in ("best_ms", "median_ms"):
            line += f"{row[kind]:10.2f}{row[kind] / first[kind]:9.2f}"
        line += f"{row['median_processor_ms']:11.1f}{row['extra_mib']:11.0f}"
        if nbytes is not None:
            line += f"{nbytes / row['best_ms'] / 1e6:8.1f}{copy_ms / row['best_ms']:9.0%}"
            line += f"{errors[name]:8.2f}" if name in errors else f"{'-':>8s}"
        print(line)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rows", type=int, help="default: 128 on a CPU, 32768 on a GPU")
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--hidden", type=int, help="default: 256 on a CPU, 3584 on a GPU")
    parser.add_argument("--chunk-rows", type=int, help="default: as many as fit")
    parser.add_argument("--samples", type=int, default=15)
    parser.add_argument("--warmups", type=int, default=2)
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--json", type=Path, help="write the results there too")
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    args.rows = args.rows or (32768 if on_gpu else 128)
    args.hidden = args.hidden or (3584 if on_gpu else 256)
    return args


def main() -> None:
    args = parse()
    device = Device(args.device)
    machine = describe_machine(args.device)
    print(" ".join(["python benchmarks/fused_loss.py", *sys.argv[1:]]))
    print("\n".join(f"{name}: {value}" for name, value in machine.items()))
    p = make_problem(args.rows, args.vocab, args.hidden, args)
    losses = our_losses(p) | loss_peers(p, compiles=not args.no_compile)
    same_loss = {name: call for name, call in losses.items() if "cross entropy" not in name}
    errors = errors_of(p, same_loss, exact_gradient(p))
    heads = our_heads(p) | head_peers(p)
    same_head = {name: call for name, call in heads.items() if name not in OTHER_LOSS}
    head_errors = errors_of(p, same_head, exact_gradient(p) @ p.weight.double())
    # Logits near 10 are off by 2^-6, so a head's gradient is by 1 %, ten times its own rounding.
    for found, bound in ((errors, 1.05), (head_errors, 20.0)):
        if wrong := {n: error for n, error in found.items() if "native" in n and error > bound}:
            raise SystemExit(f"not measured, the gradient is wrong: {wrong}")

    def copy() -> Tensor:
        return p.work.copy_(p.logits)

    results = measure(p, {**losses, "copy of the logits": copy}, device, args)
    copy_ms = results.pop("copy of the logits")["best_ms"]
    nbytes = 2 * p.logits.numel() * p.logits.element_size()
    shape = f"{args.rows} x {args.vocab} {args.dtype}"
    print(f"\ncopy of the logits: {copy_ms:.2f} ms, {nbytes / copy_ms / 1e6:.1f} GB/s")
    print_table(f"loss and gradient, logits {shape}", results, nbytes, copy_ms, errors)
    chunks = "chunks as large as fit" if args.chunk_rows is None else f"{args.chunk_rows} rows each"
    title = f"LM head, loss and gradients, {shape}, hidden {args.hidden}, {chunks}"
    head_results = measure(p, heads, device, args)
    print_table(title, head_results, None, copy_ms, {})
    print(f"load after: {load_average()}")
    if args.json:
        record = {
            "command": " ".join(["python benchmarks/fused_loss.py", *sys.argv[1:]]),
            "machine": machine
            | {"load after": load_average(), "python": platform.python_version()},
            "copy_ms": copy_ms,
            "gradient_error_over_rounding": errors,
            "loss": results,
            "head": head_results,
            "head_gradient_error_over_rounding": head_errors,
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
