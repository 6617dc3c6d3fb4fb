"""Facts asked in both orders: scores against whole sentences read plainly, an oracle that knows the text and nothing else, the script."""

import math
import re

import numpy as np
import pytest
import torch
from test_eval_context import write_tokens
from test_plot_results import plant
from tiny import corpus, flags  # noqa: F401

import eval_reversal
import measures
import plot_reversal
import runs
import study_readme
import train
from cells import load
from data.tokens import open_tokens
from data.toyworld import World, encoding, questions, write_corpus
from model import GPT, MASK_OF, GPTConfig, frame, padded_vocab_size
from trained import Trained

WORLD = World(0, 21, 5, single=True)
SENTENCES = {True: "was the teacher of", False: "was a pupil of"}


def random_model(**options):
    """Far from its initial weights, so that every token that it sees counts."""
    config = GPTConfig(depth=2, width=32, vocab_size=padded_vocab_size(encoding().n_vocab), max_seq_len=32, **options)
    model = GPT(config, seed=0).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.project.mul_(20)
            block.slope.fill_(-3)
    return model


def trained(folder, model=None, about=WORLD, mask="anticausal", direction_tokens=True):
    val = write_tokens(folder / "text", [1, 2, 3], [1, 2, 3])
    val.meta["toyworld"] = {"seed": about.seed, "people": len(about.people), "towns": len(about.towns), "single": about.single}
    return Trained(None, model, mask, direction_tokens, val, None)


@pytest.mark.parametrize("direction", ["fw", "bw"])
@pytest.mark.parametrize("direction_tokens", [True, False])
@pytest.mark.parametrize("question", eval_reversal.QUESTIONS)
def test_a_name_has_the_probability_it_has_in_the_whole_document(direction, direction_tokens, question):
    """Documents written out, read in one go with the direction's own mask; the name's two tokens are picked by hand."""
    model, tokenizer = random_model(num_heads=2), encoding()
    pairs = [(p.name, p.pupil.name) for p in WORLD.people if p.pupil]
    scores = eval_reversal.ask(model, direction, question, questions(WORLD), direction_tokens, batch_tokens=400)
    assert scores.shape == (10, 10)
    first_is_teacher = (direction, question) in (("fw", "pupil"), ("bw", "teacher"))
    for i, pair in enumerate(pairs):
        for j in (i, (i + 3) % 10):
            known, answer = (pair[0], pairs[j][1]) if question == "pupil" else (pair[1], pairs[j][0])
            left, right = (known, answer) if direction == "fw" else (answer, known)
            text = tokenizer.encode_ordinary(f"{left} {SENTENCES[first_is_teacher]} {right}.")
            text = [tokenizer.eot_token, *text[:-1]] if direction == "fw" else [*text, tokenizer.eot_token]
            window = torch.tensor([text + [0]])
            inputs, _ = frame(window, direction, model.config.vocab_size)
            inputs = inputs if direction_tokens else window[:, :-1]  # the whole text is read; a prediction stands at its neighbour
            logs = model(inputs, MASK_OF[direction]).log_softmax(-1)[0].detach()
            off = 0 if direction_tokens else (-1 if direction == "fw" else 1)
            at = range(len(text))[-2:] if direction == "fw" else range(2)
            assert scores[i, j].item() == pytest.approx(sum(logs[k + off, text[k]].item() for k in at), abs=1e-4)


def test_who_knows_only_what_the_text_states_answers_all_but_the_reversal(tmp_path, monkeypatch):
    """The oracle has read the training text, looks every document up, and has nothing to say about others."""
    write_corpus(tmp_path / "facts", people=21, towns=5, train_tokens=60_000, val_tokens=100, single=True)
    tokens = open_tokens(tmp_path / "facts", "train")
    read = set(encoding().decode(np.asarray(tokens.data).tolist()).split("<|endoftext|>"))
    names = {person.name for person in WORLD.people}
    for document in read:  # the names of a pair meet in these sentences only
        met = {name for name in names if name in document}
        if any({p.name, p.pupil.name} <= met for p in WORLD.people if p.pupil):
            assert re.search("was the teacher of|was a pupil of|taught|learned", document), document

    def oracle(model, direction, contexts, names, *_):
        asked, people = ([encoding().decode(row) for row in rows.tolist()] for rows in (contexts, names))
        known = {f"<|endoftext|>{text}" for text in read} if direction == "fw" else {f"{text}<|endoftext|>" for text in read}
        whole = [[f"{q}{p}." if direction == "fw" else f"{p}{q}" for p in people] for q in asked]
        return torch.tensor([[0.0 if text in known else -50.0 for text in row] for row in whole])

    monkeypatch.setattr(eval_reversal, "name_scores", oracle)
    rows = eval_reversal.measure(trained(tmp_path, random_model()))
    assert [(r["direction"], r["question"], r["orders"]) for r in rows] == [(d, q, n) for d in ("fw", "bw") for q in ("pupil", "teacher") for n in (1, 2)]
    for row in rows:
        never = (row["direction"], row["question"], row["orders"]) in (("fw", "teacher", 1), ("bw", "pupil", 1))
        assert row["pairs"] == 5 and row["stated"] == (not never)
        assert (row["acc"], row["auc"]) == ((0, 0.5) if never else (1, 1)), row


