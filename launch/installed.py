"""Exit status 0 where this checkout and all that it needs is installed: python launch/installed.py [EXTRA ...]"""

import sys
from importlib.metadata import distribution, requires
from pathlib import Path


def is_installed(extras: list[str]) -> bool:
    """Whether the package that imports is this checkout, and all its requirements have a version that it allows.

    Raises:
        ImportError: a package is absent.
    """
    from packaging.requirements import Requirement

    import megatron_mea

    for text in requires("megatron-mea") or []:
        requirement = Requirement(text)
        marker = requirement.marker
        applies = marker is None or any(marker.evaluate({"extra": extra}) for extra in ["", *extras])
        if not applies:
            continue

        version = distribution(requirement.name).version
        if not requirement.specifier.contains(version, prereleases=True):
            return False

    return Path(megatron_mea.__file__).resolve().parents[1] == Path(__file__).resolve().parents[1]


try:
    sys.exit(0 if is_installed(sys.argv[1:]) else 1)
except ImportError:  # also what a missing distribution raises
    sys.exit(1)
