# SPDX-License-Identifier: Apache-2.0
"""Files that are compared with what is said of them: by a manifest, by ``SHA256SUMS``, by their own headers.

``SHA256SUMS`` is believed first. Where it says that a file is damaged, the manifest tells which tensor is.
"""

from __future__ import annotations

import contextlib
import os
import stat
import zlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, BinaryIO, Final, NamedTuple

from safetensors import SafetensorError

from ..base.loading import load
from ..engine.checksums import EndsEarly, Passed, Sums, take
from ..formats.hf_index import StoredFile, read_stored
from ..formats.json_text import shown
from ..formats.manifest import FileEntry, read_manifest
from ..formats.naming import MANIFEST_NAME, SUMS_NAME, WEIGHTS_SUFFIX, is_manifest
from ..formats.sha256sums import read_sums

if TYPE_CHECKING:
    import torch

MISSING: Final = "missing"
UNREADABLE: Final = "unreadable"
SIZE: Final = "size"
HEADER: Final = "header"
DAMAGED: Final = "damaged"
INDEX: Final = "index"
OBSOLETE: Final = "obsolete"
CONTENTS: Final = "contents"
MANIFEST: Final = "manifest"
_MOST_SAID: Final = 3


class Problem(NamedTuple):
    """Something that is not as it should be."""

    kind: str
    """``"missing"``, ``"unreadable"``, ``"size"``, ``"header"``, ``"damaged"``, ``"index"`` (it and the files
    contradict each other), ``"obsolete"`` (a file that loaders may take for one of the checkpoint),
    ``"contents"`` (of a file that is no safetensors file), or ``"manifest"`` (it, or ``SHA256SUMS``, cannot be used).
    """
    path: str
    text: str
    tensor: str | None = None

    def __str__(self) -> str:
        tensor = "" if self.tensor is None else f" tensor {shown(self.tensor)}:"
        return f"{self.path}:{tensor} {self.text}"


class Known(NamedTuple):
    """What a folder says of its files, by their names in it."""

    entries: dict[str, tuple[FileEntry, str]]
    """With the name of the manifest."""
    sums: dict[str, str]
    problems: list[Problem]


def read_known(folder: str, names: Iterable[str]) -> Known:
    """Reads the manifests and ``SHA256SUMS`` among the files ``names`` of a folder. What cannot be read is a problem;
    what has vanished is not."""
    found = Known({}, {}, [])
    for name in sorted(names):
        path = os.path.join(folder, name)
        try:
            if name == SUMS_NAME:
                found.sums.update(_inside(read_sums(path)))
            elif name == MANIFEST_NAME or is_manifest(name):
                if not stat.S_ISREG(os.stat(path).st_mode):
                    raise ValueError("it is not a regular file")
                for file, entry in _inside(read_manifest(path).files).items():
                    found.entries.setdefault(file, (entry, name))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            kind = MANIFEST if isinstance(error, ValueError) else UNREADABLE
            found.problems.append(Problem(kind, path, said(error, path)))
    return found


def _inside(files: Mapping[str, Any]) -> dict[str, Any]:
    """Returns files by their shortest names. Raises ``ValueError`` for one that lies in another folder."""
    found = {}
    for name, told in files.items():
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if name.startswith("/") or ".." in parts or not parts or "\0" in name:
            raise ValueError(f"{name!r} is not a file in the folder")
        found["/".join(parts)] = told
    return found


