# SPDX-License-Identifier: Apache-2.0
"""The public address of :mod:`fastshard.integrations.torch_checkpointing`: a storage for Meta's ``torch_checkpointing``."""

from .integrations.torch_checkpointing import FastshardStorage as FastshardStorage
from .integrations.torch_checkpointing import FastshardStorageConfig as FastshardStorageConfig
