# SPDX-License-Identifier: Apache-2.0
"""``fastshard bench small-saves``: what a save of a few kilobytes costs, by the functions that scripts call.

Each function saves the same thing as its library has it and under ``fastshard.install()``, ten times each in turn, and
medians are compared: a script that saves by the thousand must not become slower.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

import fastshard

from . import machine

ROUNDS: Final = 300
BLOCK: Final = 10
"""Saves in a row of one way. One more goes before them: ``install()`` looks through all objects there are, which leaves
nothing of a save in the processor's caches, and a script calls it once."""
FACTOR: Final = 1.1
EXTRA: Final = 100e-6
"""A save may take this many times the original's time, and so many seconds more."""

Save = Callable[[Path], object]


class Measured(NamedTuple):
    """Medians, in seconds."""

    name: str
    original: float
    ours: float

    @property
    def allowed(self) -> float:
        return FACTOR * self.original + EXTRA

    @property
    def holds(self) -> bool:
        return self.ours <= self.allowed


def saves() -> Iterator[tuple[str, Save]]:
    """Name and function, called with a folder; those whose library is here."""
    import safetensors.torch

    tensors = {f"layer.{i}": torch.randn(16, 16) for i in range(4)}
    # By the libraries' names at each call, as scripts do.
    yield "torch.save", lambda folder: torch.save(tensors, folder / "small.pt")
    yield "save_file", lambda folder: safetensors.torch.save_file(tensors, folder / "small.safetensors")
    try:
        import huggingface_hub

        huggingface_hub.save_torch_state_dict  # noqa: B018 (imported now, not in the first round)
        yield (
            "save_torch_state_dict",
            lambda folder: huggingface_hub.save_torch_state_dict(dict(tensors), folder),
        )
    except ImportError:
        pass
    try:
        model = _tiny_model()
    except ImportError:
        return
    yield "save_pretrained", lambda folder: model.save_pretrained(folder)


def _tiny_model() -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=32,
    )
    return transformers.LlamaForCausalLM(config)


def measure(name: str, save: Save, directory: Path, rounds: int) -> Measured:
    """Both ways in turn, each into a folder of its own that is there already, as a script's is."""
    times: dict[bool, list[float]] = {False: [], True: []}
    folders = {False: directory / f"{name}-original", True: directory / f"{name}-ours"}
    for folder in folders.values():
        folder.mkdir()
    for done in range(0, rounds, BLOCK):
        for installed in (False, True):
            with fastshard.installed() if installed else contextlib.nullcontext():
                save(folders[installed])  # the first one of all imports and makes files, too
                for _ in range(min(BLOCK, rounds - done)):
                    began = time.perf_counter()
                    save(folders[installed])
                    times[installed].append(time.perf_counter() - began)
    _compare(name, *folders.values())
    return Measured(name, statistics.median(times[False]), statistics.median(times[True]))


def _compare(name: str, original: Path, ours: Path) -> None:
    found = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in (original, ours)]
    if found[0] != found[1]:
        raise RuntimeError(f"{name}: the files are not the same")


def table(results: Sequence[Measured], rounds: int) -> str:
    """As it is printed."""
    lines = [f"medians of {rounds}, in ms         original   fastshard     allowed"]
    for result in results:
        figures = "".join(f"{1e3 * t:12.3f}" for t in (result.original, result.ours, result.allowed))
        lines.append(f"{result.name:24}{figures}  {'holds' if result.holds else 'too slow'}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; 1 if a save takes longer than it may, 0 otherwise."""
    parser = argparse.ArgumentParser(
        prog="fastshard bench small-saves", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "--dir", type=Path, help="directory to save into (default: the system's temporary one)"
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help=f"default {ROUNDS}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file, too")
    given = parser.parse_args(arguments)
    place = given.dir or Path(tempfile.gettempdir())
    with tempfile.TemporaryDirectory(dir=place) as directory:
        results = [measure(name, save, Path(directory), given.rounds) for name, save in saves()]
    print(table(results, given.rounds))
    if given.json:
        rows = [{**result._asdict(), "allowed": result.allowed, "holds": result.holds} for result in results]
        found = {"machine": machine.describe(place, "cpu"), "rounds": given.rounds, "saves": rows}
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(not all(result.holds for result in results))
