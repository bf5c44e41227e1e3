"""The random states of a rank in a file that loads without running code."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_rl.platforms.base import Platform


def random_states(platform: Platform) -> dict[str, Any]:
    """States of the global generators as tensors, numbers and tuples."""
    states: dict[str, Any] = platform.rng_state()
    kind, keys, *rest = states["numpy"]
    return {**states, "numpy": (kind, keys.tolist(), *rest)}


def restore_random_states(path: Path, platform: Platform) -> None:
    """Set the generators to what the file has of random_states."""
    states = torch.load(path, weights_only=True)
    kind, keys, *rest = states["numpy"]
    platform.set_rng_state({**states, "numpy": (kind, np.array(keys, dtype=np.uint32), *rest)})
