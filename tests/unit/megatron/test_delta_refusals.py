"""What models with gated delta nets cannot have, each with a way out."""

from dataclasses import replace

import pytest
from test_megatron_refusals import ARCH

from megatron_rl.megatron import faults
from megatron_rl.megatron.config import ModelConfig
from megatron_rl.megatron.refusals import layer_problems, model_problems
from megatron_rl.parallel.config import ParallelConfig
from megatron_rl.weights.arch import DeltaArch

NETS = replace(
    ARCH,
    model_type="qwen3_5_text",
    num_layers=12,
    num_attention_heads=24,
    num_query_groups=4,
    head_dim=256,
    ffn_hidden_size=240,
    delta=DeltaArch(
        attention_layers=frozenset({3, 7, 11}),
        num_key_heads=16,
        num_value_heads=48,
        key_dim=128,
        value_dim=128,
        kernel=4,
    ),
)


@pytest.fixture
def newest(monkeypatch):
    monkeypatch.setattr(faults, "installed_version", lambda: faults.V0_19_2)


def problems(**layout):
    return [str(problem) for problem in model_problems(NETS, ParallelConfig(**layout))]


def test_layers_of_transformer_engine_have_no_delta_nets():
    model = ModelConfig(path="model", layer_spec="transformer_engine")
    (told,) = (str(problem) for problem in layer_problems(NETS, model, "cpu"))
    assert "not built with gated delta nets here" in told
    assert "Set model.layer_spec=local" in told


def test_what_megatrons_own_delta_nets_recompute():
    model = ModelConfig(path="model", recompute_modules=("core_attn", "gdn_norm_out"))
    (told,) = (str(problem) for problem in layer_problems(NETS, model, "cpu"))
    assert told.endswith("Set model.recompute_modules=[core_attn]")


def test_an_older_megatron_refuses_packed_rows_in_them(monkeypatch, newest):
    assert not problems()
    monkeypatch.setattr(faults, "installed_version", lambda: faults.V0_16_1)
    (told,) = problems()
    assert "Megatron-Core 0.16.1 refuses packed rows in gated delta nets" in told
    assert "Install megatron-core==0.19.2" in told


def test_ranks_do_not_share_sequences_whose_states_they_would_hand_on(newest):
    (told,) = problems(context_parallel_size=2)
    assert "parallel.context_parallel_size=2: the states of gated delta nets go through" in told
    assert told.endswith("Set parallel.context_parallel_size=1")


@pytest.mark.parametrize(
    ("tp", "told"),
    [
        (8, []),
        (3, ["key heads of gated delta nets"]),
        (12, ["key heads of gated delta nets"]),
        (32, ["value heads of gated delta nets", "key heads of gated delta nets"]),
    ],
)
def test_tensor_parallelism_cuts_heads_of_delta_nets(newest, tp, told):
    found = problems(tensor_model_parallel_size=tp)
    for name in ("key heads of gated delta nets", "value heads of gated delta nets"):
        assert any(name in problem for problem in found) == (name in told), (name, found)
