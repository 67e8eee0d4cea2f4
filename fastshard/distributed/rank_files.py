# SPDX-License-Identifier: Apache-2.0
"""The files of a save that many ranks fill: the first rank makes them and lets them appear."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Final

import torch

from ..engine import planning
from ..engine.engine import engine_for
from ..engine.pipeline import How, PlannedFile, encoded_path
from ..engine.plan import FilePlan, ForeignFile, Place, place_of
from ..engine.tensors import check_dtype
from ..publish.directory import Replacement, name_final_places
from ..publish.folder import Named
from ..publish.hidden_names import final_places, folder_of_ranks
from ..publish.record import Record
from .boxes import Boxes
from .rank_plan import File, Piece

_WHAT_STAYS: Final = re.compile(
    r"[;:,]? *\(?what had been written to .* before the error remains in place\)?", re.DOTALL
)


class RankFiles:
    """Is made on the first rank only. The others get :attr:`path`, and write to files in it.

    Everything lies in a hidden folder until :meth:`publish`, which puts all files in place in one moment and removes
    those whose names satisfy ``stale``; see :class:`fastshard.publish.directory.Replacement`. A missing ``folder`` is
    made. Whatever a killed save of the same folder has left is removed.
    """

    def __init__(self, folder: str, stale: Callable[[str], bool], *, durable: bool) -> None:
        self._change = Replacement(os.path.abspath(folder), stale, create=True, durable=durable)
        self.path: Final = os.path.join(self._change.path, folder_of_ranks())
        try:
            os.mkdir(self.path)
        except BaseException as error:
            self.end(error)
            raise

    def make(self, files: Iterable[File], how: How) -> None:
        """Makes files with their headers, and reserves the space of everything."""
        plans = []
        for file in files:
            path = os.path.join(self.path, file.name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            plans.append(FilePlan(encoded_path(path), file.header, [], file.nbytes))
        if plans:
            engine_for(how.engine).submit(
                plans, keep_alive=None, durable=how.durable, keep_cached=how.keep_cached
            ).result()

    def write_text(self, name: str, text: str) -> None:
        """Makes a small file."""
        path = os.path.join(self.path, name)
        with Named(path), open(path, "w") as file:
            file.write(text)

    def publish(self, record: Callable[[str], Record] | None = None) -> None:
        """Lets all files appear, with what ``record`` says of them. An error that is raised when they stand has ``published``."""
        for name in os.listdir(self.path):
            os.rename(os.path.join(self.path, name), os.path.join(self._change.path, name))
        os.rmdir(self.path)
        self._change.record = record and record(self._change.path)
        self._change.publish()

    def end(self, error: BaseException | None) -> None:
        """Removes what is hidden. If the save has failed with ``error``, that names final places afterwards."""
        self._change.end(error)


def explain(error: BaseException, folder: str) -> None:
    """Lets an error of writing to files in :attr:`RankFiles.path` name their final places in ``folder``."""
    if isinstance(error, OSError) and error.strerror is not None:
        # The engine says what stays in a file that is not its own; here it goes.
        error.strerror = final_places(_WHAT_STAYS.sub("", error.strerror))
        error.args = (error.errno, error.strerror)  # what is pickled
    name_final_places(error, folder)


def planned(
    path: str, nbytes: int, pieces: Iterable[Piece], boxes: Mapping[str, Boxes], how: How
) -> PlannedFile:
    """Plans what this rank writes of a file that the first rank has made at ``path``."""
    dtype = check_dtype(how.dtype)
    parts: dict[str, torch.Tensor] = {}
    places: dict[str, Place] = {}
    for piece in pieces:
        shape, kind, have = boxes[piece.name]
        offsets, tensor = have[piece.box]
        if piece.rows is not None:
            tensor = tensor.narrow(0, piece.first, piece.rows)
            offsets = (offsets[0] + piece.first, *offsets[1:])
        name = piece.name if piece.name not in parts else f"{piece.name} from {offsets}"
        itemsize = dtype.itemsize if dtype is not None and kind.is_floating_point else kind.itemsize
        parts[name] = tensor
        places[name] = place_of(shape, offsets, tuple(tensor.shape), itemsize, piece.begin)
    layout = planning.lay_out(parts, allow_strided=True, dtype=dtype)
    in_order = [places[name] for name in layout.names]
    return PlannedFile(FilePlan(ForeignFile(encoded_path(path)), b"", layout.items, nbytes, in_order), layout)
