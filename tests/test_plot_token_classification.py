"""The tables and figures of token classification: what is one value, what is a pair, what stands in one panel."""

import itertools

import pytest

pytest.importorskip("seqeval", reason="pip install -r experiments/requirements.txt")

from experiments import plot_token_classification as plot
from experiments import token_classification as tc


def test_table_and_figure_average_head_seeds_within_a_model(tmp_path, capsys):
    """Three models with two head seeds each are three independent values, not six; a pair that lacks one is left out."""
    rows = []
    for k, seed, (features, value) in itertools.product(range(3), (10, 11), (("fw", 0.5), ("fw+bw", 0.6))):
        row = dict.fromkeys(tc.COLUMNS, "") | {"task": "x", "metric": "f1", "model": f"runs/4x32_pbw0.5_seed{k}_abcdef", "seed": seed}
        row |= {"features": features, "test": value + 0.01 * k + 0.1 * (seed == 11), "subtoken": "first", "head": "mlp"}
        rows += [row, row | {"model": f"runs/4x32_pbw0_seed{k}_abcdef", "model_bw": f"runs/4x32_pbw1_seed{k}_abcdef"}]
    tc.runs.write_table(tmp_path / "scores.csv", rows, tc.COLUMNS)
    plot.main([str(tmp_path / "scores.csv")])
    out = capsys.readouterr().out
    # means over models 55, 56, 57 and 65, 66, 67: half-width 4.303 * 1 / sqrt(3); the paired difference is exactly 10
    assert "56.00 ± 2.48" in out and "66.00 ± 2.48" in out and "+10.00 ± 0.00" in out and "| 3 |" in out
    assert "| fw+bw, two models | p_bw = 0 & p_bw = 1 (runs 4x32) | 3 | 66.00 ± 2.48 | +10.00 ± 0.00 |  |" in out
    assert (tmp_path / "scores_runs.png").stat().st_size > 10_000 and not (tmp_path / "few_shot.png").exists()
    encoder = "text-encoder/encoders/4x128_pbw0.05_seed100_aede38_mntp_219e7e/model.safetensors"
    assert plot.short(encoder, {"4x128_pbw0.05_seed100_aede38": "demo"}) == ("p_bw = 0.05 + mntp", "demo 4x128")
    assert plot.short(encoder, {})[1] == "encoders 4x128" and plot.short("gpt2", {}) == ("gpt2", "")
    sampled = [row | {"shots": k, "crf": str(k > 4), "test": row["test"] + k / 1000} for row in rows for k in (4, 16)]
    tc.runs.write_table(tmp_path / "scores.csv", sampled, tc.COLUMNS)
    plot.main([str(tmp_path / "scores.csv")])
    assert "| fw | p_bw = 0.5 | frozen + CRF |  | 57.60 ± 2.48 |" in capsys.readouterr().out and (tmp_path / "few_shot.png").exists()
    tc.runs.write_json(tmp_path / "4x32_pbw1_seed3_abcdef" / "config.json", {"settings": {"task": "bw"}, "params": 1, "data": {}})
    assert plot.short(str(tmp_path / "4x32_pbw1_seed3_abcdef"), {})[0] == "bw only"
    tc.runs.write_table(tmp_path / "twice.csv", [*rows, rows[0] | {"model": "runs/4x32_pbw0.5_seed0_123456"}], tc.COLUMNS)
    for table, sentence in (("none", "no results"), ("twice", "two different runs of .*p_bw = 0.5, seed 0")):
        with pytest.raises(SystemExit, match=sentence):
            plot.main([str(tmp_path / f"{table}.csv")])


def row_of(test, **values):
    setting = {"task": "x", "metric": "f1", "features": "fw", "subtoken": "first", "head": "mlp", "crf": "False", "finetune": "False", "seed": 10}
    return dict.fromkeys(tc.COLUMNS, "") | setting | {"test": test} | values


def test_few_shots_of_two_tasks_are_two_tables_and_panels(tmp_path, capsys):
    rows = [row_of(test + 0.01 * k + shots / 1000, task=task, metric=metric, shots=shots, model=f"runs/4x32_pbw0_seed{k}_abcdef")
            for (task, metric, test), k, shots in itertools.product((("ner", "f1", 0.5), ("pos", "acc", 0.8)), range(3), (4, 16))]  # fmt: skip
    tc.runs.write_table(tmp_path / "scores.csv", rows, tc.COLUMNS)
    seen, panel = [], plot._few_shot_panel
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plot, "_few_shot_panel", lambda ax, metric, rows: seen.append((ax, panel(ax, metric, rows))))
        plot.main([str(tmp_path / "scores.csv")])
    out = capsys.readouterr().out
    assert out.index("**task ner, metric f1**") < out.index("| 51.40 ± 2.48 | 52.60") < out.index("**task pos, metric acc**") < out.index("| 81.40 ± 2.48 |")
    assert [ax.get_ylabel() for ax, _ in seen] == ["test span F1, %", "test accuracy, %"]


def test_only_the_backbones_that_were_read_decide_what_is_a_pair(tmp_path, capsys):
    """fw never reads --model_bw, bw never --model, where both are given."""
    a, b = "runs/4x32_pbw0_seed{}_abcdef", "runs/4x32_pbw1_seed{}_abcdef"
    rows = [row_of(0.5 + 0.01 * k, model=a.format(k), model_bw=bw) for k in range(3) for bw in ("", b.format(k))]
    rows += [row_of(0.4 + 0.01 * k, features="bw", model=a.format(0), model_bw=b.format(k)) for k in range(3)]
    tc.runs.write_table(tmp_path / "scores.csv", rows, tc.COLUMNS)
    plot.main([str(tmp_path / "scores.csv")])
    out = capsys.readouterr().out
    assert "| 3 | 51.00 ± 2.48 |" in out and "| 3 | 41.00 ± 2.48 |" in out


def test_a_folder_as_shells_complete_it_is_the_same_model():
    plain, completed = (tc.named(tc.Settings(model=f"runs/A{end}", model_bw=f"runs/B{end}")) for end in ("", "/"))
    assert plain == completed and tc.named(tc.Settings(model="gpt2"))["model_bw"] is None
