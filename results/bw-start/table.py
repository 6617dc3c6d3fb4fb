"""The tables and pairs of README.md, and figures/*.png: python results/bw-start/table.py"""

import sys
from pathlib import Path

import numpy as np
from matplotlib.ticker import NullLocator

HERE = Path(__file__).parent
RESULTS = HERE.parent
sys.path[:0] = [str(RESULTS.parent), str(RESULTS / "rare-passes")]
from cells import FW_ONLY, Variant  # noqa: E402
from compare import Term, common_grid, final, log_ratios, on_grid, trajectory, value_at  # noqa: E402
from drawing import COLOURS, label_ends, label_points, new_figure, write_png  # noqa: E402
from report import interval, markdown_table, plus_minus  # noqa: E402
from worth import Seeds, as_good, bw_only, only, pairs, select  # noqa: E402


def part(p_bw: float, start: float, end: float = 1.0, task: str = "fw+bw") -> Variant:
    return Variant(task, p_bw, bw_start=start, bw_end=end)


ALL_ALONG = {f"{100 * p_bw:g} % all along": Variant("fw+bw", p_bw) for p_bw in (0.05, 0.25, 1.0)}
LATE = {f"100 % from {start:g} on": part(1.0, start) for start in (0.98, 0.9, 0.8)}
MIDDLE = {"100 % from 0.8 to 0.9": part(1.0, 0.8, 0.9)}
OTHERS = {"25 % from 0.75 on": part(0.25, 0.75), "bw alone from 0.95 on": part(1.0, 0.95, task="fw-or-bw")}
OVER_TIME = dict(zip(("p_bw = 0", "5 % all along", "100 % from 0.9 on", "100 % from 0.8 on", "25 % from 0.75 on", *MIDDLE, "25 % all along"), COLOURS))
STUDIES = {  # text and width -> study of the runs that learn all along, and a title
    ("wikipedia-4k", 128): ("wikipedia-4k-long", "Wikipedia in 3,999 tokens, 4 x 128"),
    ("wikipedia-4k", 256): ("wikipedia-4k-long", "Wikipedia in 3,999 tokens, 4 x 256"),
    ("toyworld", 128): ("toyworld-long", "toyworld, 4 x 128"),
}


def ways(text: str, size: tuple[int, int], study: str) -> dict[str, Seeds]:
    """The runs of each way to learn backward, of the seeds of this study, by how many of their tokens are backward ones."""
    found = {name: select(f"bw-start/{text}", variant, text, size) for name, variant in (LATE | MIDDLE | OTHERS).items()}
    seeds = set().union(*found.values())
    found |= {name: only(select(study, variant, text, size), seeds) for name, variant in ALL_ALONG.items()}
    return dict(sorted(((name, runs) for name, runs in found.items() if runs), key=lambda item: round(share(item[1]), 2)))


def share(runs: Seeds) -> float:
    """Backward tokens / total tokens, mean over seeds."""
    return float(np.mean([final(run, "tokens_bw") / final(run, "tokens_total") for run in runs.values()]))


def row(name: str, runs: Seeds, control: Seeds, alone: Seeds) -> list[str]:
    seeds = sorted(set(runs) & set(alone))
    worth = np.array([as_good(alone[seed], final(runs[seed], "bw_loss")) / final(runs[seed], "tokens_bw") for seed in seeds])
    own = [Term(seed, runs[seed], "fw_loss", control[seed], "fw_loss", "tokens_fw") for seed in sorted(set(runs) & set(control))]
    fw, bw = (plus_minus([final(run, f"{direction}_loss") for run in runs.values()], 3) for direction in ("fw", "bw"))
    return [name, str(len(runs)), f"{100 * share(runs):.1f} %", fw, pairs(control, runs, "fw_loss"), interval(log_ratios(own), 3),
            bw, pairs(runs, alone, "bw_loss"), interval(np.log(worth), 2) if np.isfinite(worth).all() else ""]  # fmt: skip


