"""What one step of training computes, draws, counts and reports: settings reach what they set, whatever the seed hides.

Seed 100 draws bw at p_bw = 0.5 for each of its first eight micro-batches, so what is drawn is tried over hundreds of them.
"""

import io
import time

import numpy as np
import pytest
import torch
from tiny import corpus, flags  # noqa: F401

import eval_context
import eval_layers
import grid
import merge
import runs
import train
from data.tokens import Tokens, open_tokens, validation_windows
from gradients import total_norm
from model import evaluate, load_model
from recipe import Optimizers, Settings, resolve, share_done

TINY = dict(depth=2, width=32, max_seq_len=32, seq_len=32, batch_tokens=128, micro_batches=1.0, lr=0.01, weight_decay=0.0, epochs=None, steps=9)


def training(corpus, **settings):  # noqa: F811
    return train.Training(resolve(Settings(data=str(corpus), **(TINY | settings))), torch.device("cpu"), torch.float32, False)


def test_every_setting_reaches_what_it_sets(corpus):  # noqa: F811
    more = dict(num_heads=2, linear_value=True, expand=3, qk_div=4, dropout=0.1, optimizer="muon", sampling="random")
    run, other = training(corpus, seed=7, **more), training(corpus, seed=8, **more)
    assert all(getattr(run.model.config, name) == more[name] for name in ("num_heads", "linear_value", "expand", "qk_div", "dropout"))
    assert isinstance(run.optimizer, Optimizers) and run.windows.sampling == "random"
    assert not torch.equal(run.model.head, other.model.head) and (run.windows.next(9, 8) != other.windows.next(9, 8)).any()


def test_a_step_takes_the_mean_gradient_of_its_micro_batches_and_the_sum_of_both_directions(corpus):  # noqa: F811
    run, twin = (training(corpus, micro_batches=2.0, p_bw=1.0) for _ in range(2))
    windows = [torch.from_numpy(twin.windows.next(4, 32)) for _ in range(2)]
    sum(twin.model.loss(some, direction)[0] / 2 for some in windows for direction in ("fw", "bw")).backward()
    run.step(), run.read_figures()
    assert run.progress.grad_norm == pytest.approx(total_norm([p.grad for p in twin.model.parameters()]).item(), rel=1e-5)


def test_schedules_count_steps_from_0_not_micro_batches(corpus):  # noqa: F811
    run = training(corpus, micro_batches=3.0)
    for step in range(3):
        run.step()
        assert {group["name"]: group["lr"] for group in run.optimizer.param_groups} == run.recipe.lr(step)


def test_batch_and_length_are_those_of_the_same_step(corpus):  # noqa: F811
    run = training(corpus, seq_len=None, seq_len_start=8, seq_len_double_every=2)
    for _ in range(4):
        before, step = run.progress.tokens_unique, run.progress.step
        run.step()
        assert run.progress.tokens_unique - before == run.recipe.batch(step) * run.recipe.seq_len(step)


def test_backward_passes_are_drawn_for_every_micro_batch_nested_in_p_bw_and_by_seed(corpus):  # noqa: F811
    def drawn(**settings):
        run, found = training(corpus, **settings), []
        for run.progress.micro_step in range(300):
            found.append("bw" in run.directions())
        return np.array(found)

    few, many = drawn(p_bw=0.2), drawn(p_bw=0.6)
    assert (many >= few).all() and 30 < few.sum() < 90 and 150 < many.sum() < 210
    assert (few != drawn(p_bw=0.2, seed=101)).any()


def test_the_number_of_micro_batches_is_drawn_by_seed(corpus):  # noqa: F811
    counts = [[run.recipe.count(1.5, train.draw(seed, "micro_batches", step)) for step in range(30)] for seed in (1, 2) for run in [training(corpus, seed=seed)]]
    assert counts[0] != counts[1]
    for seed, planned in zip((1, 2), counts):
        run, found = training(corpus, seed=seed, micro_batches=1.5), []
        for _ in range(10):
            before = run.progress.micro_step
            run.step()
            found.append(run.progress.micro_step - before)
        assert found == planned[:10]


