# SPDX-License-Identifier: Apache-2.0
"""Sharded state, as vLLM and SGLang call it: every rank of a serving engine saves its own tensors, and loads them.

The files are those of their ``ShardedStateLoader`` (vLLM 0.33,
``vllm/model_executor/model_loader/sharded_state_loader.py``; SGLang 0.5.23, ``sglang/srt/model_loader/loader.py``): the
same names, the same split, the same bytes. Beside them lies a manifest (:mod:`fastshard.formats.manifest`), which neither
reads.
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
from ..engine.borrowed import is_traceable_wrapper_subclass
from ..engine.engine import Engine, Options
from ..engine.pipeline import How
from ..engine.reading import Piece, read_into
from ..engine.sharing import overlapping, shared_names
from ..formats.manifest import Alias, Manifest, read_manifest
from ..formats.naming import Names, Ranks, is_manifest
from ..formats.safetensors import read_header
from ..publish.linking import is_placeholder
from ..publish.staged import staged

_FAULTS_SHOWN: Final = 10

State = torch.nn.Module | Mapping[str, torch.Tensor]


def save_sharded_state(
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
    dp_replicated: bool = False,
    pattern: str | None = None,
    max_size: int | None = None,
    writer: tuple[str, str] | None = None,
    quantization: str | None = None,
    post_processed: bool | None = None,
    durable: bool = False,
    keep_cached: bool = True,
    progress: bool | None = None,
    engine: Engine | Options | None = None,
) -> Manifest:
    """Saves the tensors of one rank, to the byte the files of vLLM's ``ShardedStateLoader.save_model``, and a manifest.

    All parts are written in parallel and the rank's files change all at once: until the new ones stand, the old ones
    can be loaded. Parts of an earlier save of this rank with the same pattern go in the same moment; other ranks'
    files are not touched, and all ranks may save into one directory at the same time. As there, empty tensors are
    left out, and so are those whose memory is all in that of another one (of tied ones the smallest name stays); what
    is left out for that is listed in the manifest as an alias. Other than there, strided tensors are packed on the
    way into the file (vLLM 0.33 fails on them), of tensors that overlap in part each is saved whole, and a first tensor
    larger than ``max_size`` leaves no empty part before it.

    Args:
        model_or_state_dict: what ``state_dict()`` of a module gives, on any device.
        path: a directory; it is made if it is missing.
        tp_rank, tp_size, pp_rank, pp_size, dp_rank, dp_size, ep_rank, ep_size: which rank of how many of tensor,
            pipeline, data and expert parallelism this is.
        dp_replicated: whether every rank of data parallelism has the same weights. Experts of a mixture are split
            over them, with and without expert parallelism, so it is false for such models. Where it is true only
            ``dp_rank=0`` saves; where it is false and ``dp_size`` is not 1, ``pattern`` must have a ``{dp_rank}``, which
            vLLM's loader does not know.
        pattern: of the files, with ``{rank}`` or ``{tp_rank}``, ``{pp_rank}``, ``{dp_rank}`` and ``{part}``; ``None``:
            ``model-rank-{rank}-part-{part}.safetensors``, or where ``pp_size`` is not 1
            ``model-pp-{pp_rank}-tp-{tp_rank}-part-{part}.safetensors``.
        max_size: most bytes of tensors in a part (a larger tensor has one to itself); ``None``: one part.
        writer: name and version of the engine the weights come from, as ``("vllm", "0.33.0")``.
        quantization: name of the method by which they are quantized; ``None``: they are not.
        post_processed: whether that engine has rearranged them after loading (``process_weights_after_loading``), so
            that one that would do so again must not load them; ``False`` also where it had nothing to do. ``None``:
            not known.
        durable, keep_cached, progress, engine: as for :func:`fastshard.save_file`.

    Returns:
        What was written beside the files, as ``fastshard-<name of the parts>.json``.

    Raises:
        ValueError: for ranks, a pattern or a size that cannot be, among them data-parallel ranks that would
            overwrite each other's files.
        What :func:`fastshard.save_file` raises for tensors and failed system calls.
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
    _check_data_parallelism(ranks, names, dp_replicated)
    if max_size is not None and max_size < 1:
        raise ValueError(f"max_size={max_size!r}: a part has at least one byte")
    state = _state(model_or_state_dict)
    kept, covered = _without_subtensors(state)
    parts = {names.part(i): part for i, part in enumerate(_split(_separated(kept), max_size))}
    how = How(durable, keep_cached, progress, allow_strided=True, engine=engine)
    with staged(os.fspath(path), names.is_part, how, call="save_sharded_state", create=True) as stage:
        for name, part in parts.items():
            stage.add(part, os.path.join(stage.path, name), None)
        aliases = {name: _alias(state[name], holder, state[holder]) for name, holder in covered.items()}
        stage.write()
        manifest = Manifest(
            ranks=ranks,
            pattern=names.pattern,
            dp_replicated=dp_replicated,
            writer=writer,
            quantization=quantization,
            post_processed=post_processed,
            files={name: os.path.getsize(os.path.join(stage.path, name)) for name in parts},
            tensors={tensor: name for name, part in parts.items() for tensor in part},
            aliases=aliases,
        )
        stage.write_text(os.path.join(stage.path, names.manifest), manifest.to_json())
    return manifest


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
) -> Manifest | None:
    """Loads one rank's shards into the parameters that are there: vLLM's, SGLang's, or :func:`save_sharded_state`'s.

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

    Returns:
        The manifest; ``None`` where there is none, as beside files of vLLM's or SGLang's own: nothing is known of the
        world they were saved in then.

    Raises:
        ValueError: nothing is there to load, tensors are missing, unexpected, stored twice or of other dtypes or shapes,
            the files are not those of the manifest, or they were saved for other ranks or in another state.
        SafetensorError: a file is not in safetensors format.
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
        tensors = _state(model_or_state_dict)
        wanted, covered = _without_subtensors(tensors)
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
        _fill(sources)
    return manifest


class _Source(NamedTuple):
    """A tensor in a file."""

    name: str
    """Of the file, without its directory."""
    file: BinaryIO
    offset: int
    """From the beginning of the file."""
    nbytes: int
    code: str
    shape: tuple[int, ...]


def _state(model_or_state_dict: State) -> dict[str, torch.Tensor]:
    if isinstance(model_or_state_dict, torch.nn.Module):
        return dict(model_or_state_dict.state_dict())
    if not isinstance(model_or_state_dict, Mapping):
        raise ValueError(f"Expected a module or a dict of tensors but received {type(model_or_state_dict)}")
    return dict(model_or_state_dict)


def _without_subtensors(
    tensors: Mapping[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """What vLLM saves of them, in its order, and for every other one that is not empty the one that covers it.

    By storage in the order of the first names. A contiguous tensor is left out when a contiguous one has all of its
    memory and more, or the same and a smaller name. Strided ones stay, as in SGLang.
    """
    groups: dict[object, list[str]] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"Key `{name}` is invalid, expected torch.Tensor but received {type(tensor)}")
        if tensor.numel():
            key = (tensor.device, tensor.untyped_storage().data_ptr()) if _has_memory(tensor) else name
            groups.setdefault(key, []).append(name)
    kept, covered = {}, {}
    for group in groups.values():
        if len(group) > 1:
            reached, holder = 0, ""
            for _, minus_end, name in sorted(
                _span(name, tensors[name]) for name in group if _is_flat(tensors[name])
            ):
                if -minus_end > reached:
                    reached, holder = -minus_end, name
                else:
                    covered[name] = holder
        for name in group:
            if name not in covered:
                kept[name] = tensors[name]
    return kept, covered


def _has_memory(tensor: torch.Tensor) -> bool:
    """Of its own, at an address."""
    if tensor.layout != torch.strided or tensor.device.type == "meta":
        return False
    return not is_traceable_wrapper_subclass(tensor)


def _is_flat(tensor: torch.Tensor) -> bool:
    """Whether its bytes in a file are those in memory, one after the other."""
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def _span(name: str, tensor: torch.Tensor) -> tuple[int, int, str]:
    """Sorts those that cover others before them."""
    begin = tensor.data_ptr()
    return begin, -(begin + tensor.numel() * tensor.element_size()), name


def _separated(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same, with copies of those that have some memory in common with another one: a file holds no byte twice."""
    storages: dict[object, list[str]] = {}
    for name, tensor in tensors.items():
        if _has_memory(tensor):
            storages.setdefault((tensor.device, tensor.untyped_storage().data_ptr()), []).append(name)
    shared = shared_names(tensors, [names for names in storages.values() if len(names) > 1])
    copied = {name for names in shared for name in sorted(names)[1:]}
    return {
        name: tensor.clone(memory_format=torch.contiguous_format) if name in copied else tensor
        for name, tensor in tensors.items()
    }


