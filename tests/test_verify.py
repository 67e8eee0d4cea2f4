# SPDX-License-Identifier: Apache-2.0
"""``fastshard.verify``: what is damaged is found and named, what is sound is not, and nothing in a folder can end it."""

import hashlib
import json
import os
import random
import shutil
import socket
import subprocess
import warnings
import zlib
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file as stock_save_file

import fastshard
from fastshard import _native, verify
from fastshard.api import checked
from fastshard.cli import command as cli
from fastshard.engine import checksums
from fastshard.engine.checksums import Sums, take
from fastshard.formats.manifest import FileEntry, Manifest, TensorEntry
from fastshard.formats.naming import MANIFEST_NAME, SUMS_NAME
from fastshard.formats.safetensors import header, parse_header
from fastshard.formats.sha256sums import format_sums, read_sums

CODES = {"F32": 4, "BF16": 2, "I64": 8, "BOOL": 1}


def file_of(random_: random.Random, names: list[str]) -> bytes:
    """A safetensors file with tensors of these names and random bytes."""
    tensors = []
    for name in names:
        code, shape = random_.choice([*CODES]), [random_.randrange(4) for _ in range(random_.randrange(3))]
        nbytes = CODES[code]
        for size in shape:
            nbytes *= size
        tensors.append((name, code, tuple(shape), nbytes))
    head = header(tensors, random_.choice([None, {}, {"format": "pt"}]))
    return head + random_.randbytes(sum(nbytes for *_, nbytes in tensors))


def entry_of(data: bytes, is_safetensors: bool) -> FileEntry:
    if not is_safetensors:
        return FileEntry(len(data), zlib.crc32(data))
    begin = 8 + int.from_bytes(data[:8], "little")
    tensors = {
        t.name: TensorEntry(
            begin + t.begin, t.end - t.begin, zlib.crc32(data[begin + t.begin : begin + t.end])
        )
        for t in parse_header(data[8:begin]).tensors
    }
    return FileEntry(len(data), zlib.crc32(data[:begin]), tensors)


def manifest_of(files: dict[str, bytes]) -> bytes:
    entries = {name: entry_of(data, name.endswith(".safetensors")) for name, data in files.items()}
    return Manifest(files=entries).to_json().encode()


def sums_of(files: dict[str, bytes]) -> bytes:
    return os.fsencode(format_sums({name: hashlib.sha256(data).hexdigest() for name, data in files.items()}))


def checkpoint(random_: random.Random, *, manifest: bool = True, sums: bool = False) -> dict[str, bytes]:
    """The files of a sound checkpoint. Shards have at least one tensor, and some bytes."""
    shards = random_.randrange(1, 4)
    names = [
        f"layers.{i}.{random_.choice(['weight', 'größe', 'a/b'])}"
        for i in range(random_.randrange(1, 8) + shards)
    ]
    files = {
        "config.json": b'{"limit": Infinity}',
        "notes.txt": random_.randbytes(5),
        "training_args.bin": b"\0\1",
    }
    if shards == 1:
        files["model.safetensors"] = file_of(random_, names)
    else:
        places = {}
        for i in range(shards):
            name, mine = f"model-{i + 1:05}-of-{shards:05}.safetensors", names[i::shards]
            files[name] = file_of(random_, mine)
            places |= dict.fromkeys(mine, name)
        files["model.safetensors.index.json"] = json.dumps({"metadata": {}, "weight_map": places}).encode()
    if manifest:
        files[MANIFEST_NAME] = manifest_of(files)
    if sums:
        files[SUMS_NAME] = sums_of(files)
    return files


def put(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)


def run_of(random_: random.Random, top: Path, count: int) -> dict[Path, dict[str, bytes]]:
    made = {}
    for number in range(count):
        folder = top / f"checkpoint-{number}"
        made[folder] = checkpoint(random_, sums=number % 3 == 0)
        put(folder, made[folder])
    return made


