# SPDX-License-Identifier: Apache-2.0
"""The table of what fastshard replaces, and whether that fits the installed libraries.

To add a replacement, add a row to :data:`TABLE`, or to :data:`ASYNCHRONOUS` for what is replaced only on request,
and write its implementation. A row names the module that *defines* the function, the attribute in it
(``"save_file"``; ``"PreTrainedModel.save_pretrained"`` for what a class holds), and the implementation, which is
imported by the first call. Rows that work only together have a group, which is replaced whole or not at all.

:func:`examine` examines the installed library before anything is replaced. The functions must exist, be the
library's own, and take the parameters that the implementation knows by their positions, and what the
implementation uses of the library (:data:`NEEDS`) must exist. No code of a module runs for that.
"""

from __future__ import annotations

import functools
import importlib
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, NamedTuple

from ..base.originals import Function as Function
from ..base.originals import is_own, namespace
from .patch_entry import Entry as Entry

_ADAPTERS: Final = "fastshard.integrations.adapters"
_PRETRAINED: Final = "transformers: save_pretrained"
_ACCELERATOR: Final = "accelerate: save_model"
_STATE: Final = "accelerate: save_state"
_TRAINER: Final = "transformers: checkpoints of Trainer"
_DCP: Final = "torch: writers of distributed checkpoints"
_CONSOLIDATION: Final = "torch: consolidation of distributed checkpoints"
_WRITER: Final = "filesystem:_FileSystemWriter."
_DISTRIBUTED: Final = tuple(
    Entry(
        f"torch.distributed.checkpoint.{where.partition(':')[0]}",
        where.partition(":")[2],
        f"fastshard.integrations.dcp:{ours}",
        known,
        group,
        since="2.13",  # older ones have some of it
    )
    for where, ours, known, group in (
        # First what is imported last.
        ("hf_storage:HuggingFaceStorageWriter.finish", "finish_tensors", "self metadata results", _DCP),
        (_WRITER + "__init__", "__init__", "self path", _DCP),
        (_WRITER + "set_up_storage_writer", "set_up_storage_writer", "self is_coordinator", _DCP),
        (_WRITER + "_write_data", "_write_data", "self planner file_queue", _DCP),
        (_WRITER + "finish", "finish", "self metadata results", _DCP),
        ("staging:BlockingAsyncStager.stage", "stage_blocking", "self state_dict", ""),
        ("staging:DefaultStager.stage", "stage_by_default", "self state_dict", ""),
        (
            "_async_process_executor:_ProcessBasedAsyncCheckpointExecutor.execute_save",
            "execute_save",
            "self",
            "",
        ),
        (
            "_consolidate_hf_safetensors:_consolidate_safetensors_files",
            "consolidate",
            "input_dir output_dir fqn_to_file_mapping num_threads",
            _CONSOLIDATION,
        ),
    )
)

TABLE: tuple[Entry, ...] = (
    Entry(
        "torch.serialization",
        "save",
        "fastshard.integrations.adapters:torch_save",
        "obj f pickle_module pickle_protocol _use_new_zipfile_serialization _disable_byteorder_record",
    ),
    Entry("safetensors.torch", "save_file", f"{_ADAPTERS}:save_file", "tensors filename metadata"),
    Entry("safetensors.torch", "save", f"{_ADAPTERS}:save", "tensors metadata"),
    Entry(
        "safetensors.torch",
        "save_model",
        f"{_ADAPTERS}:save_model",
        "model filename metadata force_contiguous",
    ),
    Entry(
        "huggingface_hub.serialization._torch",
        "save_torch_state_dict",
        "fastshard.integrations.adapters:save_torch_state_dict",
        "state_dict save_directory",
    ),
    Entry(
        "huggingface_hub.lfs",
        "UploadInfo.from_path",
        "fastshard.integrations.hub_uploads:from_path",
        "cls path",
        since="2.4",  # older ones read the file here
    ),
    Entry(
        "transformers.modeling_utils",
        "PreTrainedModel.save_pretrained",
        "fastshard.integrations.transformers:save_pretrained",
        "self save_directory",
        _PRETRAINED,
    ),
    Entry(
        "transformers.integrations.accelerate",
        "load_offloaded_parameter",
        "fastshard.integrations.transformers:load_offloaded_parameter",
        "model param_name",
        _PRETRAINED,
        since="5",
    ),
    Entry(
        "transformers.utils.logging",
        "_tqdm_cls.__call__",
        "fastshard.integrations.transformers:progress_bar",
        "self",
        _PRETRAINED,
    ),
    Entry(
        "transformers.distributed.checkpoint",
        "_save_model_checkpoint_distributed",
        "fastshard.integrations.transformers_distributed:save_model",
        "model checkpoint_dir",
        since="5.24",
    ),
    Entry(
        "accelerate.accelerator",
        "Accelerator.save_model",
        "fastshard.integrations.accelerate:save_model",
        "self model save_directory",
        _ACCELERATOR,
    ),
    Entry(
        "accelerate.utils.modeling",
        "get_state_dict_offloaded_model",
        "fastshard.integrations.accelerate:get_state_dict_offloaded_model",
        "model",
        _ACCELERATOR,
    ),
    *_DISTRIBUTED,
)

