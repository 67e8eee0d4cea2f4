# SPDX-License-Identifier: Apache-2.0
"""The savers and commands that are put to the test, and what a reader of their files finds.

Each works in a folder of its own, ``root``: what it saves is below ``root/d``, what it reads in
``root/source``. Everything it saves is made once, so that every save of a saver, in whichever process, writes
the same bytes.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import hashlib
import importlib.util
import io
import json
import os
import posixpath
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy
import torch

import fastshard
from fastshard.cli import command as cli

State = dict[str, "bytes | None"]
"""Of each file that is not hidden, by its path below ``root``, the contents; ``None``: the name leads
nowhere."""


class CommandFailed(Exception):
    """A command ended with another status than 0; the text is what it said."""


@dataclass(frozen=True)
class Saver:
    """A way to save, and a state of its target before."""

    name: str
    save: Callable[[str], object]
    before: Callable[[str], object]
    """What made the files that stand before."""
    reads: Callable[[State], object] | None = None
    """What a loader of these files finds; ``None``: all files must be those of one save."""
    each: bool = False
    """Whether, after a kill, each file for itself is old or new."""
    again: Callable[[str], object] | None = None
    """The next save through the same path, if it is not the same call."""
    halfway: Callable[[str], object] | None = None
    """Makes another state that is right on the way: a saver that saves twice."""
    durable: bool = False
    """Whether all of it is on stable storage when the save returns."""
    waits: bool = False
    """Whether the disk has the data when the save returns, so that an error of writeback must be raised."""
    memory: bool = False
    """On a filesystem in memory."""
    installed: bool = False
    """Under ``fastshard.install()``."""
    needs: tuple[str, ...] = ()
    """Packages without which there is nothing to test."""

    @property
    def missing(self) -> str:
        """Of :attr:`needs`, what is not installed."""
        return ", ".join(name for name in self.needs if importlib.util.find_spec(name) is None)


@functools.cache
def _weights(seed: int, count: int) -> dict[str, torch.Tensor]:
    return {f"l.{i}.w": torch.full((64, 32), float(seed * 100 + i)) for i in range(count)}


def weights(seed: int, count: int = 4) -> dict[str, torch.Tensor]:
    return dict(_weights(seed, count))


@functools.cache
def module(seed: int) -> torch.nn.Module:
    made = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.fill_(seed + 0.5)
    return made


@functools.cache
def llama(seed: int) -> Any:
    import transformers

    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            intermediate_size=48,
            num_key_value_heads=1,
            hidden_size=32,
            num_hidden_layers=2 + seed,
            num_attention_heads=2,
            vocab_size=64,
        )
    )


@functools.cache
def accelerator() -> Any:
    import accelerate

    return accelerate.Accelerator(cpu=True)


@functools.cache
def training(seed: int) -> Any:
    """An accelerator with a model whose archive is large enough for the engine."""
    import accelerate

    made = accelerate.Accelerator(cpu=True)
    model = made.prepare(torch.nn.Linear(300, 300))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(seed + 0.5)
    made.prepare(torch.optim.SGD(model.parameters(), momentum=0.9))
    model(torch.ones(1, 300)).sum().backward()
    made._optimizers[0].step()
    return made


def command(*arguments: str) -> None:
    """The command line, as in a process of its own."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        status = cli.main(list(arguments))
    if status:
        raise CommandFailed(said.getvalue())


# --- What loaders find --------------------------------------------------------------------------------------


class Broken(Exception):
    """A loader fails on these files."""


def _opened(state: State, name: str) -> bytes:
    data = state.get(name)
    if data is None:
        raise Broken(name)
    return data


def checkpoint(state: State, folder: str = "d", stem: str = "model", suffix: str = ".safetensors") -> object:
    """transformers': the single file, else the index and what it names; with the configuration."""
    prefix = folder + "/" if folder else ""
    found = {
        name: _opened(state, name)
        for name in state
        if posixpath.dirname(name) == folder
        and name.endswith(".json")
        and not name.endswith((".index.json", "tensor_parallel.json"))
    }
    single, index = f"{prefix}{stem}{suffix}", f"{prefix}{stem}{suffix}.index.json"
    if single in state:
        return found | {single: _opened(state, single)}
    if index not in state:
        return found
    text = _opened(state, index)
    names = set(json.loads(text)["weight_map"].values())
    return found | {index: text} | {name: _opened(state, prefix + name) for name in names}