def weights(files: dict[str, bytes]) -> list[str]:
    return [name for name in files if name.endswith(".safetensors")]


def found_in(report: fastshard.Report, folder: Path) -> list[checked.Problem]:
    return [problem for problem in report.problems if problem.path.startswith(f"{folder}/")]


# The marks ----------------------------------------------------------------------------------------------


def test_a_thousand_flipped_bits_are_found_and_named(tmp_path: Path) -> None:
    random_ = random.Random(1)
    run = run_of(random_, tmp_path, 50)
    assert verify(tmp_path).ok
    flipped, in_tensors = 0, 0
    for _ in range(20):
        expected = {}
        for folder, files in run.items():
            name = random_.choice([name for name in files if name != SUMS_NAME])
            at = random_.randrange(len(files[name]))
            if name in weights(files) and random_.random() < 0.7:
                at = len(files[name]) - 1 - at // 8
            changed = bytearray(files[name])
            changed[at] ^= 1 << random_.randrange(8)
            (folder / name).write_bytes(changed)
            expected[folder] = name, at
        report = verify(tmp_path)
        for folder, (name, at) in expected.items():
            found = found_in(report, folder)
            entry = entry_of(run[folder][name], name.endswith(".safetensors"))
            tensors = [t for t, e in (entry.tensors or {}).items() if e.offset <= at < e.offset + e.nbytes]
            if name == MANIFEST_NAME:  # may accuse a file
                assert found, (name, at)
            else:
                assert os.path.join(folder, name) in {problem.path for problem in found}, (name, at)
            if tensors:
                in_tensors += 1
                assert [p.tensor for p in found if p.tensor] == tensors
            flipped += 1
            (folder / name).write_bytes(run[folder][name])
        assert len({os.path.dirname(problem.path) for problem in report.problems}) == len(run)
    assert flipped == 1000 and in_tensors > 50
    assert verify(tmp_path).ok


@pytest.mark.parametrize("digests", [True, False])
def test_files_of_another_length_are_found_and_named(tmp_path: Path, digests: bool) -> None:
    random_ = random.Random(2)
    run = run_of(random_, tmp_path, 50)
    for folder, files in run.items():
        for name in (MANIFEST_NAME, SUMS_NAME):
            if not digests and name in files:
                (folder / name).unlink()
    for _ in range(2):
        cut = {}
        for folder, files in run.items():
            name = random_.choice(weights(files))
            data = files[name]
            other = (
                data[: random_.randrange(len(data))]
                if random_.random() < 0.5
                else data + random_.randbytes(9)
            )
            (folder / name).write_bytes(other)
            cut[folder] = name
        report = verify(tmp_path, quick=random_.random() < 0.5)
        for folder, name in cut.items():
            assert {problem.path for problem in found_in(report, folder)} == {os.path.join(folder, name)}
            (folder / name).write_bytes(run[folder][name])
        assert not any(problem.kind not in ("size", "header") for problem in report.problems)
    assert verify(tmp_path).ok


def test_swapped_shards_are_found_and_named(tmp_path: Path) -> None:
    """Also those of one size and header, which only their digests tell apart."""
    random_ = random.Random(3)
    swapped = 0
    for number in range(100):
        one, other = tmp_path / f"checkpoint-{number}", tmp_path / f"checkpoint-{number + 1000}"
        files = {one: checkpoint(random_), other: checkpoint(random_)}
        if number % 2:  # the same model, a step later
            data = files[one]
            later = {
                name: data[name][: 8 + int.from_bytes(data[name][:8], "little")] for name in weights(data)
            }
            files[other] = {n: d for n, d in data.items() if n != MANIFEST_NAME}
            for name, head in later.items():
                files[other][name] = head + random_.randbytes(len(data[name]) - len(head))
            files[other][MANIFEST_NAME] = manifest_of(files[other])
        names = [name for name in weights(files[one]) if name in files[other]]
        name = names[0] if names else None
        for folder, mine in files.items():
            theirs = files[other if folder == one else one]
            other_data = theirs[name or weights(theirs)[0]]
            name_here = name or weights(mine)[0]
            put(folder, {**mine, name_here: other_data})
            if other_data == mine[name_here]:
                continue
            swapped += 1
            report = verify(folder)
            assert os.path.join(folder, name_here) in {problem.path for problem in report.problems}
    assert swapped >= 195


