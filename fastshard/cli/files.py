# SPDX-License-Identifier: Apache-2.0
"""``fastshard inspect PATH...``, ``fastshard convert SRC DST``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING, Any, Final

from ..formats.dcp_metadata import is_dcp_folder
from ..formats.file_kinds import FOLDER, INDEX, SAFETENSORS, TORCH, format_of_name, what_is
from ..formats.hf_index import files_of_index, is_folder, open_file, read_text
from ..formats.naming import INDEX_SUFFIX, TORCH_SUFFIXES, WEIGHTS_SUFFIX
from ..formats.safetensors import CAST_NAMES, FileHeader, cast_name, read_header
from .text import amount, fail, guarded, needs_torch, printable, size, table

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

COMMANDS: Final = ("inspect", "convert")
_MOST_NAMED: Final = 5


def add_parsers(commands: Commands) -> None:
    inspect = commands.add_parser(
        "inspect", help="show the header, the tensors and the sizes of safetensors files"
    )
    inspect.add_argument(
        "files", metavar="PATH", nargs="+", help="a safetensors file, an index, or a folder of such files"
    )
    inspect.add_argument(
        "--json", action="store_true", help="print JSON: an object, or a list of several files"
    )
    convert = commands.add_parser(
        "convert",
        help="make safetensors files of a checkpoint of torch.save or torch.distributed.checkpoint, or an archive of torch.save of safetensors files",
        description="The contents of SRC say what it is. The name of DST says what it becomes: an archive of torch.save if it"
        f" ends in {', '.join(TORCH_SUFFIXES)}, otherwise a safetensors file, or a folder of shards. A checkpoint of"
        " torch.distributed.checkpoint is put together from what its ranks have written, in constant memory.",
    )
    convert.add_argument(
        "file",
        metavar="SRC",
        help="a file of torch.save (a dict of tensors) or of safetensors, or a folder of such files or of .distcp files",
    )
    convert.add_argument("destination", metavar="DST", help="the file or the folder to be made")
    convert.add_argument("--key", help="take the tensors of this entry (model, state_dict, ...)")
    names = ", ".join(f"{name} ({others[0]})" for name, others in CAST_NAMES.items())
    convert.add_argument("--dtype", help=f"cast floating-point tensors to this: {names}")
    convert.add_argument(
        "--max-shard-size", metavar="SIZE", help="make DST a folder of shards of this size, such as 5GB"
    )
    convert.add_argument(
        "--verify",
        action="store_true",
        help="compare the checksums in a checkpoint of torch.distributed.checkpoint before anything is converted",
    )
    convert.add_argument("--force", action="store_true", help="replace DST if it exists")
    convert.add_argument(
        "--quiet", action="store_true", help="show no progress, and print nothing where all is well"
    )


def run(given: argparse.Namespace) -> int:
    """Runs the command. Returns the exit status."""
    if given.command == "inspect":
        return guarded(lambda: _inspect(given.files, given.json))
    return guarded(lambda: _convert(given), given.file)


# inspect -------------------------------------------------------------------------------------------------


def _inspect(paths: list[str], as_json: bool) -> int:
    status = 0
    found: list[tuple[str, FileHeader, int]] = []
    several = len(paths) > 1
    for path in paths:
        try:
            files = _files_of(path)
        except (OSError, ValueError) as error:
            status = fail(error, path)
            continue
        several = several or files != [path]
        for name in files:
            try:
                header, nbytes = _header_of(name)
            except (OSError, ValueError) as error:
                status = fail(error, name)
                continue
            found.append((name, header, nbytes))
            if not as_json:
                if several:
                    print(f"{printable(name)}:" if len(found) == 1 else f"\n{printable(name)}:")
                _show(header, nbytes)
    if as_json and found:
        told = [{**({"file": name} if several else {}), **_as_dict(h, nbytes)} for name, h, nbytes in found]
        print(json.dumps(told if several else told[0], indent=2, ensure_ascii=False))
    elif len(found) > 1:
        count = sum(len(header.tensors) for _, header, _ in found)
        total = sum(nbytes for _, _, nbytes in found)
        print(f"\ntogether: {len(found)} files, {amount(count, 'tensor')}, {size(total)} ({total} bytes)")
    return status


def _files_of(path: str) -> list[str]:
    """Returns the safetensors files that a path stands for."""
    what = what_is(path)
    if what.kind == FOLDER:
        with os.scandir(path) as entries:
            names = sorted(entry.name for entry in entries if not entry.name.startswith("."))
        indices = [name for name in names if name.endswith(INDEX_SUFFIX)]
        files = [name for name in names if name.endswith(WEIGHTS_SUFFIX)]
        if len(indices) == 1:
            files = sorted({*files, *_named_by(os.path.join(path, indices[0]))})
        if not files:
            raise ValueError(f"{what.text}, but none with {WEIGHTS_SUFFIX} files")
        return [os.path.join(path, name) for name in files]
    if what.kind == INDEX:
        return [os.path.join(os.path.dirname(path), name) for name in sorted(_named_by(path))]
    return [path]


def _named_by(index: str) -> set[str]:
    return files_of_index(read_text(index), index)


def _header_of(path: str) -> tuple[FileHeader, int]:
    what = what_is(path)
    if what.text.startswith("no regular file"):
        raise ValueError(what.text)
    if what.kind == TORCH:
        raise ValueError(
            f"{what.text}{'; fastshard convert makes a safetensors file of it' if what.is_whole else ''}"
        )
    if what.kind != SAFETENSORS and what.text != "no file of a known kind":
        # The text of the format's own check says more of a file that is only nearly one.
        try:
            return _read(path)
        except ValueError as error:
            raise ValueError(f"{error}; it is {what.text}") from None
    return _read(path)


def _read(path: str) -> tuple[FileHeader, int]:
    with open_file(path) as file:
        nbytes = os.fstat(file.fileno()).st_size
        return read_header(file, nbytes), nbytes


def _show(found: FileHeader, nbytes: int) -> None:
    rows = [
        (
            printable(t.name),
            t.code,
            printable(str(list(t.shape))),
            str(found.nbytes + t.begin),
            size(t.end - t.begin),
        )
        for t in found.tensors
    ]
    print(table(("tensor", "dtype", "shape", "offset", "size"), rows, right=(3, 4)))
    by_code: dict[str, int] = {}
    for tensor in found.tensors:
        by_code[tensor.code] = by_code.get(tensor.code, 0) + tensor.end - tensor.begin
    dtypes = ", ".join(f"{code} {size(total)}" for code, total in by_code.items())
    print(
        f"\n{amount(len(found.tensors), 'tensor')}, {size(nbytes)} ({nbytes} bytes): header {size(found.nbytes)}",
        end="",
    )
    print(f", {dtypes}" if dtypes else "")
    if found.metadata is None:
        print("no metadata")
    else:
        print(f"metadata: {json.dumps(found.metadata, ensure_ascii=not _all_printable(found.metadata))}")


def _all_printable(metadata: dict[str, str]) -> bool:
    return all(key.isprintable() and value.isprintable() for key, value in metadata.items())


def _as_dict(found: FileHeader, nbytes: int) -> dict[str, object]:
    return {
        "nbytes": nbytes,
        "header_nbytes": found.nbytes,
        "metadata": found.metadata,
        "tensors": [tensor._asdict() for tensor in found.tensors],
    }


# convert -------------------------------------------------------------------------------------------------


def _convert(given: argparse.Namespace) -> int:
    if given.dtype is not None:
        cast_name(given.dtype)
    is_folder = _is_to_be_folder(given)
    is_dcp = what_is(given.file).kind == FOLDER and is_dcp_folder(given.file)
    if problem := needs_torch("convert"):
        return fail(problem)
    how: dict[str, Any] = {"key": given.key, "dtype": given.dtype, "force": given.force}
    how["progress"] = True if sys.stderr.isatty() and not given.quiet else None
    if is_dcp:
        return _convert_dcp(given, is_folder, how)
    if given.verify:
        raise ValueError("--verify is only for checkpoints of torch.distributed.checkpoint")
    from ..tools.convert import convert, convert_folder

    if is_folder:
        done = convert_folder(
            given.file, given.destination, max_shard_size=given.max_shard_size or "5GB", **how
        )
    else:
        done = convert(given.file, given.destination, **how)
    if not given.quiet:
        print(f"{printable(given.destination)}: {amount(done.tensors, 'tensor')}, {size(done.nbytes)}")
        for name, kept in done.dropped.items():
            print(f"{printable(name)} is {printable(kept)}")
    return 0


def _convert_dcp(given: argparse.Namespace, is_folder: bool, how: dict[str, Any]) -> int:
    from ..tools.dcp_folders import convert_dcp

    if not is_folder and not given.destination.endswith(WEIGHTS_SUFFIX):
        raise ValueError(f"{given.destination}: such a checkpoint can only become {WEIGHTS_SUFFIX} files")
    done = convert_dcp(
        given.file,
        given.destination,
        max_shard_size=given.max_shard_size or "5GB",
        verify=given.verify,
        **how,
    )
    if not given.quiet:
        print(f"{printable(given.destination)}: {amount(done.tensors, 'tensor')}, {size(done.nbytes)}")
        for name, count in done.left_out.items():
            print(f"{printable(name)} is left out: {amount(count, 'tensor')}; --key takes them")
        if done.objects:
            some = ", ".join(map(printable, done.objects[:_MOST_NAMED]))
            more = f" and {len(done.objects) - _MOST_NAMED} more" if len(done.objects) > _MOST_NAMED else ""
            print(f"no tensors, and left out: {some}{more}")
    return 0


def _is_to_be_folder(given: argparse.Namespace) -> bool:
    """Returns whether DST is to be a folder. Raises ``ValueError`` if its name is that of a file of another
    kind."""
    destination: str = given.destination
    is_there = is_folder(destination)
    kind = format_of_name(destination.rstrip("/"))
    has_suffix = kind == TORCH or destination.endswith(WEIGHTS_SUFFIX)
    if given.max_shard_size is not None:
        if has_suffix and not is_there:
            raise ValueError(
                f"{destination}: this is the name of a file, and with --max-shard-size DST is a folder"
            )
        return True
    if is_there or destination.endswith("/"):
        return True
    return not has_suffix and what_is(given.file).kind in (FOLDER, INDEX)
