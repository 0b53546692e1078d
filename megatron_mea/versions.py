"""Versions of what decides on numbers: a part of every checkpoint."""

from __future__ import annotations

import contextlib
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from megatron_mea import __version__


def versions() -> dict[str, str]:
    """Versions of this package and of what decides on numbers, and the git revision where there is one."""
    found = {"megatron_mea": __version__}
    for name in ("torch", "deepspeed", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    root = Path(__file__).resolve().parents[1]
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
        found["git"] = "unknown"
        # The program may be missing, in a container for example.
        with contextlib.suppress(OSError):
            revision = subprocess.run(command, capture_output=True, text=True, check=False)
            found["git"] = revision.stdout.strip() or "unknown"
    return found
