"""A push of bfloat16 weights on one rank, where routers and their biases are float32."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from weights_models import ARCHS, hf_tensors

from megatron_rl.parallel.layout import EngineLayout, Layout
from megatron_rl.weights.config import WeightSyncConfig
from megatron_rl.weights.layouts import engine_pieces, hf_shapes, megatron_pieces
from megatron_rl.weights.pieces import local_shapes, view
from megatron_rl.weights.sync import WeightSync

ARCH = ARCHS["glm4_moe"]
LAYOUT, ENGINES = Layout(world_size=1, tp=1, pp=1), EngineLayout(world_size=1, tp=1)
BIAS, GATE = "gate.e_score_correction_bias", "gate.weight"


class Engine(dict):
    """Weights that are written in place; it may round a bias that it has got to 16 bits."""

    rounds_biases = False

    def __getitem__(self, name):
        found = super().__getitem__(name)
        if self.rounds_biases and name.endswith(BIAS):
            found.copy_(found.bfloat16())  # what was written before
        return found

    def commit(self, modules):
        pass

    def finish(self):
        pass


@pytest.fixture
def groups():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    everybody = dist.group.WORLD
    yield SimpleNamespace(
        layout=LAYOUT,
        engines=ENGINES,
        rank=0,
        nodes=(0,),
        world=everybody,
        bridge=everybody,
        engine=everybody,
        platform=SimpleNamespace(current_device=lambda: torch.device("cpu")),
    )
    dist.destroy_process_group()


@pytest.fixture
def engine():
    shapes = local_shapes(engine_pieces(ARCH, ENGINES, 0))
    wide = (BIAS, GATE)
    return Engine(
        {
            name: torch.zeros(shape, dtype=torch.float32 if name.endswith(wide) else torch.bfloat16)
            for name, shape in shapes.items()
        }
    )


def policy_params(tensors):
    pieces = megatron_pieces(ARCH, LAYOUT, LAYOUT.coordinates(0))
    params = {
        name: torch.zeros(
            shape, dtype=torch.float32 if name.endswith("expert_bias") else torch.bfloat16
        )
        for name, shape in local_shapes(pieces).items()
    }
    for piece in pieces:
        piece.of(params).copy_(view(tensors[piece.hf], piece.box))
    return params


def test_a_bias_arrives_with_all_of_its_bits_and_weights_as_16_bits(groups, engine):
    tensors = hf_tensors(ARCH)
    sync = WeightSync(ARCH, groups, WeightSyncConfig(), engine, torch.bfloat16)
    report = sync.push(policy_params(tensors))
    assert report.verified_tensors == len(hf_shapes(ARCH))
    biases = [name for name in engine if name.endswith(BIAS)]
    assert len(biases) == 3
    for name in biases:
        assert torch.equal(engine[name], tensors[name])
        assert not torch.equal(tensors[name], tensors[name].bfloat16().float())
    for name in (name for name in engine if name.endswith(GATE)):
        assert torch.equal(engine[name], tensors[name].bfloat16().float())


def test_a_bias_that_an_engine_rounds_is_named(groups, engine):
    engine.rounds_biases = True
    sync = WeightSync(ARCH, groups, WeightSyncConfig(), engine, torch.bfloat16)
    with pytest.raises(RuntimeError, match=rf"3 of \d+ verified tensors differ.*{BIAS}"):
        sync.push(policy_params(hf_tensors(ARCH)))
