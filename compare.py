"""The numbers behind every figure: which runs are compared, how they are paired, ratios, averages, intervals.

    >>> study = load("results/demo")                      # finished runs, sorted into cells; study.notes: left out, why
    >>> pairs = ratio1(study, choose(study))              # {cell: one Term per seed that both p_bw have}
    >>> {cell.label: final_ratio(terms, "mean_then_ratio") for cell, terms in pairs.items()}
    >>> paired_interval(log_ratios(pairs[cell]))          # ratio, low, high: geometric mean, 95 % t-interval

A *cell* is what one size is measured in: all runs with equal depth, width, num_heads, data and bw_mask (so "flipped"
never mixes with "anticausal"). If some other setting that can change a result differs between runs of one such cell,
it becomes part of the cell too, and runs are then never compared across it. Within a cell, runs are told apart by
*variant* (task and p_bw) and by seed, and paired by seed number. Tables only: no torch, no matplotlib.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Iterable, NamedTuple, Sequence

import numpy as np
import pandas as pd
from scipy import stats

from runs import Run, RunError, read_study

ORDERS = ("mean_then_ratio", "ratio_then_mean")
METRICS = ("loss", "acc", "ppl")
CELL_SETTINGS = ("depth", "width", "num_heads", "data", "bw_mask")
# What tells the runs of one cell apart, and what cannot change what a run learns. Any other setting splits a cell.
IGNORED_SETTINGS = (
    "seed", "p_bw", "task", "study", "eval_every", "eval_epochs", "physical_tokens", "device", "compile",
)  # fmt: skip


class StudyError(ValueError):
    """A study that cannot be compared; the message is one sentence for the user."""


class Group(NamedTuple):
    """Cells that may share a figure: all that a cell has besides its size. `extras`: further settings that vary."""

    data: str
    num_heads: int
    bw_mask: str
    extras: tuple[tuple[str, str], ...] = ()


class Cell(NamedTuple):
    group: Group
    params: int
    depth: int
    width: int

    @property
    def label(self) -> str:
        return f"{self.depth} x {self.width}"


class Variant(NamedTuple):
    """What a run was trained on. The p_bw of "fw" is 0 and that of "bw" is 1, whatever the unused setting said."""

    task: str
    p_bw: float

    @property
    def label(self) -> str:
        named = {"fw": "p_bw = 0", "bw": "bw only", "adaptive": "adaptive p_bw"}
        prefix = "fw or bw at " if self.task == "fw-or-bw" else ""
        return named.get(self.task, f"{prefix}p_bw = {self.p_bw:g}")

    def trains(self, direction: str) -> bool:
        return self.task not in ("fw", "bw") or self.task == direction


FW_ONLY, BW_ONLY = Variant("fw", 0.0), Variant("bw", 1.0)


class Term(NamedTuple):
    """One seed's ratio: `top_column` of run `top` over `bottom_column` of run `bottom` (the same run for ratio 2)."""

    seed: int
    top: Run
    top_column: str
    bottom: Run
    bottom_column: str


Ratios = dict[Cell, list[Term]]  # one term per paired seed


@dataclass
class Study:
    """A study's usable runs as cells[cell][variant][seed], and in `notes` one sentence for each thing left out."""

    folder: Path
    cells: dict[Cell, dict[Variant, dict[int, Run]]]
    notes: list[str] = field(default_factory=list)

    @property
    def groups(self) -> list[Group]:
        return sorted({cell.group for cell in self.cells})

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def name(self, cell: Cell) -> str:
        """The cell in words, with as much of its group as is needed to tell it from the study's other cells."""
        heading = self.heading(cell.group)
        return f"{cell.label} ({heading})" if len(self.groups) > 1 or "leaks" in heading else cell.label

    def heading(self, group: Group) -> str:
        parts = [group.data]
        if len({other.num_heads for other in self.groups}) > 1 or group.num_heads > 1:
            parts.append(f"{group.num_heads} heads")
        if group.bw_mask != "anticausal":
            parts.append(f"{group.bw_mask} (leaks)")
        return ", ".join(parts + [f"{name} = {value}" for name, value in group.extras])


