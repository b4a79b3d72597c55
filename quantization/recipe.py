"""A `Recipe` says what each of the six quantizers of a linear layer does, and if it is used."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import groupby

from .formats import Element, Rounding, Scaling

PAPER_BETA = 0.998
"""Q-EMA's decay by default (paper section 5)."""


def _check_type(name: str, value: object, wanted: type) -> None:
    if not isinstance(value, wanted):
        remedy = f"; write {name}=Quantizer(element=..., rounding=...)" if wanted is Quantizer else ""
        raise TypeError(f"{name} must be a {wanted.__name__}, got {value!r}{remedy}")


@dataclass(frozen=True)
class Quantizer:
    """The settings of one of Q1 .. Q6. Strings are accepted for the enums.

    Raises ValueError for an unknown element, scaling or rounding, and TypeError for an `enabled` that is no bool.
    """

    enabled: bool = True
    """If False, the operand passes through in the precision of the matmul."""
    element: Element = Element.E2M1
    scaling: Scaling = Scaling.TRUNCATION_FREE
    rounding: Rounding = Rounding.NEAREST

    def __post_init__(self) -> None:
        _check_type("enabled", self.enabled, bool)
        object.__setattr__(self, "element", Element(self.element))
        object.__setattr__(self, "scaling", Scaling(self.scaling))
        object.__setattr__(self, "rounding", Rounding(self.rounding))

    def describe(self) -> str:
        return f"{self.element.value}/{self.scaling.value}/{self.rounding.value}" if self.enabled else "off"


FORWARD = ("q1", "q2")
BACKWARD = ("q3", "q4", "q5", "q6")
QUANTIZERS = FORWARD + BACKWARD
"""Names of a recipe's quantizers."""

_NEAREST = Quantizer()
_STOCHASTIC = Quantizer(rounding=Rounding.STOCHASTIC)
_OFF = Quantizer(enabled=False)
_MICROSCALING = Quantizer(scaling=Scaling.FLOOR)


@dataclass(frozen=True)
class Recipe:
    """The six quantizers of a linear layer (paper section 3.3). `Recipe()` is TetraJet.

    Raises TypeError for something else than a `Quantizer`, and ValueError for Q-EMA with Q2 off, for a beta outside
    [0, 1), and for EMA rounding set by hand.
    """

    q1: Quantizer = field(default=_NEAREST)
    """X, groups 1x32 along D, for Y."""
    q2: Quantizer = field(default=_NEAREST)
    """W, groups 1x32 along D, for Y."""
    q3: Quantizer = field(default=_STOCHASTIC)
    """dY, groups 1x32 along C, for dX."""
    q4: Quantizer = field(default=_STOCHASTIC)
    """Q2(W), groups 32x1 along C, for dX."""
    q5: Quantizer = field(default=_STOCHASTIC)
    """dY, groups 32x1 along N, for dW."""
    q6: Quantizer = field(default=_STOCHASTIC)
    """Q1(X), groups 32x1 along N, for dW."""
    double: bool = True
    """Double quantization: Q4 and Q6 read Q2(W) and Q1(X). If False, they read W and X themselves."""
    q_ema_beta: float | None = None
    """Decay of the weights' moving average if Q-EMA rounds them in Q2 (paper section 5), None for plain Q2."""

    def __post_init__(self) -> None:
        for name in QUANTIZERS:
            _check_type(name, getattr(self, name), Quantizer)
        _check_type("double", self.double, bool)
        for name in QUANTIZERS:
            if getattr(self, name).rounding is Rounding.EMA:
                raise ValueError(f"EMA rounding belongs to Q2 alone, got it for {name}; set q_ema_beta instead")
        if self.q_ema_beta is not None:
            if not 0 <= self.q_ema_beta < 1:
                raise ValueError(f"q_ema_beta must lie in [0, 1), got {self.q_ema_beta}")
            if not self.q2.enabled:
                raise ValueError("Q-EMA replaces Q2, which this recipe switches off; enable q2 or drop q_ema_beta")

    @property
    def quantizes(self) -> bool:
        """False if every quantizer is off, so that the layer is an ordinary linear layer."""
        return any(getattr(self, name).enabled for name in QUANTIZERS)

    def with_q_ema(self, beta: float = PAPER_BETA) -> Recipe:
        """This recipe with Q-EMA in Q2."""
        return replace(self, q_ema_beta=beta)

    def with_quantizers(self, names: Iterable[str], **changes) -> Recipe:
        """This recipe with fields of the named quantizers changed: `with_quantizers(BACKWARD, rounding="nearest")`.

        Raises ValueError for a name that is not one of q1 .. q6.
        """
        return replace(self, **{name: replace(getattr(self, name), **changes) for name in _checked(names)})

    def with_only(self, names: Iterable[str]) -> Recipe:
        """This recipe with only the named quantizers on (paper Tables 1 and 6).

        Raises ValueError for a name that is not one of q1 .. q6, and if Q2 would be off with Q-EMA on.
        """
        return self.with_quantizers(set(QUANTIZERS) - set(_checked(names)), enabled=False)

    def describe(self) -> str:
        """One line: the recipe's name, or what its quantizers do if it has none."""
        plain = replace(self, q_ema_beta=None)
        text = next((name for name, recipe in RECIPES.items() if recipe == plain and name != "mxfp4"), None)
        if text is None:
            runs = groupby(QUANTIZERS, key=lambda name: getattr(self, name).describe())
            text = ", ".join((*(f"{','.join(names)}={what}" for what, names in runs), f"double={self.double}"))
        return text if self.q_ema_beta is None else f"{text}, q_ema_beta={self.q_ema_beta}"


