# SPDX-License-Identifier: Apache-2.0
"""fastshard as a ``CheckpointIO`` of Lightning, which is Lightning's own plug-in point for savers.

``lightning`` and ``pytorch_lightning`` with ``lightning_fabric`` are the same code under two names. A plugin has to
be an instance of the ``CheckpointIO`` of the one that is used, so the class here is registered with those that are
there, and inherits from neither.

What Lightning's callbacks do around a save assumes that a checkpoint stands when the call has returned:

- ``ModelCheckpoint`` removes the checkpoint before the new one right after saving that. Here the removal waits until
  what was saved before it stands, and does not happen if that has failed: a kill never leaves a run without any.
- It asks whether a name is taken (:meth:`ModelCheckpoint.file_exists`), which it is while a save is on its way there.
  That method is given the answer (:func:`_answer_for_saves_in_flight`).
- Checkpoints are loaded (``ckpt_path="best"``) and handed over between processes: these calls wait.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from ..api.archive import torch_save
from ..api.asynchronous import torch_save_async
from ..base.living import Living
from ..engine.engine import Engine, Options, SaveFuture

if TYPE_CHECKING:
    from os import PathLike

_HOMES: Final = ("lightning.fabric", "lightning_fabric")
_CALLBACKS: Final = ("lightning.pytorch", "pytorch_lightning")
_HANDED_OVER: Final = ".temp.ckpt"
"""What a worker of ``ddp_spawn`` saves at its end, for the process that has started it."""
_log: Final = logging.getLogger("fastshard")


class _Removal(NamedTuple):
    """A checkpoint that is to be removed when these saves are complete."""

    path: str
    behind: tuple[SaveFuture, ...]


class FastshardCheckpointIO:
    """A Lightning ``CheckpointIO`` that writes checkpoints by :func:`fastshard.torch_save`.

    ``Trainer(plugins=[FastshardCheckpointIO()])`` or ``Fabric(plugins=[...])``. The files are those of ``torch.save``.
    Lightning's own plugin makes each in memory first and writes that. Paths of other filesystems than the
    local one (``s3://``) are left to Lightning's plugin, and so are the formats of strategies that do not ask
    a ``CheckpointIO`` (sharded FSDP, DeepSpeed).

    With ``asynchronous=True`` training goes on when the checkpoint's values are captured, and the file
    appears later, complete or not at all. ``load_checkpoint`` waits for a save of that path,
    ``remove_checkpoint`` takes effect when what was saved before it stands, and ``teardown`` (at the end of
    ``fit()``, ``test()``, ...) waits for all. If a save has failed, the next ``save_checkpoint`` or
    ``teardown`` raises its error, and the removals behind it do not happen. With
    ``ModelCheckpoint(save_last="link")`` the link leads nowhere until the file appears.

    Args:
        asynchronous: whether saves go on behind the training.
        snapshot: how values are captured, as for :func:`fastshard.torch_save_async`.
        durable: whether a save ends when file and directory are on stable storage.
        engine: which engine saves.
    """

    def __init__(
        self,
        asynchronous: bool = False,
        *,
        snapshot: str = "auto",
        durable: bool = False,
        engine: Engine | Options | None = None,
    ) -> None:
        register()
        self.asynchronous = asynchronous
        self._snapshot = snapshot
        self._how: dict[str, Any] = {"durable": durable, "engine": engine}
        self._pid = os.getpid()
        self._saves: list[SaveFuture] = []
        """Saves that are under way, or whose error nobody was told yet."""
        self._newest: dict[str, SaveFuture] = {}
        """By path, the save that is to appear there last."""
        self._removals: list[_Removal] = []
        self._errors: list[BaseException] = []
        """Of removals."""
        self._turn = (
            threading.RLock()
        )  # a signal handler may save, so its thread must be able to take it again
        if asynchronous:
            _plugins.add(self)
            _answer_for_saves_in_flight()

    def __reduce__(self) -> tuple[Callable[..., FastshardCheckpointIO], tuple[object, ...]]:
        """A copy, as in a worker process, has the options; the saves in flight stay with the original."""
        return _made, (type(self), self.asynchronous, self._snapshot, self._how)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | PathLike[str], storage_options: Any = None
    ) -> None:
        """Saves a checkpoint; asynchronously, if that is asked for, and returns when its values are captured.

        Raises what an earlier save has failed with, if nobody was told, and what :func:`fastshard.torch_save`
        raises. A symbolic link is replaced, as in Lightning.
        """
        if storage_options is not None:
            raise TypeError(
                "`Trainer.save_checkpoint(..., storage_options=...)` with `storage_options` arg"
                f" is not supported for `{type(self).__name__}`. Please implement your custom `CheckpointIO`"
                " to define how you'd like to use `storage_options`."
            )
        self._raise_lost()
        local = _local(path)
        if local is None:
            return _theirs().save_checkpoint(checkpoint, path)  # type: ignore[no-any-return]
        os.makedirs(os.path.dirname(local), exist_ok=True)
        with self._turn:
            self._removals[:] = [removal for removal in self._removals if removal.path != local]
        if os.path.islink(local):
            return self._replace_link(checkpoint, local)
        if not self.asynchronous or os.path.basename(local) == _HANDED_OVER:
            return torch_save(checkpoint, local, **self._how)
        future = torch_save_async(checkpoint, local, snapshot=self._snapshot, **self._how)
        self._saves.append(future)
        self._newest[os.path.realpath(local)] = future

    def load_checkpoint(self, path: str | PathLike[str], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Loads a checkpoint as Lightning's own plugin does, when a save of that path has ended. Raises what that
        has failed with."""
        local = _local(path)
        future = self._newest.get(os.path.realpath(local)) if local and self._in_this_process() else None
        if future is not None:
            future.wait()
            if not _stands(future):
                self._raise_lost()
        loaded: dict[str, Any] = _theirs().load_checkpoint(path, *args, **kwargs)
        return loaded

    def remove_checkpoint(self, path: str | PathLike[str]) -> None:
        """Removes a checkpoint when everything that was saved before this call stands.

        If one of these saves fails, the checkpoint is kept.
        """
        self._forget_complete()
        behind = tuple(self._saves)
        if not behind:
            return _theirs().remove_checkpoint(path)  # type: ignore[no-any-return]
        self._removals.append(_Removal(_local(path) or os.fspath(path), behind))
        for future in behind:
            future.add_done_callback(self._remove_what_can_go)

    def teardown(self) -> None:
        """Waits for all saves and removals, and raises what one of them has failed with."""
        if not self._in_this_process():
            return
        for future in tuple(self._saves):
            future.wait()
        self._remove_what_can_go()
        self._raise_lost()

    def in_flight(self, path: str | PathLike[str]) -> bool:
        """Returns whether a save of that path is under way."""
        local = _local(path)
        future = self._newest.get(os.path.realpath(local)) if local and self._in_this_process() else None
        return future is not None and not future.done()

    def _in_this_process(self) -> bool:
        """Returns whether there is anything to wait for; the saves of the process that has forked this one are
        not."""
        if self._pid != os.getpid():
            self._pid, self._turn = os.getpid(), threading.RLock()
            self._saves, self._newest, self._removals, self._errors = [], {}, [], []
        return bool(self._saves or self._removals or self._errors)

    def _replace_link(self, checkpoint: dict[str, Any], local: str) -> None:
        """Saves where a link is. What it leads to stays as it is, which ``torch_save`` would write to."""
        with tempfile.TemporaryDirectory(prefix=".fastshard-link-", dir=os.path.dirname(local)) as folder:
            new = os.path.join(folder, os.path.basename(local))
            torch_save(checkpoint, new, **self._how)
            os.replace(new, local)

    def _forget_complete(self) -> None:
        if self._in_this_process():
            self._saves[:] = [future for future in self._saves if not _stands(future)]
            for path, future in list(self._newest.items()):
                if future.done():
                    self._newest.pop(path, None)

    def _raise_lost(self) -> None:
        """Raises the first error that nobody was told, and logs the others."""
        self._forget_complete()
        with self._turn:
            failed = [future for future in self._saves if future.done()]
            self._saves[:] = [future for future in self._saves if future not in failed]
            errors, self._errors = self._errors, []
        for future in failed:
            try:
                future.result()
            except BaseException as error:
                errors.append(error)
        for other in errors[1:]:
            _log.error("a checkpoint was not saved: %s", other)
        try:
            if errors:
                raise errors[0]
        finally:
            errors.clear()  # their tracebacks have this frame

    def _remove_what_can_go(self, _: object = None) -> None:
        """Removes what waits for saves that are complete now."""
        with self._turn:
            for removal in tuple(self._removals):
                if not all(future.done() for future in removal.behind):
                    continue
                self._removals.remove(removal)
                if not all(map(_stands, removal.behind)):
                    _log.warning("%s is kept, as a checkpoint after it was not saved", removal.path)
                    continue
                try:
                    _theirs().remove_checkpoint(removal.path)
                except Exception as error:
                    self._errors.append(error)


def register() -> None:
    """Makes the class a ``CheckpointIO`` of every Lightning that is imported; imports one if none is."""
    homes = [str(home) for home in _HOMES if home in sys.modules] or [_installed()]
    for home in homes:
        importlib.import_module(f"{home}.plugins").CheckpointIO.register(FastshardCheckpointIO)


def _installed() -> str:
    """Imports the first Lightning that is installed and returns the name of its module."""
    missing: ModuleNotFoundError | None = None
    for home in _HOMES:
        try:
            importlib.import_module(home)
            return home
        except ModuleNotFoundError as error:
            missing = error
    raise ModuleNotFoundError("Lightning is not installed: pip install lightning") from missing


def _theirs() -> Any:
    """Returns Lightning's own plugin."""
    home = next((home for home in _HOMES if home in sys.modules), None) or _installed()
    return importlib.import_module(f"{home}.plugins").TorchCheckpointIO()


def _local(path: str | PathLike[str]) -> str | None:
    """Returns the absolute path of a file on this machine; ``None`` if fsspec finds it elsewhere."""
    from fsspec.core import url_to_fs
    from fsspec.implementations.local import LocalFileSystem

    filesystem, found = url_to_fs(str(path))
    return os.path.abspath(found) if isinstance(filesystem, LocalFileSystem) else None


def _made(kind: type[FastshardCheckpointIO], asynchronous: bool, snapshot: str, how: dict[str, Any]) -> Any:
    return kind(asynchronous, snapshot=snapshot, **how)


def _stands(future: SaveFuture) -> bool:
    """Returns whether the save has ended and its file is in place. Whoever asks has not been told its error."""
    return future.done() and future._error is None


_plugins: Final[Living[FastshardCheckpointIO]] = Living()
"""The asynchronous ones."""


def _answer_for_saves_in_flight() -> None:
    """Lets ``ModelCheckpoint.file_exists`` say of a checkpoint that is being saved that it exists."""
    for home in _CALLBACKS:
        callbacks = sys.modules.get(f"{home}.callbacks.model_checkpoint")
        kind = getattr(callbacks, "ModelCheckpoint", None)
        original = vars(kind).get("file_exists") if kind else None
        if original is None or hasattr(original, "_fastshard"):
            continue

        @functools.wraps(original)
        def file_exists(self: Any, filepath: Any, trainer: Any, original: Any = original) -> Any:
            if any(plugin.in_flight(filepath) for plugin in _plugins.all()):  # on the rank that saves
                return trainer.strategy.reduce_boolean_decision(True, all=False)
            return original(self, filepath, trainer)

        file_exists._fastshard = True  # type: ignore[attr-defined]
        kind.file_exists = file_exists  # type: ignore[union-attr]
