"""The tables, the verdicts and the figures of the text encoder's ladder, from scores.csv alone. No torch.

    python experiments/plot_text_encoder.py                                  # results/text-encoder/scores.csv
    python experiments/plot_text_encoder.py results/mine/scores.csv > table.md

Prints Markdown tables; draws scores.png and, where runs can be paired, scores_differences.png beside the file. The independent
unit is a training run of the backbone; seeds of the later training are averaged within it. Runs with p_bw > 0 are
compared with those of p_bw = 0 of the same study and size, paired by training seed; intervals are 95 % t-intervals over
these pairs, p-values are Holm's over the rows of a table.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pandas as pd

from drawing import COLOURS, DASHES, new_figure, write_png
from flags import Parser, one_sentence
from report import plus_minus
from runs import RUN_NAME, RunError, trained_on
from stats import holm, mean_interval, paired_p, seeds_needed

STAGES = ("causal", "none", "mntp", "simcse", "pairs", "mntp+simcse", "mntp+pairs", "mntp+simcse+pairs")
MEASUREMENT = ("family", "task", "metric", "position", "depth", "sentences", "probe_epochs", "probe_lr")  # rows that agree in these share a panel
OF_TEXTS = ("pooling", "instruction")  # and for similarities of texts in these
TRAINING = ("data", "lora", "pairs", "mntp_", "simcse_", "pooling", "instruction")  # a stage's rows that differ here are two lines
BASE, BW_ONLY = "p_bw = 0", "bw only"
UNITS = {"f1": "span F1, %", "acc": "accuracy, %", "spearman": "Spearman, %", "loss": "loss, nats"}
TASKS = {"masked": "hidden tokens", "toyworld": "entities"}


def read_scores(path: Path) -> pd.DataFrame:
    """One line per measurement, stage, system and unit, losses in nats and all else in percent. RunError if there are none."""
    if not path.exists():
        raise RunError(f"{path} holds no results: python experiments/text_encoder.py writes them")
    rows = pd.read_csv(path, dtype=str, keep_default_na=False)
    for column in OF_TEXTS:
        rows[f"text_{column}"] = rows[column].where(rows.metric == "spearman", "")
    found = [RUN_NAME.fullmatch(Path(name).name) for name in rows.model]
    # runs of one study and size are a family, whose members differ in p_bw; other models go by their names
    rows["family"] = [str(Path(Path(name).parent.name, match["size"])) if match else "" for match, name in zip(found, rows.model)]
    rows["system"] = [trained_on(name) if match else Path(name).name for match, name in zip(found, rows.model)]
    rows["unit"] = [f"seed {match['seed']}" if match else f"tuning {seed}" for match, seed in zip(found, rows.seed)]
    twice = rows.groupby(["family", "system", "unit"]).model.nunique()
    if (twice[[unit.startswith("seed") for _, _, unit in twice.index]] > 1).any():
        raise RunError(f"{path} has two different runs of {' '.join(twice.idxmax())}: keep their rows in two tables")
    rows["stage"] = [stage + text for stage, text in zip(rows.stage, differences(rows))]
    rows["value"] = rows.score.astype(float) * np.where(rows.metric == "loss", 1, 100)
    keys = [*MEASUREMENT, *(f"text_{column}" for column in OF_TEXTS), "stage", "system", "unit"]
    return rows.groupby(keys, sort=False).value.mean().reset_index()


def differences(rows: pd.DataFrame) -> list[str]:
    """For each row what tells it from most rows of its stage and measurement: " (target i)"; mostly nothing."""
    columns = [column for column in rows if column.startswith(TRAINING)]
    texts = dict.fromkeys(rows.index, "")
    for _, part in rows.groupby([*MEASUREMENT, *(f"text_{column}" for column in OF_TEXTS), "stage"], sort=False):
        counts = {column: part[column].value_counts() for column in columns}
        usual = {column: found.index[0] if found.iloc[0] > len(part) / 2 else None for column, found in counts.items()}
        for index, row in part.iterrows():
            told = [f"{column.removeprefix('mntp_')} {row[column] or 'default'}" for column in columns if row[column] != usual[column]]
            texts[index] = f" ({', '.join(told)})" if told else ""
    return [texts[index] for index in rows.index]


def measurements(table: pd.DataFrame) -> dict[str, list[tuple[dict, dict[str, dict[str, pd.Series]]]]]:
    """{family: [(measurement, {stage: {system: values by unit}})]}, stages in the ladder's order, p_bw = 0 first."""
    keys, families = [*MEASUREMENT, *(f"text_{column}" for column in OF_TEXTS)], {}
    for key, part in table.groupby(keys, sort=False):
        order = sorted(part.stage.unique(), key=lambda stage: (STAGES.index(stage.split(" (")[0]), stage))
        ladder = {stage: {name: rows.set_index("unit").value for name, rows in part[part.stage == stage].groupby("system")} for stage in order}
        families.setdefault(key[0], []).append((dict(zip(keys, key)), ladder))
    return dict(sorted(families.items()))


