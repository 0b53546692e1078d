"""Bounds on what reading something foreign may take: a second of this thread, and 500 MB beyond what is there."""

from __future__ import annotations

import resource
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager

MEGABYTES = 500
PEAK_MEMORY = """
import re
from pathlib import Path

def peak_memory():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""
"""Source text for a script of its own process: its peak in kB.

That of getrusage begins with the peak of the process that started it, so it shows no growth below that.
"""


@contextmanager
def within_limits(seconds: float = 1.0) -> Iterator[None]:
    """Runs a block with 500 MB of address space beyond today's, and fails where this thread takes longer.

    An allocation beyond that raises MemoryError, also one that would never be touched. Import what the block needs
    before: libraries do not count.
    """
    old = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as stream:
        in_use = int(stream.read().split()[0]) * resource.getpagesize()

    resource.setrlimit(resource.RLIMIT_AS, (in_use + (MEGABYTES << 20), old[1]))
    begin = time.thread_time()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)

    taken = time.thread_time() - begin
    assert taken < seconds, f"{taken:.2f} s"


@contextmanager
def traced_memory_below(limit: int) -> Iterator[None]:
    """Runs a block, and fails where Python's allocations in it exceed `limit` bytes at any time."""
    tracemalloc.start()
    try:
        yield
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()

    assert peak < limit, f"{peak:,} bytes"
