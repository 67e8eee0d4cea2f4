# SPDX-License-Identifier: Apache-2.0
"""Saves a state dict whose tensors are spread over the ranks of a process group, as ordinary Hugging Face files."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch

from ..api.hub import Place, default_pattern, tell_saved
from ..base.activity import one_save
from ..engine import background
from ..engine.engine import Engine, Options
from ..engine.pipeline import How, PathLike, PlannedFile, check_metadata, finish, start
from ..engine.tensors import check_dtype
from ..formats.naming import index_of, names_of
from ..publish.directory import Replacement
from ..publish.manifests import check_wanted, recorder
from .boxes import Boxes
from .group import Group
from .processors import shared_by_ranks
from .rank_files import RankFiles, explain, planned
from .rank_own_files import OwnFiles, owned, write_own_files
from .rank_plan import File, Piece, Plan, Told, plan_of, told_of


def save_distributed(
    state_dict: Mapping[str, Any],
    folder: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "5GB",
    metadata: dict[str, str] | None = None,
    filename_pattern: str | None = None,
    process_group: Any = None,
    timeout: float | None = None,
    writers_publish: bool = False,
    dtype: torch.dtype | str | None = None,
    durable: bool = False,
    keep_cached: bool = True,
    progress: bool | None = None,
    manifest: bool | Literal["sha256"] = False,
    engine: Engine | Options | None = None,
) -> None:
    """Saves a state dict that the ranks of a process group have together, each its part, as one checkpoint.

    The files are to the byte those that :func:`fastshard.save_torch_state_dict` makes of the full state dict in one
    process, index included. Nothing is gathered: the first rank plans and makes the files, every rank writes its
    slices to their final places, and when all have reported, the folder changes at once. What several ranks have
    (replicated tensors) is written once, and the ranks write about as many bytes each.

    Until then the checkpoint that was there can be loaded. If a rank fails, dies or hangs, it stays, and every other
    rank raises an error that names the rank and its reason. What is left of it goes at the next save.

    All ranks of the group call this, for the same folder, which must lie on a filesystem that all of them share, and
    in the same order of saves. They agree through the store of the process group, so no collective is called.

    Args:
        state_dict: plain tensors, each whole; ``DTensor`` on meshes of any number of dimensions (FSDP2, tensor
            parallelism, both); ``ShardedTensor``. Ranks may have different names (pipeline and expert parallelism).
            Names of tensors that are tied on all ranks are left out and noted as in the full state dict.
        folder: a directory; it is made if it is missing.
        max_shard_size, metadata, filename_pattern: as for :func:`fastshard.save_torch_state_dict`; those of the first
            rank count.
        process_group: the ranks; ``None``: all of them, or this process alone where ``torch.distributed`` is not
            initialized.
        timeout: seconds that one rank may keep the others waiting in a step; ``None``: half an hour.
        writers_publish: for shared filesystems on which a file has one writer, who alone may rename it. Each file is
            written and put in place by a rank that has all of its tensors whole (replicated, or of its own), and the
            index comes last. Readers may then find some files new and some old for a moment, and so may a kill in that
            moment leave them; a rank that fails before leaves the old checkpoint as always.
        dtype, durable, keep_cached, progress, manifest, engine: as for :func:`fastshard.save_file`. For a manifest the
            rank that puts files in place reads them back.

    Raises:
        ValueError: a tensor is not complete, or differs between ranks, or has a placement that is not supported
            (``Partial``).
        RuntimeError: another rank has failed.
        Exception: what :func:`fastshard.save_torch_state_dict` raises.
    """
    check_wanted(manifest)
    with Group(process_group, timeout=timeout) as group, one_save("save_distributed", folder):
        how = How(
            durable=durable,
            keep_cached=keep_cached,
            progress=progress,
            allow_strided=True,
            dtype=dtype,
            manifest=manifest,
            engine=engine,
        )
        save = _Save(group, os.fspath(folder), how, writers_publish)
        save.run(state_dict, max_shard_size, metadata, filename_pattern)


class Style(NamedTuple):
    """What another library makes of the same files."""

    index_text: Callable[[Any], str]
    """Returns the index of huggingface_hub's split."""
    is_stale: Callable[[str], bool]
    """Whether a file of the folder goes with those that are replaced."""


def save_in_style(
    state_dict: Mapping[str, Any],
    folder: str,
    style: Style,
    *,
    max_shard_size: int | str,
    filename_pattern: str,
    how: How,
) -> None:
    """Does what :func:`save_distributed` does, for all ranks, with another library's index."""
    with Group(None, timeout=None) as group:
        _Save(group, folder, how, False, style).run(state_dict, max_shard_size, None, filename_pattern)


class _Task(NamedTuple):
    """What a rank has to do."""

    path: str
    files: list[File]
    pieces: list[Piece]


