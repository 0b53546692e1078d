"""The packages' order: each imports from those below it, lazy imports included; `exported/` imports nothing of ours.

And the names that one module alone writes down: the files of a run.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.runs import ROOT

from megatron_mea.run_folder import RunFolder

PACKAGE = ROOT / "megatron_mea"
ROWS = (
    ("exported", "__version__"),
    ("errors", "printing", "progress", "versions"),
    ("failures", "inputs", "outputs"),
    ("run_folder",),
    ("config", "console"),
    ("data",),
    ("parallel",),
    ("attention", "optimizers"),
    ("model",),
    ("checkpoint",),
    ("huggingface",),
    ("compression", "plan", "training"),
    ("slurm",),
    ("experiments",),
    ("parser",),
    ("arguments",),
    ("cli",),
    ("__main__",),
)
"""From the ground floor up, as docs/images/packages.svg draws them."""
HEIGHT = {name: row for row, names in enumerate(ROWS) for name in names}
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
TRAVELS = [name for name in FILES if name.startswith("exported/") and not name.endswith("__init__.py")]


def imported_modules(file: str) -> Iterator[str]:
    """Absolute names of the modules that a file imports, wherever in it."""
    here = ["megatron_mea", *Path(file).with_suffix("").parts]
    for node in ast.walk(ast.parse((PACKAGE / file).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(here[: -node.level]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            # `from megatron_mea.checkpoint import folder` may import a module.
            yield from (f"{module}.{alias.name}" for alias in node.names)


def names_of_ours(file: str) -> set[str]:
    """Packages and top-level modules of ours that a file imports."""
    ours = (module.split(".") for module in imported_modules(file) if module.startswith("megatron_mea."))
    return {parts[1] for parts in ours}


@pytest.mark.parametrize("file", [name for name in FILES if name != "__init__.py"])
def test_imports_run_downwards(file):
    importer = Path(file).parts[0].removesuffix(".py")
    for name in names_of_ours(file) - {importer}:
        assert HEIGHT[name] < HEIGHT[importer], f"{file} imports {name}, which stands beside or above {importer}"


@pytest.mark.parametrize("file", TRAVELS)
def test_what_travels_imports_torch_and_transformers_alone(file):
    siblings = {Path(name).stem for name in TRAVELS}
    for module in imported_modules(file):
        first, *rest = module.split(".")
        if first == "megatron_mea":
            assert rest[0] == "exported"
            assert rest[1] in siblings
        else:
            assert first in {"torch", "transformers"} or first in sys.stdlib_module_names, module


def test_every_package_has_a_row_and_a_folder_of_tests():
    packages = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert packages | modules | {"__version__"} == set(HEIGHT)
    assert packages <= {path.name for path in (ROOT / "tests").iterdir()}


def run_file_names() -> set[str]:
    """Names of files and folders in a run folder, those in its slurm/ included."""
    entries = [name for name, value in vars(RunFolder).items() if isinstance(value, property) and name != "marks"]
    names = {part for name in entries for part in getattr(RunFolder("/"), name).parts[1:]}
    return names | {RunFolder("/").preflight_marker("").name}


@pytest.mark.parametrize("file", [name for name in FILES if name != "run_folder.py"])
def test_only_run_folder_names_the_files_of_a_run(file):
    """In paths, messages and help; docstrings may speak of them, and examples of command lines (runs/...)."""
    tree = ast.parse((PACKAGE / file).read_text())
    docstrings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and node not in docstrings]
    for text in (node.value for node in constants if isinstance(node.value, str)):
        names = run_file_names() & set(re.split(r"[\s/,;:()*'\"]+", text))
        if " " in text:
            # A sentence may speak of checkpoints and jobs.
            names = {name for name in names if not name.isalpha() or name.isupper()}
        assert not names or text.startswith("runs/"), f"{file} has {text!r}"
