import sys
from pathlib import Path

# The harness of real ranks, and what ranks preload.
sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))

import harness

if "preload_megatron" not in harness.PRELOAD:
    harness.PRELOAD.append("preload_megatron")
