# SPDX-License-Identifier: Apache-2.0
"""Fixtures of all tests: the simulated CUDA driver, the real GPU, engines that are closed.

A process has one CUDA driver for good: fastshard loads it at its first use of CUDA. So the simulator and a
real GPU never meet in one process:

- without a GPU (or with ``FASTSHARD_LIBCUDA`` set, whose driver is not torch's) tests of ``sim`` run here and
  tests of the real GPU are skipped;
- with a GPU it is the other way round, and ``test_cuda_path.py`` starts the tests of ``sim`` in a process of
  their own, whose ``FASTSHARD_LIBCUDA`` is the simulator.

What needs the real GPU has the marker ``real_gpu``, by its fixtures: ``pytest -m real_gpu`` runs it and nothing else.
"""

from __future__ import annotations

import faulthandler
import fcntl
import functools
import gc
import os
import pickle
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import pytest
import simcuda

T = TypeVar("T")

if TYPE_CHECKING:
    import torch

    from fastshard.engine.engine import Engine

DRIVER_VARIABLE = "FASTSHARD_LIBCUDA"
REQUIRE_VARIABLE = "FASTSHARD_REQUIRE_CUDA"
REQUIRE_MOUNTS_VARIABLE = "FASTSHARD_REQUIRE_MOUNTS"
CACHE_VARIABLE = "FASTSHARD_SIMCUDA_CACHE"
BUDGET = 1 << 20
"""Staging memory of ``new_engine``: two slots."""
SLOT = 256 << 10
"""Their size."""
HANG_SECONDS = int(os.environ.get("FASTSHARD_HANG_SECONDS", "300"))
PROTECTED = Path("/proc/sys/fs/protected_symlinks")
_LEAKS = ("streams", "events", "modules", "registrations", "contexts", "registered_bytes")
_stderr: list[int] = []  # a copy made before pytest captures it


