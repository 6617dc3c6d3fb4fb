"""What the figures of plot_results.py share: panels, direct labels, coloured cells, captions, writing a PNG.

    >>> figure, axes = new_figure(1, 2, (8, 4))           # no window, no pyplot, no global state
    >>> save(study, figure, group, "my_figure", "Title", "Caption: what it shows, n, data, steps.")
"""

from __future__ import annotations

import io
import math
import re
import textwrap
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from compare import Group, Ratios, Study, Variant, choose, ratio1, ratio2, variants
from report import short
from runs import Run, write_atomically

# Okabe and Ito's colours, told apart with any colour vision; ratios use RdBu (blue: above 1), centred at 1.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":")


X_LABELS = {
    "step": "optimiser step",
    "epoch": "epoch (tokens seen, both directions / training tokens)",
    "epoch_unique": "epoch (text seen, once per window / training tokens)",
    "tokens_total": "tokens seen, both directions",
    "seconds": "training time in seconds",
}
METRIC_LABELS = {"loss": "loss", "acc": "accuracy", "ppl": "perplexity"}
UNITS = {"loss": "validation loss, nats per token", "acc": "validation accuracy", "ppl": "validation perplexity"}


@dataclass
class Options:
    metric: str | None = None  # None: each figure's own (loss; perplexity for ratio 1 over layers, as in the article)
    x: str = "epoch"
    epochs: tuple[float, float] | None = None
    order: str | None = None  # None: mean_then_ratio; both orders in the figures over layers
    seeds: tuple[int, ...] | None = None
    smooth: int = 1  # moving average over this many of the 500 points of ratio 1 over training
    log: bool = False
    all_seeds: bool = False
    p_bw: float | None = None
    task: str = "fw+bw"

    def tag(self, *used: str) -> str:
        """Goes into a file's name, so that figures drawn with other flags do not replace the default ones."""
        parts = []
        for option in (option for option in fields(self) if option.name in (*used, "seeds")):
            value = getattr(self, option.name)
            if value != option.default:
                flag = option.name if option.name in ("log", "all_seeds") else None
                values = value if isinstance(value, tuple) else (value,)
                prefix = "" if option.name in ("metric", "order", "task") else option.name + "-"
                parts.append(flag or prefix + "-".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values))
        return "".join("_" + re.sub(r"[^\w.+-]", "-", part) for part in parts)


def variant_colours(study: Study) -> dict[Variant, str]:
    """One colour per variant in all of a study's figures, whichever of them a panel shows."""
    return dict(zip(variants(study), COLOURS * 9))


def by_group(study: Study, ratios: Ratios) -> dict[Group, Ratios]:
    groups: dict[Group, Ratios] = {}
    for cell, terms in ratios.items():
        groups.setdefault(cell.group, {})[cell] = terms
    return groups


def runs_of(ratios: Ratios) -> list[Run]:
    return [run for terms in ratios.values() for term in terms for run in (term.top, term.bottom)]


def meaning(name: str, metric: str, label: str, direction: str = "fw") -> str:
    word = METRIC_LABELS[metric]
    if name == "ratio2":
        return f"Ratio 2 = fw {word} / bw {word} of the models with {label}."
    better = "below" if metric == "acc" else "above"
    formula = f"Ratio 1 = {direction} {word} (p_bw = 0) / {direction} {word} ({label})"
    return f"{formula}, {better} 1: the two-direction model is better."


def pick(study: Study, options: Options, name: str, metric: str, direction: str = "fw"):
    """The chosen variant and its {cell: terms} of "ratio1" or "ratio2"; empty (and noted) if the study allows none."""
    variant = choose(study, options.p_bw, options.task)
    if variant is None:
        study.note(f"{name}: no finished run was trained in both directions")
        return None, {}
    ratios = ratio1(study, variant, metric, direction) if name == "ratio1" else ratio2(study, variant, metric)
    if not ratios:
        study.note(f"{name}: no run with {variant.label} has a partner with p_bw = 0 and the same seed")
    return variant, ratios


# ---------------------------------------------------------------------------------------------------------------------
# Drawing
# ---------------------------------------------------------------------------------------------------------------------


def new_figure(rows: int, columns: int, size: tuple[float, float], **subplots) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)  # no window, no global state
    axes = figure.subplots(rows, columns, squeeze=False, **subplots)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="0.9", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.tick_params(labelsize=8)
    return figure, axes


