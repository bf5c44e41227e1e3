"""A run that never had anything to train on does not end as a good one."""

import pytest
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

ALL_WRONG = (
    "algorithm.preset=reinforce_rej",
    "rollout.group_size=2",
    "rollout.max_response_tokens=4",
    "reward.kind=number",
    "reward.num_workers=1",
    "run.num_iterations=2",
    "optimizer.lr_decay_updates=null",
)


def test_a_run_that_took_no_step_ends_with_an_error_that_counts_the_verdicts(runs):
    code, said = runs.train("untrained", 1, *ALL_WRONG)
    assert code == 2, said
    assert "done: 0 optimizer steps" in said
    assert "error: run.num_iterations=2: no optimizer step was taken in any iteration" in said
    assert "Of 48 responses " in said  # 2 x 12 prompts x 2
    began = load_file(runs.folder / "models" / "qwen2" / "model.safetensors")
    ended = load_file(runs.folder / "untrained" / "hf" / "model.safetensors")
    assert all(ended[name].equal(began[name].to(ended[name].dtype)) for name in began)

    code, said = runs.train("untrained", 1, *ALL_WRONG)  # all is done already
    assert code == 2, said
    assert "no optimizer step was taken in any iteration" in said
