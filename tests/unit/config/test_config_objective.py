"""The objective of a recipe: its forms, layers and overrides, and the flat keys of before."""

import pytest
import yaml
from bad_input import only

from megatron_rl.config import load_config
from megatron_rl.objectives.clipped_ratio import ClippedRatio
from megatron_rl.objectives.correction import RolloutCorrection
from megatron_rl.objectives.dpo import Dpo
from megatron_rl.objectives.likelihood import Likelihood


def objective_of(case, *overrides, **algorithm):
    case.settings["algorithm"] = {"preset": "grpo", **algorithm}
    return load_config(case.write(), overrides).algorithm.objective


@pytest.mark.parametrize(
    ("written", "overrides", "expected"),
    [
        (None, [], ClippedRatio()),
        ("likelihood", [], Likelihood()),
        ({"kind": "clipped_ratio", "eps_low": 0.1}, [], ClippedRatio(eps_low=0.1)),
        ({"eps_low": 0.1}, [], ClippedRatio(eps_low=0.1)),  # of the preset's kind
        (None, ["eps_low=0.1"], ClippedRatio(eps_low=0.1)),
        ("clipped_ratio", ["eps_low=0.1"], ClippedRatio(eps_low=0.1)),
        ({"eps_low": 0.1}, ["eps_high=0.3"], ClippedRatio(eps_low=0.1, eps_high=0.3)),
        ({"eps_low": 0.1}, ["=likelihood"], Likelihood()),
        ({"kind": "clipped_ratio", "eps_low": 0.1}, ["=likelihood"], Likelihood()),
        ({"kind": "clipped_ratio", "eps_low": 0.1}, ["kind=likelihood"], Likelihood()),
        ("likelihood", ["=clipped_ratio"], ClippedRatio()),
        ("likelihood", ["=clipped_ratio", "eps_low=0.1"], ClippedRatio(eps_low=0.1)),
        ("likelihood", ["eps_low=0.1", "=clipped_ratio"], ClippedRatio(eps_low=0.1)),
        (None, ["={eps_low: 0.1, eps_high: 0.3}"], ClippedRatio(eps_low=0.1, eps_high=0.3)),
    ],
)
def test_all_forms_and_their_overrides(case, written, overrides, expected):
    prefixed = [
        f"algorithm.objective{'' if text.startswith('=') else '.'}{text}" for text in overrides
    ]
    algorithm = {} if written is None else {"objective": written}
    assert objective_of(case, *prefixed, **algorithm) == expected


def test_a_base_recipe_is_overlaid_by_kind(case):
    base = case.folder / "base.yaml"
    case.settings["algorithm"] = {"preset": "grpo", "objective": {"eps_low": 0.1, "eps_high": 0.3}}
    base.write_text(yaml.safe_dump(case.settings))

    def over(algorithm):
        text = yaml.safe_dump({"base": "base.yaml", "algorithm": algorithm})
        return load_config(case.write(text), []).algorithm.objective

    assert over({"objective": {"eps_low": 0.15}}) == ClippedRatio(eps_low=0.15, eps_high=0.3)
    assert over({"objective": "likelihood"}) == Likelihood()
    assert over({"preset": "raft", "objective": "likelihood"}) == Likelihood()


def test_a_written_config_is_read_again(case):
    case.settings["algorithm"] = {"preset": "iterative_dpo", "objective": {"beta": 0.4}}
    case.settings["rollout"] |= {"group_size": 4}
    config = load_config(case.write(), [])
    text = yaml.safe_dump(config.model_dump(mode="json"))
    assert load_config(case.write(text), []) == config


@pytest.mark.parametrize(
    ("algorithm", "expected", "notice"),
    [
        (
            {"preset": "grpo", "eps_low": 0.1},
            ClippedRatio(eps_low=0.1),
            "algorithm.eps_low goes away: write algorithm.objective.eps_low=0.1",
        ),
        (
            {"preset": "grpo", "dual_clip": 3.0, "objective": {"eps_low": 0.1}},
            ClippedRatio(eps_low=0.1, dual_clip=3.0),
            "algorithm.dual_clip goes away: write algorithm.objective.dual_clip=3.0",
        ),
        (
            {"preset": "iterative_dpo", "dpo_beta": 0.4},
            Dpo(beta=0.4),
            "algorithm.dpo_beta goes away: write algorithm.objective.beta=0.4",
        ),
        (
            {"preset": "iterative_dpo", "dpo_reference": "previous_iteration"},
            Dpo(reference="previous_iteration"),
            "algorithm.dpo_reference goes away: "
            "write algorithm.objective.reference=previous_iteration",
        ),
        (
            {"preset": "raft", "eps_high": 0.2},
            Likelihood(),
            "algorithm.eps_high goes away: leave it out, likelihood has no eps_high",
        ),
    ],
)
def test_a_flat_key_works_and_says_what_to_write(case, algorithm, expected, notice):
    case.settings["algorithm"] = algorithm
    config = load_config(case.write(), []).algorithm
    assert config.objective == expected
    assert config.notices == (notice,)