def test_no_false_alarm_in_a_thousand_sound_folders(tmp_path: Path) -> None:
    random_ = random.Random(4)
    for number in range(1000):
        files = checkpoint(random_, manifest=random_.random() < 0.7, sums=random_.random() < 0.3)
        put(tmp_path / f"run-{number % 10}" / f"checkpoint-{number}", files)
    report = verify(tmp_path)
    assert report.problems == []
    files = [path for path in tmp_path.rglob("*.safetensors")]
    assert report.files >= len(files)
    without = {path for path in files if not {MANIFEST_NAME, SUMS_NAME} & {*os.listdir(path.parent)}}
    unknown = {Path(path) for path in report.without_digests if path.endswith(".safetensors")}
    assert unknown == without and report.compared > 0


# What is compared without digests -------------------------------------------------------------------------


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    files = checkpoint(random.Random(6), manifest=False)
    assert len(weights(files)) > 1
    put(folder, files)
    return folder


def kinds(report: fastshard.Report) -> dict[str, str]:
    return {os.path.basename(problem.path): problem.kind for problem in report.problems}


def test_index_and_files_are_compared(plain: Path) -> None:
    shards = sorted(plain.glob("*.safetensors"))
    index = plain / "model.safetensors.index.json"
    assert verify(plain).ok
    shards[0].rename(plain / "gone")
    assert kinds(verify(plain)) == {shards[0].name: "missing"}
    (plain / "gone").rename(shards[0])
    told = json.loads(index.read_text())
    name = next(tensor for tensor, file in told["weight_map"].items() if file == shards[0].name)
    told["weight_map"][name] = shards[1].name
    index.write_text(json.dumps(told))
    report = verify(plain)
    assert kinds(report) == {shards[0].name: "index", shards[1].name: "index"}
    assert {problem.tensor for problem in report.problems} == {name}
    index.write_text("{")
    assert kinds(verify(plain)) == {index.name: "index"}


def test_obsolete_shards_and_those_that_are_missing(plain: Path) -> None:
    shards = sorted(plain.glob("*.safetensors"))
    shutil.copy(shards[0], plain / "model-00001-of-00009.safetensors")
    shutil.copy(shards[0], plain / "model.safetensors")
    shutil.copy(shards[0], plain / "consolidated.safetensors")  # another model's, for all that is known
    found = kinds(verify(plain))
    assert found == {"model-00001-of-00009.safetensors": "obsolete", "model.safetensors": "obsolete"}
    (plain / "model.safetensors").unlink()
    (plain / "model.safetensors.index.json").unlink()
    assert kinds(verify(plain)) == {"model-00001-of-00009.safetensors": "missing"}


def test_configurations_and_archives(plain: Path) -> None:
    (plain / "config.json").write_text('{"a": ')
    torch.save({"state": torch.arange(1000.0), "step": 3}, plain / "optimizer.pt")
    report = verify(plain)
    assert (
        kinds(report) == {"config.json": "contents"}
        and str(plain / "optimizer.pt") not in report.without_digests
    )
    (plain / "config.json").write_text("{}")
    data = bytearray((plain / "optimizer.pt").read_bytes())
    data[data.index(torch.arange(1000.0).numpy().tobytes()) + 5] ^= 1
    (plain / "optimizer.pt").write_bytes(data)
    assert kinds(verify(plain)) == {"optimizer.pt": "damaged"} and verify(plain, quick=True).ok
    (plain / "optimizer.pt").write_bytes(data[:-50])
    assert kinds(verify(plain, quick=True)) == {"optimizer.pt": "contents"}


