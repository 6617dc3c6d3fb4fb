"""What the figures of plot_results.py share: panels, direct labels, coloured cells, captions, writing a PNG.

    >>> figure, axes = new_figure(1, 2, (8, 4))           # no window, no pyplot, no global state
    >>> save(study, figure, group, "my_figure", "Title", "Caption: what it shows, n, data, steps.")
"""

from __future__ import annotations

import io
import itertools
import math
import re
import textwrap
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Iterable, Sequence, Sized

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from PIL import Image  # comes with matplotlib

from cells import BUDGET_WORDS, BUDGETS, BW_ONLY, FW_ONLY, Group, Study, Variant, choose
from compare import Ratios, ratio1, ratio2
from report import short
from runs import BW_SETTINGS, Run, write_atomically
from stats import mean_interval

# Okabe and Ito's colours, told apart with any colour vision; ratios use RdBu (blue: above 1), centred at 1.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":")


X_LABELS = {
    "step": "optimiser step",
    "epoch": "epoch (tokens seen, both directions / training tokens)",
    "epoch_unique": "epoch (text seen, once per window / training tokens)",
    "tokens_total": "tokens seen, both directions",
    "tokens_fw": "tokens seen forward",
    "seconds": "training time in seconds",
}
METRIC_LABELS = {"loss": "loss", "acc": "accuracy", "ppl": "perplexity"}
UNITS = {"loss": "validation loss, nats per token", "acc": "validation accuracy", "ppl": "validation perplexity"}


CHOICE = ("p_bw", "task", *BW_SETTINGS)  # the options that choose a variant


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
    bw_weight: float | None = None
    bw_start: float | None = None
    bw_end: float | None = None
    budget: str = "tokens"

    def chosen(self, study: Study) -> Variant | None:
        """The variant that the figures compare with p_bw = 0."""
        return choose(study, **{name: getattr(self, name) for name in CHOICE})

    @property
    def axis(self) -> str:
        """The column on which training is cut into windows: epochs, or what is held equal instead of total tokens."""
        return "epoch" if self.budget == "tokens" else BUDGETS[self.budget]

    @property
    def equal(self) -> str:
        """For captions: what the compared runs have spent alike."""
        return BUDGET_WORDS[self.budget]

    def tag(self, *used: str) -> str:
        """Goes into a file's name, so that figures drawn with other flags do not replace the default ones."""
        parts = []
        for option in (option for option in fields(self) if option.name in (*used, "seeds", "budget")):
            value = getattr(self, option.name)
            if value != option.default:
                flag = option.name if option.name in ("log", "all_seeds") else None
                values = value if isinstance(value, tuple) else (value,)
                prefix = "" if option.name in ("metric", "order", "task") else option.name + "-"
                parts.append(flag or prefix + "-".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values))
        return "".join("_" + re.sub(r"[^\w.+-]", "-", part) for part in parts)


def variant_colours(study: Study) -> dict[Variant, str]:
    """One colour per variant in all figures: the usual ones are the same in every study.

    A sweep of p_bw has more of them than there are colours to tell apart: then two scales that darken with p_bw.
    """
    everything = [*study.cells.values(), *study.limited.values()]
    found = sorted({variant for by in everything for variant in by}, key=lambda v: v.place)
    usual = {FW_ONLY: COLOURS[0], Variant("fw+bw", 0.05): COLOURS[1], BW_ONLY: COLOURS[2], Variant("fw+bw", 0.5): COLOURS[3]}
    if len(found) <= len(COLOURS):
        left = iter([colour for colour in COLOURS if colour not in {usual[v] for v in found if v in usual}])
        return {variant: usual.get(variant) or next(left) for variant in found}
    colours = {FW_ONLY: COLOURS[0], BW_ONLY: COLOURS[2]}
    for scale, members in (("Oranges", [v for v in found if v.task != "fw-or-bw"]), ("Purples", [v for v in found if v.task == "fw-or-bw"])):
        members = [v for v in members if v not in colours]
        shades = colormaps[scale](np.linspace(0.4, 1.0, max(len(members), 1)))
        colours |= {variant: to_hex(shade) for variant, shade in zip(members, shades)}
    return {variant: colours[variant] for variant in found}


def by_group(study: Study, ratios: Ratios) -> dict[Group, Ratios]:
    groups: dict[Group, Ratios] = {}
    for cell, terms in ratios.items():
        groups.setdefault(cell.group, {})[cell] = terms
    return groups


UNDECIDED = "In brackets, without colour: the 95 % t-interval over seeds includes 1. "


def includes_one(logs: np.ndarray) -> np.ndarray:
    """Log-ratios (seeds, ...) -> (...): whether the 95 % t-interval over seeds includes a ratio of 1; always, with one seed."""
    mean, half = mean_interval(np.moveaxis(logs, 0, -1))
    return ~(np.abs(mean) > half)


def runs_of(ratios: Ratios) -> list[Run]:
    return [run for terms in ratios.values() for term in terms for run in (term.top, term.bottom)]


