"""Rewards a user might write, well behaved and not; loaded by import path inside workers."""

import json
import os
import signal
import subprocess
import sys
import time

not_callable = 3


def same_length(response: str, answer: str) -> bool:
    return len(response) == len(answer)


def length_reward(response: str, answer: str) -> float:
    return len(response) / 10


def with_numpy(response: str, answer: str) -> object:
    import numpy

    if response == "mean":
        return numpy.mean([numpy.float32(number) for number in answer.split()])
    return numpy.int64(len(response)) == len(answer)


def torch_is_loaded(response: str, answer: str) -> bool:
    return "torch" in sys.modules


def environment(response: str, answer: str) -> bool:
    return answer in os.environ


def needs_json(response: str, answer: str) -> bool:
    return response in json.loads(answer)["accepted"]


def misbehave(response: str, answer: str) -> bool:
    """What the response asks for, else True."""
    if response in ("child", "child, then exit"):
        _leave_a_child(answer)
        return response == "child" or os._exit(1)
    return ACTIONS.get(response, lambda: True)()


def one_argument(response: str) -> bool:
    return True


def returns_text(response: str, answer: str) -> str:
    return "yes"


def misspelt(response: str, answer: str) -> bool:
    return undefined_name  # noqa: F821 - the fault under test


def _loop_in_c() -> bool:
    return sum(range(10**12)) > 0


def _fork_and_return() -> bool:
    os.fork()  # both processes return from the function
    return True


def _leave_a_child(record: str) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    with open(record, "w") as file:
        file.write(str(child.pid))


def _print() -> bool:
    print("x" * 100_000)  # noqa: T201 - the fault under test
    print("y" * 100_000, file=sys.stderr)  # noqa: T201
    os.write(1, b"\x00\x00\x00\x10garbage")
    return True


def _raise() -> bool:
    raise ValueError("broken \ud800 reward " + "x" * 5000)


def _allocate() -> bool:
    return bool(bytearray(8 << 30))


def _allocate_on() -> bool:
    kept = []
    while True:
        kept.append(bytearray(1 << 22))


def _ignore_signals() -> bool:
    for number in set(signal.valid_signals()) - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_IGN)
    return _loop_in_c()


def _garble() -> bool:
    """Write into every descriptor, the worker's own socket included."""
    for descriptor in range(3, 32):
        try:
            os.write(descriptor, b"\xff" * 64)
        except OSError:
            continue
    return True


def _burn(seconds: float) -> bool:
    start = time.process_time()
    while time.process_time() - start < seconds:
        pass
    return True


class _BadError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no message either")


def _raise_badly() -> bool:
    raise _BadError


ACTIONS = {
    "loop in c": _loop_in_c,
    "sleep": lambda: time.sleep(1000),
    "burn": lambda: _burn(0.4),
    "no": lambda: False,
    "nap": lambda: time.sleep(2.0) is None,
    "long nap": lambda: time.sleep(5.0) is None,
    "fork": _fork_and_return,
    "sys.exit": lambda: sys.exit(0),
    "os._exit": lambda: os._exit(0),
    "print": _print,
    "raise": _raise,
    "raise badly": _raise_badly,
    "allocate": _allocate,
    "allocate on and on": _allocate_on,
    "ignore signals": _ignore_signals,
    "recurse": lambda: misbehave("recurse", ""),
    "garble": _garble,
    "nan": lambda: float("nan"),
    "huge": lambda: 10**400,
    "too large for float32": lambda: -1e308,
    "none": lambda: None,
}
