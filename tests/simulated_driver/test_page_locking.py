# SPDX-License-Identifier: Apache-2.0
"""The simulated driver page-locks what real ones do, and refuses what they refuse."""

from __future__ import annotations

import mmap
import os
import subprocess
from pathlib import Path

import driver_tools
import pytest
from driver_tools import PORTABLE, Host, register
from simcuda import Result, SimCuda, SimCudaError

READ_ONLY = 8

library, driver, sim = driver_tools.library, driver_tools.driver, driver_tools.sim


def test_registrations_that_are_too_large_or_too_many(sim: SimCuda) -> None:
    sim.set(registration_nbytes=8192, registrations=2)
    with pytest.raises(SimCudaError, match="OUT_OF_MEMORY"):
        Host(sim, 12288)
    with Host(sim, 8192), Host(sim, 4096):
        with pytest.raises(SimCudaError, match="OUT_OF_MEMORY"):
            Host(sim, 4096)
        assert sim.registered() == [8192, 4096]
    with Host(sim, 4096):
        assert sim.registered() == [8192, 4096, 4096]
    assert sim.counts().registrations == 5
    sim.reset()
    assert sim.registered() == []
    with Host(sim, 12288):
        pass


def mapped(folder: Path, flags: int = mmap.MAP_SHARED) -> mmap.mmap:
    path = folder / f"fastshard-{os.getpid()}"
    path.write_bytes(bytes(3 * 4096))
    with path.open("r+b") as file:
        path.unlink()  # as the nameless files of a save
        return mmap.mmap(file.fileno(), 3 * 4096, flags)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    kind = subprocess.run(["stat", "-fc", "%T", tmp_path], capture_output=True, text=True, check=True).stdout
    if kind.strip() in ("tmpfs", "ramfs"):
        pytest.skip("temporary files are in memory here")
    return tmp_path


def test_a_disks_pages_cannot_be_pinned(sim: SimCuda, disk: Path) -> None:
    assert register(sim, mapped(disk)) == Result.INVALID_VALUE
    assert register(sim, mapped(disk), PORTABLE | READ_ONLY) == Result.SUCCESS
    assert register(sim, mapped(disk, mmap.MAP_PRIVATE)) == Result.SUCCESS
    sim.set(disk_pinning=1)  # before driver 550.67
    assert register(sim, mapped(disk)) == Result.SUCCESS
    assert sim.violations() == []


def test_pages_in_memory_can_be_pinned(sim: SimCuda) -> None:
    assert register(sim, mapped(Path("/dev/shm"))) == Result.SUCCESS
    assert register(sim, mmap.mmap(-1, 4096)) == Result.SUCCESS  # shared, of no file
    descriptor = os.memfd_create("fastshard")
    os.truncate(descriptor, 4096)
    assert register(sim, mmap.mmap(descriptor, 4096)) == Result.SUCCESS
    os.close(descriptor)


def test_addresses_inside_of_a_registration(sim: SimCuda) -> None:
    with Host(sim, 8192) as host:
        assert host.device_address(100) == host.device_address() + 100
        sim.set(interior_pointers=0)
        host.device_address()
        with pytest.raises(SimCudaError, match="INVALID_VALUE"):
            host.device_address(4096)