ASYNCHRONOUS: tuple[Entry, ...] = (
    Entry(
        "transformers.trainer",
        "Trainer._save_checkpoint",
        "fastshard.integrations.trainer:save_checkpoint",
        "self model trial",
        _TRAINER,
    ),
    Entry(
        "transformers.trainer",
        "Trainer._get_output_dir",
        "fastshard.integrations.trainer:run_folder",
        "self trial",
        _TRAINER,
    ),
    Entry(
        "transformers.trainer",
        "Trainer._rotate_checkpoints",
        "fastshard.integrations.trainer:rotate_by_method",
        "self use_mtime output_dir",
        _TRAINER,
        until="5.2",
    ),
    Entry(
        "transformers.trainer_utils",
        "rotate_checkpoints",
        "fastshard.integrations.trainer:rotate",
        "output_dir save_total_limit best_model_checkpoint use_mtime",
        _TRAINER,
        since="5.2",
    ),
    *(
        Entry(module, name, "fastshard.integrations.trainer:after_checkpoints", known, _TRAINER)
        for module, name, known in (
            ("transformers.trainer", "Trainer._load_best_model", "self"),
            ("transformers.trainer_utils", "get_last_checkpoint", "folder"),
        )
    ),
    Entry(
        "transformers.trainer",
        "Trainer.train",
        "fastshard.integrations.trainer:train",
        "self resume_from_checkpoint trial",
        _TRAINER,
    ),
    Entry(
        "huggingface_hub.serialization._torch",
        "split_torch_state_dict_into_shards",
        "fastshard.integrations.transformers:split_into_shards",
        "state_dict filename_pattern max_shard_size",
    ),
    Entry(
        "accelerate.accelerator",
        "Accelerator.save_state",
        "fastshard.integrations.accelerate_state:save_state",
        "self output_dir",
        _STATE,
    ),
    Entry(
        "accelerate.accelerator",
        "Accelerator.load_state",
        "fastshard.integrations.accelerate_state:load_state",
        "self",
        _STATE,
    ),
    Entry(
        "accelerate.accelerator",
        "Accelerator.end_training",
        "fastshard.integrations.accelerate_state:end_training",
        "self",
        _STATE,
    ),
)
"""What ``install(asynchronous=True)``, ``install(manifest=True)`` and ``install(incremental=True)`` replace besides."""

NEEDS: Final[dict[str, tuple[str, ...]]] = {
    "safetensors: save_model": ("safetensors.torch:_remove_duplicate_names",),
    "huggingface_hub: save_torch_state_dict": (
        "huggingface_hub.serialization._torch:_clean_state_dict_for_safetensors",
        "huggingface_hub.serialization._base:split_state_dict_into_shards_factory",
        "huggingface_hub.serialization._torch:split_torch_state_dict_into_shards",
        "huggingface_hub.serialization._torch:logger",
        "huggingface_hub.constants:SAFETENSORS_WEIGHTS_FILE_PATTERN",
        "huggingface_hub.constants:PYTORCH_WEIGHTS_FILE_PATTERN",
    ),
    _PRETRAINED: (
        "transformers.utils.logging:EmptyTqdm",
        "transformers.utils.logging:is_progress_bar_enabled",
    ),
    _TRAINER: ("transformers.trainer_callback:TrainerCallback",),
    _CONSOLIDATION: (
        "torch.distributed.checkpoint._consolidate_hf_safetensors:_OutputFileData",
        "torch.distributed.checkpoint._consolidate_hf_safetensors:_FqnData",
    ),
    _DCP: (
        "torch.distributed.checkpoint.filesystem:FileSystem",
        "torch.distributed.checkpoint.filesystem:_StorageInfo",
        "torch.distributed.checkpoint.filesystem:SerializationFormat",
    ),
    _ACCELERATOR: (
        "accelerate.utils.offload:OffloadedWeightsLoader",
        "accelerate.utils.offload:PrefixedDataset",
    ),
}
"""What the implementations of each group use of the library besides the functions they replace."""


class Target(NamedTuple):
    """A function where it is bound: in a module or a class, which may hold it as a static or a class method."""

    entry: Entry
    function: Function
    owner: type | None
    value: object
    kind: type[staticmethod[..., Any]] | type[classmethod[Any, ..., Any]] | None