def test_backward_passes_are_counted_and_not_guessed_where_a_run_was_begun_before_they_were(corpus, tmp_path):  # noqa: F811
    run = training(corpus, p_bw=1.0, micro_batches=2.0)
    run.step(), run.step()
    assert run.progress.passes_bw == run.evaluate()["passes_bw"] == 4
    state = torch.load(io.BytesIO(run.state()), weights_only=True)
    assert resumed(corpus, tmp_path, state).progress.passes_bw == 4
    del state["progress"]["passes_bw"]
    assert np.isnan(resumed(corpus, tmp_path, state).evaluate()["passes_bw"])


def resumed(corpus, folder, state):  # noqa: F811
    torch.save(state, folder / "state.pt")
    run = training(corpus, p_bw=1.0, micro_batches=2.0)
    run.restore(folder / "state.pt")
    return run


def test_the_mean_over_passes_is_reported_where_a_micro_batch_has_one_direction(corpus):  # noqa: F811
    run = training(corpus, task="fw-or-bw", p_bw=0.2, micro_batches=16.0, lr=0.0)
    run.step(), run.read_figures()
    assert 0 < run.progress.tokens_bw < run.progress.tokens_total and run.progress.train_loss == pytest.approx(np.log(896), abs=0.5)


@pytest.mark.parametrize("shift, p_bw", [(-1000.0, 0.01), (1000.0, 1.0)])
def test_adaptive_p_bw_follows_the_losses_not_the_hits(corpus, monkeypatch, shift, p_bw):  # noqa: F811
    real = train.Training.one_pass
    monkeypatch.setattr(train.Training, "one_pass", lambda self, *a: real(self, *a) + torch.tensor([shift, 0.0]) * (a[1] == "bw"))
    run = training(corpus, task="adaptive", p_bw=1.0)
    run.step()
    assert run.progress.p_bw == p_bw


@pytest.mark.parametrize("budget, share", [({}, 0.0), ({"epochs": 2.0}, 0.25), ({"tokens": 200.0}, 0.25), ({"tokens_fw": 200.0}, 0.2), ({"steps": 5}, 0.6)])
def test_every_budget_has_its_own_measure(budget, share):
    settings = Settings(**({"epochs": None} | budget))
    assert share_done(settings, train_tokens=100, step=3, tokens_total=50, tokens_fw=40) == share


def test_an_epoch_counts_both_directions(corpus):  # noqa: F811
    run = training(corpus, p_bw=1.0)
    run.step()
    assert run.evaluate()["epoch"] == run.progress.tokens_total / len(run.train_tokens) == 2 * 128 / len(run.train_tokens)


def test_a_row_tells_the_smallest_slope_and_tables_from_before_are_read(corpus, tmp_path):  # noqa: F811
    run = training(corpus)
    with torch.no_grad():
        run.model.blocks[1].slope.fill_(-5.0)
    assert run.evaluate()["slope_min"] == pytest.approx(np.log1p(np.exp(-5.0))) and run.model.slopes()[0] == pytest.approx(np.log1p(np.e))
    row = dict.fromkeys(runs.CURVE_COLUMNS, 1.0) | {"fw_ppl": np.e, "bw_ppl": np.e}
    del row["slope_min"]
    runs.write_table(tmp_path / "curve.csv", [row], tuple(name for name in runs.CURVE_COLUMNS if name != "slope_min"))
    assert len(runs.read_table(tmp_path / "curve.csv", runs.CURVE_COLUMNS)) == 1


