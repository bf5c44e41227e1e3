"""What a rank does: build a policy from a Hugging Face directory, and compare its logits.

Imported on ranks only, after preload_megatron has adapted Megatron-Core.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import preload_megatron  # noqa: F401  # isort: split
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from torch import Tensor

from megatron_rl.batching.pack import pack
from megatron_rl.megatron.attention import PackedRows
from megatron_rl.megatron.config import ModelConfig, OptimizerConfig
from megatron_rl.megatron.delta_rule import DeltaRow, delta_row
from megatron_rl.megatron.layers import CentredNorm, WideNorm
from megatron_rl.parallel.config import ParallelConfig
from megatron_rl.parallel.groups import Groups
from megatron_rl.policy.policy import Policy
from megatron_rl.types import MicroBatch, Sample
from megatron_rl.weights.arch import ModelArch
from megatron_rl.weights.families.registry import read_model_config
from megatron_rl.weights.model_source import ModelSource
from megatron_rl.weights.pieces import Piece

ChangeArch = Callable[[ModelArch], ModelArch]
ChangeNorm = Callable[[WideNorm, Tensor], Tensor]
ChangePieces = Callable[[list[Piece], Policy], list[Piece]]


def loaded_policy(
    model_dir: Path,
    parallel: ParallelConfig,
    groups: Groups,
    change_arch: ChangeArch | None = None,
    change_pieces: ChangePieces | None = None,
    change: Callable[[Policy], None] | None = None,
    dtype: str = "float32",
    change_norm: ChangeNorm | None = None,
) -> Policy:
    """Every parameter is NaN before the files are read: none may keep what it was born with."""
    arch = read_model_config(model_dir)
    policy = Policy(
        arch if change_arch is None else change_arch(arch),
        ModelConfig(path=str(model_dir), dtype=dtype),
        parallel,
        OptimizerConfig(),
        groups,
        temperature=1.0,
        run_updates=1,
    )
    if change_pieces is not None:
        policy.pieces = change_pieces(policy.pieces, policy)
    params = policy.named_parameters()
    for param in params.values():
        param.fill_(torch.nan)
    policy.load(ModelSource(config_dir=model_dir))
    if change_norm is not None:
        norms = [m for chunk in policy.chunks for m in chunk.modules() if isinstance(m, WideNorm)]
        assert norms
        for norm in norms:
            norm.forward = partial(change_norm, norm)
    unwritten = [name for name, param in params.items() if param.isnan().any()]
    assert not unwritten, unwritten
    if change is not None:
        change(policy)
    return policy


def logits_error(policy: Policy, sequences: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest |policy - transformers| on all ranks, of a row with all sequences and a short one."""
    numbers = range(len(sequences))
    rows = [_packed(policy, [(k, sequences[k]) for k in asked]) for asked in (numbers, [1])]
    largest = torch.zeros(1, dtype=torch.float64)

    def compare(hidden: Tensor, batch: MicroBatch) -> Tensor:
        if policy.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden)
        logits = F.linear(hidden[:, 0].index_select(0, batch.loss.at), policy.head_weight)
        logits = gather_from_tensor_model_parallel_region(logits)
        wanted = torch.cat([expected[sample.group_id][:-1] for sample in batch.samples])
        difference = (logits[:, : policy.arch.vocab_size] - wanted).abs().max().double()
        largest.copy_(largest.maximum(difference.nan_to_num(nan=torch.inf)))
        return logits.sum()

    policy.forward(rows, compare)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    assert largest.item() > 0
    return largest.item()


