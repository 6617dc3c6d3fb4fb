"""The numbers behind every figure: what is divided by what, at which point of training, averaged how.

    >>> pairs = ratio1(study, choose(study))              # {cell: one Term per seed that both p_bw have}
    >>> {cell.label: final_ratio(terms, "mean_then_ratio") for cell, terms in pairs.items()}
    >>> paired_interval(log_ratios(pairs[cell]))          # ratio, low, high: geometric mean, 95 % t-interval

Runs are paired by seed within a cell (cells.py), and compared where the shorter of the two ends on the study's budget
axis: equal total tokens, forward tokens, steps or seconds. Between evaluations the metric is interpolated linearly, at a
pair's end in log-log; beyond them nothing is. Intervals: stats.py. Tables only: no torch, no matplotlib.
"""

from __future__ import annotations

from typing import Iterable, NamedTuple

import numpy as np
import pandas as pd

from cells import BUDGETS, BW_ONLY, FW_ONLY, Cell, Cells, Study, Variant, corpus_tokens
from runs import DOCUMENTS_COLUMNS, Run, read_table
from stats import document_interval, holm, paired_p

ORDER_WORDS = {"mean_then_ratio": "ratio of the means over seeds", "ratio_then_mean": "mean over seeds of their ratios"}
ORDERS = tuple(ORDER_WORDS)
METRICS = ("loss", "acc", "ppl")


class Term(NamedTuple):
    """One seed's ratio: `top_column` of run `top` over `bottom_column` of run `bottom` (the same run for ratio 2), at equal `x`."""

    seed: int
    top: Run
    top_column: str
    bottom: Run
    bottom_column: str
    x: str = BUDGETS["tokens"]


Ratios = dict[Cell, list[Term]]  # one term per paired seed

# ---------------------------------------------------------------------------------------------------------------------
# Ratios: a dictionary {cell: [Term per seed]} says what is divided by what; everything below works on any of them
# ---------------------------------------------------------------------------------------------------------------------


def ratio1(study: Study, variant: Variant | None, metric: str = "loss", direction: str = "fw") -> Ratios:
    """metric(p_bw = 0) / metric(variant), paired by seed. Seeds and cells without a partner go to study.notes."""
    column = f"{direction}_{metric}"
    return paired(study, FW_ONLY, column, variant, column, _with_fw_only(study, variant) if direction == "fw" else study.cells)


def ratio2(study: Study, variant: Variant | None, metric: str = "loss") -> Ratios:
    """metric_fw / metric_bw of one model, every seed of `variant`."""
    return {
        cell: [Term(seed, run, f"fw_{metric}", run, f"bw_{metric}") for seed, run in sorted(by[variant].items())]
        for cell, by in study.cells.items() if variant in by
    }  # fmt: skip


def ratio2_separate(study: Study) -> Ratios:
    """fw loss of the fw-only model / bw loss of the bw-only model with the same seed."""
    return paired(study, FW_ONLY, "fw_loss", BW_ONLY, "bw_loss", _with_bw_only(study))


def bw_against_bw_only(study: Study, variant: Variant | None) -> Ratios:
    """bw loss of `variant` / bw loss of the model that was trained on bw alone: 1 is "learned as well"."""
    return paired(study, variant, "bw_loss", BW_ONLY, "bw_loss", _with_bw_only(study)) if variant else {}


def against_alone(study: Study, variant: Variant | None, direction: str) -> Ratios:
    """Loss of `variant` in a direction / loss of the model that learned this direction only, where both have seen equally many
    tokens *in this direction*: below 1 the other direction helped, above 1 it was in the way. Whatever `study.budget` is.

    They may have taken different numbers of steps until then: `steps_at`.
    """
    alone, cells = (FW_ONLY, _with_fw_only(study, variant)) if direction == "fw" else (BW_ONLY, _with_bw_only(study))
    column = f"{direction}_loss"
    return paired(study, variant, column, alone, column, cells, f"tokens_{direction}") if variant else {}


def _with_fw_only(study: Study, variant: Variant | None) -> Cells:
    """A forward pass never uses the bw mask, so a cell with the flipped one borrows its right-masked twin's p_bw = 0."""
    cells = dict(study.cells)
    for cell, by in study.cells.items():
        twin = study.cells.get(cell.with_mask("anticausal"), {})
        if cell.group.bw_mask == "flipped" and FW_ONLY not in by and FW_ONLY in twin:
            cells[cell] = by | {FW_ONLY: {seed: run for seed, run in twin[FW_ONLY].items() if seed in by.get(variant, {})}}
    return cells


