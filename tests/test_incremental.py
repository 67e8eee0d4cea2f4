# SPDX-License-Identifier: Apache-2.0
"""``base=`` and ``install(incremental=True)``: what has not changed is linked, and nothing else is."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import names
from safetensors.torch import load_file

import fastshard
from fastshard import save_file, save_files, save_torch_model, save_torch_state_dict
from fastshard.publish import incremental

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytestmark = [pytest.mark.filterwarnings("ignore")]


def figures() -> tuple[int, int]:
    """Files that the newest save has written, and files that it has linked."""
    found = fastshard.stats()
    assert found is not None
    return found.files, found.linked_files


def inode(path: Path) -> int:
    return path.stat().st_ino


@pytest.fixture(autouse=True)
def without_clones(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on most filesystems; what a clone does is a test of its own."""
    monkeypatch.setattr(incremental, "_clone", lambda fd, path: False)
    incremental._notes.clear()


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tensors were compared by their bytes, of each file."""
    found: list[int] = []
    original = incremental.same_bytes

    def same_bytes(fd: int, placed: Any, dtype: Any) -> bool:
        found.append(len(placed))
        return original(fd, placed, dtype)

    monkeypatch.setattr(incremental, "same_bytes", same_bytes)
    return found


TENSORS = {"a": torch.arange(5000, dtype=torch.float32), "b": torch.ones(30, 40, dtype=torch.bfloat16)}


def test_an_equal_file_is_linked_and_any_other_is_written(tmp_path: Path) -> None:
    first, second = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    save_file(TENSORS, first)
    save_file({name: tensor.clone() for name, tensor in TENSORS.items()}, second, base=first)
    found = fastshard.stats()
    assert found is not None and inode(first) == inode(second)
    assert (found.files, found.nbytes, found.linked_files) == (0, 0, 1)
    assert found.linked_nbytes == first.stat().st_size and not found.fallbacks
    first.unlink()
    assert torch.equal(load_file(second)["a"], TENSORS["a"])


def changed(name: str) -> dict[str, Any]:
    """Arguments of a save that has to be written, for each reason."""
    tensors = {key: tensor.clone() for key, tensor in TENSORS.items()}
    more: dict[str, Any] = {}
    if name == "last element":
        tensors["a"][-1] += 1
    elif name == "sign of zero":
        tensors["a"][0] = -0.0
    elif name == "name":
        tensors["c"] = tensors.pop("b")
    elif name == "dtype of equal bytes":
        tensors["b"] = tensors["b"].view(torch.float16)
    elif name == "shape":
        tensors["b"] = tensors["b"].view(40, 30)
    elif name == "metadata":
        more["metadata"] = {"format": "pt"}
    elif name == "cast":
        more["dtype"] = torch.float16
    elif name == "one tensor more":
        tensors["c"] = torch.zeros(0)
    else:
        assert name == "nothing"
    return {"tensors": tensors, **more}


@pytest.mark.parametrize(
    "what",
    [
        "last element",
        "sign of zero",
        "name",
        "dtype of equal bytes",
        "shape",
        "metadata",
        "cast",
        "one tensor more",
        "nothing",
    ],
)
def test_whatever_changes_a_byte_is_written(tmp_path: Path, what: str) -> None:
    base, path, plain = (tmp_path / f"{name}.safetensors" for name in ("base", "new", "plain"))
    save_file(TENSORS, base)
    before = base.read_bytes()
    save_file(**changed(what), filename=path, base=base)
    assert figures() == ((0, 1) if what == "nothing" else (1, 0))
    save_file(**changed(what), filename=plain)
    assert path.read_bytes() == plain.read_bytes() and base.read_bytes() == before


def test_every_single_changed_byte_of_a_large_tensor_is_found(tmp_path: Path) -> None:
    tensor = torch.zeros((5 << 20) + 3, dtype=torch.uint8)
    base, path = tmp_path / "base.safetensors", tmp_path / "new.safetensors"
    save_file({"a": tensor}, base)
    for place in (0, 1, 4096, (1 << 20) - 1, 1 << 20, tensor.numel() // 2, -1):
        tensor[place] = 1
        save_file({"a": tensor}, path, base=base)
        assert figures() == (1, 0), place
        tensor[place] = 0
    save_file({"a": tensor}, path, base=base)
    assert figures() == (0, 1)


@pytest.mark.parametrize("kind", ["strided", "cast", "tied slices", "nan"])
def test_tensors_that_are_packed_are_compared_as_they_would_be_written(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    tensor = torch.randn(60, 70)
    more: dict[str, Any] = {"allow_strided": True}
    if kind == "strided":
        tensor = tensor.t()[1:, ::2]
    elif kind == "cast":
        more["dtype"] = "bf16"
    elif kind == "nan":
        tensor[0, 0] = float("nan")
    tensors = {"a": tensor[:30], "b": tensor[30:]} if kind == "tied slices" else {"a": tensor}
    base, path = tmp_path / "base.safetensors", tmp_path / "new.safetensors"
    save_file(tensors, base, **more)
    save_file(tensors, path, base=base, **more)
    assert figures() == (0, 1)
    tensor[-1, -1] += 1
    save_file(tensors, path, base=base, **more)
    assert figures() == (1, 0)


def model() -> torch.nn.Sequential:
    torch.manual_seed(0)
    made = torch.nn.Sequential(*(torch.nn.Linear(100, 100) for _ in range(10)))
    made.register_buffer("seen", torch.zeros(10))
    for layer in made[:9]:
        layer.requires_grad_(False)
    return made


def step(of: torch.nn.Sequential) -> None:
    with torch.no_grad():
        of[9].weight += 1


def test_frozen_parameters_have_files_of_their_own_and_are_linked_from_then_on(tmp_path: Path) -> None:
    trained, folders = model(), [tmp_path / str(number) for number in range(4)]
    expected = []
    for number, folder in enumerate(folders):
        folder.mkdir()
        step(trained)
        expected.append({name: tensor.clone() for name, tensor in trained.state_dict().items()})
        save_torch_model(trained, folder, base=folders[number - 1], max_shard_size="100KB")
        # Two layers to a file, five files for nine frozen layers; what is trained has one.
        assert figures() == ((6, 0) if number == 0 else (1, 5))
    index = json.loads((folders[0] / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        assert (file == "model-00006-of-00006.safetensors") == (name in ("9.weight", "9.bias", "seen"))
    for number in (0, 1, 3):
        shutil.rmtree(folders[number])
    weights = {
        name: tensor for path in folders[2].glob("*.safetensors") for name, tensor in load_file(path).items()
    }
    assert weights.keys() == expected[2].keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected[2].items())


def test_frozen_parameters_that_this_process_has_saved_are_not_read_again(
    tmp_path: Path, compared: list[int]
) -> None:
    trained, folders = model(), [tmp_path / str(number) for number in range(3)]
    for number, folder in enumerate(folders):
        folder.mkdir()
        step(trained)
        compared.clear()
        save_torch_model(trained, folder, base=folders[number - 1])
        # Buffers and what is trained are always compared; all of the frozen file is known.
        assert compared == ([] if number == 0 else [0, 3])
    incremental._notes.clear()  # another process
    compared.clear()
    save_torch_model(trained, tmp_path / "0", base=folders[2])
    assert compared == [18, 3] and figures() == (0, 2)


def way(name: str) -> Callable[[torch.nn.Sequential], None]:
    """A way to change a frozen parameter."""

    def by_data(of: torch.nn.Sequential) -> None:
        of[0].weight.data.add_(1)

    def counted(of: torch.nn.Sequential) -> None:
        with torch.no_grad():
            of[0].weight[50, 50] = 7

    def other_memory(of: torch.nn.Sequential) -> None:
        of[0].weight.data = of[0].weight.data.clone()
        of[0].weight.data[50, 50] = 7

    def other_parameter(of: torch.nn.Sequential) -> None:
        new = of[0].weight.detach().clone()
        new[50, 50] = 7
        of[0].weight = torch.nn.Parameter(new, requires_grad=False)

    def trained_unseen(of: torch.nn.Sequential) -> None:
        of[0].requires_grad_(True)
        of[0].weight.data[50, 50] = 7  # one element, and torch does not count it

    ways = (by_data, counted, other_memory, other_parameter, trained_unseen)
    return {found.__name__: found for found in ways}[name]


@pytest.mark.parametrize("name", ["by_data", "counted", "other_memory", "other_parameter", "trained_unseen"])
def test_a_changed_frozen_parameter_is_written(tmp_path: Path, name: str) -> None:
    trained = model()
    first, second = tmp_path / "1", tmp_path / "2"
    for folder in (first, second):
        folder.mkdir()
    save_torch_model(trained, first, base=first)
    way(name)(trained)
    save_torch_model(trained, second, base=first)
    weights = {n: t for path in second.glob("*.safetensors") for n, t in load_file(path).items()}
    assert all(torch.equal(weights[n], t) for n, t in trained.state_dict().items())
    assert figures()[0] >= 1


def test_a_plain_state_dict_says_nothing_of_gradients_and_is_compared(
    tmp_path: Path, compared: list[int]
) -> None:
    trained = model()
    for number in range(3):
        (tmp_path / str(number)).mkdir()
        save_torch_state_dict(trained.state_dict(), tmp_path / str(number), base=tmp_path / str(number - 1))
        assert names(tmp_path / str(number)) == ["model.safetensors"]
    assert compared == [21, 21] and figures() == (0, 1)


@pytest.mark.parametrize("how", ["written in place", "cut", "touched", "replaced", "deleted"])
def test_a_base_that_others_have_changed_is_seen(tmp_path: Path, how: str, compared: list[int]) -> None:
    trained, base, folder = model(), tmp_path / "base", tmp_path / "new"
    base.mkdir()
    folder.mkdir()
    save_torch_model(trained, base, base=base)
    file = base / "model-00001-of-00002.safetensors"
    if how == "written in place":
        with file.open("r+b") as opened:
            opened.seek(-1, os.SEEK_END)
            last = opened.read(1)
            opened.seek(-1, os.SEEK_END)
            opened.write(bytes([last[0] ^ 1]))
    elif how == "cut":
        os.truncate(file, file.stat().st_size - 1)
    elif how == "touched":
        os.utime(file)
    elif how == "replaced":
        file.write_bytes(file.read_bytes())
    else:
        shutil.rmtree(base)
    save_torch_model(trained, folder, base=base)
    assert figures() == {"touched": (0, 2), "replaced": (0, 2), "deleted": (2, 0)}.get(how, (1, 1))
    assert 18 in compared or how in ("cut", "deleted")
    weights = {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}
    assert all(torch.equal(weights[n], t) for n, t in trained.state_dict().items())


def test_a_base_whose_other_names_go_is_still_known(tmp_path: Path, compared: list[int]) -> None:
    trained = model()
    for number in range(6):
        folder = tmp_path / str(number)
        folder.mkdir()
        compared.clear()
        save_torch_model(trained, folder, base=tmp_path / str(number - 1))
        if number >= 2:
            shutil.rmtree(tmp_path / str(number - 2))
            assert compared[0] == 0


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EMLINK, errno.EPERM, errno.EOPNOTSUPP])
def test_where_no_link_is_possible_files_are_written_and_a_fallback_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    base, path = tmp_path / "base.safetensors", tmp_path / "new.safetensors"
    save_file(TENSORS, base)
    monkeypatch.setattr(os, "link", refuse)
    save_file(TENSORS, path, base=base)
    found = fastshard.stats()
    assert found is not None and (found.files, found.linked_files) == (1, 0)
    assert any(os.strerror(code) in text and "linking" in text for text in found.fallbacks)
    assert path.read_bytes() == base.read_bytes() and inode(path) != inode(base)


def test_a_base_on_another_filesystem_is_not_linked(tmp_path: Path) -> None:
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is one filesystem only")
    base = memory / f"fastshard-test-{os.getpid()}.safetensors"
    try:
        save_file(TENSORS, base)
        save_file(TENSORS, tmp_path / "new.safetensors", base=base)
        found = fastshard.stats()
        assert found is not None and found.linked_files == 0
        assert any(os.strerror(errno.EXDEV) in text for text in found.fallbacks)
    finally:
        base.unlink()


def test_a_clone_comes_before_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The filesystem of the test has no clones perhaps, so a copy stands for one."""

    def clone(fd: int, path: str) -> bool:
        shutil.copyfile(f"/proc/self/fd/{fd}", path)
        return True

    monkeypatch.setattr(incremental, "_clone", clone)
    base, path = tmp_path / "base.safetensors", tmp_path / "new.safetensors"
    save_file(TENSORS, base)
    save_file(TENSORS, path, base=base)
    assert figures() == (0, 1) and inode(path) != inode(base) and path.read_bytes() == base.read_bytes()


