# SPDX-License-Identifier: Apache-2.0
"""What nvcc makes of the kernels, where there is one."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


@pytest.mark.skipif(NVCC is None, reason="no nvcc here")
def test_every_access_says_which_memory_it_is_to(tmp_path: Path) -> None:
    """An access that does not is a generic one, of which the hardware finds that out each time."""
    assert NVCC is not None
    code = tmp_path / "pack.ptx"
    source = CSRC / "device" / "kernels" / "pack.cu"
    command = [NVCC, "-ptx", "-std=c++17", "-arch=sm_80", "-I", CSRC, "-o", code, source]
    subprocess.run(command, check=True, timeout=300)
    accesses = re.findall(r"\b(?:ld|st)\.\S+", code.read_text())
    assert any(access.startswith("ld.global") for access in accesses)
    assert [access for access in accesses if not re.match(r"..\.(?:global|shared|param)\b", access)] == []
