"""The tables and figures of token classification, from scores.csv. No torch.

    python experiments/plot_token_classification.py                                  # results/token-classification/scores.csv
    python experiments/plot_token_classification.py results/mine/scores.csv > table.md

Prints Markdown tables and draws, beside the file, scores_STUDY.png for each study that backbones come from, and
few_shot.png where training sentences were sampled. The independent unit is a backbone: runs of train.py that differ in
nothing but their seed are one system, head seeds are averaged within each backbone first, and intervals are
t-intervals over backbones, of differences paired by seed. A model without training seeds (from the hub) has its head
seeds as units.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pandas as pd

from drawing import COLOURS, DASHES, new_figure, write_png
from flags import Parser, one_sentence
from report import plus_minus
from runs import RUN_NAME, RunError, trained_on
from stats import mean_interval

# What must agree for rows to be one setting; systems of a setting are compared with each other.
SETTING = ["task", "metric", "shots", "subtoken", "head", "crf", "finetune", "epochs", "batch", "lr", "lr_backbone", "dropout", "study"]
# A run of train.py, as it is or tuned further by text_encoder.py (then its weights' path is the model's name).
RUN = re.compile(rf"(?P<run>{RUN_NAME.pattern})(?:_(?P<tuned>mntp[a-z+]*)_[0-9a-f]{{6}}/model\.safetensors)?$")
SCORES = {"f1": "span F1", "acc": "accuracy"}
# In the order of rows.
FEATURES = {"fw": COLOURS[0], "bw": COLOURS[1], "none": COLOURS[3], "fw+fw": COLOURS[4], "fw+bw": COLOURS[2]}


class System(NamedTuple):
    """What a row measured, whatever the seeds: System("fw+bw", "p_bw = 0 & bw only", "toyworld-long 4x128")."""

    features: str
    models: str  # how they were trained; their names, if they are no runs of train.py
    study: str  # where, and of what size: the same p_bw may have been trained for longer elsewhere
    depth: str = ""  # layers that the states are taken after; "": all

    @property
    def states(self) -> str:
        """"fw+bw, two models", "fw at depth 0", "bw, never trained"."""
        untrained = "bw" in self.features and self.models.split(" & ")[-1] == "p_bw = 0"
        count = "" if "+" not in self.features else ", two models" if "&" in self.models else ", one model"
        depth = f" at depth {self.depth}" if self.depth else ""
        return self.features + depth + count + (", bw never trained" if untrained and count else ", never trained" if untrained else "")

    @property
    def label(self) -> str:
        return f"{self.states}: {self.models}"


def used(row: pd.Series) -> list[str]:
    """The backbones that a row's features were read from, in their order."""
    return [row.model_bw if row.model_bw and (part == "bw" or place == 1) else row.model for place, part in enumerate(row.features.split("+"))]


def system(row: pd.Series, homes: dict[str, str]) -> System:
    kinds, studies = zip(*(short(name, homes) for name in dict.fromkeys(used(row))))
    if len(kinds) == 2 and kinds[0] == kinds[1] and studies[0] == studies[1]:
        kinds = (kinds[0], "another seed")
    return System(row.features, " & ".join(kinds), " & ".join(dict.fromkeys(studies)), row.depth)


def short(model: str, homes: dict[str, str]) -> tuple[str, str]:
    """A model without its seed: ("p_bw = 0.05", "toyworld 4x128"), ("p_bw = 0 + mntp", "wikipedia 4x192"); others are
    their own name. `homes` has the studies of runs: one that was tuned further stays in its study, wherever it is kept."""
    found = RUN.search(model)
    if not found:
        return model, ""
    folder = Path(model[: found.end("run")])
    kind = trained_on(folder) + (f" + {found['tuned']}" if found["tuned"] else "")
    return kind, f"{homes.get(found['run'], folder.parent.name)} {found['size']}".strip()


def unit(row: pd.Series) -> str:
    """What is independent between rows of a system: the backbone's training seed, else the head's seed."""
    found = RUN.search(used(row)[0])
    return f"seed {found['seed']}" if found else f"head {row.seed}"


def read_scores(path: Path) -> pd.DataFrame:
    """One line per setting, system and unit, with its score in percent. RunError if there are none."""
    if not path.exists():
        raise RunError(f"{path} holds no results: python experiments/token_classification.py writes them")
    rows = pd.read_csv(path, dtype=str, keep_default_na=False)
    homes = {Path(name).name: Path(name).parent.name for name in [*rows.model, *rows.model_bw] if not name.endswith(".safetensors")}
    rows["system"], rows["unit"] = [system(row, homes) for _, row in rows.iterrows()], rows.apply(unit, axis=1)
    rows["used"] = [" & ".join(used(row)) for _, row in rows.iterrows()]
    twice = rows[rows.unit.str.startswith("seed")].groupby([*SETTING[:-1], "system", "unit"], sort=False).used.nunique()
    if (twice > 1).any():
        raise RunError(f"{path} has two different runs of {twice.idxmax()[-2].label}, {twice.idxmax()[-1]}: keep their rows in two tables")
    rows["study"] = [name.study.split(" ")[0] for name in rows.system]
    rows["percent"] = 100 * rows.test.astype(float)
    return rows.groupby([*SETTING, "system", "unit"], sort=False).percent.mean().reset_index()


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


