"""The gated delta nets that a config.json asks for, and the layers that have attention."""

from collections.abc import Mapping

from megatron_rl.errors import InputError
from megatron_rl.weights.arch import DeltaArch
from megatron_rl.weights.families.fields import Fields, shown

DELTA_FIELDS = frozenset(
    {
        *("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim"),
        *("linear_value_head_dim", "linear_conv_kernel_dim", "full_attention_interval"),
        *("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings"),
    }
)
LINEAR, FULL = "linear_attention", "full_attention"
INTERVAL = 4  # transformers: every so many layers one has attention


def read_delta(fields: Fields, layers: int) -> DeltaArch:
    """The sizes of gated delta nets.

    Raises:
        InputError: sizes or kinds of layers that nobody builds, or two that differ.
    """
    delta = DeltaArch(
        attention_layers=_attention_layers(fields, layers),
        num_key_heads=fields.number("linear_num_key_heads"),
        num_value_heads=fields.number("linear_num_value_heads"),
        key_dim=fields.number("linear_key_head_dim"),
        value_dim=fields.number("linear_value_head_dim"),
        kernel=fields.number("linear_conv_kernel_dim"),
    )
    if delta.num_value_heads % delta.num_key_heads:
        raise InputError(
            f"{fields.where}: linear_num_key_heads={delta.num_key_heads} must divide "
            f"linear_num_value_heads={delta.num_value_heads}"
        )
    return delta


def _attention_layers(fields: Fields, layers: int) -> frozenset[int]:
    """The layers with attention: layer_types says them, else full_attention_interval."""
    told = fields.values.get("layer_types")
    interval = fields.number("full_attention_interval", INTERVAL)
    by_interval = [FULL if (layer + 1) % interval == 0 else LINEAR for layer in range(layers)]
    kinds = by_interval if told is None else told
    if not isinstance(kinds, list) or set(kinds) - {LINEAR, FULL} or len(kinds) != layers:
        raise InputError(
            f"{fields.where}: layer_types={shown(told)} must be {layers} times {LINEAR!r} or "
            f"{FULL!r}, as num_hidden_layers={layers} says. Mend config.json"
        )
    is_told = fields.values.get("full_attention_interval") is not None
    if is_told and kinds != by_interval:
        raise InputError(
            f"{fields.where}: layer_types and full_attention_interval={interval} mean other layers "
            "with attention. Remove the wrong one"
        )
    found = frozenset(layer for layer, kind in enumerate(kinds) if kind == FULL)
    if not found:
        raise InputError(
            f"{fields.where}: no layer has attention: vLLM runs no such model. Mend layer_types"
        )
    return found


def layers_behind(values: Mapping[str, object], where: str) -> int:
    """The layers that guess tokens ahead; their tensors are left out."""
    return Fields({"mtp_num_hidden_layers": 0, **values}, where).count("mtp_num_hidden_layers")
