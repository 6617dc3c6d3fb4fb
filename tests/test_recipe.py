"""The recipe: its numbers at the published size, its schedules as a run follows them, its optimisers."""

import pytest
import torch
from tiny import corpus  # noqa: F401

import train
from model import GPT, GPTConfig
from recipe import Recipe, Settings, draw

N = 46_009_736
SMALL = dict(depth=1, width=16, max_seq_len=32, batch_tokens=128, lr=0.01)


def test_the_recipes_constants():
    recipe = Recipe(Settings(), N)
    assert recipe.base_lr == pytest.approx(2.52587e-3, rel=1e-5)
    assert recipe.decay_base == pytest.approx(7.22228, rel=1e-6)
    assert recipe.batch_tokens == 57_236
    assert [Recipe(Settings(), params).batch_tokens for params in (626_443_808, 20_239_300)] == [18_511, 65_250]
    assert Recipe(Settings(batch_tokens=8, seq_len=32), N).batch(0) == 1
    assert recipe.grad_norm_target(0) == pytest.approx(2.31964e-3, rel=1e-5)
    assert recipe.grad_norm_target(100) == pytest.approx(6.9215e-5, rel=1e-4)


@pytest.mark.parametrize(
    "step, body, head, slopes, length, batch",
    [
        (0, 0.02, 1.0, 1.0, 32, 1788),
        (80, 0.804, 81**-0.2, 0.995**80, 32, 1788),
        (81, 0.8138, 82**-0.2, 0.995**81, 64, 894),
        (99, 0.9902, 100**-0.2, 0.995**99, 64, 894),
        (100, 1.0, 101**-0.2, 0.995**100, 64, 894),
        (400, 301**-0.08, 401**-0.2, 0.995**400, 512, 111),
        (1000, 901**-0.08, 1001**-0.2, 0.995**1000, 1024, 55),
    ],
)
def test_the_recipes_schedules(step, body, head, slopes, length, batch):
    recipe, base = Recipe(Settings(), N), 2.5258669e-3
    expected = {"matrices": base * body, "slopes": 100 * base * slopes, "embedding": 32 * base * body, "head": 2 * base * head}
    assert recipe.lr(step) == pytest.approx(expected, rel=1e-5)
    assert (recipe.seq_len(step), recipe.batch(step)) == (length, batch)


def test_weight_decay_and_micro_batches():
    recipe = Recipe(Settings(), N)
    assert recipe.weight_decay(None) == 16
    assert recipe.weight_decay(3.8) == pytest.approx(16 / 7.22228**3.8, rel=1e-5)
    norm = 2 * recipe.grad_norm_target(400) * N**0.5  # twice the target: half as many more
    assert recipe.grow(4.0, norm, 400) == pytest.approx(6.0)
    assert recipe.grow(0.1, 0.0, 0) == 0.1
    assert recipe.grow(90.0, norm, 400) == 100
    assert [recipe.count(0.1, 0.05), recipe.count(2.3, 0.29), recipe.count(2.3, 0.31), recipe.count(100.0, 0.0)] == [1, 3, 2, 100]


def test_a_loss_of_a_diverging_run_is_survived():
    """It is reported by the run as not finite, or falls again; arithmetic on it must not end a whole grid."""
    recipe = Recipe(Settings(), 46_009_736)
    assert 0 < recipe.weight_decay(1e6) == recipe.weight_decay(400.0) < recipe.weight_decay(300.0)
    assert recipe.weight_decay(3.3) == 16 / recipe.decay_base**3.3


@pytest.mark.parametrize("task", ["fw+bw", "bw", "fw-or-bw"])
def test_weight_decay_follows_the_fw_loss_of_the_step_before_and_is_that_of_the_matrices(corpus, monkeypatch, task):  # noqa: F811
    """Undivided, of the step's last micro-batch with an fw pass, as hlb-gpt has it; bw loss only where the step has none."""
    one_pass, passes, decays = train.Training.one_pass, [], []

    def noted(training, windows, direction, share):
        passes.append((direction, sums := one_pass(training, windows, direction, share)))
        return sums

    monkeypatch.setattr(train.Training, "one_pass", noted)
    if task == "fw-or-bw":
        monkeypatch.setattr(train.Training, "directions", lambda training: (("fw", "bw")[training.progress.micro_step % 2],))
    training = train.Training(Settings(data=str(corpus), task=task, p_bw=1.0, micro_batches=2, **SMALL), torch.device("cpu"), torch.float32, False)
    for _ in range(3):
        training.step()
        groups = {group["name"]: group["weight_decay"] for group in training.optimizer.param_groups}
        decays.append(groups.pop("matrices"))
        assert set(groups.values()) == {0.0}
    losses = [sums[0].item() for direction, sums in passes if direction == task[:2]][task != "fw-or-bw" :: 1 if task == "fw-or-bw" else 2]
    assert decays == [16.0, *(pytest.approx(training.recipe.weight_decay(loss), rel=1e-5) for loss in losses[:2])]


