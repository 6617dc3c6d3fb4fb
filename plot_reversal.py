"""The reversal curse: facts asked in the order of the text and in the other one, read forward and backward.

    python eval_reversal.py results/mine && python plot_results.py results/mine --figure reversal
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cells import BW_ONLY, Cell, Study, Variant
from drawing import COLOURS, Options, label_ends, new_figure, save
from measures import asked
from report import describe, short
from runs import Run
from stats import mean_interval

QUESTIONS = {"teacher": "Who taught Y?", "pupil": "Whom did X teach?"}
MEASURES = {"acc": "right answers", "auc": "share of others that score below the right one"}
READ = {("fw", "teacher"): "“Y was a pupil of …”", ("bw", "teacher"): "“… was the teacher of Y.”",
        ("fw", "pupil"): "“X was the teacher of …”", ("bw", "pupil"): "“… was a pupil of X.”"}  # fmt: skip
COLOUR = {"fw": COLOURS[0], "bw": COLOURS[1]}


def reversal(study: Study, options: Options = Options()) -> list[Path]:
    """Pairs stated in one order, by what was trained, a figure per size: a row per question, right answers and rank."""
    paths = []
    for cell, by in study.cells.items():
        measured = {variant: [run for _, run in sorted(by[variant].items()) if (run.folder / "reversal.csv").exists()]
                    for variant in sorted(by, key=lambda variant: variant == BW_ONLY)}  # fmt: skip
        measured = {variant: runs for variant, runs in measured.items() if runs}
        if measured:
            paths.append(_reversal_figure(study, cell, measured, options))
    if not paths:
        study.note(f"reversal: no run has a reversal.csv (python eval_reversal.py {study.folder}, for runs on toyworld-facts)")
    return paths


def _reversal_figure(study: Study, cell: Cell, by: dict[Variant, list[Run]], options: Options) -> Path:
    runs = [run for some in by.values() for run in some]
    figure, axes = new_figure(2, 2, (13.4, 6.4), sharey="col")
    for (row, column), ax in np.ndenumerate(axes):
        question, measure = tuple(QUESTIONS)[row], tuple(MEASURES)[column]
        _panel(ax, by, question, measure)
        ax.set_title(QUESTIONS[question], fontsize=9, loc="left")
        ax.set_ylabel(MEASURES[measure], fontsize=8)
    pairs = " or ".join(f"{count:g}" for count in sorted(set(asked(runs, "fw", "teacher", 1, "pairs"))))
    caption = f"{pairs} pairs that the text states in one order only, “X was the teacher of Y”; the candidates are the answers to all questions of a panel. "
    caption += "A direction is asked only of models that learned it. Hollow: the text holds no such sentence. Small: each seed; large: mean over seeds with "
    caption += f"its 95 % t-interval, cut at 0 and 1; the numbers are those of the last point. {describe(runs)}."
    title = f"A fact and its reversal: {cell.label} ({short(cell.params)} parameters), {study.heading(cell.group)}"
    return save(study, figure, cell.group, f"reversal_{cell.depth}x{cell.width}{options.tag()}", title, caption)


def _panel(ax, by: dict[Variant, list[Run]], question: str, measure: str) -> None:
    labels = []
    for direction, shift in (("fw", -0.06), ("bw", 0.06)):
        found = {place: [asked(runs, direction, question, 1, column) for column in (measure, "stated")]
                 for place, (variant, runs) in enumerate(by.items()) if variant.trains(direction)}  # fmt: skip
        found = {place: values for place, values in found.items() if len(values[0])}
        if not found:
            continue
        x, colour = np.array(list(found)) + shift, COLOUR[direction]
        mean, half = (np.array(numbers) for numbers in zip(*(mean_interval(values) for values, _ in found.values())))
        stated = all(values.all() for _, values in found.values())
        for place, (values, _) in zip(x, found.values()):
            ax.plot(np.full(len(values), place), values, "o", color=colour, markersize=2.5, alpha=0.6)
        ax.plot(x, mean, marker="o", color=colour, markersize=7, linewidth=0.8, markerfacecolor=colour if stated else "white")
        ax.vlines(x, np.clip(mean - half, 0, 1), np.clip(mean + half, 0, 1), color=colour, linewidth=1.2)
        labels.append((mean[-1], f"{direction} {READ[direction, question]}: {mean[-1]:.2f}", colour))
    pairs = asked((run for runs in by.values() for run in runs), "fw", question, 1, "pairs").mean()
    chance = 1 / pairs if measure == "acc" else 0.5
    ax.axhline(chance, color="0.4", linestyle="--", linewidth=1)
    ax.set_xticks(range(len(by)), [variant.label for variant in by], fontsize=8)
    ax.set_xlim(-0.4, len(by) - 0.6)
    ax.set_ylim(-0.04 if measure == "acc" else 0.3, 1.06)
    label_ends(ax, [*labels, (chance, f"chance: {chance:.2f}", "0.4")])
