"""Versions of the packages that decide the numerical results of a run, for the metadata of its checkpoints."""

from __future__ import annotations

import contextlib
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from megatron_mea import __version__


def versions() -> dict[str, str]:
    """Versions of this package, torch, DeepSpeed and transformers ("absent" where missing), and the git revision."""
    installed = {"megatron_mea": __version__}
    for name in ("torch", "deepspeed", "transformers"):
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            installed[name] = "absent"

    root = Path(__file__).resolve().parents[1]
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
        installed["git"] = "unknown"
        # The program may be missing, in a container for example.
        with contextlib.suppress(OSError):
            revision = subprocess.run(command, capture_output=True, text=True, check=False)
            installed["git"] = revision.stdout.strip() or "unknown"

    return installed
