# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from attacked_models import FORGET, RETAIN, model_of

from alter_peft.evaluation import Key, Pair, Rows, Scores, chat_or_plain, score_answers
from alter_peft.evaluation.attacks.asking_otherwise import (
    AFTER_RETAIN,
    IDLE,
    WAYS_OF_ASKING,
    after_answers,
    asking_otherwise,
    first_third_given,
    in_capitals,
    misspelt,
    ways_of_asking,
)


PAIR = Pair(
    "Where does Maribel Quennock keep pigeons?", "She keeps nine of them behind the house.", ("Here.",), "Nine."
)


def asked(*args, **options) -> Scores:
    return Scores(asking_otherwise(*args, **options))


def rows_of(scores: Scores, way: str, metric: str) -> list[float]:
    return scores[Key(way, metric, "asking_otherwise")].rows


@pytest.mark.parametrize("name", ways_of_asking(RETAIN))
def test_a_way_changes_the_question_and_keeps_the_answer(name):
    asked = ways_of_asking(RETAIN)[name](PAIR)
    assert asked.given + asked.completion == PAIR.completion
    assert tuple(map(str.strip, (*asked.wrong, asked.rephrased))) == (*PAIR.wrong, PAIR.rephrased)
    assert asked != PAIR
    assert ways_of_asking(RETAIN)[name](PAIR) == asked


def test_the_question_stands_behind_every_prefix():
    others = {"misspelt", "in capitals", "first third given", AFTER_RETAIN}
    for name, way in ways_of_asking(RETAIN).items():
        assert way(PAIR).prompt.endswith(PAIR.prompt) == (name not in others - {"first third given"}), name
    prompts = {way(PAIR).prompt for way in ways_of_asking(RETAIN).values()}
    assert len(prompts) == len(WAYS_OF_ASKING) + 1


def test_misspelt_swaps_inner_letters():
    found = misspelt(PAIR).prompt.split(" ")
    words = PAIR.prompt.split(" ")
    assert [a == b for a, b in zip(found, words, strict=True)] == [True, True, True, False, True, False]
    for before, after in zip(words, found, strict=True):
        assert sorted(before) == sorted(after) and (before[0], before[-1]) == (after[0], after[-1])
    assert misspelt(Pair("Why is it so?", "So.")).prompt == "Why is it so?"


def test_in_capitals():
    assert in_capitals(PAIR).prompt == "WHERE DOES MARIBEL QUENNOCK KEEP PIGEONS?"


def test_the_first_third_is_put_in_the_models_mouth():
    found = first_third_given(PAIR)
    assert (found.given, found.completion) == ("She keeps", " nine of them behind the house.")
    spaced = first_third_given(Pair("Who?", " It is  Bob."))
    assert (spaced.given, spaced.completion) == (" It", " is  Bob.")
    for bare in (Pair("Who?", " Two words"), Pair("Who?", " Bob", (" It is not Bob.",), " It is he.")):
        assert first_third_given(bare) == bare
    false = ("She shoots nine of them in the garden.", "Here.")
    compared = first_third_given(PAIR._replace(wrong=false, rephrased="There are nine behind it."))
    assert compared.wrong == (" nine of them in the garden.", " Here.")
    assert compared.rephrased == " are nine behind it."


def test_false_answers_are_asked_as_the_true_one_is(tokenizer):
    """After what is given, and with the same space before them."""
    model = model_of("plain", tokenizer)
    false = [pair._replace(wrong=(pair.completion, "Bees, on the old bridge."), rephrased=None) for pair in FORGET]
    for chat in (True, False):
        asking = chat_or_plain(tokenizer, chat)
        found = asked(model, asking, Rows(false, RETAIN), ["probability", "normalized_probability"])
        for way in ways_of_asking(RETAIN):
            true, share = (rows_of(found, way, metric) for metric in ("probability", "normalized_probability"))
            pairs = [ways_of_asking(RETAIN, chat)[way](pair) for pair in false]
            other = score_answers(model, asking, [pair._replace(completion=pair.wrong[1]) for pair in pairs])
            expected = [p / (2 * p + q) for p, q in zip(true, other.probability, strict=True)]
            assert share == pytest.approx(expected, rel=1e-3), way


def test_answers_before_the_question():
    pairs = [Pair(f"q{i}", f"a{i}") for i in range(9)]
    asked = after_answers(pairs)(Pair("Who?", "Bob"))
    shots = "Question: q0\nAnswer: a0\n\nQuestion: q3\nAnswer: a3\n\nQuestion: q6\nAnswer: a6\n\n"
    assert asked == Pair(f"{shots}Question: Who?\nAnswer:", "Bob")
    for answer in ("Bob", " Bob"):
        plain = after_answers(pairs, is_chat=False)(Pair("Who?", answer))
        assert plain.prompt + plain.completion == f"{shots}Question: Who?\nAnswer: Bob"
    (one,) = (after_answers([Pair("q", "a")], 1)(Pair("Who?", "Bob")).prompt,)
    assert one == "Question: q\nAnswer: a\n\nQuestion: Who?\nAnswer:"


def test_plain_text_is_asked_for_where_there_is_no_chat(tokenizer):
    model = model_of("plain", tokenizer)
    for chat in (True, False):
        asking = chat_or_plain(tokenizer, chat)
        found = asked(model, asking, Rows(FORGET, RETAIN), ["probability"])
        shown = [after_answers(RETAIN, is_chat=chat)(pair) for pair in FORGET]
        expected = score_answers(model, asking, shown).probability
        assert rows_of(found, AFTER_RETAIN, "probability") == expected


def test_there_must_be_answers_to_show():
    with pytest.raises(ValueError, match="`pairs` has 2 rows, but 3 of them are to be shown"):
        after_answers(RETAIN[:2])
    assert list(ways_of_asking(RETAIN[:2])) == list(WAYS_OF_ASKING)
    assert list(ways_of_asking(RETAIN[:3])) == [*WAYS_OF_ASKING, AFTER_RETAIN]


def test_idle_talk_is_about_200_tokens():
    assert 150 < len(IDLE.split()) < 250


def test_every_way_is_measured(tokenizer):
    model = model_of("gated", tokenizer)
    paraphrased = [pair._replace(prompt="Tell me: " + pair.prompt) for pair in FORGET]
    found = asked(model, tokenizer, Rows(FORGET, RETAIN, paraphrased=paraphrased, answered=2))
    names = [*ways_of_asking(RETAIN), "paraphrased"]
    assert list(found) == [
        Key(name, metric, "asking_otherwise") for name in names for metric in ("probability", "rouge")
    ]
    upper = [in_capitals(pair) for pair in FORGET]
    assert rows_of(found, "in capitals", "probability") == score_answers(model, tokenizer, upper).probability
    told = score_answers(model, tokenizer, paraphrased).probability
    assert rows_of(found, "paraphrased", "probability") == told
    without = asked(model, tokenizer, Rows(FORGET, RETAIN), ["probability"])
    assert Key("paraphrased", "probability", "asking_otherwise") not in without
