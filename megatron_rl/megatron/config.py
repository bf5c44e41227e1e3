"""The model that is trained, and how its weights are updated."""

import importlib.util
from typing import Any, Literal

from pydantic import Field

from megatron_rl.platforms.versions import torch_version
from megatron_rl.settings import Settings

Attention = Literal["transformer_engine", "flash", "blocks"]

FLASH_TORCH = (2, 12)  # the first version whose varlen_attn takes grouped queries
FLASH_HEAD = 256  # the widest head of its kernel, which wants a multiple of 8

Offload = Literal["none", "optimizer", "weights"]
"""What of the trainer leaves the device: nothing, gradients and all that the optimizer has, or the
weights too."""


class ModelConfig(Settings):
    """The model, its precision, and how Megatron-Core runs it."""

    path: str = Field(min_length=1)
    """Hugging Face directory (config.json, *.safetensors, tokenizer) or hub name."""

    ignore_config_fields: list[str] = Field(default_factory=list)
    """Fields of config.json that this program does not know and that change nothing in the network:
    those of another tool, for example. A field that is known is never ignored."""

    dtype: Literal["bfloat16", "float16", "float32", "float64"] = "bfloat16"
    """Dtype of weights and activations. Those of 16 bits have float32 main weights in the
    optimizer, and float16 a loss scale, too: see optimizer.initial_loss_scale."""

    layer_spec: Literal["auto", "local", "transformer_engine"] = "auto"
    """Layers of Megatron-Core to build: Transformer Engine's on a GPU where it is installed."""

    recompute_granularity: Literal["full", "selective"] | None = None
    """Megatron's activation recompute."""

    recompute_method: Literal["uniform", "block"] | None = None
    """Megatron's: which layers `full` recomputes."""

    recompute_num_layers: int | None = None
    """Megatron's: layers per recomputed unit."""

    recompute_modules: tuple[str, ...] | None = None
    """Megatron's: what `selective` recomputes, for example core_attn."""

    megatron: dict[str, Any] = Field(default_factory=dict)
    """Other fields of Megatron's TransformerConfig, under their own names: those that change
    neither the network nor its gradient (megatron/settable.py lists them), and the auxiliary losses
    of a mixture's routers (docs/weights.md)."""

    def uses_transformer_engine(self, device_type: str) -> bool:
        """True where layers are Transformer Engine's."""
        if self.layer_spec == "auto":
            has = importlib.util.find_spec("transformer_engine") is not None
            return has and device_type == "cuda"
        return self.layer_spec == "transformer_engine"

    def attention(self, device_type: str, head_dim: int) -> Attention:
        """Which attention layers have: one for the whole run.

        Flash attention without Transformer Engine is torch's, for 16 bits on a GPU.
        """
        if self.uses_transformer_engine(device_type):
            return "transformer_engine"
        has_kernel = (
            device_type == "cuda"
            and self.dtype in ("bfloat16", "float16")
            and head_dim % 8 == 0
            and head_dim <= FLASH_HEAD
            and torch_version() >= FLASH_TORCH
        )
        return "flash" if has_kernel else "blocks"


class OptimizerConfig(Settings):
    """AdamW on the policy. Defaults are the paper's."""

    lr: float = Field(default=1e-6, gt=0, le=1)
    """Peak learning rate. An AdamW step moves each weight by about this much, and weights are
    smaller than 1."""

    min_lr: float = Field(default=0.0, ge=0, le=1)
    """Learning rate at which a decaying schedule ends; at most lr."""

    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after the warm-up."""

    lr_warmup_updates: int = Field(default=0, ge=0)
    """Optimizer steps of linear warm-up: the first has lr / lr_warmup_updates, the last has lr."""

    lr_decay_updates: int | None = Field(default=None, gt=0)
    """Optimizer steps until min_lr; None: the most that the run can take. Updates that are skipped
    are no steps, so a run that skips many ends above min_lr."""

    weight_decay: float = Field(default=0.01, ge=0, le=1)
    """Decoupled weight decay; biases and norms have none (Megatron's rule). Times the learning rate
    it is a share of each weight."""

    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Adam's decay of the mean of gradients, per optimizer step."""

    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    """Adam's decay of the mean of squared gradients, per optimizer step."""

    adam_eps: float = Field(default=1e-8, gt=0, le=1)
    """Added to the square root of that second mean before it divides; with more than 1 nothing
    would move."""

    clip_grad: float = Field(default=1.0, ge=0)
    """Largest global gradient norm; 0 switches clipping off."""

    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What happens where the loss or the gradient is not finite: the run stops, or the update is
    left out and counted. To skip costs one look at all gradients of every update."""

    initial_loss_scale: float = Field(default=2.0**16, ge=1, le=2.0**32)
    """What Megatron's scaler of float16 multiplies the loss by at first, so that small gradients
    are not lost. An update whose gradient overflows is left out, and the scale is halved after the
    second one; after 1000 without an overflow it is doubled. Megatron itself begins at 2**32, for
    which here a dozen rollouts would be thrown away."""

    use_distributed_optimizer: bool = True
    """Megatron's: optimizer state and main weights are sharded over data-parallel ranks."""

    offload: Offload | Literal["auto"] = "auto"
    """What leaves the device while an engine generates there. `optimizer`: gradients, main weights
    and optimizer state; `weights`: the weights too, those of a reference.path among them; `auto`:
    `optimizer` on a GPU, on a CPU `none`, since there the engine has the same memory. Results are
    the same, bit for bit."""

    prompts_per_update: int | None = Field(default=None, gt=0, le=2**20)
    """Prompts of one optimizer step's mini-batch; None: all prompts of the iteration, of which
    there are no more than 2**20 either."""

    old_logprobs: Literal["auto", "trainer", "engine"] = "auto"
    """Whose log-probs the loss takes as old ones. `trainer`: the policy's before the iteration's
    first update. `engine`: those that came with the samples, so that no pass computes them; they
    differ by rollout/logprob_gap_*, and a ratio of the first update is not exactly 1. `auto`:
    without algorithm.rollout_correction `engine` under run.lag, and where that spares a pass of a
    policy that samples by itself in float32 or float64; else `trainer`."""

    epochs: int = Field(default=1, gt=0, le=1000)
    """Passes over an iteration's samples; long before 1000 they fit that iteration alone."""
