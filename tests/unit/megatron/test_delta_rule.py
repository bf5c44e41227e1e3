"""Gated delta nets of packed rows, against the recurrence as it is defined."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rl.megatron import faults

ROWS = ("apart", "behind")  # sequences by themselves, and responses behind a prompt
KINDS = ("outputs", "gradients", "states", *(f"convolution of {kernel}" for kernel in (1, 2, 4)))


@pytest.fixture(scope="module")
def told():
    """In a fresh process: here Megatron-Core must not be imported before it is prepared."""
    script = Path(__file__).parent / "delta_alone.py"
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_are_the_recurrence_of_every_sequence_alone(told, kind, row):
    assert told[f"{kind}, {row}"] < 1e-13


@pytest.mark.parametrize("row", ROWS)
def test_in_float32_an_output_is_off_by_its_rounding(told, row):
    assert 1e-9 < told[f"float32, {row}"] < 1e-5


def test_states_that_die_at_once_or_never_are_those_of_single_tokens(told):
    assert told["dying and kept"] < 1e-13


def test_a_state_that_went_on_from_another_sequence_would_show(told):
    assert told["run on"] > 1e-2


def test_memory_is_planned_with_what_a_net_makes_anew(told):
    found = told.get("kept and counted", [])
    assert found or faults.is_present("packed_delta_nets")
    for kept, counted in found:
        assert 0.95 * kept < counted < 1.05 * kept, (kept, counted)
