# SPDX-License-Identifier: Apache-2.0
"""The names of checkpoint files: which one is a shard, an index, a rank's part or a manifest.

A folder of weights can have names of five families, and all their patterns are here:

- Hugging Face's: ``model.safetensors``, ``model-00001-of-00002.safetensors``, ``model.safetensors.index.json``, the same
  for ``pytorch_model.bin``, and those of a variant (``model.fp16-00001-of-00002.safetensors`` and
  ``model.safetensors.index.fp16.json``);
- those of sharded state in vLLM and SGLang: ``model-rank-0-part-0.safetensors`` (:class:`Names`);
- fastshard's own for the manifest beside sharded state: ``fastshard-model-rank-0.json``;
- fastshard's own for a checkpoint that was cut into the parts of ranks: ``rank-0/`` and ``tensor_parallel.json``;
- those of ``torch.distributed.checkpoint``: ``shard-00001-model-00001-of-00001.safetensors`` (:func:`dcp_shard`), and
  ``__0_0.distcp`` beside ``.metadata``.

The functions work on names only; no file is looked for.
"""

from __future__ import annotations

import fnmatch
import functools
import os
import re
import string
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

WEIGHTS_SUFFIX: Final = ".safetensors"
PICKLED_SUFFIX: Final = ".bin"
"""Suffix of the files that transformers and huggingface_hub save with ``torch.save``."""
TORCH_SUFFIXES: Final = (".pt", ".pth", PICKLED_SUFFIX, ".ckpt")
"""Suffixes of files that ``torch.save`` makes."""

_INDEX_ENDING: Final = ".index.json"
INDEX_SUFFIX: Final = f"{WEIGHTS_SUFFIX}{_INDEX_ENDING}"
INDEX_NAME: Final = f"model{INDEX_SUFFIX}"
PICKLED_NAME: Final = f"pytorch_model{PICKLED_SUFFIX}"
PICKLED_INDEX_NAME: Final = f"{PICKLED_NAME}{_INDEX_ENDING}"
HUB_PATTERN: Final = f"model{{suffix}}{WEIGHTS_SUFFIX}"
"""The default pattern of huggingface_hub."""

TP_PATTERN: Final = f"model-rank-{{rank}}-part-{{part}}{WEIGHTS_SUFFIX}"
"""The default pattern of vLLM and SGLang, without pipeline parallelism."""
PP_PATTERN: Final = f"model-pp-{{pp_rank}}-tp-{{tp_rank}}-part-{{part}}{WEIGHTS_SUFFIX}"
"""The default pattern of vLLM with pipeline parallelism."""
_MANIFEST_PREFIX: Final = "fastshard-"
_MANIFEST_SUFFIX: Final = ".json"

ROOT_MANIFEST: Final = f"tensor_parallel{_INDEX_ENDING}"
RANK_MANIFEST: Final = "tensor_parallel.json"
MANIFESTS: Final = (ROOT_MANIFEST, RANK_MANIFEST)
"""The manifests of a checkpoint that was cut into the parts of ranks (:mod:`fastshard.tools.rank_folders`)."""

MANIFEST_NAME: Final = "fastshard.manifest.json"
"""The manifest of an ordinary folder (:mod:`fastshard.formats.manifest`)."""
SUMS_NAME: Final = "SHA256SUMS"
"""What ``sha256sum -c`` reads (:mod:`fastshard.formats.sha256sums`)."""
RECORDS: Final = (MANIFEST_NAME, SUMS_NAME)
"""Files that say what is in the others of their folder."""

