"""Whether the nodes of a job can train together, asked before they do: a bad node costs a minute and is named.

A job runs `python -m megatron_mea.cluster.preflight RUN_DIR` as one task a rank. Exit status as of the other
commands; what a node does wrong is no user's error, so that the job may be tried again on other nodes.
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
from megatron_mea.training.processes import choose_device
from megatron_mea.training.ranks import Ranks
from megatron_mea.versions import versions

PATIENCE = 180.0
"""Seconds that the slowest node may take to import torch."""
_SHARE_PATIENCE = 20.0
"""Seconds after which a file that one node wrote must be seen by all (file systems cache folders)."""
_SKEW = 60.0
"""Seconds by which the clocks may differ."""
_NUMBERS = 1 << 22
_TAKEN = 2 << 30
"""Bytes of a GPU's memory that others may use: contexts of monitoring, say."""


@dataclass(frozen=True)
class Report:
    """What a rank finds on its node.

    Args:
        clock: seconds since the epoch, at a moment that all ranks share.
        device: where it would compute, in words; of a GPU its identity.
        versions: of all that should be the same everywhere.
        machine: what is wrong with the node; empty where nothing is.
        folder: what is wrong with the run folder as this node sees it; empty where nothing is.
    """

    rank: int
    host: str
    clock: float
    device: str
    versions: dict[str, str]
    machine: str
    folder: str


def preflight(run_dir: Path, ranks: Ranks, patience: float = PATIENCE) -> None:
    """Compares the nodes and lets them add up numbers; rank 0 prints one line where all is well.

    Raises:
        UserError: the run folder is not shared or not writable, or the versions differ.
        MachineError: a node, its GPU or its network fails.
    """
    began, first = time.monotonic(), ranks.rank == 0
    device, machine = _look_at_device(ranks)
    wait = timedelta(seconds=patience)
    store = dist.TCPStore(
        ranks.master_address, ranks.master_port, ranks.world_size, first, timeout=wait, wait_for_workers=False
    )
    try:
        reports = _compare(run_dir, ranks, store, _identity(device), machine, wait)
    finally:
        if first:
            _remove_markers(run_dir)
    seconds = _add_up(device, ranks, store)
    if first:
        hosts = dict.fromkeys(report.host for report in reports)
        print(
            f"preflight: {ranks.world_size} rank(s) on {len(hosts)} node(s) ({', '.join(hosts)}), {device.type}, torch "
            f"{torch.__version__}; all-reduce of {_NUMBERS * 4 / 1e6:.0f} MB in {seconds:.3f} s; "
            f"{time.monotonic() - began:.0f} s in all",
            flush=True,
        )


def _compare(
    run_dir: Path, ranks: Ranks, store: dist.Store, device: str, machine: str, wait: timedelta
) -> list[Report]:
    """What all ranks report, on rank 0; every rank leaves here unless all is well."""
    if ranks.rank == 0:
        store.set("marker", _leave_marker(run_dir))
    folder = _look_at_folder(run_dir, store.get("marker").decode(), write=ranks.local_rank == 0)
    report = Report(
        ranks.rank, socket.gethostname(), _shared_moment(store, ranks, wait), device, _versions(), machine, folder
    )
    store.set(f"report/{ranks.rank}", json.dumps(asdict(report)))
    reports: list[Report] = []
    if ranks.rank == 0:
        # What keeps rank 0 from a verdict must not keep the others waiting.
        verdict: Exception | None = None
        try:
            reports = [Report(**json.loads(store.get(f"report/{rank}"))) for rank in range(ranks.world_size)]
            _judge(reports, run_dir)
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


