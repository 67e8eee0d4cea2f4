# SPDX-License-Identifier: Apache-2.0
"""``manifest=``: after any save, manifest and ``SHA256SUMS`` say what is in the files, and nothing that is not."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import subprocess
import threading
import time
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import filled, parsed, run, snapshot
from test_direct import pages_cached

import fastshard
from fastshard.base import settings
from fastshard.engine import checksums
from fastshard.formats.sha256sums import format_sums, read_sums
from fastshard.integrations import patching
from fastshard.publish import manifests, record

MANIFEST, SUMS = "fastshard.manifest.json", "SHA256SUMS"
WEIGHTS = "model.safetensors"
WANTED = [True, "sha256"]


def tensors(seed: int = 0, count: int = 5) -> dict[str, torch.Tensor]:
    return {f"t{i}": filled((40, 3 + i), seed=seed + i) for i in range(count)}


def files_of(folder: Path) -> set[str]:
    """All files in there but the two that are about the others."""
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert not any(".fastshard-" in name for name in found), found
    return found - {MANIFEST, SUMS}


def described(folder: Path) -> set[str]:
    """The files that the manifest is about. All that it says of them is compared with their bytes."""
    if not (folder / MANIFEST).exists():
        return set()
    said = json.loads((folder / MANIFEST).read_text())
    for name, entry in said["files"].items():
        data = (folder / name).read_bytes()
        assert entry["size"] == len(data), name
        ranges = {None: (0, len(data), entry["crc32"])}
        if name.endswith(".safetensors"):
            header, _ = parsed(data)
            header.pop("__metadata__", None)
            begin = 8 + int.from_bytes(data[:8], "little")
            ranges = {None: (0, begin, entry["crc32"]), **entry["tensors"]}
            assert {n: [o - begin, o + s - begin] for n, (o, s, _) in entry["tensors"].items()} == {
                n: found["data_offsets"] for n, found in header.items()
            }
        for tensor, (offset, nbytes, crc32) in ranges.items():
            assert f"{zlib.crc32(data[offset : offset + nbytes]):08x}" == crc32, (name, tensor)
        assert sum(nbytes for _, nbytes, _ in ranges.values()) == len(data), name
    return set(said["files"])


def summed(folder: Path) -> set[str]:
    """The files that ``sha256sum -c`` has found to be as they are said to be."""
    if not (folder / SUMS).exists():
        return set()
    done = subprocess.run(["sha256sum", "-c", "--strict", SUMS], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done
    names = list(read_sums(folder / SUMS))
    assert names == sorted(names) and SUMS not in names
    assert (MANIFEST in names) == (folder / MANIFEST).exists()
    return {*names} - {MANIFEST}


def check(folder: Path, wanted: object) -> None:
    """All files are described, and nothing else is."""
    assert described(folder) == files_of(folder) != set()
    assert summed(folder) == (files_of(folder) if wanted == "sha256" else set())


def _shard(folder: Path, **how: Any) -> None:
    source = folder.parent / "source"
    source.mkdir()
    fastshard.save_file(tensors(), source / WEIGHTS, manifest="sha256")
    (source / "config.json").write_text("{}")
    fastshard.shard_checkpoint(source, folder, 2, plan={"t0": "colwise"}, **how)


def _merge(folder: Path, **how: Any) -> None:
    _shard(folder.parent / "parts", manifest=True)
    fastshard.merge_checkpoint(folder.parent / "parts", folder, **how)


def _reshard(folder: Path, **how: Any) -> None:
    source = folder.parent / "source"
    source.mkdir()
    fastshard.save_torch_state_dict(tensors(), source, manifest="sha256")
    fastshard.reshard_checkpoint(source, folder, 1000, force=True, **how)


def _convert(name: str) -> Callable[..., None]:
    def convert(folder: Path, **how: Any) -> None:
        checkpoint = pytest.importorskip("torch.distributed.checkpoint")
        source = folder.parent / "dcp"
        checkpoint.save(tensors(), checkpoint_id=source, no_dist=True)
        fastshard.convert_dcp(source, folder / name, **how)

    return convert


SAVERS: dict[str, Callable[..., Any]] = {
    "save_file": lambda to, **how: fastshard.save_file(tensors(), to / WEIGHTS, {"a": "b"}, **how),
    "save_file_async": lambda to, **how: fastshard.save_file_async(tensors(), to / WEIGHTS, **how),
    "save_files": lambda to, **how: fastshard.save_files(
        {to / f"{i}.safetensors": tensors(i) for i in range(3)}, **how
    ),
    "save_model": lambda to, **how: fastshard.save_model(torch.nn.Linear(9, 8), to / WEIGHTS, **how),
    "torch_save": lambda to, **how: fastshard.torch_save(tensors(), to / "x.pt", **how),
    "torch_save of much": lambda to, **how: fastshard.torch_save(filled((300, 400)), to / "x.pt", **how),
    "torch_save_async": lambda to, **how: fastshard.torch_save_async(filled((300, 400)), to / "x.pt", **how),
    "torch_save in place": lambda to, **how: fastshard.torch_save([1], to / "x.pt", in_place=True, **how),
    "save_torch_state_dict": lambda to, **how: fastshard.save_torch_state_dict(tensors(), to, **how),
    "in shards": lambda to, **how: fastshard.save_torch_state_dict(tensors(), to, max_shard_size=1000, **how),
    "in shards, asynchronously": lambda to, **how: fastshard.save_torch_state_dict_async(
        tensors(), to, max_shard_size=1000, **how
    ),
    "pickled": lambda to, **how: fastshard.save_torch_state_dict(
        tensors(), to, safe_serialization=False, max_shard_size=1000, **how
    ),
    "save_torch_model": lambda to, **how: fastshard.save_torch_model(torch.nn.Linear(9, 8), to, **how),
    "save_sharded_state": lambda to, **how: fastshard.save_sharded_state(tensors(), to, max_size=900, **how),
    "save_distributed": lambda to, **how: fastshard.save_distributed(
        tensors(), to, max_shard_size=1000, **how
    ),
    "save_distributed, each its own": lambda to, **how: fastshard.save_distributed(
        tensors(), to, max_shard_size=1000, writers_publish=True, **how
    ),
    "shard_checkpoint": _shard,
    "merge_checkpoint": _merge,
    "reshard_checkpoint": _reshard,
    "convert_dcp": _convert(""),
    "convert_dcp into a file": _convert(WEIGHTS),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("saver", SAVERS)
def test_every_file_of_a_save_is_described(saver: str, wanted: Any, tmp_path: Path) -> None:
    if saver.startswith(
        ("save_distributed", "convert_dcp")
    ):  # older ones have no public DTensor and no no_dist
        pytest.importorskip("torch", minversion="2.6")
    folder = tmp_path / "saved"
    folder.mkdir()
    SAVERS[saver](folder, manifest=wanted)
    fastshard.wait_all()
    check(folder, wanted)
    if "checkpoint" not in saver:
        return
    shutil.rmtree(folder)
    shutil.rmtree(tmp_path / "parts", ignore_errors=True)
    shutil.rmtree(tmp_path / "source")
    SAVERS[saver](folder)  # what stood in the source is not copied
    assert not {MANIFEST, SUMS} & {*os.listdir(folder)}


@pytest.mark.parametrize(
    "saver", ["save_file", "torch_save", "in shards", "save_sharded_state", "reshard_checkpoint"]
)
def test_other_values_are_refused(saver: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="manifest must be True, False or 'sha256', not 'md5'"):
        SAVERS[saver](tmp_path, manifest="md5")
    assert not files_of(tmp_path) - {"source"}


def test_a_folder_that_is_missing_appears_with_its_manifest(tmp_path: Path) -> None:
    written = fastshard.save_sharded_state(tensors(), tmp_path / "a" / "b", manifest="sha256")
    check(tmp_path / "a" / "b", "sha256")
    assert all(entry.crc32 is not None for entry in written.files.values())  # that of the rank has them, too
    (name,) = written.files
    (beside,) = (tmp_path / "a" / "b").glob("fastshard-*.json")
    said = json.loads(beside.read_text())["files"][name]
    assert said == json.loads((tmp_path / "a" / "b" / MANIFEST).read_text())["files"][name]


def test_nothing_of_it_without(tmp_path: Path) -> None:
    fastshard.save_files({tmp_path / WEIGHTS: tensors()})
    fastshard.save_torch_state_dict(tensors(), tmp_path, max_shard_size=1000)
    assert not {MANIFEST, SUMS} & {*os.listdir(tmp_path)} and described(tmp_path) == set()


def test_figures_name_the_files_as_the_caller_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fastshard.save_file(tensors(count=2), WEIGHTS, manifest=True)
    figures = fastshard.stats()
    assert figures is not None and figures.checksums.keys() == {WEIGHTS}
    assert (figures.files, figures.nbytes) == (1, os.path.getsize(WEIGHTS))


def test_files_of_several_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    files: dict[str | os.PathLike[str], Any] = {
        tmp_path / WEIGHTS: tensors(),
        tmp_path / "a" / WEIGHTS: tensors(),
    }
    with pytest.raises(ValueError, match="no manifest or base in common"):
        fastshard.save_files(files, manifest=True)
    fastshard.save_files(
        {tmp_path / WEIGHTS: tensors(), f"{tmp_path}/a/../b.safetensors": tensors()}, manifest=True
    )
    check(tmp_path, True)


OTHERS = ["other.safetensors", "config.json"]


@pytest.fixture
def standing(tmp_path: Path) -> Path:
    """A folder whose files are all described, one of them in a folder of its own."""
    fastshard.save_files({tmp_path / n: tensors(7) for n in (WEIGHTS, OTHERS[0])}, manifest="sha256")
    (tmp_path / OTHERS[1]).write_text("{}")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "vocab.txt").write_text("a\nb")
    manifests.complete(str(tmp_path), "sha256")
    check(tmp_path, "sha256")
    return tmp_path


@pytest.mark.parametrize("wanted", [False, *WANTED])
@pytest.mark.parametrize(
    "saver",
    ["save_file", "save_files", "save_torch_state_dict", "in shards", "torch_save", "save_file_async"],
)
def test_what_is_said_of_other_files_stays(saver: str, wanted: Any, standing: Path) -> None:
    """And nothing is said of a file that a save without it has written or removed."""
    before = snapshot(standing)
    SAVERS[saver](standing, manifest=wanted)
    fastshard.wait_all()
    after = snapshot(standing)
    new = {name for name in after if after[name] != before.get(name)} - {MANIFEST, SUMS}
    assert new
    old = files_of(standing) - new
    assert old >= {*OTHERS, "sub/vocab.txt"}
    assert described(standing) == old | (new if wanted else set())
    assert summed(standing) == old | (new if wanted == "sha256" else set())


@pytest.mark.parametrize("wanted", WANTED)
def test_what_says_nothing_any_more_goes(wanted: Any, tmp_path: Path) -> None:
    fastshard.save_file(tensors(), tmp_path / WEIGHTS, manifest=wanted)
    fastshard.save_file(tensors(1), tmp_path / WEIGHTS)
    assert os.listdir(tmp_path) == [WEIGHTS]
    fastshard.save_torch_state_dict(tensors(), tmp_path, max_shard_size=1000, manifest=wanted)
    fastshard.save_torch_state_dict(tensors(), tmp_path)
    assert os.listdir(tmp_path) == [WEIGHTS]


def test_a_prepared_save_is_described_by_nobody(standing: Path) -> None:
    with fastshard.prepare(tensors(), standing / WEIGHTS) as prepared:
        prepared.save()
        assert described(standing) == summed(standing) == files_of(standing) - {WEIGHTS}
        manifests.complete(str(standing), True)
        assert WEIGHTS in described(standing)
        prepared.save(tensors(3))
        assert WEIGHTS not in described(standing)
    assert described(standing) == files_of(standing) - {WEIGHTS}


@pytest.mark.parametrize("wanted", WANTED)
def test_one_that_is_made_anew_is_not_made_of_the_old_one(wanted: Any, standing: Path) -> None:
    (standing / OTHERS[1]).write_text("changed by others")
    fastshard.write_manifest(standing, sha256=wanted == "sha256", force=True)
    check(standing, wanted)


def test_sums_of_others_are_left_alone_where_there_is_no_manifest(tmp_path: Path) -> None:
    (tmp_path / SUMS).write_text("what somebody has written")
    fastshard.save_file(tensors(), tmp_path / WEIGHTS)
    assert (tmp_path / SUMS).read_text() == "what somebody has written"


@pytest.mark.parametrize(
    "text", ["", "{}", '{"format": "fastshard manifest", "version": 99, "files": {}}', "\0"]
)
def test_one_that_cannot_be_understood_stops_no_save(
    text: str, standing: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (standing / MANIFEST).write_text(text)
    (standing / SUMS).write_text("nothing of the kind")
    fastshard.save_file(tensors(), standing / "new.safetensors", manifest="sha256")
    assert described(standing) == summed(standing) == {"new.safetensors"}
    assert [record.message for record in caplog.records if "is made anew" in record.message]


def test_what_others_have_written_is_read(standing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing that is known already, or was there before."""
    began = time.time_ns()
    for path in standing.rglob("*"):
        os.utime(path, ns=(began - 10**9, began - 10**9))
    read: list[str] = []
    take = checksums.take

    def noting(wanted: Iterable[checksums.Sums], **how: Any) -> None:
        found = list(wanted)
        read.extend(one.path for one in found)
        take(found, **how)

    monkeypatch.setattr(manifests, "take", noting)
    data = bytearray((standing / OTHERS[0]).read_bytes())
    data[-1] ^= 1
    (standing / OTHERS[0]).write_bytes(data)  # of the same size
    (standing / OTHERS[1]).write_text("[]")
    (standing / "sub" / "more").write_text("x")
    (standing / "sub" / "vocab.txt").unlink()
    manifests.complete(str(standing), "sha256", since=began)
    assert described(standing) == summed(standing) == files_of(standing)
    assert sorted(os.path.relpath(path, standing) for path in read) == [OTHERS[1], OTHERS[0], "sub/more"]
    read.clear()
    manifests.complete(str(standing), "sha256", since=time.time_ns() + 10**9)
    assert not read
    (standing / "sub" / "even more").write_text("x")
    manifests.complete(str(standing), True, since=began, within=False)
    assert "sub/even more" not in described(standing) and "sub/more" in described(standing)


