"""Exit status 0 where this checkout and all that it needs is installed: python launch/installed.py [EXTRA ...]"""

import sys
from importlib.metadata import distribution, requires
from pathlib import Path


def installed(extras: list[str]) -> bool:
    from packaging.requirements import Requirement

    import megatron_mea

    for text in requires("megatron-mea") or []:
        need = Requirement(text)
        wanted = need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in ["", *extras])
        if wanted and not need.specifier.contains(distribution(need.name).version, prereleases=True):
            return False
    return Path(megatron_mea.__file__).resolve().parents[1] == Path(__file__).resolve().parents[1]


try:
    sys.exit(0 if installed(sys.argv[1:]) else 1)
except ImportError:  # also what a missing distribution raises
    sys.exit(1)
