# SPDX-License-Identifier: Apache-2.0
"""Whether there is anything to forget, before the training, and what has become of it, after it."""

from __future__ import annotations

import math
from typing import NamedTuple

from scipy.stats import ttest_ind_from_stats
from torch import Tensor

from alter_peft.words import counted


# Rows that are measured, at most: of those to retain, and of those to forget where the loss needs nothing of them
RETAIN_ROWS, FORGET_ROWS = 64, 256
# Rows are known if they lie above unseen ones, on average, by more than MARGIN nats and not by chance (Welch's test at
# this level), or by more than CLEAR_MARGIN nats: a few rows can't pass a test
MARGIN, CLEAR_MARGIN, SIGNIFICANCE = 0.25, 1.0, 0.05
# More of a set's answer tokens sent to the wrong kind of expert than this are warned of
MUCH_ASTRAY = 0.1


class Knowledge(NamedTuple):
    """
    How well a model knows the rows: the mean log-probability of each row's labels, in nats.

    A window of a long row is a row. Probabilities are those that `forget_level` is given as: exp of the mean over rows
    of a row's mean log-probability.

    Attributes:
        forget: of the rows to forget, or of some of them where no loss and no router needs all, (rows,); the same ones
            each time.
        retain: of some rows to retain, (rows,); the same ones each time.
        unseen: of the calibration rows, which the model was never trained on, (rows,); empty without any.
        level: the probability of the unseen rows, or without any a guess at it, by general text or `forget_level`.
    """

    forget: Tensor
    retain: Tensor
    unseen: Tensor
    level: float

    @property
    def forget_probability(self) -> float:
        """Of the rows to forget."""
        return math.exp(float(self.forget.mean()))

    @property
    def retain_probability(self) -> float:
        """Of the rows to retain."""
        return math.exp(float(self.retain.mean()))

    @property
    def is_guess(self) -> bool:
        """Whether no rows have shown the level of unseen text."""
        return len(self.unseen) == 0

    @property
    def gap(self) -> float:
        """How far the rows to forget lie above unseen text, on average, in nats."""
        return float(self.forget.mean()) - math.log(self.level)

    @property
    def is_known(self) -> bool:
        """
        Whether the model knows the rows to forget, above what it knows of text that it never saw.

        They are known if they lie above it by more than 1 nat on average, or by more than 0.25 nats (the default of
        `stopping_tolerance`, within which they would count as forgotten) and not by chance: one-sided, by Welch's test
        of the rows' mean log-probabilities at the level of 5 %. Without calibration rows there is no test, and 0.25
        nats above the guess are enough.
        """
        if self.gap > CLEAR_MARGIN or self.gap <= MARGIN or self.is_guess:
            return self.gap > MARGIN
        if min(len(self.forget), len(self.unseen)) < 2:
            return False
        one, other = ([float(rows.mean()), float(rows.std()), len(rows)] for rows in (self.forget, self.unseen))
        test = ttest_ind_from_stats(*one, *other, equal_var=False, alternative="greater")
        return bool(test.pvalue < SIGNIFICANCE)

    @property
    def described(self) -> tuple[str, str, str]:
        """The probability of the rows to forget, of those never seen and of those to retain, and how many they are."""
        unseen = "a guess: there are no calibration rows" if self.is_guess else _rows(self.unseen)
        return (
            f"{_number(self.forget_probability)} ({_rows(self.forget)})",
            f"{_number(self.level)} ({unseen})",
            f"{_number(self.retain_probability)} ({_rows(self.retain)})",
        )

    @property
    def lines(self) -> list[str]:
        """The three numbers, a line each."""
        forget, unseen, retain = self.described
        return [f"to forget:  {forget}", f"never seen: {unseen}", f"to retain:  {retain}"]

    @property
    def warning(self) -> str | None:
        """What is to be said before the training if the model does not know the rows to forget."""
        if self.is_known:
            return None
        unseen = "the guess at text that it never saw" if self.is_guess else "text like them that it never saw"
        fix = ", or give calibration rows, which measure that" if self.is_guess else ""
        found, expected = _number(self.forget_probability), _number(self.level)
        return (
            f"The model does not know the rows to forget: their answer probability is {found}, and that of {unseen} "
            f"{expected}. There is nothing to forget. Check that these are the model and the rows that it was trained "
            f"on, asked as it was trained{fix}."
        )


