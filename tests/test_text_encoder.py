"""Text encoder: what is hidden and which state predicts it, contrastive loss, adapters, probes, the command, the table."""

import csv
import json
import math
import subprocess
import sys

import pytest
import torch

from conftest import ROOT
from tiny_backbones import MAKERS, METADATA, TEXTS, hugging_face, own, transformers
from data.tokens import DataError
from data.toyworld import write_corpus
from experiments import mntp, plot_text_encoder, probes, simcse, tagging_data, text_encoder, tuning
from experiments.backbone import Backbone, BackboneError
from experiments.encoder import Encoder, load_encoder, save
from model import model_bytes


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "toyworld"
    write_corpus(folder, people=20, towns=5, train_tokens=3_000, val_tokens=300)
    return folder


# ---- masked next-token prediction ----------------------------------------------------------------------------------


def test_what_is_hidden_and_how():
    tokens, generator = torch.randint(0, 500, (200, 100)), torch.Generator().manual_seed(0)
    present = torch.ones_like(tokens, dtype=torch.bool)
    present[:, 90:] = False
    tokens[:, 5] = 7
    masking = mntp.Masking(0.2, "bert", 999, 500, (7,), first=False)
    inputs, hidden = masking.hide(tokens, present, generator)
    assert not hidden[:, 90:].any() and not hidden[:, 0].any() and not hidden[tokens == 7].any() and hidden[:, 1].any()
    assert hidden.sum().item() == pytest.approx(0.2 * 200 * 88, rel=0.05)
    asked, seen = tokens[hidden], inputs[hidden]
    shares = [(seen == 999).float().mean(), ((seen != 999) & (seen != asked)).float().mean(), (seen == asked).float().mean()]
    assert [share.item() for share in shares] == pytest.approx([0.8, 0.1, 0.1], abs=0.02) and seen[seen != 999].max() < 500
    assert torch.equal(inputs[~hidden], tokens[~hidden])
    again = masking.hide(tokens, present, torch.Generator().manual_seed(0))
    assert torch.equal(again[0], inputs) and torch.equal(again[1], hidden)
    inputs, hidden = mntp.Masking(0.8, "all", 999, 500).hide(tokens, present, generator)
    assert (inputs[hidden] == 999).all() and hidden[:, 0].any() and hidden[:, :90].float().mean() == pytest.approx(0.8, abs=0.02)


class Planted(Backbone):
    """The state at position t is the unit vector t, whatever is read."""

    width = 8

    def states(self, tokens, present, mask, depth=None):
        return torch.eye(8)[torch.arange(tokens.shape[1])].expand(len(tokens), -1, -1)


def test_target_i_is_predicted_from_the_state_before_or_from_its_own():
    head = 50 * torch.eye(8)  # state t says: token t
    hidden = torch.tensor([[False, True, False, True, True, False]])
    before, own_places = torch.tensor([[9, 0, 9, 2, 3, 9]]), torch.tensor([[9, 1, 9, 3, 4, 9]])
    for target, right, wrong in (("i-1", before, own_places), ("i", own_places, before)):
        found = mntp.evaluate(Planted(), head, [(right, right, hidden)], target)
        assert found == {"loss": pytest.approx(0, abs=1e-6), "acc": 1.0, "tokens": 3}
        assert mntp.evaluate(Planted(), head, [(right, wrong, hidden)], target)["acc"] == 0.0


def test_mask_tokens():
    backbone = own()
    assert mntp.Masking.of(backbone).token == 893 and mntp.Masking.of(backbone, text=" was").token < 848
    with pytest.raises(BackboneError, match="must be one token"):
        mntp.Masking.of(backbone, text="zzq")
    llama = mntp.Masking.of(hugging_face())
    assert llama.token == hugging_face().tokenizer("_")["input_ids"][0] and llama.special and not llama.first
    assert mntp.Masking.of(hugging_face(), target="i").first