def _split(tensors: Mapping[str, torch.Tensor], max_size: int | None) -> list[dict[str, torch.Tensor]]:
    """The parts: each takes tensors in order until the next one would be too much."""
    parts: list[dict[str, torch.Tensor]] = []
    total = 0
    for name, tensor in tensors.items():
        nbytes = tensor.numel() * tensor.element_size()
        if not parts or (max_size is not None and total + nbytes > max_size):
            parts.append({})
            total = 0
        parts[-1][name] = tensor
        total += nbytes
    return parts


def _alias(tensor: torch.Tensor, holder: str, held: torch.Tensor) -> Alias:
    return Alias(holder, tensor.data_ptr() - held.data_ptr(), *_tensors.stored_as(tensor))


def _check_data_parallelism(ranks: Ranks, names: Names, replicated: bool) -> None:
    if replicated and ranks.dp_rank:
        raise ValueError(
            f"dp_rank={ranks.dp_rank} has the weights that dp_rank=0 saves (dp_replicated=True): only that one may"
        )
    if ranks.dp_size > 1 and not replicated and "dp_rank" not in names.fields:
        raise ValueError(
            f"{ranks.dp_size} data-parallel ranks would overwrite each other: pattern {names.pattern!r} has no "
            "{dp_rank}. If all of them have the same weights (no experts), pass dp_replicated=True and save from dp_rank=0."
        )


