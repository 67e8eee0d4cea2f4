# SPDX-License-Identifier: Apache-2.0
"""The writers of ``torch.distributed.checkpoint`` that are named ``FileSystemWriter`` and ``HuggingFaceStorageWriter``,
with what they write going through the engine.

The functions here take a stock writer, or one of a class derived from it, and do what its methods do. The checkpoint
is the stock one, ``.distcp`` files and ``.metadata``, but for how it comes about: the files appear at once.
"""

from __future__ import annotations

import copy
import functools
import os
import pickle
import queue
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from ..base.activity import one_save
from ..engine import background
from ..engine.engine import Options, engine_for
from ..engine.figures import counted
from ..engine.pipeline import How, encoded_path, finish
from ..engine.plan import FilePlan
from ..engine.tensors import current_streams
from ..formats.naming import (
    DCP_METADATA,
    INDEX_NAME,
    dcp_ranks_metadata,
    dcp_renumbered,
    number_of_dcp_shard,
    rank_of_distcp,
)
from .distcp import Archives, amender, fetcher
from .processors import shared_by_ranks
from .stock import metadata_version, resolved
from .unseen_files import UnseenFiles
from .writer import CALL, Scope, is_of_rank, made_by_ranks, result_of, write_index, write_tensors

Queue = queue.Queue[tuple[Any, str, list[WriteItem]]]
"""Of the files that a rank is to write: path, name, items."""
_saves: weakref.WeakKeyDictionary[Any, UnseenFiles] = weakref.WeakKeyDictionary()
"""By writer, so that nothing of a save is pickled with it."""


def begin(
    writer: Any, is_coordinator: bool, *, durable: bool, stale: Callable[[str], bool] | None = None
) -> UnseenFiles:
    """Begins a save, on every rank."""
    before = _saves.pop(writer, None)
    if before is not None:  # of a save that has failed
        before.close()
    rank, alone = writer.rank or 0, not writer.use_collectives
    files = UnseenFiles(
        os.fspath(writer.path),
        rank,
        publishes=is_coordinator or alone,
        durable=durable,
        stale=stale or functools.partial(_is_stale, rank, alone),
    )
    _saves[writer] = files
    return files


def _is_stale(rank: int, alone: bool, name: str) -> bool:
    """Returns whether the file goes when a rank, or all ranks, have saved."""
    if name == DCP_METADATA:  # the files that it tells of change
        return True
    of_rank = rank_of_distcp(name)
    return of_rank is not None and (not alone or is_of_rank(of_rank, rank))


def write(
    writer: Any, planner: SavePlanner, files: Queue, how: How
) -> torch.futures.Future[list[WriteResult]]:
    """Writes the files of this rank, and waits."""
    unseen = _saves.get(writer)
    if unseen is None:  # nobody has set the writer up
        unseen = begin(writer, True, durable=how.durable)
    future: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
    try:
        if getattr(writer.serialization_format, "value", None) == "safetensors":
            named = _taken(files)
            if not writer.use_collectives:
                named = _of_rank(unseen.rank, named)
            future.set_result(write_tensors(named, planner, unseen, how))
        else:
            future.set_result(_write_archives(unseen, planner, files, how))
    except BaseException:
        unseen.close()
        raise
    return future


def _write_archives(unseen: UnseenFiles, planner: SavePlanner, files: Queue, how: How) -> list[WriteResult]:
    began = time.perf_counter()
    results: list[WriteResult] = []
    plans: list[FilePlan] = []
    contents: list[Archives] = []
    templates: dict[Any, Any] = {}
    for name, items in _taken(files):
        made = unseen.made(name)
        archives = Archives()
        for item in sorted(items, key=lambda item: item.type != WriteItemType.BYTE_IO):
            if item.type == WriteItemType.BYTE_IO:
                data: Any = planner.resolve_data(item)
                place = archives.add_bytes(data.getbuffer())
            else:
                place = archives.add_tensor(resolved(planner, item), templates)
            results.append(result_of(item, name, *place, made))
        archives.close()
        contents.append(archives)
        plans.append(FilePlan(encoded_path(made.path), b"", archives.items))
    if not plans:
        return results
    amend = amender(contents)
    with background.synchronous(), one_save(CALL, unseen.directory):
        future = engine_for(shared_by_ranks(how).engine).submit(
            plans,
            keep_alive=contents,
            streams=current_streams({view.device for file in contents for view in file.items}),
            durable=how.durable,
            keep_cached=how.keep_cached,
            checksums=amend is not None,
            fetch=fetcher(contents),
            amend=amend,
            steps=[counted(CALL, unseen.directory)],
            explain=unseen.explain,
            plan_seconds=time.perf_counter() - began,
            serve=False,
        )
        finish(future, how.progress, os.path.basename(unseen.directory))
    return results


