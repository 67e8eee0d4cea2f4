# SPDX-License-Identifier: Apache-2.0
"""What the ranks of a group save and load, and by whom. A model is cut by rows, as FSDP2 does it."""

from __future__ import annotations

from dataclasses import dataclass

from .builders import MODEL_NBYTES
from .cases import DISK
from .samples import DURABLE, RETURN, STALL, WRITTEN


@dataclass(frozen=True)
class RankCase:
    """One model, saved or loaded by several sides that are run by the same ranks in turn."""

    name: str
    about: str
    rivals: tuple[str, ...]
    """The first one is ours."""
    base: str
    ranks: int = 2
    modes: tuple[str, ...] = WRITTEN
    needs: tuple[str, ...] = ()
    natural_nbytes: int = MODEL_NBYTES
    copies: float = 1.0
    """Most bytes it has on the disk at once, in multiples of its size."""
    measures: tuple[str, ...] = ("memcpy-1", "pwrite-1", "direct")
    """Ceilings: every rank moves its own bytes, to a file of its own where they are written."""
    memory: tuple[str, ...] = ()
    """Whose extra memory is measured, that of the rank that takes most."""
    default_on: tuple[str, ...] = ()
    """None of them is run without being asked for by name, as they start processes and take long."""
    quick: bool = False
    place: str = DISK

    @property
    def us(self) -> str:
        return self.rivals[0]

    def natural(self, kind: str) -> int:
        return self.natural_nbytes

    @property
    def bound_by(self) -> dict[str, tuple[str, ...]]:
        """For each mode the ceilings that bound it."""
        written = tuple(name for name in self.measures if name == "pwrite-1") or ("memcpy-1",)
        return {RETURN: written, DURABLE: (*written, "direct"), STALL: ("memcpy-1",)}


_ALL = (
    RankCase(
        "dcp-ranks",
        "dcp.save of a sharded model by two ranks",
        ("fastshard-writer", "fastshard-distcp", "stock-distcp", "stock-hf"),
        base="stock-distcp",
        memory=("fastshard-writer", "fastshard-distcp"),
    ),
    RankCase(
        "save-distributed",
        "final files by four ranks, in four shards",
        ("save_distributed", "one-process", "gather"),
        base="gather",
        ranks=4,
        needs=("huggingface_hub",),
        memory=("save_distributed", "gather"),
    ),
    RankCase(
        "load-ranks",
        "rows and columns of a checkpoint into the tensors of two ranks",
        ("load_distributed-columns", "load_distributed-rows", "get_slice-columns", "get_slice-rows"),
        base="get_slice-columns",
        modes=(RETURN,),
        measures=("memcpy-1",),
        copies=2.0,
    ),
    RankCase(
        "convert-dcp",
        "a .distcp folder of two ranks into one safetensors file, by one process",
        ("convert", "dcp_to_torch_save"),
        base="dcp_to_torch_save",
        modes=(RETURN,),
        copies=3.0,
        memory=("convert",),
    ),
    RankCase(
        "dcp-async",
        "dcp.async_save of a sharded model by two ranks",
        ("fastshard-stager", "default-stager", "default-stager-kept"),
        base="default-stager",
        modes=(STALL,),
        measures=("memcpy-1",),
    ),
)
RANK_CASES: dict[str, RankCase] = {case.name: case for case in _ALL}
