"""The process of one check: `python -m megatron_rl.doctor.apart MODULE:FUNCTION ANSWER SECONDS`."""

import faulthandler
import importlib
import os
import sys
import traceback
from pathlib import Path

from megatron_rl.doctor.check import Result, as_json, failed, told


def main(function: str, answer: Path, seconds: float) -> None:
    """Write what the function finds to the file, and end without destructors, which may wait."""
    # Who started it ends it at the deadline; this is for where that one is gone.
    faulthandler.dump_traceback_later(2 * seconds + 1, exit=True)
    unfinished = answer.with_suffix(".part")
    unfinished.write_text(as_json(_look(function)))
    unfinished.replace(answer)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _look(function: str) -> Result:
    module, _, name = function.partition(":")
    try:
        result: Result = getattr(importlib.import_module(module), name)()
    except Exception as error:  # of any kind: it is what the check found
        traceback.print_exc()
        return failed(told(error))
    return result


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]))
