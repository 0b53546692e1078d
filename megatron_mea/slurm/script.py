"""Job scripts: templates that install with the package, filled in with the values of a site and a submission."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mea.errors import UserError

_PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")
_PACKAGE_FOLDER = Path(__file__).parents[1]
_SITE_VARIABLES = ("PARTITION", "ACCOUNT", "QOS", "CPUS_PER_TASK", "PYTHON")


@dataclass(frozen=True, kw_only=True)
class Site:
    """Values of site.env; empty strings where it leaves a choice."""

    path: Path
    partition: str
    account: str
    qos: str
    cpus_per_task: str
    python: str

    @classmethod
    def read(cls) -> Site:
        """Runs site.env in bash and reads its variables.

        Raises:
            UserError: bash ends with an error, or a value has several lines.
        """
        path = find_template("site.env")
        _read_template(path)
        variables = " ".join(f'"${{{name}:-}}"' for name in _SITE_VARIABLES)
        script = f'. "$1" >&2 && printf "%s\\n" {variables}'
        completed = subprocess.run(
            ["bash", "-c", script, "bash", str(path)],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
        )

        values = completed.stdout.split("\n")
        if completed.returncode or len(values) != len(_SITE_VARIABLES) + 1:
            raise UserError(
                where=str(path),
                got=completed.stderr.strip() or "values of several lines",
                expected="bash that sets values",
            )

        return cls(path=path, **dict(zip(map(str.lower, _SITE_VARIABLES), values, strict=False)))

    @property
    def options(self) -> list[str]:
        """Options for sbatch; where site.env leaves a choice those of the environment's SBATCH_..."""
        site_values = {"partition": self.partition, "account": self.account, "qos": self.qos, "reservation": ""}
        values = {name: value or os.environ.get(f"SBATCH_{name.upper()}", "") for name, value in site_values.items()}
        return [f"--{name}={value}" for name, value in values.items() if value]


def find_template(name: str) -> Path:
    """The file of that name in ./launch/, else the installed one.

    Raises:
        UserError: there is none.
    """
    # A checkout has them beside the package, a wheel within.
    for folder in (Path("launch"), _PACKAGE_FOLDER / "launch", _PACKAGE_FOLDER.parent / "launch"):
        if (folder / name).is_file():
            return folder / name

    raise UserError(
        where=f"launch/{name}",
        got="no such file",
        expected="the file that comes with megatron_mea",
        hint="install it again",
    )


def render(*, name: str, site: Site, options: Sequence[str], values: Mapping[str, Any]) -> str:
    """A complete job script: the template with its `{{NAME}}` replaced, site.env and job.sh in it.

    Args:
        options: more options for sbatch, a line each.
        values: by placeholder; they are quoted for bash below the header, and for sbatch within it.

    Raises:
        UserError: a value has control characters, or a template has an unknown placeholder, no #! line, DOS line ends,
            or an #SBATCH line that sbatch would not read.
    """
    _check_values(options, values)
    path, job_path = find_template(name), find_template("job.sh")
    site_text = f"{_read_template(site.path).rstrip()}\nPYTHON=${{PYTHON:-{shlex.quote(sys.executable)}}}"
    blocks = {
        "OPTIONS": "\n".join(f"#SBATCH {option}" for option in options),
        "SITE": f"\n# ---- {site.path}\n{site_text}\n",
        "JOB": f"# ---- {job_path}\n{_read_template(job_path).rstrip()}",
    }

    def fill(match: re.Match[str]) -> str:
        key = match[1]
        if key in blocks:
            return blocks[key]
        if key not in values:
            allowed = ", ".join(sorted({*blocks, *values}))
            raise UserError(where=str(path), got=match[0], expected=f"these names in double braces: {allowed}")

        value = values[key]
        return " ".join(map(shlex.quote, value)) if isinstance(value, list) else shlex.quote(str(value))

    script = _PLACEHOLDER.sub(fill, _read_template(path))
    _check_script(path, script)
    return script.rstrip() + "\n"


def _check_values(options: Sequence[str], values: Mapping[str, Any]) -> None:
    """Raises UserError for control characters: behind a line's end stands a command, and a terminal runs escapes."""
    texts = [("an option for sbatch", option) for option in options]
    for name, value in values.items():
        texts += [(name, str(part)) for part in (value if isinstance(value, list) else [value])]

    for where, text in texts:
        if any(unicodedata.category(character) == "Cc" for character in text):
            expected = "text without line ends and other control characters"
            raise UserError(where=where, got=ascii(text), expected=expected)


def _read_template(path: Path) -> str:
    """Text of a template.

    Raises:
        UserError: it is not UTF-8, has a here-document, which would swallow what follows in the script, or DOS line
            ends, which Python would convert silently and bash would not.
    """
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise UserError(where=str(path), got=f"not UTF-8: {error.reason}", expected="UTF-8 text") from None

    if path.name == "site.env" and re.search(r"^[^#]*<<", text, re.MULTILINE):
        raise UserError(where=str(path), got="a here-document (<<)", expected="bash that sets values in lines")
    if "\r" in text:
        raise UserError(where=str(path), got="DOS line ends", expected="UNIX ones", hint=f"sed -i 's/\\r$//' {path}")

    return text


def _check_script(path: Path, script: str) -> None:
    """Raises UserError for errors that sbatch does not report: it accepts such scripts and drops lines silently."""
    if not script.startswith("#!"):
        raise UserError(where=str(path), got=script.partition("\n")[0], expected="#!/bin/bash in the first line")

    first_command = None
    for number, line in enumerate(script.splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            first_command = first_command or number
        elif first_command and line.startswith("#SBATCH"):
            got = f"{line!r} in line {number}, after the first command in line {first_command}"
            raise UserError(
                where=str(path), got=got, expected="#SBATCH lines before the first command: sbatch reads no other"
            )
