# SPDX-License-Identifier: Apache-2.0
"""The public address of :mod:`fastshard.engine.mapped`: tensors that lie in files, without reading them."""

from .engine.mapped import MappedFile as MappedFile
from .engine.mapped import lies_in_file as lies_in_file
from .engine.mapped import load_mapped as load_mapped
from .engine.mapped import same_bytes as same_bytes
