"""A recipe and its overrides as plain values: layers joined, references resolved and remembered."""

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_rl.algorithms.objective_forms import OBJECTIVE, joined, overlaid
from megatron_rl.errors import ConfigErrors, InputError
from megatron_rl.files import read_text
from megatron_rl.parallel.config import CHOSEN
from megatron_rl.references import MIN_HIDDEN_CHARS, References, hidden, remember

AUTO_LAYOUT = "parallel.auto=true"  # what `parallel=auto` is short for
MAX_DEPTH = 32  # of mappings and lists in each other; the deepest setting has 4

_UNCLEAR = (  # plain scalars that YAML 1.1 reads as numbers, and people do not
    (
        re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?"),
        "YAML reads it in base 60. Write the number out",
    ),
    (
        re.compile(r"[-+]?0[0-9_]+(\.[0-9_]*)?([eE][-+]?[0-9]+)?"),
        "YAML may read a leading zero as octal. Write the number without it",
    ),
)
_ENVIRONMENT = re.compile(r"\$\{\s*oc\.env\s*:")
_VARIABLE = re.compile(_ENVIRONMENT.pattern + r"\s*[\"']?([^,}\s\"']+)")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The values of a recipe, and the references that some of them were written as."""

    values: Any
    references: References


def read_recipe(
    recipe: Path | None,
    overrides: Sequence[str],
    is_text: Callable[[Sequence[str], str], bool] = lambda path, value: False,
) -> Recipe:
    """A recipe, its base recipes below it and `section.key=value` overrides above it.

    is_text: true of the path of a setting and what is typed for it, where that is text; an override
    gives the setting the text as it is typed, where it is not quoted, null or a reference.

    Raises:
        ConfigErrors: a file cannot be read or is not YAML, layers or references do not fit.
    """
    where = "overrides" if recipe is None else str(recipe)
    loaded = OmegaConf.create() if recipe is None else _read(recipe, seen=())
    overrides = [AUTO_LAYOUT if text == "parallel=auto" else text for text in overrides]
    overrides = [_with_text_quoted(text, is_text) for text in overrides]
    syntax = [problem for text in overrides if (problem := _override_problem(text))]
    if syntax:
        raise ConfigErrors(syntax)
    try:
        merged = _joint(loaded, joined(overrides), "overrides")
        written = OmegaConf.to_container(merged, resolve=False)
        _taken_variables(written, written)  # an error of resolving may quote a value
        values = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigErrors([hidden(f"{where}: {_first_line(error)}")]) from error
    except RecursionError as error:
        raise ConfigErrors([f"{where}: its references lead in a circle"]) from error
    return Recipe(values=values, references=dict(_references(written, values)))


def _read(recipe: Path, seen: tuple[Path, ...]) -> Any:
    if recipe in seen:
        raise ConfigErrors([f"{recipe}: base recipes name each other in a circle"])
    try:
        text = read_text(recipe, encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError, InputError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigErrors([f"recipe {_cut(str(recipe), 400)!r} cannot be read: {why}"]) from error
    try:
        root = _composed(text)
        is_mapping = root is None or isinstance(root, yaml.MappingNode)
        loaded: Any = OmegaConf.create(text if is_mapping else "{}")
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise ConfigErrors([f"{recipe}: not valid YAML: {error}"]) from error
    if not is_mapping:
        raise ConfigErrors([f"{recipe}: must hold sections (`run:`, `model:`, ...)"])
    if unclear := list(_unclear_numbers(root)):
        raise ConfigErrors([f"{recipe}, {problem}" for problem in unclear])
    values: Any = OmegaConf.to_container(loaded, resolve=False)
    if values.get("parallel") == "auto":
        loaded["parallel"] = {"auto": True}
    base = values.get("base")
    if base is None:
        return loaded
    del loaded["base"]
    below = _read((recipe.parent / str(base)).resolve(), (*seen, recipe))
    return _joint(below, loaded, str(recipe))


def _composed(text: str) -> yaml.Node | None:
    """The tree of a YAML text; ValueError where it is so deep that walking it would overflow."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            line = event.start_mark.line + 1
            raise ValueError(f"line {line}: it is nested more than {MAX_DEPTH} levels deep")
    node: yaml.Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
    return node


def _unclear_numbers(node: yaml.Node | None) -> Iterator[str]:
    """One problem for each plain scalar that is a number to YAML, but not the one it looks like."""
    seen, left = set[int](), [node]
    while left:
        node = left.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))  # an anchor's node hangs in several places
        if isinstance(node, yaml.MappingNode):
            left += [part for pair in reversed(node.value) for part in reversed(pair)]
        elif isinstance(node, yaml.SequenceNode):
            left += reversed(node.value)
        elif isinstance(node, yaml.ScalarNode) and node.style is None:
            for form, rule in _UNCLEAR:
                if form.fullmatch(node.value):
                    line = node.start_mark.line + 1
                    yield f"line {line}: {node.value}: {rule}, or quote it if it is text"


