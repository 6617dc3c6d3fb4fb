"""The article's claims, one by one: its number, ours with both backward masks, an interval, a verdict.

    >>> for row in verdicts(study): print(row.claim, row.interval, row.verdict)

A claim is measured as a log-ratio per seed and held against a threshold. It *holds*, or *does not hold*, if the 95 %
t-interval over at least three seeds lies on one side of it; else it is undecided, and the row says how many seeds would
decide it if mean and spread stay as observed. A single loss below the entropy of its text settles the question of the leak.
Where a claim is about one model, the largest size with three seeds speaks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Callable, NamedTuple

import numpy as np

import article
from cells import Group, Study, Variant, choose
from compare import bw_against_bw_only, bw_passes, corrected, log_ratios, ratio1, ratio2, ratio2_separate, share_of_the_way
from measures import (
    Measure, Scope, at_the_end, barrier, below_floor, bw_over_floor, dropout_instead, end_over_first_epoch, gap_growth_with_context, growth,
    growth_with_size, half_over_whole, on_repeated_text, over_right_mask, whole_over_one_layer,
)  # fmt: skip
from published import ARROW_OF_TIME
from report import plus_minus
from stats import mean_interval, paired_interval, seeds_needed

NEEDED = 3  # seeds; fewer give no verdict
ABSENT = "not in this study"
ENOUGH, NO_COST, BARRIER = 1.05, 0.99, 1.01  # how much worse still counts as "as well", "no cost", "no barrier"


@dataclass(frozen=True)
class Claim:
    question: str
    text: str
    article: str
    measure: Measure
    threshold: float  # of the ratio
    above: bool = True  # the claim says: above the threshold
    judged: str = "anticausal"
    gate: Callable[[Scope, str], str] = lambda scope, label: ""  # a reason to leave it undecided
    remark: Callable[[Scope, str], str] = lambda scope, label: ""
    proof: Callable[[Scope, str], str] = lambda scope, label: ""  # a reason that settles it, whatever the interval


class Row(NamedTuple):
    question: str
    claim: str
    article: str
    flipped: str
    anticausal: str
    interval: str
    verdict: str


# ---------------------------------------------------------------------------------------------------------------------
# Claims
# ---------------------------------------------------------------------------------------------------------------------


def unknown_passes(scope: Scope, label: str) -> str:
    """Why "5 % is enough" may not be judged: a model may just have had too few bw passes, so their number must be known."""
    runs = next(by for cell, by in scope.cells().items() if cell.label == label)[scope.variant].values()
    return "" if all(bw_passes(run) is not None for run in runs) else "undecided: the number of bw passes is not known"


def way_and_passes(scope: Scope, label: str) -> str:
    cell = next(cell for cell in scope.cells() if cell.label == label)
    passes = [bw_passes(run) for run in scope.cells()[cell][scope.variant].values()]
    span = [] if None in passes else sorted({f"{min(passes):.0f}", f"{max(passes):.0f}"}, key=float)
    parts = [f"{' to '.join(span)} bw passes"] if span else []
    share = share_of_the_way(scope.study, scope.variant, cell)
    if len(share):
        parts.append(f"{plus_minus(100 * share, 1)} % of the way from p_bw = 0 to bw only")
    return "; ".join(parts)


def claims(variant: Variant) -> tuple[Claim, ...]:
    """The seven questions as claims about `variant`; the article's side from article.py."""
    small, large, middle = article.SIZES[0], article.SIZES[-1], next(s for s in article.SIZES if s.label == "8 x 384")
    most = max(article.SIZES, key=lambda size: size.ratio2)
    params = [size.params for size in article.SIZES]
    grown1, grown2 = (math.exp(growth(params, np.log([getattr(size, name) for size in article.SIZES]))) for name in ("late", "ratio2"))
    narrow = [size for size in article.SIZES if size.width == small.width]
    first, end = article.LOSSES_8X384[1], article.LOSSES_8X384[10]  # fw at p_bw = 0, fw and bw at 0.05
    arrow = ARROW_OF_TIME["English"]
    none = "open there"
    p = variant.label
    return (
        Claim("1 leak", "The published mask shows the model its targets: bw loss / entropy of the text below 1",
              f"bw loss {article.BW_LOSS_32X1536} nats (32 x 1536)", bw_over_floor, 1.0, False, "flipped",
              proof=below_floor),
        Claim("1 leak", f"bw is learned better than fw: ratio 2 at {p} above 1",
              f"{small.ratio2:g} ({small.label}) to {most.ratio2:g} ({most.label})", at_the_end(ratio2), 1.0,
              remark=over_right_mask),
        Claim("1 leak", "Ratio 2 grows with size: its factor per tenfold parameters above 1", f"{grown2:.2f}", growth_with_size(ratio2), 1.0),
        Claim("1 leak", "Ratio 2 grows with training: at the end / after one epoch above 1",
              f"{first[1] / first[2]:.2f} (epoch 1) to {end[1] / end[2]:.2f} (epoch 10), {middle.label}", end_over_first_epoch(ratio2), 1.0),
        Claim("2 enough", f"{p} is enough to learn bw: bw loss / that of bw only below {ENOUGH}",
              f"bw {end[2]:.2f} beside fw {end[1]:.2f} nats ({middle.label}), no bw-only control", at_the_end(bw_against_bw_only), ENOUGH, False,
              gate=unknown_passes, remark=way_and_passes),
        Claim("3 cost", f"No cost to fw in the largest model: ratio 1 above {NO_COST}",
              f"{large.late:.3f} late, {large.all:.3f} all ({large.label})", at_the_end(ratio1), NO_COST),
        Claim("3 cost", "The cost shrinks with size: factor of ratio 1 per tenfold parameters above 1",
              f"{grown1:.3f} late", growth_with_size(ratio1), 1.0),
        Claim("3 cost", "Dip, then recovery with training: ratio 1 at the end / after one epoch above 1",
              f"{first[0] / first[1]:.3f} (epoch 1) to {end[0] / end[1]:.3f} (epoch 10), {middle.label}; means {large.early:.3f} early, "
              f"{large.late:.3f} late, {large.label}", end_over_first_epoch(ratio1), 1.0),
        Claim("4 repeats", "On repeated text learning bw helps fw: ratio 1 at the end above 1",
              f"{end[0] / end[1]:.3f} (epoch 10, {middle.label})", on_repeated_text(False), 1.0),
        Claim("4 repeats", "The same at each run's best evaluation", none, on_repeated_text(True), 1.0),
        Claim("4 repeats", "Control: dropout instead of bw helps fw: loss without / with it above 1 (best evaluations)", none, dropout_instead, 1.0),
        Claim("5 layers", "Ratio 2 grows with the layers that remain: whole / one layer above 1",
              f"{small.ratio2 / small.ratio2_one:.1f} ({small.label}) to {most.ratio2 / most.ratio2_one:.0f} ({most.label})",
              whole_over_one_layer, 1.0),
        Claim("5 layers", "Cut to half, a narrow two-direction model gains on fw only: ratio 1 (perplexity), half / whole, above 1",
              f"{min(s.ratio1_ppl_half / s.ratio1_ppl for s in narrow):.1f} to {max(s.ratio1_ppl_half / s.ratio1_ppl for s in narrow):.1f} "
              f"(width {small.width})", half_over_whole, 1.0),
        Claim("6 arrow", "Separate models find bw harder: fw loss of fw only / bw loss of bw only below 1",
              f"not there; Papadopoulos 2024: {100 / (100 + arrow[512]):.3f} (context 512)",
              at_the_end(lambda study, _: ratio2_separate(study)), 1.0, False),
        Claim("6 arrow", "The gap grows with context: bw / fw with the longest / with the shortest, above 1",
              f"not there; Papadopoulos 2024: {(100 + arrow[512]) / (100 + arrow[16]):.4f} (512 / 16)",
              gap_growth_with_context, 1.0),
        Claim("7 merging", f"No barrier between the weights of p_bw = 0 and {p}: highest fw loss / straight line below {BARRIER}",
              none, barrier, BARRIER, False),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Verdicts
# ---------------------------------------------------------------------------------------------------------------------


def decide(values: np.ndarray, threshold: float, above: bool) -> str:
    """"holds", "does not hold" or "undecided" with the reason: log-ratios per seed against a ratio's threshold."""
    if len(values) < NEEDED:
        return f"undecided: {len(values)} seed{'s' * (len(values) != 1)}, {NEEDED} are the least"
    mean, half = mean_interval(values)
    distance = mean - math.log(threshold)
    if abs(distance) > half:
        return "holds" if (distance > 0) == above else "does not hold"
    seeds = seeds_needed([values], math.log(threshold))
    return f"undecided: {seeds} seeds would decide" if seeds else "undecided: more than 1000 seeds"


def speaker(found: dict[str, np.ndarray]) -> str:
    """The model that speaks for a claim: the last (largest) with enough seeds, else the one with most."""
    enough = [label for label, values in found.items() if len(values) >= NEEDED]
    return enough[-1] if enough else max(found, key=lambda label: len(found[label]))


def show(label: str, values: np.ndarray, interval: bool = True) -> str:
    ratio, low, high = paired_interval(values)
    text = f"{_number(ratio)}" + (f" [{_number(low)}, {_number(high)}]" if interval and len(values) > 1 else "")
    return f"{text} ({label}, n = {len(values)})"


def _number(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.3g}"


def row(claim: Claim, scope: Scope) -> Row:
    sides = {mask: scope.with_mask(mask) for mask in ("flipped", "anticausal")}
    found = {mask: claim.measure(side) for mask, side in sides.items()}
    texts, interval, verdict = {"flipped": ABSENT, "anticausal": ABSENT}, "", ABSENT
    judged = speaker(found[claim.judged]) if found[claim.judged] else None
    for mask in (m for m in sides if found[m]):
        label = judged if judged in found[mask] else speaker(found[mask])  # the same size with both masks, if there is
        values, remark = found[mask][label], claim.remark(sides[mask], label)
        texts[mask] = show(label, values, interval=mask != claim.judged) + (f"; {remark}" if remark else "")
        if mask == claim.judged:
            interval = "[{}, {}]".format(*map(_number, paired_interval(values)[1:])) if len(values) > 1 else "none (n = 1)"
            verdict = claim.proof(sides[mask], label) or claim.gate(sides[mask], label) or decide(values, claim.threshold, claim.above)
    return Row(claim.question, claim.text, claim.article, texts["flipped"], texts["anticausal"], interval, verdict)


def cost_at_every_size(scope: Scope) -> Row:
    """Ratio 1 below 1 at every size: the one claim that tests many sizes at once, so its p-values are corrected (Holm)."""
    counts, verdict, interval = {}, ABSENT, ""
    for mask in ("flipped", "anticausal"):
        ratios = scope.with_mask(mask).of(ratio1(scope.study, scope.variant))
        tested = {cell: terms for cell, terms in ratios.items() if len(terms) >= NEEDED}
        if not tested:
            counts[mask] = ABSENT if not ratios else f"{len(ratios)} sizes, none with {NEEDED} seeds"
            verdict = verdict if mask == "flipped" or not ratios else f"undecided: {NEEDED} seeds are the least"
            continue
        means = {cell: float(log_ratios(terms).mean()) for cell, terms in tested.items()}
        clear = {cell for cell, (p, _) in corrected(tested).items() if p < 0.05}
        worse, better = (sum(sign * means[cell] < 0 for cell in clear) for sign in (1, -1))
        counts[mask] = f"below 1 at {worse}, above at {better}, open at {len(tested) - len(clear)} of {len(tested)} sizes"
        if mask == "anticausal":
            intervals = [paired_interval(log_ratios(terms)) for terms in tested.values()]
            interval = f"sizes: {_number(min(low for _, low, _ in intervals))} to {_number(max(high for _, _, high in intervals))}"
            seeds = seeds_needed([log_ratios(terms) for terms in tested.values()], 0.0) or "more than 1000"
            verdict = "does not hold" if better else "holds" if worse == len(tested) else f"undecided: {seeds} seeds would decide"
    theirs = sorted(size.all for size in article.SIZES)
    published = f"{theirs[0]:.3f} to {theirs[-1]:.3f}, all {len(theirs)} sizes"
    text = "fw pays at every size: ratio 1 below 1 (p-values Holm-corrected over the sizes)"
    return Row("3 cost", text, published, counts["flipped"], counts["anticausal"], interval, verdict)


def verdicts(study: Study, variant: Variant | None = None) -> dict[Group, list[Row]]:
    """A table of rows for each set of runs that differ in the mask alone; empty if nothing was trained in both directions."""
    variant = variant or choose(study)
    groups = dict.fromkeys(group._replace(bw_mask="anticausal") for group in study.groups)
    tables = {}
    for group in groups if variant else ():
        scope = Scope(study, variant, group)
        rows = [row(claim, scope) for claim in claims(variant)]
        place = next(i for i, found in enumerate(rows) if found.question.startswith("3"))
        tables[group] = [*rows[:place], cost_at_every_size(scope), *rows[place:]]
    return tables
