"""The paper's results: every table with its numbers, every figure, and the options of main.py behind each row.

Numbers: Chen, Xi, Zhu, Chen, "Oscillation-Reduced MXFP4 Training for Vision Transformers", arXiv:2502.20853.
Options hold {names} of `protocols.Tuning`, because the paper tunes them for each model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

DEITS = ("DeiT-T", "DeiT-S", "DeiT-B")
MODELS = (*DEITS, "Swin-T", "Swin-S")

FULL_PRECISION = "--quant none"
MICROSCALING = "--quant microscaling"
TETRAJET = "--quant tetrajet"
DAMPEN = f"{TETRAJET} {{dampen}}"
FREEZE = f"{TETRAJET} {{freeze}}"
OSCI_RESET = f"{TETRAJET} --osci-reset"


def q_ema(beta: float | str = "{q_ema_beta}") -> str:
    return f"{TETRAJET} --q-ema --q-ema-beta {beta}"


def q_ramping(k1: int = 16, k2: int | str = "{q_ramping_k2}") -> str:
    return f"{TETRAJET} --q-ramping --q-ramping-k1 {k1} --q-ramping-k2 {k2} {{q_ramping_detection}}"


Q_EMA, Q_RAMPING = q_ema(), q_ramping()


class Metric(str, Enum):
    """A number that a finished run has. The value is its name in reports."""

    TOP1 = "top-1 %"
    TOP5 = "top-5 %"
    RATE_W = "r(W)"
    """Mean relative change of the weights from step to step (section 4)."""
    RATE_QW = "r(Q2(W))"
    """The same of the quantized weights."""
    RATE_Y = "r(Y)"
    """The same of a block's output on a fixed input."""
    OSCILLATING = "oscillating %"
    """Share of the weights with an oscillation ratio above 16."""
    CONFIDENCE = "confidence"
    """Mean quantization confidence of the weights, from 0 to 1."""

    @property
    def digits(self) -> int:
        """Decimals that a report shows."""
        return 2 if self.value.endswith("%") else 4


@dataclass(frozen=True)
class Row:
    label: str
    options: str
    paper: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """One number for each metric of the table, by model. For a model that is not in it, the paper gives no number."""


@dataclass(frozen=True)
class Target:
    """A table, or a figure if it has no metrics; its rows are the runs that it needs."""

    title: str
    models: tuple[str, ...]
    rows: tuple[Row, ...]
    metrics: tuple[Metric, ...] = ()
    reference: str = "TetraJet"
    """Label of the row from which differences are taken."""
    tracked: bool = False
    """True if its runs need --track-oscillation."""
    note: str = ""


def _rows(models: tuple[str, ...], *rows: tuple) -> tuple[Row, ...]:
    """Rows of a table of one metric: label, options, then the paper's number of each model, None for none."""
    return tuple(
        Row(label, options, {model: (number,) for model, number in zip(models, numbers) if number is not None})
        for label, options, *numbers in rows
    )


def _figure(title: str, curves: dict[str, str], note: str = "") -> Target:
    rows = tuple(Row(label, options) for label, options in curves.items())
    return Target(title, ("DeiT-T",), rows, tracked=True, note=note)


_TOP1 = (Metric.TOP1,)
_BOTH_OFF = f"{TETRAJET} --quantizers q3,q4,q5,q6"
_BACKWARD = {
    ("stochastic", "double", "truncation-free"): (TETRAJET, 59.75, 82.67),
    ("stochastic", "double", "floor"): (f"{TETRAJET} --scaling floor", 59.18, 82.64),
    ("stochastic", "direct", "truncation-free"): (f"{TETRAJET} --backward-operands direct", 56.98, 80.60),
    ("stochastic", "direct", "floor"): (f"{TETRAJET} --backward-operands direct --scaling floor", 57.49, 81.27),
    ("nearest", "double", "truncation-free"): (f"{TETRAJET} --backward-rounding nearest", 58.60, 82.11),
    ("nearest", "double", "floor"): (f"{TETRAJET} --backward-rounding nearest --scaling floor", 59.02, 82.18),
    ("nearest", "direct", "truncation-free"): (
        f"{TETRAJET} --backward-rounding nearest --backward-operands direct",
        58.40,
        81.57,
    ),
    ("nearest", "direct", "floor"): (MICROSCALING, 58.56, 81.92),
}
_PERIODS = {
    **{(16, 3): 75.35, (16, 4): 75.33, (16, 5): 75.62, (16, 6): 74.96, (16, 7): 75.29, (16, 8): 75.13},
    **{(8, 5): 75.19, (12, 5): 75.60, (20, 5): 74.85},
}


