# SPDX-License-Identifier: Apache-2.0
"""``PreTrainedModel.save_pretrained(distributed_checkpoint=True)``: every rank writes its slices into the files that one
process would have saved for the whole model.

Transformers writes a file for each rank instead, which has to be consolidated before anything but transformers can
load it. What it loads from such files it loads from the final ones by ``from_pretrained``, too.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import torch

from ..base.activity import count_left
from ..distributed.rank_save import Style, save_in_style
from ..engine.pipeline import How
from ..formats.hf_index import make_index
from ..formats.naming import HUB_PATTERN, is_of_rank
from . import patching

_CALL: Final = "PreTrainedModel.save_pretrained"
_arguments: contextvars.ContextVar[Mapping[str, Any] | None] = contextvars.ContextVar(
    "fastshard_save_pretrained", default=None
)


@contextlib.contextmanager
def under_way(arguments: Mapping[str, Any]) -> Iterator[None]:
    """In this block, :func:`save_model` knows the arguments of the call that it is part of."""
    token = _arguments.set(arguments)
    try:
        yield
    finally:
        _arguments.reset(token)


def save_model(original: Callable[..., Any], /, model: Any, checkpoint_dir: Any) -> Any:
    arguments = _arguments.get()
    reason = "a checkpoint of its ranks" if arguments is None else _why_not(model, arguments)
    if arguments is None or reason is not None:
        count_left(_CALL, reason or "")
        return original(model, checkpoint_dir)
    parameters = model.num_parameters()

    def index_text(split: Any) -> str:
        return make_index({"total_parameters": parameters, **split.metadata}, split.tensor_to_filename)

    return save_in_style(
        _state_dict(model, arguments),
        os.fspath(checkpoint_dir),
        Style(index_text, is_of_rank),
        max_shard_size=arguments.get("max_shard_size", "50GB"),
        filename_pattern=HUB_PATTERN,
        how=How(allow_strided=True, manifest=patching.manifest()),
    )


def _why_not(model: Any, arguments: Mapping[str, Any]) -> str | None:
    """Returns why the files of ranks are left to transformers; ``None`` if they are not. All ranks find the same."""
    if arguments.get("variant") is not None:
        return "a variant"
    if arguments.get("state_dict") is not None:
        return "a state dict of the caller's"
    if getattr(model, "hf_quantizer", None) is not None:
        return "a quantized model"
    if arguments.get("save_original_format", True) and _is_converted(model):
        return "weights that are converted when they are saved"
    return None


def _is_converted(model: Any) -> bool:
    """Returns whether ``save_pretrained`` changes weights or their names."""
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        from transformers.conversion_mapping import get_model_conversion_mapping

        conversions = get_model_conversion_mapping(model, add_legacy=False)
    return bool(conversions)


def _state_dict(model: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what ``save_pretrained`` saves, with each rank's slices."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict
    from transformers.distributed import checkpoint
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    state_dict = checkpoint._redistribute_state_dict(get_model_state_dict(model))
    for name in model._keys_to_ignore_on_save or ():
        state_dict.pop(name, None)
    values = model.state_dict(keep_vars=True)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    alike: dict[str, torch.Tensor] = {name: torch.empty(1) for name in values if name in state_dict}
    for name, source in tied.items():
        if name in alike and source in alike and _same_memory(values[name], values[source]):
            alike[name] = alike[source]
    kept = remove_tied_weights_from_state_dict(dict(alike), model)
    return {name: value for name, value in state_dict.items() if name in kept or name not in alike}


def _same_memory(one: Any, other: Any) -> bool:
    """Returns whether this rank has the same memory of both, or none of either."""
    parts = [value.to_local() if hasattr(value, "to_local") else value for value in (one, other)]
    return len({part.data_ptr() if part.numel() else 0 for part in parts}) == 1
