# SPDX-License-Identifier: Apache-2.0
"""Messages of other libraries about files that are not visible yet: they are held back until the files stand."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Final

from .directory import final_places

_log: Final = logging.getLogger("fastshard")


class Messages:
    """What is to be said when the files of a directory stand. Whoever reads of a file may open it."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._records: list[logging.LogRecord] = []
        self.preferred: Sequence[str] = ()
        """Older files which loaders prefer to those that are being saved."""

    @contextlib.contextmanager
    def held_back(self, loggers: tuple[str, ...], path: str) -> Iterator[None]:
        """Holds back what these loggers say of files in the folder ``path`` during the block."""

        def is_about_others(record: logging.LogRecord) -> bool:
            text = record.getMessage()
            if path not in text:
                return True
            record.msg, record.args = final_places(text), None
            self._records.append(record)
            return False

        found = [logging.getLogger(name) for name in loggers]
        for logger in found:
            logger.addFilter(is_about_others)
        try:
            yield
        finally:
            for logger in found:
                logger.removeFilter(is_about_others)

    def tell(self, _: object) -> None:
        """Hands the messages, which name the final places, to their loggers. It is a step of a save."""
        for record in self._records:
            logging.getLogger(record.name).handle(record)
        for name in self.preferred:
            _log.warning(
                "%s is of an earlier save, and loaders look for it before the .bin files that were saved just now",
                os.path.join(self._directory, name),
            )
