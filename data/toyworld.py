"""toyworld: an English-like encyclopaedia about an invented world, written from a seed, offline, in seconds.

    python data/toyworld.py --seed 0 --show 3          three entries, their log-probability, the entropy per token
    python data/prepare.py toyworld                    the token files (calls write_corpus below)
    python data/prepare.py toyworld-facts              documents of a single sentence, for eval_reversal.py

It is a measuring instrument. One grammar (World.grammar, in toyworld_facts.py) serves the generator, the parser and
the entropy, so that they cannot disagree:
- the generator walks the grammar and draws an option at every Choice, with the Choice's probabilities;
- the parser finds these draws again from the text. They are unique, because at every Choice no option's text is the
  beginning of another option's text (a test proves it for whole worlds), so log p(text | world) is exact;
- the entropy follows by the chain rule: H(Seq) = sum over its parts, H(Choice) = H(p) + sum of p * H(option).

The floor: a model trained on other documents of the same world cannot beat log p(text | world) on fresh text. Not by
luck either: sum of log q - log p exceeds c nats with probability at most exp(-c), for the whole text (Markov).
"""

from __future__ import annotations

import argparse
import datetime
import functools
import hashlib
import json
import math
import random
import re
import sys
from bisect import bisect
from pathlib import Path
from typing import Callable, Iterator, NamedTuple, Sequence

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.tokens import replaced_folder
from data.toyworld_facts import END, LEXICON, Choice, Leaf, Node, Seq, World

# ---- documents ------------------------------------------------------------------------------------------------


class NotOfThisWorld(ValueError):
    """The text cannot have been written about this world; says from which word on."""


class Document(NamedTuple):
    text: str  # without the end-of-text token
    tokens: int  # with it: the number of tokens that the document adds to the stream
    log_prob: float  # nats, of the text and its end, the world given
    choices: tuple[int, ...]  # the option taken at each Choice, in the order of reading
    leaves: tuple[Leaf, ...]  # the words with their entity labels


class Question(NamedTuple):
    """One fact asked in both directions of naming; answers follow their prompts after a space."""

    prompt: str  # "X was the teacher of"
    answer: str  # "Y"
    reversed_prompt: str  # "Y was a pupil of"
    reversed_answer: str  # "X"
    held_out: bool  # True: no document ever states it in the reversed order


def generate(world: World, rng: random.Random) -> Document:
    """One entry, drawn with rng.random() alone."""
    return _walk(world.grammar, lambda choice: bisect(choice.bounds, rng.random()))


def parse(world: World, text: str) -> tuple[int, ...]:
    """Every choice that `generate` made for this text. NotOfThisWorld if it cannot have made it."""
    return read(world, text).choices


def read(world: World, text: str) -> Document:
    """The Document that has this text; the inverse of generating it. NotOfThisWorld if there is none."""
    words, furthest = re.findall(r"\w+|[^\w\s]", text) + [END], [0]
    found = list(_readings(world.grammar, words, furthest))
    if not found:
        raise NotOfThisWorld(f"no entry of this world reads on with {words[furthest[0]]!r} (word {furthest[0] + 1})")
    if len(found) > 1:
        raise AssertionError(f"toyworld's grammar is ambiguous: {len(found)} readings of {text!r}")
    choices = iter(found[0])
    document = _walk(world.grammar, lambda choice: next(choices))
    if document.text != text:
        raise NotOfThisWorld("the words are those of an entry, but spaces or line ends differ from what is written")
    return document


def log_prob(world: World, text: str) -> float:
    """log p(text and its end | world) in nats, from the text alone; -inf for a text that cannot be written."""
    try:
        return read(world, text).log_prob
    except NotOfThisWorld:
        return -math.inf


def entropy(world: World) -> tuple[float, float]:
    """Exact expectations (nats per document, tokens per document, its end included). Their ratio is the entropy per
    token of the endless stream of documents."""
    return world.grammar.nats, world.grammar.tokens


