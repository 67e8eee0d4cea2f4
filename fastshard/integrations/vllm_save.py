# SPDX-License-Identifier: Apache-2.0
"""``fastshard vllm-save`` makes a copy of a model folder with the weights as vLLM's ranks load them.

The flags are those of vLLM's ``examples/features/sharded_state/save_sharded_state_offline.py``: every engine
argument, ``--output``, ``--file-pattern``, ``--max-file-size``. The workers of a vLLM engine load the
weights. Each saves its own into a hidden directory when they are loaded but not yet rearranged
(:mod:`fastshard.integrations.vllm`). The other files of the model folder are copied there, and then
everything becomes visible at once. No engine is started around the workers: no memory is profiled or reserved
for a KV cache, and nothing is compiled.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import sys
from collections.abc import Sequence
from typing import Any, Final

from ..base.settings import parse_size
from ..distributed.group import described
from ..formats.manifest import read_manifest
from ..formats.naming import MANIFEST_NAME, SUMS_NAME, is_served, stale_parts
from ..publish.directory import replacing
from ..publish.manifests import Wanted, record_of
from ..publish.record import Record
from .vllm import REQUEST, Outcome, Request, outcome

PLUGIN: Final = "fastshard"
"""The name of the entry point in ``vllm.general_plugins``."""
DEFAULT_MAX_FILE_SIZE: Final = 5 * 1024**3
"""vLLM's default, in bytes."""


def main(arguments: Sequence[str]) -> int:
    """Runs the command. Returns the exit status: 0, 1 (it failed, and the output is as it was), 2 (wrong
    arguments)."""
    try:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.utils.argparse_utils import FlexibleArgumentParser
    except ImportError as error:
        print(f"fastshard: vllm-save needs vLLM: {error}", file=sys.stderr)
        return 1
    parser = EngineArgs.add_cli_args(
        FlexibleArgumentParser(prog="fastshard vllm-save", description=(__doc__ or "").partition("\n\n")[0])
    )
    add_arguments(parser)
    given = parser.parse_args(arguments)
    try:
        engine = EngineArgs.from_cli_args(given)
        check_engine(engine)
        manifest = "sha256" if given.sha256 else True
        nbytes = save(
            engine,
            given.output,
            given.file_pattern,
            given.max_file_size,
            durable=given.durable,
            manifest=manifest,
        )
    except Exception as error:
        # Of workers that have failed vLLM has shown more than the error has here.
        print(f"fastshard: {described(error)}", file=sys.stderr)
        return 1
    print(f'{given.output}: {nbytes} bytes of weights, for load_format="sharded_state"')
    return 0


def add_arguments(parser: Any) -> None:
    """Adds the arguments that are not the engine's."""
    group = parser.add_argument_group("sharded state")
    group.add_argument(
        "--output", "-o", required=True, help="the folder that is made, or in which files are replaced"
    )
    group.add_argument(
        "--file-pattern",
        help="the pattern of the names of weights, with {rank} (or {tp_rank}), {pp_rank} and {part}",
    )
    group.add_argument(
        "--max-file-size",
        type=parse_size,
        default=DEFAULT_MAX_FILE_SIZE,
        help="the size of a part, in bytes or such as 5GB or 5GiB (default: 5GiB)",
    )
    group.add_argument(
        "--sha256",
        action="store_true",
        help=f"also write {SUMS_NAME}, for sha256sum -c; it takes reading all once",
    )
    group.add_argument("--durable", action="store_true", help="return when everything is on stable storage")


def check_engine(engine: Any) -> None:
    """Raises ``ValueError`` for engine arguments with which sharded state cannot be saved.

    ``engine`` is vLLM's ``EngineArgs``.
    """
    if getattr(engine, "enable_lora", False):
        raise ValueError(
            "LoRA adapters cannot be saved as sharded state: leave out --enable-lora here, and use it when you serve"
        )
    if getattr(engine, "speculative_config", None):
        raise ValueError(
            "a draft model cannot be saved as sharded state: leave out --speculative-config here, and use it when you serve"
        )
    if getattr(engine, "data_parallel_size", 1) > 1:
        raise ValueError(
            "the names of sharded state have no place for ranks of data parallelism, which would overwrite each other's files"
        )
    if not stat.S_ISDIR(_mode(engine.model)):
        raise ValueError(f"the model must be a local directory, which {engine.model!r} is not")