def describe(setting: dict) -> str:
    extras = [f"{setting['head']} head" + (" + CRF" if setting["crf"] == "True" else ""),
              "fine-tuned" if setting["finetune"] == "True" else "frozen", f"{setting['epochs']} epochs of batches of {setting['batch']}",
              f"{setting['subtoken']} token of a word"]  # fmt: skip
    return f"{setting['task']}, {', '.join(extras)}"


def minus(by: dict[System, pd.Series], name: System, base: System | None) -> str:
    """Mean difference of two systems, paired by unit; "" where there are no such pairs."""
    if base not in by or base == name:
        return ""
    shared = by[name].index.intersection(by[base].index)
    return plus_minus((by[name][shared] - by[base][shared]).to_numpy(), 2, "+") if len(shared) else ""


def bases(by: dict[System, pd.Series], name: System) -> tuple[System, System | None]:
    """What a system is held against: forward features of the same model (as it was before MNTP), and, if it is two
    states wide, the control of that width, forward features of two models."""
    first = re.split(r" [&+] ", name.models)[0]
    controls = [x for x in by if "+" in name.features and x.features == "fw+fw" and x[2:] == name[2:]]
    controls.sort(key=lambda x: x.models.split(" & ")[0] != first)  # that of the same models, if there is one
    return System("fw", first, name.study.split(" & ")[0], name.depth), next(iter(controls), None)


def groups(table: pd.DataFrame) -> list[tuple[dict, dict[System, pd.Series]]]:
    """[(setting, {system: percent by unit})], systems of like features together."""
    found = []
    for key, part in table.groupby(SETTING, sort=False):
        by = {name: rows.set_index("unit").percent for name, rows in part.groupby("system", sort=False)}
        found.append((dict(zip(SETTING, key)), dict(sorted(by.items(), key=lambda item: list(FEATURES).index(item[0].features)))))
    return found


def markdown(table: pd.DataFrame) -> str:
    lines = []
    for setting, by in groups(table):
        lines += [f"**{describe(setting)}**", "", f"| features | models | n | {setting['metric']}, % | minus fw of the same model | minus fw+fw |"]
        lines += ["| --- " * 6 + "|"]
        for name, values in by.items():
            differences = " | ".join(minus(by, name, base) for base in bases(by, name))
            lines.append(f"| {name.states} | {name.models} ({name.study}) | {len(values)} | {plus_minus(values.to_numpy(), 2)} | {differences} |")
        lines.append("")
    return "\n".join(lines)


def variants(sampled: pd.DataFrame) -> list[tuple[str, System, pd.DataFrame]]:
    """Few-shot rows as lines over K: (what was done, system, rows of all K)."""
    done = sampled.apply(lambda row: "fine-tuned" if row.finetune == "True" else "frozen", axis=1) + sampled.crf.map({"True": " + CRF", "False": ""})
    return [(key[0], key[1], rows) for key, rows in sampled.assign(done=done).groupby(["done", "system"], sort=False)]


def sampled_alike(sampled: pd.DataFrame) -> list[tuple[dict, pd.DataFrame]]:
    """[(setting, few-shot rows)] of like tasks, metrics and heads; K, the CRF and fine-tuning tell the rows of one apart."""
    others = [name for name in SETTING if name not in ("shots", "crf", "finetune")]
    return [(dict(zip(others, key)), rows) for key, rows in sampled.groupby(others, sort=False)]


def what_differs(setting: dict, parts: list[tuple[dict, pd.DataFrame]]) -> str:
    """What tells a setting from the other ones, in words; "" where it is alone."""
    return ", ".join(f"{name} {value or 'none'}" for name, value in setting.items() if any(other[name] != value for other, _ in parts))


def few_shot_tables(sampled: pd.DataFrame) -> str:
    parts, lines = sampled_alike(sampled), []
    for setting, rows in parts:
        lines += [f"**{what_differs(setting, parts)}**"] * (len(parts) > 1) + [few_shot_table(rows)]
    return "\n\n".join(lines)


def few_shot_table(sampled: pd.DataFrame) -> str:
    counts = sorted(set(sampled.shots), key=int)
    lines = ["| features | models | backbone, head | " + " | ".join(f"K = {k}" for k in counts) + " |", "| --- " * (3 + len(counts)) + "|"]
    for done, name, rows in variants(sampled):
        cells = [rows[rows.shots == k].percent.to_numpy() for k in counts]
        lines.append(f"| {name.states} | {name.models} | {done} | " + " | ".join(plus_minus(x, 2) if len(x) else "" for x in cells) + " |")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------------


