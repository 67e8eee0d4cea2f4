# SPDX-License-Identifier: Apache-2.0
"""Compiles the CUDA kernels by NVRTC, from PyPI, without a toolkit or a host compiler, and binds them into a fatbin.

Machine code of a newer toolkit may be refused by an older driver. So each architecture is compiled by the oldest NVRTC
that knows it and what the kernels say of memory: 12.0 for those up to Hopper, 12.8 for Blackwell. Architectures to
come are given PTX of 12.0.

    python wheels/kernels.py      makes build/wheels/kernels/pack.fatbin, for either architecture of the host
"""

from __future__ import annotations

import ctypes
import glob
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "csrc" / "device" / "kernels" / "pack.cu"

COMPILERS = {
    "nvidia-cuda-nvrtc-cu12==12.0.140": ("sm_75", "sm_80", "sm_90", "compute_90"),
    "nvidia-cuda-nvrtc-cu12==12.8.93": ("sm_100", "sm_120"),
}
"""Requirements, and what each compiles. Code for sm_80 runs on sm_86 and sm_89, too, and so on."""
BINDER = "nvidia-nvfatbin-cu12==12.6.77"
"""Its fatbins are compressed by LZ4, as drivers before 12.4 know it."""

# NVRTC has no standard library. This is what the kernels, and the headers that they share with the CPU's code, name.
STANDARD = {
    "cstddef": "namespace std { enum class byte : unsigned char {}; using size_t = decltype(sizeof 0); }",
    "cstdint": (
        "using int8_t = signed char; using int16_t = short; using int32_t = int; using int64_t = long;"
        "using uint8_t = unsigned char; using uint16_t = unsigned short; using uint32_t = unsigned int;"
        "using uint64_t = unsigned long; using uintptr_t = unsigned long;"
    ),
    "cstring": "",
    "type_traits": (
        "namespace std { template <typename> struct make_signed;"
        "template <> struct make_signed<unsigned int> { using type = int; };"
        "template <> struct make_signed<unsigned long> { using type = long; };"
        "template <typename T> using make_signed_t = typename make_signed<T>::type; }"
    ),
    "string": "namespace std { struct string {}; }",
    "variant": "namespace std { template <typename...> struct variant {}; }",
    "vector": "namespace std { template <typename> struct vector { bool empty() const; unsigned long size() const; }; }",
}


class Compiler:
    """One NVRTC, of a folder into which pip has installed it."""

    def __init__(self, folder: Path) -> None:
        self._library = ctypes.CDLL(library(folder, "nvrtc"))
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p

    def compile(self, architecture: str) -> tuple[bytes, str]:
        """The code of one architecture (PTX for compute_XX), and what the compiler says of it."""
        names = [name.encode() for name in STANDARD]
        texts = [b"#pragma once\n" + text.encode() for text in STANDARD.values()]
        options = [
            f"--gpu-architecture={architecture}",
            "--std=c++17",
            f"-I{ROOT / 'csrc'}",
            "-default-device",
            "--ptxas-options=-v",
        ]
        program = ctypes.c_void_p()
        created = self._library.nvrtcCreateProgram(
            ctypes.byref(program),
            KERNELS.read_bytes(),
            KERNELS.name.encode(),
            len(names),
            strings(texts),
            strings(names),
        )
        self._check(created, "")
        result = self._library.nvrtcCompileProgram(
            program, len(options), strings([o.encode() for o in options])
        )
        log = self._text(program, "ProgramLog").rstrip(b"\0").decode()
        self._check(result, log)
        code = self._text(program, "PTX" if architecture.startswith("compute") else "CUBIN")
        self._library.nvrtcDestroyProgram(ctypes.byref(program))
        return code, log

    def _text(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self._library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)), what)
        text = ctypes.create_string_buffer(size.value)
        self._check(getattr(self._library, f"nvrtcGet{what}")(program, text), what)
        return text.raw

    def _check(self, result: int, more: str) -> None:
        if result:
            raise RuntimeError(f"NVRTC: {self._library.nvrtcGetErrorString(result).decode()}\n{more}")


def fatbin(codes: Sequence[tuple[str, bytes]], folder: Path) -> bytes:
    """The codes of all architectures in one, of which the driver takes what fits."""
    binder = ctypes.CDLL(library(folder, "nvfatbin"))
    handle = ctypes.c_void_p()

    def check(result: int) -> None:
        if result:
            raise RuntimeError(f"nvFatbin: error {result}")

    check(binder.nvFatbinCreate(ctypes.byref(handle), strings([b"-64", b"-host=linux"]), 2))
    for architecture, code in codes:
        kind, _, number = architecture.partition("_")
        arguments = (handle, code, ctypes.c_size_t(len(code)), number.encode(), KERNELS.name.encode())
        check(
            binder.nvFatbinAddPTX(*arguments, b"")
            if kind == "compute"
            else binder.nvFatbinAddCubin(*arguments)
        )
    size = ctypes.c_size_t()
    check(binder.nvFatbinSize(handle, ctypes.byref(size)))
    made = ctypes.create_string_buffer(size.value)
    check(binder.nvFatbinGet(handle, made))
    check(binder.nvFatbinDestroy(ctypes.byref(handle)))
    return made.raw


def library(folder: Path, name: str) -> str:
    (found,) = glob.glob(f"{folder}/nvidia/*/lib/lib{name}.so.*")
    return found


def strings(texts: Sequence[bytes]) -> ctypes.Array[ctypes.c_char_p]:
    return (ctypes.c_char_p * len(texts))(*texts)


def make(folder: Path) -> Path:
    """The file of the fatbin in `folder`, into which the compilers are installed, too."""
    folders = {requirement: folder / requirement for requirement in (*COMPILERS, BINDER)}
    for requirement, place in folders.items():
        if not place.exists():
            command = [
                sys.executable,
                "-m",
                "pip",
                "install",
                "-q",
                "--no-deps",
                "--target",
                place,
                requirement,
            ]
            subprocess.run(command, check=True)
    codes = []
    for requirement, architectures in COMPILERS.items():
        compiler = Compiler(folders[requirement])
        for architecture in architectures:
            code, log = compiler.compile(architecture)
            registers = ", ".join(re.findall(r"Used (\d+) registers", log)) or "-"
            print(f"kernels for {architecture}: {len(code)} bytes, registers: {registers}")
            codes.append((architecture, code))
    made, content = folder / "pack.fatbin", fatbin(codes, folders[BINDER])
    if not made.exists() or made.read_bytes() != content:  # what was linked with it need not be linked again
        made.write_bytes(content)
    return made


if __name__ == "__main__":
    print(make(ROOT / "build" / "wheels" / "kernels"))
