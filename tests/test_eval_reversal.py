"""Facts asked in both orders: scores against whole sentences read plainly, an oracle that knows the text and nothing else, the script."""

import random
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
from compare import load
from data.toyworld import World, encoding, generate, questions
from data.tokens import open_tokens
from model import GPT, MASK_OF, GPTConfig, frame, padded_vocab_size
from trained import Trained

WORLD = World(0, 21, 5)


def random_model(seed=0):
    """Far from its initial weights, so that every token that it sees counts."""
    model = GPT(GPTConfig(depth=2, width=32, vocab_size=padded_vocab_size(encoding().n_vocab), max_seq_len=32), seed=seed).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.project.mul_(20)
            block.slope.fill_(-3)
    return model


@pytest.mark.parametrize("direction", ["fw", "bw"])
@pytest.mark.parametrize("direction_tokens", [True, False])
@pytest.mark.parametrize("sentence", eval_reversal.SENTENCES)
def test_a_name_has_the_probability_it_has_in_the_whole_sentence(direction, direction_tokens, sentence):
    """Sentences written out, read in one go with the direction's own mask; the name's two tokens are picked by hand."""
    model, tokenizer, people = random_model(), encoding(), [person.name for person in WORLD.people]
    words = {"teacher": "was the teacher of", "pupil": "was a pupil of"}[sentence]
    pairs = [(p.name, p.pupil.name) if sentence == "teacher" else (p.pupil.name, p.name) for p in WORLD.people if p.pupil]
    scores, answers = eval_reversal.ask(model, direction, sentence, questions(WORLD), people, direction_tokens, batch_tokens=400)
    assert scores.shape == (10, 21)
    for (left, right), row, answer in zip(pairs, scores, answers.tolist()):
        assert people[answer] == (right if direction == "fw" else left)
        for person in (answer, 3):
            if direction == "fw":
                texts = [[tokenizer.eot_token, *tokenizer.encode_ordinary(f"{left} {words} {people[person]}")]]
            else:
                texts = [tokenizer.encode_ordinary(f"{space}{people[person]} {words} {right}.") for space in ("", " ")]
            total = 0.0
            for text in texts:
                window = torch.tensor([text + [0]])
                inputs, targets = frame(window, direction, model.config.vocab_size)
                if not direction_tokens:  # the whole text is read; a prediction stands where its neighbour does
                    inputs = targets = window[:, :-1]
                logs = model(inputs, MASK_OF[direction]).log_softmax(-1)[0].detach()
                at = range(len(text))[-2:] if direction == "fw" else range(2)
                off = 0 if direction_tokens else (-1 if direction == "fw" else 1)
                total += np.exp(sum(logs[k + off, text[k]].item() for k in at))
            assert row[person].item() == pytest.approx(np.log(total), abs=1e-4)


def trained(folder, model=None, about=WORLD, mask="anticausal"):
    val = write_tokens(folder / "text", [1, 2, 3], [1, 2, 3])
    val.meta["toyworld"] = {"seed": about.seed, "people": len(about.people), "towns": len(about.towns)}
    return Trained(None, model, mask, True, val, None)


def test_who_knows_only_what_the_text_states_answers_all_but_the_reversal(tmp_path, monkeypatch):
    """The oracle has read 3000 documents, sentence by sentence, and looks the question up, in either direction."""
    rng = random.Random(3)
    text = " ".join(generate(WORLD, rng).text for _ in range(3000))
    read = set(re.findall(r"(\w+ \w+) (was the teacher of|was a pupil of) (\w+ \w+)", text))

    def oracle(model, direction, contexts, names, *_):
        asked, people = ([encoding().decode(row).replace("<|endoftext|>", "").strip(" .") for row in rows.tolist()] for rows in (contexts, names))
        whole = [[f"{q} {p}" if direction == "fw" else f"{p} {q}" for p in people] for q in asked]
        known = {" ".join(sentence) for sentence in read}
        return torch.tensor([[0.0 if s in known else -50.0 for s in row] for row in whole])

    monkeypatch.setattr(eval_reversal, "name_scores", oracle)
    rows = eval_reversal.measure(trained(tmp_path, random_model()))
    assert [(r["direction"], r["sentence"], r["orders"]) for r in rows] == [(d, s, n) for d in ("fw", "bw") for s in ("teacher", "pupil") for n in (1, 2)]
    for row in rows:
        stated = (row["sentence"], row["orders"]) != ("pupil", 1)
        assert row["pairs"] == 5
        if stated:
            assert row["acc"] == row["acc_people"] == 1 and row["loss"] == pytest.approx(0, abs=1e-6) == row["loss_people"]
        else:
            assert row["acc"] == 0.2 and row["loss"] == pytest.approx(np.log(5)), "all alike: the first candidate, right once"
            assert row["loss_people"] == pytest.approx(np.log(21)) and row["acc_people"] <= 0.2