def _with_bw_only(study: Study) -> Cells:
    return {cell: by for cell, by in study.cells.items() if BW_ONLY in by}


def paired(study: Study, top: Variant, top_column: str, bottom: Variant | None, bottom_column: str,
           cells: Cells | None = None, x: str | None = None) -> Ratios:  # fmt: skip
    """The terms of all seeds that both variants have, where their runs overlap on `x` (default: the study's budget axis)."""
    result, x = {}, x or BUDGETS[study.budget]
    for cell, by in (study.cells if cells is None else cells).items():
        above, below = by.get(top, {}), by.get(bottom, {}) if bottom else {}
        for has, lacks, variant, other in ((above, below, top, bottom), (below, above, bottom, top)):
            alone = sorted(set(has) - set(lacks))
            if alone and (lacks or _elsewhere(study, cell, other)):
                which = f"seed{'s' * (len(alone) > 1)} {', '.join(map(str, alone))}"
                study.note(f"{study.name(cell)}: {which} of {variant.label} without a partner in {other.label}")
        terms = [Term(seed, above[seed], top_column, below[seed], bottom_column, x) for seed in sorted(set(above) & set(below))]
        met = [term for term, value in zip(terms, log_ratios(terms)) if np.isfinite(value)]
        if len(met) < len(terms):
            study.note(f"{study.name(cell)}: {top.label} and {bottom.label} are never at equal {x}")
        if met:
            result[cell] = met
    return result


def _elsewhere(study: Study, cell: Cell, variant: Variant) -> bool:
    """Whether some other setting alone keeps a cell's runs from meeting `variant`."""
    return any(variant in by and there[1:] == cell[1:] and there.group.bw_mask == cell.group.bw_mask and there.group.extras != cell.group.extras
               for there, by in study.cells.items())  # fmt: skip


def average(top: np.ndarray, bottom: np.ndarray, order: str) -> np.ndarray:
    """Two arrays (seeds, ...) -> (...): the ratio of the means, or the mean of each seed's ratio."""
    if order == "mean_then_ratio":
        return top.mean(0) / bottom.mean(0)
    if order == "ratio_then_mean":
        return (top / bottom).mean(0)
    raise ValueError(f"order must be one of {ORDERS}, not {order!r}")


# ---------------------------------------------------------------------------------------------------------------------
# Over training
# ---------------------------------------------------------------------------------------------------------------------


def trajectory(run: Run, column: str, x: str) -> tuple[np.ndarray, np.ndarray]:
    """A run's (x, metric), x increasing, without rows that lack either. x "epoch_unique" is derived from the tokens."""
    curve = run.curve.assign(epoch_unique=run.curve["tokens_unique"] / corpus_tokens(run)) if x == "epoch_unique" else run.curve
    known = curve[[x, column]].astype(float).replace([np.inf, -np.inf], np.nan).dropna()
    xs, ys = known.drop_duplicates(x, keep="last").to_numpy().T  # of equal x, the last evaluation
    return xs, ys


def common_grid(lines: list[tuple[np.ndarray, np.ndarray]], window=None, points: int | None = None) -> np.ndarray:
    """x values inside what all lines (and the window) cover: `points` evenly spaced ones, else every evaluated one.

    Empty if the lines do not overlap there: nothing is ever extrapolated.
    """
    if any(len(x) == 0 for x, _ in lines):
        return np.empty(0)
    low, high = max(x[0] for x, _ in lines), min(x[-1] for x, _ in lines)
    if window is not None:
        low, high = max(low, window[0]), min(high, window[1])
    if low > high or (points and low == high):
        return np.empty(0)
    if points:
        return np.linspace(low, high, points)
    inside = np.unique(np.concatenate([x for x, _ in lines]))
    return inside[(inside >= low) & (inside <= high)]


def on_grid(lines: list[tuple[np.ndarray, np.ndarray]], grid: np.ndarray) -> np.ndarray:
    return np.array([np.interp(grid, x, y) for x, y in lines])  # (lines, points)


