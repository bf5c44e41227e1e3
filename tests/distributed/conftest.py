import harness
import pytest
import torch

harness.PRELOAD.append("preload_megatron")


@pytest.fixture(scope="session")
def problems(tmp_path_factory):
    """Model -> file with its Problem."""
    from cases import LAYOUTS, write_problem

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("problems")
    return {model: write_problem(model, folder) for model in {y.model for y in LAYOUTS}}
