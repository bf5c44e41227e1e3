"""What models with latent attention cannot have, each with a way out."""

from dataclasses import replace

import pytest
from test_megatron_refusals import ARCH

from megatron_rl.megatron.config import ModelConfig
from megatron_rl.megatron.refusals import layer_problems, model_problems
from megatron_rl.parallel.config import ParallelConfig
from megatron_rl.rollout.refusals import engine_problems
from megatron_rl.weights.arch import LatentArch, LongRope, SlidingArch

LATENT = replace(
    ARCH,
    model_type="deepseek_v3",
    num_attention_heads=24,
    num_query_groups=24,
    head_dim=192,
    latent=LatentArch(
        rank=512, query_rank=1536, still_dim=128, turning_dim=64, value_dim=128, interleaved=True
    ),
)


def of_layers(arch, **settings):
    model = ModelConfig(path="model", **settings)
    return [str(problem) for problem in layer_problems(arch, model, "cpu")]


def test_layers_of_transformer_engine_have_no_latent_attention():
    (told,) = of_layers(LATENT, layer_spec="transformer_engine")
    assert "not built with latent attention here" in told
    assert "Set model.layer_spec=local" in told
    assert not of_layers(LATENT, layer_spec="local")
    assert not of_layers(ARCH, layer_spec="transformer_engine")


def test_layers_of_transformer_engine_have_no_long_rope():
    rope = LongRope(positions=4096, factors=(1.0,) * 32, amplitude=1.0)
    arch = replace(ARCH, long_rope=rope)
    (told,) = of_layers(arch, layer_spec="transformer_engine")
    assert "not built with LongRoPE here" in told
    assert not of_layers(arch, layer_spec="local")


def test_layers_of_transformer_engine_have_no_windows():
    arch = replace(ARCH, sliding=SlidingArch(window=8, layers=frozenset({0})))
    (told,) = of_layers(arch, layer_spec="transformer_engine")
    assert "not built with sliding windows here" in told
    assert "Set model.layer_spec=local" in told
    assert not of_layers(arch, layer_spec="local")


def test_a_norm_over_all_heads_lets_no_key_head_be_repeated():
    arch = replace(ARCH, qk_norm=True, wide_qk_norm=True, norms_behind=True)
    (told,) = of_layers(arch, layer_spec="transformer_engine")
    assert "not built with norms behind attention here" in told
    assert not of_layers(arch, layer_spec="local")
    tp = 2 * arch.num_query_groups
    for found in (
        list(model_problems(arch, ParallelConfig(tensor_model_parallel_size=tp))),
        list(engine_problems(arch, tp)),
    ):
        whys = [str(problem) for problem in found]
        assert any("key/value heads, over which a norm goes," in why for why in whys)
    ways = (*model_problems(ARCH, ParallelConfig(tensor_model_parallel_size=tp)),)
    assert not any("over which a norm goes" in str(problem) for problem in ways)


def test_what_megatrons_own_latent_attention_recomputes():
    (told,) = of_layers(LATENT, recompute_modules=("core_attn", "mla_up_proj"))
    assert told.endswith("Set model.recompute_modules=[core_attn]")
    (told,) = of_layers(LATENT, recompute_modules=("mla_up_proj",))
    assert told.endswith("Set model.recompute_modules=[core_attn]")
    assert not of_layers(LATENT, recompute_modules=("core_attn",))


@pytest.mark.parametrize(
    ("tp", "query_rank", "told"),
    [
        (24, 1536, []),
        (24, 1540, ["rows of the latent vector of queries"]),
        (24, None, []),
        (3, 1537, ["rows of the latent vector of queries"]),
        (7, 1540, ["attention heads", "rows of the latent vector and turning entries of keys"]),
    ],
)
def test_tensor_parallelism_cuts_latent_vectors(tp, query_rank, told):
    arch = replace(
        LATENT, ffn_hidden_size=168, latent=replace(LATENT.latent, query_rank=query_rank)
    )
    parallel = ParallelConfig(tensor_model_parallel_size=tp)
    found = [str(problem) for problem in model_problems(arch, parallel)]
    for name in ("attention heads", *(name for name, _ in LATENT.latent_rows)):
        assert any(name in problem for problem in found) == (name in told), (name, found)
    assert not any("rows of queries, keys and values" in problem for problem in found)