def spans(document: Document) -> list[tuple[int, int, str]]:
    """(start, end, label) of each entity; document tokens [start, end); label PER, TOWN, RIVER, OFFICE or YEAR."""
    found, position = [], 0
    for leaf in document.leaves:
        if leaf.label:
            found.append((position, position + len(leaf.words), leaf.label))
        position += len(leaf.words)
    return found


def questions(world: World) -> list[Question]:
    """One Question per teacher: prompts open a document, as half of the pairs do in both orders and half in one."""
    return [Question(f"{p.name} was the teacher of", p.pupil.name, f"{p.pupil.name} was a pupil of", p.name, p.held_out)
            for p in world.people if p.pupil]


def _walk(grammar: Node, pick: Callable[[Choice], int]) -> Document:
    stack, leaves, choices, logs = [grammar], [], [], []
    while stack:
        node = stack.pop()
        if isinstance(node, Leaf):
            leaves.append(node)
        elif isinstance(node, Seq):
            stack.extend(reversed(node.parts))
        else:
            choices.append(pick(node))
            logs.append(math.log(node.probs[choices[-1]]))
            stack.append(node.options[choices[-1]])
    words = [word for leaf in leaves for word in leaf.words]
    text = "".join(word if word in ".," else " " + word for word in words[:-1])[1:]
    return Document(text, len(words), math.fsum(logs), tuple(choices), tuple(leaves))


def _readings(node: Node, words: Sequence[str], furthest: list[int], position: int = 0, rest=None) -> Iterator[tuple]:
    """All choice sequences by which node, then the linked list `rest` = (node, rest), yields words[position:]."""
    rest = (node, rest)
    while rest:
        node, rest = rest
        if isinstance(node, Leaf):
            end = position + len(node.words)
            if tuple(words[position:end]) != node.words:
                return
            position, furthest[0] = end, max(furthest[0], min(end, len(words) - 1))
        elif isinstance(node, Seq):
            for part in reversed(node.parts):
                rest = (part, rest)
        else:
            for index, option in enumerate(node.options):
                for tail in _readings(option, words, furthest, position, rest):
                    yield (index, *tail)
            return
    if position == len(words):
        yield ()


# ---- the tokenizer --------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def encoding():
    """tiktoken.Encoding "toyworld": one token per word of the lexicon (with its leading space, as in GPT-2, and
    without it for words that may open a document), all 256 bytes, END. Encodes and gives back any text."""
    import tiktoken

    ranks = {bytes([byte]): byte for byte in range(256)}
    for word in LEXICON:
        if word not in ".,":
            ranks.setdefault(b" " + word.encode(), len(ranks))
    for word in LEXICON:
        if word[0].isupper():
            ranks.setdefault(word.encode(), len(ranks))
    # every character is in exactly one piece, as tiktoken drops what no piece matches
    return tiktoken.Encoding("toyworld", pat_str=r" ?\p{L}+| ?\p{N}+|[^\s\p{L}\p{N}]|\s", mergeable_ranks=ranks,
                             special_tokens={END: len(ranks)})


# ---- the token files ------------------------------------------------------------------------------------------


