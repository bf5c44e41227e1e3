"""All checks in the order of the table, and the table."""

import importlib.util
import textwrap
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from megatron_rl.doctor import machine, versions
from megatron_rl.doctor.check import AGAIN, Check, Result
from megatron_rl.doctor.clock import REMEDY as SET_CLOCK
from megatron_rl.doctor.clock import check_clock

WIDTH = 98
OVER_LOOPBACK = f"GLOO_SOCKET_IFNAME=lo NCCL_P2P_DISABLE=1 {AGAIN}"


def all_checks(directory: Path, *, has_vllm: bool) -> list[Check]:
    """Every check. directory: where a run would write; has_vllm: it would sample with vLLM."""
    checks = [
        _check("Python", versions.check_python),
        _check("Megatron-Core", versions.check_megatron_core),
        _check("torch", versions.check_torch),
        _check("dependencies", versions.check_dependencies),
        _apart("GPUs", "device:check_gpus", "nvidia-smi"),
        _apart("all-reduce", "ranks:check_all_reduce", OVER_LOOPBACK, OVER_LOOPBACK),
        _apart("native ops", "native_ops:check_native_ops", versions.build_command()),
        _apart("vLLM", "engine:check_vllm", versions.install_command(versions.vllm_pin())),
        _optional("Transformer Engine", "transformer_engine", versions.check_transformer_engine),
        _optional("Apex", "apex", versions.check_apex),
        _check("shared memory", machine.check_shared_memory),
        _check("open files", machine.check_open_files),
        _check("TCP port", machine.check_port),
        _check("localhost", machine.check_localhost),
        _check("disk", partial(machine.check_disk, directory)),
        _check("memory", machine.check_memory),
        Check(name="clock", look=check_clock, remedy=SET_CLOCK),
    ]
    return [check for check in checks if has_vllm or check.name != "vLLM"]


def table(results: Sequence[Result]) -> Iterator[str]:
    """The lines of the table: each check, and under it what to do where something is wrong."""
    names = max(len(result.name) for result in results)
    outcomes = max(len(result.outcome) for result in results)
    indent = " " * (names + outcomes + 4)
    for result in results:
        head = f"{result.name:{names}}  {result.outcome:{outcomes}}  "
        yield from textwrap.wrap(
            head + result.found,
            WIDTH,
            subsequent_indent=indent,
            break_on_hyphens=False,
            break_long_words=False,
        )
        if result.remedy:  # never broken, so that it can be copied
            yield f"{indent}-> {result.remedy}"


def summary(results: Sequence[Result], seconds: float) -> str:
    """The last line."""
    failures, warnings = (
        sum(result.outcome == outcome for result in results) for outcome in ("failed", "warning")
    )
    counts = [f"{failures} failed" if failures else "nothing failed"]
    counts += [f"{warnings} warning{'s' if warnings > 1 else ''}"] if warnings else []
    return f"{len(results)} checks in {seconds:.0f} s: {', '.join(counts)}"


def _check(name: str, look: Callable[[], Result]) -> Check:
    return Check(name=name, look=look, remedy=AGAIN)


def _apart(name: str, function: str, remedy: str, remedy_of_delay: str = AGAIN) -> Check:
    look = f"megatron_rl.doctor.{function}"
    return Check(name=name, look=look, remedy=remedy, remedy_of_delay=remedy_of_delay)


def _optional(name: str, module: str, look: Callable[[], Result]) -> Check:
    """Apart where the module is there, since its import may do anything."""
    if importlib.util.find_spec(module) is None:
        return _check(name, look)
    remedy = f"{versions.uninstall_command(name)}  # then what stands in its place is used"
    return Check(name=name, look=f"{look.__module__}:{look.__qualname__}", remedy=remedy)
