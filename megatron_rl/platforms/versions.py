"""What is installed, as its files say, without importing it."""

import functools
import importlib.metadata


@functools.cache
def torch_version() -> tuple[int, ...]:
    """(major, minor): recipes are read before torch is, and a plan asks for each of its layouts."""
    return tuple(map(int, importlib.metadata.version("torch").split(".")[:2]))