def save(study: Study, figure: Figure, group: Group, name: str, title: str, caption: str) -> Path:
    """Adds title and caption, and writes the PNG. The group goes into the name where a study has several."""
    figure.suptitle(title, fontsize=11)
    width = figure.get_size_inches()[0]
    caption = textwrap.fill(caption.replace(" = ", "\u00a0=\u00a0"), int(width * 19))  # never breaks "p_bw = 0.05"
    figure.text(0.01, -0.01, caption, fontsize=7, color="0.3", va="top")
    first = study.groups[0] if study.groups[0].bw_mask == "anticausal" else None
    suffix = "" if group == first else "_" + re.sub(r"[^\w.=-]+", "-", study.heading(group)).strip("-")
    path = study.folder / "figures" / f"{name}{suffix}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=200, bbox_inches="tight", metadata={"Software": None})
    write_atomically(path, content.getvalue())
    return path


def plain_log_axis(axis) -> None:
    """Plain numbers at ticks that suit what the axis spans, not one lonely power of ten. Call it after plotting."""
    low, high = axis.get_view_interval()
    ticks = {4: (1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9), 20: (1, 1.5, 2, 3, 5, 7), 1000: (1, 2, 5), math.inf: (1,)}
    subs = next((ticks[span] for span in ticks if low > 0 and high / low < span), (1,))
    axis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if value < 1e4 else short(value)))
    axis.set_minor_formatter(NullFormatter())


def label_ends(ax, labels: list[tuple[float, str, str]], gap: float = 0.055) -> None:
    """Direct labels (y, text, colour) at the right edge instead of a legend, pushed apart so that none overlap.

    A line that ends outside the panel is labelled at its edge, with an arrow that says so. Call it last: it needs the
    panel's final limits.
    """
    ax.autoscale_view()  # matplotlib would do it when saving, after these labels were placed
    to_panel = ax.transData + ax.transAxes.inverted()
    wanted = sorted((to_panel.transform((1.0, y))[1], text, colour) for y, text, colour in labels)
    places = [min(max(place, 0.0), 1.0) for place, _, _ in wanted]
    for i in range(1, len(places)):  # upwards, then back down from the top edge
        places[i] = max(places[i], places[i - 1] + gap)
    for i in reversed(range(len(places))):
        places[i] = min(places[i], 1.0 if i == len(places) - 1 else places[i + 1] - gap)
    for place, (true, text, colour) in zip(places, wanted):
        arrow = " ↑" if true > 1.02 else " ↓" if true < -0.02 else ""
        ax.text(1.015, place, text + arrow, color=colour, fontsize=7.5, va="center", transform=ax.transAxes)


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving average; near the ends over what there is, so that nothing is invented there."""
    if window <= 1:
        return values
    kernel = np.ones(min(window, len(values)))
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def coloured_cells(figure: Figure, axes: Sequence, tables: Sequence[np.ndarray], absent: Sequence, size: float) -> None:
    """Tables of ratios (rows, columns) as annotated cells on one colour scale, centred at 1 and symmetric in the log.

    Cells that are True in `absent` are hatched. The scale spans at least 3 %: seed noise must not look dramatic.
    """
    known = np.concatenate([np.abs(np.log(table[np.isfinite(table) & (table > 0)])) for table in tables])
    limit = max(1.2 * known.max(initial=0.0), 0.03)
    for ax, table, gaps in zip(axes, tables, absent):
        ax.grid(False)
        ax.spines[:].set_visible(False)
        norm = LogNorm(math.exp(-limit), math.exp(limit))
        image = ax.imshow(np.ma.masked_invalid(table), cmap="RdBu", norm=norm, aspect="auto")
        for row, column in np.argwhere(gaps):
            corner = (column - 0.5, row - 0.5)
            ax.add_patch(Rectangle(corner, 1, 1, fill=False, hatch="////", edgecolor="0.75", linewidth=0))
        for row, column in np.argwhere(np.isfinite(table)):
            value = table[row, column]
            colour = "w" if abs(math.log(value)) > 0.6 * limit else "k"
            text = f"{value:.3f}" if value < 10 else f"{value:.1f}"
            ax.text(column, row, text, ha="center", va="center", fontsize=size, color=colour)
    bar = figure.colorbar(image, ax=list(axes), pad=0.02)
    ticks = np.exp(np.linspace(-limit, limit, 5))
    bar.set_ticks(ticks, labels=[f"{tick:.3g}" for tick in ticks])
    bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize=8)