def figures(table: pd.DataFrame) -> dict[str, list]:
    """{study: the settings of its backbones in which there is something to compare, or all if there is nothing}."""
    found: dict[str, list] = {}
    for setting, by in groups(table):
        found.setdefault(setting["study"], []).append((setting, by))
    return {study: [panel for panel in panels if len(panel[1]) > 1] or panels for study, panels in found.items()}


def draw(panels: list[tuple[dict, dict[System, pd.Series]]], path: Path) -> None:
    """A panel per setting, a row per system: every unit a dot, mean and 95 % interval beside."""
    heights = [1.0 + 0.32 * len(by) for _, by in panels]
    figure, axes = new_figure(len(panels), 1, (8, sum(heights)), gridspec_kw={"height_ratios": heights})
    for ax, (setting, by) in zip(axes.flat, panels):
        for place, (name, values) in enumerate(by.items()):
            mean, half = mean_interval(values.to_numpy())
            ax.plot(values, [place] * len(values), "o", color=FEATURES[name.features], alpha=0.35, markersize=4)
            low, high = values.min(), values.max()
            # two backbones give an interval many times wider than the panel: the table has it, the dots say enough here
            if len(values) > 2:
                ax.errorbar(mean, place + 0.22, xerr=half, fmt="D", color=FEATURES[name.features], markersize=3.5, capsize=2, linewidth=1)
                low, high = min(low, mean - half), max(high, mean + half)
            ax.update_datalim([(low, place), (high, place)])
        ax.set_yticks(range(len(by)), [f"{name.label}  (n = {len(values)})" for name, values in by.items()], fontsize=7.5)
        ax.set_ylim(len(by) - 0.5, -0.5)
        ax.set_xlim(right=min(ax.get_xlim()[1], 101))  # an interval may go on where no score can
        ax.set_title(f"{describe(setting)}\nbackbones: {', '.join(dict.fromkeys(name.study for name in by))}", fontsize=8, loc="left")
        ax.set_xlabel(f"test {SCORES.get(setting['metric'], setting['metric'])}, %", fontsize=8)
    figure.suptitle("Token classification from forward and backward states", fontsize=11, x=0.01, ha="left")
    caption = "Dots: backbones trained from different seeds. Diamonds: mean and 95 % t-interval over them, where there are more than two."
    figure.text(0.01, -0.01, caption, fontsize=7, color="0.3", va="top")
    write_png(figure, path)


def draw_few_shot(sampled: pd.DataFrame, path: Path) -> None:
    """Score against K, with intervals over backbones: a panel per setting, a line per system and way of training that has more than one K."""
    parts = sampled_alike(sampled)
    figure, axes = new_figure(len(parts), 1, (6.5, 3.3 * len(parts) + 0.3))
    for ax, (setting, rows) in zip(axes.flat, parts):
        _few_shot_panel(ax, setting["metric"], rows)
        ax.set_title(what_differs(setting, parts), fontsize=8, loc="left")
    figure.suptitle(f"Few labels: {', '.join(dict.fromkeys(sampled.task))}", fontsize=11, x=0.01, ha="left")
    figure.text(0.01, -0.01, "Means and 95 % t-intervals over backbones trained from different seeds.", fontsize=7, color="0.3", va="top")
    write_png(figure, path)


def _few_shot_panel(ax, metric: str, sampled: pd.DataFrame) -> None:
    lines: Counter = Counter()
    drawn = [line for line in variants(sampled) if line[2].shots.nunique() > 1] or variants(sampled)
    for place, (done, name, rows) in enumerate(drawn):
        style = DASHES[lines[name.features] % len(DASHES)]
        lines[name.features] += 1
        by_count = [(int(k), *mean_interval(part.percent.to_numpy())) for k, part in rows.groupby("shots")]
        counts, means, halves = map(np.array, zip(*sorted(by_count)))
        shift = 1.03 ** (place - 2)  # intervals beside each other
        ax.errorbar(counts * shift, means, yerr=np.nan_to_num(halves), color=FEATURES[name.features], linestyle=style, marker="o", markersize=3,
                    linewidth=1.2, capsize=2, label=f"{name.label}, {done}")  # fmt: skip
    ax.set_xscale("log")
    ticks = sorted(set(map(int, sampled.shots)))
    ax.set_xticks(ticks, ticks)
    ax.minorticks_off()
    ax.set_xlabel("K: every label at least so many times in the training sample", fontsize=8)
    ax.set_ylabel(f"test {SCORES.get(metric, metric)}, %", fontsize=8)
    ax.legend(fontsize=7, frameon=False)


@one_sentence
def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("scores", nargs="?", type=Path, default=Path("results/token-classification/scores.csv"))
    args = parser.parse_args(argv)
    table = read_scores(args.scores)
    whole, sampled = table[table.shots == ""], table[table.shots != ""]
    if len(whole):
        print(markdown(whole))
    for study, panels in figures(whole).items():
        draw(panels, args.scores.with_name(f"{args.scores.stem}_{study}".rstrip("_") + ".png"))
    if len(sampled):
        print(few_shot_tables(sampled))
        draw_few_shot(sampled, args.scores.with_name("few_shot.png"))


if __name__ == "__main__":
    main()
