"""Writes the checkpoints of a run in a background thread."""

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
from megatron_mea.checkpoint.tensors import Fragment, copy_fragment, write_fragments
from megatron_mea.config.schema import Checkpoint
from megatron_mea.data.begin_token import fit_to_documents
from megatron_mea.data.tokenizer import copy_tokenizer
from megatron_mea.errors import RunError
from megatron_mea.outputs import make_folder
from megatron_mea.run_folder import RunFolder

T = TypeVar("T")
_CPU = torch.device("cpu")


class Saver:
    """Copies this rank's fragments, and writes them in a thread while training continues; every rank has one.

    The threads have a process group of their own, so that training never waits for them. What fails on one rank fails
    on all, and is raised by the next `wait` or `save`.

    Args:
        run_dir: the run folder.
        settings: the section `checkpoint`.
        tokenizer: the folder that every checkpoint gets a copy of.
        begins: make the copy put a begin token before a text, or nothing; None: as it does.
        group: gloo process group of all ranks, for the threads only.
        lease: of the run folder, on rank 0; None elsewhere.
        log: prints a line, on rank 0.
    """

    def __init__(
        self,
        *,
        run_dir: Path,
        settings: Checkpoint,
        tokenizer: Path,
        group: Any,
        lease: Lease | None,
        log: Callable[[str], None],
        begins: bool | None = None,
    ) -> None:
        self._dir, self._settings, self._tokenizer, self._begins = run_dir, settings, tokenizer, begins
        self.group, self._lease, self._log = group, lease, log
        self._rank = dist.get_rank(group)
        self._device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else _CPU
        self._buffers: dict[str, torch.Tensor] = {}
        self._thread: threading.Thread | None = None
        self._failure: RunError | None = None
        self.seconds: float | None = None
        """Seconds that the last checkpoint took, from its copy to its name."""

    @property
    def failed(self) -> bool:
        """Whether a checkpoint could not be written; becomes true on all ranks, not at the same moment."""
        return self._failure is not None

    def save(self, metadata: folder.CheckpointMetadata, fragments: Iterable[Fragment]) -> None:
        """Saves a checkpoint once the previous one is written; returns after the copy, or without `async_save` after
        the write.

        Raises:
            RunError: this checkpoint, or the previous one, could not be written.
        """
        self.wait()
        start = time.monotonic()
        copies = [copy_fragment(fragment, self._buffer(fragment)) for fragment in fragments]
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()

        self._thread = threading.Thread(target=self._write_or_fail, args=(metadata, copies, start), name="saver")
        self._thread.start()
        if not self._settings.async_save:
            self.wait()

    def wait(self) -> None:
        """Waits until the checkpoint that is being written is complete.

        Raises:
            RunError: it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            raise self._failure

    def _buffer(self, fragment: Fragment) -> torch.Tensor:
        """Host memory for a copy of the fragment, reused by every save."""
        values = fragment.values
        if fragment.name not in self._buffers:
            self._buffers[fragment.name] = torch.empty(len(values), dtype=values.dtype, pin_memory=values.is_cuda)

        return self._buffers[fragment.name]

    def _write_or_fail(self, metadata: folder.CheckpointMetadata, copies: list[Fragment], start: float) -> None:
        """Body of the thread: writes a checkpoint, or keeps the failure for `wait`."""
        final = RunFolder(self._dir).checkpoints / folder.folder_name(metadata.step)
        token: list[str | None] = [self._lease.token if self._lease else None]
        scratch = final
        try:
            if self._device.type == "cuda":
                # A new thread uses GPU 0, whichever its rank has.
                torch.cuda.set_device(self._device)

            dist.broadcast_object_list(token, src=0, group=self.group)
            scratch = final.with_name(f".tmp-{final.name}-{token[0]}")
            size = self._write(scratch=scratch, final=final, metadata=metadata, copies=copies)
        except (Exception, CheckpointException) as error:
            reason = _failure_reason(error)
            self._failure = RunError(f"the checkpoint of step {metadata.step} could not be written: {reason}")
            self._failure.__cause__ = error
            if self._rank == 0 and scratch != final:
                shutil.rmtree(scratch, ignore_errors=True)
            return

        self.seconds = time.monotonic() - start
        self._log(f"saved step {metadata.step}: {size / 1e6:,.1f} MB in {self.seconds:.1f} s")

    def _write(self, *, scratch: Path, final: Path, metadata: folder.CheckpointMetadata, copies: list[Fragment]) -> int:
        """Writes a scratch folder and publishes it as `final`; returns the bytes of all ranks' tensors. Collective."""
        size = sum(self._gather_or_raise(lambda: sum(copy.values.nbytes for copy in copies)))
        self._on_rank_0(lambda: self._create_scratch(scratch, size))
        write_fragments(folder=scratch, fragments=copies, group=self.group)

        # Each rank reads the files that it has written, which its host still has in memory.
        checksums_by_rank = self._gather_or_raise(
            lambda: {path.name: folder.sha256(path) for path in scratch.glob(f"__{self._rank}_*")}
        )
        checksums = {name: digest for rank_checksums in checksums_by_rank for name, digest in rank_checksums.items()}
        self._on_rank_0(lambda: self._publish(scratch=scratch, final=final, metadata=metadata, checksums=checksums))
        return size

    def _create_scratch(self, scratch: Path, size: int) -> None:
        """Creates the scratch folder, if the disk has room for `size` bytes of tensors."""
        self._check_lease()
        make_folder(scratch.parent)
        scratch.mkdir()
        free, needed = shutil.disk_usage(scratch).free, size + folder.OVERHEAD_BYTES
        if free < needed:
            raise OSError(f"{scratch.parent} has {free / 1e9:,.3f} GB free, and it needs {needed / 1e9:,.3f} GB")

    def _publish(
        self, *, scratch: Path, final: Path, metadata: folder.CheckpointMetadata, checksums: dict[str, str]
    ) -> None:
        """Adds all other files to the scratch folder, seals it, and gives it its name; removes old checkpoints."""
        copy_tokenizer(self._tokenizer, scratch / folder.TOKENIZER)
        if self._begins is not None:
            fit_to_documents(scratch / folder.TOKENIZER, begins=self._begins)

        metadata.write(scratch)
        folder.seal(scratch, checksums)

        self._check_lease()
        folder.remove(final)
        folder.publish(scratch, final)

        try:
            folder.retain(run_dir=self._dir, keep=self._settings.keep, keep_every=self._settings.keep_every)
        except OSError as error:
            # The new checkpoint is complete all the same.
            self._log(f"warning: a checkpoint beyond checkpoint.keep cannot be removed: {error}")

    def _check_lease(self) -> None:
        if self._lease and (new_holder := self._lease.new_holder()):
            raise RunError(f"{self._dir} was taken over by {new_holder}")

    def _on_rank_0(self, function: Callable[[], None]) -> None:
        """Calls `function` on rank 0; raises RunError on every rank where it fails. Collective."""
        self._gather_or_raise(lambda: function() if self._rank == 0 else None)

    def _gather_or_raise(self, function: Callable[[], T]) -> list[T]:
        """The results of `function`, by rank; raises RunError on every rank where it fails on one. Collective."""
        result, problem = None, ""
        try:
            result = function()
        except Exception as error:
            problem = _failure_reason(error)

        outcomes: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(outcomes, (problem, result), group=self.group)
        for rank, (problem, _) in enumerate(outcomes):
            if problem:
                raise RunError(problem if rank == 0 else f"rank {rank}: {problem}")

        return [result for _, result in outcomes]


def _failure_reason(error: BaseException) -> str:
    """The first line of an error, of the first rank that failed where ranks failed together."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (cause, _) = min(error.failures.items())
        return f"rank {rank}: {_failure_reason(cause)}"

    text = str(error).strip().partition("\n")[0]
    return text if isinstance(error, (OSError, RunError)) and text else f"{type(error).__name__}: {text}"
