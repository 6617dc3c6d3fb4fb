"""toyworld: unambiguous, exactly as probable as it says, the same bytes everywhere.

    pytest tests/test_toyworld.py
"""

import hashlib
import json
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data import toyworld
from data.toyworld import Choice, Leaf, NotOfThisWorld, Seq, World
from data.toyworld_facts import GRAMMAR_WORDS, LEXICON, TOWNS, person_sentences, town_sentences

ROOT = Path(__file__).resolve().parent.parent
# sha256 of train.bin and val.bin for SMALL: a change of the grammar, a word list or the drawing changes them, and with
# them every measured figure. Then pin anew, on purpose.
SMALL = dict(seed=3, people=20, towns=8, train_tokens=4000, val_tokens=1000)
SMALL_SHA256 = ("ce82e2559222f306b70cc94abb4a6af50390166554d4d049b3b835111762c0e5",
                "a5e4c4ccd9e1fcb9de7faf90ed71b3d20f0fac78589381435f912c0c5f0c0a49")


@pytest.fixture(scope="module")
def worlds():
    return [World(1, people=30, towns=10), World(2, people=15, towns=5), World(3, people=25, towns=8, single=True)]


@pytest.fixture(scope="module")
def documents(worlds):
    return [(world, toyworld.generate(world, rng)) for world in worlds for rng in [random.Random(7)]
            for _ in range(300)]


def distinct_nodes(root):
    seen, stack = {}, [root]
    while stack:
        node = stack.pop()
        if id(node) not in seen:
            seen[id(node)] = node
            stack += node.parts if isinstance(node, Seq) else node.options if isinstance(node, Choice) else ()
    return list(seen.values())


# ---- exactness ------------------------------------------------------------------------------------------------


def test_parser_recovers_every_choice_and_the_log_probability(documents):
    for world, document in documents:
        assert toyworld.parse(world, document.text) == document.choices, document.text
        assert abs(toyworld.log_prob(world, document.text) - document.log_prob) < 1e-9
        assert toyworld.read(world, document.text) == document


def heads(stack):
    """The first words that a stack of nodes can yield, each with what then remains; (None, None) when it is used up."""
    if stack is None:
        yield None, None
        return
    node, rest = stack
    if isinstance(node, Choice):
        for option in node.options:
            yield from heads((option, rest))
    elif isinstance(node, Seq):
        for part in reversed(node.parts):
            rest = (part, rest)
        yield from heads(rest)
    else:
        words = node.words if isinstance(node, Leaf) else node
        yield words[0], (words[1:], rest) if words[1:] else rest


def overlap(stacks):
    """True if two stacks (option, stack) of different options yield texts of which one begins with the other."""
    by_word = {}
    for option, stack in stacks:
        for word, rest in heads(stack):
            by_word.setdefault(word, {})[option, rest] = None
    if None in by_word and len({option for group in by_word.values() for option, _ in group}) > 1:
        return True
    return any(len({option for option, _ in group}) > 1 and overlap(group) for group in by_word.values())


def test_no_option_begins_another_so_that_every_text_has_one_reading(worlds):
    """The proof of unambiguity. By induction over the grammar, if no option's text begins another option's text at any
    Choice, then no text of a node begins another of its texts, and each has one derivation."""
    assert overlap([(0, (Leaf("a quiet"), None)), (1, (Leaf("a quiet town"), None))])
    assert overlap([(0, (Leaf("a quiet"), None)), (1, (Seq([Leaf("a"), Leaf("quiet")]), None))])
    for world in worlds:
        for node in distinct_nodes(world.grammar):
            assert node.tokens > 0.5  # nothing is empty
            if isinstance(node, Choice):
                assert not overlap([(i, (option, None)) for i, option in enumerate(node.options)])


def texts(node):
    """Every (words, probability) of a node, one entry per derivation."""
    if isinstance(node, Leaf):
        return [(node.words, 1.0)]
    if isinstance(node, Choice):
        return [(words, p * q) for p, option in zip(node.probs, node.options) for words, q in texts(option)]
    found = [((), 1.0)]
    for part in node.parts:
        found = [(head + tail, p * q) for head, p in found for tail, q in texts(part)]
    return found