def systems(panels: list[tuple[dict, dict]]) -> list[str]:
    return sorted({name for _, ladder in panels for stage in ladder.values() for name in stage}, key=lambda name: (name == BW_ONLY, name))


def family_name(family: str) -> str:
    return re.sub(r"(\d+)x(\d+)$", r"\1 x \2", family).replace("/", " ")


def describe(measurement: dict, panels: list[tuple[dict, dict]]) -> str:
    """Short, but told apart from the family's other measurements."""
    if measurement["metric"] == "spearman":
        extra = [f"{measurement['text_pooling']} pooling"] + [f"instruction {x!r}" for x in [measurement["text_instruction"]] if x]
    else:
        extra = [f"state at {measurement['position']}"] if measurement["position"] else []
    extra += [f"depth {measurement['depth']}"] if measurement["depth"] else []
    for column in ("sentences", "probe_epochs", "probe_lr"):
        if len({other[column] for other, _ in panels if other["task"] == measurement["task"]}) > 1:
            extra.append(f"{column.replace('_', ' ')} {measurement[column] or 'all'}")
    return ", ".join([TASKS.get(measurement["task"], measurement["task"]), *extra])


def paired(stage: dict[str, pd.Series], name: str) -> np.ndarray:
    """Differences from p_bw = 0 of the same seed; empty if there are none."""
    if name == BASE or BASE not in stage or name not in stage:
        return np.empty(0)
    shared = stage[name].index.intersection(stage[BASE].index)
    return (stage[name][shared] - stage[BASE][shared]).to_numpy()


def corrected(panels: list[tuple[dict, dict]], name: str) -> dict[tuple[int, str], float]:
    """{(panel, stage): p-value of the paired t-test, corrected by Holm over all of them}. Fewer than three pairs are no test."""
    tests = {(number, stage): paired(values, name) for number, (_, ladder) in enumerate(panels) for stage, values in ladder.items()}
    p = [float(paired_p(values)) if len(values) > 2 else np.nan for values in tests.values()]
    return dict(zip(tests, holm(np.array(p))))


def verdict(values: np.ndarray, lower_is_better: bool, p: float) -> str:
    """Of paired differences: better, worse, or undecided. No verdict from fewer than three pairs."""
    if len(values) < 2:
        return "undecided (one pair)"
    mean, half = mean_interval(values)
    if len(values) > 2 and half < abs(mean):
        side = "better" if (mean < 0) == lower_is_better else "worse"
        return f"**{side}**" if p < 0.05 else f"{side}, uncorrected"
    needed = seeds_needed([values], 0)
    return f"undecided ({f'{max(3, needed)} seeds' if needed else '> 1000 seeds'})"