# ---------------------------------------------------------------------------------------------------------------------
# Reading a study and sorting its runs
# ---------------------------------------------------------------------------------------------------------------------


def variant_of(run: Run) -> Variant:
    task = run["task"].replace("|", "-or-")  # both spellings mean: fw or bw per micro-batch
    if task == "fw" or (task in ("fw+bw", "fw-or-bw") and run["p_bw"] == 0):
        return FW_ONLY
    return Variant(task, 1.0 if task in ("bw", "adaptive") else float(run["p_bw"]))


def load(folder: str | Path, seeds: Sequence[int] | None = None) -> Study:
    """Reads a study. StudyError (one sentence) if it holds nothing to compare or a table is damaged."""
    folder = Path(folder)
    if not folder.is_dir():
        raise StudyError(f"{folder} is not there: train a study with python train.py --study {folder.name}")
    try:
        found = read_study(folder)
    except RunError as error:
        raise StudyError(str(error)) from None
    study = Study(folder, {})
    for sub in sorted(folder.iterdir()):
        if (sub / "curve.csv").exists() and not (sub / "config.json").exists():
            study.note(f"run {sub.name} has no config.json")
    usable = [run for run in found if (seeds is None or run["seed"] in seeds) and _usable(study, run)]
    if not usable:
        why = "; ".join(study.notes) or "none of these seeds"
        raise StudyError(f"{folder} holds no finished run to compare ({why})")
    extras = _further_settings_that_vary(usable)
    for run in usable:
        group = Group(
            run.config["data"]["name"], run["num_heads"], run["bw_mask"],
            tuple((name, _readable(_comparable(run).get(name, "not set"))) for name in extras),
        )  # fmt: skip
        cell = Cell(group, run.config["params"], run["depth"], run["width"])
        same = study.cells.setdefault(cell, {}).setdefault(variant_of(run), {})
        if run["seed"] in same:
            study.note(f"run {run.name} repeats the settings of {same[run['seed']].name}")
        else:
            same[run["seed"]] = run
    study.cells = {cell: {v: by[v] for v in variants(study) if v in by} for cell, by in sorted(study.cells.items())}
    return study


def _readable(value: str) -> str:
    """JSON of a setting -> a few letters for a heading; what is long (checksums) is told apart by a short hash."""
    text = value.strip('"')
    return text if len(text) <= 20 else hashlib.sha256(text.encode()).hexdigest()[:6]


def _usable(study: Study, run: Run) -> bool:
    for key in ("seed", "p_bw", "task", *CELL_SETTINGS):
        if key not in run.settings:
            raise StudyError(f"{run.folder / 'config.json'} has no setting {key!r}")
    for file, table in (("curve.csv", run.curve), ("layers.csv", run.layers)):
        for column in table.columns:
            if column.startswith(("fw_", "bw_", "step", "epoch", "tokens_", "layers_")) and len(table):
                if not pd.api.types.is_numeric_dtype(table[column]):
                    raise StudyError(f"{run.folder / file}: column {column!r} holds something that is no number")
    if run.finished is None:
        study.note(f"run {run.name} is unfinished (no finished.json)")
    elif run.curve.empty:
        study.note(f"run {run.name} has no evaluations (empty curve.csv)")
    elif not np.isfinite(run.curve.sort_values("step")[["fw_loss", "bw_loss"]].iloc[-1].astype(float)).all():
        study.note(f"run {run.name} ends with a loss that is not finite")
    else:
        return True
    return False


def _comparable(run: Run) -> dict[str, str]:
    """All that must be equal in runs that are compared. The data set is what its folder's meta.json called it."""
    values = {name: value for name, value in run.settings.items() if name not in IGNORED_SETTINGS}
    data = run.config["data"]
    values |= {"data": data["name"], "data files": data.get("sha256")}
    return {name: json.dumps(value) for name, value in values.items()}


