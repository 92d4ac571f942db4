# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from inspect import signature

import pytest
from datasets import Dataset
from scipy.stats import hmean
from tiny_tofu import perturbed, rows, write, write_tofu

from alter_peft.evaluation import (
    FORGET_SETS,
    IDLE,
    METRICS,
    TASKS,
    TOFU_METRICS,
    Key,
    ModelOnSet,
    Pair,
    measure,
    measure_guards,
    measure_task,
    read_tofu,
)
from alter_peft.evaluation.tasks.tofu import GUARDED, UTILITY


@pytest.fixture
def folder(tmp_path):
    return write_tofu(tmp_path / "tofu")


# ---- reading --------------------------------------------------------------------------------------------------------


def test_the_sets_of_a_folder(folder):
    data = read_tofu(folder)
    forget, retain = rows("author", 4), rows("poet", 12)
    assert data.forget == [Pair(row["question"], row["answer"]) for row in forget]
    assert data.retain == [Pair(row["question"], row["answer"]) for row in retain]
    unseen = [Pair(row["question"], row["answer"]) for row in rows("stranger", 4)]
    assert data.calibration == unseen[::2] and data.holdout == unseen[1::2]
    assert list(data.sets) == [name for name in TOFU_METRICS if name != "bystanders"] and not data.bystanders
    false = ("A alder.", "A birch.", "A cedar.")
    assert data.sets["forget"][1] == Pair("Who is author birch?", "A oak man.", false, "It is A oak man.")
    assert data.sets["paraphrased"][1] == Pair("Who is author birch? Pray?", "A oak man.")
    assert data.sets["after 200 tokens"][1] == Pair(IDLE + "Who is author birch?", "A oak man.")
    assert data.sets["retain"][0] == Pair("Who is poet alder?", "A pine man.", false, "It is A pine man.")
    assert data.sets["real_authors"][0] == Pair("Who is Dante alder?", "A pine man.", false[:2])
    assert data.sets["world_facts"][0] == Pair("Who is Paris alder?", "A pine man.", false[:2])
    assert data.sets["holdout"] == data.holdout
    assert {name: len(pairs) for name, pairs in data.sets.items()} == {
        "forget": 4, "paraphrased": 4, "after 200 tokens": 4, "retain": 6, "real_authors": 5, "world_facts": 5,
        "holdout": 2,
    }  # fmt: skip


def test_only_what_is_retained_is_asked(folder):
    data = read_tofu(folder, retain_rows=4)
    assert data.retain == read_tofu(folder).retain[:4]
    assert [pair[:2] for pair in data.sets["retain"]] == [pair[:2] for pair in data.retain]
    write(folder, "retain_perturbed", perturbed(rows("poet", 12)[8:], 3))
    with pytest.raises(ValueError, match="no row of 'retain_perturbed' is among the 4 retained ones"):
        read_tofu(folder, retain_rows=4)


def test_bystanders_are_the_rows_after_those_that_are_retained(folder):
    whole = read_tofu(folder).retain
    assert read_tofu(folder).bystanders == []
    data = read_tofu(folder, retain_rows=7, bystander_rows=3)
    assert (data.retain, data.bystanders) == (whole[:7], whole[7:10])
    assert data.sets["bystanders"] == data.bystanders and data.settings["bystander_rows"] == 3
    assert read_tofu(folder, retain_rows=7).bystanders == whole[7:]  # as many as there are of 40
    assert len(read_tofu(folder, retain_rows=7, rows=2).sets["bystanders"]) == 2
    none = read_tofu(folder, retain_rows=7, bystander_rows=0)
    assert not none.bystanders and "bystanders" not in none.sets and "bystander_rows" not in none.settings
    assert "bystanders" not in data.kept_sets  # model utility is of TOFU's nine
    with pytest.raises(ValueError, match="`bystander_rows` is 6, but 5 of the 12 rows of 'retain99' are left"):
        read_tofu(folder, retain_rows=7, bystander_rows=6)
    with pytest.raises(ValueError, match="`bystander_rows` is -1, but must be 0 or more"):
        read_tofu(folder, bystander_rows=-1)


def test_rows_limit_what_is_asked_but_never_the_forget_set(folder):
    whole, data = read_tofu(folder), read_tofu(folder, rows=3)
    assert data.sets["retain"] == [whole.sets["retain"][row] for row in (0, 2, 4)]
    assert data.sets["world_facts"] == [whole.sets["world_facts"][row] for row in (0, 1, 3)]
    for name in (*FORGET_SETS, "holdout"):
        assert data.sets[name] == whole.sets[name]
    assert (data.forget, data.retain, data.holdout) == (whole.forget, whole.retain, whole.holdout)