def described_checkpoint(state: State) -> object:
    """What ``sha256sum -c`` and a loader find: the list, and the files that it names."""
    listed = state.get("d/SHA256SUMS")
    names = [] if listed is None else [line.split("  ", 1)[1] for line in listed.decode().splitlines()]
    return {name: _opened(state, f"d/{name}") for name in names}, listed, checkpoint(state)


def pickled_checkpoint(state: State) -> object:
    return checkpoint(state, stem="pytorch_model", suffix=".bin")


def parts(state: State) -> object:
    """vLLM's: every file whose name fits, each of which must open; and the manifest."""
    names = fnmatch.filter(state, "d/model-rank-0-part-*.safetensors")
    return {name: _opened(state, name) for name in (*names, *fnmatch.filter(state, "d/fastshard-*.json"))}


def ranks(state: State) -> object:
    """A sharded checkpoint's: what all ranks have in common, and the checkpoint of each."""
    folders = sorted({name.rpartition("/")[0] for name in state if name.startswith("d/out/")})
    return {folder: checkpoint(state, folder) for folder in folders} | {
        name: _opened(state, name) for name in state if name.endswith("tensor_parallel.json")
    }


def resharded(state: State) -> object:
    return checkpoint(state, "d/out")


# --- The savers ---------------------------------------------------------------------------------------------


def nothing(root: str) -> None:
    """No target before."""


def _options(path: str) -> Any:
    return fastshard.Options(write_path=path, memory_budget=1 << 20, threads=2)


def _single(name: str, save: Callable[..., object], **how: Any) -> Iterable[Saver]:
    """``save(seed, path)`` of a file: where there is none, and where one stands."""
    file = how.pop("file", "m.safetensors")
    for variant, before in (("new", nothing), ("exists", lambda root: save(0, f"{root}/d/{file}"))):
        yield Saver(f"{name}:{variant}", lambda root: save(1, f"{root}/d/{file}"), before, **how)


def _files() -> Iterable[Saver]:
    for name, arguments, how in (
        ("save_file", {}, {}),
        ("save_file-direct", {"engine": _options("direct")}, {}),
        ("save_file-mapped", {"engine": _options("mapped")}, {}),
        ("save_file-durable", {"durable": True}, {"durable": True}),
        ("save_file-durable-direct", {"durable": True, "engine": _options("direct")}, {"durable": True}),
        ("save_file-uncached", {"keep_cached": False}, {"waits": True}),
        (
            "save_file-uncached-buffered",
            {"keep_cached": False, "engine": _options("buffered")},
            {"waits": True},
        ),
        ("save_file-uncached-durable", {"keep_cached": False, "durable": True}, {"durable": True}),
        ("save_file-tmpfs", {}, {"memory": True}),
        ("save_file-manifest", {"manifest": "sha256"}, {}),
        ("save_file-strided", {"engine": _options("buffered"), "dtype": torch.bfloat16}, {}),
    ):

        def save(seed: int, path: str, arguments: dict[str, Any] = arguments) -> None:
            fastshard.save_file(weights(seed), path, **arguments)

        yield from _single(name, save, **how)
    yield from _single("save_model", lambda seed, path: fastshard.save_model(module(seed), path))
    for name, arguments in (("save_files", {}), ("save_files-durable", {"durable": True})):

        def several(root: str, first: int, count: int, arguments: dict[str, Any] = arguments) -> None:
            folder = f"{root}/d"
            files = {f"{folder}/{i}.safetensors": weights(first + i, 2) for i in range(count)}
            fastshard.save_files(files, **arguments)  # type: ignore[arg-type]

        for variant, standing in (("new", 0), ("exists", 3), ("some", 2)):
            yield Saver(
                f"{name}:{variant}",
                functools.partial(several, first=10, count=3),
                functools.partial(several, first=0, count=standing) if standing else nothing,
                each=True,
                durable=bool(arguments),
            )
    yield Saver("save", lambda root: hashlib.sha256(fastshard.save(weights(1))).hexdigest(), nothing)


