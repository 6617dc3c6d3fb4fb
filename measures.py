"""What the verdicts are measured on: log-ratios per seed, by size, out of a study's tables.

    >>> at_the_end(ratio2)(Scope(study, variant, group))      # {"4 x 128": array of one log-ratio per seed}
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Callable, Iterable, NamedTuple

import numpy as np
import pandas as pd

from cells import FW_ONLY, Cell, Group, Study, Variant
from compare import (
    Ratios, final, layer_values, log_ratios, lowest, paired, ratio1, ratio2, ratio2_separate, ratio_curve, windows, with_layers_of_both,
)  # fmt: skip
from report import floor_of, interval, short
from runs import CONTEXT_COLUMNS, MERGE_COLUMNS, REVERSAL_COLUMNS, Run, read_table, split_table_name, table_name


class Scope(NamedTuple):
    """What a claim is measured on: the cells of one group (data, mask), `variant` against p_bw = 0."""

    study: Study
    variant: Variant
    group: Group

    def with_mask(self, bw_mask: str) -> Scope:
        return self._replace(group=self.group._replace(bw_mask=bw_mask))

    def of(self, ratios: Ratios) -> Ratios:
        return {cell: terms for cell, terms in ratios.items() if cell.group == self.group}

    def cells(self) -> dict[Cell, dict]:
        return {cell: by for cell, by in self.study.cells.items() if cell.group == self.group}

    def limited(self) -> dict[Cell, dict]:
        """What has a part of the text only, or dropout, and equals the group otherwise."""
        return {cell: by for cell, by in self.study.limited.items() if cell.group.on_all_text() == self.group.on_all_text()}


Measure = Callable[[Scope], dict[str, np.ndarray]]  # {which model: log-ratio of each seed}, by size


def at_the_end(ratio: Callable[[Study, Variant], Ratios]) -> Measure:
    return lambda scope: {cell.label: log_ratios(terms) for cell, terms in scope.of(ratio(scope.study, scope.variant)).items()}


def end_over_first_epoch(ratio: Callable[[Study, Variant], Ratios]) -> Measure:
    """Nothing where training has no more than one epoch, or bw is learned in a part of the run only. Both points are fixed beforehand: no lowest one is picked."""

    def measure(scope: Scope) -> dict[str, np.ndarray]:
        found = {}
        if not scope.variant.throughout:
            return found
        for cell, terms in scope.of(ratio(scope.study, scope.variant)).items():
            early = windows(terms).get("early")
            if early:
                _, top, bottom = ratio_curve(terms, "epoch", early)
                found[cell.label] = log_ratios(terms) - np.log(top / bottom)[:, -1]
        return found

    return measure


def growth(params: np.ndarray, logs: np.ndarray) -> np.ndarray:
    """Slope of logs (sizes, seeds) over log10 params (sizes,), by least squares: log of the factor per tenfold size."""
    return np.polyfit(np.log10(params), logs, 1)[0]


def growth_with_size(ratio: Callable[[Study, Variant], Ratios]) -> Measure:
    def measure(scope: Scope) -> dict[str, np.ndarray]:
        found = scope.of(ratio(scope.study, scope.variant))
        seeds = set.intersection(*({term.seed for term in terms} for terms in found.values())) if found else set()
        if len(found) < 3 or not seeds:
            return {}
        if more := sorted({term.seed for terms in found.values() for term in terms} - seeds):
            scope.study.note(f"growth with size: seed{'s' * (len(more) > 1)} {', '.join(map(str, more))} not at every size")
        logs = [log_ratios([term for term in terms if term.seed in seeds]) for terms in found.values()]
        return {f"{len(found)} sizes": growth([cell.params for cell in found], logs)}

    return measure


def learned_backward(scope: Scope) -> dict[str, list[Run]]:
    """Of everything trained backward all along, the highest p_bw last: whether a mask leaks shows best where the bw task was trained most."""
    return {f"{cell.label}, {variant.label}": [run for _, run in sorted(seeds.items())] for cell, by in scope.cells().items()
            for variant, seeds in by.items() if variant.trains("bw") and variant.throughout and floor_of(seeds.values())}  # fmt: skip


def bw_over_floor(scope: Scope) -> dict[str, np.ndarray]:
    return {label: np.log([final(run, "bw_loss") / floor_of(runs)[0] for run in runs]) for label, runs in learned_backward(scope).items()}


def below_floor(scope: Scope, label: str) -> str:
    """One run below the entropy of the text proves that its mask leaks, whatever the mean: no model gets there unseen."""
    runs = learned_backward(scope)[label]
    floor, error = floor_of(runs)
    below = sum(final(run, "bw_loss") < floor - 3 * error for run in runs)
    return f"holds: {below} of {len(runs)} run{'s' * (len(runs) != 1)} below" if below else ""


def over_right_mask(scope: Scope, label: str) -> str:
    """Ratio 2 with the published mask / with the right one, paired by seed."""
    terms = [scope.with_mask(mask).of(ratio2(scope.study, scope.variant)) for mask in ("flipped", "anticausal")]
    flipped, right = ({term.seed: log for cell, some in side.items() if cell.label == label for term, log in zip(some, log_ratios(some))} for side in terms)
    pairs = np.array([flipped[seed] - right[seed] for seed in sorted(set(flipped) & set(right))])
    return f"{interval(pairs, 2)} times that of the right mask" if scope.group.bw_mask == "flipped" and len(pairs) else ""


def on_repeated_text(at_best: bool) -> Measure:
    """Ratio 1 where the text was seen most often, at the end of training or at each run's best evaluation."""

    def measure(scope: Scope) -> dict[str, np.ndarray]:
        cells = {cell: by for cell, by in scope.limited().items() if not cell.group.dropout}
        found = {}
        if at_best and not scope.variant.throughout:  # its best may be without bw
            return found
        for cell, terms in paired(scope.study, FW_ONLY, "fw_loss", scope.variant, "fw_loss", cells).items():
            epochs = np.mean([final(term.top, "epoch") for term in terms])
            pairs = [math.log(lowest(t.top, "fw_loss") / lowest(t.bottom, "fw_loss")) for t in terms]
            found[cell] = round(epochs, 1), np.array(pairs) if at_best else log_ratios(terms)
        return by_repetition(found)

    return measure


