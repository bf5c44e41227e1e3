"""The table of Megatron-Core's faults is true of what several ranks show."""

import json

import pytest
from faults_on_ranks import _run_probes
from harness import run_on_ranks

from megatron_rl.megatron import faults
from megatron_rl.megatron.faults import FAULTS, ON_RANKS

NAMES = tuple(fault.name for fault in FAULTS.values() if fault.probes == ON_RANKS)


@pytest.fixture(scope="module")
def shown(problems, tmp_path_factory):
    """Fault -> whether stock code shows it."""
    out = tmp_path_factory.mktemp("faults") / "shown.json"
    run_on_ranks(2, _run_probes, NAMES, problems, out)
    return json.loads(out.read_text())


@pytest.mark.parametrize("name", NAMES)
def test_a_row_names_the_installed_version_just_where_stock_code_shows_the_fault(shown, name):
    assert shown[name] == faults.is_present(name)