@pytest.mark.parametrize("first", [True, False])
def test_entropy_equals_enumeration_of_all_texts(worlds, first):
    world = worlds[1]
    for sentences in (person_sentences(world, world.people[0], first), town_sentences(world, world.towns[0], first)):
        for kind, (_, node) in sentences.items():
            every = texts(node)
            assert len({words for words, _ in every}) == len(every), kind
            assert math.isclose(math.fsum(p for _, p in every), 1.0, abs_tol=1e-12), kind
            assert math.isclose(-math.fsum(p * math.log(p) for _, p in every), node.nats, abs_tol=1e-9), kind
            assert math.isclose(math.fsum(p * len(words) for words, p in every), node.tokens, abs_tol=1e-9), kind


def test_empirical_entropy_agrees_with_the_exact_one():
    world, rng, count = World(5, people=40, towns=12), random.Random(11), 4000
    drawn = [toyworld.generate(world, rng) for _ in range(count)]
    nats, tokens = np.array([-d.log_prob for d in drawn]), np.array([d.tokens for d in drawn])
    exact_nats, exact_tokens = toyworld.entropy(world)
    ratio = exact_nats / exact_tokens
    error = np.std(nats - ratio * tokens, ddof=1) / math.sqrt(count) / tokens.mean()
    assert abs(nats.sum() / tokens.sum() - ratio) < 4 * error
    assert abs(tokens.mean() - exact_tokens) < 4 * np.std(tokens, ddof=1) / math.sqrt(count)
    assert error < 0.01 * ratio  # the comparison says something


def test_draws_follow_the_stated_probabilities():
    """A generator that drew otherwise than its log_prob says would have a wrong floor with a right-looking parser."""
    world, rng = World(0, people=2, towns=2), random.Random(1)
    first = [toyworld.generate(world, rng).choices[0] for _ in range(4000)]
    expected = world.grammar.probs[0]
    assert abs(first.count(0) / 4000 - expected) < 4 * math.sqrt(expected * (1 - expected) / 4000)


def test_a_text_that_contradicts_the_world_is_rejected(worlds):
    world, rng = worlds[0], random.Random(0)
    p = next(p for p in world.people if p.spouse)
    drawn = (toyworld.generate(world, rng) for _ in range(100_000))
    document = next(d for d in drawn if d.text.startswith(p.name) and f" in {p.born}" in d.text
                    and p.spouse.name in d.text and (" She " if p.woman else " He ") in d.text)
    other = next(q for q in world.people if q.woman == p.spouse.woman and q is not p.spouse)
    wrong = [document.text.replace(f" {p.born}", f" {p.born + 1}"), document.text.replace(p.spouse.name, other.name),
             document.text.replace(" She ", " X ").replace(" He ", " She ").replace(" X ", " He "),
             document.text.replace(" in ", "  in ", 1), document.text + " ", document.text[:-1], "",
             document.text + "\n", document.text.rpartition(". ")[0], document.text.upper(), "\U0001f600",
             document.text + toyworld.END]
    for text in wrong:
        assert text != document.text and toyworld.log_prob(world, text) == -math.inf, text
    with pytest.raises(NotOfThisWorld, match=str(p.born + 1)):
        toyworld.parse(world, wrong[0])
    assert toyworld.log_prob(worlds[1], document.text) == -math.inf


# ---- facts, spans, questions ----------------------------------------------------------------------------------


def test_spans_point_at_the_right_words(documents):
    encoding = toyworld.encoding()
    for world, document in documents:
        ids = encoding.encode_ordinary(document.text)
        assert len(ids) == document.tokens - 1
        names = {"PER": {p.name for p in world.people} | {p.family for p in world.people},
                 "TOWN": {t.name for t in world.towns}, "RIVER": {t.river for t in world.towns},
                 "OFFICE": {p.office for p in world.people}}
        inside = set()
        for start, end, label in toyworld.spans(document):
            words = encoding.decode(ids[start:end]).strip()
            assert words.isdigit() and len(words) == 4 if label == "YEAR" else words in names[label]
            inside.update(range(start, end))
        for i, token in enumerate(ids):  # and nothing that is an entity is left out
            word = encoding.decode([token]).strip()
            assert (i in inside) == (word.isdigit() or word in names["OFFICE"] or word not in GRAMMAR_WORDS
                                     and word[0].isupper()), (word, document.text)


