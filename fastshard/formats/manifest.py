# SPDX-License-Identifier: Apache-2.0
"""The manifest beside a rank's shards, which says for which rank they are, who saved them, and in which
state.

The shards have vLLM's names and hold nothing but tensors. So nothing in them tells a shard of two ranks from
one of four, or weights as the model defines them from weights that a quantization method has rearranged. The
manifest does. There is one for each rank, as ranks know nothing of each other. It is JSON, and no loader's
pattern matches its name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final, NamedTuple

from .json_text import read_json
from .naming import Names, Ranks
from .safetensors import DTYPE_ORDER, MAX_HEADER_NBYTES

FORMAT: Final = "fastshard sharded state"
VERSION: Final = 1


class Alias(NamedTuple):
    """A tensor that is not in the files because another tensor holds all of its memory."""

    tensor: str
    """Name of the tensor that is in the files."""
    offset: int
    """Offset in that tensor's bytes where the alias begins."""
    code: str
    """Dtype of the alias, as safetensors calls it."""
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Manifest:
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
    files: Mapping[str, int] = field(default_factory=dict)
    """Size in bytes of each file, by its name."""
    tensors: Mapping[str, str] = field(default_factory=dict)
    """Name of the file that holds each tensor, by the tensor's name."""
    aliases: Mapping[str, Alias] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(
            {
                "format": FORMAT,
                "version": VERSION,
                **asdict(self),
                "writer": self.writer and {"name": self.writer[0], "version": self.writer[1]},
                "aliases": {name: alias._asdict() for name, alias in self.aliases.items()},
            },
            indent=1,
        )


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
        return _parse(read_json(data))
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)!r} is not a manifest of sharded weights: {error}") from None


def _parse(found: Any) -> Manifest:
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f'no object with "format": "{FORMAT}"')
    if found.get("version") != VERSION:
        raise ValueError(f"version {found.get('version')!r}; this fastshard reads version {VERSION}")
    ranks, writer = _get(found, "ranks", dict), _get(found, "writer", dict, type(None))
    if ranks.keys() != Ranks.__dataclass_fields__.keys():
        raise ValueError(f'"ranks" has the fields {sorted(ranks)}')
    manifest = Manifest(
        ranks=Ranks(**ranks),
        pattern=_get(found, "pattern", str),
        dp_replicated=_get(found, "dp_replicated", bool),
        writer=writer and (_get(writer, "name", str), _get(writer, "version", str)),
        quantization=_get(found, "quantization", str, type(None)),
        post_processed=_get(found, "post_processed", bool, type(None)),
        files=_get(found, "files", dict),
        tensors=_get(found, "tensors", dict),
        aliases={name: _alias(alias) for name, alias in _get(found, "aliases", dict).items()},
    )
    names = Names(manifest.pattern, manifest.ranks)
    for name, nbytes in manifest.files.items():
        if not names.is_part(name):
            raise ValueError(f"file {name!r} is not one of {names.glob!r}")
        if type(nbytes) is not int:
            raise ValueError(f"file {name!r} has a size of {nbytes!r}")
    for name, file in manifest.tensors.items():
        if not isinstance(file, str) or file not in manifest.files:
            raise ValueError(f"tensor {name!r} is in {file!r}, which is not in the list of files")
    for name, alias in manifest.aliases.items():
        if name in manifest.tensors or alias.tensor not in manifest.tensors:
            raise ValueError(f"tensor {name!r} is an alias of {alias.tensor!r}")
    return manifest


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
