# SPDX-License-Identifier: Apache-2.0
"""Digests that are known spare others a pass: statements for other tools, and uploads to the Hub, read no weights."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

import fastshard
from fastshard import cli
from fastshard.formats.digests import known_digest, known_digests
from fastshard.formats.manifest import FileEntry, Manifest
from fastshard.formats.naming import MANIFEST_NAME, SUMS_NAME
from fastshard.tools.statements import statement_of

WEIGHTS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
PAST = 1_600_000_000


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder with sums that coreutils have made, and a manifest with the sizes."""
    folder = tmp_path / "a model"
    (folder / "assets").mkdir(parents=True)
    fastshard.save_files({folder / name: {name: torch.rand(5000)} for name in WEIGHTS})
    for name in ("config.json", "model.safetensors.index.json", "README.md", "modeling.py", "assets/a-b.txt"):
        (folder / name).write_text(name)
    for path in folder.rglob("*"):
        os.utime(path, (PAST, PAST))
    seal(folder)
    return folder


def seal(folder: Path) -> None:
    files = sorted(
        str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != SUMS_NAME
    )
    sizes = {name: FileEntry(os.path.getsize(folder / name)) for name in files if name != MANIFEST_NAME}
    (folder / MANIFEST_NAME).write_text(Manifest(files=sizes).to_json())
    sums = subprocess.run(
        ["sha256sum", *sorted({*files, MANIFEST_NAME})], cwd=folder, capture_output=True, check=True
    ).stdout
    (folder / SUMS_NAME).write_bytes(sums)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def all_digests(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): digest(p) for p in folder.rglob("*") if p.is_file()}


@contextlib.contextmanager
def weights_unreadable(folder: Path) -> Iterator[None]:
    """Weights whose bytes are not those of the sums any more, though nothing else tells."""
    kept = {}
    for name in WEIGHTS:
        path = folder / name
        kept[path], times = path.read_bytes(), path.stat()
        path.write_bytes(bytes(len(kept[path])))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    yield
    for path, content in kept.items():
        path.write_bytes(content)
        os.utime(path, (PAST, PAST))


# The digests ---------------------------------------------------------------------------------------------


def test_what_is_known(checkpoint: Path) -> None:
    known = known_digests(checkpoint)
    assert {name: entry.sha256 for name, entry in known.items()} == all_digests(checkpoint)
    assert {n: e.nbytes for n, e in known.items()} == {n: os.path.getsize(checkpoint / n) for n in known}
    for name in (*WEIGHTS, "config.json", MANIFEST_NAME):
        assert known_digest(checkpoint / name) == digest(checkpoint / name)
    assert known_digest(checkpoint / SUMS_NAME) is None
    assert known_digest(checkpoint / "assets" / "a-b.txt") is None  # its folder has none


def rewritten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[::-1])


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")
    os.utime(path, (PAST, PAST))


def gone(path: Path) -> None:
    path.unlink()


def replaced_with_an_old_time(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes()[::-1])
    os.utime(other, (PAST, PAST))
    os.utime(path.parent / SUMS_NAME, (PAST + 1, PAST + 1))
    other.replace(path)


@pytest.mark.parametrize("change", [rewritten, longer, gone])
def test_what_was_changed_later_is_not_known(checkpoint: Path, change: Callable[[Path], None]) -> None:
    change(checkpoint / WEIGHTS[0])
    assert known_digest(checkpoint / WEIGHTS[0]) is None
    assert known_digest(checkpoint / WEIGHTS[1]) == digest(checkpoint / WEIGHTS[1])
    with pytest.raises((OSError, ValueError), match=WEIGHTS[0]):
        known_digests(checkpoint)