def test_facts_are_what_the_documents_state(worlds):
    world, rng = worlds[0], random.Random(2)
    facts = {(subject, relation): value for subject, relation, value in world.facts}
    assert len(facts) == len(world.facts)  # one object each
    p = next(p for p in world.people if p.spouse)
    assert facts[facts[p.name, "spouse"], "spouse"] == p.name
    assert len({p.name for p in world.people}) == len(world.people)
    for text in (toyworld.generate(world, rng).text for _ in range(300)):
        name = " ".join(text.split()[:2])
        if text.startswith(f"{name} was born in") and (name, "born in") in facts:
            sentence = text.split(".")[0]
            assert facts[name, "born in"] in sentence and facts[name, "born in year"] in sentence
    for p in world.people:
        assert p.born < p.since and p.woman != (p.spouse.woman if p.spouse else not p.woman)


def test_held_out_pairs_are_never_stated_in_reverse(worlds):
    world, rng = worlds[1], random.Random(4)
    asked = toyworld.questions(world)
    assert {q.held_out for q in asked} == {True, False}
    assert [(q.reversed_answer, q.answer) for q in asked if q.held_out] == world.held_out
    text = "\n".join(toyworld.generate(world, rng).text for _ in range(3000))
    for q in asked:
        assert f"\n{q.prompt} {q.answer}" in text
        assert (f"\n{q.reversed_prompt} {q.reversed_answer}" in text) == (not q.held_out)
        learned = [line for line in text.split("\n") if line.startswith(q.answer) and " learned " in line]
        assert bool(learned) == (not q.held_out)


def test_single_sentences_state_the_same_world_but_for_who_teaches_whom(worlds):
    """In documents of one sentence a pair meets in that sentence only, and age no longer tells who belongs to whom."""
    single, rng = worlds[2], random.Random(4)
    whole = World(3, people=25, towns=8)
    facts, pairs = ({kind: [fact for fact in world.facts if (fact[1] in ("teacher of", "taught")) == kind] for kind in (True, False)}
                    for world in (single, whole))
    assert sorted(facts[False]) == sorted(pairs[False]) and sorted(facts[True]) != sorted(pairs[True])
    assert {name for name, relation, _ in facts[True]} == {name for name, relation, _ in pairs[True]}, "the same teachers"
    documents = [toyworld.generate(single, rng) for _ in range(4000)]
    assert all(document.text.count(".") == 1 and document.text.endswith(".") for document in documents)
    for teacher, pupil in single.held_out:
        both = {text for text in (document.text for document in documents) if teacher in text and pupil in text}
        assert both and all(text.startswith(teacher) and ("was the teacher of" in text or "taught" in text) for text in both)
    born = {p.name: p.born for p in World(0, 1000, 60, single=True).people}
    ages = np.array([(born[teacher], born[pupil]) for teacher, pupil in World(0, 1000, 60, single=True).held_out])
    assert (ages[:, 0] <= ages[:, 1]).all() and abs(np.corrcoef(ages.T)[0, 1]) < 0.15      # by age: above 0.99


def test_odd_and_smallest_and_impossible_sizes():
    for people, towns in ((2, 2), (3, 2), (7, 60)):
        world = World(0, people, towns)
        document = toyworld.generate(world, random.Random(0))
        assert toyworld.parse(world, document.text) == document.choices
    for people, towns in ((1, 40), (2000, 40), (200, 1), (200, 61)):
        with pytest.raises(ValueError, match="toyworld can hold"):
            World(0, people, towns)
    with pytest.raises(SystemExit, match="--people"):
        toyworld.main(["--people", "1"])


# ---- tokenizer ------------------------------------------------------------------------------------------------


def test_every_word_is_one_token_and_the_lexicon_is_what_the_grammar_uses(worlds):
    encoding = toyworld.encoding()
    for word in LEXICON:
        assert len(encoding.encode_ordinary(word if word in ".," else " " + word)) == 1, word
        assert not word[0].isupper() or len(encoding.encode_ordinary(word)) == 1, word
    assert len(set(LEXICON)) == len(LEXICON)
    used = {word for world in worlds + [World(0, 10, 60)] for node in distinct_nodes(world.grammar)
            if isinstance(node, Leaf) for word in node.words}
    assert used <= set(LEXICON) | {toyworld.END}
    assert set(GRAMMAR_WORDS) | set(TOWNS) <= used
    assert encoding.n_vocab == encoding.eot_token + 1
    assert encoding.encode(toyworld.END, allowed_special="all") == [encoding.eot_token]


