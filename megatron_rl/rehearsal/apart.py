"""The process of a rehearsal: `python -m megatron_rl.rehearsal.apart ASKED ANSWER`.

It has a process of its own, since it teaches torch a device and Megatron-Core to use it.
"""

import json
import subprocess
import sys
import tempfile
import traceback
from dataclasses import asdict
from pathlib import Path

from megatron_rl.config import RunConfig
from megatron_rl.errors import ConfigErrors, InputError, RunError
from megatron_rl.rehearsal.rank import Rehearsal, rehearse
from megatron_rl.weights.families.registry import read_model_config
from megatron_rl.weights.model_source import find_model


def rehearse_apart(config: RunConfig, world_size: int, rank: int) -> Rehearsal:
    """Rehearse this rank of a run in a process of its own.

    Raises:
        InputError: torch cannot rehearse here.
        RunError: what is rehearsed fails, as it would on a GPU; with the end of its traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder) / "asked.json", Path(folder) / "answer.json"
        settings = config.model_dump(mode="json")
        asked.write_text(json.dumps({"config": settings, "world_size": world_size, "rank": rank}))
        command = [sys.executable, "-m", "megatron_rl.rehearsal.apart", str(asked), str(answer)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        told = json.loads(answer.read_text()) if answer.exists() else {}
    if "refused" in told:
        raise InputError(told["refused"])
    if "result" not in told:
        text = told.get("failed") or done.stderr
        raise RunError(
            f"rehearsal of rank {rank} of {world_size}: it fails, and so might the run:\n"
            + "\n".join(text.strip().splitlines()[-12:])
        )
    return Rehearsal(**told["result"])


def _main(asked: Path, answer: Path) -> None:
    given = json.loads(asked.read_text())
    config = RunConfig.model_validate(given["config"])
    model_dir = find_model(config.model.path, "model.path").config_dir
    arch = read_model_config(model_dir, config.model.ignore_config_fields)
    told: dict[str, object]
    try:
        told = {"result": asdict(rehearse(config, arch, given["world_size"], given["rank"]))}
    except (ConfigErrors, InputError) as problem:
        told = {"refused": str(problem)}
    except Exception:  # of any kind: it is what the rehearsal found
        # An op that torch has not for a device is told with a page about all other devices.
        lines = traceback.format_exc().splitlines()
        told = {"failed": "\n".join(line[:300] for line in lines if "registered at" not in line)}
    answer.write_text(json.dumps(told))


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]))