def test_a_file_that_came_later_with_an_old_time(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``cp -p`` brings one. Only its status tells."""
    import fastshard.formats.digests as module

    monkeypatch.setattr(module, "_PUBLICATION_NS", -1_000_000_000_000)  # all of this happens within a moment
    replaced_with_an_old_time(checkpoint / WEIGHTS[0])
    assert known_digest(checkpoint / WEIGHTS[0]) is None


@pytest.mark.parametrize("text", ["no sum", f"{'0' * 64}  ../other\n", f"{'0' * 64}  /etc/passwd\n"])
def test_sums_that_are_none(checkpoint: Path, text: str) -> None:
    (checkpoint / SUMS_NAME).write_text(text)
    assert known_digest(checkpoint / WEIGHTS[0]) is None
    with pytest.raises(ValueError, match=SUMS_NAME):
        known_digests(checkpoint)


# Statements ----------------------------------------------------------------------------------------------


def test_in_toto(checkpoint: Path) -> None:
    with weights_unreadable(checkpoint):
        found = json.loads(statement_of(checkpoint, "in-toto"))
    resources = {entry["name"]: entry["digest"] for entry in found["predicate"]["resources"]}
    assert resources == all_digests(checkpoint)
    assert list(resources) == sorted(resources, key=lambda name: Path(name).parts)
    concatenated = b"".join(bytes.fromhex(value) for value in resources.values())
    assert found["subject"] == [
        {"name": "a model", "digest": {"sha256": hashlib.sha256(concatenated).hexdigest()}}
    ]


def test_in_toto_is_what_model_signing_makes_of_the_files(checkpoint: Path) -> None:
    hashing = pytest.importorskip("model_signing.hashing")
    signing = pytest.importorskip("model_signing._signing.signing")
    ours = signing.dsse_payload_to_manifest(json.loads(statement_of(checkpoint, "in-toto")))
    theirs = hashing.Config().hash(checkpoint)
    assert ours == theirs and ours.model_name == theirs.model_name
    assert signing.Payload(ours).statement.pb.subject == signing.Payload(theirs).statement.pb.subject


def test_a_signature_of_it_is_verified_by_model_signing(checkpoint: Path, tmp_path: Path) -> None:
    signing = pytest.importorskip("model_signing._signing.signing")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from model_signing import verifying
    from model_signing._signing import sign_ec_key

    key = ec.generate_private_key(ec.SECP256R1())
    private, public, signature = tmp_path / "key", tmp_path / "key.pub", tmp_path / "model.sig"
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    public.write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    manifest = signing.dsse_payload_to_manifest(json.loads(statement_of(checkpoint, "in-toto")))
    sign_ec_key.Signer(private).sign(signing.Payload(manifest)).write(signature)
    verify = functools.partial(
        verifying.Config().use_elliptic_key_verifier(public_key=public).verify, checkpoint, signature
    )
    verify()
    rewritten(checkpoint / WEIGHTS[1])
    with pytest.raises(ValueError, match=WEIGHTS[1]):
        verify()


def test_oci(checkpoint: Path, tmp_path: Path) -> None:
    layout = tmp_path / "layout"
    with weights_unreadable(checkpoint):
        text = statement_of(checkpoint, "oci", layout=layout)
    manifest = json.loads(text)
    files = all_digests(checkpoint)
    layers = {layer["annotations"]["org.cncf.model.filepath"]: layer for layer in manifest["layers"]}
    assert {name: layer["digest"] for name, layer in layers.items()} == {
        name: f"sha256:{value}" for name, value in files.items()
    }
    kinds = {
        name: layer["mediaType"].removeprefix("application/vnd.cncf.model.") for name, layer in layers.items()
    }
    assert kinds == {
        **dict.fromkeys(files, "weight.config.v1.raw"),
        **dict.fromkeys(WEIGHTS, "weight.v1.raw"),
        "README.md": "doc.v1.raw",
        "modeling.py": "code.v1.raw",
    }
    # The layout: every blob is where its digest says, from the index on.
    assert json.loads((layout / "oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}
    (entry,) = json.loads((layout / "index.json").read_text())["manifests"]
    assert blob(layout, entry) == text.encode()
    config = json.loads(blob(layout, manifest["config"]))
    assert config["modelfs"] == {
        "type": "layers",
        "diffIds": [layer["digest"] for layer in manifest["layers"]],
    }
    for name, layer in layers.items():
        assert blob(layout, layer) == (checkpoint / name).read_bytes()
    assert len(list((layout / "blobs" / "sha256").iterdir())) == len({*files.values()}) + 2
    assert statement_of(checkpoint, "oci") == text
    with pytest.raises(FileExistsError):
        statement_of(checkpoint, "oci", layout=layout)


def blob(layout: Path, descriptor: dict[str, Any]) -> bytes:
    content = (layout / "blobs" / "sha256" / descriptor["digest"].removeprefix("sha256:")).read_bytes()
    assert len(content) == descriptor["size"]
    assert f"sha256:{hashlib.sha256(content).hexdigest()}" == descriptor["digest"]
    return content


def test_skopeo_copies_the_layout_and_checks_it(checkpoint: Path, tmp_path: Path) -> None:
    skopeo = shutil.which("skopeo")
    if skopeo is None:
        pytest.skip("no skopeo here")
    statement_of(checkpoint, "oci", layout=tmp_path / "layout")
    call = [skopeo, "--insecure-policy", "copy", f"oci:{tmp_path}/layout:a-model"]
    subprocess.run([*call, f"dir:{tmp_path}/sound"], check=True, capture_output=True)
    manifest = json.loads((tmp_path / "sound" / "manifest.json").read_text())
    assert manifest == json.loads(statement_of(checkpoint, "oci"))
    with weights_unreadable(checkpoint):
        found = subprocess.run([*call, f"dir:{tmp_path}/damaged"], capture_output=True, text=True)
    assert found.returncode != 0 and "igest did not match" in found.stderr


def test_digests_that_are_written_again_are_believed(tmp_path: Path) -> None:
    """The manifest is there already, to the byte, and only gets a new time: not a later one than ``SHA256SUMS`` has."""
    fastshard.save_file({"a": torch.zeros(1000)}, tmp_path / "model.safetensors")
    for _ in range(3):
        fastshard.write_manifest(tmp_path, sha256=True, force=True)
        assert set(known_digests(str(tmp_path))) == {"model.safetensors", MANIFEST_NAME, SUMS_NAME}


def test_the_command(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layout = str(tmp_path / "layout")
    for given in (["in-toto"], ["oci"], ["oci", "--layout", layout]):
        assert cli.main(["manifest", str(checkpoint), "--format", *given]) == 0
        assert capsys.readouterr().out == statement_of(checkpoint, given[0])  # type: ignore[arg-type]
    assert os.path.exists(os.path.join(layout, "index.json"))
    for given in (["--layout", layout], ["--format", "oci", "--sha256"], [layout, "--format", "oci"]):
        assert cli.main(["manifest", str(checkpoint), *given]) == 1
        assert "--format" in capsys.readouterr().err
    rewritten(checkpoint / WEIGHTS[0])
    assert cli.main(["manifest", str(checkpoint), "--format", "oci"]) == 1
    assert "was changed after SHA256SUMS" in capsys.readouterr().err


def test_arguments(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="in-toto, oci"):
        statement_of(checkpoint, "spdx")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="layout"):
        statement_of(checkpoint, "in-toto", layout="x")
    (checkpoint / SUMS_NAME).unlink()
    with pytest.raises(FileNotFoundError, match=SUMS_NAME):
        statement_of(checkpoint, "oci")


# Uploads -------------------------------------------------------------------------------------------------


class Hub(ThreadingHTTPServer):
    """As much of the Hub as a commit asks for. It has every large file already."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.batches: list[dict[str, Any]] = []
        self.committed: dict[str, str] = {}

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:  # noqa: N802
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "lfs", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self._answer({"files": files})
        if self.path.endswith("/info/lfs/objects/batch"):
            asked = json.loads(body)["objects"]
            self.server.batches.append(asked)
            return self._answer({"transfer": "basic", "objects": asked})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "lfsFile":
                self.server.committed[line["value"]["path"]] = line["value"]["oid"]
        return self._answer({"commitUrl": f"{self.server.endpoint}/o/r/commit/0", "commitOid": "0"})

    def _answer(self, content: object) -> None:
        text = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that huggingface_hub reads to hash them."""
    lfs = pytest.importorskip("huggingface_hub.lfs", exc_type=ImportError)
    if not hasattr(lfs.UploadInfo, "is_hashed"):
        pytest.skip("this huggingface_hub hashes at once")
    found: list[str] = []
    original = lfs.sha_fileobj

    def counted(file: Any, *args: Any) -> bytes:
        found.append(os.path.basename(file.name))
        return original(file, *args)

    monkeypatch.setattr(lfs, "sha_fileobj", counted)
    return found


def push(folder: Path, hub: Hub, names: Iterable[str] = WEIGHTS) -> None:
    from huggingface_hub import CommitOperationAdd, HfApi

    operations = [CommitOperationAdd(name, folder / name) for name in names]
    HfApi(endpoint=hub.endpoint, token="hf_x").create_commit("o/r", operations, commit_message="weights")  # noqa: S106


def test_an_upload_hashes_no_file_whose_digest_is_known(
    checkpoint: Path, hub: Hub, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import _commit_api

    monkeypatch.setattr(_commit_api, "is_xet_available", lambda: False)
    expected = {name: digest(checkpoint / name) for name in WEIGHTS}
    with fastshard.installed():
        push(checkpoint, hub)
        assert hashed == []
        assert hub.committed == expected
        assert [{entry["oid"] for entry in batch} for batch in hub.batches] == [{*expected.values()}]
        rewritten(checkpoint / WEIGHTS[1])
        push(checkpoint, hub)
        assert hashed == [WEIGHTS[1]]
        assert hub.committed == {name: digest(checkpoint / name) for name in WEIGHTS} != expected
    push(checkpoint, hub)
    assert sorted(hashed[1:]) == [*WEIGHTS]


def test_what_was_just_saved_is_known(
    tmp_path: Path, hub: Hub, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the folder changes: new, other files, the same files."""
    import huggingface_hub
    from huggingface_hub import _commit_api

    monkeypatch.setattr(_commit_api, "is_xet_available", lambda: False)
    for shard_size in ("5GB", "6KB", "6KB"):
        tensors = {f"t{i}": torch.rand(1000) for i in range(3)}
        with fastshard.installed(manifest="sha256"):
            huggingface_hub.save_torch_state_dict(tensors, tmp_path, max_shard_size=shard_size)
            names = sorted(path.name for path in tmp_path.glob("model*"))
            hub.committed.clear()
            push(tmp_path, hub, names)
        assert hub.committed == {name: digest(tmp_path / name) for name in names}
        assert len(names) == (1 if shard_size == "5GB" else 4)
    assert hashed == []


def test_xet_is_told_the_digest(
    checkpoint: Path, hub: Hub, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    xet = pytest.importorskip("hf_xet")
    from huggingface_hub.utils import _xet

    told: dict[str, object] = {}

    class Session:
        @contextlib.contextmanager
        def new_upload_commit(self, **_: object) -> Iterator[Session]:
            yield self

        def start_upload_file(self, path: str, sha256: object) -> Session:
            told[os.path.basename(path)] = sha256
            return self

        def result(self) -> Any:
            return type("Result", (), {"xet_info": type("Info", (), {"sha256": "00" * 32})})

    monkeypatch.setattr(_xet, "get_xet_session", Session)
    rewritten(checkpoint / WEIGHTS[1])
    with fastshard.installed():
        push(checkpoint, hub)
    assert told == {WEIGHTS[0]: digest(checkpoint / WEIGHTS[0]), WEIGHTS[1]: xet.COMPUTE_SHA256}
    assert hashed == []