def _beta_rows(model: str, tetrajet: float, betas: dict[float, float | None]) -> tuple[Row, ...]:
    rows = ((f"beta = {beta}", q_ema(beta), number) for beta, number in betas.items())
    return _rows((model,), ("TetraJet", TETRAJET, tetrajet), *rows)


TARGETS: dict[str, Target] = {
    "table1": Target(
        "Table 1: one quantizer at a time",
        ("DeiT-T", "DeiT-S"),
        _rows(
            ("DeiT-T", "DeiT-S"),
            ("full precision", FULL_PRECISION, 63.73, 73.33),
            ("Q1 (X in Y)", f"{TETRAJET} --quantizers q1", 61.50, 71.66),
            ("Q2 (W in Y)", f"{TETRAJET} --quantizers q2", 62.77, 72.45),
            ("Q3 (dY in dX)", f"{TETRAJET} --quantizers q3", 63.46, 72.97),
            ("Q4 (W in dX)", f"{TETRAJET} --quantizers q4", 63.37, 72.79),
            ("Q5 (dY in dW)", f"{TETRAJET} --quantizers q5", 63.81, 73.25),
            ("Q6 (X in dW)", f"{TETRAJET} --quantizers q6", 63.78, 73.13),
            ("all six (TetraJet)", TETRAJET, 59.75, 71.03),
        ),
        _TOP1,
        reference="full precision",
        note="The full-precision row is the paper's Table 2.",
    ),
    "table2": Target(
        "Table 2: methods",
        MODELS,
        _rows(
            MODELS,
            ("full precision", FULL_PRECISION, 63.73, 73.33, 75.57, 78.35, 80.44),
            ("INT4 per tensor (Xi et al. 2023)", "--quant int4", 40.14, 60.07, 68.13, 74.22, 75.74),
            ("Microscaling", MICROSCALING, 58.56, 70.10, 74.54, 76.87, 79.45),
            ("TetraJet", TETRAJET, 59.75, 71.03, 74.91, 77.12, 79.51),
            ("TetraJet + Q-EMA", Q_EMA, 60.00, 72.25, 77.32, 77.30, 79.74),
            ("TetraJet + Q-Ramping", Q_RAMPING, 60.31, 71.32, 75.62, 77.33, 79.67),
        ),
        _TOP1,
    ),
    "table3": Target(
        "Table 3: rates of change at the end of training",
        ("DeiT-T",),
        (
            Row("TetraJet", TETRAJET, {"DeiT-T": (0.0045, 0.0401)}),
            Row("TetraJet + Dampen", DAMPEN, {"DeiT-T": (0.0044, 0.0394)}),
            Row("TetraJet + Q-EMA", Q_EMA, {"DeiT-T": (0.0018, 0.0251)}),
            Row("TetraJet + Q-Ramping", Q_RAMPING, {"DeiT-T": (0.0028, 0.0318)}),
        ),
        (Metric.RATE_QW, Metric.RATE_Y),
        tracked=True,
        note="The last epoch's rates in oscillation.csv. The paper's r(Y) is of DeiT-T's block 9.",
    ),
    "table4": Target(
        "Table 4: other ways to reduce oscillation",
        ("DeiT-T", "DeiT-S"),
        _rows(
            ("DeiT-T", "DeiT-S"),
            ("TetraJet", TETRAJET, 59.75, 71.03),
            ("+ Dampen (Nagel et al. 2022)", DAMPEN, 59.75, 70.75),
            ("+ Freeze (Nagel et al. 2022)", FREEZE, 16.45, 22.04),
            ("+ Q-EMA", Q_EMA, 60.00, 72.25),
            ("+ Q-Ramping", Q_RAMPING, 60.31, 71.32),
            ("+ OsciReset (TetraJet-v2, not in the paper)", OSCI_RESET),
        ),
        _TOP1,
        note="The strengths of Dampen and Freeze are Nagel et al.'s own; which ones the paper used was not at hand.",
    ),
    "table5": Target(
        "Table 5: backward rounding, backward operands, scaling",
        ("DeiT-T",),
        tuple(Row(", ".join(parts), options, {"DeiT-T": numbers}) for parts, (options, *numbers) in _BACKWARD.items()),
        (Metric.TOP1, Metric.TOP5),
        reference="stochastic, double, truncation-free",
        note="The first row is TetraJet, the last one Microscaling.",
    ),
    "table6": Target(
        "Table 6: without the quantizers of the forward pass",
        ("DeiT-B",),
        _rows(
            ("DeiT-B",),
            ("TetraJet", TETRAJET, 74.91),
            ("without Q2", f"{TETRAJET} --quantizers q1,q3,q4,q5,q6", 75.16),
            ("without Q1 and Q2", _BOTH_OFF, 75.86),
            ("TetraJet + Q-EMA", Q_EMA, 77.32),
            ("TetraJet + Q-Ramping", Q_RAMPING, 75.62),
        ),
        _TOP1,
    ),
    "table7": Target(
        "Table 7: elements of the forward and the backward pass",
        ("DeiT-T",),
        _rows(
            ("DeiT-T",),
            ("E2M1, E2M1 (TetraJet)", TETRAJET, 59.75),
            ("E2M1, E3M0", f"{TETRAJET} --backward-element e3m0", 58.90),
            ("E3M0, E2M1", f"{TETRAJET} --forward-element e3m0", 54.21),
            ("E3M0, E3M0", f"{TETRAJET} --forward-element e3m0 --backward-element e3m0", 53.72),
        ),
        _TOP1,
        reference="E2M1, E2M1 (TetraJet)",
    ),
    "table8": Target(
        "Table 8: Q-EMA's beta on DeiT-T",
        ("DeiT-T",),
        _beta_rows(
            "DeiT-T",
            59.75,
            {0.993: None, 0.995: None, 0.997: None, 0.998: 59.69, 0.9983: 60.00, 0.999: None, 0.9995: None},
        ),
        _TOP1,
        note="The paper's Table 8 was not at hand: this is Table 9's sweep on DeiT-T, with the two numbers that the "
        "paper gives for it elsewhere, at the default beta and at the tuned one.",
    ),
    "table9": Target(
        "Table 9: Q-EMA's beta on DeiT-B",
        ("DeiT-B",),
        _beta_rows(
            "DeiT-B", 74.91, {0.993: 75.39, 0.995: 76.37, 0.997: 77.23, 0.998: 77.18, 0.999: 77.32, 0.9995: 77.30}
        ),
        _TOP1,
    ),
    "table10": Target(
        "Table 10: Q-Ramping's k1 and k2 on DeiT-B",
        ("DeiT-B",),
        _rows(
            ("DeiT-B",),
            ("TetraJet", TETRAJET, 74.91),
            *((f"k1 = {k1}, k2 = {k2}", q_ramping(k1, k2), number) for (k1, k2), number in _PERIODS.items()),
        ),
        _TOP1,
    ),
    "fig2": _figure(
        "Figure 2: rates of change of W, Q2(W) and Y over training",
        {"full precision": FULL_PRECISION, "TetraJet": TETRAJET},
    ),
    "fig3": _figure("Figure 3: trajectories of oscillating weights", {"TetraJet": TETRAJET}),
    "fig4": _figure("Figure 4: latent weights and quantization confidence", {"TetraJet": TETRAJET}),
    "fig5": _figure(
        "Figure 5: quantization confidence with and without Q-Ramping",
        {"TetraJet": TETRAJET, "TetraJet + Q-Ramping": Q_RAMPING},
    ),
    "fig6": _figure(
        "Figure 6: share of oscillating weights by epoch",
        {
            "TetraJet": TETRAJET,
            "TetraJet + Dampen": DAMPEN,
            "TetraJet + Q-Ramping": Q_RAMPING,
            "TetraJet + Q-EMA": Q_EMA,
        },
    ),
}
