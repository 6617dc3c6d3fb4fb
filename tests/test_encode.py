"""Texts and files are cut where their parts, encoded alone, give the tokens of the whole."""

import gzip
import json
import random

import pytest
import regex        # comes with tiktoken
from conftest import needs_gpt2, tokens_in

from data import encode, prepare, sources
from data.tokens import DataError, open_tokens

AWKWARD = {
    "spaces": "a" + " " * 5000 + "b  c \n \n  d" + " " * 700,
    "newlines": "\n" * 3000 + "x\n\n\ny\n \n" + "\n" * 999,
    "carriage returns": "one\r\ntwo\r\n\r\n three\r four \r\n",
    "emoji": "👩‍👩‍👧‍👦 🇩🇪🏳️‍🌈 😀😀 \n😀 " * 200,
    "no space": "x" * 100_000 + " y " + "é1!" * 30_000,
    "end of text": "<|endoftext|> a <|endoftext|><|endoftext|>\n<|endoftext|>" * 20,
    "other spaces": "a\u00a0b \u00a0c\u00a0 d\u3000 e\u2009 f\u0085 g\u1680\n\u2028 h\x1c i\x1f\n\x0b \x0c j " * 30,
    "apostrophes": "it's ' s we'll 'll I'Ve '' 're'd' t'\n's don 't ' ' 'm" * 50,
    "combining": "e\u0301 a\u0308\u0304 \u0301 \u0301\n क्षि นี้ \u0e31 ﷽ x\u20dd " * 50,
    "digits": "1 22 333\n4 ½ ² ③ Ⅳ ٣٤ 12'34 5.6 -7" * 50,
    "one space": " ", "one letter": "a", "nothing": "",
}
ALPHABET = ["a", "bc", "'s", "'", "'ll", " ", " ", "  ", "\n", "\n", "\r\n", "\t", "1", "23", "é", "😀", "\u00a0",
            "\u3000", "!", "<|endoftext|>", "\u0301", "\x1c", "\u0085", "字", ".", "\u200b", "/"]


def in_pieces(text, tokenizer, block, size):
    blocks = ((text[i : i + block], 0) for i in range(0, len(text), block))
    return [piece for piece, _ in encode.chunks(blocks, encode.CUTS.get(tokenizer), size)]


def check_pieces(encoding, tokenizer, text, block, size):
    pieces = in_pieces(text, tokenizer, block, size)
    assert "".join(pieces) == text
    tokens = [token for piece in pieces for token in encoding.encode_to_numpy(piece, disallowed_special=()).tolist()]
    assert tokens == encoding.encode_ordinary(text), (text[:80], block, size)
    return len(pieces)


@needs_gpt2
@pytest.mark.parametrize("kind", AWKWARD)
def test_pieces_of_awkward_text_give_the_tokens_of_the_whole(gpt2, kind):
    for block, size in ((1, 1), (7, 3), (1000, 64), (1 << 20, 1), (1 << 20, 300)):
        text = AWKWARD[kind] if block > 7 else AWKWARD[kind][:3000]
        check_pieces(gpt2, "gpt2", text, block, size)


@needs_gpt2
def test_pieces_of_random_text_give_the_tokens_of_the_whole(gpt2):
    rng = random.Random(0)
    count = 0
    for _ in range(3000):
        text = "".join(rng.choices(ALPHABET, k=rng.randrange(1, 60)))
        count += check_pieces(gpt2, "gpt2", text, rng.choice((1, 2, 5, 100)), rng.choice((1, 2, 8)))
    assert count > 6000     # the texts really were cut


@pytest.mark.parametrize("name", ["cl100k_base", "o200k_base"])
def test_the_newer_patterns_are_cut_safely_too(monkeypatch, name):
    """Their own patterns over a vocabulary of single bytes: any change in how text is split into words shows."""
    from tiktoken_ext import openai_public
    single = {bytes([i]): i for i in range(256)}
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *args, **kwargs: single)
    pattern = getattr(openai_public, name)()["pat_str"]
    rng, count = random.Random(1), 0
    for _ in range(1000):
        text = "".join(rng.choices(ALPHABET, k=rng.randrange(1, 60)))
        pieces = in_pieces(text, name, rng.choice((1, 5, 100)), rng.choice((1, 2, 8)))
        assert [w for piece in pieces for w in regex.findall(pattern, piece)] == regex.findall(pattern, text), text
        count += len(pieces)
    assert count > 2000


