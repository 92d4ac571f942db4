# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from dataclasses import replace

import pytest
from made_up_benchmark import key, make_benchmark, named, relearning, save, scores

from alter_peft.evaluation import FORGET_SETS, Key, Score
from alter_peft.evaluation.tasks.tofu import UTILITY
from alter_peft.report.estimates import Estimate
from alter_peft.report.reading import read_benchmark
from alter_peft.report.summary import is_of_set, is_share


@pytest.fixture
def folder(tmp_path):
    return make_benchmark(tmp_path / "out")


def model(benchmark, name):
    return next(model for model in benchmark.models if model.name == name)


def test_models_and_their_seeds(folder):
    benchmark = read_benchmark(folder)
    labels = ["target", "oracle (3 seeds)", "alter (2 seeds)", "lora (1 of 2 seeds)"]
    assert [found.label for found in benchmark.models] == labels
    assert [found.name for found in benchmark.methods] == ["alter", "lora"]
    assert benchmark.oracle.name == "oracle" and len(benchmark.oracle.results) == 3
    assert [cell.seed for cell in model(benchmark, "lora").failed] == [0]


def test_estimates_by_hand(folder):
    benchmark = read_benchmark(folder)
    found = model(benchmark, "alter").estimate(key("forget/probability"))
    assert found == pytest.approx(Estimate(0.12, 0.02 / math.sqrt(2), 2, 2))
    assert model(benchmark, "lora").estimate(key("forget/astray")) is None


def test_a_seed_that_lacks_a_score_is_counted(folder):
    save(folder, "alter", 1, scores=scores(0.2, 0.4), without=["utility/model_utility"])
    found = model(read_benchmark(folder), "alter").estimate(key("utility/model_utility"))
    assert found == Estimate(0.49, None, 1, 2)


@pytest.mark.parametrize(
    "score", [key("forget/fluency"), key("forget/expert_0"), key("switching_off/forget/rouge"), Key("a", "b", None, 1)]
)
def test_what_has_no_distance_as_a_score_of_a_set(score):
    assert not is_of_set(score)
    assert is_of_set(key("after 200 tokens/probability"))
    assert is_share(score) == (score.metric == "expert_0")


def test_numbers_beside_the_scores(folder):
    values = model(read_benchmark(folder), "target").values[0]
    # Min-K% of 1..4 - 3 against 1..4: half a win of 16 pairs, a tie of 1
    assert values[key("forget/membership_auc")] == 0.5 / 16
    assert values[Key("held-out half", "probability", "relearning", 50)] == 1


def test_an_auc_that_was_measured_is_kept(folder):
    save(folder, "alter", 0, scores=scores(0.1, 0.5, forget__membership_auc=0.125))
    values = model(read_benchmark(folder), "alter").values
    assert [found[key("forget/membership_auc")] for found in values] == [0.125, 0.5]


def test_bands_are_of_sets_alone(folder):
    for seed in range(3):
        guards = {
            "forget__fluency": seed,
            "forget__unique_tokens": seed,
            "switching_off__forget__rouge": seed,
            "a__acc": seed,
        }
        save(folder, "oracle", seed, scores=scores(seed / 10, 0.5, **guards), seconds={"training": seed})
    bands = read_benchmark(folder).bands
    names = ["probability", "truth_ratio", "min_k", "membership_auc"]
    others = {"holdout/min_k", "utility/model_utility", "a/acc"}
    assert set(map(str, bands)) == {*(f"forget/{name}" for name in names), *others}
    assert bands[key("forget/probability")] == pytest.approx((0.1, 0.1))


def test_a_score_that_one_oracle_lacks_has_no_band(folder):
    save(folder, "oracle", 1, scores=scores(0.1, 0.5), without=["utility/model_utility"])
    assert key("utility/model_utility") not in read_benchmark(folder).bands


