"""Figures by size: heat maps of ratio 1, both ratios by depth, width and parameters, bw against bw only.

    python plot_results.py results/demo --figure ratio1_heatmap ratio1_by_size ratio2_by_size bw_by_size
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.ticker import NullLocator

from cells import BW_ONLY, FW_ONLY, Cell, Study, variants
from compare import ORDER_WORDS, ORDERS, Ratios, average, bw_against_bw_only, final_ratio, log_ratios, ratio_curve, window_log_ratios, windows
from drawing import (
    CHOICE, METRIC_LABELS, UNDECIDED, Options, by_group, coloured_cells, includes_one, label_ends, meaning, new_figure, pick, plain_log_axis, runs_of,
    save, variant_colours,
)  # fmt: skip
from report import describe, short
from stats import paired_interval


def ratio1_heatmap(study: Study, options: Options = Options()) -> list[Path]:
    """Depth x width heat maps of ratio 1, fw and bw, at the last evaluation (or averaged over --epochs FROM TO)."""
    metric, order, paths = options.metric or "loss", options.order or ORDERS[0], []
    variant, _ = pick(study, options, "ratio1", metric)
    both = [by_group(study, pick(study, options, "ratio1", metric, direction)[1]) for direction in ("fw", "bw")]
    for group, cells in both[0].items():
        sizes = [cell for cell in study.cells if cell.group == group]
        depths, widths = sorted({cell.depth for cell in sizes}), sorted({cell.width for cell in sizes})
        figure, axes = new_figure(1, 2, (2.2 + 2.1 * max(len(widths), 1.6), 1.4 + 0.75 * max(len(depths), 1.6)))
        tables = []
        for ax, ratios, direction in zip(axes[0], both, ("fw", "bw")):
            table, undecided = np.full((len(depths), len(widths)), np.nan), np.zeros((len(depths), len(widths)), bool)
            for cell, terms in ratios.get(group, {}).items():
                place = depths.index(cell.depth), widths.index(cell.width)
                value, logs = final_ratio(terms, order), log_ratios(terms)
                if options.epochs:
                    _, top, bottom = ratio_curve(terms, "epoch", options.epochs)
                    value = average(top, bottom, order).mean() if top.size else np.nan
                    logs = window_log_ratios(terms, options.epochs)
                table[place], undecided[place] = value, includes_one(logs) if len(logs) else False
            tables.append(table)
            ax.set_xticks(range(len(widths)), widths)
            ax.set_yticks(range(len(depths)), depths)
            ax.set_xlabel("width", fontsize=8)
            ax.set_ylabel("depth", fontsize=8)
            ax.set_title("fw" if direction == "fw" else "bw (p_bw = 0 never learned it)", fontsize=9)
            coloured_cells(figure, [ax], [table], [np.isnan(table)], [undecided], 9)  # a scale each: bw ratios are much larger
            for row, column in np.argwhere(np.isnan(table)):
                ax.text(column, row, "no pair", ha="center", va="center", fontsize=8, backgroundcolor="w")
        missing = [f"{depths[row]} x {widths[column]}" for row, column in np.argwhere(np.isnan(tables[0]))]
        if missing:
            study.note(f"ratio 1 heat map ({study.heading(group)}): no pair for {', '.join(missing)}")
        when = "Mean over epochs {:g} to {:g}".format(*options.epochs) if options.epochs else f"At the end of training, at equal {options.equal}"
        caption = f"{meaning('ratio1', metric, variant.label)} Right: the same of bw. {when}, {ORDER_WORDS[order]}. {UNDECIDED}" + describe(runs_of(cells)) + "."
        caption += f" Hatched, no pair: {', '.join(missing)}." if missing else ""
        title = f"Ratio 1 of {METRIC_LABELS[metric]} by depth and width, {variant.label}, {study.heading(group)}"
        name = "ratio1_heatmap" + options.tag("metric", "epochs", "order", *CHOICE)
        paths.append(save(study, figure, group, name, title, caption))
    return paths


def ratio1_by_size(study: Study, options: Options = Options()) -> list[Path]:
    """Ratio 1 by depth, width and parameters, for early, all and late training; see `_by_size`."""
    return _by_size(study, options, "ratio1")


def ratio2_by_size(study: Study, options: Options = Options()) -> list[Path]:
    """Ratio 2 by depth, width and parameters, for early, all and late training; see `_by_size`."""
    return _by_size(study, options, "ratio2")


def bw_by_size(study: Study, options: Options = Options()) -> list[Path]:
    """Is it enough? bw loss over that of the model that learned bw only, by size, a line per variant."""
    paths = []
    trained = {v: bw_against_bw_only(study, v) for v in variants(study) if v not in (FW_ONLY, BW_ONLY)}
    for group in study.groups:
        lines = {v: {cell: terms for cell, terms in ratios.items() if cell.group == group} for v, ratios in trained.items()}
        lines = {v: cells for v, cells in lines.items() if cells}
        if sum(map(len, lines.values())) < 2:
            study.note(f"bw by size, {study.heading(group)}: fewer than two sizes or p_bw have a partner in bw only")
            continue
        figure, [[ax]] = new_figure(1, 1, (7.6, 4.2))
        ax.axhline(1, color="0.5", linewidth=1)
        labels, colours = [], variant_colours(study)
        for number, (variant, cells) in enumerate(lines.items()):
            last = _size_line(ax, cells, 1.012 ** (number - (len(lines) - 1) / 2), colours[variant])  # intervals of one size beside each other
            labels.append((last, f"{variant.label}: {last:.3f}", colours[variant]))
        _size_axis(ax, sorted({cell for cells in lines.values() for cell in cells}, key=lambda cell: cell.params))
        ax.set_ylabel("bw loss / bw loss of bw only", fontsize=8)
        label_ends(ax, labels)
        caption = f"1: bw is learned as well as by a model that learns nothing else. At equal {options.equal}, paired by seed. Small: each seed; "
        caption += "large: geometric mean with 95 % t-interval. " + describe([run for cells in lines.values() for run in runs_of(cells)]) + "."
        title = f"How well bw is learned beside fw, by size, {study.heading(group)}"
        paths.append(save(study, figure, group, "bw_by_size" + options.tag(), title, caption))
    return paths


def _size_line(ax, cells: Ratios, aside: float, colour: str) -> float:
    """Seeds, geometric means and intervals over parameters (times `aside`); returns the largest size's mean."""
    ratio, low, high = zip(*(paired_interval(log_ratios(terms)) for terms in cells.values()))
    params = np.array([cell.params for cell in cells]) * aside
    for x, terms in zip(params, cells.values()):
        ax.plot(np.full(len(terms), x), np.exp(log_ratios(terms)), "o", color=colour, markersize=2.5, alpha=0.5, markeredgewidth=0)
    reach = np.nan_to_num([np.subtract(ratio, low), np.subtract(high, ratio)])
    ax.errorbar(params, ratio, reach, color=colour, linewidth=1.5, marker="o", markersize=4, capsize=2, elinewidth=0.8)
    return ratio[-1]


def _size_axis(ax, sizes: list[Cell]) -> None:
    ax.set_xscale("log")
    ax.set_yscale("log")
    plain_log_axis(ax.yaxis)
    ax.set_xticks([cell.params for cell in sizes], [f"{cell.label}\n{short(cell.params)}" for cell in sizes], fontsize=7)
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("size, parameters", fontsize=8)


class Place(NamedTuple):
    """One violin: a depth, a width or a number of parameters, in one part of training."""

    points: np.ndarray  # 500 of the seed-averaged ratio for each of its sizes
    means: np.ndarray  # the ratio of every seed and size, its geometric mean over the part
    interval: tuple[float, float, float]  # geometric mean of those over sizes and common seeds; 95 % t-interval over seeds


def places(cells: Ratios, by: str, window: str, options: Options) -> dict[int, Place]:
    """{depth, width or params: its violin} for one of `windows`; sizes whose runs do not reach it are left out."""
    found: dict[int, list] = {}
    for cell, terms in cells.items():
        parts = windows(terms, options.axis, options.epochs)
        grid, top, bottom = ratio_curve(terms, options.axis, parts[window]) if window in parts else (np.empty(0), None, None)
        if len(grid):
            seeds = dict(zip((term.seed for term in terms), np.log(top / bottom).mean(1)))  # as in the table over training
            found.setdefault(getattr(cell, by), []).append((average(top, bottom, options.order or ORDERS[0]), seeds))
    result = {}
    for value, several in sorted(found.items()):
        common = sorted(set.intersection(*(set(seeds) for _, seeds in several)))  # a mean over sizes needs the seeds that all of them have
        means = np.array([np.mean([seeds[seed] for _, seeds in several]) for seed in common])
        interval = tuple(map(float, paired_interval(means))) if common else (np.nan,) * 3
        everyone = np.exp([log for _, seeds in several for log in seeds.values()])
        result[value] = Place(np.concatenate([points for points, _ in several]), everyone, interval)
    return result