def said(error: BaseException, path: str) -> str:
    """Returns what an error says, without the path, which stands before it anyway."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error)
    for before in (f"{path!r}: ", f"{path}: ", f"{path!r} "):
        text = text.removeprefix(before)
    return text


class Check:
    """One file. ``look`` compares what needs no digest; then ``sums`` are to be taken, if there are any, and ``judge``
    compares them."""

    def __init__(
        self,
        path: str,
        known: tuple[FileEntry, str] | None = None,
        sha256: str | None = None,
        *,
        told_by: str = SUMS_NAME,
        file: BinaryIO | None = None,
        by_crc32: bool = False,
    ) -> None:
        self.path = path
        self.identity: tuple[int, int, int, int] | None = None
        self.nbytes = 0
        self.problems: list[Problem] = []
        self.stored: StoredFile | None = None
        """The header, if it is that of a sound file."""
        self.sums: Sums | None = None
        self.digests = False
        """Whether there are any for all bytes of the file."""
        self.known = known, sha256
        self._entry: FileEntry | None = known[0] if known else None
        self._told_by = known[1] if known else told_by
        self._sha256 = sha256
        self._ranges: list[tuple[int, int]] = []
        self._wanted: list[tuple[str | None, int]] = []
        """The tensor in each of them, and the CRC-32 that it had."""
        self._file = file
        self._by_crc32 = by_crc32

    def look(self) -> None:
        info = self._status()
        if info is None:
            return
        self._note(info)
        if self._entry is not None and self._entry.nbytes != self.nbytes:
            self._say(SIZE, *self._of_another_size(self._entry))
            return
        has_header = self.path.endswith(WEIGHTS_SUFFIX) or (self._entry and self._entry.tensors is not None)
        if has_header and self._file is None:  # whoever has opened it has read its header
            self._look_at_header()
        if self._entry is not None and not self._divide(self._entry):
            return
        if self._sha256 is not None and not (self._by_crc32 and self._ranges):
            self.sums = Sums(self.path, self.nbytes, sha256=True, file=self._file)
        elif self._ranges:
            self.sums = Sums(self.path, self.nbytes, self._ranges, file=self._file)
        self.digests = self.sums is not None

    def _note(self, info: os.stat_result) -> None:
        self.nbytes = info.st_size
        self.identity = info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns

    def judge(self) -> bool:
        """Compares the sums. Returns whether others have to be taken, to know more of what is damaged."""
        sums, self.sums = self.sums, None
        assert sums is not None
        if sums.error is not None:
            kind = SIZE if isinstance(sums.error, EndsEarly) else UNREADABLE
            self._say(kind, said(sums.error, self.path))
        elif sums.sha256:
            if sums.sha256_found == self._sha256:
                return False
            self._say(DAMAGED, f"its SHA-256 is {sums.sha256_found}, not {self._sha256}")
            if self._ranges:
                self.sums = Sums(self.path, self.nbytes, self._ranges, file=self._file)
                return True
        else:
            self._compare(sums.crc32s)
        return False

    def _say(self, kind: str, text: str, tensor: str | None = None) -> None:
        self.problems.append(Problem(kind, self.path, text, tensor))

    def _status(self) -> os.stat_result | None:
        try:
            info = os.stat(self.path) if self._file is None else os.fstat(self._file.fileno())
        except (FileNotFoundError, NotADirectoryError):
            self._say(MISSING, f"is missing, and {self._told_by} names it{_link(self.path)}")
            return None
        except (OSError, ValueError) as error:  # a link to itself; a name that no file can have
            self._say(UNREADABLE, said(error, self.path))
            return None
        if not stat.S_ISREG(info.st_mode):
            self._say(UNREADABLE, "is not a regular file")
            return None
        return info

    def _of_another_size(self, entry: FileEntry) -> tuple[str, str | None]:
        text = f"it has {self.nbytes} bytes, and had {entry.nbytes}"
        if self.nbytes > entry.nbytes:
            return f"{text}: something was added, or it is another file", None
        tensors = sorted(
            (tensor.offset + tensor.nbytes, name) for name, tensor in (entry.tensors or {}).items()
        )
        lost = [name for end, name in tensors if end > self.nbytes]
        if not lost:
            return f"{text}: it was cut, or is another file", None
        return f"{text}: it was cut, or is another file; {len(lost)} tensors lie behind its end", lost[0]

    def _look_at_header(self) -> None:
        try:
            self.stored = read_stored(self.path)
        except FileNotFoundError:
            self._say(MISSING, "has vanished")
        except OSError as error:
            self._say(UNREADABLE, said(error, self.path))
        except ValueError as error:
            self._say(HEADER, said(error, self.path))

    def _divide(self, entry: FileEntry) -> bool:
        """Finds the ranges with digests. Returns whether it is worth while to read them."""
        tensors = sorted((entry.tensors or {}).items(), key=lambda item: (item[1].offset, item[1].nbytes))
        reached = tensors[0][1].offset if tensors else entry.nbytes
        ranges: list[tuple[str | None, int, int, int | None]] = [(None, 0, reached, entry.crc32)]
        for name, (offset, nbytes, crc32) in tensors:
            if offset != reached:
                self._say(MANIFEST, f"{self._told_by} says it lies at {offset}, and not at {reached}", name)
                return False
            ranges.append((name, offset, nbytes, crc32))
            reached += nbytes
        if reached != entry.nbytes:
            self._say(MANIFEST, f"{self._told_by} says nothing of its last {entry.nbytes - reached} bytes")
            return False
        if self.stored is not None and not self._has_places_of(entry, self.stored):
            self.stored = None
            return False
        if all(crc32 is None for *_, crc32 in ranges):
            return True
        for tensor, _, _, crc32 in ranges:
            if crc32 is None:
                text = f"{self._told_by} has the CRC-32 of other parts of the file, and not of this"
                self._say(MANIFEST, text, tensor)
                return False
        self._ranges = [(offset, nbytes) for _, offset, nbytes, _ in ranges]
        self._wanted = [(name, crc32 or 0) for name, _, _, crc32 in ranges]
        return True

    def _has_places_of(self, entry: FileEntry, stored: StoredFile) -> bool:
        """Compares the header with the manifest, and says what differs."""
        begin = stored.header.nbytes
        found = {t.name: (begin + t.begin, t.end - t.begin) for t in stored.header.tensors}
        told = {name: (tensor.offset, tensor.nbytes) for name, tensor in (entry.tensors or {}).items()}
        if found == told or entry.tensors is None:
            if (
                entry.crc32 is not None
                and zlib.crc32(stored.raw) != entry.crc32
                and entry.tensors is not None
            ):
                self._say(
                    HEADER, "its header is not the one that was saved: dtypes, shapes or metadata differ"
                )
                self.stored = None
            return True
        for name, place in told.items():
            if name not in found:
                self._say(HEADER, f"is not in the file, and {self._told_by} names it", name)
                return False
            if found[name] != place:
                text = "lies at {} and has {} bytes; {} says at {}, and {} bytes"
                self._say(HEADER, text.format(*found[name], self._told_by, *place), name)
                return False
        name = min(found.keys() - told.keys())
        self._say(HEADER, f"is in the file, and {self._told_by} does not name it", name)
        return False

    def _compare(self, found: list[int]) -> None:
        for (name, wanted), crc32 in zip(self._wanted, found, strict=True):
            if crc32 == wanted:
                continue
            if name is not None or self._entry is None or self._entry.tensors is None:
                self._say(DAMAGED, f"its CRC-32 is {crc32:08x}, not {wanted:08x}", name)
            elif not any(problem.kind == HEADER for problem in self.problems):
                self._say(HEADER, "its header is not the one that was saved")


def _link(path: str) -> str:
    with contextlib.suppress(OSError, ValueError):
        return f": it is a link to {os.readlink(path)!r}, which leads nowhere"
    return ""


def check(files: Iterable[Check], *, direct: bool = False, passed: Passed | None = None) -> None:
    """Takes the sums of files that were looked at, and compares them."""
    left = [file for file in files if file.sums is not None]
    while left:
        take([file.sums for file in left if file.sums is not None], direct=direct, passed=passed)
        left = [file for file in left if file.judge()]


def load_file(
    filename: str | os.PathLike[str], device: str | int = "cpu", *, verify: bool = False, **options: Any
) -> dict[str, torch.Tensor]:
    """Loads a safetensors file, as ``safetensors.torch.load_file`` does, to which ``device`` and ``options`` go.

    With ``verify`` all bytes of the file are compared first with the digests that the manifest or ``SHA256SUMS`` in
    its folder has: a save with ``manifest=True``, or ``fastshard manifest``, makes them. It is read once more for that.

    Raises what safetensors raises, and with ``verify`` ``ValueError`` if nothing is known of the file's bytes, and
    ``SafetensorError``, naming file and tensor, if they are others.
    """
    load_it = load("safetensors.torch").load_file
    if not verify:
        return load_it(filename, device, **options)  # type: ignore[no-any-return]
    path = os.fspath(filename)
    while True:
        before = _state(path)
        error = _why_not(path)
        if error is None:
            loaded = load_it(filename, device, **options)
            if _state(path) == before:
                return loaded  # type: ignore[no-any-return]
        elif _state(path) == before:
            raise error


def _state(path: str) -> list[tuple[int, int, int] | None]:
    """Returns what tells a file, and what its folder says of it, from what took these names later."""
    found: list[tuple[int, int, int] | None] = []
    for name in (path, *(os.path.join(os.path.dirname(path), name) for name in (MANIFEST_NAME, SUMS_NAME))):
        try:
            info = os.stat(name)
        except (FileNotFoundError, NotADirectoryError):
            found.append(None)
        else:
            found.append((info.st_ino, info.st_size, info.st_mtime_ns))
    return found


def _why_not(path: str) -> Exception | None:
    """Returns why a file is not to be loaded, if it is not."""
    folder, name = os.path.split(path)
    try:
        os.stat(path)
        names = [n for n in os.listdir(folder or ".") if n in (MANIFEST_NAME, SUMS_NAME) or is_manifest(n)]
    except OSError as error:
        return error
    known = read_known(folder, names)
    if known.problems:
        return ValueError(str(known.problems[0]))
    checked = Check(path, known.entries.get(name), known.sums.get(name))
    return why_unsound([checked])


def why_unsound(files: Iterable[Check]) -> Exception | None:
    """Compares files with what is known of them. Returns an error that names what is damaged, or of which file nothing
    is known."""
    files = list(files)
    for file in files:
        file.look()
        if not file.digests and not file.problems:
            text = "has no digest in a manifest or in SHA256SUMS, so its bytes cannot be verified"
            return ValueError(f"{file.path!r} {text}")
    check(files)
    problems = [problem for file in files for problem in file.problems]
    if not problems:
        return None
    more = f"; and {len(problems) - _MOST_SAID} more" if len(problems) > _MOST_SAID else ""
    return SafetensorError("; ".join(map(str, problems[:_MOST_SAID])) + more)
