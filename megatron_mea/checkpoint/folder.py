"""Checkpoint folders on disk: their files, their integrity, and the list of those of a run.

step_00001000/
    __R_0.distcp, .metadata    global tensors by name, torch.distributed.checkpoint: NAME is the float32 master
                               weight, exp_avg.NAME and exp_avg_sq.NAME are its moments; written by rank R.
                               An imported checkpoint has no moments
    meta.json                  format version, step, samples, tokens, configuration, data fingerprint, layout, versions,
                               origin
    tokenizer/                 the tokenizer folder of the run
    generation_config.json     of an imported checkpoint, where its source has one
    COMPLETE                   written last: format version, and the SHA-256 of every other file
    PINNED                     empty; `checkpoint.keep` does not remove a checkpoint that has it

A folder gets its name by a rename when everything in it is on disk, so it is complete or absent.
`.metadata` is a pickle, which `index.read_index` reads without running what a stranger may have put there.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_mea import __version__
from megatron_mea.errors import UserError, shorten
from megatron_mea.inputs import read_json_object
from megatron_mea.outputs import flush
from megatron_mea.outputs import publish as publish
from megatron_mea.run_folder import RunFolder

if TYPE_CHECKING:
    from megatron_mea.config import Config
    from megatron_mea.config.parallel_dims import ParallelDims

_NAME = re.compile(r"step_(\d{8,})")
COMPLETE, META, TOKENIZER, INDEX = "COMPLETE", "meta.json", "tokenizer", ".metadata"
GENERATION = "generation_config.json"
PINNED = "PINNED"
FORMAT_VERSION = 1
"""Of meta.json and COMPLETE; files without the number are of version 1. It rises where an older program would misread
them."""
_MAX_NAME = 255
OVERHEAD_BYTES = 1 << 20
"""Bytes a checkpoint may need beyond its tensors: metadata, tokenizer."""


def folder_name(step: int) -> str:
    """step_00001000 for step 1000."""
    return f"step_{step:08d}"


def complete_checkpoints(run_dir: str | Path) -> list[tuple[int, Path]]:
    """(step, folder) of the checkpoints of a run that have COMPLETE, oldest first; checksums are not verified."""
    return [(step, folder) for step, folder in all_checkpoints(run_dir) if (folder / COMPLETE).is_file()]


def all_checkpoints(run_dir: str | Path) -> list[tuple[int, Path]]:
    """(step, folder) of all folders with the name of a checkpoint, oldest first; they may be damaged or incomplete."""
    checkpoints = []
    for path in RunFolder(run_dir).checkpoints.glob("step_*"):
        if match := _NAME.fullmatch(path.name):
            checkpoints.append((int(match[1]), path))

    return sorted(checkpoints)


def find_corruption(folder: Path, *, rank: int = 0, world_size: int = 1) -> str | None:
    """The first problem of a checkpoint folder, read against the checksums in COMPLETE; None where it is intact.

    Args:
        rank, world_size: read only this rank's share of the files; the folder is intact if no rank finds a problem.
            The two files that every reader opens are in every share.

    Raises:
        UserError: a newer program wrote the folder.
    """
    try:
        checksums = read_checksums(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "COMPLETE is missing or unreadable"

    read_by_all = (META, INDEX)
    if missing := [name for name in read_by_all if name not in checksums]:
        return f"COMPLETE does not list {missing[0]}"

    for name in checksums:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            return f"COMPLETE lists {name!r}, which is not in the folder"

    others = [name for name in checksums if name not in read_by_all]
    for name in [*read_by_all, *others[rank::world_size]]:
        path = folder / name
        try:
            if not path.is_file():
                return f"{name} is missing"
            digest = sha256(path)
        except OSError as error:
            return f"{name} is unreadable: {error.strerror}"

        if digest != checksums[name]:
            return f"{name} does not match its checksum"

    # Imports torch, which takes longer than the checks above.
    from megatron_mea.checkpoint.index import read_index

    try:
        files = {place.relative_path for place in read_index(folder / INDEX).storage_data.values()}
    except UserError as error:
        return f"{INDEX} is {error.problems[0].got}"

    unlisted = sorted(files - checksums.keys())
    return f"COMPLETE does not list {unlisted[0]}" if unlisted else None


def intact_checkpoints(run_dir: str | Path) -> list[tuple[int, Path]]:
    """(step, folder) of the checkpoints of a run whose meta.json is intact, oldest first; raises as `find_corruption`.

    Damaged ones are quarantined later, when all ranks verify every file.
    """
    return [(step, folder) for step, folder in complete_checkpoints(run_dir) if metadata_is_intact(folder)]


def metadata_is_intact(folder: Path) -> bool:
    """Whether meta.json matches its checksum: the cheap part of `find_corruption`, for start-up; raises as that."""
    try:
        return sha256(folder / META) == read_checksums(folder)[META]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def seal(folder: Path, flushed: Mapping[str, str] | None = None) -> None:
    """Flushes the files of a folder to disk and writes COMPLETE with their checksums, last.

    Args:
        flushed: checksums, by name, of files that their writers have flushed.

    Raises:
        OSError: a file of `flushed` is missing, or the disk refuses.
    """
    checksums = dict(flushed or {})
    for name in checksums:
        if not (folder / name).is_file():
            raise OSError(f"{folder / name} is not there: run.dir must lie on a file system that all nodes share")

    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if name not in checksums:
            flush(path)
            checksums[name] = sha256(path)

    complete = folder / COMPLETE
    complete.write_text(json.dumps({"format_version": FORMAT_VERSION, "sha256": checksums}, indent=1))
    flush(complete)

    for path in [*(path for path in folder.rglob("*") if path.is_dir()), folder]:
        flush(path)


def read_checksums(folder: Path) -> dict[str, str]:
    """SHA-256 by file name, as COMPLETE lists them.

    Raises:
        UserError: a newer program wrote them.
        OSError, ValueError, KeyError, TypeError: COMPLETE is missing or unreadable.
    """
    complete = read_json_object(folder / COMPLETE)
    _check_format(complete, folder / COMPLETE)
    checksums = complete["sha256"]
    if not isinstance(checksums, dict) or not all(isinstance(digest, str) for digest in checksums.values()):
        raise ValueError("checksums that are none")
    # They are printed.
    if strange := [name for name in checksums if not name.isprintable() or not 0 < len(name) <= _MAX_NAME]:
        raise ValueError(f"a file named {shorten(strange[0])}")

    return checksums


def _check_format(contents: dict[str, Any], file: Path) -> None:
    version = contents.get("format_version", 1)
    if type(version) is not int:
        raise ValueError(f"format_version is {version!r}")
    if version > FORMAT_VERSION:
        raise UserError(
            where=str(file),
            got=f"format version {version}",
            expected=f"at most {FORMAT_VERSION}, the newest that megatron_mea {__version__} knows",
            hint="read it with the version that wrote it (meta.json, `versions`), or a newer one",
        )


def quarantine(folder: Path, reason: Literal["damaged", "later"]) -> Path:
    """Renames a checkpoint to `damaged-step_...` or `later-step_...`, which nothing reads; returns the new path."""
    target = folder.with_name(f"{reason}-{folder.name}")
    number = 1
    while target.exists():
        number += 1
        target = folder.with_name(f"{reason}-{folder.name}-{number}")

    try:
        folder.rename(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        # It lies in a lower layer of an overlay, where it can be copied.
        shutil.move(folder, target)

    return target


def retain(*, run_dir: str | Path, keep: int, keep_every: int | None) -> None:
    """Removes all but the newest `keep` checkpoints, multiples of `keep_every` steps, and pinned ones."""
    for step, folder in complete_checkpoints(run_dir)[:-keep]:
        if not ((keep_every and step % keep_every == 0) or (folder / PINNED).exists()):
            remove(folder)


def pin(folder: Path) -> None:
    """Has `retain` keep a checkpoint, until somebody removes the file PINNED in it."""
    (folder / PINNED).touch()


def remove(folder: Path) -> None:
    """Removes a checkpoint, if it exists; if interrupted, leaves a scratch folder that the next start removes."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        scratch = folder.with_name(f".tmp-{folder.name}-removed")
        try:
            folder.rename(scratch)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            # It lies in a lower layer of an overlay. Without COMPLETE half of it is no checkpoint.
            scratch = folder
            (folder / COMPLETE).unlink(missing_ok=True)
            flush(folder)

        flush(folder.parent)
        shutil.rmtree(scratch)


