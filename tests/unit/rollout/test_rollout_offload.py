"""Who has the device when: the engine and the trainer take turns, in this order."""

from types import SimpleNamespace

import pytest

from megatron_rl.policy.offload import OffloadedTrainer
from megatron_rl.rollout import sampled as module
from megatron_rl.rollout.sampled import SampledRollouts

STATE = ["policy state leaves", "critic state leaves", "memory is given back"]
WEIGHTS = ["policy weights leave", "critic weights leave", "memory is given back"]

END = ["all are here", "engine's cache wakes"]


@pytest.fixture
def turns(monkeypatch):
    """Offload -> (rollouts with an engine that is awake, and what happens to them)."""

    def of(offload):
        told = []
        monkeypatch.setattr(module, "sync_metrics", lambda report, world: {})
        monkeypatch.setattr(
            "megatron_rl.policy.offload.dist.barrier", lambda group: told.append("all are here")
        )
        platform = SimpleNamespace(
            give_back_device_memory=lambda: told.append("memory is given back")
        )
        groups = SimpleNamespace(platform=platform, world="world")
        models = [Model(name, told) for name in ("policy", "critic")]
        parts = dict.fromkeys(SampledRollouts.__dataclass_fields__)
        report = SimpleNamespace(received_bytes=0, verified_tensors=0)
        parts |= {
            "engine": Engine(told),
            "sync": SimpleNamespace(push=lambda weights: told.append("sync") or report),
            "trainer": OffloadedTrainer(offload, models, groups),
            "shares_device": True,
            "groups": groups,
            "meter": SimpleNamespace(report=lambda values: None),
        }
        return SampledRollouts(**parts), models[0], told

    return of


class Model:
    def __init__(self, name, told):
        self.residence = SimpleNamespace(
            state_leaves=lambda: told.append(f"{name} state leaves"),
            weights_leave=lambda: told.append(f"{name} weights leave"),
        )

    def named_parameters(self):
        return {}


class Engine:
    def __init__(self, told):
        self.told, self.is_awake = told, True

    def sleep(self, *, keeps_weights=False):
        self.told.append("engine keeps its weights" if keeps_weights else "engine sleeps")
        self.is_awake = False

    def wake(self):
        self.told.append("engine wakes")
        self.is_awake = True

    def wake_for_weights(self):
        self.told.append("engine's weights wake")

    def wake_for_generation(self):
        self.told.append("engine's cache wakes")
        self.is_awake = True


@pytest.mark.parametrize(
    ("offload", "expected"),
    [
        ("none", ["engine's weights wake", "sync", "engine's cache wakes"]),
        (
            "optimizer",
            [*STATE, "engine's weights wake", "sync", *STATE, *END],
        ),
        (
            "weights",
            [*STATE, "engine's weights wake", "sync", *STATE, *WEIGHTS, *END],
        ),
    ],
)
def test_state_leaves_before_the_engines_weights_and_all_before_its_cache(turns, offload, expected):
    rollouts, policy, told = turns(offload)
    rollouts.receive(policy)
    assert told == expected


@pytest.mark.parametrize("offload", ["optimizer", "weights"])
def test_a_save_has_the_device_to_itself(turns, offload):
    rollouts, _, told = turns(offload)
    with rollouts.paused():
        told.append("save")
    left = [*STATE, *(WEIGHTS if offload == "weights" else ()), "all are here"]
    assert told == ["engine keeps its weights", "save", *left, "engine wakes"]


def test_the_engine_need_not_pause_for_what_stays(turns):
    for offload, only_weights in (("none", False), ("none", True), ("optimizer", True)):
        rollouts, _, told = turns(offload)
        with rollouts.paused(only_weights=only_weights):
            pass
        assert told == [], offload


def test_an_engine_that_slept_anyway_sleeps_on(turns):
    """As after a stop while it sampled: its weights are gone, so it could not generate."""
    rollouts, _, told = turns("optimizer")
    rollouts.engine.is_awake = False
    with rollouts.paused():
        told.append("save")
    assert "engine wakes" not in told
