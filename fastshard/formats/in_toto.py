# SPDX-License-Identifier: Apache-2.0
"""The statement that OpenSSF's ``model_signing`` signs, made of digests that are known.

It is an in-toto statement with the predicate ``https://model_signing/signature/v1.0``: the digest of each file,
and as its subject one digest over these.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Final

_STATEMENT: Final = "https://in-toto.io/Statement/v1"
_PREDICATE: Final = "https://model_signing/signature/v1.0"


def statement(name: str, digests: Mapping[str, str]) -> str:
    """Returns the statement for a model of this name, as JSON. ``digests``: SHA-256 of each file, by name."""
    ordered = sorted(digests.items(), key=lambda item: item[0].split("/"))  # as that sorts paths
    subject = hashlib.sha256(b"".join(bytes.fromhex(digest) for _, digest in ordered))
    found = {
        "_type": _STATEMENT,
        "subject": [{"name": name, "digest": {"sha256": subject.hexdigest()}}],
        "predicateType": _PREDICATE,
        "predicate": {
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": False,
                "ignore_paths": [],
            },
            "resources": [
                {"name": file, "algorithm": "sha256", "digest": digest} for file, digest in ordered
            ],
        },
    }
    return json.dumps(found, indent=1) + "\n"
