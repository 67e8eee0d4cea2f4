# SPDX-License-Identifier: Apache-2.0
"""Saves sharded state: every rank of a serving engine saves its own tensors.

The files are those of the ``ShardedStateLoader`` of vLLM and SGLang (vLLM 0.33,
``vllm/model_executor/model_loader/sharded_state_loader.py``; SGLang 0.5.23,
``sglang/srt/model_loader/loader.py``): the same names, the same split, the same bytes. Beside them is a
manifest (:mod:`fastshard.formats.manifest`), which neither of them reads.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Literal

import torch

from ..engine import tensors as _tensors
from ..engine.engine import Engine, Options
from ..engine.pipeline import How
from ..engine.sharing import shared_names
from ..formats.manifest import Alias, RankManifest
from ..formats.naming import Names, Ranks
from ..publish.manifests import Outline, check_wanted
from ..publish.staged import staged
from .sharded_state import State, has_memory, nbytes_of, state_of, without_subtensors


def save_sharded_state(
    model_or_state_dict: State,
    path: str | os.PathLike[str],
    *,
    tp_rank: int = 0,
    tp_size: int = 1,
    pp_rank: int = 0,
    pp_size: int = 1,
    dp_rank: int = 0,
    dp_size: int = 1,
    ep_rank: int = 0,
    ep_size: int = 1,
    dp_replicated: bool = False,
    pattern: str | None = None,
    max_size: int | None = None,
    writer: tuple[str, str] | None = None,
    quantization: str | None = None,
    post_processed: bool | None = None,
    durable: bool = False,
    keep_cached: bool = True,
    progress: bool | None = None,
    manifest: bool | Literal["sha256"] = False,
    engine: Engine | Options | None = None,
) -> RankManifest:
    """Saves the tensors of one rank, to the byte the files of vLLM's ``ShardedStateLoader.save_model``, and a manifest.

    All parts are written in parallel and the rank's files change all at once: until the new ones stand, the old ones
    can be loaded. Parts of an earlier save of this rank with the same pattern go in the same moment; other ranks'
    files are not touched, and all ranks may save into one directory at the same time. As there, empty tensors are
    left out, and so are those whose memory is all in that of another one (of tied ones the smallest name stays); what
    is left out for that is listed in the manifest as an alias. Other than there, strided tensors are packed on the
    way into the file (vLLM 0.33 fails on them), of tensors that overlap in part each is saved whole, and a first tensor
    larger than ``max_size`` leaves no empty part before it.

    Args:
        model_or_state_dict: what ``state_dict()`` of a module gives, on any device.
        path: a directory; it is made if it is missing.
        tp_rank, tp_size, pp_rank, pp_size, dp_rank, dp_size, ep_rank, ep_size: which rank of how many of tensor,
            pipeline, data and expert parallelism this is.
        dp_replicated: whether every rank of data parallelism has the same weights. Experts of a mixture are split
            over them, with and without expert parallelism, so it is false for such models. Where it is true only
            ``dp_rank=0`` saves; where it is false and ``dp_size`` is not 1, ``pattern`` must have a ``{dp_rank}``, which
            vLLM's loader does not know.
        pattern: of the files, with ``{rank}`` or ``{tp_rank}``, ``{pp_rank}``, ``{dp_rank}`` and ``{part}``; ``None``:
            ``model-rank-{rank}-part-{part}.safetensors``, or where ``pp_size`` is not 1
            ``model-pp-{pp_rank}-tp-{tp_rank}-part-{part}.safetensors``.
        max_size: most bytes of tensors in a part (a larger tensor has one to itself); ``None``: one part.
        writer: name and version of the engine the weights come from, as ``("vllm", "0.33.0")``.
        quantization: name of the method by which they are quantized; ``None``: they are not.
        post_processed: whether that engine has rearranged them after loading (``process_weights_after_loading``), so
            that one that would do so again must not load them; ``False`` also where it had nothing to do. ``None``:
            not known.
        durable, keep_cached, progress, manifest, engine: as for :func:`fastshard.save_file`.

    Returns:
        What was written beside the files, as ``fastshard-<name of the parts>.json``. With ``manifest`` it has the
        CRC-32 of the tensors, too, once the save has ended.

    Raises:
        ValueError: for ranks, a pattern or a size that cannot be, among them data-parallel ranks that would
            overwrite each other's files.
        Exception: what :func:`fastshard.save_file` raises for tensors and failed system calls.
    """
    ranks = Ranks(
        tp_rank=tp_rank,
        tp_size=tp_size,
        pp_rank=pp_rank,
        pp_size=pp_size,
        dp_rank=dp_rank,
        dp_size=dp_size,
        ep_rank=ep_rank,
        ep_size=ep_size,
    )
    names = Names(pattern, ranks)
    _check_data_parallelism(ranks, names, dp_replicated)
    if max_size is not None and max_size < 1:
        raise ValueError(f"max_size={max_size!r}: a part has at least one byte")
    state = state_of(model_or_state_dict)
    kept, covered = without_subtensors(state)
    parts = {names.part(i): part for i, part in enumerate(_split(_separated(kept), max_size))}
    check_wanted(manifest)
    how = How(
        durable=durable,
        keep_cached=keep_cached,
        progress=progress,
        allow_strided=True,
        manifest=manifest,
        engine=engine,
    )
    with staged(os.fspath(path), names.is_part, how, call="save_sharded_state", create=True) as stage:
        files = {
            name: Outline(stage.add(part, os.path.join(stage.path, name), None)).entry()
            for name, part in parts.items()
        }
        aliases = {name: _alias(state[name], holder, state[holder]) for name, holder in covered.items()}
        written = RankManifest(
            ranks=ranks,
            pattern=names.pattern,
            dp_replicated=dp_replicated,
            writer=writer,
            quantization=quantization,
            post_processed=post_processed,
            files=files,
            aliases=aliases,
        )

        def write_manifest() -> None:
            files.update({name: stage.entries[name] for name in files if name in stage.entries})
            stage.write_text(os.path.join(stage.path, names.manifest), written.to_json())

        if manifest:
            stage.finishing.append(write_manifest)
        else:
            write_manifest()
    return written


def _separated(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the tensors, with copies of those that share some memory with another one, as a file holds no
    byte twice."""
    storages: dict[object, list[str]] = {}
    for name, tensor in tensors.items():
        if has_memory(tensor):
            storages.setdefault((tensor.device, tensor.untyped_storage().data_ptr()), []).append(name)
    shared = shared_names(tensors, [names for names in storages.values() if len(names) > 1])
    copied = {name for names in shared for name in sorted(names)[1:]}
    return {
        name: tensor.clone(memory_format=torch.contiguous_format) if name in copied else tensor
        for name, tensor in tensors.items()
    }


