# SPDX-License-Identifier: Apache-2.0
"""The fastest safe way to put PyTorch weights on disk.

``import fastshard as st`` replaces ``import safetensors.torch as st``. The import itself loads neither torch
nor safetensors nor the native module; each is loaded at its first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .base.loading import load as _load

if TYPE_CHECKING:
    from safetensors import safe_open as safe_open
    from safetensors.torch import load as load
    from safetensors.torch import load_model as load_model

    from .api.archive import torch_save as torch_save
    from .api.asynchronous import save_file_async as save_file_async
    from .api.asynchronous import save_files_async as save_files_async
    from .api.asynchronous import save_model_async as save_model_async
    from .api.asynchronous import save_sharded_state_async as save_sharded_state_async
    from .api.asynchronous import save_torch_model_async as save_torch_model_async
    from .api.asynchronous import save_torch_state_dict_async as save_torch_state_dict_async
    from .api.asynchronous import torch_save_async as torch_save_async
    from .api.checked import load_file as load_file
    from .api.hub import save_torch_model as save_torch_model
    from .api.hub import save_torch_state_dict as save_torch_state_dict
    from .api.prepared import PreparedSave as PreparedSave
    from .api.prepared import prepare as prepare
    from .api.saving import save as save
    from .api.saving import save_file as save_file
    from .api.saving import save_files as save_files
    from .api.saving import save_model as save_model
    from .api.sharded_load import load_sharded_state as load_sharded_state
    from .api.sharded_save import save_sharded_state as save_sharded_state
    from .distributed.rank_load import load_distributed as load_distributed
    from .distributed.rank_save import save_distributed as save_distributed
    from .engine.background import asynchronous as asynchronous
    from .engine.background import wait_all as wait_all
    from .engine.engine import Engine as Engine
    from .engine.engine import SaveFuture as SaveFuture
    from .engine.figures import stats as stats
    from .engine.options import Changed as Changed
    from .engine.options import Options as Options
    from .engine.options import Stats as Stats
    from .errors import ArchiveError as ArchiveError
    from .errors import SaveError as SaveError
    from .integrations.patching import install as install
    from .integrations.patching import installed as installed
    from .integrations.patching import uninstall as uninstall
    from .integrations.report import Status as Status
    from .integrations.report import status as status
    from .tools.dcp_folders import convert_dcp as convert_dcp
    from .tools.describe import write_manifest as write_manifest
    from .tools.diff import diff_checkpoints as diff_checkpoints
    from .tools.reshard import merge_checkpoint as merge_checkpoint
    from .tools.reshard import reshard_checkpoint as reshard_checkpoint
    from .tools.reshard import shard_checkpoint as shard_checkpoint
    from .tools.run_folder import latest_checkpoint as latest_checkpoint
    from .tools.run_folder import list_checkpoints as list_checkpoints
    from .tools.run_folder import prune_checkpoints as prune_checkpoints
    from .tools.verify import Report as Report
    from .tools.verify import verify as verify

__version__ = "0.1.0"

_HOMES = {
    "ArchiveError": "fastshard.errors",
    "Changed": "fastshard.engine.options",
    "Engine": "fastshard.engine.engine",
    "Options": "fastshard.engine.options",
    "PreparedSave": "fastshard.api.prepared",
    "Report": "fastshard.tools.verify",
    "SaveError": "fastshard.errors",
    "SaveFuture": "fastshard.engine.engine",
    "Stats": "fastshard.engine.options",
    "Status": "fastshard.integrations.report",
    "asynchronous": "fastshard.engine.background",
    "convert_dcp": "fastshard.tools.dcp_folders",
    "diff_checkpoints": "fastshard.tools.diff",
    "install": "fastshard.integrations.patching",
    "installed": "fastshard.integrations.patching",
    "latest_checkpoint": "fastshard.tools.run_folder",
    "list_checkpoints": "fastshard.tools.run_folder",
    "load": "safetensors.torch",
    "load_distributed": "fastshard.distributed.rank_load",
    "load_file": "fastshard.api.checked",
    "load_model": "safetensors.torch",
    "load_sharded_state": "fastshard.api.sharded_load",
    "merge_checkpoint": "fastshard.tools.reshard",
    "prepare": "fastshard.api.prepared",
    "prune_checkpoints": "fastshard.tools.run_folder",
    "reshard_checkpoint": "fastshard.tools.reshard",
    "safe_open": "safetensors",
    "save": "fastshard.api.saving",
    "save_distributed": "fastshard.distributed.rank_save",
    "save_file": "fastshard.api.saving",
    "save_file_async": "fastshard.api.asynchronous",
    "save_files": "fastshard.api.saving",
    "save_files_async": "fastshard.api.asynchronous",
    "save_model": "fastshard.api.saving",
    "save_model_async": "fastshard.api.asynchronous",
    "save_sharded_state": "fastshard.api.sharded_save",
    "save_sharded_state_async": "fastshard.api.asynchronous",
    "save_torch_model": "fastshard.api.hub",
    "save_torch_model_async": "fastshard.api.asynchronous",
    "save_torch_state_dict": "fastshard.api.hub",
    "save_torch_state_dict_async": "fastshard.api.asynchronous",
    "shard_checkpoint": "fastshard.tools.reshard",
    "stats": "fastshard.engine.figures",
    "status": "fastshard.integrations.report",
    "torch_save": "fastshard.api.archive",
    "torch_save_async": "fastshard.api.asynchronous",
    "uninstall": "fastshard.integrations.patching",
    "verify": "fastshard.tools.verify",
    "wait_all": "fastshard.engine.background",
    "write_manifest": "fastshard.tools.describe",
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
