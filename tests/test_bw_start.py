"""--bw_start and --bw_end: what task and p_bw say in between, forward only outside; what is compared with what."""

import itertools
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from test_plot_results import P5, plant
from test_step import training
from tiny import corpus, flags  # noqa: F401

import compare
import merge
import plot_results
import runs
import train
from cells import BUDGETS, BW_ONLY, FW_ONLY, Variant, choose, load
from data.tokens import DataError
from drawing import Options, new_figure, variant_colours
from measures import Scope, end_over_first_epoch, learned_backward
from plot_tradeoff import _values
from recipe import Settings, resolve
from report import alarms


def steps(run, count: int) -> list[torch.Tensor]:
    """The weights after each of so many steps."""
    return [(run.step(), torch.cat([p.detach().flatten() for p in run.model.parameters()]))[1] for _ in range(count)]


@pytest.mark.parametrize("task, budget", [("fw+bw", "tokens_fw"), *itertools.product(("fw+bw", "fw-or-bw"), ("steps", "tokens", "epochs"))])
def test_until_then_the_run_is_that_of_p_bw_0_bit_for_bit(corpus, task, budget):  # noqa: F811
    tokens = 8 * 128  # eight forward steps of the tiny model
    end = {"steps": 8, "tokens": tokens, "tokens_fw": tokens, "epochs": tokens / len(training(corpus).train_tokens)}[budget]
    late, control = (training(corpus, **({"steps": None} | {budget: end}), task=task, p_bw=p_bw, bw_start=0.5) for p_bw in (1.0, 0.0))
    for ours, theirs in zip(steps(late, 4), steps(control, 4)):
        assert torch.equal(ours, theirs)
    assert late.progress.tokens_bw == 0 and late.share_done() == 0.5
    assert not torch.equal(*(steps(run, 1)[0] for run in (late, control)))
    assert late.progress.tokens_bw == 128 and late.progress.tokens_fw == (5 if task == "fw+bw" else 4) * 128


def test_a_later_start_learns_backward_what_an_earlier_one_learns_from_then_on(corpus):  # noqa: F811
    def backward(**settings):
        run, seen = training(corpus, steps=400, p_bw=0.3, **settings), []
        for run.progress.step in range(400):
            run.progress.micro_step = run.progress.step
            seen.append("bw" in run.directions())
        return seen

    always, late, between = backward(), backward(bw_start=0.25), backward(bw_start=0.25, bw_end=0.5)
    assert 90 < sum(always) < 150 and late == [False] * 100 + always[100:] and between == late[:200] + [False] * 200


def test_a_run_killed_before_it_starts_resumes_bit_for_bit(corpus, tmp_path):  # noqa: F811
    """The share of the run that is done comes from what is saved."""
    whole, half = (training(corpus, p_bw=1.0, bw_start=0.6, steps=10) for _ in range(2))
    after = steps(whole, 10)[-1]
    steps(half, 5)
    (tmp_path / "state.pt").write_bytes(half.state())
    again = training(corpus, p_bw=1.0, bw_start=0.6, steps=10)
    again.restore(tmp_path / "state.pt")
    assert torch.equal(steps(again, 5)[-1], after) and again.progress.tokens_bw == 4 * 128


def test_runs_that_learn_one_direction_have_no_start_and_so_one_control_serves_a_grid(corpus, tmp_path):  # noqa: F811
    alone = [{"task": "fw"}, {"task": "bw"}, {"p_bw": 0.0}, {"task": "fw-or-bw", "p_bw": 0.0}]
    assert {(some.bw_start, some.bw_end) for some in (resolve(Settings(bw_start=0.5, bw_end=0.6, **some)) for some in alone)} == {(0.0, 1.0)}
    assert {resolve(Settings(bw_start=0.5, **some)).bw_start for some in ({}, {"task": "adaptive"}, {"task": "fw-or-bw", "p_bw": 1.0})} == {0.5}
    train.main([*flags(corpus, tmp_path), "--p_bw", "0", "1", "--bw_start", "0", "0.5", "--steps", "4"])
    found = runs.read_study(tmp_path)
    assert sorted((run["p_bw"], run["bw_start"], run.curve.tokens_bw.iloc[-1] / run.curve.tokens_fw.iloc[-1]) for run in found) == [(0, 0, 0), (1, 0, 1), (1, 0.5, 0.5)]
    assert sorted(map(runs.trained_on, (run.folder for run in found))) == ["p_bw = 0", "p_bw = 1", "p_bw = 1 with bw_start = 0.5"]
    assert sorted(runs.read_run(b)["bw_start"] for _, b in merge.pairs(tmp_path, (0.0, 1.0))) == [0, 0.5]


