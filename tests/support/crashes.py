"""The trees that a file system may hold after the power failed: states of a recorded sequence of operations.

The model is POSIX at its worst: a file holds what it did at its last fsync, or nothing, or all that was written; each
new name, rename and removal is on disk or not, whatever came before it, until one of its folders is flushed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from support.disk import Observer, Operation
from support.faults import Tree

_MAX_COMBINED = 5
"""Changes of names that are lost in all combinations; of more: each alone, all but each, all before and from each."""


@dataclass(eq=False, kw_only=True)
class _Node:
    """A file or folder, by whatever name.

    Args:
        flushed, written: content of a file at its last fsync, and now.
        names: of a folder, now; None for a file.
        flushed_names: of a folder, on disk.
    """

    flushed: bytes = b""
    written: bytes = b""
    names: dict[str, _Node] | None = None
    flushed_names: dict[str, _Node] = field(default_factory=dict)


_Change = list[tuple[_Node, str, _Node | None]]
"""Names that change together: (folder, name, what it names from then on, or None)."""


class Journal(Observer):
    """Follows the operations below a folder, in which all that is there is on disk.

    Attributes:
        states: every tree that a crash after one of the operations may leave, once.
        last: those after the last operation.
        moments: the trees that a killed process leaves: what there was after each operation.
    """

    def __init__(self, root: Path) -> None:
        self._root, self._pending = _read(root), list[_Change]()
        self.states: dict[tuple, Tree] = {}
        self.last: list[Tree] = []
        self.moments = [self.now()]
        self._add_states()

    def after(self, operation: Operation, content: Callable[[], bytes]) -> None:
        folder, name = self._find(operation.path)
        node = folder if name == "." else folder.names.get(name)
        if operation.kind == "fsync":
            self._flush(node)
        elif operation.kind == "write":
            node.written = content()
        elif operation.kind == "open" and not operation.creates:
            node.written = b"" if operation.truncates else node.written
        elif operation.kind in ("open", "mkdir"):
            self._change([(folder, name, _Node(names={} if operation.kind == "mkdir" else None))])
        elif operation.kind in ("unlink", "rmdir"):
            self._change([(folder, name, None)])
        else:
            target_folder, target = self._find(operation.target)
            removed = [(folder, name, None)] if operation.kind == "rename" else []
            self._change([*removed, (target_folder, target, node)])

        self.moments.append(self.now())
        self._add_states()

    def now(self) -> Tree:
        """The tree without a crash."""
        return {path: _content(node, is_lost=False, empty=False) for path, node in _walk(self._root, None, "")}

    def _find(self, path: str) -> tuple[_Node, str]:
        """The folder of a path, and the name in it."""
        *parents, name = Path(path).parts or (".",)
        node = self._root
        for parent in parents:
            node = node.names[parent]

        return node, name

    def _change(self, change: _Change) -> None:
        self._pending.append(change)
        for folder, name, node in change:
            _set(folder.names, name, node)

    def _flush(self, node: _Node) -> None:
        if node.names is None:
            node.flushed = node.written
            return

        flushed = [change for change in self._pending if any(folder is node for folder, *_ in change)]
        self._pending = [change for change in self._pending if change not in flushed]
        for folder, name, entry in itertools.chain(*flushed):
            _set(folder.flushed_names, name, entry)

    def _add_states(self) -> None:
        self.last = []
        for changes in _combinations(self._pending):
            names = dict[int, dict[str, _Node]]()
            for folder, name, node in itertools.chain(*changes):
                _set(names.setdefault(id(folder), dict(folder.flushed_names)), name, node)

            nodes = dict(_walk(self._root, names, ""))
            files = [node for node in nodes.values() if node.names is None]
            unflushed = [node for node in dict.fromkeys(files) if node.written != node.flushed]
            lost = [set(), set(unflushed), *({node} for node in unflushed)]
            for choice, empty in itertools.product(lost, (False, True)):
                tree = {path: _content(node, is_lost=node in choice, empty=empty) for path, node in nodes.items()}
                self.last.append(self.states.setdefault(tuple(tree.items()), tree))


def _read(path: Path) -> _Node:
    if path.is_file():
        content = path.read_bytes()
        return _Node(flushed=content, written=content)

    names = {entry.name: _read(entry) for entry in path.iterdir()}
    return _Node(names=names, flushed_names=dict(names))


def _set(names: dict[str, _Node], name: str, node: _Node | None) -> None:
    if node is None:
        names.pop(name, None)
    else:
        names[name] = node


def _combinations(changes: list[_Change]) -> Iterator[list[_Change]]:
    """Changes that are on disk: the others are lost."""
    if len(changes) <= _MAX_COMBINED:
        for count in range(len(changes) + 1):
            yield from map(list, itertools.combinations(changes, count))
        return

    for index in range(len(changes) + 1):
        before, one, after = changes[:index], changes[index : index + 1], changes[index + 1 :]
        yield from (before, one + after, one, before + after)


def _walk(folder: _Node, names: dict[int, dict[str, _Node]] | None, prefix: str) -> Iterator[tuple[str, _Node]]:
    """Everything below a folder by its path: with the `names` of some folders and the flushed ones; None: as it is."""
    entries = folder.names if names is None else names.get(id(folder), folder.flushed_names)
    for name, node in sorted((entries or {}).items()):
        yield f"{prefix}{name}", node
        if node.names is not None:
            yield from _walk(node, names, f"{prefix}{name}/")


def _content(node: _Node, *, is_lost: bool, empty: bool) -> bytes | None:
    if node.names is not None:
        return None
    return (b"" if empty else node.flushed) if is_lost else node.written