def test_checkpoints_of_dcp(tmp_path: Path) -> None:
    from torch.distributed import checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        dcp.save({"a": torch.arange(1000.0), "b": torch.ones(3)}, checkpoint_id=tmp_path, no_dist=True)
    assert verify(tmp_path).ok
    (file,) = tmp_path.glob("*.distcp")
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    assert kinds(verify(tmp_path)) == {file.name: "size"}
    file.unlink()
    assert kinds(verify(tmp_path)) == {file.name: "missing"}
    file.write_bytes(data)
    (tmp_path / ".metadata").unlink()
    assert kinds(verify(tmp_path)) == {".metadata": "missing"}


# Anything may be in a folder ------------------------------------------------------------------------------


def test_any_bytes_may_be_in_a_folder(tmp_path: Path) -> None:
    random_ = random.Random(5)
    names = [
        *(
            "model.safetensors",
            "model-00001-of-00002.safetensors",
            "model.safetensors.index.json",
            "config.json",
        ),
        *(
            MANIFEST_NAME,
            SUMS_NAME,
            "fastshard-model-rank-0.json",
            "pytorch_model.bin",
            "x.pt",
            ".metadata",
            "__0_0.distcp",
        ),
        *("pytorch_model.bin.index.json", "a\nb\udcff.safetensors", "tokenizer.json"),
    ]
    sources = [
        *checkpoint(random_, sums=True).values(),
        *checkpoint(random_).values(),
        *(
            b"",
            b"{}",
            b"[]",
            b"null",
            b"[" * 5000,
            b'{"weight_map": {"a": ["b"]}}',
            b'{"weight_map": {"a": "../b"}}',
        ),
        *(
            b"PK\3\4",
            b"\x80\2}q\0.",
            b"0" * 64 + b"  ../../etc/passwd\n",
            b"\\" + b"0" * 64 + b"  \\x\n",
            b"\xff\xfe",
        ),
        b'{"format": "fastshard manifest", "version": 1, "files": {"a": {"size": 1e400}}}',
        b'{"format": "fastshard manifest", "version": 1, "files": {}, "aliases": [1]}',
        b'{"format": "fastshard manifest", "version": 1, "files": {"model.safetensors": {"size": 9, "crc32": "00000000",'
        b' "tensors": {"a": [0, 9, "00000000"], "b": [0, 9, null]}}}}',
        b'{"format": "fastshard manifest", "version": 1, "files": {"a\\u0000b": {"size": 1}, "\\ud800": {"size": 1}}}',
        (2**63).to_bytes(8, "little") + b"{}",
    ]
    for number in range(400):
        folder = tmp_path / str(number)
        folder.mkdir()
        inside = os.open(folder, os.O_PATH)
        for name in random_.sample(names, random_.randrange(1, 7)):
            path = folder / name
            what = random_.random()
            if what < 0.05:
                path.mkdir()
            elif what < 0.1:
                os.mkfifo(path)
            elif what < 0.2:
                path.symlink_to(
                    random_.choice([name, "nowhere", "model.safetensors", "/", "/dev/null", "/proc/self/mem"])
                )
            elif what < 0.22:
                with socket.socket(socket.AF_UNIX) as made:
                    made.bind(f"/proc/self/fd/{inside}/{len(name)}.bin")
            else:
                data = bytearray(random_.choice(sources))
                for _ in range(random_.choice([0, 0, 1, 3, 20])):
                    if data:
                        data[random_.randrange(len(data))] = random_.randrange(256)
                path.write_bytes(data[: random_.randrange(len(data) + 1)] if random_.random() < 0.2 else data)
        how = {
            "quick": random_.random() < 0.2,
            "crc32": random_.random() < 0.2,
            "direct": random_.random() < 0.2,
        }
        os.close(inside)
        report = verify(folder, **how)
        json.dumps(report.as_dict())
        assert "\n" not in str(report.path)


