# SPDX-License-Identifier: Apache-2.0
"""What lies beside a rank's shards and says what they are: for which rank of how many, saved by whom, in which state.

The shards have vLLM's names and hold nothing but tensors, so nothing in them tells a shard of two ranks from one of
four, or weights as the model defines them from weights that a quantization method has rearranged. Their manifest
does, one for each rank, as ranks know nothing of each other. It is JSON, and no loader's glob finds it.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import string
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final, NamedTuple

from .json_text import read_json
from .safetensors import MAX_HEADER_NBYTES, RANKS

FORMAT: Final = "fastshard sharded state"
VERSION: Final = 1

TP_PATTERN: Final = "model-rank-{rank}-part-{part}.safetensors"
"""vLLM's and SGLang's default, without pipeline parallelism."""
PP_PATTERN: Final = "model-pp-{pp_rank}-tp-{tp_rank}-part-{part}.safetensors"
"""vLLM's default with it."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """A process's place among those that serve one model. Raises ``ValueError`` for a rank that is none."""

    tp_rank: int = 0
    tp_size: int = 1
    """Tensor parallelism."""
    pp_rank: int = 0
    pp_size: int = 1
    """Pipeline parallelism."""
    dp_rank: int = 0
    dp_size: int = 1
    """Data parallelism."""
    ep_rank: int = 0
    ep_size: int = 1
    """Expert parallelism: its ranks are those of the other dimensions, counted once more."""

    def __post_init__(self) -> None:
        for kind in ("tp", "pp", "dp", "ep"):
            rank, size = getattr(self, f"{kind}_rank"), getattr(self, f"{kind}_size")
            if type(rank) is not int or type(size) is not int or not 0 <= rank < size:
                raise ValueError(f"{kind}_rank={rank!r} is no rank of {kind}_size={size!r}")


class Names:
    """The names of one rank's files: a pattern with this rank's numbers in it.

    Raises ``ValueError`` for a pattern by which ranks would overwrite each other or files would not be found again.
    """

    def __init__(self, pattern: str | None, ranks: Ranks) -> None:
        if pattern is None:
            pattern = PP_PATTERN if ranks.pp_size > 1 else TP_PATTERN
        self.pattern = pattern
        self._numbers = {
            "rank": ranks.tp_rank,
            "tp_rank": ranks.tp_rank,
            "pp_rank": ranks.pp_rank,
            "dp_rank": ranks.dp_rank,
        }
        self.fields = self._fields()
        self._check(ranks)
        self.glob = self._render("*")
        """What vLLM's loader looks for."""
        self._parts = re.compile(r"(0|[1-9]\d*)".join(map(re.escape, self.glob.split("*"))), re.ASCII)
        stem = self._render("").removesuffix(".safetensors").rstrip("-_.").removesuffix("-part")
        self.manifest = f"fastshard-{stem}.json"
        if self.glob in ("", ".", ".."):
            raise self._wrong("is no name of a file")
        if fnmatch.fnmatchcase(self.manifest, self.glob):
            raise ValueError(f"pattern {pattern!r} would make loaders take {self.manifest!r} for a shard")

    def _fields(self) -> list[str]:
        """In order; the text between two of them keeps their numbers apart."""
        found: list[str] = []
        before = "-"
        for text, name, spec, conversion in self._parsed():
            between = before + text
            if found and (not between or between[0].isdigit()):
                raise self._wrong(f"needs something other than a digit behind {{{found[-1]}}}")
            if name is None:
                break
            if name not in (*self._numbers, "part"):
                raise self._wrong(
                    f"has an unknown field {{{name}}}; known are {', '.join(self._numbers)}, part"
                )
            if name == "part" and (spec or "part" in found):
                raise self._wrong("must name {part} once, as it is")
            if conversion or not re.fullmatch(r"0?\d?d?", spec or "", re.ASCII):
                raise self._wrong(f"formats {{{name}}} as something other than a number")
            if not between or between[-1].isdigit():
                raise self._wrong(f"needs something other than a digit before {{{name}}}")
            found.append(name)
            before = ""
        return found

    def _parsed(self) -> list[tuple[str, str | None, str | None, str | None]]:
        if not isinstance(self.pattern, str):
            raise TypeError(f"pattern must be a str, not {type(self.pattern).__name__}")
        if any(sign in self.pattern for sign in "*?[/\0"):
            raise self._wrong("has one of *?[/ in it")
        try:
            parsed = list(string.Formatter().parse(self.pattern))
        except ValueError as error:
            raise self._wrong(f"is none: {error}") from None
        merged: list[tuple[str, str | None, str | None, str | None]] = []
        for text, *rest in parsed:  # "{{" and "}}" come as texts of their own
            if merged and merged[-1][1] is None:
                text = merged.pop()[0] + text
            merged.append((text, *rest))  # type: ignore[arg-type]
        return merged

    def _check(self, ranks: Ranks) -> None:
        if ranks.tp_size > 1 and not {"rank", "tp_rank"}.intersection(self.fields):
            raise self._wrong(f"has no {{rank}}: {ranks.tp_size} ranks would write the same files")
        if ranks.pp_size > 1 and "pp_rank" not in self.fields:
            raise self._wrong(f"has no {{pp_rank}}: {ranks.pp_size} stages would write the same files")
        if ranks.pp_size == 1 and "pp_rank" in self.fields:
            raise self._wrong("has {pp_rank}, which there is only where pp_size is not 1")

    def _wrong(self, what: str) -> ValueError:
        return ValueError(f"pattern {self.pattern!r} {what}")

    def _render(self, part: str) -> str:
        return self.pattern.format(part=part, **self._numbers)

    def part(self, number: int) -> str:
        """The file of this part."""
        if number and "part" not in self.fields:
            raise self._wrong("has no {part}, and there is more than one")
        return self._render(str(number))

    def is_part(self, name: str) -> bool:
        """Whether it is the name of a part of this rank."""
        return self._parts.fullmatch(name) is not None


class Alias(NamedTuple):
    """A tensor that is not in the files, as its memory is all in that of another one."""

    tensor: str
    """The one that is."""
    offset: int
    """Where in its bytes it begins."""
    code: str
    """Its dtype, as safetensors calls it."""
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What is known of one rank's shards."""

    ranks: Ranks
    pattern: str
    dp_replicated: bool
    """Whether all ranks of data parallelism have the same weights."""
    writer: tuple[str, str] | None
    """Name and version of the engine that the weights lay in."""
    quantization: str | None
    post_processed: bool | None
    """Whether the engine had rearranged the weights after loading them; ``None``: not known."""
    files: Mapping[str, int] = field(default_factory=dict)
    """Name -> size in bytes."""
    tensors: Mapping[str, str] = field(default_factory=dict)
    """Name -> the file it is in."""
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
    """Reads and checks a manifest. What it says of the files is compared with them by who reads those.

    Raises ``FileNotFoundError`` and other ``OSError``, and ``ValueError`` with the file's name for anything that is
    not a manifest this version understands.
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
    if alias.offset < 0 or alias.code not in RANKS or any(type(n) is not int or n < 0 for n in shape):
        raise ValueError(f"an alias is {found!r:.200}")
    return alias
