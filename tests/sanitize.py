# SPDX-License-Identifier: Apache-2.0
"""``make sanitize``: the engine's tests over a native module (and a simulated driver) that GCC's sanitizers watch.

One after the other: addresses and undefined behaviour, then threads. Each is a build in ``build/sanitize``, and a
``fastshard`` beside it that is this checkout's Python with that module. What a sanitizer reports fails the run, in
whichever process it is reported. Needs an environment with the libraries of the tests, and CMake, Ninja and pybind11.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "sanitize"
TESTS = (
    "test_files.py",
    "test_direct.py",
    "test_mapped.py",
    "test_prepared.py",
    "test_fetch.py",
    "test_amendments.py",
    "test_future.py",
    "test_many_files.py",
    "test_closing.py",
    "test_schedule.py",
    "test_casts.py",
    "test_checksums.py",
    "test_changed.py",
    "test_shared_writes.py",
    "test_placed_items.py",
    "test_fork_snapshot.py",
    "test_planning.py",
    "test_registration.py",
    "test_warm_up.py",
    "test_cuda_path.py",
    "test_cuda_prepared.py",
    "test_cuda_streams.py",
    "test_cuda_link.py",
    "test_cuda_capture.py",
    "test_cuda_cruelty.py",
    "test_asynchronous.py",
    "test_relief.py",
    "test_async_devices.py",
    "simulated_driver",
)
"""Those that reach most of csrc."""
REMARK = re.compile(r"==\d+==WARNING: ASan is ignoring requested __asan_handle_no_return.*\n.*\n.*\n")
"""No report: threads that Python ends at exit are unwound, which ASan cannot follow."""
OPTIONS = ("-q", "-p", "no:cacheprovider", "-n", "auto", "--dist", "worksteal")


@dataclass(frozen=True)
class Sanitizer:
    name: str
    kinds: str
    library: str
    options: dict[str, str]
    """Its own, by the variable that has them."""
    suppressed: str = ""
    """What it reports that is not ours, in its own language."""
    excluded: dict[str, str] = field(default_factory=dict)
    """Tests it cannot run, and why."""
    before: tuple[str, ...] = ()
    """A command to start Python with, where it is allowed."""


NOT_COUNTED = "the sanitizer's operator new stands before that of refusing_resources.cc, which counts"
SIGNAL = "the sanitizer reports the invalid access that the test is about, and ends the process its own way"
EXCLUDED = {
    "test_closing.py::test_without_a_thread_or_memory_they_are_closed_by_the_caller[memory]": NOT_COUNTED,
    "test_closing.py::test_soon_without_a_thread_or_memory_is_now[memory]": NOT_COUNTED,
    "simulated_driver/test_simulator.py::test_the_host_cannot_read_device_addresses": SIGNAL,
}
PIPE = (
    "UBSan opens a pipe to look at what an object is, and takes it for none where no two descriptors are left"
)
PIPES = {
    f"test_many_files.py::test_close_to_the_limit_it_works_or_changes_nothing[{n}]": PIPE for n in (0, 1)
}
MORE_MEMORY = "the sanitizer keeps notes of memory in memory, and the test measures that of the process"
DUPLICATE = "it ends a forked child that starts a thread at an address where the parent had one"
FORKED = "test_shared_writes.py::test_memory_shared_with_a_forked_process_stays_shared"
UNORDERED = "a device copies what another of its streams changes, which is what is missing in the test"
FREE = "test_async_devices.py::test_a_change_"
OWN_LOCKS = (
    "its runtime has locks and a thread, which a process made by clone() alone finds held, and does not find"
)
THREADS = {
    "test_fork_snapshot.py": OWN_LOCKS,
    **{f"{FREE}behind_the_event_is_not_in_the_file[False-{seed}]": UNORDERED for seed in range(4)},
    f"{FREE}right_after_the_event[False]": UNORDERED,
    **{
        f"{FORKED}[{how}]": MORE_MEMORY
        for how in ("by a forked process", "after the import", "before the import")
    },
    "test_mapped.py::test_memory_is_bounded": MORE_MEMORY,
    "test_direct.py::test_fork_while_a_save_runs": DUPLICATE,
    "test_files.py::test_fork_while_a_save_runs": DUPLICATE,
    "test_warm_up.py::test_a_forked_child_has_none_of_it": DUPLICATE,
    "test_async_devices.py::test_a_forked_child_has_an_arena_of_its_own": DUPLICATE,
}
SANITIZERS = {
    "address": Sanitizer(
        "address",
        "address,undefined",
        "libasan.so",
        # Leaks: an interpreter leaves what it has when it ends. What fastshard takes is counted by tests.
        {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"},
        excluded={**EXCLUDED, **PIPES},
    ),
    "thread": Sanitizer(
        "thread",
        "thread",
        "libtsan.so",
        # Children of tests, forked while there are threads, start threads of their own.
        {"TSAN_OPTIONS": "die_after_fork=0"},
        suppressed="""