def _asynchronous() -> Iterable[Saver]:
    """Each waits for its save, as what is right when a call returns is right when the save has ended."""
    for snapshot in ("copy", "fork", "none"):

        def file(seed: int, path: str, snapshot: str = snapshot, **more: Any) -> None:
            fastshard.save_file_async(weights(seed), path, snapshot=snapshot, **more).result()

        def archive(seed: int, path: str, snapshot: str = snapshot, **more: Any) -> None:
            large = torch.full((300, 300), float(seed))  # small archives are torch's, and written at once
            fastshard.torch_save_async({"a": large, "step": seed}, path, snapshot=snapshot, **more).result()

        def several(root: str, first: int, count: int, snapshot: str = snapshot) -> None:
            files = {f"{root}/d/{i}.safetensors": weights(first + i, 2) for i in range(count)}
            fastshard.save_files_async(files, snapshot=snapshot).result()  # type: ignore[arg-type]

        def hub(root: str, seed: int, count: int, snapshot: str = snapshot) -> None:
            fastshard.save_torch_state_dict_async(
                weights(seed, count), f"{root}/d", max_shard_size=20_000, snapshot=snapshot
            ).result()

        def state(root: str, seed: int, count: int, snapshot: str = snapshot) -> None:
            fastshard.save_sharded_state_async(
                weights(seed, count), f"{root}/d", max_size=20_000, snapshot=snapshot
            ).result()

        yield from _single(f"save_file_async-{snapshot}", file)
        yield from _single(f"save_file_async-{snapshot}-tmpfs", file, memory=True)
        yield from _single(
            f"save_file_async-{snapshot}-durable", functools.partial(file, durable=True), durable=True
        )
        yield from _single(f"torch_save_async-{snapshot}", archive, file="m.pt")
        yield Saver(
            f"save_files_async-{snapshot}:some",
            functools.partial(several, first=10, count=3),
            functools.partial(several, first=0, count=2),
            each=True,
        )
        yield Saver(
            f"save_torch_state_dict_async-{snapshot}:more_shards",
            functools.partial(hub, seed=1, count=6),
            functools.partial(hub, seed=0, count=8),
            reads=checkpoint,
            needs=("huggingface_hub",),
        )
        yield Saver(
            f"save_sharded_state_async-{snapshot}:more_parts",
            functools.partial(state, seed=1, count=5),
            functools.partial(state, seed=0, count=8),
            reads=parts,
        )

    def twice(root: str) -> None:
        futures = [fastshard.save_file_async(weights(seed), f"{root}/d/m.safetensors") for seed in (1, 2)]
        try:
            fastshard.wait_all()
        except BaseException as error:
            # The second save goes on when the first has failed: its file stands then, and its future knows.
            error.published = futures[1].exception() is None  # type: ignore[attr-defined]
            raise

    def first(root: str, seed: int) -> None:
        fastshard.save_file(weights(seed), f"{root}/d/m.safetensors")

    yield Saver(
        "save_file_async-twice:exists",
        twice,
        functools.partial(first, seed=0),
        halfway=functools.partial(first, seed=1),
    )


def _prepared() -> Iterable[Saver]:
    for name, arguments, memory in (
        ("prepare", {}, False),
        ("prepare-durable", {"durable": True}, False),
        ("prepare-tmpfs", {}, True),
    ):

        def save(root: str, arguments: dict[str, Any] = arguments) -> None:
            with fastshard.prepare(weights(1), f"{root}/d/m.safetensors", **arguments) as prepared:
                prepared.save()
                prepared.save(weights(2))

        def file(root: str, seed: int) -> None:
            fastshard.save_file(weights(seed), f"{root}/d/m.safetensors")

        for variant, before in (("new", nothing), ("exists", functools.partial(file, seed=0))):
            yield Saver(
                f"{name}:{variant}",
                save,
                before,
                halfway=functools.partial(file, seed=1),
                durable=bool(arguments),
                memory=memory,
            )


def _archives() -> Iterable[Saver]:
    for name, arguments, how in (
        ("torch_save", {}, {}),
        ("torch_save-durable", {"durable": True}, {"durable": True}),
        ("torch_save-uncached", {"keep_cached": False}, {"waits": True}),
        ("torch_save-tmpfs", {}, {"memory": True}),
        ("torch_save-old_format", {"_use_new_zipfile_serialization": False}, {}),
        (
            "torch_save-old_format-durable",
            {"_use_new_zipfile_serialization": False, "durable": True},
            {"durable": True},
        ),
    ):

        def save(seed: int, path: str, arguments: dict[str, Any] = arguments) -> None:
            fastshard.torch_save({"a": weights(seed), "step": seed}, path, **arguments)

        yield from _single(name, save, file="m.pt", **how)

    def large(seed: int, path: str) -> None:
        fastshard.torch_save({"a": torch.full((300, 300), float(seed)), "step": seed}, path)

    yield from _single("torch_save-large", large, file="m.pt")

    def through_link(root: str, seed: int) -> None:
        if seed == 0:
            os.mkdir(f"{root}/d/blobs")
            os.symlink("blobs/m.pt", f"{root}/d/m.pt")
        fastshard.torch_save(weights(seed), f"{root}/d/m.pt")

    yield Saver(
        "torch_save:link", functools.partial(through_link, seed=1), functools.partial(through_link, seed=0)
    )


