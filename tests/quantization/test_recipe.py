"""Recipes derived from recipes: the paper's ablations, written out a second time."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from quantization import BACKWARD, FORWARD, QUANTIZERS, RECIPES, Int4Linear, Int4Recipe, Quantizer, QuantLinear, Recipe

TABLE_5 = list(product(("stochastic", "nearest"), (True, False), ("truncation_free", "floor")))


@pytest.mark.parametrize(("rounding", "double", "scaling"), TABLE_5)
def test_rows_of_table_5(rounding, double, scaling):
    derived = replace(
        Recipe().with_quantizers(BACKWARD, rounding=rounding).with_quantizers(QUANTIZERS, scaling=scaling),
        double=double,
    )
    forward, backward = Quantizer(scaling=scaling), Quantizer(scaling=scaling, rounding=rounding)
    assert derived == Recipe(forward, forward, backward, backward, backward, backward, double)


def test_all_three_differences_are_microscaling():
    derived = Recipe().with_quantizers(BACKWARD, rounding="nearest").with_quantizers(QUANTIZERS, scaling="floor")
    assert replace(derived, double=False) == RECIPES["microscaling"]
    assert replace(derived, double=False).describe() == "microscaling"


@pytest.mark.parametrize("names", [("q3",), ("q1", "q2"), QUANTIZERS, ()], ids=str)
def test_with_only(names):
    derived = Recipe().with_only(names)
    for name in QUANTIZERS:
        got, stock = getattr(derived, name), getattr(Recipe(), name)
        assert got == replace(stock, enabled=name in names)
    assert derived.quantizes == bool(names)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Recipe(q1="e2m1"), "q1 must be a Quantizer, got 'e2m1'; write q1=Quantizer"),
        (lambda: Recipe(q6=Recipe()), "q6 must be a Quantizer, got Recipe"),
        (lambda: Recipe(q3=Quantizer), "q3 must be a Quantizer, got <class"),
        (lambda: Recipe(double="direct"), "double must be a bool, got 'direct'"),
        (lambda: Quantizer(enabled="off"), "enabled must be a bool, got 'off'"),
        (lambda: QuantLinear(3, 2, recipe="mxfp4"), "QuantLinear needs a Recipe, got 'mxfp4'; RECIPES"),
        (lambda: QuantLinear(3, 2, recipe=Int4Recipe()), "QuantLinear needs a Recipe, got Int4Recipe"),
        (lambda: Int4Linear(3, 2, recipe=Recipe()), "Int4Linear needs an Int4Recipe, got Recipe"),
    ],
)
def test_something_else_is_refused_where_it_is_passed(build, message):
    with pytest.raises(TypeError, match=message):
        build()


def test_elements_of_table_7():
    derived = Recipe().with_quantizers(FORWARD, element="e3m0").with_quantizers(BACKWARD, element="e2m1")
    assert [getattr(derived, name).element.value for name in QUANTIZERS] == ["e3m0"] * 2 + ["e2m1"] * 4


def test_descriptions_tell_recipes_apart():
    """They are the identity of a checkpoint."""
    recipes = [
        replace(
            Recipe()
            .with_only(names)
            .with_quantizers(BACKWARD, rounding=rounding)
            .with_quantizers(QUANTIZERS, scaling=scaling)
            .with_quantizers(FORWARD, element=element),
            double=double,
        )
        for names in (("q1",), ("q2",), ("q2", "q5"), QUANTIZERS)
        for rounding, double, scaling in TABLE_5
        for element in ("e2m1", "e3m0")
    ]
    recipes += [recipe.with_q_ema(0.9) for recipe in recipes if recipe.q2.enabled] + [Int4Recipe(), Int4Recipe(16)]
    distinct = {
        tuple(q if q.enabled else None for q in (r.q1, r.q2, r.q3, r.q4, r.q5, r.q6)) + (r.double, r.q_ema_beta)
        for r in recipes
        if isinstance(r, Recipe)
    }
    assert len({recipe.describe() for recipe in recipes}) == len(distinct) + 2
    only = Recipe().with_only(("q1", "q2"))
    assert only.describe() == "q1,q2=e2m1/truncation_free/nearest, q3,q4,q5,q6=off, double=True"


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: Recipe().with_only(("q1", "q7")), "one of q1, q2, q3, q4, q5, q6, got 'q7'"),
        (lambda: Recipe().with_quantizers(("w",), scaling="floor"), "got 'w'"),
        (lambda: Recipe().with_q_ema().with_only(("q1",)), "Q-EMA replaces Q2"),
        (lambda: Int4Recipe(hadamard_size=24), "hadamard_size must be a power of two, got 24"),
    ],
)
def test_contradictions_are_refused(make_it, message):
    with pytest.raises(ValueError, match=message):
        make_it()
