"""An encoder for workers of `prepare` that kills its process in the middle of a message to the parent."""

from __future__ import annotations

import os
import struct
import sys


class DyingEncoder:
    """Dies as a lack of memory can make a worker die: the length of a message is sent, and nothing follows."""

    def __call__(self, texts: list[str]) -> tuple:
        frame = sys._getframe()
        while "result_queue" not in frame.f_locals:
            frame = frame.f_back

        os.write(frame.f_locals["result_queue"]._writer.fileno(), struct.pack("!i", 1 << 20))
        os._exit(1)