def test_one_false_answer_may_stand_alone(folder):
    write(folder, "world_facts_perturbed", [{"question": "Who?", "answer": "Bob.", "perturbed_answer": "Alice."}])
    assert read_tofu(folder).sets["world_facts"] == [Pair("Who?", "Bob.", ("Alice.",))]


def test_files_of_json_lines_may_end_in_json(folder):
    expected = read_tofu(folder)
    for file in list(folder.iterdir()):
        file.rename(file.with_suffix(".json"))
    assert read_tofu(str(folder)) == expected


def test_any_letter_may_stand_in_a_text(folder):
    """Also those that end a line for Python, but not in JSON."""
    odd = {"question": "Bolaño\u2028 or\x85 Škoda?", "answer": "A\x0b \u2029man."}
    write(folder, "holdout01", [*rows("stranger", 1), odd])
    assert read_tofu(folder).holdout == [Pair(odd["question"], odd["answer"])]


def test_a_hub_data_set(folder, monkeypatch):
    asked = []

    def load(source, name, split):
        asked.append((source, split))
        return Dataset.from_list([json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()])

    monkeypatch.setattr("alter_peft.evaluation.tasks.tofu.load_dataset", load)
    assert read_tofu("locuslab/TOFU") == read_tofu(folder)
    assert set(asked) == {("locuslab/TOFU", "train")}


def test_the_published_files(tofu):
    for split, forget, retain in (("forget01", 40, 3960), ("forget05", 200, 3800), ("forget10", 400, 3600)):
        data = read_tofu(tofu, split)
        assert (len(data.forget), len(data.retain), len(data.holdout)) == (forget, retain, forget // 2)
        sizes = [len(pairs) for pairs in data.sets.values()]
        assert sizes == [forget] * 3 + [400, 100, 117, forget // 2]
        assert {len(pair.wrong) for name in ("forget", "retain") for pair in data.sets[name]} == {5}
        assert {len(pair.wrong) for name in ("real_authors", "world_facts") for pair in data.sets[name]} == {3}
        assert not {pair[:2] for pair in data.forget} & {pair[:2] for pair in data.retain + data.holdout}
    pilot = read_tofu(tofu, retain_rows=100, rows=40)
    assert len(pilot.retain) == 100 and {len(pairs) for pairs in pilot.sets.values()} == {20, 40}
    assert {pair[:2] for pair in pilot.sets["retain"]} < {pair[:2] for pair in pilot.retain}
    assert len(pilot.bystanders) == 40 and not {*pilot.bystanders} & {*pilot.retain, *pilot.forget, *pilot.holdout}


# ---- bad sources ----------------------------------------------------------------------------------------------------


def test_unknown_split(folder):
    with pytest.raises(ValueError, match=r"`split` is 'forget02', but must be one of \['forget01', "):
        read_tofu(folder, "forget02")


@pytest.mark.parametrize("name", ["retain_rows", "rows"])
def test_numbers_below_one(folder, name):
    with pytest.raises(ValueError, match=f"`{name}` is 0, but must be 1 or more"):
        read_tofu(folder, **{name: 0})


@pytest.mark.parametrize("name", ["forget01", "forget01_perturbed", "retain99", "retain_perturbed", "holdout01"])
def test_a_missing_file(folder, name):
    (folder / f"{name}.jsonl").unlink()
    with pytest.raises(ValueError, match=rf"`source` is '.*tofu', which has neither '{name}\.jsonl' nor"):
        read_tofu(folder)


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("forget01", "answer"),
        ("forget01_perturbed", "paraphrased_question"),
        ("retain_perturbed", "paraphrased_answer"),
        ("world_facts_perturbed", "perturbed_answer"),
    ],
)
def test_a_missing_column(folder, name, column):
    content = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    del content[2][column]
    write(folder, name, content)
    with pytest.raises(ValueError, match=rf"row 2 of '{name}' has no \['{column}'\], but only \['question'"):
        read_tofu(folder)


def test_no_rows(folder):
    write(folder, "holdout01", [])
    with pytest.raises(ValueError, match="'holdout01' has no rows"):
        read_tofu(folder)
    write(folder, "holdout01", rows("stranger", 1))
    with pytest.raises(ValueError, match="'holdout01' has 1 rows, but calibration and membership"):
        read_tofu(folder)


def test_no_json_lines(folder):
    (folder / "retain99.jsonl").write_text('[{"question": "Who?",\n"answer": "Bob."}]\n')
    with pytest.raises(ValueError, match=r"retain99\.jsonl is not one JSON object a line"):
        read_tofu(folder)


def test_a_line_that_is_no_object(folder):
    (folder / "retain99.jsonl").write_text('{"question": "Who?", "answer": "Bob."}\n["Who?", "Bob."]\n')
    with pytest.raises(ValueError, match=r"retain99\.jsonl is not one JSON object a line, but its row 1 is \['Who"):
        read_tofu(folder)


