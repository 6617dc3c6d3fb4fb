"""Token classification: features per word, heads, the CRF against brute force, labels, samples, scores, the command."""

import csv
import itertools
import json
import random
from collections import Counter

import pytest
import torch

pytest.importorskip("seqeval", reason="pip install -r experiments/requirements.txt")

from conftest import ROOT
from data import toyworld, toyworld_facts
from data.tokens import DataError, OfflineError
from experiments import plot_token_classification as plot
from experiments import tagging_data as tagging
from experiments import token_classification as tc
from experiments.backbone import HuggingFaceBackbone, OwnBackbone
from model import GPT, GPTConfig, model_bytes

METADATA = {"tokenizer": "toyworld", "bw_mask": "anticausal", "direction_tokens": True}


def write_model(folder, width=32, seed=2):
    folder.mkdir()
    model = GPT(GPTConfig(depth=2, width=width, vocab_size=896, max_seq_len=128), seed=seed)
    with torch.no_grad():
        model.embedding.mul_(20)
    (folder / "model.safetensors").write_bytes(model_bytes(model, **METADATA))
    (folder / "config.json").write_text(json.dumps({"settings": {}}))
    return str(folder)


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "4x32_pbw0.5_seed7_abcdef")


@pytest.fixture
def task(monkeypatch):
    """toyworld, small enough for seconds."""
    load = tagging.load_task
    monkeypatch.setattr(tc, "load_task", lambda name: load(name, (24, 8, 8)))
    return load("toyworld", (24, 8, 8))


def run(tmp_path, *flags) -> list[dict]:
    tc.main([*map(str, flags), "--task", "toyworld", "--device", "cpu", "--epochs", "2", "--out", str(tmp_path / "scores.csv")])
    with open(tmp_path / "scores.csv", newline="") as file:
        return list(csv.DictReader(file))


# ---- heads -----------------------------------------------------------------------------------------------------


def crf_batch():
    torch.manual_seed(0)
    crf = tc.CRF(3)
    for parameter in crf.parameters():
        torch.nn.init.normal_(parameter)
    present = torch.arange(4) < torch.tensor([[4], [1], [3]])
    return crf, torch.randn(3, 4, 3), torch.randint(0, 3, (3, 4)), present


def brute_force(crf, emissions, length) -> dict:
    def score(path):
        steps = sum(crf.transitions[a, b] for a, b in zip(path, path[1:]))
        return crf.start[path[0]] + sum(emissions[t, y] for t, y in enumerate(path)) + steps + crf.end[path[-1]]

    return {path: score(path).item() for path in itertools.product(range(3), repeat=length)}


def test_crf_is_the_sum_over_all_labellings():
    crf, emissions, labels, present = crf_batch()
    total, decoded = 0.0, crf.decode(emissions, present)
    for row in range(3):
        length = int(present[row].sum())
        all_scores = brute_force(crf, emissions[row], length)
        total += torch.tensor(list(all_scores.values())).logsumexp(0) - all_scores[tuple(labels[row, :length].tolist())]
        assert tuple(decoded[row, :length].tolist()) == max(all_scores, key=all_scores.get)
    torch.testing.assert_close(crf.loss(emissions, labels, present), total / present.sum())


def test_nothing_at_padding_changes_a_loss_a_gradient_or_a_label():
    for crf in (False, True):
        torch.manual_seed(1)
        head = tc.Head(5, 3, "mlp", crf, dropout=0.0)
        features, labels, present = torch.randn(3, 4, 5), torch.randint(0, 3, (3, 4)), crf_batch()[3]
        results = []
        for noise in (0.0, 9.0):
            noisy = torch.where(present[..., None], features, features + noise)
            loss = head.loss(noisy, present, torch.where(present, labels, int(noise) % 3))
            grads = torch.autograd.grad(loss, list(head.parameters()))
            results.append([loss, *grads, head.predict(noisy, present)[present]])
        assert all(torch.equal(a, b) for a, b in zip(*results))
        # and a sentence alone is labelled as in the batch
        for row, length in enumerate(present.sum(1).tolist()):
            alone = head.predict(features[row : row + 1, :length], present[row : row + 1, :length])
            assert torch.equal(alone[0], head.predict(features, present)[row, :length])