def pytest_configure(config: pytest.Config) -> None:
    # What tests start must find the installed fastshard: ``python -c`` looks into the current folder first. pytest-xdist's
    # own process runs no test, and its workers take the paths they are given from where it is.
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        os.chdir(Path(__file__).parent)
    # Before torch is loaded: else its threads spin at each barrier, here and in what tests start, on the other workers'
    # cores. A case of the bench takes three times the processor's time.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    _stderr.append(os.dup(2))
    # One build for everybody, the simulator's own tests included; git ignores build/.
    os.environ.setdefault(CACHE_VARIABLE, str(Path(__file__).resolve().parents[1] / "build" / "simcuda"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "real_cuda" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.real_gpu)


@functools.cache
def real_gpu() -> bool:
    """Whether this process's CUDA driver is a real GPU's; decided once, before anything is simulated."""
    if os.environ.get(DRIVER_VARIABLE):
        return False
    import torch

    return torch.cuda.is_available()


def assert_same(found: bytes, expected: bytes) -> None:
    """Without the megabytes of explanation that pytest gives."""
    if found != expected:
        differ = (i for i, (one, other) in enumerate(zip(found, expected, strict=False)) if one != other)
        first = next(differ, min(len(found), len(expected)))
        pytest.fail(f"{len(found)} bytes, expected {len(expected)}; the first difference is at {first}")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Of a file to be saved, alone in its folder."""
    return tmp_path / "weights"


@pytest.fixture
def public() -> Iterator[Path]:
    """As ``tmp_path``, where other users' processes may pass: pytest keeps its folders to its own user."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.fixture
def memory() -> Iterator[Path]:
    """An empty directory on a filesystem in memory, whose files a device can write."""
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("no /dev/shm here")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


@pytest.fixture(params=["disk", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An empty directory on a disk, and one on a filesystem in memory."""
    if request.param == "disk":
        return tmp_path
    in_memory: Path = request.getfixturevalue("memory")
    return in_memory


@pytest.fixture
def no_hang() -> Iterator[None]:
    """Ends the process, saying where every thread is, when the test does not come to an end."""
    faulthandler.dump_traceback_later(HANG_SECONDS, exit=True, file=_stderr[0])
    yield
    faulthandler.cancel_dump_traceback_later()


def by_one_worker(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], T]) -> T:
    """Returns what ``make`` returns, which is called with a new folder by the first of pytest-xdist's workers that needs
    it. The others wait and read the pickled value, so what takes long is done once, not by each worker."""
    top = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        top = top.parent
    kept = top / f"{name}.pickle"
    with open(top / f"{name}.lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=top))
            kept.write_bytes(pickle.dumps(make(folder)))
        value: T = pickle.loads(kept.read_bytes())
    return value


@pytest.fixture(scope="session")
def simulated_driver() -> simcuda.SimCuda:
    """The simulator, built if need be, as the driver of this process's fastshard."""
    if real_gpu():
        pytest.skip("this process has a real GPU; the simulator's tests run in a process of their own")
    from fastshard import _native

    sim = simcuda.SimCuda(simcuda.build(os.environ[CACHE_VARIABLE]))
    with pytest.MonkeyPatch.context() as patch:  # for this process only, not for those it starts
        patch.setenv(DRIVER_VARIABLE, str(sim.path))
        library, _ = _native.cuda_driver_version()
    assert library == str(sim.path), "fastshard had loaded another driver before"
    return sim


@pytest.fixture
def sim(simulated_driver: simcuda.SimCuda, no_hang: None) -> Iterator[simcuda.SimCuda]:
    """The simulator at rest. Afterwards: fastshard broke no rule of CUDA's, and all it took is given back.

    A test in which a context has died ends a process, so to speak: nothing can be given back to it.
    """
    simulated_driver.new_process()
    simulated_driver.reset()
    before = simulated_driver.live()
    yield simulated_driver

    def leaked() -> list[str]:
        after = simulated_driver.live()
        return [kind for kind in _LEAKS if after[kind] > before[kind]]

    violations = simulated_driver.violations()
    simulated_driver.new_process()
    simulated_driver.reset()
    if leaked():
        gc.collect()  # a test that expects an exception leaves cycles through its traceback
        violations += simulated_driver.violations()
    assert violations == []
    assert leaked() == []


@pytest.fixture
def new_engine(request: pytest.FixtureRequest) -> Iterator[Callable[..., Engine]]:
    """Makes engines with the smallest budget, or other options, and closes them."""
    from fastshard.engine.engine import Engine, Options

    if "sim" in request.fixturenames:
        request.getfixturevalue(
            "sim"
        )  # set up first, so that it looks for leaks after the engines are closed
    engines = []

    defaults = {"memory_budget": BUDGET, "threads": 2}

    def make(**options: Any) -> Engine:
        engines.append(Engine(Options(**{**defaults, **options})))
        return engines[-1]

    make.defaults = defaults  # type: ignore[attr-defined]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture
def real_cuda() -> torch.device:
    """The first real GPU. Without one the test is skipped, or fails where ``FASTSHARD_REQUIRE_CUDA`` is 1."""
    if not real_gpu():
        missing = pytest.fail if os.environ.get(REQUIRE_VARIABLE) == "1" else pytest.skip
        missing("no real GPU: torch.cuda is not available, or the driver is simulated")
    import torch

    return torch.device("cuda", 0)


@pytest.fixture
def planned_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lays out every file in Python, as where torch has no table of DLPack functions."""
    monkeypatch.setenv("FASTSHARD_NATIVE_PLANNING", "0")


@pytest.fixture(params=["native", "python"])
def planner(request: pytest.FixtureRequest) -> None:
    """For what must be the same whoever lays out the tensors."""
    from fastshard.engine.planning import why_not_native

    if request.param == "python":
        request.getfixturevalue("planned_in_python")
    elif why_not_native():
        pytest.skip(why_not_native())


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.real_gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """For what must be the same everywhere: once on the CPU, and once on a real GPU where there is one."""
    if request.param == "cuda":
        found: torch.device = request.getfixturevalue("real_cuda")
        return found
    import torch

    return torch.device("cpu")


@pytest.fixture(scope="session")
def preloaded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that refuses calls."""
    library = tmp_path_factory.mktemp("preload") / "refusing_filesystem.so"
    source = Path(__file__).with_name("refusing_filesystem.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


@pytest.fixture
def sticky(tmp_path: Path) -> Iterator[Path]:
    """A folder as /tmp, while the kernel does not follow other users' links in there."""
    if os.geteuid() != 0:
        pytest.skip("only root can make another user's link")
    with PROTECTED.open() as setting:
        fcntl.flock(setting, fcntl.LOCK_EX)  # it is the whole machine's: tests beside this one change it, too
        before = setting.read()
        try:
            PROTECTED.write_text("1")
        except OSError as error:
            pytest.skip(f"{PROTECTED}: {error.strerror}")
        folder = tmp_path / "shared"
        folder.mkdir()
        folder.chmod(0o1777)
        yield folder
        PROTECTED.write_text(before)


def without_mounts(reason: str) -> NoReturn:
    """Skips a test that mounts something where that is not possible; fails it where ``FASTSHARD_REQUIRE_MOUNTS`` is 1."""
    missing = pytest.fail if os.environ.get(REQUIRE_MOUNTS_VARIABLE) == "1" else pytest.skip
    missing(reason)


@pytest.fixture(params=["tmpfs", "ext4"])
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 24 MiB."""
    mount = tmp_path / "mount"
    mount.mkdir()
    if request.param == "tmpfs":
        command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", mount]
    else:
        image = tmp_path / "image"
        image.write_bytes(b"")
        os.truncate(image, 24 << 20)
        mkfs = shutil.which("mkfs.ext4") or "/sbin/mkfs.ext4"
        if not os.path.exists(mkfs):
            without_mounts("no mkfs.ext4 here")
        subprocess.run([mkfs, "-q", image], check=True)
        command = ["mount", "-o", "loop", image, mount]
    if subprocess.run(command, capture_output=True).returncode != 0:
        without_mounts("mounting a filesystem is not allowed here")
    yield mount
    subprocess.run(["umount", "-l", mount], check=True)
