"""What the verdicts are measured on: planted runs whose end, best evaluation, first epoch and sizes all tell different things."""

import json

import numpy as np
import pandas as pd
import pytest
from test_compare import in_memory, study_of
from test_plot_results import P5, plant, plant_pairs

import compare
import measures
import plot_results
import report
import runs
import stats
import verdicts
from cells import BUDGETS, FW_ONLY, Variant, choose, load
from compare import against_alone, log_ratios, meeting_point
from study_readme import _own_tokens, markdown


def scope(folder):
    study = load(folder)
    return measures.Scope(study, P5, study.groups[0])


def with_best_evaluation(folder, best):
    """Sinks the fw loss of the twelfth of 25 evaluations."""
    table = pd.read_csv(folder / "curve.csv")
    table.loc[11, ["fw_loss", "fw_ppl"]] = best, np.exp(best)
    table.to_csv(folder / "curve.csv", index=False)


def test_the_end_and_the_best_evaluation_are_different_points(tmp_path):
    for seed in range(3):
        for end, best, more in ((3.0, 2.0, {}), (2.5, 1.9, {"p_bw": 0.05}), (2.0, 1.6, {"dropout": 0.1})):
            with_best_evaluation(plant(tmp_path, seed=seed, unique_tokens=1000, fw=end, **more), best)
    plant(tmp_path)
    (end,), (best,), (dropout,) = (measure(scope(tmp_path)).values() for measure in
                                   (measures.on_repeated_text(False), measures.on_repeated_text(True), measures.dropout_instead))  # fmt: skip
    assert np.exp(end) == pytest.approx(3 / 2.5) and np.exp(best) == pytest.approx(2 / 1.9) and np.exp(dropout) == pytest.approx(2 / 1.6)


def test_the_largest_model_speaks_for_repeated_text(tmp_path):
    for width, end in ((64, 2.5), (128, 2.0)):
        for seed in range(3):
            plant(tmp_path, width=width, seed=seed, unique_tokens=1000, fw=3.0)
            plant(tmp_path, width=width, seed=seed, unique_tokens=1000, fw=end, p_bw=0.05)
    found = measures.on_repeated_text(False)(scope(tmp_path))
    assert [label.split(",")[0] for label in found] == ["2 x 64", "2 x 128"] and verdicts.speaker(found).startswith("2 x 128")


def test_two_amounts_of_text_read_equally_often_are_two_results(tmp_path):
    for unique, ratio in ((1000, 1.2), (100_000, 1.1)):
        for seed in range(3):
            plant(tmp_path, seed=seed, unique_tokens=unique, fw=3.0), plant(tmp_path, seed=seed, unique_tokens=unique, fw=3.0 / ratio, p_bw=0.05)
            plant(tmp_path, seed=seed, unique_tokens=unique, fw=3.0 / ratio, dropout=0.1)
    for measure, more in ((measures.on_repeated_text(False), ""), (measures.on_repeated_text(True), ""), (measures.dropout_instead, ", dropout 0.1")):
        found = {label: float(np.exp(logs).mean()) for label, logs in measure(scope(tmp_path)).items()}
        names = [f"2 x 64, 12 epochs{more}, {unique} unique tokens" for unique in ("1,000", "100 k")]
        assert found == pytest.approx(dict(zip(names, (1.2, 1.1))))


def test_runs_with_dropout_alone_stay_out_of_the_main_comparison(tmp_path):
    plant(tmp_path), plant(tmp_path, seed=1, dropout=0.1)
    study = load(tmp_path)
    assert len(study.cells) == len(study.limited) == 1 and next(iter(study.limited)).group.dropout == 0.1


def test_ratio_at_the_end_over_ratio_after_the_first_epoch(tmp_path):
    plant(tmp_path, fw=2.0, decay=1.0, evaluations=240)
    plant(tmp_path, fw=2.0, decay=0.0, evaluations=240, p_bw=0.05)
    (logs,) = measures.end_over_first_epoch(compare.ratio1)(scope(tmp_path)).values()
    assert np.exp(logs) == pytest.approx(1 / (2 - 1 / 12), rel=1e-3)