@pytest.mark.parametrize("saver", ["save_file", "in shards", "save_sharded_state"])
@pytest.mark.parametrize("where", ["record", "publish"])
def test_a_save_that_fails_leaves_files_and_what_is_said_of_them(
    saver: str, where: str, standing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(standing)

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(*((manifests, "take") if where == "record" else (record, "format_sums")), fail)
    with pytest.raises(OSError) as failed:
        SAVERS[saver](standing, manifest="sha256")
    assert failed.value.errno == errno.EIO and isinstance(failed.value, fastshard.SaveError) == (
        saver == "save_file"
    )
    assert ".fastshard-" not in str(failed.value)
    monkeypatch.undo()
    assert snapshot(standing) == before
    check(standing, "sha256")


def test_an_error_of_the_tensors_comes_first(standing: Path) -> None:
    before = snapshot(standing)
    for wanted in (False, True):
        with pytest.raises(ValueError):
            fastshard.save_file({"a": torch.ones(4, 4).t()}, standing / WEIGHTS, manifest=wanted)
        with pytest.raises(fastshard.SaveError):
            fastshard.save_file(tensors(), standing / "missing" / WEIGHTS, manifest=wanted)
    assert snapshot(standing) == before


def test_saves_into_one_folder_at_once(tmp_path: Path) -> None:
    barrier = threading.Barrier(6)

    def save(number: int) -> None:
        for turn in range(3):
            barrier.wait()
            fastshard.save_file(tensors(turn), tmp_path / f"{number}.safetensors", manifest="sha256")

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(save, range(6)))
    check(tmp_path, "sha256")
    assert len(files_of(tmp_path)) == 6


