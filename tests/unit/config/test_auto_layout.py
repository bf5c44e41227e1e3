"""`parallel: auto`: how it is written, what it chooses, what it keeps and when it refuses."""

import json
import threading
from dataclasses import asdict

import pytest
import yaml
from test_choose import QWEN_7B, SMALL, recipe

from megatron_rl import auto_layout
from megatron_rl.auto_layout import choose_layout, settled
from megatron_rl.checkpoint.contract import Terms
from megatron_rl.choose import choices
from megatron_rl.config import load_config
from megatron_rl.errors import ConfigErrors, InputError
from megatron_rl.fit import free_on_planned
from megatron_rl.parallel.config import CHOSEN
from megatron_rl.preflight import kept_recipe

AMPLE = free_on_planned(79.6)


@pytest.fixture(autouse=True)
def no_files(monkeypatch):
    """A model of 7 billion parameters without its files; no checkpoints."""

    class Source:
        config_dir = "qwen"

    monkeypatch.setattr(auto_layout, "find_model", lambda path, field: Source)
    monkeypatch.setattr(auto_layout, "read_model_config", lambda path, ignored: QWEN_7B)
    monkeypatch.setattr(auto_layout, "newest_terms", lambda directory: None)


def asked(response=8168, **changes):
    return recipe(response=response, auto=True, **changes)


def test_it_is_the_first_of_the_layouts_that_plan_proposes():
    config = asked()
    chosen = choose_layout(config, 8, "cuda", AMPLE)
    first = next(choices(config, QWEN_7B, 8, AMPLE))
    after = chosen.applied(config)
    assert after.parallel == first.config.parallel.model_copy(update={"world_size": None})
    assert after.model == first.config.model
    assert not after.parallel.auto
    assert set(chosen.settings) >= {f"parallel.{name}" for name in CHOSEN}
    keys, why = chosen.lines
    for name, value in chosen.settings.items():
        if name.startswith("model."):
            assert f"{name}={value}" in keys
    assert f"{first.cost.total:.3g} s" in why
    assert "no GPU has confirmed" in why


def test_it_is_the_cheapest_that_fits_and_the_same_every_time():
    config, scarce = asked(), free_on_planned(40)
    found = [choose_layout(config, 8, "cuda", scarce) for _ in range(3)]
    assert found[0] == found[1] == found[2]
    assert found[0].settings != choose_layout(config, 8, "cuda", free_on_planned(400)).settings
    layout = found[0].applied(config).parallel.layout(8)
    assert layout.world_size % (layout.tp * layout.pp * layout.cp) == 0


def test_an_engine_of_the_recipe_stays_and_another_is_chosen():
    free = free_on_planned(400)
    changed = choose_layout(asked(), 8, "cuda", free)
    assert "rollout.tensor_model_parallel_size" not in changed.settings  # one rank does
    values = asked().model_dump(exclude_unset=True)
    values["rollout"]["tensor_model_parallel_size"] = 4
    config = type(asked()).model_validate(values)
    after = choose_layout(config, 8, "cuda", free).applied(config)
    assert after.rollout.tensor_model_parallel_size == 4


