# SPDX-License-Identifier: Apache-2.0
"""The simulated driver runs the pack kernel, and sees its mistakes."""

from __future__ import annotations

import driver_tools
import pytest
from driver_tools import ENTRY_NBYTES, GATHER, Host, Kernel, pack_dim, pack_entry, pattern
from simcuda import POISON, Result, SimCuda

library, driver, sim = driver_tools.library, driver_tools.driver, driver_tools.sim


def test_pack_kernel(sim: SimCuda) -> None:
    data = pattern(64 << 10)
    stream, source = sim.stream(0), sim.alloc(0, len(data))
    with Host(sim, 64 << 10) as host, sim.current(0), Kernel(sim) as kernel:
        sim.enqueue_write(stream, source, data, delay=0.01)
        entries = [
            pack_entry(source + 64, 8192, 500, 8, GATHER, 1),
            pack_entry(source + 1, 20000, 999, 1),
            pack_dim(24, 500),
        ]
        host.memory[: 2 * ENTRY_NBYTES + 24] = b"".join(entries)
        out = host.device_address(4096)
        with sim.paused():
            assert kernel.launch(stream, host.device_address(), 2, out) == Result.SUCCESS
            assert host.memory[4096 + 8192 : 4096 + 8192 + 4000] == bytes([POISON]) * 4000
        sim.synchronize(stream)
        rows = b"".join(data[64 + 24 * i : 72 + 24 * i] for i in range(500))
        assert host.memory[4096 + 8192 : 4096 + 8192 + 4001] == rows + b"\0"
        assert host.memory[4096 + 20000 : 4096 + 21000] == data[1:1000] + b"\0"
        assert sim.violations() == []

        # The table is read when the kernel runs.
        with sim.paused():
            assert kernel.launch(stream, host.device_address(), 1, out) == Result.SUCCESS
            host.memory[:ENTRY_NBYTES] = pack_entry(source, 0, 16, 16)
        sim.synchronize(stream)
        assert host.memory[4096 : 4096 + 16] == data[:16]

        # Into device memory.
        block = sim.alloc(0, 64)
        host.memory[:ENTRY_NBYTES] = pack_entry(source, 16, 16, 16)
        assert kernel.launch(stream, host.device_address(), 1, block) == Result.SUCCESS
        sim.synchronize(stream)
        assert sim.read(block, 64) == bytes([POISON]) * 16 + data[:16] + bytes([POISON]) * 32
        assert sim.launches() == {0: 3}
    assert sim.violations() == []


@pytest.mark.parametrize(
    ("mistake", "result"),
    [
        ("host address", Result.ILLEGAL_ADDRESS),
        ("other device", Result.ILLEGAL_ADDRESS),
        ("beyond allocation", Result.ILLEGAL_ADDRESS),
        ("other device's source", Result.ILLEGAL_ADDRESS),
        ("into a source", Result.ILLEGAL_ADDRESS),
        ("beyond slot", Result.ILLEGAL_ADDRESS),
        ("unit", Result.MISALIGNED_ADDRESS),
    ],
)
def test_kernel_faults(sim: SimCuda, mistake: str, result: Result) -> None:
    stream, source, foreign = sim.stream(0), sim.alloc(0, 4096), sim.alloc(1, 4096)
    with Host(sim, 8192) as host, sim.current(0), Kernel(sim) as kernel:
        table, out = host.device_address(), host.device_address(4096)
        host.memory[:ENTRY_NBYTES] = {
            "beyond allocation": pack_entry(source + 4000, 0, 112, 16),
            "other device's source": pack_entry(foreign, 0, 112, 16),
            "into a source": pack_entry(source, 4096, 112, 16),
            "beyond slot": pack_entry(source, 4000, 112, 16),
            "unit": pack_entry(source + 4, 0, 256, 16),
        }.get(mistake, pack_entry(source, 0, 256, 16))
        if mistake == "host address":
            out = host.address
        if mistake == "other device":
            out = foreign
        if mistake == "into a source":
            out = sim.alloc(0, 4096)
        assert kernel.launch(stream, table, 1, out, (128, 1, 1)) == Result.INVALID_VALUE
        before = len(sim.violations())
        assert kernel.launch(stream, table, 1, out) == Result.SUCCESS
        assert sim.call("cuStreamSynchronize", stream) == result
        assert len(sim.violations()) == before + 1