def test_ranks_save_into_one_folder(tmp_path: Path) -> None:
    """Each in a process of its own."""
    script = """
        import os, sys, torch, fastshard
        children = []
        for rank in range(3):
            pid = os.fork()
            if pid == 0:
                try:
                    state = {"a": torch.full((50,), float(rank)), "b": torch.arange(9.0)}
                    for _ in range(2):
                        fastshard.save_sharded_state(
                            state, sys.argv[1], tp_rank=rank, tp_size=3, max_size=200, manifest="sha256"
                        )
                    os._exit(0)
                finally:
                    os._exit(1)
            children.append(pid)
        sys.exit(any(os.waitpid(pid, 0)[1] for pid in children))
    """
    done = run(script, tmp_path / "served")
    assert done.returncode == 0, done.stderr
    check(tmp_path / "served", "sha256")
    assert len(files_of(tmp_path / "served")) == 9


def test_an_asynchronous_save_describes_what_it_has_written(tmp_path: Path) -> None:
    for turn in range(3):  # they appear in their order
        state = {"a": torch.full((1 << 18,), float(turn)), "b": torch.ones(3)}
        future = fastshard.save_torch_state_dict_async(
            state, tmp_path, max_shard_size=1000, manifest="sha256"
        )
        state["a"].fill_(99.0)
    future.result()
    check(tmp_path, "sha256")
    (shard,) = (n for n in files_of(tmp_path) if b'"a"' in (tmp_path / n).read_bytes()[:200] and "00" in n)
    assert (tmp_path / shard).read_bytes()[-4:] == torch.tensor(2.0).numpy().tobytes()


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("saver", ["save_file", "torch_save of much", "save_torch_state_dict"])
def test_a_save_behind_one_with_a_manifest(saver: str, asynchronous: bool, tmp_path: Path) -> None:
    """That may not have appeared when the later one begins."""
    name = "x.pt" if saver.startswith("torch") else WEIGHTS
    for _ in range(3):
        with fastshard.asynchronous():
            fastshard.save_files(
                {tmp_path / n: {"a": filled((1 << 20,))} for n in OTHERS[:1] + [name]}, manifest=True
            )
        with fastshard.asynchronous() if asynchronous else contextlib.nullcontext():
            SAVERS[saver](tmp_path)
        fastshard.wait_all()
        assert described(tmp_path) == {OTHERS[0]}