def test_summary_by_hand(folder):
    benchmark = read_benchmark(folder)
    values = model(benchmark, "alter").values[0]

    def summary(**changes):
        changed = {key(name.replace("__", "/")): value for name, value in changes.items()}
        return benchmark.summary(benchmark.distances({**values, **changed}))

    # P .11 is one away, utility .49 minus one; four more agree with the oracles' mean, three of them of the forget set
    expected = {"largest": 1, "mean of forget": 1 / 4, "mean of holdout": 0, "mean of utility": 1}
    assert summary() == pytest.approx({**expected, "mean of the sets": 1.25 / 3})
    above, below = summary(forget__probability=0.15), summary(forget__probability=0.05)
    assert above == pytest.approx(below)
    assert above["largest"] == pytest.approx(5) and above["mean of forget"] == pytest.approx(5 / 4)
    lacking = {one: value for one, value in values.items() if one != key("forget/probability")}
    with pytest.raises(ValueError, match=r"without the scores \['forget/probability'\]"):
        benchmark.summary(benchmark.distances(lacking))


def test_utility_of_any_task_counts_in_its_parts(folder):
    """Of rows with bystanders it is of other parts than TOFU's nine."""
    for seed, step in enumerate((-0.1, 0.0, 0.1)):
        parts = {"retain__probability": 0.5 + step, "bystanders__probability": 0.5 + step}
        save(folder, "oracle", seed, scores=scores(0.1 + step, 0.5 + step, step, **parts))
    benchmark = read_benchmark(folder)
    assert set(benchmark.bands) - set(benchmark.counted) == {key("utility/model_utility")}


def test_forms_of_the_forget_set_are_one_set(folder):
    """Many scores of one set count once, and so does model utility beside its parts."""
    parts = {f"{part.set}__{part.metric}": 0.5 for part in UTILITY}
    for seed, step in enumerate((-0.1, 0.0, 0.1)):
        others = {"paraphrased__rouge": 0.5 + step, "after 200 tokens__rouge": 0.5 + step}
        save(folder, "oracle", seed, scores=scores(0.1 + step, 0.5 + step, step, **parts, **others))
    benchmark = read_benchmark(folder)
    assert set(benchmark.bands) - set(benchmark.counted) == {key("utility/model_utility")}
    found = benchmark.summary({one: float(one == key("after 200 tokens/rouge")) for one in benchmark.bands})
    means = [name for name in found if name.startswith("mean of ")]
    assert "mean of forget" in means and not {"mean of paraphrased", "mean of after 200 tokens"} & set(means)
    of_forget = [one for one in benchmark.counted if one.set in FORGET_SETS]
    assert found["mean of forget"] == pytest.approx(1 / len(of_forget))
    assert found["mean of the sets"] == pytest.approx(found["mean of forget"] / (len(means) - 1))


def test_each_oracle_has_distances_to_the_others(folder):
    found = read_benchmark(folder).oracle_distances
    assert [distances[key("forget/probability")] for distances in found] == pytest.approx(
        [-1.5 * 2**0.5, 0, 1.5 * 2**0.5]
    )


def test_bands_under_attack_are_of_the_oracles_so_attacked(folder):
    save(folder, "oracle", 0, scores=scores(0.1, 0.5, quantization__int8__rouge=0.1, relearning__a__rouge=0.1))
    save(folder, "oracle", 1, scores=scores(0.2, 0.5, quantization__int8__rouge=0.3))
    bands = read_benchmark(folder).attack_bands
    assert bands[key("quantization/int8/rouge")] == pytest.approx((0.2, 0.02**0.5))
    assert key("relearning/a/rouge") not in bands  # of one oracle


