"""Every row is a command that main.py takes, and no number of the paper stands here in two versions."""

from __future__ import annotations

import pytest

from datasets import DATA_SETS
from quantization import QUANTIZERS
from reproduction.figures import FIGURES
from reproduction.protocols import PROTOCOLS
from reproduction.runs import columns, plan, run_of
from reproduction.targets import TARGETS
from training.options import parse_args
from training.setup import build_recipe


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", TARGETS)
def test_every_row_is_a_command_of_main(name, protocol, monkeypatch):
    if PROTOCOLS[protocol].needs_gpu:  # which main.py looks for
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for run in plan([TARGETS[name]], PROTOCOLS[protocol], seeds=1):
        data_path = ["--data-path", "anywhere"] if DATA_SETS[PROTOCOLS[protocol].data_set].needs_path else []
        options = parse_args([*run.arguments(), *data_path])
        assert options.model.model == run.setup.model and options.training.epochs == PROTOCOLS[protocol].epochs
        assert options.precision.track_oscillation == run.tracked
        build_recipe(options.precision)


def test_rows_of_a_table_differ_and_so_do_their_recipes():
    for target in TARGETS.values():
        for setup in columns(target, PROTOCOLS["imagenet"]).values():
            runs = [run_of(target, row, setup, PROTOCOLS["imagenet"]) for row in target.rows]
            assert len(set(runs)) == len({row.label for row in target.rows}) == len(target.rows), target.title


def test_tables_are_whole():
    assert list(TARGETS) == [f"table{n}" for n in range(1, 11)] + [f"fig{n}" for n in range(2, 7)]
    for target in TARGETS.values():
        if target.metrics:
            assert target.reference in {row.label for row in target.rows}
        for row in target.rows:
            assert row.paper.keys() <= set(target.models)
            assert all(len(numbers) == len(target.metrics) for numbers in row.paper.values())


def test_figures_have_their_drawings():
    assert {name for name, target in TARGETS.items() if not target.metrics} == set(FIGURES)
    assert all(target.tracked for target in TARGETS.values() if not target.metrics)


def test_one_configuration_has_one_number_in_the_whole_paper():
    """TetraJet on DeiT-T stands in six tables; Table 9's best beta and Table 10's k1 = 16, k2 = 5 in Table 2 too."""
    numbers: dict = {}
    for target in TARGETS.values():
        for model, setup in columns(target, PROTOCOLS["imagenet"]).items():
            for row in target.rows:
                configuration = run_of(target, row, setup, PROTOCOLS["imagenet"]).configuration
                for metric, number in zip(target.metrics, row.paper.get(model, ())):
                    numbers.setdefault((configuration, metric), []).append(number)
    assert {len(set(found)) for found in numbers.values()} == {1}
    shared = [found for found in numbers.values() if len(found) > 1]
    assert len(shared) == 12 and max(len(found) for found in shared) == 6


# The paper's tables once more: a row's label up to its first "(" and the numbers, model by model, metric by metric.
PAPER = """
table1 full precision 63.73 73.33
table1 Q1 61.50 71.66
table1 Q2 62.77 72.45
table1 Q3 63.46 72.97
table1 Q4 63.37 72.79
table1 Q5 63.81 73.25
table1 Q6 63.78 73.13
table1 all six 59.75 71.03
table2 full precision 63.73 73.33 75.57 78.35 80.44
table2 INT4 per tensor 40.14 60.07 68.13 74.22 75.74
table2 Microscaling 58.56 70.10 74.54 76.87 79.45
table2 TetraJet 59.75 71.03 74.91 77.12 79.51
table2 TetraJet + Q-EMA 60.00 72.25 77.32 77.30 79.74
table2 TetraJet + Q-Ramping 60.31 71.32 75.62 77.33 79.67
table3 TetraJet 0.0045 0.0401
table3 TetraJet + Dampen 0.0044 0.0394
table3 TetraJet + Q-EMA 0.0018 0.0251
table3 TetraJet + Q-Ramping 0.0028 0.0318
table4 TetraJet 59.75 71.03
table4 + Dampen 59.75 70.75
table4 + Freeze 16.45 22.04
table4 + Q-EMA 60.00 72.25
table4 + Q-Ramping 60.31 71.32
table4 + OsciReset
table5 stochastic, double, truncation-free 59.75 82.67
table5 stochastic, double, floor 59.18 82.64
table5 stochastic, direct, truncation-free 56.98 80.60
table5 stochastic, direct, floor 57.49 81.27
table5 nearest, double, truncation-free 58.60 82.11
table5 nearest, double, floor 59.02 82.18
table5 nearest, direct, truncation-free 58.40 81.57
table5 nearest, direct, floor 58.56 81.92
table6 TetraJet 74.91
table6 without Q2 75.16
table6 without Q1 and Q2 75.86
table6 TetraJet + Q-EMA 77.32
table6 TetraJet + Q-Ramping 75.62
table7 E2M1, E2M1 59.75
table7 E2M1, E3M0 58.90
table7 E3M0, E2M1 54.21
table7 E3M0, E3M0 53.72
table8 TetraJet 59.75
table8 beta = 0.993
table8 beta = 0.995
table8 beta = 0.997
table8 beta = 0.998 59.69
table8 beta = 0.9983 60.00
table8 beta = 0.999
table8 beta = 0.9995
table9 TetraJet 74.91
table9 beta = 0.993 75.39
table9 beta = 0.995 76.37
table9 beta = 0.997 77.23
table9 beta = 0.998 77.18
table9 beta = 0.999 77.32
table9 beta = 0.9995 77.30
table10 TetraJet 74.91
table10 k1 = 16, k2 = 3 75.35
table10 k1 = 16, k2 = 4 75.33
table10 k1 = 16, k2 = 5 75.62
table10 k1 = 16, k2 = 6 74.96
table10 k1 = 16, k2 = 7 75.29
table10 k1 = 16, k2 = 8 75.13
table10 k1 = 8, k2 = 5 75.19
table10 k1 = 12, k2 = 5 75.60
table10 k1 = 20, k2 = 5 74.85
"""


