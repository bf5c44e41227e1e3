"""The latent attention that a config.json asks for."""

from megatron_rl.errors import InputError
from megatron_rl.weights.arch import LatentArch
from megatron_rl.weights.families.fields import Fields

LATENT_FIELDS = frozenset(
    {
        *("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
        *("rope_interleave", "qk_head_dim"),
    }
)


def read_latent(fields: Fields, heads: int) -> LatentArch:
    """The sizes of latent attention.

    Raises:
        InputError: sizes that nobody builds, or of which transformers would build others.
    """
    query_rank = fields.values["q_lora_rank"]
    latent = LatentArch(
        rank=fields.number("kv_lora_rank"),
        query_rank=None if query_rank is None else fields.number("q_lora_rank"),
        still_dim=fields.number("qk_nope_head_dim"),
        turning_dim=fields.number("qk_rope_head_dim"),
        value_dim=fields.number("v_head_dim"),
        interleaved=fields.flag("rope_interleave"),
    )
    if latent.turning_dim % 2:
        raise InputError(
            f"{fields.where}: qk_rope_head_dim={latent.turning_dim} must be even: entries turn in "
            "pairs"
        )
    if latent.value_dim > latent.head_dim:
        raise InputError(
            f"{fields.where}: v_head_dim={latent.value_dim} is more than qk_nope_head_dim + "
            f"qk_rope_head_dim={latent.head_dim}: no attention here has wider values than keys"
        )
    for name, meant in (
        ("qk_head_dim", latent.head_dim),
        ("head_dim", latent.turning_dim),  # transformers turns a head of that size
        ("num_key_value_heads", heads),
    ):
        if fields.number(name, meant) != meant:
            raise InputError(
                f"{fields.where}: {name}={fields.values[name]!r} must be {meant}, by the other "
                "sizes of its latent attention. Mend config.json"
            )
    return latent
