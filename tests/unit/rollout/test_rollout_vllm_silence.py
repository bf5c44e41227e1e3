"""Whole runs with an engine are in tests/e2e/test_silence.py."""

import os

import pytest

from megatron_rl.metrics.unsaid import unsaid
from megatron_rl.rollout.vllm_silence import SAID


def test_only_lines_with_the_part_are_kept_off_the_descriptor(capfd):
    with unsaid(SAID):
        os.write(2, b"[W utils.cpp:68] Warning: NUMA binding: Using MEMBIND policy\n")
        os.write(2, b"[W utils.cpp:70] Warning: numa_set_membind failed. errno: 1\n")
    os.write(2, b"after\n")
    assert capfd.readouterr().err == (
        "[W utils.cpp:70] Warning: numa_set_membind failed. errno: 1\nafter\n"
    )


def test_an_error_inside_loses_no_line(capfd):
    def fails():
        os.write(2, b"before\n")
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"), unsaid(SAID):
        fails()
    assert capfd.readouterr().err == "before\n"
