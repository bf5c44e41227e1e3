"""The rotary position embedding that a config.json asks for, in either of its two spellings."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from megatron_rl.errors import InputError
from megatron_rl.weights.arch import LongRope, YarnRope
from megatron_rl.weights.families.fields import Fields, shown

LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_HONOURED: dict[str, set[str]] = {
    "default": set(),
    "llama3": {"factor", *LLAMA3_ROPE},
    "yarn": {
        *("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate"),
        *("attention_factor", "mscale", "mscale_all_dim"),
    },
}
# vLLM takes other settings of such models for others than transformers does, or for none.
_OF_LATENT_ATTENTION: dict[str, set[str]] = {
    "default": set(),
    "yarn": _HONOURED["yarn"] - {"attention_factor", "truncate"},
}
# transformers takes "yarn" for "longrope" in such models, and no other scaling; vLLM takes the
# amplitude from no setting.
_OF_LONG_ROPE: dict[str, set[str]] = {
    "default": set(),
    "longrope": {
        *("short_factor", "long_factor", "factor", "original_max_position_embeddings"),
    },
}
# transformers looks for truncate beside the ropes of several kinds of layers, and not in them.
_OF_WINDOWS = {**_HONOURED, "yarn": _HONOURED["yarn"] - {"truncate"}}
_OF_IMAGES_TOO: dict[str, set[str]] = {"default": set()}
_INSTEAD = {
    "attn_factor": (
        "Neither transformers 5 nor vLLM 0.32 reads it: both scale angles by attention_factor, "
        "else by 0.1 ln(factor) + 1. Write attention_factor where that is not meant, or set "
        "model.ignore_config_fields=[attn_factor]"
    )
}
# How positions on three axes are told apart, which are the same for every token of text.
_OF_IMAGES = ("mrope_section", "mrope_interleaved")
_WHOLE = (1, 1.0, None)  # values of partial_rotary_factor that turn whole heads


@dataclass(frozen=True)
class Rope:
    """What a config.json says of it; at most one of the scalings."""

    theta: float
    share: float = 1.0  # of a head that turns
    llama3_factor: float | None = None
    yarn: YarnRope | None = None
    long: LongRope | None = None

    def rotary_dim(self, head_dim: int, where: str) -> int | None:
        """Entries of a head that turn; None: all of them."""
        found = int(head_dim * self.share)
        if self.long is not None and 2 * len(self.long.factors) != found:
            raise InputError(
                f"{where}: rope scaling has {len(self.long.factors)} factors, and {found} entries "
                "of a head turn in pairs, each of which has one. Mend config.json"
            )
        if self.share == 1:
            return None
        if found % 2 or not 0 < found < head_dim:
            raise InputError(
                f"{where}: partial_rotary_factor={shown(self.share)} turns {found} entries of a "
                f"head of {head_dim}: it must be an even number of them, at most all. Mend "
                "config.json"
            )
        return found


def read_rope(
    fields: Fields,
    told_theta: object,
    ignored: Collection[str],
    partial: float | None = None,
    *,
    of_latent_attention: bool = False,
    of_long_rope: bool = False,
    of_images: bool = False,
    of_windows: bool = False,
) -> Rope:
    """The rope of a model.

    told_theta: rope_theta as config.json itself has it. ignored: names that a person says change
    nothing. partial: the share of a head that turns where no field says it; None: heads turn whole,
    and other shares are refused. of_images: the model's tokens may also be parts of images.
    of_windows: the rope is of some layers, and others have a window and a rope of their own.
    """
    rope = _settings(fields, told_theta)
    if of_images:
        rope = {name: value for name, value in rope.items() if name not in _OF_IMAGES}
    theta = Fields({"rope_theta": rope.pop("rope_theta", None)}, fields.where).real("rope_theta")
    kind = rope.pop("rope_type", rope.pop("type", None)) or "default"
    rope.pop("type", None)
    share = _share(fields, rope.pop("partial_rotary_factor", None), partial)
    honoured = _HONOURED
    if of_latent_attention or of_long_rope:
        honoured = _OF_LATENT_ATTENTION if of_latent_attention else _OF_LONG_ROPE
    if of_images or of_windows:
        honoured = _OF_IMAGES_TOO if of_images else _OF_WINDOWS
    if not isinstance(kind, str) or kind not in honoured:
        raise InputError(
            f"{fields.where}: rope type {kind!r} is not supported: {', '.join(honoured)} are. Use "
            "a model with one of them"
        )
    unknown = sorted(set(rope) - honoured[kind] - set(ignored))
    if unknown:
        name = unknown[0]
        raise InputError(
            f"{fields.where}: rope of type {kind!r} has {name}={rope[name]!r}, which is not known. "
            "A setting that is ignored would train another model"
            + (f". {_INSTEAD[name]}" if name in _INSTEAD else "")
        )
    rope = {name: value for name, value in rope.items() if name in honoured[kind]}
    if kind == "llama3":
        return Rope(theta, share, llama3_factor=_llama3_factor(rope, fields.where))
    if kind == "default":
        return Rope(theta, share)
    if kind == "longrope":
        return Rope(theta, share, long=_long_rope(fields, rope))
    yarn = _yarn(rope, fields.where)
    if of_latent_attention:
        yarn = _with_scores(yarn, rope, fields.where)
    return Rope(theta, share, yarn=yarn)


def _share(fields: Fields, told: object, partial: float | None) -> float:
    """The share of a head that turns; told: by the rope's own parameters."""
    if partial is None:
        if told not in _WHOLE:
            raise InputError(
                f"{fields.where}: a partial_rotary_factor other than 1 is not supported. Use a "
                "model that rotates whole heads"
            )
        return 1.0
    name = "partial_rotary_factor"
    found = [value for value in (fields.values.get(name), told) if value is not None]
    if any(value != found[0] for value in found):
        raise InputError(
            f"{fields.where}: {name} is {found[0]!r}, and {found[1]!r} in rope_parameters: two "
            "spellings of one thing differ. Remove the wrong one"
        )
    return Fields({name: found[0] if found else partial}, fields.where).real(name)