def _override_problem(text: str) -> str | None:
    key, equals, value = text.partition("=")
    if not equals or not all(part.strip() for part in key.split(".")) or "." not in key:
        return f"override {text!r}: must read section.key=value, for example run.seed=1"
    if key.count(".") >= MAX_DEPTH:
        return f"override {text[:60]!r}...: its key has more than {MAX_DEPTH} parts"
    try:
        unclear = next(_unclear_numbers(_composed(value)), None)
        OmegaConf.from_dotlist([text])
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError) as error:
        return f"override {_cut(text)!r}: its value is not valid YAML: {_first_line(error)}"
    return unclear and f"override {text!r}: {unclear.partition(': ')[2]}"


def _with_text_quoted(override: str, is_text: Callable[[Sequence[str], str], bool]) -> str:
    """The override, its value quoted where it is text that YAML might take for something else.

    prompts.system=              -> prompts.system=""        a shell takes quotes away
    prompts.template={prompt}    -> prompts.template="{prompt}"
    """
    key, equals, value = override.partition("=")
    if not equals or not is_text(key.split("."), value):
        return override
    if value in ("null", "~") or "${" in value or _is_quoted(value):
        return override
    return f"{key}={json.dumps(value, ensure_ascii=False)}"


def is_list(value: str) -> bool:
    """True where YAML reads a list."""
    try:
        return isinstance(yaml.compose(value, Loader=yaml.SafeLoader), yaml.SequenceNode)
    except (yaml.YAMLError, RecursionError):
        return False


def _is_quoted(value: str) -> bool:
    if not value.startswith(("'", '"')):
        return False
    try:
        node = yaml.compose(value, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return False
    return isinstance(node, yaml.ScalarNode) and node.style in ("'", '"')


def _joint(below: Any, above: Any, where: str) -> Any:
    """One layer over another.

    Raises:
        ConfigErrors: a section of one is a plain value in the other.
    """
    layers: Any = [OmegaConf.to_container(layer, resolve=False) for layer in (below, above)]
    lower, upper = layers
    if clashes := list(_clashes(lower, upper, ())):
        raise ConfigErrors([f"{where}: {clash}" for clash in clashes])
    return overlaid(_below_chosen(below, lower, upper), above)


def _below_chosen(below: Any, lower: Any, upper: Any) -> Any:
    """The lower layer, without the sizes of its layout where the upper one has them chosen."""
    section, chooses = lower.get("parallel"), upper.get("parallel")
    if not isinstance(section, dict) or not isinstance(chooses, dict):
        return below
    if chooses.get("auto") is not True:
        return below
    kept = {name: value for name, value in section.items() if name not in CHOSEN}
    return OmegaConf.create(lower | {"parallel": kept})


def _clashes(below: Any, above: Any, path: tuple[str, ...]) -> Iterator[str]:
    if below is None or above is None or ".".join(path) == OBJECTIVE:
        return  # an objective may be a bare name
    if isinstance(below, dict) and isinstance(above, dict):
        for key in below.keys() & above.keys():
            yield from _clashes(below[key], above[key], (*path, str(key)))
    elif isinstance(below, dict) or isinstance(above, dict):
        plain = above if isinstance(below, dict) else below
        other = "the layer below it" if plain is above else "the layer above it"
        yield (
            f"{'.'.join(path)}={_cut(str(plain))!r}: it is a section with keys in {other}. "
            "Write keys in both, or leave it out"
        )


def _taken_variables(written: Any, resolved: Any) -> set[str]:
    """The values of the environment that a recipe asks for; messages hide them from now on."""
    values = dict(_leaves(resolved, ()))
    taken = set()
    for path, text in _leaves(written, ()):
        if not isinstance(text, str) or not _ENVIRONMENT.search(text):
            continue
        named = set(_VARIABLE.findall(text))
        for name, value in os.environ.items():
            # A name may be the value of another reference, and then only its value tells it.
            is_inside = len(value) >= MIN_HIDDEN_CHARS and value in str(values.get(path))
            if name in named or is_inside:
                remember(name, value)
                taken.add(value)
    return taken - {""}


def _references(written: Any, resolved: Any) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """The path and text of each reference whose value is, or holds, one of the environment."""
    taken = _taken_variables(written, resolved)
    values = dict(_leaves(resolved, ()))
    for path, text in _leaves(written, ()):
        if isinstance(text, str) and "${" in text:
            is_tainted = any(value in str(values.get(path)) for value in taken)
            if is_tainted or _ENVIRONMENT.search(text):
                yield path, text


def _leaves(value: Any, path: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    if isinstance(value, dict | list):
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        for key, each in inner:
            yield from _leaves(each, (*path, key))
    else:
        yield path, value


def _cut(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
