# SPDX-License-Identifier: Apache-2.0
"""The checkpoints of a run: which there are, which of them are complete, and which are to be kept.

A run is a folder with folders whose names end with the number of a step, as ``Trainer`` makes ``checkpoint-500``. The
newest checkpoint is the one with the largest number. What complete means is told by
:func:`fastshard.tools.structure.problems_of`.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Final

from ..publish.hidden_names import PREFIX
from .structure import problems_of, trainer_state

CHECKPOINT_PREFIX: Final = "checkpoint-"
"""What ``Trainer`` calls its checkpoints, before the number."""
_DELETED: Final = ".deleted"
_LATEST: Final = ("latest", "latest_checkpointed_iteration.txt")
"""Texts of DeepSpeed and Megatron that say which checkpoint a run goes on from."""
_MAX_LATEST_NBYTES: Final = 256


@dataclass(frozen=True)
class RunCheckpoint:
    """A checkpoint of a run."""

    name: str
    path: str
    step: int
    problems: tuple[str, ...] = field(default=(), compare=False)
    """Why it is not complete."""

    @property
    def complete(self) -> bool:
        return not self.problems


@dataclass(frozen=True)
class Pruned:
    """What :func:`prune_checkpoints` has done."""

    kept: dict[str, str]
    """Of each checkpoint that was kept, by its path, the reason."""
    deleted: list[str]
    """Paths of those that were deleted or, with ``dry_run``, would have been."""


def list_checkpoints(run: str | os.PathLike[str], *, prefix: str = CHECKPOINT_PREFIX) -> list[RunCheckpoint]:
    """Returns the checkpoints of a run, in the order of their steps, and whether they are complete.

    No tensors are read: a run of many large checkpoints takes milliseconds. ``fastshard.verify`` reads them.

    Args:
        run: The folder of the run.
        prefix: What the names of checkpoints have before the number, as ``"step-"`` or ``"global_step"``.

    Raises ``OSError`` if the run's folder cannot be read.
    """
    return [
        found for found in map(_looked_at, named_checkpoints(os.fspath(run), prefix)) if found is not None
    ]


def latest_checkpoint(run: str | os.PathLike[str], *, prefix: str = CHECKPOINT_PREFIX) -> str | None:
    """Returns the path of the newest complete checkpoint of a run; ``None`` if there is none.

    Takes the arguments of :func:`list_checkpoints`.
    """
    for checkpoint in reversed(named_checkpoints(os.fspath(run), prefix)):
        found = _looked_at(checkpoint)
        if found is not None and found.complete:
            return found.path
    return None


def named_checkpoints(run: str, prefix: str) -> list[RunCheckpoint]:
    """Returns the folders of a run that are named as checkpoints, in the order of their steps."""
    pattern = re.compile(rf"{re.escape(prefix)}(\d{{1,18}})", re.ASCII)
    found = []
    with os.scandir(run) as entries:
        for entry in entries:
            match = pattern.fullmatch(entry.name)
            if match is not None and entry.is_dir():
                found.append(RunCheckpoint(entry.name, os.path.join(run, entry.name), int(match[1])))
    return sorted(found, key=lambda checkpoint: (checkpoint.step, checkpoint.name))


def _looked_at(checkpoint: RunCheckpoint) -> RunCheckpoint | None:
    """Returns the checkpoint with its problems; ``None`` if somebody has deleted it meanwhile."""
    try:
        problems = problems_of(checkpoint.path)
    except FileNotFoundError:
        return None
    except OSError as error:
        problems = [str(error.strerror)]
    return RunCheckpoint(checkpoint.name, checkpoint.path, checkpoint.step, tuple(problems))


def prune_checkpoints(
    run: str | os.PathLike[str],
    *,
    keep_last: int | None = None,
    keep_every: int | None = None,
    keep: Collection[str] = (),
    incomplete: bool = False,
    durable: bool = False,
    dry_run: bool = False,
    prefix: str = CHECKPOINT_PREFIX,
) -> Pruned:
    """Deletes checkpoints of a run that need not be kept. Training code calls it after a save.

    Only complete checkpoints count. So while the newest one is not complete, whether it is being written or its
    save was killed, the older ones are kept in its place, and the last complete one is never deleted. Also kept are
    the one that was written last, as an earlier run may have left larger numbers, the best checkpoint that ``Trainer`` names, those that links or a text ``latest`` in the run's folder lead to, and
    those that files of a kept one are symbolic links into. A checkpoint that files of another one are hard links
    to may go: the other one keeps its bytes.

    A checkpoint vanishes by one rename, so it is never seen in part. What a kill leaves is hidden, and removed by the
    next call.

    Args:
        run: The folder of the run.
        keep_last: Keep so many of the newest complete ones. Default: one.
        keep_every: Keep also those whose step is a multiple of this.
        keep: Names of further ones to be kept.
        incomplete: Also delete those that are not complete and older than the newest complete one.
        durable: Delete nothing before those that ``keep_last`` keeps are on stable storage.
        dry_run: Delete nothing, and say what would be deleted.
        prefix: As in :func:`list_checkpoints`.

    Raises ``ValueError`` for numbers below one, or if neither is given, and ``OSError`` for what cannot be deleted.
    """
    if keep_last is None and keep_every is None:
        raise ValueError("keep_last or keep_every is needed, to say which checkpoints are to be kept")
    for name, value in (("keep_last", keep_last), ("keep_every", keep_every)):
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
    folder = os.fspath(run)
    found = list_checkpoints(folder, prefix=prefix)
    complete = [checkpoint for checkpoint in found if checkpoint.complete]
    last = complete[-(keep_last or 1) :]
    kept = _kept(folder, found, complete, last, keep_every, keep, incomplete)
    going = [checkpoint for checkpoint in found if checkpoint.name not in kept]
    if not dry_run:
        if durable and going:
            for checkpoint in last:
                _sync(checkpoint.path)
        _remove_leftovers(folder)
        for checkpoint in going:
            _delete(folder, checkpoint.name)
    return Pruned(
        {checkpoint.path: kept[checkpoint.name] for checkpoint in found if checkpoint.name in kept},
        [checkpoint.path for checkpoint in going],
    )


def _kept(
    run: str,
    found: list[RunCheckpoint],
    complete: list[RunCheckpoint],
    last: list[RunCheckpoint],
    keep_every: int | None,
    keep: Collection[str],
    incomplete: bool,
) -> dict[str, str]:
    """Returns the names of those that are kept, and why."""
    if not complete:
        return {checkpoint.name: "none is complete" for checkpoint in found}
    newest = complete[-1]
    written = max(complete, key=lambda checkpoint: (_written(checkpoint), checkpoint.step))
    named = {os.path.basename(os.path.normpath(name)) for name in keep}
    best = _best(complete)
    led_to = _led_to(run)
    kept: dict[str, str] = {}
    for checkpoint in found:
        if checkpoint in last:
            reason = "the newest" if checkpoint is newest else "one of the last"
        elif checkpoint is written:
            reason = "the last that was written"
        elif not checkpoint.complete and (checkpoint.step >= newest.step or not incomplete):
            reason = "not complete"
        elif keep_every is not None and checkpoint.complete and checkpoint.step % keep_every == 0:
            reason = f"a multiple of {keep_every}"
        elif checkpoint.name in named:
            reason = "named"
        elif checkpoint.name == best:
            reason = "the best"
        elif checkpoint.name in led_to:
            reason = f"{led_to[checkpoint.name]} leads to it"
        elif os.path.islink(checkpoint.path):
            reason = "a link"
        else:
            continue
        kept[checkpoint.name] = reason
    _add_targets(run, found, kept)
    return kept


def _written(checkpoint: RunCheckpoint) -> float:
    with contextlib.suppress(OSError):
        return os.stat(checkpoint.path).st_mtime
    return 0.0


def _best(complete: Iterable[RunCheckpoint]) -> str | None:
    """Returns the name of the best checkpoint, as the newest one says."""
    named = None
    for checkpoint in complete:
        with contextlib.suppress(OSError, ValueError):
            best = trainer_state(checkpoint.path).get("best_model_checkpoint")
            named = os.path.basename(os.path.normpath(best)) if isinstance(best, str) and best else named
    return named


def _led_to(run: str) -> dict[str, str]:
    """Returns the names of what links and texts in the run's folder lead to, each with the name of the link."""
    found = {}
    with os.scandir(run) as entries:
        for entry in entries:
            if entry.is_symlink():
                target = os.path.realpath(entry.path)
                if os.path.dirname(target) == os.path.realpath(run):
                    found[os.path.basename(target)] = entry.name
    for name in _LATEST:
        with contextlib.suppress(OSError), open(os.path.join(run, name), "rb") as file:
            found[os.path.basename(os.fsdecode(file.read(_MAX_LATEST_NBYTES).strip()))] = name
    return found


