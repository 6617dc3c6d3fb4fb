"""What backward tokens are worth: runs of several studies, seed by seed, against *bw only* after as many backward tokens.

The runs of bw-only/ are the beginnings of bw only, evaluated often: how often a run is evaluated and where it ends change
nothing of what is learned, so runs that end at different places are one, and are checked to be.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from cells import BW_ONLY, Variant, variant_of
from compare import Term, common_grid, final, log_ratios, on_grid, trajectory, value_at
from drawing import COLOURS, label_ends, plain_log_axis
from report import interval, plus_minus
from runs import Run, read_study

HERE = Path(__file__).parent
RESULTS = HERE.parent
Seeds = dict[int, Run]


def select(study: str, variant: Variant, data: str = "wikipedia-4k", size: tuple[int, int] = (4, 128)) -> Seeds:
    """The finished runs of a study, by seed."""
    found = [run for run in read_study(RESULTS / study) if run.finished and variant_of(run) == variant
             and (run.config["data"]["name"], run["depth"], run["width"], run["bw_mask"], run.settings.get("dropout") or 0)
             == (data, *size, "anticausal", 0)]  # fmt: skip
    assert len({run["seed"] for run in found}) == len(found)
    return {run["seed"]: run for run in found}


def joined(runs: list[Run], long: Run) -> Run:
    """Beginnings of one run, and its later rows from `long`. Where they overlap they are the same: to the last digit among the
    beginnings, within 2 % where `long`, of another machine perhaps, has a row between two of theirs."""
    curve = pd.concat([run.curve for run in runs])
    assert (curve.groupby("step")[["tokens_bw", "fw_loss", "bw_loss"]].nunique() == 1).all(axis=None), runs
    first = replace(runs[-1], curve=curve.drop_duplicates("step").sort_values("step"))
    end = final(first, "step")
    for row in long.curve[long.curve["step"] <= end].itertuples():
        assert abs(value_at(first, "bw_loss", "step", row.step) / row.bw_loss - 1) < 0.02, (long.name, row.step)
    return replace(first, curve=pd.concat([first.curve, long.curve[long.curve["step"] > end]]))


def bw_only(study: str, data: str = "wikipedia-4k", size: tuple[int, int] = (4, 128)) -> Seeds:
    """bw only from its first steps on: its beginning, and after that what `study` has, evaluated more rarely."""
    beginnings: dict[int, list[Run]] = {}
    for run in read_study(HERE / "bw-only"):
        if run.finished and (run.config["data"]["name"], run["depth"], run["width"]) == (data, *size):
            beginnings.setdefault(run["seed"], []).append(run)
    return {seed: joined(sorted(beginnings[seed], key=lambda run: final(run, "step")), long)
            for seed, long in select(study, BW_ONLY, data, size).items() if seed in beginnings}  # fmt: skip


def as_good(run: Run, loss: float) -> float:
    """The backward tokens after which a run's bw loss was first down to `loss`, interpolated in log-log; NaN where it began lower or never was."""
    tokens, losses = trajectory(run, "bw_loss", "tokens_bw")
    losses = np.minimum.accumulate(losses)
    if not losses[-1] <= loss <= losses[0]:
        return np.nan
    return float(np.exp(np.interp(-np.log(loss), -np.log(losses), np.log(tokens))))


def span(values: np.ndarray) -> str:
    low, high = f"{values.min() / 1e6:.2f}", f"{values.max() / 1e6:.2f}"
    return f"{low} M" if low == high else f"{low} to {high} M"


def worth(text: str, name: str, runs: Seeds, alone: Seeds) -> list[str]:
    """A row: what a run's backward tokens taught it, and how many bw only needs for as much."""
    seeds = sorted(set(runs) & set(alone))
    terms = [Term(seed, runs[seed], "bw_loss", alone[seed], "bw_loss", "tokens_bw") for seed in seeds]
    own, losses = (np.array([final(runs[seed], column) for seed in seeds]) for column in ("tokens_bw", "bw_loss"))
    needed = np.array([as_good(alone[seed], loss) for seed, loss in zip(seeds, losses)])
    return [text, name, str(len(seeds)), span(own), plus_minus(losses, 2), interval(log_ratios(terms), 3), span(needed), interval(np.log(needed / own), 2)]


def only(runs: Seeds, seeds: Seeds) -> Seeds:
    return {seed: run for seed, run in runs.items() if seed in seeds}


def pairs(top: Seeds, bottom: Seeds, column: str) -> str:
    seeds = sorted(set(top) & set(bottom))
    return interval(log_ratios([Term(seed, top[seed], column, bottom[seed], column) for seed in seeds]), 3)


def draw_lines(ax, lines: dict[str, Seeds]) -> None:
    """bw loss over backward tokens: each seed thin, their mean thick where all of them were evaluated."""
    labels = []
    for (name, runs), colour in zip(lines.items(), COLOURS):
        curves = [trajectory(run, "bw_loss", "tokens_bw") for run in runs.values()]
        curves = [(tokens[tokens > 0], losses[tokens > 0]) for tokens, losses in curves]
        for tokens, losses in curves:
            ax.plot(tokens, losses, color=colour, linewidth=0.6, alpha=0.4)
        grid = common_grid(curves)
        mean = on_grid(curves, grid).mean(0)
        ax.plot(grid, mean, color=colour, linewidth=1.8)
        labels.append((mean[-1], f"{name} (n = {len(runs)})", colour))
    ax.set_xscale("log")
    ax.set_yscale("log")
    plain_log_axis(ax.xaxis)
    plain_log_axis(ax.yaxis)
    ax.set_xlabel("tokens seen backward", fontsize=8)
    ax.set_ylabel("bw validation loss, nats per token", fontsize=8)
    label_ends(ax, labels)
