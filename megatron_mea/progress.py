"""Progress bars for long commands."""

from __future__ import annotations

import sys
from typing import Any


def progress_bar(*arguments: Any, **settings: Any) -> Any:
    """tqdm on stderr; in a log file a line every half minute rather than every second."""
    from tqdm import tqdm

    pace = {"mininterval": 1.0} if sys.stderr.isatty() else {"mininterval": 30.0, "delay": 30.0}
    return tqdm(*arguments, **pace, **settings)
