# SPDX-License-Identifier: Apache-2.0
"""The manifest beside a checkpoint's files: what is in them, and how it can be told whether that is still so.

It says for every tensor where it lies and what the CRC-32 of its bytes is, so that a damaged tensor can be named
and an unchanged one is known. ``SHA256SUMS`` (:mod:`fastshard.formats.sha256sums`) says less, and other tools read
it.

The shards of a serving engine's ranks have vLLM's names and hold nothing but tensors. So nothing in them tells a
shard of two ranks from one of four, or weights as the model defines them from weights that a quantization method
has rearranged. Their manifest does. There is one for each rank, as ranks know nothing of each other.

A manifest is JSON, and no loader's pattern matches its name. It has a line for each tensor.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final, NamedTuple

from .json_text import read_json
from .naming import Names, Ranks
from .safetensors import DTYPE_ORDER, MAX_HEADER_NBYTES

FORMAT: Final = "fastshard manifest"
VERSION: Final = 1
_CRC32: Final = re.compile("[0-9a-f]{8}")
_text: Final = json.encoder.encode_basestring_ascii


class Alias(NamedTuple):
    """A tensor that is not in the files because another tensor holds all of its memory."""

    tensor: str
    """Name of the tensor that is in the files."""
    offset: int
    """Offset in that tensor's bytes where the alias begins."""
    code: str
    """Dtype of the alias, as safetensors calls it."""
    shape: tuple[int, ...]


class TensorEntry(NamedTuple):
    """A tensor's bytes in a file."""

    offset: int
    """Offset of the first byte from the beginning of the file."""
    nbytes: int
    crc32: int | None
    """CRC-32 of the bytes, that of ``zlib.crc32``; ``None`` if it was not taken."""


class FileEntry(NamedTuple):
    """A file of a checkpoint."""

    nbytes: int
    crc32: int | None = None
    """CRC-32 of what precedes the tensors in a safetensors file (length and header), and of the whole of any
    other file; ``None`` if it was not taken."""
    tensors: Mapping[str, TensorEntry] | None = None
    """The tensors of a safetensors file, in the order of their bytes; ``None`` for any other file."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What is known of the files of a checkpoint. Names of files are relative to its folder, with ``/``."""

    files: Mapping[str, FileEntry] = field(default_factory=dict)
    aliases: Mapping[str, Alias] = field(default_factory=dict)

    @property
    def tensors(self) -> Mapping[str, str]:
        """Name of the file that holds each tensor, by the tensor's name. Variants of a model may have the same names in
        several files: then it is the last of them."""
        return {name: file for file, entry in self.files.items() for name in entry.tensors or ()}

    def to_json(self) -> str:
        """Returns the manifest as text. It takes about a microsecond for each tensor."""
        rest: dict[str, object] = {}
        if self.aliases:
            rest["aliases"] = {name: alias._asdict() for name, alias in self.aliases.items()}
        rest |= self._more()
        lines = [f'{{"format": "{FORMAT}", "version": {VERSION}, "files": {{']
        for last, (name, entry) in _with_last(self.files.items()):
            head = f'{_text(name)}: {{"size": {entry.nbytes}, "crc32": {_quoted(entry.crc32)}'
            if entry.tensors is None:
                lines.append(f"{head}}}{last}")
                continue
            lines.append(f'{head}, "tensors": {{')
            lines += [
                f" {_text(tensor)}: [{offset}, {nbytes}, {_quoted(crc)}],"
                for tensor, (offset, nbytes, crc) in entry.tensors.items()
            ]
            if entry.tensors:
                lines[-1] = lines[-1][:-1]
            lines.append(f"}}}}{last}")
        lines.append("}")
        lines += [f", {_text(name)}: {json.dumps(value)}" for name, value in rest.items()]
        return "\n".join([*lines, "}\n"])

    def _more(self) -> dict[str, object]:
        return {}


@dataclass(frozen=True, kw_only=True)
class RankManifest(Manifest):
    """What is known of one rank's shards."""

    ranks: Ranks
    pattern: str
    dp_replicated: bool
    """Whether all ranks of data parallelism have the same weights."""
    writer: tuple[str, str] | None
    """Name and version of the engine that the weights come from."""
    quantization: str | None
    post_processed: bool | None
    """Whether the engine had rearranged the weights after loading them; ``None`` if that is not known."""

    def _more(self) -> dict[str, object]:
        return {
            "rank": {
                **{name: getattr(self, name) for name in _OF_A_RANK},
                "ranks": asdict(self.ranks),
                "writer": self.writer and {"name": self.writer[0], "version": self.writer[1]},
            }
        }


_OF_A_RANK: Final = tuple(
    found.name for found in fields(RankManifest) if found.name not in ("files", "aliases")
)


def _quoted(crc32: int | None) -> str:
    return "null" if crc32 is None else f'"{crc32:08x}"'


