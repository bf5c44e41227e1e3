"""Files of /proc and /sys as kernels write them, in a folder of their own."""

import resource

import pytest

from megatron_rl.platforms import host_memory

MIB = 2**20


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Writes files of this machine; it has 8,192 MiB, of which 4,096 are available."""
    monkeypatch.setattr(host_memory, "ROOT", tmp_path)

    def write(path, text):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    write("proc/meminfo", "MemTotal:   8388608 kB\nMemFree: 1 kB\nMemAvailable:   4194304 kB\n")
    return write


def test_without_a_limit_it_is_what_the_machine_has(machine):
    assert host_memory.available_bytes() == 4096 * MIB
    machine("proc/self/cgroup", "0::/user.slice\n")
    machine("sys/fs/cgroup/user.slice/memory.max", "max\n")
    machine("sys/fs/cgroup/user.slice/memory.current", f"{1000 * MIB}\n")
    assert host_memory.available_bytes() == 4096 * MIB


def test_a_limit_counts_wherever_above_it_stands_and_files_can_be_given_back(machine):
    machine("proc/self/cgroup", "0::/pod/container\n")
    machine("sys/fs/cgroup/pod/memory.max", f"{2000 * MIB}\n")
    machine("sys/fs/cgroup/pod/memory.current", f"{1500 * MIB}\n")
    machine(
        "sys/fs/cgroup/pod/memory.stat",
        f"anon {1100 * MIB}\nfile {400 * MIB}\ninactive_file {300 * MIB}\n"
        f"active_file {100 * MIB}\n",
    )
    machine("sys/fs/cgroup/pod/container/memory.max", "max\n")
    machine("sys/fs/cgroup/pod/container/memory.current", f"{900 * MIB}\n")
    assert host_memory.available_bytes() == (2000 - 1500 + 400) * MIB


def test_version_1_in_a_container_that_sees_only_the_top(machine):
    machine("proc/self/cgroup", "12:cpu,cpuacct:/docker/a\n4:memory:/docker/a\n1:name=systemd:/\n")
    machine("sys/fs/cgroup/memory/memory.limit_in_bytes", f"{1024 * MIB}\n")
    machine("sys/fs/cgroup/memory/memory.usage_in_bytes", f"{600 * MIB}\n")
    machine("sys/fs/cgroup/memory/memory.stat", f"inactive_file 1\ntotal_inactive_file {MIB}\n")
    assert host_memory.available_bytes() == (1024 - 600 + 1) * MIB


def test_more_than_the_limit_is_nothing(machine):
    machine("proc/self/cgroup", "0::/\n")
    machine("sys/fs/cgroup/memory.max", f"{10 * MIB}\n")
    machine("sys/fs/cgroup/memory.current", f"{12 * MIB}\n")
    assert host_memory.available_bytes() == 0


def test_a_system_without_these_files_says_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(host_memory, "ROOT", tmp_path)
    assert host_memory.available_bytes() is None
    assert host_memory.own_bytes() == 0
    kills = host_memory.OomKills()
    kills.look()
    assert kills.risen() is None


def test_own_memory_is_that_which_no_file_holds(machine):
    pages = MIB // resource.getpagesize()
    machine("proc/self/statm", f"{90 * pages} {9 * pages} {7 * pages} 1 0 {50 * pages} 0\n")
    assert host_memory.own_bytes() == 2 * MIB


@pytest.mark.parametrize(
    ("groups", "file"),
    [
        ("0::/pod\n", "sys/fs/cgroup/pod/memory.events"),
        ("4:memory:/pod\n", "sys/fs/cgroup/memory/pod/memory.oom_control"),
        ("0::/\n", "proc/vmstat"),
    ],
)
def test_a_kill_for_memory_is_seen_in_whatever_counts_it(machine, groups, file):
    machine("proc/self/cgroup", groups)
    counts = machine(file, "low 0\noom 1\noom_kill 0\n")
    kills = host_memory.OomKills()
    assert kills.risen() is None
    machine(file, "low 0\noom 2\noom_kill 2\n")
    assert kills.risen() == f"oom_kill of {counts}: 0 -> 2"


def test_this_machine_has_some_memory():
    available = host_memory.available_bytes()
    assert available is None or MIB < available < 2**50