def remove_leftovers(run_dir: str | Path) -> None:
    """Removes the scratch folders of interrupted saves."""
    for scratch in RunFolder(run_dir).checkpoints.glob(".tmp-step_*"):
        shutil.rmtree(scratch, ignore_errors=True)


@dataclass(frozen=True, kw_only=True)
class CheckpointMetadata:
    """The contents of meta.json.

    Args:
        expert_counts: how often each expert was chosen in the step, by layer; empty for a dense model.
        origin: source of imported or compressed weights; such a checkpoint holds no moments, its configuration names
            no data, and its layout is empty. Empty for the checkpoint of a run.
    """

    step: int
    samples: int
    tokens: int
    config: dict[str, Any]
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    versions: dict[str, str]
    validation_loss: float | None
    expert_counts: dict[str, list[int]] = field(default_factory=dict)
    origin: str = ""

    @classmethod
    def of_step(
        cls,
        step: int,
        *,
        config: Config,
        dims: ParallelDims,
        data: list[dict[str, Any]],
        versions: dict[str, str],
        validation_loss: float | None,
        expert_counts: dict[str, list[int]],
    ) -> CheckpointMetadata:
        """The metadata of a run's checkpoint of `step`.

        Args:
            data: the fingerprint of its corpora.
        """
        return cls(
            step=step,
            samples=step * config.training.global_batch_size,
            tokens=step * config.tokens_per_step,
            config=config.model_dump(mode="json"),
            data=data,
            layout={
                "tensor_model_parallel_size": dims.tp,
                "pipeline_model_parallel_size": dims.pp,
                "context_parallel_size": dims.cp,
                "data_parallel_size": dims.dp,
                "zero_stage": config.parallel.zero_stage,
            },
            versions=versions,
            validation_loss=validation_loss,
            expert_counts=expert_counts,
        )

    def write(self, folder: Path) -> None:
        """Writes meta.json into `folder`."""
        contents = {"format_version": FORMAT_VERSION} | vars(self)
        if not self.expert_counts:
            # Programs that know no experts read it.
            del contents["expert_counts"]

        (folder / META).write_text(json.dumps(contents, indent=1))

    @classmethod
    def read(cls, folder: Path) -> CheckpointMetadata:
        """Reads meta.json, the configuration with all keys of this program.

        Raises:
            UserError: the folder holds no readable meta.json, or a newer program wrote it.
        """
        # Where there is no checkpoint, nobody waits for pydantic.
        from pydantic import TypeAdapter

        from megatron_mea.config.load import complete_config

        try:
            contents = read_json_object(folder / META)
            _check_format(contents, folder / META)
            contents.pop("format_version", None)
            if unknown := contents.keys() - cls.__dataclass_fields__.keys():
                raise ValueError(f"an unknown key {min(unknown)!r}")

            # As JSON, since of Python objects a strict check wants the class itself.
            metadata = TypeAdapter(cls).validate_json(json.dumps(contents), strict=True)
            if min(metadata.step, metadata.samples, metadata.tokens) < 0:
                raise ValueError("a negative count")

            sections = metadata.config
            if not {"data", "run"} <= sections.keys() or not all(isinstance(keys, dict) for keys in sections.values()):
                raise TypeError("config is no configuration")
            return replace(metadata, config=complete_config(metadata.config))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                where=str(folder / META), got=f"unreadable ({error})", expected="a checkpoint of this package"
            ) from None


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
