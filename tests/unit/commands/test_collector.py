"""Python's collector looks seldom during a start, and as usual after it."""

import gc

from megatron_rl import collector


def test_it_looks_as_usual_after_a_start():
    before = gc.get_threshold()
    try:
        collector.look_seldom()
        assert gc.get_threshold() == collector.SELDOM
        collector.look_as_usual()
        assert gc.get_threshold() == collector.USUAL == before
    finally:
        gc.set_threshold(*before)
