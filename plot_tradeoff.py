"""Two figures on what p_bw buys: fw loss against bw loss (pareto), and what repeated text does to both (repeats).

    python plot_results.py results/toyworld --figure pareto repeats
"""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import Callable

import numpy as np
from matplotlib.ticker import NullLocator

from cells import BUDGETS, BW_ONLY, FW_ONLY, Cell, Study, Variant, corpus_tokens
from compare import bw_against_bw_only, final, log_ratios, lowest, share_of_the_way, value_at
from drawing import CHOICE, COLOURS, DASHES, Options, label_ends, label_points, new_figure, numbered, plain_log_axis, save, variant_colours
from report import describe, floor_of, interval, short
from runs import BW_SETTINGS, Run
from stats import mean_interval

TASK_STYLES = {"fw+bw": ("#0072B2", "o"), "fw-or-bw": ("#D55E00", "s"), "adaptive": ("#CC79A7", "D")}
USUAL, SIGNS = tuple(BW_SETTINGS.values()), {"bw_weight": "x", "bw_start": "from", "bw_end": "to"}
TASK_LABELS = {"fw+bw": "fw plus bw", "fw-or-bw": "fw or bw", "adaptive": "adaptive p_bw"}

# ---------------------------------------------------------------------------------------------------------------------
# fw loss against bw loss
# ---------------------------------------------------------------------------------------------------------------------


