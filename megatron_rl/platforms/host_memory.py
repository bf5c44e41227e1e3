"""Memory of this machine as far as this process may use it, and what the kernel killed for it.

A container's limit is that of its control group, which /proc/meminfo knows nothing of. Where a file
is not there, as on other systems than Linux, it says nothing.
"""

import contextlib
import ctypes
import resource
from collections import deque
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")
LOOKS = 20  # of OomKills that are compared with


def available_bytes() -> int | None:
    """Bytes that this process and its like can still take before the kernel has none left.

    The least of what the machine has and of what each limit above this process leaves. Cached files
    count as free, swap does not. None: nothing here says it.
    """
    found = [value for value in (_of_the_machine(), *_below_limits()) if value is not None]
    return max(0, min(found)) if found else None


def own_bytes() -> int:
    """Bytes of this process that are no cached file; 0 where nothing says it."""
    with contextlib.suppress(OSError, ValueError):
        _, resident, of_files = (ROOT / "proc/self/statm").read_text().split()[:3]
        return (int(resident) - int(of_files)) * resource.getpagesize()
    return 0


def give_back() -> None:
    """Give the kernel what the C library keeps of memory that was freed, where it can."""
    with contextlib.suppress(OSError, AttributeError):  # another system, another C library
        ctypes.CDLL(None).malloc_trim(0)


def _of_the_machine() -> int | None:
    kibibytes = _numbers(ROOT / "proc/meminfo").get("MemAvailable")
    return None if kibibytes is None else kibibytes * 1024


def _below_limits() -> Iterator[int]:
    for directory in _control_groups():
        for limit_file, usage_file, prefix in (
            ("memory.max", "memory.current", ""),  # version 2
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),  # version 1
        ):
            limit, usage = _number(directory / limit_file), _number(directory / usage_file)
            if limit is not None and usage is not None:
                counts = _numbers(directory / "memory.stat")
                cached = [counts.get(f"{prefix}{kind}_file", 0) for kind in ("inactive", "active")]
                yield limit - usage + sum(cached)


def _control_groups() -> Iterator[Path]:
    """The directories of this process's groups for memory, innermost first."""
    with contextlib.suppress(OSError):
        for line in (ROOT / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):
                top = ROOT / "sys/fs/cgroup" / controllers
                # In a container the path may be that of the host, of which only the top is here.
                own = top / path.strip("/")
                yield from (
                    own,
                    *(above for above in own.parents if top in (above, *above.parents)),
                )


class OomKills:
    """How often the kernel has killed a process for memory, now and some looks ago."""

    def __init__(self) -> None:
        self._before: deque[dict[str, int]] = deque([_oom_kills()], maxlen=LOOKS)

    def look(self) -> None:
        """Remember the counts of now; they are compared with for the next looks."""
        self._before.append(_oom_kills())

    def risen(self) -> str | None:
        """The first count that has risen since the oldest look kept, with its file."""
        oldest = self._before[0]
        for name, count in _oom_kills().items():
            if count > oldest.get(name, count):
                return f"oom_kill of {name}: {oldest[name]} -> {count}"
        return None


def _oom_kills() -> dict[str, int]:
    files = [
        directory / name
        for directory in _control_groups()
        for name in ("memory.events", "memory.oom_control")  # versions 2 and 1
    ]
    found = {str(path): _numbers(path).get("oom_kill") for path in (*files, ROOT / "proc/vmstat")}
    return {path: count for path, count in found.items() if count is not None}


def _number(path: Path) -> int | None:
    """The number that a file holds; None where there is none ("max"), or no file."""
    with contextlib.suppress(OSError, ValueError):
        return int(path.read_text())
    return None


def _numbers(path: Path) -> dict[str, int]:
    """The numbers of a file whose lines are a name and a number; a colon or a unit may follow."""
    found: dict[str, int] = {}
    with contextlib.suppress(OSError):
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError, IndexError):
                name, value = line.split()[:2]
                found[name.rstrip(":")] = int(value)
    return found