def test_a_clone_is_asked_of_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    base, path = tmp_path / "base.safetensors", tmp_path / "new.safetensors"
    save_file(TENSORS, base)
    save_file(TENSORS, path, base=base)
    assert figures() == (0, 1) and path.read_bytes() == base.read_bytes()
    assert names(tmp_path) == ["base.safetensors", "new.safetensors"]


def test_a_base_may_be_what_is_replaced(tmp_path: Path) -> None:
    trained = model()
    for number in range(3):
        step(trained)
        save_torch_model(trained, tmp_path, base=tmp_path)
        assert figures() == ((2, 0) if number == 0 else (1, 1))
    weights = {n: t for path in tmp_path.glob("*.safetensors") for n, t in load_file(path).items()}
    assert all(torch.equal(weights[n], t) for n, t in trained.state_dict().items())
    assert len(names(tmp_path)) == 3


def test_a_failed_save_leaves_the_base_and_nothing_else(tmp_path: Path) -> None:
    base, folder = tmp_path / "base", tmp_path / "new"
    for made in (base, folder):
        made.mkdir()
    save_files({base / "1.safetensors": TENSORS})
    before = {name: (base / name).read_bytes() for name in names(base)}
    with pytest.raises(ValueError):
        files = {
            folder / "1.safetensors": TENSORS,
            folder / "2.safetensors": {"a": torch.ones(2).to_sparse()},
        }
        save_files(files, base=base)
    assert names(folder) == [] and {name: (base / name).read_bytes() for name in names(base)} == before
    assert (base / "1.safetensors").stat().st_nlink == 1