def test_what_training_reports_is_what_the_scripts_measure_with_any_mask_and_framing(corpus, tmp_path):  # noqa: F811
    """Or flipped models would be evaluated without their leak."""
    train.main(flags(corpus, tmp_path, "--steps 4 --depth 2 --p_bw 0 1 --bw_mask flipped --direction_tokens false --max_seq_len 32"))
    a, b = sorted(path.parent for path in tmp_path.glob("*/config.json"))
    eval_layers.main([str(b), "--device", "cpu"]), eval_context.main([str(b), "--device", "cpu"])
    merge.main([str(a), str(b), "--points", "2", "--device", "cpu"])
    run, model = runs.read_run(b), load_model(b / "model.safetensors")[0]
    val, merged = open_tokens(corpus, "val"), runs.read_table(tmp_path / "merge.csv", runs.MERGE_COLUMNS)
    for direction, mask in (("fw", "causal"), ("bw", "flipped")):
        (truth,) = evaluate(model, validation_windows(val, 32, 8), direction, mask, False)
        whole = run.layers[(run.layers.ablation == "cut") & (run.layers.layers_remaining == 2)]
        documents = runs.read_table(b / "documents.csv", runs.DOCUMENTS_COLUMNS).query("direction == @direction")
        found = [table[f"{direction}_loss"].iloc[-1] for table in (run.curve, whole, merged)]
        found.append((documents.loss * documents.tokens).sum() / documents.tokens.sum())
        assert found == pytest.approx([truth["loss"]] * 4, rel=1e-5), direction


def test_the_alarm_leaves_three_errors_and_the_leaking_mask(corpus, monkeypatch):  # noqa: F811
    run = training(corpus, bw_mask="flipped")
    row = run.evaluate()
    monkeypatch.setattr(Tokens, "floor", (row["fw_loss"] + 0.02, 0.01))
    run.check(row)
    run.check(row | {"bw_loss": 0.1})
    with pytest.raises(runs.RunError, match="the model sees its targets"):
        run.check(row | {"fw_loss": row["fw_loss"] - 0.02})


@pytest.mark.parametrize("write", [train.write_row, train.write_state, train.write_end])
def test_nothing_is_written_by_a_process_that_lost_its_claim(corpus, tmp_path, write):  # noqa: F811
    run = training(corpus)
    run.step(), run.read_figures()
    claim = grid.take(tmp_path)
    claim.path.rename(tmp_path / "claim.7")
    with pytest.raises(grid.LostClaim):
        write(run, tmp_path, claim)
    assert [path.name for path in tmp_path.iterdir()] == ["claim.7"]
    claim.over.set()


def test_the_clock_adds_up_training_and_leaves_evaluations_out(corpus, tmp_path, monkeypatch):  # noqa: F811
    real = train.Training.evaluate
    monkeypatch.setattr(train.Training, "evaluate", lambda self: time.sleep(0.3) or real(self))
    train.main(flags(corpus, tmp_path, "--steps 6"))
    (run,) = runs.read_study(tmp_path)
    assert (np.diff(run.curve.seconds) > 0).all() and run.finished["seconds_in_all"] > run.finished["seconds"] + 0.8


def test_dropout_differs_between_micro_batches_directions_seeds_and_processes(corpus, monkeypatch):  # noqa: F811
    seeds, real = [], torch.manual_seed
    monkeypatch.setattr(train.torch, "manual_seed", lambda seed: seeds.append(seed) or real(seed))
    for seed in (1, 2):
        training(corpus, seed=seed, dropout=0.5, p_bw=1.0, micro_batches=2.0).step()
    assert len(set(seeds)) == 8
    run = training(corpus, dropout=0.5)
    run.group.size = 2
    for run.group.rank in (1, 0):
        run.one_pass(torch.from_numpy(run.windows.next(2, 32)), "fw", 1.0)
    assert seeds[-1] != seeds[-2]


def test_a_run_that_reached_the_cap_stays_marked(corpus):  # noqa: F811
    run = training(corpus, micro_batches=None, max_micro_batches=2)
    for run.progress.micro_batches in (2.0, 1.0):
        run.step()
    assert run.progress.hit_cap