def save(
    engine: Any,
    output: str,
    pattern: str | None = None,
    max_size: int | None = DEFAULT_MAX_FILE_SIZE,
    *,
    durable: bool = False,
    manifest: Wanted = True,
) -> int:
    """Does what the command does. Returns the bytes of weights. ``engine`` is vLLM's ``EngineArgs``.

    Raises ``ValueError`` if the weights are not what ``load_format="sharded_state"`` expects or the arguments
    make no sense, ``OSError`` for failed system calls, and what vLLM raises. The output is as it was then.
    """
    model = os.path.realpath(engine.model)
    if os.path.realpath(output) == model:
        raise ValueError(f"the output is the model's own folder {engine.model!r}")
    change = replacing(
        os.path.abspath(output),
        stale_parts(pattern),
        create=True,
        durable=durable,
        record=lambda folder: _record(folder, manifest),
    )
    with change as staging:
        copy_metadata(model, staging, leave_out=os.path.realpath(output))
        request = Request(staging, pattern, max_size, durable, manifest=True)
        outcomes = _load_and_save(engine, request)
        files = _checked(outcomes, staging)
        if any(said is not None and said.untied for said in outcomes):
            _untie(os.path.join(staging, "config.json"))
        return sum(os.path.getsize(os.path.join(staging, name)) for name in files)


def _record(staging: str, manifest: Wanted) -> Record:
    """Returns what is known of all files. The checksums of the weights were taken when the workers wrote them."""
    of_weights = os.path.join(staging, MANIFEST_NAME)
    known = read_manifest(of_weights).files
    os.unlink(of_weights)  # the folder's manifest takes its place
    return record_of(staging, manifest, known)


def _load_and_save(engine: Any, request: Request) -> list[Outcome | None]:
    """Starts the workers, which load and save. Returns the outcome of each."""
    # As vLLM's own command does: its default, fork, is not for processes that have used CUDA.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.executor import Executor

    config = engine.create_engine_config(usage_context=UsageContext.LLM_CLASS)
    if not isinstance(config.additional_config, dict):
        raise ValueError("--additional-config must be a JSON object")
    config.additional_config = {**config.additional_config, REQUEST: request._asdict()}
    executor = Executor.get_class(config)(config)
    try:
        outcomes: list[Outcome | None] = executor.collective_rpc(outcome)
        return outcomes
    finally:
        executor.shutdown()


def _checked(outcomes: Sequence[Outcome | None], staging: str) -> list[str]:
    """Returns the names of all ranks' files, if all ranks have saved."""
    for said in outcomes:
        if said is None:
            allowed = os.environ.get("VLLM_PLUGINS")
            reason = "the weights were not loaded by vLLM's base loader, or fastshard's warnings say why"
            if allowed is not None and PLUGIN not in allowed.split(","):
                reason = f"VLLM_PLUGINS={allowed!r} leaves {PLUGIN!r} out"
            raise ValueError(f"fastshard was not active in vLLM's workers: {reason}")
        if said.error is not None:
            raise ValueError(f"{said.rank}: {said.error}")
    files = [name for said in outcomes if said is not None for name in said.files]
    missing = [name for name in files if not stat.S_ISREG(_mode(os.path.join(staging, name)))]
    if missing or len(set(files)) != len(files):
        raise ValueError(f"ranks have saved into other places, or into the same files: {missing or files}")
    return files


def copy_metadata(model: str, target: str, leave_out: str | None = None) -> None:
    """Copies everything of a model folder except weights and their indexes, which describe files that are not
    there.

    As in vLLM's script, folders in it are copied whole. Hidden entries and the folder ``leave_out`` are not
    copied. Links are followed, as those of Hugging Face's cache lead elsewhere.
    """

    def left_out(folder: str, names: list[str]) -> list[str]:
        return [
            name
            for name in names
            if name.startswith(".") or os.path.realpath(os.path.join(folder, name)) == leave_out
        ]

    is_stale = stale_parts(None)
    names = os.listdir(model)
    for name in sorted(set(names) - set(left_out(model, names))):
        path, place = os.path.join(model, name), os.path.join(target, name)
        if stat.S_ISDIR(_mode(path)):
            shutil.copytree(path, place, ignore=left_out)
        elif not is_served(name) and not is_stale(name):
            shutil.copy(path, place)


def _mode(path: str) -> int:
    """Returns the mode of what is there; 0 if nothing is. Raises ``OSError`` if that cannot be told."""
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0


def _untie(path: str) -> None:
    """Changes a config so that it does not say that embeddings and head are tied, as they are not."""
    with open(path) as file:
        config = json.load(file)
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and part.get("tie_word_embeddings", True):
            part["tie_word_embeddings"] = False
    with open(path, "w") as file:
        json.dump(config, file, indent=2)
