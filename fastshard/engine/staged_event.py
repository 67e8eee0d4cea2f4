# SPDX-License-Identifier: Apache-2.0
"""What the streams of a job wait for instead of the host, until a save has its own copy of all tensors."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from .. import _native


class StagedEvent:
    """Happens when a save has its own copy of all tensors. Used as a ``torch.cuda.Event``.

    An event of ``torch.cuda.Stream.wait_event(event)`` may be one of these.
    """

    def __init__(
        self,
        holders: Sequence[_native.Save],
        is_staged: Callable[[], bool],
        wait_staged: Callable[[], bool],
        note: Callable[[str], object] = lambda text: None,
    ) -> None:
        """``holders`` are the saves that bring the tensors into memory. ``note`` is told why the host waits for
        them, if it has to."""
        self._holders = tuple(holders)
        self._is_staged = is_staged
        self._wait_staged = wait_staged
        self._note = note
        self._process = os.getpid()

    def wait(self, stream: torch.cuda.Stream | None = None) -> None:
        """Makes what is enqueued on ``stream`` from now on wait there until the tensors may change.

        The host goes on at once, but for the tensors that lie in its own memory: these are copied when the call
        returns, as no stream holds up their changes. Where not all copies out of devices could be enqueued
        beforehand, the host waits for them.

        Args:
            stream: ``None``: the current streams of all devices that the save reads from.
        """
        if self.query():
            return
        refusals = [
            f"the host waits for the snapshot: {refusal}"
            for save in self._holders
            for ordinal, handle in self._streams(save, stream)
            if (refusal := save.hold_stream(ordinal, handle)) is not None
        ]
        for refusal in refusals:
            self._note(refusal)
        if refusals or not self._holders or not all(save.devices for save in self._holders):
            self._wait_staged()

    def query(self) -> bool:
        """Returns whether the tensors may change."""
        if os.getpid() != self._process:
            raise RuntimeError("this save belongs to the parent process")
        return self._is_staged()

    def synchronize(self) -> None:
        """Waits on the host until the tensors may change."""
        if not self.query():
            self._wait_staged()

    @staticmethod
    def _streams(save: _native.Save, stream: Any) -> list[tuple[int, int]]:
        if stream is not None:
            return [(stream.device.index, stream.cuda_stream)] if save.devices else []
        from . import tensors

        return list(tensors.current_streams(save.devices).items())
