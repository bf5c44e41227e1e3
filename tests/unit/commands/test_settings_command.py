"""Every key of a recipe is printed, with what it means."""

from typing import Annotated, Literal

import pytest
from pydantic import Field

from megatron_rl.commands.main import main
from megatron_rl.commands.settings import WIDTH, Entry, entries, lines
from megatron_rl.config import RunConfig
from megatron_rl.settings import Settings


def keys_of(schema: dict, top: dict, at: str) -> set[str]:
    """Paths of all properties in pydantic's own JSON schema, which knows nothing of our walk."""
    found = set()
    for name, value in schema.get("properties", {}).items():
        path = f"{at}{name}"
        found.add(path)
        for inner, where in inner_schemas(value, path):
            found |= keys_of(top["$defs"][inner], top, f"{where}.")
    return found


def inner_schemas(value: dict, path: str):
    for one in [value, *value.get("anyOf", []), *value.get("oneOf", [])]:
        if "$ref" in one:
            yield one["$ref"].rpartition("/")[2], path
        elif isinstance(one.get("additionalProperties"), dict):
            yield from inner_schemas(one["additionalProperties"], f"{path}.<name>")


def test_every_key_is_there_with_a_text():
    listed, schema = list(entries(RunConfig)), RunConfig.model_json_schema()
    listed_keys = {entry.path for entry in listed if not entry.path.endswith("<name>")}
    assert listed_keys == keys_of(schema, schema, at="")
    assert {"reward.parts.<name>.weight", "evaluation.benchmarks.<name>.path"} <= listed_keys
    assert [entry.path for entry in listed if not entry.text] == []
    assert [entry.path for entry in listed if not entry.is_group and not entry.default] == []


def test_everything_fits_the_terminal_and_starts_with_the_sections_in_order(capsys):
    assert main(["settings"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert max(map(len, told)) <= WIDTH
    sections = [line for line in told if line in RunConfig.model_fields]
    assert sections == list(RunConfig.model_fields)
    assert '  prompts.overlong   skip | error; default "skip"' in told


def test_one_key_with_its_bounds(capsys):
    assert main(["settings", "rollout.temperature"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "  rollout.temperature   float >= 0.01 and <= 2.0; default 1.0",
        "      Softmax temperature. The trainer divides its logits by the same value. Beyond these "
        "bounds",
        "      vLLM refuses it, or silently takes the lower one.",
    ]


def test_one_section_holds_its_own_keys_only(capsys):
    assert main(["settings", "reward"]) == 0
    told = capsys.readouterr().out
    assert (
        "reward.parts.<name>.weight   float >= -1000000000.0 and <= 1000000000.0; must be set"
        in told
    )
    assert "  rollout." not in told


def test_names_and_unions_of_an_algorithm_are_told_as_a_recipe_spells_them(capsys):
    assert main(["settings", "algorithm"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "Annotated" not in told
    assert "algorithm.selection list of all | gold | positive" in told
    assert "algorithm.objective section; default the preset's" in told
    assert "algorithm.objective (kind: dpo)" in told
    assert "algorithm.objective.beta float > 0; default 0.1" in told


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("rolout", "rollout"),
        ("rollout.temprature", "rollout.temperature"),
        ("reward.parts.name.weight", "reward.parts.<name>.weight"),
    ],
)
def test_an_unknown_key_names_the_nearest(capsys, key, near):
    assert main(["settings", key]) == 2
    said = capsys.readouterr().err
    assert said == (
        f"megatron-rl: error: settings: there is no section or key {key!r}. Did you mean {near}?\n"
    )


def test_a_recipe_adds_its_values_where_they_differ(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "run: {output_dir: out, num_iterations: 3}\nmodel: {path: m}\nprompts: {path: p}\n"
        "algorithm: {preset: grpo}\nrollout: {temperature: 0.5, group_size: 4}\n"
    )
    assert main(["settings", "rollout", "--recipe", str(recipe)]) == 0
    told = capsys.readouterr().out
    assert "rollout.temperature   float >= 0.01 and <= 2.0; default 1.0; here 0.5\n" in told
    assert "rollout.group_size   int >= 1 and <= 65536; default 4\n" in told
    assert main(["settings", "run.num_iterations", "--recipe", str(recipe)]) == 0
    assert "int >= 1 and <= 1000000000; must be set; here 3\n" in capsys.readouterr().out


class Clipped(Settings):
    """A ratio that is bounded."""

    kind: Literal["clipped"] = "clipped"
    """Which."""

    eps: float = Field(default=0.2, gt=0, le=1)
    """How far."""


class Plain(Settings):
    """No ratio."""

    kind: Literal["plain"] = "plain"


class Section(Settings):
    """One of two."""

    objective: Annotated[Clipped | Plain, Field(discriminator="kind")] | None = None
    """The loss."""


def test_the_members_of_a_union_are_listed_by_their_kind():
    listed = list(entries(Section))
    assert listed[0] == Entry(
        path="objective", kind="section, or null", default="default null", text="The loss."
    )
    assert [entry.text for entry in listed if entry.path == "objective.kind"] == [
        "Which.",
        "Chooses these settings.",
    ]
    titles = [next(line for line in lines(entry) if line) for entry in listed[1:]]
    assert titles == [
        "objective (kind: clipped)",
        '  objective.kind   clipped; default "clipped"',
        "  objective.eps   float > 0 and <= 1; default 0.2",
        "objective (kind: plain)",
        '  objective.kind   plain; default "plain"',
    ]
