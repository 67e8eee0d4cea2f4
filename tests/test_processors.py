# SPDX-License-Identifier: Apache-2.0
"""How many threads write for a rank: its part of the machine's processors."""

from __future__ import annotations

import os

import pytest

from fastshard.distributed.processors import _VARIABLES, ranks_here, shared_by_ranks
from fastshard.engine.engine import Options
from fastshard.engine.pipeline import How


@pytest.fixture(autouse=True)
def of_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in _VARIABLES:
        monkeypatch.delenv(variable, raising=False)


@pytest.mark.parametrize(
    ("ranks", "cpus", "usable", "threads"),
    [
        ("1", 8, 8, None),
        ("2", 8, 8, 4),
        ("8", 8, 8, 1),
        ("16", 8, 8, 1),
        ("8", 256, 256, None),  # as many as one process takes
        ("4", 16, 4, None),  # each rank has processors of its own
        ("", 8, 8, None),
        ("no number", 8, 8, None),
    ],
)
def test_a_rank_takes_its_part(
    monkeypatch: pytest.MonkeyPatch, ranks: str, cpus: int, usable: int, threads: int | None
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    monkeypatch.setattr(os, "cpu_count", lambda: cpus)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(usable))
    engine = shared_by_ranks(How()).engine
    assert engine == (None if threads is None else Options(threads=threads))


def test_what_the_caller_wants_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    how = How(engine=Options(threads=7))
    assert shared_by_ranks(how) is how


def test_without_a_group_there_is_one_rank() -> None:
    assert ranks_here() == 1
