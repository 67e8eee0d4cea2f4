# SPDX-License-Identifier: Apache-2.0
"""``fastshard.install()``: what it replaces, when, and that nothing of it is left afterwards."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import os
import pickle
import sys
import textwrap
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch as st
import torch
from helpers import filled, names, release, run, run_bare, said_now, same

import fastshard
import fastshard.integrations.adapters
from fastshard.integrations import patching
from fastshard.integrations.patch_groups import expected
from fastshard.integrations.patching import Entry


def held(entry: Entry) -> Any:
    """What stands in the entry's place now."""
    return inspect.getattr_static(*_owner(entry)) if "." in entry.attribute else getattr(*_owner(entry))


def _owner(entry: Entry) -> tuple[Any, str]:
    *classes, name = entry.attribute.split(".")
    return functools.reduce(getattr, classes, sys.modules[entry.module]), name


def references() -> dict[Entry, Any]:
    """What the installed versions of the libraries have themselves."""
    there = [entry for entry in patching.TABLE if importlib.util.find_spec(entry.library)]
    for entry in there:
        importlib.import_module(entry.library)
    return {entry: importlib.import_module(entry.module) and held(entry) for entry in expected(there)}


REFERENCE = references()
ORIGINAL = {"save_file": st.save_file}  # in a container, out of reach
TENSORS = {"a": filled((3, 5)), "b": filled((7,), torch.bfloat16)}


@pytest.fixture(autouse=True)
def original_again() -> Iterator[None]:
    """Nothing is installed before a test, nor after it."""
    yield
    fastshard.uninstall()
    assert not patching._state.active
    for entry, function in REFERENCE.items():
        assert held(entry) is function


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Callable[..., types.ModuleType]:
    """Puts a module into ``sys.modules`` for the test."""

    def made(name: str, source: str = "", **bindings: object) -> types.ModuleType:
        new = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, new)
        exec(textwrap.dedent(source), vars(new))
        vars(new).update(bindings)
        return new

    return made


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts ``fs_library`` on disk, to be imported by the test, with replacements for what it defines."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)

    def written(source: str, *attributes: str) -> None:
        (tmp_path / "fs_library.py").write_text(textwrap.dedent(source))
        importlib.invalidate_caches()
        entries = tuple(Entry("fs_library", name, f"{__name__}:marked") for name in attributes)
        monkeypatch.setattr(patching, "TABLE", patching.TABLE + entries)

    yield written
    fastshard.uninstall()
    for name in set(sys.modules) - before:
        if name.startswith("fs_"):
            del sys.modules[name]


