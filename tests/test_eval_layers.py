"""Ablations: equal to models really cut, no work done twice, planted identities, and the script as a user runs it."""

import copy
import functools
import math

import pandas as pd
import pytest
import torch
from torch import nn

import eval_layers
import runs
import train
from data.tokens import open_tokens, validation_windows
from data.toyworld import write_corpus
from model import GPT, GPTConfig, evaluate, frame

ALL = list(eval_layers.ABLATIONS)


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


@pytest.mark.parametrize("bw_mask", ["anticausal", "flipped"])
def test_equal_to_a_model_that_is_really_cut(corpus, bw_mask):
    val = open_tokens(corpus, "val")
    model = make(val)
    before = {name: weights.clone() for name, weights in model.state_dict().items()}
    rows = eval_layers.ablate(model, val, ALL, bw_mask)
    left = {kind: [row["layers_remaining"] for row in rows if row["ablation"] == kind] for kind in ALL}
    assert left == {"cut": [4, 3, 2, 1], "drop": [3] * 4, "block": [2] * 3 + [1] * 2}
    for row in rows:
        small = copy.deepcopy(model)
        gone = range(row["layers_remaining"], 4) if row["ablation"] == "cut" else range(row["layer"], row["layer"] + 4 - row["layers_remaining"])
        small.blocks = nn.ModuleList(small.blocks[k] for k in range(4) if k not in gone)
        for direction, mask in (("fw", "causal"), ("bw", bw_mask)):
            sums = [full_logits_loss(small, windows, direction, mask) for windows in validation_windows(val, 32, 8)]
            loss = sum(total for total, _ in sums) / sum(count for _, count in sums)
            assert row[f"{direction}_loss"] == pytest.approx(loss, rel=1e-5)
            assert row["tokens"] == sum(count for _, count in sums)
    assert all(torch.equal(weights, model.state_dict()[name]) for name, weights in before.items())


@pytest.mark.parametrize("ablations, times_a_pass, models", [(["cut"], 1, 4), (ALL, 1 + (3 + 2 + 1 + 2 + 1 + 1) / 4, 10)])
def test_no_layer_is_computed_twice(corpus, ablations, times_a_pass, models):
    """Behind the shared states, every (first layer left out, next layer kept) runs its own remaining layers, and the
    last layer left out is the model that was cut there: 10 models, not 4 + 4 + 5."""
    val = open_tokens(corpus, "val")
    model, calls, heads = make(val), [], []
    for block in model.blocks:
        block.register_forward_hook(lambda *_: calls.append(1))
    evaluate(model, validation_windows(val, 32, 8), "fw")
    plain = len(calls)
    score = model.score
    model.score = lambda *arguments: heads.append(1) or score(*arguments)
    eval_layers.ablate(model, val, ablations, batch_tokens=32 * 8)
    assert len(calls) - plain == 2 * times_a_pass * plain  # forward and backward
    assert len(heads) == 2 * models * plain / 4


def test_a_layer_that_does_nothing_has_no_influence_and_is_not_missed(corpus):
    val = open_tokens(corpus, "val")
    model = make(val)
    with torch.no_grad():
        model.blocks[2].project.zero_()
    found = {"fw": eval_layers.Similarity(), "bw": eval_layers.Similarity()}
    rows = eval_layers.ablate(model, val, ALL, similarities=found)
    whole = rows[0]
    dropped = {row["layer"]: row for row in rows if row["ablation"] == "drop"}
    for direction, similarity in found.items():
        table = {(row["block_size"], row["layer"]): row for row in similarity.rows(direction)}
        assert len(table) == 10 and {row["tokens"] for row in table.values()} == {len(val) - 1}
        assert dropped[2][f"{direction}_loss"] == whole[f"{direction}_loss"] != dropped[1][f"{direction}_loss"]
        assert table[1, 2]["block_influence"] == pytest.approx(0, abs=1e-12) and table[1, 2]["angular_distance"] == pytest.approx(0, abs=1e-7)
        assert table[1, 1]["block_influence"] > 1e-3 and table[1, 1]["angular_distance"] > 0.01
        assert table[2, 1]["angular_distance"] == pytest.approx(table[1, 1]["angular_distance"], rel=1e-9)  # the identity adds nothing


