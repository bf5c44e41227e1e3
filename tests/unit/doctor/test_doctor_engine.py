"""vLLM that is not there, does not start, or samples what cannot be; e2e has the one that works."""

import pytest
import torch

from megatron_rl.doctor import engine
from megatron_rl.doctor.check import Check, run_checks
from megatron_rl.doctor.versions import VLLM
from megatron_rl.rollout.engine import Response


@pytest.fixture
def samples(monkeypatch):
    """Sets the log-probs of a response, and the version."""

    def set_to(logprobs, version=VLLM):
        response = Response(
            key=(0, 0),
            tokens=torch.ones(len(logprobs), dtype=torch.int64),
            logprobs=torch.tensor(logprobs),
            finish_reason="length",
        )
        monkeypatch.setattr(engine, "_sample", lambda platform: [response])
        monkeypatch.setattr(engine, "version_of", lambda name: version)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: object())

    return set_to


@pytest.mark.parametrize(
    ("logprobs", "version", "outcome", "told"),
    [
        ([-1.0] * 8, VLLM, "ok", "sampled 8 tokens"),
        ([-1.0] * 8, f"{VLLM}+cpu", "ok", "sampled 8 tokens"),
        ([-1.0] * 8, "0.31.0", "warning", f"only {VLLM} was tested"),
        ([-1.0] * 5, VLLM, "failed", "gave 5 of 8 tokens"),
        ([-1.0] * 7 + [float("nan")], VLLM, "failed", "nan"),
        ([-1.0] * 7 + [0.5], VLLM, "failed", "has log-probs"),
    ],
)
def test_what_it_samples_is_looked_at(samples, logprobs, version, outcome, told):
    samples(logprobs, version)
    result = engine.check_vllm()
    assert result.outcome == outcome
    assert told in result.found
    assert bool(result.remedy) == (outcome != "ok")


def test_one_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(engine, "version_of", lambda name: None)
    result = engine.check_vllm()
    assert result.outcome == "warning"
    assert result.remedy.endswith(f"=={VLLM}")


def test_one_that_does_not_start(samples, monkeypatch):
    class Broken:
        def __init__(self, *_args, **_settings):
            raise RuntimeError("Engine core initialization failed")

    sample = engine._sample
    samples([-1.0] * 8)
    monkeypatch.setattr(engine, "_sample", sample)
    monkeypatch.setattr(engine, "init_distributed", lambda platform: None)
    monkeypatch.setattr(engine, "make_groups", lambda *_args, **_settings: None)
    monkeypatch.setattr(engine, "VllmEngine", Broken)
    (result,) = run_checks([Check(name="vLLM", look=engine.check_vllm, remedy="again")], 60)
    assert (result.outcome, result.remedy) == ("failed", "again")
    assert result.found == "RuntimeError: Engine core initialization failed"
