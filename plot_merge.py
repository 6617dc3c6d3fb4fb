"""Losses along the line between the weights of two runs, from the study's merge.csv.

    python plot_results.py results/demo --figure merge
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from cells import Cell, Study, Variant
from drawing import COLOURS, Options, label_ends, new_figure, plain_log_axis, save
from report import describe, floor_of, plus_minus, short
from runs import BW_SETTINGS, MERGE_COLUMNS, Run, read_table


class Line(NamedTuple):
    """The models between two runs. weights (points,) from 0 (run a) to 1 (run b); losses {"fw", "bw": (points,)}."""

    a: Run
    b: Run
    weights: np.ndarray
    losses: dict[str, np.ndarray]


def barrier(line: Line, direction: str) -> float:
    """How far the loss rises above the straight line between its ends, in nats per token; 0 if it never does."""
    losses = line.losses[direction]
    return float(np.max(losses - np.interp(line.weights, line.weights[[0, -1]], losses[[0, -1]])))


def lines(study: Study) -> dict[tuple[Cell, Variant, Variant], list[Line]]:
    """The lines of merge.csv between runs of this study, by size and what both ends were trained on."""
    table = read_table(study.folder / "merge.csv", MERGE_COLUMNS)
    known = {run.name: (cell, variant, run) for cell, by in study.cells.items() for variant, seeds in by.items() for run in seeds.values()}
    found: dict[tuple[Cell, Variant, Variant], list[Line]] = {}
    for names, rows in table.groupby(["run_a", "run_b"]):
        if not set(names) <= set(known):
            study.note(f"merge: {names[0]} to {names[1]}: not both runs are in the study")
            continue
        (cell, variant_a, a), (_, variant_b, b) = (known[name] for name in names)
        rows = rows.sort_values("weight")
        line = Line(a, b, rows.weight.to_numpy(float), {direction: rows[f"{direction}_loss"].to_numpy(float) for direction in ("fw", "bw")})
        found.setdefault((cell, variant_a, variant_b), []).append(line)
    return found


def merge(study: Study, options: Options = Options()) -> list[Path]:
    """fw and bw loss along the line between two runs' weights, every pair of runs thin, the mean over pairs thick."""
    found, paths = lines(study), []
    if not found:
        study.note("merge: no pair of runs was merged (python merge.py RUN_A RUN_B)")
    for (cell, variant_a, variant_b), pairs in found.items():
        figure, axes = new_figure(1, 2, (10, 3.9))
        ends = [run for line in pairs for run in (line.a, line.b)]
        for ax, direction, colour in zip(axes[0], ("fw", "bw"), COLOURS):
            _merge_panel(ax, pairs, direction, colour, floor_of(ends))
            ax.set_title(direction, fontsize=9, loc="left")
            ax.set_xlabel(f"share of the weights: 0 is {variant_a.label}, 1 is {variant_b.label}", fontsize=8)
            ax.set_ylabel(f"{direction} validation loss, nats per token", fontsize=8)
        told = [f"{direction} {plus_minus([barrier(line, direction) for line in pairs], 3)} (n = {len(pairs)})" for direction in ("fw", "bw")]
        caption = f"Loss of models whose weights are (1 - share) x those of the run with {variant_a.label} + share x those of "
        caption += f"the run with {variant_b.label}"
        caption += " and the same seed. " if all(line.a["seed"] == line.b["seed"] for line in pairs) else ". "
        caption += "Thin: each pair of runs; thick: mean; dots: the runs themselves; dashed: the straight line between them (on a "
        caption += "logarithmic axis it bends). Height of the barrier, that is the largest loss above "
        caption += f"the straight line between both ends, mean over pairs ± half of its 95 % t-interval: {', '.join(told)} nats per token. "
        name = "_".join([f"merge_{cell.depth}x{cell.width}", _tag(variant_a), "to", _tag(variant_b)]) + options.tag()
        title = f"Between two models' weights: {cell.label} ({short(cell.params)} parameters), {study.heading(cell.group)}"
        paths.append(save(study, figure, cell.group, name, title, caption + describe(ends) + "."))
    return paths


def _tag(variant: Variant) -> str:
    how = "".join(f"-{name}-{value:g}" for name, value in zip(BW_SETTINGS, variant.how) if value != BW_SETTINGS[name])
    return variant.task if variant.task in ("fw", "bw") else f"{variant.task}-{variant.p_bw:g}{how}"


def _merge_panel(ax, pairs: list[Line], direction: str, colour: str, floor: tuple[float, float] | None) -> None:
    for line in pairs:
        ax.plot(line.weights, line.losses[direction], color=colour, linewidth=0.7, alpha=0.45)
    grid = np.unique(np.concatenate([line.weights for line in pairs]))
    mean = np.mean([np.interp(grid, line.weights, line.losses[direction]) for line in pairs], 0)
    ax.plot(grid, mean, color=colour, linewidth=1.8)
    ax.plot(grid[[0, -1]], mean[[0, -1]], "o", color=colour, markersize=5, clip_on=False)
    ax.plot(grid, np.interp(grid, grid[[0, -1]], mean[[0, -1]]), color="0.5", linewidth=1, linestyle="--")
    labels = [(mean[-1], f"{mean[-1]:.3f}", colour)]
    if floor:
        ax.axhline(floor[0], color="0.35", linestyle=":", linewidth=1)
        labels.append((floor[0], f"entropy floor: {floor[0]:.3f}", "0.35"))
    if mean.max() > 2 * mean.min():
        ax.set_yscale("log")
        plain_log_axis(ax.yaxis)
    ax.annotate(f"{mean[0]:.3f}", (0, mean[0]), (6, -11 if mean[1] > mean[0] else 5), textcoords="offset points", fontsize=7.5, color=colour)
    label_ends(ax, labels)
