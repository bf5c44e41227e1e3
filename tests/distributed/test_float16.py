"""Training in float16: the true gradient, overflows that are left out, and a scale that resumes."""

import json
from pathlib import Path

import harness
import pytest
import torch.distributed as dist
from layout import Layout

LAYOUTS = (
    Layout(name="one rank", world=1),
    Layout(name="one rank, definitions", world=1, ops="reference"),
    Layout(name="TP2 SP", world=2, tp=2, sequence_parallel=True),
    Layout(name="PP2, tied", world=2, pp=2, model="qwen2_tied"),
)
# float16 keeps 11 bits; weights, activations and their gradients are each rounded to it.
BOUND = 2e-2


@pytest.fixture(scope="module")
def found(problems, tmp_path_factory):
    told: dict[str, dict] = {}
    for world in (1, 2):
        folder = tmp_path_factory.mktemp("float16")
        layouts = [layout for layout in LAYOUTS if layout.world == world]
        harness.run_on_ranks(world, train, problems, layouts, folder)
        told |= json.loads((folder / "told.json").read_text())
    return told


def train(problems: dict[str, Path], layouts: list[Layout], folder: Path) -> None:
    import torch
    from cases import cases_of
    from policy_on_ranks import algorithm_of, measure, microbatches_of, policy_at

    from megatron_rl.megatron.checkpoint import load_model, writer_of
    from megatron_rl.megatron.config import OptimizerConfig

    told = {}
    # All of them first: after a checkpoint was loaded, a process unpickles nothing any more.
    read = {
        layout.model: torch.load(problems[layout.model], weights_only=False) for layout in layouts
    }
    for layout in layouts:
        problem = read[layout.model]
        case = next(iter(cases_of(layout)))
        # At the default of 2**16 the gradient of this tied embedding overflows.
        usual = OptimizerConfig(lr=1e-3, clip_grad=0.0, initial_loss_scale=2.0**12)
        high = usual.model_copy(update={"initial_loss_scale": 2.0**32})
        with policy_at(layout, problem, usual, "float16") as policy:
            exact = measure(policy, case, problem, layout=layout)
        with policy_at(layout, problem, high, "float16") as policy:
            rows, loss = (
                microbatches_of(policy, case, problem),
                algorithm_of(case.question.recipe).loss(),
            )
            rows = tuple(row.with_loss() for row in rows)
            before = policy.snapshot()
            skipped = [policy.update(rows, loss).metrics for _ in range(3)]
            is_unmoved = all(
                torch.equal(value, before[name]) for name, value in policy.snapshot().items()
            )
            scale, version = policy.loss_scale(), policy.version
            directory = folder / layout.name
            if dist.get_rank() == 0:
                directory.mkdir()
            dist.barrier()
            writer = writer_of(policy, directory, policy.groups)
            writer.write()
            writer.gather()
            writer.finish()
        with policy_at(layout, problem, usual, "float16") as policy:
            load_model(policy, directory)
            resumed = policy.loss_scale()
            trackers = [
                (part.grad_scaler._growth_tracker, part.grad_scaler._hysteresis_tracker)
                for part in policy.optimizer.chained_optimizers
            ]
        told[layout.name] = {
            "gradient": exact.gradient_error,
            "norm": exact.norm_error,
            "skipped": [metrics.get("policy/scaler_skipped") for metrics in skipped],
            "scales": [metrics["policy/loss_scale"] for metrics in skipped],
            "unmoved": is_unmoved,
            "scale": scale,
            "version": version,
            "resumed": resumed,
            "trackers": trackers,
        }
    if dist.get_rank() == 0:
        (folder / "told.json").write_text(json.dumps(told))


@pytest.mark.parametrize("layout", [layout.name for layout in LAYOUTS])
def test_gradient_and_norm_are_those_of_float64_and_not_scaled(found, layout):
    assert found[layout]["gradient"] < BOUND
    assert found[layout]["norm"] < BOUND


@pytest.mark.parametrize("layout", [layout.name for layout in LAYOUTS])
def test_an_overflow_is_counted_and_nothing_moves_but_the_scale(found, layout):
    told = found[layout]
    assert told["skipped"] == [1.0] * 3
    assert told["scales"] == [2.0**32, 2.0**32, 2.0**31]
    assert told["unmoved"]
    assert told["version"] == 0


@pytest.mark.parametrize("layout", [layout.name for layout in LAYOUTS])
def test_the_scale_goes_on_from_the_checkpoint(found, layout):
    told = found[layout]
    assert told["scale"] == told["resumed"] == 2.0**30
    assert told["trackers"] == [[0, -1]]
