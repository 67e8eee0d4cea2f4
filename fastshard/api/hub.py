# SPDX-License-Identifier: Apache-2.0
"""The savers of huggingface_hub: its names, split, index and metadata; all shards at once."""

from __future__ import annotations

import errno
import functools
import json
import os
import stat
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from operator import attrgetter
from typing import Any, Final, Literal

import torch

from ..engine.background import make_way
from ..engine.engine import Engine, Options
from ..engine.pipeline import How
from ..engine.sharing import by_storage
from ..engine.tensors import check_dtype, each_alone
from ..engine.unchanged import frozen_storages, is_in, parameters_in
from ..errors import ArchiveError, SaveError
from ..formats.naming import index_of, names_of, shard_of
from ..publish.incremental import check_base
from ..publish.manifests import check_wanted
from ..publish.staged import save_alone, staged
from .archive import torch_save


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
    dtype: torch.dtype | str | None = None,
    manifest: bool | Literal["sha256"] = False,
    base: str | os.PathLike[str] | None = None,
    engine: Engine | Options | None = None,
) -> None:
    """Saves a module's state dict; see :func:`save_torch_state_dict`."""
    save_torch_state_dict(
        model.state_dict() if base is None else model.state_dict(keep_vars=True),
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
        manifest=manifest,
        base=base,
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
    dtype: torch.dtype | str | None = None,
    manifest: bool | Literal["sha256"] = False,
    base: str | os.PathLike[str] | None = None,
    engine: Engine | Options | None = None,
) -> None:
    """Saves a state dict in shards with an index, to the byte the files of
    ``huggingface_hub.save_torch_state_dict``.

    Shards are written in parallel, and the directory changes all at once. Until every file stands, the
    checkpoint that was there can be loaded. (huggingface_hub deletes it first, so a failed save leaves none.)
    There must be space for both. Of shared tensors one is saved; as there, the others are deleted from
    ``state_dict``, and their names are added to ``metadata``, both the caller's objects. Strided tensors are
    packed on the way into the file, not copied first.

    Args:
        state_dict: tensors on any device, by name.
        save_directory: an existing directory. If ``is_main_process``, files in it that belong to an earlier save
            with the same ``filename_pattern`` are removed; all others stay.
        filename_pattern: the pattern of the shards' names, with ``{suffix}``; ``None``:
            ``model{suffix}.safetensors``, or ``pytorch_model{suffix}.bin`` if ``safe_serialization`` is false (the
            files are then pickled by :func:`fastshard.torch_save`).
        force_contiguous: save strided tensors instead of refusing them.
        max_shard_size: in bytes, or a text as ``"5GB"`` (10^9). A larger tensor has a shard to itself.
        metadata: is written into the file, or into the index if there is one.
        is_main_process: whether to remove files of earlier saves. Every process that calls this writes all files.
        shared_tensors_to_discard: names that are not kept if there are others for the same memory.
        base: an earlier checkpoint, as for :func:`fastshard.save_file`; pickled shards are always written. Parameters
            that need no gradient, as far as ``state_dict`` tells (``keep_vars=True``), get files of their own.
        durable, keep_cached, progress, dtype, manifest, engine: as for :func:`fastshard.save_file`; pickled shards are
            not cast.

    Raises:
        FileNotFoundError: ``save_directory`` is missing.
        Exception: what :func:`fastshard.save_file` raises.
    """
    from huggingface_hub.serialization import _torch as theirs

    dtype = check_dtype(dtype)
    check_wanted(manifest)
    check_base(base)
    frozen = frozenset() if base is None else frozen_storages(parameters_in([state_dict]))
    if filename_pattern is None:
        filename_pattern = default_pattern(safe_serialization)
    metadata = {} if metadata is None else metadata
    sized = state_dict
    comes_in_pieces = type(state_dict) not in (dict, OrderedDict)
    simple = (
        safe_serialization
        and shared_tensors_to_discard is None
        and not comes_in_pieces
        and each_alone(state_dict)
    )
    if safe_serialization and not simple:
        discarded = {}  # which huggingface_hub knows from 0.27 on
        if shared_tensors_to_discard is not None:
            discarded["shared_tensors_to_discard"] = shared_tensors_to_discard
        state_dict = theirs._clean_state_dict_for_safetensors(
            state_dict, metadata, force_contiguous=False, **discarded
        )
        sized = state_dict
        if force_contiguous:
            state_dict, sized = _made_contiguous(state_dict)
    if safe_serialization and dtype is not None:
        sized = {
            name: torch.empty_like(t, dtype=dtype, device="meta") if t.is_floating_point() else t
            for name, t in sized.items()
        }
    if not safe_serialization:
        theirs.logger.warning(_UNSAFE)
    # In the simple case no storage is asked for that tensors may have in common, which takes most of the time.
    split_one = split_by_size if simple else theirs.split_torch_state_dict_into_shards
    apart = {name for name in sized if frozen and is_in(frozen, state_dict[name])}
    split = split_apart(
        functools.partial(split_one, filename_pattern=filename_pattern, max_shard_size=max_shard_size),
        sized,
        apart if safe_serialization else (),
        filename_pattern,
    )
    make_way(save_directory)
    place = Place(os.fspath(save_directory), filename_pattern)
    place.check(SaveError if safe_serialization else ArchiveError)
    obsolete = place.earlier() if is_main_process else frozenset()
    how = How(
        durable=durable,
        keep_cached=keep_cached,
        progress=progress,
        allow_strided=force_contiguous,
        dtype=dtype,
        manifest=manifest,
        base=base,
        engine=engine,
    )
    in_file = metadata_in_files(split, metadata)
    alone = False
    if safe_serialization and len(split.filename_to_tensors) == 1:
        ((filename, names),) = split.filename_to_tensors.items()
        shard = {name: state_dict[name] for name in names}
        alone = save_alone(
            shard,
            place.folder,
            place.inside(filename),
            in_file,
            obsolete,
            how,
            call="save_torch_state_dict",
            listed=place.listed,
        )
    if not alone:
        with staged(place.folder, obsolete.__contains__, how, call="save_torch_state_dict") as stage:
            stage.at_once = comes_in_pieces
            if stage.base is not None:
                stage.base.frozen = frozen
            for filename, names in split.filename_to_tensors.items():
                shard = {name: state_dict[name] for name in names}
                path = place.staged(filename, stage.path)
                if safe_serialization:
                    stage.add(shard, path, in_file)
                else:
                    torch_save(shard, path, durable=durable, keep_cached=keep_cached, engine=engine)
            if split.is_sharded:
                index_path = place.staged(index_of(filename_pattern), stage.path)
                stage.write_text(index_path, index_text(split, metadata))
    for name in obsolete:
        theirs.logger.debug(f"Removing existing file '{name}' from folder.")
    tell_saved(split, filename_pattern, max_shard_size, save_directory)


