"""Figures over a setting that a study varies: does the answer hang on it?

    python train.py --study results/mine --lr 0.002 0.004 0.008 --p_bw 0 0.05 --seed 100 101 102
    python plot_results.py results/mine --figure by_setting

Runs that differ in such a setting are never compared with each other (cells.py): every value has pairs of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from cells import BW_ONLY, FW_ONLY, Cell, Group, Study, Variant, variants
from compare import bw_against_bw_only, final, log_ratios, ratio1
from drawing import Options, label_ends, new_figure, plain_log_axis, save, variant_colours
from report import describe, short
from runs import Run
from stats import mean_interval

Values = dict[Variant, dict[str, dict[int, float]]]  # of every variant, by the setting's value as its flag spells it, by seed


class Sweep(NamedTuple):
    """Cells that differ in one setting. `group` is what they share."""

    group: Group
    depth: int
    width: int
    setting: str


def sweeps(study: Study) -> dict[Sweep, dict[str, Cell]]:
    """{sweep: {the setting's value: its cell}}, values in rising order."""
    found: dict[Sweep, dict[str, Cell]] = {}
    for cell in study.cells:
        for setting, value in cell.group.extras:
            group = cell.group._replace(extras=tuple(extra for extra in cell.group.extras if extra[0] != setting))
            found.setdefault(Sweep(group, cell.depth, cell.width, setting), {})[value] = cell
    return {sweep: dict(sorted(cells.items(), key=lambda item: _place(item[0]))) for sweep, cells in found.items() if len(cells) > 1}


def _place(value: str) -> tuple[float, str]:
    try:
        return float(value), ""
    except ValueError:
        return np.inf, value  # words last


def by_setting(study: Study, options: Options = Options()) -> list[Path]:
    """Losses, ratio 1 and bw against bw only over each setting that varies, a figure per size and setting."""
    paths = []
    for sweep, cells in sweeps(study).items():
        by = {value: study.cells[cell] for value, cell in cells.items()}
        trained = {variant for value in by.values() for variant in value}
        losses = {d: _losses({v for v in trained if v.trains(d)}, by, f"{d}_loss") for d in ("fw", "bw")}
        both = [variant for variant in variants(study) if variant in trained - {FW_ONLY, BW_ONLY}]
        ratios = [_ratios(cells, {variant: compared(study, variant) for variant in both}) for compared in (ratio1, bw_against_bw_only)]
        figure, axes = new_figure(2, 2, (11.5, 7.6))
        words = ("fw loss, nats per token", "bw loss, nats per token", "ratio 1 = fw loss, p_bw = 0 / this", "bw loss / that of bw only")
        for ax, lines, label in zip(axes.flat, (*losses.values(), *ratios), words):
            _panel(ax, list(cells), lines, variant_colours(study), geometric="/" in label)
            ax.set_xlabel(sweep.setting, fontsize=8)
            ax.set_ylabel(label, fontsize=8)
        runs = [run for value in by.values() for seeds in value.values() for run in seeds.values()]
        low, high = (short(end(final(run, "tokens_total") for run in runs)) for end in (min, max))
        caption = "Thin: each seed; thick: means (of ratios geometric) with 95 % t-intervals. Above: losses at the end of each run, after "
        caption += f"{low if low == high else f'{low} to {high}'} tokens. "
        caption += f"Below: at equal {options.equal}, paired by seed; within one value of {sweep.setting}. {_numbers(by)}{describe(runs)}."
        sizes = {cell.params for cell in cells.values()}
        size = f"{sweep.depth} x {sweep.width}" + f" ({short(*sizes)} parameters)" * (len(sizes) == 1)
        title = f"By {sweep.setting}: {size}, {study.heading(sweep.group)}"
        first = study.groups[0] if next(iter(cells.values())).group == study.groups[0] else sweep.group
        paths.append(save(study, figure, first, f"by_{sweep.setting}_{sweep.depth}x{sweep.width}".replace(" ", "_") + options.tag(), title, caption))
    return paths


def _losses(shown: set[Variant], by: dict[str, dict[Variant, dict[int, Run]]], column: str) -> Values:
    return {variant: {value: {seed: final(run, column) for seed, run in cell[variant].items()} for value, cell in by.items() if variant in cell} for variant in shown}


def _ratios(cells: dict[str, Cell], terms: dict) -> Values:
    found = {variant: {value: dict(zip((term.seed for term in of[cell]), np.exp(log_ratios(of[cell])))) for value, cell in cells.items() if cell in of}
             for variant, of in terms.items()}  # fmt: skip
    return {variant: values for variant, values in found.items() if values}


def _numbers(by: dict[str, dict[Variant, dict[int, Run]]]) -> str:
    """How many seeds the points have, where they are not the same."""
    numbers = {value: sorted({len(seeds) for seeds in cell.values()}) for value, cell in by.items()}
    told = (f"{' to '.join(map(str, dict.fromkeys((found[0], found[-1]))))} at {value}" for value, found in numbers.items())
    return f"Seeds: {', '.join(told)}. " if len({number for found in numbers.values() for number in found}) > 1 else ""


def _panel(ax, values: list[str], lines: Values, colours: dict[Variant, str], geometric: bool) -> None:
    """A line per variant over the values: where they are numbers far apart on a logarithmic axis, where they are words side by side."""
    ax.set_visible(bool(lines))
    numbers = [_place(value)[0] for value in values]
    spaced = np.isfinite(numbers).all()
    log = spaced and min(numbers) > 0 and max(numbers) > 3 * min(numbers)
    places = dict(zip(values, np.log(numbers) if log else numbers if spaced else range(len(values))))
    span, labels = max(places.values()) - min(places.values()), []
    for number, (variant, found) in enumerate(sorted(lines.items(), key=lambda item: item[0].place)):
        aside = 0.012 * span * (number - (len(lines) - 1) / 2)  # intervals of one value beside each other
        colour, x = colours[variant], [places[value] + aside for value in found]
        for seed in sorted({seed for seeds in found.values() for seed in seeds}):
            line = [(place, seeds[seed]) for place, seeds in zip(x, found.values()) if seed in seeds]
            ax.plot(*zip(*line), "o-", color=colour, markersize=2.5, linewidth=0.5, alpha=0.4, markeredgewidth=0)
        several = [np.array(list(seeds.values())) for seeds in found.values()]
        middle, half = map(np.array, zip(*(mean_interval(np.log(seeds) if geometric else seeds) for seeds in several)))
        mean, low, high = (np.exp(end) if geometric else end for end in (middle, middle - half, middle + half))
        reach = np.nan_to_num([mean - low, high - mean])
        ax.errorbar(x, mean, reach, color=colour, linewidth=1.5, marker="o", markersize=4, capsize=2, elinewidth=0.8)
        labels.append((mean[-1], variant.label, colour))
    if geometric:
        ax.axhline(1, color="0.5", linewidth=1)
    ax.set_xticks(list(places.values()), list(places))
    ax.set_xlim(min(places.values()) - 0.06 * span, max(places.values()) + 0.06 * span)
    if labels and max(end for end, *_ in labels) > 2 * min(end for end, *_ in labels):
        ax.set_yscale("log")
        plain_log_axis(ax.yaxis)
    label_ends(ax, labels)
