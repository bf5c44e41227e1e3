"""Just the messages of the list are kept off the terminal."""

import logging
import warnings

import pytest

from megatron_rl.megatron.silence import LOGGED, WARNINGS, silence

DDP = "megatron.core.distributed.distributed_data_parallel"
NOISE = "DistributedDataParallel: full_param_layout not provided with use_distributed_optimizer"


@pytest.fixture
def silent():
    """The filters of one call, taken away again."""
    before = {name: list(logging.getLogger(name).filters) for name in LOGGED}
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        silence("cuda")
        yield warned
    for name, filters in before.items():
        logging.getLogger(name).filters[:] = filters


def warn(message, category, module):
    warnings.warn_explicit(message, category, "a file", 1, module=module)


@pytest.mark.parametrize(
    ("message", "category", "module", "is_heard"),
    [
        ("Apex is not installed. Falling back", UserWarning, "megatron.core.models.backends", 0),
        ("Transformer Engine and Apex are not installed.", UserWarning, "megatron.core.a", 0),
        ("`torch.distributed.x` is deprecated", FutureWarning, "torch.distributed.c10d_logger", 0),
        ("Apex is not installed. Falling back", UserWarning, "somebody", 1),
        ("the gradient is wrong", UserWarning, "megatron.core.optimizer.optimizer", 1),
        ("megatron-core 0.18.0 is not tested", UserWarning, "megatron_rl.megatron.faults", 1),
        ("`torch.distributed.x` is deprecated", UserWarning, "torch.distributed.a", 1),
    ],
)
def test_a_warning_is_silenced_by_words_category_and_module(
    silent, message, category, module, is_heard
):
    warn(message, category, module)
    assert len(silent) == is_heard


@pytest.mark.parametrize(("device_type", "is_heard"), [("cpu", 0), ("cuda", 1)])
def test_advice_about_a_gpu_is_heard_where_there_is_one(silent, device_type, is_heard):
    silence(device_type)
    advice = "When using sequence parallelism it is recommended to set the environment variable"
    warn(advice, UserWarning, "megatron.core.tensor_parallel.layers")
    assert len(silent) == is_heard


@pytest.mark.parametrize(
    ("name", "level", "message", "is_heard"),
    [
        (DDP, logging.WARNING, NOISE, False),
        (DDP, logging.ERROR, NOISE, True),
        (DDP, logging.WARNING, "a bucket is lost", True),
        ("megatron.core.elsewhere", logging.WARNING, NOISE, True),
    ],
)
def test_a_record_is_silenced_by_words_and_logger_and_never_an_error(
    silent, caplog, name, level, message, is_heard
):
    logging.getLogger(name).log(level, message)
    assert (message in caplog.messages) == is_heard


def test_every_message_has_words_of_its_own():
    assert all(start for _, _, start in WARNINGS)
    assert all(LOGGED.values())