def meaning(name: str, metric: str, label: str) -> str:
    word = METRIC_LABELS[metric]
    if name == "ratio2":
        return f"Ratio 2 = fw {word} / bw {word} of the models with {label}."
    better = "below" if metric == "acc" else "above"
    formula = f"Ratio 1 = fw {word} (p_bw = 0) / fw {word} ({label})"
    return f"{formula}, {better} 1: the two-direction model is better."


def pick(study: Study, options: Options, name: str, metric: str, direction: str = "fw"):
    """The chosen variant and its {cell: terms} of "ratio1" or "ratio2"; empty (and noted) if the study allows none."""
    variant = options.chosen(study)
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


def panels(count: int) -> tuple[Figure, list]:
    """A figure with `count` panels, four in a row."""
    columns = min(count, 4)
    rows = -(-count // columns)
    figure, axes = new_figure(rows, columns, (1.2 + 3.9 * columns, 0.8 + 2.9 * rows))
    for ax in axes.flat[count:]:
        ax.set_visible(False)
    return figure, list(axes.flat[:count])


def save(study: Study, figure: Figure, group: Group, name: str, title: str, caption: str) -> Path:
    """Adds title and caption, and writes the PNG (or a PDF without them). The group goes into the name where a study has several."""
    first = study.groups[0] if study.groups[0].bw_mask == "anticausal" else None
    suffix = "" if group == first else "_" + re.sub(r"[^\w.=-]+", "-", study.heading(group)).strip("-")
    path = study.folder / "figures" / f"{name}{suffix}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    if study.pdf:
        return write_pdf(figure, path.with_suffix(".pdf"))
    figure.suptitle(title, fontsize=11)
    caption = f"Study {'/'.join(part for part in study.folder.parts[-2:] if part != 'results')}. {caption}"
    caption = textwrap.fill(caption.replace(" = ", "\u00a0=\u00a0"), int(figure.get_size_inches()[0] * 19))  # never breaks "p_bw = 0.05"
    figure.text(0.01, -0.01, caption, fontsize=7, color="0.3", va="top")
    write_png(figure, path)
    return path


def write_png(figure: Figure, path: Path) -> None:
    content, small = io.BytesIO(), io.BytesIO()
    figure.savefig(content, format="png", dpi=200, bbox_inches="tight", metadata={"Software": None})
    Image.open(content).convert("RGB").quantize(256).save(small, format="png", optimize=True)  # a palette: a third of the size
    write_atomically(path, small.getvalue())


def write_pdf(figure: Figure, path: Path) -> Path:
    """Vector graphics with fonts as text, as publishers want them."""
    content = io.BytesIO()
    with rc_context({"pdf.fonttype": 42}):
        figure.savefig(content, format="pdf", bbox_inches="tight", metadata={"CreationDate": None})
    write_atomically(path, content.getvalue())
    return path


def plain_log_axis(axis) -> None:
    """Plain numbers at ticks that suit what the axis spans, not one lonely power of ten. Call it after plotting."""
    low, high = axis.get_view_interval()
    if 0 < low and high / low < 1.8:  # as good as linear
        axis.set_major_locator(MaxNLocator(5))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())
        return
    ticks = {4: (1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9), 20: (1, 1.5, 2, 3, 5, 7), 1000: (1, 2, 5), math.inf: (1,)}
    subs = next((ticks[span] for span in ticks if low > 0 and high / low < span), (1,))
    axis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if value < 1e4 else short(value)))
    axis.set_minor_formatter(NullFormatter())


def spread(wanted: list[float], gap: float) -> list[float]:
    """Rising places in [0, 1], at least `gap` apart and together as near to the wanted ones (rising) as that allows."""
    blocks: list[list[float]] = []  # of labels that touch: those of a block share what is left of their place without the gaps below
    for i, place in enumerate(wanted):
        blocks.append([place - i * gap])
        while len(blocks) > 1 and np.mean(blocks[-2]) > np.mean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    bases = [float(np.mean(block)) for block in blocks for _ in block]
    return [min(max(base, 0.0), 1.0 - (len(wanted) - 1) * gap) + i * gap for i, base in enumerate(bases)]


def numbered(name: str, seeds: Sized, all_seeds: Iterable[Sized]) -> str:
    """A line's name, with its number of seeds where not all lines have as many: then their means are no pairs."""
    return f"{name} (n = {len(seeds)})" if len({len(others) for others in all_seeds}) > 1 else name


def label_ends(ax, labels: list[tuple[float, str, str]], gap: float = 0.055) -> None:
    """Direct labels (y, text, colour) at the right edge instead of a legend, pushed apart so that none overlap.

    A line that ends outside the panel is labelled at its edge, with an arrow that says so. Call it last: it needs the
    panel's final limits.
    """
    ax.autoscale_view()  # matplotlib would do it when saving, after these labels were placed
    to_panel = ax.transData + ax.transAxes.inverted()
    wanted = sorted((to_panel.transform((1.0, y))[1], text, colour) for y, text, colour in labels)
    places = spread([min(max(place, 0.0), 1.0) for place, _, _ in wanted], gap)
    for place, (true, text, colour) in zip(places, wanted):
        arrow = " ↑" if true > 1 else " ↓" if true < 0 else ""
        if abs(place - true) > 0.01 and not arrow:  # pushed aside: a line leads back to its end
            ax.plot([1.0, 1.014], [true, place], color=colour, linewidth=0.6, transform=ax.transAxes, clip_on=False)
        ax.text(1.018, place, text + arrow, color=colour, fontsize=7.5, va="center", transform=ax.transAxes)


