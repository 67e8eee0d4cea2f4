#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The recipes of docker/, built for real on a root file system that stands in for the official images.

    debootstrap --variant=minbase --components=main,universe --include=python3-pip,python3-dev,ca-certificates noble ROOT \\
        http://archive.ubuntu.com/ubuntu
    make wheels ARGS="--python 3.12 --architecture x86_64"
    python tests/image_recipes.py ROOT

No docker and no registry is needed, but root and buildah, and PyPI and the root's own packages for the recipe that builds
the wheel. ``ROOT`` becomes an image with the name of the one that a recipe begins with. It has a Python with pip, but no
vLLM: ``tests/serving_image.py`` goes on with that. Ends with status 77 where this machine cannot do it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

TOP = Path(__file__).resolve().parents[1]
RECIPES = sorted((TOP / "docker").glob("*.Dockerfile"))
BROUGHT = ("/etc/resolv.conf", "/etc/hosts", "/etc/ssl/certs/ca-certificates.crt")
"""How this machine reaches PyPI, with the variables of pip."""
LOOK = """
import importlib.util, json, pathlib, shutil, sys, sysconfig
(folder,) = importlib.util.find_spec("fastshard").submodule_search_locations
(native,) = pathlib.Path(folder).glob("_native*.so")
spec = importlib.util.spec_from_file_location("fastshard._native", native)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert module.kernels_compiled_in() is not None
print(json.dumps({
    "command": shutil.which("fastshard"),
    "compilers": [name for name in ("gcc", "g++", "cc", "cmake", "ninja") if shutil.which(name)],
    "left": [path for path in ("/src", "/wheels", "/dist") if pathlib.Path(path).exists()],
}))
"""
ENVIRONMENT = {"STORAGE_DRIVER": "overlay", "BUILDAH_ISOLATION": "chroot"}


def buildah(*arguments: object) -> str:
    command = ["buildah", *map(str, arguments)]
    done = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout.strip()


def begins_with(recipe: Path) -> str:
    """The name of the image that a recipe begins with, in full."""
    text = recipe.read_text()
    name = re.search(r"^(?:ARG IMAGE=|FROM )(\S+)", text, re.MULTILINE)
    assert name is not None, recipe
    return f"docker.io/{name.group(1)}"


def make_base(root: Path) -> str:
    container = buildah("from", "scratch")
    buildah("add", "-q", container, root, "/")
    for path in filter(os.path.exists, BROUGHT):
        buildah("add", "-q", container, os.path.realpath(path), path)
    # The images let pip install into the system's Python.
    buildah("run", container, "--", "sh", "-c", "rm -f /usr/lib/python3*/EXTERNALLY-MANAGED")
    base = buildah("commit", "-q", "--rm", container)
    for name in {begins_with(recipe) for recipe in RECIPES}:
        buildah("tag", base, name)
    return base


def check(recipe: Path) -> None:
    image = f"localhost/tried-{recipe.stem.split('.')[0]}"
    buildah("build-using-dockerfile", "--pull-never", "-f", recipe, "-t", image, TOP)
    container = buildah("from", "--pull-never", image)
    try:
        found = json.loads(buildah("run", container, "--", "python3", "-c", LOOK))
        entry = json.loads(buildah("inspect", "--type", "image", image))["OCIv1"]["config"].get("Entrypoint")
    finally:
        buildah("rm", container)
        buildah("rmi", image)
    assert found["command"], found
    assert found["compilers"] == found["left"] == [], found
    assert (entry == ["fastshard", "serve"]) == (recipe.name == "from-source.Dockerfile"), entry
    print(
        f"ok  {recipe.relative_to(TOP)}: {found['command']}, the native module loads, nothing else is left",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("root", type=Path, help="the folder of a root file system with a Python and pip")
    given = parser.parse_args()
    if os.geteuid() != 0 or not shutil.which("buildah"):
        print("not tried: it takes root and buildah")
        return 77
    base = make_base(given.root)
    try:
        for recipe in RECIPES:
            check(recipe)
    finally:
        buildah("rmi", "--force", base)
    return 0


if __name__ == "__main__":
    sys.exit(main())
