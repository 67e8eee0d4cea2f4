# SPDX-License-Identifier: Apache-2.0
"""What all public functions have in common: arguments become plans, plans are submitted, and saves are waited
for."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError

from ..errors import SaveError
from ..formats.safetensors import HeaderTooLarge
from . import background, planning, snapshots
from . import tensors as _tensors
from .engine import (
    Engine,
    Fetch,
    Options,
    SaveFuture,
    Stats,
    Step,
    Wanted,
    engine_for,
    progress_wanted,
)
from .figures import counted
from .parts import Linked, Served
from .plan import FETCHED, FilePlan, Memory
from .planning import Layout
from .progress import wait_with_bar

PathLike = str | os.PathLike[str]
StateDict = dict[str, torch.Tensor]


def lay_out(
    tensors: StateDict,
    metadata: dict[str, str] | None,
    allow_strided: bool,
    dtype: torch.dtype | str | None,
    filename: object = "",
) -> tuple[Layout, bytes]:
    """Returns the tensors in file order, and the header that precedes them. Raises as
    :func:`fastshard.save_file`."""
    dtype = _tensors.check_dtype(dtype)
    layout = planning.lay_out(tensors, allow_strided=allow_strided, dtype=dtype)
    check_filename(filename)
    check_metadata(metadata)
    try:
        head = layout.header(metadata)
    except HeaderTooLarge:
        raise SafetensorError("Error while serializing: header too large") from None
    return layout, head


def fetcher(layouts: list[Layout], dtype: torch.dtype | str | None) -> Fetch:
    """Returns the function that brings bytes which only Python can bring, for the tensors of each file.

    It may run on any thread, and copies on the streams that are current on the thread that calls ``fetcher``.
    """
    target = _tensors.check_dtype(dtype)
    on_streams = _tensors.on_current_streams(
        [
            entry.tensor.device
            for layout in layouts
            if FETCHED in layout.devices
            for entry in layout.entries
            if entry.view.device == FETCHED
        ]
    )

    def fetch(file: int, item: int, first_byte: int, nbytes: int, address: int) -> None:
        tensor = layouts[file].entries[item].tensor
        with on_streams(tensor.device):
            _tensors.fetch(tensor, first_byte, nbytes, address, target)

    return fetch


def check_filename(filename: object) -> None:
    path: Any = filename
    if not isinstance(path, str):
        try:
            path = os.fspath(path)
        except TypeError as error:
            raise TypeError(f"argument 'filename': {error}") from None
    if isinstance(path, bytes):
        raise TypeError("argument 'filename': 'bytes' object is not an instance of 'str'")
    os.fsencode(path)


def check_metadata(metadata: Any) -> None:
    """Raises ``TypeError``, as safetensors does, for what no header can hold."""
    if metadata is None:
        return
    if not isinstance(metadata, dict):
        raise TypeError(
            f"argument 'metadata': '{type(metadata).__name__}' object is not an instance of 'dict'"
        )
    for pair in metadata.items():
        for text in pair:
            if not isinstance(text, str):
                raise TypeError(
                    f"argument 'metadata': {_tensors.what_it_is(text)} is not an instance of 'str'"
                )
            text.encode()


def encoded_path(filename: PathLike) -> bytes:
    path = os.fsencode(filename)
    if b"\0" in path:
        raise SaveError(22, os.strerror(22), filename)
    return path


class How(NamedTuple):
    """The options that public functions have in common: their names, types and defaults.

    :func:`fastshard.save_file` has all of them, and describes them for users. ``tests/test_options.py`` compares every
    signature with this one, and names the options that a function leaves out.
    """

    durable: bool = False
    """The save ends when file and directory are on stable storage."""
    keep_cached: bool = True
    """``False``: the save ends when nothing of the file is in the page cache any more."""
    progress: bool | None = None
    """Whether to show a bar; ``None``: as the environment says."""
    allow_strided: bool = False
    """Non-contiguous tensors are packed, not refused."""
    dtype: torch.dtype | str | None = None
    """What floating-point tensors are cast to on their way."""
    checksums: bool = False
    """The CRC-32 of each tensor is taken as its bytes pass."""
    manifest: bool | Literal["sha256"] = False
    """What the folder is to say of the files: nothing, ``True`` for ``fastshard.manifest.json``, ``"sha256"`` for that
    and ``SHA256SUMS``."""
    base: PathLike | None = None
    """An earlier checkpoint. Its files that are the same are linked instead of written."""
    engine: Engine | Options | None = None
    """Which engine saves, or what limits it has; ``None``: the default engine."""


class PlannedFile(NamedTuple):
    """The plan of a file, and the tensors that it points into."""

    file: FilePlan
    layout: Layout


def plan_file(
    tensors: StateDict, filename: PathLike, metadata: dict[str, str] | None, how: How
) -> PlannedFile:
    """Plans one file of a save. Raises as :func:`fastshard.save_file`."""
    layout, head = lay_out(tensors, metadata, how.allow_strided, how.dtype, filename)
    return PlannedFile(FilePlan(encoded_path(filename), head, layout.items), layout)


def write_files(
    plans: Mapping[PathLike, PlannedFile],
    how: How,
    began: float,
    description: str | None = None,
    steps: Sequence[Step] = (),
) -> None:
    """Writes these files and waits. ``began`` and ``steps`` are those of :func:`start`."""
    if description is None:
        one = os.path.basename(os.fspath(next(iter(plans)))) if len(plans) == 1 else None
        description = f"{len(plans)} files" if one is None else one
    background.make_way(*plans, wait=background.current() is None)
    finish(start(plans, how, began, steps=steps), how.progress, description)


def start(
    plans: Mapping[PathLike, PlannedFile],
    how: How,
    began: float,
    *,
    call: str = "save_file",
    steps: Sequence[Step] = (),
    undo: Callable[[], None] | None = None,
    explain: Callable[[BaseException], BaseException | None] | None = None,
    paths: Iterable[PathLike] | None = None,
    shown: Mapping[PathLike, str] | None = None,
    linked: Linked | None = None,
) -> SaveFuture:
    """Starts writing these files.

    ``began`` is when planning did, by ``time.perf_counter``. ``call`` is the public function under which the
    save counts when it is complete. ``paths`` are the files and folders that it changes, if these are not the
    plans' own, and ``shown`` their names in ``Stats.checksums``. ``steps``, ``undo`` and ``explain`` are those of :meth:`fastshard.Engine.submit`. In a block of
    :func:`fastshard.asynchronous` the save is made behind a snapshot.
    """
    layouts = [planned.layout for planned in plans.values()]
    devices = set[int]().union(*(layout.devices for layout in layouts))
    checksums = how.checksums or bool(how.manifest)
    names = {
        (shown or {}).get(filename) or os.fspath(filename): planned.layout.names
        for filename, planned in plans.items()
        if checksums
    }
    return engine_for(how.engine).submit(
        [planned.file for planned in plans.values()],
        keep_alive=layouts,
        streams=_tensors.current_streams(devices),
        durable=how.durable,
        keep_cached=how.keep_cached,
        checksums=checksums,
        fetch=fetcher(layouts, how.dtype) if FETCHED in devices else None,
        steps=[*steps, counted(call, next(iter([*plans, *(paths or ())]), ""))] if plans or linked else steps,
        undo=undo,
        explain=explain,
        tensor_names=names,
        plan_seconds=time.perf_counter() - began,
        linked=linked,
        serve=False,
        wanted=_wanted(plans, layouts, paths),
    )


def start_after(
    saves: Sequence[SaveFuture],
    paths: Iterable[PathLike],
    *,
    steps: Sequence[Step],
    undo: Callable[[], None],
    explain: Callable[[BaseException], BaseException | None],
) -> SaveFuture:
    """Starts a save without files of its own: its steps change ``paths`` when these saves have ended."""
    places = frozenset(background.place_of(path) for path in paths)
    served = Served(steps=steps, undo=undo, explain=explain)
    future = snapshots.start_after(engine_for(None), saves, places, served)
    future.serve()
    return future


def _wanted(
    plans: Mapping[PathLike, PlannedFile], layouts: list[Layout], paths: Iterable[PathLike] | None
) -> Wanted | None:
    """Returns how the save is to be made whose caller goes on; ``None`` if its caller waits."""
    scope = background.current()
    if scope is None or any(isinstance(planned.file.target, Memory) for planned in plans.values()):
        return None
    unchanged = _unchanged(layouts) if scope.check_unchanged else None
    return wanted(scope, plans if paths is None else paths, unchanged)


def wanted(
    scope: background.asynchronous, paths: Iterable[PathLike], unchanged: Callable[[], None] | None = None
) -> Wanted:
    """Returns how a save of these files and folders is to be made in a block of :func:`fastshard.asynchronous`."""
    places = frozenset(background.place_of(path) for path in paths)
    return Wanted(scope.snapshot, scope.wait_staged, unchanged, places)


def _unchanged(layouts: list[Layout]) -> Callable[[], None]:
    """Returns a function that raises if a tensor was changed since. Raises ``ValueError`` if torch does not count
    the changes of one."""
    seen: list[tuple[str, torch.Tensor, int]] = []
    for layout in layouts:
        for name, entry in zip(layout.names, layout.entries):
            if entry.tensor.is_inference():
                raise ValueError(
                    f"check_unchanged: torch does not count the changes of inference tensor {name!r}"
                )
            seen.append((name, entry.tensor, entry.tensor._version))

    def check() -> None:
        for name, tensor, version in seen:
            if tensor._version != version:
                raise RuntimeError(
                    f"tensor {name!r} was changed before the snapshot of the save was complete"
                )

    return check


def finish(future: SaveFuture, progress: bool | None, description: str) -> Stats | None:
    """Waits for a save, with a bar if one is wanted, and returns its figures.

    A save that was started in a block of :func:`fastshard.asynchronous` is handed over to that, and there are no
    figures yet.
    """
    scope = background.current()
    if scope is not None and future.background is not None:
        scope.take(future)
        return None
    if progress_wanted(progress) and future.progress().nbytes:
        wait_with_bar(future, description)
    return future.result()
