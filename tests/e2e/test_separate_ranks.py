"""Runs whose last ranks only sample: in turns with the trainer, and one iteration ahead of it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from engine_models import QUICKSTART, write_model
from forked import run_command
from safetensors.torch import load_file
from training_runs import ENVIRONMENT, ROOT

pytestmark = pytest.mark.slow
EXHAUSTIVE = pytest.mark.exhaustive

# What a clock, the machine or the bytes on the wire say, and what only separate ranks report.
NOT_COMPARED = (
    *("time/", "memory/", "tokens_per_s", "weights/"),
    *("rollout/updates_behind", "rollout/logprob_gap"),
)
AHEAD = {"run": {"lag": 1}, "rollout": {"separate_ranks": 1}}
# Weights do not move: what is added to them is lost in their rounding.
FROZEN = {"optimizer": {"lr": 1e-30}}
# Prompts are drawn until four groups have right and wrong responses.
FILLED = {"rollout": {"group_size": 2, "rounds": {"max_responses": 4, "fill": True}}}
UPDATES = 2  # of an iteration


def recipe_of(folder: Path, name: str, *changes: dict[str, Any]) -> dict[str, Any]:
    recipe: dict[str, Any] = {
        "run": {"output_dir": str(folder / name), "num_iterations": 4, "seed": 5},
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "prompts": {
            "path": str(QUICKSTART / "data" / "train.jsonl"),
            "prompts_per_iteration": 4 * UPDATES,
            "max_prompt_tokens": 64,
        },
        "rollout": {"engine": "vllm", "group_size": 4, "max_response_tokens": 12},
        "reward": {"kind": "coin_reward:is_even", "num_workers": 1},
        "algorithm": {"preset": "grpo"},
        "optimizer": {"lr": 3e-3, "prompts_per_update": 4},
        "checkpoint": {"save_every": 1, "keep_last": 4},
        "debug": {"record": 4},
    }
    for change in changes:
        for section, values in change.items():
            recipe[section] = {**recipe.get(section, {}), **values}
    return recipe


def train(folder: Path, name: str, ranks: int, *changes: dict[str, Any]) -> str:
    """What it printed."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe_of(folder, name, *changes)))
    code, said = run_command(["train", str(path)], ranks, ROOT, ENVIRONMENT)
    assert code == 0, said[-8000:]
    return said


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("separate")
    write_model("qwen2_tied", found / "model")
    return found


@pytest.fixture(scope="module")
def ahead(folder):
    """A run at lag 1 on one rank that trains and one that samples."""
    train(folder, "ahead", 2, AHEAD)
    return folder / "ahead"


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def compared(run: Path) -> list[dict[str, float]]:
    return [
        {name: v for name, v in row.items() if not any(part in name for part in NOT_COMPARED)}
        for row in metrics(run)
    ]


def weights(run: Path) -> bytes:
    return (run / "hf" / "model.safetensors").read_bytes()


def responses(run: Path, iteration: int) -> list[dict[str, Any]]:
    """What a run recorded of an iteration: tokens and log-probs, by prompt and place."""
    folder = run / "debug" / f"iteration_{iteration:06d}"
    groups = [
        group
        for path in sorted(folder.iterdir())
        for group in torch.load(path, weights_only=True)["groups"]
    ]
    return [
        {
            "prompt": group["prompt"]["group_id"],
            "tokens": rollout["response_tokens"].tolist(),
            "logprobs": rollout["rollout_logprobs"].tolist(),
            "reward": rollout["reward"],
        }
        for group in sorted(groups, key=lambda group: group["prompt"]["group_id"])
        for rollout in group["rollouts"]
    ]


