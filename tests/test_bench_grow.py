# SPDX-License-Identifier: Apache-2.0
"""bench/grow.py: memory that is there only once it is used."""

from __future__ import annotations

import contextlib

import pytest

from fastshard.bench import grow

ZONES = """Node 0, zone      DMA
  pages free     10
        present  512
        managed  256
Node 0, zone   Normal
  per-node stats
      nr_free_cma  0
  pages free     262144
        boost    0
        present  1048576
        managed  786432
        protection: (0, 0)
Node 1, zone  Movable
  pages free     0
        present  0
        managed  0
"""


def test_memory_zones_in_a_line_each(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grow.mmap, "PAGESIZE", 4096)
        assert grow.zones(ZONES) == [
            "node 0 DMA: free 0.00 GiB, managed 0.00 GiB, present 0.00 GiB",
            "node 0 Normal: free 1.00 GiB, managed 3.00 GiB, present 4.00 GiB",
        ]
    assert grow.state(tmp_path)[0].startswith("memory ") and str(tmp_path) in grow.state(tmp_path)[-1]
    assert grow.state(tmp_path / "none")[-1].endswith("No such file or directory")


class Machine:
    """Whose memory grows by a little whenever somebody waits for it."""

    def __init__(self, limit: int, available: int) -> None:
        self.limit, self.available, self.slept = limit, available, 0.0

    def grows(self, seconds: float) -> None:
        self.slept += seconds
        self.available = min(self.limit, self.available + (2 << 20))


@pytest.mark.parametrize("limit, held", [(100, 9), (5, 5)])
def test_memory_is_touched_step_by_step(monkeypatch, limit, held, capsys):
    there = Machine(limit << 20, 3 << 20)
    touched = []

    @contextlib.contextmanager
    def touch(nbytes):
        assert nbytes <= min(4 << 20, there.available)
        there.available -= nbytes
        there.limit -= nbytes
        touched.append(nbytes)
        yield

    monkeypatch.setattr(grow, "touched", touch)
    monkeypatch.setattr(grow, "SPARED_NBYTES", 0)
    found = grow.grow(9 << 20, 4 << 20, lambda: there.available, there.grows)
    assert found == sum(touched) == held << 20
    assert (there.slept >= grow.PATIENCE_SECONDS) == (held < 9)
    assert capsys.readouterr().out.count("holding") == len(touched) > 1
