"""Names of Megatron-Core's parameters, and where they stand in the tensors of its checkpoints.

The tables of weights/ name parameters as the local layers do. Transformer Engine's layers fuse a
norm into the linear that follows it, and keep all experts of a rank in one module.

A checkpoint has other names than a model. The layers of a stack that are alike are one tensor with
the layer as its first axis, their experts a second axis; where dense and mixture layers alternate,
every layer has its own. Norms are kept under the linear that follows, as Transformer Engine fuses
them.
"""

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain

from megatron_rl.weights.arch import ModelArch
from megatron_rl.weights.layouts import MegatronParam, megatron_params
from megatron_rl.weights.pieces import Box, Piece

DELTA_NORM = ("input_layernorm.", "self_attention.in_proj.layer_norm_")
INPUT_NORM = ("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
MLP_NORM = ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
# Latent attention leaves the norm before it alone, and fuses those of latent vectors.
LATENT_NORMS = (
    ("self_attention.q_layernorm.", "self_attention.linear_q_up_proj.layer_norm_"),
    ("self_attention.kv_layernorm.", "self_attention.linear_kv_up_proj.layer_norm_"),
)
LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj")
LATENT_LINEARS = (
    *("self_attention.linear_kv_down_proj", "self_attention.linear_kv_up_proj"),
    "self_attention.linear_proj",
)
QUERY_LINEARS = ("self_attention.linear_q_proj",)
LATENT_QUERY_LINEARS = ("self_attention.linear_q_down_proj", "self_attention.linear_q_up_proj")
DELTA_LINEARS = ("self_attention.in_proj", "self_attention.out_proj")
DENSE_LINEARS = ("mlp.linear_fc1", "mlp.linear_fc2")
EXPERT_LINEARS = ("mlp.experts.experts.linear_fc1", "mlp.experts.experts.linear_fc2")
SHARED_EXPERT_LINEARS = ("mlp.shared_experts.linear_fc1", "mlp.shared_experts.linear_fc2")
# Only Transformer Engine's layers ask for this entry.
ATTENTION_STATE = "self_attention.core_attention"

_FROM_TRANSFORMER_ENGINE = (
    (r"\.self_attention\.(?:linear_qkv|in_proj)\.layer_norm_weight$", ".input_layernorm.weight"),
    (r"\.mlp\.linear_fc1\.layer_norm_weight$", ".pre_mlp_layernorm.weight"),
    (
        r"\.mlp\.experts\.(linear_fc[12])\.weight(\d+)$",
        r".mlp.experts.local_experts.\2.\1.weight",
    ),
)

Lead = tuple[int, ...]  # layer and expert, each where it is an axis


def local_name(name: str) -> str:
    """The name in the local layers of a parameter of either kind of layers."""
    for pattern, replacement in _FROM_TRANSFORMER_ENGINE:
        name = re.sub(pattern, replacement, name)
    return name


@dataclass(frozen=True)
class Naming:
    """How one writer names the tensors of a checkpoint."""

    is_stacked: bool
    """True where the layer is an axis; else its number is in the name."""

    fuses_mixture_norm: bool = False
    """True where the norm before a mixture is under its linears, as stock local layers save it."""

    def key(self, param: MegatronParam, arch: ModelArch) -> str:
        """The name of the tensor that holds a parameter."""
        name = param.template.replace(".local_experts.{e}.", ".experts.")
        for pair in _norms(param, arch):
            name = name.replace(*pair)
        is_dense = param.layer is not None and not arch.has_experts(param.layer)
        if is_dense or self.fuses_mixture_norm:
            name = name.replace(*MLP_NORM)
        if self.is_stacked:
            return name.replace(".layers.{i}.", ".layers.")
        return name.replace("{i}", str(param.layer))

    def lead(self, param: MegatronParam) -> Lead:
        """The position of a parameter on the leading axes of that tensor."""
        layer = (param.layer,) if self.is_stacked and param.layer is not None else ()
        return layer if param.expert is None else (*layer, param.expert)


def _norms(param: MegatronParam, arch: ModelArch) -> tuple[tuple[str, str], ...]:
    """The norms before attention that are kept under another name."""
    if param.layer is not None and not arch.has_attention(param.layer):
        return (DELTA_NORM,)
    return (INPUT_NORM,) if arch.latent is None else LATENT_NORMS


def stock_naming(arch: ModelArch) -> Naming:
    """The names of Megatron-Core with Transformer Engine, under which we save either layers."""
    kinds = {arch.has_experts(layer) for layer in range(arch.num_layers)}
    return Naming(is_stacked=len(kinds) == 1 and arch.delta is None)


NAMINGS = tuple(
    Naming(is_stacked, fuses) for is_stacked in (True, False) for fuses in (False, True)
)
"""Every naming that is read."""


@dataclass(frozen=True)
class StoredParams:
    """The parameters that stand in one tensor of a checkpoint."""

    by_lead: dict[Lead, MegatronParam]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor, without rows that pad a vocabulary."""
        leads = list(self.by_lead)
        counts = tuple(1 + max(axis) for axis in zip(*leads, strict=True))
        return counts + self.first.shape

    @property
    def first(self) -> MegatronParam:
        return next(iter(self.by_lead.values()))

    @property
    def hf_names(self) -> list[str]:
        return [name for param in self.by_lead.values() for name in param.hf_names]

    def pieces(self, box: Box) -> Iterator[Piece]:
        """The pieces in a rectangle of a tensor: rectangle[piece.stack][piece.index] = hf[box]."""
        axes = len(next(iter(self.by_lead)))
        for lead in itertools.product(*(range(lo, hi) for lo, hi in box[:axes])):
            stack = tuple(at - lo for at, (lo, _) in zip(lead, box[:axes], strict=True))
            for piece in self.by_lead[lead].pieces:
                part = piece.cut(box[axes:])
                if part is not None:
                    yield replace(part, stack=stack)


def stored_params(
    arch: ModelArch, naming_of: Callable[[MegatronParam], Naming]
) -> dict[str, StoredParams]:
    """Tensors of a checkpoint by key, with the parameters in each, in the order of the network."""
    tensors: dict[str, StoredParams] = {}
    for param in chain.from_iterable(map(_parts, megatron_params(arch))):
        naming = naming_of(param)
        stored = tensors.setdefault(naming.key(param, arch), StoredParams({}))
        stored.by_lead[naming.lead(param)] = param
    return tensors


def _parts(param: MegatronParam) -> Iterator[MegatronParam]:
    """The parameter, or what stands in a tensor of its own: one of its pieces each."""
    if not param.stored:
        yield param
        return
    for template, piece in zip(param.stored, param.pieces, strict=True):
        (lo, hi), *rest = piece.index
        yield replace(
            param,
            template=template,
            shape=(hi - lo, *param.shape[1:]),
            pieces=(replace(piece, index=((0, hi - lo), *rest)),),
        )


def extra_state_keys(arch: ModelArch, naming: Naming) -> Iterator[str]:
    """The byte entries that stock layers ask for when they load: one per linear, all empty."""
    for layer in range(arch.num_layers):
        prefix = "decoder.layers." if naming.is_stacked else f"decoder.layers.{layer}."
        at: Lead = (layer,) if naming.is_stacked else ()
        of: Lead = (arch.num_layers,) if naming.is_stacked else ()
        has_experts = arch.has_experts(layer)
        of_every_token: tuple[str, ...] = DENSE_LINEARS
        if arch.mixture and has_experts:
            of_every_token = SHARED_EXPERT_LINEARS if arch.mixture.shared_ffn_hidden_size else ()
        for module in (*_attention_states(arch, layer), *of_every_token):
            yield _extra_state(prefix + module, at or (0,), of or (1,))
        count = arch.mixture.num_experts if arch.mixture and has_experts else 0
        for expert in range(count):
            for module in EXPERT_LINEARS:
                yield _extra_state(prefix + module, (*at, expert), (*of, count))


def _attention_states(arch: ModelArch, layer: int) -> tuple[str, ...]:
    if not arch.has_attention(layer):
        return DELTA_LINEARS
    return (*_attention_linears(arch), ATTENTION_STATE)


def _attention_linears(arch: ModelArch) -> tuple[str, ...]:
    if arch.latent is None:
        return LINEARS
    is_direct = arch.latent.query_rank is None
    return (*(QUERY_LINEARS if is_direct else LATENT_QUERY_LINEARS), *LATENT_LINEARS)


def _extra_state(module: str, at: Lead, of: Lead) -> str:
    """Megatron-Core's name of one shard of a non-tensor."""
    return f"{module}._extra_state/shard_{'.'.join(map(str, at))}_{'.'.join(map(str, of))}"