def test_the_former_cap_is_a_correction_and_says_what_to_write(case):
    case.settings["algorithm"] = {"preset": "grpo", "rollout_is_cap": 1.5}
    config = load_config(case.write(), []).algorithm
    assert config.rollout_correction == RolloutCorrection(high=1.5)
    assert config.shared_terms.correction == ("token", "truncate", 0.0, 1.5)
    said = "algorithm.rollout_is_cap goes away: write algorithm.rollout_correction.high=1.5"
    assert config.notices == (said,)
    override = said.partition("write ")[2]
    case.settings["algorithm"] = {"preset": "grpo"}
    again = load_config(case.write(), [override]).algorithm
    assert again.shared_terms == config.shared_terms


def test_a_former_cap_of_null_is_no_correction(case):
    case.settings["algorithm"] = {"preset": "grpo", "rollout_is_cap": None}
    config = load_config(case.write(), []).algorithm
    assert config.shared_terms.correction is None
    assert config.notices == ("algorithm.rollout_is_cap goes away: leave it out",)


@pytest.mark.parametrize(
    ("settings", "term"),
    [
        ({}, ("token", "truncate", 0.0, 2.0)),
        ({"level": "sequence", "mode": "mask"}, ("sequence", "mask", 0.0, 2.0)),
        ({"level": "geometric"}, ("geometric", "truncate", 0.0, 1.001)),
        ({"low": 0.5, "high": 3.0}, ("token", "truncate", 0.5, 3.0)),
    ],
)
def test_defaults_of_a_correction(settings, term):
    assert RolloutCorrection(**settings).term == term


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"algorithm": {"preset": "iterative_dpo"}}, "rollout.temperature=0.7: the log-probs of"),
        (
            {"model": {"dtype": "float64"}, "optimizer": {"clip_grad": 0}},
            "model.dtype=float64: every rank keeps a whole",
        ),
        ({}, None),
    ],
)
def test_what_is_done_in_another_way_is_said(case, changes, said):
    case.settings["rollout"] |= {"temperature": 0.7, "group_size": 2}
    for section, settings in changes.items():
        case.change(**{section: settings})
    notices = load_config(case.write(), []).notices
    assert [text[: len(said or "")] for text in notices] == ([said] if said else [])


def test_the_new_form_says_nothing(case):
    case.settings["algorithm"] = {"preset": "grpo", "objective": {"eps_low": 0.1}}
    assert load_config(case.write(), []).algorithm.notices == ()


@pytest.mark.parametrize(
    ("algorithm", "problem"),
    [
        (
            {"preset": "grpo", "eps_low": 0.1, "objective": {"eps_low": 0.1}},
            "algorithm.eps_low=0.1: stands beside algorithm.objective.eps_low. Keep the latter",
        ),
        (
            {"preset": "raft", "eps_high": 0.3},
            "algorithm.eps_high=0.3: has no effect under an objective other than clipped_ratio. "
            "Set algorithm.objective=clipped_ratio or leave it out",
        ),
        (
            {"preset": "grpo", "rollout_is_cap": 2.0, "rollout_correction": {"low": 0.5}},
            "algorithm.rollout_is_cap=2.0: stands beside algorithm.rollout_correction. Keep the",
        ),
        (
            {"preset": "grpo", "objective": {"eps_lo": 0.1}},
            "algorithm.objective.eps_lo: unknown key. Did you mean algorithm.objective.eps_low?",
        ),
        (
            {"preset": "raft", "objective": {"eps_low": 0.1}},
            "algorithm.objective.eps_low: unknown key. Known here: kind",
        ),
        (
            {"preset": "grpo", "objective": "cliped_ratio"},
            "algorithm.objective='cliped_ratio': is not known. Did you mean 'clipped_ratio'? "
            "Known: likelihood, clipped_ratio, cispo, gspo, sapo, dpo",
        ),
        (
            {"preset": "grpo", "objective": {"kind": "dqo", "beta": 0.1}},
            "algorithm.objective='dqo': is not known. Did you mean 'dpo'? "
            "Known: likelihood, clipped_ratio, cispo, gspo, sapo, dpo",
        ),
        (
            {"preset": "grpo", "objective": {"kind": ["dpo"]}},
            "algorithm.objective=['dpo']: is not known. ",
        ),
        (
            {"preset": ["grpo"], "objective": {"eps_low": 0.1}},
            "algorithm.preset=['grpo']: Input should be a valid string",
        ),
        (
            {"preset": "grpo", "objective": 3},
            "algorithm.objective=3: ",
        ),
        (
            {"preset": "grpo", "objective": {"eps_low": 2}},
            "algorithm.objective.eps_low=2: Input should be less than or equal to 1",
        ),
        (
            {"preset": "grpoo", "objective": {"eps_low": 0.1}},
            "algorithm.preset='grpoo': is not known. Did you mean 'grpo'? ",
        ),
    ],
)
def test_a_bad_objective_is_named_as_the_recipe_has_it(case, algorithm, problem):
    case.settings["algorithm"] = algorithm
    assert only(case.config_problems()).startswith(problem)


def test_a_bad_layer_below_an_override_is_named(case):
    case.settings["algorithm"] = "grpo"
    assert case.config_problems("algorithm.objective=dpo")
    assert only(case.config_problems()).startswith("algorithm='grpo': ")
