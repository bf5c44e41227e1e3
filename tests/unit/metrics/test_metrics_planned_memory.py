"""What is held is told beside what was planned, once, and once more where the plan is exceeded."""

from megatron_rl.memory import GIB, Need
from megatron_rl.metrics.names import meaning
from megatron_rl.metrics.planned_memory import PlannedMemory
from megatron_rl.session import _planned

NEED = Need(
    held={"weights": 2.0 * GIB},
    passing={"activations": 3.0 * GIB},
    instead={"copies for a checkpoint": 1.0 * GIB},
    generating={"engine's share": 4.5 * GIB},
)


def test_the_first_iteration_is_told_and_no_other():
    planned = _planned(NEED, "cpu")
    assert planned.metrics() == {"memory/planned_peak_gib": 6.5}
    assert list(planned.compared({"memory/peak_gib": 6.6, "memory/update_gib": 6.6})) == [
        "memory: GiB on a rank, of those planned: peak 6.60 of 6.50"
    ]
    assert list(planned.compared({"memory/peak_gib": 7.0})) == []


def test_on_a_gpu_engine_and_trainer_are_two_sums():
    planned = _planned(NEED, "cuda")
    assert planned.metrics() == {
        "memory/planned_peak_gib": 6.5,
        "memory/planned_rollout_gib": 6.5,
        "memory/planned_update_gib": 5.0,
    }
    assert all(meaning(name) for name in planned.metrics())
    values = {"memory/peak_gib": 6.0, "memory/rollout_gib": 6.0, "memory/update_gib": 6.4}
    told, more = planned.compared(values)
    assert told == (
        "memory: GiB on a rank, of those planned: peak 6.00 of 6.50, rollout 6.00 of 6.50, update "
        "6.40 of 5.00"
    )
    assert more == (
        "memory: 6.40 GiB on a rank (update) are more than the 5.00 that were planned; the largest "
        "parts of the plan are engine's share 4.5 GiB, weights 2.0 GiB. Longer sequences, or a "
        "larger batch, may not fit"
    )


def test_what_grows_beyond_the_plan_later_is_told_once():
    planned = _planned(NEED, "cpu")
    list(planned.compared({"memory/peak_gib": 6.0}))
    assert list(planned.compared({"memory/peak_gib": 8.1})) == []  # an estimate: 1.25 times 6.5
    (more,) = planned.compared({"memory/peak_gib": 8.2})
    assert more.startswith("memory: 8.20 GiB on a rank (peak) are more than the 6.50")
    assert list(planned.compared({"memory/peak_gib": 9.0})) == []


def test_without_a_plan_or_a_measurement_nothing_is_told():
    assert list(PlannedMemory({}).compared({"memory/peak_gib": 9.0})) == []
    assert list(PlannedMemory({"rollout": 1.0}).compared({"memory/peak_gib": 9.0})) == []