def dropout_instead(scope: Scope) -> dict[str, np.ndarray]:
    """fw loss of p_bw = 0 without dropout / with it, at each run's best evaluation, where the text was seen most often."""
    everything, found = scope.cells() | scope.limited(), {}
    for cell, by in everything.items():
        plain = everything.get(cell._replace(group=cell.group._replace(dropout=0.0)), {}).get(FW_ONLY, {})
        seeds = sorted(set(plain) & set(by.get(FW_ONLY, {})))
        if cell.group.dropout and seeds:
            epochs = np.mean([final(plain[seed], "epoch") for seed in seeds])
            logs = [math.log(lowest(plain[seed], "fw_loss") / lowest(by[FW_ONLY][seed], "fw_loss")) for seed in seeds]
            found[cell] = round(epochs, 1), np.array(logs)
    return by_repetition(found)


def by_repetition(found: dict[Cell, tuple[float, np.ndarray]]) -> dict[str, np.ndarray]:
    """{cell: (epochs, log-ratios)} -> those that saw their text most often last, then the largest; labels tell all of them apart."""
    order = sorted(found, key=lambda cell: (found[cell][0], cell.params, cell.group.unique_tokens, cell.group.dropout))
    names = {cell: f"{cell.label}, {found[cell][0]:.3g} epochs" + f", dropout {cell.group.dropout:g}" * (cell.group.dropout > 0) for cell in order}
    alike = [name for name in names.values() if list(names.values()).count(name) > 1]
    return {name + f", {short(cell.group.unique_tokens)} unique tokens" * (name in alike): found[cell][1] for cell, name in names.items()}


