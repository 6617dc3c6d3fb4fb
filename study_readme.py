"""The README of a study, written from its tables: verdicts, numbers, figures, and how all of it was made.

    python plot_results.py results/demo --report          # writes results/demo/README.md, between its two marks

What stands outside the marks is kept. Numbers: compare.py, verdicts.py; no torch, no matplotlib.
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Iterable

import numpy as np

from cells import BUDGET_WORDS, BUDGETS, BW_ONLY, FW_ONLY, Cell, Group, Study, Variant, choose, corpus_tokens, variant_of, variants
from compare import (
    Ratios, Term, against_alone, bw_against_bw_only, corrected, final, log_ratios, lowest, meeting_point, paired, ratio1, ratio2,
    ratio2_separate, steps_at, window_log_ratios, windows,
)  # fmt: skip
from measures import asked
from report import alarms, describe, documents, floor_of, interval, markdown_table, p_value, plus_minus, short, write_between
from runs import BW_SETTINGS, MERGE_COLUMNS, Run, read_table, split_table_name
from verdicts import ABSENT, NEEDED, verdicts

MARKS = ("<!-- report: written by python plot_results.py --report -->", "<!-- end of report -->")


def write(study: Study, variant: Variant | None = None) -> Path:
    """Writes README.md of the study; RunError if only one of the two marks is left in it."""
    path = study.folder / "README.md"
    write_between(path, MARKS, study.folder.name, lambda above: markdown(study, variant, above))
    return path


def markdown(study: Study, variant: Variant | None = None, above: str = "") -> str:
    """All sections. `variant` is held against p_bw = 0 (default: as in the figures); figures that `above` shows are not repeated."""
    variant = variant or choose(study)
    sections = [
        _verdicts(study, variant), _losses(study), _budgets(study, variant), _own_tokens(study), _over_training(study, variant),
        _repeats(study), _reversal(study), _documents(study, variant), _figures(study.folder, above), _made(study), _left_out(study),
    ]  # fmt: skip
    return "\n\n".join(section for section in sections if section)


def _section(title: str, *parts: str) -> str:
    return "\n\n".join([f"## {title}", *(" ".join(part.split()) if part.startswith("\n") else part for part in parts)])


def _per_group(ratios: Iterable[Ratios]) -> list[tuple[Group, list[Cell]]]:
    """Groups with their sizes, largest last, that occur in any of these ratios."""
    found = {cell for one in ratios for cell in one}
    return [(group, sorted(cell for cell in found if cell.group == group)) for group in sorted({cell.group for cell in found})]


def _titled(study: Study, group: Group, content: str) -> str:
    """Under a heading of its own where the group needs one."""
    return f"### {study.heading(group)}\n\n{content}" if study.needs_heading(group) else content


# ---------------------------------------------------------------------------------------------------------------------
# Sections
# ---------------------------------------------------------------------------------------------------------------------


def _verdicts(study: Study, variant: Variant | None) -> str:
    if study.fine_tuned:
        return ""
    found = verdicts(study, variant)
    if not found:
        return "## Verdicts\n\nNo finished run of this study was trained in both directions."
    parts = []
    for group, rows in found.items():
        content = markdown_table(("question", "claim", "article (flipped mask)", "ours, flipped", "ours, anticausal", "95 % interval", "verdict"),
                        [row._replace(verdict=row.verdict if row.verdict == ABSENT else f"**{row.verdict}**") for row in rows])  # fmt: skip
        parts.append(f"### {study.heading(group)}\n\n{content}" if len(found) > 1 or group != group.on_all_text() else content)
    return _section("Verdicts", *parts, f"""
        {variant.label} against p_bw = 0, runs paired by seed, at equal {BUDGET_WORDS[study.budget]}. Ours: geometric mean over seeds. A verdict is
        on the right (anticausal) mask unless the claim is about the published one, and on the size named with it: the largest with {NEEDED}
        seeds. *holds*, *does not hold*: the 95 % t-interval over at least {NEEDED} seeds lies on one side of the value in the claim. Seeds that
        would decide: if mean and spread stay as observed. The article's ratio 2 is the mean of each seed's ratio. Intervals of different claims are not corrected for each other; p-values over sizes
        are (Holm).""")


def _losses(study: Study) -> str:
    """Final losses with t-intervals, ratios with paired ones, the floor: a row per size and variant."""
    parts = []
    for group in study.groups:
        rows, runs = [], []
        for cell in (cell for cell in study.cells if cell.group == group):
            rows += _loss_rows(study, cell)
            runs += [run for seeds in study.cells[cell].values() for run in seeds.values()]
        columns = ("size (parameters)", "trained on", "seeds", "fw loss", "bw loss", "ratio 1", "p", "ratio 2", "bw / bw only")
        parts.append(_titled(study, group, f"{describe(runs)}.\n\n{markdown_table(columns, rows)}"))
    return _section("Losses and ratios", *parts, f"""
        Validation loss in nats per token at the end of each run: mean over seeds ± half of its 95 % t-interval; *italic*: this direction was
        never trained. Ratio 1 = fw loss (p_bw = 0) / fw loss (this row), above 1: the two-direction model is the better forward model. p: paired
        t-test of ratio 1 against 1, corrected by Holm over the sizes of this table that were trained on the same. Ratio 2 = fw loss / bw loss of one model
        (of separate models: fw only / bw only). bw / bw only: 1 is learned as well as by a model that learns nothing else. Ratios: geometric
        mean over seeds [95 % t-interval of the paired log-ratios], at equal {BUDGET_WORDS[study.budget]}.""")


def _loss_rows(study: Study, cell: Cell) -> list[list[str]]:
    by, rows = study.cells[cell], []
    for variant, seeds in by.items():
        losses = {d: plus_minus([final(run, f"{d}_loss") for _, run in sorted(seeds.items())]) for d in ("fw", "bw")}
        cells = [f"*{text}*" if not variant.trains(direction) else text for direction, text in losses.items()]
        ratios = ["", "", "", ""]
        if variant not in (FW_ONLY, BW_ONLY):
            everywhere = [ratio(study, variant) for ratio in (ratio1, ratio2, bw_against_bw_only)]
            p = p_value(*corrected(everywhere[0])[cell]) if cell in everywhere[0] else ""
            one, two, enough = (interval(log_ratios(sizes[cell])) if cell in sizes else "" for sizes in everywhere)
            ratios = [one, p, two, enough]
        rows.append([f"{cell.label} ({short(cell.params)})", variant.label, ", ".join(map(str, sorted(seeds))), *cells, *ratios])
    if separate := ratio2_separate(study).get(cell):
        seeds = ", ".join(str(term.seed) for term in separate)
        rows.append([cell.label, "*fw only / bw only*", seeds, "", "", "", "", interval(log_ratios(separate)), ""])
    if floor := floor_of(run for seeds in by.values() for run in seeds.values()):
        rows.append([cell.label, "*entropy of the text*", "", f"{floor[0]:.4f}", f"{floor[0]:.4f}", "", "", "", ""])
    return rows


def _budgets(study: Study, variant: Variant | None) -> str:
    found = {budget: ratio1(replace(study, budget=budget, notes=[]), variant) for budget in BUDGETS}
    parts = []
    for group, cells in _per_group(found.values()):
        texts = {cell: [interval(log_ratios(ratios[cell])) if cell in ratios else "never equal" for ratios in found.values()] for cell in cells}
        parts.append(_titled(study, group, markdown_table(["size", *(BUDGET_WORDS[b] for b in BUDGETS)], ([c.label, *texts[c]] for c in cells))))
    if not parts:
        return ""
    return _section("Ratio 1 at equal budgets", *parts, f"""
        Ratio 1 of {variant.label} [95 % t-interval] where the shorter run of each pair ends, on four axes; between evaluations the loss is interpolated
        in log-log. On a machine that does other work too, seconds say little.""")  # fmt: skip


def _own_tokens(study: Study) -> str:
    """Whether the directions help each other: a row per size and variant that learned both. Not of fine-tuning, whose learning rate
    falls to 0 at a run's end: two runs that meet in the middle of one of them cannot be compared."""
    both = [v for v in variants(study) if v.trains("fw") and v.trains("bw")] * (not study.fine_tuned)
    found = {(v, d): against_alone(replace(study, notes=[]), v, d) for v in both for d in ("fw", "bw")}
    parts = []
    for group, cells in _per_group(found.values()):
        rows = []
        for cell, v in itertools.product(cells, both):
            texts = [text for d in ("fw", "bw") for text in _against_alone(found[v, d].get(cell, []), len(study.cells[cell].get(v, {})))]
            rows += [[cell.label, v.label, *texts]] if any(texts) else []
        columns = ("size", "trained on", "fw tokens", "steps", "fw loss / that of p_bw = 0", "bw tokens", "steps", "bw loss / that of bw only")
        parts += [_titled(study, group, markdown_table(columns, rows))] if rows else []
    if not parts:
        return ""
    return _section("Each direction at equal tokens of its own", *parts, """
        Loss of a model of both directions / loss of the model that learned this direction only, where both have seen equally many tokens *in this
        direction*: above 1 the other direction was in the way, below 1 it helped. Geometric mean over seeds [95 % t-interval], of so many of the
        variant's seeds; tokens, and steps of the two models, are means. Where the steps differ, so do learning rates and the number of updates: only rows of (nearly) equal steps
        tell what the directions do to each other and nothing else. Left out: seeds that never have equally many tokens, and those whose control is
        still in its warm-up there. Between evaluations interpolated in log-log, good to some tenths of a per cent.""")  # fmt: skip


