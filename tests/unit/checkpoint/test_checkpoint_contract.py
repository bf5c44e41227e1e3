"""The contract of a resume: every setting has a class, and what must stay is refused early."""

import dataclasses
import hashlib
import importlib.util
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from megatron_rl import session
from megatron_rl.checkpoint import contract
from megatron_rl.checkpoint.contract import CONTRACT, UNSET, clause_of
from megatron_rl.checkpoint.manifest import write_manifest
from megatron_rl.checkpoint.names import CHECKPOINTS, iteration_of
from megatron_rl.commands.settings import entries
from megatron_rl.config import RunConfig, load_config
from megatron_rl.errors import ConfigErrors, InputError
from megatron_rl.preflight import check_resume, kept_recipe, read_inputs, start_terms
from megatron_rl.weights.hf_files import copy_companions

ROOT = Path(__file__).parents[3]
QUICKSTART = ROOT / "examples" / "quickstart"
SETTINGS = {entry.path for entry in entries(RunConfig) if not entry.is_group}
# Those that hold other settings are classed by these.
LEAVES = {one for one in SETTINGS if not any(other.startswith(f"{one}.") for other in SETTINGS)}


class Entered(Exception):
    """The run got as far as to Megatron-Core, so nothing was refused."""


@pytest.fixture(autouse=True)
def stop_at_enter(monkeypatch):
    def enter(_):
        raise Entered

    monkeypatch.setattr(session, "enter", enter)


# -- the table -------------------------------------------------------------------------------------


def test_every_setting_is_in_just_one_class():
    classed = [setting for clause in CONTRACT for setting in clause.settings]
    assert sorted(classed) == sorted(LEAVES)


def test_the_documentation_repeats_the_table():
    text = (ROOT / "docs" / "reliability.md").read_text()
    rows = [line for line in text.splitlines() if re.match(r"\| `\w+\.", line)]
    assert rows == [
        f"| {', '.join(f'`{setting}`' for setting in clause.settings)} | {clause.kind}"
        f"{f', by {clause.outcome}' if clause.outcome else ''} | {clause.why} |"
        for clause in CONTRACT
    ]


# -- a run with a checkpoint -----------------------------------------------------------------------


class Case:
    """A run of supervised training with a checkpoint after iteration 4, whose files say so."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.model = model
        self.data = folder / "data.jsonl"
        rows = (QUICKSTART / "data" / "train.jsonl").read_text().splitlines(keepends=True)
        self.data.write_text("".join(rows[:20]))
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(
            yaml.safe_dump(
                {
                    "run": {"output_dir": str(folder / "out"), "num_iterations": 6, "seed": 7},
                    "model": {"path": str(self.model), "dtype": "float32"},
                    "prompts": {"path": str(self.data), "max_prompt_tokens": 64},
                    "rollout": {"engine": "vllm", "max_response_tokens": 96},
                    "algorithm": {"preset": "sft"},
                    "optimizer": {"lr": 3e-4},
                }
            )
        )
        self.checkpoint = folder / "out" / CHECKPOINTS / "iteration_000004"
        copy_companions(self.model, self.checkpoint / "policy" / "hf_config")
        config = load_config(self.recipe, [])
        self.state = {
            "iteration": 4,
            "prompts": read_inputs(config, 1).prompts.state_dict(),
            "models": {"policy": {"scheduler": scheduler(config.optimizer)}},
            "layout": [1, 1, 1, 1],
            "recipe": kept_recipe(config),
        }
        self.write()

    def write(self, **changes: object) -> None:
        state = {k: v for k, v in (self.state | changes).items() if v is not None}
        write_state(self.checkpoint, json.dumps(state))

    def start(self, *overrides: str) -> None:
        session.train_session(load_config(self.recipe, overrides))

    def refusal(self, *overrides: str) -> str:
        with pytest.raises(ConfigErrors) as refused:
            self.start(*overrides)
        (problem,) = refused.value.problems
        return problem

    def changes(self, *overrides: str, world_size: int = 1) -> list[str]:
        config = load_config(self.recipe, overrides)
        state = json.loads((self.checkpoint / "state.json").read_text())
        saved = contract.saved_terms(self.checkpoint, state)
        return contract.changes(saved, start_terms(config, read_inputs(config, 1), world_size))


def write_state(checkpoint: Path, text: str) -> None:
    checkpoint.mkdir(exist_ok=True)
    (checkpoint / "state.json").write_text(text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    files = dict.fromkeys(("policy/.metadata", "rank_0.pt"), (0, ""))
    files["state.json"] = (len(text), digest)
    write_manifest(checkpoint, iteration_of(checkpoint), 1, files)


def scheduler(optimizer) -> dict[str, object]:
    """The part of Megatron's schedule that a checkpoint has always had."""
    return {
        "max_lr": optimizer.lr,
        "min_lr": optimizer.min_lr,
        "lr_decay_style": optimizer.lr_schedule,
        "start_wd": optimizer.weight_decay,
    }


