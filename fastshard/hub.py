# SPDX-License-Identifier: Apache-2.0
"""The savers of huggingface_hub: its names, split, index and metadata; all shards at once."""

from __future__ import annotations

import json
import os
import re

import torch

from .archive import torch_save
from .engine import Engine, Options
from .saving import How
from .sharing import by_storage
from .staged import save_alone, staged


def save_torch_model(
    model: torch.nn.Module,
    save_directory: str | os.PathLike[str],
    *,
    filename_pattern: str | None = None,
    force_contiguous: bool = True,
    max_shard_size: int | str = "5GB",
    metadata: dict[str, str] | None = None,
    safe_serialization: bool = True,
    is_main_process: bool = True,
    shared_tensors_to_discard: list[str] | None = None,
    durable: bool = False,
    keep_cached: bool = True,
    progress: bool | None = None,
    dtype: torch.dtype | None = None,
    engine: Engine | Options | None = None,
) -> None:
    """Saves a module's state dict; see :func:`save_torch_state_dict`."""
    save_torch_state_dict(
        model.state_dict(),
        save_directory,
        filename_pattern=filename_pattern,
        force_contiguous=force_contiguous,
        max_shard_size=max_shard_size,
        metadata=metadata,
        safe_serialization=safe_serialization,
        is_main_process=is_main_process,
        shared_tensors_to_discard=shared_tensors_to_discard,
        durable=durable,
        keep_cached=keep_cached,
        progress=progress,
        dtype=dtype,
        engine=engine,
    )


def save_torch_state_dict(
    state_dict: dict[str, torch.Tensor],
    save_directory: str | os.PathLike[str],
    *,
    filename_pattern: str | None = None,
    force_contiguous: bool = True,
    max_shard_size: int | str = "5GB",
    metadata: dict[str, str] | None = None,
    safe_serialization: bool = True,
    is_main_process: bool = True,
    shared_tensors_to_discard: list[str] | None = None,
    durable: bool = False,
    keep_cached: bool = True,
    progress: bool | None = None,
    dtype: torch.dtype | None = None,
    engine: Engine | Options | None = None,
) -> None:
    """Saves a state dict in shards with an index, to the byte the files of ``huggingface_hub.save_torch_state_dict``.

    Shards are written in parallel, and the directory changes all at once: until every file stands, the checkpoint
    that was there can be loaded (huggingface_hub deletes it first, so a failed save leaves none). There must be
    room for both. Of shared tensors one is saved; as there, the others are deleted from ``state_dict``, and their
    names are added to ``metadata``, both the caller's. Strided tensors are packed on the way into the file, not
    copied first.

    Args:
        state_dict: name -> tensor on any device.
        save_directory: an existing directory. Files in it that belong to an earlier save with the same
            ``filename_pattern`` go, if ``is_main_process``; all others stay.
        filename_pattern: of the shards, with ``{suffix}``; ``None``: ``model{suffix}.safetensors``, or
            ``pytorch_model{suffix}.bin`` when ``safe_serialization`` is false (pickled then, by
            :func:`fastshard.torch_save`).
        force_contiguous: save strided tensors instead of refusing them.
        max_shard_size: bytes, or as ``"5GB"`` (10^9). A larger tensor has a shard to itself.
        metadata: goes into the file, or into the index if there is one.
        is_main_process: whether to remove files of earlier saves. Every process that calls this writes all files.
        shared_tensors_to_discard: names not to be kept if there are others for the same memory.
        durable, keep_cached, progress, dtype, engine: as for :func:`fastshard.save_file`; pickled shards are not cast.

    Raises:
        FileNotFoundError: ``save_directory`` is missing.
        What :func:`fastshard.save_file` raises.
    """
    from huggingface_hub import constants, split_torch_state_dict_into_shards
    from huggingface_hub.serialization._torch import _clean_state_dict_for_safetensors

    if filename_pattern is None:
        filename_pattern = (
            constants.SAFETENSORS_WEIGHTS_FILE_PATTERN
            if safe_serialization
            else constants.PYTORCH_WEIGHTS_FILE_PATTERN
        )
    metadata = {} if metadata is None else metadata
    sized = state_dict
    if safe_serialization:
        state_dict = _clean_state_dict_for_safetensors(
            state_dict,
            metadata,
            force_contiguous=False,
            shared_tensors_to_discard=shared_tensors_to_discard,
        )
        sized = state_dict
        if force_contiguous:
            state_dict, sized = _made_contiguous(state_dict)
        if dtype is not None:
            sized = {
                name: torch.empty_like(t, dtype=dtype, device="meta") if t.is_floating_point() else t
                for name, t in sized.items()
            }
    split = split_torch_state_dict_into_shards(
        sized, filename_pattern=filename_pattern, max_shard_size=max_shard_size
    )
    prefix, _, suffix = filename_pattern.partition("{suffix}")
    earlier = re.compile(re.escape(prefix) + r"(-\d{5}-of-\d{5})?" + re.escape(suffix) + r"(\.index\.json)?")

    def stale(name: str) -> bool:
        return is_main_process and earlier.fullmatch(name) is not None

    how = How(durable, keep_cached, progress, force_contiguous, dtype, engine=engine)
    in_file = {"format": "pt"} if split.is_sharded else {"format": "pt", **metadata}
    directory = os.fspath(save_directory)
    if safe_serialization and len(split.filename_to_tensors) == 1:
        ((filename, names),) = split.filename_to_tensors.items()
        if save_alone({name: state_dict[name] for name in names}, directory, filename, in_file, stale, how):
            return
    with staged(directory, stale, how) as stage:
        for filename, names in split.filename_to_tensors.items():
            shard = {name: state_dict[name] for name in names}
            path = stage.place(filename)
            if safe_serialization:
                stage.add(shard, path, in_file)
            else:
                torch_save(shard, path, durable=durable, keep_cached=keep_cached, engine=engine)
        if split.is_sharded:
            index = {"metadata": {**split.metadata, **metadata}, "weight_map": split.tensor_to_filename}
            stage.write_text(filename_pattern.format(suffix="") + ".index.json", json.dumps(index, indent=2))


def _made_contiguous(
    state_dict: dict[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The tensors to be saved as contiguous ones, and what the split is to be made from: copies on the meta device,
    which have the sizes that copies would have. Only strided tensors with memory in common are copied, as nothing
    could be streamed from them twice."""
    alone = {names[0] for names in by_storage(state_dict) if len(names) == 1}
    saved, sized = {}, {}
    for name, tensor in state_dict.items():
        if tensor.is_contiguous():
            saved[name] = sized[name] = tensor
        elif name in alone:
            saved[name] = tensor
            sized[name] = torch.empty_like(tensor, device="meta", memory_format=torch.contiguous_format)
        else:
            saved[name] = sized[name] = tensor.contiguous()
    return saved, sized