@pytest.mark.parametrize("changes", [{}, FILLED], ids=["responses at once", "rounds"])
def test_in_turns_it_is_the_run_of_ranks_that_do_both(folder, changes):
    """The same responses, rewards, gradients and evaluations, to the bit."""
    held = {
        "evaluation": {
            "benchmarks": {
                "held": {
                    "path": str(QUICKSTART / "data" / "heldout.jsonl"),
                    "max_problems": 6,
                }
            },
            "samples": 2,
            "at_start": True,
            "at_end": True,
        }
    }
    both, apart = (f"{name} {bool(changes)}" for name in ("both", "apart"))
    train(folder, both, 1, changes, held)
    separate = {"rollout": {**changes.get("rollout", {}), "separate_ranks": 1}}
    said = train(folder, apart, 2, changes, held, separate)
    assert "1 engines of TP 1 on the last 1 ranks, which only sample, in turns" in said
    assert weights(folder / apart) == weights(folder / both)
    assert compared(folder / apart) == compared(folder / both)
    assert [row.get("rollout/updates_behind") for row in metrics(folder / apart)] == [
        *[None],
        *[0] * 4,
    ]
    for iteration in range(1, 5):
        found = responses(folder / apart, iteration)
        assert found == responses(folder / both, iteration)
    written = [folder / name / "evaluation" / "held_000004.jsonl" for name in (both, apart)]
    assert written[0].read_text() == written[1].read_text()


def test_an_iteration_is_sampled_by_the_weights_before_those_of_the_last(folder, ahead):
    """Iterations 1 and 2 from the first weights, 3 from those after iteration 1, and so on."""
    train(folder, "never moved", 1, FROZEN)
    expected = [responses(folder / "never moved", iteration) for iteration in (1, 2)]
    for done in (1, 2):
        name = f"moved {done} times"
        kept = Path("checkpoints") / f"iteration_{done:06d}"
        shutil.copytree(ahead / kept, folder / name / kept)
        said = train(folder, name, 1, FROZEN, {"run": {"num_iterations": done + 2}})
        assert f"resumed after iteration {done}" in said
        expected.append(responses(folder / name, done + 2))
    found = [responses(ahead, iteration) for iteration in (1, 2, 3, 4)]
    assert found == expected
    assert expected[1] != responses(folder / "moved 1 times", 2)  # the weights tell
    assert [row["rollout/updates_behind"] for row in metrics(ahead)] == [0, *[UPDATES] * 3]


@pytest.mark.parametrize(
    "is_filled",
    [pytest.param(False, marks=EXHAUSTIVE), True],
    ids=["responses at once", "rounds"],
)
def test_it_resumes_with_rollouts_in_flight(folder, ahead, is_filled):
    changes = [AHEAD]
    straight, name = ahead, f"resumed {is_filled}"
    if is_filled:
        changes = [{**AHEAD, "rollout": {**FILLED["rollout"], "separate_ranks": 1}}]
        straight = folder / "ahead, filled"
        train(folder, straight.name, 2, *changes)
    shutil.copytree(straight, folder / name)
    for lost in ("hf", "checkpoints/iteration_000003", "checkpoints/iteration_000004"):
        shutil.rmtree(folder / name / lost)
    said = train(folder, name, 2, *changes)
    assert "iteration 3: its rollouts are the checkpoint's" in said
    assert weights(folder / name) == weights(straight)
    assert compared(folder / name) == compared(straight)
    assert responses(folder / name, 3) == responses(straight, 3)


def test_rollouts_in_flight_of_another_batch_are_drawn_anew_and_that_is_said(folder, ahead):
    name, kept = "smaller batch", Path("checkpoints") / "iteration_000002"
    shutil.copytree(ahead / kept, folder / name / kept)
    smaller = {"prompts": {"prompts_per_iteration": 4}, "run": {"lag": 1, "num_iterations": 3}}
    said = train(folder, name, 2, AHEAD, smaller)
    assert "iteration 3: it has another batch than the checkpoint's rollouts" in said
    (row,) = metrics(folder / name)
    assert (row["rollout/updates_behind"], row["rollout/responses"]) == (0, 4 * 4)