def _packed(policy: Policy, numbered: Sequence[tuple[int, Tensor]]) -> MicroBatch:
    """All but the first token are response: the logits of every position but the last are asked."""
    samples = [
        Sample(
            group_id=number,
            index=0,
            update=0,
            prompt_tokens=tokens[:1],
            response_tokens=tokens[1:],
            advantage=0.0,
            rollout_logprobs=None,
        )
        for number, tokens in numbered
    ]
    return pack(
        samples,
        weight_of=lambda sample: 1.0,
        multiple=policy.groups.layout.tp,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


# -- mistakes --------------------------------------------------------------------------------------


def without_rope_scaling(arch: ModelArch) -> ModelArch:
    return replace(arch, rope_scaling_factor=None, yarn=None, long_rope=None)


def without_amplitude(arch: ModelArch) -> ModelArch:
    if arch.long_rope is not None:
        return replace(arch, long_rope=replace(arch.long_rope, amplitude=1.0))
    return replace(arch, yarn=replace(arch.yarn, amplitude=1.0))


def without_windows(arch: ModelArch) -> ModelArch:
    assert arch.sliding is not None
    return replace(arch, sliding=replace(arch.sliding, window=1000))


def one_token_more_seen(arch: ModelArch) -> ModelArch:
    assert arch.sliding is not None
    return replace(arch, sliding=replace(arch.sliding, window=arch.sliding.window + 1))


def windows_in_other_layers(arch: ModelArch) -> ModelArch:
    """As if layers were counted from 1: the last window is in the layer that has none."""
    assert arch.sliding is not None
    moved = frozenset((layer + 1) % arch.num_layers for layer in arch.sliding.layers)
    return replace(arch, sliding=replace(arch.sliding, layers=moved))


def all_layers_turned_alike(arch: ModelArch) -> ModelArch:
    assert arch.sliding is not None
    return replace(arch, sliding=replace(arch.sliding, rope_theta=None))


def with_another_theta(arch: ModelArch) -> ModelArch:
    return replace(arch, rope_theta=arch.rope_theta / 50)


def with_another_softmax(arch: ModelArch) -> ModelArch:
    assert arch.mixture is not None
    mixture = replace(arch.mixture, renormalized=not arch.mixture.renormalized)
    return replace(arch, mixture=mixture)


def queries_and_gates_swapped(pieces: list[Piece], policy: Policy) -> list[Piece]:
    """Behind each head's rows of queries in q_proj stand as many of its gates."""
    dim = policy.arch.head_dim

    def swapped(piece: Piece) -> Piece:
        if not piece.hf.endswith("q_proj.weight"):
            return piece
        (lo, hi), columns = piece.box
        by = -dim if lo // dim % 2 else dim
        return replace(piece, box=((lo + by, hi + by), columns))

    return list(map(swapped, pieces))


def norms_not_centred(policy: Policy) -> None:
    """They multiply by their weights, and not by 1 + weight."""
    for module in _modules(policy):
        if isinstance(module, CentredNorm):
            module.weight.data.sub_(1)


def shared_gates_open(policy: Policy) -> None:
    """The expert that every token meets has no gate."""
    _shared_experts(policy, "use_shared_expert_gate", False)


def without_shared_experts(policy: Policy) -> None:
    """The output of that expert is left out."""
    _shared_experts(policy, "forward", torch.zeros_like)


def _shared_experts(policy: Policy, name: str, value: object) -> None:
    found = [module for module in _modules(policy) if hasattr(module, "use_shared_expert_gate")]
    assert found
    for module in found:
        setattr(module, name, value)


def sequences_run_on(policy: Policy) -> None:
    """States go from one sequence of a row into the next."""
    for module in _modules(policy):
        if hasattr(module, "planned"):  # a gated delta net
            module.planned = partial(_as_one_run, module)


def _as_one_run(net: Any, rows: PackedRows) -> DeltaRow:
    length = sum(rows.runs[0])
    return delta_row([length], [None], kernel=net.conv_kernel_dim, device=torch.device("cpu"))


def _modules(policy: Policy) -> Iterator[torch.nn.Module]:
    return chain.from_iterable(chunk.modules() for chunk in policy.chunks)


def without_scale_of_routers(arch: ModelArch) -> ModelArch:
    assert arch.mixture is not None
    return replace(arch, mixture=replace(arch.mixture, scale=1.0))


def without_groups_of_experts(arch: ModelArch) -> ModelArch:
    return replace(arch, mixture=replace(arch.mixture, num_groups=1, chosen_groups=1))


def without_scale_of_scores(arch: ModelArch) -> ModelArch:
    return replace(arch, yarn=replace(arch.yarn, score_mscale=0.0))


def halves_for_neighbours(arch: ModelArch) -> ModelArch:
    return replace(arch, latent=replace(arch.latent, interleaved=False))


def whole_heads_turned(arch: ModelArch) -> ModelArch:
    if arch.long_rope is not None:
        factors = (2 * arch.long_rope.factors)[: arch.head_dim // 2]
        arch = replace(arch, long_rope=replace(arch.long_rope, factors=factors))
    return replace(arch, rotary_dim=None)


def long_factors(arch: ModelArch) -> ModelArch:
    """Those of texts behind the context of pretraining, as vLLM has them for shorter ones, too."""
    factors = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
    return replace(arch, long_rope=replace(arch.long_rope, factors=factors))


def of_each_head(norm: WideNorm, heads: Tensor) -> Tensor:
    """As Qwen3 norms heads, each by itself."""
    weight = norm.own_weight.view(heads.shape[-2:])
    return F.rms_norm(heads, heads.shape[-1:], eps=norm.eps) * weight


def of_own_heads(norm: WideNorm, heads: Tensor) -> Tensor:
    """Over the heads of this tensor-parallel rank alone."""
    own = heads.flatten(-2)
    return F.rms_norm(own, own.shape[-1:], norm.own_weight, norm.eps).view_as(heads)


def with_another_epsilon(arch: ModelArch) -> ModelArch:
    return replace(arch, rms_norm_eps=10 * arch.rms_norm_eps)


def swapped(one: str, other: str) -> ChangePieces:
    """Two Hugging Face tensors in each other's place."""

    def change(pieces: list[Piece], policy: Policy) -> list[Piece]:
        parts = {f"{one}.weight": f"{other}.weight", f"{other}.weight": f"{one}.weight"}
        result = [
            replace(piece, hf=piece.hf.replace(part, parts[part]))
            for piece in pieces
            for part in [next((part for part in parts if piece.hf.endswith(part)), "")]
            if part
        ]
        assert result
        changed = {(piece.param, piece.index): piece for piece in result}
        return [changed.get((piece.param, piece.index), piece) for piece in pieces]

    return change


def biases_of_routers_reversed(pieces: list[Piece], policy: Policy) -> list[Piece]:
    """The first layer with experts has the bias of the last one."""
    changed = []
    for piece in pieces:
        if piece.param.endswith("expert_bias"):
            layers = policy.arch.num_layers
            number = int(piece.hf.split(".")[2])
            hf = piece.hf.replace(f".{number}.", f".{layers - number}.")  # layer 0 is dense
            piece = replace(piece, hf=hf)
        changed.append(piece)
    return changed


def stacks_taken_for_ours(pieces: list[Piece], policy: Policy) -> list[Piece]:
    """Each rank has a run of rows of a file's one matrix, as it has of Megatron-Core's."""
    rank, result = policy.groups.here.tp_rank, {}
    for piece in pieces:
        if piece.hf.endswith(("qkv_proj.weight", "gate_up_proj.weight")):
            rows, columns = policy.named_parameters()[piece.param].shape
            box = ((rank * rows, (rank + 1) * rows), (0, columns))
            piece = replace(piece, index=((0, rows), (0, columns)), box=box)
        result[piece.param, piece.index] = piece
    return list(result.values())


def gate_over_up_cut_as_one(pieces: list[Piece], policy: Policy) -> list[Piece]:
    """At TP2, rank 0 holds all of gate and rank 1 all of up: the stacked matrix, cut in two."""
    mine = ("gate_proj", "up_proj")[policy.groups.here.tp_rank]
    result = []
    for piece in pieces:
        if ".mlp.linear_fc1." not in piece.param:
            result.append(piece)
        elif mine in piece.hf:
            rows = 2 * (piece.index[0][1] - piece.index[0][0])
            columns = piece.index[1]
            result.append(replace(piece, index=((0, rows), columns), box=((0, rows), columns)))
    return result
