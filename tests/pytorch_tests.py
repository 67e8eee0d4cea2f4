# SPDX-License-Identifier: Apache-2.0
"""Runs PyTorch's own tests of ``torch.distributed.checkpoint`` with fastshard's writers and readers in the place of
torch's.

    python tests/pytorch_tests.py CHECKOUT [--installed] [FILE ...]

``CHECKOUT`` is one of pytorch/pytorch, best of the installed version; its files are not changed. Each file of
``test/distributed/checkpoint`` is run as a copy that begins with a few lines: names of torch's writers are ours, or with
``--installed`` the stock writers under ``fastshard.install()``; tests that ask for GPUs run with gloo on the CPU. The
copies are run once more without those lines, so a test that fails for torch's own writers is told from one that fails
for ours. This is not part of ``make test``. PyTorch's tests need the package expecttest, and a few need zstandard.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree

FILES = (
    "test_hf_safetensor_e2e.py",
    "test_hf_storage.py",
    "test_file_system_checkpoint_cpu.py",
    "test_file_system_checkpoint.py",
    "test_consolidate_hf_safetensors.py",
    "test_quantized_hf_storage.py",
    "test_dtensor_checkpoint.py",
    "test_dtensor_resharding.py",
    "test_hsdp_checkpoint.py",
    "test_tp_checkpoint.py",
    "test_save_load_api.py",
    "test_async_process_executor.py",
    "test_planner.py",
    "test_format_utils.py",
    "e2e/test_e2e_save_and_load.py",
    "e2e/test_fine_tuning.py",
)
"""What saves or loads by way of files."""
FOLDER = Path("test/distributed/checkpoint")

ON_THE_CPU = """
import torch as _torch
import torch.distributed.fsdp as _fsdp
import torch.testing._internal.common_distributed as _common
import torch.testing._internal.distributed._shard.sharded_tensor as _sharded
import torch.testing._internal.distributed._tensor.common_dtensor as _common_dtensor
_common.skip_if_lt_x_gpu = _common_dtensor.skip_if_lt_x_gpu = lambda *_, **__: lambda test: test
_common.requires_nccl = _common.requires_accelerator_dist_backend = _common.skip_if_lt_x_gpu

def _with_comms(func=None, init_rpc=True, backend="gloo", _with_comms=_sharded.with_comms):
    return _with_comms(func, init_rpc, "gloo")

_sharded.with_comms = _with_comms

def _init(self, *args, _init=_fsdp.FullyShardedDataParallel.__init__, **kwargs):
    kwargs.setdefault("device_id", _torch.device("cpu"))
    _init(self, *args, **kwargs)

_fsdp.FullyShardedDataParallel.__init__ = _init
"""
ON_GPUS = (
    (r"\.cuda\((dist\.get_rank\(\)|self\.rank)?\)", ""),
    (r"/cuda:\d", "/cpu"),
    (r'device=("cuda(:\d)?"|self\.rank)', 'device="cpu"'),
    (r"\.to\(self\.rank\)", ""),
    (r"torch\.(cuda|accelerator)\.device_count\(\)", "4"),
    (r'f?"cpu:gloo,[^"]*"', '"gloo"'),
)
"""What the tests put on GPUs, and what they do instead."""
INSTALLED = """
import fastshard
fastshard.install()
"""
OURS = """
import torch.distributed.checkpoint as _dcp
import torch.distributed.checkpoint._storage_utils as _storage_utils
import torch.distributed.checkpoint.filesystem as _filesystem
import torch.distributed.checkpoint.hf_storage as _hf_storage
from fastshard import dcp as _ours

class _Writer(_ours.FastshardWriter):
    def __init__(self, path, fqn_to_index_mapping=None, thread_count=1, save_distributed=False, save_sharded=False):
        super().__init__(path, fqn_to_index_mapping, save_distributed=save_distributed or save_sharded)

class _Reader(_ours.FastshardReader):
    def __init__(self, path, thread_count=1):
        super().__init__(path)

for _name, _kind in (("HuggingFaceStorageWriter", _Writer), ("HuggingFaceStorageReader", _Reader)):
    for _home in (_dcp, _hf_storage):
        setattr(_home, _name, _kind)
        setattr(_home, "_" + _name, _kind)
for _home in (_dcp, _filesystem, _storage_utils):
    _home.FileSystemWriter = _ours.FastshardFileSystemWriter
