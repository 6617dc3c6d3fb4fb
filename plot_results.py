"""Every figure of a study, from its result tables alone (no torch). Numbers: compare.py; words: report.py; drawing:
drawing.py; figures by size in plot_sizes.py, by any other setting in plot_settings.py, of p_bw and repeated text in
plot_tradeoff.py, over layers in plot_layers.py.

    python plot_results.py                                # every study under results/
    python plot_results.py results/demo                   # everything its tables allow -> results/demo/figures/*.png
    python plot_results.py results/demo --figure curves ratio1_by_size --metric ppl --x tokens_total
    python plot_results.py results/demo --budget tokens_fw         # compare at equal forward tokens; also steps, seconds
    python plot_results.py results/demo --epochs 1 5 --order ratio_then_mean --seeds 100 101 --smooth 25
    python plot_results.py results/demo --pdf             # for a paper: vector graphics without title and caption
    python plot_results.py results/demo --report          # verdicts and tables into results/demo/README.md, no figures

A new figure: write a function (study, options) -> list of paths, and name it in FIGURES. What is missing or unfinished
is left out and named, never guessed.
"""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from pathlib import Path
from typing import Callable, Sequence

import numpy as np

from cells import BUDGETS, BW_ONLY, FW_ONLY, Study, load
from compare import METRICS, ORDER_WORDS, ORDERS, average, common_grid, final, on_grid, ratio_curve, trajectory
from drawing import (
    CHOICE, COLOURS, DASHES, METRIC_LABELS, UNITS, X_LABELS, Options, by_group, label_ends, meaning, new_figure, numbered, pick,
    plain_log_axis, runs_of, save, smoothed, variant_colours,
)  # fmt: skip
from flags import Parser, one_sentence
from plot_blocks import blocks_angle, blocks_drop, blocks_influence
from plot_context import context
from plot_layers import layers_cut, layers_drop, layers_drop_ratio1, layers_drop_ratio2, layers_ratio1, layers_ratio2
from plot_merge import merge
from plot_reversal import reversal
from plot_settings import by_setting
from plot_sizes import bw_by_size, ratio1_by_size, ratio1_heatmap, ratio2_by_size
from plot_tradeoff import pareto, repeats
from report import describe, floor_of, short, summary
from stats import paired_interval
from study_readme import write as write_readme

# ---------------------------------------------------------------------------------------------------------------------
# Figures over training
# ---------------------------------------------------------------------------------------------------------------------


def curves(study: Study, options: Options = Options()) -> list[Path]:
    """fw and bw validation metric over training, one figure per size; every seed thin, the mean over seeds thick."""
    metric, paths = options.metric or "loss", []
    for cell, by in study.cells.items():
        scales = ["log"] if options.log else ["linear", "log"]
        figure, axes = new_figure(len(scales), 2, (11, 3.6 * len(scales) + 0.4))
        runs = [run for seeds in by.values() for run in seeds.values()]
        for (row, column), ax in np.ndenumerate(axes):
            direction = ("fw", "bw")[column]
            floor = floor_of(runs) if metric == "loss" else None
            _curves_panel(ax, by, f"{direction}_{metric}", options, scales[row], floor, variant_colours(study))
            ax.set_title(f"{direction}, {'log-log' if scales[row] == 'log' else 'linear'}", fontsize=9, loc="left")
            ax.set_xlabel(X_LABELS[options.x], fontsize=8)
            ax.set_ylabel(UNITS[metric], fontsize=8)
        caption = f"Thin: each seed; thick: mean over seeds, where all of them were evaluated. {describe(runs)}."
        if FW_ONLY in by:
            caption += " The bw task of p_bw = 0 was never trained."
        caption += " With bw_start bw is drawn from there on." * any(variant.bw_start for variant in by)
        if not options.log and metric != "acc":
            caption += " Linear panels leave out the steep start (arrow: the line lies outside); log-log shows all but step 0."
        size = f"{cell.label} ({short(cell.params)} parameters)"
        title = f"Validation {METRIC_LABELS[metric]} of {size}, {study.heading(cell.group)}"
        name = f"curves_{cell.depth}x{cell.width}" + options.tag("metric", "x", "epochs", "log")
        paths.append(save(study, figure, cell.group, name, title, caption))
    return paths


