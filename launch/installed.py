"""Exit status 0 where this checkout and all that it needs is installed: python launch/installed.py [EXTRA ...]"""

import sys
from importlib.metadata import PackageNotFoundError, distribution, requires
from pathlib import Path

from packaging.requirements import Requirement

try:
    import megatron_mea

    here = Path(megatron_mea.__file__).resolve().parents[1] == Path(__file__).resolve().parents[1]
    extras = sys.argv[1:]
    for text in requires("megatron-mea") or []:
        need = Requirement(text)
        wanted = need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in ["", *extras])
        if wanted and not need.specifier.contains(distribution(need.name).version, prereleases=True):
            raise PackageNotFoundError(need.name)
except (ImportError, PackageNotFoundError):
    sys.exit(1)
sys.exit(0 if here else 1)