def marked(original: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[str, Any]:
    """The implementation that the tests' replacements have."""
    return "ours", original(*args, **kwargs)


def replaced(function: Any) -> bool:
    return hasattr(function, "__wrapped__")


def engine_saves(function: Callable[..., Any], path: Path) -> bool:
    """Whether this save is fastshard's."""
    before = fastshard.stats()
    function(TENSORS, path)
    assert same(path, TENSORS)
    return fastshard.stats() is not before


# What is replaced ---------------------------------------------------------------------------------------


def test_replaced_wherever_it_is_bound(module, path):
    early = module("fs_early", "from safetensors.torch import save_file as keep, load_file", number=7)
    fastshard.install()
    late = module("fs_late", "from safetensors.torch import save_file")
    assert st.save_file is early.keep is late.save_file
    assert st.save_file is not ORIGINAL["save_file"]
    assert early.load_file is st.load_file and not replaced(st.load_file) and early.number == 7
    assert engine_saves(early.keep, path)

    fastshard.uninstall()
    assert st.save_file is early.keep is late.save_file is ORIGINAL["save_file"]
    assert not engine_saves(early.keep, path)


def bindings() -> dict[str, dict[str, object]]:
    return {
        name: {key: value for key, value in vars(module).items() if value is not sys.meta_path}
        for name, module in sys.modules.items()
        if isinstance(module, types.ModuleType) and not name.startswith(("_pytest", "hypothesis"))
    }


def test_reversal_is_exact(module):
    module("fs_early", "from safetensors.torch import *; from safetensors.torch import save_file as other")
    with fastshard.installed():
        pass  # loads the native module, which stays
    before, meta_path = bindings(), list(sys.meta_path)
    for _ in range(2):
        fastshard.install()
        assert bindings() != before
        assert len(sys.meta_path) == len(meta_path) + 1
        fastshard.uninstall()
        after = bindings()
        assert after.keys() == before.keys()
        for name, namespace in before.items():
            changed = [key for key in namespace if after[name].get(key) is not namespace[key]]
            assert list(after[name]) == list(namespace) and changed == [], name
        assert sys.meta_path == meta_path


@pytest.mark.parametrize("entry", REFERENCE, ids=lambda entry: entry.attribute)
def test_looks_like_the_original(entry):
    original = REFERENCE[entry]
    fastshard.install()
    function = held(entry)
    if isinstance(function, classmethod):
        original, function = original.__func__, function.__func__
    assert function is not original and function.__wrapped__ is original
    assert inspect.signature(function) == inspect.signature(original)
    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(function, name) == getattr(original, name)
    if not entry.implementation.startswith("fastshard.integrations.adapters:"):
        return
    # What the adapter takes is what the original takes: nothing of ours leaks through the name.
    _, signature = patching._load(entry.implementation)
    taken = list(signature.parameters.values())[1:]
    expected = list(inspect.signature(original).parameters.values())
    if entry.library == "huggingface_hub" and release("huggingface_hub") < (0, 27):  # it has got more since
        taken = [p for p in taken if p.name not in ("is_main_process", "shared_tensors_to_discard")]
    assert [(p.name, p.kind, p.default) for p in taken] == [(p.name, p.kind, p.default) for p in expected]


def test_pickled_by_reference():
    fastshard.install()
    pickled = pickle.dumps(st.save_file)
    assert pickle.loads(pickled) is st.save_file and replaced(st.save_file)
    fastshard.uninstall()
    assert pickle.loads(pickled) is ORIGINAL["save_file"]


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = torch.nn.Linear(4, 4)
        self.two = torch.nn.Linear(4, 4)
        self.two.weight = self.one.weight


def test_files_and_mutations_are_the_same(tmp_path):
    model = Tied()

    def save_everything(directory: Path) -> tuple[dict[str, bytes], bytes, dict[str, str]]:
        directory.mkdir()
        metadata: dict[str, str] = {}
        st.save_file(TENSORS, directory / "file", metadata={"format": "pt"})
        st.save_model(model, directory / "model", metadata)
        return {path.name: path.read_bytes() for path in directory.iterdir()}, st.save(TENSORS), metadata

    expected = save_everything(tmp_path / "theirs")
    with fastshard.installed():
        assert save_everything(tmp_path / "ours") == expected
    assert expected[2] == {"two.weight": "one.weight"}


@pytest.mark.parametrize("name", ["save_file", "save", "save_model"])
@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((), {}),
        (({}, "file", None, True, True, True), {}),
        (({}, "file"), {"durable": True}),
        (({},), {"filename": "file", "tensor": {}}),
        (([], "file"), {}),
        (({"a": 1}, "file"), {}),
        (({"a": torch.ones(2).to_sparse()}, "file"), {}),
        ((dict.fromkeys("ab", torch.ones(2)), "file"), {}),
        (({"a": torch.ones(4, 4).t()}, "file"), {}),
        (({"a": torch.ones(2)}, "missing/file"), {}),
    ],
)
def test_errors_are_the_same(name, args, kwargs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def failure() -> tuple[type[BaseException], str] | None:
        try:
            getattr(st, name)(*args, **kwargs)
        except Exception as error:
            return type(error).__mro__[-4:], said_now(str(error)).split("No such file")[0]
        return None

    expected = failure()
    with fastshard.installed():
        found = failure()
    if expected is not None and ("I/O error" in expected[1] or "IoError" in expected[1]):
        assert "I/O error" in found[1]  # SaveError, which is a SafetensorError
    else:
        assert found == expected
    assert names(tmp_path) == []


# When ---------------------------------------------------------------------------------------------------


def test_blocks_nest_and_end_when_the_last_one_does():
    with fastshard.installed():
        with fastshard.installed():
            assert replaced(st.save_file)
            fastshard.uninstall()  # of what nobody installed
            assert replaced(st.save_file)
        assert replaced(st.save_file)
    assert not replaced(st.save_file)
    with pytest.raises(KeyError), fastshard.installed():
        raise KeyError
    assert not replaced(st.save_file)


def test_install_outlives_a_block_and_a_block_an_uninstall():
    fastshard.install()
    fastshard.install()
    with fastshard.installed():
        pass
    assert replaced(st.save_file)
    with fastshard.installed():
        fastshard.uninstall()
        assert replaced(st.save_file)
    assert not replaced(st.save_file)
    with fastshard.installed():
        fastshard.install()
    assert replaced(st.save_file)
    fastshard.uninstall()  # twice installed is once
    assert not replaced(st.save_file)


def test_works_as_a_decorator(path):
    @fastshard.installed()
    def decorated() -> bool:
        return engine_saves(st.save_file, path)

    assert decorated() and decorated()


def test_installing_again_reaches_what_has_come_meanwhile(module):
    fastshard.install()
    late = module("fs_late", save_file=ORIGINAL["save_file"])
    assert not replaced(late.save_file)
    fastshard.install()
    assert late.save_file is st.save_file


def test_references_out_of_reach_pass_to_the_original(path):
    fastshard.install()
    held = functools.partial(st.save_file, metadata={"format": "pt"})
    assert engine_saves(held, path)
    fastshard.uninstall()
    assert not engine_saves(held, path)
    with fastshard.installed():
        assert engine_saves(held, path)
        assert held.func is st.save_file


# Imports ------------------------------------------------------------------------------------------------


def environment(**variables: str) -> dict[str, str]:
    return {**{k: v for k, v in os.environ.items() if k != "FASTSHARD_DISABLE"}, **variables}


def test_auto_before_everything(tmp_path):
    """The whole of a script: one line first, then the libraries, in the order a user has them."""
    for name in ("transformers", "accelerate"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"no {name} here")
    script = """
        import sys
        import fastshard.auto
        heavy = {"torch", "numpy", "safetensors", "transformers", "huggingface_hub", "accelerate", "inspect", "logging"}
        assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()

        import transformers.modeling_utils, accelerate.utils.other
        import fastshard, safetensors.torch, torch, huggingface_hub
        from pathlib import Path
        assert safetensors.torch.save_file.__wrapped__ is not None
        assert transformers.modeling_utils.safe_save_file is safetensors.torch.save_file
        assert accelerate.utils.other.safe_save_file is safetensors.torch.save_file
        assert type(safetensors.torch.__loader__).__module__.startswith("_frozen"), "our loader is gone"
        assert safetensors.torch.__spec__.loader is safetensors.torch.__loader__

        config = transformers.LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, vocab_size=32)
        model = transformers.LlamaForCausalLM(config)
        assert fastshard.stats() is None
        model.save_pretrained(sys.argv[1] + "/ours")
        assert fastshard.stats().files == 1
        saved = fastshard.stats()
        shards = {str(i): torch.ones(3) for i in range(4)}
        pattern = "hub{suffix}.safetensors"
        huggingface_hub.save_torch_state_dict(shards, sys.argv[1] + "/ours", filename_pattern=pattern, max_shard_size=12)
        assert fastshard.stats().files == 4
        assert huggingface_hub.save_torch_state_dict is huggingface_hub.serialization.save_torch_state_dict
        try:
            huggingface_hub.save_torch_state_dict(shards, sys.argv[1] + "/ours", durable=True)
        except TypeError as error:
            assert str(error).startswith("save_torch_state_dict() got an unexpected keyword argument 'durable'"), error

        fastshard.uninstall()
        assert transformers.modeling_utils.safe_save_file is safetensors.torch.save_file
        assert not hasattr(safetensors.torch.save_file, "__wrapped__")
        saved = fastshard.stats()
        model.save_pretrained(sys.argv[1] + "/theirs")
        assert fastshard.stats() is saved
        ours, theirs = ((Path(sys.argv[1]) / name / "model.safetensors").read_bytes() for name in ("ours", "theirs"))
        assert ours == theirs
        print("reached")
    """
    (tmp_path / "ours").mkdir()
    result = run_bare(script, tmp_path, env=environment(HF_HUB_OFFLINE="1"))
    assert result.stdout.endswith("reached\n"), result.stderr


@pytest.mark.parametrize(("value", "active"), [("1", False), ("yes", False), ("0", True), ("", True)])
def test_operators_switch(value, active):
    script = """
        import sys
        finders = list(sys.meta_path)
        import fastshard.auto
        print(sys.meta_path != finders)
    """
    result = run_bare(script, env=environment(FASTSHARD_DISABLE=value))
    assert result.stdout == f"{active}\n", result.stderr


def test_a_native_module_that_does_not_load_is_told_at_once():
    script = """
        import sys
        import safetensors.torch as st
        finders, original = list(sys.meta_path), st.save_file
        sys.modules["fastshard._native"] = None
        try:
            import fastshard.auto
        except ImportError as error:
            assert "native module cannot be loaded" in str(error) and "FASTSHARD_DISABLE=1" in str(error)
            assert sys.meta_path == finders and st.save_file is original
            print("refused")
    """
    result = run_bare(script, env=environment())
    assert result.stdout == "refused\n", result.stderr


def test_absent_libraries_are_no_matter(library, monkeypatch):
    library("def save(): return 1", "save", "gone", "Gone.save", "save.gone")
    absent = Entry("fs_absent.saving", "save", f"{__name__}:marked")
    monkeypatch.setattr(patching, "TABLE", (absent, *patching.TABLE))
    fastshard.install()
    with pytest.raises(ModuleNotFoundError, match="fs_absent"):
        import fs_absent.saving  # noqa: F401
    import fs_library

    assert fs_library.save() == ("ours", 1)
    assert vars(fs_library).keys() >= {"save"} and not hasattr(fs_library, "gone")


def test_a_library_imported_later_is_left_as_its_own_loader_made_it(library):
    library("def save():\n    return 'text'\n", "save")
    fastshard.install()
    spec = importlib.util.find_spec("fs_library")
    assert spec.loader.get_filename("fs_library") == spec.origin
    import fs_library

    assert replaced(fs_library.save)
    assert type(fs_library.__loader__) is type(fs_library.__spec__.loader)
    assert type(fs_library.__loader__).__module__ != patching.__name__
    assert inspect.getsource(fs_library.save) == "def save():\n    return 'text'\n"


def test_reload(library, module):
    library("def save(): return 1", "save")
    fastshard.install()
    import fs_library

    first = fs_library.save
    user = module("fs_user", "from fs_library import save")
    importlib.reload(fs_library)
    second = fs_library.save
    assert second is not first and second.__wrapped__ is not first.__wrapped__
    assert second() == ("ours", 1) == user.save()
    fastshard.uninstall()
    # As it would be without us: who imported the first one has the first one.
    assert user.save is first.__wrapped__ and fs_library.save is second.__wrapped__
    importlib.reload(fs_library)
    assert not replaced(fs_library.save)
    fastshard.install()
    assert fs_library.save() == ("ours", 1) == user.save()


def test_an_import_that_fails_may_be_tried_again(library, tmp_path):
    library(
        "import sys\nif not hasattr(sys, 'fs_ready'): raise KeyError('not yet')\ndef save(): return 1", "save"
    )
    fastshard.install()
    with pytest.raises(KeyError, match="not yet"):
        import fs_library
    sys.fs_ready = True
    try:
        import fs_library
    finally:
        del sys.fs_ready
    assert fs_library.save() == ("ours", 1)


def test_lazy_packages(library, tmp_path):
    """A package whose attributes come by ``__getattr__``, which keeps them, as huggingface_hub's and transformers' do."""
    library("def save(): return 1", "save")
    (tmp_path / "fs_lazy.py").write_text(
        textwrap.dedent("""
        import importlib
        def __getattr__(name):
            value = getattr(importlib.import_module("fs_library"), name)
            globals()[name] = value
            return value
        """)
    )
    import fs_lazy

    fastshard.install()
    assert "fs_library" not in sys.modules and "save" not in vars(fs_lazy)
    assert fs_lazy.save() == ("ours", 1)
    assert replaced(vars(fs_lazy)["save"])
    fastshard.uninstall()
    assert fs_lazy.save() == 1


def test_modules_that_bind_while_the_library_is_being_imported(library, tmp_path):
    library("def save(): return 1\nimport fs_circular", "save")
    (tmp_path / "fs_circular.py").write_text("from fs_library import save")
    fastshard.install()
    import fs_circular
    import fs_library

    assert fs_circular.save is fs_library.save and replaced(fs_library.save)


class AsksEverybody:
    """A finder that finds by asking all others, as post-import hooks do."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "fs_library":
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None:
                return spec
        return None


class Old:
    """A finder from before Python 3.4."""


@pytest.mark.parametrize(
    ("finder", "place"), [(AsksEverybody, "before"), (AsksEverybody, "behind"), (Old, "behind")]
)
def test_other_finders(library, monkeypatch, finder, place):
    library("def save(): return 1", "save")
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    if place == "behind":
        sys.meta_path.insert(0, finder())
    fastshard.install()
    if place == "before":
        sys.meta_path.insert(0, finder())
    patched = list(sys.meta_path)
    import fs_library

    assert fs_library.save() == ("ours", 1)
    assert sys.meta_path == patched
    fastshard.uninstall()
    assert len(sys.meta_path) == len(patched) - 1


def test_uninstalling_in_the_middle_of_a_search_hides_no_finder():
    fastshard.install()
    asked = []
    for finder in sys.meta_path:  # as an import does
        asked.append(finder)
        fastshard.uninstall()
    assert asked[0] is patching._finder and asked[1:] == sys.meta_path


def test_an_import_under_way_on_another_thread_is_awaited(library, no_hang):
    library(
        """
        import sys
        sys.fs_begun.set()
        assert sys.fs_go_on.wait(300)
        def save(): return 1
        """,
        "save",
    )
    sys.fs_begun, sys.fs_go_on = threading.Event(), threading.Event()
    try:
        importer = threading.Thread(target=importlib.import_module, args=["fs_library"])
        importer.start()
        assert sys.fs_begun.wait(300)
        installer = threading.Thread(target=fastshard.install)
        installer.start()
        installer.join(0.05)
        assert installer.is_alive()
        sys.fs_go_on.set()
        installer.join()
        importer.join()
    finally:
        del sys.fs_begun, sys.fs_go_on
    assert replaced(sys.modules["fs_library"].save)


# Odd modules, odd functions -----------------------------------------------------------------------------


def test_nothing_of_a_module_runs(module, monkeypatch):
    touched = []

    class Touchy(types.ModuleType):
        def __getattribute__(self, name: str) -> Any:
            touched.append(name)
            raise RuntimeError(name)

        def __setattr__(self, name: str, value: object) -> None:
            touched.append(name)
            raise RuntimeError(name)

    class Lying:
        @property
        def __class__(self) -> Any:
            touched.append("__class__")
            raise RuntimeError

        @property
        def __dict__(self) -> Any:
            touched.append("__dict__")
            raise RuntimeError

    module("fs_lazy", "def __getattr__(name): raise RuntimeError(name)")
    touchy = Touchy("fs_touchy")
    namespace = types.ModuleType.__dict__["__dict__"].__get__(touchy)
    namespace["kept"] = st.save_file
    unhappy: dict[str, object] = {
        "fs_touchy": touchy,
        "fs_lying": Lying(),
        "fs_none": None,
        "fs_number": 5,
        "fs_class": Touchy,
        "fs_unmade": types.ModuleType.__new__(types.ModuleType),
    }
    for name, odd in unhappy.items():
        monkeypatch.setitem(sys.modules, name, odd)
    touched.clear()  # pytest has looked
    fastshard.install()
    assert namespace["kept"] is st.save_file and replaced(st.save_file)
    fastshard.uninstall()
    assert namespace["kept"] is st.save_file
    assert touched == []


def test_values_and_keys_of_every_kind(module):
    class Hostile:
        def __eq__(self, other: object) -> bool:
            raise RuntimeError

        __hash__ = None

    odd = module("fs_odd", hostile=Hostile(), saver=st.save_file)
    vars(odd)[5] = st.save_file
    fastshard.install()
    assert vars(odd)[5] is odd.saver is st.save_file


def test_class_attributes(library):
    source = """
        class Base:
            def save(self, value): return type(self).__name__, value
            @staticmethod
            def static(value): return value
            @classmethod
            def of_class(cls, value): return cls.__name__, value
        class Derived(Base):
            pass
    """
    library(source, "Base.save", "Base.static", "Base.of_class", "Derived.save")
    import fs_library

    base, derived = fs_library.Base, fs_library.Derived
    before = dict(vars(base)), dict(vars(derived))
    fastshard.install()
    for _ in range(2):
        assert derived().save(1) == ("ours", ("Derived", 1))
        assert base.static(2) == ("ours", 2) == base().static(2)
        assert derived.of_class(value=3) == ("ours", ("Derived", 3))
        assert "save" not in vars(derived)  # inherited, so not its own to replace
        fastshard.install()
    kinds = {name: type(vars(base)[name]) for name in ("save", "static", "of_class")}
    assert kinds == {"save": types.FunctionType, "static": staticmethod, "of_class": classmethod}
    held = base.save
    fastshard.uninstall()
    assert (dict(vars(base)), dict(vars(derived))) == before
    assert held(derived(), 1) == ("Derived", 1)
    assert patching._class_attributes == []

    fastshard.install()
    base.save = own = lambda self: None  # somebody else's, put there after us, stays
    fastshard.uninstall()
    assert base.save is own
    assert dict(vars(base))["static"] is before[0]["static"]


def test_what_somebody_else_has_replaced_is_left_alone(library, caplog):
    library("def save(): return 1\nclass Base:\n    def save(self): return 2", "save", "Base.save")
    import fs_library

    @functools.wraps(fs_library.save)
    def theirs() -> str:
        return "theirs"

    own_method, fs_library.save = fs_library.Base.save, theirs
    fs_library.Base.save = len
    for _ in range(2):
        fastshard.install()
    assert fs_library.save is theirs and fs_library.Base.save is len
    assert [record.getMessage().split(" is ")[0] for record in caplog.records] == [
        "fs_library.save",
        "fs_library.Base.save",
    ]
    fastshard.uninstall()
    fs_library.save, fs_library.Base.save = theirs.__wrapped__, own_method

    fastshard.install()
    ours = fs_library.save
    fs_library.save = wrapper = functools.wraps(ours)(lambda: ("wrapped", ours()))
    assert fs_library.save() == ("wrapped", ("ours", 1))
    fastshard.uninstall()
    assert fs_library.save is wrapper and wrapper() == ("wrapped", 1)


# Calls --------------------------------------------------------------------------------------------------


def two_values(original: Callable[..., Any], one: int, two: int = 2) -> Any:
    return "ours", one, two


def test_arguments_unknown_to_us_are_the_originals(library, monkeypatch):
    library("def save(one, two=2, *, newer=None): return 'theirs', one, two, newer")
    monkeypatch.setattr(patching, "TABLE", (Entry("fs_library", "save", f"{__name__}:two_values"),))
    import fs_library

    fastshard.install()
    assert fs_library.save(1, two=3) == ("ours", 1, 3)
    assert fs_library.save(1, newer=4) == ("theirs", 1, 2, 4)
    with pytest.raises(TypeError, match=r"^save\(\) missing 1 required positional argument: 'one'$"):
        fs_library.save()


def calls_it_again(original: Callable[..., Any], depth: int) -> list[Any]:
    import fs_library

    if depth == 9:
        raise KeyError(depth)
    return ["ours", fs_library.save(depth + 1), fs_library.other(depth)]


def test_an_implementation_cannot_meet_itself(library, monkeypatch):
    library("def save(depth): return [depth, other(depth)]\ndef other(depth): return [-depth]")
    table = tuple(Entry("fs_library", name, f"{__name__}:calls_it_again") for name in ("save", "other"))
    monkeypatch.setattr(patching, "TABLE", table)
    import fs_library

    with fastshard.installed():
        # other() is another function: its replacement runs within the one of save(), where both are originals.
        assert fs_library.save(1) == ["ours", [2, ["ours", [3, [-3]], [-2]]], ["ours", [2, [-2]], [-1]]]
        with pytest.raises(KeyError):
            fs_library.save(9)
        assert fs_library.save(1)[0] == "ours"  # also after an error


def test_threads_install_uninstall_import_and_save(tmp_path, monkeypatch, no_hang):
    rounds = 12
    failures: list[BaseException] = []
    monkeypatch.syspath_prepend(tmp_path)
    for number in range(rounds):
        (tmp_path / f"fs_user{number}.py").write_text(
            "import wave\nfrom safetensors.torch import save_file\n"
        )
    importlib.invalidate_caches()

    def toggles(number: int) -> None:
        fastshard.install()
        fastshard.uninstall()

    def blocks(number: int) -> None:
        with fastshard.installed():
            assert replaced(st.save_file)

    def saves(number: int) -> None:
        path = tmp_path / f"{threading.get_ident()}"
        st.save_file(TENSORS, path)
        assert same(path, TENSORS)

    def imports(number: int) -> None:
        for name in ("wave", f"fs_user{number}"):
            sys.modules.pop(name, None)
            importlib.import_module(name)

    def repeat(action: Callable[[int], None]) -> None:
        try:
            for number in range(rounds):
                action(number)
        except BaseException as error:
            failures.append(error)

    before = dict(sys.modules)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        actions = [toggles, toggles, blocks, blocks, saves, saves, saves, imports]
        threads = [threading.Thread(target=repeat, args=[action]) for action in actions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    fastshard.uninstall()
    users = [sys.modules[f"fs_user{number}"] for number in range(rounds)]
    for name in sys.modules.keys() - before.keys():
        del sys.modules[name]
    assert failures == []
    assert all(user.save_file is ORIGINAL["save_file"] for user in users)
    assert not any(finder is patching._finder for finder in sys.meta_path)


def test_forks(tmp_path):
    """Children of a process whose other thread keeps installing and uninstalling."""
    script = """
        import gc, threading
        gc.unfreeze()  # installing looks for referrers
        import safetensors.torch as st
        original, stop = st.save_file, threading.Event()
        def toggle():
            while not stop.is_set():
                install()
                uninstall()
        thread = threading.Thread(target=toggle, daemon=True)
        thread.start()
        for number in range(4):
            child = os.fork()
            if child == 0:
                try:
                    install()
                    before = stats()
                    st.save_file({"a": torch.ones(3)}, f"{sys.argv[1]}/{number}")
                    assert stats() is not before
                    uninstall()
                    assert st.save_file is original
                    os._exit(0)
                finally:
                    os._exit(1)
            assert os.waitpid(child, 0)[1] == 0, number
        stop.set()
        thread.join()
        install()
        child = os.fork()
        if child == 0:
            before = stats()
            st.save_file({"a": torch.ones(3)}, f"{sys.argv[1]}/inherited")
            os._exit(stats() is before)
        print(os.waitpid(child, 0)[1])
    """
    result = run(script, tmp_path)
    assert result.stdout == "0\n", result.stderr
    assert len(names(tmp_path)) == 5


def test_names_of_the_package():
    assert {"install", "installed", "uninstall"} <= set(fastshard.__all__)
    importlib.import_module("fastshard.auto")
    assert callable(fastshard.install) and isinstance(fastshard.auto, types.ModuleType)
    with contextlib.suppress(ImportError):
        importlib.import_module("fastshard.install")
        pytest.fail("a module of that name would take the function's place")
