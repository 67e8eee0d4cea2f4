# SPDX-License-Identifier: Apache-2.0
"""Whether a checkpoint's folder has all that belongs in it, as far as that shows without reading its tensors.

Looked at are indices and their shards, headers against sizes, archives' directories, manifests and sizes, metadata of
``torch.distributed.checkpoint``, and what ``Trainer`` writes last. So a checkpoint that a job was killed in is found, and
one that was copied in part, in milliseconds; a flipped bit in a tensor is not.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from ..api.checked import MISSING
from ..formats.file_kinds import TORCH, what_is
from ..formats.hf_index import StoredFile, open_file, read_object, read_stored, read_text, weight_map
from ..formats.manifest import read_manifest
from ..formats.naming import (
    DISTCP_SUFFIX,
    MANIFEST_NAME,
    SUMS_NAME,
    TORCH_SUFFIXES,
    WEIGHTS_SUFFIX,
    index_of_what,
    is_dcp_metadata,
    is_manifest,
    number_of_dcp_shard,
    place_in_set,
)
from ..formats.sha256sums import read_sums
from .structure import of_dcp

TRAINER_STATE: Final = "trainer_state.json"
"""What ``Trainer`` writes last."""
_TRAINER_ARGUMENTS: Final = "training_args.bin"
_MARK: Final = "checkpoint-is-incomplete.txt"
"""Stands in a checkpoint that ``Trainer`` makes on a signal, until it is made."""
_TO_RESUME: Final[Mapping[str, re.Pattern[str]]] = {
    # Of one process, FSDP (a folder), XLA, and DeepSpeed, which has all in one folder.
    "the optimizer's state": re.compile(r"(rank.+-)?optimizer(_\d+)?(\.pt|\.bin)?(_.+)?|global_step\d+"),
    "the scheduler's state": re.compile(r"scheduler\.(pt|bin)|global_step\d+"),
    "the state of random numbers": re.compile(r"rng_state(_\d+)?\.pth"),
}
"""What ``Trainer`` needs to go on, all of it or, with ``save_only_model=True``, nothing."""
_WEIGHTS: Final = (WEIGHTS_SUFFIX, *TORCH_SUFFIXES, DISTCP_SUFFIX)
_NO_WEIGHTS: Final = re.compile(r".*optimizer.*|scheduler\..*|scaler\..*|rng_state.*|training_args\.bin")
_PICKLE_SUFFIX: Final = ".pkl"
_LEAST_ARCHIVE_NBYTES: Final = 64
_EDGE_NBYTES: Final = 64
_MAX_PARSED_NBYTES: Final = 1 << 20


def problems_of(folder: str) -> list[str]:
    """Returns why a folder is no complete checkpoint, a line for each reason; nothing if it is one.

    Raises ``OSError`` if the folder itself cannot be listed.
    """
    found = _Folder(folder)
    problems = list(found.problems())
    if not problems and not found.has_weights():
        problems.append("it holds no weights")
    return problems


class _Folder:
    def __init__(self, path: str) -> None:
        self.path = path
        with os.scandir(path) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
        self.names = [entry.name for entry in found]
        shown = [entry for entry in found if not entry.name.startswith(".") or is_dcp_metadata(entry.name)]
        self.inner = [entry.name for entry in shown if entry.is_dir(follow_symlinks=False)]
        self.files = [entry.name for entry in shown if not entry.is_dir()]

    def _place(self, name: str) -> str:
        return os.path.join(self.path, name)

    def has_weights(self) -> bool:
        """Returns whether there are weights, here or, as FSDP and DeepSpeed have them, in a folder of it."""
        if any(name.endswith(_WEIGHTS) and not _NO_WEIGHTS.fullmatch(name) for name in self.files):
            return True
        inner = (name for name in self.inner if not _NO_WEIGHTS.fullmatch(name))
        return any(_Folder(self._place(name)).has_weights() for name in inner)

    def problems(self) -> Iterator[str]:
        if _MARK in self.names:
            yield f"{_MARK} says so"
        stored: dict[str, StoredFile] = {}
        sound = []
        for name in self.files:
            with self._said(name) as said:
                self._look_at(name, stored)
                sound.append(name)
            yield from said
        for name in sound:
            with self._said(name) as said:
                if index_of_what(name) is not None:
                    said += self._of_index(name, stored)
                elif name == MANIFEST_NAME or is_manifest(name):
                    said += self._of_manifest(name)
                elif name == SUMS_NAME:
                    said += self._missing(read_sums(self._place(name)), name)
            yield from said
        yield from self._of_sets()
        for found in of_dcp(self.path):
            yield f"{os.path.relpath(found.path, self.path)}{' ' if found.kind == MISSING else ': '}{found.text}"
        yield from self._of_trainer()
        for name in self.inner:
            yield from (f"{name}/{problem}" for problem in _Folder(self._place(name)).problems())

    @contextlib.contextmanager
    def _said(self, name: str) -> Iterator[list[str]]:
        """Gives a list to be filled, and puts what the block raises into it."""
        said: list[str] = []
        try:
            yield said
        except FileNotFoundError:
            said.append(f"{name} is missing, or a link that leads nowhere")
        except OSError as error:
            said.append(f"{name}: {error.strerror or error}")
        except ValueError as error:
            text = str(error).removeprefix(f"{self._place(name)!r}").removeprefix(":").strip()
            said.append(f"{name}: {text}" if name not in text else text)

    def _look_at(self, name: str, stored: dict[str, StoredFile]) -> None:
        """Raises ``ValueError`` for a file that has been cut."""
        path = self._place(name)
        if name.endswith(WEIGHTS_SUFFIX):
            stored[name] = read_stored(path)
        elif name.endswith((*TORCH_SUFFIXES, _PICKLE_SUFFIX)):
            what = what_is(path)
            least = 1 if name.endswith(_PICKLE_SUFFIX) else _LEAST_ARCHIVE_NBYTES
            if not what.is_whole or (what.kind != TORCH and os.path.getsize(path) < least):
                raise ValueError(f"it is {what.text}")
        elif name.endswith(".json"):
            _expect_json(path)
        else:
            os.stat(path)

    def _of_index(self, name: str, stored: Mapping[str, StoredFile]) -> Iterator[str]:
        path = self._place(name)
        suffix = index_of_what(name)
        assert suffix is not None
        places = weight_map(read_text(path), path, suffix)
        for file in sorted(set(places.values())):
            if file not in self.names:
                yield f"{file} is missing, and {name} names it"
        there = {file: {tensor.name for tensor in found.header.tensors} for file, found in stored.items()}
        lost = [tensor for tensor, file in places.items() if file in there and tensor not in there[file]]
        if lost:
            more = f", nor are {len(lost) - 1} others where they should be" if len(lost) > 1 else ""
            yield f"tensor {lost[0]!r} is not in {places[lost[0]]}, where {name} has it{more}"

    def _of_manifest(self, name: str) -> Iterator[str]:
        for file, entry in read_manifest(self._place(name)).files.items():
            try:
                nbytes = os.stat(self._place(file)).st_size
            except (FileNotFoundError, NotADirectoryError):
                yield f"{file} is missing, and {name} names it"
                continue
            if nbytes != entry.nbytes:
                yield f"{file} has {nbytes} bytes, and {entry.nbytes} says {name}"

    def _missing(self, names: Iterable[str], told_by: str) -> Iterator[str]:
        for name in names:
            try:
                os.stat(self._place(name))
            except (FileNotFoundError, NotADirectoryError):
                yield f"{name} is missing, and {told_by} names it"

    def _of_sets(self) -> Iterator[str]:
        """Yields which numbered shards are missing, where no index names any."""
        if any(index_of_what(name) is not None for name in self.files):
            return
        sets: dict[str, tuple[int, set[int]]] = {}
        for name in self.files:
            place = place_in_set(name)
            if place is not None and number_of_dcp_shard(name) is None:
                sets.setdefault(place[0], (place[2], set()))[1].add(place[1])
        for count, numbers in sets.values():
            lost = count - len(numbers)
            if lost:
                yield f"{lost} of {count} shards are missing, and their index"
            elif count > 1:
                yield f"the index of {count} shards is missing"

    def _of_trainer(self) -> Iterator[str]:
        if TRAINER_STATE not in self.files:
            if _TRAINER_ARGUMENTS in self.files:
                yield f"{TRAINER_STATE} is missing, which Trainer writes last"
            return
        with self._said(TRAINER_STATE) as said:
            trainer_state(self.path)
        yield from said
        has = {what: any(map(names.fullmatch, self.names)) for what, names in _TO_RESUME.items()}
        if any(has.values()):
            yield from (f"{what} is missing" for what, there in has.items() if not there)


def trainer_state(folder: str) -> dict[str, object]:
    """Returns what ``Trainer`` says of a checkpoint. Raises ``OSError``, and ``ValueError`` naming the file."""
    path = os.path.join(folder, TRAINER_STATE)
    return read_object(read_text(path), path)


def _expect_json(path: str) -> None:
    """Raises ``ValueError`` for a text that has been cut, or that is zeros after a crash. Of a long one only the
    edges are looked at."""
    with open_file(path) as file:
        nbytes = os.fstat(file.fileno()).st_size
        if nbytes > _MAX_PARSED_NBYTES:
            first = file.read(_EDGE_NBYTES).lstrip()[:1]
            file.seek(nbytes - _EDGE_NBYTES)
            last = file.read().rstrip()[-1:]
            if first + last not in (b"{}", b"[]"):
                raise ValueError("it is JSON whose end is missing")
            return
        data = file.read()
    try:
        json.loads(data)  # as transformers reads it: NaN and Infinity are allowed
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON: {error}" if data else "it is empty") from None
