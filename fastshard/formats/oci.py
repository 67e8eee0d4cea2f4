# SPDX-License-Identifier: Apache-2.0
"""The OCI manifest of a model, made of digests that are known: CNCF's ModelPack, one file a layer.

Files are layers as they are (``.raw``), so a layer's digest is that of the file, and nothing is packed or read.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Final, NamedTuple

from .digests import Known
from .naming import WEIGHTS_SUFFIX, goes_with_weights

_MODEL: Final = "application/vnd.cncf.model"
_FILE_PATH: Final = "org.cncf.model.filepath"
_TITLE: Final = "org.opencontainers.image.title"
"""What ``oras pull`` calls a file."""
_TAG: Final = "org.opencontainers.image.ref.name"
_DOCUMENTS: Final = (".md", ".rst", ".pdf")
_CODE: Final = ".py"
_JSON: Final = ".json"

_NOT_IN_TAGS: Final = re.compile(r"[^A-Za-z0-9._]+")
_MOST_OF_A_TAG: Final = 128

LAYOUT_NAME: Final = "oci-layout"
LAYOUT: Final = '{"imageLayoutVersion": "1.0.0"}'
INDEX_NAME: Final = "index.json"


class Blob(NamedTuple):
    """A document and its descriptor."""

    text: str
    descriptor: dict[str, object]


class Packed(NamedTuple):
    """A model as an OCI artifact."""

    manifest: Blob
    config: Blob
    layers: dict[str, str]
    """Name of the file that each layer is, by the layer's digest."""


def pack(name: str, files: Mapping[str, Known]) -> Packed:
    """Returns the artifact of a model of this name. Raises ``ValueError`` if there is no file."""
    if not files:
        raise ValueError("there are no files to describe")
    layers = [_layer(file, known) for file, known in sorted(files.items())]
    is_safetensors = any(file.endswith(WEIGHTS_SUFFIX) for file in files)
    config = _blob(
        f"{_MODEL}.config.v1+json",
        {
            "descriptor": {"name": name},
            "config": {"format": "safetensors"} if is_safetensors else {},
            "modelfs": {"type": "layers", "diffIds": [layer["digest"] for layer in layers]},
        },
    )
    manifest = _blob(
        _image("manifest"),
        {
            "schemaVersion": 2,
            "mediaType": _image("manifest"),
            "artifactType": f"{_MODEL}.manifest.v1+json",
            "config": config.descriptor,
            "layers": layers,
        },
    )
    manifest.descriptor["artifactType"] = f"{_MODEL}.manifest.v1+json"
    return Packed(manifest, config, {f"sha256:{known.sha256}": file for file, known in files.items()})


def index(packed: Packed, name: str) -> str:
    """Returns the ``index.json`` of an image layout that has this artifact only. Its tag is the name, as far as tags
    can be that."""
    tag = _NOT_IN_TAGS.sub("-", name).strip("-.")[:_MOST_OF_A_TAG] or "model"
    entry = {**packed.manifest.descriptor, "annotations": {_TAG: tag}}
    return _json({"schemaVersion": 2, "mediaType": _image("index"), "manifests": [entry]})


def _layer(file: str, known: Known) -> dict[str, object]:
    return {
        "mediaType": f"{_MODEL}.{_kind(file)}.v1.raw",
        "digest": f"sha256:{known.sha256}",
        "size": known.nbytes,
        "annotations": {_FILE_PATH: file, _TITLE: file},
    }


def _kind(file: str) -> str:
    """Returns how ModelPack calls such a file."""
    name = file.rpartition("/")[2]
    if goes_with_weights(name) and not name.endswith(_JSON):  # an index
        return "weight"
    if name.lower().endswith(_DOCUMENTS) or name.upper().startswith(("LICENSE", "NOTICE", "README")):
        return "doc"
    return "code" if name.endswith(_CODE) else "weight.config"


def _image(what: str) -> str:
    return f"application/vnd.oci.image.{what}.v1+json"


def _blob(media_type: str, content: object) -> Blob:
    text = _json(content)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Blob(text, {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(text.encode())})


def _json(content: object) -> str:
    return json.dumps(content, indent=1) + "\n"
