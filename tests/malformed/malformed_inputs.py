"""The list of malformed inputs as it lies in the YAML files beside this one, and good inputs."""

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
QUICKSTART = HERE.parents[1] / "examples" / "quickstart"
REPEATED = re.compile(r"<<(\d+) of (.*?)>>", re.DOTALL)
OUTCOMES = {"error", "ran", "skipped"}

GOOD_RECIPE = """\
run:
  output_dir: OUT
  num_iterations: 2
model:
  path: MODEL
  dtype: float32
prompts:
  path: DATA
  prompts_per_iteration: 2
  max_prompt_tokens: 16
rollout:
  max_response_tokens: 16
algorithm:
  preset: grpo
"""
GOOD_ROWS = '{"prompt": "1+1?", "answer": "2"}\n{"prompt": "3-1?", "answer": "2"}\n'


@dataclass(frozen=True)
class Case:
    """A malformed input and what has to come of it."""

    kind: str
    name: str
    given: dict[str, Any]  # what the kind's function in test_malformed.py reads

    @property
    def error(self) -> str | None:
        """A fragment of the one message; None where the input is taken."""
        return self.given.get("error")


def read_cases() -> list[Case]:
    """Every case of every file; a file's name is the kind of its cases."""
    cases = []
    for file in sorted(HERE.glob("*.yaml")):
        for given in yaml.safe_load(file.read_text(encoding="utf-8")):
            assert len(OUTCOMES & given.keys()) == 1, f"{file.name}: {given}: one of {OUTCOMES}"
            cases.append(Case(file.stem, str(given["name"]), _expanded(given)))
    return cases


def make_model(directory: Path) -> None:
    """The quickstart's model: two heads of 32, two layers, 112 tokens, 256 positions."""
    spec = importlib.util.spec_from_file_location("make_model", QUICKSTART / "make_model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.make_model(directory, QUICKSTART / "data" / "train.jsonl")


def _expanded(value: Any) -> Any:
    """The value with `<<3000 of [>>` written out."""
    if isinstance(value, dict):
        return {_expanded(key): _expanded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_expanded(each) for each in value]
    if isinstance(value, str):
        return REPEATED.sub(lambda found: found[2] * int(found[1]), value)
    return value
