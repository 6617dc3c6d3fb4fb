"""Figures over blocks of layers, context and merged weights: planted tables are found again, what is missing is named."""

import numpy as np
import pytest
from test_plot_results import plant

import compare
import plot_blocks
import plot_context
import plot_layers
import plot_merge
import runs
from cells import load, variants
from compare import ratio1
from drawing import Options


def plant_layers(folder, depth=4, windows=None, wrong=0.0):
    """Leaving out n layers from l on costs the factor exp(0.1 n + 0.01 l) in fw and twice its logarithm in bw; the angle
    around them is 0.02 n + 0.001 l; a layer that costs more has more influence (for bw less)."""
    rows = [("cut", k, None, 0.1 * (depth - k) + 0.01 * k * (k < depth)) for k in range(1, depth + 1)]
    rows += [("drop" if n == 1 else "block", depth - n, l, 0.1 * n + 0.01 * l) for n in range(1, depth) for l in range(depth - n + 1)]  # noqa: E741
    table = [{"ablation": kind, "layers_remaining": left, "layer": l, "tokens": 100, "fw_loss": 2 * np.exp(x) + wrong, "bw_loss": 3 * np.exp(2 * x)}
             for kind, left, l, x in rows]  # fmt: skip  # noqa: E741
    filled = [dict.fromkeys(runs.LAYERS_COLUMNS, 0.5) | row | {f"{d}_ppl": np.exp(row[f"{d}_loss"]) for d in ("fw", "bw")} for row in table]
    runs.write_table(folder / runs.table_name("layers", windows=windows), filled, runs.LAYERS_COLUMNS)
    similar = [{"direction": d, "layer": l, "block_size": n, "angular_distance": 0.02 * n + 0.001 * l, "tokens": 100,
                "block_influence": 0.3 + (0.01 if d == "fw" else -0.01) * l}
               for d in ("fw", "bw") for n in range(1, depth + 1) for l in range(depth - n + 1)]  # fmt: skip  # noqa: E741
    runs.write_table(folder / runs.table_name("similarity", windows=windows), similar, runs.SIMILARITY_COLUMNS)


def test_the_readme_names_the_commands_that_measured(tmp_path):
    from study_readme import _measured, _merged

    a, b = plant(tmp_path, seed=0), plant(tmp_path, seed=0, p_bw=0.05)
    for name in ("context.csv", "context_32windows.csv", "context_wikitext_32windows.csv", "context_my_text.csv"):
        (a / name).touch()
    assert _measured(tmp_path, "eval_context.py", "context") == sorted(f"python eval_context.py {tmp_path}{flags}" for flags in (
        "", " --windows 32", " --data data/wikitext --windows 32", " --data data/my_text"))  # fmt: skip
    row = dict.fromkeys(runs.MERGE_COLUMNS, 1.0) | {f"{d}_ppl": np.e for d in ("fw", "bw")}
    runs.write_table(tmp_path / "merge.csv", [row | {"run_a": a.name, "run_b": b.name, "weight": w} for w in (0, 1)], runs.MERGE_COLUMNS)
    assert _merged(tmp_path, {run.name: run for run in runs.read_study(tmp_path)}) == [f"python merge.py {tmp_path} --p_bw 0 0.05"]


@pytest.fixture
def captions(monkeypatch):
    """The captions of all figures that are drawn, by name."""
    found = {}
    for module in (plot_blocks, plot_context, plot_layers, plot_merge):
        def keep(study, figure, group, name, title, caption, save=module.save):
            found[name] = caption
            return save(study, figure, group, name, title, caption)
        monkeypatch.setattr(module, "save", keep)
    return found


