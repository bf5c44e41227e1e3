"""The learning rate of every optimizer step, by Megatron's schedule as we set it up."""

import json
import subprocess
import sys

import pytest

RATES = """
import json, sys
from types import SimpleNamespace
from megatron_rl.megatron.config import OptimizerConfig
from megatron_rl.megatron.optimizer import build_scheduler
found = []
for settings in json.loads(sys.argv[1]):
    optimizer = SimpleNamespace(param_groups=[{}])
    scheduler = build_scheduler(OptimizerConfig(lr=1.0, **settings), optimizer, run_updates=8)
    found.append([])
    for _ in range(8):
        found[-1].append(optimizer.param_groups[0]["lr"])
        scheduler.step(1)
print(json.dumps(found))
"""
BY_HAND = (  # the first step of a warm-up moves the policy already
    ({"lr_warmup_updates": 4}, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
    ({"lr_warmup_updates": 1}, [1] * 8),
    ({}, [1] * 8),
    (
        {"lr_warmup_updates": 2, "lr_schedule": "linear", "lr_decay_updates": 5},
        [0.5, 1, 0.75, 0.5, 0.25, 0, 0, 0],
    ),
    (
        {"lr_warmup_updates": 9, "lr_schedule": "linear", "lr_decay_updates": 4},
        [0.25, 0.5, 0.75, 1, 0, 0, 0, 0],
    ),
)


@pytest.fixture(scope="module")
def found():
    """In a fresh process: here Megatron-Core must not be imported before it is prepared."""
    settings = json.dumps([settings for settings, _ in BY_HAND])
    ended = subprocess.run(
        [sys.executable, "-c", RATES, settings], capture_output=True, text=True, check=True
    )
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", range(len(BY_HAND)))
def test_the_learning_rate_of_every_step_from_the_first_on(found, case):
    assert found[case] == pytest.approx(BY_HAND[case][1])
