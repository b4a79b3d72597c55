"""Verdicts are computed from seeds, the paper's side of each claim from its tables."""

from __future__ import annotations

import math
import re

import pytest

from reproduction.claims import CLAIMS, Claim, gap, standard_error
from reproduction.targets import TARGETS, Metric

AHEAD = Claim("A is ahead of B", "table2", ("TetraJet",), ("Microscaling",))
NO_GAIN = Claim("A gains less than a quarter", "table2", ("TetraJet",), ("Microscaling",), below=0.25)


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.text)
def test_every_claim_is_about_rows_of_its_target_and_true_of_the_paper(claim):
    target = TARGETS[claim.target]
    assert {*claim.more, *claim.less} <= {row.label for row in target.rows}
    assert all(metric.digits == 2 or target.tracked for _, metric in (*claim.terms[0], *claim.terms[1]))
    papers = [claim.paper(model) for model in target.models]
    assert all(number is not None for number in papers) == bool(target.metrics)
    for number in papers if target.metrics else ():
        assert number < claim.below if claim.below is not None else number > 0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("TetraJet is ahead of Microscaling", 59.75 - 58.56),
        ("Q1 and Q2 cost more, on average, than Q3 to Q6", (63.46 + 63.37 + 63.81 + 63.78) / 4 - (61.50 + 62.77) / 2),
        ("Q-EMA ends with calmer outputs than TetraJet", 0.0401 - 0.0251),
    ],
)
def test_the_papers_difference(text, number):
    claim = next(claim for claim in CLAIMS if claim.text == text)
    assert math.isclose(claim.paper("DeiT-T"), number)


def test_a_difference_is_of_the_seeds_that_all_rows_have():
    claim = Claim("", "table1", ("a", "b"), ("c",), Metric.TOP1, Metric.TOP5)
    rows = {
        ("a", Metric.TOP1): {0: 10.0, 1: 20.0, 2: 30.0},
        ("b", Metric.TOP1): {1: 22.0, 2: 36.0},
        ("c", Metric.TOP5): {0: 1.0, 2: 3.0, 1: 2.0, 3: 4.0},
    }
    assert claim.ours(lambda *term: rows[term]) == [21.0 - 2.0, 33.0 - 3.0]


@pytest.mark.parametrize(
    ("differences", "ahead", "no_gain"),
    [
        ([], "not run", "not run"),
        ([9.0, 9.0], "cannot be told, n < 3", "cannot be told, n < 3"),
        # Mean 2, standard error 1 / sqrt(3); t of 2 degrees of freedom is 4.303: the half interval is 2.48.
        ([1.0, 2.0, 3.0], "cannot be told", "cannot be told"),
        ([1.5, 2.5, 3.5], "holds", "cannot be told"),
        ([-1.5, -2.5, -3.5], "does not hold", "holds"),
        ([1.8, 2.8, 3.8], "holds", "does not hold"),
        # Of 9 degrees: 2.262. Mean 0.5, deviation sqrt(10 / 9) / 2, standard error 1 / 6.
        ([0.0, 1.0] * 5, "holds", "cannot be told"),
        ([0.1, 0.1, 0.1], "holds", "holds"),
        ([0.0, 0.0, 0.0], "cannot be told", "holds"),
        ([0.4, 0.4, 0.4], "holds", "does not hold"),
    ],
)
def test_verdicts(differences, ahead, no_gain):
    assert (AHEAD.verdict(differences), NO_GAIN.verdict(differences)) == (ahead, no_gain)


def test_standard_errors():
    assert math.isclose(standard_error([1.0, 2.0, 3.0]), 1 / math.sqrt(3))
    # Standard errors 1 / sqrt(3) and sqrt(2) / sqrt(2): that of the difference is sqrt(4 / 3).
    difference, errors = gap([6.0, 7.0, 8.0], [1.0, 3.0])
    assert difference == 5.0 and math.isclose(errors, 5 / math.sqrt(4 / 3))
    assert gap([1.0, 1.0], [2.0, 2.0]) == (-1.0, -math.inf)


def test_texts_are_told_apart():
    assert len({(claim.text, claim.target) for claim in CLAIMS}) == len(CLAIMS)
    assert not any(re.search(r"[|\n]", claim.text) for claim in CLAIMS)