def test_growth_is_per_tenfold_parameters_of_the_seeds_that_every_size_has(tmp_path):
    for width, ratio in ((64, 1.0), (128, 1.1), (256, 1.21)):  # parameters grow fourfold each
        for seed in (0, 1, 2)[width == 64 :]:
            plant(tmp_path, width=width, seed=seed, fw=ratio * 2 * 1.01**seed), plant(tmp_path, width=width, seed=seed, fw=2.0, p_bw=0.05)
        if width == 128:
            assert measures.growth_with_size(compare.ratio1)(scope(tmp_path)) == {}  # two sizes are no trend
    (logs,) = measures.growth_with_size(compare.ratio1)(scope(tmp_path)).values()
    assert np.exp(logs) == pytest.approx([1.1 ** (1 / np.log10(4))] * 2)


def test_half_of_a_models_layers_over_the_whole(tmp_path):
    plant_pairs(tmp_path, (2.0,), (2.2,), (0,), depth=4)
    (logs,) = measures.half_over_whole(scope(tmp_path)).values()
    assert logs == pytest.approx((2.0 - 2.2) * (1.4 - 1.0))  # of perplexities, with 2 of 4 layers


def test_the_gap_grows_from_the_first_context_on(tmp_path):
    for task, p_bw, direction, losses in (("fw", 0.0, "fw", (3.0, 2.0)), ("bw", 1.0, "bw", (3.3, 2.4))):
        folder = plant(tmp_path, task=task, p_bw=p_bw, max_seq_len=32)
        rows = [{"direction": direction, "context": context, "tokens": 9, "loss": loss} for context, loss in zip((16, 32), losses)]
        runs.write_table(folder / "context.csv", rows, runs.CONTEXT_COLUMNS)
    plant(tmp_path, p_bw=0.05, max_seq_len=32)
    (logs,) = measures.gap_growth_with_context(scope(tmp_path)).values()
    assert np.exp(logs) == pytest.approx([1.2 / 1.1])


def test_a_barrier_counts_a_pair_once_above_the_straight_line(tmp_path):
    line = []
    for seed in (0, 1):
        ends = plant(tmp_path, seed=seed).name, plant(tmp_path, seed=seed, p_bw=0.05).name
        for a, b in (ends, ends[::-1]):  # merged from both ends, as merge.py allows
            line += [{"run_a": a, "run_b": b, "weight": w, "fw_loss": 2 + 0.1 * abs(w - (a > b)) + 0.3 * w * (1 - w)} for w in (0, 0.5, 1)]
    pd.DataFrame(line, columns=runs.MERGE_COLUMNS).to_csv(tmp_path / "merge.csv", index=False)
    (heights,) = measures.barrier(scope(tmp_path)).values()
    assert len(heights) == 2 and heights == pytest.approx([np.log(2.125 / 2.05)] * 2)


def test_separate_models_are_divided_fw_by_bw(tmp_path):
    plant(tmp_path, fw=3.0, bw=9.0), plant(tmp_path, fw=8.0, bw=4.0, task="bw", p_bw=1.0)
    (terms,) = compare.ratio2_separate(load(tmp_path)).values()
    assert np.exp(compare.log_ratios(terms)) == pytest.approx([0.75])


# ---------------------------------------------------------------------------------------------------------------------
# Which runs are compared at all
# ---------------------------------------------------------------------------------------------------------------------


def test_p_bw_0_is_fw_only_whatever_the_task_and_005_is_preferred(tmp_path):
    for p_bw in (0.01, 0.05):
        plant(tmp_path, p_bw=p_bw)
    plant(tmp_path, task="fw-or-bw", p_bw=0.0)
    study = load(tmp_path)
    assert choose(study) == P5 and FW_ONLY in next(iter(study.cells.values()))


