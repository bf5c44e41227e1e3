"""Python's garbage collector during a start, of which it would take a fifth and find nothing."""

import gc

SELDOM = (100_000, 10, 10)  # imports make half a million objects, and hardly any garbage
USUAL = gc.get_threshold()


def spare() -> None:
    """Have it look seldom, until resume()."""
    gc.set_threshold(*SELDOM)


def resume() -> None:
    """Have it look as often as it usually does: what a step leaves may hold activations."""
    gc.set_threshold(*USUAL)