def _split(tensors: Mapping[str, torch.Tensor], max_size: int | None) -> list[dict[str, torch.Tensor]]:
    """Divides the tensors into parts. Each part takes tensors in order until the next one would be too much."""
    parts: list[dict[str, torch.Tensor]] = []
    total = 0
    for name, tensor in tensors.items():
        nbytes = nbytes_of(tensor)
        if not parts or (max_size is not None and total + nbytes > max_size):
            parts.append({})
            total = 0
        parts[-1][name] = tensor
        total += nbytes
    return parts


def _alias(tensor: torch.Tensor, holder: str, held: torch.Tensor) -> Alias:
    return Alias(
        holder, tensor.data_ptr() - held.data_ptr(), *_tensors.stored_as(tensor.dtype, tuple(tensor.shape))
    )


def _check_data_parallelism(ranks: Ranks, names: Names, replicated: bool) -> None:
    if replicated and ranks.dp_rank:
        raise ValueError(
            f"dp_rank={ranks.dp_rank} has the weights that dp_rank=0 saves (dp_replicated=True): only that one may"
        )
    if ranks.dp_size > 1 and not replicated and "dp_rank" not in names.fields:
        raise ValueError(
            f"{ranks.dp_size} data-parallel ranks would overwrite each other: pattern {names.pattern!r} has no "
            "{dp_rank}. If all of them have the same weights (no experts), pass dp_replicated=True and save from dp_rank=0."
        )
