"""What of several possible parts a model is trained with, as a start says it."""

import pytest
import torch

from megatron_rl.megatron.in_use import layers_in_use, optimizer_in_use, precision_in_use
from megatron_rl.megatron.settable import OF_TE


@pytest.mark.parametrize(
    ("overrides", "attention", "said"),
    [
        ((), "blocks", "layers: local; attention in padded blocks"),
        (("bias_activation_fusion",), "flash", "layers: local; flash attention of torch"),
        (
            ("attention_backend", "bias_activation_fusion", "cpu_offloading"),
            "blocks",
            "layers: local, which do not read "
            "model.megatron.attention_backend, model.megatron.cpu_offloading; "
            "attention in padded blocks",
        ),
        (
            ("attention_backend",),
            "transformer_engine",
            "layers: Transformer Engine's; its own attention",
        ),
    ],
)
def test_layers_and_what_they_do_not_read(overrides, attention, said):
    assert {"attention_backend", "cpu_offloading"} <= set(OF_TE)
    assert layers_in_use(overrides, attention) == said


@pytest.mark.parametrize(
    ("dtype", "gradients", "scale", "said"),
    [
        (torch.float64, torch.float64, 1.0, "precision: float64, gradients in float64"),
        (
            torch.bfloat16,
            torch.float32,
            1.0,
            "precision: bfloat16, gradients in float32, main weights in float32",
        ),
        (
            torch.float16,
            torch.float32,
            65536.0,
            "precision: float16, gradients in float32, main weights in float32, loss scale 65536",
        ),
    ],
)
def test_dtypes_and_the_loss_scale(dtype, gradients, scale, said):
    assert precision_in_use(dtype, gradients, scale) == said


@pytest.mark.parametrize(
    ("maker", "shards", "overlaps", "said"),
    [
        ("torch.optim.adamw", 1, False, "torch, its state whole on every rank, {} after {}"),
        ("apex.optimizers.fused_adam", 4, True, "Apex, its state over 4 ranks, {} during {}"),
        (
            "transformer_engine.pytorch.optimizers.fused_adam",
            2,
            True,
            "Transformer Engine, its state over 2 ranks, {} during {}",
        ),
    ],
)
def test_whose_adam_it_is_and_when_gradients_are_reduced(maker, shards, overlaps, said):
    adam = type("Adam", (), {"__module__": maker})()
    told = optimizer_in_use(adam, shards=shards, overlaps=overlaps)
    assert told == "optimizer: Adam of " + said.format("gradients reduced", "the backward")