def _against_alone(terms: list[Term], seeds: int) -> tuple[str, str, str]:
    """Tokens, steps of both and the ratio, of the terms whose control is past its warm-up; "" without any."""
    terms = [term for term in terms if steps_at(term.bottom, term) > (term.bottom.settings.get("warmup_steps") or 0)]
    if not terms:
        return "", "", ""
    steps = (np.mean([steps_at(run, term) for term, run in zip(terms, side)]) for side in zip(*((term.top, term.bottom) for term in terms)))
    tokens = np.mean([meeting_point(term) for term in terms])
    return short(tokens), " / ".join(f"{count:,.0f}" for count in steps), f"{interval(log_ratios(terms))}, {len(terms)} of {seeds}"


def _over_training(study: Study, variant: Variant | None) -> str:
    ratios, parts = ratio1(study, variant), []
    for group, cells in _per_group([ratios]):
        rows = []
        for cell in cells:
            found = windows(ratios[cell])
            texts = [_window(ratios[cell], found.get(name)) for name in ("early", "all", "late")]
            rows.append([cell.label, *texts, interval(log_ratios(ratios[cell]))])
        parts.append(_titled(study, group, markdown_table(("size", "early", "all", "late", "end"), rows)))
    if not parts:
        return ""
    return _section("Ratio 1 over training", *parts, f"""
        Ratio 1 of {variant.label}, averaged over the first epoch (early), all of training, its second half (late) [95 % t-interval over seeds],
        from the first evaluation on, with the window's tokens (both directions) and optimiser steps. early is empty where training has no more than one epoch.
        {"" if variant.throughout else f"It learns bw from {variant.bw_start:g} to {variant.bw_end:g} of the run only."}""")


