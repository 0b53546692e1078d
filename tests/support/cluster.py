"""A real SLURM cluster of several nodes on one machine: munged, slurmctld and one slurmd a node, on free ports.

A node is a process namespace with a hostname, a /etc/hosts and a /dev/shm of its own, so it can lose power as a whole.
Nothing outlives the process that started the cluster: the kernel kills its daemons and nodes, however that one ended.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "unshare", "setpriv", "hostname", "mount")
# States that a job does not leave by itself.
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}
IDLE = {"IDLE", "PLANNED"}
WORKING = IDLE | {"MIXED", "ALLOCATED", "COMPLETING"}

# A requeued job waits cred_expire seconds (by default 120). A node is lost when it has not answered for SlurmdTimeout
# (300), which is looked at once a ping of MessageTimeout (10) has failed.
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
FirstJobId={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobs.txt
PropagateResourceLimits=NONE
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=1
ReturnToService=2
SlurmdTimeout=10
MessageTimeout=5
KillWait=10
MinJobAge=600
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
GresTypes=gpu
{nodes}
PartitionName=train Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10
PartitionName=short Nodes=ALL MaxTime=5 PriorityTier=1 GraceTime=20
"""
NODE = "NodeName={name} NodeAddr=127.0.0.1 Port={port} CPUs=96 RealMemory=1000000 Gres=gpu:8"

# The first process of a node: it reaps the orphans of its slurmd, and ends with it.
NODE_SCRIPT = """
mount --bind "$2/hosts" /etc/hosts && mount -t tmpfs shm /dev/shm && hostname "$1" || exit
slurmd -D -N "$1" -f "$2/slurm.conf" &
wait
"""


class ClusterError(RuntimeError):
    """The cluster could not be started, or does not answer."""