def test_masked_training_learns_and_is_measured_on_the_same_hidden_tokens(corpus):
    backbone = own()
    train, val = (tuning.token_stream(backbone, str(corpus), split) for split in ("train", "val"))
    masking = mntp.Masking.of(backbone)
    first, again = (list(mntp.validation(val, masking, 16, 12, batch=5)) for _ in range(2))
    assert [len(x[0]) for x in first] == [5, 5, 2] and all(torch.equal(a, b) for x, y in zip(first, again) for a, b in zip(x, y))
    rows = mntp.train(backbone, backbone.model.head, train, val, masking, 30, 0.01, 8, 16, val_windows=12)
    assert [row["step"] for row in rows] == [0, 6, 12, 18, 24, 30] and rows[0]["train_loss"] is None
    assert rows[-1]["val_loss"] < rows[0]["val_loss"] - 1
    found = mntp.evaluate(backbone, backbone.model.head, first)
    assert (found["loss"], found["acc"]) == pytest.approx((rows[-1]["val_loss"], rows[-1]["val_acc"]))


def test_adapters_alone_are_trained_and_saving_merges_them(tmp_path):
    (tmp_path / "text.txt").write_text("the cat sat on the mat and the dog lay there\n" * 60)
    for kind in ("llama", "gpt2"):
        backbone = hugging_face(kind, tie=True)
        before = {name: x.clone() for name, x in backbone.model.state_dict().items()}
        text, val = (tuning.token_stream(backbone, str(tmp_path / "text.txt"), split) for split in ("train", "val"))
        head = mntp.output_head(backbone, "")
        rows = mntp.train(backbone, head, text, val, mntp.Masking.of(backbone), 12, 0.01, 8, 32, lora=4, val_windows=4)
        assert rows[-1]["val_loss"] < rows[0]["val_loss"]
        kept = {name.replace("base_model.model.", "").replace(".base_layer", ""): x for name, x in backbone.model.state_dict().items()}
        assert all(torch.equal(kept[name], x) for name, x in before.items())
        assert all("lora_" in name for name, x in backbone.named_parameters() if x.requires_grad)
        save(Encoder(backbone), tmp_path / kind)
        vectors = Encoder(backbone).encode(TEXTS)
        torch.testing.assert_close(load_encoder(tmp_path / kind).encode(TEXTS), vectors, rtol=1e-3, atol=1e-3)
        assert (vectors - Encoder(hugging_face(kind, tie=True)).encode(TEXTS)).abs().max() > 0.01


def test_the_seed_decides_where_adapters_begin(tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"The river number {k} is long.\n" for k in range(40)))

    def first(seed: int, before: int) -> torch.Tensor:
        backbone = hugging_face(tie=True)
        torch.manual_seed(before)  # what ran before in the same process
        text, val = (tuning.token_stream(backbone, str(tmp_path / "text.txt"), split) for split in ("train", "val"))
        mntp.train(backbone, mntp.output_head(backbone, ""), text, val, mntp.Masking.of(backbone), 1, 0.0, 2, 16, lora=2, seed=seed, val_windows=2)
        return next(x for name, x in backbone.named_parameters() if "lora_A" in name).detach()

    assert torch.equal(first(10, 0), first(10, 1)) and not torch.equal(first(10, 0), first(11, 0))


def test_text_in_another_models_tokens(corpus, tmp_path):
    ours, theirs = own(), hugging_face()
    stream = tuning.token_stream(theirs, str(corpus), "val", most=400)
    text = "".join(theirs.tokenizer.decode(stream.data.tolist()))
    assert len(stream) == 400 and "~".join(tuning.documents(str(corpus), "val")).startswith(text) and "~" in text
    assert tuning.token_stream(ours, str(corpus), "val").data is not None and "tokenizer" in tuning.token_stream(ours, str(corpus), "val").meta
    found = tuning.sentences(str(corpus), "train", 50)
    assert len(found) == len(set(found)) == 50 and all(4 <= len(x.split()) <= 48 and x.endswith(".") for x in found)


# ---- contrastive training ------------------------------------------------------------------------------------------


def test_one_long_stream_is_read_in_pieces(corpus, monkeypatch):
    """A data set may be a single document of a hundred million tokens."""
    whole = "".join(tuning.documents(str(corpus), "val"))
    monkeypatch.setattr(tuning, "PIECE", 7)
    pieces = list(tuning.documents(str(corpus), "val"))
    assert "".join(pieces) == whole and max(len(piece.split()) for piece in pieces) < 9