def test_a_file_whose_folder_is_being_changed_is_taken_out_of_no_hidden_manifest(tmp_path: Path) -> None:
    """Its name leads into the hidden folder of the other save for that moment."""
    new = tmp_path / ".fastshard-0123456789abcdef.staging" / ".new"
    new.mkdir(parents=True)
    SAVERS["torch_save of much"](new, manifest=True)
    (new.parent / ".now").symlink_to(".new")
    (tmp_path / "x.pt").symlink_to(f"{new.parent.name}/.now/x.pt")
    before = (new / MANIFEST).read_bytes()
    SAVERS["torch_save of much"](tmp_path, manifest=True)
    assert (new / MANIFEST).read_bytes() == before and described(tmp_path) == {"x.pt"}
    assert not (tmp_path / "x.pt").is_symlink()


def test_many_tensors(tmp_path: Path) -> None:
    state = {f"layers.{i}.weight": torch.full((i % 5,), float(i)) for i in range(20_000)}
    fastshard.save_torch_state_dict(state, tmp_path, max_shard_size="80KB", manifest=True)
    check(tmp_path, True)
    said = json.loads((tmp_path / MANIFEST).read_text())["files"]
    assert sum(len(entry.get("tensors", ())) for entry in said.values()) == 20_000


def test_names_that_gnu_escapes(tmp_path: Path) -> None:
    names = ["a\\b.safetensors", "c\nd.safetensors", "ä é.safetensors", "e\rf.safetensors", "*g.safetensors"]
    fastshard.save_files({tmp_path / name: tensors() for name in names}, manifest="sha256")
    check(tmp_path, "sha256")
    theirs = subprocess.run(["sha256sum", "--", *os.listdir(tmp_path)], cwd=tmp_path, capture_output=True)
    ours = {line for line in (tmp_path / SUMS).read_bytes().splitlines()}
    assert ours <= {*theirs.stdout.splitlines()} and len(ours) == len(names) + 1
    for name in names:
        fastshard.save_file(tensors(1), tmp_path / name)
    assert not {MANIFEST, SUMS} & {*os.listdir(tmp_path)}


