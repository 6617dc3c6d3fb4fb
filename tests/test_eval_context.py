"""Losses by context and by document: a planted Markov chain, what a context really sees, documents of known length."""

import hashlib
import json
import math

import numpy as np
import pytest
import torch
from tiny import corpus, flags  # noqa: F401

import eval_context
import runs
import train
from data.tokens import open_tokens
from data.toyworld import write_corpus
from model import GPT, GPTConfig
from trained import Trained

SYMBOLS = 6


def write_tokens(folder, train_split, val, vocab_size=SYMBOLS, eot=0, tokenizer="planted"):
    folder.mkdir(parents=True)
    splits = {}
    for split, tokens in (("train", train_split), ("val", val)):
        data = np.asarray(tokens, "<u2").tobytes()
        (folder / f"{split}.bin").write_bytes(data)
        splits[split] = {"file": f"{split}.bin", "tokens": len(tokens), "sha256": hashlib.sha256(data).hexdigest()}
    meta = {"name": folder.name, "tokenizer": tokenizer, "vocab_size": vocab_size, "dtype": "uint16", "eot_token": eot, "splits": splits}
    (folder / "meta.json").write_text(json.dumps(meta))
    return open_tokens(folder, "val")


def markov_model(step: np.ndarray, length: int) -> GPT:
    """A model that knows one thing: symbols d apart on the circle follow each other with logit step[d]; step[d] is
    step[-d], so the same holds backward. The direction tokens say nothing: a window's first prediction is uniform."""
    model = GPT(GPTConfig(depth=1, width=8, vocab_size=SYMBOLS + 2, max_seq_len=length), seed=0)
    with torch.no_grad():
        model.blocks[0].project.zero_()
        model.embedding.zero_()
        model.embedding[:SYMBOLS, :SYMBOLS] = 1000 * torch.eye(SYMBOLS)  # far above the norm's epsilon
        unit = model.norm(model.embedding)[:SYMBOLS, :SYMBOLS]  # `high` at the symbol, `low` elsewhere
        high, low = unit[0, 0], unit[0, 1]
        model.head.zero_()
        for symbol in range(SYMBOLS):
            model.head[symbol, :SYMBOLS] = torch.tensor([step[(symbol - other) % SYMBOLS] for other in range(SYMBOLS)]) / (high - low)
    return model.eval()


def planted(tmp_path, count, length, eot=0):
    step = np.array([0.0, 2.0, 0.5, -1.0, 0.5, 2.0])
    rng = np.random.default_rng(0)
    chain = np.exp(step) / np.exp(step).sum()
    val = np.cumsum(rng.choice(SYMBOLS, count, p=chain)) % SYMBOLS
    tokens = write_tokens(tmp_path / "planted", val[:50], val, eot=eot)
    return Trained(None, markov_model(step, length), "anticausal", True, tokens, None), val, step


def true_losses(val, step):
    """Nats of each token but the first given its neighbour, by hand: the same in both directions, as step is symmetric.

    The two direction tokens share the softmax; all logits are shifted by what `low` adds to each of them."""
    model = markov_model(step, 8)
    shift = float(model.norm(model.embedding)[0, 1].detach() * model.head[0].detach().sum())
    total = math.log(np.exp(step + shift).sum() + 2)
    return total - shift - step[np.diff(val) % SYMBOLS]


