"""A study in words: the caption under a figure, the summary `make demo` ends with.

    >>> print(summary("results/demo"))

Numbers come from compare.py. Losses are those of each run's last evaluation; ratios are taken where the shorter run of a
pair ends. No torch, no matplotlib.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Callable, Iterable

import numpy as np

from cells import BW_ONLY, FW_ONLY, Cell, Study, Variant, load, variant_of
from compare import Term, bootstrap, bw_against_bw_only, corrected, final, log_ratios, ratio1, ratio2
from runs import Run, RunError, write_atomically
from stats import mean_interval, paired_interval


def short(number: float) -> str:
    """1234 -> 1,234; 57236 -> 57.2 k; 94000000 -> 94 M."""
    for least, unit, letter in ((999.5e6, 1e9, "G"), (999.5e3, 1e6, "M"), (1e4, 1e3, "k")):
        if number >= least:
            return f"{number / unit:.3g} {letter}"
    return f"{number:,.0f}"


def _span(numbers: Iterable[float]) -> str:
    low, high = min(numbers := list(numbers)), max(numbers)
    return short(low) if short(low) == short(high) else f"{short(low)} to {short(high)}"


def tokens_per_step(run: Run) -> tuple[float, float]:
    """Tokens per optimiser step: the mean over the run, and the largest mean between two evaluations.

    Both, because the recipe's adaptive number of micro-batches can put most of the tokens into the last few steps.
    """
    table = run.curve[run.curve["step"] > 0]
    steps, tokens = ([0.0, *table[column]] for column in ("step", "tokens_total"))
    if len(steps) < 2:
        return 0.0, 0.0
    return tokens[-1] / steps[-1], float(np.max(np.diff(tokens) / np.diff(steps)))


def describe(runs: Iterable[Run]) -> str:
    """One line on what was trained: data, p_bw, seeds, optimiser steps, tokens per step; for captions."""
    runs = list({run.folder: run for run in runs}.values())
    seeds = sorted({run["seed"] for run in runs})
    alike = ("depth", "width", "bw_mask", "unique_tokens", "dropout")
    keys = {(*(run.settings.get(name) for name in alike), variant_of(run), run["seed"]) for run in runs}
    numbers = Counter(key[:-1] for key in keys).values()
    means, peaks = zip(*(tokens_per_step(run) for run in runs))
    parts = [
        "Data " + ", ".join(sorted({run.config["data"]["name"] for run in runs})),
        ", ".join(v.label for v in sorted({variant_of(run) for run in runs}, key=lambda v: v.place)),
        f"n = {_span(numbers)} seed{'s' * (max(numbers) > 1)} ({', '.join(map(str, seeds))})",
        f"{_span(run.curve['step'].max() for run in runs)} optimiser steps",
        f"{_span(means)} tokens per step on average"
        + (f", at most {short(max(peaks))} between two evaluations" if max(peaks) > 1.2 * max(means) else ""),
    ]
    capped = sum(bool(run.finished.get("hit_cap")) for run in runs)
    if capped:
        parts.append(f"{capped} of {len(runs)} runs reached the cap on micro-batches")
    if any(run["bw_mask"] == "flipped" for run in runs):
        parts.append("the flipped bw mask LEAKS its targets")
    return "; ".join(parts)


def floor_of(runs: Iterable[Run]) -> tuple[float, float] | None:
    """(entropy floor, its standard error) in nats per token where the data set knows it (toyworld), else None."""
    data = next(iter(runs)).config["data"]
    return None if data.get("floor") is None else (data["floor"], data.get("floor_se") or 0.0)


def plus_minus(values: np.ndarray, digits: int = 4, sign: str = "") -> str:
    """Mean ± half of the 95 % t-interval; `sign` "+" shows it always."""
    mean, half = mean_interval(values)
    return f"{mean:{sign}.{digits}f}" + ("" if np.isnan(half) else f" ± {half:.{digits}f}")


def interval(logs: np.ndarray, digits: int = 4) -> str:
    ratio, low, high = paired_interval(logs)
    return f"{ratio:.{digits}f}" + ("" if np.isnan(low) else f" [{low:.{digits}f}, {high:.{digits}f}]")


def p_value(p: float, sizes: int) -> str:
    """A p-value against a ratio of 1; with several sizes, Holm's correction over them was applied."""
    if np.isnan(p):
        return ""
    return ("p < 0.001" if p < 0.001 else f"p = {p:.2g}") + (f" (Holm, {sizes} sizes)" if sizes > 1 else "")


def documents(terms: list[Term], digits: int = 3) -> str:
    """The intervals of single pairs over validation documents, "" where no pair has both tables."""
    found = [(term.seed, bootstrap(term)) for term in terms]
    return ", ".join(f"seed {seed} {ratio:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
                     for seed, (ratio, low, high) in ((seed, values) for seed, values in found if values))  # fmt: skip


