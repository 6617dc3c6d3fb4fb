"""The pareto figure: a sweep of p_bw is drawn from the same seeds, or says how many each point has."""

from test_plot_results import P5, plant, small_pictures  # noqa: F401

import plot_tradeoff
from cells import BW_ONLY, FW_ONLY, Variant, load
from drawing import Options

HALF = Variant("fw+bw", 0.5)


def drawn(folder, monkeypatch):
    """The runs of a study's one panel, and its labels."""
    panels, labels, draw = [], [], plot_tradeoff._sweep_panel
    monkeypatch.setattr(plot_tradeoff, "_sweep_panel", lambda ax, by, value: panels.append(by) or draw(ax, by, value))
    monkeypatch.setattr(plot_tradeoff, "label_points", lambda ax, points: labels.extend(text for *_, text, _ in points))
    plot_tradeoff.pareto(load(folder), Options())
    return panels[0], labels


def plant_sweep(folder, seeds_of_half):
    """The seeds that only the smaller p_bw have are worse: a mean over all of them would turn the order round."""
    for seed in range(5):
        worse = 0.5 * (seed not in seeds_of_half)
        for p_bw, fw, bw in ((0.0, 3.0, 9.0), (0.05, 3.1, 6.0)):
            plant(folder, seed=seed, fw=fw + worse, bw=bw, p_bw=p_bw, layers=False)
        plant(folder, seed=seed, fw=9.0, bw=4.0, p_bw=1.0, task="bw", layers=False)
    for seed in seeds_of_half:
        plant(folder, seed=seed, fw=3.2, bw=4.5, p_bw=0.5, layers=False)


def test_points_of_a_sweep_are_means_over_the_seeds_that_all_of_them_have(tmp_path, monkeypatch):
    plant_sweep(tmp_path, (1, 2, 4))
    by, labels = drawn(tmp_path, monkeypatch)
    assert {variant: sorted(seeds) for variant, seeds in by.items()} == dict.fromkeys((FW_ONLY, P5, HALF, BW_ONLY), [1, 2, 4])
    assert labels == ["5 %", "50 %"]


def test_where_too_few_have_all_points_say_how_many_they_are_of(tmp_path, monkeypatch):
    plant_sweep(tmp_path, (1, 2))
    by, labels = drawn(tmp_path, monkeypatch)
    assert len(by[P5]) == 5 and len(by[HALF]) == 2 and labels == ["5 % (n = 5)", "50 % (n = 2)"]