def test_points_of_relearning_have_a_band(folder):
    """Also where the oracles agree by chance: their rows do not."""
    point = Key("held-out half", "probability", "relearning", 1)
    for path in folder.glob("*/result.json"):
        if not path.parent.name.startswith(("oracle", "alter-0")):
            path.unlink()
    save(folder, "alter", 0, scores=scores(0.1, 0.5))
    for seed, rows in enumerate(([0.1, 0.3], [0.3, 0.1], [0.2, 0.2])):
        with_rows = [replace(one, rows=rows) if one.key == point else one for one in relearning(0.1, 0.2, 0.6)]
        save(folder, "oracle", seed, scores=scores(0.1 + seed / 100, 0.5), curves=with_rows)
    bands = read_benchmark(folder).attack_bands
    assert bands[point] == pytest.approx((0.2, (0.01 / 2) ** 0.5))
    assert bands[point._replace(step=50)].spread == 0  # without rows


def test_relearning_is_shown_at_the_last_step_and_where_a_method_is_farthest(folder):
    def shown():
        return [one for one in read_benchmark(folder).attacks if one.attack == "relearning"]

    def steps(*found):
        return [Key("held-out half", "probability", "relearning", step) for step in found]

    for seed in range(3):
        curves = relearning(*(value + seed / 100 for value in (0.1, 0.2, 0.6)))
        save(folder, "oracle", seed, scores=scores(0.1 + seed / 100, 0.5), curves=curves)
    (folder / "lora-1" / "result.json").unlink()
    save(folder, "alter", 0, scores=scores(0.1, 0.5), curves=relearning(0.1, 0.5, 0.7))
    save(folder, "alter", 1, scores=scores(0.1, 0.5))
    assert shown() == steps(1, 50)
    save(folder, "alter", 1, scores=scores(0.1, 0.5), curves=relearning(0.0, 0.2, 0.6))
    assert shown() == steps(0, 1, 50)
    save(folder, "target", 0, scores=scores(0.9, 0.5), curves=relearning(0.9, 0.2, 0.6))
    save(folder, "alter", 1, scores=scores(0.1, 0.5), curves=relearning(0.1, 0.2, 0.8))
    assert shown() == steps(1, 50)
    for seed in (1, 2):
        save(folder, "oracle", seed, scores=scores(0.1 + seed / 100, 0.5))
    assert shown() == steps(50)  # of one oracle


def test_an_oracle_has_its_own_scores_beside_an_attack_on_an_adapter(folder):
    for seed, value in enumerate((0.1, 0.2)):
        save(folder, "oracle", seed, scores=scores(value, 0.5, quantization__int8__rouge=value))
    attacked = {"merged_quantization__int8__rouge": 0.4, "switching_off__forget without a__probability": 0.5}
    attacked |= {"switching_off__forget__probability": 0.9}
    save(folder, "alter", 0, scores=scores(0.1, 0.5, **attacked))
    found = read_benchmark(folder)
    assert found.attack_bands[key("switching_off/forget/probability")] == found.bands[key("forget/probability")]
    assert found.attack_bands[key("merged_quantization/int8/rouge")] == pytest.approx((0.15, 0.005**0.5))
    assert key("switching_off/forget without a/probability") not in found.attack_bands


def test_a_cell_that_stopped_after_its_scores_is_measured(folder):
    save(folder, "lora", 0, scores=scores(0.1, 0.4), error="RuntimeError: attack")
    found = model(read_benchmark(folder), "lora")
    assert found.label == "lora (2 seeds)" and not found.failed


@pytest.mark.parametrize(("value", "rows"), [(math.nan, [0.5]), (0.5, [math.inf])])
def test_a_cell_with_a_score_that_is_no_number_has_failed(folder, value, rows):
    save(folder, "alter", 1, scores=scores(0.1, 0.5), curves=[Score("forget", "probability", value, rows)])
    found = model(read_benchmark(folder), "alter")
    assert found.label == "alter (1 of 2 seeds)" and found.failed[0].seed == 1
    assert found.failed[0].error.startswith("`forget/probability` is ")


def with_settings(found, **settings):
    return [replace(score, settings=settings) for score in found]


