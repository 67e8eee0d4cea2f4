# SPDX-License-Identifier: Apache-2.0
"""Who reads a checkpoint that is on disk, to see whether it is what was saved. Nobody saves anything."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .job import CPU, SOURCES, Job, Rival
from .rivals_fastshard import require, variant
from .samples import MIB, RETURN


def described(job: Job) -> Path:
    """Returns a folder beside the output with the job's files, a manifest and ``SHA256SUMS``, in the page cache. The
    first call makes it."""
    import fastshard

    folder = job.out.with_name(SOURCES) / f"{job.nbytes}-described-in-{len(job.shards)}"
    if not folder.exists():
        folder.mkdir(parents=True)
        shards = zip(job.paths, job.contiguous())
        fastshard.save_files({folder / path.name: shard for path, shard in shards})
        fastshard.write_manifest(folder, sha256=True)
    return folder


def _verify(crc32: bool) -> Callable[[Job], Callable[[], None]]:
    def prepare(job: Job) -> Callable[[], None]:
        import fastshard

        require("verify")
        folder, check = described(job), fastshard.verify

        def verify() -> None:
            report = check(folder, crc32=crc32)
            if not report.ok or report.compared < job.nbytes:
                raise RuntimeError(f"not all bytes were compared: {report}")

        return verify

    return prepare


def _read_threads(job: Job) -> Callable[[], None]:
    """Two threads that read the files into a mebibyte each, which stays in a core's cache."""
    paths = sorted(described(job).glob("*.safetensors"))

    def read(share: list[Path]) -> None:
        buffer = memoryview(bytearray(MIB))
        for path in share:
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    def read_all() -> None:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(read, (paths[::2], paths[1::2])))

    return read_all


VERIFIERS = (
    variant(
        "fastshard-verify",
        "verify, by SHA256SUMS",
        _verify(False),
        writes="verified",
        modes=(RETURN,),
        own=True,
        devices=(CPU,),
    ),
    variant(
        "fastshard-verify-crc32",
        "verify, by the CRC-32 of each tensor",
        _verify(True),
        writes="verified",
        modes=(RETURN,),
        own=True,
        devices=(CPU,),
    ),
    Rival(
        "read-threads",
        "two threads that only read the same files",
        _read_threads,
        writes="verified",
        modes=(RETURN,),
        own=True,
        devices=(CPU,),
    ),
)
