"""The `sweep` verb: one run a combination of variant, learning rate and seed, here or as a SLURM array."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from megatron_mea import failures
from megatron_mea.checkpoint.run_config import load_run_config
from megatron_mea.config import Config, dump_config
from megatron_mea.config.load import complete_config, load_config, read_tree
from megatron_mea.config.variants import LATENT_KEYS, LATENT_SUFFIX, VARIANTS
from megatron_mea.errors import RunError, UserError
from megatron_mea.inputs import read_last_json_line
from megatron_mea.outputs import disk_errors, make_folder, reserve_output, write_file
from megatron_mea.printing import show
from megatron_mea.run_folder import RunFolder
from megatron_mea.slurm import scheduler
from megatron_mea.slurm.job_files import job_files, record_jobs
from megatron_mea.slurm.resources import Resources, check_resources
from megatron_mea.slurm.script import Site, render
from megatron_mea.slurm.submit import check_run, template_values
from megatron_mea.training.startup import read_run_state

_POLL_SECONDS = 0.2


def combinations(
    *,
    path: str,
    overrides: Sequence[str],
    variants: Sequence[str],
    learning_rates: Sequence[str],
    seeds: Sequence[str],
    out: Path,
) -> tuple[list[Config], list[str]]:
    """A configuration a run, in folders of `out` that are named after what differs, and the lines of `load_run_config`.

    An empty sequence leaves the value of the file.

    Args:
        variants: as `Model.variant_label`.

    Raises:
        UserError: a combination is no valid configuration, or two are the same.
    """
    variants = variants or [load_config(path, overrides).model.variant_label]
    rates = learning_rates or [str(load_config(path, [*overrides, *_variant_settings(variants[0])]).optimizer.lr)]
    configs: dict[tuple[str, float, int], Config] = {}
    lines = []
    for variant, rate, seed in itertools.product(variants, rates, seeds or [""]):
        name = f"{variant}-lr{rate}" + (f"-seed{seed}" if seed else "")
        settings = [*_variant_settings(variant), f"optimizer.lr={rate}", f"run.dir={out / name}"]
        settings += [f"training.seed={seed}"] if seed else []
        config, inherited = load_run_config(path, [*overrides, *settings])
        lines += [f"{name}: {line}" for line in inherited]
        # 1e-3 and 0.001 are the same.
        key = (config.model.variant_label, config.optimizer.lr, config.training.seed)
        if key in configs:
            raise UserError(
                where="sweep", got=f"{Path(configs[key].run.dir).name} and {name}", expected="each combination once"
            )
        configs[key] = config

    return list(configs.values()), lines


def _variant_settings(label: str) -> list[str]:
    """Overrides that make a variant of a file which may have sizes of others: a variant reads its own alone."""
    variant = label.removesuffix(LATENT_SUFFIX)
    is_latent = label != variant
    settings = [f"model.attention_variant={variant}", f"model.hlc_form={'latent' if is_latent else 'head'}"]
    if is_latent or (variant in VARIANTS and not VARIANTS[variant].combines_kv):
        settings.append("model.num_component_heads=null")
    if is_latent:
        settings += ["model.hlc_init=block", "model.hlc_mixes=both"]
    else:
        settings += [f"model.{key}=null" for key in LATENT_KEYS]

    return settings


def run_here(configs: Sequence[Config], at_once: int = 1) -> str:
    """Trains runs on this machine, each in a process of its own, and skips those that have ended.

    A run that diverges is a result. What each prints goes to `train.log` in its folder.

    Args:
        at_once: runs that may run at the same time; they share the cores, and take the GPUs in turn.

    Raises:
        UserError: one has a folder that is none, or is finished with other settings; nothing was trained.
        RunError: some failed; the others were trained all the same.
        ValueError: `at_once` is below 1.
    """
    if at_once < 1:
        raise ValueError(f"at_once is {at_once}; expected 1 and more")

    # All of them before the first is trained, which may take days.
    has_ended = {config.run.dir: _has_ended(config) for config in configs}
    with reserve_output(Path(configs[0].run.dir).parent, folder=True):
        pass

    pending = deque(config for config in configs if not has_ended[config.run.dir])
    slots: list[_SweepRun | None] = [None] * min(at_once, len(pending))
    failed, done, start = [], 0, time.monotonic()
    count = len(pending)
    log = RunFolder(configs[0].run.dir).train_log.name
    show(f"{len(configs)} runs, {len(configs) - count} of them done before; each writes {log}")
    try:
        while pending or any(slots):
            for slot, run in enumerate(slots):
                if run is not None and run.process.poll() is not None:
                    done, slots[slot], failure = done + 1, None, run.failure()
                    failed += [f"{run.folder.path}: {failure}"] if failure else []
                    time_left = _format_time((time.monotonic() - start) / done * (count - done))
                    show(f"run {done} of {count}: {run.folder.path} {run.result()} | {time_left} left")
                if slots[slot] is None and pending:
                    slots[slot] = _SweepRun(config=pending.popleft(), slot=slot, slots=len(slots))
            time.sleep(_POLL_SECONDS)
    except BaseException:
        # Asked to stop, or the disk refused something: the runs in hand save.
        for run in filter(None, slots):
            run.process.send_signal(signal.SIGTERM)
        for run in filter(None, slots):
            run.process.wait()
        raise

    if failed:
        raise RunError("\n  ".join([f"{len(failed)} of {len(configs)} runs failed:", *failed]))

    return f"{len(configs)} runs are done: megatron-mea report {Path(configs[0].run.dir).parent} --out report.html"


class _SweepRun:
    """A run of this machine, in a process of its own."""

    def __init__(self, *, config: Config, slot: int, slots: int) -> None:
        self.folder = folder = RunFolder(config.run.dir)
        with disk_errors(folder.path):
            make_folder(folder.slurm)
            write_file(folder.job_config, dump_config(config))
            for file in (folder.failure_note, folder.failed):
                file.unlink(missing_ok=True)

            log = folder.train_log.open("ab")

        with log:
            command = [sys.executable, "-m", "megatron_mea", "train", str(folder.job_config)]
            note = {failures.FAILURE_FILE_VARIABLE: str(folder.failure_note)}
            environment = os.environ | _slot_environment(slot, slots) | note
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)

    def failure(self) -> str | None:
        """Why it failed, which is left in the folder too; None where it did not."""
        folder = self.folder
        if self.process.returncode == 0 or folder.diverged.exists():
            return None

        note = folder.failure_note.read_text() if folder.failure_note.exists() else ""
        reason = note.partition("\n")[2].strip() or f"status {self.process.returncode}; see {folder.train_log}"
        try:
            write_file(folder.failed, json.dumps({"status": self.process.returncode, "reason": reason}) + "\n")
        except OSError as error:
            # The other runs go on, and the reason is told at the end.
            reason += f" ({folder.failed} cannot be written: {error.strerror})"
        return reason

    def result(self) -> str:
        """How the run ended, with its last losses, for people."""
        for mark in (self.folder.diverged, self.folder.failed):
            if mark.exists():
                return mark.name.lower()

        try:
            row = read_last_json_line(self.folder.metrics)
            losses = [f"{key.replace('_', ' ')} {row[key]:.4f}" for key in ("loss", "validation_loss") if key in row]
            return ", ".join([f"at step {row['step']:d}", *losses])
        except (OSError, ValueError, KeyError, TypeError, OverflowError):
            return "ended"


def _has_ended(config: Config) -> bool:
    """Whether a run is finished, or diverged with these very settings: it would do so again."""
    if read_run_state(config).finished_step is not None:
        return True

    folder = RunFolder(config.run.dir)
    if not (folder.diverged.exists() and folder.job_config.is_file()):
        return False

    # An older program wrote fewer keys.
    return complete_config(read_tree(folder.job_config)) == config.model_dump(mode="json")


def _slot_environment(slot: int, slots: int) -> dict[str, str]:
    """Environment variables of a run on this machine: its share of the threads, and a GPU where there are some."""
    # Not before all runs have been checked: it takes seconds.
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // slots)))}
    gpus = torch.cuda.device_count()
    if gpus and slots > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(gpu) for gpu in range(gpus)]
        share["CUDA_VISIBLE_DEVICES"] = names[slot % gpus]

    return share


def _format_time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def submit_array(
    *, configs: Sequence[Config], out: Path, resources: Resources, at_once: int | None, dry_run: bool
) -> str:
    """Submits the runs that have not ended as the elements of a SLURM array; returns what to print.

    Args:
        at_once: elements that may run at the same time; None: as many as the cluster lets.

    Raises:
        UserError: a run or the resources would fail; nothing was submitted.
    """
    remaining = [config for config in configs if not _has_ended(config)]
    if not remaining:
        return f"all {len(configs)} runs are done"

    warnings = list(dict.fromkeys(line for config in remaining for line in check_run(config, resources)[2]))
    site, path = Site.read(), RunFolder(out.resolve()).array_script
    options, more_warnings = check_resources(
        configs=remaining, resources=resources, site=site, needs_scheduler=not dry_run
    )
    values = template_values(configs=remaining, resources=resources, script=path, log="%A_%a.log")
    runs = [str(Path(config.run.dir).resolve()) for config in remaining]
    values |= {
        "ARRAY": f"0-{len(runs) - 1}" + (f"%{at_once}" if at_once else ""),
        "RUNS": runs,
        "STEPS": remaining[0].steps,
    }
    script = render(name=path.name, site=site, options=options, values=values)
    warning_lines = [f"warning: {line}" for line in [*warnings, *more_warnings]]
    if dry_run:
        return "\n".join([script, *(f"# {line}" for line in warning_lines)])

    expected = scheduler.check_script(script)
    with job_files(configs=remaining, path=path, script=script) as jobs:
        jobs.append(job := scheduler.submit(str(path)))
        for index, config in enumerate(remaining):
            record_jobs(config, [f"{job}_{index}"])

    lines = [f"Submitted batch job {job}", *warning_lines]
    lines += [f"  {job}_{index}  {run}" for index, run in enumerate(runs)]
    lines += [
        f"  scheduler     {expected}",
        f"  logs          {path.parent}/{job}_*.log",
        f"  state         squeue --array --job {job}",
        f"  save, stop    scancel --batch --signal=USR1 {job}_0",
        f"  cancel        scancel {job}",
    ]
    return "\n".join(lines)
