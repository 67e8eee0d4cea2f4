# SPDX-License-Identifier: Apache-2.0
"""What the files of a checkpoint say of each other and of themselves, compared without digests."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Final

from ..api.checked import (
    CONTENTS,
    DAMAGED,
    INDEX,
    MISSING,
    OBSOLETE,
    SIZE,
    UNREADABLE,
    Check,
    Problem,
    said,
)
from ..engine.checksums import Sums
from ..formats.dcp_metadata import read_metadata
from ..formats.file_kinds import TORCH, what_is
from ..formats.hf_index import StoredFile, open_file, read_text, weight_map
from ..formats.naming import (
    DCP_METADATA,
    DISTCP_SUFFIX,
    are_of_the_same_weights,
    index_of_what,
    is_dcp_metadata,
    number_of_dcp_shard,
    place_in_set,
)
from ..formats.torch_archive import UnknownLayout, records_of
from ..formats.torch_items import Edges

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
_MOST_RECORDS: Final = 1 << 20


class Indices:
    """The indices of a folder."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.problems: list[Problem] = []
        self.named: dict[str, set[str]] = {}
        """Names of the files that each index names, by its name."""
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
        self.named[name] = named = set(mapped.values())
        for other in names:
            if other not in named and index_of_what(other) is None and are_of_the_same_weights(named, other):
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
        for index, mapped in self._maps.items():
            expected: dict[str, list[str]] = {}
            for tensor, name in mapped.items():
                expected.setdefault(name, []).append(tensor)
            for name, tensors in expected.items():
                found = stored.get(name)
                if found is not None:
                    yield from self._compare(index, mapped, name, tensors, found)

    def _compare(
        self, index: str, mapped: Mapping[str, str], name: str, tensors: list[str], found: StoredFile
    ) -> Iterator[Problem]:
        path = os.path.join(self.folder, name)
        there = {tensor.name for tensor in found.header.tensors}
        lost = [tensor for tensor in tensors if tensor not in there]
        if lost:
            yield Problem(INDEX, path, f"{index} says that it is in this file{_more(lost)}", lost[0])
        if number_of_dcp_shard(name) is not None:
            return  # others have parts of the same tensors
        extra = [t.name for t in found.header.tensors if mapped.get(t.name) != name]
        if extra:
            place = mapped.get(extra[0])
            where = "does not name it" if place is None else f"says that it is in {place!r}"
            yield Problem(INDEX, path, f"it is in this file, and {index} {where}{_more(extra)}", extra[0])


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


def of_sets(folder: str, names: Iterable[str], known: Collection[str]) -> Iterator[Problem]:
    """Yields which sets of numbered shards are not complete, where nothing else says which shards there are."""
    sets: dict[str, dict[int, tuple[str, int]]] = {}
    for name in names:
        place = None if name in known else place_in_set(name)
        if place is not None:
            sets.setdefault(place[0], {})[place[1]] = name, place[2]
    for shards in sets.values():
        name, count = next(iter(shards.values()))
        missing = next((number for number in range(1, count + 1) if number not in shards), None)
        if missing is not None:
            lost = count - len(shards)
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
            found = json.loads(read_text(path))  # as transformers reads it: NaN and Infinity are allowed
        except FileNotFoundError:
            continue
        except OSError as error:
            yield Problem(UNREADABLE, path, said(error, path))
        except (ValueError, RecursionError) as error:
            yield Problem(CONTENTS, path, f"it is not JSON: {said(error, path)}")
        else:
            if not isinstance(found, dict):
                yield Problem(CONTENTS, path, "it does not hold a JSON object")


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


def names_in(path: str, index: str) -> list[str]:
    """Returns the names of the files of an index, as far as it can be read. What is wrong with it is said elsewhere."""
    suffix = index_of_what(index)
    try:
        return [] if suffix is None else sorted(set(weight_map(read_text(path), path, suffix).values()))
    except (OSError, ValueError):
        return []
