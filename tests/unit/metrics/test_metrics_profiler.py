"""Traces of iterations, in a world of one rank; and what is not traced."""

import gzip
import json
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from megatron_rl.metrics.meter import Meter
from megatron_rl.metrics.profiler import Profiler
from megatron_rl.platforms.base import CPU, CUDA


@pytest.fixture(scope="module")
def groups():
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield SimpleNamespace(platform=CPU, rank=0, world=dist.group.WORLD)
    dist.destroy_process_group()


def names_in(file):
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    return {event.get("name") for event in events}


def one_iteration(meter):
    with meter.phase("rollout"):
        torch.ones(3).cumsum(0)
    with meter.phase("update"):
        torch.ones(3).sigmoid()


def test_the_iterations_that_are_named_are_traced_with_their_phases(groups, tmp_path, capfd):
    said = []
    profiler = Profiler([3, 1], tmp_path, groups, said.append)
    meter = Meter(groups, profiler=profiler)
    for number in (1, 2, 3):
        with profiler.iteration(number):
            one_iteration(meter)
    traces = sorted((tmp_path / "profile").iterdir())
    assert [file.name for file in traces] == [
        "iteration_000001_rank_000.json.gz",
        "iteration_000003_rank_000.json.gz",
    ]
    for file, number in zip(traces, (1, 3), strict=True):
        found = names_in(file)
        assert {f"iteration {number}", "rollout", "update", "aten::cumsum"} <= found
        assert "iteration 2" not in found
    assert said == []
    assert capfd.readouterr().err == ""  # kineto tells of each


def test_without_iterations_nothing_is_marked_written_or_said(groups, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.profiler, "profile", None)
    monkeypatch.setattr(torch.profiler, "record_function", None)
    profiler = Profiler([], tmp_path, groups, pytest.fail)
    meter = Meter(groups, profiler=profiler)
    with profiler.iteration(1):
        one_iteration(meter)
    assert list(tmp_path.iterdir()) == []
    assert [*profiler.start_lines(), *profiler.resumed_lines(5)] == []


def test_an_iteration_that_is_not_whole_leaves_no_trace(groups, tmp_path):
    profiler = Profiler([1, 2], tmp_path, groups, pytest.fail)
    with profiler.iteration(1):
        profiler.drop()
    with pytest.raises(ZeroDivisionError), profiler.iteration(2):
        _ = 1 / 0
    with torch.profiler.profile() as after:  # neither of them still runs
        profiler.phase("rollout").__enter__()
    assert list(tmp_path.iterdir()) == []
    assert "rollout" not in {event.name for event in after.events()}


def test_a_trace_that_cannot_be_written_is_told_and_ends_nothing(groups, tmp_path):
    (tmp_path / "profile").write_text("somebody's file")
    said = []
    with Profiler([1], tmp_path, groups, said.append).iteration(1):
        pass
    (line,) = said
    assert line.startswith("profile: no trace of iteration 1 on rank 0: [Errno 17]")


def test_the_start_says_what_will_be_traced_and_a_resume_what_will_not(groups, tmp_path):
    profiler = Profiler((7, 2, 5), tmp_path, groups, pytest.fail)
    assert list(profiler.start_lines()) == [
        f"profile: iterations 2, 5 and 7 will be traced, each rank to a file in "
        f"{tmp_path / 'profile'}"
    ]
    assert list(profiler.resumed_lines(1)) == []
    assert list(profiler.resumed_lines(2)) == [
        "profile: iteration 2 will not be traced, since the run goes on after iteration 2"
    ]
    assert list(profiler.resumed_lines(6)) == [
        "profile: iterations 2 and 5 will not be traced, since the run goes on after iteration 6"
    ]


# -- the memory of a GPU, by what torch is called with --------------------------------------------


@pytest.fixture
def memory(monkeypatch):
    """The calls of torch's recorder; a dump writes a word."""
    calls = []

    def record(enabled="all", **settings):
        calls.append("off" if enabled is None else "on")

    def dump(file):
        calls.append("dump")
        with open(file, "w") as out:
            out.write("history")

    monkeypatch.setattr("torch.cuda.memory._record_memory_history", record)
    monkeypatch.setattr("torch.cuda.memory._dump_snapshot", dump)
    return calls


def test_where_a_gpu_runs_out_of_memory_its_history_is_written(memory, tmp_path):
    file = tmp_path / "profile" / "memory.pickle"
    with pytest.raises(torch.OutOfMemoryError) as raised, CUDA.memory_history(file):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert memory == ["on", "dump", "off"]
    assert file.read_text() == "history"
    assert raised.value.__notes__ == [f"the allocations before it: {file}"]


@pytest.mark.parametrize("error", [None, RuntimeError("another")])
def test_another_end_writes_no_history(memory, tmp_path, error):
    try:
        with CUDA.memory_history(tmp_path / "memory.pickle"):
            if error:
                raise error
    except RuntimeError:
        pass
    assert memory == ["on", "off"]


def test_a_history_that_cannot_be_written_hides_no_error(memory, tmp_path):
    (tmp_path / "profile").write_text("somebody's file")
    file = tmp_path / "profile" / "memory.pickle"
    with pytest.raises(torch.OutOfMemoryError), CUDA.memory_history(file):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert memory == ["on", "off"]


def test_a_cpu_has_no_history(memory, tmp_path):
    with pytest.raises(torch.OutOfMemoryError), CPU.memory_history(tmp_path / "memory.pickle"):
        raise torch.OutOfMemoryError("there")
    assert memory == []