def _folders() -> Iterable[Saver]:
    def hub(root: str, seed: int, count: int, size: int = 20_000, **arguments: Any) -> None:
        fastshard.save_torch_state_dict(weights(seed, count), f"{root}/d", max_shard_size=size, **arguments)

    for name, arguments, reads in (
        ("save_torch_state_dict", {}, checkpoint),
        ("save_torch_state_dict-durable", {"durable": True}, checkpoint),
        ("save_torch_state_dict-manifest", {"manifest": "sha256"}, described_checkpoint),
        ("save_torch_state_dict-bin", {"safe_serialization": False}, pickled_checkpoint),
    ):
        new = functools.partial(hub, seed=1, count=6, **arguments)
        one = functools.partial(hub, seed=1, count=2, size=10**9, **arguments)
        more = functools.partial(hub, seed=0, count=8, **arguments)
        for variant, before, save in (
            ("new", nothing, new),
            ("more_shards", more, new),
            ("one_file_over_shards", more, one),
            ("shards_over_one_file", one, functools.partial(hub, seed=3, count=6, **arguments)),
        ):
            yield Saver(
                f"{name}:{variant}",
                save,
                before,
                reads=reads,
                durable="durable" in arguments,
                needs=("huggingface_hub",),
            )

    def state(root: str, seed: int, count: int, **arguments: Any) -> None:
        fastshard.save_sharded_state(weights(seed, count), f"{root}/d", max_size=20_000, **arguments)

    for name, arguments in (("save_sharded_state", {}), ("save_sharded_state-durable", {"durable": True})):
        save = functools.partial(state, seed=1, count=5, **arguments)
        for variant, before in (
            ("new", lambda root: os.rmdir(f"{root}/d")),
            ("empty", nothing),
            ("more_parts", functools.partial(state, seed=0, count=8)),
            ("fewer_parts", functools.partial(state, seed=0, count=2)),
        ):
            yield Saver(f"{name}:{variant}", save, before, reads=parts, durable=bool(arguments))


def _libraries() -> Iterable[Saver]:
    def pretrained(root: str, seed: int, size: str, **arguments: Any) -> None:
        llama(seed).save_pretrained(f"{root}/d/c", max_shard_size=size, **arguments)

    def accelerated(root: str, seed: int, size: str, **arguments: Any) -> None:
        accelerator().save_model(llama(seed), f"{root}/d/c", max_shard_size=size, **arguments)

    for name, function, package in (
        ("save_pretrained", pretrained, "transformers"),
        ("Accelerator.save_model", accelerated, "accelerate"),
    ):
        for variant, before, save in (
            ("new", nothing, functools.partial(function, seed=0, size="20KB")),
            (
                "more_shards",
                functools.partial(function, seed=1, size="20KB"),
                functools.partial(function, seed=0, size="20KB"),
            ),
            (
                "one_file_over_shards",
                functools.partial(function, seed=1, size="20KB"),
                functools.partial(function, seed=0, size="5GB"),
            ),
        ):
            yield Saver(
                f"{name}:{variant}",
                save,
                before,
                reads=lambda state: checkpoint(state, "d/c"),
                installed=True,
                needs=("transformers", package),
            )

    def state(root: str, seed: int) -> None:
        """A whole checkpoint, as a loop makes it that goes on meanwhile."""
        random.seed(seed)
        numpy.random.seed(seed)
        torch.manual_seed(seed)
        with fastshard.installed(asynchronous=True):
            training(seed).save_state(f"{root}/d/c")
            fastshard.wait_all()

    for variant, before in (("new", nothing), ("exists", functools.partial(state, seed=0))):
        yield Saver(
            f"Accelerator.save_state_async:{variant}",
            functools.partial(state, seed=1),
            before,
            installed=True,
            needs=("accelerate",),
        )

    def saved_by_torch(root: str, seed: int) -> None:
        torch.save(weights(seed), f"{root}/d/m.pt")

    yield Saver(
        "torch.save:exists",
        functools.partial(saved_by_torch, seed=1),
        functools.partial(saved_by_torch, seed=0),
        installed=True,
    )