def alarms(study: Study) -> list[str]:
    """Sentences on losses no honest model can have: under the floor, or bw better than fw on real text."""
    found = []
    for cell, by in study.cells.items():
        if cell.group.bw_mask == "flipped":
            continue  # this mask leaks by design, and every heading says so
        for variant, seeds in by.items():
            floor = floor_of(seeds.values())
            for run in seeds.values():
                losses = {direction: final(run, f"{direction}_loss") for direction in ("fw", "bw")}
                for direction, loss in losses.items():
                    if floor and loss < floor[0] - 3 * floor[1]:
                        found.append(f"{run.name}: {direction} loss {loss:.4f} is under the floor of {floor[0]:.4f}")
                favoured = variant.p_bw * variant.bw_weight > (1 - variant.p_bw if variant.task == "fw-or-bw" else 1)
                both = variant.trains("fw") and variant.trains("bw") and not favoured
                if not floor and both and losses["fw"] > 1.01 * losses["bw"]:
                    found.append(f"{run.name}: bw loss clearly below fw loss: a leak until proven otherwise")
    return found


def summary(study: Study | str | Path) -> str:
    """What was found, for the end of `make demo`: losses against the floor, both ratios, where the pictures are."""
    study = study if isinstance(study, Study) else load(study)
    lines = []
    for cell, by in study.cells.items():
        runs = [run for seeds in by.values() for run in seeds.values()]
        lines += [f"{study.name(cell)}, {short(cell.params)} parameters. {describe(runs)}.", ""]
        wide = max(20, *(len(variant.label) for variant in by)) + 2
        lines += [f"    {'loss, nats per token':<{wide}}{'fw':>9}{'bw':>9}"]
        for variant, seeds in by.items():
            means = [np.mean([final(run, f"{direction}_loss") for run in seeds.values()]) for direction in ("fw", "bw")]
            untrained = [direction for direction in ("fw", "bw") if not variant.trains(direction)]
            remark = f"    ({untrained[0]} was not trained)" if untrained else ""
            lines += [f"    {variant.label:<{wide}}{means[0]:>9.3f}{means[1]:>9.3f}{remark}"]
        if floor := floor_of(runs):
            lines += [f"    {'entropy floor':<{wide}}{floor[0]:>9.3f}{floor[0]:>9.3f}    (no model can get below it)"]
        lines += [""]
        for variant in by:
            lines += _ratio_lines(study, cell, variant)
        lines += ["    [ ]: 95 % t-interval over seeds, paired", ""]
    lines += [f"ALARM: {alarm}" for alarm in alarms(study)]
    lines += [f"left out: {note}" for note in study.notes]
    return "\n".join(lines + [f"pictures: {study.folder / 'figures'}"])


def _ratio_lines(study: Study, cell: Cell, variant: Variant) -> list[str]:
    if variant in (FW_ONLY, BW_ONLY):
        return []
    lines = []
    one, two, enough = ratio1(study, variant), ratio2(study, variant), bw_against_bw_only(study, variant)
    p = p_value(*corrected(one).get(cell, (np.nan, 0)))
    better = "bw sees its targets" if cell.group.bw_mask == "flipped" else "bw is learned better than fw"
    for name, ratios, meaning, above, below in (
        ("ratio 1", one, f"fw loss, p_bw = 0 / {variant.label}{', ' * bool(p) + p}", "bw helped fw", "learning bw cost fw"),
        ("ratio 2", two, f"fw loss / bw loss, {variant.label}", better, "bw is learned less well than fw"),
        ("bw / bw only", enough, f"bw loss, {variant.label} / bw only", "learned less well than alone", "learned better than alone"),
    ):
        if cell in ratios:
            logs = log_ratios(ratios[cell])
            _, low, high = paired_interval(logs)
            verdict = above if low > 1 else below if high < 1 else f"undecided with {len(logs)} seed{'s' * (len(logs) > 1)}"
            lines += [f"    {name} {interval(logs, 3)}    {meaning}: {verdict}"]
            over = documents(ratios[cell])
            lines += [f"        validation documents resampled, one pair each: {over}"] if over else []
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# Markdown
# ---------------------------------------------------------------------------------------------------------------------


def markdown_table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    columns = list(columns)
    return "\n".join("| " + " | ".join(row) + " |" for row in [columns, ["---"] * len(columns), *rows])


def write_between(path: Path, marks: tuple[str, str], title: str, make: Callable[[str], str]) -> None:
    """Replaces what stands between two marks of a file by `make(what stands around them)`; a new file gets a title and both.

    RunError if only one of the marks is left in the file.
    """
    text = path.read_text() if path.exists() else f"# {title}\n"
    if not any(mark in text for mark in marks):
        text = text.rstrip() + "\n\n" + "\n".join(marks) + "\n"
    before, start, rest = text.partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not (start and end):
        raise RunError(f"{path} has lost one of the marks between which its tables stand: {marks[0]} ... {marks[1]}")
    write_atomically(path, f"{before}{start}\n\n{make(before + after)}\n\n{end}{after}")
