"""A study's runs, sorted for comparing: which of them may be compared at all.

    >>> study = load("results/demo")                      # finished runs, sorted into cells; study.notes: left out, why
    >>> study.cells[cell][Variant("fw+bw", 0.05)][100]    # the run of seed 100
    >>> choose(study)                                     # the variant to compare with p_bw = 0: 5 % where there is one

A *cell* is what one size is measured in: all runs with equal depth, width, num_heads, data and bw_mask (so "flipped"
never mixes with "anticausal"). If some other setting that can change a result differs between runs of one such cell,
it becomes part of the cell too, and runs are then never compared across it. Within a cell, runs are told apart by
*variant* (task, p_bw and BW_SETTINGS of runs.py) and by seed. Runs on a part of the text (unique_tokens) or with dropout answer a question of
their own: they wait in `study.limited`, out of every other comparison. Tables only: no torch, no matplotlib.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Sequence

import numpy as np
import pandas as pd

from flags import UserError
from runs import BW_SETTINGS, OPERATIONAL, Run, RunError, label, read_study

# Settings that older runs do not have, and what those runs did.
LATER_SETTINGS = {"unique_tokens": None, "dropout": 0.0, "optimizer": "adamw"} | BW_SETTINGS
CELL_SETTINGS = ("depth", "width", "num_heads", "data", "bw_mask", "unique_tokens", "dropout")
CROSSED = ("bw_mask", "dropout")  # cells that differ in these alone meet in some comparisons
# What tells the runs of one cell apart, and what cannot change what a run learns. Any other setting splits a cell.
IGNORED_SETTINGS = (
    "seed", "p_bw", "task", *BW_SETTINGS, *OPERATIONAL, "attention", "ablations",
)  # fmt: skip
# What a comparison holds equal, and the column that counts it. The article's is tokens: those of both directions.
BUDGETS = {"tokens": "tokens_total", "tokens_fw": "tokens_fw", "steps": "step", "seconds": "seconds"}
BUDGET_WORDS = {"tokens": "total tokens (both directions)", "tokens_fw": "forward tokens", "steps": "optimiser steps", "seconds": "training seconds"}


class StudyError(UserError, ValueError):
    """A study that cannot be compared; the message is one sentence for the user."""


class Group(NamedTuple):
    """Cells that may share a figure: all that a cell has besides its size. `extras`: further settings that vary."""

    data: str
    num_heads: int
    bw_mask: str
    extras: tuple[tuple[str, str], ...] = ()
    unique_tokens: int = 0  # 0: the whole training split
    dropout: float = 0.0

    def on_all_text(self) -> Group:
        """The group of the same runs with the whole text and no dropout."""
        return self._replace(unique_tokens=0, dropout=0.0)


class Cell(NamedTuple):
    group: Group
    params: int
    depth: int
    width: int

    @property
    def label(self) -> str:
        return f"{self.depth} x {self.width}"

    def with_mask(self, bw_mask: str) -> Cell:
        return self._replace(group=self.group._replace(bw_mask=bw_mask))


class Variant(NamedTuple):
    """What a run was trained on. The p_bw of "fw" is 0 and that of "bw" is 1, whatever the unused setting said."""

    task: str
    p_bw: float
    bw_weight: float = 1.0
    bw_start: float = 0.0
    bw_end: float = 1.0

    @property
    def how(self) -> tuple[float, ...]:
        """The values of BW_SETTINGS."""
        return tuple(getattr(self, name) for name in BW_SETTINGS)

    @property
    def throughout(self) -> bool:
        """Whether bw is learned all along, and not in a part of the run only."""
        return (self.bw_start, self.bw_end) == (0, 1)

    @property
    def label(self) -> str:
        return label(self._asdict())

    @property
    def place(self) -> tuple:
        """Its place in every list of variants."""
        return self.p_bw, self.task, *self.how

    def trains(self, direction: str) -> bool:
        return self.task not in ("fw", "bw") or self.task == direction


FW_ONLY, BW_ONLY = Variant("fw", 0.0), Variant("bw", 1.0)
Cells = dict[Cell, dict[Variant, dict[int, Run]]]


@dataclass
class Study:
    """A study's usable runs as cells[cell][variant][seed], and in `notes` one sentence for each thing left out."""

    folder: Path
    cells: Cells
    notes: list[str] = field(default_factory=list)
    limited: Cells = field(default_factory=dict)  # fewer unique tokens, or dropout
    budget: str = "tokens"
    pdf: bool = False  # its figures are drawn for a paper

    @property
    def groups(self) -> list[Group]:
        return sorted({cell.group for cell in self.cells})

    @property
    def fine_tuned(self) -> bool:
        """Whether experiments/finetune.py made all of it: the claims are about training from the start."""
        return all("model" in run.settings for by in self.cells.values() for seeds in by.values() for run in seeds.values())

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def name(self, cell: Cell) -> str:
        """The cell in words, with as much of its group as is needed to tell it from the study's other cells."""
        return f"{cell.label} ({self.heading(cell.group)})" if self.needs_heading(cell.group) else cell.label

    def needs_heading(self, group: Group) -> bool:
        """Whether a reader must be told which runs these are: there are others, or they are not what one expects."""
        return self.groups != [group] or group != group.on_all_text() or group.bw_mask == "flipped"

    def heading(self, group: Group) -> str:
        parts = [group.data]
        if len({other.num_heads for other in self.groups}) > 1 or group.num_heads > 1:
            parts.append(f"{group.num_heads} heads")
        if group.bw_mask != "anticausal":
            parts.append(group.bw_mask + " (leaks)" * (group.bw_mask == "flipped"))
        parts += [f"{group.unique_tokens:,} unique tokens"] * (group.unique_tokens > 0)
        parts += [f"dropout {group.dropout:g}"] * (group.dropout > 0)
        return ", ".join(parts + [f"{name} = {value}" for name, value in group.extras])


