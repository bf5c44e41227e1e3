import importlib.util
import json
from pathlib import Path

import pytest

QUICKSTART = Path(__file__).parents[3] / "examples" / "quickstart"


@pytest.fixture(scope="session")
def quickstart_rows():
    return [
        json.loads(line)
        for name in ("train", "heldout")
        for line in (QUICKSTART / "data" / f"{name}.jsonl").read_text().splitlines()
    ]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """The quickstart's model directory: tokenizer.model beside the Hugging Face files."""
    spec = importlib.util.spec_from_file_location("make_model", QUICKSTART / "make_model.py")
    make_model = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_model)
    directory = tmp_path_factory.mktemp("model")
    make_model.make_model(directory, QUICKSTART / "data" / "train.jsonl")
    return directory


@pytest.fixture
def write_jsonl(tmp_path):
    """Writes records, or lines given as text or bytes, and returns the path."""

    def write(*lines, name="data.jsonl"):
        raw = [
            line if isinstance(line, bytes) else line.encode()
            for line in (x if isinstance(x, str | bytes) else json.dumps(x) for x in lines)
        ]
        path = tmp_path / name
        path.write_bytes(b"".join(line + b"\n" for line in raw))
        return path

    return write