def against(runs: Seeds, others: Seeds, column: str, seeds: list[int]) -> np.ndarray:
    """Loss / that of the run of the same seed, at the end."""
    return np.array([final(runs[seed], column) / final(others[seed], column) for seed in seeds])


def after_the_start(runs: Seeds) -> str:
    """fw loss / that of the last evaluation without bw, and bw loss, at the first evaluation of at least 10 steps after."""
    rows = []
    for run in runs.values():
        before, begun = run.curve[run.curve["tokens_bw"] == 0].iloc[-1], run.curve[run.curve["tokens_bw"] > 0]
        row = begun[begun["step"] - before["step"] >= 10].iloc[0]
        rows.append((row["step"] - before["step"], row["fw_loss"] / before["fw_loss"], before["bw_loss"], row["bw_loss"]))
    steps, ratio, before, bw = np.array(rows).T
    return f"{steps.min():.0f} to {steps.max():.0f} steps after: fw loss {interval(np.log(ratio), 3)} times, bw loss {plus_minus(before, 2)} to {plus_minus(bw, 2)}"


def after_the_end(runs: Seeds, control: Seeds, steps: int | None) -> str:
    """So many steps after the last backward pass (None: at the end of the run): bw loss, and fw loss / that of p_bw = 0 at equal fw tokens."""
    rows = []
    for seed, run in runs.items():
        curve = run.curve[run.curve["tokens_bw"] == run.curve["tokens_bw"].max()]
        first, last = curve.iloc[0], curve.iloc[-1]["step"]
        step = last if steps is None else first["step"] + steps
        fw, bw, tokens = (value_at(run, column, "step", step) for column in ("fw_loss", "bw_loss", "tokens_fw"))
        rows.append((step - first["step"], bw, fw / value_at(control[seed], "fw_loss", "tokens_fw", tokens)))
    after, bw, fw = np.array(rows).T
    return f"{after.min():.0f} to {after.max():.0f} steps after the end: bw loss {plus_minus(bw, 2)}, fw {interval(np.log(fw), 3)}"


def draw_plane(ax, found: dict[str, Seeds], control: Seeds, alone: Seeds) -> None:
    """What each way pays in fw for what it gets in bw: seeds small, geometric means large. Lines join the ways of one kind."""
    labels, means = [], {}
    kinds = {"p_bw all along": ALL_ALONG, "100 % from there on": LATE, "100 % for a tenth": MIDDLE, "25 % from there on": ["25 % from 0.75 on"]}
    for (kind, names), colour, marker in zip(kinds.items(), COLOURS, "osvD"):
        names = [name for name in names if name in found]
        for name in names:
            seeds = sorted(set(found[name]) & set(control) & set(alone))
            points = np.array([against(found[name], control, "fw_loss", seeds), against(found[name], alone, "bw_loss", seeds)])
            ax.plot(*points, ".", color=colour, markersize=4, alpha=0.5)
            means[name] = np.exp(np.log(points).mean(1))
            labels.append((*means[name], name.replace("100 % ", "") if kind != "p_bw all along" else name.split(" all")[0], colour))
        if names:
            ax.plot(*np.array([means[name] for name in names]).T, marker + "-", color=colour, linewidth=1, markersize=6, label=kind)
    ax.axvline(1, color="0.55", linewidth=1)
    ax.set_yscale("log")
    bottom, top = ax.get_ylim()
    ax.set_yticks([tick for tick in (1, 1.1, 1.2, 1.3, 1.4, 1.5, 1.7, 2, 2.5, 3, 4, 5) if bottom < tick < top], minor=False)
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("fw loss / that of p_bw = 0, equal total tokens", fontsize=8)
    ax.set_ylabel("bw loss / that of bw only", fontsize=8)
    ax.legend(fontsize=7, frameon=False)
    label_points(ax, labels)