def test_a_prepared_save_does_not_write_into_a_file_that_was_linked(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(100_000)}
    path, kept = tmp_path / "live.safetensors", tmp_path / "kept.safetensors"
    with fastshard.prepare(tensors, path) as prepared:
        prepared.save()
        save_file(tensors, kept, base=path)
        before = kept.read_bytes()
        for value in range(1, 5):
            tensors["a"].fill_(value)
            prepared.save()
            assert kept.read_bytes() == before
            assert torch.equal(load_file(path)["a"], tensors["a"])


def test_an_asynchronous_save_compares_when_it_is_called(tmp_path: Path) -> None:
    tensors = {name: tensor.clone() for name, tensor in TENSORS.items()}
    base, path = tmp_path / "base.safetensors", tmp_path / "new.safetensors"
    save_file(tensors, base)
    with fastshard.asynchronous():
        save_file(tensors, path, base=base)
        tensors["a"].zero_()
    fastshard.wait_all()
    assert inode(base) == inode(path) and torch.equal(load_file(path)["a"], TENSORS["a"])


@pytest.mark.parametrize("manifest", [True, "sha256"])
def test_records_take_over_what_the_base_says(
    tmp_path: Path, manifest: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastshard.formats.manifest import read_manifest
    from fastshard.publish import manifests

    read: list[str] = []
    take = manifests.take

    def noting(wanted: Any, **more: Any) -> Any:
        wanted = list(wanted)
        read.extend(os.path.basename(one.path) for one in wanted)
        return take(wanted, **more)

    monkeypatch.setattr(manifests, "take", noting)
    trained = model()
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        step(trained)
        read.clear()
        save_torch_model(trained, folder, base=tmp_path / "0", manifest=manifest)
    assert "model-00001-of-00002.safetensors" not in read
    one, other = (read_manifest(tmp_path / name / "fastshard.manifest.json").files for name in "01")
    assert one.keys() == other.keys()
    file = "model-00001-of-00002.safetensors"
    assert (
        one[file] == other[file]
        and one[file].tensors
        and all(t.crc32 is not None for t in one[file].tensors.values())
    )
    if manifest == "sha256":
        import hashlib

        for line in (tmp_path / "1" / "SHA256SUMS").read_text().splitlines():
            digest, name = line.split("  ")
            assert hashlib.sha256((tmp_path / "1" / name).read_bytes()).hexdigest() == digest


def test_a_base_must_be_a_path(tmp_path: Path) -> None:
    for wrong in (1, b"bytes", ["a"]):
        with pytest.raises(TypeError):
            save_file(TENSORS, tmp_path / "m.safetensors", base=wrong)  # type: ignore[arg-type]
    assert names(tmp_path) == []


def trainer_of(folder: Path, **options: Any) -> Any:
    import test_async_trainer

    trainer = test_async_trainer.trainer_of(folder, **{"max_steps": 5, "save_steps": 1, **options})
    trainer.model.inner.requires_grad_(False)
    return trainer


@pytest.fixture
def installed(request: pytest.FixtureRequest) -> Iterator[None]:
    with fastshard.installed(incremental=True, asynchronous=request.param):
        yield


@pytest.mark.parametrize("installed", [False, True], indirect=True, ids=["synchronous", "asynchronous"])
def test_checkpoints_of_trainer_share_what_is_frozen(tmp_path: Path, installed: None) -> None:
    trainer = trainer_of(tmp_path / "run")
    trainer.train()
    folders = [tmp_path / "run" / f"checkpoint-{number}" for number in range(1, 6)]
    frozen = {inode(folder / "model-00001-of-00002.safetensors") for folder in folders}
    trained = {inode(folder / "model-00002-of-00002.safetensors") for folder in folders}
    assert len(frozen) == 1 and len(trained) == 5
    assert len({inode(folder / "optimizer.pt") for folder in folders}) == 5
    for folder in folders[:2] + folders[3:]:
        shutil.rmtree(folder)
    again = type(trainer.model).from_pretrained(folders[2])
    assert torch.equal(again.inner.weight, trainer.model.inner.weight)
    resumed = trainer_of(tmp_path / "run")
    resumed.train(resume_from_checkpoint=str(folders[2]))
    for one, other in zip(resumed.model.parameters(), trainer.model.parameters()):
        assert torch.equal(one, other)
    assert inode(folders[4] / "model-00001-of-00002.safetensors") in frozen


def test_rotation_deletes_any(tmp_path: Path) -> None:
    with fastshard.installed(incremental=True, manifest=True):
        trainer = trainer_of(tmp_path / "run", save_total_limit=1)
        trainer.train()
    run = tmp_path / "run"
    assert names(run) == ["checkpoint-5"]
    folder = run / "checkpoint-5"
    assert (folder / "model-00001-of-00002.safetensors").stat().st_nlink == 1
    assert "fastshard.manifest.json" in names(folder)
    again = type(trainer.model).from_pretrained(folder)
    for one, other in zip(again.parameters(), trainer.model.parameters()):
        assert torch.equal(one, other)


def test_without_incremental_nothing_is_linked(tmp_path: Path) -> None:
    with fastshard.installed(manifest=True):
        trainer_of(tmp_path / "run").train()
    for path in (tmp_path / "run").rglob("*.safetensors"):
        assert path.name == "model.safetensors" and path.stat().st_nlink == 1


def test_what_is_installed_is_said() -> None:
    with fastshard.installed(incremental=True):
        assert fastshard.status().incremental and "incrementally" in str(fastshard.status())
    assert not fastshard.status().incremental
