"""The reversal curse: facts asked in the order of the text and in the other one, read forward and backward.

    python eval_reversal.py results/mine && python plot_results.py results/mine --figure reversal
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from compare import Cell, Study, Variant, mean_interval
from drawing import COLOURS, Options, label_ends, new_figure, save
from measures import asked
from report import describe, short
from runs import Run

QUESTIONS = {"teacher": "Who taught Y?", "pupil": "Whom did X teach?"}
ORDERS = {1: "pairs stated in one order: “X was the teacher of Y”", 2: "pairs stated in both orders"}
READ = {("fw", "teacher"): "“Y was a pupil of …”", ("bw", "teacher"): "“… was the teacher of Y.”",
        ("fw", "pupil"): "“X was the teacher of …”", ("bw", "pupil"): "“… was a pupil of X.”"}  # fmt: skip
COLOUR = {"fw": COLOURS[0], "bw": COLOURS[1]}


def reversal(study: Study, options: Options = Options()) -> list[Path]:
    """Share of right answers by what was trained, a figure per size: a row per question, a column per kind of pairs."""
    paths = []
    for cell, by in study.cells.items():
        measured = {variant: [run for _, run in sorted(seeds.items()) if (run.folder / "reversal.csv").exists()] for variant, seeds in by.items()}
        measured = {variant: runs for variant, runs in measured.items() if runs}
        if measured:
            paths.append(_reversal_figure(study, cell, measured))
    if not paths:
        study.note(f"reversal: no run has a reversal.csv (python eval_reversal.py {study.folder}, for runs on toyworld-facts)")
    return paths


def _reversal_figure(study: Study, cell: Cell, by: dict[Variant, list[Run]]) -> Path:
    runs = [run for some in by.values() for run in some]
    kinds = [orders for orders in ORDERS if len(asked(runs, "fw", "teacher", orders, "acc"))]  # a world of two people has one
    figure, axes = new_figure(2, len(kinds), (1.2 + 6.2 * len(kinds), 6.4), sharey=True)
    for (row, column), ax in np.ndenumerate(axes):
        question, orders = tuple(QUESTIONS)[row], kinds[column]
        _panel(ax, by, question, orders)
        ax.set_title(f"{QUESTIONS[question]} ({ORDERS[orders]})", fontsize=9, loc="left")
    caption = "A direction is asked only of models that learned it. Hollow: the text holds no such sentence. Small: each seed; large: mean over seeds with "
    caption += f"its 95 % t-interval, cut at 0 and 1. Candidates: the answers to all questions of a panel. {describe(runs)}."
    title = f"A fact and its reversal: {cell.label} ({short(cell.params)} parameters), {study.heading(cell.group)}"
    return save(study, figure, cell.group, f"reversal_{cell.depth}x{cell.width}", title, caption)


def _panel(ax, by: dict[Variant, list[Run]], question: str, orders: int) -> None:
    labels = []
    for direction, shift in (("fw", -0.06), ("bw", 0.06)):
        found = {place: [asked(runs, direction, question, orders, column) for column in ("acc", "stated")]
                 for place, (variant, runs) in enumerate(by.items()) if variant.trains(direction)}  # fmt: skip
        found = {place: values for place, values in found.items() if len(values[0])}
        if not found:
            continue
        x, colour = np.array(list(found)) + shift, COLOUR[direction]
        mean, half = (np.array(numbers) for numbers in zip(*(mean_interval(acc) for acc, _ in found.values())))
        stated = all(values.all() for _, values in found.values())
        for place, (acc, _) in zip(x, found.values()):
            ax.plot(np.full(len(acc), place), acc, "o", color=colour, markersize=2.5, alpha=0.6)
        ax.plot(x, mean, marker="o", color=colour, markersize=7, linewidth=0.8, markerfacecolor=colour if stated else "white")
        ax.vlines(x, np.clip(mean - half, 0, 1), np.clip(mean + half, 0, 1), color=colour, linewidth=1.2)
        labels.append((mean[-1], f"{direction} {READ[direction, question]}: {mean[-1]:.2f}", colour))
    chance = 1 / asked((run for runs in by.values() for run in runs), "fw", question, orders, "pairs").mean()
    ax.axhline(chance, color="0.4", linestyle="--", linewidth=1)
    ax.set_xticks(range(len(by)), [variant.label for variant in by], fontsize=8)
    ax.set_xlim(-0.4, len(by) - 0.6)
    ax.set_ylim(-0.04, 1.06)
    ax.set_ylabel("right answers", fontsize=8)
    label_ends(ax, [*labels, (chance, f"chance: {chance:.2f}", "0.4")])
