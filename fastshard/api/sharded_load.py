# SPDX-License-Identifier: Apache-2.0
"""Sharded state, loaded: every rank of a serving engine fills its own tensors from its own files.

The files are vLLM's, SGLang's or :func:`fastshard.save_sharded_state`'s. Everything is compared before a byte is read.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable, Iterable, Mapping
from typing import BinaryIO, Final, NamedTuple

import torch
from safetensors import SafetensorError

from ..engine import tensors as _tensors
from ..engine.reading import Piece, read_into
from ..engine.sharing import overlapping
from ..formats.manifest import Alias, RankManifest, read_rank_manifest
from ..formats.naming import SUMS_NAME, Names, Ranks, is_manifest
from ..formats.safetensors import read_header
from ..publish.linking import is_placeholder
from .checked import Check, read_known, why_unsound
from .sharded_state import State, has_memory, is_flat, nbytes_of, state_of, without_subtensors

_FAULTS_SHOWN: Final = 10


def load_sharded_state(
    model_or_state_dict: State,
    path: str | os.PathLike[str],
    *,
    tp_rank: int = 0,
    tp_size: int = 1,
    pp_rank: int = 0,
    pp_size: int = 1,
    dp_rank: int = 0,
    dp_size: int = 1,
    ep_rank: int = 0,
    ep_size: int = 1,
    pattern: str | None = None,
    reader: tuple[str, str] | None = None,
    quantization: str | None = None,
    post_processed: bool | None = None,
    verify: bool = False,
) -> RankManifest | None:
    """Loads one rank's shards into the parameters that are there: vLLM's, SGLang's, or :func:`fastshard.save_sharded_state`'s.

    Only this rank's files are opened, and bytes go straight from the page cache to where the parameters lie, in
    parallel; strided ones and those of a device are copied by torch from the mapped file. Everything is compared
    before anything is changed: names, dtypes and shapes from the files' headers, and what the manifest says. vLLM
    converts other dtypes, and fills a part of a parameter from a smaller tensor; here both are errors. A tensor that is
    not stored under its name is filled from the one that it shared memory with when it was saved, or from what is stored
    of those that share its memory here: tied weights have many names.

    Args:
        model_or_state_dict: a module, or the tensors to be filled. As for saving, empty tensors and those whose memory
            is all in that of another one are not looked for.
        path: the directory.
        tp_rank, tp_size, pp_rank, pp_size, dp_rank, dp_size, ep_rank, ep_size, pattern: as for saving.
        reader: name and version of the engine the parameters belong to. Where the manifest names another one,
            post-processed weights are refused: their layout is that engine's own affair.
        quantization: name of the method the parameters are for; ``None``: it is not compared.
        post_processed: whether the parameters are as after ``process_weights_after_loading``, so that the engine does
            not call it after this; ``None``: it is not compared.
        verify: compare all bytes of the files with the CRC-32 in the manifest, or with ``SHA256SUMS``, before anything
            is changed. They are read once more for that.

    Returns:
        The manifest; ``None`` where there is none, as beside files of vLLM's or SGLang's own: nothing is known of the
        world they were saved in then.

    Raises:
        ValueError: nothing is there to load, tensors are missing, unexpected, stored twice or of other dtypes or shapes,
            the files are not those of the manifest, or they were saved for other ranks or in another state.
        SafetensorError: a file is not in safetensors format, or is damaged, which ``verify`` finds; with it, files of
            which no digest is known are a ``ValueError``.
        OSError: a file cannot be read. If that happens while tensors are read, some parameters have changed.
    """
    ranks = Ranks(
        tp_rank=tp_rank,
        tp_size=tp_size,
        pp_rank=pp_rank,
        pp_size=pp_size,
        dp_rank=dp_rank,
        dp_size=dp_size,
        ep_rank=ep_rank,
        ep_size=ep_size,
    )
    names = Names(pattern, ranks)
    directory = os.fspath(path)
    described = os.path.join(directory, names.manifest)
    with contextlib.ExitStack() as stack:
        tensors = state_of(model_or_state_dict)
        wanted, covered = without_subtensors(tensors)
        manifest, files = _opened(directory, names)
        for file in files:
            stack.enter_context(file)
        if manifest is not None:
            _check_manifest(manifest, described, ranks, reader, quantization, post_processed)
        elif not files:
            missing = os.path.join(directory, names.glob)
            raise ValueError(f"Could not find checkpoint files {missing!r}{_others(directory)}")
        stored = _stored(files)
        if manifest is not None:
            _check_files(manifest, described, files, stored)
        sources = _sources(wanted, covered, tensors, stored, manifest.aliases if manifest else {})
        if verify:
            _verify(directory, manifest, names.manifest, files)
        _fill(sources)
    return manifest


class _Source(NamedTuple):
    """A tensor in a file."""

    name: str
    """Name of the file, without its directory."""
    file: BinaryIO
    offset: int
    """Offset from the beginning of the file."""
    nbytes: int
    code: str
    shape: tuple[int, ...]


def _opened(directory: str, names: Names) -> tuple[RankManifest | None, list[BinaryIO]]:
    """Opens the manifest, if there is one, and the parts, by number.

    All of them are of one save, whatever is saved meanwhile: if the manifest was replaced, they are opened
    again.
    """
    path = os.path.join(directory, names.manifest)
    while True:
        before = _identity(path)
        with contextlib.ExitStack() as stack:
            manifest = None
            try:
                if before is not None:
                    manifest = read_rank_manifest(path)
                files: list[BinaryIO] = [
                    stack.enter_context(open(name, "rb")) for name in _parts_in(directory, names)
                ]
            except FileNotFoundError:
                if _identity(path) == before:
                    raise
                continue
            if _identity(path) == before:
                stack.pop_all()
                return manifest, files


def _identity(path: str) -> tuple[int, int] | None:
    """Returns what tells a file from files that took its name later."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_ino, found.st_mtime_ns