def test_angles_and_influence_of_known_states():
    """Quarter turns, an eighth of a turn, and the reverse; over batches and chunks of unequal size."""
    similarity = eval_layers.Similarity()
    similarity.CHUNK = 4
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0])
    for count in (3, 2):
        similarity.add([x.expand(1, count, 2) for x in (a, b, 2 * (a + b / 3), -a)])
    rows = {(row["layer"], row["block_size"]): row for row in similarity.rows("fw")}
    half = math.sqrt(0.5)
    expected = {(0, 1): (0.5, 0), (1, 1): (0.25, half), (2, 1): (0.75, -half), (0, 2): (0.25, half), (1, 2): (0.5, 0), (0, 3): (1, -1)}
    for place, (angle, cosine) in expected.items():
        assert rows[place]["angular_distance"] == pytest.approx(angle) and rows[place]["block_influence"] == pytest.approx(1 - cosine)
        assert rows[place]["tokens"] == 5


def study_of(corpus, tmp_path, more):
    base = f"--data {corpus} --study {tmp_path} --width 32 --max_seq_len 32 --batch_tokens 256 --micro_batches 1 --steps 2 --device cpu"
    train.main([*base.split(), *more.split()])
    return sorted(path.parent for path in tmp_path.glob("*/config.json"))


def test_the_script_measures_a_study_once(corpus, tmp_path, capsys):
    first, second = study_of(corpus, tmp_path, "--depth 3 --p_bw 0 0.5")
    (first / "finished.json").unlink()
    eval_layers.main([str(tmp_path), "--device", "cpu", "--ablations", "cut", "drop"])
    assert f"{first}: unfinished, left out" in "".join(capsys.readouterr())
    run = runs.read_run(second)
    assert runs.read_run(first).layers.empty
    assert list(run.layers.ablation) == ["cut"] * 3 + ["drop"] * 3
    full = run.layers.iloc[0]
    assert full.layers_remaining == 3 and full.fw_loss == pytest.approx(run.curve.iloc[-1].fw_loss, abs=1e-3)
    old = (run.folder / "layers.csv").read_text().splitlines()
    eval_layers.main([str(run.folder), "--device", "cpu"])
    assert (run.folder / "layers.csv").read_text().splitlines()[:7] == old, "what was there is kept as it was"
    assert list(runs.read_run(second).layers.ablation) == ["cut"] * 3 + ["drop"] * 3 + ["block"] * 2
    before = (run.folder / "layers.csv").read_bytes()
    capsys.readouterr()
    eval_layers.main([str(run.folder), "--device", "cpu"])
    assert "done before" in "".join(capsys.readouterr())
    eval_layers.main([str(run.folder), "--device", "cpu", "--again", "--ablations", "cut"])
    assert sorted((run.folder / "layers.csv").read_bytes().splitlines()) == sorted(before.splitlines())
    assert len(runs.read_table(run.folder / "similarity.csv", runs.SIMILARITY_COLUMNS)) == 2 * (3 + 2 + 1)
    rows = runs.read_rows(run.folder / "layers.csv", runs.LAYERS_COLUMNS)
    runs.write_table(run.folder / "layers.csv", [row for row in rows if (row["ablation"], row["layer"]) != ("drop", "1")], runs.LAYERS_COLUMNS)
    assert eval_layers.missing(run, ["cut", "drop", "block"]) == ["drop"]  # a row short