def test_the_number_of_micro_batches_moves_every_fifth_step_by_that_steps_gradient_norm(corpus):  # noqa: F811
    """The step is counted before it is increased: the first one already moves it."""
    training, before = train.Training(Settings(data=str(corpus), **SMALL), torch.device("cpu"), torch.float32, False), 0.1
    for step in range(12):
        training.step()
        if step % 5 == 0:
            before = training.recipe.grow(before, training.progress.grad_norm, step)
        assert training.progress.micro_batches == before
        assert training.evaluate()["seq_len"] == training.recipe.seq_len(step) == 32
    assert before != 0.1


def test_a_row_tells_the_sequence_length_of_its_own_step(corpus):  # noqa: F811
    settings = Settings(data=str(corpus), seq_len_start=8, seq_len_double_every=2, micro_batches=1, **SMALL)
    training = train.Training(settings, torch.device("cpu"), torch.float32, False)
    assert [(training.step(), training.evaluate()["seq_len"])[1] for _ in range(6)] == [8, 8, 8, 16, 16, 32]


def test_every_schedule_can_be_fixed():
    recipe = Recipe(Settings(lr=0.5, warmup_steps=0, lr_decay=0, lr_decay_head=0, lr_decay_slopes=1, weight_decay=0.1, seq_len=64,
                             micro_batches=3, batch_tokens=640), N)  # fmt: skip
    for step in (0, 7, 1000):
        assert recipe.lr(step) == {"matrices": 0.5, "slopes": 50, "embedding": 16, "head": 1}
        assert (recipe.weight_decay(2.0), recipe.seq_len(step), recipe.batch(step)) == (0.1, 64, 10)


def test_every_parameter_is_in_the_group_that_the_recipe_names():
    model = GPT(GPTConfig(depth=2, width=32, vocab_size=896))
    groups = {group["name"]: group for group in train.make_optimizer(model).param_groups}
    sizes = {name: sum(p.numel() for p in group["params"]) for name, group in groups.items()}
    D, V = 32, model.config.vocab_size
    assert sizes == {"matrices": 2 * (136 * D + 2 * D * D), "slopes": 2, "embedding": V * D + 3 * D, "head": V * D}
    assert groups["head"]["betas"] == (0.6, 0.95) and groups["matrices"]["betas"] == (0.9, 0.95) and groups["head"]["eps"] == 1e-9


def test_muon_turns_the_matrices_by_as_much_as_adamw_and_leaves_the_rest_to_it():
    model, twin = (GPT(GPTConfig(2, 32, vocab_size=64)) for _ in range(2))
    optimizer, adamw = train.make_optimizer(model, "muon"), train.make_optimizer(twin)
    assert [group["name"] for group in optimizer.param_groups] == [group["name"] for group in adamw.param_groups]
    before = {name: weights.detach().clone() for name, weights in model.named_parameters()}
    windows = torch.randint(0, 62, (8, 33))
    for net, ours in ((model, optimizer), (twin, adamw)):
        net.loss(windows, "fw")[0].backward()
        for group in ours.param_groups:
            group["lr"], group["weight_decay"] = 0.01, 0.0
        ours.step()
    for (name, weights), other in zip(model.named_parameters(), twin.parameters()):
        change, step = weights.detach() - before[name], other.detach() - before[name]
        if not name.endswith(("expand", "project")):
            assert torch.equal(weights, other), name
            continue
        singular, theirs = (torch.linalg.svdvals(x) for x in (change, step))
        assert singular[29] > singular[0] / 2 and theirs[29] < theirs[0] / 3, name  # as far in every direction, or nearly
        assert (change.norm() / step.norm()).item() == pytest.approx(0.2, rel=0.3), name  # AdamW's first step is its largest
    optimizer.zero_grad()
    assert all(weights.grad is None for weights in model.parameters())


def test_draws_are_nested_in_p_bw_and_independent_between_streams():
    draws = [draw(100, "direction", k) for k in range(4000)]
    assert sum(x < 0.05 for x in draws) == pytest.approx(200, abs=45)
    assert draws != [draw(100, "micro_batches", k) for k in range(4000)] and draws != [draw(101, "direction", k) for k in range(4000)]