_ALL_WEIGHTS: Final = (WEIGHTS_SUFFIX, *TORCH_SUFFIXES, ".h5", ".msgpack", ".gguf", ".onnx")
_SERVED_WEIGHTS: Final = (WEIGHTS_SUFFIX, PICKLED_SUFFIX, ".pt", ".pth", ".gguf")
_SHARD: Final = r"(-\d{5}-of-\d{5})?"
_WEIGHTS: Final = re.compile(rf"(?P<stem>.+?){_SHARD}(?P<suffix>\.safetensors|\.bin)")
_INDEX: Final = re.compile(r"(?P<stem>.+)(?P<suffix>\.safetensors|\.bin)\.index(?P<variant>\..+)?\.json")
_NUMBERED: Final = re.compile(r".*-\d+\.safetensors", re.DOTALL)
_OF_RANK: Final = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
_RANK_FOLDER: Final = re.compile(r"rank-\d+")
DCP_METADATA: Final = ".metadata"
DISTCP_SUFFIX: Final = ".distcp"
_OBJECTS: Final = "objects.fastshard"
_DCP_SHARD: Final = re.compile(
    rf"shard-(?P<number>\d{{5,}})-(model-\d{{5,}}-of-\d{{5,}}(-\d+)?\.safetensors|{re.escape(_OBJECTS)})",
    re.ASCII,
)
_DCP_WHOLE: Final = re.compile(
    rf"model-\d{{5,}}-of-\d{{5,}}(-\d+)?\.safetensors|{re.escape(_OBJECTS)}", re.ASCII
)
_DCP_RANKS_METADATA: Final = re.compile(rf"__(\d+){re.escape(DCP_METADATA)}", re.ASCII)
_DISTCP: Final = re.compile(rf"__(\d+)_\d+{re.escape(DISTCP_SUFFIX)}", re.ASCII)


def is_weights(name: str) -> bool:
    """Returns whether a Hugging Face loader takes a file of this name for weights."""
    return _WEIGHTS.fullmatch(name) is not None


def is_numbered(name: str) -> bool:
    """Returns whether loaders may find the file by a pattern and open it: a shard, or a rank's part."""
    return _NUMBERED.fullmatch(name) is not None


def shard_of(pattern: str, number: int, count: int) -> str:
    """Returns the name of a shard by a pattern with ``{suffix}``, as huggingface_hub numbers them, from 1."""
    return pattern.format(suffix=f"-{number:05d}-of-{count:05d}")


def goes_with_weights(name: str) -> bool:
    """Returns whether the file holds a model's weights in some format, or is an index of such files."""
    return name.endswith((*_ALL_WEIGHTS, *(f"{suffix}{_INDEX_ENDING}" for suffix in _ALL_WEIGHTS)))


def is_of_rank(name: str) -> bool:
    """Returns whether transformers takes it for one rank's file of a distributed checkpoint."""
    return _OF_RANK.fullmatch(name) is not None


def is_served(name: str) -> bool:
    """Returns whether vLLM may load weights from the file, or find them through it: weights, or an index."""
    return name.endswith((*_SERVED_WEIGHTS, INDEX_SUFFIX, f"{PICKLED_SUFFIX}{_INDEX_ENDING}"))


def are_of_the_same_weights(names: Iterable[str], name: str, *, in_any_container: bool = False) -> bool:
    """Returns whether a file belongs to the same weights as one of ``names``: as a shard, the only file, or
    an index. ``in_any_container``: also as a shard or an index in the other container."""
    found = _WEIGHTS.fullmatch(name) or _INDEX.fullmatch(name)
    if found is None:
        return False
    stem = found["stem"] + (found.groupdict().get("variant") or "")
    also = in_any_container and (found.re is _INDEX or found[2] is not None)
    return any(
        match["stem"] == stem and (also or match["suffix"] == found["suffix"])
        for match in map(_WEIGHTS.fullmatch, names)
        if match
    )


def index_of_what(name: str) -> str | None:
    """Returns the suffix of the files that an index of this name is of; ``None`` if it is no index's name."""
    found = _INDEX.fullmatch(name)
    return None if found is None else found["suffix"]


def place_in_set(name: str) -> tuple[str, int, int] | None:
    """Returns of a shard what all shards of its checkpoint have in common, its number, and how many there are; ``None``
    for other files."""
    found = _WEIGHTS.fullmatch(name)
    if found is None or found[2] is None or number_of_dcp_shard(name) is not None:
        return None
    number, _, count = found[2][1:].partition("-of-")
    return f"{found['stem']} {found['suffix']} {count}", int(number), int(count)