def pareto(study: Study, options: Options = Options()) -> list[Path]:
    """fw loss against bw loss at the end of training: a panel for each size with several p_bw, and one for all sizes."""
    paths, chosen = [], options.chosen(study)
    for group in study.groups:
        cells = [cell for cell in study.cells if cell.group == group and set(study.cells[cell]) - {FW_ONLY, BW_ONLY}]
        swept = [cell for cell in cells if len(set(study.cells[cell]) - {FW_ONLY, BW_ONLY}) > 1]
        sizes = [cell for cell in cells if chosen in study.cells[cell]]
        together = len(sizes) > 1
        panels = len(swept) + together
        if not panels:
            study.note(f"pareto, {study.heading(group)}: nothing to hold one point against")
            continue
        columns = min(panels, 3)
        rows = -(-panels // columns)
        wide = 6.4 if columns == 1 else 5.2
        figure, axes = new_figure(rows, columns, (wide * columns, 0.8 + 0.8 * wide * rows))
        for ax in axes.flat[panels:]:
            ax.set_visible(False)
        alike = {cell: _alike(study.cells[cell]) for cell in swept}
        for ax, (cell, by) in zip(axes.flat, alike.items()):
            _sweep_panel(ax, by, _values(by, options.budget))
            ax.set_title(f"{cell.label} ({short(cell.params)})", fontsize=9, loc="left")
        if together:
            _sizes_panel(axes.flat[panels - 1], {cell: {chosen: study.cells[cell][chosen]} for cell in sizes}, chosen)
        shown = {cell: alike[cell] if cell in swept else {chosen: study.cells[cell][chosen]} for cell in {*swept, *(sizes * together)}}
        runs = [run for by in shown.values() for seeds in by.values() for run in seeds.values()]
        where = "at the end of training" if options.budget == "tokens" else f"at equal {options.equal}, where the first run of a sweep ends"
        caption = f"Validation loss {where}; down and left is better. Small: each seed; large: mean over seeds with 95 % t-intervals, which may "
        different = [f"{name} (behind {SIGNS.get(name, name)})" for name, usual in BW_SETTINGS.items() if any(getattr(v, name) != usual for by in shown.values() for v in by)]
        caption += f"reach out of the picture; lines join rising p_bw within {' and '.join(['a task', *different])}. "
        caption += "All sizes: at the end of training, of all seeds; colour tells the width, marker the depth. " if together else ""
        fewer = [cell.label for cell in swept if alike[cell] != study.cells[cell]]
        caption += f"{', '.join(fewer)}: of the seeds that every p_bw has. " if fewer else ""
        caption += "Points with another n are means over other seeds, which are no pairs. " if any(len({*map(len, alike[cell].values())}) > 1 for cell in swept) else ""
        if swept:
            caption += "Grey lines and bands: models trained in one direction only, with their interval; their other loss is far off the scale. "
        caption += _enough(study, cells, options) + describe(runs) + "."
        title = f"What p_bw buys: fw loss against bw loss, {study.heading(group)}"
        paths.append(save(study, figure, group, "pareto" + options.tag(*CHOICE), title, caption))
    return paths


def _alike(by: dict[Variant, dict]) -> dict[Variant, dict]:
    """Of every variant the seeds that all of them have, where these are three or more: means over different seeds are no pairs."""
    common = set.intersection(*map(set, by.values()))
    return {variant: {seed: seeds[seed] for seed in seeds if seed in common} for variant, seeds in by.items()} if len(common) >= 3 else by


def _values(by: dict[Variant, dict], budget: str) -> Callable[[Run, str], float]:
    """How to read a run's loss: at its end, or where the first of the runs that learn fw ends on another budget's axis."""
    if budget == "tokens":
        return final
    x = BUDGETS[budget]
    end = min(run.curve[x].max() for variant, seeds in by.items() if variant.trains("fw") for run in seeds.values())

    def value(run: Run, column: str) -> float:
        untrained = column == "bw_loss" and not np.interp(end, run.curve[x], run.curve["tokens_bw"])  # bw_start is still to come
        return np.nan if untrained else value_at(run, column, x, end)

    return value


def _enough(study: Study, cells: list[Cell], options: Options) -> str:
    """How near the chosen p_bw comes to bw only, in numbers, where the control was trained."""
    variant = options.chosen(study)
    found = {cell: terms for cell, terms in bw_against_bw_only(study, variant).items() if cell in cells}
    text = ""
    for cell, terms in found.items():
        share, half = mean_interval(share_of_the_way(study, variant, cell)) if FW_ONLY in study.cells[cell] else (np.nan, np.nan)
        way = "" if np.isnan(half) else f", {100 * share:.1f} ± {100 * half:.1f} % of the way from p_bw = 0"
        text += f"{cell.label}: bw loss at {variant.label} / bw only, equal {options.equal}: {interval(log_ratios(terms), 3)}{way}. "
    return text


def _sweep_panel(ax, by: dict[Variant, dict], value: Callable[[Run, str], float]) -> None:
    labels, bounds = [], ([], [])
    by = {v: seeds for v, seeds in by.items() if v == FW_ONLY or all(np.isfinite(value(run, "bw_loss")) for run in seeds.values())}
    swept = [variant for variant in by if variant not in (FW_ONLY, BW_ONLY)]
    for task in dict.fromkeys(variant.task for variant in swept):
        colour, marker = TASK_STYLES.get(task, ("#000000", "^"))  # a task of one's own
        hows = sorted({variant.how for variant in swept if variant.task == task}, key=lambda how: (how != USUAL, how))
        for how, dash, sign in zip(hows, cycle(DASHES), cycle((marker, "^", "v", "P", "X", "<", ">"))):
            line = [variant for variant in swept if (variant.task, variant.how) == (task, how)]
            means = [_cross(ax, by[variant].values(), colour, sign, bounds, value) for variant in line]
            told = [(name, value) for name, value in zip(BW_SETTINGS, how) if value != BW_SETTINGS[name]]
            name = ", ".join([TASK_LABELS.get(task, task), *(f"{name} {value:g}" for name, value in told)])
            ax.plot(*np.array(means).T, dash, color=colour, linewidth=1, marker=sign, markersize=5, label=name)
            signs = [f"{SIGNS.get(name, name)} {value:g}" for name, value in told]
            names = [" ".join([f"{100 * variant.p_bw:g} %"] * (task != "adaptive") + signs) for variant in line]
            names = [numbered(text, by[variant], [by[other] for other in swept]) for text, variant in zip(names, line)]
            labels += [(*mean, name, colour) for mean, name in zip(means, names)]
    for variant, column, axis in ((FW_ONLY, "fw_loss", 0), (BW_ONLY, "bw_loss", 1)):
        if variant in by:
            bounds[axis].extend(value(run, column) for run in by[variant].values())
    _scales(ax, bounds, floor_of(run for seeds in by.values() for run in seeds.values()))
    for variant, column, upright in ((FW_ONLY, "fw_loss", True), (BW_ONLY, "bw_loss", False)):
        if variant in by:
            mean, half = mean_interval([value(run, column) for run in by[variant].values()])
            (ax.axvline if upright else ax.axhline)(mean, color="0.55", linewidth=1)
            if np.isfinite(half):
                (ax.axvspan if upright else ax.axhspan)(mean - half, mean + half, color="0.55", alpha=0.15, linewidth=0)
            _edge_note(ax, mean, f"{'fw only' if upright else 'bw only'} {mean:.3f}", upright)
    if len({(variant.task, variant.how) for variant in swept}) > 1:
        ax.legend(fontsize=7, frameon=False, loc="upper right")
    label_points(ax, labels)


def _sizes_panel(ax, cells: dict[Cell, dict], variant: Variant) -> None:
    widths, depths, bounds, labels = sorted({cell.width for cell in cells}), sorted({cell.depth for cell in cells}), ([], []), []
    for cell, by in cells.items():
        colour, marker = COLOURS[widths.index(cell.width) % len(COLOURS)], "os^Dv"[depths.index(cell.depth) % 5]
        mean = _cross(ax, by[variant].values(), colour, marker, bounds, final)
        ax.plot(*mean, marker, color=colour, markersize=5)
        labels.append((*mean, cell.label, colour))
    _scales(ax, bounds, floor_of(run for by in cells.values() for run in by[variant].values()))
    ax.set_title(f"{variant.label}, all sizes", fontsize=9, loc="left")
    label_points(ax, labels)


def _cross(ax, runs, colour: str, marker: str, bounds: tuple[list, list], value: Callable[[Run, str], float]) -> np.ndarray:
    """Seeds as dots, 95 % t-intervals of both losses as a cross; returns the means (2,) and adds what must be in view."""
    points = np.array([[value(run, "fw_loss"), value(run, "bw_loss")] for run in runs])
    mean, half = mean_interval(points.T)
    ax.plot(*points.T, marker, color=colour, markersize=2.5, alpha=0.45, markeredgewidth=0)
    if np.isfinite(half).all():
        ax.plot([mean[0] - half[0], mean[0] + half[0]], [mean[1]] * 2, color=colour, linewidth=0.8, alpha=0.8)
        ax.plot([mean[0]] * 2, [mean[1] - half[1], mean[1] + half[1]], color=colour, linewidth=0.8, alpha=0.8)
    for seen, values in zip(bounds, points.T):
        seen.extend(values)
    return mean


def _scales(ax, bounds: tuple[list, list], floor: tuple[float, float] | None) -> None:
    """Axes that show every seed and no more: an interval may be wider, and the floor only has its line if it is near."""
    far = []
    for values, axis in zip(bounds, (ax.xaxis, ax.yaxis)):
        x, low, high = axis is ax.xaxis, min(values), max(values)
        near = floor and np.log(high / floor[0]) < 2.5 * np.log(high / low)
        far += ["fw" if x else "bw"] if floor and not near else []
        low = min(low, floor[0]) if near else low
        pad = max((high / low) ** 0.08, 1.005)
        (ax.set_xlim if x else ax.set_ylim)(low / pad, high * pad**1.6)
        if high / low > 2:
            (ax.set_xscale if x else ax.set_yscale)("log")
            plain_log_axis(axis)
        if near:
            (ax.axvline if x else ax.axhline)(floor[0], color="0.35", linestyle="--", linewidth=1)
            _edge_note(ax, floor[0], f"entropy floor {floor[0]:.3f}", upright=x)
    if far:
        text = f"entropy floor {floor[0]:.3f}: off the scale of {' and '.join(far)}"
        ax.annotate(text, (0.01, 0.01), xycoords="axes fraction", fontsize=7, color="0.35")
    ax.set_xlabel("fw loss, nats per token", fontsize=8)
    ax.set_ylabel("bw loss, nats per token", fontsize=8)


def _edge_note(ax, value: float, text: str, upright: bool) -> None:
    low, high = ax.get_xlim() if upright else ax.get_ylim()
    if not low < value < high:
        return
    if upright:
        style = {"xy": (value, 0.99), "xycoords": ax.get_xaxis_transform(), "xytext": (-1, 0), "rotation": 90, "ha": "right", "va": "top"}
    else:
        style = {"xy": (0.99, value), "xycoords": ax.get_yaxis_transform(), "xytext": (0, 1), "ha": "right", "va": "bottom"}
    ax.annotate(text, textcoords="offset points", fontsize=7, color="0.35", **style)


# ---------------------------------------------------------------------------------------------------------------------
# Repeated text
# ---------------------------------------------------------------------------------------------------------------------


def repeats(study: Study, options: Options = Options()) -> list[Path]:
    """fw loss against epochs over unique tokens, a line per p_bw and dropout: at the end, and at each run's best evaluation."""
    paths, everything = [], study.cells | study.limited
    sizes = sorted({cell._replace(group=cell.group.on_all_text()) for cell in study.limited})
    for size in sizes:
        cells = {cell: by for cell, by in everything.items() if cell._replace(group=cell.group.on_all_text()) == size}
        few = {cell: by for cell, by in cells.items() if cell.group.unique_tokens}
        wanted = {v for by in (few or cells).values() for v in by if v.trains("fw")}  # not the whole p_bw sweep on all text
        lines: dict[tuple[Variant, float], list] = {}
        for cell, by in cells.items():
            for variant in (v for v in by if v in wanted):
                lines.setdefault((variant, cell.group.dropout), []).append(list(by[variant].values()))
        shown = [{v: seeds for v, seeds in by.items() if v in wanted} for by in cells.values()]
        value = {run.name: _values(by, options.budget) for by in shown for seeds in by.values() for run in seeds.values()}
        where = "at the end of training" if options.budget == "tokens" else f"at equal {options.equal} within each point's runs"
        figure, axes = new_figure(2, 2, (11, 8), sharey="row")
        for column, (read, when) in enumerate(((lambda run: value[run.name](run, "fw_loss"), where), (lambda run: lowest(run, "fw_loss"), "at each run's best evaluation"))):
            _repeats_panel(axes[0, column], lines, read, when, variant_colours(study))
            _gain_panel(axes[1, column], lines, read, when, variant_colours(study))
        runs = [run for points in lines.values() for seeds in points for run in seeds]
        caption = "Small: each seed; large: mean over seeds with 95 % t-intervals, below: of ratios paired by seed. All runs of a line but for its unique tokens are alike; one epoch "
        caption += "is one pass over those, tokens of both directions counted. Unique tokens: "
        caption += ", ".join(short(tokens) for tokens in sorted({corpus_tokens(run) for run in runs})) + ". "
        title = f"Repeated text: fw loss of {size.label} ({short(size.params)}), {study.heading(size.group)}"
        name = f"repeats_{size.depth}x{size.width}" + options.tag("log")
        paths.append(save(study, figure, size.group, name, title, caption + describe(runs) + "."))
    return paths


def _repeats_panel(ax, lines: dict, value, title: str, colours: dict) -> None:
    labels, rates = [], sorted({rate for _, rate in lines})
    for (variant, rate), points in sorted(lines.items(), key=lambda item: item[0][0].p_bw):
        colour, dash = colours[variant], DASHES[rates.index(rate) % len(DASHES)]
        points = sorted(points, key=lambda seeds: final(seeds[0], "epoch"))
        means, halves = zip(*(mean_interval([value(run) for run in seeds]) for seeds in points))
        _line(ax, points, [[value(run) for run in seeds] for seeds in points], means, halves, colour, dash)
        labels.append((means[-1], f"{_named(variant, rate, rates)}: {means[-1]:.3f}", colour))
    if floor := floor_of(run for points in lines.values() for seeds in points for run in seeds):
        ax.axhline(floor[0], color="0.35", linestyle="--", linewidth=1)
        labels.append((floor[0], f"entropy floor: {floor[0]:.3f}", "0.35"))
    _epochs_axis(ax, [seeds for points in lines.values() for seeds in points])
    ax.set_title(title, fontsize=9, loc="left")
    ax.set_ylabel("fw validation loss, nats per token", fontsize=8)
    label_ends(ax, labels)


def _gain_panel(ax, lines: dict, value, title: str, colours: dict) -> None:
    """fw loss of p_bw = 0 without dropout over that of everything else, paired by seed and unique tokens."""
    labels, rates, drawn = [], sorted({rate for _, rate in lines}), []
    plain = {(corpus_tokens(run), run["seed"]): run for seeds in lines.get((FW_ONLY, 0.0), []) for run in seeds}
    for (variant, rate), points in sorted(lines.items(), key=lambda item: item[0][0].p_bw):
        pairs = [[(run, plain[key]) for run in seeds if (key := (corpus_tokens(run), run["seed"])) in plain] for seeds in points]
        pairs = sorted((some for some in pairs if some), key=lambda some: final(some[0][0], "epoch"))
        if (variant, rate) == (FW_ONLY, 0.0) or not pairs:
            continue
        logs = [np.log([value(base) / value(run) for run, base in some]) for some in pairs]
        means, halves = map(np.array, zip(*(mean_interval(some) for some in logs)))
        ends = np.exp(means) - np.exp(means - halves), np.exp(means + halves) - np.exp(means)
        seeds = [[run for run, _ in some] for some in pairs]
        _line(ax, seeds, [np.exp(some) for some in logs], np.exp(means), ends, colours[variant], DASHES[rates.index(rate) % len(DASHES)])
        labels.append((np.exp(means[-1]), f"{_named(variant, rate, rates)}: {np.exp(means[-1]):.3f}", colours[variant]))
        drawn += seeds
    if not drawn:
        ax.set_visible(False)
        return
    ax.axhline(1, color="0.5", linewidth=1)
    _epochs_axis(ax, drawn)
    ax.set_title(title, fontsize=9, loc="left")
    ax.set_ylabel("fw loss of p_bw = 0, dropout 0 / this (above 1: a gain)", fontsize=8)
    label_ends(ax, labels)


def _named(variant: Variant, rate: float, rates: list[float]) -> str:
    return variant.label + (f", dropout {rate:g}" if len(rates) > 1 else "")


def _line(ax, points: list[list[Run]], values, means, halves, colour: str, dash: str) -> None:
    """A line over epochs of unique tokens: each point's seeds small, its mean large with an interval."""
    epochs = [np.mean([final(run, "epoch") for run in seeds]) for seeds in points]
    for x, some in zip(epochs, values):
        ax.plot([x] * len(some), some, "o", color=colour, markersize=2.5, alpha=0.5, markeredgewidth=0)
    style = {"linewidth": 1.5, "marker": "o", "markersize": 4, "capsize": 2, "elinewidth": 0.8}
    ax.errorbar(epochs, means, np.nan_to_num(halves), color=colour, linestyle=dash, **style)


def _epochs_axis(ax, points: list[list[Run]]) -> None:
    ax.set_xscale("log")
    ax.set_yscale("log")
    plain_log_axis(ax.yaxis)
    measured = sorted({round(final(run, "epoch"), 1) for seeds in points for run in seeds})
    ax.set_xticks([x for i, x in enumerate(measured) if not i or x > 1.15 * measured[i - 1]])
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("epochs over unique tokens", fontsize=8)