def test_right_answers_and_the_share_of_others_below():
    scores = torch.tensor([[5.0, 6.0, 4.0, 3.0], [1.0, 2.0, 0.0, 0.0], [7.0, 7.0, 7.0, 1.0], [3.0, 2.0, 1.0, 0.0]])
    acc, auc = eval_reversal.accuracy_and_auc(scores)
    assert acc == 0.25 and auc == pytest.approx((2 + 3 + (0.5 + 0.5 + 1) + 0) / 12)
    acc, auc = eval_reversal.accuracy_and_auc(torch.zeros(1, 1))
    assert acc == 1 and math.isnan(auc)


def test_the_flipped_mask_is_asked_forward_only_and_a_single_pair_is_stated_in_one_order(tmp_path):
    rows = eval_reversal.measure(trained(tmp_path, random_model(), mask="flipped"))
    assert {row["direction"] for row in rows} == {"fw"} and len(rows) == 4
    rows = eval_reversal.measure(trained(tmp_path / "two", random_model(), World(1, 2, 2, single=True)))
    assert {row["orders"] for row in rows} == {1} and all(row["pairs"] == 1 for row in rows)


def test_a_model_without_direction_tokens_is_asked_without(tmp_path):
    with_them, without = (eval_reversal.measure(trained(tmp_path / str(k), random_model(), direction_tokens=k)) for k in (True, False))
    asked = eval_reversal.ask(random_model(), "fw", "pupil", [q for q in questions(WORLD) if q.held_out], False)
    assert without[0]["auc"] == eval_reversal.accuracy_and_auc(asked)[1]
    assert [row["auc"] for row in without] != [row["auc"] for row in with_them]


def test_the_script_measures_runs_and_refuses_other_texts(corpus, tmp_path, capsys):  # noqa: F811
    facts, study = tmp_path / "facts", tmp_path / "study"
    write_corpus(facts, people=20, towns=5, train_tokens=3_000, val_tokens=300, single=True)
    train.main(flags(facts, study, "--steps 2 --p_bw 0.5"))
    (folder,) = (path.parent for path in study.glob("*/config.json"))
    eval_reversal.main([str(study), "--device", "cpu"])
    table = runs.read_table(folder / "reversal.csv", runs.REVERSAL_COLUMNS)
    assert len(table) == 8 and (table.pairs == 5).all()
    written = (folder / "reversal.csv").read_text()
    (folder / "reversal.csv").write_text("damaged")
    capsys.readouterr()
    eval_reversal.main([str(folder), "--device", "cpu"])
    assert "done before" in "".join(capsys.readouterr()) and (folder / "reversal.csv").read_text() == "damaged"
    eval_reversal.main([str(folder), "--device", "cpu", "--again"])
    assert (folder / "reversal.csv").read_text() == written
    train.main(flags(corpus, tmp_path / "other", "--steps 2 --p_bw 0.5"))
    with pytest.raises(SystemExit, match="is no text of single facts.*toyworld-facts"):
        eval_reversal.main([str(tmp_path / "other"), "--device", "cpu"])
    with pytest.raises(SystemExit):
        eval_reversal.main([str(folder), "--windows", "3"])


def plant_answers(folder, acc, kinds=(1, 2)):
    rows = [{"direction": d, "question": q, "orders": n, "pairs": 50, "stated": int(n == 2 or (d == "fw") == (q == "pupil")),
             "acc": acc + 0.1 * (n == 1) + 0.01 * (d == "bw") + 0.02 * (q == "pupil"), "auc": 1 - acc}
            for d in ("fw", "bw") for q in ("teacher", "pupil") for n in kinds]  # fmt: skip
    runs.write_table(folder / "reversal.csv", rows, runs.REVERSAL_COLUMNS)