def test_sums_are_read_as_they_are_written() -> None:
    sums = {"b": "0" * 64, "a/c": "f" * 64, "x\\\n": "1" * 64}
    assert format_sums(sums).splitlines() == [f"{'f' * 64}  a/c", f"{'0' * 64}  b", f"\\{'1' * 64}  x\\\\\\n"]


def test_what_was_read_for_it_leaves_the_page_cache(tmp_path: Path) -> None:
    state = {"a": filled((1 << 20,))}
    for name, keep in (("cached", True), ("dropped", False)):
        (tmp_path / name).mkdir()
        fastshard.save_torch_state_dict(state, tmp_path / name, keep_cached=keep, manifest="sha256")
        assert (pages_cached(tmp_path / name / WEIGHTS) > 0) == keep
        check(tmp_path / name, "sha256")


def test_durable(tmp_path: Path) -> None:
    fastshard.save_torch_state_dict(tensors(), tmp_path, max_shard_size=1000, durable=True, manifest="sha256")
    fastshard.save_file(tensors(), tmp_path / "x.safetensors", durable=True, manifest="sha256")
    check(tmp_path, "sha256")


@pytest.mark.parametrize(
    ("said", "wanted"),
    [(None, False), ("0", False), ("1", True), ("yes", True), ("SHA256", "sha256"), ("", False)],
)
def test_the_environment_asks_for_it(
    said: str | None, wanted: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(settings.MANIFEST_VARIABLE, raising=False)
    if said is not None:
        monkeypatch.setenv(settings.MANIFEST_VARIABLE, said)
    assert settings.manifest_wanted() == wanted


def test_blocks_ask_for_the_most_of_what_is_wanted() -> None:
    with pytest.raises(ValueError, match="'md5'"):
        fastshard.install(manifest="md5")  # type: ignore[arg-type]
    assert patching.manifest() is False
    with fastshard.installed(manifest=True):
        with fastshard.installed(manifest="sha256"), fastshard.installed():
            assert patching.manifest() == "sha256" == fastshard.status().manifest
            assert "with manifests" in str(fastshard.status())
        assert patching.manifest() is True
    assert patching.manifest() is False


@pytest.mark.parametrize("wanted", WANTED)
def test_savers_of_others(wanted: Any, tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    accelerate = pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import save_file

    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    with fastshard.installed(manifest=wanted):
        model.save_pretrained(tmp_path / "a", max_shard_size="50KB")
        accelerate.Accelerator(cpu=True).save_model(model, str(tmp_path / "b"), max_shard_size="50KB")
        (tmp_path / "c").mkdir()
        hub.save_torch_state_dict(tensors(), tmp_path / "c", max_shard_size=1000)
        (tmp_path / "d").mkdir()
        save_file(tensors(), tmp_path / "d" / WEIGHTS)
        torch.save(tensors(), tmp_path / "d" / "x.pt")
    for name in ("a", "b", "c"):
        check(tmp_path / name, wanted)
        assert len(files_of(tmp_path / name)) > 2
    assert described(tmp_path / "d") == set()  # of a single file nothing is said
    assert {"config.json", "generation_config.json"} < files_of(tmp_path / "a")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_checkpoints_of_trainers(asynchronous: bool, wanted: Any, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")

    class Model(transformers.PreTrainedModel):  # type: ignore[name-defined,misc]
        config_class = transformers.PretrainedConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.layer = torch.nn.Linear(40, 40)

        def forward(self, x: torch.Tensor, **_: object) -> dict[str, torch.Tensor]:
            return {"loss": self.layer(x).square().mean()}

    options = transformers.TrainingArguments(
        str(tmp_path / "run"),
        max_steps=4,
        save_steps=1,
        save_total_limit=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    data = [{"x": torch.ones(40)} for _ in range(8)]
    with fastshard.installed(manifest=wanted, asynchronous=asynchronous):
        transformers.Trainer(Model(transformers.PretrainedConfig()), options, train_dataset=data).train()
        made = accelerate.Accelerator(cpu=True)
        made.prepare(torch.nn.Linear(30, 30))
        made.save_state(str(tmp_path / "state"))
        fastshard.wait_all()
    assert sorted(os.listdir(tmp_path / "run")) == ["checkpoint-3", "checkpoint-4"]
    for folder in (*(tmp_path / "run").iterdir(), tmp_path / "state"):
        check(folder, wanted)
    assert {"optimizer.pt", "trainer_state.json", WEIGHTS} < files_of(tmp_path / "run" / "checkpoint-4")
