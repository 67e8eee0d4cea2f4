# SPDX-License-Identifier: Apache-2.0
"""Prepared saves: planned, reserved, mapped and page-locked once. Every save after that only copies."""

from __future__ import annotations

import os
import threading
from concurrent.futures import CancelledError
from typing import Any, NamedTuple

import torch

from ..engine import tensors as _tensors
from ..engine.background import asynchronous, make_way, place_of
from ..engine.engine import Engine, Options, SaveFuture, Stats, engine_for
from ..engine.figures import counted
from ..engine.pipeline import (
    How,
    PathLike,
    StateDict,
    check_filename,
    encoded_path,
    finish,
    lay_out,
)
from ..engine.plan import FETCHED, FilePlan
from ..engine.planning import Layout, places
from ..publish.manifests import forget
from .sources import Given, Source, source_of


def prepare(
    tensors: Given,
    filename: PathLike,
    metadata: dict[str, str] | None = None,
    *,
    generations: int = 2,
    durable: bool = False,
    allow_strided: bool = False,
    dtype: torch.dtype | str | None = None,
    checksums: bool = False,
    engine: Engine | Options | None = None,
) -> PreparedSave:
    """Prepares saving these tensors to this file again and again.

    It is meant for weights that go from a trainer to a server through ``/dev/shm``, and for frequent
    checkpoints::

        with fastshard.prepare(model, "/dev/shm/model.safetensors") as prepared:
            for step in ...:
                train()
                prepared.save()

    Beside the file, ``generations`` buffers of its size are reserved, mapped, populated, and, on filesystems
    in memory, page-locked for the tensors' devices. Each save fills a buffer that no reader can find, at the
    speed of memory or of the link, and publishes it atomically under ``filename``. So whoever opens the file
    finds a complete save, and a crash at any moment leaves the newest one. There is no file under the name
    before the first save.

    **How long a reader may take.** A buffer is filled again by the ``generations``-th save after the one that
    published it. So with two generations, what a reader has open or mapped stays unchanged during the next
    save and until the one after that *begins*. A reader that needs longer copies what it wants to keep, or
    gets more generations.

    Args:
        tensors: where every save reads its tensors anew:

            - a module: its parameters and buffers, as :func:`fastshard.save_model` saves them. One of tied tensors is
              kept, and the names of the others go into the metadata; strided ones are packed. Parameters that get
              other memory (``.data =``, ``load_state_dict(assign=True)``, ``.to(device)``) are followed.
            - a function without arguments that returns a dict as for :func:`fastshard.save_file`.
            - such a dict, in which tensors may be replaced. The tensors of a module's ``state_dict()`` are *not* the
              module's: they keep the memory that its parameters had. If it can be told that nobody writes to that
              memory any more, the save warns. A module avoids this.

            Names, shapes and dtypes must stay what they were. Tensors that have to be copied before they can be saved
            (lazy conjugate or negative bits, more than 8 strided dimensions) are refused, as a copy would not follow
            them.
        filename, metadata, durable, allow_strided, dtype, checksums, engine: as for :func:`fastshard.save_file`.
        generations: the number of buffers, at least two.

    Raises:
        SaveError: with ``errno.ENOSPC`` if the filesystem has no space for all buffers: here, and never later; with
            ``errno.ENOMEM`` if a filesystem in memory has the space, but the memory limit of a container (control group)
            leaves less.
        Exception: what :func:`fastshard.save_file` raises.
    """
    how = How(durable=durable, allow_strided=allow_strided, dtype=dtype, checksums=checksums, engine=engine)
    return PreparedSave(tensors, filename, metadata, generations, how)


