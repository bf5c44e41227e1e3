"""What of several possible parts a model is trained with, for the start of a run."""

from collections.abc import Iterable

import torch

from megatron_rl.megatron.config import Attention
from megatron_rl.megatron.settable import OF_TE

ATTENTIONS: dict[Attention, str] = {
    "transformer_engine": "its own attention",
    "flash": "flash attention of torch",
    "blocks": "attention in padded blocks",
}
ADAMS = {"torch": "torch", "apex": "Apex", "transformer_engine": "Transformer Engine"}


def layers_in_use(overrides: Iterable[str], attention: Attention) -> str:
    """Which layers a model has; overrides: names of model.megatron.

    A recipe for GPUs is rehearsed on a CPU as it is, so what local layers do not read is said there
    and not refused.
    """
    if attention == "transformer_engine":
        return f"layers: Transformer Engine's; {ATTENTIONS[attention]}"
    unread = [f"model.megatron.{name}" for name in overrides if name in OF_TE]
    told = f", which do not read {', '.join(unread)}" if unread else ""
    return f"layers: local{told}; {ATTENTIONS[attention]}"


def precision_in_use(dtype: torch.dtype, gradients: torch.dtype, loss_scale: float) -> str:
    """Dtypes of weights and gradients; loss_scale: of float16."""
    told = f"precision: {_named(dtype)}, gradients in {_named(gradients)}"
    if dtype.itemsize == 2:
        told += ", main weights in float32"
    return told + (f", loss scale {loss_scale:g}" if dtype == torch.float16 else "")


def optimizer_in_use(optimizer: object, *, shards: int, overlaps: bool) -> str:
    """Whose Adam it is, and when gradients are reduced; shards: ranks that share its state."""
    maker = ADAMS.get(type(optimizer).__module__.partition(".")[0], type(optimizer).__module__)
    kept = f"its state over {shards} ranks" if shards > 1 else "its state whole on every rank"
    when = "during" if overlaps else "after"
    return f"optimizer: Adam of {maker}, {kept}, gradients reduced {when} the backward"


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
