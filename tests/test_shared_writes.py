# SPDX-License-Identifier: Apache-2.0
"""One file that several threads write: one from the front, the others through mappings from the back.

Where a test needs to know that the others have taken part, the first write of a save waits for them.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch as reference
import torch
from conftest import BUDGET, assert_same
from forked import run
from helpers import names, preload
from simcuda import SimCuda
from test_cuda_path import on_device, on_host, varied

import fastshard
from fastshard import Engine, Options, SaveError, save_file
from fastshard.engine.plan import FilePlan

MIB = 1 << 20

SAVE = """
import json, os, sys
import torch
import fastshard
from fastshard import Options, SaveError, save_file
def saved(kind, path, **options):
    engine = Options(**{"threads": 2, **options})
    big = {str(i): torch.full((1 << 20,), float(i)) for i in range(6)}
    if kind == "large":
        save_file(big, path, engine=engine)
    elif kind == "durable":
        save_file(big, path, engine=engine, durable=True)
    elif kind == "small":
        save_file({f"{i}": torch.full((4096,), float(i)) for i in range(1500)}, path, engine=engine)
    elif kind == "strided":
        wide = {str(i): torch.full((2048, 2048), float(i))[:, :1024] for i in range(3)}
        save_file(wide, path, engine=engine, allow_strided=True)
    elif kind == "cast":
        big.update({str(i): torch.full((1 << 20,), float(i)) for i in range(6, 12)})
        save_file(big, path, engine=engine, dtype=torch.bfloat16)
    elif kind == "checked":
        save_file(big, path, engine=engine, checksums=True)
    elif kind == "archive":
        fastshard.torch_save(big, path, engine=engine)
try:
    saved(sys.argv[1], sys.argv[2], **json.loads(sys.argv[3]))
    stats = fastshard.stats()
    print(json.dumps({"mapped": stats.mapped_nbytes, "path": stats.write_path, "fallbacks": stats.fallbacks,
                      "checksums": next(iter(stats.checksums.values()), {})}))
except SaveError as error:
    print(json.dumps({"errno": error.errno, "filename": error.filename}))
"""
KINDS = ("large", "durable", "small", "strided", "cast", "checked", "archive")


def save(library: Path, refuse: str, kind: str, path: Path, **options: object) -> dict[str, object]:
    done = run(SAVE, kind, path, json.dumps(options), env=preload(library, refuse))
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bytes(preloaded: Path, folder: Path, kind: str) -> None:
    alone, shared = folder / "alone", folder / "shared"
    expected = save(preloaded, "", kind, alone, write_path="buffered")
    found = save(preloaded, "slow@1:1", kind, shared)
    assert expected["mapped"] == 0
    assert found["path"] == "buffered" and not found["fallbacks"]
    assert 0 < found["mapped"] < shared.stat().st_size  # type: ignore[operator]
    assert found["checksums"] == expected["checksums"]
    if kind == "archive":  # torch writes its own name into it
        assert all(
            torch.equal(one, other)
            for one, other in zip(torch.load(shared).values(), torch.load(alone).values(), strict=True)
        )
    else:
        assert_same(shared.read_bytes(), alone.read_bytes())


@pytest.mark.parametrize("options", [{"write_path": "buffered"}, {"threads": 1}])
def test_one_thread_where_that_is_asked_for(preloaded: Path, path: Path, options: dict[str, object]) -> None:
    assert save(preloaded, "", "large", path, **options)["mapped"] == 0


def test_without_reserved_space_one_thread_writes(preloaded: Path, path: Path) -> None:
    expected = save(preloaded, "", "checked", path, threads=1)
    found = save(preloaded, "fallocate", "checked", path)
    assert (found["mapped"], found["checksums"]) == (0, expected["checksums"])
    assert len(found["checksums"]) == 6  # type: ignore[arg-type]
    assert any("fallocate refused" in text for text in found["fallbacks"])  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["large", "strided", "checked"])
@pytest.mark.parametrize("refuse", ["readv:1", "readv:38", "readv@3:14"])
def test_what_the_kernel_does_not_copy_is_written(
    preloaded: Path, tmp_path: Path, kind: str, refuse: str
) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    save(preloaded, "", kind, alone, write_path="buffered")
    code = int(refuse.partition(":")[2])
    found = save(preloaded, f"slow@1:{3 if '@3' in refuse else 1} {refuse}", kind, shared)
    assert found["fallbacks"] == [f"writing by several threads refused: {os.strerror(code)}"]
    assert (found["mapped"] == 0) == ("@" not in refuse)
    assert_same(shared.read_bytes(), alone.read_bytes())


def test_the_reason_of_a_page_that_cannot_be_had(preloaded: Path, folder: Path) -> None:
    path = folder / "weights"
    path.write_bytes(b"old")
    # As on a full filesystem in memory: the store is refused, and so is the write in its place.
    found = save(preloaded, "slow@1:2 readv@2:14 pwritev:28", "large", path)
    assert found == {"errno": errno.ENOSPC, "filename": str(path)}
    assert (path.read_bytes(), names(folder)) == (b"old", ["weights"])


FORKED = """
import json, os, signal, sys
import torch