def test_a_markov_chain_has_the_loss_that_its_windows_predict(tmp_path):
    """Within a window of c tokens one is predicted from nothing, ln(8), and c - 1 from their neighbour; forward and
    backward give a window the same probability, so here there is no arrow of time."""
    trained, val, step = planted(tmp_path, 1_000, 96)
    by_context, _ = eval_context.measure(trained, batch_tokens=300)
    rows = {(row["direction"], row["context"]): row for row in by_context}
    assert [context for direction, context in rows if direction == "fw"] == [16, 32, 64, 96]
    nats = true_losses(val, step)
    for context in (16, 32, 64, 96):
        starts = [start + k * context for start in range(0, 960, 96) for k in range(96 // context)]
        expected = np.mean([(math.log(SYMBOLS + 2) + nats[start : start + context - 1].sum()) / context for start in starts])
        for direction in ("fw", "bw"):
            row = rows[direction, context]
            assert row["tokens"] == len(starts) * context == (640 if context == 64 else 960)
            assert row["loss"] == pytest.approx(expected, rel=1e-5), (direction, context)
    some, none = eval_context.measure(trained, windows=3)
    assert {row["tokens"] for row in some if row["context"] != 64} == {3 * 96} and none == []


@pytest.mark.parametrize("direction, mask", [("fw", "causal"), ("bw", "anticausal")])
@pytest.mark.parametrize("direction_tokens", [True, False])
def test_a_context_sees_its_window_and_nothing_else(direction, mask, direction_tokens):
    """A token changed just outside a window changes none of its losses; one changed inside changes those that see it."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(depth=2, width=16, vocab_size=50, max_seq_len=32), seed=0).eval()
    with torch.no_grad():
        model.embedding.mul_(20)
        for block in model.blocks:
            block.project.mul_(10)
            block.slope.fill_(-4)  # far tokens count, too
    windows = np.random.default_rng(1).integers(0, 48, (2, 33))

    def losses(windows):
        return eval_context.token_losses(model, [eval_context.pieces(windows, 8)], direction, mask, direction_tokens).reshape(2, 4, 8)

    before = losses(windows)
    changed = windows.copy()
    changed[0, [7, 24]] = (windows[0, [7, 24]] + 1) % 48
    moved = losses(changed) != before
    assert not moved[1].any()
    edge = 0 if direction_tokens else 1  # without direction tokens a piece has one more token, the next one's first
    assert not moved[0, 1 : 3 - edge].any()
    assert moved[0, 0, 7 if direction == "fw" else 0] and moved[0, 3, 7 if direction == "fw" else 0]
    if direction == "bw":
        assert moved[0, 0, :7].all(), "every token of the window sees what follows"


def test_documents_hold_their_own_tokens(tmp_path):
    """Documents of 3, 1 and 7 tokens and an end that has no separator; every token's loss is known."""
    trained, val, step = planted(tmp_path, 40, 16, eot=9)
    assert set(eval_context.documents(trained.val)) == {0}, "a text without separators is one document"
    val = np.where(val == 0, 1, val)
    val[[2, 3, 10]] = 0
    trained.val = write_tokens(tmp_path / "documents", val, val)
    assert np.bincount(eval_context.documents(trained.val)).tolist() == [3, 1, 7, 29]
    _, rows = eval_context.measure(trained)
    nats = true_losses(val, step)
    starts = np.arange(0, 39, 16)
    known = {"fw": np.insert(nats, 0, 0.0)[:-1], "bw": nats.copy()}  # a token from the one before, from the one after
    known["fw"][starts] = known["bw"][[15, 31, 38]] = math.log(SYMBOLS + 2)
    for direction in ("fw", "bw"):
        found = [row for row in rows if row["direction"] == direction]
        assert [(row["document"], row["tokens"]) for row in found] == [(0, 3), (1, 1), (2, 7), (3, 28)]  # the last token is not scored
        for row, (first, stop) in zip(found, ((0, 3), (3, 4), (4, 11), (11, 39))):
            assert row["loss"] == pytest.approx(known[direction][first:stop].mean(), rel=1e-5)
    trained.direction_tokens = False  # then fw scores all but the first token, bw all but the last two of the split
    _, rows = eval_context.measure(trained)
    counts = {direction: [row["tokens"] for row in rows if row["direction"] == direction] for direction in ("fw", "bw")}
    assert counts == {"fw": [2, 1, 7, 29], "bw": [3, 1, 7, 28]}


def test_the_script_measures_runs_on_their_own_and_on_other_text(corpus, tmp_path, capsys):  # noqa: F811
    study = tmp_path / "study"
    train.main(flags(corpus, study, "--steps 2 --p_bw 0.5"))
    (folder,) = (path.parent for path in study.glob("*/config.json"))
    eval_context.main([str(study), "--device", "cpu"])
    end = runs.read_run(folder).curve.iloc[-1]
    documents = runs.read_table(folder / "documents.csv", runs.DOCUMENTS_COLUMNS)
    contexts = runs.read_table(folder / "context.csv", runs.CONTEXT_COLUMNS)
    count = open_tokens(corpus, "val").meta["splits"]["val"]["documents"]
    assert contexts.context.tolist() == [16, 32] * 2
    for direction in ("fw", "bw"):
        rows = documents[documents.direction == direction]
        assert len(rows) == count and (rows.loss * rows.tokens).sum() / rows.tokens.sum() == pytest.approx(end[f"{direction}_loss"], rel=1e-5)
    capsys.readouterr()
    eval_context.main([str(folder), "--device", "cpu"])
    assert "done before" in "".join(capsys.readouterr())

    write_corpus(tmp_path / "elsewhere", people=21, towns=5, train_tokens=1_000, val_tokens=300)
    eval_context.main([str(folder), "--device", "cpu", "--data", str(tmp_path / "elsewhere")])
    eval_context.main([str(folder), "--device", "cpu", "--windows", "4"])
    eval_context.main([str(folder), "--device", "cpu", "--data", str(corpus), "--again"])  # its own text, by name
    names = {path.name for path in folder.glob("*.csv")} - {"curve.csv"}
    assert names == {"context.csv", "documents.csv", "context_elsewhere.csv", "documents_elsewhere.csv", "context_4windows.csv"}
    write_tokens(tmp_path / "foreign", [1, 2, 3], [1, 2, 3])
    with pytest.raises(SystemExit, match="holds tokens of 'planted', but .* was trained on those of 'toyworld'"):
        eval_context.main([str(folder), "--device", "cpu", "--data", str(tmp_path / "foreign")])
    with pytest.raises(SystemExit, match="There are no prepared tokens in .*nowhere"):
        eval_context.main([str(folder), "--device", "cpu", "--data", "nowhere"])
