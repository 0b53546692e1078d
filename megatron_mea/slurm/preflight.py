"""Checks before training that the nodes of a job work together: a bad node costs a minute and is named.

A job runs `python -m megatron_mea.slurm.preflight RUN_DIR` as one task a rank. It exits with the status of the other
commands; a node that fails is no user's error, so that the job may be tried again on other nodes.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_mea.errors import MachineError, UserError
from megatron_mea.failures import exit_status
from megatron_mea.printing import note
from megatron_mea.run_folder import RunFolder
from megatron_mea.training.distributed import choose_device, port_errors
from megatron_mea.training.rank_env import RankEnv
from megatron_mea.versions import versions

TIMEOUT = 180.0
"""Seconds that the slowest node may take to import torch."""
_SHARED_FOLDER_TIMEOUT = 20.0
"""Seconds after which a file that one node wrote must be seen by all (file systems cache folders)."""
_MAX_CLOCK_SKEW = 60.0
"""Seconds by which the clocks may differ."""
_ALL_REDUCE_ELEMENTS = 1 << 22
_MAX_USED_GPU_BYTES = 2 << 30
"""Bytes of a GPU's memory that others may use: contexts of monitoring, say."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """The state of a rank's node.

    Args:
        clock: seconds since the epoch, at a moment that all ranks share.
        device: `cpu`, or `GPU` and its UUID.
        versions: of all software that should be the same everywhere.
        machine_problem: of the node or its GPU; empty where there is none.
        folder_problem: of the run folder as this node sees it; empty where there is none.
    """

    rank: int
    host: str
    clock: float
    device: str
    versions: dict[str, str]
    machine_problem: str
    folder_problem: str


def preflight(run_dir: Path, rank_env: RankEnv, *, timeout: float = TIMEOUT) -> None:
    """Compares the nodes and times an all-reduce over all ranks; rank 0 prints one line where all is well.

    Args:
        timeout: seconds that ranks may take to arrive.

    Raises:
        UserError: the run folder is not shared or not writable, or the versions differ.
        MachineError: a node, its GPU or its network fails.
    """
    begin, is_rank_0, run = time.monotonic(), rank_env.rank == 0, RunFolder(run_dir)
    device, machine_problem = _check_device(rank_env)
    wait = timedelta(seconds=timeout)
    with port_errors(rank_env):
        store = dist.TCPStore(
            host_name=rank_env.master_address,
            port=rank_env.master_port,
            world_size=rank_env.world_size,
            is_master=is_rank_0,
            timeout=wait,
            wait_for_workers=False,
        )

    try:
        reports = _exchange_reports(
            run=run,
            rank_env=rank_env,
            store=store,
            device=_device_identity(device),
            machine_problem=machine_problem,
            wait=wait,
        )
    finally:
        if is_rank_0:
            for marker in run.preflight_markers():
                marker.unlink(missing_ok=True)

    seconds = _time_all_reduce(device=device, rank_env=rank_env, store=store)
    if is_rank_0:
        hosts = dict.fromkeys(report.host for report in reports)
        print(
            f"preflight: {rank_env.world_size} rank(s) on {len(hosts)} node(s) ({', '.join(hosts)}), {device.type}, "
            f"torch {torch.__version__}; all-reduce of {_ALL_REDUCE_ELEMENTS * 4 / 1e6:.0f} MB in {seconds:.3f} s; "
            f"{time.monotonic() - begin:.0f} s in all",
            flush=True,
        )


def _exchange_reports(
    *, run: RunFolder, rank_env: RankEnv, store: dist.Store, device: str, machine_problem: str, wait: timedelta
) -> list[Report]:
    """Reports of all ranks on rank 0, an empty list elsewhere; where there is a problem every rank ends here.

    Raises:
        UserError, MachineError: on rank 0, the problems of all ranks; others exit with status 1.
    """
    if rank_env.rank == 0:
        store.set("marker", _write_marker(run))
    marker = store.get("marker").decode()
    folder_problem = _check_folder(run=run, marker=marker, write=rank_env.local_rank == 0)

    report = Report(
        rank=rank_env.rank,
        host=socket.gethostname(),
        clock=_shared_clock(store=store, rank_env=rank_env, wait=wait),
        device=device,
        versions=_software_versions(),
        machine_problem=machine_problem,
        folder_problem=folder_problem,
    )
    store.set(f"report/{rank_env.rank}", json.dumps(asdict(report)))

    reports: list[Report] = []
    if rank_env.rank == 0:
        # An error that keeps rank 0 from a verdict must not keep the others waiting.
        verdict: Exception | None = None
        try:
            reports = [Report(**json.loads(store.get(f"report/{rank}"))) for rank in range(rank_env.world_size)]
            _raise_problems(reports, run.path)
        except Exception as error:
            verdict = error

        store.set("verdict", "bad" if verdict else "good")
        if verdict:
            # The others read it from here.
            time.sleep(1)
            raise verdict
    elif store.get("verdict") == b"bad":
        # Rank 0 says why.
        time.sleep(3)
        sys.exit(1)

    return reports


def find_problems(reports: Sequence[Report]) -> Iterator[tuple[str, str]]:
    """(kind, sentence) of every problem: "machine", or what the user has set up wrongly: "folder" or "versions"."""
    for report in reports:
        if report.machine_problem:
            yield "machine", f"{report.host}, rank {report.rank}: {report.machine_problem}"

        same = [other.rank for other in reports if (other.host, other.device) == (report.host, report.device)]
        if report.device.startswith("GPU") and same[0] == report.rank and len(same) > 1:
            yield "machine", f"{report.host}: ranks {', '.join(map(str, same))} share one GPU: it has fewer than ranks"

    kinds = {report.host: report.device.split(" ")[0] for report in reports}
    if len(set(kinds.values())) > 1:
        yield "machine", "some nodes have GPUs: " + ", ".join(f"{kind} on {host}" for host, kind in kinds.items())

    clocks = {report.host: report.clock for report in reports}
    median = sorted(clocks.values())[len(clocks) // 2]
    for host, clock in clocks.items():
        if abs(clock - median) > _MAX_CLOCK_SKEW:
            yield "machine", f"{host}: its clock is {clock - median:+.0f} s off"

    for host, problem in {report.host: report.folder_problem for report in reports if report.folder_problem}.items():
        yield "folder", f"{host}: {problem}"

    for name in sorted({name for report in reports for name in report.versions}):
        hosts_by_version: dict[str, list[str]] = {}
        for report in reports:
            # A node without git knows no revision.
            if name == "git" and name not in report.versions:
                continue
            hosts = hosts_by_version.setdefault(report.versions.get(name, "absent"), [])
            if report.host not in hosts:
                hosts.append(report.host)

        if len(hosts_by_version) > 1:
            differences = (f"{version} on {', '.join(hosts)}" for version, hosts in hosts_by_version.items())
            yield "versions", f"{name}: " + "; ".join(differences)


def _raise_problems(reports: Sequence[Report], run_dir: Path) -> None:
    """Raises the problems of one kind together, those that another attempt cannot cure first."""
    problems: dict[str, list[str]] = {}
    for kind, sentence in find_problems(reports):
        problems.setdefault(kind, []).append(sentence)

    if "folder" in problems:
        expected = "a folder that every node can write and that all see alike"
        raise UserError(where="run.dir", got=f"{run_dir}; " + "; ".join(problems["folder"]), expected=expected)

    if "versions" in problems:
        raise UserError(where="environment", got="; ".join(problems["versions"]), expected="the same on all nodes")

    if "machine" in problems:
        raise MachineError(
            "preflight: " + "; ".join(problems["machine"]) + "\n  leave such nodes out: submit ... -- --exclude=NODE"
        )


def _check_device(rank_env: RankEnv) -> tuple[torch.device, str]:
    """The device of this rank and its problem, empty where it computes correctly."""
    try:
        device = choose_device(rank_env)
        if device.type == "cuda":
            torch.cuda.set_device(device)
            free, total = torch.cuda.mem_get_info()
            if total - free > _MAX_USED_GPU_BYTES:
                return device, f"{device}: {(total - free) / 1e9:.1f} GB are in use before anything started"

            ones = torch.ones(2048, 2048, device=device)
            if not bool((ones @ ones == 2048).all()):
                return device, f"{device} multiplies wrongly"

        return device, ""
    except UserError as error:
        return torch.device("cpu"), f"{error.problems[0].got}"
    except RuntimeError as error:
        return torch.device("cpu"), str(error).strip().partition("\n")[0]


def _device_identity(device: torch.device) -> str:
    """`cpu`, or `GPU` and its UUID, by which two ranks on the same one are noticed."""
    return str(device) if device.type == "cpu" else f"GPU {torch.cuda.get_device_properties(device).uuid}"


def _software_versions() -> dict[str, str]:
    known = {name: version for name, version in versions().items() if version != "unknown"}
    return known | {"python": platform.python_version(), "cuda": torch.version.cuda or "none"}


def _write_marker(run: RunFolder) -> str:
    """Leaves a file in the run folder that all nodes must see; returns its name, as `preflight_marker` takes it."""
    name = f"{os.environ.get('SLURM_JOB_ID', 'local')}-{os.getpid()}"
    marker = run.preflight_marker(name)
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        marker.touch()
    except OSError as error:
        # The others miss the file; this node reports the problem when it writes its own.
        note(f"preflight: {marker}: {error.strerror}")
    return name


def _check_folder(*, run: RunFolder, marker: str, write: bool) -> str:
    """The problem of the run folder on this node: rank 0's marker is not there, or no file can be written; or empty."""
    deadline = time.monotonic() + _SHARED_FOLDER_TIMEOUT
    while not run.preflight_marker(marker).exists():
        if time.monotonic() > deadline:
            return "it does not see what rank 0 wrote there: the folder is not shared"
        time.sleep(0.5)

    if write:
        try:
            run.preflight_marker(f"{marker}-{socket.gethostname()}").touch()
        except OSError as error:
            return f"it cannot be written there: {error.strerror}"

    return ""