def label_points(ax, points: list[tuple[float, float, str, str]]) -> None:
    """Labels (x, y, text, colour) beside their points, each at the nearest place where it meets no label, no point and no seed's dot.

    Without such a place inside the panel, the least crowded one. Call it last: it needs the panel's final limits.
    """
    ax.figure.draw_without_rendering()  # the layout moves the panel; what follows is measured in its pixels
    renderer, frame, per_point = ax.figure.canvas.get_renderer(), ax.get_window_extent(), ax.figure.dpi / 72
    spots = [ax.transData.transform((x, y)) for x, y, _, _ in points]
    there = [*ax.texts, *([ax.get_legend()] if ax.get_legend() else [])]
    dots = [spot for line in ax.lines if line.get_marker() != "None" for spot in line.get_transform().transform(line.get_xydata())]  # the seeds, too
    taken = [(x - r, y - r, x + r, y + r) for r, some in ((5, spots), (3, dots)) for x, y in some]
    taken += [tuple(thing.get_window_extent(renderer).extents) for thing in there]
    for (x, y), (*place, text, colour) in zip(spots, points):
        probe = ax.text(*place, text, fontsize=7)
        width, height = probe.get_window_extent(renderer).width + 4, probe.get_window_extent(renderer).height
        probe.remove()
        options = []
        for distance, angle in itertools.product((9, 15, 22, 32, 44), np.deg2rad([30, -30, 150, -150, 90, -90, 0, 180])):
            left = x + math.cos(angle) * (distance + width / 2) - width / 2
            low = y + math.sin(angle) * (distance + height / 2) - height / 2
            corners = (left, low, left + width, low + height)
            inside = frame.x0 <= left and corners[2] <= frame.x1 and frame.y0 <= low and corners[3] <= frame.y1
            options.append((_crowding(corners, taken) + 1e4 * (not inside) + 0.01 * distance, corners, distance))
        _, corners, distance = min(options, key=lambda option: option[0])
        taken.append(corners)
        offset = ((corners[0] + 2 - x) / per_point, (corners[1] - y) / per_point)
        leader = {"arrowstyle": "-", "color": colour, "linewidth": 0.4, "shrinkA": 0, "shrinkB": 3} if distance > 15 else None
        ax.annotate(text, place, offset, textcoords="offset points", fontsize=7, color=colour, arrowprops=leader)


def _crowding(box: tuple[float, ...], taken: list[tuple[float, ...]]) -> float:
    """The area in pixels that a box (x0, y0, x1, y1) shares with others."""
    overlaps = ((min(box[2], other[2]) - max(box[0], other[0]), min(box[3], other[3]) - max(box[1], other[1])) for other in taken)
    return sum(width * height for width, height in overlaps if width > 0 and height > 0)


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving average; near the ends over what there is, so that nothing is invented there."""
    if window <= 1:
        return values
    kernel = np.ones(min(window, len(values)))
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def coloured_cells(figure: Figure, axes: Sequence, tables: Sequence[np.ndarray], absent: Sequence, undecided: Sequence, size: float) -> None:
    """Tables of ratios (rows, columns) as annotated cells on one colour scale, centred at 1 and symmetric in the log.

    Cells that are True in `absent` are hatched, those in `undecided` without colour: their interval includes 1. The scale spans at least 3 %: seed
    noise must not look dramatic.
    """
    known = np.concatenate([np.abs(np.log(table[np.isfinite(table) & (table > 0)])) for table in tables])
    limit = max(1.2 * known.max(initial=0.0), 0.03)
    norm = LogNorm(math.exp(-limit), math.exp(limit))
    for ax, table, gaps, unclear in zip(axes, tables, absent, undecided):
        ax.grid(False)
        ax.spines[:].set_visible(False)
        ax.imshow(np.ma.masked_where(unclear | ~np.isfinite(table), table), cmap="RdBu", norm=norm, aspect="auto")
        for row, column in np.argwhere(gaps):
            corner = (column - 0.5, row - 0.5)
            ax.add_patch(Rectangle(corner, 1, 1, fill=False, hatch="////", edgecolor="0.75", linewidth=0))
        for row, column in np.argwhere(np.isfinite(table)):
            value, decided = table[row, column], not unclear[row, column]
            text = f"{value:.3f}" if value < 10 else f"{value:.1f}"
            colour = "w" if decided and abs(math.log(value)) > 0.6 * limit else "k"
            ax.text(column, row, text if decided else f"({text})", ha="center", va="center", fontsize=size, color=colour)
    bar = figure.colorbar(ScalarMappable(norm, "RdBu"), ax=list(axes), pad=0.02)
    ticks = np.exp(np.linspace(-limit, limit, 5))
    bar.set_ticks(ticks, labels=[f"{tick:.3g}" for tick in ticks])
    bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize=8)