def _curves_panel(ax, by: dict, column: str, options: Options, scale: str, floor, colours: dict) -> None:
    labels, tops, lows = [], [], []
    start, stop = options.epochs or (-np.inf, np.inf)
    for variant, seeds in by.items():
        colour = colours[variant]
        if variant.bw_start and column.startswith("bw"):  # untrained before
            seeds = {seed: replace(run, curve=run.curve[run.curve["tokens_bw"] > 0]) for seed, run in seeds.items()}
        lines = [trajectory(run, column, options.x) for run in seeds.values()]
        lines = [(x[keep], y[keep]) for x, y in lines for keep in [(x >= start) & (x <= stop)]]
        if scale == "log":
            lines = [(x[x > 0], y[x > 0]) for x, y in lines]
        grid = common_grid(lines)
        if not len(grid):
            continue
        mean = on_grid(lines, grid).mean(0)
        for x, y in lines:
            ax.plot(x, y, color=colour, linewidth=0.7, alpha=0.45)
        ax.plot(grid, mean, color=colour, linewidth=1.6, marker="o" if len(grid) == 1 else "")
        last = np.mean([y[-1] for _, y in lines])  # as in the tables; the mean's line ends where the first seed does
        labels.append((last, f"{numbered(variant.label, seeds, by.values())}: {last:.3f}", colour))
        if variant.trains(column[:2]):
            early = grid[0] + 0.1 * (grid[-1] - grid[0])  # a model that was trained before may get worse at first
            tops += [np.interp(early, grid, mean), *mean[grid >= early], *(y[-1] for _, y in lines)]
            lows += [y.min() for _, y in lines]
    if floor:
        ax.axhline(floor[0], color="0.35", linestyle="--", linewidth=1)
        labels.append((floor[0], f"entropy floor: {floor[0]:.3f}", "0.35"))
        lows.append(floor[0])
    if scale == "log":
        ax.set_xscale("log")
        ax.set_yscale("log")
        plain_log_axis(ax.xaxis)
        plain_log_axis(ax.yaxis)
    elif tops and not column.endswith("acc"):
        pad = 0.06 * (max(tops) - min(lows)) or 0.05
        ax.set_ylim(min(lows) - pad, max(tops) + pad)
    label_ends(ax, labels)


def own_tokens(study: Study, options: Options = Options()) -> list[Path]:
    """Each direction's metric over the tokens seen *in that direction*: does learning the other one help? A figure per size that has
    models of both directions and of one."""
    metric, options, paths = options.metric or "loss", replace(options, epochs=None, budget="tokens"), []
    for cell, by in study.cells.items() if not study.fine_tuned else ():
        both = [variant for variant in by if variant.trains("fw") and variant.trains("bw")]
        alone = [(d, words) for variant, d, words in ((FW_ONLY, "fw", "forward"), (BW_ONLY, "bw", "backward")) if variant in by]
        if not both or not alone:
            continue
        figure, axes = new_figure(1, len(alone), (5.7 * len(alone), 4.4))
        runs = [run for seeds in by.values() for run in seeds.values()]
        for ax, (direction, words) in zip(axes[0], alone):
            x = f"tokens_{direction}"
            learned = {v: {seed: run for seed, run in seeds.items() if final(run, x) > 0} for v, seeds in by.items() if v.trains(direction)}
            learned, floor = {v: seeds for v, seeds in learned.items() if seeds}, floor_of(runs) if metric == "loss" else None
            _curves_panel(ax, learned, f"{direction}_{metric}", replace(options, x=x), "log", floor, variant_colours(study))
            ax.set_title(direction, fontsize=9, loc="left")
            ax.set_xlabel(f"tokens seen {words}", fontsize=8)
            ax.set_ylabel(UNITS[metric], fontsize=8)
        caption = "A direction against the tokens seen in it: where lines coincide, the other direction neither helped nor was in the way; with a smaller share "
        caption += "of the tokens a model has taken more steps for as many. Thin: each seed; thick: mean over seeds, where all of them were evaluated. "
        title = f"Each direction at equal tokens of its own: {cell.label} ({short(cell.params)} parameters), {study.heading(cell.group)}"
        name = f"own_tokens_{cell.depth}x{cell.width}" + options.tag("metric")
        paths.append(save(study, figure, cell.group, name, title, caption + describe(runs) + "."))
    return paths