def test_any_text_round_trips():
    encoding, rng = toyworld.encoding(), random.Random(0)
    alphabet = " \n\r\t.,'aZ09_é\u00a0\u0301\u200d\U0001f600中\u2028\x00" + "She was"
    awkward = ["", " ", "\n\n She  was\r\n", "a" * 5000, toyworld.END, "naïve 1734th \U0001f468\u200d\U0001f469"]
    for text in awkward + ["".join(rng.choice(alphabet) for _ in range(40)) for _ in range(300)]:
        assert encoding.decode(encoding.encode_ordinary(text)) == text
    for byte in range(256):
        assert encoding.decode_single_token_bytes(byte) == bytes([byte])


# ---- files ----------------------------------------------------------------------------------------------------


def hashes(folder):
    return tuple(hashlib.sha256((Path(folder) / f"{split}.bin").read_bytes()).hexdigest() for split in ("train", "val"))


def test_files_hold_the_documents_and_meta_their_floor(tmp_path):
    meta = toyworld.write_corpus(tmp_path / "world", **SMALL)
    assert json.loads((tmp_path / "world/meta.json").read_text()) == meta
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["meta.json", "train.bin", "val.bin", "world"]
    world, encoding, about = World(3, people=20, towns=8), toyworld.encoding(), meta["toyworld"]
    assert (meta["vocab_size"], meta["eot_token"]) == (encoding.n_vocab, encoding.eot_token)
    for split, size in (("train", 4000), ("val", 1000)):
        entry = meta["splits"][split]
        ids = np.fromfile(tmp_path / "world" / entry["file"], dtype="<u2")
        parts = np.split(ids, np.flatnonzero(ids == meta["eot_token"]) + 1)
        stories = [encoding.decode(part[:-1].tolist()) for part in parts]
        assert stories.pop() == "" and len(stories) == entry["documents"]
        assert size <= entry["tokens"] == len(ids) < size + 150
        assert entry["bytes"] == sum(len(s.encode()) for s in stories)
        assert entry["sha256"] == hashes(tmp_path / "world")[split == "val"]
        nll = -math.fsum(toyworld.log_prob(world, s) for s in stories) / len(ids)
        assert abs(about[f"{split}_nll"] - nll) < 1e-8
        assert abs(nll - about["entropy_per_token"]) < 4 * about[f"{split}_nll_se"]


def test_pinned_bytes(tmp_path):
    toyworld.write_corpus(tmp_path / "world", **SMALL)
    assert hashes(tmp_path / "world") == SMALL_SHA256
    toyworld.write_corpus(tmp_path / "other", **{**SMALL, "seed": 4})
    assert not set(hashes(tmp_path / "other")) & set(SMALL_SHA256)


def test_equal_bytes_whatever_the_hash_seed_and_beside_a_folder_of_the_same_name(tmp_path):
    """data/toyworld/ (the files) lies beside data/toyworld.py: the module must still be the one that is imported."""
    (tmp_path / "data").mkdir()
    for name in ("__init__.py", "tokens.py", "toyworld.py", "toyworld_facts.py"):
        shutil.copy(ROOT / "data" / name, tmp_path / "data" / name)
    shutil.copy(ROOT / "flags.py", tmp_path)
    code = f"from data import toyworld; toyworld.write_corpus('data/toyworld', **{SMALL})"
    found = []
    for hash_seed in ("1", "2"):
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True,
                       env={**os.environ, "PYTHONHASHSEED": hash_seed})
        found.append(hashes(tmp_path / "data/toyworld"))
    assert found[0] == found[1] == SMALL_SHA256
    shown = subprocess.run([sys.executable, "data/toyworld.py", "--people", "20", "--towns", "8", "--show", "2"],
                           cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert shown.count("log p =") == 2 and "nats per token" in shown


def test_a_failure_leaves_the_old_folder_alone(tmp_path, monkeypatch):
    toyworld.write_corpus(tmp_path / "world", **SMALL)
    monkeypatch.setattr(toyworld.json, "dumps", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        toyworld.write_corpus(tmp_path / "world", **{**SMALL, "seed": 9})
    assert hashes(tmp_path / "world") == SMALL_SHA256
    assert [p.name for p in tmp_path.iterdir()] == ["world"]
