"""`megatron-rl doctor`: what works on this machine and what does not, each failure with a way out.

megatron-rl doctor                                  the machine; disk of the current directory
megatron-rl doctor RECIPE.yaml section.key=value    for a run of this recipe
torchrun ... -m megatron_rl doctor                  one table a machine; clocks are compared, too

It trains nothing and writes nothing but temporary files. A check that hangs is ended at the
deadline, and those beside it go on. Exit code 2 where a check failed; a warning is no failure.
"""

import argparse
import os
import time
from pathlib import Path

from megatron_rl.commands.terminal import positive
from megatron_rl.config import load_config
from megatron_rl.doctor.check import run_checks
from megatron_rl.doctor.report import all_checks, summary, table
from megatron_rl.errors import FAILED, ConfigErrors, tell_torchrun

DEADLINE_S = 55


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.add_argument("recipe", type=Path, nargs="?", metavar="RECIPE.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument(
        "--deadline",
        type=positive,
        default=DEADLINE_S,
        metavar="SECONDS",
        help=f"of every check, which all run at the same time; default {DEADLINE_S}",
    )


def run(options: argparse.Namespace) -> int:
    directory, has_vllm = Path.cwd(), True
    if options.recipe is not None:
        if "=" in options.recipe.name and not options.recipe.exists():
            raise ConfigErrors([f"override {str(options.recipe)!r}: name a recipe before it"])
        config = load_config(options.recipe, options.overrides)
        from megatron_rl.auto_engine import with_engine  # it needs torch
        from megatron_rl.platforms.base import detect

        config = with_engine(config, detect().device_type, print)
        directory, has_vllm = Path(config.run.output_dir), config.has_vllm
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return 0  # the first rank looks at the machine that they share
    start = time.monotonic()
    results = run_checks(all_checks(directory, has_vllm=has_vllm), options.deadline)
    last = summary(results, time.monotonic() - start)
    print(*table(results), "", last, sep="\n", flush=True)
    has_failed = any(result.outcome == "failed" for result in results)
    if has_failed:
        tell_torchrun(last)
    return FAILED if has_failed else 0
