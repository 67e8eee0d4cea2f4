# SPDX-License-Identifier: Apache-2.0
"""Writers and readers for ``torch.distributed.checkpoint``: ``dcp.save(state, storage_writer=FastshardWriter(path))``.

Importing this module imports ``torch.distributed.checkpoint``.
"""

from .distributed.file_system import FastshardFileSystemWriter as FastshardFileSystemWriter
from .distributed.reader import FastshardReader as FastshardReader
from .distributed.stager import FastshardStager as FastshardStager
from .distributed.writer import FastshardWriter as FastshardWriter