def test_blocks_and_influence_are_found_again(tmp_path, captions):
    for seed in (0, 1):
        plant_layers(plant(tmp_path, depth=4, seed=seed))
        plant_layers(plant(tmp_path, depth=4, seed=seed, p_bw=0.05))
    study = load(tmp_path)
    (by,) = study.cells.values()
    run = by[variants(study)[1]][0]
    table = plot_blocks.damage(run, "bw")
    assert table.shape == (3, 4) and table[1, 2] == pytest.approx(2 * 0.22) and np.isnan(table[1, 3]) and np.isnan(table[2, 2])
    assert plot_blocks.similarity(run, "fw", "angular_distance")[3, 0] == pytest.approx(0.08)
    for draw in (plot_blocks.blocks_drop, plot_blocks.blocks_angle, plot_blocks.blocks_influence):
        (path,) = draw(study)
        assert path.stat().st_size > 10_000
    assert "4 x 64 fw 1.00 (1.00 to 1.00, 4 runs), 4 x 64 bw -1.00 (-1.00 to -1.00, 2 runs)" in captions["blocks_influence"], "p_bw = 0 was not trained backward"
    assert not study.notes
    for folder in tmp_path.glob("*x*"):  # as eval_layers.py --ablations cut drop leaves it: the drops are enough for the correlation
        rows = [row for row in runs.read_rows(folder / "layers.csv", runs.LAYERS_COLUMNS) if row["ablation"] != "block"]
        runs.write_table(folder / "layers.csv", rows, runs.LAYERS_COLUMNS)
    plot_blocks.blocks_influence(load(tmp_path))
    assert "4 x 64 fw 1.00 (1.00 to 1.00, 4 runs)" in captions["blocks_influence"] and not plot_blocks.blocks_drop(load(tmp_path))


def test_figures_of_some_seeds_do_not_replace_those_of_all(tmp_path):
    """Of every kind that reads another table than curve.csv and layers.csv, too."""
    folders = [plant(tmp_path, p_bw=p_bw, seed=seed, max_seq_len=128) for seed in (0, 1) for p_bw in (0.0, 0.05)]
    for folder in folders:
        plant_context(folder, 1)
    a, b = (folder.name for folder in folders[:2])
    row = dict.fromkeys(runs.MERGE_COLUMNS, 1.0) | {f"{d}_ppl": np.e for d in ("fw", "bw")}
    runs.write_table(tmp_path / "merge.csv", [row | {"run_a": a, "run_b": b, "weight": w} for w in (0, 1)], runs.MERGE_COLUMNS)
    figures = [draw(load(tmp_path, seeds), Options(seeds=seeds)) for draw in (plot_context.context, plot_merge.merge) for seeds in (None, (0,))]
    names = [path.name for paths in figures for path in paths]
    assert len(names) == len(set(names)) == 4 and sum("seeds-0" in name for name in names) == 2


def test_windows_have_figures_of_their_own_and_an_incomplete_table_none(tmp_path, captions):
    folder = plant(tmp_path, depth=4)
    plant_layers(folder, windows=8)
    study = load(tmp_path)
    assert plot_blocks.damage(next(iter(next(iter(study.cells.values())).values()))[0], "fw") is None
    assert [path.name for path in plot_blocks.blocks_drop(study)] == ["blocks_drop_4x64_8windows.png"]
    assert "From 8 windows of the validation split only" in captions["blocks_drop_4x64_8windows"]
    assert any("blocks_drop: 4 x 64 has no such table (python eval_layers.py" in note for note in study.notes)
    assert [path.name for path in plot_blocks.blocks_influence(study)] == ["blocks_influence_8windows.png"]


def test_ratios_with_one_layer_left_out(tmp_path, captions):
    """Ratio 1 of the losses without layer l, paired by seed; a seed whose partner lacks a row does not count."""
    for seed, wrong in ((0, 0.0), (1, 1.0)):
        plant_layers(plant(tmp_path, depth=4, seed=seed), wrong=wrong)
        plant_layers(plant(tmp_path, depth=4, seed=seed, p_bw=0.05))
    plant_layers(plant(tmp_path, depth=4, seed=2), wrong=9.0)
    plant(tmp_path, depth=4, seed=2, p_bw=0.05, layers=False)
    study = load(tmp_path)
    (terms,) = ratio1(study, variants(study)[1]).values()
    expected = 1 + 1.0 / (4 * np.exp(0.1 + 0.01 * np.arange(4)))
    assert compare.average(*plot_layers.layer_values(terms[:2], "drop"), "mean_then_ratio") == pytest.approx(expected)
    assert [path.name for path in plot_layers.layers_drop_ratio1(study)] == ["layers_drop_ratio1_loss.png"]
    assert "n = 2 seeds (0, 1)" in captions["layers_drop_ratio1_loss"]
    assert [path.name for path in plot_layers.layers_drop_ratio2(study)] == ["layers_drop_ratio2_loss.png"]