def pickled_stems(names: Iterable[str]) -> set[str]:
    """Returns how the names of those safetensors files begin that loaders prefer to the pickled files
    ``names``."""
    found = {
        match["stem"]
        for match in map(_WEIGHTS.fullmatch, names)
        if match and match["suffix"] == PICKLED_SUFFIX
    }
    return found | {stem.removeprefix("pytorch_") for stem in found if stem.startswith("pytorch_model")}


def is_safetensors_of(stems: set[str], name: str) -> bool:
    """Returns whether it is a safetensors file, or an index of such files, whose name begins with one of
    ``stems``."""
    found = _WEIGHTS.fullmatch(name) or _INDEX.fullmatch(name)
    return found is not None and found["suffix"] == WEIGHTS_SUFFIX and found["stem"] in stems


def visibility(path: str) -> tuple[int, str]:
    """Sorts paths in the order in which they may appear.

    An index or a manifest makes loaders open its shards, and a single file is preferred to an index, so these
    come last.
    """
    name = os.path.basename(path)
    shows = name.endswith(_INDEX_ENDING) or name.startswith(_MANIFEST_PREFIX) or name in RECORDS
    return (2 if shows else 1 if path.endswith((WEIGHTS_SUFFIX, PICKLED_SUFFIX)) else 0), path


def index_of(pattern: str) -> str:
    """Returns the name of the index of files of a pattern with ``{suffix}``."""
    return pattern.format(suffix="") + _INDEX_ENDING


@functools.lru_cache(maxsize=64)
def names_of(pattern: str) -> re.Pattern[str]:
    """Returns a pattern that matches the only file, the shards and the index of a save."""
    prefix, _, suffix = pattern.partition("{suffix}")
    return re.compile(f"{re.escape(prefix)}{_SHARD}{re.escape(suffix)}({re.escape(_INDEX_ENDING)})?")


def rank_folder(rank: int) -> str:
    """Returns the name of a rank's folder in a checkpoint that was cut into the parts of ranks."""
    return f"rank-{rank}"


def is_rank_folder(name: str) -> bool:
    """Returns whether it is the name of some rank's folder, as :func:`rank_folder` makes it."""
    return _RANK_FOLDER.fullmatch(name) is not None


def dcp_shard(shard: int | None, file: int, files: int) -> str:
    """Returns the name of a file of a rank in the layout of ``HuggingFaceStorageWriter``. ``shard`` is ``None`` if the
    tensors are not in shards."""
    return f"{_of_shard(shard)}model-{file:05d}-of-{files:05d}{WEIGHTS_SUFFIX}"


def dcp_layer(name: str, layer: int) -> str:
    """Returns the name of the file with further chunks of tensors of which such a file has a chunk already."""
    return f"{name.removesuffix(WEIGHTS_SUFFIX)}-{layer}{WEIGHTS_SUFFIX}" if layer > 1 else name


def dcp_objects(name: str) -> str:
    """Returns the name of the file with what a rank saves besides the tensors in such a file. Other readers take it
    for no weights."""
    return _of_shard(number_of_dcp_shard(name)) + _OBJECTS


def dcp_renumbered(name: str, shard: int) -> str:
    """Returns the name of the same file of another shard."""
    return _of_shard(shard) + name.partition("-")[2].partition("-")[2]


def _of_shard(shard: int | None) -> str:
    return "" if shard is None else f"shard-{shard:05d}-"


def number_of_dcp_shard(name: str) -> int | None:
    """Returns the number of the shard of which the file is one, as :func:`dcp_shard` and :func:`dcp_objects` name it;
    ``None`` for others."""
    found = _DCP_SHARD.fullmatch(name)
    return None if found is None else int(found["number"])


def is_dcp_objects(name: str) -> bool:
    """Returns whether the file has what ranks save besides tensors."""
    return name == _OBJECTS or (name.endswith(_OBJECTS) and number_of_dcp_shard(name) is not None)