def _commands() -> Iterable[Saver]:
    def source(root: str, seed: int, count: int, place: str = "source") -> None:
        os.makedirs(f"{root}/{place}", exist_ok=True)
        fastshard.save_torch_state_dict(weights(seed, count), f"{root}/{place}", max_shard_size=20_000)
        with open(f"{root}/{place}/config.json", "w") as file:
            json.dump({"model_type": f"made-{seed}"}, file)
        with open(f"{root}/plan.json", "w") as file:
            json.dump({"l.*.w": "colwise"}, file)

    def pickled(root: str, seed: int = 1) -> None:
        os.makedirs(f"{root}/source", exist_ok=True)
        fastshard.torch_save(weights(seed, 4), f"{root}/source/pytorch_model.bin")
        with open(f"{root}/source/config.json", "w") as file:
            json.dump({"model_type": f"made-{seed}"}, file)

    def pickled_beside_file(root: str) -> None:
        pickled(root)
        fastshard.save_file(weights(0), f"{root}/d/m.safetensors")

    def pickled_beside_shards(root: str) -> None:
        pickled(root)
        source(root, 0, 8, "d/out")

    def convert(root: str, *more: str) -> None:
        command("convert", f"{root}/source/pytorch_model.bin", f"{root}/d/m.safetensors", *more)

    def convert_folder(root: str, *more: str) -> None:
        command("convert", f"{root}/source", f"{root}/d/out", "--max-shard-size", "20KB", *more)

    force = {
        "convert": lambda root: convert(root, "--force"),
        "convert-folder": lambda root: convert_folder(root, "--force"),
        "shard": lambda root: shard(root, "--force"),
        "merge": lambda root: merge(root, "--force"),
        "reshard": lambda root: reshard(root, "--force"),
    }
    yield Saver("convert:new", convert, pickled, again=force["convert"])
    yield Saver("convert:exists", force["convert"], pickled_beside_file)
    needs = ("huggingface_hub",)
    yield Saver(
        "convert-folder:new",
        convert_folder,
        pickled,
        again=force["convert-folder"],
        reads=resharded,
        needs=needs,
    )
    yield Saver(
        "convert-folder:more_shards",
        force["convert-folder"],
        pickled_beside_shards,
        reads=resharded,
        needs=needs,
    )

    def shard(root: str, *more: str) -> None:
        plan = f"{root}/plan.json"
        command("shard", f"{root}/source", "-o", f"{root}/d/out", "--tp", "2", "--plan", plan, *more)

    def merge(root: str, *more: str) -> None:
        command("merge", f"{root}/ranks", "-o", f"{root}/d/out", *more)

    def reshard(root: str, *more: str) -> None:
        command("reshard", f"{root}/source", "-o", f"{root}/d/out", "--max-shard-size", "40KB", *more)

    def reshard_in_place(root: str) -> None:
        command("reshard", f"{root}/d/out", "-o", f"{root}/d/out", "--max-shard-size", "40KB", "--force")

    def source_and_old(root: str) -> None:
        source(root, 1, 4)
        source(root, 0, 6, "d/out")

    def to_merge(root: str) -> None:
        source(root, 1, 4)
        fastshard.shard_checkpoint(f"{root}/source", f"{root}/ranks", 2, plan=f"{root}/plan.json")

    def to_merge_over_old(root: str) -> None:
        to_merge(root)
        source(root, 0, 6, "d/out")

    def source_and_ranks(root: str) -> None:
        source(root, 0, 6)
        fastshard.shard_checkpoint(f"{root}/source", f"{root}/d/out", 2, plan=f"{root}/plan.json")
        source(root, 1, 4)

    def only_old(root: str) -> None:
        source(root, 1, 6, "d/out")

    new = functools.partial(source, seed=1, count=4)
    yield Saver("shard:new", shard, new, again=force["shard"], reads=ranks, needs=needs)
    yield Saver("shard:over_ranks", force["shard"], source_and_ranks, reads=ranks, needs=needs)
    yield Saver(
        "shard:over_checkpoint",
        lambda root: shard(root, "--force", "--durable"),
        source_and_old,
        reads=ranks,
        durable=True,
        needs=needs,
    )
    yield Saver("merge:new", merge, to_merge, again=force["merge"], reads=resharded, needs=needs)
    yield Saver(
        "merge:exists",
        lambda root: merge(root, "--force", "--durable"),
        to_merge_over_old,
        reads=resharded,
        durable=True,
        needs=needs,
    )
    yield Saver("reshard:new", reshard, new, again=force["reshard"], reads=resharded, needs=needs)
    yield Saver("reshard:exists", force["reshard"], source_and_old, reads=resharded, needs=needs)
    yield Saver("reshard:in_place", reshard_in_place, only_old, reads=resharded, needs=needs)


def all_savers() -> dict[str, Saver]:
    made = (*_files(), *_asynchronous(), *_prepared(), *_archives(), *_folders(), *_libraries(), *_commands())
    return {saver.name: saver for saver in made}