def test_where_nothing_fits_the_nearest_is_named_with_as_many_ranks_as_do():
    with pytest.raises(ConfigErrors) as refused:
        choose_layout(asked(), 2, "cuda", free_on_planned(30))
    (problem,) = refused.value.problems
    assert "no layout of qwen on 2 ranks fits. The nearest, TP " in problem
    assert "GiB a rank at its peak" in problem
    times = int(problem.split("It would fit ")[1].split()[0])
    chosen = choose_layout(asked(), times, "cuda", free_on_planned(30))
    assert chosen.lines
    with pytest.raises(ConfigErrors):
        choose_layout(asked(), times // 2, "cuda", free_on_planned(30))


def test_a_model_that_cannot_be_read_is_left_to_those_who_read_it(monkeypatch):
    def missing(path, field):
        raise InputError("gone")

    monkeypatch.setattr(auto_layout, "find_model", missing)
    chosen = choose_layout(asked(), 8, "cuda", AMPLE)
    assert (chosen.settings, chosen.lines) == ({"parallel.auto": False}, ())


def terms(config, world):
    return Terms(
        where="runs/a/checkpoints/iteration_000003",
        recipe=kept_recipe(config),
        layout=config.parallel.layout(world).sizes,
    )


def test_a_run_that_goes_on_with_as_many_ranks_keeps_its_layout(monkeypatch):
    sizes = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    former = recipe(**sizes, sequence_parallel=True)
    monkeypatch.setattr(auto_layout, "newest_terms", lambda directory: (terms(former, 8), 3))
    chosen = choose_layout(asked(), 8, "cuda", AMPLE)
    assert chosen.applied(asked()).parallel == former.parallel
    assert chosen.lines == (
        "layout: parallel.auto keeps that of iteration_000003, which 8 ranks made",
    )
    for world, config in ((4, asked()), (8, asked(pipeline_model_parallel_size=1))):
        if world == 8:
            config = config.model_copy(
                update={"run": config.run.model_copy(update={"resume": "never"})}
            )
        assert "keeps" not in choose_layout(config, world, "cuda", AMPLE).lines[0]


def test_the_first_rank_chooses_for_all(monkeypatch):
    """Of the second one less is free, by itself it would choose otherwise."""
    told, is_there, said = {}, threading.Event(), []

    class Store:
        def set(self, key, value):
            told[key] = value
            is_there.set()

        def get(self, key):
            assert is_there.wait(60)
            return told[key]

    monkeypatch.setattr(auto_layout, "store_of_this_attempt", lambda name: Store())
    monkeypatch.setenv("WORLD_SIZE", "8")
    found = []
    for rank, gib in (("0", 400), ("1", 40)):
        monkeypatch.setenv("RANK", rank)
        found.append(settled(asked(), "cuda", free_on_planned(gib), said.append))
    assert found[0] == found[1]
    alone = choose_layout(asked(), 8, "cuda", free_on_planned(40)).applied(asked())
    assert alone.parallel != found[1].parallel or alone.model != found[1].model
    assert said[:2] == said[2:]
    json.loads(told["chosen"])
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(ConfigErrors, match="no layout of qwen on 8 ranks fits"):
            settled(asked(), "cuda", free_on_planned(4), said.append)


def test_on_a_cpu_the_memory_is_counted_as_a_cpu_needs_it(monkeypatch):
    monkeypatch.setattr(auto_layout, "read_model_config", lambda path, ignored: SMALL)
    config = recipe(auto=True)
    chosen = choose_layout(config, 2, "cpu", None)
    assert not chosen.applied(config).parallel.auto
    assert "GiB, and" not in chosen.lines[1]  # nothing says what is free


# -- how it is written -----------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path):
    def write(name="recipe.yaml", **parallel):
        values = recipe().model_dump(exclude_unset=True, mode="json")
        values["parallel"] = parallel.get("parallel", parallel)
        path = tmp_path / name
        path.write_text(yaml.safe_dump(values))
        return path

    return write


def test_the_short_form_is_the_long_one(written):
    assert load_config(written(parallel="auto"), []).parallel.auto
    assert load_config(written(auto=True), []).parallel.auto
    assert load_config(written(), ["parallel=auto"]).parallel.auto
    assert load_config(written(parallel="auto"), ["parallel.world_size=4"]).parallel.world_size == 4


def test_above_a_layout_it_takes_its_place(written, tmp_path):
    path = written(tensor_model_parallel_size=2, overlap_grad_reduce=False)
    found = load_config(path, ["parallel=auto"]).parallel
    assert found.auto
    assert found.tensor_model_parallel_size == 1
    assert found.overlap_grad_reduce is False
    above = tmp_path / "above.yaml"
    above.write_text("base: recipe.yaml\nparallel: auto\n")
    assert asdict_of(load_config(above, [])) == asdict_of(load_config(path, ["parallel=auto"]))
    with pytest.raises(ConfigErrors, match="stands beside parallel"):
        load_config(above, ["parallel.pipeline_model_parallel_size=2"])


def asdict_of(config):
    return config.parallel.model_dump() | asdict(config.parallel.split)
