"""The tables and pairs of README.md, and figures/backward_tokens.png: python results/rare-passes/table.py

What a backward token teaches, in runs where backward passes are rare, against *bw only* after as many backward tokens, seed by
seed. The runs of bw-only/ are the beginnings of bw only, evaluated often: how often a run is evaluated and where it ends change
nothing of what is learned, so runs that end at different places are one, and are checked to be.
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
from compare import Term, common_grid, final, log_ratios, on_grid, trajectory, value_at  # noqa: E402
from drawing import COLOURS, label_ends, new_figure, plain_log_axis, write_png  # noqa: E402
from report import interval, markdown_table, plus_minus  # noqa: E402
from runs import Run, read_study  # noqa: E402

P5, P50, P100 = (Variant("fw+bw", p_bw) for p_bw in (0.05, 0.5, 1.0))
SPREAD, WEIGHTED = "micro-batches/wikipedia-4k", "rare-passes/weighted"
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


# ---------------------------------------------------------------------------------------------------------------------
# What a backward token is worth
# ---------------------------------------------------------------------------------------------------------------------

alone = {"Wikipedia, 4 x 128": bw_only("wikipedia-4k-long"), "Wikipedia, 4 x 256": bw_only("wikipedia-4k-long", size=(4, 256)),
         "toyworld, 4 x 128": bw_only("toyworld-long", "toyworld")}  # fmt: skip
spread, weighted = select(SPREAD, P5), {weight: select(WEIGHTED, Variant("fw+bw", 0.05, weight)) for weight in (5.0, 20.0)}
some = only(spread, weighted[20.0])
rows = [
    ("Wikipedia, 4 x 128", "16.4 M, one micro-batch", select("wikipedia-4k-long", P5)),
    ("Wikipedia, 4 x 128", "8.2 M, one micro-batch", select("wikipedia-4k", P5)),
    ("Wikipedia, 4 x 128", "8.2 M, 16 micro-batches", spread),
    ("Wikipedia, 4 x 128", "the same, seeds 100 to 102", some),
    *(("Wikipedia, 4 x 128", f"... with bw_weight = {weight:g}", runs) for weight, runs in weighted.items()),
    ("Wikipedia, 4 x 256", "16.4 M, one micro-batch", select("wikipedia-4k-long", P5, size=(4, 256))),
    ("toyworld, 4 x 128", "7.5 M, one micro-batch", select("toyworld-long", P5, "toyworld")),
    ("toyworld, 4 x 128", "7.5 M, 16 micro-batches", select("micro-batches/toyworld", P5, "toyworld")),
]
columns = ("text, size", "p_bw = 0.05: total tokens, per step", "n", "its backward tokens", "its bw loss, nats", "/ that of bw only after as many", "bw only is as good after", "worth")
print(markdown_table(columns, [worth(text, name, runs, alone[text]) for text, name, runs in rows if set(runs) & set(alone[text])]))
for name, runs in (("weight 5", weighted[5.0]), ("weight 20", weighted[20.0])):
    gain = [np.log(as_good(alone["Wikipedia, 4 x 128"][seed], final(runs[seed], "bw_loss")) / as_good(alone["Wikipedia, 4 x 128"][seed], final(some[seed], "bw_loss"))) for seed in sorted(runs)]
    print(f"weight 1 / {name}, same seeds: fw loss {pairs(some, runs, 'fw_loss')}, bw loss {pairs(some, runs, 'bw_loss')}; worth, {name} / 1: {interval(np.array(gain), 1)}")
    print(f"p_bw = 0.5 / {name}: fw loss", pairs(select("wikipedia-4k", P50), runs, "fw_loss"), "bw loss", pairs(select("wikipedia-4k", P50), runs, "bw_loss"))

# ---------------------------------------------------------------------------------------------------------------------
# What a larger weight buys, and what it costs
# ---------------------------------------------------------------------------------------------------------------------

rows, fw_only, whole = [], select(SPREAD, FW_ONLY), select("wikipedia-4k", BW_ONLY)
ways = [("0.05", spread), ("0.05, seeds 100 to 102", some), *((f"0.05 with bw_weight = {weight:g}", runs) for weight, runs in weighted.items())]
for name, runs, control in (*((*way, fw_only) for way in ways), ("0.5, one micro-batch", select("wikipedia-4k", P50), select("wikipedia-4k", FW_ONLY))):
    fw, bw = (plus_minus([final(run, column) for run in runs.values()], 3) for column in ("fw_loss", "bw_loss"))
    rows.append([name, str(len(runs)), fw, pairs(control, runs, "fw_loss"), bw, pairs(runs, whole, "bw_loss")])
print("\n" + markdown_table(("p_bw", "n", "fw loss", "ratio 1", "bw loss", "/ bw only, equal total tokens"), rows))

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


panels = {
    "Wikipedia in 3,999 tokens": {
        "bw only": alone["Wikipedia, 4 x 128"], "p_bw = 1": select("wikipedia-4k-long", P100), "p_bw = 0.05": select("wikipedia-4k-long", P5),
        "0.05, 16 micro-batches": spread, "... with bw_weight = 5": weighted[5.0], "... with bw_weight = 20": weighted[20.0],
    },
    "toyworld": {
        "bw only": alone["toyworld, 4 x 128"], "p_bw = 1": select("toyworld-long", P100, "toyworld"),
        "p_bw = 0.05": select("toyworld-long", P5, "toyworld"), "0.05, 16 micro-batches": select("micro-batches/toyworld", P5, "toyworld"),
    },
}  # fmt: skip
figure, axes = new_figure(1, 2, (13, 5))
for ax, (title, lines) in zip(axes[0], panels.items()):
    draw_lines(ax, lines)
    ax.set_title(title, fontsize=9, loc="left")
figure.suptitle("What a backward token teaches, when there are few among the forward ones: 4 x 128", fontsize=11)
caption = "Thin: each seed; thick: mean over seeds, where all of them were evaluated. Steps of 4,096 tokens, one micro-batch where nothing else is said; with p_bw = 0.05 one step in twenty has a backward pass then, with 16 micro-batches most have."
figure.text(0.01, -0.01, caption, fontsize=7, color="0.3", va="top")
path = HERE / "figures" / "backward_tokens.png"
path.parent.mkdir(exist_ok=True)
write_png(figure, path)
print(f"\n{path}")
