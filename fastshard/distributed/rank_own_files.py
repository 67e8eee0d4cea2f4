# SPDX-License-Identifier: Apache-2.0
"""A save by many ranks in which each file has one writer, who also gives it its name.

There are shared filesystems on which a process may only rename what it has written itself, and on which a file may have
only one writer. There each rank writes whole files, into a hidden folder of its own, and puts them in place when all
ranks have reported; the first rank puts the index in place last, and removes old files in the same moment. The folder
does not change at once: see :func:`fastshard.save_distributed`.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from ..engine import background
from ..engine.pipeline import How, PathLike, PlannedFile, plan_file, write_files
from ..publish.directory import Replacement
from ..publish.record import Record
from .boxes import Boxes
from .group import Group
from .rank_plan import Plan, Told


class OwnFiles(NamedTuple):
    """What a rank has to write."""

    files: dict[str, list[str]]
    """Names of files, and of the tensors in them."""
    metadata: dict[str, str]
    """Of each file."""


def owned(plan: Plan, told: Sequence[Mapping[str, Told]]) -> list[OwnFiles]:
    """Gives each file to one of the ranks that have all of it, so that all write about as many bytes.

    Raises ``ValueError``, naming a tensor, if there is no such rank.
    """
    loads = [0] * len(told)
    shares: list[dict[str, list[str]]] = [{} for _ in told]
    sizes = {file.name: file.nbytes for file in plan.files}
    for file, names in sorted(plan.split.filename_to_tensors.items(), key=lambda item: -sizes[item[0]]):
        having = set(range(len(told)))
        for name in names:
            having &= {rank for rank in having if _has_all(told[rank].get(name))}
            if not having:
                raise ValueError(
                    f"writers_publish=True: no rank has all tensors of {file} whole, among them {name!r}; this way of "
                    "saving is for tensors that are not cut over ranks, and files that belong to one rank"
                )
        rank = min(having, key=lambda rank: loads[rank])
        loads[rank] += sizes[file]
        shares[rank][file] = names
    return [OwnFiles(share, plan.metadata) for share in shares]


def _has_all(told: Told | None) -> bool:
    return told is not None and (
        math.prod(told.shape) == 0 or told.boxes == [((0,) * len(told.shape), tuple(told.shape))]
    )


def write_own_files(
    group: Group,
    folder: str,
    task: OwnFiles,
    boxes: Mapping[str, Boxes],
    how: How,
    record: Callable[[str], Record] | None,
    last: Callable[[Replacement], None],
    stale: Callable[[str], bool],
) -> None:
    """Writes this rank's files and puts them in place, with what ``record`` says of them. ``last`` is called on the first
    rank to make the index."""
    change: Replacement | None = None
    try:
        with group.agreed():
            change = Replacement(folder, durable=how.durable)
            began = time.perf_counter()
            plans: dict[PathLike, PlannedFile] = {}
            for file, names in task.files.items():
                path = os.path.join(change.path, file)
                tensors = {name: boxes[name].whole() for name in names}
                plans[path] = plan_file(tensors, path, task.metadata, how)
            if plans:
                with background.synchronous():
                    write_files(plans, how, began, f"Saving {len(plans)} files")
                change.record = record and record(change.path)
        with group.agreed():  # one after the other, as only one at a time changes names
            change.publish()
            change.end(None)
            change = None
    except BaseException as error:
        if change is not None:
            change.end(error)
        raise

    def finish() -> None:
        with Replacement(folder, stale, durable=how.durable) as final:
            last(final)
            final.record = record and record(final.path)
            final.publish()

    group.from_first(finish)