def _further_settings_that_vary(found: list[Run]) -> list[str]:
    seen: dict[tuple, set[str]] = {}
    for run in found:
        values = _comparable(run)
        cell = tuple(values[name] for name in CELL_SETTINGS)
        for name, value in values.items():
            seen.setdefault((name, cell), set()).add(value)
    return sorted({name for (name, _), different in seen.items() if len(different) > 1})


def variants(study: Study) -> list[Variant]:
    return sorted({v for cell in study.cells.values() for v in cell}, key=lambda v: (v.p_bw, v.task))


def choose(study: Study, p_bw: float | None = None, task: str = "fw+bw") -> Variant | None:
    """The variant to hold against p_bw = 0: `p_bw` if given, else 0.05, else the smallest; of `task`, else of any."""
    both = [v for v in variants(study) if v not in (FW_ONLY, BW_ONLY)]
    both = [v for v in both if v.task == task] or both
    if p_bw is not None:
        both = [v for v in both if v.p_bw == p_bw]
        if not both:
            study.note(f"no finished run has p_bw = {p_bw:g}")
    return next((v for v in both if v.p_bw == 0.05), both[0] if both else None)


# ---------------------------------------------------------------------------------------------------------------------
# Ratios: a dictionary {cell: [Term per seed]} says what is divided by what; everything below works on either ratio
# ---------------------------------------------------------------------------------------------------------------------


def ratio1(study: Study, variant: Variant | None, metric: str = "loss", direction: str = "fw") -> Ratios:
    """metric(p_bw = 0) / metric(variant), paired by seed. Seeds and cells without a partner go to study.notes."""
    column = f"{direction}_{metric}"
    return _paired(study, FW_ONLY, column, variant, column)


def ratio2(study: Study, variant: Variant | None, metric: str = "loss") -> Ratios:
    """metric_fw / metric_bw of one model, every seed of `variant`."""
    return {
        cell: [Term(seed, run, f"fw_{metric}", run, f"bw_{metric}") for seed, run in sorted(by[variant].items())]
        for cell, by in study.cells.items() if variant in by
    }  # fmt: skip


def ratio2_separate(study: Study, metric: str = "loss") -> Ratios:
    """metric_fw of the fw-only model / metric_bw of the bw-only model with the same seed."""
    return _paired(study, FW_ONLY, f"fw_{metric}", BW_ONLY, f"bw_{metric}")


def _paired(study: Study, top: Variant, top_column: str, bottom: Variant | None, bottom_column: str) -> Ratios:
    result = {}
    for cell, by in study.cells.items():
        above, below = by.get(top, {}), by.get(bottom, {}) if bottom else {}
        if bottom:
            for has, lacks, variant, other in ((above, below, top, bottom), (below, above, bottom, top)):
                alone = sorted(set(has) - set(lacks))
                if alone:
                    which = f"seed{'s' * (len(alone) > 1)} {', '.join(map(str, alone))}"
                    study.note(f"{study.name(cell)}: {which} of {variant.label} without a partner in {other.label}")
        both = sorted(set(above) & set(below))
        if both:
            result[cell] = [Term(seed, above[seed], top_column, below[seed], bottom_column) for seed in both]
    return result


def average(top: np.ndarray, bottom: np.ndarray, order: str) -> np.ndarray:
    """Two arrays (seeds, ...) -> (...): the ratio of the means, or the mean of each seed's ratio."""
    if order == "mean_then_ratio":
        return top.mean(0) / bottom.mean(0)
    if order == "ratio_then_mean":
        return (top / bottom).mean(0)
    raise ValueError(f"order must be one of {ORDERS}, not {order!r}")