def test_the_published_head():
    layers = tc.Head(6, 3, "mlp").layers
    assert [type(layer).__name__ for layer in layers] == ["Dropout", "Linear", "ReLU", "Linear"]
    assert (layers[0].p, layers[1].weight.shape, layers[3].weight.shape) == (0.1, (6, 6), (3, 6))


# ---- features --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_features_are_the_states_at_each_words_first_or_last_token(model, task):
    sentence = tagging.Sentence(["Adela", " zzq", " was", "."], ["B-PER", "I-PER", "O", "O"])  # " zzq" takes four tokens
    words = {}
    for subtoken in ("first", "last"):
        features = tc.Features(tc.Settings(model=model, features="fw+bw", subtoken=subtoken, device="cpu"), {})
        words[subtoken], present = features.batch([sentence, *task.train[:3]])
        backbone = features.parts[0][0]
        assert len(features.modules) == 1 and present[0].sum() == 4
    ids, first = backbone.encode(sentence.words)
    assert first == [0, 1, 5, 6]
    V = backbone.model.config.vocab_size
    fw = backbone.model.hidden(torch.tensor([[V - 2, *ids]]), "causal")[0, 1:]
    bw = backbone.model.hidden(torch.tensor([[*ids, V - 1]]), "anticausal")[0, :-1]
    for subtoken, places in (("first", [0, 1, 5, 6]), ("last", [0, 4, 5, 6])):
        torch.testing.assert_close(words[subtoken][0, :4], torch.cat([fw[places], bw[places]], -1), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_frozen_features_are_live_features_computed_once(model, task):
    features, cache = tc.Features(tc.Settings(model=model, features="fw+bw", device="cpu"), {}), {}
    live, _ = features.batch(task.train[:5])
    features.freeze(task.train, cache)
    torch.testing.assert_close(features.batch(task.train[:5])[0], live, rtol=1e-4, atol=1e-5)
    again = tc.Features(tc.Settings(model=model, features="fw", device="cpu"), {})
    again.parts[0][0].states = None  # a call would fail
    again.freeze(task.train, cache)
    assert torch.equal(again.batch(task.train[:5])[0], features.batch(task.train[:5])[0][..., :32])


@torch.no_grad()
def test_the_control_is_two_forward_models_side_by_side(model, tmp_path, task):
    other = write_model(tmp_path / "4x32_pbw0.5_seed8_abcdef", seed=5)
    both, _ = tc.Features(tc.Settings(model=model, model_bw=other, features="fw+fw", device="cpu"), {}).batch(task.train[:3])
    for place, name in enumerate((model, other)):
        alone, _ = tc.Features(tc.Settings(model=name, features="fw", device="cpu"), {}).batch(task.train[:3])
        assert torch.equal(both[..., 32 * place : 32 * (place + 1)], alone)
    row = plot.pd.Series({"model": model, "model_bw": other, "features": "fw+fw", "depth": ""})
    assert plot.system(row, {}) == ("fw+fw", "p_bw = 0.5 & another seed", f"{tmp_path.name} 4x32", "")


def test_two_models_of_other_sizes_and_tokenizers_meet_at_words(model, tmp_path, task):
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = Tokenizer(models.BPE(vocab={x: k for k, x in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[]))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=letters)
    config = transformers.GPT2Config(vocab_size=256, n_positions=1024, n_embd=24, n_layer=1, n_head=2)
    other = HuggingFaceBackbone(transformers.GPT2Model(config).eval(), fast, "other")
    backbones = {"other": other}
    features = tc.Features(tc.Settings(model=model, model_bw="other", features="fw+bw", device="cpu"), backbones)
    words, present = features.batch(task.train[:4])
    assert isinstance(features.parts[0][0], OwnBackbone) and features.parts[1] == (other, "bw")
    assert words.shape[-1] == features.width == 32 + 24 and len(features.modules) == 2
    assert [len(s.words) for s in task.train[:4]] == present.sum(1).tolist()
    alone, _ = features.batch(task.train[2:3])
    torch.testing.assert_close(words[2][present[2]], alone[0], rtol=1e-4, atol=1e-5)


# ---- data ------------------------------------------------------------------------------------------------------


def write_task(folder, **splits):
    for split in tagging.SPLITS:
        (folder / f"x.{split}.conll").write_text(splits.get(split, "The\tO\nArvel\tB-RIVER\n\nYes\tO\n"), encoding="utf-8")
    return str(folder / "x")


def test_column_files(tmp_path):
    task = tagging.load_task(write_task(tmp_path, train="\n\nThe\tO\r\nRed\tB-RIVER\nArvel\tI-RIVER\n\n\nNo\tO"))
    assert [s.words for s in task.train] == [["The", " Red", " Arvel"], ["No"]]
    assert task.labels == ["O", "B-RIVER", "I-RIVER"] and task.spans and task.metric == "f1"
    assert tagging.load_task(write_task(tmp_path, train="a\tX\n", dev="a\tY\n", test="a\tX\n")).metric == "acc"


@pytest.mark.parametrize(
    "text, sentence",
    [("a b\n", "line 1: expected a word, a tab and a label"), ("a\tO\nb\tO\tX\n", "line 2"), ("a\t\n", "line 1"),
     ("a\tO\nb\tI-PER\n", "'b' has label 'I-PER' after 'O'"), ("a\tB-X\nb\tI-PER\n", "after 'B-X'"),
     ("a\tB-X\n\nb\tI-X\n", "sentence 2"), ("a\tB-X\nb\tNOUN\n", "neither O nor B-x nor I-x"), ("\n", "without sentences")],
)  # fmt: skip
def test_wrong_files_are_named(tmp_path, text, sentence):
    with pytest.raises(DataError, match=sentence):
        tagging.load_task(write_task(tmp_path, dev=text))


def test_tasks_that_are_not_there(tmp_path, monkeypatch):
    import huggingface_hub

    with pytest.raises(DataError, match=r"x.train.conll does not exist: a task is toyworld"):
        tagging.load_task(str(tmp_path / "x"))
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *a, **k: (_ for _ in ()).throw(ConnectionError("no network")))
    with pytest.raises(OfflineError, match="eriktks/conll2003 could not be read"):
        tagging.load_task("conll2003")