def _checked(names: Iterable[str]) -> tuple[str, ...]:
    names = tuple(names)
    unknown = [name for name in names if name not in QUANTIZERS]
    if unknown:
        raise ValueError(f"a quantizer is one of {', '.join(QUANTIZERS)}, got {unknown[0]!r}")
    return names


@dataclass(frozen=True)
class Int4Recipe:
    """INT4 per tensor of Xi et al. 2023 (arXiv 2306.11987), the paper's other baseline: see `baselines/int4.py`.

    Raises ValueError for a block size that is not a power of two.
    """

    hadamard_size: int = 32
    """Largest block of the Hadamard transform; 1 for none."""
    sampling: bool = True
    """Leverage-score sampling of half the rows of the split gradients. False keeps all rows."""

    def __post_init__(self) -> None:
        if self.hadamard_size < 1 or self.hadamard_size & (self.hadamard_size - 1):
            raise ValueError(f"hadamard_size must be a power of two, got {self.hadamard_size}")

    @property
    def quantizes(self) -> bool:
        return True

    def describe(self) -> str:
        """One line."""
        return f"int4, hadamard_size={self.hadamard_size}, sampling={self.sampling}"


_LAYERS: dict[type, type] = {}


def layer_for(recipe_class: type) -> Callable[[type], type]:
    """Class decorator: `swap_linears` builds the decorated layer for recipes of `recipe_class`, by its `from_linear`.

    So a baseline brings its own layer, and neither it nor the MX layer imports the other.
    """

    def register(layer: type) -> type:
        _LAYERS[recipe_class] = layer
        return layer

    return register


def layer_class(recipe: Recipe | Int4Recipe) -> type:
    """The layer that was registered for the class of `recipe`. Raises TypeError if there is none."""
    for recipe_class, layer in _LAYERS.items():
        if isinstance(recipe, recipe_class):
            return layer
    known = " or ".join(sorted(recipe_class.__name__ for recipe_class in _LAYERS))
    raise TypeError(f"a recipe must be of the class {known}, got {recipe!r}; RECIPES holds the named ones")


def is_quantized_layer(module: object) -> bool:
    """Tell if `module` is a layer that `swap_linears` puts into a model, of any class of recipes."""
    return isinstance(module, tuple(_LAYERS.values()))


_TETRAJET = Recipe()

RECIPES: dict[str, Recipe | Int4Recipe] = {
    "none": Recipe(*[_OFF] * 6),
    "mxfp4": _TETRAJET,
    "tetrajet": _TETRAJET,
    "microscaling": Recipe(*[_MICROSCALING] * 6, double=False),
    "int4": Int4Recipe(),
}
"""Named recipes. `mxfp4` and `tetrajet` are one recipe; `microscaling` is the paper's baseline (Eq. 6-7): floor
scaling, nearest rounding also in the backward pass, and Q4 and Q6 that read W and X; `int4` is its INT4 baseline."""


def changed_recipe(
    name: str,
    quantizers: Iterable[str] | None = None,
    backward_rounding: str | None = None,
    backward_operands: str | None = None,
    scaling: str | None = None,
    forward_element: str | None = None,
    backward_element: str | None = None,
) -> Recipe | Int4Recipe:
    """The recipe of this name, with the changes that the options of main.py of these names ask for.

    None leaves what the recipe has; INT4's has nothing that can be changed.
    """
    recipe = RECIPES[name]
    if isinstance(recipe, Int4Recipe):
        return recipe
    if quantizers is not None:
        recipe = recipe.with_only(quantizers)
    if backward_operands is not None:
        recipe = replace(recipe, double=backward_operands == "double")
    for names, change, value in (
        (BACKWARD, "rounding", backward_rounding),
        (QUANTIZERS, "scaling", scaling),
        (FORWARD, "element", forward_element),
        (BACKWARD, "element", backward_element),
    ):
        if value is not None:
            recipe = recipe.with_quantizers(names, **{change: value})
    return recipe


RECIPE_CHANGES = tuple(inspect.signature(changed_recipe).parameters)[1:]
"""The options of main.py that change a recipe."""