class PreparedSave:
    """What :func:`prepare` returns: a context manager.

    Its methods may be called from any thread, one save at a time. It must not be used in a forked child. A
    signal handler may save while a save of the same object is under way in its thread. Then the handler's
    file is published first, and the interrupted save begins anew.
    """

    def __init__(
        self,
        tensors: Given,
        filename: PathLike,
        metadata: dict[str, str] | None,
        generations: int,
        how: How,
    ) -> None:
        self._source = source_of(tensors)
        check_filename(filename)
        if isinstance(generations, bool) or not isinstance(generations, int) or generations < 2:
            raise ValueError(f"generations must be an integer of at least 2, not {generations!r}")
        self.filename = filename
        self.generations = generations
        self._metadata = metadata
        self._how = how
        self._dtype = _tensors.check_dtype(how.dtype)
        self._engine = engine_for(how.engine)
        # Reentrant: see save(). It serves to make threads take turns.
        self._lock = threading.RLock()
        self._pid = os.getpid()
        self._turn = 0
        self._saves = 0
        self._fetching = False
        bound = self._planned(self._source, self._source.read())
        self.nbytes = bound.file.nbytes
        """Size of the file in bytes; the buffers take ``generations`` times as much."""
        self._specs = bound.specs
        self._header = bound.file.header
        self._native: Any = self._engine.prepare(bound.file, generations, bound)

    @property
    def saves(self) -> int:
        """The number of saves that were made."""
        return self._saves

    @property
    def closed(self) -> bool:
        return self._native is None

    def __repr__(self) -> str:
        buffers = "closed" if self.closed else f"{self.generations} generations of {self.nbytes:,} bytes"
        made = f"{self._saves} save" if self._saves == 1 else f"{self._saves} saves"
        return f"<PreparedSave of {os.fspath(self.filename)!r}: {len(self._specs)} tensors, {buffers}, {made} made>"

    def save(
        self, tensors: Given | None = None, *, progress: bool | None = None, changed: bool = False
    ) -> Stats:
        """Saves the tensors as they are now and returns when the file stands under its name.

        What was enqueued on their devices' current streams before the call is in the file. Other ``tensors``
        are bound first (:meth:`bind`). After an exception the file is as it was, and the next save may be
        tried.

        With ``changed=True`` every byte is compared with the save before while it is copied, and ``changed`` of the
        figures that are returned says which tensors differ, and which ranges of the file, in blocks of 4 KiB. The
        published file must not be cut meanwhile, as it is read.

        Raises ``ValueError``, naming the tensor, for a name, shape or dtype that has changed, and
        ``RuntimeError`` in a signal handler that has interrupted a save of tensors whose bytes Python brings.
        """
        return self._save(tensors, progress, None, changed).stats

    def save_async(self, tensors: Given | None = None, *, changed: bool = False) -> SaveFuture:
        """Does the same, but returns when the tensors may be changed: all is in the new file, which is then synced
        if that is wanted, and appears. The next save waits for it.

        An error after that is raised by ``result()`` of the future, or as :func:`fastshard.save_file_async` says.
        """
        return self._save(tensors, False, asynchronous(), changed)

    def _save(
        self, tensors: Given | None, progress: bool | None, scope: asynchronous | None, changed: bool
    ) -> SaveFuture:
        self._open()
        given = None if tensors is None else source_of(tensors)
        with self._lock:
            make_way(self.filename)
            forget([self.filename])
            source = given or self._source
            source.check()
            future = None
            while future is None:
                future = self._attempt(source, progress, scope, changed)
            self._saves += 1
            return future

    def bind(self, tensors: Given) -> None:
        """Binds other tensors, which are saved from now on.

        Raises ``ValueError``, naming the tensor, unless names, shapes and dtypes are those of the tensors
        before.
        """
        self._open()
        source = source_of(tensors)
        with self._lock:
            self._bind(self._open(), source)

    def close(self) -> None:
        """Releases the buffers. The newest save stays under its name as an ordinary file. May be called twice."""
        if os.getpid() != self._pid:
            self._native = None
            return
        with self._lock:
            native, self._native = self._native, None
            if native is not None:
                native.close()

    def __enter__(self) -> PreparedSave:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> Any:
        """Returns the native module's object. Raises ``RuntimeError`` if it may not be used."""
        native = self._native
        if os.getpid() != self._pid:
            raise RuntimeError("this prepared save belongs to the parent process")
        if native is None:
            raise RuntimeError("the prepared save is closed")
        return native

    def _attempt(
        self, source: Source, progress: bool | None, scope: asynchronous | None, changed: bool
    ) -> SaveFuture | None:
        """Makes one save. Returns ``None`` if a signal handler has used this object meanwhile.

        A handler may interrupt anywhere in here, and finds nothing half done. What is bound and the tag that
        says so change in one native call, and the engine starts a save only if the tag is the expected one. A
        save that the handler finds under way is cancelled by the handler's save, and started again by the
        interrupted call.
        """
        native = self._open()
        if self._fetching:
            raise RuntimeError(
                f"a save of {os.fspath(self.filename)!r} is under way in this thread, and only this thread can bring"
                " its bytes: a signal handler cannot save it at the same time"
            )
        if native.closed:
            native = self._stand_again(native)
        self._turn += 1
        turn = self._turn
        tensors, bound = self._bind(native, source)
        ordered = [tensors[name] for name in bound.names]
        filename = os.fspath(self.filename)
        future = self._engine.submit_prepared(
            native,
            keep_alive=ordered,
            streams=_tensors.current_streams(bound.devices),
            durable=self._how.durable,
            checksums=self._how.checksums,
            changed=changed,
            fetch=_fetcher(ordered, self._dtype),
            tensor_names={filename: bound.names} if self._how.checksums or changed else None,
            tag=bound,
            steps=[counted("PreparedSave.save", filename)],
            paths=None if scope is None else frozenset([place_of(filename)]),
        )
        if future is None:
            return None
        self._fetching = FETCHED in bound.devices
        try:
            if scope is None:
                finish(future, progress, os.path.basename(filename))
            else:
                scope.take(future)
            return future
        except CancelledError:
            if self._turn == turn:
                raise
            return None
        finally:
            self._fetching = False

    def _stand_again(self, native: Any) -> Any:
        """Makes the buffers anew for a save after the exit of Python has begun, when engines release what
        they hold."""
        bound: _Bound = native.tag
        self._native = self._engine.prepare(bound.file, self.generations, bound)
        return self._native

    def _bind(self, native: Any, source: Source) -> tuple[StateDict, _Bound]:
        """Reads the tensors, and tells the engine their addresses if these have changed."""
        tensors = source.read()
        bound: _Bound = native.tag
        if not bound.fits(tensors):
            bound = self._planned(source, tensors)
            self._require_same(bound)
            native.bind(bound.file, bound)
        self._source = source
        return tensors, bound

    def _planned(self, source: Source, tensors: StateDict) -> _Bound:
        metadata = self._metadata
        if source.tied and (metadata is None or isinstance(metadata, dict)):
            metadata = {
                **(metadata or {}),
                **{n: k for n, k in source.tied.items() if n not in (metadata or {})},
            }
        strided = self._how.allow_strided or source.is_module
        layout, header = lay_out(tensors, metadata, strided, self._dtype, self.filename)
        for name in layout.copied(tensors):
            raise ValueError(
                f"`{name}` cannot be prepared: it has to be copied before it is saved (lazy conjugate or"
                " negative bit, or more than 8 strided dimensions). Prepare the copy, and fill it before each save."
            )
        return _Bound(tensors, layout, FilePlan(encoded_path(self.filename), header, layout.items))

    def _require_same(self, bound: _Bound) -> None:
        old, new = self._specs, bound.specs
        for name in [*old, *(name for name in new if name not in old)]:
            if name not in new:
                raise ValueError(f"`{name}` is missing: the save was prepared with it")
            if name not in old:
                raise ValueError(f"`{name}` is unexpected: the save was prepared without it")
            for what, before, after in zip(_Spec._fields, old[name], new[name]):
                if before != after:
                    raise ValueError(f"`{name}` has {what} {after}, but the save was prepared for {before}")
        if bound.file.header != self._header:
            raise ValueError("the save was prepared for other tied names")


