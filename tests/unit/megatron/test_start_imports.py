"""What a start on a CPU does without: packages that take seconds to import, which nothing uses."""

import subprocess
import sys

SLOW = (
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "wandb",
    "vllm",
    "transformers",
    "matplotlib",
)
CODE = f"""
import sys
from megatron_rl.platforms.base import CPU
import megatron_rl.session
from megatron_rl.megatron.enter import enter
enter(CPU)
import megatron_rl.build, megatron_rl.loop
found = [name for name in {SLOW} if name in sys.modules]
assert not found, found
from megatron.core import timers
from megatron.core.transformer.moe import router
assert timers.wandb is None
assert "TopKRouter" in vars(router)
import wandb  # it is hidden no longer
"""


def test_parts_that_a_run_on_a_cpu_does_not_use_are_not_imported():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
