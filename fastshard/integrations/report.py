# SPDX-License-Identifier: Apache-2.0
"""``fastshard.status()``: which saves of this process the engine makes, and which it does not."""

from __future__ import annotations

from typing import NamedTuple

from ..base import activity
from ..base.activity import Saved
from ..engine import background
from ..publish.hidden_names import final_places
from . import patching
from .patch_groups import expected, version_of

UNSEEN = (
    "safetensors.serialize_file, safetensors.numpy.save_file and those of other frameworks (they call Rust directly)",
    "writers of torch.distributed.checkpoint before torch 2.13, but for what they give to torch.save",
    "references to an original that were taken before install(): default arguments, functools.partial, closures",
)
"""Functions that fastshard does not replace. What is saved through them is not counted."""


NOT_YET = "this version does not have it, or not as fastshard knows it"
"""Why nothing is replaced in an old version of a library."""


class Replacement(NamedTuple):
    """Functions of a library that are replaced together or not at all."""

    library: str
    version: str
    """Version of the library; empty if it is not imported."""
    functions: tuple[str, ...]
    replaced: bool
    why_not: str = ""


class Status(NamedTuple):
    """What :func:`status` returns. ``print`` shows it."""

    version: str
    installed: bool
    replacements: tuple[Replacement, ...]
    saved: dict[str, Saved]
    """What the engine has saved, by public function."""
    left: dict[str, dict[str, int]]
    """How many calls were left to the original, by public function and reason."""
    planned: dict[str, int]
    """How many files were laid out natively, under the empty text, or in Python, by reason."""
    asynchronous: bool = False
    """Whether checkpoints of other libraries are written while their loops go on."""
    manifest: bool | str = False
    """What checkpoints of other libraries are to say of their files."""
    incremental: bool = False
    """Whether checkpoints of other libraries link what has not changed."""
    in_flight: tuple[str, ...] = ()
    """Files and folders of asynchronous saves that have not appeared yet."""
    on_the_spot: dict[str, dict[str, int]] = {}
    """How many calls were finished on the spot though they were to be asynchronous, by function and
    reason."""
    taken_over: dict[str, int] = {}
    """How many asynchronous saves did not end with what the job left of the processors, but were taken over by writers of
    normal priority, by reason."""

    def __str__(self) -> str:
        how = "installed, asynchronously" if self.asynchronous else "installed"
        how += ", with manifests" if self.manifest else ""
        how += ", incrementally" if self.incremental else ""
        state = how if self.installed else "not installed: fastshard.install(), or FASTSHARD_AUTO=1"
        lines = [f"fastshard {self.version}, {state}", *self.lines_of_replacements()]
        lines += ["saved by the engine:"]
        lines += [f"  {call}: {_described(total)}" for call, total in self.saved.items()] or ["  nothing yet"]
        lines += ["laid out:"]
        lines += [
            f"  {count} file(s) in Python: {reason}" if reason else f"  {count} file(s) natively"
            for reason, count in self.planned.items()
        ] or ["  nothing yet"]
        lines += ["left to the original:", *(_by_reason(self.left) or ["  nothing yet"])]
        if self.in_flight:
            lines += ["in flight:", *(f"  {place}" for place in self.in_flight)]
        if self.on_the_spot:
            lines += ["finished on the spot:", *_by_reason(self.on_the_spot)]
        if self.taken_over:
            lines += ["taken over by writers of normal priority:"]
            lines += [f"  {count} asynchronous save(s): {why}" for why, count in self.taken_over.items()]
        lines += ["not seen here, if it happens:", *(f"  {text}" for text in UNSEEN)]
        return "\n".join(lines)

    def lines_of_replacements(self) -> list[str]:
        """Returns lines of text that say what is replaced, and what is not and why."""
        lines = []
        for title, wanted in (("replaced:", True), ("not replaced:", False)):
            found = [r for r in self.replacements if r.replaced is wanted]
            lines += [title] if found else []
            for r in found:
                why = f" ({r.why_not})" if r.why_not else ""
                lines.append(f"  {f'{r.library} {r.version}'.rstrip()}: {', '.join(r.functions)}{why}")
        return lines


def _by_reason(counts: dict[str, dict[str, int]]) -> list[str]:
    return [
        f"  {call}: {count}x {reason}"
        for call, reasons in counts.items()
        for reason, count in reasons.items()
    ]


def _described(total: Saved) -> str:
    rate = total.nbytes / total.seconds / 2**30 if total.seconds else 0.0
    return (
        f"{total.saves} save(s), {total.files} file(s), {total.nbytes} bytes in {total.seconds:.3f} s "
        f"({rate:.2f} GiB/s)"
    )


def status() -> Status:
    """Returns what is replaced in this process, what is not and why, what the engine has saved, and what was
    left to the original functions.

    ``print(fastshard.status())`` shows it; ``fastshard env`` shows the first half for a machine.
    """
    from .. import __version__

    replacements = []
    for found, replaced in patching.overview().values():
        library = found.entries[0].library
        why_not = ""
        if replaced:
            pass
        elif not expected(found.entries):
            why_not = NOT_YET
        elif found.awaited:
            why_not = f"{found.awaited} is not imported"
        elif found.misfit:
            why_not = f"fastshard does not fit this version: {found.misfit}"
        elif found.foreign:
            why_not = f"somebody else has replaced {', '.join(map(str, found.foreign))} before"
        else:
            why_not = "fastshard is not installed"
        functions = tuple(entry.call for entry in found.entries)
        replacements.append(Replacement(library, version_of(library), functions, replaced, why_not))
    return Status(
        __version__,
        patching.is_active(),
        tuple(replacements),
        activity.saved(),
        activity.left(),
        activity.planned(),
        patching.is_asynchronous(),
        patching.manifest(),
        patching.is_incremental(),
        _in_flight(),
        activity.on_the_spot(),
        activity.taken_over(),
    )


def _in_flight() -> tuple[str, ...]:
    """Returns what asynchronous saves have not put in place yet, but for the parts of a checkpoint."""
    saves = (save.background for save in background.in_flight() if save.background)
    paths = dict.fromkeys(path for save in saves for path in sorted(save.paths))
    return tuple(path for path in paths if final_places(path) == path)
