import os
from pathlib import Path

import pytest


@pytest.fixture
def pids(monkeypatch, tmp_path):
    """Lets processes apart import apart_functions; a file to which they write who they are."""
    path = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))
    monkeypatch.setenv("DOCTOR_TEST_PIDS", str(tmp_path / "pids"))
    return tmp_path / "pids"