def _shared_clock(*, store: dist.Store, rank_env: RankEnv, wait: timedelta) -> float:
    """This node's clock when the last rank has arrived, in seconds since the epoch.

    Raises:
        MachineError: on rank 0: some have not arrived.
    """
    store.set(f"arrived/{rank_env.rank}", socket.gethostname())
    if rank_env.rank == 0:
        ranks = range(rank_env.world_size)
        deadline, missing = time.monotonic() + wait.total_seconds(), list(ranks)
        while missing := [rank for rank in missing if not store.check([f"arrived/{rank}"])]:
            if time.monotonic() > deadline:
                hosts = {store.get(f"arrived/{rank}").decode() for rank in set(ranks) - set(missing)}
                raise MachineError(
                    f"preflight: no word from rank(s) {', '.join(map(str, missing))} in {wait.total_seconds():.0f} s; "
                    f"those of {', '.join(sorted(hosts))} are there"
                )
            time.sleep(0.1)

        store.set("moment", "now")

    store.wait(["moment"], wait + timedelta(seconds=10))
    return time.time()


def _time_all_reduce(*, device: torch.device, rank_env: RankEnv, store: dist.Store) -> float:
    """Seconds of an all-reduce of `_ALL_REDUCE_ELEMENTS` float32 elements over all ranks.

    Raises:
        MachineError: the sum is wrong.
    """
    dist.init_process_group(
        backend="nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("group", store),
        rank=rank_env.rank,
        world_size=rank_env.world_size,
        timeout=timedelta(minutes=2),
    )

    expected = rank_env.world_size * (rank_env.world_size + 1) / 2
    for _ in range(2):
        # The first all-reduce opens the connections.
        values = torch.full((_ALL_REDUCE_ELEMENTS,), float(rank_env.rank + 1), device=device)
        dist.barrier()
        begin = time.monotonic()
        dist.all_reduce(values)
        # The comparison waits for the GPU, so it is timed too.
        is_correct = bool((values == expected).all())
        seconds = time.monotonic() - begin

    if not is_correct:
        host = socket.gethostname()
        raise MachineError(f"preflight: rank {rank_env.rank} on {host}: an all-reduce gave a wrong sum")

    dist.destroy_process_group()
    return seconds


def main(arguments: Sequence[str], environment: Mapping[str, Any] = os.environ) -> int:
    """Exit status: 0 all is well, 2 the user has set something up wrongly, 1 a node fails."""
    (run_dir,) = arguments
    return exit_status(lambda: preflight(Path(run_dir), RankEnv.from_environment(environment)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
