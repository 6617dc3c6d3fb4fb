"""Figures and their numbers, on planted tables with known ratios: shuffled, unequal, incomplete, unfinished."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import compare
import plot_results
import plot_sizes
import report
import runs
from cells import FW_ONLY, StudyError, Variant, choose, load
from compare import ORDERS
from study_readme import markdown

ROOT = Path(__file__).resolve().parent.parent
P5 = Variant("fw+bw", 0.05)
OTHER_TABLES = {"blocks_angle", "blocks_influence", "context", "merge", "reversal", "bw_by_size", "by_setting", "pareto"}  # drawn from more than curves and layers of both directions


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch):
    """Most of the time would go into pixels."""
    import matplotlib.figure

    save = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda self, f, **k: save(self, f, **(k | {"dpi": 40})))


def plant(
    study, depth=2, width=64, p_bw=0.0, seed=0, fw=3.0, bw=6.0, epochs=12.0, evaluations=25, task="fw+bw",
    floor=None, finished=True, layers=True, shuffle=False, decay=1.0, name=None, **settings,
):  # fmt: skip
    """One run. At the share t of it, fw loss = fw * (1 + decay * (1 - t)): exactly `fw` at the end, bw likewise."""
    others = "".join(f"_{value}" for value in settings.values())
    name = name or f"{depth}x{width}_pbw{p_bw:g}_{task.replace('+', '')}_seed{seed}{others}"
    folder = Path(study) / name
    t = np.linspace(1 / evaluations, 1, evaluations)
    steps = np.round(t * 100 * epochs)
    table = pd.DataFrame({column: 0.0 for column in runs.CURVE_COLUMNS}, index=range(evaluations))
    table["step"], table["epoch"], table["tokens_total"], table["seconds"] = steps, t * epochs, t * epochs * 1e6, t * 60
    table["tokens_unique"], table["p_bw"], table["passes_bw"] = table["tokens_total"] / (1 + p_bw), p_bw, np.nan
    table["tokens_fw"] = table["tokens_total"] if task == "fw" else 0.0 if task == "bw" else table["tokens_unique"]
    table["tokens_bw"] = table["tokens_total"] - table["tokens_fw"]
    for direction, end in (("fw", fw), ("bw", bw)):
        table[f"{direction}_loss"] = end * (1 + decay * (1 - t))
        table[f"{direction}_ppl"] = np.exp(table[f"{direction}_loss"])
        table[f"{direction}_acc"] = 0.2 + 0.3 * t
    rows = []
    for kind, places in (("cut", range(1, depth + 1)), ("drop", range(depth))):
        for place in places:
            factor = 1 + 0.2 * (depth - place if kind == "cut" else 1 + place)
            losses = {"fw": fw * factor, "bw": bw * factor**0.5}
            row = {"ablation": kind, "layers_remaining": place if kind == "cut" else depth - 1}
            row |= {"layer": None if kind == "cut" else place}
            row |= {f"{d}_loss": v for d, v in losses.items()} | {f"{d}_ppl": np.exp(v) for d, v in losses.items()}
            rows.append(row | {"fw_acc": 0.3, "bw_acc": 0.2})
    layers_table = pd.DataFrame(rows)
    if shuffle:
        table, layers_table = table.sample(frac=1, random_state=seed), layers_table.sample(frac=1, random_state=seed)
    folder.mkdir(parents=True)
    table.to_csv(folder / "curve.csv", index=False)
    if layers:
        layers_table.to_csv(folder / "layers.csv", index=False)
    known = {"depth": depth, "width": width, "num_heads": 1, "data": "wiki", "bw_mask": "anticausal"}
    known |= {"p_bw": p_bw, "task": task, "seed": seed, "lr": 0.01, "eval_every": evaluations} | settings
    data = {"name": known["data"], "train_tokens": 1e6, "floor": floor, "floor_se": 0.01}
    config = {"name": name, "settings": known, "params": depth * width**2 * 1000, "data": data}
    (folder / "config.json").write_text(json.dumps(config))
    if finished:
        content = {"step": int(steps[-1]), "tokens_total": epochs * 1e6, "seconds": 60, "hit_cap": False}
        (folder / "finished.json").write_text(json.dumps(content))
    return folder


def plant_pairs(study, base, other, seeds=(0, 1, 2), **common):
    for seed, a, b in zip(seeds, base, other):
        plant(study, seed=seed, fw=a, **common)
        plant(study, seed=seed, fw=b, p_bw=0.05, **common)


def test_both_averaging_orders_are_found_again_and_differ(tmp_path):
    plant_pairs(tmp_path, base=(2.0, 4.0, 6.0), other=(1.0, 5.0, 3.0), shuffle=True)
    (terms,) = compare.ratio1(load(tmp_path), P5).values()
    assert compare.final_ratio(terms, "mean_then_ratio") == pytest.approx(12 / 9)
    assert compare.final_ratio(terms, "ratio_then_mean") == pytest.approx((2 + 0.8 + 2) / 3)
    (two,) = compare.ratio2(load(tmp_path), P5).values()
    assert compare.final_ratio(two, "mean_then_ratio") == pytest.approx(3 / 6)
    with pytest.raises(ValueError, match="order"):
        compare.final_ratio(terms, "median")


def test_seeds_pair_by_number_not_by_place(tmp_path):
    """Folder names sort the seeds differently on each side; a pairing by row order would give other ratios."""
    for seed, name in ((100, "z"), (101, "y"), (102, "x")):
        plant(tmp_path, seed=seed, fw=float(seed), name="a" + name)
        plant(tmp_path, seed=seed, fw=seed / 2, p_bw=0.05, name=f"b{seed}")
    (terms,) = compare.ratio1(load(tmp_path), P5).values()
    assert [term.seed for term in terms] == [100, 101, 102]
    assert np.exp(compare.log_ratios(terms)) == pytest.approx(2.0)


def test_only_paired_seeds_count_in_both_orders_and_the_others_are_named(tmp_path):
    plant_pairs(tmp_path, base=(2.0, 4.0), other=(1.0, 1.0), seeds=(0, 1))
    plant(tmp_path, seed=2, fw=99.0)
    plant(tmp_path, seed=3, fw=99.0, p_bw=0.05)
    plant(tmp_path, seed=4, fw=99.0)
    plant(tmp_path, seed=4, fw=99.0, p_bw=0.05, finished=False)
    study = load(tmp_path)
    (terms,) = compare.ratio1(study, P5).values()
    assert compare.final_ratio(terms, "mean_then_ratio") == compare.final_ratio(terms, "ratio_then_mean") == 3.0
    notes = "\n".join(study.notes)
    assert "seeds 2, 4 of p_bw = 0 without a partner" in notes and "seed 3 of p_bw = 0.05" in notes
    assert "2x64_pbw0.05_fwbw_seed4 is unfinished" in notes
    assert load(tmp_path, seeds=[1]).cells[terms and next(iter(study.cells))][FW_ONLY].keys() == {1}


def test_curves_of_unequal_length_and_spacing_are_compared_where_both_exist(tmp_path):
    """fw = 2 (2 - t): at epoch e the losses are 2 (2 - e / 12) and 3 (2 - e / 6). Linear, so interpolation is exact."""
    plant(tmp_path, fw=2.0, epochs=12.0, evaluations=24, shuffle=True)
    plant(tmp_path, fw=3.0, epochs=6.0, evaluations=15, p_bw=0.05, shuffle=True)
    (terms,) = compare.ratio1(load(tmp_path), P5).values()
    grid, top, bottom = compare.ratio_curve(terms, "epoch")
    assert (grid[0], grid[-1], len(grid)) == (pytest.approx(12 / 24), pytest.approx(6.0), 500)
    assert compare.average(top, bottom, ORDERS[0]) == pytest.approx(2 * (2 - grid / 12) / (3 * (2 - grid / 6)))
    grid, _, _ = compare.ratio_curve(terms, "epoch", window=(5, 10))
    assert (grid[0], grid[-1]) == (5.0, pytest.approx(6.0))
    assert compare.ratio_curve(terms, "epoch", window=(7, 10))[0].size == 0  # nothing is extrapolated
    unique, _, _ = compare.ratio_curve(terms, "epoch_unique")
    assert unique[-1] == pytest.approx(6 / 1.05)


def test_violins_by_size_and_the_points_on_them(tmp_path):
    """Two sizes of one depth, with ratios 2 and 4 all along, 500 points of each: the median by depth is between."""
    plant_pairs(tmp_path, base=(4.0, 2.0), other=(2.0, 1.0), seeds=(0, 1), width=64)
    plant_pairs(tmp_path, base=(4.0, 8.0), other=(1.0, 2.0), seeds=(0, 1), width=128)
    ratios = compare.ratio1(load(tmp_path), P5)
    options = plot_results.Options(order=ORDERS[1])
    by_width = plot_sizes.places(ratios, "width", "all", options)
    assert {width: float(np.median(place.points)) for width, place in by_width.items()} == pytest.approx({64: 2, 128: 4})
    (place,) = plot_sizes.places(ratios, "depth", "late", options).values()
    assert len(place.points) == 1000 and np.median(place.points) == pytest.approx(3)
    assert sorted(place.means) == pytest.approx([2, 2, 4, 4]) and place.interval == pytest.approx([8**0.5] * 3)
    assert list(plot_sizes.places(ratios, "params", "early", options)) == [2 * 64**2 * 1000, 2 * 128**2 * 1000]


def test_bw_against_bw_only_by_size(tmp_path, monkeypatch):
    for width, worse in ((64, 2.0), (128, 1.5)):
        for seed in range(3):
            plant(tmp_path / "a", width=width, seed=seed, fw=9.0, bw=2.0 + 0.1 * seed, task="bw", p_bw=1.0)
            plant(tmp_path / "a", width=width, seed=seed, fw=3.0, bw=worse * (2.0 + 0.1 * seed), p_bw=0.05)
    captions, drawn = [], []
    monkeypatch.setattr("plot_sizes.save", lambda study, figure, group, name, title, caption: captions.append(caption))
    monkeypatch.setattr("plot_sizes.label_ends", lambda ax, labels: drawn.extend(labels))
    plot_results.bw_by_size(load(tmp_path / "a"))
    assert "n = 3 seeds (0, 1, 2)" in captions[0] and "p_bw = 0.05, bw only" in captions[0]
    assert [(value, text) for value, text, _ in drawn] == [(pytest.approx(1.5), "p_bw = 0.05: 1.500")]  # the largest size
    plant_pairs(tmp_path / "b", (2.0,), (1.0,))
    study = load(tmp_path / "b")
    assert plot_results.bw_by_size(study) == [] and any("partner in bw only" in note for note in study.notes)


def test_windows_are_cut_on_the_axis_that_is_asked_for(tmp_path):
    """The ratio changes from 1.5 to 1 over 12 epochs: a window's median is the ratio at the window's middle."""
    plant(tmp_path, fw=2.0, decay=1.0, evaluations=240)
    plant(tmp_path, fw=2.0, decay=0.0, evaluations=240, p_bw=0.05)
    (terms,) = compare.ratio1(load(tmp_path), P5).values()
    epochs, steps = compare.windows(terms), compare.windows(terms, "step")
    assert epochs == {"early": (0.05, pytest.approx(1)), "all": (0.05, 12), "late": (6, 12)}
    assert steps == {"early": (5, pytest.approx(100, abs=1)), "all": (5, 1200), "late": (600, 1200)}
    for window, middle in (("early", 0.525), ("late", 9)):
        (place,) = plot_sizes.places(compare.ratio1(load(tmp_path), P5), "depth", window, plot_results.Options()).values()
        assert np.median(place.points) == pytest.approx(2 - middle / 12, abs=2e-3)
        (logs,) = (compare.window_log_ratios(terms, window_) for name, window_ in epochs.items() if name == window)
        assert np.log(place.means) == pytest.approx(logs)  # as in the README's table over training
    assert compare.windows(terms, asked=(5, 10)) == {"epochs 5 to 10": (5, 10)}
    assert compare.windows(terms, asked=(5, 20)) == {} == compare.windows(terms, asked=(0, 0.04))


def test_runs_from_before_and_after_a_new_setting_are_never_mixed(tmp_path):
    """Whoever adds a flag and trains on in an old study: nothing says what the old runs did."""
    for seed in range(3):
        plant(tmp_path, seed=seed, fw=2.0)
        plant(tmp_path, seed=seed, fw=4.0, p_bw=0.05, momentum=0.9)
    study = load(tmp_path)
    assert compare.ratio1(study, P5) == {}
    assert sorted(cell.group.extras for cell in study.cells) == [(("momentum", "0.9"),), (("momentum", "not set"),)]


def test_a_task_of_ones_own_is_not_taken_for_the_articles(tmp_path):
    plant(tmp_path, fw=2.0)
    plant(tmp_path, fw=2.1, task="prefix", p_bw=0.05)
    study = load(tmp_path)
    assert Variant("prefix", 0.05).label == "prefix, p_bw = 0.05" and choose(study) is None


def test_flipped_and_differing_settings_are_never_mixed(tmp_path):
    plant_pairs(tmp_path, base=(2.0,), other=(1.0,))
    plant_pairs(tmp_path, base=(2.0,), other=(0.5,), bw_mask="flipped")
    study = load(tmp_path)
    assert [compare.final_ratio(terms, ORDERS[0]) for terms in compare.ratio1(study, P5).values()] == [2.0, 4.0]
    assert [study.heading(group) for group in study.groups] == ["wiki", "wiki, flipped (leaks)"]
    plant(tmp_path, seed=7, lr=0.5)
    plant(tmp_path, seed=7, lr=0.25, p_bw=0.05)
    study = load(tmp_path)
    assert all(term.seed != 7 for terms in compare.ratio1(study, P5).values() for term in terms)
    assert any("lr = 0.5" in note and "seed 7" in note for note in study.notes)


def test_a_setting_that_follows_the_size_does_not_split_cells(tmp_path):
    plant_pairs(tmp_path, base=(2.0,), other=(1.0,), width=64, lr=0.1)
    plant_pairs(tmp_path, base=(2.0,), other=(1.0,), width=128, lr=0.2)
    assert len(load(tmp_path).groups) == 1


def test_which_p_bw_is_compared(tmp_path):
    plant(tmp_path, task="fw")
    plant(tmp_path, p_bw=0.5)
    assert choose(load(tmp_path)) == Variant("fw+bw", 0.5)  # the only one there is
    plant(tmp_path, p_bw=0.05)
    plant(tmp_path, p_bw=0.05, task="fw-or-bw", fw=1.0)
    plant(tmp_path, task="bw")
    study = load(tmp_path)
    assert choose(study) == P5 and choose(study, 0.5) == Variant("fw+bw", 0.5)
    assert choose(study, task="fw-or-bw") == Variant("fw-or-bw", 0.05)
    plant(tmp_path, p_bw=0.25, task="fw-or-bw")
    assert choose(load(tmp_path), 0.25) == Variant("fw-or-bw", 0.25)  # --p_bw tells, whatever the task
    assert choose(study, 0.3) is None and "p_bw = 0.3" in study.notes[-1]
    assert [term.seed for term in next(iter(compare.ratio2_separate(study).values()))] == [0]


def test_tokens_per_step_show_the_giant_batches_at_the_end(tmp_path):
    folder = plant(tmp_path, evaluations=3)
    table = pd.read_csv(folder / "curve.csv").assign(step=[100, 200, 210], tokens_total=[1e5, 2e5, 1.2e6])
    table.to_csv(folder / "curve.csv", index=False)
    assert report.tokens_per_step(runs.read_run(folder)) == (pytest.approx(1.2e6 / 210), pytest.approx(1e5))
    assert "at most 100 k between two evaluations" in report.describe([runs.read_run(folder)])


@pytest.fixture(scope="module")
def grid_study(tmp_path_factory):
    """{2, 4} x {64, 128}, one size without p_bw = 0; three seeds, one unfinished; a flipped pair; a floor."""
    study = tmp_path_factory.mktemp("results") / "grid"
    for depth in (2, 4):
        for width in (64, 128):
            for seed in (0, 1, 2):
                for p_bw in (0.0, 0.05, 0.5):
                    if (depth, width, p_bw) != (4, 128, 0.0):
                        fw = 3 - 0.1 * depth + 0.3 * p_bw + 0.01 * seed * (1 + p_bw)
                        done = (depth, seed, p_bw) != (2, 2, 0.0)
                        plant(study, depth, width, p_bw, seed, fw, 9.5 if p_bw == 0 else 3.3, floor=1.5, finished=done)
    plant_pairs(study, (3.0, 3.1), (2.9, 3.1), (0, 1), depth=2, bw_mask="flipped", floor=1.5)
    plant_pairs(study, (3.2, 3.3), (3.1, 3.2), (0, 1), floor=1.5, unique_tokens=125_000, layers=False)
    plant_pairs(study, (3.2, 3.3), (3.1, 3.2), (0, 1), bw_mask="flipped", unique_tokens=125_000, dropout=0.1, layers=False)
    return study


@pytest.mark.parametrize("name", [name for name in plot_results.FIGURES if name not in OTHER_TABLES])
def test_every_figure_is_drawn(grid_study, name):
    paths = plot_results.FIGURES[name](load(grid_study), plot_results.Options())
    if name == "leak":  # both masks in one picture, for the one size that has both
        assert [path.name for path in paths] == ["leak_2x64.png"]
    else:
        assert len(paths) >= 2 and any("flipped" in path.name for path in paths)  # the flipped group gets its own
    for path in paths:
        assert path.parent == grid_study / "figures"
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 3000


def test_pareto_needs_several_p_bw_or_sizes(tmp_path):
    plant_pairs(tmp_path, (3.0, 3.1), (2.9, 3.1), (0, 1))
    study = load(tmp_path)
    assert plot_results.pareto(study) == [] and any("pareto" in note for note in study.notes)
    for seed in (0, 1):
        plant(tmp_path, seed=seed, fw=3.2, bw=3.5, p_bw=0.5)
        plant(tmp_path, seed=seed, fw=9.0, bw=3.1, task="bw", p_bw=1.0)
    (path,) = plot_results.pareto(load(tmp_path))
    assert path.name == "pareto.png" and path.read_bytes().startswith(b"\x89PNG")


def test_command_draws_all_and_names_what_is_left_out(tmp_path, capsys):
    plant_pairs(tmp_path / "s", (3.0, 3.1), (2.9, 3.1), (0, 1), epochs=0.8, evaluations=5)
    plant(tmp_path / "s", seed=2, finished=False)
    plant(tmp_path / "s", seed=3, layers=False)
    plant(tmp_path / "s", unique_tokens=125_000, fw=3.3)
    flags = ["--smooth", "9", "--all_seeds", "--x", "step", "--order", ORDERS[1]]
    paths = plot_results.main([str(tmp_path / "s"), *flags])
    out = capsys.readouterr().out
    assert {path.name for path in (tmp_path / "s" / "figures").iterdir()} == {path.name for path in paths}
    assert all(str(path) in out for path in paths) and len(paths) == len(plot_results.FIGURES) - 1 - len(OTHER_TABLES)  # all but the leak
    assert "seed2 is unfinished" in out and "layers: not measured in every run (python eval_layers.py" in out
    assert "ratio2_by_size_ratio_then_mean.png" in out and "repeats_2x64.png" in out


def test_a_caption_counts_only_the_seeds_in_its_figure(tmp_path, monkeypatch):
    plant_pairs(tmp_path, (3.0,), (2.9,), (0,))
    plant_pairs(tmp_path, (3.1,), (2.8,), (1,), layers=False)
    captions = []
    monkeypatch.setattr("plot_layers.save", lambda study, figure, group, name, title, caption: captions.append(caption))
    plot_results.layers_ratio1(load(tmp_path))
    assert "n = 1 seed (0)" in captions[0]


def test_runs_with_a_single_evaluation_have_points_but_no_ratio_over_training(tmp_path, capsys):
    plant_pairs(tmp_path, (3.0,), (2.0,), evaluations=1, layers=False)
    figures = ["curves", "ratio1_training", "ratio1_heatmap", "ratio1_by_size"]
    paths = plot_results.main([str(tmp_path), "--figure", *figures])
    assert {path.name for path in paths} == {"curves_2x64.png", "ratio1_heatmap.png"}
    assert "do not overlap" in (out := capsys.readouterr().out) and "no two evaluations" in out


def test_report_and_summary(grid_study):
    text = markdown(load(grid_study))
    assert "### wiki, flipped (leaks)" in text and "| 2 x 64 | *entropy of the text* | | 1.5000 | 1.5000 |" in text.replace("|  |", "| |")
    table = text.split("## Losses and ratios")[1]
    (line,) = [line for line in table.splitlines() if line.startswith("| 4 x 64 (16.4 M) | p_bw = 0.05 ")]
    fw = 2.615 + 0.0105 * np.arange(3)
    half = 4.302653 * fw.std(ddof=1) / 3**0.5
    assert f"{fw.mean():.4f} ± {half:.4f}" in line
    logs = np.log((2.6 + 0.01 * np.arange(3)) / fw)
    assert f"{np.exp(logs.mean()):.4f} [{np.exp(logs.mean() - 4.302653 * logs.std(ddof=1) / 3**0.5):.4f}, " in line
    assert "(Holm, 3 sizes)" in line
    text = plot_results.summary(grid_study)
    assert "entropy floor" in text and "ratio 1" in text and "ratio 2" in text and str(grid_study / "figures") in text
    assert "ALARM" not in text and "(Holm, 3 sizes)" in text


def test_without_a_folder_every_study_is_drawn_nested_ones_too(tmp_path, monkeypatch):
    plant(tmp_path / "results" / "one")
    run = plant(tmp_path / "results" / "two" / "nested")
    (run / "model").mkdir()
    (run / "model" / "config.json").write_text("{}")  # a Hugging Face model's own, as finetune.py leaves it
    monkeypatch.chdir(tmp_path)
    paths = plot_results.main(["--figure", "curves"])
    assert [str(path) for path in paths] == [f"results/{study}/figures/curves_2x64.png" for study in ("one", "two/nested")]


def test_user_errors_are_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)

    def message(*argv):
        with pytest.raises(SystemExit) as stop:
            plot_results.main(list(argv))
        assert "\n" not in str(stop.value)
        return str(stop.value)

    assert "empty holds no runs" in message("empty") and "nowhere does not exist" in message("nowhere")
    assert "results/ holds no study" in message()
    folder = plant(tmp_path / "s")
    assert "none of these seeds" in message("s", "--seeds", "5")
    assert "--epochs 3 1" in message("s", "--epochs", "3", "1") and "--smooth 0" in message("s", "--smooth", "0")
    assert "--epochs is a window" in message("s", "--epochs", "1", "3", "--budget", "steps")
    assert "--epochs is a window" in message("s", "--epochs", "1", "3", "--x", "step")
    table = pd.read_csv(folder / "curve.csv")
    table.assign(fw_loss="abc").to_csv(folder / "curve.csv", index=False)
    assert "curve.csv" in message("s") and "'fw_loss'" in message("s")
    table.drop(columns="bw_ppl").to_csv(folder / "curve.csv", index=False)
    assert "curve.csv" in message("s") and "'bw_ppl'" in message("s")
    plant(tmp_path / "u", finished=False)
    with pytest.raises(StudyError, match="no finished run .*is unfinished"):
        load(tmp_path / "u")


def test_plotting_needs_no_torch():
    code = "import sys, plot_results; assert not {'torch', 'matplotlib.pyplot'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
