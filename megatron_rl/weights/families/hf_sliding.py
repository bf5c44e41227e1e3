"""The layers with a sliding window that a config.json asks for, and the rope of either kind."""

from collections.abc import Mapping

from megatron_rl.errors import InputError
from megatron_rl.weights.arch import SlidingArch
from megatron_rl.weights.families.fields import Fields, shown

SLIDING, FULL = "sliding_attention", "full_attention"
INTERVAL = 4  # transformers: every so many layers one sees all that is before a token
_PLAIN = frozenset({"rope_type", "rope_theta"})  # the settings of a rope without scaling


def read_sliding(fields: Fields, layers: int, rope_theta: float) -> SlidingArch:
    """The window and its layers; rope_theta: of the rope of these layers.

    Raises:
        InputError: kinds of layers that nobody builds, or of which engines would make others.
    """
    told = fields.values.get("layer_types")
    by_interval = [SLIDING if (layer + 1) % INTERVAL else FULL for layer in range(layers)]
    kinds = by_interval if told is None else told
    if (
        not isinstance(kinds, list)
        or len(kinds) != layers
        or any(kind not in (SLIDING, FULL) for kind in kinds)
    ):
        raise InputError(
            f"{fields.where}: layer_types={shown(told)} must be {layers} times {SLIDING!r} or "
            f"{FULL!r}, as num_hidden_layers={layers} says. Mend config.json"
        )
    found = frozenset(layer for layer, kind in enumerate(kinds) if kind == SLIDING)
    if not found:
        raise InputError(
            f"{fields.where}: layer_types has no {SLIDING!r}: no published model is like that, and "
            "it has not been tried. Use a model with both kinds of layers"
        )
    return SlidingArch(window=fields.number("sliding_window"), layers=found, rope_theta=rope_theta)


def ropes_of_kinds(
    fields: Fields, told_theta: object, default_theta: float
) -> tuple[Fields, float]:
    """Fields for read_rope of full layers, and the base of the plain rope of the others.

    transformers 5 writes rope_parameters with one rope for each kind of layer; older files have
    rope_theta and rope_scaling, of which the latter is that of full layers alone.

    told_theta: rope_theta as config.json itself has it. default_theta: where nothing says it.
    """
    where, kinds = fields.where, fields.values.get("rope_parameters")
    if kinds is None:
        if told_theta not in (None, default_theta):
            raise InputError(
                f"{where}: rope_theta={shown(told_theta)}: transformers 5 gives it to layers with "
                f"{FULL!r} alone, and {default_theta:g} to the others. Say both in rope_parameters"
            )
        return fields, default_theta
    if not isinstance(kinds, Mapping) or kinds.keys() != {SLIDING, FULL}:
        raise InputError(
            f"{where}: rope_parameters={shown(kinds)} must have {SLIDING!r} and {FULL!r}: other "
            "settings in it are not read by transformers. Mend config.json"
        )
    if fields.values.get("rope_scaling") is not None:
        raise InputError(
            f"{where}: rope_scaling and rope_parameters are two spellings of one thing. Remove "
            "one of them"
        )
    for kind, settings in kinds.items():
        if not isinstance(settings, Mapping) or "rope_theta" not in settings:
            raise InputError(
                f"{where}: rope_parameters has {kind}={shown(settings)}: it must be an object with "
                "rope_theta. Mend config.json"
            )
    near, whole = kinds[SLIDING], kinds[FULL]
    if near.get("rope_type", "default") != "default" or near.keys() - _PLAIN:
        raise InputError(
            f"{where}: rope_parameters has {SLIDING}={shown(near)}: only a plain rope (rope_type "
            "'default' and a rope_theta) is supported in layers with a window. Use a model with one"
        )
    theta = Fields(near, where).real("rope_theta")
    return Fields({**fields.values, "rope_parameters": whole}, where), theta