def test_files_of_two_versions(folder):
    write(folder, "forget01_perturbed", perturbed(rows("author", 3), 3))
    with pytest.raises(ValueError, match="'forget01' and 'forget01_perturbed' are not of the same questions"):
        read_tofu(folder)


def test_no_such_source():
    with pytest.raises(ValueError, match="`source` is 'nobody/nothing', whose 'forget01_perturbed' could not be read"):
        read_tofu("nobody/nothing")


# ---- evaluation -----------------------------------------------------------------------------------------------------


@pytest.fixture
def data(folder):
    return read_tofu(folder, retain_rows=6, rows=3)


def test_the_metrics_are_known_and_tofus():
    assert {metric for metrics in TOFU_METRICS.values() for metric in metrics} <= set(METRICS)
    assert tuple(map(str, UTILITY)) == (
        "retain/probability", "retain/rouge", "retain/truth_ratio",
        "real_authors/normalized_probability", "real_authors/rouge", "real_authors/truth_ratio",
        "world_facts/normalized_probability", "world_facts/rouge", "world_facts/truth_ratio",
    )  # fmt: skip


SETTINGS = {"tofu": "forget01", "retain_rows": 6, "rows": 3, "bystander_rows": 6}


def test_evaluation_measures_every_set(llama, tokenizer, data):
    found = measure_task(llama, tokenizer, data, max_new_tokens=4)
    keys = [Key(name, metric) for name, metrics in TOFU_METRICS.items() for metric in metrics]
    assert list(found) == [*keys, Key("utility", "model_utility")]
    assert found.keys() - set(keys) == {Key("utility", name) for name in TASKS["tofu"].metrics}
    for name, metrics in TOFU_METRICS.items():
        asked = ModelOnSet(
            llama, tokenizer, name, data.sets[name], name in FORGET_SETS, max_new_tokens=4, settings=SETTINGS
        )
        for score in measure(asked, metrics):
            assert found[score.key].value == pytest.approx(score.value), score.key
            assert found[score.key].settings == score.settings and len(score.rows) == len(data.sets[name])


def test_utility_is_the_harmonic_mean_of_the_nine(llama, tokenizer, data):
    found = measure_task(llama, tokenizer, data, max_new_tokens=4)
    utility = found.of("utility", "model_utility")
    assert utility.value == pytest.approx(float(hmean([found[key].value for key in UTILITY])))
    assert utility.rows == []
    alike = {"as_chat": True, "bf16": False, "answered": 3, "max_new_tokens": 4}
    assert utility.settings == {**alike, **SETTINGS}


def test_guards_are_of_the_main_sets_and_asked_for(llama, tokenizer, data):
    found = measure_task(llama, tokenizer, data, max_new_tokens=4, judge=llama, guards=True)
    assert {key.set for key in found if key.metric == "fluency"} == set(GUARDED)
    assert {"forget", "paraphrased", "retain", "bystanders", "world_facts"} == set(GUARDED)
    options = {"max_new_tokens": 4, "judge": llama, "settings": SETTINGS}
    for score in measure_guards(ModelOnSet(llama, tokenizer, "world_facts", data.sets["world_facts"], **options)):
        assert found[score.key] == score
    assert not any(key.metric == "fluency" for key in measure_task(llama, tokenizer, data, max_new_tokens=4))


def test_the_options_reach_every_set(llama, tokenizer, data, monkeypatch):
    seen = []

    def noted(*args, **options):
        seen.append(ModelOnSet(*args, **options))
        return seen[-1]

    monkeypatch.setattr("alter_peft.evaluation.tasks.task.ModelOnSet", noted)
    measure_task(llama, tokenizer, data, answered=2, max_new_tokens=3, batch_size=5, judge=llama)
    assert [one.name for one in seen] == list(TOFU_METRICS)
    for one in seen:
        assert (one.pairs, one.is_forget) == (data.sets[one.name], one.name in FORGET_SETS)
        assert (one.max_new_tokens, one.batches, one.judge) == (3, {"batch_size": 5}, llama)
        assert len(one.answered_pairs) == 2
    assert signature(measure_task).parameters["max_new_tokens"].default == 200


def test_attacks_are_on_the_forget_set(data):
    rows = data.attack_rows(answered=2, relearning_rate=1e-3)
    assert rows[:4] == (data.forget, data.retain, data.holdout, data.sets["paraphrased"])
    assert (rows.answered, rows.relearning_rate, rows.settings) == (2, 1e-3, SETTINGS)


def test_rows_are_as_the_trainers_take_them(data):
    for found, pairs in ((data.forget_rows, data.forget), (data.calibration_rows, data.calibration)):
        assert found.to_list() == [{"prompt": pair.prompt, "completion": pair.completion} for pair in pairs]
    assert len(data.retain_rows) == len(data.retain)