def test_contrastive_loss_by_hand():
    anchors, positives = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    # cosines: (1, 1) for the first, (0, 0) for the second: both must guess between two
    assert simcse.contrastive_loss(anchors, positives).item() == pytest.approx(math.log(2))
    negatives = torch.tensor([[-1.0, 0.0], [0.0, -1.0]])
    e = [math.exp(2 * x) for x in (-1, 0, 1)]
    by_hand = (math.log(2 * e[2] + e[0] + e[1]) - 2 + math.log(2 * e[1] + e[1] + e[0])) / 2
    assert simcse.contrastive_loss(anchors, positives, negatives, temperature=0.5).item() == pytest.approx(by_hand)


@pytest.mark.parametrize("make", MAKERS)
@torch.no_grad()
def test_dropout_is_there_while_asked_for_and_differs_between_two_readings(make):
    encoder = Encoder(make())
    rows = encoder.rows(TEXTS)
    before = encoder.embed(rows)
    with simcse.dropout(encoder.backbone, 0.3):
        first, second = encoder.embed(rows * 2).split(4)
    assert (first - second).abs().amax(1).min() > 1e-3 and torch.equal(encoder.embed(rows), before)
    with simcse.dropout(encoder.backbone, 0.0):
        torch.testing.assert_close(encoder.embed(rows), before, rtol=1e-4, atol=1e-4)


def test_batches_hold_every_example_once_a_pass_and_neighbours_in_length():
    lengths = [k % 50 for k in range(1000)]
    draw = simcse.batches(lengths, 20, seed=3)
    found = [next(draw) for _ in range(50)]
    assert sorted(k for batch in found for k in batch) == list(range(1000))
    assert sum(max(lengths[k] for k in batch) - min(lengths[k] for k in batch) for batch in found) / 50 < 10
    assert found[0] == next(simcse.batches(lengths, 20, seed=3)) != next(simcse.batches(lengths, 20, seed=4))
    with pytest.raises(DataError, match="do not fill a batch of 20"):
        next(simcse.batches(lengths[:19], 20, seed=3))


@pytest.mark.parametrize("columns", [1, 2, 3])
def test_contrastive_training_learns_from_texts_pairs_and_hard_negatives(columns, corpus):
    found = tuning.sentences(str(corpus), "train", 96)
    examples = list(zip(*(found[k * 32 : (k + 1) * 32] for k in range(columns))))
    losses = simcse.train(Encoder(own()), examples, steps=20, lr=3e-3, batch=16, seed=1, dtype="float32")
    assert sum(losses[-4:]) < sum(losses[:4])
    assert losses[:2] == simcse.train(Encoder(own()), examples, steps=20, lr=3e-3, batch=16, seed=1, dtype="float32")[:2]


