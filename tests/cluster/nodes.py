"""Machines of one cluster, all on this machine.

Each has its own network interface and address, host name, process numbers and shared memory, as a
container has; the file system is shared, as a cluster's is.
"""

import os
import subprocess
from pathlib import Path
from typing import Any

NUM_NODES = 2
INTERFACE = "cluster0"
PREFIX = f"mrl-{os.getpid()}-"

# The first process of a node. When it is killed, the kernel kills all others of the node.
FIRST_PROCESS = """
hostname "$1" && mount --bind "$2" /etc/hosts && mount -t tmpfs tmpfs /dev/shm &&
    mount --bind /dev/null /etc/resolv.conf || exit 99 # a name server that nobody reaches is slow
shift 2
"$@" || exit $?
"""


class Node:
    """One machine: address, name, and what runs on it."""

    def __init__(self, number: int, hosts: Path) -> None:
        self.name, self.address = f"node{number}", f"10.77.0.{number + 1}"
        self.namespace = f"{PREFIX}{number}"
        self._hosts = hosts
        self._running: list[subprocess.Popen[bytes]] = []

    def start(self, command: list[str], log: Path, **options: Any) -> subprocess.Popen[bytes]:
        """Start a command; it ends with everything that it started."""
        with log.open("ab") as file:
            process = subprocess.Popen(
                [
                    *("ip", "netns", "exec", self.namespace),
                    *("unshare", "--uts", "--mount", "--pid", "--fork", "--mount-proc"),
                    *("--kill-child", "sh", "-c", FIRST_PROCESS, "first_process"),
                    *(self.name, str(self._hosts), *command),
                ],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                **options,
            )
        self._running.append(process)
        return process

    def kill(self) -> None:
        """End all processes at once, as a reset does; the network says that they are gone."""
        for process in self._running:
            process.kill()
            process.wait()
        self._running.clear()

    def bytes_sent(self) -> int:
        """What has left by the cable so far."""
        counter = f"/sys/class/net/{INTERFACE}/statistics/tx_bytes"
        return int(command("ip", "netns", "exec", self.namespace, "cat", counter))


class Nodes:
    """Two nodes and the cable between them."""

    def __init__(self, folder: Path) -> None:
        hosts = folder / "hosts"
        self.all = [Node(number, hosts) for number in range(NUM_NODES)]
        names = [f"{node.address} {node.name}" for node in self.all]
        hosts.write_text("\n".join(["127.0.0.1 localhost", "::1 localhost", *names, ""]))

    def connect(self) -> None:
        """Set up networks; whoever calls it closes them.

        Raises:
            PermissionError: it is not permitted here; the reason is in the message.
        """
        first, second = self.all
        for node in self.all:
            command("ip", "netns", "add", node.namespace)
        command(
            *("ip", "link", "add", INTERFACE, "netns", first.namespace, "type", "veth"),
            *("peer", "name", INTERFACE, "netns", second.namespace),
        )
        for node in self.all:
            inside = ("ip", "-n", node.namespace)
            command(*inside, "address", "add", f"{node.address}/24", "dev", INTERFACE)
            command(*inside, "link", "set", INTERFACE, "up")
            command(*inside, "link", "set", "lo", "up")

    def close(self) -> None:
        """End everything that runs, and take the networks away."""
        for node in self.all:
            node.kill()
            subprocess.run(["ip", "netns", "delete", node.namespace], capture_output=True)


def command(*words: str) -> str:
    """Run a command of the system; gives what it prints.

    Raises:
        PermissionError: it may not be run here, or fails; the reason is in the message.
    """
    try:
        done = subprocess.run(words, capture_output=True, text=True)
    except FileNotFoundError:
        raise PermissionError(f"there is no command {words[0]!r}") from None
    if done.returncode != 0:
        raise PermissionError(f"`{' '.join(words)}`: {done.stderr.strip()}")
    return done.stdout