def _add_targets(run: str, found: list[RunCheckpoint], kept: dict[str, str]) -> None:
    """Also keeps those that symbolic links in kept ones lead into."""
    above = os.path.realpath(run)
    names = {checkpoint.name for checkpoint in found}
    ahead = list(kept)
    while ahead:
        name = ahead.pop()
        for path, folders, files in os.walk(os.path.join(run, name)):
            for link in (os.path.join(path, inner) for inner in (*folders, *files)):
                if not os.path.islink(link):
                    continue
                target = os.path.relpath(os.path.realpath(link), above).partition(os.sep)[0]
                if target in names and target not in kept:
                    kept[target] = f"{name} has links into it"
                    ahead.append(target)


def _delete(run: str, name: str) -> None:
    hidden = os.path.join(run, f"{PREFIX}{name}{_DELETED}")
    try:
        os.rename(os.path.join(run, name), hidden)
    except FileNotFoundError:
        return  # by another process
    _remove(hidden)


def _remove_leftovers(run: str) -> None:
    """Removes what an earlier call has renamed, and could not remove before it was killed."""
    with os.scandir(run) as entries:
        left = [e.path for e in entries if e.name.startswith(PREFIX) and e.name.endswith(_DELETED)]
    for path in left:
        _remove(path)


def _remove(path: str) -> None:
    while os.path.lexists(path):
        with contextlib.suppress(FileNotFoundError):  # another process removes it, too
            shutil.rmtree(path)


def _sync(folder: str) -> None:
    """Returns when all files of a folder, and its name, are on stable storage."""
    for path, _, files in os.walk(folder):
        for place in (*(os.path.join(path, name) for name in files), path):
            fd = os.open(place, os.O_RDONLY | os.O_NONBLOCK)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
    fd = os.open(os.path.dirname(os.path.abspath(folder)), os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
