"""The layers with a sliding window that a config.json asks for, and the rope of either kind."""

from collections.abc import Mapping

from megatron_rl.errors import InputError
from megatron_rl.weights.arch import SlidingArch
from megatron_rl.weights.families.fields import Fields, shown

SLIDING, FULL = "sliding_attention", "full_attention"
INTERVAL = 4  # transformers: every so many layers one sees all that is before a token
_PLAIN = frozenset({"rope_type", "rope_theta"})  # the settings of a rope without scaling


def read_sliding(
    windows: str | None, fields: Fields, layers: int, rope_theta: float | None
) -> SlidingArch | None:
    """The window and its layers, by Family.windows; None where all layers see all.

    rope_theta: of the rope of these layers, where it is one of their own.

    Raises:
        InputError: kinds of layers that nobody builds, or of which engines would make others.
    """
    if windows is None:
        return None
    if windows == "by layer":
        found = _layers_told(fields, layers)
    elif windows == "all":
        found = _all_or_nothing(fields, layers)
    else:
        found = _switched(fields, layers)
    if not found:
        return None
    window = fields.number("sliding_window")
    if windows != "by layer" and window >= fields.number("max_position_embeddings"):
        return None  # never full
    return SlidingArch(window=window, layers=found, rope_theta=rope_theta)


def refuse_kinds_of_layers(kinds: object, where: str) -> None:
    """Refuse layer_types but that of layers which all see all that is before a token."""
    if kinds is None:
        return
    if not isinstance(kinds, list) or any(kind != FULL for kind in kinds):
        raise InputError(
            f"{where}: layer_types={shown(kinds)} is not supported: only full_attention "
            "is. Use a model without sliding-window layers"
        )


def _layers_told(fields: Fields, layers: int) -> frozenset[int]:
    """As OLMo 3 has it."""
    by_interval = [SLIDING if (layer + 1) % INTERVAL else FULL for layer in range(layers)]
    found = _named(fields, layers, by_interval)
    if not found:
        raise InputError(
            f"{fields.where}: layer_types has no {SLIDING!r}: no published model is like that, and "
            "it has not been tried. Use a model with both kinds of layers"
        )
    return found


def _all_or_nothing(fields: Fields, layers: int) -> frozenset[int]:
    """As Mistral has it: transformers slides wherever there is a window.

    vLLM asks layer_types first, where they are told, so that they may not be.
    """
    kinds, where = fields.values.get("layer_types"), fields.where
    if fields.values.get("sliding_window") is None:
        refuse_kinds_of_layers(kinds, where)
        return frozenset()
    window = fields.number("sliding_window")
    if window < fields.number("max_position_embeddings"):
        for name in ("layer_types", "use_sliding_window"):
            if (told := fields.values.get(name)) is not None:
                raise InputError(
                    f"{where}: sliding_window={window} and {name}={shown(told)}: transformers "
                    f"does not ask {name} of this family. Remove it, or set sliding_window to null"
                )
    refuse_kinds_of_layers(kinds, where)
    return frozenset(range(layers))


def _switched(fields: Fields, layers: int) -> frozenset[int]:
    """As Qwen2 has it: of the layers from max_window_layers on, which are all, or none."""
    if not fields.flag("use_sliding_window"):
        refuse_kinds_of_layers(fields.values.get("layer_types"), fields.where)
        return frozenset()
    fields.number("sliding_window")
    first = fields.count("max_window_layers")
    found = _named(fields, layers, [FULL if n < first else SLIDING for n in range(layers)])
    if len(found) not in (0, layers):
        raise InputError(
            f"{fields.where}: use_sliding_window=True gives {len(found)} of {layers} layers a "
            "window (max_window_layers, layer_types): vLLM 0.32 has none of this family in which "
            "layers differ. Use a model whose window is switched off"
        )
    return found


def _named(fields: Fields, layers: int, absent: list[str]) -> frozenset[int]:
    """The layers with a window; absent: the kinds where layer_types is."""
    told = fields.values.get("layer_types")
    kinds = absent if told is None else told
    if (
        not isinstance(kinds, list)
        or len(kinds) != layers
        or any(kind not in (SLIDING, FULL) for kind in kinds)
    ):
        raise InputError(
            f"{fields.where}: layer_types={shown(told)} must be {layers} times {SLIDING!r} or "
            f"{FULL!r}, as num_hidden_layers={layers} says. Mend config.json"
        )
    return frozenset(layer for layer, kind in enumerate(kinds) if kind == SLIDING)


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