def ratio_curve(terms: list[Term], x: str = "epoch", window=None, points: int = 500) -> tuple[np.ndarray, ...]:
    """grid (points,), top and bottom (seeds, points), where *all* runs of the terms overlap."""
    tops = [trajectory(term.top, term.top_column, x) for term in terms]
    bottoms = [trajectory(term.bottom, term.bottom_column, x) for term in terms]
    grid = common_grid(tops + bottoms, window, points)
    return grid, on_grid(tops, grid), on_grid(bottoms, grid)


def windows(terms: list[Term], x: str = "epoch", asked: tuple[float, float] | None = None) -> dict[str, tuple[float, float]]:
    """Parts of training as intervals of x: early (the first epoch of the top runs), all, late (the second half).

    What came before the first evaluation is in none of them. early is left out where training ends with it. `asked`:
    this window of epochs instead, if the runs cover it: to within 1 % at its end, and at least its second half.
    """
    lines = [trajectory(run, term.top_column, x)[0] for term in terms for run in (term.top, term.bottom)]
    if any(len(line) == 0 for line in lines):
        return {}
    start, end = max(line[0] for line in lines), min(line[-1] for line in lines)
    if asked:
        covered = start <= sum(asked) / 2 and end >= 0.99 * asked[1]
        return {f"epochs {asked[0]:g} to {asked[1]:g}": asked} if covered else {}
    ends = [np.interp(1.0, [0.0, *table["epoch"]], [0.0, *table[x]]) for table in (term.top.curve for term in terms)]
    early = {"early": (start, float(np.mean(ends)))} if start < np.mean(ends) < 0.99 * end else {}
    return early | {"all": (start, end), "late": (max(start, end / 2), end)}


def window_log_ratios(terms: list[Term], window: tuple[float, float]) -> np.ndarray:
    """(seeds,): the log-ratio averaged over 500 points of a window of epochs; empty if the runs do not overlap in it."""
    _, top, bottom = ratio_curve(terms, "epoch", window)
    return np.log(top / bottom).mean(1) if top.size else np.empty(0)


# ---------------------------------------------------------------------------------------------------------------------
# At the end of training
# ---------------------------------------------------------------------------------------------------------------------


def final(run: Run, column: str) -> float:
    """A column's value at the last evaluation."""
    return float(run.curve[column].iloc[-1])


def lowest(run: Run, column: str) -> float:
    """A column's least value over training: the loss at a run's best evaluation."""
    return float(run.curve[column].min())


def value_at(run: Run, column: str, x: str, end: float) -> float:
    """A positive metric where x is `end`, interpolated along straight lines in log-log; NaN outside what was evaluated after the start."""
    xs, ys = trajectory(run, column, x)
    xs, ys = xs[xs > 0], ys[xs > 0]
    return float(np.exp(np.interp(np.log(end), np.log(xs), np.log(ys)))) if len(xs) and xs[0] <= end <= xs[-1] else np.nan


def meeting_point(term: Term) -> float:
    """Where on its x the shorter of a term's two runs ends: they are compared there, and the longer one is interpolated."""
    return min(np.max(trajectory(run, column, term.x)[0], initial=-np.inf)
               for run, column in ((term.top, term.top_column), (term.bottom, term.bottom_column)))  # fmt: skip


def steps_at(run: Run, term: Term) -> float:
    """Optimiser steps that a run had taken at the term's meeting point."""
    return float(np.interp(meeting_point(term), *trajectory(run, "step", term.x)))


def final_values(terms: list[Term]) -> tuple[np.ndarray, np.ndarray]:
    """top, bottom (seeds,) where the two runs of each term meet; NaN where they never do."""
    values = []
    for term in terms:
        if term.top is term.bottom:
            values.append((final(term.top, term.top_column), final(term.top, term.bottom_column)))
        else:
            end = meeting_point(term)
            values.append((value_at(term.top, term.top_column, term.x, end), value_at(term.bottom, term.bottom_column, term.x, end)))
    top, bottom = np.array(values, float).reshape(-1, 2).T
    return top, bottom


def final_ratio(terms: list[Term], order: str) -> float:
    return float(average(*final_values(terms), order))


def log_ratios(terms: list[Term]) -> np.ndarray:
    top, bottom = final_values(terms)
    return np.log(top / bottom)