def make_model(folder: Path) -> Path:
    spec = importlib.util.spec_from_file_location("make_model", QUICKSTART / "make_model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.make_model(folder, QUICKSTART / "data" / "train.jsonl")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def case(tmp_path, model):
    return Case(tmp_path, model)


def test_the_same_recipe_goes_on_and_nothing_is_said(case):
    assert case.changes() == []
    with pytest.raises(Entered):
        case.start()


def test_what_may_change_is_said_with_both_values(case):
    with pytest.raises(Entered):
        case.start("optimizer.lr=1e-5")
    assert case.changes("optimizer.lr=1e-5", "optimizer.lr_schedule=cosine") == [
        "optimizer.lr 0.0003 -> 1e-05",
        "optimizer.lr_schedule constant -> cosine",
    ]
    assert case.changes("optimizer.prompts_per_update=8") == [
        "optimizer.prompts_per_update null -> 8"
    ]


def test_a_part_that_comes_or_goes_is_said(case):
    part = f"reward.parts.brief.weight {UNSET} -> 0.5"
    assert part in case.changes("reward.parts.brief={kind: format, weight: 0.5}")


def test_what_does_not_matter_is_silent(case):
    assert case.changes("run.output_dir=elsewhere", "metrics.console=plain") == []


# Setting -> the value that is refused, and what the message says of the one that was.
MUST_STAY = {
    "run.seed": ("8", "must stay so: else prompts would come in another order"),
    "prompts.shuffle": ("false", "made with true"),
    "model.dtype": ("bfloat16", "made with float32"),
    "optimizer.use_distributed_optimizer": ("false", "made with true"),
}


def test_all_that_must_stay_by_value_is_tried_here():
    kept = {
        s for c in CONTRACT if c.kind == "must not change" and not c.outcome for s in c.settings
    }
    assert kept == MUST_STAY.keys()


@pytest.mark.parametrize("setting", MUST_STAY)
def test_what_must_stay_is_refused_before_anything_is_built(case, setting):
    value, why = MUST_STAY[setting]
    problem = case.refusal(f"{setting}={value}")
    assert problem.startswith(f"{setting}={value}: {case.checkpoint} was made with ")
    assert why in problem
    check_ways_out(case, problem, f"{setting}={value}")


def check_ways_out(case, problem, *refused):
    """Both go through as they are typed."""
    back, other = re.search(
        r"Set (.*), or start another run from its weights: (.*)$", problem
    ).groups()
    with pytest.raises(Entered):
        case.start(*refused, *shlex.split(back))
    assert other == f"run.output_dir=ANOTHER_DIRECTORY model.path={case.checkpoint}"


def test_another_network_is_refused_with_what_differs(case, tmp_path):
    other = Path(shutil.copytree(case.model, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    problem = case.refusal(f"model.path={other}")
    assert problem.startswith(f"model.path={other}: another network than that of ")
    assert "by its config.json: rms_norm_eps 0.5 instead of 1e-06. " in problem
    check_ways_out(case, problem, f"model.path={other}")


def test_the_same_network_elsewhere_goes_on_with_the_weights_of_the_checkpoint(case, tmp_path):
    other = Path(shutil.copytree(case.model, tmp_path / "other"))
    with pytest.raises(Entered):
        case.start(f"model.path={other}")
    (line,) = case.changes(f"model.path={other}")
    assert line.startswith(f"model.path {case.model} -> {other}: the trained weights are the ")


def test_changed_data_are_refused_and_a_copy_is_not(case, tmp_path):
    copy = tmp_path / "copy.jsonl"
    copy.write_text(case.data.read_text())
    with pytest.raises(Entered):
        case.start(f"prompts.path={copy}")
    assert case.changes(f"prompts.path={copy}") == [f"prompts.path {case.data} -> {copy}"]
    lines = copy.read_text().splitlines(keepends=True)
    copy.write_text("".join(lines[1:]))
    problem = case.refusal(f"prompts.path={copy}")
    assert f"{len(lines) - 1} usable rows now, {len(lines)} then; checksum " in problem
    check_ways_out(case, problem, f"prompts.path={copy}")


def test_an_edited_file_and_a_new_template_are_changed_data(case):
    template = "prompts.template='2+{prompt}'"
    check_ways_out(case, case.refusal(template), template)
    case.data.write_text("".join(case.data.read_text().splitlines(keepends=True)[1:]))
    assert "Bring them back, or start another run" in case.refusal()


def test_a_critic_may_neither_come_nor_go(case):
    case.write(models={"policy": case.state["models"]["policy"], "critic": {}})
    problem = case.refusal()
    assert "this recipe trains policy; " in problem
    assert f"{case.checkpoint} holds policy, critic. " in problem
    recipe = case.state["recipe"]
    recipe["algorithm"]["preset"] = "ppo"
    case.write(models={"policy": {}, "critic": {}}, recipe=recipe)
    assert "Set algorithm.preset=ppo, or start another run" in case.refusal()


def test_another_layout_is_said_with_what_it_does_to_random_states(case):
    tp2 = "parallel.tensor_model_parallel_size=2"
    config = load_config(case.recipe, [tp2])
    now = dataclasses.replace(
        start_terms(load_config(case.recipe, []), read_inputs(load_config(case.recipe, []), 1), 2),
        recipe=kept_recipe(config),
        layout=(2, 2, 1, 1),
    )
    saved = contract.saved_terms(case.checkpoint, case.state)
    assert contract.breaches(saved, now) == []
    assert contract.changes(saved, now) == [
        "parallel.tensor_model_parallel_size 1 -> 2",
        "layout 1 ranks (TP 1, PP 1) -> 2 ranks (TP 2, PP 1): random states belong to ranks, and "
        "were not restored",
    ]


def test_an_older_checkpoint_is_compared_by_what_it_has(case):
    case.write(recipe=None)
    with pytest.raises(Entered):
        case.start("run.seed=8")
    assert case.changes("optimizer.lr=1e-5", "run.seed=8") == [
        "optimizer.lr 0.0003 -> 1e-05",
        "iteration_000004 does not hold its recipe: whether other settings than these have changed "
        "is not known",
    ]
    case.data.write_text("".join(case.data.read_text().splitlines(keepends=True)[1:]))
    assert "usable rows now" in case.refusal()


@pytest.mark.parametrize("text", ["[]", "null", "{", None])
def test_a_state_that_cannot_be_trusted_is_left_to_the_resume(case, text):
    """Of a damaged checkpoint nothing is taken for a setting, not even where it reads well."""
    damaged = json.dumps(case.state).replace('"seed": 7', '"seed": 6')
    (case.checkpoint / "state.json").write_text(damaged if text is None else text)
    with pytest.raises(Entered):
        case.start()
    config = load_config(case.recipe, [])
    assert check_resume(config, read_inputs(config, 1), 1) is None


def test_an_older_checkpoint_is_asked_where_the_newest_is_damaged(case):
    newest = case.checkpoint.with_name("iteration_000005")
    write_state(newest, json.dumps(case.state | {"iteration": 5}))
    (newest / "MANIFEST.json").unlink()
    assert contract.newest_terms(case.checkpoint.parent)[1] == 4


def test_the_newest_checkpoint_is_asked_by_number(case):
    newest = case.checkpoint.with_name("iteration_1000000")
    write_state(newest, json.dumps(case.state | {"iteration": 1000000}))
    assert contract.newest_terms(case.checkpoint.parent)[1] == 1000000


def test_resume_never_is_refused_before_anything_is_built(case):
    with pytest.raises(InputError, match=r"it holds checkpoints, and run\.resume is never"):
        case.start("run.resume=never")


def test_an_unknown_setting_has_no_clause():
    assert clause_of("run.sead") is None
    assert clause_of("reward.parts.a.b.weight").kind == "may change"