def test_candidates_are_the_answers_of_the_same_kind():
    scores = torch.tensor([[0.0, 1.0, 9.0], [0.0, 1.0, 9.0]])  # three people, the third is nobody's answer
    answers = torch.tensor([1, 0])
    assert eval_reversal.accuracy_and_loss(scores, answers)[0] == 0
    acc, loss = eval_reversal.accuracy_and_loss(scores[:, answers], torch.arange(2))
    assert acc == 0.5 and loss == pytest.approx((np.log1p(np.exp(-1)) + np.log1p(np.exp(1))) / 2)


def test_the_flipped_mask_is_asked_forward_only_and_a_pair_has_one_half(tmp_path):
    rows = eval_reversal.measure(trained(tmp_path, random_model(), mask="flipped"))
    assert {row["direction"] for row in rows} == {"fw"} and len(rows) == 4
    rows = eval_reversal.measure(trained(tmp_path / "two", random_model(), World(1, 2, 2)))
    assert {row["orders"] for row in rows} == {1} and all(row["pairs"] == 1 and row["acc"] == 1 and row["loss"] == 0 for row in rows)


def test_the_script_measures_runs_and_refuses_other_texts(corpus, tmp_path, capsys):  # noqa: F811
    study = tmp_path / "study"
    train.main(flags(corpus, study, "--steps 2 --p_bw 0.5"))
    (folder,) = (path.parent for path in study.glob("*/config.json"))
    eval_reversal.main([str(study), "--device", "cpu"])
    table = runs.read_table(folder / "reversal.csv", runs.REVERSAL_COLUMNS)
    assert len(table) == 8 and (table.pairs == len(questions(World(**{k: open_tokens(corpus, "val").meta["toyworld"][k] for k in ("seed", "people", "towns")}))) / 2).all()
    capsys.readouterr()
    eval_reversal.main([str(folder), "--device", "cpu"])
    assert "done before" in "".join(capsys.readouterr())
    plain = trained(tmp_path, random_model())
    del plain.val.meta["toyworld"]
    with pytest.raises(ValueError, match="is not a toyworld"):
        eval_reversal.measure(plain)
    with pytest.raises(SystemExit):
        eval_reversal.main([str(folder), "--windows", "3"])


def test_planted_answers_are_drawn_and_told(tmp_path, monkeypatch):
    def table(folder, acc, directions=("fw", "bw")):
        rows = [{"direction": d, "sentence": s, "orders": n, "pairs": 50, "acc": acc if (s, n) == ("pupil", 1) else 1.0, "loss": 1 + acc,
                 "acc_people": 0.5, "loss_people": 2.0} for d in directions for s in ("teacher", "pupil") for n in (1, 2)]  # fmt: skip
        runs.write_table(folder / "reversal.csv", rows, runs.REVERSAL_COLUMNS)

    for seed in (0, 1):
        table(plant(tmp_path, seed=seed, floor=1.5), 0.02 + 0.04 * seed)
        table(plant(tmp_path, seed=seed, p_bw=0.5, floor=1.5), 0.2 + 0.2 * seed)
    plant(tmp_path, seed=2)  # was never asked
    study = load(tmp_path)
    (cell,) = study.cells
    found = measures.asked([run for by in study.cells[cell].values() for run in by.values()], "bw", "pupil", 1, "acc")
    assert found.tolist() == [0.02, 0.06, 0.2, 0.4]
    captions = []
    monkeypatch.setattr(plot_reversal, "save", lambda study, figure, group, name, title, caption, save=plot_reversal.save: (
        captions.append(caption), save(study, figure, group, name, title, caption))[1])  # fmt: skip
    (path,) = plot_reversal.reversal(study)
    assert path.name == f"reversal_{cell.depth}x{cell.width}.png" and path.stat().st_size > 20_000
    assert "n = 2 seeds (0, 1)" in captions[0]
    text = study_readme.markdown(study)
    lines = [line for line in text.split("\n") if line.startswith(f"| {cell.label} | ") and "%" in line]
    assert [line.split(" | ")[1:4] for line in lines] == [["fw", "p_bw = 0", "2"], ["fw", "p_bw = 0.5", "2"], ["bw", "p_bw = 0.5", "2"]]
    assert lines[0].endswith("| 4 ± 25 %; 1.04 ± 0.25 |") and "chance is 2 %; 3.91" in text
    assert f"python eval_reversal.py {tmp_path}" in text
    for path in tmp_path.glob("*/reversal.csv"):
        path.unlink()
    study = load(tmp_path)
    assert plot_reversal.reversal(study) == [] and "no run has a reversal.csv" in study.notes[-1]
    assert "Facts and their reversals" not in study_readme.markdown(study)
