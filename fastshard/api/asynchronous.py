# SPDX-License-Identifier: Apache-2.0
"""The asynchronous forms of the savers: the same function, with the same arguments, in a block of
:func:`fastshard.asynchronous`."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, Final

from ..engine.background import asynchronous
from ..engine.figures import stats
from ..engine.future import SaveFuture, ended_save
from . import archive, hub, saving, sharded_save

_OWN: Final = tuple(inspect.signature(asynchronous).parameters.values())


def _asynchronous(function: Callable[..., Any]) -> Callable[..., SaveFuture]:
    """Returns the asynchronous form of a saver."""

    @functools.wraps(function)
    def start(
        *args: Any,
        snapshot: str = "auto",
        wait_staged: bool = True,
        check_unchanged: bool = False,
        **kwargs: Any,
    ) -> SaveFuture:
        earlier = stats()
        with asynchronous(
            snapshot=snapshot, wait_staged=wait_staged, check_unchanged=check_unchanged
        ) as saves:
            saves.call = id(sys._getframe())
            function(*args, **kwargs)
        newest = stats()
        *before, last = saves.futures or [ended_save(None if newest is earlier else newest)]
        for future in before:
            future.result()
        return last

    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    start.__name__ = f"{function.__name__}_async"
    start.__qualname__ = start.__name__
    start.__module__ = __name__
    start.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*parameters, *_OWN], return_annotation=SaveFuture
    )
    start.__doc__ = f"""Starts what :func:`{function.__name__}` does, and returns a :class:`SaveFuture`.

    By default the call returns when its snapshot is complete: the tensors may then be changed, and the file holds
    what they were. What is wrong with the arguments is raised here; what fails later is raised by ``result()`` of the
    future, else by the next save of the same path or by :func:`fastshard.wait_all`, else it is logged when the
    process ends. The exit of Python waits for the save. Saves of one path appear in the order of their calls.
    What cannot be written later (small archives, file-like objects and what else is left to ``torch.save``) has
    been written when the call returns.

    Args:
        snapshot, wait_staged, check_unchanged: as for :class:`fastshard.asynchronous`.
        engine: ``Options(max_in_flight=..., snapshot_budget=...)`` limit how many saves are in flight, and the
            memory of their snapshots: the call waits until there is room.

    The other arguments and the errors are those of :func:`{function.__name__}`. There is no progress bar; the future
    has ``progress()``.
    """
    return start


save_file_async = _asynchronous(saving.save_file)
save_files_async = _asynchronous(saving.save_files)
save_model_async = _asynchronous(saving.save_model)
save_torch_state_dict_async = _asynchronous(hub.save_torch_state_dict)
save_torch_model_async = _asynchronous(hub.save_torch_model)
save_sharded_state_async = _asynchronous(sharded_save.save_sharded_state)
torch_save_async = _asynchronous(archive.torch_save)
