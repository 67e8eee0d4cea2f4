# SPDX-License-Identifier: Apache-2.0
"""What other tools want to know of a checkpoint's files, from its ``SHA256SUMS``: no weights are read."""

from __future__ import annotations

import os
from typing import Final, Literal

from ..formats import in_toto, oci
from ..formats.digests import known_digests

FORMATS: Final = ("in-toto", "oci")


def statement_of(
    folder: str | os.PathLike[str],
    form: Literal["in-toto", "oci"],
    *,
    layout: str | os.PathLike[str] | None = None,
) -> str:
    """Returns what a folder's ``SHA256SUMS`` says in the form of another tool, as JSON.

    Args:
        folder: the checkpoint.
        form: ``"in-toto"`` is the statement that ``model_signing`` signs, and ``"oci"`` the manifest of an artifact as
            CNCF's ModelPack describes it, each file a layer.
        layout: of ``"oci"``, a folder to be made, which becomes an OCI image layout with this artifact, from which it
            can be pushed. Its layers are symbolic links to the files.

    Raises:
        OSError: there is no ``SHA256SUMS``, or a file that it names is missing; ``FileExistsError`` for ``layout``.
        ValueError: a file was changed later, ``SHA256SUMS`` cannot be read, or ``form`` is none of these.
    """
    if form not in FORMATS:
        raise ValueError(f"the format must be one of {', '.join(FORMATS)}, not {form!r}")
    if layout is not None and form != "oci":
        raise ValueError(f"only the format oci has a layout, not {form}")
    files = known_digests(folder)
    name = os.path.basename(os.path.realpath(folder)) or "model"
    if form == "in-toto":
        return in_toto.statement(name, {file: known.sha256 for file, known in files.items()})
    packed = oci.pack(name, files)
    if layout is not None:
        _write_layout(packed, folder, layout, name)
    return packed.manifest.text


def _write_layout(
    packed: oci.Packed, folder: str | os.PathLike[str], layout: str | os.PathLike[str], name: str
) -> None:
    """Writes the layout, its index last."""
    os.mkdir(layout)
    blobs = os.path.join(layout, "blobs", "sha256")
    os.makedirs(blobs)
    for digest, file in packed.layers.items():
        os.symlink(os.path.realpath(os.path.join(folder, file)), os.path.join(blobs, _hex(digest)))
    for blob in (packed.config, packed.manifest):
        _write(os.path.join(blobs, _hex(str(blob.descriptor["digest"]))), blob.text)
    _write(os.path.join(layout, oci.LAYOUT_NAME), oci.LAYOUT)
    _write(os.path.join(layout, oci.INDEX_NAME), oci.index(packed, name))


def _hex(digest: str) -> str:
    return digest.partition(":")[2]


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)