def _window(terms: list[Term], window: tuple[float, float] | None) -> str:
    logs = window_log_ratios(terms, window) if window else ()
    if not len(logs):
        return ""
    curve = terms[0].top.curve
    (start, end), (first, last) = (np.interp(window, [0.0, *curve["epoch"]], [0.0, *curve[x]]) for x in ("tokens_total", "step"))
    return f"{interval(logs)}, {short(start)} to {short(end)} tokens, steps {first:.0f} to {last:.0f}"


def _repeats(study: Study) -> str:
    """fw losses by unique tokens and dropout, with the runs on all text beside them, of the sizes that have such runs."""
    sizes = {cell._replace(group=cell.group.on_all_text()) for cell in study.limited}
    wanted = {v for by in study.limited.values() for v in by}  # not the whole sweep of p_bw on all of the text
    beside = {cell: {v: by[v] for v in by if v in wanted} for cell, by in study.cells.items() if cell in sizes}
    rows = []
    for cell, by in sorted((beside | study.limited).items(), key=lambda item: _by_text(item[0])):
        for v, seeds in by.items():
            pairs = paired(study, FW_ONLY, "fw_loss", v, "fw_loss", {cell: by}).get(cell) if v != FW_ONLY and v.trains("fw") else None
            runs = [run for _, run in sorted(seeds.items())]
            epochs = np.mean([final(run, "epoch") for run in runs])
            losses = [plus_minus([value(run, "fw_loss") for run in runs]) for value in (final, lowest)]
            ratio = interval(log_ratios(pairs)) if pairs else ""
            rows.append([cell.label, cell.group.bw_mask, short(corpus_tokens(runs[0])), f"{epochs:.3g}", f"{cell.group.dropout:g}", v.label,
                         str(len(runs)), *losses, ratio])  # fmt: skip
    columns = ("size", "mask", "unique tokens", "epochs", "dropout", "trained on", "n", "fw loss at the end", "at its best evaluation", "ratio 1")
    if not rows:
        return ""
    return _section("Repeated text", markdown_table(columns, rows), """
        Epochs: tokens seen, both directions, over unique tokens. Ratio 1, at the end, compares runs with the same unique tokens and dropout. Of
        these runs, only those with all of the text and no dropout enter any other table.""")