def _opened(directory: str, names: Names) -> tuple[Manifest | None, list[BinaryIO]]:
    """The manifest, if there is one, and the parts, by number: all of one save, whatever is saved meanwhile."""
    path = os.path.join(directory, names.manifest)
    while True:
        before = _identity(path)
        with contextlib.ExitStack() as stack:
            manifest = None
            try:
                if before is not None:
                    manifest = read_manifest(path)
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
    """Tells a file from those that took its name later."""
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
    """What else there is, for whoever looked for another world's files."""
    with contextlib.suppress(OSError, ValueError):
        for name in sorted(os.listdir(directory)):
            if is_manifest(name):
                manifest = read_manifest(os.path.join(directory, name))
                sizes = manifest.ranks
                return (
                    f"; there are files {manifest.pattern!r} saved with tp_size={sizes.tp_size}, "
                    f"pp_size={sizes.pp_size}, dp_size={sizes.dp_size}"
                )
    return ""


def _check_manifest(
    manifest: Manifest,
    path: str,
    ranks: Ranks,
    reader: tuple[str, str] | None,
    quantization: str | None,
    post_processed: bool | None,
) -> None:
    """Raises ``ValueError`` saying why the shards are not for these parameters."""
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
    """Every tensor of the files."""
    stored: dict[str, _Source] = {}
    for file in files:
        shard = os.path.basename(file.name)
        try:
            header = read_header(file, os.fstat(file.fileno()).st_size)
        except ValueError as error:
            raise SafetensorError(f"{file.name!r} is no safetensors file: {error}") from None
        for name, code, shape, begin, end in header.tensors:
            if name in stored:
                raise ValueError(f"tensor {name!r} is in both {stored[name].file.name!r} and {file.name!r}")
            stored[name] = _Source(shard, file, header.nbytes + begin, end - begin, code, shape)
    return stored


def _check_files(
    manifest: Manifest, path: str, files: Iterable[BinaryIO], stored: Mapping[str, _Source]
) -> None:
    """Raises ``ValueError`` unless the files are the ones that the manifest was written with."""
    sizes = {os.path.basename(file.name): os.fstat(file.fileno()).st_size for file in files}
    places = {name: source.name for name, source in stored.items()}
    expected: Mapping[str, object]
    actual: Mapping[str, object]
    for expected, actual in ((manifest.files, sizes), (manifest.tensors, places)):
        for name in sorted(expected.keys() | actual.keys()):
            if expected.get(name) != actual.get(name):
                raise ValueError(
                    f"{path!r} does not describe the files beside it: {name!r} is {expected.get(name)!r} there and "
                    f"{actual.get(name)!r} here"
                )


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
        holder, nbytes = stored[alias.tensor], _nbytes(tensors[name])
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
    """Names that lie in the memory of a tensor and can be filled, which fills all of it: none twice. Else nothing."""
    whole = tensors[holder]
    parts: dict[str, _Source] = {}
    spans: list[tuple[int, int]] = []
    for name in sorted(inside, key=lambda name: (-_nbytes(tensors[name]), name)):
        source = source_of(name)
        begin = tensors[name].data_ptr() - whole.data_ptr()
        span = begin, begin + _nbytes(tensors[name])
        if source is not None and not overlapping([*spans, span]):
            parts[name] = source
            spans.append(span)
    return parts if _covers(spans, _nbytes(whole)) else {}


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _covers(spans: Iterable[tuple[int, int]], nbytes: int) -> bool:
    """Whether every byte of so many is in one of them."""
    reached = 0
    for begin, end in sorted(spans):
        if begin > reached:
            return False
        reached = max(reached, end)
    return reached >= nbytes


def _misfit(name: str, tensor: torch.Tensor, source: _Source) -> str:
    """Why these bytes cannot become that tensor; empty if they can."""
    if not _has_memory(tensor):
        return f"{name!r} has no memory to load into"
    if any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride())):
        return f"{name!r} is expanded: its elements are not its own"
    code, shape = _tensors.stored_as(tensor)
    if (source.code, source.shape) != (code, shape):
        return f"{name!r} is {source.code} {list(source.shape)} in {source.name!r}, expected {code} {list(shape)}"
    if source.nbytes != _nbytes(tensor):
        return f"{name!r} has {source.nbytes} bytes in {source.name!r}"
    return ""


def _fill(sources: Iterable[tuple[torch.Tensor, _Source]]) -> None:
    """Host tensors by reading into them, all others by copies from the mapped files."""
    pieces: dict[BinaryIO, list[Piece]] = {}
    mapped: dict[BinaryIO, list[tuple[torch.Tensor, _Source]]] = {}
    for tensor, source in sources:
        if tensor.is_cpu and _is_flat(tensor):
            pieces.setdefault(source.file, []).append(Piece(source.offset, source.nbytes, tensor.data_ptr()))
        else:
            mapped.setdefault(source.file, []).append((tensor, source))
    read_into(pieces.items())
    for file, those in mapped.items():
        # Private and writable, as torch wants it; nothing writes to it.
        view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
        for tensor, source in those:
            _tensors.copy_from(tensor, view[source.offset : source.offset + source.nbytes])
