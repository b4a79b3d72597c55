"""Every row is a command that main.py takes, and no number of the paper stands here in two versions."""

from __future__ import annotations

import pytest

from options import build_recipe, parse_args
from reproduction.figures import FIGURES
from reproduction.protocols import PROTOCOLS
from reproduction.runs import columns, plan, run_of
from reproduction.targets import TARGETS


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", TARGETS)
def test_every_row_is_a_command_of_main(name, protocol, monkeypatch):
    if PROTOCOLS[protocol].needs_gpu:  # which main.py looks for
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for run in plan([TARGETS[name]], PROTOCOLS[protocol], seeds=1):
        data_path = ["--data-path", "anywhere"] if PROTOCOLS[protocol].data_set != "DIGITS" else []
        args = parse_args([*run.arguments(), *data_path])
        assert args.model == run.setup.model and args.epochs == PROTOCOLS[protocol].epochs
        assert args.track_oscillation == run.tracked
        build_recipe(args)


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


@pytest.mark.parametrize(
    ("table", "label", "model", "number"),
    [
        ("table1", "Q4 (W in dX)", "DeiT-S", 72.79),
        ("table2", "INT4 per tensor (Xi et al. 2023)", "Swin-S", 75.74),
        ("table2", "TetraJet + Q-EMA", "DeiT-B", 77.32),
        ("table4", "+ Freeze (Nagel et al. 2022)", "DeiT-T", 16.45),
        ("table6", "without Q1 and Q2", "DeiT-B", 75.86),
        ("table7", "E3M0, E2M1", "DeiT-T", 54.21),
        ("table9", "beta = 0.995", "DeiT-B", 76.37),
        ("table10", "k1 = 12, k2 = 5", "DeiT-B", 75.60),
    ],
)
def test_numbers_of_the_paper(table, label, model, number):
    assert next(row for row in TARGETS[table].rows if row.label == label).paper[model] == (number,)


def test_runs_are_shared():
    """What tables have in common is trained once, tracked where one of them needs it tracked."""
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