def _by_text(cell: Cell) -> tuple:
    return cell.group.on_all_text(), cell.params, cell.group.dropout, -(cell.group.unique_tokens or math.inf)


def _reversal(study: Study) -> str:
    """Facts asked in both orders: a row per size, variant and kind of pairs, where eval_reversal.py has been."""
    rows, pairs = [], set()
    for (cell, by), orders in itertools.product(study.cells.items(), (1, 2)):
        for v, seeds in by.items():
            texts, counts = [], []
            for question, direction in itertools.product(("teacher", "pupil"), ("fw", "bw")):
                acc, auc, stated, count = (asked(seeds.values(), direction, question, orders, c) for c in ("acc", "auc", "stated", "pairs"))
                known = v.trains(direction) and len(acc) > 0
                text = f"{plus_minus(100 * acc, 0)} %; {plus_minus(auc, 2)}" if known else ""
                texts, counts = [*texts, text if not known or stated.all() else f"*{text}*"], [*counts, *([len(acc)] * known)]
                pairs |= set(count.astype(int))
            if counts:
                rows.append([study.name(cell), ("", "one order", "both orders")[orders], v.label, str(max(counts)), *texts])
    columns = ("size", "pairs stated in", "trained on", "n", "Who taught Y? fw", "bw", "Whom did X teach? fw", "bw")
    if not rows:
        return ""
    counts, chances = (" or ".join(words) for words in ((str(n) for n in sorted(pairs)), (f"{100 / n:.0f}" for n in sorted(pairs))))
    return _section("Facts and their reversals", markdown_table(columns, rows), f"""
        Right answers; share of the other candidates that score below the right one: mean over seeds ± half of its 95 % t-interval. The candidates
        are the answers to all questions of a cell, {counts} of them; by chance {chances} % and 0.50. Who taught Y? reads "Y was a pupil of" forward
        and "was the teacher of Y." backward, Whom did X teach? reads "X was the teacher of" and "was a pupil of X."; one order: the text says who
        was the teacher of whom, and never who was a pupil. *Italic*: no such sentence is in the text. All seeds share one world and its pairs.""")


def _documents(study: Study, variant: Variant | None) -> str:
    named = {"ratio 1": ratio1(study, variant), "ratio 2": ratio2(study, variant), "bw / bw only": bw_against_bw_only(study, variant)}
    rows = [[study.name(cell), name, documents(terms, 4)] for name, ratios in named.items() for cell, terms in ratios.items()]
    rows = [row for row in rows if row[-1]]
    if not rows:
        return ""
    return _section("How far the validation text may mislead", markdown_table(("size", "of", "each pair [95 % interval]"), rows), f"""
        {variant.label}; whole validation documents drawn with replacement, 2000 times: how uncertain *one* pair is because the validation set is
        finite. What other seeds would change is in the intervals above.""")


def _figures(folder: Path, above: str) -> str:
    """Every figure that `above` does not show, the questions' own first; those of single sizes folded away."""
    first = ("leak", "bw_by_size", "pareto", "ratio1", "ratio2", "repeats", "reversal", "context", "merge")
    rank = {name: next((place for place, start in enumerate(first) if name.startswith(start)), len(first))
            for name in sorted(path.name for path in (folder / "figures").glob("*.png")) if f"figures/{name}" not in above}  # fmt: skip
    shown, single = ([f"![{name.removesuffix('.png').replace('_', ' ')}](figures/{name})" for name in sorted(rank, key=rank.get)
                      if name.startswith(("curves_", "own_tokens_", "blocks_")) == of_one_size] for of_one_size in (False, True))  # fmt: skip
    folded = ["<details><summary>Figures of single sizes</summary>", *single, "</details>"] if single else []
    return _section("Figures", *shown, *folded) if rank else ""


