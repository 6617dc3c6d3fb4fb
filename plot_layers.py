"""The figures over layers, from layers.csv: ratios and losses on cut models, and with single layers left out.

    python plot_results.py results/demo --figure layers_ratio1 layers_ratio2 layers_cut layers_drop
    python plot_results.py results/demo --figure layers_drop_ratio1 layers_drop_ratio2
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cells import Cell, Study
from compare import ORDER_WORDS, ORDERS, ablation, average, final, layer_values, with_layers, with_layers_of_both
from drawing import (
    CHOICE, METRIC_LABELS, UNDECIDED, UNITS, Options, by_group, coloured_cells, includes_one, label_ends, meaning, new_figure, numbered, panels, pick, plain_log_axis,
    runs_of, save, variant_colours,
)  # fmt: skip
from report import describe, short

PLACES = {"cut": "layers remaining (removed from the back)", "drop": "layer left out (0: first)"}


def layers_ratio1(study: Study, options: Options = Options()) -> list[Path]:
    """Ratio 1 (perplexity) over layers remaining, a row of coloured cells per size, in both averaging orders."""
    return _layer_bars(study, options, "ratio1", options.metric or "ppl")


def layers_ratio2(study: Study, options: Options = Options()) -> list[Path]:
    """Ratio 2 (loss) over layers remaining, a row of coloured cells per size, in both averaging orders."""
    return _layer_bars(study, options, "ratio2", options.metric or "loss")


def layers_drop_ratio1(study: Study, options: Options = Options()) -> list[Path]:
    """Ratio 1 (loss) with one layer left out of both models, a row of coloured cells per size, in both averaging orders."""
    return _layer_bars(study, options, "ratio1", options.metric or "loss", "drop")


def layers_drop_ratio2(study: Study, options: Options = Options()) -> list[Path]:
    """Ratio 2 (loss) with one layer left out, a row of coloured cells per size, in both averaging orders."""
    return _layer_bars(study, options, "ratio2", options.metric or "loss", "drop")


def _layer_bars(study: Study, options: Options, ratio: str, metric: str, kind: str = "cut") -> list[Path]:
    paths, orders = [], [options.order] if options.order else ORDERS
    variant, ratios = pick(study, options, ratio, metric)
    for group, cells in by_group(study, ratios).items():
        complete = {cell: with_layers_of_both(study, terms, kind) for cell, terms in cells.items()}
        if not any(complete.values()):
            study.note(f'layers_{"drop_" * (kind == "drop")}{ratio}: no pair has all "{kind}" rows (python eval_layers.py {study.folder})')
            continue
        sizes = [cell for cell in study.cells if cell.group == group]
        most = max(cell.depth for cell in sizes)
        size = (2.6 + 0.4 * max(most, 9), len(orders) * (0.9 + 0.27 * max(len(sizes), 2)) + 0.4)
        figure, axes = new_figure(len(orders), 1, size)
        tables, absent, undecided = [], [], np.zeros((len(sizes), most), bool)
        for row, cell in enumerate(sizes):
            if terms := complete.get(cell):
                undecided[row, : cell.depth] = includes_one(np.log(np.divide(*layer_values(terms, kind))))
        for ax, order in zip(axes[:, 0], orders):
            table = np.full((len(sizes), most), np.nan)
            for row, cell in enumerate(sizes):
                if terms := complete.get(cell):
                    table[row, : cell.depth] = average(*layer_values(terms, kind), order)
            tables.append(table)
            absent.append(np.isnan(table) & (np.arange(most) < np.array([[cell.depth] for cell in sizes])))
            ax.set_xticks(range(most), range(1, most + 1) if kind == "cut" else range(most))
            ax.set_yticks(range(len(sizes)), [f"{cell.label} (n = {len(complete.get(cell, ()))})" for cell in sizes])
            ax.set_title(ORDER_WORDS[order].capitalize(), fontsize=9, loc="left")
            ax.tick_params(length=0)
        axes[-1, 0].set_xlabel(PLACES[kind], fontsize=8)
        coloured_cells(figure, axes[:, 0], tables, absent, [undecided] * len(orders), 6.5)
        caption = f"{meaning(ratio, metric, variant.label)} Rows: depth x width, n: seeds. {UNDECIDED}"
        caption += describe(runs_of(complete)) + "."
        gaps = [cell.label for cell, row in zip(sizes, absent[0]) if row.any()]
        caption += f" Hatched, not measured: {', '.join(gaps)}." if gaps else ""
        what = "over layers remaining" if kind == "cut" else "with one layer left out"
        title = f"{ratio[:5].title()} {ratio[5:]} of {METRIC_LABELS[metric]} {what}, {variant.label}, {study.heading(group)}"
        name = f"layers_{'drop_' if kind == 'drop' else ''}{ratio}_{metric}" + options.tag("order", *CHOICE)
        paths.append(save(study, figure, group, name, title, caption))
    return paths


def layers_cut(study: Study, options: Options = Options()) -> list[Path]:
    """fw and bw metric over layers remaining, a panel per size."""
    return _layer_lines(study, options, "cut")


def layers_drop(study: Study, options: Options = Options()) -> list[Path]:
    """fw and bw metric with one layer left out, over that layer's index, minus the whole model's; a panel per size."""
    return _layer_lines(study, options, "drop")


def _layer_lines(study: Study, options: Options, kind: str) -> list[Path]:
    metric, paths = options.metric or "loss", []
    for group in study.groups:
        shown = {}  # {cell: {variant: its runs with a complete table}}
        for cell in (cell for cell in study.cells if cell.group == group):
            kept = {variant: with_layers(study, seeds.values(), kind) for variant, seeds in study.cells[cell].items()}
            if any(kept.values()):
                shown[cell] = {variant: found for variant, found in kept.items() if found}
        if not shown:
            study.note(f'layers_{kind}: no run has all "{kind}" rows (python eval_layers.py {study.folder})')
            continue
        figure, axes = panels(len(shown))
        for ax, (cell, by) in zip(axes, shown.items()):
            _layer_panel(ax, cell, by, kind, metric, options.log, variant_colours(study))
        runs = [run for by in shown.values() for found in by.values() for run in found]
        what = "Layers removed from the back; final norm and head stay." if kind == "cut" else \
            f"One layer left out: {METRIC_LABELS[metric]} minus that of the whole model."
        caption = f"{what} Solid: fw, dashed: bw; thin: each seed, thick: mean. Untrained directions are not shown. "
        title = {"cut": "over layers remaining", "drop": "with one layer left out"}[kind]
        title = f"Validation {METRIC_LABELS[metric]} {title}, {study.heading(group)}"
        name = f"layers_{kind}_{metric}" + options.tag("log")
        paths.append(save(study, figure, group, name, title, caption + describe(runs) + "."))
    return paths


def _layer_panel(ax, cell: Cell, by: dict, kind: str, metric: str, log: bool, colours: dict) -> None:
    labels = []
    for variant, found in by.items():
        for direction in (direction for direction in ("fw", "bw") if variant.trains(direction)):
            column, dash = f"{direction}_{metric}", "-" if direction == "fw" else "--"
            tables = [ablation(run, kind)[column] for run in found]
            places = tables[0].index
            lines = np.array(tables) - (np.array([[final(run, column)] for run in found]) if kind == "drop" else 0)
            for line in lines:
                ax.plot(places, line, dash, color=colours[variant], linewidth=0.6, alpha=0.45)
            ax.plot(places, lines.mean(0), dash, color=colours[variant], linewidth=1.6, marker="o", markersize=2.5)
            labels.append((lines.mean(0)[-1], numbered(f"{direction}, {variant.label}", found, by.values()), colours[variant]))
    if kind == "drop":
        ax.axhline(0, color="0.5", linewidth=1)
        if log:  # a layer may also do harm: negative values keep their place
            ax.set_yscale("symlog", linthresh=0.1)
    elif log or metric == "ppl":
        ax.set_yscale("log")
        plain_log_axis(ax.yaxis)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set_title(f"{cell.label} ({short(cell.params)})", fontsize=9, loc="left")
    ax.set_xlabel(PLACES[kind], fontsize=8)
    ax.set_ylabel(UNITS[metric] if kind == "cut" else f"increase of {UNITS[metric]}", fontsize=8)
    label_ends(ax, labels, 0.075)
