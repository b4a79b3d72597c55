"""The paper's claims, each as a difference between rows of its tables, and the verdict of our seeds on each."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from scipy.stats import t as student

from reproduction.targets import TARGETS, Metric

LEAST_SEEDS = 3
LEVEL = 0.95
NO_GAIN = 0.25
"""Points of top-1: the smallest gain that the paper's Table 2 reports for one of its own methods on DeiT-T."""
LEAST_GAP = 5
"""Standard errors by which full precision must be ahead of Microscaling in a protocol that compares methods."""

RULE = (
    "A claim says that a difference is above 0 or, where it gives a number, below that. It holds if the two-sided "
    f"{100 * LEVEL:.0f} % interval of Student's t around our mean lies on that side as a whole, and does not hold if "
    f"it lies on the other; otherwise, and with fewer than {LEAST_SEEDS} seeds, it cannot be told. Each claim is "
    "judged by itself: of 20 differences that are none, about one seems to be told. Ours: differences seed by seed, "
    "over the seeds that all rows of the claim have, mean +- sample standard deviation over n seeds."
)


@dataclass(frozen=True)
class Claim:
    """The claim that the mean over rows `more` of a target is above the mean over rows `less`."""

    text: str
    target: str
    more: tuple[str, ...]
    less: tuple[str, ...]
    metric: Metric = Metric.TOP1
    less_metric: Metric | None = None
    """The metric of the rows `less`, if it is not `metric`."""
    below: float | None = None
    """If given, the claim is that the difference is less than this."""

    @property
    def terms(self) -> tuple[list[tuple[str, Metric]], list[tuple[str, Metric]]]:
        less_metric = self.less_metric or self.metric
        return [(label, self.metric) for label in self.more], [(label, less_metric) for label in self.less]

    def paper(self, model: str) -> float | None:
        """The paper's difference, if it gives the numbers."""
        target = TARGETS[self.target]
        numbers = {
            (row.label, metric): number
            for row in target.rows
            for metric, number in zip(target.metrics, row.paper.get(model, ()))
        }
        if not all(term in numbers for side in self.terms for term in side):
            return None
        return _difference(self.terms, lambda *term: numbers[term])

    def ours(self, values: Callable[[str, Metric], dict[int, float]]) -> list[float]:
        """The difference for each seed that all of its rows have; `values` gives a row's numbers by seed."""
        by_seed = {term: values(*term) for side in self.terms for term in side}
        common = sorted(set.intersection(*(set(numbers) for numbers in by_seed.values())))
        return [_difference(self.terms, lambda *term, seed=seed: by_seed[term][seed]) for seed in common]

    def verdict(self, differences: list[float]) -> str:
        if len(differences) < LEAST_SEEDS:
            return f"cannot be told, n < {LEAST_SEEDS}" if differences else "not run"
        distance = statistics.fmean(differences) - (self.below or 0)
        if self.below is not None:
            distance = -distance
        half = student.ppf((1 + LEVEL) / 2, len(differences) - 1) * standard_error(differences)
        if abs(distance) <= half:
            return "cannot be told"
        return "holds" if distance > 0 else "does not hold"


def _difference(terms: tuple[list, list], value: Callable[[str, Metric], float]) -> float:
    more, less = (statistics.fmean(value(*term) for term in side) for side in terms)
    return more - less


def standard_error(numbers: list[float]) -> float:
    """The standard error of the mean of two numbers or more."""
    return statistics.stdev(numbers) / math.sqrt(len(numbers))


def gap(ahead: list[float], behind: list[float]) -> tuple[float, float]:
    """The difference of the means, and how many of its standard errors that is. Each list has two numbers or more."""
    difference = statistics.fmean(ahead) - statistics.fmean(behind)
    error = math.hypot(standard_error(ahead), standard_error(behind))
    return difference, difference / error if error else math.copysign(math.inf, difference)


