# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from peft import PeftConfig, PeftType, mapping

import alter_peft
from alter_peft import AlterConfig, AlterModel
from alter_peft.peft_import import check_peft_version
from alter_peft.registration import ALTER, PREFIX, extend_peft_type, register


def run_fresh(code: str) -> str:
    """Standard output of a fresh Python process that runs `code` in the checkout."""
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_alter_is_a_member_like_any_other():
    assert PeftType("ALTER") is PeftType["ALTER"] is PeftType.ALTER is ALTER
    assert isinstance(ALTER, PeftType) and ALTER == "ALTER"
    assert (ALTER.name, ALTER.value, repr(ALTER)) == ("ALTER", "ALTER", "<PeftType.ALTER: 'ALTER'>")
    assert ALTER in PeftType and "ALTER" in PeftType.__members__
    assert list(PeftType).count(ALTER) == 1 and len(list(PeftType)) == len(PeftType) == len(PeftType.__members__)
    assert str(ALTER) == str(PeftType.LORA).replace("LORA", "ALTER")
    assert json.dumps(ALTER) == '"ALTER"' and {ALTER: 1}["ALTER"] == 1


def test_extending_again_returns_the_same_member():
    before = list(PeftType)
    assert extend_peft_type() is ALTER
    assert list(PeftType) == before


def test_member_and_config_survive_pickling():
    assert pickle.loads(pickle.dumps(ALTER)) is ALTER
    config = AlterConfig(domains=["a", "b"], r=4, target_modules=["q_proj"])
    copied = pickle.loads(pickle.dumps(config))
    assert copied == config and copied.peft_type is ALTER


def test_peft_knows_config_tuner_and_prefix():
    assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING[ALTER] is AlterConfig
    assert mapping.PEFT_TYPE_TO_TUNER_MAPPING[ALTER] is AlterModel
    assert mapping.PEFT_TYPE_TO_PREFIX_MAPPING[ALTER] == AlterModel.prefix == PREFIX
    assert PREFIX == ALTER.lower() + "_"  # what transformers' load_adapter assumes


