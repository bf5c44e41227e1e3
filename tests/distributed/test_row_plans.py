"""A packed row is planned once: no layer and no model chunk asks for lengths or angles again."""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from harness import run_on_ranks
from layout import Layout
from tiny_models import write_model
from torch.utils._python_dispatch import TorchDispatchMode

LENGTHS = ((40, 7), (30,), (12, 9, 21), (5,))  # of the sequences of four rows
LAYOUTS = (
    Layout(name="one rank", world=1),
    Layout(name="one rank, all recomputed", world=1, recompute="full"),
    Layout(name="one rank, attention recomputed", world=1, recompute="selective"),
    Layout(name="PP2 VPP2", world=2, pp=2, vpp=2),
)


@pytest.fixture(scope="module")
def counts(tmp_path_factory):
    """Layout -> what each rank counted."""
    folder = tmp_path_factory.mktemp("rows")
    write_model("qwen2", folder / "model")
    found: dict[str, Any] = {}
    for world in (1, 2):
        out = folder / f"{world}.json"
        run_on_ranks(world, count_calls, folder / "model", out)
        found |= json.loads(out.read_text())
    return found


@pytest.mark.parametrize("layout", [layout.name for layout in LAYOUTS])
def test_a_row_is_planned_and_its_angles_are_computed_once(counts, layout):
    for of_rank in counts[layout]:
        assert of_rank["plans"] == of_rank["angles"] == len(LENGTHS)


@pytest.mark.parametrize("layout", [y.name for y in LAYOUTS if y.recompute != "selective"])
def test_no_layer_reads_from_the_device(counts, layout):
    """On a GPU, each such call waits for all that was started.

    Where Megatron-Core recomputes attention it reads the kind of mask, from a tensor of the host.
    """
    for of_rank in counts[layout]:
        assert of_rank["layers"] > 0
        assert of_rank.get("reads", 0) == 0


def count_calls(model_dir: Path, out: Path) -> None:
    from policy_on_ranks import policy_at

    from megatron_rl.megatron.config import OptimizerConfig

    found = {}
    for layout in (layout for layout in LAYOUTS if layout.world == dist.get_world_size()):
        problem: Any = SimpleNamespace(model_dir=model_dir)
        with policy_at(layout, problem, OptimizerConfig(clip_grad=0.0)) as policy:
            with counted(policy) as counts:
                policy.backward([row_of(lengths, policy) for lengths in LENGTHS], summed)
            everyone = [None] * layout.world
            dist.all_gather_object(everyone, dict(counts))
            found[layout.name] = everyone
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found))


@pytest.mark.parametrize("preset", ["grpo", "gspo", "iterative_dpo"])
def test_the_loop_over_micro_batches_reads_nothing(tmp_path, preset):
    """With the loss, by the native ops and by their definitions; the ways to read are below."""
    write_model("qwen2", tmp_path / "model")
    run_on_ranks(1, update, tmp_path / "model", preset)


def update(model_dir: Path, preset: str) -> None:
    from policy_on_ranks import algorithm_of, policy_at
    from reference import Recipe

    from megatron_rl.megatron.config import OptimizerConfig

    for ops in ("auto", "reference"):
        problem: Any = SimpleNamespace(model_dir=model_dir)
        layout = Layout(name="one rank", world=1, ops=ops)
        with policy_at(layout, problem, OptimizerConfig(clip_grad=0.0)) as policy:
            rows = [row_of(lengths, policy) for lengths in LENGTHS]
            policy.update(rows, algorithm_of(Recipe(preset=preset)).loss())
            with reads_of_the_loop() as reads:
                policy.update(rows, algorithm_of(Recipe(preset=preset)).loss())
        assert reads == {"loops": 1}, reads


WAYS = ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")


@contextmanager
def reads_of_the_loop() -> Iterator[Counter[str]]:
    """Count what the host asks of tensors between the first micro-batch and the last gradient."""
    from megatron_rl.megatron import schedule

    counts: Counter[str] = Counter()
    stock = schedule.get_forward_backward_func

    def asking(name: str) -> Any:
        own = getattr(torch.Tensor, name)

        def call(*args: Any, **settings: Any) -> Any:
            counts[name] += 1
            return own(*args, **settings)

        return call

    def watched() -> Any:
        def loop(**settings: Any) -> Any:
            counts["loops"] += 1
            with ExitStack() as stack:
                for name in WAYS:
                    stack.enter_context(mock.patch.object(torch.Tensor, name, asking(name)))
                return stock()(**settings)

        return loop

    with mock.patch.object(schedule, "get_forward_backward_func", watched):
        yield counts


def summed(hidden: torch.Tensor, _: Any) -> torch.Tensor:
    return hidden.sum()


def row_of(lengths: tuple[int, ...], policy: Any) -> Any:
    from megatron_rl.batching.pack import pack
    from megatron_rl.types import Sample

    samples = [
        Sample(
            group_id=0,
            index=0,
            update=0,
            prompt_tokens=torch.arange(1),
            response_tokens=torch.arange(1, length),
            advantage=0.0,
            rollout_logprobs=None,
        )
        for length in lengths
    ]
    device = torch.device("cpu")
    return pack(samples, weight_of=lambda _: 1.0, multiple=1, dtype=policy.dtype, device=device)


@contextmanager
def counted(policy: Any) -> Iterator[Counter[str]]:
    """Count plans, angles, and reads of tensors by the host within layers, run again or not."""
    from megatron.core.transformer.transformer_layer import TransformerLayer

    from megatron_rl.megatron import schedule
    from megatron_rl.megatron.rope import Rope

    counts: Counter[str] = Counter()

    def counting(name: str, stock: Any) -> Any:
        def call(*args: Any, **settings: Any) -> Any:
            counts[name] += 1
            return stock(*args, **settings)

        return call

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            counts["reads"] += function is torch.ops.aten._local_scalar_dense.default
            return function(*args, **kwargs or {})

    stock_layer = TransformerLayer.forward

    def layer(*args: Any, **settings: Any) -> Any:
        counts["layers"] += 1
        reading = counting("reads", torch.Tensor.tolist)
        with Reads(), mock.patch.object(torch.Tensor, "tolist", reading):
            return stock_layer(*args, **settings)

    with ExitStack() as stack:
        for where, name, call in (
            (schedule, "packed_rows", counting("plans", schedule.packed_rows)),
            (Rope, "rotation", counting("angles", Rope.rotation)),
            (TransformerLayer, "forward", layer),
        ):
            stack.enter_context(mock.patch.object(where, name, call))
        yield counts
