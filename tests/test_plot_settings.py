"""by_setting: every value of a setting with pairs of its own, on planted tables."""

import pytest
from test_plot_results import P5, plant, small_pictures  # noqa: F401

import plot_results
import plot_settings
from cells import BW_ONLY, FW_ONLY, load
from plot_settings import sweeps

RATES = {0.002: 1.02, 0.008: 1.01, 0.016: 0.99, None: 1.05}  # ratio 1 of each


def plant_rates(study, rates=RATES, seeds=(0, 1), **common):
    for lr, ratio in rates.items():
        for seed in seeds:
            fw = 4.0 + (lr or 1.0) + 0.1 * seed
            plant(study, seed=seed, fw=fw, lr=lr, layers=False, **common)
            plant(study, seed=seed, fw=fw / ratio, bw=6.0, p_bw=0.05, lr=lr, layers=False, **common)
            plant(study, seed=seed, fw=9.0, bw=5.0, p_bw=1.0, task="bw", lr=lr, layers=False, **common)


def drawn(monkeypatch):
    """What every panel is given."""
    seen, draw = [], plot_settings._panel
    monkeypatch.setattr(plot_settings, "_panel", lambda ax, values, lines, colours, geometric: seen.append(lines) or draw(ax, values, lines, colours, geometric))
    return seen


def test_every_value_is_compared_with_its_own_controls(tmp_path, monkeypatch, capsys):
    plant_rates(tmp_path)
    panels = drawn(monkeypatch)
    (path,) = plot_results.main([str(tmp_path), "--figure", "by_setting"])
    assert path.name == "by_lr_2x64.png"
    fw, bw, first, enough = panels
    assert set(fw) == {FW_ONLY, P5} and set(bw) == {P5, BW_ONLY} and set(first) == set(enough) == {P5}
    assert list(first[P5]) == ["0.002", "0.008", "0.016", "none"]  # numbers in order, words last
    for value, ratio in zip(first[P5], RATES.values()):
        assert first[P5][value] == pytest.approx(dict.fromkeys((0, 1), ratio)) and enough[P5][value] == pytest.approx(dict.fromkeys((0, 1), 1.2))
    assert fw[FW_ONLY]["0.016"] == pytest.approx({0: 4.016, 1: 4.116}) and bw[BW_ONLY]["none"] == pytest.approx({0: 5.0, 1: 5.0})


def test_two_settings_make_a_figure_for_each_value_of_the_other_and_sizes_stay_apart(tmp_path):
    for batch in (256, 512):
        plant_rates(tmp_path, {0.002: 1.0, 0.004: 1.0}, batch_tokens=batch)
    plant_rates(tmp_path, {0.002: 1.0, 0.004: 1.0}, width=128, batch_tokens=256)
    found = {(sweep.width, sweep.setting, sweep.group.extras): list(cells) for sweep, cells in sweeps(load(tmp_path)).items()}
    assert found == {
        (64, "lr", (("batch_tokens", "256"),)): ["0.002", "0.004"], (64, "lr", (("batch_tokens", "512"),)): ["0.002", "0.004"],
        (64, "batch_tokens", (("lr", "0.002"),)): ["256", "512"], (64, "batch_tokens", (("lr", "0.004"),)): ["256", "512"],
        (128, "lr", (("batch_tokens", "256"),)): ["0.002", "0.004"],
    }  # fmt: skip
    paths = plot_results.main([str(tmp_path), "--figure", "by_setting"])
    assert len(set(paths)) == 5 and all(path.exists() for path in paths)


def test_a_value_without_pairs_has_losses_and_no_ratio(tmp_path, monkeypatch):
    plant_rates(tmp_path, {0.002: 1.02, 0.008: 1.01})
    plant(tmp_path, fw=4.5, lr=0.032, layers=False)
    panels = drawn(monkeypatch)
    assert plot_results.main([str(tmp_path), "--figure", "by_setting"])
    assert list(panels[0][FW_ONLY]) == ["0.002", "0.008", "0.032"] and list(panels[2][P5]) == ["0.002", "0.008"]


def test_words_and_a_study_of_forward_only_runs_can_be_drawn_and_one_without_a_sweep_has_no_figure(tmp_path, capsys):
    for optimizer in ("adamw", "muon"):
        plant(tmp_path / "words", fw=4.0, optimizer=optimizer, layers=False)
    assert [path.name for path in plot_results.main([str(tmp_path / "words"), "--figure", "by_setting"])] == ["by_optimizer_2x64.png"]
    plant_rates(tmp_path / "one", {0.002: 1.0})
    assert plot_results.main([str(tmp_path / "one"), "--figure", "by_setting"]) == []


def test_the_caption_counts_seeds_not_runs(tmp_path):
    plant_rates(tmp_path)
    plant(tmp_path, fw=4.0, seed=2, lr=0.002, layers=False)
    study = load(tmp_path)
    ((_, cells),) = sweeps(study).items()
    by = {value: study.cells[cell] for value, cell in cells.items()}
    assert plot_settings._numbers(by) == "Seeds: 2 to 3 at 0.002, 2 at 0.008, 2 at 0.016, 2 at none. "
    runs = [run for value in by.values() for seeds in value.values() for run in seeds.values()]
    assert "n = 2 to 3 seeds (0, 1, 2)" in plot_results.describe(runs)
