# SPDX-License-Identifier: Apache-2.0
"""Prepared saves: planned, reserved, mapped and page-locked once; every save after that is copying."""

from __future__ import annotations

import os
import threading
from typing import Any

import torch

from . import tensors as _tensors
from .engine import Engine, Options, Stats, engine_for
from .plan import FilePlan
from .planning import PathLike, StateDict, check_filename, encoded_path, fetcher, lay_out
from .saving import How, finish


def prepare(
    tensors: StateDict,
    filename: PathLike,
    metadata: dict[str, str] | None = None,
    *,
    generations: int = 2,
    durable: bool = False,
    allow_strided: bool = False,
    dtype: torch.dtype | None = None,
    checksums: bool = False,
    engine: Engine | Options | None = None,
) -> PreparedSave:
    """Makes everything ready for saving these tensors to this file again and again.

    For weights that go from a trainer to a server through ``/dev/shm``, and for frequent checkpoints::

        with fastshard.prepare(model.state_dict(), "/dev/shm/model.safetensors") as prepared:
            for step in ...:
                train()
                prepared.save()

    ``generations`` buffers of the file's size are reserved beside it, mapped, populated, and on filesystems in
    memory page-locked for the tensors' devices. Each save fills one that nobody is directed to, at the speed of
    memory or of the link, and publishes it atomically under ``filename``: whoever opens the file finds a complete
    save, and a crash at any moment leaves the newest one. Nothing stands under the name before the first save.

    **How long a reader may take.** A buffer is filled again by the ``generations``-th save after the one that
    published it. So with two generations, what a reader has open or mapped from a save stays as it is during the
    next save and until the one after that *begins*; a reader that needs longer copies what it wants to keep, or
    is given more generations.

    Args:
        tensors: as for :func:`fastshard.save_file`; they are read anew by every save. Tensors that have to be
            copied before they can be saved (lazy conjugate or negative bits, more than 8 strided dimensions) are
            refused, as a copy would not follow them.
        filename, metadata, durable, allow_strided, dtype, checksums, engine: as for :func:`fastshard.save_file`.
        generations: buffers; two at least.

    Raises:
        What :func:`fastshard.save_file` raises; a filesystem with no room for all buffers is ``SaveError`` with
        ``errno.ENOSPC`` here, and never later.
    """
    how = How(durable=durable, allow_strided=allow_strided, dtype=dtype, checksums=checksums, engine=engine)
    return PreparedSave(tensors, filename, metadata, generations, how)


class PreparedSave:
    """What :func:`prepare` returns. A context manager; its methods may be called from any thread, one save at a
    time. Not to be used in a forked child."""

    def __init__(
        self,
        tensors: StateDict,
        filename: PathLike,
        metadata: dict[str, str] | None,
        generations: int,
        how: How,
    ) -> None:
        check_filename(filename)
        if isinstance(generations, bool) or not isinstance(generations, int) or generations < 2:
            raise ValueError(f"generations must be an integer of at least 2, not {generations!r}")
        self.filename = filename
        self.generations = generations
        self._metadata = metadata
        self._how = how
        self._engine = engine_for(how.engine)
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._entries, self._header = self._plan(tensors)
        self._addresses = [entry.tensor.data_ptr() for entry in self._entries]
        self._native: Any = self._engine.prepare(self._file(self._entries), generations)

    @property
    def nbytes(self) -> int:
        """Size of the file in bytes; the buffers take ``generations`` times as much."""
        return len(self._header) + sum(entry.view.nbytes for entry in self._entries)

    def save(self, tensors: StateDict | None = None, *, progress: bool | None = None) -> Stats:
        """Saves the tensors as they are now and returns when the file stands under its name.

        What was enqueued on their devices' current streams before the call is in the file. ``tensors``: others,
        bound first (:meth:`bind`). After an exception the file is as it was, and the next save may be tried.
        """
        with self._lock:
            self._check()
            if tensors is not None:
                self._bind(tensors)
            elif any(e.tensor.data_ptr() != address for e, address in zip(self._entries, self._addresses)):
                # Their memory was swapped (`parameter.data = ...`): the same tensors, elsewhere.
                self._bind({entry.name: entry.tensor for entry in self._entries})
            future = self._engine.submit_prepared(
                self._native,
                keep_alive=self._entries,
                streams=_tensors.streams_for(self._entries),
                durable=self._how.durable,
                checksums=self._how.checksums,
                fetch=fetcher([self._entries], self._how.dtype),
                description=os.path.basename(os.fspath(self.filename)),
            )
            return finish(future, progress, {self.filename: self._entries}, "PreparedSave.save")

    def bind(self, tensors: StateDict) -> None:
        """From now on saves these tensors.

        Raises ``ValueError``, naming the tensor, unless names, shapes, dtypes and devices are those of the
        tensors before.
        """
        with self._lock:
            self._check()
            self._bind(tensors)

    def close(self) -> None:
        """Releases the buffers. The newest save stays under its name as an ordinary file. May be called twice."""
        with self._lock:
            if self._native is not None and os.getpid() == self._pid:
                self._native.close()
            self._native = None
            self._entries, self._addresses = [], []

    def __enter__(self) -> PreparedSave:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self) -> None:
        if self._native is None:
            raise RuntimeError("the prepared save is closed")
        if os.getpid() != self._pid:
            raise RuntimeError("this prepared save belongs to the parent process")

    def _plan(self, tensors: StateDict) -> tuple[list[_tensors.Entry], bytes]:
        entries, header = lay_out(
            tensors, self._metadata, self._how.allow_strided, self._how.dtype, self.filename
        )
        for entry in entries:
            if entry.tensor is not tensors[entry.name]:
                raise ValueError(
                    f"`{entry.name}` cannot be prepared: it has to be copied before it is saved (lazy conjugate or"
                    " negative bit, or more than 8 strided dimensions). Prepare the copy, and fill it before each save."
                )
        return entries, header

    def _file(self, entries: list[_tensors.Entry]) -> FilePlan:
        return FilePlan(encoded_path(self.filename), self._header, [entry.view for entry in entries])

    def _bind(self, tensors: StateDict) -> None:
        entries, header = self._plan(tensors)
        _require_same({e.name: e for e in self._entries}, {e.name: e for e in entries})
        assert header == self._header
        self._native.bind(self._file(entries))
        self._entries, self._addresses = entries, [entry.tensor.data_ptr() for entry in entries]


def _require_same(old: dict[str, _tensors.Entry], new: dict[str, _tensors.Entry]) -> None:
    for name in [*old, *(name for name in new if name not in old)]:
        if name not in new:
            raise ValueError(
                f"`{name}` is missing: tensors can only be bound to a save prepared for the same names"
            )
        if name not in old:
            raise ValueError(f"`{name}` is unexpected: the save was prepared without it")
        before, after = old[name].tensor, new[name].tensor
        for what in ("shape", "dtype", "device"):
            was, is_ = getattr(before, what), getattr(after, what)
            if was != is_:
                raise ValueError(f"`{name}` has {what} {is_}, but the save was prepared for {was}")