def _made(study: Study) -> str:
    runs = [run for by in (study.cells | study.limited).values() for seeds in by.values() for run in seeds.values()]
    lines = [f"python {command}" for command in sorted({run.config["command"] for run in runs if run.config.get("command")})]
    lines += _measured(study.folder, "eval_layers.py", "layers") * (not study.fine_tuned) + _measured(study.folder, "eval_context.py", "context")
    lines += _measured(study.folder, "eval_reversal.py", "reversal")
    lines += _merged(study.folder, {run.name: run for run in runs})
    tags = re.compile(rf"_(?:(p_bw|{'|'.join(BW_SETTINGS)})-([\d.]+?)|(fw-or-bw|adaptive))(?=_|\.png)")
    chosen = (tags.findall(path.name) for path in study.folder.glob("figures/*.png"))
    flags = sorted({"".join(f" --task {task}" if task else f" --{name} {value}" for name, value, task in found) for found in chosen} | {""})
    lines += [f"python plot_results.py {study.folder}{some}" for some in flags]
    lines += [f"python plot_results.py {study.folder} --report"]
    seconds = sum(run.finished.get("seconds", 0) for run in runs)
    spent = f"{seconds / 3600:.1f} hours" if seconds > 5400 else f"{seconds / 60:.0f} minutes"
    dates = sorted({date for run in runs for date in (run.config.get("date"), run.finished.get("date")) if date})
    versions = [", ".join(f"{name} {version}" for name, version in run.config.get("versions", {}).items()) for run in runs]
    facts = [f"{len(runs)} runs, {spent} of training in total", *([" to ".join(sorted({dates[0], dates[-1]}))] if dates else [])]
    for name, values in (("machine", [run.config.get("device") for run in runs]), ("versions", versions),
                         ("commits", [run.config.get("git_commit") for run in runs])):  # fmt: skip
        different = sorted({value for value in values if value})
        facts += [f"{name}: {'; '.join(different)}"] if different else []
    return _section("How it was made", "```bash\n" + "\n".join(lines) + "\n```", "\n".join(f"- {fact}" for fact in facts))


def _measured(folder: Path, script: str, table: str) -> list[str]:
    """The commands that wrote these tables of some of a study's runs: of their own text or another, of all windows or some."""
    commands = set()
    for path in folder.glob(f"*/{table}*.csv"):
        text, windows = split_table_name(path, table)
        commands.add(f"python {script} {folder}" + (f" --data data/{text}" if text else "") + (f" --windows {windows}" if windows else ""))
    return sorted(commands)


def _merged(folder: Path, runs: dict[str, Run]) -> list[str]:
    if not (folder / "merge.csv").exists():
        return []
    pairs = read_table(folder / "merge.csv", MERGE_COLUMNS)[["run_a", "run_b"]].drop_duplicates().to_numpy()
    commands = set()
    for a, b in ((a, b) for a, b in pairs if {a, b} <= runs.keys()):
        one, other = variant_of(runs[a]), variant_of(runs[b])
        usual = one.p_bw != other.p_bw and runs[a]["task"] == runs[b]["task"] == "fw+bw" and (one.how == other.how or 0 in (one.p_bw, other.p_bw))
        commands.add(f"python merge.py {folder} --p_bw {one.p_bw:g} {other.p_bw:g}" if usual else f"python merge.py {folder}/{a} {folder}/{b}")
    return sorted(commands)


def _left_out(study: Study) -> str:
    alarm = "\n".join(f"- **ALARM**: {alarm}" for alarm in alarms(study))
    notes = "\n".join(f"- {note}" for note in study.notes)
    folded = f"<details><summary>Left out of one comparison or another</summary>\n\n{notes}\n\n</details>" if notes else ""
    return "\n\n".join(part for part in (alarm, folded) if part)