def default_pattern(safe_serialization: bool = True) -> str:
    """Returns huggingface_hub's pattern of the names of weights."""
    from huggingface_hub import constants

    return (
        constants.SAFETENSORS_WEIGHTS_FILE_PATTERN
        if safe_serialization
        else constants.PYTORCH_WEIGHTS_FILE_PATTERN
    )


def split_apart(
    split_one: Callable[[dict[str, Any]], Any], sized: dict[str, Any], apart: Collection[str], pattern: str
) -> Any:
    """Returns a split in which the tensors of these names have files of their own, the first ones.

    ``split_one`` is huggingface_hub's, for one part.
    """
    parts = [{n: t for n, t in sized.items() if (n in apart) is own} for own in (True, False)]
    if not all(parts):
        return split_one(sized)
    splits = [split_one(part) for part in parts]
    groups = [names for split in splits for names in split.filename_to_tensors.values()]
    files = {shard_of(pattern, number, len(groups)): names for number, names in enumerate(groups, 1)}
    metadata = {**splits[0].metadata, "total_size": sum(split.metadata["total_size"] for split in splits)}
    found = {name: file for file, names in files.items() for name in names}
    return type(splits[0])(metadata=metadata, filename_to_tensors=files, tensor_to_filename=found)


def split_by_size(
    sized: dict[str, Any],
    filename_pattern: str,
    max_shard_size: int | str,
    get_storage_id: Callable[[Any], object] = lambda _: None,
) -> Any:
    """Returns huggingface_hub's split of values that say by ``nbytes`` how large they are."""
    from huggingface_hub.serialization._base import split_state_dict_into_shards_factory

    return split_state_dict_into_shards_factory(
        sized,
        get_storage_size=attrgetter("nbytes"),
        get_storage_id=get_storage_id,
        filename_pattern=filename_pattern,
        max_shard_size=max_shard_size,
    )


