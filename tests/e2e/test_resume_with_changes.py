"""A run that is resumed with another recipe: what may change takes effect, and is said."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from harness import run_on_ranks
from training_runs import TP2, build

pytestmark = pytest.mark.slow

WHOLE = "optimizer.use_distributed_optimizer=false"
# Ranks, tensor parallelism, and whether Megatron's distributed optimizer shards.
KINDS = {"one rank": (1, 1, True), "not sharded": (1, 1, False), "TP2": (2, 2, True)}
NEW = {
    "lr": 2e-4,
    "min_lr": 1e-5,
    "lr_schedule": "linear",
    "lr_warmup_updates": 3,
    "lr_decay_updates": 40,
    "weight_decay": 0.3,
    "adam_beta1": 0.8,
    "adam_beta2": 0.95,
    "adam_eps": 1e-5,
    "clip_grad": 0.01,
}


def new_rate(steps: int) -> float:
    """NEW's learning rate after so many steps: linear from 2e-4 at step 3 to 1e-5 at step 40."""
    return 1e-5 + (1.0 - (steps - 3) / 37) * (2e-4 - 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_next_updates_are_those_of_torch_with_the_new_settings(runs, kind):
    ranks, tp, is_sharded = KINDS[kind]
    layout = (TP2 if tp == 2 else ()) + (() if is_sharded else (WHOLE,))
    name = runs.straight(kind, ranks, *layout)
    out = runs.folder / f"updates {kind}.json"
    run_on_ranks(ranks, update_as_torch_does, runs.folder, name, tp, is_sharded, out)
    for found in json.loads(out.read_text()):
        assert found["steps"] == [12, 13]
        assert found["rates"] == [new_rate(12), new_rate(13)]
        assert found["parameters"] > 20
        assert found["differing"] == 0
        assert found["moved"] == found["parameters"]
        if ranks == 1:  # over two ranks the sum counts norms and biases, which both hold, twice
            assert found["norms"] == pytest.approx([0.01, 0.01], rel=1e-3)  # it was clipped


# -- on the ranks ----------------------------------------------------------------------------------


def update_as_torch_does(folder: Path, name: str, tp: int, is_sharded: bool, out: Path) -> None:
    """Two updates after a resume, beside torch's AdamW on copies of weights and state."""
    import torch.distributed as dist

    from megatron_rl.loop import run_iteration

    settings = NEW | {"use_distributed_optimizer": is_sharded}
    run = build(folder / "models" / "qwen2", folder / name, tp, 1, **settings)
    run.resume()
    (part,) = run.policy.optimizer.chained_optimizers
    twin = Twin(part.optimizer)
    run_iteration(run, run.done_iterations + 1)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, twin.result())
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found))


class Twin:
    """AdamW on copies; steps with the same gradients just before the optimizer that it copied."""

    def __init__(self, own: Any) -> None:
        import torch

        self.own, self.rates, self.norms, self.steps = own, [], [], []
        self.pairs = [(p, p.detach().clone()) for g in own.param_groups for p in g["params"]]
        copies = {id(p): copy for p, copy in self.pairs}
        self.start = [copy.clone() for _, copy in self.pairs]
        self.copy = torch.optim.AdamW(
            [
                {
                    "params": [copies[id(p)] for p in group["params"]],
                    "weight_decay": 0.3 * group["wd_mult"],  # biases and norms have none
                }
                for group in own.param_groups
            ],
            betas=(0.8, 0.95),
            eps=1e-5,
        )
        for p, copy in self.pairs:
            self.copy.state[copy] = {name: value.clone() for name, value in own.state[p].items()}
            assert self.copy.state[copy]["exp_avg_sq"].any()
        own.register_step_pre_hook(self.step)

    def step(self, *_: Any) -> None:
        (steps,) = {int(state["step"]) for state in self.copy.state.values()}
        self.steps.append(steps)
        self.rates.append(self.own.param_groups[0]["lr"])
        for group in self.copy.param_groups:
            group["lr"] = new_rate(steps)
        for p, copy in self.pairs:
            copy.grad = p.grad.clone()
        self.norms.append(sum(float(c.grad.double().square().sum()) for _, c in self.pairs))
        self.copy.step()

    def result(self) -> dict[str, Any]:
        import torch

        return {
            "steps": self.steps,
            "rates": self.rates,
            "parameters": len(self.pairs),
            "differing": sum(not torch.equal(p, copy) for p, copy in self.pairs),
            "moved": sum(
                not torch.equal(p, at) for (p, _), at in zip(self.pairs, self.start, strict=True)
            ),
            "norms": [math.sqrt(squares) for squares in self.norms],
        }
