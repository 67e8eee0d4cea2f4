# SPDX-License-Identifier: Apache-2.0
"""A storage for ``torch_checkpointing`` (0.1.1), whose files the engine writes.

Its own storage opens files with ``O_DIRECT`` and writes whatever lies in memory wherever it lies, which ext4 and XFS
refuse (EINVAL), and syncs nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch_checkpointing
from torch_checkpointing.checkpoint_layout import SafetensorsSerialization, TorchSerialization
from torch_checkpointing.storage.base_storage import StorageConfig
from torch_checkpointing.storage.filesystem import LocalFileSystemStorage, LocalFileSystemStorageConfig

from .. import _native
from ..api.archive import torch_save
from ..api.saving import save_file
from ..engine import background
from ..engine.engine import Options, engine_for
from ..engine.pipeline import encoded_path
from ..engine.plan import HOST, FilePlan, TensorView
from ..errors import save_errors
from ..publish.folder import open_folder

_BUFFER_NBYTES = 1 << 20


@dataclass
class FastshardStorageConfig(StorageConfig):  # type: ignore[misc, unused-ignore]
    """For ``CheckpointManager.Config(storage_config=FastshardStorageConfig())``.

    Items in safetensors and in torch's format are written straight out of their tensors, by several threads, and appear
    complete or not at all, as all files do.
    """

    durable: bool = False
    """A file that has been written, and a checkpoint that has its name, is on stable storage (fsync)."""
    keep_cached: bool = True
    """``False``: nothing of a file stays in the page cache."""
    options: Options | None = None
    """Limits of the engine: ``Options(write_path="direct")`` writes past the page cache."""

    def create_storage(self) -> FastshardStorage:
        _let_items_stream()
        return FastshardStorage(self)


class FastshardStorage(LocalFileSystemStorage):  # type: ignore[misc, unused-ignore]
    """Files on a local or mounted filesystem. It reads, lists and removes as ``LocalFileSystemStorage`` does."""

    def __init__(self, config: FastshardStorageConfig | None = None) -> None:
        super().__init__(LocalFileSystemStorageConfig(use_direct_io=False))
        self._made_with = config or FastshardStorageConfig()

    def write(self, path: Path, data: Any) -> None:
        address, nbytes, owner = _memory_of(data)
        made_with = self._made_with
        plan = FilePlan(encoded_path(path), b"", [TensorView(address, nbytes, HOST)] if nbytes else [])
        engine_for(made_with.options).submit(
            [plan], keep_alive=owner, durable=made_with.durable, keep_cached=made_with.keep_cached
        ).result()

    def stream_write(self, path: Path) -> io.IOBase:
        return _WriteStream(path, self._made_with.durable, self._made_with.keep_cached)

    def write_item(self, path: Path, item: Any, layout: Any) -> bool:
        """Writes an item out of the memory of its tensors. Returns ``False`` if its format has no such way."""
        made_with = self._made_with
        if isinstance(layout, SafetensorsSerialization):
            flat = layout.prepare_tensors_for_save(item)
            save_file(
                flat,
                path,
                layout.metadata,
                durable=made_with.durable,
                keep_cached=made_with.keep_cached,
                engine=made_with.options,
            )
        elif isinstance(layout, TorchSerialization):
            torch_save(
                item,
                path,
                durable=made_with.durable,
                keep_cached=made_with.keep_cached,
                engine=made_with.options,
            )
        else:
            return False
        return True

    def mkdir(self, path: Path, recursive: bool = True) -> None:
        there = Path(path)
        while recursive and not there.exists():
            there = there.parent
        super().mkdir(path, recursive)
        if self._made_with.durable:
            for made in [path, *Path(path).parents]:
                _sync(made)
                if made == there:
                    break

    def rename(
        self, src_path: Path, dst_path: Path, is_directory: bool = False, background_cleanup: bool = False
    ) -> None:
        durable = self._made_with.durable
        if durable and os.path.isdir(src_path):
            for folder, _, _ in os.walk(src_path):
                _sync(folder)
        super().rename(src_path, dst_path, is_directory, background_cleanup)
        if durable:
            for parent in {os.path.dirname(os.path.abspath(path)) for path in (src_path, dst_path)}:
                _sync(parent)


class _WriteStream(io.RawIOBase):
    """A file that appears, complete, when it is closed, and never if the block that writes it fails."""

    def __init__(self, path: Path, durable: bool, keep_cached: bool) -> None:
        self._path = path
        self._durable = durable
        self._failed = False
        with save_errors():
            self._new = _native.NewFile(encoded_path(path), keep_cached, False)
            descriptor = self._new.descriptor()
        self._file = io.BufferedWriter(io.FileIO(descriptor, "wb", closefd=False), _BUFFER_NBYTES)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return self._file.write(data)

    def tell(self) -> int:
        return self._file.tell()

    def flush(self) -> None:
        if not self._file.closed:
            self._file.flush()

    def close(self) -> None:
        if self.closed:
            return
        try:
            if self._failed:
                with contextlib.suppress(OSError):
                    self._file.close()
            else:
                background.make_way(self._path)
                with save_errors():
                    self._file.close()
                    self._new.publish(self._durable)
        finally:
            self._new.close()
            super().close()

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._failed = kind is not None
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._failed = True
            self.close()


def _let_items_stream() -> None:
    """Lets the package's writer ask a storage of ours for whole items, which it otherwise makes bytes of first. Where it
    has no such method any more, it writes those bytes."""
    kind: Any = getattr(torch_checkpointing, "CheckpointWriter", None)
    original: Callable[..., None] | None = getattr(kind, "_write_key", None)
    if original is None or hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def write_key(self: Any, key: str, layout_info: Any, full_path: Path, data: Any) -> None:
        storage = getattr(self, "_storage", None)
        layout = layout_info.serialization_format
        if not isinstance(storage, FastshardStorage) or not storage.write_item(full_path, data, layout):
            original(self, key, layout_info, full_path, data)

    kind._write_key = write_key


def _memory_of(data: Any) -> tuple[int, int, object]:
    """Returns address and size of a buffer's memory, and what keeps it there."""
    view = memoryview(data)
    if not isinstance(data, bytes):
        if view.nbytes and view.c_contiguous and not view.readonly:
            array = (ctypes.c_char * view.nbytes).from_buffer(data)
            return ctypes.addressof(array), view.nbytes, array
        data = view.tobytes()
    return ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value or 0, len(data), data


def _sync(path: str | os.PathLike[str]) -> None:
    with open_folder(os.fspath(path)) as folder:
        folder.sync()
