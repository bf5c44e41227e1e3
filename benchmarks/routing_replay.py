"""The log-prob gap between engine and policy, with and without routing replay; one rank, a CPU.

    python benchmarks/routing_replay.py

Random models of four layers, a dense one and a mixture of the same size. The same responses are
scored twice: by the experts that the engine chose, and by those that the policy would choose.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1] / "tests" / "distributed")]

NOTICED = 0.05  # nats
MODELS = ("qwen2", "qwen3_moe")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--batches", type=int, default=8, help="of 28 responses each")
    args = parser.parse_args()
    from engine_models import write_model
    from harness import run_on_ranks

    print("| dtype | model | routed by | tokens | median | above 0.05 | largest | other experts |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [{"prompt": f"{7 * k}+{k % 13}", "answer": "1"} for k in range(60)]
        (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for model in MODELS:
            write_model(model, folder / model)
        for dtype in args.dtypes:
            for model in MODELS:
                out = folder / f"{model}-{dtype}.json"
                run_on_ranks(1, measure, folder, model, dtype, args.batches, out)
                for line in json.loads(out.read_text()):
                    print(f"| {dtype} | {model} | {line}", flush=True)


def measure(folder: Path, model: str, dtype: str, batches: int, out: Path) -> None:
    """On a rank: build a run, sample, and score what was sampled."""
    import torch
    from engine_on_ranks import build, config_of, leave, push, rows_of, sample

    is_mixture = model != "qwen2"
    config = config_of(
        folder / model, folder / "prompts.jsonl", 1, {}, dtype=dtype, routing_replay=is_mixture
    )
    run, _ = build(config)
    push(run)
    rows: list[Any] = []
    for number in range(batches):
        rows += rows_of(run, sample(run, run.prompts.next_batch(), number))
    sampled = torch.cat([row.loss.rollout_logprobs for row in rows])
    told = []
    for name, routed in (("the engine", rows), ("the policy", [r.without_experts for r in rows])):
        with torch.no_grad():
            gaps = (torch.cat(run.policy.logprobs(routed) or []) - sampled).abs().double()
        other = _other_experts(run, rows) if is_mixture else 0.0
        told.append(
            f"{name if is_mixture else '-'} | {len(gaps)} | {gaps.median():.2g} | "
            f"{(gaps > NOTICED).double().mean():.2%} | {gaps.max():.2g} | "
            + (f"{other:.2%} |" if is_mixture else "- |")
        )
    out.write_text(json.dumps(told[: 2 if is_mixture else 1]))
    leave()


def _other_experts(run: Any, rows: list[Any]) -> float:
    """Share of (token, layer) at which the policy would choose other experts than the engine."""
    import torch
    from engine_on_ranks import patched

    from megatron_rl.megatron.routers import EngineChoice

    stock, counts = EngineChoice.get_replay_topk, torch.zeros(2)

    def compared(self: Any, *args: Any, **settings: Any) -> Any:
        scores, chosen = stock(self, *args, **settings)
        own, told = args[0].topk(chosen.shape[1]).indices, self._experts[:, 0] >= 0
        differ = (own.sort(1).values != chosen.sort(1).values).any(1)
        counts.add_(torch.stack([told.sum(), (told & differ).sum()]))
        return scores, chosen

    with patched(EngineChoice, "get_replay_topk", compared):
        run.policy.logprobs(rows)
    return float(counts[1] / counts[0])


if __name__ == "__main__":
    main()