class Cluster:
    """Nodes `node1` to `nodeN`, each with 96 CPUs, 1 TB and 8 GPUs that it only claims to have.

    Partitions: `train` (the default), `urgent` (takes nodes from the others, whose jobs have 20 seconds to save and
    are requeued if they have not ended by then) and `short` (at most 5 minutes). To be used as root, from
    the main thread: the daemons end with it.

    Attributes:
        names: of the nodes.
        environment: what a process needs in its environment to talk to this cluster.
        folder: configuration, state and logs; removed by `close`.
    """

    def __init__(self, nodes: int = 4) -> None:
        """Starts the daemons and waits until every node can take a job.

        Raises:
            ClusterError: with the end of the logs; nothing is left running.
        """
        self.names = [f"node{number}" for number in range(1, nodes + 1)]
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.environment = {"SLURM_CONF": str(self.folder / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._boot_times: dict[str, int] = {}
        self._reserved_ports: list[socket.socket] = []
        try:
            self._configure()
            # --force: the folder's parents need not be open to all, since all is root.
            options = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid", "seed-file": "seed"}
            paths = [f"--{option}={self.folder / name}" for option, name in options.items()]
            self._start("munged", "munged", "--foreground", "--force", *paths)
            self._wait_until(
                condition=(self.folder / "munge.socket").exists, message="munged does not answer", timeout=10
            )
            self._start("slurmctld", "slurmctld", "-D", "-f", self.environment["SLURM_CONF"])
            for name in self.names:
                self._boot(name)
            self._wait_until(condition=lambda: self._ready(self.names), message="not every node came up", timeout=60)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(
        self, *command: str | Path, check: bool = True, timeout: float = 120, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command that talks to this cluster, such as `sbatch`, and returns it with its output as text.

        Args:
            check: whether a status other than 0 is an AssertionError with what the command wrote.
            timeout: in seconds.
            options: further ones of `subprocess.run`; `env` adds to the environment of this process.

        Raises:
            subprocess.TimeoutExpired: the command was killed.
        """
        environment = os.environ | self.environment | options.pop("env", {})
        completed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, **options)
        output = completed.stdout + completed.stderr
        assert completed.returncode == 0 or not check, f"{command} ended with {completed.returncode}:\n{output}"

        return completed

    def jobs(self, job_id: int | str) -> list[dict[str, str]]:
        """Fields of `scontrol show job`, a dictionary for each element of an array; empty for an unknown id."""
        lines = self.run("scontrol", "show", "job", "-o", str(job_id), check=False).stdout.splitlines()
        return [_parse_fields(line) for line in lines]

    def job(self, job_id: int | str) -> dict[str, str]:
        """Fields of one job, or of one element of an array (`7_1`)."""
        jobs = self.jobs(job_id)
        assert len(jobs) == 1, f"job {job_id} has {len(jobs)} entries"

        return jobs[0]

    def wait(self, job_id: int | str, states: str | Collection[str], *, timeout: float = 60, restarts: int = 0) -> str:
        """Waits until the job is in one of `states` (for example `RUNNING`), and returns that state.

        Args:
            timeout: in seconds.
            restarts: how often the job must have been requeued by then, at least.

        Raises:
            AssertionError: too late, or the job has ended in another state; with the logs of the job and of slurmctld.
        """
        expected = {states} if isinstance(states, str) else set(states)
        deadline = time.monotonic() + timeout
        while True:
            job = self.job(job_id)
            state = job["JobState"]
            if state in expected and int(job["Restarts"]) >= restarts:
                return state
            if state in ENDED or time.monotonic() > deadline:
                path = Path(job.get("StdOut", ""))
                raise AssertionError(
                    f"job {job_id} is {state} ({job['Reason']}) after {job['Restarts']} restarts, "
                    f"not {sorted(expected)} after {restarts}\n{path}:\n{_tail(path, lines=60)}\n"
                    f"slurmctld:\n{self._log_tail('slurmctld')}"
                )
            time.sleep(0.1)

    def kill_node(self, name: str, *, noticed: bool = False) -> None:
        """Takes the power from a node: its slurmd and whatever ran on it are gone when this returns.

        Args:
            noticed: tell slurmctld, which otherwise finds out after 10 to 25 seconds.
        """
        self._stop(name)
        if noticed:
            self.run("scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=test")

    def restore_node(self, name: str, timeout: float = 60) -> None:
        """Switches a killed node on again and waits until it can take jobs; does nothing for one that lives.

        Raises:
            ClusterError: it did not come back within `timeout` seconds.
        """
        if name not in self._daemons:
            self._boot(name)

        self._wait_until(condition=lambda: self._ready([name]), message=f"{name} did not come back", timeout=timeout)

    def clear(self, timeout: float = 60) -> None:
        """Cancels every job, and waits until all nodes are there and idle.

        Raises:
            ClusterError: that took more than `timeout` seconds.
        """
        self._cancel()
        for name in self.names:
            self.restore_node(name)

        self._wait_until(
            condition=lambda: self._ready(self.names, IDLE), message="the nodes do not become idle", timeout=timeout
        )

    def close(self) -> None:
        """Cancels every job, gives the tasks five seconds to end, and stops every process of the cluster."""
        try:
            # What is left ends with its node.
            with contextlib.suppress(ClusterError, AssertionError, subprocess.TimeoutExpired):
                if "slurmctld" in self._daemons:
                    self._cancel()
                    self._wait_until(
                        condition=lambda: not self.run("squeue", "-h").stdout, message="jobs are left", timeout=5
                    )
        finally:
            for name in reversed(list(self._daemons)):
                self._stop(name)
            for reserved in self._reserved_ports:
                reserved.close()
            shutil.rmtree(self.folder, ignore_errors=True)

    def _configure(self) -> None:
        """Reserves ports and writes the configuration files into the folder."""
        # Bound but not listening: nobody else is given the port, and a daemon can take it, since both reuse addresses.
        for _ in range(1 + len(self.names)):
            reserved = socket.socket()
            self._reserved_ports.append(reserved)
            reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            reserved.bind(("", 0))

        ports = [reserved.getsockname()[1] for reserved in self._reserved_ports]
        host = socket.gethostname().split(".")[0]
        nodes = "\n".join(NODE.format(name=name, port=port) for name, port in zip(self.names, ports[1:], strict=True))
        config = CONFIG.format(host=host, port=ports[0], folder=self.folder, nodes=nodes)
        (self.folder / "slurm.conf").write_text(config)

        hosts = "".join(f"127.0.1.{number} {name}\n" for number, name in enumerate(self.names, 1))
        (self.folder / "hosts").write_text(Path("/etc/hosts").read_text() + "\n" + hosts)

        # A GPU must be a character device; a link to one will do.
        for number in range(8):
            (self.folder / f"nvidia{number}").symlink_to("/dev/null")

        (self.folder / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={self.folder}/nvidia[0-7]\n")
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\n")

        (self.folder / "munge.key").touch(mode=0o600)
        (self.folder / "munge.key").write_bytes(os.urandom(128))

    def _start(self, name: str, *command: str) -> None:
        """Starts a daemon that the kernel kills when this process ends."""
        # A session of its own: an interrupt from the terminal is for us, who then need the daemons to cancel jobs.
        with (self.folder / f"{name}.log").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _boot(self, name: str) -> None:
        """Starts a node in namespaces of its own."""
        self._boot_times[name] = int(time.time())
        isolated = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--uts")
        self._start(name, *isolated, "sh", "-c", NODE_SCRIPT, "sh", name, str(self.folder))

    def _stop(self, name: str) -> None:
        """Ends a daemon, or a node with all its processes."""
        daemon = self._daemons.pop(name)
        if name in self.names:
            # The kernel ends every process of the node before this one is gone, which unshare waits for.
            for pid in _child_pids(daemon.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        else:
            daemon.terminate()

        try:
            daemon.wait(10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()

    def _cancel(self) -> None:
        self.run("scancel", "--user=root", "--quiet", check=False, timeout=20)

    def _ready(self, names: Collection[str], states: Collection[str] = frozenset(WORKING)) -> bool:
        """Whether the nodes are in one of `states`, reported since they were last started."""
        ready_nodes = set()
        for line in self.run("scontrol", "show", "node", "-o", check=False).stdout.splitlines():
            node = _parse_fields(line)
            started = node.get("SlurmdStartTime", "None")
            if started != "None" and datetime.fromisoformat(started).timestamp() >= self._boot_times[node["NodeName"]]:
                ready_nodes |= {node["NodeName"]} if set(node["State"].split("+")) <= set(states) else set()

        return ready_nodes >= set(names)

    def _wait_until(self, *, condition: Callable[[], bool], message: str, timeout: float) -> None:
        """Waits until `condition()` is true.

        Raises:
            ClusterError: that takes more than `timeout` seconds, or a daemon has ended; with the end of the logs.
        """
        deadline = time.monotonic() + timeout
        while True:
            dead = [name for name, daemon in self._daemons.items() if daemon.poll() is not None]
            if dead or time.monotonic() > deadline:
                logs = "".join(f"\n{name}:\n{self._log_tail(name)}" for name in dead or ["slurmctld"])
                raise ClusterError(f"{message}{logs}" if dead else f"{message} within {timeout:g} s{logs}")
            if condition():
                return
            time.sleep(0.1)

    def _log_tail(self, name: str) -> str:
        return _tail(self.folder / f"{name}.log", lines=20)


def _parse_fields(line: str) -> dict[str, str]:
    """The `Name=value` pairs of a line of scontrol."""
    return dict(re.findall(r"([A-Z][\w/:]*)=(.*?)(?= [A-Z][\w/:]*=| *$)", line))


def _tail(path: Path, *, lines: int) -> str:
    """The last lines of a file."""
    if not path.is_file():
        return "(not there)"

    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])


def _child_pids(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []
