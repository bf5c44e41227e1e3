"""Python's collector looks seldom during a start, and as usual after it."""

import gc
import subprocess
import sys

from megatron_rl import collector


def test_it_looks_as_usual_after_a_start():
    before = gc.get_threshold()
    try:
        collector.spare()
        assert gc.get_threshold() == collector.SELDOM
        collector.resume()
        assert gc.get_threshold() == collector.USUAL == before
    finally:
        gc.set_threshold(*before)


def test_a_command_that_does_not_train_leaves_it_alone():
    """Conversion, for example, may make much garbage, and is no start of anything."""
    code = "import gc, megatron_rl.commands.main; print(gc.get_threshold())"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == str(collector.USUAL)
