"""A Slurm of Debian's packages: one controller and one daemon a node (nodes.py)."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from nodes import Node, Nodes

NEEDED = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "munged")
SETTINGS = """
ClusterName=cluster
SlurmctldHost={controller}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n.spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
GresTypes=gpu
NodeName={names} CPUs=2 RealMemory=4000 Gres=gpu:1
PartitionName=all Nodes={names} Default=YES MaxTime=INFINITE State=UP
"""
# A device that is everywhere: a "GPU" is no more than a number of ranks.
GPUS = "AutoDetect=off\nName=gpu File=/dev/null\n"
# The daemons want to see control groups, though nothing here asks for one.
CONTROL_GROUPS = {
    True: "CgroupPlugin=cgroup/v1\nCgroupMountpoint={folder}/cgroup\n",
    False: "CgroupPlugin=cgroup/v2\nIgnoreSystemd=yes\n",
}


class Slurm:
    """The daemons, and commands as a user of the cluster calls them."""

    def __init__(self, nodes: Nodes, folder: Path) -> None:
        self.nodes, self.folder = nodes.all, folder
        self._munged: subprocess.Popen[bytes] | None = None
        self._environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}

    @staticmethod
    def missing() -> list[str]:
        return [name for name in NEEDED if shutil.which(name) is None]

    def start(self) -> None:
        names = ",".join(node.name for node in self.nodes)
        (self.folder / "state").mkdir()
        (self.folder / "slurm.conf").write_text(
            SETTINGS.format(controller=self.nodes[0].name, folder=self.folder, names=names)
        )
        (self.folder / "gres.conf").write_text(GPUS)
        (self.folder / "cgroup").mkdir()
        is_old = len(Path("/proc/self/cgroup").read_text().splitlines()) > 1
        groups = CONTROL_GROUPS[is_old].format(folder=self.folder)
        (self.folder / "cgroup.conf").write_text(groups)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        self._munged = subprocess.Popen(
            [
                *("munged", "--foreground", "--force", f"--key-file={key}"),
                *(f"--{name}-file={self.folder}/munge.{name}" for name in ("pid", "log", "seed")),
                f"--socket={self.folder}/munge.socket",
            ],
            stdout=subprocess.DEVNULL,
            stderr=(self.folder / "munged.log").open("ab"),
        )
        wait_until((self.folder / "munge.socket").exists, 20, "munged does not start")
        self._daemon(self.nodes[0], "slurmctld", "-D")
        for node in self.nodes:
            self._daemon(node, "slurmd", "-D", "-N", node.name)
        wait_until(lambda: self.node_states() == {"idle"}, 120, "nodes do not come up")

    def _daemon(self, node: Node, name: str, *options: str) -> None:
        log = self.folder / f"{node.name}.{name}.log"
        node.start([name, *options], log, env=self._environment)

    def node_states(self) -> set[str]:
        return set(self.ask("sinfo", "--noheader", "--Node", "--format=%T").split())

    def ask(self, *words: str, cwd: Path | None = None, **environment: str) -> str:
        """What a command of Slurm prints on the first node."""
        inside = ("ip", "netns", "exec", self.nodes[0].namespace)
        hosts = f'mount --bind "{self.folder}/hosts" /etc/hosts && exec "$@"'
        done = subprocess.run(
            [*inside, "unshare", "--mount", "sh", "-c", hosts, "sh", *words],
            cwd=cwd,
            env=self._environment | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.stdout + done.stderr

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, ..."""
        return self.shown(job).get("JobState", "")

    def shown(self, job: str) -> dict[str, str]:
        words = self.ask("scontrol", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def close(self) -> None:
        for node in self.nodes:
            node.kill()
        if self._munged is not None:
            self._munged.kill()
            self._munged.wait()


def wait_until(condition: Callable[[], bool], seconds: float, problem: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, problem
        time.sleep(0.5)