def draw_over_time(ax, lines: dict[str, Seeds], direction: str, window: tuple[float, float]) -> None:
    """Loss over total tokens inside the window, mean over the seeds that all lines have; bw from the first backward token on."""
    labels, seeds = [], sorted(set.intersection(*map(set, lines.values())))
    for name, runs in lines.items():
        colour, curves = OVER_TIME[name], []
        for run in (runs[seed] for seed in seeds):
            tokens, losses = trajectory(run, f"{direction}_loss", "tokens_total")
            begun = np.interp(tokens, run.curve["tokens_total"], run.curve["tokens_bw"]) > 0
            curves.append((tokens[begun], losses[begun]) if direction == "bw" else (tokens, losses))
        grid = common_grid(curves, window)
        mean = on_grid(curves, grid).mean(0)
        ax.plot(grid / 1e6, mean, color=colour, linewidth=1.5)
        labels.append((mean[-1], name, colour))
    ax.set_xlabel("million tokens seen, both directions", fontsize=8)
    ax.set_ylabel(f"{direction} validation loss, nats per token", fontsize=8)
    ax.set_title(f"{direction} loss, mean over seeds {', '.join(map(str, seeds))}", fontsize=9, loc="left")
    label_ends(ax, labels)


def print_the_end(runs: Seeds, control: Seeds) -> None:
    for steps in (0, 50, 150, None):
        print("100 % from 0.8 to 0.9,", after_the_end(runs, control, steps))


for (text, width), (study, title) in STUDIES.items():
    size = 4, width
    control, alone, found = select(study, FW_ONLY, text, size), bw_only(study, text, size), ways(text, size, study)
    columns = (f"{title}: when bw is learned", "n", "bw / all tokens", "fw loss", "p_bw = 0 / it (ratio 1)", "it / p_bw = 0, equal fw tokens", "bw loss", "bw / bw only", "worth")
    print(markdown_table(columns, [row(name, runs, control, alone) for name, runs in found.items()]), "\n")
    for name, runs in found.items():
        for other, others in found.items():
            if name not in ALL_ALONG and other != name and (0.75 < share(runs) / share(others) < 1.33 or other == "25 % all along"):
                print(f"{name} / {other}: fw loss {pairs(runs, others, 'fw_loss')}, bw loss {pairs(runs, others, 'bw_loss')}")
    for name in (name for name in LATE if name in found):
        print(f"{name}, {after_the_start(found[name])}")
    print_the_end(found["100 % from 0.8 to 0.9"], control)
    figure, (panels,) = new_figure(1, 3, (17, 5.2))
    draw_plane(panels[0], {name: runs for name, runs in found.items() if name != "bw alone from 0.95 on"}, control, alone)
    panels[0].set_title("at the end of training", fontsize=9, loc="left")
    end = max(final(run, "tokens_total") for run in control.values())
    shown = {name: runs for name, runs in ({"p_bw = 0": control} | found).items() if name in OVER_TIME}
    draw_over_time(panels[1], shown, "fw", (0.4 * end, end))
    draw_over_time(panels[2], {name: shown[name] for name in shown if name != "p_bw = 0"}, "bw", (0.4 * end, end))
    figure.suptitle(f"When backward is learned: {title}", fontsize=11)
    caption = "Shares are of the run's total tokens, per cents the p_bw there. Left: small, each seed; large, geometric means. Middle and right: between evaluations interpolated."
    figure.text(0.01, -0.01, caption, fontsize=7, color="0.3", va="top")
    path = HERE / "figures" / f"{text}_4x{width}.png"
    path.parent.mkdir(exist_ok=True)
    write_png(figure, path)
    print(f"\n{path}\n")

print("toyworld with --lr_decay_slopes 0.999:")
print_the_end(*(select("bw-start/slopes", variant, "toyworld") for variant in (MIDDLE["100 % from 0.8 to 0.9"], FW_ONLY)))