"""
STOCK = """
import torch.distributed.checkpoint.hf_storage as _hf_storage
_init = _hf_storage.HuggingFaceStorageWriter.__init__
def _with_old_names(self, *args, save_sharded=None, **kwargs):
    if save_sharded is not None:
        kwargs["save_distributed"] = save_sharded
    _init(self, *args, **kwargs)
_hf_storage.HuggingFaceStorageWriter.__init__ = _with_old_names
"""


def adapted(text: str, preamble: str) -> str:
    """Returns a test file that begins with these lines. What it puts on a GPU it leaves on the CPU."""
    for pattern, instead in ON_GPUS:
        text = re.sub(pattern, instead, text)
    futures = re.findall(r"^from __future__ import .*$", text, re.MULTILINE)
    text = re.sub(r"^from __future__ import .*$", "", text, flags=re.MULTILINE)
    return "\n".join([*futures, ON_THE_CPU, preamble, text])


def run(path: Path, checkout: Path, seconds: int) -> dict[str, str]:
    """Returns how each test of a file has ended: passed, failed, skipped."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        paths = os.pathsep.join([str(checkout / "test"), os.environ.get("PYTHONPATH", "")])
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-n0",
            f"--junit-xml={report}",
        ]
        command += ["-o", "addopts=", "-W", "ignore", "--rootdir", str(path.parent), str(path)]
        environment = {**os.environ, "PYTHONPATH": paths, "TMPDIR": folder, "CUDA_VISIBLE_DEVICES": ""}
        try:
            ended = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, text=True, timeout=seconds
            )
        except subprocess.TimeoutExpired:
            return {path.name: f"took more than {seconds} s"}
        if not report.exists():
            return {path.name: ended.stdout[-2000:] + ended.stderr[-2000:]}
        return {
            f"{case.get('classname', '').rpartition('.')[2]}.{case.get('name')}": outcome(case)
            for case in ElementTree.parse(report).iter("testcase")
        }


def outcome(case: ElementTree.Element) -> str:
    for kind in ("failure", "error", "skipped"):
        found = case.find(kind)
        if found is not None:
            lines = re.findall(r"^E +([\w.]*(?:Error|Exception)\b.*)", found.text or "", re.MULTILINE)
            lines = lines or (found.get("message") or "").strip().splitlines()
            return f"{kind}: {lines[-1] if lines else ''}"
    return "passed"


def told(name: str, ours: dict[str, str], theirs: dict[str, str]) -> Iterable[str]:
    passed = sum(how == "passed" for how in ours.values())
    skipped = sum(how.startswith("skipped") for how in ours.values())
    both = [test for test, how in ours.items() if _failed(how) and _failed(theirs.get(test, ""))]
    only = [test for test, how in ours.items() if _failed(how) and test not in both]
    yield f"{name}: {passed} passed, {skipped} skipped, {len(both)} fail with torch's own too, {len(only)} fail"
    for test in (*only, *both):
        yield f"    {test}: {ours[test][:300]}" + (
            f" (torch's: {theirs[test][:120]})" if test in both else ""
        )


def _failed(how: str) -> bool:
    return how != "passed" and not how.startswith("skipped")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path)
    parser.add_argument("files", nargs="*", default=FILES)
    parser.add_argument(
        "--installed", action="store_true", help="the stock writers under fastshard.install()"
    )
    parser.add_argument("--seconds", type=int, default=900, help="for each file")
    asked = parser.parse_intermixed_args()
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in asked.files:
            source = asked.checkout / FOLDER / name
            if not source.exists():
                print(f"{name}: not in the checkout")
                continue
            copy = Path(folder, f"test_copy_of_{source.name}")
            copy.write_text(adapted(source.read_text(), STOCK + INSTALLED if asked.installed else OURS))
            ours = run(copy, asked.checkout, asked.seconds)
            theirs: dict[str, str] = {}
            if any(map(_failed, ours.values())):
                copy.write_text(adapted(source.read_text(), STOCK))
                theirs = run(copy, asked.checkout, asked.seconds)
            lines = [*told(name, ours, theirs)]
            print(*lines, sep="\n", flush=True)
            failed += any(_failed(how) and not _failed(theirs.get(test, "")) for test, how in ours.items())
            failed += all(map(_failed, ours.values()))  # it was not collected, or took too long
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