def _parts_in(directory: str, names: Names) -> list[str]:
    try:
        found = os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []
    parts = sorted(filter(names.is_part, found), key=lambda name: (len(name), name))
    paths = [os.path.join(directory, name) for name in parts]
    return [path for path in paths if not is_placeholder(path)]


def _others(directory: str) -> str:
    """Returns which other parts there are, for an error about parts that are missing."""
    with contextlib.suppress(OSError, ValueError):
        for name in sorted(os.listdir(directory)):
            if is_manifest(name):
                manifest = read_rank_manifest(os.path.join(directory, name))
                sizes = manifest.ranks
                return (
                    f"; there are files {manifest.pattern!r} saved with tp_size={sizes.tp_size}, "
                    f"pp_size={sizes.pp_size}, dp_size={sizes.dp_size}"
                )
    return ""


def _check_manifest(
    manifest: RankManifest,
    path: str,
    ranks: Ranks,
    reader: tuple[str, str] | None,
    quantization: str | None,
    post_processed: bool | None,
) -> None:
    """Raises ``ValueError``, saying why, if the shards are not for these parameters."""
    compared = [
        name for name in Ranks.__dataclass_fields__ if not (manifest.dp_replicated and name.startswith("dp_"))
    ]
    differing = [name for name in compared if getattr(manifest.ranks, name) != getattr(ranks, name)]
    if differing:
        saved = ", ".join(f"{name}={getattr(manifest.ranks, name)}" for name in differing)
        here = ", ".join(f"{name}={getattr(ranks, name)}" for name in differing)
        raise ValueError(f"the shards were saved with {saved} and cannot be loaded with {here} ({path!r})")
    if quantization is not None and manifest.quantization != quantization:
        raise ValueError(
            f"the shards were saved with quantization={manifest.quantization!r} and cannot be loaded into "
            f"parameters for {quantization!r} ({path!r})"
        )
    if manifest.post_processed is None:
        return
    if post_processed is not None and post_processed != manifest.post_processed:
        state, after = ("after", "again") if manifest.post_processed else ("before", "no more")
        raise ValueError(
            f"the shards were saved {state} the engine had processed its weights (process_weights_after_loading), and "
            f"would be processed {after} ({path!r})"
        )
    if manifest.post_processed and reader and manifest.writer and tuple(reader) != tuple(manifest.writer):
        raise ValueError(
            f"the shards were saved after {' '.join(manifest.writer)} had processed its weights, in a layout of its "
            f"own, which {' '.join(reader)} cannot be trusted to know ({path!r})"
        )