@pytest.mark.parametrize("name", ["gpt2", "cl100k_base"])
def test_files_are_split_unread_where_texts_may_be_cut(tmp_path, name):
    """Every part but the first begins where a text may be cut; together they are the file."""
    rng, path, cut, count = random.Random(2), tmp_path / "text.txt", encode.CUTS[name], 0
    for _ in range(500):
        text = "".join(rng.choices(ALPHABET, k=rng.randrange(1, 60)))
        path.write_bytes(text.encode())
        before, size = rng.randrange(3), rng.choice((1, 2, 8, 40))
        begin = len(text[:before].encode())
        parts = list(sources.TextPart(path, begin, len(text.encode())).split(encode.BYTE_CUTS[cut], size))
        texts = [part.text() for part in parts]
        assert "".join(texts) == text[before:] and all(part.stop - part.start >= size for part in parts[:-1])
        assert all(cut.fullmatch(a[-1] + b[0]) for a, b in zip(texts, texts[1:]))
        count += len(parts)
    assert count > 900
    for letters in (4094, 4095, 4096, 4097, sources.READ + 4095):       # around the ends of what is read to find a cut
        path.write_text("x" * letters + " y")
        part = sources.TextPart(path, 0, letters + 2)
        assert [part.stop for part in part.split(encode.BYTE_CUTS[cut], 1)] == [letters, letters + 2]
    path.write_text("short")
    (part,) = part.split(encode.BYTE_CUTS[cut], 1)
    with pytest.raises(DataError, match="became shorter"):
        part.text()


def test_long_text_is_cut_in_linear_time_and_grows_only_where_it_must():
    pieces = in_pieces("word " * 40_000 + "x" * 100_000 + " end", "gpt2", 1000, 500)
    assert max(map(len, pieces[:-3])) < 510 and max(map(len, pieces)) >= 100_000
    assert len(in_pieces("word " * 1000, "toyworld", 100, 50)) == 1     # no rule for this one: encoded whole
    examined = []

    class Counting:         # counts the characters that the search may look at
        def search(self, text, start):
            examined.append(len(text) - start)
            return encode.GPT2_CUT.search(text, start)

    list(encode.chunks((("x" * 1000, 0) for _ in range(500)), Counting(), 10))
    assert sum(examined) < 2 * 500_000


@needs_gpt2
@pytest.mark.parametrize("name", ["gpt2", "gpt2:300"])
def test_workers_give_the_tokens_of_the_whole_documents(tmp_path, gpt2, monkeypatch, name):
    encoding = prepare.load_tokenizer(name)
    monkeypatch.setattr(encode, "TASK", 200)
    texts = [*AWKWARD.values(), "\ud83d lone \ude00", "last"]
    (tmp_path / "in").mkdir()
    with gzip.open(tmp_path / "in" / "a.train.jsonl.gz", "wt", newline="") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "in" / "b.valid.txt").write_bytes("".join(AWKWARD.values()).encode())
    prepare.main([str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--workers", "2", "--tokenizer", name])
    assert tokens_in(tmp_path / "out", "train") == [t for text in texts for t in [*encoding.encode_ordinary(text), encoding.eot_token]]
    assert tokens_in(tmp_path / "out", "val") == encoding.encode_ordinary("".join(AWKWARD.values()))
    meta = open_tokens(tmp_path / "out", "train").meta
    assert meta["vocab_size"] == encoding.n_vocab and meta["splits"]["train"]["documents"] == len(texts) and meta["splits"]["val"]["documents"] == 1
    assert meta["splits"]["val"]["bytes"] == (tmp_path / "in" / "b.valid.txt").stat().st_size
