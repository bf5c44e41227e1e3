"""Python's garbage collector during a start, of which it would take a fifth and find nothing."""

import gc

SELDOM = (100_000, 10, 10)  # imports make half a million objects, and hardly any garbage
USUAL = gc.get_threshold()


def look_seldom() -> None:
    """Until look_as_usual()."""
    gc.set_threshold(*SELDOM)


def look_as_usual() -> None:
    """For the work itself, which may leave garbage that holds activations."""
    gc.set_threshold(*USUAL)