def test_numbers_of_the_paper():
    lines = []
    for name, target in TARGETS.items():
        for row in target.rows if target.metrics else ():
            digits = target.metrics[0].digits
            numbers = (f" {number:.{digits}f}" for model in target.models for number in row.paper.get(model, ()))
            lines.append(f"{name} {row.label.partition(' (')[0]}" + "".join(numbers))
    assert lines == PAPER.strip().splitlines()


def test_labels_of_ablations_are_their_recipes():
    """The label of a row names the quantizers that the row leaves out, or the element that it gives them."""

    def recipe_of(table: str, label: str):
        target = TARGETS[table]
        row = next(row for row in target.rows if row.label.partition(" (")[0] == label)
        model, setup = next(iter(columns(target, PROTOCOLS["smoke"]).items()))
        return build_recipe(parse_args(run_of(target, row, setup, PROTOCOLS["smoke"]).arguments()).precision)

    def enabled(table: str, label: str) -> set[str]:
        recipe = recipe_of(table, label)
        return {name for name in QUANTIZERS if getattr(recipe, name).enabled}

    for name in QUANTIZERS:
        assert enabled("table1", name.upper()) == {name}
    assert enabled("table1", "full precision") == set() and enabled("table1", "all six") == set(QUANTIZERS)
    assert enabled("table6", "without Q2") == set(QUANTIZERS) - {"q2"}
    assert enabled("table6", "without Q1 and Q2") == set(QUANTIZERS) - {"q1", "q2"}
    for forward in ("E2M1", "E3M0"):
        for backward in ("E2M1", "E3M0"):
            recipe = recipe_of("table7", f"{forward}, {backward}")
            elements = [getattr(recipe, name).element.value.upper() for name in QUANTIZERS]
            assert elements == [forward] * 2 + [backward] * 4
    for rounding in ("stochastic", "nearest"):
        for operands in ("double", "direct"):
            for scaling in ("truncation-free", "floor"):
                recipe = recipe_of("table5", f"{rounding}, {operands}, {scaling}")
                assert recipe.double == (operands == "double")
                assert {getattr(recipe, name).scaling.value for name in QUANTIZERS} == {scaling.replace("-", "_")}
                roundings = [getattr(recipe, name).rounding.value for name in QUANTIZERS]
                assert roundings == ["nearest"] * 2 + [rounding] * 4


@pytest.mark.parametrize(
    ("model", "name", "global_batch", "lr", "beta", "k2"),
    [
        ("DeiT-T", "deit_tiny_patch16_224", 1024, 5e-4, "0.9983", "5"),
        ("DeiT-S", "deit_small_patch16_224", 1024, 5e-4, "0.9972", "5"),
        ("DeiT-B", "deit_base_patch16_224", 512, 2.5e-4, "0.999", "5"),
        ("Swin-T", "swin_tiny_patch4_window7_224", 1024, 5e-4, "0.9975", "3"),
        ("Swin-S", "swin_small_patch4_window7_224", 1024, 5e-4, "0.998", "4"),
    ],
)
def test_the_papers_hyperparameters(model, name, global_batch, lr, beta, k2):
    """The settings of the paper's appendix: batch, learning rate, and the tuning of Q-EMA and Q-Ramping."""
    protocol, table = PROTOCOLS["imagenet"], TARGETS["table2"]
    setup = protocol.setups[model]
    assert (setup.model, setup.global_batch, setup.lr, protocol.epochs) == (name, global_batch, lr, 90)
    q_ema, q_ramping = (
        parse_args([*run_of(table, row, setup, protocol).options, "--device", "cpu"]).remedies
        for row in table.rows
        if row.label in ("TetraJet + Q-EMA", "TetraJet + Q-Ramping")
    )
    assert q_ema.q_ema and str(q_ema.q_ema_beta) == beta
    assert q_ramping.q_ramping and (q_ramping.q_ramping_k1, str(q_ramping.q_ramping_k2)) == (16, k2)
    assert q_ramping.q_ramping_steps == 30


def test_runs_are_shared():
    """A run that several tables share is trained once, and tracked if one of them needs it tracked."""
    smoke = PROTOCOLS["smoke"]
    runs = plan(list(TARGETS.values()), smoke, seeds=2)
    assert len(runs) == len(set(runs)) == len({run.name for run in runs})
    assert len({(run.configuration, run.seed) for run in runs}) == len(runs)
    assert [run.seed for run in runs] == [0] * (len(runs) // 2) + [1] * (len(runs) // 2)
    both = plan([TARGETS["table2"], TARGETS["table3"]], smoke, seeds=1)
    tracked = {run.options for run in both if run.tracked}
    assert len(both) == 7 and len(tracked) == 4 and ("--quant", "none") not in tracked


def test_models_with_one_setup_share_a_column():
    assert list(columns(TARGETS["table2"], PROTOCOLS["small"])) == ["DeiT-T"]
    assert list(columns(TARGETS["table6"], PROTOCOLS["small"])) == ["DeiT-B"]
    assert list(columns(TARGETS["table2"], PROTOCOLS["imagenet"])) == list(TARGETS["table2"].models)
