import fcntl
import os

import harness
import pytest
import torch

harness.PRELOAD.append("preload_megatron")


@pytest.fixture(scope="session")
def problems(tmp_path_factory):
    """Model -> file with its Problem; workers share the files and write half of them each."""
    from cases import write_problem
    from splits import LAYOUTS

    torch.set_num_threads(1)
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if worker else base) / "problems"
    folder.mkdir(exist_ok=True)
    models = sorted({layout.model for layout in LAYOUTS})
    for model in models[::-1] if worker[-1:] in set("13579") else models:
        with (folder / f"{model}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / f"{model}.pt").exists():
                write_problem(model, folder)
    return {model: folder / f"{model}.pt" for model in models}
