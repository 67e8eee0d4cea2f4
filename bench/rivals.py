# SPDX-License-Identifier: Apache-2.0
"""All who save, in the order of the tables.

A new rival is one function and one entry in the file of those that it belongs with.
"""

from __future__ import annotations

from .job import Rival
from .rivals_async import ASYNC
from .rivals_dcp import DCP
from .rivals_fastsafetensors import FASTSAFETENSORS
from .rivals_fastshard import FASTSHARD
from .rivals_hub import HUB, TRANSFORMERS
from .rivals_sharded import SHARDED_STATE, TENSOR_PARALLEL
from .rivals_torch import TORCH
from .rivals_training import TRAINING
from .rivals_verify import VERIFIERS

_ALL = (
    *FASTSHARD,
    *SHARDED_STATE,
    *TORCH,
    *FASTSAFETENSORS,
    *DCP,
    *HUB,
    *TENSOR_PARALLEL,
    *TRANSFORMERS,
    *ASYNC,
    *TRAINING,
    *VERIFIERS,
)
RIVALS: dict[str, Rival] = {rival.name: rival for rival in _ALL}