def markdown(table: pd.DataFrame) -> str:
    """A table for each family and each system that is paired with p_bw = 0; plain scores where nothing can be paired."""
    lines = []
    for family, panels in measurements(table).items():
        title, names = family_name(family), systems(panels)
        others = [name for name in names if any(len(paired(stage, name)) for _, ladder in panels for stage in ladder.values())]
        for other in others:
            lines += [f"| {title} | stage | {BASE} | {other} | difference, paired | p (Holm) | {other} is |", "| --- " * 7 + "|"]
            lines += [*compared(panels, other), ""]
        if not others:
            lines += [f"| {title or 'measured'} | stage | model | n | score |", "| --- " * 5 + "|"]
            for measurement, ladder in panels:
                cells = [(stage, name, values) for stage, found in ladder.items() for name, values in found.items()]
                what, digits = f"{describe(measurement, panels)}: {UNITS[measurement['metric']]}", 3 if measurement["metric"] == "loss" else 2
                for stage, name, values in cells:
                    lines.append(f"| {what} | {stage} | {name} | {len(values)} | {plus_minus(values.to_numpy(), digits)} |")
            lines.append("")
    return "\n".join(lines)


def compared(panels: list[tuple[dict, dict]], other: str) -> list[str]:
    lines, p = [], corrected(panels, other)
    for number, (measurement, ladder) in enumerate(panels):
        digits, lower = (3, True) if measurement["metric"] == "loss" else (2, False)
        what = f"{describe(measurement, panels)}: {UNITS[measurement['metric']]}"
        for stage, values in ladder.items():
            pairs = paired(values, other)
            if not len(pairs):
                continue
            shared = values[other].index.intersection(values[BASE].index)
            scores = " | ".join(plus_minus(values[name][shared].to_numpy(), digits) for name in (BASE, other))
            value = p[number, stage]
            shown = "" if np.isnan(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"
            found = f"{plus_minus(pairs, digits, '+')} (n = {len(pairs)}) | {shown} | {verdict(pairs, lower, value)}"
            lines.append(f"| {what} | {stage} | {scores} | {found} |")
            what = ""
    return lines


def draw(table: pd.DataFrame, path: Path, differ: bool = False) -> bool:
    """A row of panels per family, a panel per measurement, a line per system up the ladder: seeds as dots, mean and 95 %
    interval; of the scores, or of the differences from p_bw = 0 -> False if there is nothing to draw."""
    families = {family: panels for family, panels in measurements(table).items() if not differ or (BASE in (names := systems(panels)) and len(names) > 1)}
    if not families:
        return False
    columns = max(len(panels) for panels in families.values())
    figure, axes = new_figure(len(families), columns, (4.3 * columns, 2.9 * len(families)))
    for row, (family, panels) in zip(axes, families.items()):
        for number, (ax, (measurement, ladder)) in enumerate(zip(row, panels)):
            panel(ax, panels, number, differ)
            ax.set_title(f"{family_name(family)}: {describe(measurement, panels)}".removeprefix(": "), fontsize=8.5, loc="left")
        row[0].legend(fontsize=8, frameon=False)
        for ax in row[len(panels):]:
            ax.set_axis_off()
    caption = "Dots: backbones trained from different seeds. Large markers: mean and 95 % t-interval over them, where there are more than two."
    if differ:
        figure.suptitle(f"From a causal model to a text encoder: difference from {BASE} of the same seed", fontsize=11)
        caption = caption.replace("backbones trained from different seeds", "pairs of backbones, one per training seed")
        caption += " Filled: zero is left out after Holm's correction over a row of panels (never with one pair). For a loss below 0 is better."
    else:
        figure.suptitle("From a causal model to a text encoder", fontsize=11)
        caption += " Bars that overlap may hide a difference: the figure of differences compares seed by seed."
    figure.text(0.01, -0.01, caption, fontsize=8, color="0.3", va="top")
    write_png(figure, path)
    return True


def panel(ax, panels: list[tuple[dict, dict]], number: int, differ: bool) -> None:
    measurement, ladder = panels[number]
    names, drawn = [name for name in systems(panels) if not differ or name != BASE], {}
    for place, name in enumerate(names):
        number_of, p = systems(panels).index(name), corrected(panels, name)
        colour, marker, dash = COLOURS[number_of % len(COLOURS)], "Ds^ovPX"[number_of % 7], DASHES[number_of % len(DASHES)]
        values = [(at, stage, paired(found, name) if differ else found.get(name, pd.Series(dtype=float)).to_numpy())
                  for at, (stage, found) in enumerate(ladder.items())]  # fmt: skip
        points = [(at + 0.18 * (place - (len(names) - 1) / 2), stage, found) for at, stage, found in values if len(found)]
        for x, stage, found in points:
            ax.plot([x - 0.06] * len(found), found, "o", color=colour, alpha=0.5, markersize=4, markeredgewidth=0)
            mean, half = mean_interval(found)
            reach = max(np.abs(found - mean).max(), half if len(found) > 2 else 0)
            drawn.setdefault(name, []).append((x, mean, reach))
            # two runs give an interval many times wider than the panel: the table has it, the dots say enough here
            ax.errorbar([x], [mean], [half] if len(found) > 2 else None, color=colour, linewidth=1.2, capsize=2.5, marker=marker, markersize=4.5,
                        markerfacecolor=colour if not differ or p[number, stage] < 0.05 else "white")  # fmt: skip
        style = {"linestyle": "none" if differ else dash, "linewidth": 1.0, "marker": marker, "markersize": 4.5, "zorder": 1}
        ax.plot([x for x, _, _ in points], [mean_interval(found)[0] for _, _, found in points], color=colour, label=name, **style)
    if differ:
        ax.axhline(0, color="0.2", linewidth=0.9)
        drawn["zero"] = [(0, 0, 0)]
    limit(ax, drawn)
    ax.set_xticks(range(len(ladder)), [stage.replace("+", "\n+ ").replace(" (", "\n(") for stage in ladder], fontsize=8)
    ax.set_xlim(-0.5, len(ladder) - 0.5)
    ax.set_ylabel(UNITS[measurement["metric"]].replace("%", "points" if differ else "%"), fontsize=8)


def limit(ax, drawn: dict[str, list[tuple[float, float, float]]]) -> None:
    """Leaves bw-only models out of sight, with their value, where they are so far off (under a causal mask, which they never
    learned) that nothing else could be told apart."""
    inside = [point for name, points in drawn.items() for point in points if name != BW_ONLY]
    if BW_ONLY not in drawn or not inside:
        return
    low, high = min(y - reach for _, y, reach in inside), max(y + reach for _, y, reach in inside)
    far, span = [], high - low
    for x, y, reach in sorted(drawn[BW_ONLY], key=lambda point: abs(point[1] - (low + high) / 2)):
        if low - span <= y <= high + span:
            low, high = min(low, y - reach), max(high, y + reach)
        else:
            far.append((x, y))
    ax.set_ylim(low - 0.12 * (high - low), high + 0.12 * (high - low))
    for x, y in far:
        edge, arrow, side = (0, "↓", "bottom") if y < low else (1, "↑", "top")
        ax.annotate(f"{BW_ONLY} {y:.3g} {arrow}", (x, edge), xycoords=("data", "axes fraction"), fontsize=7.5, ha="center", va=side)


@one_sentence
def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("scores", nargs="?", type=Path, default=Path("results/text-encoder/scores.csv"))
    args = parser.parse_args(argv)
    table = read_scores(args.scores)
    print(markdown(table))
    draw(table, args.scores.with_suffix(".png"))
    draw(table, args.scores.with_name(f"{args.scores.stem}_differences.png"), differ=True)


if __name__ == "__main__":
    main()