def is_of_dcp_whole(name: str) -> bool:
    """Returns whether the file may be of a save that is not in shards, its index left out."""
    return _DCP_WHOLE.fullmatch(name) is not None


def rank_of_distcp(name: str) -> int | None:
    """Returns the rank whose ``.distcp`` file or metadata it is; ``None`` for others."""
    found = _DISTCP.fullmatch(name) or _DCP_RANKS_METADATA.fullmatch(name)
    return None if found is None else int(found[1])


def dcp_ranks_metadata(rank: int) -> str:
    """Returns the name of the metadata of a rank that saves on its own (``use_collectives=False``)."""
    return f"__{rank}{DCP_METADATA}"


def is_dcp_metadata(name: str) -> bool:
    """Returns whether it is the name of the metadata of all ranks, or of one that has saved on its own."""
    return name == DCP_METADATA or _DCP_RANKS_METADATA.fullmatch(name) is not None


def is_manifest(name: str) -> bool:
    """Returns whether it is the name of the manifest of some rank's sharded state."""
    within = len(name) > len(_MANIFEST_PREFIX) + len(_MANIFEST_SUFFIX)
    return within and name.startswith(_MANIFEST_PREFIX) and name.endswith(_MANIFEST_SUFFIX)


def stale_parts(pattern: str | None) -> Callable[[str], bool]:
    """Returns a function that tells whether a name is of an earlier save, of any rank.

    These are parts with this pattern or vLLM's own ones, and their manifests.
    """
    patterns = []
    for known in {TP_PATTERN, PP_PATTERN, pattern or TP_PATTERN}:
        pieces = (
            re.escape(text) + ("" if name is None else r"\d+")
            for text, name, _, _ in string.Formatter().parse(known)
        )
        patterns.append(re.compile("".join(pieces), re.ASCII))
    return lambda name: is_manifest(name) or any(pattern.fullmatch(name) for pattern in patterns)


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The rank of a process among those that serve one model. Raises ``ValueError`` for a rank that cannot
    be."""

    tp_rank: int = 0
    tp_size: int = 1
    """Number of ranks of tensor parallelism."""
    pp_rank: int = 0
    pp_size: int = 1
    """Number of ranks of pipeline parallelism."""
    dp_rank: int = 0
    dp_size: int = 1
    """Number of ranks of data parallelism."""
    ep_rank: int = 0
    ep_size: int = 1
    """Number of ranks of expert parallelism. They are the ranks of the other dimensions, numbered once more."""

    def __post_init__(self) -> None:
        for kind in ("tp", "pp", "dp", "ep"):
            rank, size = getattr(self, f"{kind}_rank"), getattr(self, f"{kind}_size")
            if type(rank) is not int or type(size) is not int or not 0 <= rank < size:
                raise ValueError(f"{kind}_rank={rank!r} is not a rank of {kind}_size={size!r}")


class Names:
    """The names of one rank's files: a pattern with this rank's numbers in it.

    Raises ``ValueError`` for a pattern with which ranks would overwrite each other, or files would not be
    found again.
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
        stem = self._render("").removesuffix(WEIGHTS_SUFFIX).rstrip("-_.").removesuffix("-part")
        self.manifest = f"{_MANIFEST_PREFIX}{stem}{_MANIFEST_SUFFIX}"
        if self.glob in ("", ".", ".."):
            raise self._wrong("is not the name of a file")
        if fnmatch.fnmatchcase(self.manifest, self.glob):
            raise ValueError(f"pattern {pattern!r} would make loaders take {self.manifest!r} for a shard")

    def _fields(self) -> list[str]:
        """The fields of the pattern in order. The text between two of them keeps their numbers apart."""
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
            raise self._wrong(f"is not a pattern: {error}") from None
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
        """Returns the name of the file of this part."""
        if number and "part" not in self.fields:
            raise self._wrong("has no {part}, and there is more than one")
        return self._render(str(number))

    def is_part(self, name: str) -> bool:
        """Returns whether it is the name of a part of this rank."""
        return self._parts.fullmatch(name) is not None
