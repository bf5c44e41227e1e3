"""Programs that take turns: each waits at a gate before an iteration, and one goes at a time.

A gate is a folder. A rank that arrives behind iteration i touches `RANK.i`; the conductor touches
`go.i` to let all ranks of a program begin iteration i. A rank needs nothing but the standard
library, so that a program of another environment can stand at a gate, too.

Whoever is not at its turn is stopped (SIGSTOP) with all its processes, since threads that wait wake
up, those of gloo a hundred times a second for each group, and slow down whoever is.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

GATE = "MEGATRON_RL_BENCHMARK_GATES"
TICK_S = 0.002
SETTLE_S = 0.05  # for timers that ran out while a program was stopped


class Gate:
    """What a rank of a program passes; GATE names the folder."""

    def __init__(self) -> None:
        self._folder, self._rank = Path(os.environ[GATE]), os.environ.get("RANK", "0")
        self._done = 0

    def wait(self) -> None:
        """Arrive behind what is done, and wait for the next iteration's turn; or the end."""
        self.arrive()
        while not (self._folder / f"go.{self._done + 1}").exists():
            if (self._folder / "end").exists() or not self._folder.exists():
                os._exit(0)
            time.sleep(TICK_S)
        self._done += 1

    def arrive(self) -> None:
        status = Path("/proc/self/status").read_text().splitlines()
        peak = next(line.split()[1] for line in status if line.startswith("VmHWM"))
        (self._folder / f"{self._rank}.peak").write_text(peak)
        (self._folder / f"{self._rank}.{self._done}").touch()

    def note(self, phases: Mapping[str, float]) -> None:
        """Seconds of the iteration that is over, by phase; the first rank's are kept."""
        if self._rank == "0":
            with (self._folder / "phases.jsonl").open("a") as file:
                file.write(json.dumps(dict(phases)) + "\n")


class Program:
    """One of those that take turns, from the conductor's side."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        ranks: int,
        folder: Path,
        environment: Mapping[str, str],
        cwd: Path,
    ) -> None:
        """Start it, and wait until all its ranks stand at their first gate."""
        self.name, self.ranks = name, ranks
        self.seconds: list[float] = []
        self._gates, self._log = folder / f"{name}.gates", folder / f"{name}.log"
        self._gates.mkdir()
        began = time.monotonic()
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                cwd=cwd,
                env={**os.environ, **environment, GATE: str(self._gates)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._await(0)
        self.start_s = time.monotonic() - began
        self._signal(signal.SIGSTOP)

    def go(self) -> None:
        """Let it do one iteration, alone."""
        number = len(self.seconds) + 1
        self._signal(signal.SIGCONT)
        time.sleep(SETTLE_S)
        began = time.monotonic()
        (self._gates / f"go.{number}").touch()
        self._await(number)
        self.seconds.append(time.monotonic() - began)
        self._signal(signal.SIGSTOP)

    def end(self) -> None:
        """Tell its ranks to go, and end what is left of it."""
        (self._gates / "end").touch()
        self._signal(signal.SIGCONT)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGTERM)
            self._process.wait(60)  # torchrun ends its ranks within 30 s

    @property
    def peak_mib(self) -> int:
        """Of the rank that has held most."""
        peaks = [int((self._gates / f"{r}.peak").read_text()) for r in range(self.ranks)]
        return max(peaks) // 1024

    def phases(self) -> list[dict[str, float]]:
        """Of each iteration that it has noted."""
        path = self._gates / "phases.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    def _signal(self, number: signal.Signals) -> None:
        """To the process that was started and to all that it has started."""
        import psutil

        try:
            started = psutil.Process(self._process.pid)
            for process in (started, *started.children(recursive=True)):
                process.send_signal(number)
        except psutil.NoSuchProcess:
            pass  # what has ended is noticed where it is waited for

    def _await(self, number: int) -> None:
        while any(not (self._gates / f"{rank}.{number}").exists() for rank in range(self.ranks)):
            if self._process.poll() is not None:
                sys.exit(f"{self.name} ended:\n{self._log.read_text()[-4000:]}")
            time.sleep(TICK_S)
