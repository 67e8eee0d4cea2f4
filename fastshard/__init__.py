# SPDX-License-Identifier: Apache-2.0
"""The fastest safe way to put PyTorch weights on disk.

``import fastshard as st`` stands in for ``import safetensors.torch as st``. Importing costs nothing: torch,
safetensors and the native module are loaded by the first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .loading import load as _load

if TYPE_CHECKING:
    from safetensors import safe_open as safe_open
    from safetensors.torch import load as load
    from safetensors.torch import load_file as load_file
    from safetensors.torch import load_model as load_model

    from .archive import torch_save as torch_save
    from .engine import Engine as Engine
    from .engine import SaveFuture as SaveFuture
    from .errors import ArchiveError as ArchiveError
    from .errors import SaveError as SaveError
    from .hub import save_torch_model as save_torch_model
    from .hub import save_torch_state_dict as save_torch_state_dict
    from .options import Options as Options
    from .options import Stats as Stats
    from .patching import install as install
    from .patching import installed as installed
    from .patching import uninstall as uninstall
    from .prepared import PreparedSave as PreparedSave
    from .prepared import prepare as prepare
    from .report import Status as Status
    from .report import status as status
    from .reshard import merge_checkpoint as merge_checkpoint
    from .reshard import reshard_checkpoint as reshard_checkpoint
    from .reshard import shard_checkpoint as shard_checkpoint
    from .saving import save as save
    from .saving import save_file as save_file
    from .saving import save_files as save_files
    from .saving import save_model as save_model
    from .saving import stats as stats
    from .sharded import load_sharded_state as load_sharded_state
    from .sharded import save_sharded_state as save_sharded_state

__version__ = "0.1.0"

_HOMES = {
    "ArchiveError": "fastshard.errors",
    "Engine": "fastshard.engine",
    "Options": "fastshard.options",
    "PreparedSave": "fastshard.prepared",
    "SaveError": "fastshard.errors",
    "SaveFuture": "fastshard.engine",
    "Stats": "fastshard.options",
    "Status": "fastshard.report",
    "install": "fastshard.patching",
    "installed": "fastshard.patching",
    "load": "safetensors.torch",
    "load_file": "safetensors.torch",
    "load_model": "safetensors.torch",
    "load_sharded_state": "fastshard.sharded",
    "merge_checkpoint": "fastshard.reshard",
    "prepare": "fastshard.prepared",
    "reshard_checkpoint": "fastshard.reshard",
    "safe_open": "safetensors",
    "save": "fastshard.saving",
    "save_file": "fastshard.saving",
    "save_files": "fastshard.saving",
    "save_model": "fastshard.saving",
    "save_sharded_state": "fastshard.sharded",
    "save_torch_model": "fastshard.hub",
    "save_torch_state_dict": "fastshard.hub",
    "shard_checkpoint": "fastshard.reshard",
    "stats": "fastshard.saving",
    "status": "fastshard.report",
    "torch_save": "fastshard.archive",
    "uninstall": "fastshard.patching",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(_load(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