def test_a_result_joins_what_was_measured_alike(folder):
    """Where both have a score; what only one of them has is no matter."""
    rouge = named(forget__rouge=0.5)
    mine, longer = (with_settings(rouge, answered=20, max_new_tokens=length) for length in (60, 200))
    save(folder, "mine", 3, scores=scores(0.1, 0.5), curves=longer)
    assert [one.name for one in read_benchmark(folder).methods] == ["alter", "lora", "mine"]
    save(folder, "alter", 0, scores=scores(0.1, 0.5), curves=mine)
    with pytest.raises(ValueError, match=r"`forget/rouge`: max_new_tokens is 60 in '.*', but 200 in '.*mine-3/"):
        read_benchmark(folder)
    save(folder, "mine", 3, scores=with_settings(scores(0.1, 0.5), files=["mine.jsonl"]))
    with pytest.raises(ValueError, match=r"`forget/probability`: files is None in '.*', but \['mine.jsonl'\] in "):
        read_benchmark(folder)


def spoil(folder, change):
    """What a folder may be instead of a benchmark."""
    cells = {name: [folder / f"{name}-{seed}" / "result.json" for seed in range(3)] for name in ("oracle", "alter")}
    if change == "no results":
        for path in folder.glob("*/result.json"):
            path.unlink()
    elif change == "no oracle":
        for path in cells["oracle"]:
            path.unlink()
    elif change == "one oracle":
        cells["oracle"][0].unlink()
        save(folder, "oracle", 1, error="OSError: disk full")
    elif change == "no method":
        for name in ("alter", "lora"):
            for path in folder.glob(f"{name}-*/result.json"):
                path.unlink()
    elif change == "no scores":
        save(folder, "alter", 1)
    elif change == "other scores":
        save(folder, "alter", 1, scores=named(other__rouge=0.5))
    elif change == "a text":
        save(folder, "alter", 1, scores=[Score("forget", "probability", "high")])
    elif change == "other questions":
        save(folder, "lora", 1, scores=scores(0.1, 0.5), curves=named(forget__truth_ratio=[0.5] * 3))
    elif change == "other settings":  # the first that says so counts
        of_lora = with_settings(scores(0.1, 0.5), tofu="forget05")
        save(folder, "lora", 1, scores=of_lora)
    elif change == "twice":
        (folder / "copy").mkdir()
        (folder / "copy" / "result.json").write_text(cells["alter"][0].read_text())
    elif change == "no JSON":
        cells["alter"][0].write_text("{")
    elif change == "other JSON":
        cells["alter"][0].write_text('{"name": "alter"}')
    elif change == "one seed thrice":
        for seed in range(3):
            save(folder, "oracle", seed, scores=scores(0.1, 0.5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no results", r"there is no \*/result.json in it"),
        ("no oracle", r"has no oracle, only \['target', 'alter', 'lora'\]"),
        ("one oracle", r"has 1 measured oracles; seed 1 failed: OSError: disk full. A band needs at least 2"),
        ("no method", r"has no method, only \['target', 'oracle'\]"),
        ("no scores", "alter of seed 1 has neither scores nor an error"),
        ("other scores", r"alter of seed 1 has no score that the oracles have; it has \['other/rouge'\]"),
        ("a text", r"alter-1/result.json' is no result \(`forget/probability` is 'high'"),
        ("other questions", "`forget/truth_ratio`: number of rows is 4 in '.*', but 3 in '.*lora-1/result.json'"),
        ("other settings", "`forget/probability`: tofu is None in '.*alter-0/.*, but 'forget05' in '.*lora"),
        ("twice", r"copy/result.json' is a second cell of alter with seed 0"),
        ("no JSON", r"alter-0/result.json' is no result \("),
        ("other JSON", r"alter-0/result.json' is no result \(it has no list of `scores`"),
        ("one seed thrice", "do not differ in any score"),
    ],
)
def test_what_is_no_benchmark(folder, change, message):
    spoil(folder, change)
    with pytest.raises(ValueError, match=message):
        read_benchmark(folder)


def test_no_folder(tmp_path):
    with pytest.raises(ValueError, match=r"`folder` is '.*nowhere', but there is no such folder"):
        read_benchmark(tmp_path / "nowhere")
