import pytest
from conversion_models import to_megatron, write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "hf"
    write_model("qwen2", folder)
    return folder


@pytest.fixture(scope="module")
def converted(model, tmp_path_factory):
    return to_megatron(model, tmp_path_factory.mktemp("converted"))
