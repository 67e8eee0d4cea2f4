# SPDX-License-Identifier: Apache-2.0
"""A plan becomes bytes: from tensors to the files that the native module writes."""
