"""An evaluation whose questions do not all come back has no result."""

import json
from types import SimpleNamespace

import pytest
import torch

from megatron_rl.errors import RunError
from megatron_rl.evaluation.config import EvaluationConfig
from megatron_rl.evaluation.evaluator import Evaluator
from megatron_rl.types import Prompt, Rollout, RolloutGroup, Verdict

PROMPTS = [Prompt(group_id=n, tokens=torch.tensor([5]), answer="4", text="2+2?") for n in range(3)]
ROLLOUT = Rollout(
    response_tokens=torch.tensor([7, 2]),
    rollout_logprobs=torch.tensor([-0.5, -0.5]),
    finish_reason="stop",
    policy_version=0,
    text="4",
    verdict=Verdict.CORRECT,
    extracted="4",
)


@pytest.fixture
def evaluated(monkeypatch, tmp_path):
    """Evaluate on a lone rank where these groups come back: (group_id, number of responses)."""
    gather = "megatron_rl.evaluation.evaluator.all_gather_objects"
    monkeypatch.setattr(gather, lambda own, group: [own])
    config = EvaluationConfig(
        benchmarks={"some": {"path": "some.jsonl"}}, samples=2, resamples=10, every=1
    )
    evaluator = Evaluator(
        config,
        {"some": PROMPTS},
        max_response_tokens=9,
        model="m",
        seed=0,
        asked={"date": "2026-11-27"},
        equality=lambda pairs: {},
        output_dir=tmp_path,
        groups=SimpleNamespace(world=None, is_main=True),
    )

    def run(*came_back):
        groups = [
            RolloutGroup(prompt=PROMPTS[number], rollouts=(ROLLOUT,) * count)
            for number, count in came_back
        ]
        return evaluator.run(lambda prompts, draw: groups, iteration=None, policy_version=0)

    run.directory = tmp_path / "evaluation"
    return run


def test_all_questions_in_any_order(evaluated):
    result = evaluated((2, 2), (0, 2), (1, 2)).benchmarks["some"]
    assert (result.num_questions, result.verdicts[Verdict.CORRECT]) == (3, 6)
    summary = json.loads((evaluated.directory / "summary.json").read_text())
    assert summary["prompts"] == {"date": "2026-11-27"}


@pytest.mark.parametrize(
    ("came_back", "said"),
    [
        ([], r"3 of 3 questions .* 0, 1, 2"),
        ([(0, 2), (2, 2)], r"1 of 3 questions .* once with 2 responses .* counted from 0: 1\)"),
        ([(0, 2), (1, 1), (2, 2)], r"1 of 3 questions .*: 1\)"),
        ([(0, 2), (0, 2), (1, 2), (2, 2)], r"1 of 3 questions .*: 0\)"),
    ],
)
def test_lost_questions_are_no_result(evaluated, came_back, said):
    with pytest.raises(RunError, match=rf"evaluation\.benchmarks\.some: {said}"):
        evaluated(*came_back)
    assert not (evaluated.directory / "summary.json").exists()
