"""The tables and pairs of README.md, and figures/backward_tokens.png: python results/rare-passes/table.py"""

import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from cells import BW_ONLY, FW_ONLY, Variant  # noqa: E402
from compare import final  # noqa: E402
from drawing import new_figure, write_png  # noqa: E402
from report import interval, markdown_table, plus_minus  # noqa: E402
from worth import as_good, bw_only, draw_lines, only, pairs, select, worth  # noqa: E402

P5, P50, P100 = (Variant("fw+bw", p_bw) for p_bw in (0.05, 0.5, 1.0))
SPREAD, WEIGHTED = "micro-batches/wikipedia-4k", "rare-passes/weighted"

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