class _Spec(NamedTuple):
    """The properties of a tensor that must not change."""

    shape: torch.Size
    dtype: torch.dtype


class _Bound:
    """Tensors as they were planned. None of them is held, as a module may release their memory after a save."""

    def __init__(self, tensors: StateDict, layout: Layout, file: FilePlan) -> None:
        self.file = file
        self.names = list(layout.names)
        self.specs = {name: _Spec(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        self.devices = layout.devices
        self._keys, self._types = list(tensors), list(map(type, tensors.values()))
        self._complex = any(spec.dtype.is_complex for spec in self.specs.values())
        self._places = self._places_of(tensors)

    def fits(self, tensors: StateDict) -> bool:
        """Returns whether these tensors lie where the planned ones lay, in the same way."""
        if list(tensors) != self._keys or list(map(type, tensors.values())) != self._types:
            return False
        return self._places_of(tensors) == self._places

    def _places_of(self, tensors: StateDict) -> object:
        """Returns address and layout of each tensor: what its view says, as far as that can be read quickly."""
        found = places(tensors)
        if found is not None:
            return found
        rows: list[object] = [
            (t.data_ptr(), t.dtype, t.shape, t.device, t.is_neg(), t.is_contiguous() or t.stride())
            for t in tensors.values()
        ]
        if self._complex:
            rows += [t.is_conj() for t in tensors.values()]
        return rows


def _fetcher(tensors: list[torch.Tensor], dtype: torch.dtype | None) -> Any:
    """Returns the function that brings bytes which only Python can bring."""

    def fetch(file: int, item: int, first_byte: int, nbytes: int, address: int) -> None:
        _tensors.fetch(tensors[item], first_byte, nbytes, address, dtype)

    return fetch
