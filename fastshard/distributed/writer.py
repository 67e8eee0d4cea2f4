# SPDX-License-Identifier: Apache-2.0
"""A writer for ``torch.distributed.checkpoint`` in the layout of its ``HuggingFaceStorageWriter``: the ranks' parts of
tensors in safetensors files, whose metadata says where in the whole tensors they lie."""

from __future__ import annotations

import dataclasses
import json
import os
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import distributed
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult

from ..base.activity import one_save
from ..engine import background
from ..engine.engine import Options
from ..engine.pipeline import How, PathLike, PlannedFile, encoded_path, finish, start
from ..engine.plan import FilePlan
from ..engine.planning import lay_out_each
from ..engine.tensors import check_dtype
from ..formats.dcp_metadata import SHARDING_KEY
from ..formats.naming import (
    INDEX_NAME,
    are_of_the_same_weights,
    dcp_layer,
    dcp_objects,
    dcp_shard,
    is_dcp_objects,
    is_of_dcp_whole,
    number_of_dcp_shard,
)
from .final_files import state_of
from .processors import shared_by_ranks
from .rank_save import save_distributed
from .stock import InFolder, StorageInfo, resolved
from .unseen_files import Made, UnseenFiles

CALL: Final = "dcp.save"
"""Under which saves of writers are counted."""
_SHARD: Final = "shard_index"


class Scope:
    """Whose files a save replaces. It refers to no writer, so a writer's end is not put off."""

    def __init__(self, shards: bool) -> None:
        self.shards = shards
        self.rank = 0
        self.alone = False
        """Whether each rank publishes its own files."""

    def is_stale(self, name: str) -> bool:
        shard = number_of_dcp_shard(name)
        if self.shards:
            return shard is not None and (not self.alone or is_of_rank(shard - 1, self.rank))
        return (
            shard is not None
            or is_of_dcp_whole(name)
            or are_of_the_same_weights([dcp_shard(None, 1, 1)], name)
        )


class _File(NamedTuple):
    """A file of a rank: its tensors by name, and the results that say so."""

    tensors: dict[str, torch.Tensor]
    offsets: dict[str, Sequence[int]]
    """Where in its whole tensor each of them begins."""
    items: list[WriteItem]