def _stored(files: Iterable[BinaryIO]) -> dict[str, _Source]:
    """Returns every tensor of the files."""
    stored: dict[str, _Source] = {}
    for file in files:
        shard = os.path.basename(file.name)
        try:
            header = read_header(file, os.fstat(file.fileno()).st_size)
        except ValueError as error:
            raise SafetensorError(f"{file.name!r} is not a safetensors file: {error}") from None
        for name, code, shape, begin, end in header.tensors:
            if name in stored:
                raise ValueError(f"tensor {name!r} is in both {stored[name].file.name!r} and {file.name!r}")
            stored[name] = _Source(shard, file, header.nbytes + begin, end - begin, code, shape)
    return stored


def _check_files(
    manifest: RankManifest, path: str, files: Iterable[BinaryIO], stored: Mapping[str, _Source]
) -> None:
    """Raises ``ValueError`` unless the files are those that the manifest was written with."""
    sizes = {os.path.basename(file.name): os.fstat(file.fileno()).st_size for file in files}
    places = {name: (source.name, source.offset, source.nbytes) for name, source in stored.items()}
    told = {
        name: (file, offset, nbytes)
        for file, entry in manifest.files.items()
        for name, (offset, nbytes, _) in (entry.tensors or {}).items()
    }
    expected: Mapping[str, object]
    actual: Mapping[str, object]
    for expected, actual in (
        ({name: entry.nbytes for name, entry in manifest.files.items()}, sizes),
        (told, places),
    ):
        for name in sorted(expected.keys() | actual.keys()):
            if expected.get(name) != actual.get(name):
                raise ValueError(
                    f"{path!r} does not describe the files beside it: {name!r} is {expected.get(name)!r} there and "
                    f"{actual.get(name)!r} here"
                )


def _verify(directory: str, manifest: RankManifest | None, described: str, files: Iterable[BinaryIO]) -> None:
    """Raises ``SafetensorError`` if bytes of the files are others than were saved."""
    sums = read_known(directory, [SUMS_NAME]).sums
    checks = []
    for file in files:
        name = os.path.basename(file.name)
        known = None if manifest is None else (manifest.files[name], described)
        checks.append(Check(file.name, known, sums.get(name), file=file, by_crc32=True))
    error = why_unsound(checks)
    if error is not None:
        raise error


