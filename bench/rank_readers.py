# SPDX-License-Identifier: Apache-2.0
"""What ranks have written, read back in one process and compared."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from .job import Shard
from .samples import MIB
from .verify import Mismatch

BATCH_NBYTES = 256 * MIB
"""Read back at a time."""


def _batches(whole: Shard) -> Iterator[Shard]:
    batch: Shard = {}
    for name, tensor in whole.items():
        batch[name] = tensor
        if sum(t.nbytes for t in batch.values()) >= BATCH_NBYTES:
            yield batch
            batch = {}
    if batch:
        yield batch


def _expect(loaded: Shard, wanted: Shard) -> None:
    for name, tensor in wanted.items():
        # As integers: random bits hold NaNs, which equal nothing.
        if not torch.equal(loaded[name].view(torch.int16), tensor.view(torch.int16)):
            raise Mismatch(f"tensor {name!r} came back different")


def _by_dcp(make_reader: Callable[[Path], Any]) -> Callable[[Path, Shard], None]:
    """By torch's own reader, in this process, which is no rank."""

    def read(out: Path, whole: Shard) -> None:
        from torch.distributed import checkpoint

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "torch.distributed is uninitialized": as intended
            for batch in _batches(whole):
                loaded = {name: torch.empty_like(tensor) for name, tensor in batch.items()}
                checkpoint.load(loaded, storage_reader=make_reader(out), no_dist=True)
                _expect(loaded, batch)

    return read


def _stock_file_system(out: Path) -> Any:
    from torch.distributed.checkpoint import FileSystemReader

    return FileSystemReader(out)


def _stock_hugging_face(out: Path) -> Any:
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    return HuggingFaceStorageReader(str(out))


def by_safetensors(out: Path, whole: Shard) -> None:
    from safetensors import safe_open

    left = dict(whole)
    for path in sorted(out.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                _expect({name: file.get_tensor(name)}, {name: left.pop(name)})
    if left:
        raise Mismatch(f"{len(left)} tensors are missing")


READERS: dict[str, Callable[[Path, Shard], None]] = {
    "dcp": _by_dcp(_stock_file_system),
    "dcp-hf": _by_dcp(_stock_hugging_face),
    "safetensors": by_safetensors,
}
