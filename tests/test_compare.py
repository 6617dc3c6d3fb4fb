"""Statistics held against planted truths: coverage of intervals, family-wise errors, budgets, verdicts, the README."""

import csv
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from test_plot_results import P5, plant, plant_pairs

import article
import compare
import measures
import plot_results
import runs
import stats
import verdicts
from cells import Study, load, sort_runs
from compare import bootstrap, bw_against_bw_only, corrected, log_ratios, ratio1, ratio2
from runs import Run
from stats import paired_interval
from study_readme import markdown

SETTINGS = {"depth": 2, "width": 64, "num_heads": 1, "data": "wiki", "bw_mask": "anticausal", "task": "fw+bw"}
NO_LAYERS = pd.DataFrame()


def in_memory(p_bw, seed, losses, params=1e6, **columns):
    """A run that is on no disk: fw losses at evenly spaced steps, 1000 tokens each."""
    steps = np.arange(1, len(losses) + 1)
    table = {"step": steps, "epoch": steps / 10, "tokens_total": 1000 * steps, "fw_loss": losses, "bw_loss": losses} | columns
    curve = pd.DataFrame(np.array([*table.values()], float).T, columns=[*table])  # one block: a tenth of the time
    settings = SETTINGS | {"p_bw": p_bw, "seed": seed}
    config = {"settings": settings, "params": params, "data": {"name": "wiki", "train_tokens": 10_000}}
    return Run(Path(f"{p_bw}_{seed}_{params:g}"), config, curve, NO_LAYERS, {"seconds": 1})


def study_of(found, budget="tokens"):
    study = Study(Path("study"), {}, budget=budget)
    sort_runs(study, found)
    return study


def test_windows_of_training_are_within_it():
    """Ten evaluations to an epoch. Training that ends with its first epoch has no early part; what was asked for must be covered."""
    for evaluations, early in ((8, False), (10, False), (11, True), (20, True)):
        (terms,) = ratio1(study_of([in_memory(p_bw, 0, [3.0] * evaluations) for p_bw in (0.0, 0.05)]), P5).values()
        found = compare.windows(terms)
        end = evaluations / 10
        assert found == ({"early": (0.1, 1.0)} if early else {}) | {"all": (0.1, end), "late": (max(0.1, end / 2), end)}
    assert compare.windows(terms, asked=(0.0, 2.02)) == {"epochs 0 to 2.02": (0.0, 2.02)}, "to within 1 %"
    assert compare.windows(terms, asked=(1.0, 2.03)) == {} == compare.windows(terms, asked=(0.0, 0.19))


# ---------------------------------------------------------------------------------------------------------------------
# Intervals
# ---------------------------------------------------------------------------------------------------------------------


def test_the_paired_interval_covers_a_planted_effect_with_missing_runs():
    """Noise between seeds (10 %) is shared by a pair and must not count; runs are missing at random, pairs with them."""
    rng, truth, covered, draws = np.random.default_rng(0), 1.02, 0, 1000
    for _ in range(draws):
        found = []
        for seed, shared in enumerate(0.1 * rng.standard_normal(5)):
            for p_bw, log_loss in ((0.0, np.log(3.0 * truth)), (0.05, np.log(3.0))):
                if rng.random() > 0.2 or seed < 2:  # two pairs at least
                    end = np.exp(log_loss + shared + 0.01 * rng.standard_normal())
                    found.append(in_memory(p_bw, seed, [2 * end, end]))
        (terms,) = ratio1(study_of(found), P5).values()
        _, low, high = paired_interval(log_ratios(terms))
        covered += low < truth < high
    assert 0.93 <= covered / draws <= 0.97


