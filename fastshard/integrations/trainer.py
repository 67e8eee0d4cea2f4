# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of transformers' ``Trainer`` that are written while training goes on.

``fastshard.install(asynchronous=True)`` replaces transformers' functions with these, and so does
``install(manifest=True)``, for a manifest of all files of a checkpoint, and ``install(incremental=True)``. ``Trainer`` makes a
checkpoint as ever, but in a hidden folder: it is told another run folder for that. All values are captured
when its method returns. Older checkpoints are removed when the new one stands. One checkpoint is in flight at
a time; whoever is going to look for checkpoints waits for it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final

from ..base.activity import count_on_the_spot
from ..engine import background
from ..publish.checkpoint import Checkpoint, checkpoint, wait_for_earlier
from ..publish.directory import final_places
from ..publish.incremental import based_on
from . import patching
from .overrides import bound, is_of_a_library, overridden, wrapped
from .transformers import arguments_by_name, completing, overridden_in_model

_CALL: Final = "Trainer._save_checkpoint"
_LOGGERS: Final = (
    "transformers.trainer",
    "transformers.tokenization_utils_base",
    "transformers.processing_utils",
)
_STEPS: Final = (
    "_save_checkpoint",
    "_get_output_dir",
    "save_model",
    "_save",
    "_save_optimizer_and_scheduler",
    "_save_scaler",
    "_save_rng_state",
    "_rotate_checkpoints",
    "_sorted_checkpoints",
)
"""Methods of ``Trainer`` that know the checkpoint's folder."""
_UPLOADS: Final = {
    "WandbCallback": "_log_model",
    "MLflowCallback": "_log_artifacts",
    "NeptuneCallback": "_should_upload_checkpoint",
    "ClearMLCallback": "_log_model",
    "FlyteCallback": "sync_checkpoints",
    "DVCLiveCallback": "_log_model",
}
"""Attributes of transformers' own callbacks that say whether they upload what was saved."""
_UPLOADS_NOTHING: Final = (None, False, "false", "end")
_CHECKPOINT: Final = re.compile(r"checkpoint-(\d+)", re.ASCII)
_INCOMPLETE: Final = "checkpoint-is-incomplete.txt"
_log: Final = logging.getLogger("fastshard")

_running = threading.local()


def save_checkpoint(original: Callable[..., Any], trainer: Any, *args: Any, **kwargs: Any) -> Any:
    """Makes a checkpoint that appears when everything in it is written, complete or not at all.

    Raises the error of the checkpoint before, if that has failed.
    """
    wait_for_earlier()
    arguments = arguments_by_name(original)(trainer, *args, **kwargs)
    run = trainer._get_output_dir(trial=arguments["trial"])
    step = trainer.state.global_step
    with based_on(_newest_before(run, step) if patching.is_incremental() else None):
        return _save_checkpoint(original, trainer, os.path.join(run, f"checkpoint-{step}"), args, kwargs)


def _newest_before(run: str, step: int) -> str | None:
    """Returns the checkpoint that a new one may share files with: the newest one before it, or else the newest one. It
    need not be complete, as each of its files is compared."""
    try:
        found = {int(name[1]): name[0] for name in map(_CHECKPOINT.fullmatch, os.listdir(run)) if name}
    except FileNotFoundError:
        found = {}
    found.pop(step, None)
    # A path where nothing is: the first checkpoint has its frozen parameters apart, too.
    name = found[max(found, key=lambda number: (number < step, number))] if found else "checkpoint-0"
    return os.path.join(run, name)


def _save_checkpoint(
    original: Callable[..., Any], trainer: Any, directory: str, args: Any, kwargs: dict[str, Any]
) -> Any:
    asynchronous = patching.is_asynchronous()
    run = os.path.dirname(directory)
    reason = next(_reasons(trainer, directory), None) if asynchronous else None
    if reason is not None:
        count_on_the_spot(_CALL, reason)
    if reason is not None or not asynchronous:
        with background.synchronous(), completing(directory, trainer.args.should_save):
            return original(trainer, *args, **kwargs)
    os.makedirs(run, exist_ok=True)
    wanted = patching.manifest()
    with checkpoint(directory, call=_CALL, loggers=_LOGGERS, manifest=wanted) as made, _filling(made):
        try:
            result = original(trainer, *args, **kwargs)
        finally:
            moved = _name_final_place(trainer.state)
        if moved:
            trainer.state.save_to_json(os.path.join(made.path, "trainer_state.json"))
    return result


@contextlib.contextmanager
def _filling(made: Checkpoint) -> Iterator[None]:
    _running.checkpoint = made
    try:
        yield
    finally:
        _running.checkpoint = None


def _filled() -> Checkpoint | None:
    """Returns the checkpoint that this thread's ``Trainer`` is making."""
    return getattr(_running, "checkpoint", None)


