"""Our rope is transformers' own, for every family and style, on packed rows."""

import importlib
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig

from megatron_rl.megatron.rope import Rope, frequencies
from megatron_rl.weights.arch import YarnRope
from megatron_rl.weights.families.hf_config import read_arch
from megatron_rl.weights.families.registry import FAMILIES

LENGTHS = (9, 1, 300, 40)  # in 300 positions waves of all lengths of llama3's bands have begun
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
NEAR = {"rope_type": "default", "rope_theta": 5_000.0}  # of layers with a window
STYLES = {
    "plain": {"rope_type": "default", "rope_theta": 10_000.0},
    "wide": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "llama3": LLAMA3,
    "llama3, factor 8": LLAMA3 | {"factor": 8.0},
    "yarn": YARN,
    "yarn, its own turns": YARN | {"beta_fast": 8.0, "beta_slow": 2.0},
    "yarn, its own bounds": YARN | {"beta_fast": 8.0, "beta_slow": 2.0, "truncate": False},
    "yarn, its own amplitude": YARN | {"attention_factor": 0.75},
    "yarn, two scales": YARN | {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7},
    "yarn, at once": YARN | {"original_max_position_embeddings": 16},
}
# Texts of the context of pretraining, behind which the other factors are.
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0 + 0.1 * pair for pair in range(32)],
    "long_factor": [2.0 + pair for pair in range(32)],
}
OF_LONG = {
    "plain": STYLES["plain"],
    "wide": STYLES["wide"],
    "longrope": LONG,
    "longrope of three quarters": {
        **LONG,
        "partial_rotary_factor": 0.75,
        "short_factor": LONG["short_factor"][:24],
        "long_factor": LONG["long_factor"][:24],
    },
}
# transformers and vLLM read these alike in models with latent attention, which turn neighbours.
OF_LATENTS = ("plain", "wide", "yarn", "yarn, two scales", "yarn, at once")
LATENTS = {
    "deepseek_v3": {"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    "glm4_moe_lite": {"first_k_dense_replace": 1},
}
OF_NETS = dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text"), ("plain", "wide"))
OF_WINDOWS = {"olmo3": tuple(style for style in STYLES if style != "yarn, its own bounds")}
KINDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(LATENTS, OF_LATENTS),
    **OF_NETS,
    **OF_WINDOWS,
}
CASES = [
    (family, style)
    for family in FAMILIES
    for style in (OF_LONG if family == "phi3" else STYLES)
    if style in KINDS.get(family, (*STYLES, *OF_LONG))
]
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def config_of(family, style, head_dim=64):
    settings = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    if family in LATENTS:
        settings |= {"num_key_value_heads": 4, **LATENTS[family]}
    if family == "phi3":
        settings |= {"max_position_embeddings": 4096, "original_max_position_embeddings": 512}
    windows = {} if family == "qwen2" else {"sliding_window": None}
    rope = dict({**STYLES, **OF_LONG}[style])
    if family == "olmo3":
        windows["sliding_window"] = 8
        rope = {"full_attention": rope, "sliding_attention": NEAR}
    return AutoConfig.for_model(
        family,
        rope_parameters=rope,
        head_dim=head_dim,
        **settings,
        **windows,
    )


def arch_of(config):
    told = config.to_diff_dict()
    if config.model_type == "glm4_moe":  # which is refused without its biases
        told["attention_bias"] = True
    told |= LATENTS.get(config.model_type, {})
    return read_arch(FAMILIES[config.model_type], told, "config.json")


def positions():
    return torch.cat([torch.arange(length) for length in LENGTHS])


def rope_of_transformers(config, dtype, kind="full_attention"):
    """(cos, sin, apply) as a model of this dtype has them; kind: of a layer, where it matters."""
    name = config.model_type.removesuffix("_text")
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    prefix = type(config).__name__.removesuffix("Config")
    rotary = getattr(module, f"{prefix}RotaryEmbedding")(config)
    kinds = (kind,) if name == "olmo3" else ()
    cos, sin = rotary(torch.empty(0, dtype=dtype), positions()[None], *kinds)
    apply = "apply_rotary_pos_emb_interleave" if name in LATENTS else "apply_rotary_pos_emb"
    return cos, sin, getattr(module, apply)