UNTRAINED = 13.0
MIDDLE = Variant("fw+bw", 1.0, bw_start=0.5, bw_end=0.75)
LATE, LAST = Variant("fw+bw", 1.0, bw_start=0.9), Variant("fw-or-bw", 1.0, bw_start=0.95)


def plant_starts(study) -> None:
    """Runs from before there was such a setting, and two that start late, with a curve that says so; one control."""
    for seed in range(3):
        plant(study, seed=seed, fw=2.0)
        plant(study, seed=seed, fw=2.5, bw=5.0, p_bw=0.05)
        plant(study, seed=seed, fw=9.0, bw=2.5, task="bw", p_bw=1.0)
        for variant, fw, bw in ((LATE, 2.2, 2.75), (LAST, 4.0, 2.6), (MIDDLE, 2.05, 3.0)):
            folder = plant(study, seed=seed, fw=fw, bw=bw, p_bw=1.0, task=variant.task, bw_start=variant.bw_start, bw_end=variant.bw_end)
            table = pd.read_csv(folder / "curve.csv")
            end = table.tokens_total.max()
            late = (table.tokens_total - variant.bw_start * end).clip(lower=0, upper=(variant.bw_end - variant.bw_start) * end)
            table["tokens_bw"] = late / 2 if variant.task == "fw+bw" else late
            table["tokens_fw"] = table.tokens_total - table.tokens_bw
            table["tokens_unique"] = table.tokens_fw + (table.tokens_bw if variant.task == "fw-or-bw" else 0)
            table.loc[table.tokens_bw == 0, ["bw_loss", "bw_ppl"]] = UNTRAINED, np.exp(UNTRAINED)
            table.to_csv(folder / "curve.csv", index=False)


def test_a_start_is_a_variant_of_its_own_with_the_same_control(tmp_path):
    plant_starts(tmp_path)
    study = load(tmp_path)
    (by,) = study.cells.values()
    assert list(by) == [FW_ONLY, P5, BW_ONLY, MIDDLE, LATE, LAST]
    assert choose(study) == P5 and choose(study, bw_start=0.9) == choose(study, 1.0) == LATE and choose(study, bw_end=0.75) == MIDDLE and choose(study, task="fw-or-bw") == LAST
    assert choose(study, bw_start=0.3) is None and "bw_start = 0.3" in study.notes[-1]
    (terms,) = compare.ratio1(study, LATE).values()
    assert len(terms) == 3 and compare.final_ratio(terms, compare.ORDERS[0]) == pytest.approx(2 / 2.2)
    assert MIDDLE.label == "p_bw = 1 with bw_start = 0.5 and bw_end = 0.75"
    assert (LATE.label, LAST.label) == ("p_bw = 1 with bw_start = 0.9", "fw or bw at p_bw = 1 with bw_start = 0.95")
    assert alarms(study) == [], "a model that has learned bw last may be better at it"


