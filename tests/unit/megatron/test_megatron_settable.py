import pytest

from megatron_rl.megatron.settable import OF_TE, layers_in_use


@pytest.mark.parametrize(
    ("overrides", "use_te", "said"),
    [
        ((), False, "local"),
        (("bias_activation_fusion",), False, "local"),
        (
            ("attention_backend", "bias_activation_fusion", "cpu_offloading"),
            False,
            "local, which do not read model.megatron.attention_backend, "
            "model.megatron.cpu_offloading",
        ),
        (("attention_backend",), True, "Transformer Engine's"),
    ],
)
def test_what_layers_do_not_read_is_said(overrides, use_te, said):
    assert {"attention_backend", "cpu_offloading"} <= set(OF_TE)
    assert layers_in_use(overrides, use_te=use_te) == said
