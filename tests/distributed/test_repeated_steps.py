"""Steps of the policy as engine that are repeated have the bits of those that run anew."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from harness import run_on_ranks
from splits import Layout
from test_megatron_engine import engine_of, responses_of
from tiny_models import DELTAS, write_model

MODELS = ("qwen2", "phi4_mini", "olmo3", *DELTAS[:1])
ONE, TP = Layout(name="one rank", world=1), Layout(name="TP2", world=2, tp=2)
CASES = [*((ONE, model) for model in MODELS), (TP, "qwen2")]
KINDS = ("sampled", "greedy", "truncated")
CALLS = 3  # the first ones run, or are recorded


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repeated")
    for name in MODELS:
        write_model(name, folder / name)
    answers = {}
    for world in (1, 2):
        out = folder / f"{world}.json"
        run_on_ranks(world, sample_again, folder, out)
        answers |= json.loads(out.read_text())
    return answers


def sample_again(folder: Path, out: Path) -> None:
    from policy_on_ranks import groups_at

    found: dict[str, Any] = {}
    for layout, model in CASES:
        if layout.world != dist.get_world_size():
            continue
        with groups_at(layout, None) as (parallel, groups):
            engine = engine_of(folder / model, parallel, groups)
            for kind in KINDS:
                found[f"{layout.name}: {model}: {kind}"] = {
                    "repeated": [counted(engine, groups, kind) for _ in range(CALLS)],
                    "anew": anew(engine, groups, kind),
                }
            with torch.no_grad():  # as an update does it
                for weight in engine._policy.named_parameters().values():
                    weight.mul_(1.1)
            for kind in KINDS:
                answers = counted(engine, groups, kind)[1], anew(engine, groups, kind)
                found[f"{layout.name}: {model}: {kind}"]["updated"] = answers
            with torch.no_grad():
                for chunk in engine._policy.chunks:
                    for weight in chunk.parameters():
                        weight.data = weight.data / 1.1  # in other memory
            told = found[f"{layout.name}: {model}: sampled"]
            told["moved"] = counted(engine, groups, "sampled"), anew(engine, groups, "sampled")
            with mock.patch("megatron_rl.rollout.megatron_engine.KEPT_BYTES", 0):
                engine._kept.clear()
                told["not kept"] = [counted(engine, groups, "sampled") for _ in range(2)]
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found))


def counted(engine: Any, groups: Any, kind: str) -> tuple[float, dict[str, Any]]:
    """The share of steps that were repeated, and the responses."""
    from megatron_rl.megatron.decoding import Decoder
    from megatron_rl.rollout.recorded import Recordings

    run, next_tokens, counts = Recordings.run, Decoder.next_tokens, {"asked": 0, "run": 0}

    def asked(self: Any, *given: Any) -> Any:
        counts["asked"] += 1
        return run(self, *given)

    def ran(self: Any, *given: Any) -> Any:
        counts["run"] += 1
        return next_tokens(self, *given)

    with (
        mock.patch.object(Recordings, "run", asked),
        mock.patch.object(Decoder, "next_tokens", ran),
    ):
        answers = responses_of(engine, groups, kind)
    return 1 - counts["run"] / counts["asked"], answers


def anew(engine: Any, groups: Any, kind: str) -> dict[str, Any]:
    """The responses of the same steps without any recording."""
    from megatron_rl.rollout.recorded import Recordings

    def run(self: Any, key: Any, function: Any, *inputs: Any) -> Any:
        return function(*inputs)

    with mock.patch.object(Recordings, "run", run):
        return responses_of(engine, groups, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("layout", "model"), CASES, ids=lambda one: getattr(one, "name", one))
def test_repeated_steps_have_the_same_bits(found, layout, model, kind):
    told = found[f"{layout.name}: {model}: {kind}"]
    shares = [share for share, _ in told["repeated"]]
    assert shares[-1] == 1
    assert shares == sorted(shares)
    for _, answers in told["repeated"]:
        assert answers == told["anew"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("layout", "model"), CASES, ids=lambda one: getattr(one, "name", one))
def test_an_update_is_seen(found, layout, model, kind):
    told = found[f"{layout.name}: {model}: {kind}"]
    repeated, anew = told["updated"]
    assert repeated == anew
    assert repeated != told["anew"]


@pytest.mark.parametrize(("layout", "model"), CASES, ids=lambda one: getattr(one, "name", one))
def test_weights_in_other_memory_are_recorded_anew(found, layout, model):
    told = found[f"{layout.name}: {model}: sampled"]
    (share, answers), anew = told["moved"]
    assert share < 1
    assert answers == anew
    assert answers != told["updated"][1]


@pytest.mark.parametrize(("layout", "model"), CASES, ids=lambda one: getattr(one, "name", one))
def test_a_large_cache_is_recorded_in_every_call(found, layout, model):
    told = found[f"{layout.name}: {model}: sampled"]
    shares = [share for share, _ in told["not kept"]]
    assert shares[0] == shares[1] < 1
    assert [answers for _, answers in told["not kept"]] == [told["moved"][1]] * 2
