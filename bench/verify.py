# SPDX-License-Identifier: Apache-2.0
"""Are the bytes right? A fast saver that writes something else has measured nothing."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import safe_open

from .builders import TP
from .job import Job, Rival, Shard
from .machine import cpu_count
from .rivals import RIVALS
from .rivals_sharded import source_of
from .rivals_verify import described
from .samples import MIB

CHUNK_NBYTES = 16 * MIB


class Mismatch(Exception):
    """The output is not what was to be saved; says where."""


def digests(path: Path) -> list[bytes]:
    """blake2b of each 16 MiB of the file, on all CPUs (hashing and reading let the GIL go)."""

    def digest(offset: int) -> bytes:
        return hashlib.blake2b(os.pread(fd, CHUNK_NBYTES, offset)).digest()

    fd = os.open(path, os.O_RDONLY)
    try:
        with ThreadPoolExecutor(cpu_count()) as pool:
            return list(pool.map(digest, range(0, os.fstat(fd).st_size, CHUNK_NBYTES)))
    finally:
        os.close(fd)


def _files(directory: Path) -> dict[str, Path]:
    """By their paths from the directory."""
    return {str(p.relative_to(directory)): p for p in sorted(directory.rglob("*")) if p.is_file()}


class Written:
    """The files of a directory: digests only, so no second copy lies on the disk."""

    def __init__(self, out: Path) -> None:
        files = _files(out)
        self._digests = {name: digests(path) for name, path in files.items()}
        self._sizes = {name: path.stat().st_size for name, path in files.items()}

    def same_bytes(self, out: Path, stands: bool = False) -> None:
        """Raises Mismatch where a directory has other files, or one of other bytes."""
        # Beside a standing file lies, hidden, the one that will take its place.
        found = {name: p for name, p in _files(out).items() if not (stands and p.name.startswith("."))}
        if found.keys() != self._sizes.keys():
            raise Mismatch(f"files are {sorted(found)}, not {sorted(self._sizes)}")
        for name, path in found.items():
            nbytes, size = path.stat().st_size, self._sizes[name]
            if nbytes != size:
                raise Mismatch(f"{name} has {nbytes} bytes instead of {size}")
            for i, (one, other) in enumerate(zip(digests(path), self._digests[name])):
                if one != other:
                    raise Mismatch(f"{name} differs in the 16 MiB at byte {i * CHUNK_NBYTES}")


class Reference(Written):
    """What a rival, ``base``, writes for a job."""

    def __init__(self, job: Job, base: str) -> None:
        rival = RIVALS[base]
        with rival.within():
            rival.prepare(job)()
        super().__init__(job.out)

    def check(self, rival: Rival, job: Job) -> str:
        """Raises Mismatch, or says in a word or two what was found to be right."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # loaders warn about themselves
                if rival.writes == "safetensors":
                    self.same_bytes(job.out, rival.stands)
                    return "same bytes"
                _LOADERS[str(rival.writes)](job)
                return "loads back"
        except Mismatch:
            raise
        except Exception as error:  # a file that no loader takes is as wrong as one with other bytes
            raise Mismatch(f"cannot be read back: {error}") from error


