import fcntl
import os
from pathlib import Path

import harness
import pytest
import torch

harness.PRELOAD.append("preload_megatron")


def pytest_collection_modifyitems(config, items):
    """The layouts of a part; tests that have none stay as they are."""
    if not (part := config.getoption("part")):
        return
    from splits import is_in_part

    part, of = map(int, part.split("/"))
    measured = [i for i in items if {"extent", "name"} <= _params(i).keys()]
    others = [i for i in measured if not is_in_part(i.callspec.params["name"], part, of)]
    config.hook.pytest_deselected(items=others)
    items[:] = [i for i in items if i not in others]


def _params(item):
    return item.callspec.params if hasattr(item, "callspec") else {}


@pytest.fixture(scope="session")
def problems(request, tmp_path_factory):
    """Model -> file with its Problem; workers share the files and write half of them each.

    Parts of a published table share them too.
    """
    from cases import write_problem
    from splits import LAYOUTS

    torch.set_num_threads(1)
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    base = tmp_path_factory.getbasetemp()
    kept = request.config.getoption("measured")
    folder = (Path(kept) if kept else base.parent if worker else base) / "problems"
    folder.mkdir(exist_ok=True, parents=True)
    models = sorted({layout.model for layout in LAYOUTS})
    for model in models[::-1] if worker[-1:] in set("13579") else models:
        with (folder / f"{model}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / f"{model}.pt").exists():
                write_problem(model, folder)
    return {model: folder / f"{model}.pt" for model in models}
