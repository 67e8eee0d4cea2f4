# SPDX-License-Identifier: Apache-2.0
"""fastshard saves a dict of tensors in each of its ways.

The bench runs with older versions too: a way that a version does not have is ``Unavailable``.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .job import CUDA, Job, Prepare, Rival, Shard, Unavailable
from .samples import DURABLE, MODES, RETURN


def detail() -> dict[str, Any]:
    """What fastshard says about the newest save of this process."""
    import fastshard

    stats = fastshard.stats()
    fields = [name for name in dir(stats) if not name.startswith("_")] if stats else []
    return {name: getattr(stats, name) for name in fields if not callable(getattr(stats, name))}


def variant(name: str, about: str, prepare: Prepare, **fields: Any) -> Rival:
    """A rival that saves with fastshard in another way than its plain one."""
    return Rival(name, f"fastshard, {about}", prepare, detail=detail, **fields)


def require(name: str) -> None:
    """Raises ``Unavailable`` if this fastshard has no function of that name."""
    import fastshard

    if not hasattr(fastshard, name):
        raise Unavailable(f"this fastshard has no {name}")


def accepts(function: Callable[..., Any], **keywords: Any) -> dict[str, Any]:
    """Returns the keywords, or raises ``Unavailable`` if this fastshard does not have them all."""
    missing = keywords.keys() - inspect.signature(function).parameters.keys()
    if missing:
        raise Unavailable(f"this fastshard has no {', '.join(sorted(missing))}=")
    return keywords


def _fastshard(job: Job, **keywords: Any) -> Callable[[], None]:
    import fastshard

    if job.dtype is not None:
        keywords["dtype"] = job.dtype
    keywords = accepts(fastshard.save_file, durable=job.durable, allow_strided=job.strided, **keywords)
    save_file, save_files = fastshard.save_file, fastshard.save_files
    if len(job.shards) == 1:
        (path,), (tensors,) = job.paths, job.shards
        return lambda: save_file(tensors, path, **keywords)
    files: dict[str | os.PathLike[str], Shard] = dict(zip(job.paths, job.shards))
    return lambda: save_files(files, **keywords)


def _fastshard_with(**options: Any) -> Prepare:
    """Saves the same files through an engine that has these options."""

    def prepare(job: Job) -> Callable[[], None]:
        import fastshard
        from fastshard.engine.engine import engine_for

        chosen = fastshard.Options(**accepts(fastshard.Options, **options))
        try:
            engine = engine_for(chosen)
        except ValueError as error:  # no such write path
            raise Unavailable(str(error)) from None
        return _fastshard(job, engine=engine)

    return prepare


def _fastshard_uncached(job: Job) -> Callable[[], None]:
    return _fastshard(job, keep_cached=False)


def _fastshard_contiguous(job: Job) -> Callable[[], None]:
    """Saves the same bytes from tensors that need no packing: the difference is what packing costs."""
    return _fastshard(replace(job, shards=job.contiguous(), dtype=None))


def _fastshard_described(manifest: bool | str) -> Prepare:
    """Saves the same files, and what the folder says of them."""
    return lambda job: _fastshard(job, manifest=manifest)


class _Standing:
    """A save that is prepared once and called once in each round."""

    def __init__(self, job: Job, **asked: Any) -> None:
        import fastshard

        require("prepare")
        self._asked = accepts(fastshard.PreparedSave.save, **asked)
        (path,), (tensors,) = job.paths, job.shards
        cast = {} if job.dtype is None else {"dtype": job.dtype}
        keywords = accepts(fastshard.prepare, allow_strided=job.strided, **cast)
        self._prepared = fastshard.prepare(tensors, path, **keywords)

    def __call__(self) -> None:
        self._prepared.save(**self._asked)

    def close(self) -> None:
        self._prepared.close()


def _detail_of_changes() -> dict[str, Any]:
    found = detail()
    return {**found, "changed": found["changed"].nbytes}


FASTSHARD = (
    Rival("fastshard", "fastshard.save_file / save_files", _fastshard, modes=MODES, detail=detail),
    Rival(
        "prepared",
        "fastshard.prepare: prepared once, saved each round",
        _Standing,
        modes=(RETURN,),
        one_file_only=True,
        stands=True,
        footprint=0.0,
        detail=detail,
    ),
    Rival(
        "prepared-changed",
        "the same, which says what has changed since the round before",
        lambda job: _Standing(job, changed=True),
        modes=(RETURN,),
        one_file_only=True,
        stands=True,
        footprint=0.0,
        detail=_detail_of_changes,
    ),
    variant("fastshard-buffered", 'write_path="buffered"', _fastshard_with(write_path="buffered")),
    variant("fastshard-mapped", 'write_path="mapped"', _fastshard_with(write_path="mapped")),
    variant(
        "fastshard-registered",
        'write_path="registered": the device writes the pages of the file',
        _fastshard_with(write_path="registered"),
        devices=(CUDA,),
    ),
    variant(
        "fastshard-direct", 'write_path="direct"', _fastshard_with(write_path="direct"), modes=(DURABLE,)
    ),
    variant("fastshard-uncached", "keep_cached=False", _fastshard_uncached, modes=(DURABLE,)),
    variant(
        "fastshard-noscratch",
        "device_scratch=0: kernels store over the link",
        _fastshard_with(device_scratch=0),
        devices=(CUDA,),
    ),
    variant(
        "fastshard-manifest",
        "manifest=True: the CRC-32 of each tensor",
        _fastshard_described(True),
        writes="described",
        own=True,
    ),
    variant(
        "fastshard-sha256",
        'manifest="sha256": SHA256SUMS as well',
        _fastshard_described("sha256"),
        writes="described",
        own=True,
    ),
    variant("fastshard-contiguous", "the same bytes, contiguous before", _fastshard_contiguous),
)
