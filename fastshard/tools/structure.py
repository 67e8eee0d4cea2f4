# SPDX-License-Identifier: Apache-2.0
"""What the files of a checkpoint say of each other and of themselves, compared without digests.

``verify`` asks for all that contradicts something; whoever lists the checkpoints of a run, for what is missing of one
(:func:`problems_of`): indices and their shards, headers against sizes, archives' directories, manifests and sizes,
metadata of ``torch.distributed.checkpoint``, and what ``Trainer`` writes last. So a checkpoint that a job was killed in
is found, and one that was copied in part, in milliseconds; a flipped bit in a tensor is not.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Final

from ..api.checked import CONTENTS, INDEX, MISSING, OBSOLETE, SIZE, UNREADABLE, Problem, said
from ..formats.dcp_metadata import read_metadata
from ..formats.file_kinds import TORCH, what_is
from ..formats.hf_index import StoredFile, open_file, read_object, read_stored, read_text, weight_map
from ..formats.manifest import read_manifest
from ..formats.naming import (
    DCP_METADATA,
    DISTCP_SUFFIX,
    MANIFEST_NAME,
    SUMS_NAME,
    TORCH_SUFFIXES,
    WEIGHTS_SUFFIX,
    are_of_the_same_weights,
    index_of_what,
    is_dcp_metadata,
    is_manifest,
    number_of_dcp_shard,
    place_in_set,
)
from ..formats.sha256sums import read_sums

_CONFIGURATIONS: Final = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "model_index.json",
    "preprocessor_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "trainer_state.json",
)
"""Files that a model cannot be loaded without if they are there, and which hold an object."""
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


class Indices:
    """The indices of a folder."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.problems: list[Problem] = []
        self.named: dict[str, dict[str, list[str]]] = {}
        """The files that each index names, by its name, and their tensors."""
        self._maps: dict[str, dict[str, str]] = {}
        self.obsolete: dict[str, str] = {}
        """Files that seem to belong to the weights of an index, which does not name them, with its name."""

    def read(self, name: str, suffix: str, names: Sequence[str]) -> None:
        path = os.path.join(self.folder, name)
        try:
            mapped = weight_map(read_text(path), path, suffix)
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            self.problems.append(
                Problem(INDEX if isinstance(error, ValueError) else UNREADABLE, path, said(error, path))
            )
            return
        self._maps[name] = mapped
        self.named[name] = named = dict[str, list[str]]()
        for tensor, file in mapped.items():
            named.setdefault(file, []).append(tensor)
        for other in names:
            if (
                other not in named
                and index_of_what(other) is None
                and are_of_the_same_weights(named.keys(), other)
            ):
                self.obsolete.setdefault(other, name)

    def compare(self, stored: Mapping[str, StoredFile | None]) -> Iterator[Problem]:
        """Yields what contradicts the headers, of those files that have sound ones."""
        all_named = set[str]().union(*self.named.values())
        for other, index in self.obsolete.items():
            if other not in all_named:
                path = os.path.join(self.folder, other)
                yield Problem(
                    OBSOLETE, path, f"{index} does not name it, and loaders may take it for its weights"
                )
        for index, name, found in self._pairs(stored):
            yield from self._lost(index, name, found)
            yield from self._extra(index, name, found)

    def lost(self, stored: Mapping[str, StoredFile | None]) -> Iterator[Problem]:
        """Yields which tensors are not where an index has them, of those files that have sound headers."""
        for index, name, found in self._pairs(stored):
            yield from self._lost(index, name, found)

    def _pairs(self, stored: Mapping[str, StoredFile | None]) -> Iterator[tuple[str, str, StoredFile]]:
        for index, named in self.named.items():
            for name in named:
                if (found := stored.get(name)) is not None:
                    yield index, name, found

    def _lost(self, index: str, name: str, found: StoredFile) -> Iterator[Problem]:
        there = {tensor.name for tensor in found.header.tensors}
        lost = [tensor for tensor in self.named[index][name] if tensor not in there]
        if lost:
            text = f"{index} says that it is in this file{_more(lost)}"
            yield Problem(INDEX, os.path.join(self.folder, name), text, lost[0])

    def _extra(self, index: str, name: str, found: StoredFile) -> Iterator[Problem]:
        if number_of_dcp_shard(name) is not None:
            return  # others have parts of the same tensors
        mapped = self._maps[index]
        extra = [t.name for t in found.header.tensors if mapped.get(t.name) != name]
        if extra:
            place = mapped.get(extra[0])
            where = "does not name it" if place is None else f"says that it is in {place!r}"
            text = f"it is in this file, and {index} {where}{_more(extra)}"
            yield Problem(INDEX, os.path.join(self.folder, name), text, extra[0])


def _more(tensors: list[str]) -> str:
    return f", and so for {len(tensors) - 1} more" if len(tensors) > 1 else ""


def of_indices(folder: str, names: Sequence[str]) -> Indices:
    """Reads the indices of a folder, whose files have these names."""
    found = Indices(folder)
    for name in names:
        suffix = index_of_what(name)
        if suffix is not None:
            found.read(name, suffix, names)
    return found