def problems(reports: Sequence[Report]) -> Iterator[tuple[str, str]]:
    """(kind, sentence) of what is wrong: of a "machine", or of what the user has set up, a "folder" or "versions"."""
    for report in reports:
        if report.machine:
            yield "machine", f"{report.host}, rank {report.rank}: {report.machine}"
        same = [other.rank for other in reports if (other.host, other.device) == (report.host, report.device)]
        if report.device.startswith("GPU") and same[0] == report.rank and len(same) > 1:
            yield "machine", f"{report.host}: ranks {', '.join(map(str, same))} share one GPU: it has fewer than ranks"
    kinds = {report.host: report.device.split(" ")[0] for report in reports}
    if len(set(kinds.values())) > 1:
        yield "machine", "some nodes have GPUs: " + ", ".join(f"{kind} on {host}" for host, kind in kinds.items())
    clocks = {report.host: report.clock for report in reports}
    middle = sorted(clocks.values())[len(clocks) // 2]
    for host, clock in clocks.items():
        if abs(clock - middle) > _SKEW:
            yield "machine", f"{host}: its clock is {clock - middle:+.0f} s off"
    for host, problem in {report.host: report.folder for report in reports if report.folder}.items():
        yield "folder", f"{host}: {problem}"
    for name in sorted({name for report in reports for name in report.versions}):
        hosts: dict[str, list[str]] = {}
        for report in reports:
            # A node without git knows no revision.
            if name == "git" and name not in report.versions:
                continue
            found = hosts.setdefault(report.versions.get(name, "absent"), [])
            if report.host not in found:
                found.append(report.host)
        if len(hosts) > 1:
            yield "versions", f"{name}: " + "; ".join(f"{value} on {', '.join(on)}" for value, on in hosts.items())


def _judge(reports: Sequence[Report], run_dir: Path) -> None:
    found: dict[str, list[str]] = {}
    for kind, sentence in problems(reports):
        found.setdefault(kind, []).append(sentence)
    if "folder" in found:
        allowed = "a folder that every node can write and that all see alike"
        raise UserError("run.dir", f"{run_dir}; " + "; ".join(found["folder"]), allowed)
    if "versions" in found:
        raise UserError("environment", "; ".join(found["versions"]), "the same on all nodes")
    if "machine" in found:
        raise MachineError(
            "preflight: " + "; ".join(found["machine"]) + "\n  leave such nodes out: submit ... -- --exclude=NODE"
        )


def _look_at_device(ranks: Ranks) -> tuple[torch.device, str]:
    """The device of this rank, and what is wrong with it."""
    try:
        device = choose_device(ranks)
        if device.type == "cuda":
            torch.cuda.set_device(device)
            free, total = torch.cuda.mem_get_info()
            if total - free > _TAKEN:
                return device, f"{device}: {(total - free) / 1e9:.1f} GB are in use before anything started"
            one = torch.ones(2048, 2048, device=device)
            if not bool((one @ one == 2048).all()):
                return device, f"{device} multiplies wrongly"
        return device, ""
    except UserError as error:
        return torch.device("cpu"), f"{error.problems[0].found}"
    except RuntimeError as error:
        return torch.device("cpu"), str(error).strip().partition("\n")[0]


def _identity(device: torch.device) -> str:
    return str(device) if device.type == "cpu" else f"GPU {torch.cuda.get_device_properties(device).uuid}"


def _versions() -> dict[str, str]:
    found = {name: value for name, value in versions().items() if value != "unknown"}
    return found | {"python": platform.python_version(), "cuda": torch.version.cuda or "none"}


def _leave_marker(run_dir: Path) -> str:
    name = f".preflight-{os.environ.get('SLURM_JOB_ID', 'local')}-{os.getpid()}"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / name).touch()
    except OSError as error:
        # Its absence tells the others; this one is told when it writes its own.
        print(f"preflight: {run_dir / name}: {error.strerror}", file=sys.stderr)
    return name


def _look_at_folder(run_dir: Path, marker: str, write: bool) -> str:
    """What is wrong with the folder: rank 0's marker is not seen here, or a file of one's own cannot be written."""
    deadline = time.monotonic() + _SHARE_PATIENCE
    while not (run_dir / marker).exists():
        if time.monotonic() > deadline:
            return "it does not see what rank 0 wrote there: the folder is not shared"
        time.sleep(0.5)
    if write:
        try:
            (run_dir / f"{marker}-{socket.gethostname()}").touch()
        except OSError as error:
            return f"it cannot be written there: {error.strerror}"
    return ""


def _remove_markers(run_dir: Path) -> None:
    for marker in run_dir.glob(".preflight-*"):
        marker.unlink(missing_ok=True)


def _shared_moment(store: dist.Store, ranks: Ranks, wait: timedelta) -> float:
    """The clock when the last rank has arrived.

    Raises:
        MachineError: on rank 0: some have not arrived.
    """
    store.set(f"arrived/{ranks.rank}", socket.gethostname())
    if ranks.rank == 0:
        deadline, missing = time.monotonic() + wait.total_seconds(), list(range(ranks.world_size))
        while missing := [rank for rank in missing if not store.check([f"arrived/{rank}"])]:
            if time.monotonic() > deadline:
                there = {store.get(f"arrived/{rank}").decode() for rank in set(range(ranks.world_size)) - set(missing)}
                raise MachineError(
                    f"preflight: no word from rank(s) {', '.join(map(str, missing))} in {wait.total_seconds():.0f} s; "
                    f"those of {', '.join(sorted(there))} are there"
                )
            time.sleep(0.1)
        store.set("moment", "now")
    store.wait(["moment"], wait + timedelta(seconds=10))
    return time.time()


def _add_up(device: torch.device, ranks: Ranks, store: dist.Store) -> float:
    """Seconds of an all-reduce across all ranks.

    Raises:
        MachineError: the sum is wrong.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    group = dist.PrefixStore("group", store)
    dist.init_process_group(
        backend, store=group, rank=ranks.rank, world_size=ranks.world_size, timeout=timedelta(minutes=2)
    )
    expected = ranks.world_size * (ranks.world_size + 1) / 2
    for _ in range(2):
        # The first one makes the connections.
        numbers = torch.full((_NUMBERS,), float(ranks.rank + 1), device=device)
        dist.barrier()
        begin = time.monotonic()
        dist.all_reduce(numbers)
        right = bool((numbers == expected).all())
        seconds = time.monotonic() - begin
    if not right:
        raise MachineError(f"preflight: rank {ranks.rank} on {socket.gethostname()}: an all-reduce gave a wrong sum")
    dist.destroy_process_group()
    return seconds


def main(arguments: Sequence[str], environment: Mapping[str, Any] = os.environ) -> int:
    """Exit status: 0 all is well, 2 the user has set something up wrongly, 1 a node fails."""
    (run_dir,) = arguments
    return exit_status(lambda: preflight(Path(run_dir), Ranks.from_environment(environment)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