def test_pairs_are_read_and_checked(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text('"a, b",c\nd,e\n')
    assert simcse.read_pairs(str(path)) == [("a, b", "c"), ("d", "e")]
    path.write_text('a,"' + "b" * 200_000)
    with pytest.raises(DataError, match="field limit"):
        simcse.read_pairs(str(path))
    with pytest.raises(DataError, match="field limit"):
        probes.read_sts(path)
    for text in ("a\n", "a,b\nc,d,e\n", "a,\n", ""):
        path.write_text(text)
        with pytest.raises(DataError, match="must have two columns"):
            simcse.read_pairs(str(path))
    with pytest.raises(DataError, match="cannot be read"):
        simcse.read_pairs(str(tmp_path / "none.csv"))


# ---- probes --------------------------------------------------------------------------------------------------------


def test_similarity_is_scored_by_rank(monkeypatch, tmp_path):
    encoder = Encoder(own())
    angles = {"a": 0.0, "b": 0.1, "c": 0.5, "d": 1.5}
    monkeypatch.setattr(encoder, "encode", lambda texts: torch.tensor([[math.cos(angles[x]), math.sin(angles[x])] for x in texts]))
    (tmp_path / "x.csv").write_text("a,b,5\na,c,4.5\na,d,0.5\n")
    pairs = probes.read_sts(tmp_path / "x.csv")
    assert pairs[1] == ("a", "c", 4.5) and probes.sts(encoder, pairs) == pytest.approx(1.0)
    assert probes.sts(encoder, [(a, b, -score) for a, b, score in pairs]) == pytest.approx(-1.0)
    (tmp_path / "x.csv").write_text("a,b,five\n")
    with pytest.raises(DataError, match="no list of sentence"):
        probes.read_sts(tmp_path / "x.csv")


def test_a_probe_reads_the_token_or_the_one_before():
    """Labels that a word has by itself are found at i; at i - 1 a causal model has not read the word, and they are not."""
    generator = torch.Generator().manual_seed(0)
    words = [" was", " the", " in", " of"]
    draw = lambda: torch.randint(0, 4, (9,), generator=generator).tolist()  # noqa: E731
    sentence = lambda ids: tagging_data.Sentence([words[k] for k in ids], ["AB"[k % 2] for k in ids])  # noqa: E731
    splits = [[sentence(draw()) for _ in range(n)] for n in (60, 20, 40)]
    task, encoder = tagging_data.Task("words", *splits), Encoder(own(), mask="causal")
    found = {position: probes.word_probe(encoder, task, position, epochs=10, lr=0.05)["acc"] for position in probes.POSITIONS}
    assert found["i"] > 0.95 and found["i-1"] < 0.65


# ---- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def run_folder(tmp_path, corpus):
    folder = tmp_path / "runs" / "2x32_pbw0_seed100_abcdef"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(model_bytes(own().model.bfloat16(), **METADATA))
    (folder / "config.json").write_text(json.dumps({"settings": {"data": str(corpus)}, "params": 1, "data": {}}))
    (tmp_path / "sts-test.csv").write_text("".join(f"{a},{b},{k}\n" for k, (a, b) in enumerate(zip(TEXTS, TEXTS[1:]))))
    for split in tagging_data.SPLITS:
        (tmp_path / f"pos.{split}.conll").write_text("He\tA\ntaught\tB\n\nShe\tA\ndied\tB\n")
    return folder


FLAGS = "--mntp_steps 2 --mntp_batch 4 --mntp_length 16 --mntp_windows 4 --simcse_steps 2 --simcse_batch 4 --probe_epochs 1 --device cpu".split()


def rows_of(tmp_path, model, *flags, out="scores.csv") -> list[dict]:
    out = tmp_path / out
    text_encoder.main([*FLAGS, "--model", str(model), "--encoders", str(out.with_suffix("")), "--out", str(out), *map(str, flags)])
    with open(out, newline="") as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def test_the_ladder_is_climbed_once_and_completed_after_an_interruption(tmp_path, run_folder, capsys, monkeypatch):
    flags = ("--stage", "causal", "none", "mntp", "mntp+simcse", "--task", "masked", tmp_path / "sts", tmp_path / "pos")
    rows = rows_of(tmp_path, run_folder, *flags)
    assert [(row["stage"], row["task"]) for row in rows] == [
        (stage, task) for stage in ("causal", "none", "mntp", "mntp+simcse") for task in ("masked", "sts", "pos")
    ]  # fmt: skip
    assert {row["metric"] for row in rows} == {"loss", "spearman", "acc"} and all(float(row["score"]) == float(row["score"]) for row in rows)
    assert rows[0]["score"] != rows[3]["score"] != rows[6]["score"] != rows[9]["score"]
    assert rows[1]["mntp_steps"] == "" and rows[7]["mntp_steps"] == "2" and rows[7]["simcse_steps"] == "" and rows[10]["simcse_steps"] == "2"
    encoders = sorted((tmp_path / "scores").iterdir())
    assert len(encoders) == 2 and all((folder / "curve.csv").exists() for folder in encoders)
    # rows that are there are skipped, and so is a causal row when only the training changes
    assert rows_of(tmp_path, run_folder, *flags) == rows and capsys.readouterr().out.count("skipped") == 12
    rows_of(tmp_path, run_folder, "--stage", "causal", "--task", tmp_path / "pos", "--mntp_share", 0.5)
    assert capsys.readouterr().out.count("skipped") == 1
    # an encoder that was not finished is trained again, to the same rows; a finished one is not
    lines = (tmp_path / "scores.csv").read_text().splitlines(keepends=True)
    (tmp_path / "scores.csv").write_text("".join(lines[:7]))
    next(folder for folder in encoders if "+" in folder.name).joinpath("encoder.json").unlink()
    monkeypatch.setattr(text_encoder, "train_masked", None)
    assert rows_of(tmp_path, run_folder, *flags) == rows


def test_the_script_runs_as_a_user_runs_it(tmp_path, run_folder):
    command = [sys.executable, "experiments/text_encoder.py", *FLAGS, "--model", run_folder, "--encoders", tmp_path / "x"]
    command += ["--out", tmp_path / "x.csv"]
    done = subprocess.run([*command, "--stage", "none", "--task", tmp_path / "pos"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "none i 10: acc" in done.stdout, done.stderr
    assert (tmp_path / "x.csv").read_text().startswith("model,stage,task")


def test_other_seeds_targets_and_styles_are_other_rows(tmp_path, run_folder):
    flags = ("--seed", 1, 2, "--mntp_target", "i-1", "i", "--mntp_style", "bert", "all")
    rows = rows_of(tmp_path, run_folder, "--stage", "mntp", "--task", "masked", *flags)
    assert len({row["score"] for row in rows}) == 8 and len(list((tmp_path / "scores").iterdir())) == 8


def test_pairs_and_a_hugging_face_model(tmp_path, run_folder, corpus):
    (tmp_path / "pairs.csv").write_text("".join(f"He taught {x}.,She taught {x}.\n" for x in ("law", "music", "botany", "grammar")))
    flags = ("--stage", "mntp+pairs", "--pairs", tmp_path / "pairs.csv", "--task", tmp_path / "sts")
    rows_of(tmp_path, run_folder, *flags, "--save", tmp_path / "kept")
    assert load_encoder(tmp_path / "kept").encode(TEXTS).shape == (4, 32)
    rows_of(tmp_path, tmp_path / "kept", "--stage", "none", "--task", tmp_path / "pos")  # a saved encoder is a model, too
    backbone = hugging_face("llama")
    transformers.LlamaForCausalLM(backbone.model.config).save_pretrained(tmp_path / "llama")
    backbone.tokenizer.save_pretrained(tmp_path / "llama")
    flags = ("--data", corpus, "--stage", "none", "mntp+simcse", "--task", "masked", tmp_path / "sts", "--lora", 2)
    rows = rows_of(tmp_path, tmp_path / "llama", *flags, out="llama.csv")
    assert len(rows) == 4 and rows[3]["lora"] == "2" and rows[0]["lora"] == ""


def test_another_text_of_the_same_name_does_not_find_the_old_encoder(tmp_path, run_folder, capsys):
    for place, text in (("a", "The first text.\n"), ("b", "Another one.\n")):
        (tmp_path / place).mkdir()
        (tmp_path / place / "text.txt").write_text(20 * text)
    flags = ("--stage", "mntp", "--task", tmp_path / "sts", "--data")
    rows = rows_of(tmp_path, run_folder, *flags, tmp_path / "a" / "text.txt")
    with pytest.raises(SystemExit, match="another --data text.txt"):
        rows_of(tmp_path, run_folder, *flags, tmp_path / "b" / "text.txt")
    assert rows_of(tmp_path, run_folder, *flags, tmp_path / "a" / "text.txt") == rows and "skipped" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, sentence",
    [(("--model", ""), "--model is missing"), (("--model", "no/such/model"), "neither a run"), (("--stage", "pairs"), "--pairs is missing"),
     (("--stage", "mntp", "--data", "nowhere"), "no prepared tokens"), (("--seed", 1, 2, "--save", "x"), "one value for every flag"),
     (("--task", "nowhere"), "does not exist"),
     (("--stage", "simcse", "--simcse_batch", 5000), "do not fill a batch")],
)  # fmt: skip
def test_wrong_requests_are_one_sentence(tmp_path, run_folder, flags, sentence):
    with pytest.raises(SystemExit, match=sentence) as error:
        rows_of(tmp_path, run_folder, "--stage", "none", "--task", tmp_path / "pos", *flags)
    assert "\n" not in str(error.value)


# ---- the table and the figure --------------------------------------------------------------------------------------


def test_table_pairs_runs_by_seed_and_says_how_many_would_decide(tmp_path, capsys):
    rows = []
    for seed in range(4):
        for p_bw, stage, value in (("0", "causal", 0.5), ("0.05", "causal", 0.5 + 0.001 * (seed - 1)), ("0", "mntp", 0.6), ("0.05", "mntp", 0.65)):
            for tuning_seed, extra in ((10, 0.02), (11, -0.02)):
                row = dict.fromkeys(text_encoder.COLUMNS, "") | {"task": "x", "metric": "f1", "position": "i", "probe_epochs": 3, "stage": stage}
                row |= {"model": f"runs/4x32_pbw{p_bw}_seed{seed}_abcdef", "seed": tuning_seed, "score": value + 0.01 * seed + extra}
                row |= {"mntp_steps": 5} if stage == "mntp" else {}
                rows.append(row)
    text_encoder.runs.write_table(tmp_path / "scores.csv", rows, text_encoder.COLUMNS)
    plot_text_encoder.main([str(tmp_path / "scores.csv")])
    out = capsys.readouterr().out
    assert "| mntp | 61.50 ± 2.05 | 66.50 ± 2.05 | +5.00 ± 0.00 (n = 4) | < 0.001 | **better** |" in out
    # differences -0.1, 0, 0.1, 0.2: mean 0.05, spread 0.129; t(0.975, 27) * 0.129 / sqrt(28) is the first below 0.05
    assert "| causal | 51.50 ± 2.05 | 51.55 ± 2.26 | +0.05 ± 0.21 (n = 4) | 0.495 | undecided (29 seeds) |" in out
    assert (tmp_path / "scores.png").stat().st_size > 10_000 and (tmp_path / "scores_differences.png").stat().st_size > 10_000
    again = [row | {"model": row["model"].replace("abcdef", "123456")} for row in rows]
    text_encoder.runs.write_table(tmp_path / "scores.csv", rows + again, text_encoder.COLUMNS)
    with pytest.raises(SystemExit, match="two different runs"):
        plot_text_encoder.main([str(tmp_path / "scores.csv")])
    with pytest.raises(SystemExit, match="no results"):
        plot_text_encoder.main([str(tmp_path / "none.csv")])


def test_verdicts_have_a_side():
    values = torch.tensor([1.0, 1.1, 0.9]).numpy()
    assert [plot_text_encoder.verdict(values, lower, 0.01) for lower in (False, True)] == ["**better**", "**worse**"]
    assert plot_text_encoder.verdict(-values, True, 0.2) == "better, uncorrected"
    assert "undecided" in plot_text_encoder.verdict(values[:2], False, float("nan"))


def test_what_is_compared_is_corrected_and_what_cannot_be_paired_is_listed(tmp_path, capsys):
    """Three variants of masked training, one with a difference; bw-only runs, which only their config.json tells; a model that is no run."""
    rows = []
    for seed in range(3):
        text_encoder.runs.write_json(tmp_path / f"4x32_pbw1_seed{seed}_abcdef" / "config.json", {"settings": {"task": "bw"}, "params": 1, "data": {}})
        for p_bw, gain in (("0", 0), ("0.05", 0.05), ("1", 9)):
            for target, style in (("i-1", "bert"), ("i", "bert"), ("i-1", "all")):
                row = dict.fromkeys(text_encoder.COLUMNS, "") | {"task": "masked", "metric": "loss", "stage": "mntp", "seed": 10}
                row |= {"model": f"{tmp_path}/4x32_pbw{p_bw}_seed{seed}_abcdef", "mntp_target": target, "mntp_style": style}
                rows.append(row | {"score": 1 + 0.1 * seed + gain * (target == "i") * (1 + 0.01 * seed)})
    rows += [row | {"model": "gpt2", "stage": "none"} for row in rows[:1]]
    text_encoder.runs.write_table(tmp_path / "scores.csv", rows, text_encoder.COLUMNS)
    plot_text_encoder.main([str(tmp_path / "scores.csv")])
    out = capsys.readouterr().out
    assert "p_bw = 0.05 is |" in out and "bw only is |" in out and "| none | gpt2 | 1 | 1.000 |" in out
    assert "| mntp | " in out and "| mntp (style all) | " in out and "(target i-1" not in out
    worse = next(line for line in out.splitlines() if "| mntp (target i) |" in line)
    assert worse.endswith("| < 0.001 | **worse** |")