def _settings(fields: Fields, told_theta: object) -> dict[str, object]:
    """The rope_parameters of transformers 5, or the rope_theta and rope_scaling of 4."""
    theta: dict[str, object] = {"rope_theta": fields.values["rope_theta"]}
    found: list[dict[str, object]] = []
    for name in ("rope_parameters", "rope_scaling"):
        value = fields.values.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise InputError(f"{fields.where}: {name}={value!r} must be an object")
        if value is not None:
            found.append({**theta, **value})
    if found and told_theta is not None:
        found.append({**found[0], **theta})
    if any(other != found[0] for other in found):
        raise InputError(
            f"{fields.where}: rope_theta, rope_scaling and rope_parameters are two spellings of "
            f"one thing and differ: {found}. Remove the wrong one"
        )
    return found[0] if found else theta


def _llama3_factor(rope: Mapping[str, object], where: str) -> float:
    for name, constant in LLAMA3_ROPE.items():
        if rope.get(name) != constant:
            raise InputError(
                f"{where}: rope scaling has {name}={rope.get(name)!r}: Megatron-Core's llama3 "
                f"rope has {constant} built in. Only that value can be trained"
            )
    return Fields(rope, where).real("factor")


def _yarn(rope: Mapping[str, object], where: str) -> YarnRope:
    """YaRN (arXiv:2309.00071) with the defaults of transformers and vLLM, which are the same."""
    present = {name: value for name, value in rope.items() if value is not None}
    fields = Fields({"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True, **present}, where)
    factor, fast, slow = (fields.real(name) for name in ("factor", "beta_fast", "beta_slow"))
    original = fields.number("original_max_position_embeddings")
    if factor < 1:
        raise InputError(f"{where}: rope scaling has factor={shown(factor)}: YaRN's is at least 1")
    if slow > fast:  # Kimi-K2 has both alike, which makes a step
        raise InputError(
            f"{where}: rope scaling has beta_slow={shown(slow)}, which must be no more than "
            f"beta_fast={shown(fast)}"
        )
    if "attention_factor" in present:
        amplitude = fields.real("attention_factor")
    else:
        has_both = "mscale" in present and "mscale_all_dim" in present
        over, under = (
            (fields.real("mscale"), fields.real("mscale_all_dim")) if has_both else (1.0, 0.0)
        )
        amplitude = (0.1 * over * math.log(factor) + 1) / (0.1 * under * math.log(factor) + 1)
    return YarnRope(
        factor=factor,
        original_max_position_embeddings=original,
        beta_fast=fast,
        beta_slow=slow,
        amplitude=amplitude,
        rounds_range=fields.flag("truncate"),
    )


def _with_scores(yarn: YarnRope, rope: Mapping[str, object], where: str) -> YarnRope:
    """YaRN of latent attention, where mscale_all_dim scales scores, too."""
    told = [rope.get(name) for name in ("mscale", "mscale_all_dim")]
    if told == [None, None]:
        return yarn
    if None in told:
        raise InputError(
            f"{where}: rope scaling has mscale={told[0]!r} and mscale_all_dim={told[1]!r}: with "
            "one of them alone transformers and vLLM scale angles differently. Set both, or none"
        )
    return replace(yarn, score_mscale=Fields(rope, where).real("mscale_all_dim"))


def _long_rope(fields: Fields, rope: Mapping[str, object]) -> LongRope:
    """LongRoPE as transformers and vLLM have it up to the context of pretraining."""
    where, name = fields.where, "original_max_position_embeddings"
    original, longest = fields.number(name), fields.number("max_position_embeddings")
    stretch = longest / original
    if original == 1:
        raise InputError(f"{where}: {name}=1: no model has a context of one token")
    for told, meant in ((name, original), ("factor", stretch)):
        if rope.get(told, meant) != meant:
            raise InputError(
                f"{where}: rope scaling has {told}={shown(rope[told])}, and by {name}={original} "
                f"and max_position_embeddings={longest} it is {meant:g}. transformers and vLLM "
                "would differ. Remove the wrong one"
            )
    factors, others = (_factors(rope, name, where) for name in ("short_factor", "long_factor"))
    if len(factors) != len(others):
        raise InputError(
            f"{where}: rope scaling has {len(factors)} factors in short_factor and {len(others)} "
            "in long_factor: one is not of this model. Mend config.json"
        )
    amplitude = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
    return LongRope(positions=original, factors=factors, amplitude=amplitude)


def _factors(rope: Mapping[str, object], name: str, where: str) -> tuple[float, ...]:
    told = rope.get(name)
    if not isinstance(told, list):
        raise InputError(f"{where}: rope scaling has {name}={shown(told)}: it must be a list")
    return tuple(Fields({name: value}, where).real(name) for value in told)