def ratio1_training(study: Study, options: Options = Options()) -> list[Path]:
    """Ratio 1 over training, a line per size: colour tells the width, dashes the depth."""
    metric, order, paths = options.metric or "loss", options.order or ORDERS[0], []
    variant, ratios = pick(study, options, "ratio1", metric)
    for group, cells in by_group(study, ratios).items():
        figure, [[ax]] = new_figure(1, 1, (8, 4.6))
        ax.axhline(1, color="0.5", linewidth=1)
        labels = []
        widths, depths = (sorted({getattr(cell, size) for cell in cells}) for size in ("width", "depth"))
        for cell, terms in cells.items():
            grid, top, bottom = ratio_curve(terms, options.x, options.epochs)
            if not len(grid):
                study.note(f"ratio 1 over training, {study.name(cell)}: its runs do not overlap")
                continue
            colour, dash = COLOURS[widths.index(cell.width) % 7], DASHES[depths.index(cell.depth) % 4]
            line = smoothed(average(top, bottom, order), options.smooth)
            for seed in (top / bottom if options.all_seeds else []):
                ax.plot(grid, smoothed(seed, options.smooth), color=colour, linestyle=dash, linewidth=0.6, alpha=0.5)
            ax.plot(grid, line, color=colour, linestyle=dash, linewidth=1.8)
            if len(cells) <= 3 and len(terms) > 2:  # more bands than that hide each other; between evaluations two seeds may meet
                _, low, high = paired_interval(np.log(top / bottom).T)
                ax.fill_between(grid, smoothed(low, options.smooth), smoothed(high, options.smooth), color=colour, alpha=0.12, linewidth=0)
            labels.append((line[-1], f"{cell.label} (n = {len(terms)}): {line[-1]:.3f}", colour))
        if not labels:
            continue
        if options.log:
            ax.set_xscale("log")
            plain_log_axis(ax.xaxis)
        ax.set_xlabel(X_LABELS[options.x], fontsize=8)
        ax.set_ylabel(f"ratio 1 of fw {METRIC_LABELS[metric]}", fontsize=8)
        label_ends(ax, labels, 0.042)
        caption = f"{meaning('ratio1', metric, variant.label)} Colour: width; dashes: depth. {ORDER_WORDS[order].capitalize()}; "
        caption += "band: 95 % t-interval over three seeds or more; " * (len(cells) <= 3)
        caption += f"moving average over {options.smooth} of 500 points. " if options.smooth > 1 else "not smoothed. "
        tag = options.tag("metric", "x", "epochs", "order", "smooth", "log", "all_seeds", *CHOICE)
        title = f"Ratio 1 over training, {variant.label}, {study.heading(group)}"
        caption += describe(runs_of(cells)) + "."
        paths.append(save(study, figure, group, "ratio1_training" + tag, title, caption))
    return paths


