import sys
from pathlib import Path

# The harness of real ranks, and what ranks preload.
sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))

import harness
import pytest
from engine_models import write_model
from tiny_models import DELTAS, OF_EXPERTS
from training_runs import TP2, Runs

# With vLLM as well: one server for all files costs less than one for those that have an engine.
for module in ("preload_megatron", "preload_vllm"):
    if module not in harness.PRELOAD:
        harness.PRELOAD.append(module)


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    small = ("qwen2", "qwen2_tied", "glm4_moe", "deepseek_v3", "phi4_mini", "olmo2", "olmo3")
    for name in (*small, *DELTAS[:1], *OF_EXPERTS):
        write_model(name, folder / "models" / name)
    return Runs(folder)


@pytest.fixture(scope="session")
def straight_tp2(runs):
    return runs.straight("TP2", 2, *TP2)
