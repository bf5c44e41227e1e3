"""What a run prints is ours: nothing of what stock parts say at every import, build, save, load."""

import subprocess

import pytest
from engine_models import QUICKSTART
from tiny_models import DELTAS
from training_runs import PP2, TP2

pytestmark = pytest.mark.slow

TWO = ("run.num_iterations=2", "checkpoint.save_every=1")
SP_EP = (
    *TP2,
    "parallel.sequence_parallel=true",
    "parallel.expert_model_parallel_size=2",
    "parallel.expert_tensor_parallel_size=1",
)
VPP = (*PP2, "parallel.virtual_pipeline_model_parallel_size=2")
SAMPLED = (
    "algorithm.preset=reinforce",
    "rollout.group_size=2",
    "rollout.rounds.fill=true",
    "rollout.max_response_tokens=8",
    "reward.kind=coin_reward:is_even",
    "reward.num_workers=1",
)
CASES = {
    "one rank, traced": ("qwen2", 1, ("run.profile=[2]",)),
    "sampled by an engine": ("qwen2_tied", 1, (*SAMPLED, "rollout.engine=vllm")),
    "experts in bfloat16": ("glm4_moe", 2, (*SP_EP, "model.dtype=bfloat16")),
    "sampled with latent attention": ("deepseek_v3", 1, SAMPLED),
    "sampled by an engine with LongRoPE": ("phi4_mini", 1, (*SAMPLED, "rollout.engine=vllm")),
    **{f"sampled with {name}": (name, 1, SAMPLED) for name in DELTAS[:1]},
    "sampled by an engine of transformers' network": (
        "olmo2",
        1,
        (*SAMPLED, "rollout.engine=vllm"),
    ),
    "sampled by an engine with windows": ("olmo3", 1, (*SAMPLED, "rollout.engine=vllm")),
    "float16": ("qwen2_tied", 2, (*TP2, "model.dtype=float16")),
    "interleaved": ("qwen2_tied", 2, VPP),
}


EXHAUSTIVE = {"float16", "interleaved"}


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=pytest.mark.exhaustive if c in EXHAUSTIVE else ()) for c in CASES],
)
def test_nothing_is_said_beside_the_report(runs, case):
    """Twice, so that a checkpoint is loaded as well; not what torchrun itself says of ranks."""
    model, ranks, layout = CASES[case]
    path = f"model.path={runs.folder / 'models' / model}"
    for overrides in (TWO, ("run.num_iterations=3", "checkpoint.save_every=1")):
        settings = (path, *layout, *overrides)
        done = runs.start("train", f"silent {case}", ranks, *settings, stderr=subprocess.PIPE)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        assert "done: " in done.stdout
        assert [line for line in done.stdout.splitlines() if not line.startswith(OURS)] == []


def test_an_evaluation_says_no_more_than_its_table(runs):
    """It reads the weights by vLLM's own loader, which has bars of its own."""
    data = f"evaluation.benchmarks.a.path={QUICKSTART / 'data' / 'heldout.jsonl'}"
    settings = (
        *SAMPLED,
        "rollout.engine=vllm",
        data,
        "evaluation.benchmarks.a.max_problems=4",
        "evaluation.samples=1",
    )
    done = runs.start("evaluate", "silent evaluation", 1, *settings, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    model = next(n for n, line in enumerate(lines) if line.startswith(str(runs.folder / "models")))
    assert lines[0].startswith("benchmark a: 4 of 200 rows, layout: prompt and answer ")
    assert any(line.startswith("first prompt, ") for line in lines[:model])
    assert [line for line in lines[:model] if not line.startswith(OURS)] == []
    rows = lines[model + 1 :]
    assert rows[0].split()[0] == "benchmark"
    assert rows[-1].startswith("written to ")


OURS = (
    "ops: ", "engine: ", "layout: ", "model: ", "layers: ", "precision: ", "optimizer: ",
    "prompts: ", "first prompt, ", "benchmark ", "contamination: ", "algorithm: ",
    "old-log-prob pass: ", "reference pass: ", "pass that counts experts: ", "routing replay: ",
    "iteration ", "resumed after iteration ",
    "run.num_iterations 2 -> 3", "done: ", "rollout: ", "rounds: ", "engine probe: ",
    "packed row: ",
    "key/value cache: ", "offload: ", "memory: ", "profile: ", "  ",
    "a stop would lose its iteration: ", "start-up: ",
)  # fmt: skip
