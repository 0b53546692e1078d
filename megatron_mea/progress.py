"""Progress bars for long commands."""

from __future__ import annotations

import sys
from typing import Any


def progress_bar(*arguments: Any, **settings: Any) -> Any:
    """tqdm on stderr: updated every second on a terminal, every 30 seconds in a log file."""
    from tqdm import tqdm

    intervals = {"mininterval": 1.0} if sys.stderr.isatty() else {"mininterval": 30.0, "delay": 30.0}
    return tqdm(*arguments, **intervals, **settings)