def test_names_that_are_links_of_a_change_are_ordinary(tmp_path: Path) -> None:
    files = checkpoint(random.Random(7))
    hidden = tmp_path / ".fastshard-0123456789abcdef.staging"
    put(hidden / ".new", files)
    (hidden / ".now").symlink_to(".new")
    for name in files:
        (tmp_path / name).symlink_to(f"{hidden.name}/.now/{name}")
    assert verify(tmp_path).ok and verify(tmp_path).compared == sum(
        len(data) for name, data in files.items() if name != MANIFEST_NAME
    )
    (tmp_path / "latest").symlink_to(".")  # a loop
    (tmp_path / weights(files)[0]).unlink()
    (tmp_path / weights(files)[0]).symlink_to("nowhere")
    found = verify(tmp_path)
    assert kinds(found) == {weights(files)[0]: "missing"} and "nowhere" in found.problems[0].text


# What others do meanwhile ---------------------------------------------------------------------------------


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch):
    """Has things done once between the look at files and the reading of their bytes."""
    left = []

    def check(*arguments, **options):
        while left:
            left.pop()()
        return checked.check(*arguments, **options)

    monkeypatch.setattr("fastshard.tools.verify.check", check)
    return left


def test_a_save_that_appears_meanwhile_is_no_damage(tmp_path: Path, meanwhile: list) -> None:
    random_ = random.Random(8)
    folder = tmp_path / "model"
    put(folder, checkpoint(random_))

    def save() -> None:
        shutil.rmtree(folder)
        put(folder, checkpoint(random_))

    meanwhile += [save]
    assert verify(folder).ok
    meanwhile += [lambda: (folder / "config.json").write_bytes(b"")]
    assert kinds(verify(folder)) == {"config.json": "size"} or not verify(folder).ok


def test_a_checkpoint_that_is_rotated_away_is_no_damage(tmp_path: Path, meanwhile: list) -> None:
    run_of(random.Random(9), tmp_path, 4)
    meanwhile += [lambda: shutil.rmtree(tmp_path / "checkpoint-2")]
    report = verify(tmp_path)
    assert report.ok and report.vanished == [str(tmp_path / "checkpoint-2")]
    meanwhile += [lambda: shutil.rmtree(tmp_path)]
    with pytest.raises(FileNotFoundError):
        verify(tmp_path)


# Sums -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direct", [False, True])
def test_sums_of_parts_are_put_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool
) -> None:
    monkeypatch.setattr(checksums, "_STEP_NBYTES", 24 * 4096)
    monkeypatch.setattr(checksums, "_STRETCH_NBYTES", 60 * 4096)
    random_ = random.Random(10)
    data = random_.randbytes(1_234_567)
    (tmp_path / "f").write_bytes(data)
    ranges, at = [], 3
    while at < len(data):
        nbytes = min(random_.choice([0, 1, 7, 4096, 333_333]), len(data) - at)
        ranges.append((at, nbytes))
        at += nbytes + random_.choice([0, 0, 0, 5])
    passed: list[int] = []
    sums = Sums(str(tmp_path / "f"), len(data), ranges, sha256=True)
    take([sums], direct=direct, passed=passed.append)
    assert sums.error is None and sums.crc32s == [zlib.crc32(data[at : at + n]) for at, n in ranges]
    assert sums.sha256_found == hashlib.sha256(data).hexdigest()
    assert sum(passed) == sums.work
    short = Sums(str(tmp_path / "f"), len(data) + 1, [(0, len(data) + 1)])
    take([short, gone := Sums(str(tmp_path / "g"), 1, sha256=True)], direct=direct)
    assert isinstance(short.error, checksums.EndsEarly) and isinstance(gone.error, FileNotFoundError)


