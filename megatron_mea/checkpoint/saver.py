"""Writes the checkpoints of a run behind its training."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from megatron_mea.checkpoint import folder
from megatron_mea.checkpoint.lease import Lease
from megatron_mea.checkpoint.tensors import Fragment, copy_of, write_fragments
from megatron_mea.config.schema import Checkpoint
from megatron_mea.data.tokenizer import copy_tokenizer
from megatron_mea.errors import RunError

T = TypeVar("T")
_CPU = torch.device("cpu")


class Saver:
    """Copies what this rank holds, and lets a thread write it while training goes on; one on every rank.

    The threads meet in a process group of their own, so that training never waits for them. What one of them cannot
    do fails on all, and is raised by the next `wait` or `save`.

    Args:
        run_dir: of the run.
        settings: the section `checkpoint`.
        tokenizer: the folder that every checkpoint gets a copy of.
        group: gloo process group of all ranks, for the threads alone.
        lease: of the run folder, on rank 0.
        say: prints a line, on rank 0.
    """

    def __init__(
        self,
        run_dir: Path,
        settings: Checkpoint,
        tokenizer: Path,
        group: Any,
        lease: Lease | None,
        say: Callable[[str], None],
    ) -> None:
        self._dir, self._settings, self._tokenizer = run_dir, settings, tokenizer
        self.group, self._lease, self._say = group, lease, say
        self._rank = dist.get_rank(group)
        self._device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else _CPU
        self._buffers: dict[str, torch.Tensor] = {}
        self._thread: threading.Thread | None = None
        self._failure: RunError | None = None
        self.seconds: float | None = None
        """How long the last checkpoint took, from its copy to its name."""

    @property
    def failed(self) -> bool:
        """Whether a checkpoint could not be written; the same on all ranks, though not at the same moment."""
        return self._failure is not None

    def save(self, meta: folder.Meta, fragments: Iterable[Fragment]) -> None:
        """Saves a checkpoint, after the one before; returns when it is copied, or written without `async_save`.

        Raises:
            RunError: it, or the one before, could not be written.
        """
        self.wait()
        began = time.monotonic()
        copies = [copy_of(fragment, self._buffer(fragment)) for fragment in fragments]
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        self._thread = threading.Thread(target=self._write_or_fail, args=(meta, copies, began), name="saver")
        self._thread.start()
        if not self._settings.async_save:
            self.wait()

    def wait(self) -> None:
        """Until what is being written is a checkpoint.

        Raises:
            RunError: it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            raise self._failure

    def _buffer(self, fragment: Fragment) -> torch.Tensor:
        """Memory of the host that is kept for the next save."""
        numbers = fragment.numbers
        if fragment.name not in self._buffers:
            self._buffers[fragment.name] = torch.empty(len(numbers), dtype=numbers.dtype, pin_memory=numbers.is_cuda)
        return self._buffers[fragment.name]

    def _write_or_fail(self, meta: folder.Meta, copies: list[Fragment], began: float) -> None:
        final = self._dir / "checkpoints" / folder.folder_name(meta.step)
        token: list[str | None] = [self._lease.token if self._lease else None]
        scratch = final
        try:
            if self._device.type == "cuda":
                # A thread begins on GPU 0, whatever the rank's.
                torch.cuda.set_device(self._device)
            dist.broadcast_object_list(token, src=0, group=self.group)
            scratch = final.with_name(f".tmp-{final.name}-{token[0]}")
            size = self._write(scratch, final, meta, copies)
        except (Exception, CheckpointException) as error:
            self._failure = RunError(f"the checkpoint of step {meta.step} could not be written: {_reason(error)}")
            self._failure.__cause__ = error
            if self._rank == 0 and scratch != final:
                shutil.rmtree(scratch, ignore_errors=True)
            return
        self.seconds = time.monotonic() - began
        self._say(f"saved step {meta.step}: {size / 1e6:,.1f} MB in {self.seconds:.1f} s")

    def _write(self, scratch: Path, final: Path, meta: folder.Meta, copies: list[Fragment]) -> int:
        """Writes beside and publishes; returns the bytes of all ranks' tensors."""
        size = sum(self._together(lambda: sum(copy.numbers.nbytes for copy in copies)))
        self._on_first(lambda: self._open(scratch, size))
        write_fragments(scratch, copies, self.group)
        # Each rank reads what it has written, which its host still has in memory.
        mine = self._together(lambda: {p.name: folder.sha256(p) for p in scratch.glob(f"__{self._rank}_*")})
        checksums = {name: digest for ranks in mine for name, digest in ranks.items()}
        self._on_first(lambda: self._publish(scratch, final, meta, checksums))
        return size

    def _open(self, scratch: Path, size: int) -> None:
        self._check_lease()
        scratch.mkdir(parents=True)
        free, needed = shutil.disk_usage(scratch).free, size + folder.SPARE
        if free < needed:
            raise OSError(f"{scratch.parent} has {free / 1e9:,.3f} GB free, and it needs {needed / 1e9:,.3f} GB")

    def _publish(self, scratch: Path, final: Path, meta: folder.Meta, checksums: dict[str, str]) -> None:
        copy_tokenizer(self._tokenizer, scratch / folder.TOKENIZER)
        meta.write(scratch)
        folder.seal(scratch, checksums)
        self._check_lease()
        folder.remove(final)
        folder.publish(scratch, final)
        try:
            folder.retain(self._dir, self._settings.keep, self._settings.keep_every)
        except OSError as error:
            # The new one is whole all the same.
            self._say(f"warning: a checkpoint beyond checkpoint.keep cannot be removed: {error}")

    def _check_lease(self) -> None:
        if self._lease and (other := self._lease.lost_to()):
            raise RunError(f"{self._dir} was taken over by {other}")

    def _on_first(self, work: Callable[[], None]) -> None:
        self._together(lambda: work() if self._rank == 0 else None)

    def _together(self, work: Callable[[], T]) -> list[T]:
        """What `work` returns on each rank; raises on every rank what it raises on one."""
        result, problem = None, ""
        try:
            result = work()
        except Exception as error:
            problem = _reason(error)
        found: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(found, (problem, result), group=self.group)
        for rank, (problem, _) in enumerate(found):
            if problem:
                raise RunError(problem if rank == 0 else f"rank {rank}: {problem}")
        return [result for _, result in found]


def _reason(error: BaseException) -> str:
    """The first line of what went wrong, of the first rank where it did."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (cause, _) = min(error.failures.items())
        return f"rank {rank}: {_reason(cause)}"
    text = str(error).strip().partition("\n")[0]
    return text if isinstance(error, (OSError, RunError)) and text else f"{type(error).__name__}: {text}"
