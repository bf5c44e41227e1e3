"""One iteration with real sampling and grading on data in every published layout."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from engine_models import write_model

pytestmark = pytest.mark.slow

LAYOUTS = Path(__file__).parents[1] / "data" / "layouts"
EXPECTED = yaml.safe_load((LAYOUTS / "expected.yaml").read_text(encoding="utf-8"))
CHAT = "{% for message in messages %}{{ message.content }}={% endfor %}"


def test_train_takes_every_layout_and_says_which_it_is(runs):
    model = runs.folder / "models" / "with_chat_template"
    write_model("qwen2", model)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": CHAT}))
    data = runs.folder / "layouts"
    shutil.copytree(LAYOUTS, data)
    (data / "expected.yaml").unlink()
    num_rows = sum(len(expected["answers"]) for expected in EXPECTED.values())
    paths = [str(data / name) for name in EXPECTED]
    said = runs.finish(
        "layouts",
        1,
        f"model.path={model}",
        f"prompts.path=[{', '.join(map(json.dumps, paths))}]",
        f"prompts.prompts_per_iteration={num_rows}",
        "prompts.system=",
        "prompts.instruction=",
        "optimizer.prompts_per_update=null",
        "algorithm.preset=reinforce",  # untrained, the model is always wrong, which teaches too
        "rollout.group_size=2",
        "rollout.max_response_tokens=4",
        "run.num_iterations=1",
        "checkpoint.save_every=0",
    )
    lines = [line for line in said.splitlines() if line.startswith("layout: ")]
    for name, expected in EXPECTED.items():
        layout = f"layout: {expected['layout']} ("
        assert any(line.startswith(layout) for line in lines), f"{name}: {lines}"
    (record,) = runs.records("layouts")
    assert record["iteration"] == 1
    assert f"prompts: {num_rows} of " in said
