"""Labelled sentences for token classification: local files, the hub, toyworld; BIO checked; few-shot samples; scores.

    task = load_task("toyworld")                       # documents of the invented world with its own entity spans
    task = load_task("toyworld-ahead")                 # the same documents; only words further on tell a label
    task = load_task("toyworld-behind")                # its mirror image; only words before tell a label
    task = load_task("data/tagging/wnut17-ner")        # the files wnut17-ner.train.conll, .dev.conll and .test.conll
    task = load_task("conll2003")                      # also wnut17, ewt-pos: from the Hugging Face hub
    sample = few_shot(task.train, 16, seed=10)         # every label at least 16 times, as far as there are so many
    print(scores([["B-PER", "O"]], [["B-PER", "O"]]))  # {"precision": 1.0, "recall": 1.0, "f1": 1.0, "acc": 1.0}

A file has one word a line, `word TAB label`, with a blank line between sentences. Labels that all are O, B-x or I-x
are spans, scored by seqeval; any others (parts of speech) are scored by accuracy.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data import toyworld
from data.tokens import DataError, OfflineError
from data.toyworld_facts import FAMILIES, MEN, OFFICES, WOMEN

SPLITS = ("train", "dev", "test")
# name -> repository, configuration, column of labels. The hub's own conversion to parquet: no code of theirs is run.
HUB = {
    "conll2003": ("eriktks/conll2003", "conll2003", "ner_tags"),
    "wnut17": ("leondz/wnut_17", "wnut_17", "ner_tags"),
    "ewt-pos": ("universal-dependencies/universal_dependencies", "en_ewt", "upos"),
}


@dataclass
class Sentence:
    words: list[str]  # with the white space in front of them, so that "".join(words) is the text
    labels: list[str]


@dataclass
class Task:
    name: str
    train: list[Sentence]
    dev: list[Sentence]
    test: list[Sentence]

    @property
    def labels(self) -> list[str]:
        """All labels of all splits, O first, then by name: the classes of a head."""
        return sorted({label for split in SPLITS for s in getattr(self, split) for label in s.labels}, key=lambda x: (x != "O", x))

    @property
    def spans(self) -> bool:
        return all(label == "O" or label[:2] in ("B-", "I-") for label in self.labels)

    @property
    def metric(self) -> str:
        """What the best epoch is chosen by, and the table shows."""
        return "f1" if self.spans else "acc"


def load_task(name: str, toyworld_sizes: tuple[int, int, int] = (2000, 500, 1000)) -> Task:
    """A task by name or by the common beginning of its three files. DataError or OfflineError: one sentence."""
    if name in TOYWORLD:
        splits = toyworld_sentences(TOYWORLD[name], toyworld_sizes)
    elif name in HUB:
        splits = hub_sentences(name)
    else:
        splits = [read_conll(Path(f"{name}.{split}.conll")) for split in SPLITS]
    task = Task(Path(name).name, *splits)
    if any(not sentences for sentences in splits):
        raise DataError(f"{name} has a split without sentences: train, dev and test all need some")
    return task


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def read_conll(path: Path) -> list[Sentence]:
    """Sentences of a file, `word TAB label` a line. DataError names the line that is no such line, or is no BIO."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: a task is {', '.join(TOYWORLD)}, {', '.join(HUB)}, or the beginning that the names of "
                        f"its .train.conll, .dev.conll and .test.conll have in common") from None  # fmt: skip
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    sentences, words, labels = [], [], []
    for number, line in enumerate([*lines, ""], 1):
        cells = line.rstrip("\r").split("\t")
        if cells == [""]:
            if words:
                sentences.append(spaced(words, labels))
            words, labels = [], []
        elif len(cells) != 2 or not cells[0].strip() or not cells[1].strip():
            raise DataError(f"{path}, line {number}: expected a word, a tab and a label, got {line!r}")
        else:
            words.append(cells[0].strip())
            labels.append(cells[1].strip())
    check_bio(sentences, str(path))
    return sentences


def spaced(words: list[str], labels: list[str]) -> Sentence:
    """Column files do not say where the text had spaces: one goes between any two words."""
    return Sentence([" " * (k > 0) + word for k, word in enumerate(words)], list(labels))


def check_bio(sentences: list[Sentence], where: str) -> None:
    """Raises DataError if labels look like spans (some B-x or I-x) but break BIO: an I-x that continues no x."""
    if not any(label[:2] in ("B-", "I-") for s in sentences for label in s.labels):
        return
    for number, sentence in enumerate(sentences, 1):
        for before, label, word in zip(["O", *sentence.labels], sentence.labels, sentence.words):
            if label != "O" and label[:2] not in ("B-", "I-"):
                raise DataError(f"{where}, sentence {number}: {label!r} is neither O nor B-x nor I-x, as other labels are")
            if label[:2] == "I-" and before not in (f"B-{label[2:]}", label):
                raise DataError(f"{where}, sentence {number}: {word.strip()!r} has label {label!r} after {before!r}: a span begins with B-")


def hub_sentences(name: str) -> list[list[Sentence]]:
    import datasets
    from huggingface_hub import HfApi

    repository, config, column = HUB[name]
    try:
        HfApi().dataset_info(repository, timeout=10)  # fails at once where load_dataset would retry for long
        loaded = datasets.load_dataset(repository, config, revision="refs/convert/parquet")
    except Exception as error:  # the hub's library has many kinds
        raise OfflineError(f"{repository} could not be read from the Hugging Face hub ({type(error).__name__}): write its splits "
                           f"as X.train.conll, X.dev.conll and X.test.conll and give --task X") from None  # fmt: skip
    splits = []
    for split in ("train", "validation", "test"):
        names = getattr(loaded[split].features[column], "feature", None)  # of a list of classes, else labels are text
        label = names.names.__getitem__ if hasattr(names, "names") else str
        splits.append([spaced(row["tokens"], [label(x) for x in row[column]]) for row in loaded[split] if row["tokens"]])
        check_bio(splits[-1], f"{repository}, {split}")
    return splits


