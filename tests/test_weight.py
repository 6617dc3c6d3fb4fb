"""--bw_weight: what it does to a step's gradient, to a grid of runs, and to what is compared with what."""

import math

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
from cells import FW_ONLY, Variant, choose, load, variant_of
from recipe import Settings, resolve
from report import alarms, summary

HEAVY = Variant("fw+bw", 0.05, 4.0)


def gradients(run) -> torch.Tensor:
    """All gradients of one step, which changes no weight."""
    kept = []
    run.optimizer.step = lambda: kept.extend(p.grad.flatten().clone() for p in run.model.parameters())
    run.step()
    return torch.cat(kept)


@pytest.mark.parametrize("task", ["fw+bw", "fw-or-bw"])
def test_the_gradient_is_that_of_fw_plus_the_weight_times_that_of_bw(corpus, task):  # noqa: F811
    """With fw-or-bw some of the micro-batches are bw alone. What is reported is not weighed."""
    if task == "fw+bw":
        weights = {"p_bw": 0.0}, {"p_bw": 1.0}, {"p_bw": 1.0, "bw_weight": 5.0}
        fw, both, heavy = (training(corpus, micro_batches=2.0, **more) for more in weights)
        fw, bw = gradients(fw), gradients(both)
        bw -= fw
    else:
        both, heavy, double = (training(corpus, micro_batches=8.0, task=task, p_bw=0.5, seed=7, bw_weight=weight) for weight in (1.0, 5.0, 2.0))
        fw = gradients(both)
        bw = gradients(double) - fw
        fw = fw - bw
        assert 0 < both.progress.tokens_bw < both.progress.tokens_total
    assert bw.norm() > 0.1 * fw.norm()
    torch.testing.assert_close(gradients(heavy), fw + 5 * bw, rtol=1e-4, atol=1e-6)
    for run in (both, heavy):
        run.read_figures()
    assert heavy.progress.last_loss == both.progress.last_loss and heavy.progress.train_loss == both.progress.train_loss


def test_runs_that_learn_one_direction_have_no_weight_and_so_one_control_serves_a_grid(corpus, tmp_path):  # noqa: F811
    alone = [{"task": "fw"}, {"task": "bw"}, {"p_bw": 0.0}, {"task": "fw-or-bw", "p_bw": 0.0}, {"task": "fw-or-bw", "p_bw": 1.0}]
    assert {resolve(Settings(bw_weight=5.0, **some)).bw_weight for some in alone} == {1.0}
    assert {resolve(Settings(bw_weight=5.0, **some)).bw_weight for some in ({}, {"task": "adaptive"}, {"task": "fw-or-bw", "p_bw": 0.5})} == {5.0}
    train.main([*flags(corpus, tmp_path), "--p_bw", "0", "0.5", "--bw_weight", "1", "5", "--steps", "2"])
    found = runs.read_study(tmp_path)
    assert sorted((run["p_bw"], run["bw_weight"]) for run in found) == [(0, 1), (0.5, 1), (0.5, 5)]
    assert sorted(map(runs.trained_on, (run.folder for run in found))) == ["p_bw = 0", "p_bw = 0.5", "p_bw = 0.5 with bw_weight = 5"]
    assert sorted(runs.read_run(b)["bw_weight"] for _, b in merge.pairs(tmp_path, (0.0, 0.5))) == [1, 5]
    train.main([*flags(corpus, tmp_path), "--p_bw", "1", "--bw_weight", "5", "--steps", "2"])
    assert [(runs.read_run(a)["bw_weight"], runs.read_run(b)["bw_weight"]) for a, b in merge.pairs(tmp_path, (0.5, 1.0))] == [(5, 5)]


def plant_weights(study) -> None:
    """Runs from before there was such a setting, and two weights with their own losses; one control."""
    for seed in range(3):
        plant(study, seed=seed, fw=2.0)
        plant(study, seed=seed, fw=2.5, bw=5.0, p_bw=0.05)
        plant(study, seed=seed, fw=4.0, bw=3.0, p_bw=0.05, bw_weight=4.0)
        plant(study, seed=seed, fw=2.2, bw=5.5, p_bw=0.05, bw_weight=0.5)
        plant(study, seed=seed, fw=9.0, bw=2.5, task="bw", p_bw=1.0)


