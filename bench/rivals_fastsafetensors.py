# SPDX-License-Identifier: Apache-2.0
"""``fastsafetensors.ParallelSaver``, which writes several safetensors files at once through mappings of them."""

from __future__ import annotations

from collections.abc import Callable

from .job import Job, Prepare, Rival, Unavailable
from .machine import cpu_count


def _parallel_saver(num_threads: int) -> Prepare:
    """Saves as many files of the same names. Which tensor goes into which file is the saver's own choice."""

    def prepare(job: Job) -> Callable[[], None]:
        try:
            from fastsafetensors import ParallelSaver
        except ImportError:
            raise Unavailable("no fastsafetensors with a ParallelSaver is installed") from None
        saver = ParallelSaver(num_shards=len(job.shards), num_threads=num_threads, fsync=job.durable)
        base = str(job.out / "model")

        def save() -> None:
            saver.save(job.merged(), base)

        return save

    return prepare


FASTSAFETENSORS = (
    Rival(
        "parallel-saver",
        "fastsafetensors.ParallelSaver with one thread for each core",
        _parallel_saver(cpu_count()),
        writes="files",
    ),
    *(
        Rival(
            f"parallel-saver-{threads}",
            f"fastsafetensors.ParallelSaver, num_threads={threads}",
            _parallel_saver(threads),
            writes="files",
        )
        for threads in (1, 4, 8)
    ),
)
