"""The tables of README.md and figures/*.png: python results/rare-passes/table.py

What a backward token teaches, in runs where backward passes are rare, against *bw only* after as many backward tokens, seed by
seed. The runs of bw-only/ are the beginnings of bw only, evaluated often: `--eval_every` and the end of a run change nothing
of what is learned, so two runs that end at different places are one, and are checked to be.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

HERE = Path(__file__).parent
RESULTS = HERE.parent
sys.path.insert(0, str(RESULTS.parent))
from cells import BW_ONLY, FW_ONLY, Variant, variant_of  # noqa: E402
from compare import Term, common_grid, final, log_ratios, on_grid, trajectory  # noqa: E402
from drawing import COLOURS, label_ends, new_figure, plain_log_axis, write_png  # noqa: E402
from report import interval, markdown_table, plus_minus  # noqa: E402
from runs import Run, read_study  # noqa: E402

P5, P100 = Variant("fw+bw", 0.05), Variant("fw+bw", 1.0)
Seeds = dict[int, Run]


def select(study: str, variant: Variant, data: str = "wikipedia-4k", size: tuple[int, int] = (4, 128)) -> Seeds:
    """The finished runs of a study, by seed."""
    return {run["seed"]: run for run in read_study(RESULTS / study) if run.finished and variant_of(run) == variant
            and (run.config["data"]["name"], run["depth"], run["width"], run["bw_mask"], run.settings.get("dropout") or 0)
            == (data, *size, "anticausal", 0)}  # fmt: skip


def joined(runs: list[Run]) -> Run:
    """Runs of which each is the beginning of the next, as one."""
    curve = pd.concat([run.curve for run in runs])
    same = curve.groupby("step")[["tokens_bw", "fw_loss", "bw_loss"]].nunique()
    assert (same == 1).all(axis=None), runs
    return replace(runs[-1], curve=curve.drop_duplicates("step").sort_values("step"))


def bw_only(study: str, data: str = "wikipedia-4k", size: tuple[int, int] = (4, 128)) -> Seeds:
    """bw only from its first steps on: its beginning, and after that what `study` has, evaluated more rarely."""
    beginnings: dict[int, list[Run]] = {}
    for run in read_study(HERE / "bw-only"):
        if run.finished and (run.config["data"]["name"], run["depth"], run["width"]) == (data, *size):
            beginnings.setdefault(run["seed"], []).append(run)
    whole, long = {}, select(study, BW_ONLY, data, size)
    for seed, runs in ((seed, runs) for seed, runs in beginnings.items() if seed in long):
        first = joined(sorted(runs, key=lambda run: final(run, "step")))
        later = long[seed].curve
        whole[seed] = replace(first, curve=pd.concat([first.curve, later[later["step"] > final(first, "step")]]))
    return whole


def as_good(run: Run, loss: float) -> float:
    """The backward tokens after which the run's bw loss was down to `loss`, interpolated in log-log; NaN if it began lower or never was."""
    tokens, losses = trajectory(run, "bw_loss", "tokens_bw")
    losses = np.minimum.accumulate(losses)
    if not losses[-1] <= loss <= losses[0]:
        return np.nan
    return float(np.exp(np.interp(-np.log(loss), -np.log(losses), np.log(tokens))))


def worth(name: str, runs: Seeds, alone: Seeds) -> list[str]:
    """A row: what a run's backward tokens taught it, and how many bw only needs for as much."""
    seeds = sorted(set(runs) & set(alone))
    terms = [Term(seed, runs[seed], "bw_loss", alone[seed], "bw_loss", "tokens_bw") for seed in seeds]
    own, losses = (np.array([final(runs[seed], column) for seed in seeds]) for column in ("tokens_bw", "bw_loss"))
    needed = np.array([as_good(alone[seed], loss) for seed, loss in zip(seeds, losses)])
    return [name, str(len(seeds)), f"{own.min() / 1e6:.2f} to {own.max() / 1e6:.2f} M", plus_minus(losses, 2), interval(log_ratios(terms), 3),
            f"{needed.min() / 1e6:.2f} to {needed.max() / 1e6:.2f} M", interval(np.log(needed / own), 2)]  # fmt: skip


