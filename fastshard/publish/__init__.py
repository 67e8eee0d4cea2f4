# SPDX-License-Identifier: Apache-2.0
"""Gives several files their names at the same moment."""