def _taken(files: Queue) -> Iterator[tuple[str, list[WriteItem]]]:
    """Takes the files out of a queue, those without items left out."""
    while True:
        try:
            _, name, items = files.get_nowait()
        except queue.Empty:
            return
        if items:
            yield name, items


def _of_rank(
    rank: int, named: Iterator[tuple[str, list[WriteItem]]]
) -> Iterator[tuple[str, list[WriteItem]]]:
    """Returns other names where the stock writer gives all ranks the same."""
    for name, items in named:
        yield name if number_of_dcp_shard(name) is None else dcp_renumbered(name, rank + 1), items


def publish(writer: Any, metadata: Metadata, results: list[list[WriteResult]]) -> None:
    """Writes ``.metadata``, and lets the checkpoint appear."""
    unseen = _saves.pop(writer)
    found = made_by_ranks(results)
    metadata.version = metadata_version()
    metadata.storage_data = {
        result.index: _without_place(result.storage_data) for of_rank in results for result in of_rank
    }
    metadata.storage_meta = writer.storage_meta()
    together = writer.use_collectives or writer.rank is None
    name = DCP_METADATA if together else dcp_ranks_metadata(writer.rank)
    made = found[name] = unseen.made(name)
    try:
        with open(made.path, "wb") as file:
            pickle.dump(metadata, file)
    except OSError as error:
        unseen.explain(error)
        unseen.close()
        raise
    unseen.publish(found)


def publish_tensors(writer: Any, results: list[list[WriteResult]]) -> None:
    """Lets the checkpoint of a ``HuggingFaceStorageWriter`` appear, with its index if it is not in shards."""
    unseen = _saves.pop(writer)
    found = made_by_ranks(results)
    if not writer.save_distributed:
        found[INDEX_NAME] = write_index(unseen, results)
    unseen.publish(found)


def scope_of(writer: Any) -> Scope:
    """Returns which files a save of a ``HuggingFaceStorageWriter`` replaces."""
    scope = Scope(writer.save_distributed)
    scope.rank, scope.alone = writer.rank or 0, not writer.use_collectives
    return scope


def is_under_way(writer: Any) -> bool:
    """Returns whether a save by this writer has begun here."""
    return writer in _saves


def _without_place(info: Any) -> Any:
    plain = copy.copy(info)
    del plain.made
    return plain


class _NoFolder(FileSystem):
    """The folder of a checkpoint appears with its files."""

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        pass


_FILE_SYSTEM: Final = _NoFolder


class FastshardFileSystemWriter(FileSystemWriter):
    """``torch.distributed.checkpoint.FileSystemWriter`` with the same arguments and the same files, ``.distcp`` and
    ``.metadata``, which the stock ``FileSystemReader`` reads.

    It writes from the tensors' own memory and from devices in bounded memory, and the checkpoint appears at once:
    until then the folder has the earlier one, whose files go in the same moment. ``options`` are limits of the
    engine. With ``_extensions``, or with another ``fs`` set, the stock writer writes.
    """

    def __init__(
        self, path: str | os.PathLike[str], *args: Any, options: Options | None = None, **kwargs: Any
    ) -> None:
        super().__init__(path, *args, **kwargs)
        if not hasattr(FileSystemWriter, "_write_data"):
            raise RuntimeError(
                f"FastshardFileSystemWriter needs a later version of torch than {torch.__version__}"
            )
        self._options = options
        if not self.transforms.extensions:
            self.fs = _FILE_SYSTEM()

    def _is_ours(self) -> bool:
        return type(self.fs) is _FILE_SYSTEM

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)
        if self._is_ours():
            begin(self, is_coordinator, durable=self.sync_files)

    def _write_data(self, planner: SavePlanner, file_queue: Queue) -> torch.futures.Future[list[WriteResult]]:
        if not self._is_ours():
            return super()._write_data(planner, file_queue)
        return write(self, planner, file_queue, How(durable=self.sync_files, engine=self._options))

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        if not self._is_ours():
            return super().finish(metadata, results)
        publish(self, metadata, results)