def _sets_in(names: Iterable[str]) -> Iterable[tuple[str, int, set[int]]]:
    """Returns of sets of numbered shards the name of one, how many there are to be, and the numbers that are there."""
    sets: dict[str, tuple[str, int, set[int]]] = {}
    for name in names:
        place = place_in_set(name)
        if place is not None:
            sets.setdefault(place[0], (name, place[2], set()))[2].add(place[1])
    return sets.values()


def of_sets(folder: str, names: Iterable[str], known: Collection[str]) -> Iterator[Problem]:
    """Yields which sets of numbered shards are not complete, where nothing else says which shards there are."""
    for name, count, numbers in _sets_in(name for name in names if name not in known):
        missing = next((number for number in range(1, count + 1) if number not in numbers), None)
        if missing is not None:
            lost = count - len(numbers)
            text = (
                f"is one of {count} shards, of which {lost} are missing, the first of them number {missing}"
            )
            yield Problem(MISSING, os.path.join(folder, name), f"{text}, and there is no index")


def of_configurations(folder: str, names: Iterable[str]) -> Iterator[Problem]:
    """Yields which configurations are not JSON."""
    for name in names:
        if name not in _CONFIGURATIONS:
            continue
        path = os.path.join(folder, name)
        try:
            found = _parsed(read_text(path))
        except FileNotFoundError:
            continue
        except OSError as error:
            yield Problem(UNREADABLE, path, said(error, path))
        except ValueError as error:
            yield Problem(CONTENTS, path, said(error, path))
        else:
            if not isinstance(found, dict):
                yield Problem(CONTENTS, path, "it does not hold a JSON object")


def _parsed(text: str | bytes) -> object:
    """Returns what a text holds. Raises ``ValueError`` if it is not JSON."""
    try:
        return json.loads(text)  # as transformers reads it: NaN and Infinity are allowed
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON: {error}" if text else "it is empty") from None


def of_dcp(folder: str) -> Iterator[Problem]:
    """Yields what is missing of a checkpoint of ``torch.distributed.checkpoint``."""
    try:
        names = os.listdir(folder)
        if not any(map(is_dcp_metadata, names)):
            files = sorted(name for name in names if name.endswith(DISTCP_SUFFIX))
            if files:
                text = f"is missing, and {files[0]} is there: the save has not ended"
                yield Problem(MISSING, os.path.join(folder, DCP_METADATA), text)
            return
        metadata = read_metadata(folder)
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        path = os.path.join(folder, DCP_METADATA)
        yield Problem(CONTENTS if isinstance(error, ValueError) else UNREADABLE, path, said(error, path))
        return
    ends: dict[str, tuple[int, str]] = {}
    for name, tensor in metadata.tensors.items() if metadata is not None else ():
        for chunk in tensor.chunks:
            ends[chunk.path] = max(ends.get(chunk.path, (0, "")), (chunk.begin + chunk.nbytes, name))
    for path, (end, name) in sorted(ends.items()):
        try:
            nbytes = os.stat(path).st_size
        except (FileNotFoundError, NotADirectoryError):
            yield Problem(MISSING, path, f"is missing, and {DCP_METADATA} names it", name)
        except (OSError, ValueError) as error:
            yield Problem(UNREADABLE, path, said(error, path))
        else:
            if nbytes < end:
                yield Problem(
                    SIZE, path, f"the file has {nbytes} bytes, and {end} are needed: it was cut", name
                )


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
                if name == MANIFEST_NAME or is_manifest(name):
                    entries = read_manifest(self._place(name)).files
                    said += self._of_told({file: entry.nbytes for file, entry in entries.items()}, name)
                elif name == SUMS_NAME:
                    said += self._of_told(dict.fromkeys(read_sums(self._place(name))), name)
            yield from said
        yield from self._of_indices(sound, stored)
        yield from self._of_sets()
        yield from map(self._line, of_dcp(self.path))
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

    def _line(self, problem: Problem) -> str:
        name = os.path.relpath(problem.path, self.path)
        return f"{name} {problem.text}" if problem.kind == MISSING else str(problem._replace(path=name))

    def _of_indices(self, sound: Sequence[str], stored: Mapping[str, StoredFile]) -> Iterator[str]:
        indices = of_indices(self.path, sound)
        yield from map(self._line, indices.problems)
        for index, named in indices.named.items():
            yield from (
                f"{file} is missing, and {index} names it" for file in sorted(named) if file not in self.names
            )
        yield from map(self._line, indices.lost(stored))

    def _of_told(self, sizes: Mapping[str, int | None], told_by: str) -> Iterator[str]:
        for name, wanted in sizes.items():
            try:
                nbytes = os.stat(self._place(name)).st_size
            except (FileNotFoundError, NotADirectoryError):
                yield f"{name} is missing, and {told_by} names it"
                continue
            if wanted not in (None, nbytes):
                yield f"{name} has {nbytes} bytes, and {wanted} says {told_by}"

    def _of_sets(self) -> Iterator[str]:
        """Yields which numbered shards are missing, where no index names any."""
        if any(index_of_what(name) is not None for name in self.files):
            return
        for _, count, numbers in _sets_in(n for n in self.files if number_of_dcp_shard(n) is None):
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
    _parsed(data)