def test_a_loss_that_is_not_finite_at_the_end_leaves_a_run_out(tmp_path):
    plant_pairs(tmp_path, (2.0,), (2.0,), (0,))
    folder = plant(tmp_path, seed=1)
    table = pd.read_csv(folder / "curve.csv")
    table.loc[table.step.idxmax(), ["fw_loss", "fw_ppl"]] = np.nan
    table.sort_values("step", ascending=False).to_csv(folder / "curve.csv", index=False)
    assert any("not finite" in note for note in load(tmp_path).notes)


def test_another_text_of_the_same_name_and_another_recipe_are_cells_of_their_own(tmp_path):
    for seed, sha in ((0, "a" * 64), (1, "b" * 64)):
        path = plant(tmp_path / "text", seed=seed) / "config.json"
        content = json.loads(path.read_text())
        content["data"]["sha256"] = {"train": sha, "val": sha}
        path.write_text(json.dumps(content))
        plant(tmp_path / "sampling", seed=seed, sampling=("random", "shuffled")[seed])
        plant(tmp_path / "batch", seed=seed, batch_tokens=(128, 256)[seed])
    assert [len(load(tmp_path / name).cells) for name in ("text", "sampling", "batch")] == [2, 2, 2]


# ---------------------------------------------------------------------------------------------------------------------
# Verdicts
# ---------------------------------------------------------------------------------------------------------------------


def test_every_claim_has_its_measure_threshold_and_side():
    """Written out once more: a claim judged on the other side prints the opposite verdict."""
    found = [(claim.question, claim.measure.__qualname__.split(".")[0], claim.threshold, claim.above, claim.judged) for claim in verdicts.claims(P5)]
    right, flipped = (True, "anticausal"), (False, "flipped")
    assert found == [
        ("1 leak", "bw_over_floor", 1.0, *flipped), ("1 leak", "at_the_end", 1.0, *right), ("1 leak", "growth_with_size", 1.0, *right),
        ("1 leak", "end_over_first_epoch", 1.0, *right), ("2 enough", "at_the_end", 1.05, False, "anticausal"),
        ("3 cost", "at_the_end", 0.99, *right), ("3 cost", "growth_with_size", 1.0, *right), ("3 cost", "end_over_first_epoch", 1.0, *right),
        ("4 repeats", "on_repeated_text", 1.0, *right), ("4 repeats", "on_repeated_text", 1.0, *right), ("4 repeats", "dropout_instead", 1.0, *right),
        ("5 layers", "whole_over_one_layer", 1.0, *right), ("5 layers", "half_over_whole", 1.0, *right),
        ("6 arrow", "at_the_end", 1.0, False, "anticausal"), ("6 arrow", "gap_growth_with_context", 1.0, *right),
        ("7 merging", "barrier", 1.01, False, "anticausal"),
    ]  # fmt: skip


def test_claims_of_one_measure_differ_in_what_they_measure(tmp_path):
    """Ratio 1 and ratio 2, at the end and at the best evaluation, are told apart by planted values."""
    for seed in range(3):
        for p_bw, fw, bw, best in ((0.0, 3.0, 9.0, 2.0), (0.05, 2.5, 4.0, 1.9)):
            plant(tmp_path, seed=seed, p_bw=p_bw, fw=fw, bw=bw)
            with_best_evaluation(plant(tmp_path, seed=seed, p_bw=p_bw, fw=fw, bw=bw, unique_tokens=1000), best)
    found = {claim.text[:30]: next(iter(claim.measure(scope(tmp_path)).values()), None) for claim in verdicts.claims(P5) if claim.measure(scope(tmp_path))}
    expected = {"bw is learned better than fw: ": 2.5 / 4, "No cost to fw in the largest m": 3 / 2.5,
                "On repeated text learning bw h": 3 / 2.5, "The same at each run's best ev": 2 / 1.9}  # fmt: skip
    assert {text: np.exp(found[text][0]) for text in expected} == pytest.approx(expected)


def test_a_verdict_is_on_the_logarithm_of_its_threshold():
    assert verdicts.decide(np.log([1.0491, 1.0492, 1.0493]), 1.05, False) == "holds"
    assert verdicts.decide(np.log([1.0507, 1.0508, 1.0509]), 1.05, False) == "does not hold"
    unclear = np.log([1.0, 1.06, 1.11])
    assert verdicts.decide(unclear, 1.05, False) == f"undecided: {stats.seeds_needed([unclear], np.log(1.05))} seeds would decide"