def forked():
    child = os.fork()
    return child if child != 0 else signal.pause()

child = None
if sys.argv[2] == "before the import":
    state = {str(i): torch.full((1 << 20,), float(i)) for i in range(12)}
    child = forked()
import fastshard
from fastshard import Options, save_file

def private():
    with open("/proc/self/smaps_rollup") as lines:
        return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) << 10

if child is None:
    state = {str(i): torch.full((1 << 20,), float(i)) for i in range(12)}
    child = forked()
save_file({"x": state["0"][:100]}, sys.argv[1])  # what is made only once
before = private()
save_file(state, sys.argv[1], engine=Options(threads=3))
grown = private() - before
os.kill(child, signal.SIGKILL)
os.waitpid(child, 0)
stats = fastshard.stats()
print(json.dumps({"grown": grown, "mapped": stats.mapped_nbytes, "fallbacks": stats.fallbacks}))
"""


@pytest.mark.parametrize("how", ["by a forked process", "after the import", "before the import"])
def test_memory_shared_with_a_forked_process_stays_shared(preloaded: Path, path: Path, how: str) -> None:
    environment = preload(preloaded, "nap@1")
    if how == "by a forked process":
        done = run(FORKED, path, how, env=environment)
    else:
        command = [sys.executable, "-c", FORKED, path, how]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=path.parent)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["mapped"] == 0 and len(found["fallbacks"]) == 1
    assert "shared with a forked process" in found["fallbacks"][0]
    assert found["grown"] < 8 * MIB  # of 48
    assert all((tensor == int(name)).all() for name, tensor in reference.load_file(path).items())


def test_small_files_are_left_to_one_thread(path: Path, new_engine: Callable[..., Engine]) -> None:
    save_file({"x": torch.zeros(15 * MIB, dtype=torch.uint8)}, path, engine=new_engine(threads=4))
    stats = fastshard.stats()
    assert stats is not None and stats.mapped_nbytes == 0


@pytest.mark.parametrize("threads", [2, 5])
def test_from_a_device(sim: SimCuda, new_engine: Callable[..., Engine], folder: Path, threads: int) -> None:
    generator = np.random.default_rng(3)
    sources = [*varied(sim), on_device(sim, generator.random((1024, 4096))[:, 100:2100])]
    sources.append(on_host(generator.integers(0, 256, 5 * MIB, dtype=np.uint8)))
    path = folder / "weights"
    engine = new_engine(threads=threads, memory_budget=8 * BUDGET)
    plan = FilePlan(os.fsencode(path), b"a header", [source.view for source in sources])
    assert sum(len(source.packed) for source in sources) > 16 * MIB
    sim.set_bandwidth(2e9)  # the front does not come to the end alone
    stats = engine.submit([plan], keep_alive=sources).result()
    assert stats.mapped_nbytes > 0
    assert_same(path.read_bytes(), b"a header" + b"".join(source.packed for source in sources))


def test_saves_that_share_threads(folder: Path, new_engine: Callable[..., Engine]) -> None:
    """More saves at once than threads, some of them of several files: helpers leave for what waits."""
    engine = new_engine(threads=3)
    sizes = [40 * MIB + 12345, 17 * MIB, 5000, 20 * MIB + 1]
    state = {str(size): torch.arange(size // 4, dtype=torch.int32) for size in sizes}

    def one(number: int) -> None:
        for size in sizes[number % 2 :]:
            save_file({"w": state[str(size)]}, folder / f"{number}-{size}", engine=engine)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(one, range(6)))
    expected = {size: reference.save({"w": state[str(size)]}) for size in sizes}
    for name in names(folder):
        assert_same((folder / name).read_bytes(), expected[int(name.partition("-")[2])])


def test_a_full_disk(small_disk: Path) -> None:
    old = {"w": torch.zeros(1000)}
    save_file(old, small_disk / "weights")
    with pytest.raises(SaveError) as caught:
        save_file(
            {"w": torch.zeros(30 * MIB, dtype=torch.uint8)}, small_disk / "weights", engine=Options(threads=2)
        )
    assert (caught.value.errno, names(small_disk)[-1]) == (errno.ENOSPC, "weights")
    assert torch.equal(reference.load_file(small_disk / "weights")["w"], old["w"])