def trajectory(run: Run, column: str, x: str) -> tuple[np.ndarray, np.ndarray]:
    """A run's (x, metric), x increasing, without rows that lack either. x "epoch_unique" is derived from the tokens."""
    table = run.curve.sort_values("step")
    xs = table["tokens_unique"] / run.config["data"]["train_tokens"] if x == "epoch_unique" else table[x]
    points = pd.DataFrame({"x": xs, "y": table[column]}).replace([np.inf, -np.inf], np.nan).dropna()
    points = points.drop_duplicates("x", keep="last").sort_values("x")
    return points["x"].to_numpy(float), points["y"].to_numpy(float)


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
    """grid (points,), top and bottom (seeds, points): linear interpolation where *all* runs of the terms overlap."""
    tops = [trajectory(term.top, term.top_column, x) for term in terms]
    bottoms = [trajectory(term.bottom, term.bottom_column, x) for term in terms]
    grid = common_grid(tops + bottoms, window, points)
    return grid, on_grid(tops, grid), on_grid(bottoms, grid)


def reaches(terms: list[Term], window: tuple[float, float]) -> bool:
    """Whether all runs cover the window of epochs: to within 1 % at its end, and at least its second half."""
    runs = [run for term in terms for run in (term.top, term.bottom)]
    spans = [trajectory(run, "fw_loss", "epoch")[0] for run in runs]
    middle = (window[0] + window[1]) / 2
    return all(len(span) > 0 and span[0] <= middle and span[-1] >= 0.99 * window[1] for span in spans)


def final(run: Run, column: str) -> float:
    return float(run.curve.sort_values("step")[column].iloc[-1])


def final_values(terms: list[Term]) -> tuple[np.ndarray, np.ndarray]:
    """top, bottom (seeds,) at each run's last evaluation."""
    top = np.array([final(term.top, term.top_column) for term in terms])
    return top, np.array([final(term.bottom, term.bottom_column) for term in terms])


def final_ratio(terms: list[Term], order: str) -> float:
    return float(average(*final_values(terms), order))


def log_ratios(terms: list[Term]) -> np.ndarray:
    top, bottom = final_values(terms)
    return np.log(top / bottom)


# ---------------------------------------------------------------------------------------------------------------------
# Layers
# ---------------------------------------------------------------------------------------------------------------------


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
        if missing:
            rows = "any" if len(missing) == len(expected) else ", ".join(map(str, missing))
            study.note(f'run {run.name}: layers.csv lacks the "{kind}" row {rows}'.replace("row any", "rows"))
        else:
            complete.append(run)
    return complete


def with_cuts(study: Study, terms: list[Term]) -> list[Term]:
    """The terms both of whose runs have every cut."""
    return [term for term in terms if len(with_layers(study, (term.top, term.bottom), "cut")) == 2]


def cut_ratio(study: Study, terms: list[Term], order: str) -> pd.Series:
    """The ratio over layers remaining (index 1..depth), over the seeds whose runs have every cut; empty if none has."""
    terms = with_cuts(study, terms)
    if not terms:
        return pd.Series(dtype=float)
    tops = np.array([ablation(term.top, "cut")[term.top_column] for term in terms])  # (seeds, depth)
    bottoms = np.array([ablation(term.bottom, "cut")[term.bottom_column] for term in terms])
    return pd.Series(average(tops, bottoms, order), index=range(1, tops.shape[1] + 1))


# ---------------------------------------------------------------------------------------------------------------------
# Intervals
# ---------------------------------------------------------------------------------------------------------------------


def mean_interval(values: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """(..., n) -> mean and half-width of its t-interval; the half-width is NaN for n < 2."""
    values = np.asarray(values, float)
    n = values.shape[-1]
    if n < 2:
        return values.mean(-1), np.full(values.shape[:-1], np.nan)
    return values.mean(-1), stats.t.ppf((1 + level) / 2, n - 1) * values.std(-1, ddof=1) / np.sqrt(n)


def paired_interval(logs: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log-ratios per seed (..., n) -> ratio (geometric mean), low, high of the paired t-interval; NaN for n < 2."""
    mean, half = mean_interval(logs, level)
    return np.exp(mean), np.exp(mean - half), np.exp(mean + half)