# A thread's local variables are freed by the dynamic loader, of which it does not know that the thread has ended.
race:_dl_deallocate_tls
""",
        excluded={**EXCLUDED, **THREADS},
        before=("setarch", "-R"),  # it knows no addresses as random as newer kernels give
    ),
}


def build(sanitizer: Sanitizer, folder: Path) -> Path:
    """Makes the module, and the package around it; the folder to import it from."""
    made, package = folder / "module", folder / "package"
    configure: list[str | Path] = [
        *(
            "cmake",
            "-S",
            ROOT,
            "-B",
            folder / "build",
            "-G",
            "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
        ),
        *("-DCMAKE_BUILD_TYPE=Debug", f"-DCMAKE_CXX_FLAGS={flags(sanitizer)}"),
        *("-DCMAKE_COMPILE_WARNING_AS_ERROR=OFF", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={made}"),
        *shlex.split(os.environ.get("CMAKE_ARGS", "")),
    ]
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}",
    }
    subprocess.run(configure, check=True, env=environment, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", folder / "build", "--target", "_native"], check=True, env=environment)
    shutil.rmtree(package, ignore_errors=True)
    (package / "fastshard").mkdir(parents=True)
    sources = [
        path for path in (ROOT / "fastshard").iterdir() if path.suffix != ".so" and path.name != "bench"
    ]
    for path in (*sources, ROOT / "bench", *made.glob("_native*.so")):
        (package / "fastshard" / path.name).symlink_to(path)
    return package


def flags(sanitizer: Sanitizer) -> str:
    return f"-fsanitize={sanitizer.kinds} -fno-sanitize-recover=undefined -fno-omit-frame-pointer -O1 -g"


def environment_of(sanitizer: Sanitizer, folder: Path, package: Path) -> dict[str, str]:
    compiler = os.environ.get("CXX", "c++")
    libraries = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        # The C++ runtime is loaded with the sanitizer's, which looks for its functions when the process begins.
        for name in (sanitizer.library, "libstdc++.so")
    ]
    suppressions = folder / "suppressions"
    suppressions.write_text(sanitizer.suppressed)
    more = f":log_path={folder / 'reports' / 'report'}" + f":suppressions={suppressions}" * bool(
        sanitizer.suppressed
    )
    return {
        **os.environ,
        **{name: value + more for name, value in sanitizer.options.items()},
        "LD_PRELOAD": " ".join(libraries),
        "PYTHONPATH": str(package),
        "FASTSHARD_SIMCUDA_CACHE": str(folder / "simcuda"),
        "CXXFLAGS": flags(sanitizer),  # of the simulated driver
        "FASTSHARD_HANG_SECONDS": "600",  # all is several times as slow
        "OMP_NUM_THREADS": "1",  # torch's OpenMP synchronizes where no sanitizer sees it
    }


def run(sanitizer: Sanitizer, arguments: list[str]) -> bool:
    folder = WORK / sanitizer.name
    package = build(sanitizer, folder)
    reports = folder / "reports"
    shutil.rmtree(reports, ignore_errors=True)
    reports.mkdir()
    environment = environment_of(sanitizer, folder, package)
    allowed = (
        sanitizer.before and subprocess.run([*sanitizer.before, "true"], capture_output=True).returncode == 0
    )
    python = [*(sanitizer.before if allowed else ()), sys.executable]
    # From tests/, where no other fastshard is.
    script = "import fastshard._native; print(fastshard._native.__file__)"
    found = subprocess.run(
        [*python, "-c", script],
        cwd=ROOT / "tests",
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    assert Path(found).is_relative_to(package), f"the tests would take {found}"
    options = [*OPTIONS, *(f"--deselect=tests/{name}" for name in sanitizer.excluded)]
    began = time.monotonic()
    ended = subprocess.run(
        [*python, "-m", "pytest", *options, *(arguments or TESTS)], cwd=ROOT / "tests", env=environment
    )
    reported = [
        text
        for path in sorted(reports.iterdir())
        if (text := REMARK.sub("", path.read_text(errors="replace")).strip())
    ]
    print(*reported, sep="\n\n")
    print(
        f"{sanitizer.name}: status {ended.returncode}, {len(reported)} processes reported, "
        f"{time.monotonic() - began:.0f} s",
        flush=True,
    )
    return ended.returncode == 0 and not reported


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=SANITIZERS, help="this one of the sanitizers")
    parser.add_argument("arguments", nargs="*", help="pytest's, instead of the engine's tests")
    given = parser.parse_args()
    chosen = [SANITIZERS[given.only]] if given.only else list(SANITIZERS.values())
    return 0 if all([run(sanitizer, given.arguments) for sanitizer in chosen]) else 1


if __name__ == "__main__":
    sys.exit(main())