def test_ranges_that_no_file_can_have_are_refused(tmp_path: Path) -> None:
    block = bytearray(3)
    with open(__file__, "rb") as file:
        with pytest.raises(ValueError, match="beyond the size that a file can have"):
            _native.crc32_of_ranges(file.fileno(), b"f", 0, [2**63, 2**63], False, block)
        assert _native.crc32_of_ranges(file.fileno(), b"f", 5, [], False, block) == []
        assert _native.crc32_of_ranges(file.fileno(), b"f", 5, [0, 0], False, block) == [0, 0]
        wanted = zlib.crc32(Path(__file__).read_bytes()[5:15])
        assert _native.crc32_of_ranges(file.fileno(), b"f", 5, [10], False, block) == [wanted]
        for direct, unusable in ((False, bytearray()), (True, block)):
            with pytest.raises(ValueError, match="the block cannot be read into"):
                _native.crc32_of_ranges(file.fileno(), b"f", 0, [5], direct, unusable)
    (tmp_path / "closed").touch()
    with pytest.raises(OSError, match="closed"):
        _native.crc32_of_ranges(-1, os.fsencode(tmp_path / "closed"), 0, [5], False, block)


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no sha256sum here")
def test_sums_are_those_of_gnu(tmp_path: Path) -> None:
    names = [
        "plain",
        "with space",
        "back\\slash",
        "new\nline",
        "return\r",
        "*star",
        "größe",
        os.fsdecode(b"\xff"),
    ]
    for name in names:
        (tmp_path / name).write_bytes(os.fsencode(name))
    text = subprocess.run(["sha256sum", "--", *names], cwd=tmp_path, capture_output=True, check=True).stdout
    (tmp_path / SUMS_NAME).write_bytes(text)
    found = read_sums(tmp_path / SUMS_NAME)
    assert found == {name: hashlib.sha256(os.fsencode(name)).hexdigest() for name in names}
    (tmp_path / SUMS_NAME).write_bytes(os.fsencode(format_sums(found)))
    subprocess.run(["sha256sum", "--strict", "-c", SUMS_NAME], cwd=tmp_path, capture_output=True, check=True)
    assert verify(tmp_path).ok and verify(tmp_path).files == len(names)
    (tmp_path / "new\nline").write_bytes(b"other")
    assert [problem.kind for problem in verify(tmp_path).problems] == ["damaged"]


# Loading --------------------------------------------------------------------------------------------------


