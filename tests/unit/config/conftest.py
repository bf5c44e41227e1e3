import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from bad_input import GOOD_ROWS

from megatron_rl.config import load_config
from megatron_rl.errors import ConfigErrors
from megatron_rl.preflight import Inputs, read_inputs

QUICKSTART = Path(__file__).parents[3] / "examples" / "quickstart"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """The quickstart's: two heads of 32, two layers, 112 tokens, 256 positions."""
    spec = importlib.util.spec_from_file_location("make_model", QUICKSTART / "make_model.py")
    make_model = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_model)
    directory = tmp_path_factory.mktemp("model")
    make_model.make_model(directory, QUICKSTART / "data" / "train.jsonl")
    return directory


class Case:
    """A recipe that works, to be spoiled."""

    def __init__(self, folder: Path, model_dir: Path) -> None:
        self.folder = folder
        self.prompts = self.write_rows("prompts.jsonl", *GOOD_ROWS)
        self.settings: dict[str, Any] = {
            "run": {"output_dir": str(folder / "out"), "num_iterations": 2},
            "model": {"path": str(model_dir), "dtype": "float32"},
            "prompts": {
                "path": str(self.prompts),
                "prompts_per_iteration": 2,
                "max_prompt_tokens": 16,
            },
            "rollout": {"engine": "vllm", "max_response_tokens": 16},
            "algorithm": {"preset": "grpo"},
        }

    def write_rows(self, name: str, *rows: dict[str, Any] | str) -> Path:
        lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
        path = self.folder / name
        path.write_text("".join(f"{line}\n" for line in lines))
        return path

    def change(self, **sections: dict[str, Any]) -> None:
        for section, values in sections.items():
            self.settings.setdefault(section, {}).update(values)

    def write(self, text: str | None = None) -> Path:
        recipe = self.folder / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(self.settings) if text is None else text)
        return recipe

    def read(self, world_size: int = 1) -> Inputs:
        return read_inputs(load_config(self.write(), []), world_size)

    def config_problems(self, *overrides: str, text: str | None = None) -> list[str]:
        with pytest.raises(ConfigErrors) as caught:
            load_config(self.write(text), overrides)
        return caught.value.problems

    def input_problems(self, world_size: int = 1) -> list[str]:
        config = load_config(self.write(), [])
        with pytest.raises(ConfigErrors) as caught:
            read_inputs(config, world_size)
        return caught.value.problems


@pytest.fixture
def case(tmp_path, model_dir):
    return Case(tmp_path, model_dir)


@pytest.fixture
def model_copy(case, model_dir):
    """Copies the model directory, changes its config.json, and points the recipe to it."""

    def copy(without: str = "", **config: Any) -> Path:
        directory = case.folder / "model"
        shutil.copytree(model_dir, directory)
        settings = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(settings | config))
        for file in [file for file in directory.iterdir() if without and without in file.name]:
            file.unlink()
        case.change(model={"path": str(directory)})
        return directory

    return copy