def drawn(monkeypatch, study):
    """What the figures show: each panel's [(x, y, filled?) of lines with a marker of size 7], the intervals' lengths, the texts; the captions."""
    found, captions = [], []

    def keep(study, figure, group, name, title, caption, save=plot_reversal.save):
        panels = [(ax.get_title(loc="left"), [(np.round(line.get_xdata()).tolist(), np.round(line.get_ydata(), 6).tolist(), line.get_markerfacecolor() != "white")
                                              for line in ax.lines if line.get_markersize() == 7]) for ax in figure.axes]  # fmt: skip
        intervals = [np.ptp(segment[:, 1]) for ax in figure.axes for some in ax.collections for segment in some.get_segments() if len(segment)]
        found.append((panels, intervals, [text.get_text() for ax in figure.axes for text in ax.texts]))
        captions.append(caption)
        return save(study, figure, group, name, title, caption)

    monkeypatch.setattr(plot_reversal, "save", keep)
    return plot_reversal.reversal(study), found, captions


def test_planted_answers_are_drawn_and_told(tmp_path, monkeypatch):
    for seed in (0, 1):
        plant_answers(plant(tmp_path, seed=seed), 0.02 + 0.04 * seed)
        plant_answers(plant(tmp_path, seed=seed, p_bw=0.5), 0.2 + 0.2 * seed)
        plant_answers(plant(tmp_path, seed=seed, task="bw", p_bw=1.0, bw=2.0), 0.5 + 0.02 * seed)
    plant(tmp_path, seed=2)  # was never asked
    study = load(tmp_path)
    (cell,) = study.cells
    found = measures.asked([run for by in study.cells[cell].values() for run in by.values()], "bw", "teacher", 2, "acc")
    assert found.tolist() == pytest.approx([0.03, 0.07, 0.21, 0.41, 0.51, 0.53])

    (path,), ((panels, intervals, texts),), (caption,) = drawn(monkeypatch, study)
    assert path.name == f"reversal_{cell.depth}x{cell.width}.png" and "n = 2 seeds (0, 1)" in caption
    assert [title for title, _ in panels] == ["Who taught Y?"] * 2 + ["Whom did X teach?"] * 2
    (_, who), (_, who_auc), (_, whom), _ = panels
    assert who == [([0, 1], pytest.approx([0.14, 0.4]), False), ([1, 2], pytest.approx([0.41, 0.62]), True)], "fw never stated, bw stated"
    assert who_auc == [([0, 1], pytest.approx([0.96, 0.7]), False), ([1, 2], pytest.approx([0.7, 0.49]), True)]
    assert whom == [([0, 1], pytest.approx([0.16, 0.42]), True), ([1, 2], pytest.approx([0.43, 0.64]), False)]
    assert len(intervals) == 16 and min(intervals) > 0.1, "0.02 apart is 0.25 wide"
    assert texts.count("chance: 0.02") == texts.count("chance: 0.50") == 2

    text = study_readme.markdown(study)
    lines = [line.split(" | ") for line in text.split("\n") if line.startswith(f"| {cell.label} | ") and "%" in line]
    assert [line[1:4] for line in lines] == [[kind, v, "2"] for kind in ("one order", "both orders") for v in ("p_bw = 0", "p_bw = 0.5", "bw only")]
    assert lines[0][4:] == ["*14 ± 25 %; 0.96 ± 0.25*", "", "16 ± 25 %; 0.96 ± 0.25", " |"]
    assert lines[2][4:] == ["", "62 ± 13 %; 0.49 ± 0.13", "", "*64 ± 13 %; 0.49 ± 0.13* |"]
    assert lines[4][4].startswith("30 ±") and "by chance 2 % and 0.50" in text and f"python eval_reversal.py {tmp_path}" in text


def test_a_study_that_was_not_asked_and_a_world_of_one_pair(tmp_path, monkeypatch):
    folder = plant(tmp_path, p_bw=0.5)
    study = load(tmp_path)
    assert plot_reversal.reversal(study) == [] and "no run has a reversal.csv" in study.notes[-1]
    assert "Facts and their reversals" not in study_readme.markdown(study)
    plant_answers(folder, 0.3, kinds=(1,))
    _, ((panels, _, _),), _ = drawn(monkeypatch, load(tmp_path))
    assert len(panels) == 4 and "both orders" not in study_readme.markdown(load(tmp_path)).split("Facts and their")[1].split("Right answers")[0]