_TETRAJET, _FULL = ("TetraJet",), ("full precision",)
_Q_EMA, _Q_RAMPING, _DAMPEN = ("TetraJet + Q-EMA",), ("TetraJet + Q-Ramping",), ("TetraJet + Dampen",)
_BASE, _E2M1 = ("stochastic, double, truncation-free",), ("E2M1, E2M1 (TetraJet)",)
_FORWARD = ("Q1 (X in Y)", "Q2 (W in Y)")
_BACKWARD = ("Q3 (dY in dX)", "Q4 (W in dX)", "Q5 (dY in dW)", "Q6 (X in dW)")
_STILL = "ends with calmer quantized weights than TetraJet"

CLAIMS = (
    Claim("Full precision is ahead of Microscaling", "table2", _FULL, ("Microscaling",)),
    Claim("Full precision is ahead of TetraJet", "table2", _FULL, _TETRAJET),
    Claim("TetraJet is ahead of Microscaling", "table2", _TETRAJET, ("Microscaling",)),
    Claim("TetraJet is ahead of INT4 per tensor", "table2", _TETRAJET, ("INT4 per tensor (Xi et al. 2023)",)),
    Claim("Q-EMA gains on TetraJet", "table2", _Q_EMA, _TETRAJET),
    Claim("Q-Ramping gains on TetraJet", "table2", _Q_RAMPING, _TETRAJET),
    Claim("Q1 and Q2 cost more, on average, than Q3 to Q6", "table1", _BACKWARD, _FORWARD),
    Claim(
        f"Dampen gains nothing: less than {NO_GAIN} points",
        "table4",
        ("+ Dampen (Nagel et al. 2022)",),
        _TETRAJET,
        below=NO_GAIN,
    ),
    Claim("Freeze loses to TetraJet", "table4", _TETRAJET, ("+ Freeze (Nagel et al. 2022)",)),
    Claim("Stochastic backward rounding beats nearest", "table5", _BASE, ("nearest, double, truncation-free",)),
    Claim("Double quantization beats direct", "table5", _BASE, ("stochastic, direct, truncation-free",)),
    Claim("Truncation-free scaling beats floor", "table5", _BASE, ("stochastic, double, floor",)),
    Claim("Without Q2 accuracy is higher", "table6", ("without Q2",), _TETRAJET),
    Claim("Without Q1 and Q2 accuracy is higher", "table6", ("without Q1 and Q2",), _TETRAJET),
    Claim("E2M1 beats E3M0 in the forward pass", "table7", _E2M1, ("E3M0, E2M1",)),
    Claim("E2M1 beats E3M0 in the backward pass", "table7", _E2M1, ("E2M1, E3M0",)),
    Claim(
        "Quantized weights keep changing where weights come to rest",
        "fig2",
        _TETRAJET,
        _TETRAJET,
        Metric.RATE_QW,
        Metric.RATE_W,
    ),
    Claim("Outputs change more than in full precision", "fig2", _TETRAJET, _FULL, Metric.RATE_Y),
    Claim(f"Q-EMA {_STILL}", "table3", _TETRAJET, _Q_EMA, Metric.RATE_QW),
    Claim(f"Q-Ramping {_STILL}", "table3", _TETRAJET, _Q_RAMPING, Metric.RATE_QW),
    Claim("Q-EMA calms quantized weights more than Q-Ramping", "table3", _Q_RAMPING, _Q_EMA, Metric.RATE_QW),
    Claim("Dampen calms quantized weights less than Q-Ramping", "table3", _DAMPEN, _Q_RAMPING, Metric.RATE_QW),
    Claim("Q-EMA ends with calmer outputs than TetraJet", "table3", _TETRAJET, _Q_EMA, Metric.RATE_Y),
    Claim("Q-Ramping ends with calmer outputs than TetraJet", "table3", _TETRAJET, _Q_RAMPING, Metric.RATE_Y),
    Claim("Q-Ramping raises quantization confidence", "fig5", _Q_RAMPING, _TETRAJET, Metric.CONFIDENCE),
    Claim("Fewer weights oscillate with Q-EMA", "fig6", _TETRAJET, _Q_EMA, Metric.OSCILLATING),
    Claim("Fewer weights oscillate with Q-Ramping", "fig6", _TETRAJET, _Q_RAMPING, Metric.OSCILLATING),
    Claim("Q-EMA leaves fewer oscillating than Q-Ramping", "fig6", _Q_RAMPING, _Q_EMA, Metric.OSCILLATING),
)