def _with_last(items: Any) -> Iterator[tuple[str, Any]]:
    """Yields each item with what follows it in a list: a comma, or nothing behind the last one."""
    items = list(items)
    for number, item in enumerate(items, 1):
        yield "," if number < len(items) else "", item


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Reads and checks a manifest. What it says of the files is compared with them when they are read.

    Raises ``FileNotFoundError`` and other ``OSError``, and ``ValueError`` with the file's name for anything
    that is not a manifest which this version understands.
    """
    with open(path, "rb") as file:
        data = file.read(MAX_HEADER_NBYTES + 1)
    try:
        if len(data) > MAX_HEADER_NBYTES:
            raise ValueError(f"it is longer than {MAX_HEADER_NBYTES} bytes")
        return parse_manifest(data)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)!r} is not a manifest of fastshard: {error}") from None


def read_rank_manifest(path: str | os.PathLike[str]) -> RankManifest:
    """Reads and checks the manifest of a rank's shards. Raises as :func:`read_manifest`."""
    manifest = read_manifest(path)
    if not isinstance(manifest, RankManifest):
        raise ValueError(f"{os.fspath(path)!r} is not a manifest of a rank's shards")
    return manifest


def parse_manifest(data: bytes) -> Manifest:
    """Returns the manifest that a text describes. Raises ``ValueError`` for anything else."""
    found = read_json(data)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f'no object with "format": "{FORMAT}"')
    if found.get("version") != VERSION:
        raise ValueError(
            f"its version is {found.get('version')!r}, and this fastshard reads version {VERSION}"
        )
    _only(found, "format", "version", "files", "aliases", "rank")
    files = {name: _file(name, entry) for name, entry in _get(found, "files", dict).items()}
    aliases = _get(found, "aliases", dict) if "aliases" in found else {}
    aliases = {name: _alias(alias) for name, alias in aliases.items()}
    known = {name for entry in files.values() for name in entry.tensors or ()}
    for name, alias in aliases.items():
        if name in known or alias.tensor not in known:
            raise ValueError(f"tensor {name!r} is an alias of {alias.tensor!r}")
    if "rank" not in found:
        return Manifest(files=files, aliases=aliases)
    return _of_rank(_get(found, "rank", dict), files, aliases)


def _of_rank(
    found: dict[str, Any], files: Mapping[str, FileEntry], aliases: Mapping[str, Alias]
) -> RankManifest:
    ranks, writer = _get(found, "ranks", dict), _get(found, "writer", dict, type(None))
    if ranks.keys() != Ranks.__dataclass_fields__.keys():
        raise ValueError(f'"ranks" has the fields {sorted(ranks)}')
    manifest = RankManifest(
        files=files,
        aliases=aliases,
        ranks=Ranks(**ranks),
        pattern=_get(found, "pattern", str),
        dp_replicated=_get(found, "dp_replicated", bool),
        writer=writer and (_get(writer, "name", str), _get(writer, "version", str)),
        quantization=_get(found, "quantization", str, type(None)),
        post_processed=_get(found, "post_processed", bool, type(None)),
    )
    seen: dict[str, str] = {}
    for file, entry in files.items():
        for tensor in entry.tensors or ():
            if seen.setdefault(tensor, file) != file:
                raise ValueError(f"tensor {tensor!r} is in two files")
    names = Names(manifest.pattern, manifest.ranks)
    for name in files:
        if not names.is_part(name):
            raise ValueError(f"file {name!r} is not one of {names.glob!r}")
    return manifest


def _file(name: str, found: Any) -> FileEntry:
    if type(found) is not dict or os.path.isabs(name) or not name or ".." in name.split("/"):
        raise ValueError(f"the entry of file {name!r} is {found!r:.100}")
    _only(found, "size", "crc32", "tensors")
    nbytes = _get(found, "size", int)
    tensors = None if "tensors" not in found else _get(found, "tensors", dict)
    if tensors is not None:
        tensors = {tensor: _tensor(tensor, entry, nbytes) for tensor, entry in tensors.items()}
    return FileEntry(nbytes, _crc32(found.get("crc32")), tensors)


def _tensor(name: str, found: Any, end: int) -> TensorEntry:
    if type(found) is not list or len(found) != 3 or type(found[0]) is not int or type(found[1]) is not int:
        raise ValueError(f"the entry of tensor {name!r} is {found!r:.100}")
    if found[0] < 0 or found[1] < 0 or sum(found[:2]) > end:
        raise ValueError(f"tensor {name!r} lies at {found[:2]} of a file of {end} bytes")
    return TensorEntry(found[0], found[1], _crc32(found[2]))


def _crc32(found: Any) -> int | None:
    if found is None:
        return None
    if type(found) is not str or not _CRC32.fullmatch(found):
        raise ValueError(f"a CRC-32 is {found!r:.100}")
    return int(found, 16)


def _only(found: Mapping[str, Any], *known: str) -> None:
    """Refuses other fields: a field whose name is damaged would say nothing, and nobody would notice."""
    for key in found:
        if key not in known:
            raise ValueError(f"no field {key!r} is known")


def _get(found: Mapping[str, Any], key: str, *types: type) -> Any:
    value = found.get(key)
    if type(value) not in types:
        raise ValueError(f'"{key}" is {value!r:.100}')
    return value


def _alias(found: Any) -> Alias:
    if type(found) is not dict:
        raise ValueError(f"an alias is {found!r:.100}")
    shape = _get(found, "shape", list)
    alias = Alias(
        _get(found, "tensor", str), _get(found, "offset", int), _get(found, "code", str), tuple(shape)
    )
    if alias.offset < 0 or alias.code not in DTYPE_ORDER or any(type(n) is not int or n < 0 for n in shape):
        raise ValueError(f"an alias is {found!r:.200}")
    return alias