def leak(study: Study, options: Options = Options()) -> list[Path]:
    """The published mask against the right one: bw loss and ratio 2 over training, where a study holds both masks."""
    paths = []
    variant = options.chosen(study)
    flipped = {cell: by[variant] for cell, by in study.cells.items() if cell.group.bw_mask == "flipped" and variant in by}
    for cell, leaking in flipped.items():
        twins = study.cells.get(cell.with_mask("anticausal"), {})
        right, control = twins.get(variant), twins.get(BW_ONLY, {})
        if not right:
            study.note(f"leak: {study.name(cell)} has no runs with the right mask to compare with")
            continue
        figure, axes = new_figure(1, 2, (11, 3.9))
        masks = (("anticausal", right, variant_colours(study)[variant]), ("flipped, as published", leaking, "#000000"))
        floor = floor_of(right.values())
        for ax, column in zip(axes[0], ("bw_loss", "ratio2")):
            labels = []
            alone = [("bw only, anticausal", control, variant_colours(study).get(BW_ONLY))] * bool(control and column == "bw_loss")
            shown = [seeds for _, seeds, _ in (*masks, *alone)]
            for name, seeds, colour in (*masks, *alone):
                lines = [trajectory(run, "bw_loss", options.x) for run in seeds.values()]
                if column == "ratio2":
                    lines = [(x, trajectory(run, "fw_loss", options.x)[1] / y) for (x, y), run in zip(lines, seeds.values())]
                grid = common_grid(lines)
                for x, y in lines:
                    ax.plot(x, y, color=colour, linewidth=0.7, alpha=0.45)
                values = on_grid(lines, grid)
                mean = np.exp(np.log(values).mean(0)) if column == "ratio2" else values.mean(0)  # as in the tables
                ax.plot(grid, mean, color=colour, linewidth=1.8)
                last = np.array([y[-1] for _, y in lines])  # as in the tables; the mean's line ends where the first seed does
                last = np.exp(np.log(last).mean()) if column == "ratio2" else last.mean()
                labels.append((last, f"{numbered(name, seeds, shown)}: {last:.3f}", colour))
            level = floor[0] if floor and column == "bw_loss" else 1.0 if column == "ratio2" else None
            if level is not None:
                ax.axhline(level, color="0.35", linestyle="--", linewidth=1)
                labels.append((level, f"entropy of the text: {level:.3f}" if column == "bw_loss" else "as good as fw: 1", "0.35"))
            ax.set_yscale("log")
            plain_log_axis(ax.yaxis)
            ax.set_xlabel(X_LABELS[options.x], fontsize=8)
            ax.set_ylabel("bw validation loss, nats per token" if column == "bw_loss" else "ratio 2 = fw loss / bw loss", fontsize=8)
            label_ends(ax, labels)
        caption = "Same settings but for the backward mask. No model can predict unseen text below its entropy: " if floor else ""
        caption += "a lower loss means that targets were seen. " if floor else "Ratio 2 clearly above 1 means that targets were seen. "
        caption += "Thin: each seed; thick: mean, geometric for the ratio. " + describe([*right.values(), *leaking.values(), *control.values()]) + "."
        title = f"The published backward mask and the right one: {cell.label} on {cell.group.data}, {variant.label}"
        name = f"leak_{cell.depth}x{cell.width}" + options.tag("x", *CHOICE)
        paths.append(save(study, figure, cell.with_mask("anticausal").group, name, title, caption))
    return paths


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------

FIGURES: dict[str, Callable[[Study, Options], list[Path]]] = {
    function.__name__: function
    for function in (
        curves, own_tokens, leak, pareto, ratio1_training, ratio1_heatmap, ratio1_by_size, ratio2_by_size, bw_by_size, by_setting, repeats,
        layers_ratio1, layers_ratio2, layers_cut, layers_drop, layers_drop_ratio1, layers_drop_ratio2,
        blocks_drop, blocks_angle, blocks_influence, context, merge, reversal,
    )
}  # fmt: skip


