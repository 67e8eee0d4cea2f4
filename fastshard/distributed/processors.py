# SPDX-License-Identifier: Apache-2.0
"""How many threads write for one of several ranks that save at once on a machine."""

from __future__ import annotations

import os
from typing import Final

from torch import distributed

from ..engine.engine import Options
from ..engine.pipeline import How

_VARIABLES: Final = (
    "LOCAL_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "MPI_LOCALNRANKS",
    "SLURM_NTASKS_PER_NODE",
)
"""Of torchrun, Open MPI, MPICH and Slurm: the ranks on this machine."""


def shared_by_ranks(how: How) -> How:
    """Returns the same with this rank's part of the processors, unless the caller has chosen an engine.

    Threads of all ranks on all processors take turns, and those that store into mappings take twice the time of those
    that write (DESIGN.md, "Write paths").
    """
    if how.engine is not None:
        return how
    most = Options().writers
    threads = max(1, (os.cpu_count() or most) // ranks_here())
    return how if threads >= most else how._replace(engine=Options(threads=threads))


def ranks_here() -> int:
    """Returns how many ranks there are on this machine, or on all if nobody says that."""
    for variable in _VARIABLES:
        text = os.environ.get(variable, "")
        if text.isdecimal() and int(text):
            return int(text)
    known = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if known else 1
