"""What each objective and each correction costs beside the clipped ratio, native and by definition.

    python benchmarks/objective_cost.py --output benchmarks/results/objective_cost.md

LM head, loss and both gradients, as in an update; the model's own passes, which are the same for
all and the larger part, are not in it. All take turns in one process. Responses are of 64 tokens.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from fused_loss import Problem, make_problem, measure
from measure import Device, describe_machine, load_average
from torch import Tensor

from megatron_rl.objectives.cispo import Cispo
from megatron_rl.objectives.clipped_ratio import ClippedRatio
from megatron_rl.objectives.gspo import Gspo
from megatron_rl.objectives.likelihood import Likelihood
from megatron_rl.objectives.objective import TokenObjective
from megatron_rl.objectives.sapo import Sapo
from megatron_rl.objectives.token_loss import linear_policy_loss
from megatron_rl.ops import backend
from megatron_rl.ops.config import Backend
from megatron_rl.ops.head import Head
from megatron_rl.ops.loss_spec import Correction, SharedTerms

RESPONSE_TOKENS = 64
PLAIN = SharedTerms()
LOSSES: dict[str, tuple[TokenObjective, SharedTerms]] = {
    "clipped_ratio": (ClippedRatio(), PLAIN),
    "likelihood": (Likelihood(), PLAIN),
    "cispo": (Cispo(), PLAIN),
    "sapo": (Sapo(), PLAIN),
    "gspo": (Gspo(), PLAIN),
    "clipped_ratio, correction by token": (
        ClippedRatio(),
        SharedTerms(correction=Correction("token", "mask", 0.5, 2.0)),
    ),
    "clipped_ratio, correction by sequence": (
        ClippedRatio(),
        SharedTerms(correction=Correction("sequence", "truncate", 0.0, 2.0)),
    ),
}
OPS: dict[Backend, str] = {"native": "native", "reference": "definition"}


def calls(p: Problem) -> dict[str, Callable[[], Tensor]]:
    """Name of a loss and of its ops -> call that returns the gradient of the hidden states."""
    lengths = torch.full((len(p.targets) // RESPONSE_TOKENS,), RESPONSE_TOKENS)
    lengths = lengths.to(p.targets.device)
    noise = 0.1 * torch.randn(len(p.targets), device=p.targets.device)
    tokens = replace(p.tokens, rollout_logprobs=p.old_logprobs + noise)

    def run(ops: Backend, objective: TokenObjective, shared: SharedTerms) -> Tensor:
        backend.choose(ops, p.hidden.device)
        hidden = p.hidden.detach().requires_grad_()
        head = Head(hidden=hidden, head_weight=p.weight.detach().requires_grad_(), shard=p.shard)
        result = linear_policy_loss(
            head, tokens, objective, shared, responses=lengths, chunk_rows=p.chunk_rows
        )
        result.loss.backward()
        assert hidden.grad is not None
        return hidden.grad

    return {
        f"{name} | {told}": (lambda ops=ops, loss=loss: run(ops, *loss))  # type: ignore[misc]
        for name, loss in LOSSES.items()
        for ops, told in OPS.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--chunk-rows", type=int, help="default: as many as fit")
    parser.add_argument("--samples", type=int, default=15)
    parser.add_argument("--warmups", type=int, default=2)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    machine = describe_machine(args.device)
    p = make_problem(args.rows, args.vocab, args.hidden, args)
    results = measure(p, calls(p), Device(args.device), args)
    first = results["clipped_ratio | native"]
    own = [a for a in sys.argv[1:] if a not in ("--output", str(args.output))]
    command = " ".join(["python benchmarks/objective_cost.py", *own])
    lines = [
        "# What objectives cost",
        "",
        f"`{command}`",
        f"on {machine['device']}, torch {machine['torch']}: LM head of {args.vocab} rows, loss and "
        f"both gradients of {args.rows} tokens, hidden {args.hidden}, {args.dtype}; "
        f"{args.samples} samples each, in turns. Load after it: {load_average()}.",
        "",
        "| loss | ops | best, ms | of clipped_ratio, native | median, ms | of it |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in results.items():
        cells = (
            f"{row[kind]:.1f} | {row[kind] / first[kind]:.2f}" for kind in ("best_ms", "median_ms")
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if args.output:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
