"""What a power cut leaves on a disk: the operations of a program recorded, and what of them is sure to be there.

A file's content is sure after fsync of the file, a name in a folder after fsync of the folder. What is not sure may be
there all the same, most often names before content: both extremes are played.
"""

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from unittest import mock


class Recorder:
    """Records the new folders, renames, removals and fsyncs below `root` while it is entered, in `log`."""

    def __init__(self, root: Path):
        self.root, self.log, self.marks = root, [], {}

    def mark(self, name: int) -> None:
        """Remember by `name` how many operations came before now."""
        self.marks[name] = len(self.log)

    def __enter__(self) -> "Recorder":
        self._patches = [
            mock.patch.object(os, "fsync", self._recording("fsync", os.fsync)),
            mock.patch.object(os, "replace", self._recording("rename", os.replace)),
            mock.patch.object(os, "mkdir", self._recording("mkdir", os.mkdir)),
            mock.patch.object(shutil, "rmtree", self._recording("remove", shutil.rmtree)),
        ]
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        for patch in self._patches:
            patch.stop()

    def _recording(self, kind: str, function):
        def call(first, *others, **options):
            there = kind != "remove" or Path(first).exists()
            function(first, *others, **options)
            path = Path(os.readlink(f"/proc/self/fd/{first}")) if kind == "fsync" else Path(first)
            if not there or not path.is_relative_to(self.root):
                return
            target = Path(others[0]).relative_to(self.root).as_posix() if kind == "rename" else None
            content = path.read_bytes() if kind == "fsync" and path.is_file() else None
            self.log.append((kind, path.relative_to(self.root).as_posix(), target, content))

        return call


@dataclass
class Node:
    """A file or a folder: what it is now, and what the disk is sure to have of it."""

    content: bytes = b""  # of a file, flushed
    names: dict[str, "Node"] = field(default_factory=dict)  # of a folder, now
    sure: dict[str, "Node"] = field(default_factory=dict)  # of a folder, flushed
    folder: bool = False


def after_power_loss(log: list[tuple], names_first: bool, target: Path) -> None:
    """Make the folder `target` as the disk would be found. With `names_first` all names are there, and content only
    where it was flushed; without it a name is lost, too, unless its folder was flushed."""
    root = Node(folder=True)
    for kind, path, to, content in log:
        parent, name = _find(root, path)
        if kind == "mkdir":
            parent.names[name] = Node(folder=True)
        elif kind == "rename":
            new_parent, new_name = _find(root, to)
            new_parent.names[new_name] = parent.names.pop(name)
        elif kind == "remove":
            del parent.names[name]
        elif content is not None:
            parent.names.setdefault(name, Node()).content = content
        else:
            folder = parent.names[name] if path != "." else root
            folder.sure = dict(folder.names)
    _make(root, names_first, target)


def _find(root: Node, path: str) -> tuple[Node, str]:
    """The folder of a path, and its name there; the root has neither."""
    node, parts = root, PurePosixPath(path).parts
    for part in parts[:-1]:
        node = node.names[part]
    return node, parts[-1] if parts else ""


def _make(node: Node, names_first: bool, place: Path) -> None:
    if not node.folder:
        place.write_bytes(node.content)
        return
    place.mkdir(parents=True)
    for name, inner in (node.names if names_first else node.sure).items():
        _make(inner, names_first, place / name)
