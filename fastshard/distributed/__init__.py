# SPDX-License-Identifier: Apache-2.0
"""Saves and loads across the ranks of ``torch.distributed``."""