@pytest.mark.parametrize(
    ("ranks", "separate", "tp", "engine_tp"),
    [
        (4, 2, 2, 2),
        pytest.param(3, 2, 1, 2, marks=EXHAUSTIVE),
        pytest.param(3, 1, 2, 1, marks=EXHAUSTIVE),
        (3, 2, 1, 1),
    ],
    ids=["TP2 and TP2", "one and TP2", "TP2 and one", "one and two engines"],
)
def test_at_any_split_it_samples_what_one_rank_would(folder, ahead, ranks, separate, tp, engine_tp):
    """The first two iterations' rewards, whose weights no update has touched, and all verified."""
    name = f"{ranks} ranks, {separate} apart, {tp} and {engine_tp}"
    layout = {
        "rollout": {"separate_ranks": separate, "tensor_model_parallel_size": engine_tp},
        "parallel": {"tensor_model_parallel_size": tp},
        "weights": {"verify_one_in": 1},
        "run": {"lag": 1, "num_iterations": 3},
    }
    said = train(folder, name, ranks, layout)
    assert "engine probe: largest log-prob gap" in said
    for iteration in (1, 2):
        found, expected = responses(folder / name, iteration), responses(ahead, iteration)
        assert [each["tokens"] for each in found] == [each["tokens"] for each in expected]
    first, one = metrics(folder / name)[0], metrics(ahead)[0]
    for quantity in ("policy/loss", "policy/grad_norm", "reward/mean"):
        assert first[quantity] == pytest.approx(one[quantity], rel=1e-4, abs=1e-6)
    assert [row["rollout/updates_behind"] for row in metrics(folder / name)] == [
        0,
        UPDATES,
        UPDATES,
    ]
    tensors = len(load_file(folder / "model" / "model.safetensors"))
    verified = [row["weights/verified_tensors"] for row in metrics(folder / name)]
    assert verified == [tensors] * 3


class Started:
    """A run at lag 1 on two ranks, as a user starts it, that has come to its third iteration."""

    def __init__(self, folder: Path, name: str) -> None:
        self.run = folder / name
        recipe = recipe_of(folder, name, AHEAD, {"run": {"lag": 1, "num_iterations": 400}})
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe))
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        self.process = subprocess.Popen(
            [sys.executable, *torchrun, "-m", "megatron_rl", "train", str(path)],
            cwd=ROOT,
            env=os.environ | ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        lines = self.run / "metrics.jsonl"
        deadline = time.monotonic() + 240
        while not lines.exists() or len(lines.read_text().splitlines()) < 3:
            assert self.process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def rank(self, number: int) -> int:
        """The process of a rank."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        for pid in map(int, children.read_text().split()):
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if f"RANK={number}".encode() in variables:
                return pid
        raise LookupError(f"rank {number} is not there")

    def said(self) -> str:
        said, _ = self.process.communicate(timeout=120)
        return said


def test_a_signal_ends_both_sides_and_loses_nothing(folder, ahead):
    started = Started(folder, "told to stop")
    started.process.send_signal(signal.SIGTERM)
    said = started.said()
    assert "told to stop: " in said, said
    assert "stopped: " in said
    done = metrics(started.run)[-1]["iteration"]
    assert (started.run / "checkpoints" / f"iteration_{done:06d}" / "ahead_0.pt").exists()
    # The run to the end of the next iteration is the one that nobody stopped.
    until = {"run": {"lag": 1, "num_iterations": done + 1}}
    straight = folder / "undisturbed"
    train(folder, straight.name, 2, AHEAD, until)
    train(folder, started.run.name, 2, AHEAD, until)
    assert weights(started.run) == weights(straight)
    assert compared(started.run) == compared(straight)


@pytest.mark.parametrize(
    "lost",
    [0, pytest.param(1, marks=EXHAUSTIVE)],
    ids=["the one that trains", "the one that samples"],
)
def test_where_one_rank_is_killed_the_other_says_so_and_leaves(folder, lost):
    started = Started(folder, f"lost {lost}")
    os.kill(started.rank(lost), signal.SIGKILL)
    said = started.said()
    assert started.process.returncode != 0
    assert f"rank {lost} (process" in said, said[-4000:]