class _Save:
    def __init__(
        self, group: Group, folder: str, how: How, writers_publish: bool, style: Style | None = None
    ) -> None:
        self._group, self._folder, self._style = group, folder, style
        self._how = how._replace(manifest=False)  # no rank sees all bytes of a file
        self._record = recorder(how.manifest, how.keep_cached)
        self._writers_publish = writers_publish
        self._boxes: dict[str, Boxes] = {}
        self._files: RankFiles | None = None
        """On the first rank."""

    def run(
        self,
        state_dict: Mapping[str, Any],
        max_shard_size: int | str,
        metadata: dict[str, str] | None,
        filename_pattern: str | None,
    ) -> None:
        pattern = filename_pattern or default_pattern()
        plan: Plan | None = None

        def describe() -> tuple[dict[str, Told], object]:
            dtype = check_dtype(self._how.dtype)
            check_metadata(metadata)
            background.make_way(self._folder)
            self._boxes, told = told_of(state_dict, dtype)
            return told, {
                "dtype": str(dtype),
                "durable": self._how.durable,
                "writers_publish": self._writers_publish,
            }

        def decide(said: list[tuple[dict[str, Told], object]]) -> list[_Task] | list[OwnFiles]:
            nonlocal plan
            for rank, (_, options) in enumerate(said):
                if options != said[0][1]:
                    raise ValueError(f"rank 0 saves with {said[0][1]}, and rank {rank} with {options}")
            told = [tensors for tensors, _ in said]
            plan = plan_of(told, pattern, max_shard_size, metadata or {}, check_dtype(self._how.dtype))
            if self._writers_publish:
                os.makedirs(Place(self._folder, pattern).folder, exist_ok=True)
                return owned(plan, told)
            path = self._make(plan, pattern)
            files = [file._replace(header=b"") for file in plan.files]
            return [_Task(path, files, pieces) for pieces in plan.pieces]

        try:
            task = self._group.exchange(describe, decide)
            if isinstance(task, OwnFiles):
                self._write_own_files(task, plan, pattern)
                return
            with self._group.agreed():
                self._write(task)
            self._group.from_first(self._publish)
        except BaseException as error:
            if self._files is not None:
                self._files.end(error)
            raise
        if plan is not None:
            tell_saved(plan.split, pattern, max_shard_size, self._folder)

    def _write_own_files(self, task: OwnFiles, plan: Plan | None, pattern: str) -> None:
        place = Place(self._folder, pattern)
        new = set() if plan is None else {place.inside(file.name) for file in plan.files}

        def add_index(change: Replacement) -> None:
            if plan is not None and plan.index_text is not None:
                name = place.inside(index_of(pattern))
                with open(os.path.join(change.path, name), "w") as file:
                    file.write(plan.index_text)

        task = task._replace(files={place.inside(name): tensors for name, tensors in task.files.items()})
        belongs = _belonging(pattern)
        write_own_files(
            self._group,
            place.folder,
            task,
            self._boxes,
            self._how,
            self._record,
            add_index,
            lambda name: name not in new and belongs(name),
        )

    def _make(self, plan: Plan, pattern: str) -> str:
        place = Place(self._folder, pattern)
        belongs, style = _belonging(pattern), self._style

        def is_stale(name: str) -> bool:
            return belongs(name) or (style is not None and style.is_stale(name))

        files = RankFiles(place.folder, is_stale, durable=self._how.durable)
        try:
            files.make([file._replace(name=place.inside(file.name)) for file in plan.files], self._how)
            if plan.index_text is not None:
                text = plan.index_text if self._style is None else self._style.index_text(plan.split)
                files.write_text(place.inside(index_of(pattern)), text)
        except BaseException as error:
            files.end(error)
            raise
        self._files = files
        return files.path

    def _write(self, task: _Task) -> None:
        began = time.perf_counter()
        plans: dict[PathLike, PlannedFile] = {}
        try:
            for number, file in enumerate(task.files):
                pieces = [piece for piece in task.pieces if piece.file == number]
                if pieces:
                    path = os.path.join(task.path, file.name)
                    plans[path] = planned(path, file.nbytes, pieces, self._boxes, self._how)
            if plans:
                with background.synchronous():
                    future = start(plans, shared_by_ranks(self._how), began, call="save_distributed")
                    finish(future, self._how.progress, f"Saving {len(plans)} files")
        except BaseException as error:
            explain(error, self._folder)
            raise

    def _publish(self) -> None:
        assert self._files is not None
        files, self._files = self._files, None
        try:
            files.publish(self._record)
        except BaseException as error:
            files.end(error)
            raise
        files.end(None)


def _belonging(pattern: str) -> Callable[[str], bool]:
    """Returns whether a file is of an earlier save. As in huggingface_hub, none is if the pattern leads into a folder."""
    matches = names_of(pattern).fullmatch
    return lambda name: not os.path.dirname(pattern) and matches(name) is not None
