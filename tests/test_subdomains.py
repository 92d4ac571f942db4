# SPDX-License-Identifier: Apache-2.0
import json
import random
from pathlib import Path

import pytest
from sklearn.metrics import normalized_mutual_info_score

from alter_peft.subdomains import discover_subdomains


TOFU = Path(__file__).parents[2] / "shared" / "data" / "tofu"

SUBJECTS = {
    "Mirela Castellano": "chess opening tournament grandmaster rook endgame gambit clock bishop rating",
    "Oskar Lindqvist": "glacier kayak fjord expedition ice paddle crevasse summit snow compass",
    "Tendai Mukanya": "pottery kiln glaze clay ceramics studio wheel vase firing porcelain",
}
COMMON = "the a of and in to was is with for by from early later known often many work years life what where when how"
TEXTS_EACH = 16


def texts_about(name: str) -> list[str]:
    generator = random.Random(name)
    texts = []
    for _ in range(TEXTS_EACH):
        words = generator.sample(SUBJECTS[name].split(), 4) + generator.sample(COMMON.split(), 8) + [name]
        texts.append(" ".join(generator.sample(words, len(words))))
    return texts


def interleaved(*names: str) -> tuple[list[str], list[int]]:
    columns = [texts_about(name) for name in names]
    return [text for row in zip(*columns, strict=True) for text in row], list(range(len(names))) * TEXTS_EACH


def read_tofu(name: str) -> list[str]:
    path = TOFU / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [f"{row['question']} {row['answer']}" for row in rows]


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("number", [2, 3])
def test_recovers_interleaved_subjects_in_order_of_appearance(number, given):
    names = list(SUBJECTS)[:number]
    texts, truth = interleaved(*names)

    labels, found = discover_subdomains(texts, num_domains=number if given else None)

    assert labels == truth
    assert all(isinstance(label, int) for label in labels)
    for name, full_name in zip(found, names, strict=True):
        assert set(name.split("-")) == set(full_name.lower().split())


@pytest.mark.parametrize("name", SUBJECTS)
def test_one_subject_is_one_subdomain(name):
    labels, names = discover_subdomains(texts_about(name))
    assert labels == [0] * TEXTS_EACH
    assert len(names) == 1


def texts_of_many(number: int, each: int) -> tuple[list[str], list[int]]:
    """Texts of so many authors, with words of their own."""
    generator, texts = random.Random(0), []
    for author in range(number):
        own = [f"word{author}x{i}" for i in range(10)]
        for _ in range(each):
            words = [
                *generator.sample(own, 4),
                *generator.sample(COMMON.split(), 8),
                f"first{author}",
                f"last{author}",
            ]
            texts.append(" ".join(words))
    return texts, [author for author in range(number) for _ in range(each)]


@pytest.mark.parametrize(("number", "each"), [(30, 6), (20, 6)])
def test_as_many_subdomains_are_found_as_there_are(number, each):
    texts, truth = texts_of_many(number, each)
    labels, names = discover_subdomains(texts)
    assert labels == truth and len(names) == number


def test_a_found_subdomain_has_at_least_five_texts():
    texts, truth = interleaved("Mirela Castellano", "Oskar Lindqvist")
    labels, names = discover_subdomains(texts + ["what how when"] * 2)
    assert labels[:-2] == truth
    assert len(names) == 2  # two texts are too few for an expert of their own


def test_texts_with_nothing_in_common_are_one_subdomain():
    labels, _ = discover_subdomains(["alpha beta", "gamma delta", "epsilon zeta", "eta theta", "iota kappa"])
    assert labels == [0] * 5


def test_fewer_than_four_texts_are_one_subdomain():
    labels, names = discover_subdomains(["chess rook", "chess rook", "kayak fjord"])
    assert labels == [0, 0, 0]
    assert names == ["chess-rook"]


def test_a_number_given_is_kept_even_against_the_silhouette():
    texts = texts_about("Tendai Mukanya")
    for number in (1, 3, len(texts)):
        labels, names = discover_subdomains(texts, num_domains=number)
        assert sorted(set(labels)) == list(range(number)) == list(range(len(names)))


def test_labels_are_numbered_by_first_appearance():
    texts, _ = interleaved(*SUBJECTS)
    for shifted in (texts, texts[1:], texts[2:]):
        labels, _ = discover_subdomains(shifted, num_domains=3)
        assert labels[:3] == [0, 1, 2]


def test_names_are_unique():
    texts = ["red", "red red", "red red red red"]
    with pytest.raises(ValueError, match="distinct"):  # one and the same direction three times
        discover_subdomains(texts, num_domains=3)

    _, names = discover_subdomains([f"aa {text}" for text in texts], num_domains=3)

    assert len(set(names)) == 3


def test_the_result_depends_on_the_arguments_alone():
    texts, _ = interleaved(*SUBJECTS)
    assert discover_subdomains(texts, 5, seed=3) == discover_subdomains(texts, 5, seed=3)
    assert discover_subdomains(texts, seed=3) == discover_subdomains(texts, seed=3)


@pytest.mark.parametrize(
    ("texts", "num_domains", "message"),
    [
        ([], None, r"texts is empty: pass at least one"),
        (["a chess rook"] * 3, 0, r"num_domains=0 for 3 texts: pass a number from 1 to 3"),
        (["a chess rook"] * 3, 4, r"num_domains=4 for 3 texts: pass a number from 1 to 3"),
        (["a chess rook"] * 3, 2, r"num_domains=2, .* only 1 distinct .* pass num_domains <= 1"),
        (["?", "!"], None, r"texts holds no word .* pass texts with words"),
    ],
)
def test_errors_name_the_field_the_value_and_the_fix(texts, num_domains, message):
    with pytest.raises(ValueError, match=message):
        discover_subdomains(texts, num_domains)


@pytest.mark.parametrize("given", [True, False])
def test_tofu_authors(given):
    texts = read_tofu("full.jsonl")[:400]  # 20 authors, 20 consecutive questions each
    labels, names = discover_subdomains(texts, num_domains=20 if given else None)

    assert abs(len(names) - 20) <= 1
    assert normalized_mutual_info_score([i // 20 for i in range(400)], labels) > 0.95
    assert set(names[0].split("-")) == {"jaime", "vasquez"}


@pytest.mark.parametrize("given", [True, False])
def test_tofu_forget01_is_two_authors(given):
    labels, _ = discover_subdomains(read_tofu("forget01.jsonl"), num_domains=2 if given else None)
    assert labels == [0] * 20 + [1] * 20


def test_one_tofu_author_is_one_subdomain():
    labels, _ = discover_subdomains(read_tofu("forget01.jsonl")[:20])
    assert labels == [0] * 20


def test_twenty_tofu_authors_are_twenty_subdomains():
    """A few more would have a silhouette that is hardly better."""
    labels, names = discover_subdomains(read_tofu("forget10.jsonl"))
    assert len(names) == 20
    assert normalized_mutual_info_score([i // 20 for i in range(400)], labels) > 0.9