def duplicate_names(state_dict: dict[str, torch.Tensor]) -> dict[str, str]:
    """Returns by huggingface_hub's rule which names of shared tensors are left out, and the name that is kept."""
    from huggingface_hub.serialization import _torch as theirs

    if each_alone(state_dict):
        return {}
    left_out: dict[str, str] = {}
    theirs._clean_state_dict_for_safetensors(dict(state_dict), left_out, force_contiguous=False)
    return left_out


def metadata_in_files(split: Any, metadata: Mapping[str, str]) -> dict[str, str]:
    """Returns the metadata that each file of a split has in its header."""
    return {"format": "pt"} if split.is_sharded else {"format": "pt", **metadata}


def index_text(split: Any, metadata: Mapping[str, str]) -> str:
    """Returns the index of a split."""
    index = {"metadata": {**split.metadata, **metadata}, "weight_map": split.tensor_to_filename}
    return json.dumps(index, indent=2)


def tell_saved(split: Any, pattern: str, max_shard_size: int | str, save_directory: object) -> None:
    """Logs what huggingface_hub logs of a save."""
    from huggingface_hub.serialization import _torch as theirs

    for name in split.filename_to_tensors:
        theirs.logger.debug(f"Shard saved to {name}")
    if split.is_sharded:
        theirs.logger.info(
            f"The model is bigger than the maximum size per checkpoint ({max_shard_size}). "
            f"Model weighs have been saved in {len(split.filename_to_tensors)} checkpoint shards. "
            f"You can find where each parameters has been saved in the index located at {index_of(pattern)}."
        )
    theirs.logger.info(f"Model weights successfully saved to {save_directory}!")


_UNSAFE: Final = (
    "You are using unsafe serialization. Due to security reasons, it is recommended not to load "
    "pickled models from untrusted sources. If you intend to share your model, we strongly recommend "
    "using safe serialization by installing `safetensors` with `pip install safetensors`."
)
"""The text that huggingface_hub itself logs."""


class Place:
    """The place of the files of a pattern, which may lead into a folder: ``"sub/w{suffix}.safetensors"``."""

    def __init__(self, directory: str, pattern: str) -> None:
        inner, self._pattern = os.path.split(pattern)
        if "{" in inner:  # a folder for each file
            if os.path.isabs(inner) or ".." in inner.split(os.sep):
                raise ValueError(f"filename_pattern={pattern!r} leads out of the folder")
            inner = ""
            self._pattern = pattern
        self.folder = os.path.join(directory, inner) if inner else directory
        self._inner = inner
        self.listed: list[str] | None = None
        """What :meth:`earlier` has seen in the folder."""

    def check(self, error: type[SaveError] | type[ArchiveError]) -> None:
        """Raises ``error`` if the pattern leads into a folder that does not exist, as the saver of a file
        does."""
        if self._inner:
            try:
                os.stat(self.folder)
            except (FileNotFoundError, NotADirectoryError) as found:
                raise error(found.errno, found.strerror, self.folder) from None

    def earlier(self) -> Collection[str]:
        """Returns the files of an earlier save with this pattern, in the order of the folder.

        As in huggingface_hub, there are none if the pattern leads into a folder.
        """
        if self._inner:
            return ()
        is_of_it = names_of(self._pattern).fullmatch
        self.listed = os.listdir(self.folder)
        return {found: None for found in self.listed if is_of_it(found)}.keys()

    def inside(self, filename: str) -> str:
        """Returns a file's path relative to the folder."""
        return os.path.relpath(filename, self._inner) if self._inner else filename

    def staged(self, filename: str, stage: str) -> str:
        """Returns the path where a file is made."""
        path = os.path.join(stage, self.inside(filename))
        if os.sep in filename and not self._inner:
            folder = os.path.join(self.folder, os.path.dirname(filename))
            if not stat.S_ISDIR(os.stat(folder).st_mode):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), folder)
            os.makedirs(os.path.dirname(path), exist_ok=True)
        return path


def _made_contiguous(
    state_dict: dict[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Returns the tensors to be saved as contiguous ones, and those that the split is to be made from.

    The latter are copies on the meta device, which have the sizes of real copies. Only strided tensors that
    share memory are really copied, as nothing could be streamed from them twice.
    """
    state_dict = dict(state_dict.items())
    if all(tensor.is_contiguous() for tensor in state_dict.values()):
        return state_dict, state_dict
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
