"""A machine that lacks something: shared memory, files, a port, its own name, disk, memory."""

import os
import resource
import socket
from collections import namedtuple

import pytest

from megatron_rl.doctor import machine

GIB = 1 << 30
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def free(monkeypatch):
    """Sets the bytes that every file system has free."""

    def set_to(nbytes):
        monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(nbytes, 0, nbytes))

    return set_to


@pytest.mark.parametrize(("nbytes", "outcome"), [(2 * GIB, "ok"), (64 << 20, "warning")])
def test_shared_memory_may_be_too_little(free, tmp_path, nbytes, outcome):
    free(nbytes)
    assert machine.check_shared_memory(tmp_path).outcome == outcome


def test_shared_memory_may_be_missing_or_closed(tmp_path, monkeypatch):
    result = machine.check_shared_memory(tmp_path / "none")
    assert (result.outcome, result.found) == (
        "failed",
        f"{tmp_path / 'none'}: No such file or directory",
    )
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert machine.check_shared_memory(tmp_path).outcome == "failed"


@pytest.mark.parametrize(
    ("limits", "outcome", "remedy"),
    [
        ((4096, 4096), "ok", ""),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), "ok", ""),
        ((1024, 1048576), "warning", "ulimit -n 65536"),
        ((1024, 8192), "warning", "ulimit -n 8192"),
        ((1024, 1024), "warning", "sudo prlimit --pid $$ --nofile=65536"),
        ((64, resource.RLIM_INFINITY), "failed", "ulimit -n 65536"),
    ],
)
def test_open_files(limits, outcome, remedy):
    result = machine.check_open_files(limits)
    assert (result.outcome, result.remedy) == (outcome, remedy)


def test_a_port_is_bound_and_connected_to():
    assert machine.check_port().outcome == "ok"


def test_a_port_that_cannot_be_bound():
    result = machine.check_port("192.0.2.1")  # of documents (RFC 5737), so nobody's
    assert result.outcome == "failed"
    assert result.found.startswith("192.0.2.1 takes no connection: ")
    assert result.remedy


@pytest.mark.parametrize(
    ("address", "outcome"), [("127.0.0.1", "ok"), ("::1", "ok"), ("203.0.113.7", "failed")]
)
def test_localhost_is_this_machine(monkeypatch, address, outcome):
    family = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
    monkeypatch.setattr("socket.getaddrinfo", lambda *_: [(*family, (address, 0))])
    assert machine.check_localhost().outcome == outcome


def test_localhost_without_an_address(monkeypatch):
    def refuse(*_):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    assert machine.check_localhost().outcome == "failed"


@pytest.mark.parametrize(
    ("nbytes", "outcome"), [(0, "failed"), (5 * GIB, "warning"), (50 * GIB, "ok")]
)
def test_the_disk_of_a_run_that_has_no_directory_yet(free, tmp_path, nbytes, outcome):
    free(nbytes)
    result = machine.check_disk(tmp_path / "runs" / "a")
    assert result.outcome == outcome
    assert f" free in {tmp_path}" in result.found


def test_a_disk_that_cannot_be_written_to(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    assert machine.check_disk(tmp_path / "file").outcome == "failed"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert machine.check_disk(tmp_path).outcome == "failed"


@pytest.mark.parametrize(
    ("nbytes", "outcome"),
    [(100 << 20, "failed"), (2 * GIB, "warning"), (64 * GIB, "ok"), (None, "ok")],
)
def test_memory(nbytes, outcome):
    assert machine.check_memory(lambda: nbytes).outcome == outcome
