import os
import sys
from pathlib import Path

import pytest

for folder in ("distributed", "e2e"):  # tiny models, and what a small run looks like
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.cluster)


@pytest.fixture(scope="session", autouse=True)
def root():
    if os.geteuid() != 0:
        pytest.skip("only root may set up networks, machines and schedulers")
