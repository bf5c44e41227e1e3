"""Models with gated delta nets, from sampling to an export that transformers reads."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from test_resume import check_continuation
from test_silence import SAMPLED
from training_runs import LAST, PP2, TP2

from megatron_rl.megatron import faults

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(faults.is_present("packed_delta_nets"), reason="refused at this version"),
]


SHARED_EXPERTS = (
    *TP2,
    "parallel.sequence_parallel=true",
    "parallel.expert_model_parallel_size=2",
    "parallel.expert_tensor_parallel_size=1",
)
IN_FLOAT64 = (
    "model.dtype=float64",
    "optimizer.use_distributed_optimizer=false",
    "optimizer.clip_grad=0",
)
# Model -> how two ranks split it first.
MODELS = {"qwen3_5": TP2, "qwen3_5_moe": SHARED_EXPERTS}


def path_of(runs, model):
    return f"model.path={runs.folder / 'models' / model}"


@pytest.mark.parametrize("model", MODELS)
def test_it_samples_and_trains_by_itself(runs, model):
    """What vLLM refuses on a CPU the policy does, with log-probs that a pass confirms."""
    name = f"sampled {model}"
    said = runs.finish(name, 1, path_of(runs, model), *SAMPLED, "run.num_iterations=3")
    assert "engine: megatron, since the other one refuses" in said
    assert "vLLM 0.32 runs on a CPU in bfloat16 alone" in said
    records = runs.records(name)
    gaps = [record["rollout/logprob_gap_max"] for record in records]
    assert 0 < max(gaps) < 1e-5  # after updates, too
    config = json.loads((runs.folder / name / "hf" / "config.json").read_text())
    assert config["model_type"] == f"{model}_text"


@pytest.mark.parametrize("model", MODELS)
def test_another_layout_continues_and_what_is_exported_was_trained(runs, model):
    straight, moved = f"{model} TP2", f"{model} TP2 to PP2"
    runs.finish(straight, 2, path_of(runs, model), *MODELS[model])
    shutil.rmtree(runs.copy(straight, moved) / "checkpoints" / LAST)
    said = runs.finish(moved, 2, path_of(runs, model), *PP2)
    assert "resumed after iteration 3" in said
    # A net makes more of rounding than attention does, and routers more of that: seen were 1.1e-6
    # and 1.7e-5 of a norm of 42, by models of other random weights.
    bound = 1e-4 if "moe" in model else 1e-5
    check_continuation(runs.records(straight), runs.records(moved), bound=bound)
    there, here, first = (
        load_file(folder / "model.safetensors")
        for folder in (
            runs.folder / straight / "hf",
            runs.folder / moved / "hf",
            runs.folder / "models" / model,
        )
    )
    assert there.keys() == here.keys() == first.keys()
    for name, tensor in there.items():
        torch.testing.assert_close(here[name], tensor, atol=1e-5, rtol=1e-5)
        assert not torch.equal(tensor, first[name]), name


def test_an_optimizer_that_is_not_distributed_goes_on_at_its_own_experts(runs):
    """In float64, where rounding does not count; Megatron-Core sums the norm in float32."""
    straight, moved = "whole optimizer", "whole optimizer, moved"
    settings = (path_of(runs, "qwen3_5_moe"), *IN_FLOAT64)
    runs.finish(straight, 2, *settings, *SHARED_EXPERTS)
    shutil.rmtree(runs.copy(straight, moved) / "checkpoints" / LAST)
    code, said = runs.train(moved, 2, *settings, *PP2)
    assert code != 0
    assert "Go on at the size that the checkpoint has" in said
    runs.finish(moved, 2, *settings, "parallel.expert_model_parallel_size=2")
    check_continuation(runs.records(straight), runs.records(moved), bound=1e-6)