def _samples(tensors: Shard) -> list[str]:
    """First, middle and last name: enough to notice a loader or a saver that is not doing its work."""
    names = list(tensors)
    return sorted({names[0], names[len(names) // 2], names[-1]})


def _expect(job: Job, tensors: Shard, loaded: Shard) -> None:
    for name in _samples(tensors):
        tensor = tensors[name]
        wanted, found = tensor.to(job.dtype or tensor.dtype).cpu(), loaded[name].cpu()
        # As bytes: random bits hold NaNs, which equal nothing.
        same = found.dtype == wanted.dtype and found.shape == wanted.shape
        if not same or not torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (found, wanted))):
            raise Mismatch(f"tensor {name!r} came back different")


def _load_torch(job: Job) -> None:
    for path, tensors in zip(job.paths, job.shards):
        loaded = torch.load(path.with_suffix(".pt"), map_location="cpu", mmap=True, weights_only=True)
        if loaded.keys() != tensors.keys():
            raise Mismatch(f"{path.name} holds other names")
        _expect(job, tensors, loaded)


def _load_dcp(job: Job) -> None:
    from torch.distributed import checkpoint

    tensors = {name: t for shard in job.shards for name, t in shard.items()}
    loaded = {n: torch.empty_like(tensors[n], dtype=job.dtype, device="cpu") for n in _samples(tensors)}
    checkpoint.load(loaded, storage_reader=checkpoint.FileSystemReader(job.out))
    _expect(job, tensors, loaded)


def _load_files(job: Job) -> None:
    from safetensors.torch import load_file

    loaded: Shard = {}
    for path in job.out.glob("*.safetensors"):
        loaded |= load_file(path)
    if loaded.keys() != job.merged().keys():
        raise Mismatch("the files hold other names")
    for tensors in job.shards:
        _expect(job, tensors, loaded)


def _load_dcp_hf(job: Job) -> None:
    tensors = {name: t for shard in job.shards for name, t in shard.items()}
    loaded: Shard = {}
    for path in job.out.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found = set(file.keys()).intersection(_samples(tensors))
            loaded |= {name: file.get_tensor(name) for name in found}
    if len(loaded) != len(_samples(tensors)):
        raise Mismatch("tensors are missing")
    _expect(job, tensors, loaded)


def _load_sharded(job: Job) -> None:
    from safetensors.torch import load_file

    tensors = {name: t for shard in job.shards for name, t in shard.items()}
    found = [load_file(path) for path in job.out.glob("model-rank-0-part-*.safetensors")]
    if sorted(name for part in found for name in part) != sorted(tensors):
        raise Mismatch("the parts hold other names")
    _expect(job, tensors, {name: t for part in found for name, t in part.items()})


def _load_described(job: Job) -> None:
    from safetensors.torch import load_file

    said = json.loads((job.out / "fastshard.manifest.json").read_text())["files"]
    sums = job.out / "SHA256SUMS"
    if sums.exists():
        subprocess.run(["sha256sum", "-c", "--quiet", "--strict", sums.name], cwd=job.out, check=True)
    for path, tensors in zip(job.paths, job.shards):
        _expect(job, tensors, load_file(path))
        with open(path, "rb") as file:
            for name in _samples(tensors):
                offset, nbytes, crc32 = said[path.name]["tensors"][name]
                file.seek(offset)
                if f"{zlib.crc32(file.read(nbytes)):08x}" != crc32:
                    raise Mismatch(f"the manifest says something else of tensor {name!r}")


def _verified(job: Job) -> None:
    """One damaged byte is found."""
    import fastshard

    folder = described(job)
    path = max(folder.glob("*.safetensors"))
    for found in ({"damaged"}, set()):
        with open(path, "r+b") as file:
            file.seek(-1, os.SEEK_END)
            last = file.read(1)[0]
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last ^ 1]))
        report = fastshard.verify(path, crc32=True)
        if {problem.kind for problem in report.problems} != found:
            raise Mismatch(f"a damaged byte: {report.problems}")


def _load_frozen(job: Job) -> None:
    from safetensors.torch import load_file

    weights = job.shards[0]
    first = next(iter(weights))  # it is frozen
    checkpoints = list(job.out.glob("checkpoint-*"))
    if not checkpoints:
        raise Mismatch("there is no checkpoint")
    for checkpoint in checkpoints:
        loaded = {name: t for path in checkpoint.glob("*.safetensors") for name, t in load_file(path).items()}
        if loaded.keys() != weights.keys():
            raise Mismatch(f"{checkpoint.name} holds other names")
        if not torch.equal(loaded[first].view(torch.uint8), weights[first].view(torch.uint8)):
            raise Mismatch(f"{first!r} is different in {checkpoint.name}")


def _load_ranks(job: Job) -> None:
    for rank in range(TP):
        with safe_open(job.out / f"rank-{rank}" / "model.safetensors", "pt") as file:
            if set(file.keys()) != job.merged().keys():
                raise Mismatch(f"rank {rank} holds other names")
            for name, tensor in job.merged().items():
                dim = 1 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0
                wanted = tensor.tensor_split(TP, dim)[rank].contiguous().view(torch.uint8)
                if not torch.equal(file.get_tensor(name).view(torch.uint8), wanted):
                    raise Mismatch(f"tensor {name!r} of rank {rank} is different")


def _load_copy(job: Job) -> None:
    with open(source_of(job) / "model.safetensors", "rb") as source:
        for rank in range(TP):
            with open(job.out / f"{rank}.part", "rb") as part:
                while data := part.read(CHUNK_NBYTES):
                    if source.read(len(data)) != data:
                        raise Mismatch(f"{part.name} is different")
        if source.read(1):
            raise Mismatch("the copy is shorter")


_LOADERS = {
    "files": _load_files,
    "sharded": _load_sharded,
    "described": _load_described,
    "verified": _verified,
    "ranks": _load_ranks,
    "frozen": _load_frozen,
    "copy": _load_copy,
    "torch": _load_torch,
    "dcp": _load_dcp,
    "dcp-hf": _load_dcp_hf,
}
