"""The store through which ranks find each other."""

import socket
import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from megatron_rl.parallel import groups
from megatron_rl.parallel.groups import store_of_this_attempt


def test_a_lone_process_opens_no_socket(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(groups, "TCPStore", lambda *_, **__: pytest.fail("it listens"))
    one, other = store_of_this_attempt("one"), store_of_this_attempt("other")
    one.set("key", "1")
    assert not other.check(["key"])
    assert store_of_this_attempt("one").get("key") == b"1"


def test_ranks_that_torchrun_started_again_do_not_see_the_former_ones(monkeypatch):
    server = dist.TCPStore("127.0.0.1", 0, is_master=True)
    _be_first_of_two(monkeypatch, server.port)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    for attempt in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        store = store_of_this_attempt("groups")
        assert not store.check(["address"])
        store.set("address", attempt)


def test_what_the_first_rank_wrote_outlives_its_client(monkeypatch):
    """Without torchrun's store the first rank serves, and others may read long after it wrote."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    _be_first_of_two(monkeypatch, port)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    reads: list[bytes] = []

    def read_late():
        other = dist.TCPStore("127.0.0.1", port, 2, timeout=timedelta(seconds=30))
        has_written.wait(30)
        reads.append(other.get("megatron_rl/attempt_0/layout/chosen"))

    has_written = threading.Event()
    other_rank = threading.Thread(target=read_late)
    other_rank.start()
    store_of_this_attempt("layout").set("chosen", "tp 2")
    has_written.set()
    other_rank.join(60)
    assert reads == [b"tp 2"]


def _be_first_of_two(monkeypatch, port):
    for name, value in {
        "WORLD_SIZE": "2",
        "RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }.items():
        monkeypatch.setenv(name, value)
