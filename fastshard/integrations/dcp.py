# SPDX-License-Identifier: Apache-2.0
"""The stock writers of ``torch.distributed.checkpoint``, as accelerate, Lightning, transformers and torchtitan use
them, write through the engine.

Methods are replaced, not classes, so a writer is what it was: its class, its classes derived from it, and what it is
asked for. A writer with a filesystem of its own, with extensions, or with a method of its own that takes part in a
save is left to the original.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, Final

from ..base.activity import count_left
from ..distributed import file_system
from ..engine.mapped import DTYPES
from ..engine.pipeline import How
from ..tools.dcp_folders import consolidate as assemble
from . import patching

_PACKAGE: Final = "torch.distributed.checkpoint."
_TAKING_PART: Final = (
    "reset",
    "set_up_storage_writer",
    "prepare_local_plan",
    "prepare_global_plan",
    "write_data",
    "_write_data",
    "finish",
    "storage_meta",
    "checkpoint_id",
)
"""What has to be torch's own of a writer whose saves go through the engine."""


class _InEachProcess:
    """Goes with a writer into the process that saves, and replaces there what is replaced here."""

    def __reduce__(self) -> tuple[Callable[[], object], tuple[()]]:
        return (_InEachProcess.arrive if patching.is_active() else object), ()

    @staticmethod
    def arrive() -> object:
        patching.install(asynchronous=patching.is_asynchronous())
        return _InEachProcess()


def __init__(original: Callable[..., None], /, self: Any, path: Any, *args: Any, **kwargs: Any) -> None:
    original(self, path, *args, **kwargs)
    self.__dict__.setdefault("_fastshard", _InEachProcess())


def set_up_storage_writer(
    original: Callable[..., None], /, self: Any, is_coordinator: bool, *args: Any, **kwargs: Any
) -> None:
    original(self, is_coordinator, *args, **kwargs)
    if isinstance(self, file_system.FastshardFileSystemWriter):
        return
    reason = _why_not(self)
    if reason:
        count_left("dcp.save", reason)
        return
    stale = file_system.scope_of(self).is_stale if hasattr(self, "save_distributed") else None
    file_system.begin(self, is_coordinator, durable=self.sync_files, stale=stale)


def _write_data(original: Callable[..., Any], /, self: Any, planner: Any, file_queue: Any) -> Any:
    if not file_system.is_under_way(self):
        return original(self, planner, file_queue)
    return file_system.write(self, planner, file_queue, How(durable=self.sync_files, allow_strided=True))


def finish(original: Callable[..., None], /, self: Any, metadata: Any, results: Any) -> None:
    if not file_system.is_under_way(self):
        return original(self, metadata=metadata, results=results)
    file_system.publish(self, metadata, results)


def finish_tensors(original: Callable[..., None], /, self: Any, metadata: Any, results: Any) -> None:
    if not file_system.is_under_way(self):
        return original(self, metadata=metadata, results=results)
    file_system.publish_tensors(self, results)
    if self.save_distributed and self.enable_consolidation:
        original(self, metadata=metadata, results=results)


def execute_save(original: Callable[..., Any], /, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Makes the writer here which torch would make in the process that saves, where nothing is replaced before it has
    arrived."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    place = kwargs.get("checkpoint_id")
    if kwargs.get("storage_writer") is None and place and FileSystemWriter.validate_checkpoint_id(place):
        kwargs["storage_writer"] = FileSystemWriter(place)
    return original(self, *args, **kwargs)


def consolidate(
    original: Callable[..., Any],
    /,
    input_dir: str,
    output_dir: str,
    fqn_to_file_mapping: dict[str, str],
    num_threads: int,
) -> dict[str, Any]:
    """Puts files of ranks together in constant memory, whatever the tensors' dtypes; torch's own knows floating-point
    ones only.

    What is returned is what torch writes the index from.
    """
    from torch.distributed.checkpoint import _consolidate_hf_safetensors as theirs

    found = assemble(input_dir, output_dir, fqn_to_file_mapping)
    described: dict[str, Any] = {}
    for name, tensor in found.items():
        path = os.path.join(output_dir, fqn_to_file_mapping[name])
        file = described.setdefault(path, theirs._OutputFileData())
        itemsize = DTYPES[tensor.code].itemsize
        file.fqn_data[name] = theirs._FqnData(
            shape_in_file=[*tensor.shape], dtype_size=itemsize, dtype_str=tensor.code
        )
    return described


def stage_blocking(original: Callable[..., Any], /, self: Any, state_dict: Any) -> Any:
    """Stages, for ``async_save``, with a stager of ours what a writer of torch's would copy into new memory."""
    if self.cache_staged_state_dict:  # which somebody has asked for, to have one copy only
        return original(self, state_dict)
    return _stager().stage(state_dict)


def stage_by_default(original: Callable[..., Any], /, self: Any, state_dict: Any, **kwargs: Any) -> Any:
    """As :func:`stage_blocking`, for ``async_save`` without a writer that stages: that has a stager without options."""
    config = getattr(self, "_config", None)
    if config is None or any(vars(config).values()):
        return original(self, state_dict, **kwargs)
    return _stager().stage(state_dict)


@functools.cache
def _stager() -> Any:
    """Returns the stager of this process. It keeps its memory for the next save."""
    from ..distributed.stager import FastshardStager

    return FastshardStager()


def _why_not(writer: Any) -> str:
    """Returns why a writer is left to the original; empty if it is not."""
    if type(writer.fs).__module__ + "." + type(writer.fs).__name__ != f"{_PACKAGE}filesystem.FileSystem":
        return "a writer with a filesystem of its own"
    if writer.transforms.extensions:
        return "a writer with extensions"
    for name in _TAKING_PART:
        home = next(kind for kind in type(writer).__mro__ if name in vars(kind))
        if not home.__module__.startswith(_PACKAGE):
            return "a writer with methods of its own"
    return ""