def corrected(ratios: Ratios) -> dict[Cell, tuple[float, int]]:
    """{cell: (p-value against a ratio of 1, Holm-corrected over all sizes of its group; their number)}."""
    result = {}
    for group in {cell.group for cell in ratios}:
        sizes = [cell for cell in ratios if cell.group == group]
        p = holm(np.array([paired_p(log_ratios(ratios[cell])) for cell in sizes]))
        result |= {cell: (float(value), int(np.isfinite(p).sum())) for cell, value in zip(sizes, p)}
    return result


def share_of_the_way(study: Study, variant: Variant, cell: Cell) -> np.ndarray:
    """(seeds,): how far `variant` brings the bw loss from that of p_bw = 0 (0) to that of the bw-only model (1)."""
    by = study.cells[cell]
    ends = [by.get(v, {}) for v in (FW_ONLY, variant, BW_ONLY)]
    losses = np.array([[final(end[seed], "bw_loss") for end in ends] for seed in sorted(set.intersection(*map(set, ends)))])
    return (losses[:, 0] - losses[:, 1]) / (losses[:, 0] - losses[:, 2]) if len(losses) else np.empty(0)


def bw_passes(run: Run) -> float | None:
    """Micro-batches that were learned backward. Older tables do not count them: then about as many as the tokens make, None where a
    micro-batch's were left to the recipe."""
    if np.isfinite(counted := final(run, "passes_bw") if "passes_bw" in run.curve else np.nan):
        return counted
    return final(run, "tokens_bw") / run["batch_tokens"] if run.settings.get("batch_tokens") else None


# ---------------------------------------------------------------------------------------------------------------------
# Documents and layers
# ---------------------------------------------------------------------------------------------------------------------


def bootstrap(term: Term) -> tuple[float, float, float] | None:
    """One pair's ratio of losses with the 95 % interval of a bootstrap over validation documents; None without tables."""
    tables = []
    for run, column in ((term.top, term.top_column), (term.bottom, term.bottom_column)):
        path = run.folder / "documents.csv"
        if not path.exists() or not column.endswith("_loss"):
            return None
        table = read_table(path, DOCUMENTS_COLUMNS)
        tables.append(table[table["direction"] == column[:2]].set_index("document")[["tokens", "loss"]])
    both = pd.concat(tables, axis=1, join="inner").to_numpy(float)  # (documents, 4)
    return document_interval(both[:, 0], both[:, 1], both[:, 3]) if len(both) > 1 else None


def ablation(run: Run, kind: str) -> pd.DataFrame:
    """Rows of layers.csv of one kind, indexed by layers remaining ("cut") or by the layer left out ("drop")."""
    rows, place = run.layers[run.layers["ablation"] == kind], "layer" if kind == "drop" else "layers_remaining"
    return rows.drop_duplicates(place, keep="last").set_index(place).sort_index()


def with_layers(study: Study, runs: Iterable[Run], kind: str) -> list[Run]:
    """The runs whose layers.csv has every row of this kind; the others go to study.notes."""
    complete = []
    for run in runs:
        expected = set(range(1, run["depth"] + 1)) if kind == "cut" else set(range(run["depth"]))
        missing = sorted(expected - set(ablation(run, kind).index))
        if run.layers.empty:
            study.note(f"layers: not measured in every run (python eval_layers.py {study.folder})")
        elif missing:
            rows = "s" if len(missing) == len(expected) else f" {', '.join(map(str, missing))}"
            study.note(f'run {run.name}: layers.csv lacks the "{kind}" row{rows}')
        else:
            complete.append(run)
    return complete


def with_layers_of_both(study: Study, terms: list[Term], kind: str) -> list[Term]:
    """The terms both of whose runs have every row of this kind."""
    return [term for term in terms if len(with_layers(study, (term.top, term.bottom), kind)) == 2]


def layer_values(terms: list[Term], kind: str) -> np.ndarray:
    """(top and bottom, seeds, depth): over layers remaining (1..depth), or over the layer left out (0..depth - 1).

    Of the whole trained models: layers know no other budget.
    """
    sides = ([(term.top, term.top_column) for term in terms], [(term.bottom, term.bottom_column) for term in terms])
    return np.array([[ablation(run, kind)[column] for run, column in side] for side in sides])
