"""The numbers on seeds, slopes and sizes in README.md, and figures/slopes.png: python results/wikipedia-4k-long/table.py

A model's *smallest slope* is that of the layer that sees furthest, at the end of training (slopes.csv).
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from cells import BW_ONLY, Variant, load  # noqa: E402
from compare import against_alone, bw_against_bw_only, final, log_ratios, ratio1, ratio_curve  # noqa: E402
from drawing import new_figure, plain_log_axis, save, variant_colours  # noqa: E402
from report import describe, interval  # noqa: E402
from stats import paired_p  # noqa: E402

PARTS = {"all": range(1000), "seeds 100 to 104": range(105), "the others": range(105, 1000)}  # the first five raised the question
FIVE, BOTH = Variant("fw+bw", 0.05), Variant("fw+bw", 1.0)
study = load(HERE)
cell = next(cell for cell in study.cells if (cell.depth, cell.width) == (4, 128))
by = study.cells[cell]
smallest = pd.read_csv(HERE / "slopes.csv").groupby("run")["slope"].min()


def rank_correlation(x: list[float], y: list[float]) -> str:
    rho, p = spearmanr(x, y)
    return f"rank correlation {rho:.2f}, p = {p:.2g}, n = {len(x)}"


for variant, seeds in by.items():
    column = "bw_loss" if variant == BW_ONLY else "fw_loss"
    slopes, losses = [smallest[run.name] for run in seeds.values()], [final(run, column) for run in seeds.values()]
    print(f"{variant.label}: smallest slopes {' '.join(f'{slope:.4f}' for slope in sorted(slopes))}; {column} {min(losses):.3f} to {max(losses):.3f}")
    for part, members in PARTS.items():
        chosen = [i for i, seed in enumerate(seeds) if seed in members]
        if len(chosen) > 3:
            print(f"    {column} against slope, {part}:", rank_correlation([slopes[i] for i in chosen], [losses[i] for i in chosen]))

for variant in (FIVE, BOTH):
    for part, members in PARTS.items():
        terms = [term for term in ratio1(study, variant)[cell] if term.seed in members]
        if not terms:
            continue
        _, top, bottom = ratio_curve(terms, "tokens_total")
        logs, ends = np.log(top / bottom), log_ratios(terms)
        points = ", ".join(f"{where} {interval(logs[:, place], 3)}" for where, place in (("first", 0), ("middle", 250)))
        print(f"ratio 1 of {variant.label}, {part} (n = {len(terms)}): {points}, end {interval(ends, 3)}, p = {paired_p(ends):.2g}; "
              f"end / first {interval(ends - logs[:, 0], 3)}")  # fmt: skip
        gaps = np.array([np.log(smallest[term.bottom.name] / smallest[term.top.name]) for term in terms])
        print(f"    its smallest slope / that of p_bw = 0: {interval(gaps, 2)}, lower in {(gaps < 0).sum()} of {len(gaps)} pairs;",
              "ratio 1 against that:", rank_correlation(gaps, ends))  # fmt: skip

for name, ratios in (
    ("ratio 1, p_bw = 0.05", ratio1(study, FIVE)), ("ratio 1, p_bw = 1", ratio1(study, BOTH)), ("bw / bw only, p_bw = 0.05", bw_against_bw_only(study, FIVE)),
    ("fw / p_bw = 0 at equal fw tokens, p_bw = 1", against_alone(study, BOTH, "fw")), ("bw / bw only at equal bw tokens, p_bw = 1", against_alone(study, BOTH, "bw")),
):  # fmt: skip
    small, large = ({term.seed: value for term, value in zip(terms, log_ratios(terms))} for _, terms in sorted(ratios.items(), key=lambda item: item[0].params))
    seeds = sorted(set(small) & set(large))
    sizes = [np.array([size[seed] for seed in seeds]) for size in (small, large)]
    print(f"{name}, seeds {seeds}: 4 x 128 {interval(sizes[0], 3)}, 4 x 256 {interval(sizes[1], 3)}, second / first {interval(sizes[1] - sizes[0], 3)}")

for variant in (FIVE, BOTH):
    (terms,) = (terms for other, terms in ratio1(study, variant).items() if other != cell)
    gaps = np.log([final(term.bottom, "slope_min") / final(term.top, "slope_min") for term in terms])
    print(f"4 x 256, {variant.label}: smallest slope / that of p_bw = 0 {interval(gaps, 2)}, lower in {(gaps < 0).sum()} of {len(gaps)} pairs")

figure, [[ax]] = new_figure(1, 1, (8, 4.6))
shown = [run for variant, seeds in by.items() if variant.trains("fw") for run in seeds.values()]
for variant, seeds in by.items():
    if variant.trains("fw"):
        points = np.array([(smallest[run.name], final(run, "fw_loss")) for run in seeds.values()])
        points[:, 0] = np.maximum(points[:, 0], 1e-4)
        ax.scatter(*points.T, s=28, color=variant_colours(study)[variant], label=f"{variant.label} (n = {len(points)})")
ax.set_xscale("log")
plain_log_axis(ax.xaxis)
ax.set_xlabel("smallest learned slope of a model's layers at the end (left: a layer sees far)", fontsize=8)
ax.set_ylabel("fw validation loss, nats per token", fontsize=8)
ax.legend(frameon=False, fontsize=8)
caption = "Each point is a model: its fw loss, and the slope of the layer that sees furthest. A token d places away keeps e^(-slope d) of its weight. "
caption += "Slopes below 0.0001 are drawn there. p_bw = 1 has read half as much text forward. "
print(save(study, figure, cell.group, "slopes", f"How far the layers of {cell.label} see, and their fw loss", caption + describe(shown) + "."))