def _name_final_place(state: Any) -> bool:
    """Lets the state name the best checkpoint by its final place. Returns whether it named another one."""
    best = state.best_model_checkpoint
    if not best or final_places(best) == best:
        return False
    state.best_model_checkpoint = final_places(best)
    return True


def run_folder(original: Callable[..., Any], trainer: Any, *args: Any, **kwargs: Any) -> Any:
    """While a checkpoint is made, returns the folder around it. Anybody else is going to look into the run
    folder, and waits for what is in flight."""
    made = _filled()
    if made is not None:
        return os.path.dirname(made.path)
    wait_for_earlier()
    return original(trainer, *args, **kwargs)


def rotate(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Removes older checkpoints when the one that is being made stands."""
    made = _filled()
    if made is None:
        return original(*args, **kwargs)
    made.then(functools.partial(original, *map(_final, args), **{n: _final(v) for n, v in kwargs.items()}))
    return None


def rotate_by_method(original: Callable[..., Any], trainer: Any, *args: Any, **kwargs: Any) -> Any:
    """Does the same for the method of older versions, with the trainer's state as it is now."""
    if _filled() is None:
        return original(trainer, *args, **kwargs)
    still = object.__new__(type(trainer))
    vars(still).update(vars(trainer), state=copy.copy(trainer.state))
    _name_final_place(still.state)
    return rotate(original, still, *args, **kwargs)


def _final(argument: object) -> object:
    return final_places(argument) if isinstance(argument, str) else argument


def after_checkpoints(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls the original when no checkpoint is in flight any more."""
    wait_for_earlier()
    return original(*args, **kwargs)


def train(original: Callable[..., Any], trainer: Any, *args: Any, **kwargs: Any) -> Any:
    """Trains, and returns when all checkpoints stand. Raises the error of one that has failed."""
    wait_for_earlier()
    try:
        result = original(trainer, *args, **kwargs)
    except BaseException:
        try:
            wait_for_earlier()
        except Exception as error:
            _log.error("a checkpoint that was in flight when training failed has failed, too: %r", error)
        raise
    wait_for_earlier()
    return result


def _reasons(trainer: Any, directory: str) -> Iterator[str]:
    """Yields why a checkpoint is to stand when the call returns: somebody's own code may look at it."""
    from transformers.utils.import_utils import is_sagemaker_mp_enabled, is_torch_xla_available

    options = trainer.args
    if options.push_to_hub and getattr(options.hub_strategy, "value", None) != "end":
        yield "push_to_hub=True"
    if options.world_size > 1 or is_torch_xla_available() or is_sagemaker_mp_enabled():
        yield "several processes save together"
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        yield "DeepSpeed or FSDP saves"
    if os.path.islink(directory) or os.path.exists(os.path.join(directory, _INCOMPLETE)):
        yield "the folder is a link, or was made for a checkpoint on a signal"
    if wrapped(bound("safetensors.torch", "save_file"), bound("torch", "save")):
        yield "somebody else's save_file or torch.save is in place"
    own = [overridden(trainer, *_STEPS), overridden(trainer.state, "save_to_json")]
    own += [f"{type(found).__name__}.on_save" for found in _callbacks(trainer)]
    own += [
        overridden(saved, "save_pretrained", "_save_pretrained", "save_vocabulary")
        for saved in _texts(trainer)
    ]
    for model in _models(trainer):
        own += [overridden(model, "save_pretrained"), *overridden_in_model(model)]
    yield from (f"{name} may look at what was saved" for name in own if name)


def _callbacks(trainer: Any) -> Iterator[Any]:
    """Yields callbacks that may look at a checkpoint."""
    from transformers import TrainerCallback

    for callback in trainer.callback_handler.callbacks:
        method = getattr(callback, "on_save", None)
        if getattr(method, "__func__", method) is TrainerCallback.on_save or method is None:
            continue
        if is_of_a_library(method):
            switch = _UPLOADS.get(type(callback).__name__)
            said = getattr(callback, switch, True) if switch else True
            if getattr(said, "value", said) in _UPLOADS_NOTHING:
                continue
        yield callback


def _texts(trainer: Any) -> Iterator[Any]:
    """Yields tokenizers and processors that are saved with the model, and their parts."""
    for holder in (trainer, getattr(trainer, "data_collator", None)):
        for name in ("processing_class", "tokenizer"):
            found = vars(holder).get(name) if hasattr(holder, "__dict__") else None
            if found is not None:
                yield found
                yield from (value for value in vars(found).values() if hasattr(value, "save_pretrained"))


def _models(trainer: Any) -> Iterator[Any]:
    """Yields the model, and what its wrappers hold."""
    model = trainer.model
    while model is not None:
        if hasattr(model, "save_pretrained"):
            yield model
        inner = vars(model).get("_modules", {})
        model = inner.get("module") or inner.get("_orig_mod")