def variant_of(run: Run) -> Variant:
    task = run["task"]
    if task == "fw" or (task in ("fw+bw", "fw-or-bw") and run["p_bw"] == 0):
        return FW_ONLY
    variant = Variant(task, 1.0 if task == "adaptive" else float(run["p_bw"]), *(float(run.settings.get(name, usual)) for name, usual in BW_SETTINGS.items()))
    return BW_ONLY if task == "bw" or ((task, variant.p_bw) == ("fw-or-bw", 1) and variant.throughout) else variant


def corpus_tokens(run: Run) -> int:
    """Tokens of text that the run could see: an epoch."""
    return int(run.settings.get("unique_tokens") or run.config["data"]["train_tokens"])


def variants(study: Study) -> list[Variant]:
    return sorted({v for cell in study.cells.values() for v in cell}, key=lambda v: v.place)


def choose(study: Study, p_bw: float | None = None, task: str = "fw+bw", **how: float | None) -> Variant | None:
    """The variant to compare with p_bw = 0: `p_bw` and of BW_SETTINGS what is given, else 0.05 and what is usual, else the smallest; of `task`,
    else of any that is known here."""
    both = [v for v in variants(study) if v not in (FW_ONLY, BW_ONLY) and v.task in ("fw+bw", "fw-or-bw", "adaptive")]
    for name, value in {"p_bw": p_bw, **how}.items():
        if value is not None:
            both = [v for v in both if math.isclose(getattr(v, name), value, rel_tol=1e-5)]  # as many digits as a file's name has
            if not both:
                study.note(f"no finished run has {name} = {value:g}")
                return None
    both = [v for v in both if v.task == task] or both
    for name, usual in BW_SETTINGS.items():
        both = [v for v in both if getattr(v, name) == usual] or both
    return next((v for v in both if v.p_bw == 0.05), both[0] if both else None)


# ---------------------------------------------------------------------------------------------------------------------
# Reading a study
# ---------------------------------------------------------------------------------------------------------------------