def parser() -> argparse.ArgumentParser:
    p = Parser("Draw every figure that a study's tables allow.")
    p.add_argument("study", nargs="*", help="study folders (default: every study under results/)")
    names = list(FIGURES)
    p.add_argument("--figure", nargs="+", choices=names, default=names, metavar="NAME", help=f"of {', '.join(names)}")
    p.add_argument("--metric", choices=METRICS, help="default: loss (perplexity for layers_ratio1)")
    p.add_argument("--budget", choices=BUDGETS, default="tokens", help="what is held equal between compared runs (default: tokens of both directions)")
    p.add_argument("--x", choices=X_LABELS, help="x axis of figures over training (default: epoch, or the budget's)")
    p.add_argument("--epochs", nargs=2, type=float, metavar=("FROM", "TO"), help="only this window of epochs (at equal total tokens)")
    p.add_argument("--order", choices=ORDERS, help="order of averaging over seeds and dividing (default: mean_then_ratio; both in the figures over layers)")
    p.add_argument("--seeds", nargs="+", type=int, help="only these seeds")
    p.add_argument("--smooth", type=int, default=1, help="moving average of ratio1_training, in points of 500")
    p.add_argument("--log", action="store_true", help="logarithmic axes only")
    p.add_argument("--all_seeds", action="store_true", help="ratio1_training: each seed as a thin line, too")
    p.add_argument("--p_bw", type=float, help="which p_bw to compare with 0 (default: 0.05, or the only one)")
    p.add_argument("--task", default="fw+bw", choices=("fw+bw", "fw-or-bw", "adaptive"), help="which task, if several have this p_bw")
    p.add_argument("--bw_weight", type=float, help="which weight of the bw loss, if several were trained (default: 1, or the only one)")
    p.add_argument("--bw_start", type=float, help="which start of bw, if several were trained (default: 0, or the only one)")
    p.add_argument("--bw_end", type=float, help="which end of bw, if several were trained (default: 1, or the only one)")
    p.add_argument("--pdf", action="store_true", help="PDF files without title and caption, for a paper, instead of PNG files")
    p.add_argument("--report", action="store_true", help="write the study's README.md from its tables instead of drawing")
    return p


def draw(study: Study, figures: Sequence[str] = tuple(FIGURES), options: Options = Options()) -> list[Path]:
    """Draws the named figures, printing a line for each file; returns the files. What was left out is in study.notes."""
    paths = []
    for name in figures:
        new = FIGURES[name](study, options)
        paths += new
        for path in new:
            print(f"{name}: {path}")
    return paths


@one_sentence
def main(argv: list[str] | None = None) -> list[Path]:
    args = parser().parse_args(argv)
    if args.smooth < 1:
        raise SystemExit(f"--smooth {args.smooth}: must be at least 1")
    if args.epochs and not 0 <= args.epochs[0] < args.epochs[1]:
        raise SystemExit(f"--epochs {args.epochs[0]:g} {args.epochs[1]:g}: FROM must be at least 0 and below TO")
    x = args.x or Options(budget=args.budget).axis
    if args.epochs and (args.budget != "tokens" or not x.startswith("epoch")):
        raise SystemExit("--epochs is a window of the axis of epochs: not with --budget, nor with another --x")
    folders = args.study or sorted({str(table.parent.parent) for table in Path("results").rglob("curve.csv")})
    if not folders:
        raise SystemExit("results/ holds no study: train one with python train.py, or name a folder")
    chosen = {option.name: getattr(args, option.name) for option in fields(Options)}
    chosen["x"] = x
    options = Options(**{name: tuple(value) if isinstance(value, list) else value for name, value in chosen.items()})
    paths = []
    for folder in folders:
        study = load(folder, options.seeds, options.budget)
        study.pdf = args.pdf
        if args.report:
            print(write_readme(study, options.chosen(study)))
        else:
            paths += draw(study, args.figure, options)
            print(f"\n{summary(study)}")
    return paths


if __name__ == "__main__":
    main()
