"""Auxiliary losses of routers, and their bias: what model.megatron may ask for; see routers.py."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron_rl.errors import ConfigError

KIND, COEFF, Z_COEFF = (
    "moe_router_load_balancing_type",
    "moe_aux_loss_coeff",
    "moe_z_loss_coeff",
)
BIAS_RATE = "moe_router_bias_update_rate"
LOSSES = (KIND, COEFF, Z_COEFF)
FIELDS = (*LOSSES, BIAS_RATE)
"""Megatron's names. Its own routers are not told of them."""

KINDS: tuple[str, ...] = ("none", "seq_aux_loss", "global_aux_loss")
"""Those of Megatron's balancings that are the same at every layout and row length."""


@dataclass(frozen=True, kw_only=True)
class AuxiliaryLosses:
    """What an update adds to its loss for the routers, and how it moves their bias."""

    balanced_over: Literal["sequence", "update"] | None = None
    balance_coeff: float = 0.0
    z_coeff: float = 0.0
    bias_rate: float = 0.0

    def __bool__(self) -> bool:
        """True where there is a loss."""
        return self.balanced_over is not None or self.z_coeff > 0


def auxiliary_losses(overrides: Mapping[str, Any]) -> AuxiliaryLosses:
    """Those that model.megatron asks for; it has been checked."""
    over: dict[str, Literal["sequence", "update"]] = {
        "seq_aux_loss": "sequence",
        "global_aux_loss": "update",
    }
    balanced_over = over.get(overrides.get(KIND, "none"))
    return AuxiliaryLosses(
        balanced_over=balanced_over,
        balance_coeff=float(overrides[COEFF]) if balanced_over else 0.0,
        z_coeff=float(overrides.get(Z_COEFF) or 0.0),
        bias_rate=float(overrides.get(BIAS_RATE) or 0.0),
    )


def auxiliary_problems(overrides: Mapping[str, Any]) -> Iterator[ConfigError]:
    """Coefficients that are none, and those that act on nothing."""
    kind, field = overrides.get(KIND, "none"), f"model.megatron.{COEFF}"
    coeff = overrides.get(COEFF)
    if kind not in KINDS:
        yield ConfigError(
            f"model.megatron.{KIND}",
            kind,
            "it balances over a micro-batch, which is another one at every layout and row length, "
            "or chooses other experts than the engine does",
            f"Set model.megatron.{KIND}=none, or name {' or '.join(KINDS[1:])} there and a "
            f"coefficient in {field}",
        )
    elif kind == "none":
        if coeff:
            yield ConfigError(
                field,
                coeff,
                f"has no effect without model.megatron.{KIND}",
                f"Set {field}=0, or name {' or '.join(KINDS[1:])} in model.megatron.{KIND}",
            )
    elif not _is_coefficient(coeff):
        rule = f"is what model.megatron.{KIND}={kind} is multiplied by: a number above 0"
        yield ConfigError(field, coeff, rule, f"Set {field}=0.001")
    for name in (Z_COEFF, BIAS_RATE):
        if (value := overrides.get(name)) and not _is_coefficient(value):
            field = f"model.megatron.{name}"
            way_out = f"Set {field}=0, which switches it off, or use a small one as 0.001"
            yield ConfigError(field, value, "must be a number above 0", way_out)


def _is_coefficient(value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 < float(str(value)) < math.inf
