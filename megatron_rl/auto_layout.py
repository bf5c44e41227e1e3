"""`parallel: auto`: the layout that a run gets, and why; one rank chooses, and all have it.

A run that goes on with as many ranks keeps the layout that its checkpoint was made with.
"""

import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_rl.auto_engine import with_engine
from megatron_rl.checkpoint.contract import newest_terms
from megatron_rl.checkpoint.names import CHECKPOINTS
from megatron_rl.choose import ENGINE, Choice, choices, nearest_choice
from megatron_rl.config import RunConfig
from megatron_rl.errors import ConfigErrors, InputError
from megatron_rl.fit import HOPELESS, RECOMPUTED, Free, changed_in, typed
from megatron_rl.memory import GIB
from megatron_rl.parallel.config import CHOSEN
from megatron_rl.parallel.groups import store_of_this_attempt
from megatron_rl.weights.families.registry import read_model_config
from megatron_rl.weights.model_source import find_model

MORE_RANKS = (2, 4, 8, 16)  # times as many, that a refusal tries
UNCONFIRMED = "by a cost model that no GPU has confirmed"


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Settings in the place of `parallel: auto`; none where the recipe says its layout."""

    settings: Mapping[str, Any] = field(default_factory=dict)  # section.key -> value
    lines: Sequence[str] = ()

    def applied(self, config: RunConfig) -> RunConfig:
        """The recipe with them, as checkpoints and config.yaml keep it."""
        for name, value in self.settings.items():
            section, _, key = name.partition(".")
            config = changed_in(config, section, **{key: value})
        return config


def settled(
    config: RunConfig, device_type: str, free: Free | None, say: Callable[[str], None]
) -> RunConfig:
    """The recipe of a run with an engine and a layout where it says auto; every rank calls it.

    The first rank chooses the layout for all, since what is free differs a little from rank to
    rank.

    Raises:
        ConfigErrors: no layout fits; on every rank.
    """
    config = with_engine(config, device_type, say)
    if not config.parallel.auto:
        return config
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        chosen = choose_layout(config, world, device_type, free)
    else:
        store = store_of_this_attempt("layout")
        if os.environ["RANK"] == "0":
            store.set("chosen", json.dumps(_told_to_others(config, world, device_type, free)))
        told = json.loads(store.get("chosen"))
        if problems := told.pop("problems", None):
            raise ConfigErrors(problems)
        chosen = Chosen(**told)
    for line in chosen.lines:
        say(line)
    return chosen.applied(config)


def _told_to_others(
    config: RunConfig, world: int, device_type: str, free: Free | None
) -> dict[str, Any]:
    try:
        chosen = choose_layout(config, world, device_type, free)
    except ConfigErrors as error:
        return {"problems": error.problems}
    return {"settings": chosen.settings, "lines": chosen.lines}


def choose_layout(config: RunConfig, world: int, device_type: str, free: Free | None) -> Chosen:
    """What `parallel: auto` means for so many ranks.

    Where the model cannot be read or cut, nothing is: what reads all inputs says why.

    Raises:
        ConfigErrors: no layout fits.
    """
    if not config.parallel.auto:
        return Chosen()
    nothing = Chosen(settings={"parallel.auto": False})
    try:
        source = find_model(config.model.path, "model.path")
        arch = read_model_config(source.config_dir, config.model.ignore_config_fields)
    except InputError:
        return nothing
    if (former := _former(config, world)) is not None:
        return former
    found = choices(config, arch, world, free, device_type=device_type, engines=_engines(config))
    best = list(itertools.islice(found, 2))
    if best:
        return Chosen(settings=_settings(best[0], config), lines=tuple(_lines(best, config, world)))
    nearest = nearest_choice(config, arch, world, free, device_type, _engines(config))
    if nearest is None:
        return nothing
    assert free is not None  # else everything would have fitted
    ways = [
        f"It would fit {world * times} ranks"
        for times in (MORE_RANKS if device_type == "cuda" else ())
        if any(
            choices(
                config, arch, world * times, free, device_type=device_type, engines=_engines(config)
            )
        )
    ]
    need = nearest.fit.need
    raise ConfigErrors(
        [
            f"parallel.auto=True: no layout of {source.config_dir} on {world} ranks fits. The "
            f"nearest, {_told(nearest)}, needs some {need.total / GIB:.1f} GiB a rank at its peak "
            f"({need.largest}), and {free}. {ways[0] if ways else HOPELESS}"
        ]
    )


def _engines(config: RunConfig) -> tuple[int, ...]:
    """Sizes of an engine to try: that of the recipe alone where it says one."""
    name = "tensor_model_parallel_size"
    return (getattr(config.rollout, name),) if name in config.rollout.model_fields_set else ENGINE


def _settings(choice: Choice, config: RunConfig) -> dict[str, Any]:
    """All that is chosen, with what stays as it was among the sizes."""
    return {
        "parallel.auto": False,
        **{f"parallel.{name}": getattr(choice.config.parallel, name) for name in CHOSEN},
        **{name: value for name, value in choice.settings.items() if "parallel." not in name},
    }


def _lines(best: list[Choice], config: RunConfig, world: int) -> Iterator[str]:
    """The keys that were chosen, and why."""
    first, *others = best
    keys = {
        name: value
        for name, value in _settings(first, config).items()
        if name != "parallel.auto" and value != _value_in(config, name)
    }
    told = " ".join(f"{name}={typed(value)}" for name, value in keys.items())
    ranks = "one rank" if world == 1 else f"{world} ranks"
    yield f"layout: parallel.auto chose for {ranks}: {told or 'each has the whole model'}"
    free, need = first.fit.free, first.fit.need.total / GIB
    memory = f"a rank needs {need:.1f} GiB" + (f", and {free}" if free is not None else "")
    beside = f"; next {_told(others[0])}, {others[0].cost.total:.3g} s" if others else ""
    yield (
        f"layout: {UNCONFIRMED} an update takes {first.cost.total:.3g} s ({first.cost.told})"
        f"{beside}; {memory}"
    )


def _value_in(config: RunConfig, name: str) -> Any:
    section, _, key = name.partition(".")
    return getattr(getattr(config, section), key)


def _told(choice: Choice) -> str:
    return choice.layout.axes + choice.layout.experts


def _former(config: RunConfig, world: int) -> Chosen | None:
    """The layout of the checkpoint that the run goes on from, where it has as many ranks."""
    if config.run.resume == "never":
        return None
    found = newest_terms(Path(config.run.output_dir) / CHECKPOINTS)
    terms = None if found is None else found[0]
    if terms is None or terms.recipe is None or not terms.is_whole or terms.layout is None:
        return None
    if terms.layout[0] != world:
        return None
    recipe = terms.recipe
    settings: dict[str, Any] = {"parallel.auto": False}
    parallel, fields = recipe["parallel"], type(config.parallel).model_fields
    settings |= {f"parallel.{name}": parallel.get(name, fields[name].default) for name in CHOSEN}
    if recipe["model"]["recompute_granularity"] is not None:
        settings |= {f"model.{name}": recipe["model"][name] for name in RECOMPUTED}
    if len(_engines(config)) > 1:
        name = "tensor_model_parallel_size"
        settings[f"rollout.{name}"] = recipe["rollout"][name]
    where = Path(terms.where).name
    line = f"layout: parallel.auto keeps that of {where}, which {world} ranks made"
    return Chosen(settings=settings, lines=(line,))