def _by_size(study: Study, options: Options, ratio: str) -> list[Path]:
    """A row per part of training, a column per way to order sizes (left out where it tells none apart, or all of them)."""
    metric, paths = options.metric or "loss", []
    variant, ratios = pick(study, options, ratio, metric)
    for group, cells in by_group(study, ratios).items():
        rows = [f"epochs {options.epochs[0]:g} to {options.epochs[1]:g}"] if options.epochs else ["early", "all", "late"]
        panels = {(row, by): places(cells, by, row, options) for row in rows for by in ("depth", "width", "params")}
        rows = [row for row in rows if panels[row, "params"]]
        if not rows:
            study.note(f"{ratio} by size, {study.heading(group)}: no two evaluations to interpolate between in the window")
            continue
        columns = [by for by in ("depth", "width", "params") if by == "params" or 1 < len({getattr(cell, by) for cell in cells}) < len(cells)]
        shares = [max(2.2, 0.8 * len({getattr(cell, by) for cell in cells})) for by in columns]
        if len(columns) > 1:
            figure, axes = new_figure(len(rows), len(columns), (1.6 + sum(shares), 0.7 + 2.6 * len(rows)), sharey="row", width_ratios=shares)
        else:  # few sizes: the parts of training side by side
            figure, axes = new_figure(1, len(rows), (max(1.2 + shares[0], 3.4) * len(rows), 3.6), sharey=True)
            axes = axes.T
        for (row, column), ax in np.ndenumerate(axes):
            by = columns[column]
            _violin_panel(ax, panels[rows[row], by], by)
            if column == 0:
                ax.set_ylabel(f"{ratio[:5]} {ratio[5:]} of {METRIC_LABELS[metric]}", fontsize=8)
                ax.set_title(_span(cells, rows[row], options, ", " if len(columns) > 1 else "\n"), fontsize=8, loc="left")
        for ax, row in zip(axes[:, -1], rows):
            drawn = np.concatenate([np.concatenate([place.points, place.means, place.interval]) for place in panels[row, "params"].values()])
            drawn = drawn[np.isfinite(drawn)]
            if drawn.min() > 0 and drawn.max() > 4 * drawn.min():
                for panel in ax.get_shared_y_axes().get_siblings(ax):
                    panel.set_yscale("log")
                    plain_log_axis(panel.yaxis)
        caption = f"{meaning(ratio, metric, variant.label)} Orange: each seed and size, the geometric mean over that part of training; black: "
        caption += f"their mean over the seeds that all of its sizes have, with a 95 % t-interval over seeds, at equal {options.equal}. Violins, as illustration: 500 points per "
        caption += "size of the mean over seeds; their extent is change during training, not uncertainty. "
        missed = {row: [cell.label for cell, terms in cells.items() if row not in windows(terms, options.axis, options.epochs)] for row in rows}
        caption += "".join(f"Not in {row}: {', '.join(labels)}. " for row, labels in missed.items() if labels)
        caption += "early: the first epoch; late: the second half. " if not options.epochs else ""
        name = f"{ratio}_by_size" + options.tag("metric", "epochs", "order", *CHOICE)
        title = f"{ratio[:5].title()} {ratio[5:]} of {METRIC_LABELS[metric]} by size, {variant.label}, {study.heading(group)}"
        paths.append(save(study, figure, group, name, title, caption + describe(runs_of(cells)) + "."))
    return paths


def _span(cells: Ratios, row: str, options: Options, between: str) -> str:
    """A part of training with its epochs, tokens and steps, from the first to the last of all sizes."""
    spans = []
    for terms in cells.values():
        window = windows(terms, options.axis, options.epochs).get(row)
        for term in terms if window else ():
            table = term.top.curve
            spans.append([np.interp(window, [0.0, *table[options.axis]], [0.0, *table[x]]) for x in ("epoch", "tokens_total", "step")])
    low, high = np.min(spans, 0)[:, 0], np.max(spans, 0)[:, 1]
    tokens, steps = f"tokens {short(low[1])} to {short(high[1])}", f"steps {short(low[2])} to {short(high[2])}"
    return between.join([f"{row}: epochs {low[0]:.2g} to {high[0]:.3g}", f"{tokens}, {steps}"])


def _violin_panel(ax, values: dict[int, Place], by: str) -> None:
    spots = np.arange(len(values))
    ax.axhline(1, color="0.5", linewidth=1)
    if values:
        for body in ax.violinplot([place.points for place in values.values()], spots, widths=0.8, showextrema=False)["bodies"]:
            body.set(facecolor="#56B4E9", edgecolor="#0072B2", alpha=0.45)
    for spot, place in zip(spots, values.values()):
        ax.plot(np.full(len(place.means), spot - 0.12), place.means, "o", color="#D55E00", markersize=3.5, markeredgecolor="w", markeredgewidth=0.4)
        mean, low, high = place.interval
        if np.isfinite(low):
            ax.plot([spot + 0.12] * 2, [low, high], color="k", linewidth=1.4)
        ax.plot(spot + 0.12, mean, "D", color="k", markersize=4)
        ax.annotate(f"{mean:.3f}", (spot, 0.015), xycoords=("data", "axes fraction"), ha="center", fontsize=7)
    ax.margins(y=0.14)
    ax.set_xlim(-0.6, len(values) - 0.4)
    ax.set_xticks(spots, [short(value) if by == "params" else f"{value}" for value in values])
    ax.tick_params(axis="x", rotation=45 if by == "params" and len(values) > 4 else 0)
    ax.set_xlabel("parameters" if by == "params" else by, fontsize=8)