def test_holm_by_hand_and_over_the_sizes_of_a_study():
    assert stats.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert stats.holm([0.6, np.nan, 0.7]) == pytest.approx([1.0, np.nan, 1.0], nan_ok=True)
    found = []
    for params, effect in ((1e6, 0.05), (2e6, 0.02), (3e6, 0.0)):
        for seed, noise in enumerate((-0.004, 0.0, 0.005)):
            found += [in_memory(0.0, seed, [3.0], params), in_memory(0.05, seed, [3.0 * np.exp(effect + noise)], params)]
    ratios = ratio1(study_of(found), P5)
    alone = [float(stats.paired_p(log_ratios(terms))) for terms in ratios.values()]
    assert [p for p, _ in corrected(ratios).values()] == pytest.approx([3 * alone[0], 2 * alone[1], alone[2]])
    assert {sizes for _, sizes in corrected(ratios).values()} == {3}


def test_the_bootstrap_reads_both_runs_of_a_pair_by_document(tmp_path):
    plant_pairs(tmp_path, (3.0, 3.0), (2.9, 2.9), (0, 1))
    (terms,) = ratio1(load(tmp_path), P5).values()
    assert bootstrap(terms[0]) is None
    for run, losses in ((terms[0].top, (3, 1, 2)), (terms[0].bottom, (2, 1, 1))):
        rows = [{"direction": d, "document": k, "tokens": 10 * (k + 1), "loss": x + (d == "bw")} for d in ("bw", "fw") for k, x in enumerate(losses)]
        pd.DataFrame(rows).sample(frac=1, random_state=int(losses[0])).to_csv(run.folder / "documents.csv", index=False)
    ratio, low, high = bootstrap(terms[0])
    assert ratio == pytest.approx((10 * 3 + 20 * 1 + 30 * 2) / (10 * 2 + 20 * 1 + 30 * 1)) and (low, high) == (1.0, 2.0)
    (twos,) = ratio2(load(tmp_path), P5).values()
    assert bootstrap(twos[0])[0] == pytest.approx(70 / (70 + 60)) and bootstrap(twos[1]) is None
    assert "resampled, one pair each: seed 0 1.571 [1.000, 2.000]" in plot_results.summary(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Budgets and pairing
# ---------------------------------------------------------------------------------------------------------------------


def test_a_loss_that_depends_on_forward_tokens_alone_is_equal_at_equal_forward_tokens():
    def run(p_bw, evaluations, share):
        total = np.linspace(0.1, 1, evaluations) * 1e6
        return in_memory(p_bw, 0, (share * total) ** -0.5, tokens_total=total, tokens_fw=share * total, seconds=total)

    found = [run(0.0, 13, 1.0), run(0.05, 8, 0.8)]
    for budget, log_ratio in (("tokens_fw", 0.0), ("tokens", 0.5 * np.log(0.8)), ("seconds", 0.5 * np.log(0.8)), ("steps", None)):
        (terms,) = ratio1(study_of(found, budget), P5).values()
        if budget == "steps":  # the eighth evaluation of thirteen against the last of eight
            log_ratio = -0.5 * np.log((0.1 + 0.9 * 7 / 12) / 0.8)
        assert log_ratios(terms) == pytest.approx([log_ratio], abs=1e-12), budget


def test_repeated_text_is_compared_on_the_budget_asked_for(tmp_path, monkeypatch):
    """p_bw = 1 reads half the text: at equal forward tokens its partner counts halfway through, not at its end."""
    for seed in (0, 1):
        plant(tmp_path, seed=seed, fw=2.0, unique_tokens=125_000)
        plant(tmp_path, seed=seed, fw=3.0, p_bw=1.0, unique_tokens=125_000)
    plant_pairs(tmp_path, (2.0, 2.0), (2.0, 2.0), (0, 1))
    drawn = {}

    def panel(ax, lines, value, title, colours):
        drawn[title] = {variant.p_bw: [value(run) for run in points[-1]] for (variant, _), points in lines.items()}

    monkeypatch.setattr("plot_tradeoff._repeats_panel", panel)
    for budget, at_p_bw_0 in (("tokens", 2.0), ("tokens_fw", 3.0), ("seconds", 2.0)):
        drawn.clear()
        (path,) = plot_results.repeats(load(tmp_path), plot_results.Options(budget=budget))
        where, best = drawn
        assert drawn[where][0.0] == pytest.approx([at_p_bw_0] * 2, rel=1e-3) and drawn[where][1.0] == pytest.approx([3.0, 3.0])
        assert drawn[best][0.0] == [2.0, 2.0] and ("equal" in where) == (budget != "tokens") == (budget in path.stem)


def test_nothing_is_extrapolated_to_a_common_end():
    late = in_memory(0.0, 0, [2.0, 1.0], tokens_total=[5e6, 6e6])
    study = study_of([late, in_memory(0.05, 0, [3.0, 2.0])])
    assert ratio1(study, P5) == {} and any("never at equal tokens_total" in note for note in study.notes)


def test_runs_of_two_optimisers_never_meet_in_a_pair(tmp_path):
    plant_pairs(tmp_path, (3.0, 3.0), (2.0, 2.0), (0, 1))  # from before there was a choice
    plant_pairs(tmp_path, (3.0, 3.0), (2.5, 2.5), (0, 1), optimizer="muon")
    ratios = {cell.group.extras: np.exp(log_ratios(terms)) for cell, terms in ratio1(load(tmp_path), P5).items()}
    assert ratios == {(("optimizer", "adamw"),): pytest.approx(1.5), (("optimizer", "muon"),): pytest.approx(1.2)}


def test_new_settings_never_meet_in_a_pair(tmp_path):
    """Runs of one seed and p_bw that differ in an unknown setting, in unique tokens or dropout are other models."""
    plant_pairs(tmp_path, (3.0, 3.0), (2.0, 2.0), (0, 1))
    plant_pairs(tmp_path, (3.0, 3.0), (2.5, 2.5), (0, 1), unique_tokens=1000)
    plant_pairs(tmp_path, (3.0, 3.0), (2.4, 2.4), (0, 1), unique_tokens=1000, dropout=0.1)
    plant(tmp_path, seed=2, fw=9.0, unique_tokens=None, dropout=0.0, optimizer="adamw")  # as newer runs say what older ones did
    plant(tmp_path, seed=2, fw=6.0, p_bw=0.05)
    study = load(tmp_path)
    (terms,) = ratio1(study, P5).values()
    assert [term.seed for term in terms] == [0, 1, 2] and np.exp(log_ratios(terms)) == pytest.approx(1.5)
    assert [(c.group.unique_tokens, c.group.dropout) for c in study.limited] == [(1000, 0.0), (1000, 0.1)]
    measured = measures.on_repeated_text(False)(measures.Scope(study, P5, study.groups[0]))
    assert [np.exp(values) for values in measured.values()] == [pytest.approx(1.2)]  # without the dropout runs
    plant(tmp_path, seed=3, colour="red")
    plant(tmp_path, seed=3, p_bw=0.05, colour="blue")
    assert all(term.seed != 3 for terms in ratio1(load(tmp_path), P5).values() for term in terms)


def test_a_study_of_repeated_text_alone_is_compared_as_any_other(tmp_path):
    plant_pairs(tmp_path, (3.0, 3.0), (2.0, 2.0), (0, 1), unique_tokens=1000.0)  # as train.py writes it
    study = load(tmp_path)
    assert len(ratio1(study, P5)) == 1 and study.heading(study.groups[0]) == "wiki, 1,000 unique tokens"
    row = rows_of(tmp_path)["On repeated text learning bw helps fw"]
    assert row.anticausal == "1.500 (2 x 64, 12 epochs, n = 2)" and row.verdict.startswith("undecided")
    assert "1,000 unique tokens" in markdown(study) and "| 2 x 64 | anticausal | 1,000 | 12 | 0 | p_bw = 0.05 | 2 |" in markdown(study)


def test_limited_runs_that_differ_in_dropout_get_tables_of_their_own(tmp_path):
    """All of them are limited, and only one kind has models in both directions: the others have nothing to say about those."""
    plant(tmp_path, dropout=0.1)
    plant_pairs(tmp_path, (3.0,), (2.0,), (0,), dropout=0.2)
    plant(tmp_path, task="bw", p_bw=1.0, bw=5.0, dropout=0.2)
    none, some = verdicts.verdicts(load(tmp_path)).values()
    assert [rows[4].anticausal for rows in (none, some)] == ["not in this study", "1.200 (2 x 64, n = 1); 0.0 % of the way from p_bw = 0 to bw only"]


@pytest.mark.parametrize("crossed", ({"bw_mask": "flipped"}, {"dropout": 0.1}))
def test_a_setting_that_differs_only_across_masks_or_dropout_keeps_them_apart(tmp_path, crossed):
    plant_pairs(tmp_path, (3.0, 3.0), (2.0, 2.0), (0, 1))
    for seed in (0, 1):
        plant(tmp_path, seed=seed, fw=1.5, p_bw=0.05 * ("bw_mask" in crossed), lr=0.0001, **crossed)
    study = load(tmp_path)
    assert {cell.group.extras for cell in study.cells | study.limited} == {(("lr", "0.01"),), (("lr", "0.0001"),)}
    assert [cell.group.bw_mask for cell in ratio1(study, P5)] == ["anticausal"]
    assert measures.dropout_instead(measures.Scope(study, P5, study.groups[-1])) == {}


def test_the_flipped_mask_borrows_the_forward_model_for_forward_losses_only(tmp_path):
    plant_pairs(tmp_path, (3.0, 3.0), (2.0, 2.0), (0, 1))
    plant(tmp_path, seed=1, fw=1.5, p_bw=0.05, bw_mask="flipped")
    study = load(tmp_path)
    flipped = [terms for cell, terms in ratio1(study, P5).items() if cell.group.bw_mask == "flipped"]
    assert [np.exp(log_ratios(terms)) for terms in flipped] == [pytest.approx(2.0)]
    assert len(ratio1(study, P5, direction="bw")) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Verdicts and the README
# ---------------------------------------------------------------------------------------------------------------------


def test_dtypes_are_never_mixed_under_auto(tmp_path):
    """On two hosts `auto` may be two dtypes; older runs tell theirs in the words for their device only."""
    for seed, (dtype, words) in enumerate((("bfloat16", ""), (None, "2 CPU threads, float32 (the machine multiplies bf16 slowly), compile off"))):
        for p_bw in (0.0, 0.05):
            config = plant(tmp_path, seed=seed, p_bw=p_bw, dtype="auto") / "config.json"
            content = json.loads(config.read_text()) | ({"dtype": dtype} if dtype else {}) | {"device": words}
            config.write_text(json.dumps(content))
    assert [cell.group.extras for cell in load(tmp_path).cells] == [(("dtype", "bfloat16"),), (("dtype", "float32"),)]


def test_a_verdict_needs_three_seeds_and_an_interval_on_one_side():
    logs = np.log([1.10, 1.11, 1.12])
    assert verdicts.decide(logs, 1.0, above=True) == "holds" and verdicts.decide(logs, 1.0, above=False) == "does not hold"
    assert verdicts.decide(logs[:2], 1.0, above=True).startswith("undecided: 2 seeds, 3 are")
    unclear = np.log([0.9, 1.2, 1.1])
    assert verdicts.decide(unclear, 1.0, above=True) == f"undecided: {stats.seeds_needed([unclear], 0)} seeds would decide"


def rows_of(folder):
    study = load(folder)
    (rows,) = verdicts.verdicts(study).values()
    return {row.claim.split(":")[0]: row for row in rows}


def test_five_per_cent_is_judged_with_control_passes_and_seeds_only(tmp_path):
    seeds, claim = (0, 1, 2), "p_bw = 0.05 is enough to learn bw"
    for seed in seeds:
        plant(tmp_path, seed=seed, fw=3.0, bw=9.0, batch_tokens=1000)
        plant(tmp_path, seed=seed, fw=3.0, bw=4.0 + 0.01 * seed, p_bw=0.05, batch_tokens=1000)
    assert rows_of(tmp_path)[claim].verdict == "not in this study"
    for seed in seeds:
        plant(tmp_path, seed=seed, fw=12.0, bw=3.0 - 0.02 * seed, task="bw", p_bw=1.0, batch_tokens=1000)
    row = rows_of(tmp_path)[claim]
    assert row.verdict == "does not hold" and "571 bw passes" in row.anticausal and "% of the way" in row.anticausal
    assert row.interval.startswith("[1.3") and row.flipped == "not in this study"
    assert rows_of(tmp_path)["fw pays at every size"].verdict.startswith("undecided")  # no difference, no spread
    (terms,) = bw_against_bw_only(load(tmp_path), P5).values()
    assert np.exp(log_ratios(terms)) == pytest.approx([(4 + 0.01 * s) / (3 - 0.02 * s) for s in seeds])
    for path in tmp_path.glob("*/config.json"):
        path.write_text(path.read_text().replace('"batch_tokens": 1000', '"batch_tokens": null'))
    assert "passes is not known" in rows_of(tmp_path)[claim].verdict
    for path in tmp_path.glob("*/curve.csv"):
        pd.read_csv(path).assign(passes_bw=77).to_csv(path, index=False)
    row = rows_of(tmp_path)[claim]
    assert row.verdict == "does not hold" and "; 77 bw passes;" in row.anticausal


def test_verdicts_over_sizes_and_training(tmp_path):
    """Planted: ratio 1 is 0.9 and 0.95 and 0.98, growing with size; it recovers in training; the published mask leaks."""
    rng = np.random.default_rng(3)
    for width, ratio in ((64, 0.9), (128, 0.95), (256, 0.98)):
        for seed in range(3):
            fw, noise = 3.0 + 0.1 * rng.standard_normal(), np.exp(0.001 * rng.standard_normal(3))
            plant(tmp_path, width=width, seed=seed, fw=fw, decay=1.0, floor=1.0)
            plant(tmp_path, width=width, seed=seed, fw=fw / ratio * noise[0], bw=3.5 * noise[1], p_bw=0.05, decay=1.3, floor=1.0)
            plant(tmp_path, width=width, seed=seed, fw=fw, bw=0.1 * noise[2], p_bw=0.05, bw_mask="flipped", floor=1.0)
    rows = rows_of(tmp_path)
    assert rows["fw pays at every size"].verdict == "holds" and "below 1 at 3, above at 0" in rows["fw pays at every size"].anticausal
    leak = rows["The published mask shows the model its targets"]
    assert leak.verdict == "holds: 3 of 3 runs below" and leak.anticausal.endswith("(2 x 256, p_bw = 0.05, n = 3)")
    assert rows["bw is learned better than fw"].verdict == "does not hold" and "2 x 256, n = 3" in rows["bw is learned better than fw"].anticausal
    assert rows["No cost to fw in the largest model"].verdict == "does not hold"
    assert rows["The cost shrinks with size"].verdict == "holds" and rows["Dip, then recovery with training"].verdict == "holds"
    narrow = rows["Cut to half, a narrow two-direction model gains on fw only"]
    assert "2 x 64" in narrow.anticausal
    assert " times that of the right mask" in rows["bw is learned better than fw"].flipped
    absent = [claim for claim, row in rows.items() if row.verdict == "not in this study"]
    assert any("On repeated text" in claim for claim in absent) and any("barrier" in claim for claim in absent)


def test_one_run_below_the_entropy_proves_the_leak_and_a_mean_above_it_does_not_refute_it(tmp_path):
    claim = "The published mask shows the model its targets"
    for seed, bw in enumerate((0.99, 3.0, 5.0)):  # the first within three errors of the entropy, 1 +- 0.01
        plant(tmp_path, seed=seed, fw=3.0, bw=bw, p_bw=0.05, bw_mask="flipped", floor=1.0)
        plant(tmp_path, seed=seed, fw=3.0, bw=4.0, p_bw=0.05, floor=1.0)
    assert "holds" not in rows_of(tmp_path)[claim].verdict.replace("not hold", "")
    plant(tmp_path, seed=3, fw=3.0, bw=0.5, p_bw=0.05, bw_mask="flipped", floor=1.0)
    plant(tmp_path, seed=3, fw=3.0, bw=4.0, p_bw=0.05, floor=1.0)
    rows = rows_of(tmp_path)
    assert rows[claim].verdict == "holds: 1 of 4 runs below"
    ratio = np.exp(np.mean(np.log([4 / 0.99, 4 / 3, 4 / 5, 4 / 0.5])))  # same fw: ratio 2 differs as the bw losses do
    assert f"{ratio:.2f} [" in rows["bw is learned better than fw"].flipped


def test_verdicts_on_layers_context_and_merging(tmp_path):
    """Planted cuts: with k of 4 blocks ratio 2 is 0.5 sqrt(1.2 (4 - k)); ratio 1 of the perplexity falls with blocks."""
    for seed in range(3):
        a = plant(tmp_path, depth=4, seed=seed, fw=2.0)
        b = plant(tmp_path, depth=4, seed=seed, fw=2.2 + 0.01 * seed, bw=4.0 - 0.01 * seed, p_bw=0.05)
        c = plant(tmp_path, depth=4, seed=seed, fw=9.0, bw=2.1, task="bw", p_bw=1.0)
        for folder, direction, gap in ((a, "fw", 1.0), (c, "bw", 1.01 + 0.001 * seed)):
            rows = [{"direction": direction, "context": n, "tokens": 100, "loss": 3 * gap**k} for k, n in enumerate((16, 64, 256))]
            pd.DataFrame(rows).sample(frac=1, random_state=seed).to_csv(folder / "context.csv", index=False)
        line = [{"run_a": b.name, "run_b": a.name, "weight": w, "fw_loss": 2.0 * (1 + 0.3 * w * (1 - w) + 0.001 * seed)} for w in (0, 0.5, 1)]
        merge = pd.DataFrame(line, columns=runs.MERGE_COLUMNS)
        merge.to_csv(tmp_path / "merge.csv", mode="a", header=seed == 0, index=False)
    study = load(tmp_path)
    scope = measures.Scope(study, P5, study.groups[0])
    (growth,), (barrier,), (cuts,) = (f(scope).values() for f in (measures.gap_growth_with_context, measures.barrier, measures.whole_over_one_layer))
    assert np.exp(growth) == pytest.approx([1.01**2, 1.011**2, 1.012**2])
    assert barrier == pytest.approx(np.log(1 + 0.075 / (1 + 0.001 * np.arange(3))))
    assert np.exp(cuts) == pytest.approx(1.6**-0.5)
    rows = rows_of(tmp_path)
    assert rows["The gap grows with context"].verdict == "holds" == rows["Separate models find bw harder"].verdict
    assert next(row for claim, row in rows.items() if claim.startswith("No barrier")).verdict == "does not hold"
    merged = pd.read_csv(tmp_path / "merge.csv")
    merged.loc[merged["run_a"].str.contains("seed0"), "run_b"] = merged["run_b"].iloc[-1]  # of two seeds: no pair
    merged.to_csv(tmp_path / "merge.csv", index=False)
    assert len(*measures.barrier(scope).values()) == 2
    for path in tmp_path.glob("*/context.csv"):  # measured on some windows only: said so, and other texts never count
        path.rename(path.with_name("context_64windows.csv"))
    for path in tmp_path.glob("*seed0/context_64windows.csv"):
        (path.with_name("context_8windows.csv")).write_text(path.read_text())
        (path.with_name("context_elsewhere_99windows.csv")).write_text(path.read_text())
    row = rows_of(tmp_path)["The gap grows with context"]
    assert row.verdict == "holds" and row.anticausal.endswith("(4 x 64, 64 windows, n = 3)")


def test_the_readme_keeps_what_stands_around_the_report(tmp_path, capsys):
    plant_pairs(tmp_path, (3.0, 3.1, 3.2), (2.9, 3.0, 3.1), bw=3.3)
    plant_pairs(tmp_path, (3.3, 3.4), (3.2, 3.4), (0, 1), unique_tokens=125_000)
    plot_results.main([str(tmp_path), "--report"])
    readme = tmp_path / "README.md"
    assert capsys.readouterr().out.strip() == str(readme)
    first = readme.read_text()
    for heading in ("Verdicts", "Losses and ratios", "Ratio 1 at equal budgets", "Ratio 1 over training", "Repeated text", "How it was made"):
        assert f"## {heading}\n" in first, heading
    assert "| 2 x 64 | anticausal | 125 k | 12 | 0 | p_bw = 0 | 2 |" in first
    readme.write_text(first.replace("# " + tmp_path.name, "# My study\n\nBy hand.", 1) + "\nAlso by hand.\n")
    plot_results.main([str(tmp_path), "--report"])
    second = readme.read_text()
    assert second.startswith("# My study\n\nBy hand.") and second.endswith("Also by hand.\n") and second.count("## Verdicts") == 1
    readme.write_text(second.replace("<!-- end of report -->", ""))
    with pytest.raises(SystemExit, match="lost one of the marks"):
        plot_results.main([str(tmp_path), "--report"])


@pytest.mark.skipif(not (ROOT.parent / "shared" / "article").is_dir(), reason="the transcribed numbers are not beside the project")
def test_the_articles_numbers_are_those_that_were_transcribed():
    def table(name):
        with open(ROOT.parent / "shared" / "article" / name) as file:
            return list(csv.DictReader(file))

    medians = {(r["epoch_start"], r["epoch_stop"], float(r["value"])): float(r["median"])
               for r in table("ratio1_violin_medians.csv") if r["group"] == "params_millions"}  # fmt: skip
    ratios = [{(int(r["depth"]), int(r["width"]), int(r["layers_remaining"])): float(r["ratio"]) for r in table(f"{name}.csv")
               if r["order"] == "ratio_then_mean"} for name in ("ratio1_layers", "ratio2_layers")]  # fmt: skip
    assert len(article.SIZES) == 16
    for size in article.SIZES:
        assert (size.all, size.early, size.late) == tuple(medians[window + (size.params,)] for window in (("0", ""), ("0", "1"), ("5", "")))
        here = (size.depth, size.width)
        assert (size.ratio1_ppl, size.ratio1_ppl_half) == (ratios[0][(*here, size.depth)], ratios[0][(*here, size.depth // 2)]), size
        assert (size.ratio2, size.ratio2_one) == (ratios[1][(*here, size.depth)], ratios[1][(*here, 1)]), size
    losses = {(r["depth"], r["p_bw"], r["direction"], float(r["epoch"])): float(r["val_loss"]) for r in table("curves.csv")}
    for epoch, ours in article.LOSSES_8X384.items():
        assert ours == tuple(losses["8", p, d, epoch] for p, d in (("0.0", "fw"), ("0.05", "fw"), ("0.05", "bw")))
    assert article.BW_LOSS_32X1536 == min(loss for (depth, p, d, _), loss in losses.items() if (depth, p, d) == ("32", "0.05", "bw"))


def test_what_is_ones_own_is_drawn_and_called_by_its_name(tmp_path):
    """A task, a backward mask and a setting that this version does not know: a hacker's runs."""
    for seed in (0, 1):
        for p_bw, cosine in ((0.2, None), (0.4, None), (0.2, 5)):
            plant(tmp_path, seed=seed, fw=3 + 0.1 * seed, p_bw=p_bw, task="bw+fw", bw_mask="near", cosine=cosine)
    study = load(tmp_path)
    assert [study.heading(group) for group in study.groups] == ["wiki, near, cosine = 5", "wiki, near, cosine = none"]
    (path,) = plot_results.pareto(study)
    assert "near" in path.name and not any("leak" in name for name in (path.name, *study.notes))
