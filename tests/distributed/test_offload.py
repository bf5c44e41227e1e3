"""A trainer that leaves the device between iterations: nothing of it stays, and no bit changes."""

import gc
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import MANY_ROWS, TEMPERATURE, owned
from harness import asked_for, run_on_ranks
from reference import Recipe
from splits import LAYOUTS
from tiny_models import graded_groups, write_model

RECIPE = Recipe(preset="ppo", gamma=0.95, gae_lambda=0.9, kl_reward_coef=0.3)
LR, ITERATIONS = 1e-2, 2  # it leaves, comes back, and leaves again


@dataclass(frozen=True)
class Run:
    """How a PPO run of policy, critic and a frozen reference is split and kept."""

    layout: str
    dtype: str
    is_sharded: bool = True  # the optimizer, over data-parallel ranks
    is_exhaustive: bool = False  # what it shows, others show as well

    def __str__(self) -> str:
        return f"{self.layout} {self.dtype}" + (" sharded" if self.is_sharded else "")


RUNS = {
    1: (Run("one rank", "float32", is_sharded=False), Run("one rank", "bfloat16")),
    2: (
        Run("DP2", "bfloat16"),
        Run("DP2", "float32", is_exhaustive=True),
        Run("TP2 SP", "bfloat16", is_sharded=False, is_exhaustive=True),
        Run("PP2, tied", "float64"),
        Run("EP2", "bfloat16"),
    ),
    4: (Run("TP2 DP2", "bfloat16", is_exhaustive=True),),
}
EVERY_RUN = [run for runs in RUNS.values() for run in runs]
NAMES = [run.layout for run in EVERY_RUN]
RUN_PARAMS = [
    pytest.param(run, marks=pytest.mark.exhaustive if run.is_exhaustive else ())
    for run in EVERY_RUN
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The folder of the models, by their names."""
    folder = tmp_path_factory.mktemp("models")
    for model in {layout.model for layout in LAYOUTS if layout.name in str(NAMES)}:
        write_model(model, folder / model)
    return folder


@pytest.fixture(scope="module")
def found(request, models):
    """Run -> what was found of it; those of a world that tests ask for are made with the first."""
    told, asked = {}, asked_for(request, "run")

    def of(run):
        world = next(world for world, runs in RUNS.items() if run in runs)
        if str(run) not in told:
            out = models / f"{world}.json"
            here = [one for one in RUNS[world] if one in asked]
            run_on_ranks(world, train_on_ranks, here, models, out)
            told.update(json.loads(out.read_text()))
        return told[str(run)]

    return of


@pytest.mark.parametrize("run", RUN_PARAMS, ids=str)
@pytest.mark.parametrize("offload", ["optimizer", "weights"])
def test_every_bit_is_the_same(found, run, offload):
    """Weights, the optimizer's state and metrics, after iterations of two updates."""
    assert found(run)["moved"]
    assert found(run)[offload]["differing"] == []


@pytest.mark.parametrize("run", RUN_PARAMS, ids=str)
@pytest.mark.parametrize("offload", ["optimizer", "weights"])
def test_memory_is_really_freed(found, run, offload):
    """What storages hold, of all tensors that are alive, by which number of parameters says it."""
    for freed, expected in found(run)[offload]["freed"]:
        assert expected > 100_000
        assert freed == pytest.approx(expected, rel=0.02)


def test_what_does_not_come_back_with_its_values_is_noticed(models, tmp_path):
    out = tmp_path / "found.json"
    run_on_ranks(1, train_without_values, RUNS[1][1:], models, out)
    (told,) = json.loads(out.read_text()).values()
    assert len(told["optimizer"]["differing"]) > 10


def train_without_values(runs: Sequence[Run], models: Path, out: Path) -> None:
    """The memory is there again, with whatever it holds."""
    from megatron_rl.platforms.host_bytes import HostBytes

    HostBytes.give = lambda self, parts: [part.fill_(1) for part in parts]  # type: ignore
    train_on_ranks(runs, models, out)


def train_on_ranks(runs: Sequence[Run], models: Path, out: Path) -> None:
    from megatron_rl.platforms import host_bytes

    host_bytes.PIECE = 2**12  # so that tensors lie across pieces, and several in one
    told = {}
    for run in runs:
        plain, moved, _ = train(run, models, "none")
        told[str(run)] = {"moved": moved}
        for offload in ("optimizer", "weights"):
            result, _, freed = train(run, models, offload)
            differing = [n for n, value in plain.items() if not torch.equal(value, result[n])]
            told[str(run)][offload] = {"differing": everywhere(differing), "freed": freed}
            assert plain.keys() == result.keys()
    if dist.get_rank() == 0:
        out.write_text(json.dumps(told))


def train(run: Run, models: Path, offload: str) -> tuple[dict[str, Any], bool, Any]:
    """What the models and metrics are in the end, whether they moved, and (freed, expected)."""
    from policy_on_ranks import algorithm_of, groups_at, pack

    from megatron_rl.megatron.config import ModelConfig, OptimizerConfig
    from megatron_rl.policy.critic import Critic
    from megatron_rl.policy.offload import OffloadedTrainer
    from megatron_rl.policy.passes import plan_passes
    from megatron_rl.policy.policy import Policy
    from megatron_rl.policy.reference import OtherModel
    from megatron_rl.policy.trainer import Trainer
    from megatron_rl.weights.families.registry import read_model_config
    from megatron_rl.weights.model_source import ModelSource

    layout = next(one for one in LAYOUTS if one.name == run.layout)
    model_dir, graded = models / layout.model, graded_groups()
    config = OptimizerConfig(
        lr=LR, clip_grad=0.0, use_distributed_optimizer=run.is_sharded, offload=offload
    )
    settings = ModelConfig(path=str(model_dir), dtype=run.dtype)
    with groups_at(layout) as (parallel, groups):
        arch = read_model_config(model_dir)

        def made(kind: Any, **more: Any) -> Any:
            model = kind(arch, settings, parallel, config, groups, run_updates=10, **more)
            model.load(ModelSource(config_dir=model_dir))
            return model

        policy, other = (made(Policy, temperature=TEMPERATURE) for _ in range(2))
        critic = made(Critic)
        for model in (policy, critic):
            model.prepare_training()
        start, reported = policy.snapshot(), []
        algorithm = algorithm_of(RECIPE)
        trainer = Trainer(
            policy,
            algorithm,
            plan_passes(algorithm, num_updates=2, epochs=1),
            reported.append,
            epochs=1,
            reference=OtherModel(other, leaves=offload == "weights"),
            critic=critic,
        )
        away = OffloadedTrainer(offload, [policy, critic, other], groups)
        mine = owned(graded, "by turns", dist.get_rank(), dist.get_world_size())
        numbers = {g.prompt.group_id: k % 2 for k, g in enumerate(graded)}
        freed = []
        for _ in range(ITERATIONS):
            batches = pack(policy, algorithm, mine, update_of=numbers, row_tokens=MANY_ROWS)
            trainer.update(trainer.add_advantages(trainer.add_logprobs(batches)))
            if offload != "none":
                before = live_bytes()
                away.leaves()
                expected = bytes_of(run, policy, critic, other, offload)
                freed.append([before - live_bytes(), expected])
        result = {f"metric {k} {n}": torch.tensor(v) for k, r in enumerate(reported)
                  for n, v in r.items()}  # fmt: skip
        for model in (policy, critic):
            result |= {f"{model.name} {n}": v.clone() for n, v in model.snapshot().items()}
            model.residence.bring_state()
            result |= {f"{model.name} state {k}": v.clone() for k, v in enumerate(states(model))}
        moved = not all(torch.equal(start[n], v) for n, v in policy.snapshot().items())
        return result, moved, everywhere(freed)


def states(model: Any) -> list[torch.Tensor]:
    """All that the optimizers remember, main weights among it."""
    return [
        value.detach()
        for part in getattr(model.optimizer, "chained_optimizers", [model.optimizer])
        for group in part.optimizer.param_groups
        for param in group["params"]
        for value in (param, *part.optimizer.state[param].values())
        if torch.is_tensor(value)
    ]


def bytes_of(run: Run, policy: Any, critic: Any, other: Any, offload: str) -> int:
    """Gradients, moments and main weights, and the weights where they leave too.

    The reference has left already, after its passes.
    """
    size = getattr(torch, run.dtype).itemsize
    total = 0
    for model in (policy, critic):
        for chunk in model.chunks:
            for parameter in chunk.parameters():
                count = parameter.numel()
                is_expert = not getattr(parameter, "allreduce", True)
                copies = model.groups.layout.expert_dp if is_expert else model.groups.layout.dp
                shards = copies if run.is_sharded and run.dtype != "float64" else 1
                stepped = count / shards
                total += count * max(size, 4) + stepped * (12 if size == 2 else 2 * size)
                total += count * size if offload == "weights" else 0
    return int(total)


def live_bytes() -> int:
    """Bytes of the storages of all tensors that are alive, besides host memory."""
    from megatron_rl.platforms.host_bytes import HostBytes

    gc.collect()
    alive = gc.get_objects()
    kept = {id(piece) for one in alive if type(one) is HostBytes for piece in one._pieces}
    storages = {}
    for one in alive:
        if issubclass(type(one), torch.Tensor) and id(one) not in kept and not one.is_sparse:
            storages[one.untyped_storage()._cdata] = one.untyped_storage().nbytes()
    return sum(storages.values())


def everywhere(item: list[Any]) -> list[Any]:
    """What the lists of all ranks hold."""
    items: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return [one for of_rank in items for one in of_rank]
