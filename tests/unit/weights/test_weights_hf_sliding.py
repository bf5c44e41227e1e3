"""OLMo 3's windows and ropes in config.json: honoured, or refused by name."""

from math import log

import pytest
from hub_configs import MISTRAL, OLMO3, PHI4, QWEN2, QWEN3

from megatron_rl.errors import InputError
from megatron_rl.weights.arch import SlidingArch, YarnRope

PLAIN = {"rope_type": "default", "rope_theta": 500_000.0}
KINDS = {
    "full_attention": {**OLMO3["rope_scaling"], "rope_theta": 500_000.0},
    "sliding_attention": PLAIN,
}
OLD_ROPE = ("rope_theta", "rope_scaling")


def test_olmo_3_is_read(read):
    arch = read(OLMO3)
    assert arch.sliding == SlidingArch(
        window=4096,
        layers=frozenset(n for n in range(32) if n % 4 != 3),
        rope_theta=500_000.0,
    )
    assert arch.yarn == YarnRope(
        factor=8.0,
        original_max_position_embeddings=8192,
        beta_fast=32.0,
        beta_slow=1.0,
        amplitude=0.1 * log(8) + 1,
        rounds_range=True,
    )
    assert (arch.wide_qk_norm, arch.norms_behind, arch.turns_in_float32) == (True, True, True)
    # 32 layers of 4 * 4096 ** 2 + 3 * 4096 * 11008 and 4 norms of 4096, two embeddings, a norm.
    layer = 4 * 4096**2 + 3 * 4096 * 11008 + 4 * 4096
    assert arch.num_parameters == 32 * layer + 2 * 100278 * 4096 + 4096


def test_keys_that_tokens_see_on_average(read):
    """Of 8,192 tokens in 24 layers 4,096 * 3/4, in 8 layers half of all; of 100, half of all."""
    arch = read(OLMO3)
    assert arch.keys_seen(8192) == 24 * 4096 * 0.75 + 8 * 4096
    assert arch.keys_seen(100) == 32 * 50


@pytest.mark.parametrize(
    ("absent", "changes"),
    [
        (("sliding_window",), {}),
        (("layer_types",), {}),
        (("rope_theta",), {}),
        (OLD_ROPE, {"rope_parameters": KINDS}),
        (("rope_scaling",), {"rope_parameters": KINDS}),
        (("rope_theta",), {"rope_parameters": KINDS, "rope_scaling": None}),
    ],
)
def test_spellings_of_one_model(read, absent, changes):
    assert read(OLMO3, without=absent, **changes) == read(OLMO3)


def test_absent_fields_are_what_transformers_takes(read, tmp_path):
    from transformers import AutoConfig

    absent = ("sliding_window", "layer_types", "rms_norm_eps", "num_key_value_heads", *OLD_ROPE)
    arch = read(OLMO3, without=absent)
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert arch.sliding.window == theirs.sliding_window
    kinds = [
        "sliding_attention" if n in arch.sliding.layers else "full_attention" for n in range(32)
    ]
    assert kinds == theirs.layer_types
    assert arch.rms_norm_eps == theirs.rms_norm_eps
    assert arch.num_query_groups == theirs.num_key_value_heads
    assert arch.rope_theta == theirs.rope_parameters["full_attention"]["rope_theta"]
    assert arch.sliding.rope_theta == theirs.rope_parameters["sliding_attention"]["rope_theta"]
    assert arch.yarn is None