WORTH = ("p_bw = 0.05", "n", "its backward tokens", "its bw loss, nats", "/ that of bw only after as many", "bw only is as good after", "a backward token is worth")
texts = {
    "wikipedia-4k, 4 x 128": (bw_only("wikipedia-4k-long"), {
        "4,000 steps, one micro-batch": select("wikipedia-4k-long", P5),
        "2,000 steps, one micro-batch": select("wikipedia-4k", P5),
        "2,000 steps, 16 micro-batches": select("micro-batches/wikipedia-4k", P5),
    } | {f"the same, bw_weight = {weight:g}": select("rare-passes/weighted", Variant("fw+bw", 0.05, weight)) for weight in (5.0, 20.0)}),
    "wikipedia-4k, 4 x 256": (bw_only("wikipedia-4k-long", size=(4, 256)), {
        "4,000 steps, one micro-batch": select("wikipedia-4k-long", P5, size=(4, 256)),
    }),
    "toyworld, 4 x 128": (bw_only("toyworld-long", "toyworld"), {
        "1,831 steps, one micro-batch": select("toyworld-long", P5, "toyworld"),
        "1,831 steps, 16 micro-batches": select("micro-batches/toyworld", P5, "toyworld"),
    }),
}  # fmt: skip
for text, (alone, ways) in texts.items():
    print(f"\n{text}\n" + markdown_table(WORTH, [worth(name, runs, alone) for name, runs in ways.items() if set(runs) & set(alone)]))

# ---------------------------------------------------------------------------------------------------------------------
# What a larger weight buys, and what it costs
# ---------------------------------------------------------------------------------------------------------------------

SPREAD = "micro-batches/wikipedia-4k"
fw_only, alone = select(SPREAD, FW_ONLY), select("wikipedia-4k", BW_ONLY)
rows = []
for name, runs, control in (
    *((f"0.05, bw_weight = {weight:g}", select(SPREAD if weight == 1 else "rare-passes/weighted", Variant("fw+bw", 0.05, weight)), fw_only) for weight in (1.0, 5.0, 20.0)),
    ("0.5, one micro-batch", select("wikipedia-4k", Variant("fw+bw", 0.5)), select("wikipedia-4k", FW_ONLY)),
):  # fmt: skip
    pairs = [[Term(seed, some[seed], column, others[seed], column) for seed in sorted(set(some) & set(others))]
             for some, others, column in ((control, runs, "fw_loss"), (runs, alone, "bw_loss"))]  # fmt: skip
    if not runs:
        continue
    fw, bw = ([final(run, column) for run in runs.values()] for column in ("fw_loss", "bw_loss"))
    rows.append([name, str(len(runs)), plus_minus(fw, 3), interval(log_ratios(pairs[0]), 3), plus_minus(bw, 3), interval(log_ratios(pairs[1]), 3)])
print("\n" + markdown_table(("p_bw", "n", "fw loss", "ratio 1", "bw loss", "/ bw only"), rows))


# ---------------------------------------------------------------------------------------------------------------------
# The picture
# ---------------------------------------------------------------------------------------------------------------------


def draw_lines(ax, lines: dict[str, Seeds]) -> None:
    """bw loss over backward tokens: each seed thin, their mean thick where all of them were evaluated."""
    labels = []
    for (name, runs), colour in zip(lines.items(), COLOURS):
        curves = [trajectory(run, "bw_loss", "tokens_bw") for run in runs.values()]
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


figure, axes = new_figure(1, 2, (13, 5))
panels = {
    "Wikipedia in 3,999 tokens": {
        "bw only": texts["wikipedia-4k, 4 x 128"][0], "p_bw = 1": select("wikipedia-4k-long", P100),
        "p_bw = 0.05": select("wikipedia-4k-long", P5), "0.05, 16 micro-batches": select(SPREAD, P5),
        "... with bw_weight = 20": select("rare-passes/weighted", Variant("fw+bw", 0.05, 20.0)),
    },
    "toyworld": {
        "bw only": texts["toyworld, 4 x 128"][0], "p_bw = 1": select("toyworld-long", P100, "toyworld"),
        "p_bw = 0.05": select("toyworld-long", P5, "toyworld"), "0.05, 16 micro-batches": select("micro-batches/toyworld", P5, "toyworld"),
    },
}  # fmt: skip
for ax, (title, lines) in zip(axes[0], panels.items()):
    draw_lines(ax, lines)
    ax.set_title(title, fontsize=9, loc="left")
figure.suptitle("What a backward token teaches, when there are few among the forward ones: 4 x 128", fontsize=11)
caption = "Thin: each seed; thick: mean over seeds, where all of them were evaluated. Steps of 4,096 tokens; p_bw = 0.05 takes some twenty steps for each that learns backward."
figure.text(0.01, -0.01, caption, fontsize=7, color="0.3", va="top")
path = HERE / "figures" / "backward_tokens.png"
path.parent.mkdir(exist_ok=True)
write_png(figure, path)
print("\n" + str(path))