def test_a_cost_with_p_above_5_percent_is_not_a_cost(tmp_path):
    """Three seeds, p = 0.07."""
    for seed, log in enumerate((0.0156, 0.03, 0.0444)):
        plant(tmp_path, seed=seed, fw=2.0), plant(tmp_path, seed=seed, fw=2.0 * np.exp(log), p_bw=0.05)
    (p, _), = compare.corrected(compare.ratio1(load(tmp_path), P5)).values()
    row = verdicts.cost_at_every_size(scope(tmp_path))
    assert 0.06 < p < 0.08 and row.verdict.startswith("undecided") and row.anticausal == "below 1 at 0, above at 0, open at 1 of 1 sizes"


@pytest.mark.parametrize("number, text", [(999, "999"), (57_236, "57.2 k"), (999_499, "999 k"), (999_999, "1 M"), (94_000_000, "94 M"), (999_999_999, "1 G")])
def test_numbers_are_short_across_units(number, text):
    assert report.short(number) == text


def test_losses_that_cannot_be_are_reported(tmp_path):
    plant(tmp_path / "toy", fw=1.4, bw=2.0, floor=1.5)
    assert "under the floor of 1.5" in report.summary(tmp_path / "toy")
    plant(tmp_path / "text", fw=3.0, bw=2.5, p_bw=0.05)
    assert "leak until proven otherwise" in report.summary(tmp_path / "text")


def learner(p_bw, seed, fw, bw, factors=(1.0, 1.0), **settings):
    """A run whose losses are power laws of the tokens of their direction alone, but for planted factors; the first row is before training."""
    tokens = {d: np.linspace(0, 1, 14) * end if np.isscalar(end) else np.array(end, float) for d, end in (("fw", fw), ("bw", bw))}
    losses = {f"{d}_loss": factor * np.maximum(tokens[d], 1.0) ** -0.1 for d, factor in zip(tokens, factors)}
    found = in_memory(p_bw, seed, losses["fw_loss"], step=np.arange(14) * 10, tokens_total=tokens["fw"] + tokens["bw"], tokens_fw=tokens["fw"],
                      tokens_bw=tokens["bw"], seconds=np.arange(14), **losses)  # fmt: skip
    found.settings.update({"warmup_steps": 5} | settings)
    return found


@pytest.fixture
def learners():
    """Two seeds that end at different tokens; at 5 % the bw tokens stand still between backward passes while the loss goes on falling."""
    found = [learner(0.0, seed, 1e6, 0) for seed in (0, 1)] + [learner(1.0, seed, 0, 1.3e6, task="bw") for seed in (0, 1)]
    found += [learner(1.0, 0, 0.5e6, 0.5e6, (1.1, 0.9)), learner(1.0, 1, 0.4e6, 0.4e6, (1.1, 0.9))]
    rare = learner(0.05, 0, 0.8e6, [*np.linspace(0, 0.2e6, 12), 0.2e6, 0.2e6], (1.0, 0.8))
    rare.curve.loc[[11, 12], "bw_loss"] *= 2
    return [*found, rare, learner(0.05, 1, 0.8e6, 0.01e6)]  # too few bw tokens for its control, but for the row before training


@pytest.mark.parametrize("budget", BUDGETS)
def test_each_direction_is_compared_at_equal_tokens_of_its_own(learners, budget):
    study, both = study_of(learners, budget), Variant("fw+bw", 1.0)
    for variant, direction, ratio, points in ((both, "fw", 1.1, [0.5e6, 0.4e6]), (both, "bw", 0.9, [0.5e6, 0.4e6]),
                                              (P5, "fw", 1.0, [0.8e6, 0.8e6]), (P5, "bw", 0.8, [0.2e6])):  # fmt: skip
        (terms,) = against_alone(study, variant, direction).values()
        assert log_ratios(terms) == pytest.approx(np.log([ratio] * len(points)), abs=1e-12)
        assert [meeting_point(term) for term in terms] == points
    assert [compare.steps_at(run, terms[0]) for run in (terms[0].top, terms[0].bottom)] == [130, 20]
    assert against_alone(study, None, "fw") == {} and study_of(learners[:4]).notes == []


