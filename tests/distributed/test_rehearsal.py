"""A rehearsed rank holds what a real one holds, and the ranks of a run exchange what is rehearsed.

Real ranks train on a CPU; what they hold is summed up over the memory of all their tensors.
"""

import contextlib
import gc
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from harness import run_on_ranks
from tiny_models import write_model
from torch import Tensor

from megatron_rl.algorithms.algorithm import Algorithm
from megatron_rl.config import RunConfig
from megatron_rl.ops.head import LOGITS_BYTES
from megatron_rl.rehearsal.apart import rehearse_apart
from megatron_rl.rehearsal.ledger import Storages
from megatron_rl.rehearsal.rank import full_rows
from megatron_rl.weights.families.registry import read_model_config

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank, layers anew": (
        1,
        {
            "model": {
                "recompute_granularity": "full",
                "recompute_method": "uniform",
                "recompute_num_layers": 1,
            }
        },
    ),
    "TP 2, sequence parallel": (
        2,
        {"parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True}},
    ),
    "DP 2": (2, {}),
    "PP 2 of 3 and 1 layers": (
        2,
        {
            "parallel": {
                "pipeline_model_parallel_size": 2,
                "num_layers_in_last_pipeline_stage": 1,
            }
        },
    ),
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_model("qwen2", folder)
    config = json.loads((folder / "config.json").read_text())
    # Wide enough for activations to be more than what a process has anyway.
    config |= {"hidden_size": 256, "intermediate_size": 704, "vocab_size": 2048}
    config |= {"max_position_embeddings": 2048}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def recipe(model_dir: Path, changes: dict[str, Any]) -> RunConfig:
    sections: dict[str, Any] = {
        "model": {"path": str(model_dir), "dtype": "float32"},
        "algorithm": {"preset": "sft"},
        "prompts": {"path": "none.jsonl", "prompts_per_iteration": 16, "max_prompt_tokens": 64},
        "rollout": {"engine": "vllm", "max_response_tokens": 192},
        "batching": {"max_tokens_per_microbatch": 1024},
        "run": {"num_iterations": 1, "output_dir": "none"},
    }
    for name, section in changes.items():
        sections[name] = sections.get(name, {}) | section
    return RunConfig.model_validate(sections)


EXHAUSTIVE = {"one rank, layers anew", "DP 2"}


@pytest.mark.parametrize(
    "layout",
    [pytest.param(y, marks=pytest.mark.exhaustive if y in EXHAUSTIVE else ()) for y in LAYOUTS],
)
def test_a_rehearsed_rank_holds_what_a_real_one_holds(layout, model_dir, tmp_path):
    world_size, changes = LAYOUTS[layout]
    config = recipe(model_dir, changes)
    run_on_ranks(world_size, train_and_look, config, tmp_path)
    for rank in range(world_size) if layout.startswith("PP") else [0]:  # else all are alike
        real = json.loads((tmp_path / f"{rank}.json").read_text())
        rehearsed = rehearse_apart(config, world_size, rank)
        assert rehearsed.memory["update"] == pytest.approx(real["update"], rel=0.05), rank
        for name, nbytes in rehearsed.held.items():
            assert nbytes == pytest.approx(real[name], rel=0.05), (rank, name)


def train_and_look(config: RunConfig, folder: Path) -> None:
    """Train this rank for two updates, and write down what its tensors took."""
    from policy_on_ranks import _groups_destroyed

    from megatron_rl.megatron.groups import join
    from megatron_rl.platforms.base import CPU
    from megatron_rl.policy.policy import Policy

    arch = read_model_config(Path(config.model.path), [])
    algorithm, held = Algorithm(config.algorithm), {}
    groups = join(CPU, config.parallel, 1)
    rows, _ = full_rows(config, algorithm, groups.layout)
    with _groups_destroyed(), Storages("cpu") as storages, layers_of_a_gpu():
        policy = Policy(
            arch,
            config.model,
            config.parallel,
            config.optimizer,
            groups,
            temperature=1.0,
            run_updates=2,
        )
        policy.config.bias_activation_fusion = False
        draw(policy.named_parameters())
        gc.collect()
        held["weights"] = storages.held
        policy.prepare_training()
        gc.collect()
        held["gradients and main weights"] = storages.held - held["weights"]
        before = storages.held
        policy.update(rows, algorithm.loss())
        gc.collect()
        held["Adam's moments"] = storages.held - before
        storages.mark()
        policy.update(rows, algorithm.loss())
        held["update"] = storages.peak
    (folder / f"{groups.rank}.json").write_text(json.dumps(held))


def draw(parameters: dict[str, Tensor]) -> None:
    for parameter in parameters.values():
        torch.nn.init.normal_(parameter, std=0.02)


@contextlib.contextmanager
def layers_of_a_gpu() -> Iterator[None]:
    """A GPU has one kernel for RMSNorm, and without Transformer Engine nothing else of its kind;
    logits are given back to its allocator.
    """

    def norm(values: Tensor, shape: Any, weight: Tensor, eps: float) -> Tensor:
        normed: Tensor = KeptInput.apply(values, weight, eps)
        return normed

    def never(*_: Tensor) -> bool:  # a mock would keep the tensors that it was called with
        return False

    with (
        mock.patch("torch.nn.functional.rms_norm", norm),
        mock.patch("megatron_rl.ops.fused_layers.run_natively", never),
        mock.patch("megatron_rl.ops.head.logits_bytes", return_value=LOGITS_BYTES),
        mock.patch("megatron_rl.ops.head.KEPT_BYTES", 0),
    ):
        yield


class KeptInput(torch.autograd.Function):
    """An RMSNorm whose backward computes it again from its input."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(values, weight)
        ctx.eps = eps
        return normed(values, weight, eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            out = normed(*inputs, ctx.eps)
        return (*torch.autograd.grad(out, inputs, gradients[0]), None)


def normed(values: Tensor, weight: Tensor, eps: float) -> Tensor:
    return values * (values.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


@pytest.mark.parametrize("extent", ["share", pytest.param("whole", marks=pytest.mark.exhaustive)])
def test_every_kind_of_preset_family_and_layout_is_rehearsed(extent):
    """In one process, since most of a rehearsal's time is that of its imports."""
    script = Path(__file__).parent / "rehearsals_alone.py"
    done = subprocess.run([sys.executable, str(script), extent], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
