# SPDX-License-Identifier: Apache-2.0
"""The functions of ``safetensors.torch``: they plan the files, and the engine writes them."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Literal

import torch

from ..base.activity import one_save
from ..base.loading import load
from ..engine import background
from ..engine import tensors as _tensors
from ..engine.engine import Engine, Options
from ..engine.pipeline import (
    How,
    PathLike,
    PlannedFile,
    StateDict,
    check_filename,
    encoded_path,
    lay_out,
    plan_file,
    write_files,
)
from ..engine.plan import FilePlan, Memory
from ..engine.sharing import duplicates
from ..engine.unchanged import frozen_storages, parameters_in
from ..errors import SaveError
from ..publish.incremental import check_base
from ..publish.manifests import check_wanted, forget
from ..publish.staged import staged


def save_file(
    tensors: StateDict,
    filename: PathLike,
    metadata: dict[str, str] | None = None,
    *,
    durable: bool = False,
    keep_cached: bool = True,
    progress: bool | None = None,
    allow_strided: bool = False,
    dtype: torch.dtype | str | None = None,
    checksums: bool = False,
    manifest: bool | Literal["sha256"] = False,
    base: PathLike | None = None,
    engine: Engine | Options | None = None,
) -> None:
    """Saves a dict of tensors in safetensors format, byte for byte what ``safetensors.torch.save_file``
    writes.

    The file appears under its name complete or not at all. Its mode follows the umask. If it replaces a file,
    it takes over that one's mode, access control list and extended attributes. A symbolic link is replaced by
    the file; what it led to stays as it is.

    Args:
        tensors: by name, dense and contiguous tensors on any device, each with memory of its own. What was
            enqueued on a device's current stream before the call is in the file.
        filename: path of the file.
        metadata: texts that are written into the header, in this order.
        durable: return when file and directory are on stable storage (fsync). Otherwise the call returns as soon
            as others can read the file.
        keep_cached: with ``False``, nothing of the file is left in the page cache when the call returns, so the
            save pushes nothing else out of it (a live server's working set); the call then waits for the disk.
            ``True`` promises nothing: asynchronous saves, and durable ones from a device, go past the page cache.
            A filesystem in memory ignores it.
        progress: show a tqdm bar; ``None``: if the environment variable ``FASTSHARD_PROGRESS`` says so.
        allow_strided: pack non-contiguous tensors straight into the file instead of refusing them. Slices
            of one tensor are accepted as long as they have no element in common.
        dtype: cast every floating-point tensor to this dtype on its way into the file, as ``module.to(dtype)``
            does, without a second copy in memory: ``torch.float32``, ``float16``, ``bfloat16``,
            ``float8_e4m3fn`` or ``float8_e5m2``, or a name, as ``"bf16"``. The bytes are those of
            ``tensor.to(dtype)`` on the CPU, except that a NaN saved as ``bfloat16`` is always 0x7fc0 (torch's
            depends on strides and length).
        checksums: take the CRC-32 of each tensor's bytes (that of ``zlib.crc32``) as they pass; afterwards
            ``stats().checksums`` has them.
        manifest: let the folder say what is in its files. ``True`` writes ``fastshard.manifest.json``, with the CRC-32
            of each tensor, which are taken as with ``checksums``, and of each header; ``"sha256"`` also writes
            ``SHA256SUMS``, which ``sha256sum -c SHA256SUMS`` checks anywhere. Both appear in the same moment as the
            file, and keep what they say of other files. A save without it takes its files out of both before it
            writes.
        base: an earlier checkpoint (a folder, or one file), which may be missing. A file in it that has the same header
            and the same bytes is cloned where the filesystem can, or gets a second name (a hard link), instead of being
            written once more; ``stats().linked_files`` counts them. Each checkpoint is complete by itself, and any may
            be deleted. A linked file has one content, mode and time under all its names: fastshard replaces files, but
            whoever writes into one in place changes all. Bytes are compared when the call is made, unless this
            process has saved or compared them before and they are those of parameters that need no gradient, with
            the same memory, version and sample of elements. Where no link is possible the file is written, and
            ``stats().fallbacks`` says so.
        engine: an :class:`Engine`, or :class:`Options` (an engine is kept for them), or ``None`` for the
            default engine.

    Raises:
        ValueError, RuntimeError, KeyError, NotImplementedError, TypeError: for tensors that cannot be
            saved, as safetensors does; ``ValueError`` also for a ``dtype`` that is none of these.
        SaveError: a system call failed; both a ``SafetensorError`` and an ``OSError``.
        SafetensorError: the header would be too long for readers.
    """
    if not isinstance(tensors, Mapping):
        lay_out(
            tensors, None, allow_strided, dtype
        )  # says what is wrong with them, also where a name was expected
    how = How(
        durable=durable,
        keep_cached=keep_cached,
        progress=progress,
        allow_strided=allow_strided,
        dtype=dtype,
        checksums=checksums,
        manifest=manifest,
        base=base,
        engine=engine,
    )
    _save({filename: tensors}, metadata, how)


def save_files(
    files: Mapping[PathLike, StateDict],
    metadata: dict[str, str] | None = None,
    *,
    durable: bool = False,
    keep_cached: bool = True,
    progress: bool | None = None,
    allow_strided: bool = False,
    dtype: torch.dtype | str | None = None,
    checksums: bool = False,
    manifest: bool | Literal["sha256"] = False,
    base: PathLike | None = None,
    engine: Engine | Options | None = None,
) -> None:
    """Saves many files at once, in parallel: all of them become visible, or none.

    ``files`` has the tensors for each path, as for :func:`save_file`; the other arguments and the errors are
    those of :func:`save_file`, too. ``metadata`` goes into every file. Two paths that name the same file are
    a ``ValueError``, and so are files in several folders with a ``manifest`` or a ``base``. If the machine stops
    between the first and the last rename, some files are new and some old, each of them complete.
    """
    if not isinstance(files, Mapping):
        raise ValueError(f"Expected a dict of [path, dict of tensors] but received {type(files)}")
    seen: dict[str, PathLike] = {}
    for filename in files:
        check_filename(filename)
        encoded_path(filename)
        folder, name = os.path.split(os.fspath(filename))
        known = seen.setdefault(os.path.join(os.path.realpath(folder), name), filename)  # a link is replaced
        if known is not filename:
            raise ValueError(f"{filename!r} and {known!r} are the same file")
    how = How(
        durable=durable,
        keep_cached=keep_cached,
        progress=progress,
        allow_strided=allow_strided,
        dtype=dtype,
        checksums=checksums,
        manifest=manifest,
        base=base,
        engine=engine,
    )
    with one_save("save_files", os.path.dirname(next(iter(seen), "")) or "."):
        _save(files, metadata, how, "save_files")


def save_model(
    model: torch.nn.Module,
    filename: PathLike,
    metadata: dict[str, str] | None = None,
    force_contiguous: bool = True,
    *,
    durable: bool = False,
    keep_cached: bool = True,
    progress: bool | None = None,
    allow_strided: bool = False,
    dtype: torch.dtype | str | None = None,
    checksums: bool = False,
    manifest: bool | Literal["sha256"] = False,
    base: PathLike | None = None,
    engine: Engine | Options | None = None,
) -> None:
    """Saves a module's parameters and buffers, of tied tensors only one; see
    ``safetensors.torch.save_model``.

    The names left out are added to ``metadata`` (the caller's dict, as there), with the name that is kept.
    Unlike there, a tensor that is part of a larger storage is accepted if no other tensor shares memory with
    it. With ``force_contiguous`` strided tensors are packed straight into the file. The other arguments and
    the errors are those of :func:`save_file`.
    """
    _tensors.check_dtype(dtype)
    state_dict = model.state_dict() if base is None else model.state_dict(keep_vars=True)
    for kept, removed in duplicates(state_dict).items():
        metadata = {} if metadata is None else metadata
        for name in removed:
            metadata.setdefault(name, kept)
            del state_dict[name]
    if force_contiguous:
        state_dict = dict(state_dict)  # there a new dict is made, whatever mapping the module returns
    how = How(
        durable=durable,
        keep_cached=keep_cached,
        progress=progress,
        allow_strided=allow_strided or force_contiguous,
        dtype=dtype,
        checksums=checksums,
        manifest=manifest,
        base=base,
        engine=engine,
    )
    try:
        with one_save("save_model", filename):
            _save({filename: state_dict}, metadata, how, "save_model")
    except ValueError as error:
        hint = " Or use save_model(..., force_contiguous=True), read the docs for potential caveats."
        raise ValueError(f"{error}{hint}") from None


def save(
    tensors: StateDict,
    metadata: dict[str, str] | None = None,
    *,
    progress: bool | None = None,
    allow_strided: bool = False,
    dtype: torch.dtype | str | None = None,
    engine: Engine | Options | None = None,
) -> bytes:
    """Returns the bytes that :func:`save_file` would write. Arguments and errors are the same."""
    began = time.perf_counter()
    layout, head = lay_out(tensors, metadata, allow_strided, dtype)
    data, address = load("fastshard._native").new_bytes(len(head) + layout.nbytes)
    plan = FilePlan(Memory(address, len(data)), head, layout.items)
    how = How(progress=progress, dtype=dtype, engine=engine)
    with one_save("save", "memory"):
        write_files({"": PlannedFile(plan, layout)}, how, began, "Saving to memory")
    return bytes(data)


def _save(
    files: Mapping[PathLike, StateDict], metadata: dict[str, str] | None, how: How, call: str = "save_file"
) -> None:
    began = time.perf_counter()
    check_wanted(how.manifest)
    check_base(how.base)
    if files and (how.manifest or how.base is not None):
        return _save_in_stage(files, metadata, how, call)
    plans = {filename: plan_file(tensors, filename, metadata, how) for filename, tensors in files.items()}
    background.make_way(*files, wait=background.current() is None)
    forget(files, durable=how.durable)
    # An asynchronous save may have to come behind one with a manifest.
    later = [lambda _: forget(files, durable=how.durable)] if background.current() is not None else []
    write_files(plans, how, began, steps=later)


def _save_in_stage(
    files: Mapping[PathLike, StateDict], metadata: dict[str, str] | None, how: How, call: str
) -> None:
    for filename in files:
        check_filename(filename)
        encoded_path(filename)
    folders = {os.path.dirname(os.fspath(filename)) or os.curdir for filename in files}
    if len({os.path.realpath(folder) for folder in folders}) > 1:
        raise ValueError(
            f"files in {len(folders)} folders have no manifest or base in common; save each folder by itself"
        )
    with staged(next(iter(folders)), _nothing, how, call=call, error_kind=SaveError) as stage:
        if stage.base is not None:
            stage.base.frozen = frozen_storages(parameters_in(files.values()))
        for filename, tensors in files.items():
            path = os.path.join(stage.path, os.path.basename(os.fspath(filename)))
            stage.add(tensors, path, metadata, filename)


def _nothing(name: str) -> bool:
    return False
