"""The job scripts: templates that install with the package, and what a site and a submission put into them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_mea.errors import UserError

_PLACE = re.compile(r"\{\{(\w+)\}\}")
_PACKAGE = Path(__file__).parents[1]
_FIELDS = ("PARTITION", "ACCOUNT", "QOS", "CPUS_PER_TASK", "PYTHON")


@dataclass(frozen=True)
class Site:
    """What site.env says; empty strings where it leaves a choice."""

    path: Path
    partition: str
    account: str
    qos: str
    cpus_per_task: str
    python: str

    @classmethod
    def read(cls) -> Site:
        """Raises UserError where the file is no bash that ends well."""
        path = template("site.env")
        _text(path)
        fields = " ".join(f'"${{{name}:-}}"' for name in _FIELDS)
        script = f'. "$1" >&2 && printf "%s\\n" {fields}'
        done = subprocess.run(["bash", "-c", script, "bash", str(path)], capture_output=True, text=True, check=False)
        values = done.stdout.split("\n")
        if done.returncode or len(values) != len(_FIELDS) + 1:
            raise UserError(str(path), done.stderr.strip() or "values of several lines", "bash that sets values")
        return cls(path, *values[:-1])

    @property
    def options(self) -> list[str]:
        """Of sbatch, also from the SBATCH_... of the environment."""
        given = {"partition": self.partition, "account": self.account, "qos": self.qos, "reservation": ""}
        found = {name: value or os.environ.get(f"SBATCH_{name.upper()}", "") for name, value in given.items()}
        return [f"--{name}={value}" for name, value in found.items() if value]


def template(name: str) -> Path:
    """The file of that name in ./launch/, else the installed one.

    Raises:
        UserError: there is none.
    """
    # A checkout has them beside the package, a wheel within.
    for folder in (Path("launch"), _PACKAGE / "launch", _PACKAGE.parent / "launch"):
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"launch/{name}", "no such file", "the file that comes with megatron_mea", "install it again")


def render(name: str, site: Site, options: Sequence[str], values: Mapping[str, str | int]) -> str:
    """A job script, whole: the template with its `{{NAME}}` replaced, site.env and job.sh in it.

    Args:
        options: more of sbatch, a line each.
        values: by placeholder; quoted for bash below the header, and for sbatch within it.

    Raises:
        UserError: a template has an unknown placeholder, no #! line, DOS line ends, or an #SBATCH line that sbatch
            would not read.
    """
    path = template(name)
    own = f"{_text(site.path).rstrip()}\nPYTHON=${{PYTHON:-{shlex.quote(sys.executable)}}}"
    blocks = {
        "OPTIONS": "\n".join(f"#SBATCH {option}" for option in options),
        "SITE": f"\n# ---- {site.path}\n{own}\n",
        "JOB": f"# ---- {template('job.sh')}\n{_text(template('job.sh')).rstrip()}",
    }

    def fill(match: re.Match[str]) -> str:
        key = match[1]
        if key in blocks:
            return blocks[key]
        if key not in values:
            allowed = ", ".join(sorted({*blocks, *values}))
            raise UserError(str(path), match[0], f"these names in double braces: {allowed}")
        value = values[key]
        return " ".join(map(shlex.quote, value)) if isinstance(value, list) else shlex.quote(str(value))

    script = _PLACE.sub(fill, _text(path))
    _check(path, script)
    return script.rstrip() + "\n"


def _text(path: Path) -> str:
    """Of a template, whose line ends Python would mend without a word, and bash would not."""
    text = path.read_bytes().decode()
    if "\r" in text:
        raise UserError(str(path), "DOS line ends", "UNIX ones", f"sed -i 's/\\r$//' {path}")
    return text


def _check(path: Path, script: str) -> None:
    """What sbatch does not say: it takes some of these scripts, and drops lines without a word."""
    if not script.startswith("#!"):
        raise UserError(str(path), script.partition("\n")[0], "#!/bin/bash in the first line")
    command = None
    for number, line in enumerate(script.splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            command = command or number
        elif command and line.startswith("#SBATCH"):
            found = f"{line!r} in line {number}, after the first command in line {command}"
            raise UserError(str(path), found, "#SBATCH lines before the first command: sbatch reads no other")
