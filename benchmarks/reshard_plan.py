"""How long the weight bridge takes to plan a reshard, by model and number of ranks.

    python benchmarks/reshard_plan.py

A plan needs shapes alone, so that neither weights nor ranks are there. Every rank plans once, at
the start of a run, what it sends and receives at every step.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "unit" / "weights"))

from hub_configs import QWEN2, QWEN3_MOE
from measure import describe_machine, load_average

from megatron_rl.parallel.layout import EngineLayout, Layout
from megatron_rl.parallel.stages import Split
from megatron_rl.plan import RANKS_PER_NODE
from megatron_rl.weights.arch import ModelArch
from megatron_rl.weights.families.registry import read_model_config
from megatron_rl.weights.sync import plan_sync

QWEN2_72B = QWEN2 | {
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
    "vocab_size": 152064,
}


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A model, how it is trained and how it is sampled."""

    name: str
    config: dict[str, Any]
    layout: dict[str, Any]
    engine_tp: int


PROBLEMS = (
    Problem(
        name="Qwen2.5-72B, TP 4 PP 4 to TP 4",
        config=QWEN2_72B,
        layout={"tp": 4, "pp": 4},
        engine_tp=4,
    ),
    Problem(
        name="Qwen2.5-72B, PP 4 of 19, 21, 21, 19",
        config=QWEN2_72B,
        layout={"tp": 4, "pp": 4, "split": Split(first=19, last=19)},
        engine_tp=4,
    ),
    Problem(
        name="Qwen3-30B-A3B, TP 2 EP 8 to TP 2",
        config=QWEN3_MOE,
        layout={"tp": 2, "pp": 1, "ep": 8},
        engine_tp=2,
    ),
)


def arch_of(config: dict[str, Any]) -> ModelArch:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        return read_model_config(Path(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64, 256, 1024])
    parser.add_argument("--samples", type=int, default=5)
    args = parser.parse_args()
    for name, value in describe_machine("cpu").items():
        print(f"{name}: {value}")
    print(
        f"\n{'':36s}{'ranks':>6s}{'median s':>10s}{'received':>10s}{'sent GB':>9s}{'needs':>7s}"
        f"{'in by node':>12s}"
    )
    for problem in PROBLEMS:
        arch = arch_of(problem.config)
        for world in args.ranks:
            layout = Layout(world_size=world, **problem.layout)
            engines = EngineLayout(world_size=world, tp=problem.engine_tp)
            times = []
            for _ in range(args.samples):
                start = time.perf_counter()
                plan = plan_sync(
                    arch,
                    layout,
                    engines,
                    rank=world - 1,
                    itemsize=2,
                    mib=256,
                    nodes=[rank // RANKS_PER_NODE for rank in range(world)],
                )
                times.append(time.perf_counter() - start)
            stats = plan.stats
            print(
                f"{problem.name:36s}{world:6d}{median(times):10.2f}{stats.received_max / 1e9:10.1f}"
                f"{stats.sent_max / 1e9:9.1f}{stats.need_max / 1e9:7.1f}"
                f"{stats.between_nodes / 1e9 / (world / RANKS_PER_NODE):12.1f}"
            )
    print(f"load after: {load_average()}")


if __name__ == "__main__":
    main()