def whole_over_one_layer(scope: Scope) -> dict[str, np.ndarray]:
    return _cuts(scope, ratio2(scope.study, scope.variant), lambda logs: logs[:, -1] - logs[:, 0])


def half_over_whole(scope: Scope) -> dict[str, np.ndarray]:
    """Of the narrowest models that were cut."""
    ratios = ratio1(scope.study, scope.variant, "ppl")
    found = _cuts(scope, ratios, lambda logs: logs[:, logs.shape[1] // 2 - 1] - logs[:, -1])
    widths = {cell.label: cell.width for cell in ratios}
    return {label: logs for label, logs in found.items() if widths[label] == min(widths[other] for other in found)}


def _cuts(scope: Scope, ratios: Ratios, contrast: Callable[[np.ndarray], np.ndarray]) -> dict[str, np.ndarray]:
    found = {}
    for cell, terms in scope.of(ratios).items():
        top, bottom = layer_values(with_layers_of_both(scope.study, terms, "cut"), "cut")
        if len(top) and cell.depth > 1:
            found[cell.label] = contrast(np.log(top / bottom))
    return found


def gap_growth_with_context(scope: Scope) -> dict[str, np.ndarray]:
    """log(bw / fw) of two single-direction models with the longest context, minus that with the shortest.

    From context.csv, or where no pair has it, from the table of most windows of the same text.
    """
    found = {}
    for cell, terms in scope.of(ratio2_separate(scope.study)).items():
        tables = {split_table_name(path, "context") for term in terms for path in term.top.folder.glob("context_*windows.csv")}
        for count in (None, *sorted((windows for text, windows in tables if text is None), reverse=True)):
            gaps = []
            for term in terms:
                paths = [run.folder / table_name("context", None, count) for run in (term.top, term.bottom)]
                if all(path.exists() for path in paths):
                    gap = np.log(by_context(paths[1], "bw") / by_context(paths[0], "fw")).dropna()
                    gaps += [gap.iloc[-1] - gap.iloc[0]] if len(gap) > 1 else []
            if gaps:
                found[cell.label + (f", {count} windows" if count else "")] = np.array(gaps)
                break
    return found


def by_context(path: Path, direction: str) -> pd.Series:
    """Losses in nats per token of one direction, by context length; empty if there is no such table."""
    table = read_table(path, CONTEXT_COLUMNS)
    return table[table["direction"] == direction].set_index("context")["loss"].sort_index()


def barrier(scope: Scope) -> dict[str, np.ndarray]:
    """Between the weights of p_bw = 0 and `variant`: the highest fw loss / the straight line between its ends, as a logarithm."""
    path = scope.study.folder / "merge.csv"
    table = read_table(path, MERGE_COLUMNS) if path.exists() else None
    found = {}
    for cell, by in scope.cells().items() if table is not None else ():
        pairs = {frozenset((run.name, by[scope.variant][seed].name)) for seed, run in by.get(FW_ONLY, {}).items() if seed in by.get(scope.variant, {})}
        heights = {}  # one for each pair, which may have been merged from both of its ends
        for ends, line in table.groupby(["run_a", "run_b"]):
            if frozenset(ends) in pairs:
                line = line.sort_values("weight")
                weights, losses = line["weight"].to_numpy(), line["fw_loss"].to_numpy()
                heights[frozenset(ends)] = np.log(losses / np.interp(weights, weights[[0, -1]], losses[[0, -1]])).max()
        if heights:
            found[cell.label] = np.array(list(heights.values()))
    return found


def asked(runs: Iterable[Run], direction: str, question: str, orders: int, column: str) -> np.ndarray:
    """A column of reversal.csv, (runs,): of those runs that have the table and can be asked in this direction."""
    tables = (read_table(run.folder / "reversal.csv", REVERSAL_COLUMNS) for run in runs)
    rows = (table[(table["direction"] == direction) & (table["question"] == question) & (table["orders"] == orders)] for table in tables)
    return np.array([row[column].iloc[0] for row in rows if len(row)], float)
