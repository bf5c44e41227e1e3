"""The processes that run verifiers: a zygote that forks workers, and the workers.

    trainer rank --control socket--> zygote (no torch, one thread) --fork--> workers
          +----------- one socket pair per worker ------------------------------+

The zygote imports the verifier once, so that a worker killed for overrunning its deadline is back
in milliseconds. Started by pool.py as `python -m megatron_rl.reward.worker <fd> <trainer pid>`.
"""

import ctypes
import gc
import importlib
import inspect
import json
import math
import numbers
import operator
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

from megatron_rl.reward.channel import Message, encode, receive
from megatron_rl.reward.checks import MAX_REWARD

Function = Callable[[str, str], Any]

_PR_SET_PDEATHSIG = 1  # of prctl(2): the signal that this process gets when its parent dies
_MAX_REASON_CHARS = 500


def main() -> None:
    """Be the zygote: read the settings from the control socket, then fork and kill as told."""
    control = socket.socket(fileno=int(sys.argv[1]))
    trainer_pid = int(sys.argv[2])
    settings = json.loads(control.recv(1 << 16))
    if settings["function"] is None:
        try:
            # Imported here, since it takes a second and a user's function may not need sympy.
            from megatron_rl.reward import symbolic

            symbolic.warm_up()
        except ImportError as error:
            control.send(f"{error}".encode(errors="replace")[:_MAX_REASON_CHARS])
            return
        gc.freeze()  # the collector would write to pages that the workers share
    workers: set[int] = set()
    try:
        _serve(control, trainer_pid, settings, workers)
    finally:
        for pid in workers:
            _kill_group(pid)


def _serve(control: socket.socket, trainer_pid: int, settings: Message, workers: set[int]) -> None:
    """Fork a worker for each socket that arrives, kill workers by pid, until the trainer is gone.

    A message is "fork" with a worker's end of a socket pair, or the pid of a worker.
    """
    # The socket may outlive the trainer, in a process that it forked: look for our parent, too.
    control.settimeout(0.5)
    while os.getppid() == trainer_pid:
        _bury(workers)
        try:
            request, descriptors, _, _ = socket.recv_fds(control, 64, 1)
        except TimeoutError:
            continue
        if not request:
            return
        if descriptors:
            _fork_worker(control, descriptors[0], settings, workers)
        elif int(request) in workers:
            _kill_group(int(request))


def _bury(workers: set[int]) -> None:
    """Reap dead workers and kill what they left running."""
    for pid in list(workers):
        # WNOWAIT leaves the dead worker unreaped, so its pid and its group are still its own.
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            _kill_group(pid)
            os.waitpid(pid, 0)
            workers.discard(pid)


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        os.kill(pid, signal.SIGKILL)  # it has not made its group yet


def _fork_worker(
    control: socket.socket, descriptor: int, settings: Message, workers: set[int]
) -> None:
    zygote_pid = os.getpid()
    try:
        pid = os.fork()
    except OSError:
        os.close(descriptor)  # the trainer sees the end of the socket and asks for another
        return
    if pid:
        os.close(descriptor)
        workers.add(pid)
        return
    try:
        control.close()
        _run_worker(socket.socket(fileno=descriptor), settings, zygote_pid)
    finally:
        os._exit(1)  # never back into the zygote's loop


def _run_worker(connection: socket.socket, settings: Message, zygote_pid: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != zygote_pid:
        return  # the zygote died before prctl
    os.setsid()  # a process group of its own: whatever the worker starts is killed with it
    is_user_code = settings["function"] is not None
    _limit(settings["memory_bytes"], is_user_code=is_user_code)
    pid = os.getpid()
    connection.sendall(encode({"pid": pid}))
    path = settings["function"] or "megatron_rl.reward.symbolic:verify_pair"
    function, failure = _load(path)
    if function is None:
        connection.sendall(encode({"failed": str(failure)[:_MAX_REASON_CHARS]}))
        return
    connection.sendall(encode({"ready": True}))
    while (request := receive(connection)) is not None:
        reply = _execute(function, request["left"], request["right"])
        if os.getpid() != pid:
            return  # we are a child that the user's function forked and let return
        leaves_children = is_user_code and _has_children()
        # Jobs that are in the socket by now go to another worker.
        reply["is_last"] = leaves_children or bool(reply.pop("is_spent", False))
        connection.sendall(encode(reply))
        if leaves_children:
            _kill_group(pid)
        if reply["is_last"]:
            return


def _limit(memory_bytes: int, *, is_user_code: bool) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if not is_user_code:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))


def _has_children() -> bool:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def _load(path: str) -> tuple[Function | None, str | None]:
    """(function, None), or (None, why there is none)."""
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except BaseException as error:  # user code may raise anything, SystemExit too
        return None, f"importing {module_name} raises {_describe(error)}"
    try:
        function = operator.attrgetter(name)(module)
    except AttributeError:
        return None, f"module {module_name} has no attribute {name}"
    if not callable(function):
        return None, f"{name} of {module_name} is a {type(function).__name__}, not callable"
    try:
        inspect.signature(function).bind("response", "answer")
    except TypeError as error:
        return None, f"{name} cannot be called as {name}(response, answer): {error}"
    except ValueError:
        pass  # some functions written in C do not tell their arguments
    return function, None


def _execute(function: Function, left: str, right: str) -> Message:
    """The reply to one request: what the function returns, or what it raises."""
    started = time.process_time()
    try:
        reply = _describe_value(function(left, right))
    except MemoryError:
        # The heap is as large as it may get: a fresh worker serves the next sample.
        reply = {"verdict": "error", "reason": "MemoryError", "is_spent": True}
    except BaseException as error:  # user code may raise anything, SystemExit too
        reply = {"verdict": "error", "reason": _describe(error), "has_raised": True}
        # These errors do not depend on the data, so the check at start-up refuses the function.
        reply["is_misuse"] = isinstance(error, ImportError | NameError | SyntaxError)
    reply["cpu"] = time.process_time()  # since the worker's own start
    reply["seconds"] = reply["cpu"] - started
    return reply


def _describe_value(returned: object) -> Message:
    value = _plain(returned)
    if value is None:
        kind = type(returned)
        name = f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
        reason = f"returned a {name}: must be a bool or a float"
        return {"verdict": "error", "reason": reason[:_MAX_REASON_CHARS], "is_misuse": True}
    if isinstance(value, bool):
        return {"verdict": "correct" if value else "wrong"}
    try:
        reward = float(value)
    except OverflowError:
        reward = math.inf
    if not abs(reward) <= MAX_REWARD:  # nor is NaN
        reason = f"returned {reward:g}: must be finite and at most {MAX_REWARD:g} in size"
        return {"verdict": "error", "reason": reason, "is_misuse": True}
    return {"reward": reward}


def _plain(value: Any) -> bool | numbers.Real | None:
    """The bool or real number that a value is, else None.

    A scalar of NumPy, and a tensor or an array with no axis, is what it holds; they are told by
    their shape, since neither library is imported here. An array with an axis is no reward, however
    few entries it has: which of its entries were meant to count is not said anywhere.
    """
    if getattr(value, "shape", None) == () and callable(getattr(value, "item", None)):
        value = value.item()
    return value if isinstance(value, bool | numbers.Real) else None


def _describe(error: BaseException) -> str:
    try:
        text = str(error)
    except BaseException:  # a user's exception class may be broken as well
        text = "(its message cannot be printed)"
    return f"{type(error).__name__}: {text}"[:_MAX_REASON_CHARS]


if __name__ == "__main__":
    main()
