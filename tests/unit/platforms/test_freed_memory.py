"""What becomes of large memory that was freed, by the pages that the kernel had to give for it."""

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc's malloc")

PROGRAM = """
import mmap, resource, sys
import torch
from megatron_rl.platforms import host_memory

BYTES = 64 << 20

def new_pages():  # of 4 KiB or more, for a tensor that is made, filled and freed
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(BYTES, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if "keeps" in sys.argv:
    host_memory.keep_what_is_freed()
new_pages()
again, held = new_pages(), host_memory.own_bytes()
host_memory.give_back()
print(again, held - host_memory.own_bytes())
"""


def pages_and_bytes(*words, **environment):
    """(pages that the second of two tensors of 64 MiB took, bytes that were given back at last)."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words],
        env=own | {"THP_MEM_ALLOC_ENABLE": "0"} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    pages, given_back = map(int, done.stdout.split())
    return pages, given_back


def test_it_serves_again_and_is_given_back_where_it_is_asked_for():
    pages, given_back = pages_and_bytes("keeps")
    assert pages < 100
    assert given_back > 60 << 20


def test_left_alone_the_library_maps_it_anew():
    pages, given_back = pages_and_bytes()
    assert pages > 16_000
    assert given_back < 4 << 20


def test_what_the_environment_says_of_malloc_holds():
    pages, _ = pages_and_bytes("keeps", MALLOC_ARENA_MAX="2")
    assert pages > 16_000
