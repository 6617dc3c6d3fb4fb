"""Ablations: equal to models really cut, one pass for all cuts, nothing changed, and the script as a user runs it."""

import copy

import pytest
import torch
from torch import nn

import eval_layers
import runs
import train
from data.tokens import open_tokens, validation_windows
from data.toyworld import write_corpus
from model import GPT, GPTConfig, evaluate, frame


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "toyworld"
    write_corpus(folder, people=20, towns=5, train_tokens=5_000, val_tokens=1_000)
    return folder


def make(val) -> GPT:
    model = GPT(GPTConfig(depth=4, width=32, vocab_size=896, max_seq_len=32), seed=1)
    with torch.no_grad():
        model.embedding.mul_(20)
        for block in model.blocks:
            block.project.mul_(10)
    return model


def full_logits_loss(model, windows, direction, mask):
    """Summed loss and count of a batch, by a second path: full logits of a model with as many blocks as it has left."""
    inputs, targets = frame(torch.as_tensor(windows), direction, 896)
    x = model.embed(inputs)
    for block in model.blocks:
        x = block(x, mask)
    logits = model.norm(x) @ model.head.T
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item(), targets.numel()


@pytest.mark.parametrize("ablation", ["cut", "drop"])
@pytest.mark.parametrize("bw_mask", ["anticausal", "flipped"])
def test_equal_to_a_model_that_is_really_cut(corpus, ablation, bw_mask):
    val = open_tokens(corpus, "val")
    model = make(val)
    before = {name: weights.clone() for name, weights in model.state_dict().items()}
    rows = eval_layers.ablate(model, val, ablation, bw_mask)
    assert [row["layers_remaining"] for row in rows] == ([4, 3, 2, 1] if ablation == "cut" else [3] * 4)
    for row in rows:
        small = copy.deepcopy(model)
        keep = range(row["layers_remaining"]) if ablation == "cut" else [k for k in range(4) if k != row["layer"]]
        small.blocks = nn.ModuleList(small.blocks[k] for k in keep)
        for direction, mask in (("fw", "causal"), ("bw", bw_mask)):
            sums = [full_logits_loss(small, windows, direction, mask) for windows in validation_windows(val, 32, 8)]
            loss = sum(total for total, _ in sums) / sum(count for _, count in sums)
            assert row[f"{direction}_loss"] == pytest.approx(loss, rel=1e-5)
    assert all(torch.equal(weights, model.state_dict()[name]) for name, weights in before.items())


def test_all_cuts_take_one_pass_through_the_blocks(corpus):
    val = open_tokens(corpus, "val")
    model, calls = make(val), []
    for block in model.blocks:
        block.register_forward_hook(lambda *_: calls.append(1))
    evaluate(model, validation_windows(val, 32, 8), "fw")
    plain = len(calls)
    eval_layers.ablate(model, val, "cut", batch_tokens=32 * 8)
    assert len(calls) - plain == 2 * plain  # once forward, once backward


def test_the_script_measures_a_study_once(corpus, tmp_path, capsys):
    base = f"--data {corpus} --study {tmp_path} --depth 3 --width 32 --max_seq_len 32 --batch_tokens 256 --micro_batches 1 --steps 2 --device cpu"
    train.main([*base.split(), *"--p_bw 0 0.5".split()])
    runs_found = sorted(path.parent for path in tmp_path.glob("*/config.json"))
    (runs_found[0] / "finished.json").unlink()
    eval_layers.main([str(tmp_path), "--device", "cpu"])
    assert f"{runs_found[0]}: unfinished, left out" in "".join(capsys.readouterr())
    run = runs.read_run(runs_found[1])
    assert runs.read_run(runs_found[0]).layers.empty
    assert list(run.layers.ablation) == ["cut"] * 3 + ["drop"] * 3
    full = run.layers.iloc[0]
    assert full.layers_remaining == 3 and full.fw_loss == pytest.approx(run.curve.iloc[-1].fw_loss, abs=1e-3)
    before = (run.folder / "layers.csv").read_bytes()
    eval_layers.main([str(run.folder), "--device", "cpu"])
    eval_layers.main([str(run.folder), "--device", "cpu", "--again", "--ablations", "cut"])
    assert sorted((run.folder / "layers.csv").read_bytes().splitlines()) == sorted(before.splitlines())


def test_other_validation_tokens_and_missing_weights_are_named(corpus, tmp_path):
    base = f"--data {corpus} --study {tmp_path} --depth 1 --width 32 --max_seq_len 32 --batch_tokens 256 --micro_batches 1 --steps 1 --device cpu"
    train.main(base.split())
    (folder,) = (path.parent for path in tmp_path.glob("*/config.json"))
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(SystemExit, match="model.safetensors is not a model"):
        eval_layers.main([str(folder)])
    with pytest.raises(SystemExit, match="holds no runs"):
        eval_layers.main([str(corpus)])
    write_corpus(corpus.parent / "other", people=21, towns=5, train_tokens=5_000, val_tokens=1_000)
    config = (folder / "config.json").read_text().replace(f'"{corpus}"', f'"{corpus.parent / "other"}"')
    (folder / "config.json").write_text(config)
    with pytest.raises(SystemExit, match="other validation tokens"):
        eval_layers.main([str(folder)])
