# SPDX-License-Identifier: Apache-2.0
"""Cuts checkpoints into the parts of ranks, merges them, and distributes tensors over other files.

Everything goes straight from mapped files into the final ones. ``shard_checkpoint`` makes a folder for each
rank of tensor parallelism::

    OUT/config.json, tokenizer.json, ...    copied
    OUT/tensor_parallel.index.json          number of ranks; headers and index of the source, as they were
    OUT/rank-0/model.safetensors, ...       a checkpoint of its own: the rank's part of every tensor, under its name
    OUT/rank-0/tensor_parallel.json         of each tensor the whole shape, the dimension that is split, and the
                                            intervals of it that this rank holds

``merge_checkpoint`` makes the source's files from that again, to the byte. ``reshard_checkpoint`` distributes
whole tensors over files of another size. No tensor is ever in memory: a part is a strided view of a mapped
file, which the engine writes where it belongs.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from tqdm import tqdm

from ..engine.engine import Engine, Options, progress_wanted
from ..engine.pipeline import How
from ..engine.plan import HOST, TensorView
from ..formats.hf_index import (
    Checkpoint,
    make_index,
    other_files,
    read_checkpoint,
    read_object,
    same_file,
    write_text,
)
from ..formats.naming import (
    INDEX_SUFFIX,
    MANIFESTS,
    RANK_MANIFEST,
    ROOT_MANIFEST,
    WEIGHTS_SUFFIX,
    is_rank_folder,
    rank_folder,
)
from ..formats.safetensors import DTYPE_ORDER, header
from ..publish.directory import creating, replacing
from ..publish.hidden_names import PREFIX
from ..publish.manifests import recorder
from .model_plan import ModelPlan
from .outputs import Output, copy, write
from .parts import Interleaved, Part, Sources, check_equal
from .rank_folders import MAX_RANKS, rank_manifest, read_ranks, root_manifest
from .tp_plan import read_plan, splits_of

PathLike = str | os.PathLike[str]


def shard_checkpoint(
    src: PathLike,
    out: PathLike,
    tp: int,
    *,
    plan: Mapping[str, str] | PathLike | None = None,
    max_shard_size: int | str | None = None,
    force: bool = False,
    durable: bool = False,
    keep_cached: bool = True,
    progress: bool | None = None,
    manifest: bool | Literal["sha256"] = False,
    engine: Engine | Options | None = None,
) -> None:
    """Cuts a Hugging Face checkpoint into the parts that the ranks of tensor parallelism hold.

    Args:
        src: a folder with safetensors files, an index if there are several, and ``config.json``.
        out: a folder that does not exist or is empty; see the module's text for what is in it afterwards.
        tp: number of ranks.
        plan: which tensors are split in which way: a mapping from names to styles, or a JSON file with one. The names
            are those of the checkpoint's tensors or their modules, ``*`` standing for any number in them; tensors of
            which it does not speak are held by all ranks. ``None``: the plan transformers has for the model.
        max_shard_size: of each rank's files, bytes or as ``"5GB"``; ``None``: the source's files, each in parts.
        force: replace the checkpoint in ``out``: its weights go, files of other names stay.
        durable, keep_cached, progress, manifest, engine: as for :func:`fastshard.save_file`. For a manifest the files
            are read back.

    Raises:
        FileExistsError: ``out`` is not empty.
        ValueError: the source contradicts itself (the text names the file), a tensor is unknown to the model, a style
            is unknown, a dimension cannot be divided.
        OSError, SaveError: a file could not be read or written.
        ImportError: transformers is missing, and no plan was given.
    """
    if type(tp) is not int or not 1 <= tp <= MAX_RANKS:
        raise ValueError(f"the number of ranks must be 1 to {MAX_RANKS}, not {tp!r}")
    how = How(durable=durable, keep_cached=keep_cached, progress=progress, manifest=manifest, engine=engine)
    checkpoint = read_checkpoint(src)
    home = checkpoint.home()
    shapes = [(name, tensor.shape) for name, (_, tensor) in home.items()]
    if plan is None:
        splits = ModelPlan(checkpoint.folder, home).splits(shapes, tp)
    else:
        splits = splits_of(shapes, plan if isinstance(plan, Mapping) else read_plan(plan))
    parts = {
        name: Part.of(tensor, split, tp)
        for (name, (_, tensor)), split in zip(home.items(), map(splits.__getitem__, home))
    }
    layout = (
        _layout(checkpoint, {name: part.nbytes for name, part in parts.items()}, max_shard_size)
        if max_shard_size is not None
        else {name: [t.name for t in file.header.tensors] for name, file in checkpoint.files.items()}
    )
    metadata = _metadata_of(checkpoint, layout)
    places = {tensor: name for name, tensors in layout.items() for tensor in tensors}
    indexed = checkpoint.index_text is not None if max_shard_size is None else len(layout) > 1
    index = make_index({"total_size": sum(part.nbytes for part in parts.values())}, places)

    def outputs() -> Iterator[Output]:
        sources = Sources(checkpoint)
        for filename, tensors in layout.items():
            for rank in range(tp):
                entries = [parts[name].entry for name in tensors]
                items = [view for name in tensors for view in parts[name].views(sources.address(name), rank)]
                path = os.path.join(rank_folder(rank), filename)
                yield Output(path, header(entries, metadata[filename]), items, sources.of(tensors))

    with _target(out, checkpoint.folder, force, how) as stage:
        for rank in range(tp):
            os.mkdir(os.path.join(stage, rank_folder(rank)))
            if indexed:
                write_text(os.path.join(stage, rank_folder(rank), checkpoint.index_name), index)
            described = {name: parts[name].described(rank) for name in places}
            write_text(
                os.path.join(stage, rank_folder(rank), RANK_MANIFEST), rank_manifest(tp, rank, described)
            )
        write_text(os.path.join(stage, ROOT_MANIFEST), root_manifest(tp, checkpoint))
        copy(checkpoint.others, checkpoint.folder, stage)
        write(outputs(), stage, how, "Sharding")


def merge_checkpoint(
    src: PathLike,
    out: PathLike,
    *,
    force: bool = False,
    durable: bool = False,
    keep_cached: bool = True,
    progress: bool | None = None,
    manifest: bool | Literal["sha256"] = False,
    engine: Engine | Options | None = None,
) -> None:
    """Puts the parts that :func:`shard_checkpoint` made together again: the source's files, to the byte.

    ``src`` is the folder it made; what ranks hold twice must be equal. The other arguments and the errors are those
    of :func:`shard_checkpoint`.
    """
    how = How(durable=durable, keep_cached=keep_cached, progress=progress, manifest=manifest, engine=engine)
    folder = os.fspath(src)
    found = read_ranks(folder)
    sources = [Sources(checkpoint) for checkpoint in found.ranks]

    def outputs() -> Iterator[Output]:
        for filename, file in found.files.items():
            names = [tensor.name for tensor in file.header.tensors]
            items: list[TensorView | Interleaved] = []
            for name in names:
                items += found.tensors[name].items(sources)
            kept = [mapping for source in sources for mapping in source.of(names)]
            yield Output(filename, file.raw, items, kept)

    with _target(out, folder, force, how) as stage:
        replicated = [name for name, whole in found.tensors.items() if whole.intervals is None]
        with tqdm(
            total=sum(sources[0].nbytes(name) for name in replicated),
            desc="Comparing",
            unit="B",
            unit_scale=True,
            disable=not progress_wanted(progress),
        ) as bar:
            for name in replicated:
                check_equal(name, sources)
                bar.update(sources[0].nbytes(name))
        if found.source_index is not None:
            write_text(os.path.join(stage, found.source_index.name), found.source_index.text)
        copy(other_files(folder), folder, stage)
        write(outputs(), stage, how, "Merging")


def reshard_checkpoint(
    src: PathLike,
    out: PathLike,
    max_shard_size: int | str,
    *,
    force: bool = False,
    durable: bool = False,
    keep_cached: bool = True,
    progress: bool | None = None,
    manifest: bool | Literal["sha256"] = False,
    engine: Engine | Options | None = None,
) -> None:
    """Distributes a checkpoint's tensors over files of another size, as ``save_pretrained(max_shard_size=...)`` does.

    ``max_shard_size``: bytes, or as ``"5GB"`` (10^9); a larger tensor has a file to itself. ``out`` may be ``src``,
    if forced. The other arguments and the errors are those of :func:`shard_checkpoint`.
    """
    how = How(durable=durable, keep_cached=keep_cached, progress=progress, manifest=manifest, engine=engine)
    checkpoint = read_checkpoint(src)
    home = checkpoint.home()
    layout = _layout(checkpoint, {n: t.end - t.begin for n, (_, t) in home.items()}, max_shard_size)
    metadata = _metadata_of(checkpoint, layout)

    def outputs() -> Iterator[Output]:
        sources = Sources(checkpoint)
        for filename, names in layout.items():
            stored = [home[name][1] for name in names]
            entries = [(t.name, t.code, t.shape, t.end - t.begin) for t in stored]
            items = [TensorView(sources.address(t.name), t.end - t.begin, HOST) for t in stored]
            yield Output(filename, header(entries, metadata[filename]), items, sources.of(names))

    with _target(out, checkpoint.folder, force, how, in_place=True) as stage:
        if len(layout) > 1:
            told = {} if checkpoint.index_text is None else _index_metadata(checkpoint)
            total = sum(tensor.end - tensor.begin for _, tensor in home.values())
            places = {tensor: name for name, tensors in layout.items() for tensor in tensors}
            name = f"{_stem(checkpoint)}{INDEX_SUFFIX}"
            write_text(os.path.join(stage, name), make_index({**told, "total_size": total}, places))
        if not same_file(out, checkpoint.folder):
            copy(checkpoint.others, checkpoint.folder, stage)
        write(outputs(), stage, how, "Resharding")


@contextlib.contextmanager
def _target(out: PathLike, src: str, force: bool, how: How, in_place: bool = False) -> Iterator[str]:
    """Gives a hidden folder in ``out``. When the block ends, all of its contents stand in ``out``, or none."""
    folder = os.fspath(out)
    record = recorder(how.manifest, how.keep_cached)
    if same_file(folder, src) and not in_place:
        raise ValueError(f"{folder!r} is the source itself")
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        names = []
    present = [name for name in names if not name.startswith(PREFIX)]
    if present and not force:
        raise FileExistsError(
            errno.EEXIST, "the target is not empty; force=True (--force) replaces what is in it", folder
        )
    old = _checkpoint_in(folder) if present else []
    target = (
        replacing(folder, obsolete=old, create=True, durable=how.durable, record=record)
        if names
        else creating(folder, durable=how.durable, record=record)
    )
    with target as stage:
        yield stage
    for place in {os.path.dirname(name) for name in old} - {""}:
        try:
            os.rmdir(os.path.join(folder, place))
        except OSError as error:
            # It went with its files, or has others.
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
                error.published = True  # type: ignore[attr-defined]
                error.strerror = (
                    f"the new checkpoint is in place, but not what it replaces is gone: {error.strerror}"
                )
                raise


def _checkpoint_in(folder: str) -> list[str]:
    """Returns weights, indices and manifests, as paths relative to the folder."""

    def files_of(place: str) -> list[str]:
        return [
            entry.name
            for entry in os.scandir(os.path.join(folder, place))
            if entry.name.endswith((WEIGHTS_SUFFIX, INDEX_SUFFIX)) or entry.name in MANIFESTS
        ]

    ranks = [
        entry.name
        for entry in os.scandir(folder)
        if is_rank_folder(entry.name) and entry.is_dir(follow_symlinks=False)
    ]
    return [
        *files_of(""),
        *itertools.chain.from_iterable(
            [os.path.join(rank, name) for name in names]
            for rank, names in ((rank, files_of(rank)) for rank in ranks)
            if RANK_MANIFEST in names
        ),
    ]


def _layout(
    checkpoint: Checkpoint, sizes: Mapping[str, int], max_shard_size: int | str
) -> dict[str, list[str]]:
    """Returns the tensors of each file in the order of their bytes, split as the hub does."""
    from huggingface_hub import split_torch_state_dict_into_shards

    home = checkpoint.home()
    pattern = f"{_stem(checkpoint)}{{suffix}}{WEIGHTS_SUFFIX}"
    split = split_torch_state_dict_into_shards(
        {name: torch.empty(size, dtype=torch.uint8, device="meta") for name, size in sizes.items()},
        filename_pattern=pattern,
        max_shard_size=max_shard_size,
    )
    found: dict[str, list[str]] = split.filename_to_tensors or {pattern.format(suffix=""): []}
    return {
        filename: sorted(names, key=lambda name: (DTYPE_ORDER[home[name][1].code], name))
        for filename, names in found.items()
    }


def _stem(checkpoint: Checkpoint) -> str:
    """Returns what the names of its files begin with."""
    if checkpoint.index_text is not None:
        return checkpoint.index_name.removesuffix(INDEX_SUFFIX)
    return next(iter(checkpoint.files)).removesuffix(WEIGHTS_SUFFIX)


def _metadata_of(checkpoint: Checkpoint, layout: Mapping[str, list[str]]) -> dict[str, dict[str, str] | None]:
    """Returns the metadata of each file: the source file's if it is one of them, else what all source files
    have in common."""
    if layout.keys() == checkpoint.files.keys():
        return {name: file.header.metadata for name, file in checkpoint.files.items()}
    found: dict[str, str] | None = None
    for file in checkpoint.files.values():
        for key, value in (file.header.metadata or {}).items():
            found = {} if found is None else found
            if found.setdefault(key, value) != value:
                raise ValueError(f"{file.path!r}: other files have another {key!r} in their metadata")
    return dict.fromkeys(layout, found)


def _index_metadata(checkpoint: Checkpoint) -> dict[str, Any]:
    assert checkpoint.index_text is not None
    path = os.path.join(checkpoint.folder, checkpoint.index_name)
    metadata = read_object(checkpoint.index_text, path).get("metadata")
    return metadata if isinstance(metadata, dict) else {}