def plant_context(folder, factor, table="context"):
    """bw is worse than fw by `factor` per cent and doubling of the context, on top of a loss that falls with context."""
    rows = [{"direction": d, "context": c, "tokens": 960, "loss": 5 / k * (1 + 0.01 * factor * k * (d == "bw"))}
            for d in ("fw", "bw") for k, c in enumerate((16, 32, 64, 128), 1)]  # fmt: skip
    runs.write_table(folder / f"{table}.csv", rows, runs.CONTEXT_COLUMNS)


def test_the_gap_over_context_is_paired_by_seed(tmp_path, captions):
    for seed, factor in ((0, 0.5), (1, 0.7)):
        plant_context(plant(tmp_path, seed=seed, max_seq_len=128), 100)  # bw of the fw-only model: must not count
        plant_context(plant(tmp_path, seed=seed, task="bw", p_bw=1.0, max_seq_len=128), factor)
        both = plant(tmp_path, seed=seed, p_bw=0.5, max_seq_len=128)
        plant_context(both, 2 * factor)
        plant_context(both, 3, "context_wikitext")
    plant_context(plant(tmp_path, seed=2, task="bw", p_bw=1.0, max_seq_len=128), 50)  # no fw-only partner
    study = load(tmp_path)
    (by,) = study.cells.values()
    fw, _, bw = (by[variant] for variant in sorted(by, key=lambda variant: variant.p_bw))
    contexts, found = plot_context.gaps([(fw[seed], bw[seed]) for seed in (0, 1)])
    assert contexts.tolist() == [16, 32, 64, 128] and found == pytest.approx(np.outer([0.5, 0.7], [1, 2, 3, 4]))
    assert [path.name for path in plot_context.context(study)] == ["context_2x64.png", "context_2x64_wikitext.png"]
    assert "Measured on wikitext" in captions["context_2x64_wikitext"]
    assert "n = 2 seeds (0, 1)" in captions["context_2x64"]


def test_the_barrier_is_measured_above_the_line_between_the_ends(tmp_path, captions):
    """fw: a parabola of height 0.5 or 0.7 over ends 3 and 5; bw: falls below the line, no barrier."""
    rows = []
    for seed, height in ((0, 0.5), (1, 0.7)):
        a, b = plant(tmp_path, seed=seed).name, plant(tmp_path, seed=seed, p_bw=0.05).name
        for weight in np.linspace(0, 1, 11):
            bump = 4 * weight * (1 - weight)
            row = {"run_a": a, "run_b": b, "weight": weight, "fw_loss": 3 + 2 * weight + height * bump, "bw_loss": 9 - 6 * weight - bump}
            rows.append(dict.fromkeys(runs.MERGE_COLUMNS, 0.0) | row | {f"{d}_ppl": np.exp(row[f"{d}_loss"]) for d in ("fw", "bw")})
    gone = [row | {"run_b": "deleted"} for row in rows[:11]]
    runs.write_table(tmp_path / "merge.csv", rows + gone, runs.MERGE_COLUMNS)
    study = load(tmp_path)
    ((_, pairs),) = plot_merge.lines(study).items()
    assert [plot_merge.barrier(line, "fw") for line in pairs] == pytest.approx([0.5, 0.7])
    assert [plot_merge.barrier(line, "bw") for line in pairs] == pytest.approx([0, 0])
    assert [path.name for path in plot_merge.merge(study)] == ["merge_2x64_fw_to_fw+bw-0.05.png"]
    assert "fw 0.600 ± 1.271 (n = 2), bw 0.000 ± 0.000 (n = 2)" in captions["merge_2x64_fw_to_fw+bw-0.05"]
    assert any("to deleted: not both runs are in the study" in note for note in study.notes)


def test_what_was_not_measured_is_named(tmp_path):
    plant(tmp_path)
    study = load(tmp_path)
    assert plot_context.context(study) == plot_merge.merge(study) == plot_blocks.blocks_angle(study) == []
    notes = "\n".join(study.notes)
    for text in ("no run has a context.csv", "no pair of runs was merged", "blocks_angle: 2 x 64 has no such table"):
        assert text in notes
