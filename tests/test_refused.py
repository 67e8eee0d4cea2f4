# SPDX-License-Identifier: Apache-2.0
"""A thread, a mapping or memory refused at each moment of a save: it returns with the whole file in place or raises with the
old one there; it never waits for what nobody will do, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import refusals

SCRIPT = """
from fastshard.engine.engine import Options
folder, kind, write_path, save = sys.argv[1], sys.argv[2].encode(), sys.argv[3], sys.argv[4]
path = f"{folder}/weights"
old = {"a": torch.zeros(10)}
new = {"a": torch.arange(150_000.0), "b": torch.ones(300, 200).t(), "c": torch.ones(3)}
engine = Options(write_path=write_path, memory_budget=1 << 20, threads=3)
many = {f"{folder}/many-{i}": new for i in range(3)}

def fresh():
    for name in os.listdir(folder):
        os.unlink(f"{folder}/{name}")
    for name in (path, *many):
        fastshard.save_file(old, name, engine=Options(threads=1))

def save_file():
    fastshard.save_file(new, path, allow_strided=True, checksums=True, engine=engine)

def save_files():
    fastshard.save_files(many, allow_strided=True, engine=engine)

def torch_save():
    fastshard.torch_save(new, path, engine=engine)

def prepared():
    with fastshard.prepare(new, path, allow_strided=True, engine=engine) as one:
        one.save()

def contents():
    return {name: open(f"{folder}/{name}", "rb").read() for name in sorted(os.listdir(folder))}

def tried():
    before = descriptors()
    try:
        saves[save]()
    finally:
        library.refuse(kind, ctypes.c_long(0))
        if descriptors() > before:
            os.write(2, b"descriptors left open\\n")

saves = {"save_file": save_file, "save_files": save_files, "torch_save": torch_save, "prepared": prepared}
fresh()
before = contents()
saves[save]()
after = contents()
fastshard.engine.engine._kept.clear()  # the engines, with their threads: the child makes them anew in any case

def child_saves(call):
    fresh()
    said = child(tried, kind, call, limit=20)
    found = contents()
    expected = after if said == "returned" else before
    verdict = "as said" if found == expected else f"another state: {sorted(set(found) ^ set(expected)) or 'contents'}"
    return f"{said.split(':')[0]}, {verdict}"

def count():
    fresh()
    return int(child(lambda: saves[save](), kind, 0))

requests = count()
step = max(1, requests // int(sys.argv[5]))
for call in range(1, requests + 1, step):
    print(f"{call} of {requests}: {child_saves(call)}")
"""
RIGHT = {"returned, as said", "MemoryError, as said", "SaveError, as said", "ArchiveError, as said"}
RIGHT.add("RuntimeError, as said")  # what torch makes of std::bad_alloc


@pytest.mark.parametrize("save", ["save_file", "save_files", "torch_save", "prepared"])
@pytest.mark.parametrize("kind", ["thread", "map", "memory"])
@pytest.mark.parametrize("write_path", ["buffered", "direct", "mapped"])
def test_refused_once(tmp_path: Path, kind: str, save: str, write_path: str) -> None:
    if save == "prepared" and write_path != "mapped":
        pytest.skip("a prepared save has no other path")
    said = refusals.run(SCRIPT, tmp_path, kind, write_path, save, 25)
    wrong = [line for line in said.splitlines() if line.partition(": ")[2] not in RIGHT]
    assert said
    assert wrong == []