def _sources(
    wanted: Mapping[str, torch.Tensor],
    covered: Mapping[str, str],
    tensors: Mapping[str, torch.Tensor],
    stored: Mapping[str, _Source],
    aliases: Mapping[str, Alias],
) -> list[tuple[torch.Tensor, _Source]]:
    """Every tensor with where it comes from. Raises ``ValueError`` for all that do not fit, or are too many.

    One that is not stored under its name is looked for under the name that it had when it was saved (the manifest knows
    the aliases) or that it has in the model, too (``covered``: names of what lies in another one's memory).
    """
    found, wrong = [], []
    taken: dict[str, list[tuple[int, int]]] = {}  # bytes of what is stored

    def source_of(name: str) -> _Source | None:
        if name in stored:
            return stored[name]
        alias = aliases.get(name)
        if alias is None:
            return None
        holder, nbytes = stored[alias.tensor], nbytes_of(tensors[name])
        if alias.offset + nbytes > holder.nbytes:
            return None
        return holder._replace(
            offset=holder.offset + alias.offset, nbytes=nbytes, code=alias.code, shape=alias.shape
        )

    inside: dict[str, list[str]] = {}
    for name, holder in covered.items():
        inside.setdefault(holder, []).append(name)
    for name in wanted:
        source = source_of(name)
        parts = {name: source} if source else _parts_of(name, tensors, inside.get(name, ()), source_of)
        if not parts:
            wrong.append(f"{name!r} is missing")
        for part, source in parts.items():
            fault = _misfit(part, tensors[part], source)
            if fault:
                wrong.append(fault)
            else:
                found.append((tensors[part], source))
            holder = part if part in stored else aliases[part].tensor
            begin = source.offset - stored[holder].offset
            taken.setdefault(holder, []).append((begin, begin + source.nbytes))
    for name, source in stored.items():
        if name not in wanted and not _covers(taken.get(name, ()), source.nbytes):
            shares = f", where it shares memory with {covered[name]!r}" if name in covered else ""
            wrong.append(f"{name!r} in {source.name!r} is not expected{shares}")
    if wrong:
        more = f"; and {len(wrong) - _FAULTS_SHOWN} more" if len(wrong) > _FAULTS_SHOWN else ""
        raise ValueError(
            f"the shards do not fit the parameters: {'; '.join(sorted(wrong)[:_FAULTS_SHOWN])}{more}"
        )
    return found


def _parts_of(
    holder: str,
    tensors: Mapping[str, torch.Tensor],
    inside: Iterable[str],
    source_of: Callable[[str], _Source | None],
) -> dict[str, _Source]:
    """Returns names of tensors that can be filled, lie in the memory of this one, and together fill all of
    it.

    No byte is filled twice. Returns nothing if there are none.
    """
    whole = tensors[holder]
    parts: dict[str, _Source] = {}
    spans: list[tuple[int, int]] = []
    for name in sorted(inside, key=lambda name: (-nbytes_of(tensors[name]), name)):
        source = source_of(name)
        begin = tensors[name].data_ptr() - whole.data_ptr()
        span = begin, begin + nbytes_of(tensors[name])
        if source is not None and not overlapping([*spans, span]):
            parts[name] = source
            spans.append(span)
    return parts if _covers(spans, nbytes_of(whole)) else {}


def _covers(spans: Iterable[tuple[int, int]], nbytes: int) -> bool:
    """Returns whether these ranges together have every one of so many bytes."""
    reached = 0
    for begin, end in sorted(spans):
        if begin > reached:
            return False
        reached = max(reached, end)
    return reached >= nbytes


def _misfit(name: str, tensor: torch.Tensor, source: _Source) -> str:
    """Returns why these bytes cannot become that tensor; an empty text if they can."""
    if not has_memory(tensor):
        return f"{name!r} has no memory to load into"
    if any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride())):
        return f"{name!r} is expanded: its elements are not its own"
    code, shape = _tensors.stored_as(tensor.dtype, tuple(tensor.shape))
    if (source.code, source.shape) != (code, shape):
        return f"{name!r} is {source.code} {list(source.shape)} in {source.name!r}, expected {code} {list(shape)}"
    if source.nbytes != nbytes_of(tensor):
        return f"{name!r} has {source.nbytes} bytes in {source.name!r}"
    return ""


def _fill(sources: Iterable[tuple[torch.Tensor, _Source]]) -> None:
    """Fills host tensors by reading into them, and all others by copies from the mapped files."""
    pieces: dict[BinaryIO, list[Piece]] = {}
    mapped: dict[BinaryIO, list[tuple[torch.Tensor, _Source]]] = {}
    for tensor, source in sources:
        if tensor.is_cpu and is_flat(tensor):
            pieces.setdefault(source.file, []).append(Piece(source.offset, source.nbytes, tensor.data_ptr()))
        else:
            mapped.setdefault(source.file, []).append((tensor, source))
    read_into(pieces.items())
    for file, those in mapped.items():
        # Private and writable, as torch wants it; nothing writes to it.
        view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
        for tensor, source in those:
            _tensors.copy_from(tensor, view[source.offset : source.offset + source.nbytes])