# ---------------------------------------------------------------------------------------------------------------------
# toyworld
# ---------------------------------------------------------------------------------------------------------------------

# After its subject, the first of these words says which fact about a person a sentence tells.
FACTS = {
    "born": "BIRTH", "died": "DEATH", "known": "CHARACTER", "travelled": "TRAVEL", "served": "OFFICE", **dict.fromkeys(OFFICES, "OFFICE"),
    **dict.fromkeys(("married", "wife", "husband"), "MARRIAGE"), **dict.fromkeys(("teacher", "taught", "pupil", "learned"), "LESSON"),
}  # fmt: skip


def told(words: list[str]) -> list[tuple[int, int, int, str]]:
    """(start, end, stop, fact) of each sentence that begins with a person: its subject is words [start, end), its full
    stop word `stop`. Documents about towns have none, and neither have sentences that begin with a year."""
    found, start = [], 0
    for stop in (k for k, word in enumerate(words) if word == "."):
        first, second = words[start : start + 2]
        if first in WOMEN + MEN or (first == "The" and second in OFFICES):
            end = start + 2
        else:
            end = start + (first in ("She", "He", *FAMILIES))
        if end > start:
            found.append((start, end, stop, next(FACTS[word] for word in words[end:stop] if word in FACTS)))
        start = stop + 1
    return found


def ahead(document: toyworld.Document) -> list[tuple[int, int, str]]:
    """Spans [start, end) over the subjects, labelled with the fact that the rest of the sentence tells. The facts come
    in random order and no subject gives one away: what stands to the left only says which were told already."""
    return [(start, end, fact) for start, end, _, fact in told(words_of(document))]


def behind(document: toyworld.Document) -> list[tuple[int, int, str]]:
    """The mirror image: the full stop of the same sentences, labelled with the fact that has just been told."""
    return [(stop, stop + 1, fact) for _, _, stop, fact in told(words_of(document))]


TOYWORLD = {"toyworld": toyworld.spans, "toyworld-ahead": ahead, "toyworld-behind": behind}


def words_of(document: toyworld.Document) -> list[str]:
    return [word for leaf in document.leaves for word in leaf.words][:-1]  # without the end-of-text token


def toyworld_sentences(spans: Callable, sizes: tuple[int, int, int], seed: int = 0) -> list[list[Sentence]]:
    """Documents about the world of data/toyworld (seed 0), not those that were written to the token files; the same ones
    whatever their labels, which `spans` gives."""
    world, splits = toyworld.World(seed), []
    for split, size in zip(SPLITS, sizes):
        rng, sentences = random.Random(f"tagging {seed} {split}"), []
        for _ in range(size):
            document = toyworld.generate(world, rng)
            words = words_of(document)
            labels = ["O"] * len(words)
            for start, end, label in spans(document):
                labels[start:end] = [f"B-{label}"] + [f"I-{label}"] * (end - start - 1)
            text = [word if k == 0 or word in ".," else " " + word for k, word in enumerate(words)]
            sentences.append(Sentence(text, labels))
        splits.append(sentences)
    return splits


# ---------------------------------------------------------------------------------------------------------------------
# Sampling and scoring
# ---------------------------------------------------------------------------------------------------------------------


def few_shot(sentences: list[Sentence], k: int, seed: int) -> list[Sentence]:
    """Sentences in random order, each kept if it holds a label that was met fewer than k times so far.

    A span counts once, at its B; O counts for nothing. So every label is met at least k times, or as often as there is
    one. The sample for a larger k begins with that for a smaller one only by chance: they are drawn alike, not nested.
    """
    sentences = random.Random(f"few-shot {seed}").sample(sentences, len(sentences))
    met: dict[str, int] = {}
    kept = []
    for sentence in sentences:
        labels = [label for label in sentence.labels if label != "O" and label[:2] != "I-"]
        if any(met.get(label, 0) < k for label in labels):
            kept.append(sentence)
            for label in labels:
                met[label] = met.get(label, 0) + 1
    return kept


def scores(gold: list[list[str]], predicted: list[list[str]]) -> dict[str, float]:
    """Per-word accuracy, and for BIO labels seqeval's span precision, recall and F1 over sentences, as shares of 1."""
    pairs = [(a, b) for g, p in zip(gold, predicted, strict=True) for a, b in zip(g, p, strict=True)]
    result = {"acc": sum(a == b for a, b in pairs) / len(pairs)}
    if all(a == "O" or a[:2] in ("B-", "I-") for a, _ in pairs):
        from seqeval.metrics.sequence_labeling import precision_recall_fscore_support

        found = precision_recall_fscore_support(gold, predicted, average="micro", zero_division=0)
        result |= dict(zip(("precision", "recall", "f1"), map(float, found)))
    return result


def write_conll(path: str | Path, sentences: list[Sentence], predicted: list[list[str]]) -> None:
    """word TAB label TAB predicted label, a blank line between sentences."""
    lines = ["\n".join(f"{w.strip()}\t{g}\t{p}" for w, g, p in zip(s.words, s.labels, labels)) for s, labels in zip(sentences, predicted)]
    Path(path).write_text("\n\n".join(lines) + "\n", encoding="utf-8")