class FastshardWriter(InFolder, StorageWriter):
    """Saves a checkpoint of ``dcp.save`` or ``dcp.async_save`` as safetensors files, which the stock
    ``HuggingFaceStorageReader``, its consolidation, and :class:`FastshardReader` read.

    Each rank writes its part, from whatever device, in bounded memory. The files appear all at once, when all ranks
    have written theirs; in the same moment the files of an earlier save go, those of more ranks included. A rank
    that fails or dies leaves the earlier checkpoint as it was, and every other rank raises.

    Tensors may have any dtype of the format, strides, and memory in common; there may be several chunks of one
    tensor on a rank. What is no tensor (numbers, generators, ...) is in a file of its own beside the rank's tensors,
    for :class:`FastshardReader`. With ``use_collectives=False``, and where ranks save with ``no_dist=True``, each
    rank publishes its own files, named by its rank.

    The writer can be pickled, as ``async_save`` in a process does. It stages nothing: pass a stager, or leave that to
    torch's.

    Args:
        path: folder of the checkpoint. ``checkpoint_id`` of ``dcp.save`` replaces it.
        fqn_to_index_mapping: in which file of its rank, from 1 on, each tensor is; ``None``: all in one.
        save_distributed: with ``False`` the tensors must all be on one rank, and whole. The names are then
            ``model-00001-of-00001.safetensors``, with an index.
        final: write ordinary Hugging Face files at once, which need no consolidation: those of
            :func:`fastshard.save_distributed`, which ``max_shard_size``, ``process_group`` and ``timeout`` are for.
            All ranks have to save. Objects that are no tensors are refused. The group does not go into another
            process, where all ranks are meant.
        durable, keep_cached, progress, dtype: as for :func:`fastshard.save_file`.
        options: limits of the engine that writes.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        fqn_to_index_mapping: Mapping[str, int] | None = None,
        *,
        save_distributed: bool = True,
        final: bool = False,
        max_shard_size: int | str = "5GB",
        process_group: Any = None,
        timeout: float | None = None,
        durable: bool = False,
        keep_cached: bool = True,
        progress: bool | None = None,
        dtype: torch.dtype | str | None = None,
        options: Options | None = None,
    ) -> None:
        super().__init__()
        self.path = os.fspath(path)
        self.fqn_to_index_mapping = None if fqn_to_index_mapping is None else dict(fqn_to_index_mapping)
        self.save_distributed = save_distributed
        self.final = final
        if final and fqn_to_index_mapping is not None:
            raise ValueError(
                "with final=True files are split by max_shard_size, so fqn_to_index_mapping cannot be used"
            )
        self._final_options = {
            "max_shard_size": max_shard_size,
            "process_group": process_group,
            "timeout": timeout,
        }
        self._how = How(
            durable=durable,
            keep_cached=keep_cached,
            progress=progress,
            allow_strided=True,
            dtype=check_dtype(dtype),
            engine=options,
        )
        self._scope = Scope(save_distributed)
        self._files: UnseenFiles | None = None
        self._save_id = str(uuid.uuid4())

    def __getstate__(self) -> dict[str, Any]:
        options = {**self._final_options, "process_group": None}
        return {**self.__dict__, "_files": None, "_final_options": options}

    def storage_meta(self) -> StorageMeta | None:
        return StorageMeta(checkpoint_id=self.path, save_id=self._save_id)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id is not None:
            self.path = os.fspath(checkpoint_id)
        self._save_id = str(uuid.uuid4())

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._scope.rank = kwargs.get("rank") or 0
        self._scope.alone = not kwargs.get("use_collectives", True)
        if not self.final:
            self._begin(is_coordinator)

    def _begin(self, is_coordinator: bool) -> None:
        if self._files is not None:  # of a save that has failed
            self._files.close()
        self._files = UnseenFiles(
            self.path,
            self._scope.rank,
            publishes=is_coordinator or self._scope.alone,
            durable=self._how.durable,
            stale=self._scope.is_stale,
        )

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Numbers the shards. Nothing else may be in a plan: a cached one is used for later saves, too."""
        if not self.save_distributed and sum(bool(plan.items) for plan in plans) > 1:
            raise ValueError("save_distributed=False, but several ranks have tensors or objects to save")
        scope = self._scope
        if len(plans) == 1 and not scope.alone and not scope.rank:
            scope.rank, scope.alone = _among_others()
            if self.final and scope.alone:
                raise ValueError(
                    "final=True is saved by all ranks together, so it cannot be used with no_dist=True"
                )
        first = scope.rank + 1 if scope.alone else 1
        return [
            dataclasses.replace(plan, storage_data={_SHARD: shard} if self.save_distributed else {})
            for shard, plan in enumerate(plans, first)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        future: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        if self.final:
            self._save_final(plan, planner)
            future.set_result([])
            return future
        if self._files is None:  # nobody has set the writer up
            self._begin(True)
        try:
            future.set_result(self._write(plan, planner) if plan.items else [])
        except BaseException:
            if self._files is not None:
                self._files.close()
            raise
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        files = self._files
        if self.final:
            return  # which they have agreed on
        if files is None:
            raise RuntimeError("finish() was called without a save that was set up")
        found = made_by_ranks(results)
        if not self.save_distributed:
            found[INDEX_NAME] = write_index(files, results)
        files.publish(found)
        self._files = None

    def _save_final(self, plan: SavePlan, planner: SavePlanner) -> None:
        save_distributed(
            state_of(plan, planner),
            self.path,
            durable=self._how.durable,
            keep_cached=self._how.keep_cached,
            progress=self._how.progress,
            dtype=self._how.dtype,
            engine=self._how.engine,
            **self._final_options,
        )

    def _write(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        assert self._files is not None
        shard = (plan.storage_data or {}).get(_SHARD, self._scope.rank + 1) if self.save_distributed else None
        mapping = self.fqn_to_index_mapping
        count = max(mapping.values(), default=1) if mapping else 1
        files: dict[str, list[WriteItem]] = {}
        for item in plan.items:
            is_object = item.type == WriteItemType.BYTE_IO
            file = 1 if is_object else _file_of(item.index.fqn, mapping)
            files.setdefault(dcp_shard(shard, file, count), []).append(item)
        return write_tensors(files.items(), planner, self._files, self._how)


def is_of_rank(rank: int, own: int) -> bool:
    """Returns whether files of this rank go with a save that a rank has made by itself: its own, and those of ranks
    that do not exist any more."""
    known = distributed.is_available() and distributed.is_initialized()
    return rank == own or (known and rank >= distributed.get_world_size())


def _among_others() -> tuple[int, bool]:
    """Returns the rank of a process that saves by itself, and whether there are others that may do the same."""
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return 0, False
    return distributed.get_rank(), True


def _file_of(fqn: str, mapping: Mapping[str, int] | None) -> int:
    if mapping is None:
        return 1
    try:
        return mapping[fqn]
    except KeyError:
        raise ValueError(f"fqn_to_index_mapping has no file for {fqn!r}") from None


def _name(result: WriteResult) -> str:
    name: str = result.storage_data.relative_path
    return name


def _plan_of(
    tensors: dict[str, torch.Tensor], offsets: Mapping[str, Sequence[int]], path: str, how: How
) -> PlannedFile:
    """Plans a safetensors file that says where in the whole tensors its tensors lie."""
    layout = lay_out_each(tensors, dtype=how.dtype)  # type: ignore[arg-type]
    metadata = {"format": "pt"}
    if offsets:
        info = {fqn: {"saved_offsets": list(begin)} for fqn, begin in offsets.items()}
        metadata = {SHARDING_KEY: json.dumps(info), "DCP_VERSION": "1.0", **metadata}
    return PlannedFile(FilePlan(encoded_path(path), layout.header(metadata), layout.items), layout)


def write_tensors(
    named: Iterable[tuple[str, list[WriteItem]]], planner: SavePlanner, unseen: UnseenFiles, how: How
) -> list[WriteResult]:
    """Writes safetensors files, by the names that the stock writer gives them, and waits."""
    began = time.perf_counter()
    results: list[WriteResult] = []
    planned: dict[PathLike, PlannedFile] = {}
    for name, file in _arranged(named, planner).items():
        made = unseen.made(name)
        plan = planned[made.path] = _plan_of(file.tensors, file.offsets, made.path, how)
        nbytes = {entry.name: entry.view.nbytes for entry in plan.layout.entries}
        results += (result_of(item, name, 0, nbytes[item.index.fqn], made) for item in file.items)
    if planned:
        with background.synchronous(), one_save(CALL, unseen.directory):
            future = start(planned, shared_by_ranks(how), began, call=CALL, explain=unseen.explain)
            finish(future, how.progress, os.path.basename(unseen.directory))
    return results


def _arranged(named: Iterable[tuple[str, list[WriteItem]]], planner: SavePlanner) -> dict[str, _File]:
    """Returns what is in each file. A name occurs in a file once, and what is no tensor has a file of its own."""
    files: dict[str, _File] = {}
    for name, items in named:
        for item in items:
            fqn, layer, place = item.index.fqn, 1, name
            if item.type == WriteItemType.BYTE_IO:
                place = dcp_objects(name)
            while fqn in files.setdefault(place, _File({}, {}, [])).tensors:
                layer += 1
                place = dcp_layer(name, layer)
            files[place].tensors[fqn] = resolved(planner, item)
            if item.tensor_data is not None:
                files[place].offsets[fqn] = item.tensor_data.chunk.offsets
            files[place].items.append(item)
    return files


def write_index(files: UnseenFiles, results: Iterable[Iterable[WriteResult]]) -> Made:
    """Writes the index of a checkpoint that is not in shards, as the stock writer does."""
    tensors = [result for of_rank in results for result in of_rank if not is_dcp_objects(_name(result))]
    index = {
        "metadata": {"total_size": sum(result.size_in_bytes for result in tensors)},
        "weight_map": {result.index.fqn: _name(result) for result in tensors},
    }
    made = files.made(INDEX_NAME)
    with open(made.path, "w") as file:
        json.dump(index, file, indent=2)
    return made


def result_of(item: WriteItem, name: str, offset: int, nbytes: int, made: Made) -> WriteResult:
    """Returns what the coordinator is told of an item, as the stock writer does, and where its file is hidden."""
    info = StorageInfo(name, offset, nbytes)
    info.made = made
    return WriteResult(index=item.index, size_in_bytes=nbytes, storage_data=info)


def made_by_ranks(results: Iterable[Iterable[WriteResult]]) -> dict[str, Made]:
    """Returns the hidden files of all ranks by their final names.

    Raises ``RuntimeError`` if two of them have the same one.
    """
    found: dict[str, Made] = {}
    for result in (result for of_rank in results for result in of_rank):
        made: Made = result.storage_data.made
        if found.setdefault(_name(result), made) != made:
            raise RuntimeError(
                f"ranks {found[_name(result)].rank} and {made.rank} have both made {_name(result)}"
            )
    return found
