# SPDX-License-Identifier: Apache-2.0
"""fastshard in SGLang: what its plugin sets up, in every process of an engine.

SGLang's ``ShardedStateLoader`` (0.5.23, ``sglang/srt/model_loader/loader.py``) saves a model's state after
``process_weights_after_loading``. It also calls that step before it loads a state, so what it has saved is
what it expects. Therefore only the saving is replaced, by :func:`save_model`. It also saves strided weights,
on which SGLang 0.5.23 fails.
"""

from __future__ import annotations

import logging
from typing import Final

import torch

from ..api.sharded_save import save_sharded_state
from ..base.settings import flag, parse_size
from .patching import DISABLE_VARIABLE

TARGET: Final = "sglang.srt.model_loader.loader.ShardedStateLoader.save_model"

logger = logging.getLogger(__name__)


def register() -> None:
    """The entry point (``sglang.srt.plugins``). It does nothing if ``FASTSHARD_DISABLE`` is set to yes.

    It never raises, so an engine starts with fastshard or without it.
    """
    if flag(DISABLE_VARIABLE):
        return
    try:
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        HookRegistry.register(TARGET, save_model, HookType.REPLACE)
    except Exception as error:
        logger.warning("fastshard is not at work in this SGLang: %s: %s", type(error).__name__, error)


def save_model(
    model: torch.nn.Module, path: str, pattern: str | None = None, max_size: int | str | None = None
) -> None:
    """Replaces ``ShardedStateLoader.save_model``: saves this rank's part of a live engine's model.

    Each rank's files appear all at once, and those of an earlier save of the same rank are removed.
    ``max_size`` is in bytes, or a text as ``"5GB"``. (SGLang's own command line passes a text, and then fails
    when it compares it with a number.)

    Raises:
        ValueError: for pipeline parallelism, whose stages would overwrite each other's files, as SGLang's loader has
            no names for them; for a pattern or a size that is not possible.
        OSError: a system call has failed.
    """
    from sglang import __version__ as version
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    if parallel.pp_size > 1:
        raise ValueError(
            f"SGLang's loader has no names for the {parallel.pp_size} stages of pipeline parallelism: "
            "they would overwrite each other's files"
        )
    save_sharded_state(
        model,
        path,
        tp_rank=parallel.tp_rank,
        tp_size=parallel.tp_size,
        pattern=pattern,
        max_size=None if max_size is None else parse_size(max_size),
        writer=("sglang", version),
        post_processed=True,
    )
