# SPDX-License-Identifier: Apache-2.0
"""Names in a folder change all at once."""
