# SPDX-License-Identifier: Apache-2.0
"""The public address of :mod:`fastshard.integrations.lightning`: checkpoints of Lightning's Trainer and Fabric."""

from .integrations.lightning import FastshardCheckpointIO as FastshardCheckpointIO
