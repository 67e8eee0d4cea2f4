# SPDX-License-Identifier: Apache-2.0
"""Is a checkpoint what was saved? ``fastshard verify`` and :func:`verify` look at a file, a folder, and the folders in
it, as those of a run.

Bytes are compared where there is something to compare them with: a manifest, ``SHA256SUMS``, the checksums in archives
of ``torch.save``. Without, it is compared what the files say of themselves and of each other: headers and sizes,
indices and headers, numbers of shards, metadata of ``torch.distributed.checkpoint`` and files, whether configurations
are JSON. Nothing that is found in a folder is trusted.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from ..api.checked import (
    CONTENTS,
    DAMAGED,
    MISSING,
    UNREADABLE,
    Check,
    Known,
    Problem,
    check,
    read_known,
    said,
)
from ..base.loading import load
from ..engine.checksums import Sums
from ..engine.engine import progress_wanted
from ..formats.file_kinds import TORCH, what_is
from ..formats.hf_index import is_folder, open_file, read_text, weight_map
from ..formats.naming import (
    DCP_METADATA,
    DISTCP_SUFFIX,
    MANIFEST_NAME,
    SUMS_NAME,
    TORCH_SUFFIXES,
    WEIGHTS_SUFFIX,
    index_of_what,
    is_manifest,
)
from ..formats.torch_archive import UnknownLayout, records_of
from ..formats.torch_items import Edges
from .structure import of_configurations, of_dcp, of_indices, of_sets

_MOST_TRIES = 4
_MOST_RECORDS: Final = 1 << 20
State = dict[str, tuple[int, int, int] | None]


@dataclass
class Report:
    """What was found."""

    path: str
    files: int = 0
    """Files that were looked at."""
    nbytes: int = 0
    """Their size."""
    compared: int = 0
    """Bytes of those that were compared with digests."""
    problems: list[Problem] = field(default_factory=list)
    without_digests: list[str] = field(default_factory=list)
    """Files of weights whose bytes could not be compared, as nothing is known of them, or were not, with ``quick``."""
    vanished: list[str] = field(default_factory=list)
    """Folders that were removed meanwhile."""

    @property
    def ok(self) -> bool:
        """Whether there are no problems."""
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """Returns the report as JSON has it."""
        return {
            "path": self.path,
            "ok": self.ok,
            "files": self.files,
            "nbytes": self.nbytes,
            "compared_nbytes": self.compared,
            "problems": [
                {"kind": found.kind, "path": found.path, "tensor": found.tensor, "text": found.text}
                for found in self.problems
            ],
            "without_digests": self.without_digests,
            "vanished": self.vanished,
        }


def verify(
    path: str | os.PathLike[str],
    *,
    quick: bool = False,
    crc32: bool = False,
    direct: bool = False,
    progress: bool | None = None,
) -> Report:
    """Compares files with what is known of them. Nothing is changed.

    What another save replaces or removes meanwhile is no problem: then the folder is looked at again.

    Args:
        path: a file, an index, a folder, or one with such folders in it. Hidden names and links to folders are passed
            over.
        quick: do not read any tensors: sizes, headers and indices only.
        crc32: compare the CRC-32 in manifests where both are known, and not SHA-256, which takes several times as long.
        direct: read past the page cache, from the disk itself.
        progress: show a tqdm bar; ``None``: if the environment variable ``FASTSHARD_PROGRESS`` says so.

    Raises:
        OSError: the path is not there, or cannot be read. What is wrong with anything in it is in the report.
    """
    name = os.fspath(path)
    earlier: dict[str, Check] = {}
    seen: set[str] = set()
    for _ in range(_MOST_TRIES):
        before = _state(name)
        look = _Look(name, quick, crc32, earlier)
        with bar(look.work, progress, "Verifying") as passed:
            check(look.checks.values(), direct=direct, passed=passed)
        report = look.report()
        report.vanished = sorted(seen - set(look.folders))
        if report.ok or _state(name) == before:
            break
        seen.update(look.folders)
        earlier = {path: checked for path, checked in look.checks.items() if not checked.problems}
    return report


@contextlib.contextmanager
def bar(work: int, progress: bool | None, description: str) -> Iterator[Callable[[int], object] | None]:
    """Gives what is to be told of bytes that have passed: a tqdm bar, if one is wanted."""
    if not work or not progress_wanted(progress):
        yield None
        return
    with load("tqdm.auto").tqdm(
        total=work, unit="B", unit_scale=True, desc=description, smoothing=0
    ) as shown:
        yield shown.update


class Archive(Check):
    """A file of ``torch.save`` of which nothing is known but the CRC-32 that it has of its own records."""

    def __init__(self, path: str, index: str | None) -> None:
        super().__init__(path, told_by=index or DCP_METADATA)
        self._named = index is not None

    def look(self) -> None:
        info = self._status()
        if info is None:
            return
        self._note(info)
        try:
            what = what_is(self.path)
            if (
                what.kind == TORCH
                and not what.is_whole
                or what.kind != TORCH
                and (self._named or not self.nbytes)
            ):
                self._say(CONTENTS, f"it is {what.text}" if self.nbytes else "it is empty")
                return
            with open_file(self.path) as file:
                records = records_of(
                    Edges(lambda at, n: os.pread(file.fileno(), n, at), self.nbytes), _MOST_RECORDS
                )
        except UnknownLayout:
            return  # of the older format, or something else
        except FileNotFoundError:
            self._say(MISSING, "has vanished")
            return
        except (OSError, ValueError) as error:
            self._say(UNREADABLE if isinstance(error, OSError) else CONTENTS, said(error, self.path))
            return
        records.sort(key=lambda record: record.begin)
        ends = [0, *(record.begin + record.nbytes for record in records)]
        if any(record.begin < end for record, end in zip(records, ends)) or ends[-1] > self.nbytes:
            return
        kept = [record for record in records if record.crc]
        self.digests = bool(kept)
        self._wanted = [(record.name, record.crc) for record in kept]
        if kept:
            self.sums = Sums(self.path, self.nbytes, [(record.begin, record.nbytes) for record in kept])

    def _compare(self, found: list[int]) -> None:
        for (name, wanted), crc32 in zip(self._wanted, found, strict=True):
            if crc32 != wanted:
                self._say(DAMAGED, f"the record {name!r} has the CRC-32 {crc32:08x}, not {wanted:08x}")


class _Look:
    """The folders and files that a path stands for, looked at, and what is left to be read."""

    def __init__(self, path: str, quick: bool, by_crc32: bool, earlier: dict[str, Check]) -> None:
        self.path = path
        self.checks: dict[str, Check] = {}
        self.problems: list[Problem] = []
        self.folders: list[str] = []
        self._quick = quick
        self._by_crc32 = by_crc32
        self._earlier = earlier
        if not is_folder(path):
            os.stat(path)
            self._look_at(os.path.dirname(path), _named_by(path), alone=True)
        elif not self._walk(path):
            self.problems.append(Problem(MISSING, path, "it holds neither weights nor digests"))
        self.work = sum(found.sums.work for found in self.checks.values() if found.sums is not None)

    def report(self) -> Report:
        report = Report(self.path, problems=list(self.problems))
        for path, found in self.checks.items():
            report.problems += found.problems
            if found.identity is None:
                continue
            report.files += 1
            report.nbytes += found.nbytes
            if found.digests and not self._quick:
                report.compared += found.nbytes
            elif path.endswith((WEIGHTS_SUFFIX, *TORCH_SUFFIXES)):
                report.without_digests.append(path)
        return report

    def _walk(self, top: str) -> bool:
        """Looks at a folder and all in it. Returns whether there was anything to be looked at."""
        ahead, found = [top], False
        while ahead:
            folder = ahead.pop()
            try:
                files, folders = entries_of(folder)
            except FileNotFoundError:
                if folder == top:
                    raise
                continue
            except OSError as error:
                if folder == top:
                    raise
                self.problems.append(Problem("unreadable", folder, said(error, folder)))
                continue
            self.folders.append(folder)
            found |= self._look_at(folder, files)
            ahead += reversed([os.path.join(folder, name) for name in folders])
        return found

    def _look_at(self, folder: str, names: Sequence[str], alone: bool = False) -> bool:
        """Looks at files of a folder. Returns whether there was anything to be looked at. ``alone``: only at these, of
        which others in the folder may say something."""
        telling = _telling(folder) if alone else names
        known = read_known(folder, telling)
        self.problems += known.problems
        if alone:
            kept = {*names}
            known = Known(
                {name: told for name, told in known.entries.items() if name in kept},
                {name: told for name, told in known.sums.items() if name in kept},
                [],
            )
        indices = of_indices(folder, names)
        self.problems += indices.problems
        told_by = {name: index for index, named in indices.named.items() for name in named}
        of_weights = [
            name for name in names if name.endswith(WEIGHTS_SUFFIX) or (alone and index_of_what(name) is None)
        ]
        archives = [name for name in names if name.endswith(TORCH_SUFFIXES)]
        for name in sorted({*known.entries, *known.sums, *told_by, *of_weights, *archives}):
            self._check(os.path.join(folder, name), known, name, told_by.get(name))
        here = {name: self.checks.get(os.path.join(folder, name)) for name in {*names, *told_by}}
        self.problems += indices.compare(
            {name: found.stored if found else None for name, found in here.items()}
        )
        self.problems += of_sets(folder, names, {*told_by, *known.entries, *indices.obsolete})
        parts: list[Problem] = []
        if not alone:
            self.problems += of_configurations(folder, names)
            parts = list(of_dcp(folder))
            self.problems += parts
        of_ranks = bool(parts) or any(name.endswith(DISTCP_SUFFIX) for name in names)
        return bool(known.entries or known.sums or told_by or of_weights or archives or of_ranks)

    def _check(self, path: str, known: Known, name: str, index: str | None) -> None:
        if path in self.checks:
            return  # a manifest in a folder above has told of it
        entry, sha256 = known.entries.get(name), known.sums.get(name)
        found: Check
        if entry is None and sha256 is None and name.endswith(TORCH_SUFFIXES):
            found = Archive(path, index)
        else:
            found = Check(path, entry, sha256, told_by=index or SUMS_NAME, by_crc32=self._by_crc32)
        found.look()
        before = self._earlier.get(path)
        if before is not None and before.identity == found.identity and before.known == found.known:
            found = before
        elif self._quick:
            found.sums = None
        self.checks[path] = found


def _telling(folder: str) -> list[str]:
    return [n for n in os.listdir(folder or ".") if n in (MANIFEST_NAME, SUMS_NAME) or is_manifest(n)]


def _names_in(path: str, index: str) -> list[str]:
    """Returns the names of the files of an index, as far as it can be read. What is wrong with it is said elsewhere."""
    suffix = index_of_what(index)
    try:
        return [] if suffix is None else sorted(set(weight_map(read_text(path), path, suffix).values()))
    except (OSError, ValueError):
        return []


def _named_by(path: str) -> list[str]:
    """Returns the names of the files that a file stands for: of an index its shards, too."""
    name = os.path.basename(path)
    return [name, *_names_in(path, name)]


def entries_of(folder: str) -> tuple[list[str], list[str]]:
    """Returns the names of files, and of folders, that are not hidden. A link is a file, unless it leads to a folder."""
    files, folders = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            try:
                leads_to_folder = entry.is_dir()
            except OSError:
                leads_to_folder = False
            if not leads_to_folder:
                files.append(entry.name)
            elif not entry.is_symlink():
                folders.append(entry.name)
    return sorted(files), sorted(folders)


def _state(path: str) -> State:
    """Returns what tells all that a path stands for from what takes its place later."""
    found: State = {}
    ahead = [path] if is_folder(path) else []
    if not ahead:
        folder = os.path.dirname(path)
        for name in {*_named_by(path), *_telling(folder)}:
            found[name] = _identity(os.path.join(folder, name))
    while ahead:
        folder = ahead.pop()
        try:
            files, folders = entries_of(folder)
        except OSError:
            continue
        found[folder] = None
        for name in files:
            found[os.path.join(folder, name)] = _identity(os.path.join(folder, name))
        ahead += [os.path.join(folder, name) for name in folders]
    return found


def _identity(path: str) -> tuple[int, int, int] | None:
    try:
        info = os.stat(path)
    except OSError:
        return None
    return info.st_ino, info.st_size, info.st_mtime_ns