class Astray(NamedTuple):
    """Share of the answer tokens of each set that the router sends to the wrong kind of expert, as it was fitted."""

    forget: float
    retain: float

    @property
    def warning(self) -> str | None:
        """What is to be said before the training if it is much, of either set."""
        if max(self) <= MUCH_ASTRAY:
            return None
        return (
            f"The router sends {self.forget:.0%} of the answer tokens of the rows to forget to the retain expert, and "
            f"{self.retain:.0%} of those of the rows to retain to forget experts (more than {MUCH_ASTRAY:.0%} is "
            "much): the first will not be forgotten, and the others may be. The two sets are too much alike for it. "
            "Take rows to retain that are about other things, name in a column `subject` whom each row to forget is "
            "about (`counterfactual_copies` are made of it), let it read more of the text before a token "
            "(`router_half_life`) or another layer (`router_layer`), or train plain LoRA, which has no router."
        )


class Summary(NamedTuple):
    """
    What a training has done, on the same rows before and after.

    Attributes:
        before, after: what the model knew and knows.
        astray: what the router did with the rows; `None` without one.
        steps, epochs: how long it was trained.
        reached: whether the training ended because the forget rows had come to their targets; `None` if nothing was
            to end it.
        targets: what token targets were taken from, in words; empty without any.
        stalled: whether the training ended because they came no nearer to their targets.
    """

    before: Knowledge
    after: Knowledge
    astray: Astray | None
    steps: int
    epochs: float
    reached: bool | None
    targets: str = ""
    stalled: bool = False

    @property
    def is_forgotten(self) -> bool:
        """
        Whether the rows to forget are no better known now than text that the model never saw.

        They lie above it by 0.25 nats at most, on average, or the training ended because they had come to their
        targets. More than that is not forgotten, even if so few rows may lie there by chance: a test that cannot tell
        them from unseen text does not show that they are like it.
        """
        return not self.after.is_known and (self.after.gap <= MARGIN or bool(self.reached))

    @property
    def verdict(self) -> str:
        """One sentence on whether they are."""
        longer = "Train longer (`num_train_epochs`) or faster (`learning_rate`)"
        if self.stalled:
            longer = "They came no nearer: begin anew, at another `learning_rate`"
        if self.after.is_known:
            return f"not forgotten: the rows to forget are still known above text that the model never saw. {longer}"
        if not self.before.is_known:
            return "there was nothing to forget: the model did not know these rows before the training"
        if not self.is_forgotten:
            forget, unseen = self.after.forget, self.after.unseen
            return (
                f"not shown to be forgotten: the rows to forget are {math.exp(self.after.gap):.1f} times as likely as "
                f"text that the model never saw, which {_rows(forget)} to forget and {_rows(unseen)} never seen "
                f"cannot tell from chance. {longer}, or give more of these rows"
            )
        if self.reached:
            return "forgotten: the rows to forget have come to their level"
        if self.after.gap < -CLEAR_MARGIN:
            return "forgotten, and far below text that the model never saw, which can be noticed"
        return "forgotten: the rows to forget are no better known than text that the model never saw"

    @property
    def lines(self) -> list[str]:
        """About seven lines in plain words."""
        before, (forget, unseen, retain) = self.before, self.after.described
        routed = []
        if self.astray is not None:
            shares = f"{self.astray.forget:.1%} of the tokens to forget, {self.astray.retain:.1%} of those to retain"
            routed = [f"astray:     {shares}, sent to the wrong kind of expert"]
        return [
            f"to forget:  {_number(before.forget_probability)} -> {forget}",
            f"never seen: {unseen}",
            f"to retain:  {_number(before.retain_probability)} -> {retain}",
            *routed,
            *([f"targets:    {self.targets}"] if self.targets else []),
            f"trained:    {counted(self.steps, 'step')}, {counted(self.epochs, 'epoch')}",
            f"result:     {self.verdict}",
        ]


def _rows(values: Tensor) -> str:
    return counted(len(values), "row")


def _number(probability: float) -> str:
    return f"{probability:.3f}" if probability >= 0.0005 else f"{probability:.0e}"