def write_corpus(out_folder: str | Path, seed: int = 0, people: int = 200, towns: int = 40,
                 train_tokens: int = 750_000, val_tokens: int = 50_000, single: bool = False, command: str | None = None) -> dict:
    """Writes train.bin, val.bin and meta.json and returns meta. The two splits are independent draws from one world.

    Each split holds whole documents, an end-of-text token after each, until it has at least the tokens asked for.
    out_folder is complete or untouched. ValueError for sizes that cannot be."""
    if train_tokens < 1 or val_tokens < 1:
        raise ValueError(f"toyworld needs at least one token per split, not {train_tokens} and {val_tokens}")
    world, out = World(seed, people, towns, single), Path(out_folder)
    splits, about = {}, {"seed": seed, "people": people, "towns": towns} | ({"single": True} if single else {})
    nats, tokens = entropy(world)
    about.update(entropy_per_token=nats / tokens, nats_per_document=nats, tokens_per_document=tokens)
    with replaced_folder(out) as partial:
        for split, size in (("train", train_tokens), ("val", val_tokens)):
            splits[split], measured = _write_split(world, split, size, partial / f"{split}.bin")
            about.update(measured)
        about = {name: round(value, 9) if isinstance(value, float) else value for name, value in about.items()}
        meta = {"name": out.name, "tokenizer": "toyworld", "vocab_size": encoding().n_vocab, "dtype": "uint16",
                "eot_token": encoding().eot_token, "splits": splits, "source": "generated by data/toyworld.py",
                "licence": "Apache-2.0", "date": datetime.date.today().isoformat(), "command": command, "toyworld": about}
        (partial / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    return meta


def _write_split(world: World, split: str, size: int, path: Path) -> tuple[dict, dict]:
    """Writes one split; returns its entry in meta["splits"] and its own {split_nll, split_nll_se}, nats per token.

    nll = minus the generator's log-probability / tokens. nll_se = its standard error as a ratio over documents,
    sqrt(D/(D-1) * sum((nats_d - nll * tokens_d)**2)) / sum(tokens_d): how far nll may lie from the entropy per token
    by the luck of the draw. A model scored on these very tokens shares that luck: compare it with nll itself."""
    import numpy as np

    rng = random.Random(f"toyworld {world.seed} {len(world.people)} {len(world.towns)} {split}")
    tokenizer, ids, nats, lengths, text_bytes = encoding(), [], [], [], 0
    while len(ids) < size:
        document = generate(world, rng)
        ids += tokenizer.encode_ordinary(document.text) + [tokenizer.eot_token]
        nats.append(-document.log_prob)
        lengths.append(document.tokens)
        text_bytes += len(document.text.encode())
    if len(ids) != sum(lengths):
        raise AssertionError("toyworld's tokenizer and its count of words disagree")
    data = np.array(ids, dtype="<u2").tobytes()
    path.write_bytes(data)
    count, nll = len(lengths), math.fsum(nats) / len(ids)
    squares = math.fsum((n - nll * length) ** 2 for n, length in zip(nats, lengths))
    entry = {"file": path.name, "tokens": len(ids), "documents": count, "bytes": text_bytes,
             "sha256": hashlib.sha256(data).hexdigest()}
    se = math.sqrt(squares * count / (count - 1)) / len(ids) if count > 1 else None
    return entry, {f"{split}_nll": nll, f"{split}_nll_se": se}


def main(argv: Sequence[str] | None = None) -> float:
    """Prints sample documents and the entropy; returns the entropy per token."""
    parser = argparse.ArgumentParser(description="Shows what toyworld's encyclopaedia looks like and its entropy.")
    parser.add_argument("--seed", type=int, default=0, help="of the world and of the documents shown")
    parser.add_argument("--people", type=int, default=200)
    parser.add_argument("--towns", type=int, default=40)
    parser.add_argument("--single", action="store_true", help="documents of a single sentence, as toyworld-facts has them")
    parser.add_argument("--show", type=int, default=3, help="number of documents to print")
    args = parser.parse_args(argv)
    try:
        world = World(args.seed, args.people, args.towns, args.single)
    except ValueError as error:
        raise SystemExit(f"{error} (--people, --towns)") from None
    rng = random.Random(f"show {args.seed}")
    for _ in range(args.show):
        document = generate(world, rng)
        print(f"{document.text}\n  [{document.tokens} tokens, log p = {document.log_prob:.3f} nats]\n")
    nats, tokens = entropy(world)
    print(f"entropy {nats / tokens:.4f} nats per token = {nats:.2f} nats / {tokens:.2f} tokens per document; "
          f"{len(world.facts)} facts, vocabulary {encoding().n_vocab}")
    return nats / tokens


if __name__ == "__main__":
    main()
