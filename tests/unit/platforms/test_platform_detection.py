import pytest

from megatron_rl.errors import InputError
from megatron_rl.platforms.base import CPU, CUDA, detect


@pytest.mark.parametrize(("wanted", "platform"), [("cpu", CPU), ("cuda", CUDA)])
def test_a_device_named_by_hand_is_taken(monkeypatch, wanted, platform):
    monkeypatch.setenv("MEGATRON_RL_DEVICE", wanted)
    assert detect() is platform


@pytest.mark.parametrize(("has_device", "platform"), [(False, CPU), (True, CUDA)])
def test_without_a_name_torch_decides(monkeypatch, has_device, platform):
    monkeypatch.setenv("MEGATRON_RL_DEVICE", "")
    monkeypatch.setattr("torch.cuda.is_available", lambda: has_device)
    assert detect() is platform


def test_another_name_is_refused_with_those_there_are(monkeypatch):
    monkeypatch.setenv("MEGATRON_RL_DEVICE", "tpu")
    with pytest.raises(InputError, match="MEGATRON_RL_DEVICE='tpu': must be cpu or cuda"):
        detect()