def test_the_table_of_own_tokens(learners):
    study = study_of(learners)
    section = _own_tokens(study)
    assert "| 2 x 64 | p_bw = 0.05 | 800 k | 130 / 104 | 1.0000 [1.0000, 1.0000], 2 of 2 | 200 k | 130 / 20 | 0.8000, 1 of 2 |" in section
    assert "| 2 x 64 | p_bw = 1 | 450 k | 130 / 58 | 1.1000 [1.1000, 1.1000], 2 of 2 | 450 k | 130 / 45 | 0.9000 [0.9000, 0.9000], 2 of 2 |" in section
    assert study.notes == [] and _own_tokens(study_of(learners[:4])) == "", "nothing learned both"
    learners[2].settings["warmup_steps"] = 20  # of the bw-only run of seed 0
    assert "2 of 2 |  |  |  |" in _own_tokens(study) and "| 0.9000 [0.9000, 0.9000], 2 of 2 |" in _own_tokens(study)
    for run in learners:
        run.settings["model"] = "gpt2"
    assert _own_tokens(study_of(learners)) == "" and plot_results.own_tokens(study_of(learners)) == []


def test_own_tokens_are_part_of_the_report_and_of_all_figures(tmp_path):
    plant_pairs(tmp_path, (3.0, 3.0), (2.0, 2.0), (0, 1))
    assert plot_results.FIGURES["own_tokens"] is plot_results.own_tokens
    (path,) = plot_results.draw(load(tmp_path), ["own_tokens"])
    text = markdown(load(tmp_path))
    assert "## Each direction at equal tokens of its own" in text
    assert text.index("<details>") < text.index(path.name) < text.index("</details>"), "folded away"


def test_the_figure_of_own_tokens_shows_each_direction_to_whom_learned_it(tmp_path, monkeypatch):
    plant_pairs(tmp_path, (3.0, 3.0), (2.0, 2.0), (0, 1))
    plant(tmp_path, seed=0, width=128)  # nothing learned both there
    plant(tmp_path, seed=0, p_bw=1.0, task="bw")
    unlucky = plant(tmp_path, seed=2, p_bw=0.05)  # no backward pass was drawn
    table = pd.read_csv(unlucky / "curve.csv").assign(tokens_bw=0)
    table.to_csv(unlucky / "curve.csv", index=False)
    shown = []
    monkeypatch.setattr("plot_results._curves_panel", lambda ax, by, column, options, scale, floor, colours: shown.append(
        (column, options.x, scale, options.epochs, {v.label: [*seeds] for v, seeds in by.items()})))  # fmt: skip
    monkeypatch.setattr("plot_results.save", lambda study, figure, group, name, title, caption: (name, [ax.get_xlabel() for ax in figure.axes]))
    axes = ["tokens seen forward", "tokens seen backward"]
    for options, metric, tag in ((plot_results.Options(epochs=(0, 1), budget="steps"), "loss", ""), (plot_results.Options(metric="acc"), "acc", "_acc")):
        shown.clear()
        assert plot_results.own_tokens(load(tmp_path), options) == [(f"own_tokens_2x64{tag}", axes)]
        assert shown == [(f"fw_{metric}", "tokens_fw", "log", None, {"p_bw = 0": [0, 1], "p_bw = 0.05": [0, 1, 2]}),
                         (f"bw_{metric}", "tokens_bw", "log", None, {"p_bw = 0.05": [0, 1], "bw only": [0]})]  # fmt: skip
    plant_pairs(tmp_path / "other", (3.0, 3.0), (2.0, 2.0), (0, 1))
    assert plot_results.own_tokens(load(tmp_path / "other"))[0][1] == axes[:1], "bw has no control there"