def test_hub_rows_become_sentences(monkeypatch):
    import datasets
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *a, **k: None)
    names = datasets.ClassLabel(names=["O", "B-PER", "I-PER"])
    features = datasets.Features({"tokens": datasets.List(datasets.Value("string")), "ner_tags": datasets.List(names)})
    rows = datasets.Dataset.from_dict({"tokens": [["Ada", "Lovelace", "."], []], "ner_tags": [[1, 2, 0], []]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: {"train": rows, "validation": rows, "test": rows})
    task = tagging.load_task("wnut17")
    assert task.dev == [tagging.Sentence(["Ada", " Lovelace", " ."], ["B-PER", "I-PER", "O"])]


def test_toyworlds_labels_are_its_spans(task):
    sentence = task.train[0]
    assert "".join(sentence.words).count(" .") == 0 and len(sentence.words) == len(sentence.labels)
    tagging.check_bio(task.train + task.dev + task.test, "toyworld")
    texts = [{"".join(s.words) for s in split} for split in (task.train, task.dev, task.test)]
    assert not texts[0] & texts[1] and not texts[0] & texts[2]
    assert {"B-PER", "I-PER", "B-TOWN", "B-YEAR"} <= set(task.labels)


def test_ahead_and_behind_name_the_fact_that_each_sentence_tells():
    """Against the grammar itself: every kind of sentence about a person, drawn on its own; none about towns."""
    world, rng, met = toyworld.World(0, people=40, towns=10), random.Random(0), Counter()

    def drawn(node) -> list[str]:
        return [x for leaf in toyworld._walk(node, lambda choice: rng.randrange(len(choice.options))).leaves for x in leaf.words]

    for person, first in itertools.product(world.people, (True, False)):
        for kind, (_, node) in toyworld_facts.person_sentences(world, person, first).items():
            words = drawn(node)
            found = tagging.told(words)
            assert [(start, stop, fact) for start, _, stop, fact in found] == [(0, len(words) - 1, kind.upper())] * (words[0] != "In"), words
            assert not found or words[: found[0][1]] in (["He"], ["She"], [person.family], person.name.split(), ["The", person.office])
            met[kind] += len(found)
    assert len(met) == 7 and min(met.values()) > 10
    assert not any(tagging.told(drawn(node)) for town in world.towns for _, node in toyworld_facts.town_sentences(world, town, True).values())


def test_no_reader_of_the_left_can_tell_what_comes():
    """The best guess of a subject's label from everything up to it, the world's facts given, is right 44 times in 100."""
    world, rng, chances = toyworld.World(0), random.Random(1), []
    documents = (toyworld.generate(world, rng) for _ in range(300))
    for document in (document for document in documents if document.choices[0] == 0):  # about a person
        words, person = tagging.words_of(document), world.people[document.choices[1]]
        weights = {kind.upper(): weight for kind, (weight, _) in toyworld_facts.person_sentences(world, person, True).items()}
        weights["OFFICE"] *= 2 / 3  # the other third begins with a year
        facts, start = {start: fact for start, _, _, fact in tagging.told(words)}, 0
        for stop in (k for k, word in enumerate(words) if word == "."):
            if start in facts:
                chances.append(max(weights.values()) / sum(weights.values()))
            del weights[facts.get(start, "OFFICE")]
            start = stop + 1
    assert 0.43 < sum(chances) / len(chances) < 0.46


def test_toyworlds_tasks_share_their_documents(task):
    behind = tagging.load_task("toyworld-behind", (24, 8, 8))
    assert [s.words for s in behind.test] == [s.words for s in task.test] and behind.spans
    assert {word for s in behind.train for word, label in zip(s.words, s.labels) if label != "O"} == {"."}


def test_few_shot_has_every_label_k_times_and_no_sentence_in_vain():
    task = tagging.load_task("toyworld", (400, 1, 1))
    count = lambda sentences: Counter(x for s in sentences for x in s.labels if x[0] == "B")  # noqa: E731
    everything, sample = count(task.train), tagging.few_shot(task.train, 16, seed=1)
    assert all(number >= min(16, everything[label]) for label, number in count(sample).items())
    assert set(count(sample)) == set(everything) and len(sample) < 60
    assert sample == tagging.few_shot(task.train, 16, seed=1) != tagging.few_shot(task.train, 16, seed=2)
    assert len(tagging.few_shot(task.train, 10**6, seed=1)) == sum(any(x[0] == "B" for x in s.labels) for s in task.train)


def test_spans_end_with_their_sentence():
    """A span at a sentence's end and one at the next one's beginning are two: the stream of all words would make one."""
    gold = [["O", "B-PER"], ["I-PER", "O"]]
    assert tagging.scores(gold, [["O", "B-PER"], ["O", "O"]]) == {"acc": 0.75, "precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3)}
    assert tagging.scores([["NOUN", "VERB"]], [["NOUN", "NOUN"]]) == {"acc": 0.5}


# ---- the command -----------------------------------------------------------------------------------------------


def test_a_grid_is_a_row_per_combination_and_done_ones_are_skipped(tmp_path, model, task, capsys):
    flags = ("--model", model, "--features", "fw", "none", "--head", "linear", "--seed", 10, 11)
    rows = run(tmp_path, *flags)
    assert [(row["features"], row["seed"]) for row in rows] == [("fw", "10"), ("fw", "11"), ("none", "10"), ("none", "11")]
    assert all(float(row["test"]) == float(row["test"]) and row["metric"] == "f1" and row["sentences"] == "24" for row in rows)
    assert run(tmp_path, *flags) == rows and capsys.readouterr().out.count("skipped") == 4
    assert len(run(tmp_path, *flags, "--crf", "true", "--shots", 2)) == 8


def test_the_same_seed_gives_the_same_row(tmp_path, model, task):
    """Rows of a grid do not depend on what ran before them."""
    rows = run(tmp_path, "--model", model, "--features", "fw", "fw+bw")
    (tmp_path / "scores.csv").unlink()
    alone = run(tmp_path, "--model", model, "--features", "fw+bw")[0]
    assert {k: v for k, v in alone.items() if k != "seconds"} == {k: v for k, v in rows[1].items() if k != "seconds"}


@pytest.mark.parametrize("finetune", ["false", "true"])
def test_a_saved_tagger_tags_as_before(tmp_path, model, task, finetune, capsys):
    flags = ("--model", model, "--features", "fw+bw", "--finetune", finetune, "--crf", "true", "--lr_backbone", 0.01)
    first, second = tmp_path / "first.conll", tmp_path / "second.conll"
    row = run(tmp_path, *flags, "--save", tmp_path / "tagger", "--predictions", first)[0]
    capsys.readouterr()
    run(tmp_path, "--load", tmp_path / "tagger", "--predictions", second)
    assert first.read_text() == second.read_text() and f"f1 {float(row['test']):.4f}" in capsys.readouterr().out
    blocks = first.read_text().strip().split("\n\n")
    assert len(blocks) == len(task.test)
    sentence = task.test[0]
    assert [line.split("\t")[:2] for line in blocks[0].split("\n")] == [[w.strip(), x] for w, x in zip(sentence.words, sentence.labels)]


def test_fine_tuning_moves_the_backbone_and_freezing_does_not(model, task):
    for finetune in (False, True):
        settings = tc.Settings(model=model, features="fw+bw", finetune=finetune, epochs=1, lr_backbone=0.01, device="cpu")
        features = tc.Features(settings, {})
        before = {name: x.clone() for name, x in features.modules.state_dict().items()}
        if not finetune:
            features.freeze(task.train + task.dev, {})
        tc.fit(settings, task, task.train, features)
        moved = [name for name, x in features.modules.state_dict().items() if not torch.equal(x, before[name])]
        assert bool(moved) == finetune and (not finetune or any("embedding" in name for name in moved))


def test_the_best_epoch_by_dev_score_is_kept(model, task, monkeypatch):
    dev_scores, weights = iter([0.1, 0.7, 0.3]), []

    def fake(gold, predicted):
        return {"f1": next(dev_scores)}

    monkeypatch.setattr(tc, "scores", fake)
    monkeypatch.setattr(tc, "tag", lambda head, *_: weights.append(head.layers[1].weight.detach().clone()))
    settings = tc.Settings(model=model, features="fw", epochs=3, device="cpu")
    features = tc.Features(settings, {})
    features.freeze(task.train, {})
    head, epoch, dev = tc.fit(settings, task, task.train, features)
    assert (epoch, dev) == (2, 0.7) and torch.equal(head.layers[1].weight, weights[1]) and not torch.equal(weights[1], weights[2])


@pytest.mark.parametrize(
    "flags, sentence",
    [((), "--model is missing"), (("--model", "MODEL", "--features", "fw+fw"), "second forward model"),
     (("--load", "nowhere"), "holds no tagger"), (("--model", "no/such/model"), "neither a run"),
     (("--model", "MODEL", "--depth", 9), "depth must be between 0 and 2"),
     (("--model", "MODEL", "--save", "x", "--seed", 1, 2), "one value for every flag")],
)  # fmt: skip
def test_wrong_requests_are_one_sentence(tmp_path, model, task, flags, sentence):
    with pytest.raises(SystemExit, match=sentence):
        run(tmp_path, *(model if flag == "MODEL" else flag for flag in flags))


def test_real_files_are_read_whole():
    if not (folder := ROOT.parent / "shared" / "data" / "tagging").exists():
        pytest.skip(f"the labelled sentences are not here ({folder.name})")
    wnut, ewt = (tagging.load_task(str(folder / name)) for name in ("wnut17-ner", "ewt-pos"))
    assert (len(ewt.train), len(ewt.dev), len(ewt.test), len(ewt.labels), ewt.metric) == (12544, 2001, 2077, 17, "acc")
    assert (len(wnut.train), len(wnut.labels), wnut.metric) == (3394, 13, "f1")
