"""The reversal curse: facts asked in the order of the text and in the other one, read forward and backward.

    python eval_reversal.py results/demo && python plot_results.py results/demo --figure reversal
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from compare import Cell, Study, Variant, mean_interval
from drawing import COLOURS, Options, label_ends, new_figure, save
from measures import ASKED, ASKED_WORDS, asked
from report import describe, floor_of, short
from runs import Run

STYLES = dict(zip(ASKED, ((COLOURS[0], "o"), (COLOURS[5], "s"), (COLOURS[4], "^"), (COLOURS[1], "D"))))


def reversal(study: Study, options: Options = Options()) -> list[Path]:
    """Right answers and nats of the right one by what was trained, a figure per size, a column per direction of reading."""
    paths = []
    for cell, by in study.cells.items():
        measured = {variant: [run for _, run in sorted(seeds.items()) if (run.folder / "reversal.csv").exists()] for variant, seeds in by.items()}
        measured = {variant: runs for variant, runs in measured.items() if runs}
        if measured:
            paths.append(_reversal_figure(study, cell, measured))
    if not paths and any(floor_of(by_seed.values()) for by in study.cells.values() for by_seed in by.values()):  # a toyworld
        study.note(f"reversal: no run has a reversal.csv (python eval_reversal.py {study.folder})")
    return paths


def _reversal_figure(study: Study, cell: Cell, by: dict[Variant, list[Run]]) -> Path:
    columns = {"fw": "read forward (fw)", "bw": "read backward (bw)"}
    trained = {direction: {v: runs for v, runs in by.items() if v.trains(direction) and len(asked(runs, direction, "teacher", 1, "acc"))}
               for direction in columns}  # fmt: skip
    columns = {direction: title for direction, title in columns.items() if trained[direction]}
    figure, axes = new_figure(2, len(columns), (1.5 + 5.6 * len(columns), 6.6), sharey="row")
    for k, (direction, title) in enumerate(columns.items()):
        for ax, column in zip(axes[:, k], ("acc", "loss")):
            _panel(ax, trained[direction], direction, column)
        axes[0, k].set_title(title, fontsize=9, loc="left")
    runs = [run for some in by.values() for run in some]
    caption = f"{' '.join(ASKED_WORDS.split())}. Small: each seed; large: mean over seeds, for nats with its 95 % t-interval. {describe(runs)}."
    title = f"A fact and its reversal: {cell.label} ({short(cell.params)} parameters), {study.heading(cell.group)}"
    return save(study, figure, cell.group, f"reversal_{cell.depth}x{cell.width}", title, caption)


def _panel(ax, by: dict[Variant, list[Run]], direction: str, column: str) -> None:
    labels, places = [], np.arange(len(by))
    for k, (how, (colour, marker)) in enumerate(STYLES.items()):
        values = [asked(runs, direction, *how, column) for runs in by.values()]
        if not all(map(len, values)):
            continue  # a world so small that it has no such pairs
        mean, half = (np.array(x) for x in zip(*map(mean_interval, values)))
        x = places + 0.08 * (k - 1.5)
        for place, some in zip(x, values):
            ax.plot(np.full(len(some), place), some, marker, color=colour, markersize=2.5, alpha=0.6)
        ax.plot(x, mean, marker=marker, color=colour, markersize=6, linewidth=0.8, alpha=0.9)
        if column == "loss":
            ax.vlines(x, mean - half, mean + half, color=colour, linewidth=1.2)
        labels.append((mean[-1], f"{ASKED[how]}: {mean[-1]:.2f}", colour))
    pairs = np.mean([asked(runs, direction, *how, "pairs").mean() for runs in by.values() for how in ASKED])
    chance = 1 / pairs if column == "acc" else np.log(pairs)
    ax.axhline(chance, color="0.4", linestyle="--", linewidth=1)
    labels.append((chance, f"chance: {chance:.2f}", "0.4"))
    ax.set_xticks(places, [variant.label for variant in by], fontsize=8)
    ax.set_xlim(-0.4, len(by) - 0.6)
    ax.set_ylabel("right answers" if column == "acc" else "nats of the right answer", fontsize=8)
    label_ends(ax, labels)