def test_a_weight_is_a_variant_of_its_own_with_the_same_control(tmp_path):
    plant_weights(tmp_path)
    study = load(tmp_path)
    (by,) = study.cells.values()
    assert list(by) == [FW_ONLY, Variant("fw+bw", 0.05, 0.5), P5, HEAVY, Variant("bw", 1.0)]
    assert choose(study) == P5 and choose(study, bw_weight=4.0) == choose(study, 0.05, bw_weight=4.0) == HEAVY
    assert choose(study, bw_weight=3.0) is None and "bw_weight = 3" in study.notes[-1]
    for variant, ratio in ((P5, 0.8), (HEAVY, 0.5)):
        (terms,) = compare.ratio1(study, variant).values()
        assert len(terms) == 3 and compare.final_ratio(terms, compare.ORDERS[0]) == pytest.approx(ratio)
    assert HEAVY.label == "p_bw = 0.05 with bw_weight = 4" and len({len(line) for line in summary(study).split("\n") if "    p_bw = 0.05" in line}) == 1, "one column"


def test_figures_of_a_weight_have_names_of_their_own_and_the_readme_tells_the_flag(tmp_path):
    plant_weights(tmp_path)
    main = plot_results.main
    (path,) = main([str(tmp_path), "--figure", "ratio1_training", "--bw_weight", "4"])
    assert path.name == "ratio1_training_bw_weight-4.png"
    assert [path.name for path in main([str(tmp_path), "--figure", "pareto"])] == ["pareto.png"]
    main([str(tmp_path), "--report"])
    text = (tmp_path / "README.md").read_text()
    assert f"plot_results.py {tmp_path} --bw_weight 4\n" in text and f"| {HEAVY.label} | 0, 1, 2 | 4.0000 ± 0.0000" in text


def test_the_only_weight_there_is_needs_no_flag(tmp_path):
    for seed in range(3):
        plant(tmp_path, seed=seed, fw=2.0)
        plant(tmp_path, seed=seed, fw=4.0, p_bw=0.05, bw_weight=4.0)
    assert choose(load(tmp_path)) == HEAVY


def test_a_large_weight_may_make_bw_the_better_direction(tmp_path):
    """Without a known entropy a bw loss well below the fw loss is an alarm, but not where the weight explains it."""
    plant(tmp_path, fw=3.0, bw=2.0, p_bw=0.05, bw_weight=40.0)
    assert alarms(load(tmp_path)) == []
    plant(tmp_path, fw=3.0, bw=2.0, p_bw=0.05, bw_weight=20.0)
    assert len(alarms(load(tmp_path))) == 1


@pytest.mark.parametrize("p_bw, weight, expected", [(0.9, 1.0, 0), (0.3, 3.0, 0), (0.5, 1.0, 1), (0.3, 2.0, 1)])
def test_where_bw_is_learned_instead_of_fw_the_alarm_weighs_their_passes(tmp_path, p_bw, weight, expected):
    plant(tmp_path, task="fw-or-bw", fw=3.0, bw=2.0, p_bw=p_bw, bw_weight=weight)
    assert len(alarms(load(tmp_path))) == expected


def test_commands_of_merged_pairs_are_those_that_make_them(tmp_path):
    plant_weights(tmp_path)
    of_seed_0 = [run for run in runs.read_study(tmp_path) if run["seed"] == 0 and run["task"] == "fw+bw"]
    zero, light, heavy = (next(run.name for run in of_seed_0 if variant_of(run) == variant) for variant in (FW_ONLY, P5, HEAVY))
    for a, b, command in ((zero, heavy, "--p_bw 0 0.05"), (light, heavy, f"/{light} {tmp_path}/{heavy}")):
        row = dict.fromkeys(runs.MERGE_COLUMNS, 1.0) | {"run_a": a, "run_b": b, "fw_ppl": math.e, "bw_ppl": math.e}
        runs.write_table(tmp_path / "merge.csv", [row | {"weight": weight} for weight in (0.0, 0.5, 1.0)], runs.MERGE_COLUMNS)
        plot_results.main([str(tmp_path), "--report"])
        lines = (tmp_path / "README.md").read_text().splitlines()
        assert [line for line in lines if line.startswith("python merge.py")] == [f"python merge.py {tmp_path}{' ' * (command[0] == '-')}{command}"]
