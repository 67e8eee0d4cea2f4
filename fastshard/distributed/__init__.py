# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that the ranks of a process group save and load together."""