def heads(dtype, count=3, width=64):
    generator = torch.Generator().manual_seed(count)
    return torch.randn(sum(LENGTHS), count, width, generator=generator, dtype=torch.float64).to(
        dtype
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("family", "style"), CASES)
def test_rotated_heads_and_their_gradients_are_those_of_transformers(family, style, dtype):
    """Bit for bit: products and sums are the same, in the same order."""
    config = config_of(family, style)
    rotation = Rope(arch_of(config), dtype, torch.device("cpu")).rotation(positions())
    cos, sin, apply = rope_of_transformers(config, dtype)
    half = cos.shape[-1] // 2  # of what turns of a head
    cos, sin = cos.to(rotation.cos.dtype), sin.to(rotation.cos.dtype)
    assert torch.equal(rotation.cos[:, 0], cos[0, :, :half])
    assert torch.equal(rotation.sin[:, 0], sin[0, :, half:])

    query, key = heads(dtype, 4).requires_grad_(), heads(dtype, 2).requires_grad_()
    expected = apply(query[None], key[None], cos, sin, unsqueeze_dim=2)
    for one, wanted in zip((query, key), expected, strict=True):
        turned = rotation.turned(one)
        assert turned.dtype == dtype
        assert torch.equal(turned, wanted[0])
        gradient = torch.randn_like(turned)
        (own,) = torch.autograd.grad(turned, one, gradient)
        (their,) = torch.autograd.grad(wanted, one, gradient[None], retain_graph=True)
        if rotation.cos.dtype != dtype:  # autograd would round both terms of a sum, and then it
            exact = one.detach().float().requires_grad_()
            wide, _ = apply(exact[None], exact[None], cos, sin, unsqueeze_dim=2)
            (their,) = torch.autograd.grad(wide, exact, gradient[None].float())
            assert family in ("olmo2", "olmo3")
        assert torch.equal(own, their.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers_with_a_window_turn_by_a_rope_of_their_own(dtype):
    """Another base, and no YaRN; bit for bit as in transformers."""
    config = config_of("olmo3", "yarn")
    rotation = Rope(arch_of(config), dtype, torch.device("cpu")).rotation(positions())
    near = rotation.of(8)
    cos, sin, _ = rope_of_transformers(config, dtype, "sliding_attention")
    half = cos.shape[-1] // 2
    assert torch.equal(near.cos[:, 0], cos[0, :, :half].to(near.cos.dtype))
    assert torch.equal(near.sin[:, 0], sin[0, :, half:].to(near.cos.dtype))
    assert rotation.of(None) is rotation
    assert not torch.equal(near.cos, rotation.cos)


def test_frequencies_by_hand():
    """Head of 4, base 10000: exponents 0 and 1/2, so 1 and 1/100 radians per position."""
    arch = arch_of(config_of("llama", "plain"))
    torch.testing.assert_close(
        frequencies(replace(arch, head_dim=4)), torch.tensor([1.0, 0.01]), rtol=1e-7, atol=0
    )


def test_scaled_frequencies_by_hand():
    """Base (8192 / 2 pi)**2 and head of 4: waves of 2 pi and 8192 positions.

    The first is short and stays; the second is as long as the context, where the blend is all
    stretched: 1/32 of it.
    """
    arch = replace(arch_of(config_of("llama", "llama3")), head_dim=4)
    base = (8192 / (2 * torch.pi)) ** 2
    told = frequencies(replace(arch, rope_theta=base))
    wanted = torch.tensor([1.0, 2 * torch.pi / 8192 / 32])
    torch.testing.assert_close(told, wanted, rtol=1e-5, atol=0)


def test_frequencies_of_yarn_by_hand():
    """Base (512 / 2 pi)**2 and head of 8: waves of 2 pi r**(i/2) positions, with r = 512 / 2 pi.

    In 512 positions they turn r**(1 - i/2) times: r, r**(1/2) = 9.03, 1 and r**(-1/2). With bounds
    at r**(1/2) and r**(-1/2) turns, those of i = 1, 2 and 3 are at 0, 1/2 and 1 of the range, so
    the first two stay as they are, and the others are halved in part and in full.
    """
    turns = 512 / (2 * torch.pi)
    yarn = YarnRope(
        factor=2.0,
        original_max_position_embeddings=512,
        beta_fast=turns**0.5,
        beta_slow=turns**-0.5,
        amplitude=1.0,
        rounds_range=False,
    )
    arch = replace(arch_of(config_of("llama", "plain")), head_dim=8, rope_theta=turns**2, yarn=yarn)
    wanted = torch.tensor([1.0, turns**-0.5, 0.75 / turns, 0.5 * turns**-1.5])
    torch.testing.assert_close(frequencies(arch), wanted, rtol=1e-5, atol=0)


def test_a_packed_row_is_each_sequence_alone():
    rope = Rope(arch_of(config_of("llama", "llama3")), torch.float32, torch.device("cpu"))
    whole, row = heads(torch.float32), rope.rotation(positions())
    alone = [
        rope.rotation(torch.arange(len(part))).turned(part) for part in whole.split(list(LENGTHS))
    ]
    assert torch.equal(row.turned(whole), torch.cat(alone))


def test_the_product_of_two_heads_depends_on_their_distance_alone():
    rope = Rope(arch_of(config_of("llama", "plain")), torch.float64, torch.device("cpu"))
    query, key = heads(torch.float64, 1)[:2].expand(2, 1, 64)
    near = rope.rotation(torch.tensor([5, 2])).turned(torch.stack([query, key]))
    far = rope.rotation(torch.tensor([105, 102])).turned(torch.stack([query, key]))
    # Angles are float32, as in transformers.
    torch.testing.assert_close(near[0, 0] @ near[1, 0], far[0, 0] @ far[1, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
@pytest.mark.parametrize("is_cut", [False, True], ids=["whole", "a view"])
def test_the_gradient_is_the_slope(is_cut, interleaved):
    """Also where heads are cut out of a larger tensor, as keys are in Megatron-Core."""
    rope = Rope(arch_of(config_of("llama", "plain")), torch.float64, torch.device("cpu"))
    narrow = Rope.__new__(Rope)
    narrow.frequencies, narrow.dtype, narrow.amplitude = rope.frequencies[:3], rope.dtype, 1.0
    narrow.interleaved = interleaved
    rotation = narrow.rotation(torch.tensor([0, 3, 4, 0, 1]))
    part = slice(4, 10) if is_cut else slice(None)
    inputs = torch.randn(5, 2, 14 if is_cut else 6, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rotation.turned(x[..., part]), (inputs,))


def test_nothing_is_written_to_and_only_the_angles_are_kept():
    rope = Rope(arch_of(config_of("llama", "plain")), torch.float32, torch.device("cpu"))
    rotation, inputs = rope.rotation(positions()), heads(torch.float32).requires_grad_()
    before = inputs.detach().clone()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.data_ptr()), lambda _: None
    ):
        turned = rotation.turned(inputs)
    assert torch.equal(inputs, before)
    assert turned.data_ptr() != inputs.data_ptr()
    assert sorted(kept) == sorted([rotation.cos.data_ptr(), rotation.sin.data_ptr()])