def load(folder: str | Path, seeds: Sequence[int] | None = None, budget: str = "tokens") -> Study:
    """Reads a study. StudyError (one sentence) if it holds nothing to compare or a table is damaged.

    `budget`, one of BUDGETS, is what all comparisons of this study hold equal.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise StudyError(f"{folder} does not exist: train a study with python train.py --study {folder}")
    try:
        found = read_study(folder)
    except RunError as error:
        raise StudyError(str(error)) from None
    study = Study(folder, {}, budget=budget)
    for sub in sorted(folder.iterdir()):
        if (sub / "curve.csv").exists() and not (sub / "config.json").exists():
            study.note(f"run {sub.name} has no config.json")
    usable = [run for run in found if (seeds is None or run["seed"] in seeds) and _usable(study, run)]
    if not usable:
        why = "; ".join(study.notes) or "none of these seeds"
        raise StudyError(f"{folder} holds no finished run to compare ({why})")
    sort_runs(study, usable)
    return study


def sort_runs(study: Study, runs: list[Run]) -> None:
    """Puts runs into cells. The limited ones stay aside, unless all of them are: then they are the study, too."""
    extras = _further_settings_that_vary(runs)
    everything: Cells = {}
    for run in runs:
        group = Group(
            run.config["data"]["name"], run["num_heads"], run["bw_mask"],
            tuple((name, _readable(_comparable(run).get(name, "not set"))) for name in extras),
            int(run.settings.get("unique_tokens") or 0), run.settings.get("dropout") or 0.0,
        )  # fmt: skip
        cell = Cell(group, run.config["params"], run["depth"], run["width"])
        same = everything.setdefault(cell, {}).setdefault(variant_of(run), {})
        if run["seed"] in same:
            study.note(f"run {run.name} repeats the settings of {same[run['seed']].name}")
        else:
            same[run["seed"]] = run
    order = sorted({v for by in everything.values() for v in by}, key=lambda v: v.place)
    everything = {cell: {v: by[v] for v in order if v in by} for cell, by in sorted(everything.items())}
    study.limited = {cell: by for cell, by in everything.items() if cell.group.unique_tokens or cell.group.dropout}
    study.cells = {cell: by for cell, by in everything.items() if cell not in study.limited} or everything


def _readable(value: str) -> str:
    """JSON of a setting -> a few letters for a heading; what is long (checksums) is told apart by a short hash."""
    text = "none" if value == "null" else value.strip('"')  # as the flag spells it
    return text if len(text) <= 20 else hashlib.sha256(text.encode()).hexdigest()[:6]


def _usable(study: Study, run: Run) -> bool:
    for key in ("seed", "p_bw", "task", *CELL_SETTINGS):
        if key not in run.settings and key not in LATER_SETTINGS:
            raise StudyError(f"{run.folder / 'config.json'} has no setting {key!r}")
    for file, table in (("curve.csv", run.curve), ("layers.csv", run.layers)):
        for column in table.columns:
            if column.startswith(("fw_", "bw_", "step", "epoch", "tokens_", "seconds", "layers_")) and len(table):
                if not pd.api.types.is_numeric_dtype(table[column]):
                    raise StudyError(f"{run.folder / file}: column {column!r} holds something that is no number")
    if run.finished is None:
        study.note(f"run {run.name} is unfinished (no finished.json)")
    elif run.curve.empty:
        study.note(f"run {run.name} has no evaluations (empty curve.csv)")
    elif not (variant_of(run).throughout or run.curve["tokens_bw"].iloc[-1]):
        study.note(f"run {run.name} never learned bw")
    elif not np.isfinite(run.curve[["fw_loss", "bw_loss"]].iloc[-1].astype(float)).all():
        study.note(f"run {run.name} ends with a loss that is not finite")
    else:
        return True
    return False


def _comparable(run: Run) -> dict[str, str]:
    """All that must be equal in runs that are compared. The data set is what its folder's meta.json called it."""
    values = LATER_SETTINGS | {name: value for name, value in run.settings.items() if name not in IGNORED_SETTINGS}
    data = run.config["data"]
    values |= {"data": data["name"], "data files": data.get("sha256"), "dtype": dtype_of(run)}
    return {name: json.dumps(value) for name, value in values.items()}


def dtype_of(run: Run) -> str | None:
    """What "auto" was on the run's machine; older runs say so in the words for their device only."""
    words = str(run.config.get("device", ""))
    return run.config.get("dtype") or next((name for name in ("bfloat16", "float32") if f", {name} (" in words), run.settings.get("dtype"))


def _further_settings_that_vary(found: list[Run]) -> list[str]:
    """A setting that some runs lack varies, too: they were trained before there was one, and nothing says what it was then."""
    seen: dict[tuple, set[str]] = {}
    everything = [_comparable(run) for run in found]
    for values in everything:
        met = tuple(values[name] for name in CELL_SETTINGS if name not in CROSSED)
        for name in {name for other in everything for name in other} - {*CROSSED}:
            seen.setdefault((name, met), set()).add(values.get(name, "not set"))
    return sorted({name for (name, _), different in seen.items() if len(different) > 1})