def test_a_base_for_each_kind_of_layer(read):
    near = {**PLAIN, "rope_theta": 10_000.0}
    kinds = {**KINDS, "sliding_attention": near}
    arch = read(OLMO3, without=OLD_ROPE, rope_parameters=kinds)
    assert (arch.rope_theta, arch.sliding.rope_theta) == (500_000.0, 10_000.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["full_attention"] * 32}, "layer_types has no 'sliding_attention'"),
        ({"layer_types": ["sliding_attention"] * 31}, "must be 32 times 'sliding_attention' or"),
        ({"layer_types": ["chunked_attention"] * 32}, "must be 32 times 'sliding_attention' or"),
        ({"layer_types": [["sliding_attention"]] * 32}, "must be 32 times 'sliding_attention' or"),
        ({"layer_types": "sliding_attention"}, "must be 32 times 'sliding_attention' or"),
        ({"sliding_window": None}, "sliding_window=None must be a positive whole number"),
        ({"sliding_window": 0}, "sliding_window=0 must be a positive whole number"),
        ({"sliding_window": 4096.5}, "sliding_window=4096.5 must be a positive whole number"),
        ({"use_sliding_window": True}, "use_sliding_window=True is not supported for olmo3"),
        ({"rope_theta": 10_000}, "rope_theta=10000: transformers 5 gives it to layers with"),
        ({"rope_parameters": KINDS}, "two spellings of one thing. Remove one of them"),
    ],
)
def test_what_would_be_another_model_is_refused(read, changes, message):
    with pytest.raises(InputError, match=message):
        read(OLMO3, **changes)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        (PLAIN, "must have 'sliding_attention' and 'full_attention'"),
        ({"sliding_attention": PLAIN}, "must have 'sliding_attention' and 'full_attention'"),
        ([PLAIN], "must have 'sliding_attention' and 'full_attention'"),
        ({**KINDS, "factor": 2.0}, "must have 'sliding_attention' and 'full_attention'"),
        ({**KINDS, "full_attention": None}, "full_attention=None: it must be an object"),
        (
            {**KINDS, "sliding_attention": {"rope_type": "default"}},
            "it must be an object with rope_theta",
        ),
        (
            {**KINDS, "sliding_attention": KINDS["full_attention"]},
            "only a plain rope .* is supported in layers with a window",
        ),
        (
            {**KINDS, "sliding_attention": {**PLAIN, "partial_rotary_factor": 0.5}},
            "only a plain rope .* is supported in layers with a window",
        ),
        (
            {**KINDS, "sliding_attention": {**PLAIN, "rope_theta": "high"}},
            "rope_theta='high' must be a positive number",
        ),
        (
            {**KINDS, "full_attention": {**PLAIN, "rope_type": "linear"}},
            "rope type 'linear' is not supported",
        ),
        (
            {**KINDS, "full_attention": {**KINDS["full_attention"], "truncate": False}},
            "rope of type 'yarn' has truncate=False, which is not known",
        ),
    ],
)
def test_ropes_that_nobody_reads_alike_are_refused(read, rope, message):
    with pytest.raises(InputError, match=message):
        read(OLMO3, without=OLD_ROPE, rope_parameters=rope)


def test_two_bases_that_differ_are_refused(read):
    with pytest.raises(InputError, match="two spellings of one thing and differ"):
        read(OLMO3, without=("rope_scaling",), rope_parameters=KINDS, rope_theta=10_000)


@pytest.mark.parametrize(
    ("config", "window", "layers"), [(MISTRAL, 4096, 32), (PHI4, 2047, 40), (PHI4, 16383, 40)]
)
def test_a_window_of_all_layers(read, config, window, layers):
    """They turn as they would without it."""
    arch = read(config, sliding_window=window)
    assert arch.sliding == SlidingArch(window=window, layers=frozenset(range(layers)))
    assert arch.keys_seen(2 * window) == layers * window * 0.75


@pytest.mark.parametrize("config", [MISTRAL, PHI4])
def test_a_window_that_is_never_full_is_none(read, config):
    positions = config["max_position_embeddings"]
    assert read(config, sliding_window=positions).sliding is None
    assert read(config, sliding_window=None).sliding is None
    assert read(config, sliding_window=positions - 1).sliding is not None


@pytest.mark.parametrize("kind", ["full_attention", "sliding_attention"])
def test_kinds_of_layers_beside_a_window_of_all_are_refused(read, kind):
    """vLLM asks them and transformers does not."""
    with pytest.raises(InputError, match="transformers does not ask layer_types of this family"):
        read(MISTRAL, sliding_window=4096, layer_types=[kind] * 32)
    with pytest.raises(InputError, match="is not supported: only full_attention is"):
        read(MISTRAL, sliding_window=None, layer_types=["sliding_attention"] * 32)


@pytest.mark.parametrize("config", [QWEN2, QWEN3])
def test_a_window_that_is_switched_on(read, config):
    layers, on = config["num_hidden_layers"], {"use_sliding_window": True, "sliding_window": 512}
    assert read(config, **on, max_window_layers=layers) == read(config)
    assert read(config, **on, max_window_layers=layers + 1) == read(config)
    whole = SlidingArch(window=512, layers=frozenset(range(layers)))
    assert read(config, **on, max_window_layers=0).sliding == whole
    kinds = ["sliding_attention"] * layers
    assert read(config, **on, max_window_layers=layers, layer_types=kinds).sliding == whole
    assert read(config, **on, max_window_layers=0, layer_types=["full_attention"] * layers) == read(
        config
    )
    for told in ({"max_window_layers": 1}, {"layer_types": ["full_attention", *kinds[1:]]}):
        with pytest.raises(InputError, match=rf"gives {layers - 1} of {layers} layers a window"):
            read(config, **on, **told)
    with pytest.raises(InputError, match="sliding_window=None must be a positive whole number"):
        read(config, use_sliding_window=True, sliding_window=None, max_window_layers=0)
    with pytest.raises(InputError, match="use_sliding_window=1 must be true or false"):
        read(config, use_sliding_window=1)


def test_layers_with_a_window_are_those_of_transformers(read, tmp_path):
    from transformers import AutoConfig

    changes = {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 0}
    arch = read(QWEN2, **changes)
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert theirs.layer_types == ["sliding_attention"] * len(arch.sliding.layers)
    assert theirs.sliding_window == arch.sliding.window