def test_windows_go_to_tables_of_their_own(corpus, tmp_path):
    (folder,) = study_of(corpus, tmp_path, "--depth 2")
    eval_layers.main([str(folder), "--device", "cpu", "--windows", "5"])
    assert not (folder / "layers.csv").exists() and not (folder / "similarity.csv").exists()
    table = runs.read_table(folder / "layers_5windows.csv", runs.LAYERS_COLUMNS)
    assert set(table.tokens) == {5 * 32} == set(runs.read_table(folder / "similarity_5windows.csv", runs.SIMILARITY_COLUMNS).tokens)
    val = open_tokens(corpus, "val")
    full = (len(val) - 1) // 32
    starts = [k * full // 5 * 32 for k in range(5)]
    assert [batch[0, 0] for batch in validation_windows(val, 32, 1, 5)] == val.data[starts].tolist()
    with pytest.raises(SystemExit, match=f"has {full} full windows of length 32; {full + 1} of them cannot be chosen"):
        eval_layers.main([str(folder), "--device", "cpu", "--windows", str(full + 1)])


def test_tables_of_an_older_version_are_read_and_continued(corpus, tmp_path):
    (folder,) = study_of(corpus, tmp_path, "--depth 2")
    eval_layers.main([str(folder), "--device", "cpu", "--ablations", "cut"])
    table = runs.read_rows(folder / "layers.csv", runs.LAYERS_COLUMNS)
    runs.write_table(folder / "layers.csv", [{name: row[name] for name in runs.LAYERS_COLUMNS[:-1]} for row in table], runs.LAYERS_COLUMNS[:-1])
    (folder / "similarity.csv").unlink()
    eval_layers.main([str(folder), "--device", "cpu", "--ablations", "drop"])
    layers = runs.read_run(folder).layers
    assert list(layers.tokens.isna()) == [True, True, False, False] and list(layers.ablation) == ["cut", "cut", "drop", "drop"]


def test_a_published_run_without_weights_is_named(corpus, tmp_path):
    (folder,) = study_of(corpus, tmp_path, "--depth 1")
    (folder / "model.safetensors").unlink()
    with pytest.raises(SystemExit, match="keeps no weights.*another --study"):
        eval_layers.main([str(folder), "--device", "cpu"])


def test_no_block_to_leave_out_and_no_gpu_are_sentences(corpus, tmp_path, capsys):
    (folder,) = study_of(corpus, tmp_path, "--depth 2")
    eval_layers.main([str(folder), "--device", "cpu", "--ablations", "block"])
    assert "depth 2 has no such layers" in capsys.readouterr().out and not (folder / "layers.csv").exists()
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="no CUDA device here"):
            eval_layers.main([str(folder), "--device", "cuda"])


def test_other_validation_tokens_and_missing_weights_are_named(corpus, tmp_path):
    (folder,) = study_of(corpus, tmp_path, "--depth 1")
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


def test_compiled_models_are_measured_alike(corpus, tmp_path, monkeypatch):
    """As on CUDA: all scripts that measure trained models compile them there."""
    import eval_context
    import merge
    import trained

    a, b = study_of(corpus, tmp_path, "--depth 2 --p_bw 0 0.5 --dtype float32")
    scripts = ((eval_layers, [str(a)]), (eval_context, [str(a)]), (merge, [str(a), str(b), "--points", "3"]))
    names, tables = ("layers.csv", "similarity.csv", "context.csv", "documents.csv"), []
    for compiled in (False, True):
        if compiled:
            monkeypatch.setattr(trained, "has_compiler", lambda device: True)
            monkeypatch.setattr(GPT, "compile_parts", functools.partialmethod(GPT.compile_parts, backend="aot_eager"))
        for script, arguments in scripts:
            script.main([*arguments, "--device", "cpu", *(["--again"] if script is not merge else [])])
        tables.append([pd.read_csv(path) for path in [*(a / name for name in names), tmp_path / "merge.csv"]])
    assert trained.open_trained(runs.read_run(a), "cpu").model.compiled
    for plain, fast in zip(*tables):
        pd.testing.assert_frame_equal(plain, fast, rtol=1e-4, atol=1e-6)
