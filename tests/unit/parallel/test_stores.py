"""The store through which ranks find each other."""

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
    for name, value in {
        "WORLD_SIZE": "2",
        "RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(server.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }.items():
        monkeypatch.setenv(name, value)
    for attempt in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        store = store_of_this_attempt("groups")
        assert not store.check(["address"])
        store.set("address", attempt)
