"""A field of Megatron-Core's own configuration, set in a recipe, on a machine without a GPU."""

import pytest

pytestmark = pytest.mark.slow

ACCEPTED = "model.megatron.bias_activation_fusion=true"
REFUSED = "model.megatron.bias_activation_fusoin=true"
ONE_ITERATION = ("run.num_iterations=1", "checkpoint.save_every=0", "checkpoint.export_hf=false")


def test_a_run_with_an_accepted_setting_trains(runs):
    runs.finish("own setting", 1, ACCEPTED, *ONE_ITERATION)
    (record,) = runs.records("own setting")
    assert record["policy/updates"] == 2


def test_a_run_says_what_its_layers_do_not_read(runs):
    said = runs.finish(
        "of other layers", 1, "model.megatron.attention_backend=flash", *ONE_ITERATION
    )
    assert "layers: local, which do not read model.megatron.attention_backend" in said


def test_the_plan_of_a_run_with_an_accepted_setting_is_printed(runs):
    code, said = runs.command("plan", "planned", 1, ACCEPTED)
    assert code == 0, said
    assert "optimizer steps" in said


@pytest.mark.parametrize("command", ["train", "plan"])
def test_a_setting_that_megatron_core_has_not_is_named(runs, command):
    code, said = runs.command(command, "misspelt", 1, REFUSED)
    assert code == 2
    assert "Did you mean bias_activation_fusion?" in said