class Found(NamedTuple):
    """What :func:`examine` has found of a group."""

    entries: tuple[Entry, ...]
    """The functions that the installed version should have."""
    targets: tuple[Target, ...] = ()
    """The functions that can be replaced, if there is no reason against it."""
    awaited: str | None = None
    """A module that has to be imported first."""
    misfit: str | None = None
    """Why the group does not fit the installed version."""
    foreign: tuple[Entry, ...] = ()
    """The functions that somebody else has replaced."""


def groups(table: Iterable[Entry]) -> dict[str, list[Entry]]:
    """Returns the rows of a table by the names of their groups, in the order of the table."""
    found: dict[str, list[Entry]] = {}
    for entry in table:
        found.setdefault(entry.belongs_to, []).append(entry)
    return found


def version_of(library: str) -> str:
    """Returns the version of a library that is imported; an empty text if it does not tell."""
    said = namespace(sys.modules.get(library)).get("__version__")
    if isinstance(said, str):
        return said
    return _installed_version(library) if library in sys.modules else ""


@functools.cache
def _installed_version(library: str) -> str:
    """Returns the installed version, for libraries whose module in ``sys.modules`` is a lazy object."""
    from importlib import metadata

    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return ""


def expected(entries: Iterable[Entry]) -> list[Entry]:
    """Returns the functions of a group that the imported version of the library should have."""
    return [entry for entry in entries if _is_of_this_version(entry)]


def _is_of_this_version(entry: Entry) -> bool:
    release = _release(version_of(entry.library)) if entry.since or entry.until else ()
    return (not entry.since or release >= _release(entry.since)) and (
        not entry.until or release < _release(entry.until)
    )


def _release(version: str) -> tuple[int, ...]:
    """Returns the numbers that a version begins with. A version without any counts as new."""
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:3]) or (
        sys.maxsize,
    )


def bring(group: str, entries: Sequence[Entry], ready: Callable[[str], bool]) -> None:
    """Imports what a group needs besides the module of its first row, once that is imported.

    All of it belongs to the same library, and most of it is imported with that module.
    """
    if ready(entries[0].module):
        for module in _modules(group, expected(entries)):
            if module not in sys.modules:
                try:
                    importlib.import_module(module)
                except Exception:  # which `examine` will see
                    continue


def _modules(group: str, entries: Iterable[Entry]) -> list[str]:
    needed = (need.partition(":")[0] for need in NEEDS.get(group, ()))
    return list(dict.fromkeys((*(entry.module for entry in entries), *needed)))


def examine(
    group: str,
    entries: Sequence[Entry],
    ready: Callable[[str], bool],
    is_ours: Callable[[object], bool],
) -> Found:
    """Whether a group can be replaced. ``ready``: whether a module's code has run; ``is_ours``: whether this is a
    replacement that is in place already."""
    wanted = tuple(expected(entries))
    if not wanted or not ready(entries[0].module):
        return Found(tuple(entries), awaited=entries[0].module)
    for module in _modules(group, wanted):
        if module not in sys.modules:
            return Found(wanted, misfit=f"there is no module {module}")
        if not ready(module):
            return Found(wanted, awaited=module)
    missing = []
    for need in NEEDS.get(group, ()):
        module, _, name = need.partition(":")
        if name not in namespace(sys.modules[module]):
            missing.append(f"{module} has no {name}")
    targets, foreign = [], []
    for entry in wanted:
        target = _target(entry)
        if target is None:
            missing.append(f"{entry.module} has no {entry.attribute}")
        elif is_ours(target.function):
            continue
        elif not is_own(target.function, entry.module):
            foreign.append(entry)
        else:
            targets.append(target)
            if other := _other_parameters(target.function, entry.parameters.split()):
                missing.append(f"{entry} {other}")
    return Found(wanted, tuple(targets), None, "; ".join(missing) or None, tuple(foreign))


def _target(entry: Entry) -> Target | None:
    holder = namespace(sys.modules.get(entry.module))
    *classes, name = entry.attribute.split(".")
    owner = None
    for part in classes:
        owner = holder.get(part)
        if not issubclass(type(owner), type):
            return None
        holder = dict(vars(owner))
    if name not in holder:
        return None
    value = holder[name]
    kind = type(value) if type(value) in (staticmethod, classmethod) else None
    return Target(entry, value.__func__ if kind else value, owner, value, kind)


def _other_parameters(function: Function, known: list[str]) -> str | None:
    """How the parameters that can be given by their places differ from those that the implementation knows; more of
    them, or fewer, do not: calls that it does not take are the original's."""
    code = function.__code__
    found = list(code.co_varnames[: code.co_argcount])
    both = min(len(found), len(known))
    if found[:both] == known[:both] or (not found and code.co_flags & 0x04):  # CO_VARARGS: a decorated one
        return None
    return f"takes ({', '.join(found)}), not ({', '.join(known)})"
