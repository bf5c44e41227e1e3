"""Native ops with a wrong result, one at a time, and an extension that is not there."""

import pytest
import torch

from megatron_rl.doctor.native_ops import check_native_ops
from megatron_rl.ops import backend, native

OPS = torch.ops.megatron_rl
needs_ops = pytest.mark.skipif(not native.BUILT, reason=f"no native ops: {native.FAULT}")


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setenv("MEGATRON_RL_DEVICE", "cpu")


@needs_ops
def test_the_ops_that_are_here_are_right():
    result = check_native_ops()
    assert (result.outcome, result.found) == (
        "ok",
        "on cpu as by the definitions, in float32 and bfloat16",
    )
    assert backend.chosen() == "auto"  # as before


def scaled_gradient(logits, *rest):
    found = ONEPASS(logits, *rest)
    logits.mul_(1.01)
    return found


def other_logprobs(logits, *rest):
    logprobs, *others = ONEPASS(logits, *rest)
    return (logprobs + 1e-3, *others)


ONEPASS = OPS.policy_loss_onepass_ if native.BUILT else None
ROW_STATS = OPS.row_stats if native.BUILT else None
DLOGITS = OPS.dlogits if native.BUILT else None
GROUP_STATS = OPS.group_stats if native.BUILT else None


@needs_ops
@pytest.mark.parametrize(
    ("op", "wrong", "named"),
    [
        ("policy_loss_onepass_", scaled_gradient, "gradient of loss in "),
        ("policy_loss_onepass_", other_logprobs, "loss in "),
        ("row_stats", lambda *args: ROW_STATS(*args) + 1e-3, "log-probs in "),
        ("dlogits", lambda *args: DLOGITS(*args) * 1.01, "gradient of log-probs in "),
    ],
)
def test_a_wrong_op_is_named_with_its_dtypes(monkeypatch, op, wrong, named):
    monkeypatch.setattr(OPS, op, wrong)
    result = check_native_ops()
    assert result.outcome == "failed"
    faults = result.found.removeprefix("on cpu, other results than by the definition: ")
    assert {f"{named}float32", f"{named}bfloat16"} <= set(faults.split(", "))
    assert "ops.backend=reference" in result.remedy


@needs_ops
def test_wrong_statistics_of_groups_are_named(monkeypatch):
    def wrong(*args):
        *others, advantages = GROUP_STATS(*args)
        return (*others, advantages + 1e-6)

    monkeypatch.setattr(OPS, "group_stats", wrong)
    result = check_native_ops()
    assert result.outcome == "failed"
    assert result.found.endswith("definition: statistics of groups")


def test_without_the_extension_the_definitions_run(monkeypatch):
    monkeypatch.setattr(native, "has", lambda op, device: False)
    monkeypatch.setattr(native, "FAULT", "it was not compiled")
    result = check_native_ops()
    assert (result.outcome, result.found) == (
        "not there",
        "PyTorch definitions are used instead: it was not compiled",
    )
    assert result.remedy.endswith(" setup.py build_ext --inplace --force")