def test_load_file_compares_first(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    stock_save_file({"a": torch.arange(100.0), "b": torch.ones(5)}, path)
    with pytest.raises(ValueError, match="cannot be verified"):
        fastshard.load_file(path, verify=True)
    fastshard.write_manifest(tmp_path)
    assert fastshard.load_file(path, verify=True)["a"].equal(torch.arange(100.0))
    data = bytearray(path.read_bytes())
    data[-7] ^= 4
    path.write_bytes(data)
    with pytest.raises(SafetensorError, match=r"model\.safetensors: tensor 'b': its CRC-32 is"):
        fastshard.load_file(path, verify=True)
    assert fastshard.load_file(path).keys() == {"a", "b"}
    with pytest.raises(FileNotFoundError):
        fastshard.load_file(tmp_path / "other", verify=True)


def test_load_sharded_state_compares_first(tmp_path: Path) -> None:
    state = {"a": torch.arange(100.0), "b": torch.ones(5)}
    fastshard.save_sharded_state(state, tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    with pytest.raises(ValueError, match="cannot be verified"):
        fastshard.load_sharded_state(state, tmp_path, verify=True)
    (tmp_path / SUMS_NAME).write_bytes(sums_of({path.name: path.read_bytes()}))
    target = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    fastshard.load_sharded_state(target, tmp_path, verify=True)
    assert all(target[name].equal(tensor) for name, tensor in state.items())
    # With the manifest's own digests the tensor is known.
    (told,) = tmp_path.glob("fastshard-*.json")
    text = json.loads(told.read_text())
    for tensor in text["files"][path.name]["tensors"].values():
        tensor[2] = f"{zlib.crc32(path.read_bytes()[tensor[0] : tensor[0] + tensor[1]]):08x}"
    first = min(tensor[0] for tensor in text["files"][path.name]["tensors"].values())
    text["files"][path.name]["crc32"] = f"{zlib.crc32(path.read_bytes()[:first]):08x}"
    told.write_text(json.dumps(text))
    fastshard.load_sharded_state(target, tmp_path, verify=True)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    before = {name: tensor.clone() for name, tensor in target.items()}
    with pytest.raises(SafetensorError, match=r"tensor '[ab]': its CRC-32 is"):
        fastshard.load_sharded_state(target, tmp_path, verify=True)
    assert all(target[name].equal(tensor) for name, tensor in before.items())
    assert len(verify(tmp_path).problems) == 2  # SHA-256, and the tensor


# Manifests, the commands ----------------------------------------------------------------------------------


def test_a_manifest_can_be_made_later(tmp_path: Path) -> None:
    files = checkpoint(random.Random(11), manifest=False)
    folder = tmp_path / "model"
    put(folder, files)
    put(folder / "vae", {"model.safetensors": files[weights(files)[0]]})  # the same tensors again
    manifest = fastshard.write_manifest(folder, sha256=True)
    assert {*manifest.files} == {*files, "vae/model.safetensors"}
    assert (folder / MANIFEST_NAME).read_text() == manifest.to_json()
    for name, data in files.items():
        assert manifest.files[name] == entry_of(data, name.endswith(".safetensors"))
    report = verify(folder)
    assert (
        report.ok and not report.without_digests and report.files == len(files) + 2
    )  # the manifest has a digest, too
    if shutil.which("sha256sum"):
        subprocess.run(
            ["sha256sum", "--strict", "-c", SUMS_NAME], cwd=folder, capture_output=True, check=True
        )
    with pytest.raises(FileExistsError):
        fastshard.write_manifest(folder)
    fastshard.write_manifest(folder, force=True)
    assert not (folder / SUMS_NAME).exists() and verify(folder).ok
    (folder / "vae" / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match="vae"):
        fastshard.write_manifest(folder, force=True)
    assert kinds(verify(folder)) == {"model.safetensors": "size"}
    with pytest.raises(ValueError, match="several checkpoints"):
        put(tmp_path / "checkpoint-1", files)
        fastshard.write_manifest(tmp_path)


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = checkpoint(random.Random(12), manifest=False)
    folder = tmp_path / "checkpoint-7"
    put(folder, files)
    assert cli.main(["verify", str(tmp_path)]) == 0 and "no digest is known" in capsys.readouterr().out
    assert cli.main(["verify", "--strict", str(tmp_path)]) == 1
    assert cli.main(["manifest", "--sha256", str(folder)]) == 0
    assert cli.main(["manifest", str(folder)]) == 1 and "is there already" in capsys.readouterr().err
    assert cli.main(["verify", "--strict", str(tmp_path)]) == 0 and "sound" in capsys.readouterr().out
    assert cli.main(["verify", "--quiet", str(tmp_path)]) == 0 and capsys.readouterr().out == ""
    name = weights(files)[0]
    entry = entry_of(files[name], True)
    tensor, (offset, *_) = next((t, e) for t, e in entry.tensors.items() if e.nbytes)
    data = bytearray(files[name])
    data[offset] ^= 1
    (folder / name).write_bytes(data)
    assert cli.main(["verify", str(folder / name)]) == 1
    assert f"tensor {tensor}: its CRC-32 is" in capsys.readouterr().out
    assert cli.main(["verify", "--json", "--crc32", str(tmp_path)]) == 1
    told = json.loads(capsys.readouterr().out)
    (problem,) = told["problems"]
    assert not told["ok"] and (problem["path"], problem["tensor"]) == (str(folder / name), tensor)
    assert cli.main(["verify", str(tmp_path / "nowhere")]) == 1 and "No such file" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        cli.main(["verify"])
    assert ended.value.code == 2