@pytest.mark.parametrize("cls", [AlterConfig, PeftConfig])
def test_config_json_round_trip(cls, tmp_path):
    config = AlterConfig(
        r=4, domains=["person", "recipe"], target_modules=["q_proj", "v_proj"], router_layer=2, entropy_quantile=0.3,
        rank_pattern={"q_proj": 2}, init_weights="cluster", task_type="CAUSAL_LM", base_model_name_or_path="some/base",
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "ALTER"
    loaded = cls.from_pretrained(tmp_path)
    assert type(loaded) is AlterConfig
    expected = {**config.to_dict(), "inference_mode": True}  # PEFT saves configs for inference
    assert {**loaded.to_dict(), "inference_mode": True} == expected


def test_another_package_of_the_same_name_is_refused():
    class Stranger(AlterConfig):
        pass

    Stranger.__module__ = "elsewhere.config"
    with pytest.raises(ImportError, match=r"already registered by alter_peft\.tuner\.config"):
        register(Stranger, AlterModel)
    assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING[ALTER] is AlterConfig


def test_what_other_libraries_put_around_saving_stays(tmp_path):
    """Before and after the package is imported, and when it is imported again."""
    assert run_fresh(f"""
from functools import wraps
import sys
from peft import PeftModel

calls = []
def put(name):
    save = PeftModel.save_pretrained
    @wraps(save)
    def save_pretrained(self, *args, **kwargs):
        calls.append(name)
        return save(self, *args, **kwargs)
    PeftModel.save_pretrained = save_pretrained

put("before")
sys.path.insert(0, "tests")
from test_saving import adapted
ours = PeftModel.save_pretrained
import importlib, alter_peft.tuner as tuner
importlib.reload(tuner)
assert PeftModel.save_pretrained is not ours and PeftModel.save_pretrained.__wrapped__ is ours.__wrapped__
put("after")
theirs = PeftModel.save_pretrained
importlib.reload(tuner)
assert PeftModel.save_pretrained is theirs
adapted("new").save_pretrained({str(tmp_path)!r})
print(*calls)
""").split() == ["after", "before"]


def test_importing_twice_replaces_its_own_entry():
    assert run_fresh("""
import importlib, sys
import alter_peft, alter_peft.tuner as tuner
from peft import PeftType, mapping
first, member = alter_peft.AlterConfig, PeftType.ALTER
importlib.reload(alter_peft.registration)
importlib.reload(tuner)
assert PeftType.ALTER is member and list(PeftType).count(member) == 1
for name in [n for n in sys.modules if n.split(".")[0] == "alter_peft"]:
    del sys.modules[name]
import alter_peft
assert alter_peft.AlterConfig is not first
assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING[member] is alter_peft.AlterConfig
assert mapping.PEFT_TYPE_TO_TUNER_MAPPING[member] is alter_peft.AlterModel
print(PeftType("ALTER").value)
""").split() == ["ALTER"]


@pytest.mark.parametrize("order", ["before", "after"])
def test_lives_beside_another_plug_in(order):
    plug_in = """
from peft import PeftType
other = str.__new__(PeftType, "OTHER")
other._name_, other._value_, other.__objclass__ = "OTHER", "OTHER", PeftType
other._sort_order_ = len(PeftType.__members__)
type.__setattr__(PeftType, "OTHER", other)
PeftType._member_names_.append("OTHER")
PeftType._member_map_["OTHER"] = PeftType._value2member_map_["OTHER"] = other
"""
    ours = "import alter_peft\n"
    check = """
import pickle
assert len(PeftType) == len(set(PeftType)) == len(list(PeftType))
for name in ("OTHER", "ALTER", "LORA"):
    assert PeftType(name) is PeftType[name] is getattr(PeftType, name) is pickle.loads(pickle.dumps(PeftType(name)))
assert len({m._sort_order_ for m in PeftType}) == len(PeftType)
print([m.value for m in PeftType][-2:])
"""
    code = plug_in + ours if order == "before" else ours + plug_in
    last = ["OTHER", "ALTER"] if order == "before" else ["ALTER", "OTHER"]
    assert run_fresh(code + check).strip() == str(last)


@pytest.mark.parametrize("version", ["0.20.0", "0.21.0rc1", "0.22.0", "1.0.0"])
def test_untested_peft_versions_are_refused_with_the_fix(version):
    with pytest.raises(ImportError, match=rf"peft>=0\.21\.0,<0\.22\.0, but found peft=={version}\. Install"):
        check_peft_version(version)


@pytest.mark.parametrize("version", ["0.21.0", "0.21.2", "0.21.99"])
def test_tested_peft_versions_are_accepted(version):
    check_peft_version(version)


def test_loading_an_adapter_needs_no_trainer():
    """The import that every card asks for brings neither TRL nor what phase I needs."""
    code = "import sys, alter_peft; unneeded = {'trl', 'datasets', 'alter_peft.trainer'};"
    code += "print(sorted(unneeded & set(sys.modules)));"
    code += "from alter_peft import AlterUnlearnTrainer; print(AlterUnlearnTrainer.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2:] == ["[]", "AlterUnlearnTrainer"]
    with pytest.raises(AttributeError, match="has no attribute 'AlterTrainer'"):
        alter_peft.AlterTrainer  # noqa: B018


def test_the_trainer_is_imported_when_it_is_asked_for():
    code = "import sys, alter_peft; names = set(dir(alter_peft)); assert 'trl' not in sys.modules;"
    code += "print({'trainer', 'AlterUnlearnTrainer', 'AlterUnlearnConfig', 'AlterConfig'} <= names);"
    code += "print(alter_peft.trainer.AlterUnlearnTrainer is alter_peft.AlterUnlearnTrainer)"
    assert run_fresh(code).split() == ["True", "True"]
    with pytest.raises(AttributeError, match="no attribute 'AlterTrainer'"):
        _ = alter_peft.AlterTrainer