@pytest.mark.parametrize("options", [["--budget", "tokens_fw"], ["--bw_start", "0.9"]])
def test_every_figure_is_drawn_of_runs_that_have_no_backward_token_for_long(tmp_path, options, recwarn):
    plant_starts(tmp_path)
    paths = plot_results.main([str(tmp_path), *options])
    assert all(any(path.name.startswith(name) for path in paths) for name in ("own_tokens", "pareto", "curves"))
    assert not [str(warning.message) for warning in recwarn if issubclass(warning.category, RuntimeWarning)]
    plot_results.main([str(tmp_path), "--report"])
    text = (tmp_path / "README.md").read_text()
    assert f"| {LATE.label} | 0, 1, 2 | 2.2000 ± 0.0000" in text
    assert (f"plot_results.py {tmp_path} --bw_start 0.9\n" in text) == (options == ["--bw_start", "0.9"])
    paths = plot_results.main([str(tmp_path), "--figure", "ratio1_training", "--p_bw", "1", "--task", "fw-or-bw", "--bw_start", "0.95"])
    plot_results.main([str(tmp_path), "--report"])
    text = (tmp_path / "README.md").read_text()
    assert f"plot_results.py {tmp_path} --p_bw 1 --task fw-or-bw --bw_start 0.95\n" in text


def test_losses_from_before_bw_began_are_no_result_of_it(tmp_path):
    """Not in the panel of bw losses, nor a point of the sweep where a shorter run ends."""
    plant_starts(tmp_path)
    study = load(tmp_path)
    (by,) = study.cells.values()
    figure, axes = new_figure(1, 1, (4, 4))
    plot_results._curves_panel(axes[0, 0], by, "bw_loss", Options(), "linear", None, variant_colours(study))
    drawn = {line.get_ydata().max() for line in axes[0, 0].get_lines()}
    assert axes[0, 0].get_ylim()[1] < UNTRAINED and UNTRAINED not in drawn and len(drawn) > 3
    plt.close(figure)
    run = by[LATE][0]
    for budget, end in (("steps", 600), ("tokens_fw", 6e6)):
        value = _values({LATE: {0: replace(run, curve=run.curve[run.curve[BUDGETS[budget]] <= end])}}, budget)
        assert np.isnan(value(run, "bw_loss")) and np.isfinite(value(run, "fw_loss"))
    assert _values(by, "tokens")(run, "bw_loss") == 2.75


def test_a_late_start_does_not_speak_for_training_from_the_start(tmp_path):
    """The leak shows in what was trained most; what happens from the first epoch to the end is p_bw = 0 at first."""
    for seed in range(3):
        plant(tmp_path, seed=seed, floor=1.0, fw=2.0, bw_mask="flipped")
        plant(tmp_path, seed=seed, floor=1.0, bw=0.1, p_bw=1.0, bw_mask="flipped")
        plant(tmp_path, seed=seed, floor=1.0, bw=3.0, p_bw=1.0, bw_mask="flipped", bw_start=0.9)
    study = load(tmp_path)
    (group,) = study.groups
    assert list(learned_backward(Scope(study, Variant("fw+bw", 1.0), group))) == ["2 x 64, p_bw = 1"]
    over_training = end_over_first_epoch(compare.ratio1)
    assert over_training(Scope(study, Variant("fw+bw", 1.0), group)) and not over_training(Scope(study, LATE, group))


def test_a_run_that_ends_before_it_starts_is_refused_or_left_out(tmp_path):
    for start, end in ((0.95, 1), (0.05, 0.1)):
        with pytest.raises(DataError, match=f"no step of --steps 10 is between --bw_start {start} and --bw_end {end}"):
            resolve(Settings(steps=10, bw_start=start, bw_end=end))
    with pytest.raises(DataError, match="--bw_start must be before --bw_end = 0.5, got 0.5"):
        resolve(Settings(bw_start=0.5, bw_end=0.5))
    assert resolve(Settings(steps=10, bw_start=0.9)).bw_start == 0.9 and resolve(Settings(steps=10, bw_start=0.05, bw_end=0.11)).bw_end == 0.11
    plant_starts(tmp_path)
    folder = plant(tmp_path, seed=7, p_bw=1.0, bw_start=0.9)
    table = pd.read_csv(folder / "curve.csv")
    table["tokens_fw"], table["tokens_bw"] = table.tokens_total, 0.0
    table.to_csv(folder / "curve.csv", index=False)
    study = load(tmp_path)
    assert 7 not in study.cells[next(iter(study.cells))][LATE] and f"run {folder.name} never learned bw" in study.notes
