# SPDX-License-Identifier: Apache-2.0
"""torch.distributed.checkpoint (DCP) saves in one process, with each of its writers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from .job import Job, Rival, then_sync
from .samples import RETURN


def _checkpoint(job: Job, make_writer: Callable[[], Any]) -> Callable[[], None]:
    """Saves all tensors in this process. Without a process group DCP does so by itself."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.api import CheckpointException

    make_writer()

    def save() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "torch.distributed is uninitialized": as intended
            try:
                checkpoint.save(job.merged(), storage_writer=make_writer())
            except CheckpointException as error:  # a BaseException, which nobody expects
                raise RuntimeError(f"DCP failed: {list(error.failures.values())}") from None

    return then_sync(job, save)


def _dcp_fs(job: Job) -> Callable[[], None]:
    from torch.distributed.checkpoint import FileSystemWriter

    return _checkpoint(job, lambda: FileSystemWriter(job.out))


def _dcp_fs_nosync(job: Job) -> Callable[[], None]:
    from torch.distributed.checkpoint import FileSystemWriter

    return _checkpoint(job, lambda: FileSystemWriter(job.out, sync_files=False))


def _dcp_hf(job: Job) -> Callable[[], None]:
    from torch.distributed.checkpoint import HuggingFaceStorageWriter

    return _checkpoint(job, lambda: HuggingFaceStorageWriter(str(job.out)))


DCP = (
    Rival("dcp-fs", "DCP FileSystemWriter (fsyncs by default)", _dcp_fs, writes="dcp", slow=True),
    Rival(
        "dcp-fs-nosync",
        "DCP FileSystemWriter, sync_files=False: like for like on return",
        _dcp_fs_nosync,
        writes="dcp",
        modes=(RETURN,),
        slow=True,
    ),
    Rival(
        "dcp-hf",
        "DCP HuggingFaceStorageWriter (fsyncs by default)",
        _dcp_hf,
        writes="dcp-hf",
        slow=True,
        footprint=3.0,
    ),
)
