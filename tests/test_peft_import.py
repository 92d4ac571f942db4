# SPDX-License-Identifier: Apache-2.0
"""PEFT knows ALTER in every order of imports, and importing `alter_peft` imports nothing heavy."""

from __future__ import annotations

import importlib
import inspect
import sys
import threading
import time
from importlib.machinery import SourceFileLoader
from importlib.util import find_spec

import pytest
from test_registration import run_fresh

import alter_peft
from alter_peft import peft_import


KNOWN = """
from peft import PeftType, mapping
import alter_peft
assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType("ALTER")] is alter_peft.AlterConfig
assert mapping.PEFT_TYPE_TO_TUNER_MAPPING[PeftType.ALTER] is alter_peft.AlterModel
print("known")
"""
IN_THREADS = """
import threading, alter_peft
ways = ["from peft import PeftType; PeftType.ALTER", "from alter_peft import AlterConfig",
        "from peft import AutoPeftModelForCausalLM, PeftType; PeftType.ALTER", "import alter_peft.losses, peft"] * 2
errors, start = [], threading.Barrier(len(ways))
def run(way):
    start.wait()
    try:
        exec(way)
    except BaseException as error:
        errors.append(f"{way}: {error!r}")
threads = [threading.Thread(target=run, args=(way,)) for way in ways]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert not errors, errors
"""


LOOKED_UP = "import alter_peft, importlib.util\nassert importlib.util.find_spec('peft').loader.get_source('peft')"
slow = pytest.mark.slow  # seconds each, for a fresh process


@pytest.mark.parametrize(
    "first",
    [
        pytest.param("import alter_peft\nfrom peft import AutoPeftModelForCausalLM", id="before"),
        pytest.param("import peft, alter_peft", id="after"),
        pytest.param("from alter_peft import AlterConfig", id="from", marks=slow),
        pytest.param("import alter_peft, trl, transformers.integrations.peft", id="by others", marks=slow),
        pytest.param("import alter_peft.tuner.export", id="a room", marks=slow),
        pytest.param(LOOKED_UP, id="looked up", marks=slow),
        pytest.param(IN_THREADS, id="threads", marks=slow),
    ],
)
def test_peft_knows_alter(first):
    assert run_fresh(first + KNOWN).split()[-1] == "known"


def test_importing_is_light():
    code = "import alter_peft, alter_peft.cli, sys\n"
    code += "print(sorted({'torch', 'transformers', 'peft', 'trl', 'datasets', 'yaml', 'numpy'} & set(sys.modules)))"
    assert run_fresh(code).split() == ["[]"]


# ---- the hook itself, on packages made up for it --------------------------------------------------------------------


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """A function that writes a package; `made_up_peft` and `made_up_tuner` are what the hook knows."""
    monkeypatch.setattr(peft_import, "PEFT", "made_up_peft")
    monkeypatch.setattr(peft_import, "TUNER", "made_up_tuner")
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.21.2")
    monkeypatch.syspath_prepend(tmp_path)
    before = list(sys.meta_path)
    yield lambda name, text: (tmp_path / f"made_up_{name}.py").write_text(text)
    sys.meta_path[:] = before
    for name in ("made_up_peft", "made_up_tuner"):
        sys.modules.pop(name, None)


def test_the_tuner_is_the_last_step_of_pefts_import(made_up):
    made_up("peft", "steps = ['peft']\n")
    made_up("tuner", "from made_up_peft import steps\nsteps.append('tuner')\n")
    peft_import.register_when_imported()
    peft_import.register_when_imported()  # twice is once
    assert "made_up_tuner" not in sys.modules
    module = importlib.import_module("made_up_peft")
    assert module.steps == ["peft", "tuner"]
    assert type(module.__loader__) is type(module.__spec__.loader) is SourceFileLoader
    assert inspect.getsource(module) == "steps = ['peft']\n"
    assert peft_import._FINDER not in sys.meta_path


def test_where_peft_is_there_the_tuner_is_imported_at_once(made_up):
    made_up("peft", "")
    made_up("tuner", "")
    importlib.import_module("made_up_peft")
    peft_import.register_when_imported()
    assert "made_up_tuner" in sys.modules and peft_import._FINDER not in sys.meta_path


def test_an_import_that_failed_may_be_tried_again(made_up):
    made_up("peft", "import nothing_of_that_name\n")
    made_up("tuner", "")
    peft_import.register_when_imported()
    with pytest.raises(ModuleNotFoundError, match="nothing_of_that_name"):
        importlib.import_module("made_up_peft")
    made_up("peft", "mended_now = True\n")
    importlib.invalidate_caches()
    importlib.import_module("made_up_peft")
    assert "made_up_tuner" in sys.modules


def test_what_is_only_looked_up_is_not_imported(made_up):
    made_up("peft", "source = 1\n")
    peft_import.register_when_imported()
    spec = find_spec("made_up_peft")
    assert spec.loader.get_source("made_up_peft") == "source = 1\n" and spec.origin.endswith("made_up_peft.py")
    assert "made_up_peft" not in sys.modules and find_spec("made_up_other") is None


def test_without_peft_the_import_fails_as_ever(made_up):
    peft_import.register_when_imported()
    with pytest.raises(ModuleNotFoundError, match="made_up_peft"):
        importlib.import_module("made_up_peft")


def test_a_second_thread_waits_until_alter_is_known(made_up):
    made_up("peft", "import time; time.sleep(0.1); known = []\n")
    made_up("tuner", "import time; time.sleep(0.2); from made_up_peft import known; known.append('ALTER')\n")
    peft_import.register_when_imported()
    seen = []

    def ask():
        seen.append(list(importlib.import_module("made_up_peft").known))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join()
    assert seen == [["ALTER"]] * 4


def test_an_untested_peft_is_refused_at_once(made_up, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.99")
    with pytest.raises(ImportError, match=r"found peft==0\.99"):
        peft_import.register_when_imported()


def test_names_are_those_that_are_promised():
    assert set(alter_peft.__all__) | {"trainer", "tuner"} <= set(dir(alter_peft))
    for name in alter_peft.__all__:
        assert getattr(alter_peft, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'AlterTuner'"):
        _ = alter_peft.AlterTuner
