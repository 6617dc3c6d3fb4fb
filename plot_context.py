"""The arrow of time: how much worse backward prediction is than forward, by context length, from context.csv.

    python plot_results.py results/demo --figure context

The gap is (bw loss - fw loss) / fw loss, per seed: of two models of one seed, trained forward only and backward only,
and of each two-direction model. Tables of other texts (eval_context.py --data, --windows) get figures of their own.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.ticker import NullLocator, SymmetricalLogLocator

from cells import BW_ONLY, FW_ONLY, Cell, Study
from drawing import Options, label_ends, new_figure, save, variant_colours
from measures import by_context
from published import ARROW_OF_TIME
from report import describe, short
from runs import Run, split_table_name
from stats import paired_interval

WIDE = 20  # per cent; gaps beyond it need a logarithmic axis beside gaps of one per cent


def gaps(pairs: list[tuple[Run, Run]], table: str = "context") -> tuple[np.ndarray, np.ndarray]:
    """(contexts,) and (pairs, contexts): by how many per cent run b's bw loss is above run a's fw loss, one pair per seed.

    The contexts that all tables have. Empty where none has any.
    """
    paths = [(a.folder / f"{table}.csv", b.folder / f"{table}.csv") for a, b in pairs]
    found = [(100 * (by_context(b, "bw") / by_context(a, "fw") - 1)).dropna() for a, b in paths]
    common = pd.concat([gap for gap in found if len(gap)] or [pd.Series(dtype=float)], axis=1, join="inner")
    return common.index.to_numpy(int), common.to_numpy().T


def context(study: Study, options: Options = Options()) -> list[Path]:
    """Gap between bw and fw over context length, a figure per size: two single-direction models, two-direction models."""
    tables, paths = sorted({path.stem for path in study.folder.glob("*/context*.csv")}), []
    if not tables:
        study.note(f"context: no run has a context.csv (python eval_context.py {study.folder})")
    for table in tables:
        for cell, by in study.cells.items():
            separate = [(by[FW_ONLY][seed], by[BW_ONLY][seed]) for seed in sorted(set(by.get(FW_ONLY, ())) & set(by.get(BW_ONLY, ())))]
            panels = [[("fw only and bw only", "k", separate)],
                      [(variant.label, variant_colours(study)[variant], [(run, run) for _, run in sorted(seeds.items())])
                       for variant, seeds in by.items() if variant not in (FW_ONLY, BW_ONLY)]]  # fmt: skip
            panels = [[line for line in lines if gaps(line[2], table)[0].size] for lines in panels]
            if any(panels):
                paths.append(_context_figure(study, cell, table, panels, options))
            elif any((run.folder / f"{table}.csv").exists() for seeds in by.values() for run in seeds.values()):
                study.note(f"context: {study.name(cell)} has {table}.csv for one direction only")
    return paths


def _context_figure(study: Study, cell: Cell, table: str, panels: list[list], options: Options) -> Path:
    titles = ("two models, one for each direction", "one model for both directions")
    drawn = [(lines, title) for lines, title in zip(panels, titles) if lines]
    figure, axes = new_figure(1, len(drawn), (1 + 5.2 * len(drawn), 4.2))
    for k, (lines, title) in enumerate(drawn):
        _gap_panel(axes[0, k], lines, table, {} if k else ARROW_OF_TIME)
        axes[0, k].set_title(title, fontsize=9, loc="left")
    runs = [run for lines in panels for _, _, pairs in lines for pair in pairs for run in pair]
    caption = "The text is cut into windows of this length; fw and bw predict the same tokens from what lies before or behind them in the window. "
    caption += "Gap: (bw loss - fw loss) / fw loss. Thin: each seed; thick: mean with its 95 % t-interval over seeds, of the log-ratio. "
    caption += "These models were trained on windows of up to {:,} tokens. ".format(max(run["max_seq_len"] for run in runs))
    caption += "An axis that reaches far is linear up to 1 %, logarithmic beyond. "
    caption += "Grey: Papadopoulos et al. 2024, separate models, other texts, trained on windows of each size. "
    text, windows = split_table_name(table, "context")
    measured = [text] * bool(text) + [f"{windows} windows"] * bool(windows)
    caption += f"Measured on {', '.join(measured)}. " if measured else ""
    name = f"context_{cell.depth}x{cell.width}" + table.removeprefix("context") + options.tag()
    title = f"How much worse backward is than forward, by context: {cell.label} ({short(cell.params)} parameters), {study.heading(cell.group)}"
    title += f", on {text}" if text else ""
    return save(study, figure, cell.group, name, title, caption + describe(runs) + ".")


def _gap_panel(ax, lines: list, table: str, published: dict[str, dict[int, float]]) -> None:
    labels, seen, largest = [], {c for line in published.values() for c in line}, 0.0
    for label, colour, pairs in lines:
        contexts, found = gaps(pairs, table)
        mean, low, high = (100 * (ratio - 1) for ratio in paired_interval(np.log1p(found.T / 100)))
        for line in found:
            ax.plot(contexts, line, color=colour, linewidth=0.6, alpha=0.35)
        ax.plot(contexts, mean, color=colour, linewidth=1.6, marker="o", markersize=3)
        ax.vlines(contexts, low, high, color=colour, linewidth=1.2)
        labels.append((mean[-1], f"{label} (n = {len(found)}): {mean[-1]:.2f} %", colour))
        seen, largest = seen | set(contexts.tolist()), max(largest, np.abs(mean).max())
    for (name, line), dash in zip(published.items(), ("--", ":")):
        ax.plot(list(line), list(line.values()), dash, color="0.45", linewidth=1.2)
        labels.append((list(line.values())[-1], f"published, {name}", "0.45"))
    ax.axhline(0, color="0.5", linewidth=1)
    if largest > WIDE:
        ax.set_yscale("symlog", linthresh=1, linscale=0.4)
        ax.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=1, subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set_xscale("log", base=2)
    ax.set_xticks(sorted(seen), sorted(seen))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("context length, tokens", fontsize=8)
    ax.set_ylabel("bw loss above fw loss, %", fontsize=8)
    label_ends(ax, labels)
