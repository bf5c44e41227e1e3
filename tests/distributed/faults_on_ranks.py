"""Probes of megatron_rl/megatron/faults.py that need ranks: each trains what is refused or avoided.

A probe runs on every rank, with {model: file of its Problem}, and returns the same on all.
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from cases import FEW_ROWS, Case, question_of
from layout import Layout

NOTICED, BOUND = 1e-3, 1e-12
Problems = dict[str, Path]

TP2 = Layout(name="TP2", world=2, tp=2)
TP2_SP = replace(TP2, sequence_parallel=True)
PP2_VPP2 = Layout(name="PP2 VPP2", world=2, pp=2, vpp=2)
EXPERTS = Layout(name="DP2", world=2, model="qwen3_moe")


def interleaving_without_overlap(problems: Problems) -> bool:
    """Rows are padded to one length: gloo notices messages that cross by their sizes alone."""
    import policy_on_ranks

    def even_packer(*args: Any, **settings: Any) -> Any:
        return stock(*args, **{**settings, "row_multiple": 2 * FEW_ROWS})

    stock = policy_on_ranks.Packer
    no_overlap = {"overlap_p2p_comm": False, "batch_p2p_comm": True}
    with mock.patch.object(policy_on_ranks, "Packer", even_packer):
        assert _measured(problems, PP2_VPP2).gradient_error < BOUND
        return _measured(problems, PP2_VPP2, megatron=no_overlap).gradient_error > NOTICED


def experts_of_smaller_tensor_parallelism(problems: Problems) -> bool:
    layout = replace(TP2_SP, model="qwen3_moe", expert_tp=1)
    return _measured(problems, layout).gradient_error > NOTICED


def weights_without_marks(problems: Problems) -> bool:
    measured = _measured(problems, TP2, megatron={"perform_initialization": False})
    return measured.norm_error > NOTICED


def experts_without_sequence_parallelism(problems: Problems) -> bool:
    try:
        _measured(problems, replace(TP2, model="qwen3_moe"))
    except ValueError as error:
        return "tensor parallelism" in str(error)
    return False


def norm_without_mark(problems: Problems) -> bool:
    """What stock code reduces where our norm does not mark its weight."""
    from gradient_faults import norms_without_tag

    return _measured(problems, TP2_SP, fault=norms_without_tag).gradient_error > NOTICED


def latent_keys_without_reduction(problems: Problems) -> bool:
    """Stock code, which is right where one rank has all heads."""
    from megatron_rl.megatron.latent_attention import LatentAttention, MLASelfAttention

    name = "get_query_key_value_tensors"
    layout = replace(TP2_SP, model="moonlight")
    with mock.patch.object(LatentAttention, name, getattr(MLASelfAttention, name)):
        assert _measured(problems, replace(EXPERTS, model="moonlight")).gradient_error < NOTICED
        return _measured(problems, layout).gradient_error > NOTICED


def gated_norm_without_reduction(problems: Problems) -> bool:
    """Stock code takes the weight as it is, and nothing else adds its gradient up over ranks."""
    if "qwen3_5" not in problems:  # nets are refused at this version
        return False
    from megatron_rl.megatron import delta_net

    name = "copy_to_tensor_model_parallel_region"
    layout = replace(TP2, model="qwen3_5")
    with mock.patch.object(delta_net, name, lambda weight, group: weight):
        assert _measured(problems, replace(EXPERTS, model="qwen3_5")).gradient_error < NOTICED
        return _measured(problems, layout).gradient_error > NOTICED


def optimizers_of_a_mixture(problems: Problems) -> bool:
    """A checkpoint of an expert-parallel layout loads without it only after fitting."""
    from megatron_rl.megatron import checkpoint

    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder)
    with _policy(problems, replace(EXPERTS, ep=2), dtype="float32") as policy:
        writer = checkpoint.writer_of(policy, Path(folder[0]), policy.groups)
        writer.write()
        writer.gather()
        writer.finish()
        dist.barrier()
    with _policy(problems, EXPERTS, dtype="float32") as policy:
        checkpoint.load_model(policy, Path(folder[0]))
        try:
            with mock.patch.object(checkpoint, "fitted", lambda _, loaded: loaded):
                checkpoint.load_model(policy, Path(folder[0]))
        except (AssertionError, KeyError, RuntimeError, ValueError):
            return True
    return False


# -- what they are made of -------------------------------------------------------------------------


def _run_probes(names: tuple[str, ...], problems: Problems, out: Path) -> None:
    shown = {name: globals()[name](problems) for name in names}
    if dist.get_rank() == 0:
        out.write_text(json.dumps(shown))


def _measured(
    problems: Problems,
    layout: Layout,
    megatron: dict[str, Any] | None = None,
    fault: Callable[..., Any] | None = None,
) -> Any:
    """One update of the reference's answer to GRPO."""
    from policy_on_ranks import measure

    problem = torch.load(problems[layout.model], weights_only=False)
    case = Case(question=question_of("grpo"), row_tokens=FEW_ROWS)
    with _policy(problems, layout, megatron=megatron) as policy:
        return measure(policy, case, problem, layout=layout, fault=fault)


@contextmanager
def _policy(
    problems: Problems,
    layout: Layout,
    dtype: str = "float64",
    megatron: dict[str, Any] | None = None,
) -> Iterator[Any]:
    from policy_on_ranks import policy_at

    from megatron_rl.megatron.config import OptimizerConfig

    problem = torch.load(problems[layout.model], weights_only=False)
    optimizer = OptimizerConfig(lr=1e-3, clip_grad=0.0)
    with policy_at(layout, problem, optimizer, dtype, megatron=megatron) as policy:
        yield policy
