"""Reading tokens: checks on opening, training windows, validation windows, tokenizers."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import regex        # comes with tiktoken
from conftest import CACHE, ROOT, needs_gpt2

from data.tokens import (DataError, TrainingWindows, load_tokenizer, num_scored, open_tokens, validation_windows,
                         file_sha256)


def write_folder(folder, count=1000, dtype="uint16", split="train"):
    """A token folder whose token number i is i (so that a window shows where it comes from)."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{split}.bin"
    np.arange(count, dtype=np.dtype(dtype).newbyteorder("<")).tofile(path)
    entry = {"file": path.name, "tokens": count, "documents": 1, "bytes": count, "sha256": file_sha256(path)}
    meta = {"name": folder.name, "tokenizer": "gpt2", "vocab_size": 50257, "dtype": dtype, "eot_token": 50256,
            "splits": {split: entry}}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def tokens_of(tmp_path, count=1000, dtype="uint16"):
    return open_tokens(write_folder(tmp_path / "plain", count, dtype), "train")


# Opening


@pytest.mark.parametrize("dtype, count", [("uint16", 60_000), ("uint32", 70_000)])
def test_opens_what_was_written(tmp_path, dtype, count):
    tokens = tokens_of(tmp_path, count, dtype)
    assert len(tokens) == count and isinstance(tokens.data, np.memmap)
    assert tokens.data[-1] == count - 1 and tokens.meta["dtype"] == dtype


def test_truncated_or_longer_file_is_an_error_that_names_the_command(tmp_path):
    folder = write_folder(tmp_path / "toyworld")
    whole = (folder / "train.bin").read_bytes()
    message = r"train\.bin has .* promises 1,000 tokens.*python data/prepare\.py toyworld"
    for damaged in (whole[:-2], whole[:-1], whole + b"\0\0", b""):
        (folder / "train.bin").write_bytes(damaged)
        with pytest.raises(DataError, match=message):
            open_tokens(folder, "train")


def test_altered_file_is_found_by_its_sha256(tmp_path):
    folder = write_folder(tmp_path / "plain")
    altered = bytearray((folder / "train.bin").read_bytes())
    altered[100] ^= 1
    (folder / "train.bin").write_bytes(altered)
    open_tokens(folder, "train")
    with pytest.raises(DataError, match="sha256 differs.*python data/prepare.py"):
        open_tokens(folder, "train", verify=True)


def test_missing_folder_file_split_or_field_is_one_sentence(tmp_path):
    with pytest.raises(DataError, match="no prepared tokens in .*python data/prepare.py wikitext-103"):
        open_tokens(tmp_path / "data" / "wikitext-103", "train")
    folder = write_folder(tmp_path / "plain")
    with pytest.raises(DataError, match="'val'"):
        open_tokens(folder, "val")
    (folder / "train.bin").unlink()
    with pytest.raises(DataError, match="is missing; prepare it again"):
        open_tokens(folder, "train")
    for broken in ("{", "[]", '{"dtype": "uint16", "splits": {"train": {}}}', '{"dtype": "float", "splits": {}}'):
        (folder / "meta.json").write_text(broken)
        with pytest.raises(DataError, match="meta.json.*python data/prepare.py") as caught:
            open_tokens(folder, "train")
        assert "\n" not in str(caught.value)


def test_the_recorded_command_is_the_one_named(tmp_path):
    folder = write_folder(tmp_path / "plain")
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, "command": "python data/prepare.py books.txt --out x"}))
    (folder / "train.bin").write_bytes(b"")
    with pytest.raises(DataError, match="python data/prepare.py books.txt --out x"):
        open_tokens(folder, "train")


# Training windows


@pytest.mark.parametrize("sampling", ["shuffled", "random"])
def test_windows_are_consecutive_tokens_in_range(tmp_path, sampling):
    windows = TrainingWindows(tokens_of(tmp_path, 137), sampling, seed=3)
    starts = []
    for _ in range(300):
        batch = windows.next(3, 10)
        assert batch.shape == (3, 11) and batch.dtype == np.int64
        assert (np.diff(batch) == 1).all()
        starts += batch[:, 0].tolist()
    assert min(starts) == 0 and max(starts) == 137 - 11     # the first and the last possible start both occur


def test_a_shuffled_pass_scores_each_token_once(tmp_path):
    count, length = 1003, 10
    windows = TrainingWindows(tokens_of(tmp_path, count), seed=1)
    offsets, orders = set(), set()
    for pass_number in range(5):
        batch = windows.next(1, length)
        size = len(windows._order)
        batch = np.concatenate([batch, windows.next(size - 1, length)]) if size > 1 else batch
        scored = Counter(batch[:, 1:].ravel().tolist())
        assert set(scored.values()) == {1}
        offset = batch[:, 0].min()
        assert 0 <= offset < length and sorted(scored) == list(range(offset + 1, offset + 1 + size * length))
        assert count - (offset + 1 + size * length) < length        # what is left at the end is less than a window
        assert windows.pass_number == pass_number
        offsets.add(offset)
        orders.add(tuple(batch[:, 0] - offset))
    assert len(offsets) > 1 and len(orders) == 5


def test_a_pass_may_end_within_a_batch_and_calls_may_be_split(tmp_path):
    tokens = tokens_of(tmp_path, 95)
    for sampling in ("shuffled", "random"):
        whole, parts = (TrainingWindows(tokens, sampling, seed=5) for _ in range(2))
        expected = whole.next(41, 10)       # more than four passes at once
        sizes = [1, 2, 3, 4, 5, 6, 7, 13]
        assert (np.concatenate([parts.next(size, 10) for size in sizes]) == expected).all()


def test_a_new_length_begins_a_new_pass(tmp_path):
    windows = TrainingWindows(tokens_of(tmp_path, 1000))
    windows.next(5, 16)
    assert (windows.pass_number, windows.position) == (0, 5)
    assert windows.next(2, 32).shape == (2, 33)
    assert (windows.pass_number, windows.position) == (1, 2)
    windows.next(2, 32)
    assert (windows.pass_number, windows.position) == (1, 4)


@pytest.mark.parametrize("sampling", ["shuffled", "random"])
def test_state_restores_exactly_and_is_json(tmp_path, sampling):
    tokens = tokens_of(tmp_path, 500)
    running = TrainingWindows(tokens, sampling, seed=7)
    calls = [(3, 8), (5, 8), (7, 16), (20, 16), (30, 16), (1, 16), (4, 8)]
    states, batches = [], []
    for call in calls:
        states.append(json.loads(json.dumps(running.state())))
        batches.append(running.next(*call))
    for i, state in enumerate(states):
        restored = TrainingWindows(tokens, sampling, seed=7)
        restored.restore(state)
        for call, expected in zip(calls[i:], batches[i:]):
            assert (restored.next(*call) == expected).all()


def test_a_state_of_another_stream_is_refused(tmp_path):
    tokens = tokens_of(tmp_path, 500)
    state = TrainingWindows(tokens, seed=7).state()
    for other in (TrainingWindows(tokens, seed=8), TrainingWindows(tokens, "random", seed=7),
                  TrainingWindows(tokens_of(tmp_path, 501), seed=7)):
        with pytest.raises(DataError, match="the saved position belongs to"):
            other.restore(state)


@pytest.mark.parametrize("sampling", ["shuffled", "random"])
def test_equal_seeds_see_the_same_stream_and_others_do_not(tmp_path, sampling):
    tokens = tokens_of(tmp_path, 5000)
    state = np.random.get_state()[1].copy()
    one, two, other = (TrainingWindows(tokens, sampling, seed).next(50, 20) for seed in (1, 1, 2))
    assert (one == two).all() and not (one == other).all()
    assert (np.random.get_state()[1] == state).all()        # NumPy's shared generator is not touched


@pytest.mark.parametrize("sampling", ["shuffled", "random"])
def test_one_window_is_enough_and_less_is_a_clear_error(tmp_path, sampling):
    windows = TrainingWindows(tokens_of(tmp_path, 33), sampling)
    assert (windows.next(4, 32)[:, 0] == 0).all()
    with pytest.raises(DataError, match=r"split 'train' .* has 33 tokens, too few for one window of length 33"):
        windows.next(1, 33)
    with pytest.raises(DataError, match="sampling"):
        TrainingWindows(windows.tokens, "sorted")


def test_random_starts_are_uniform(tmp_path):
    count, length, draws = 110, 10, 20_000
    starts = TrainingWindows(tokens_of(tmp_path, count), "random").next(draws, length)[:, 0]
    counts = np.bincount(starts, minlength=count - length)
    expected = draws / (count - length)
    assert len(counts) == count - length
    assert ((counts - expected) ** 2 / expected).sum() < 99 + 4 * np.sqrt(2 * 99)     # chi squared, 4 deviations


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is read from Linux's /proc")
def test_memory_does_not_grow_over_a_long_run(tmp_path):
    script = """
import sys
from data.tokens import TrainingWindows, open_tokens, validation_windows
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))
tokens = open_tokens(sys.argv[1], "train")
windows = TrainingWindows(tokens, seed=0)
def work(times):
    for i in range(times):
        windows.next(64, (64, 128)[i // 50 % 2])
    for batch in validation_windows(tokens, 128, 64):
        pass
work(200)
before = anonymous()
work(2000)
print(anonymous() - before, len(tokens.data) * 2 // 1024)
"""
    folder = write_folder(tmp_path / "large", 1)
    np.zeros(8_000_000, "<u2").tofile(folder / "train.bin")
    meta = json.loads((folder / "meta.json").read_text())
    meta["splits"]["train"]["tokens"] = 8_000_000
    (folder / "meta.json").write_text(json.dumps(meta))
    done = subprocess.run([sys.executable, "-c", script, str(folder)], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    grown, file_size = map(int, done.stdout.split())
    assert grown < 2000 < file_size / 4, f"{grown} kB more after reading all of a {file_size} kB file several times"


# Validation windows


@pytest.mark.parametrize("count, length, batch", [(1000, 10, 7), (1001, 10, 7), (1002, 10, 7), (12, 64, 4), (65, 64, 4),
                                                  (66, 64, 1), (2, 1, 1)])
def test_validation_scores_every_token_but_the_first_once(tmp_path, count, length, batch):
    tokens = tokens_of(tmp_path, count)
    batches = list(validation_windows(tokens, length, batch))
    scored = np.concatenate([windows[:, 1:].ravel() for windows in batches])
    assert (scored == np.arange(1, count)).all() and len(scored) == num_scored(tokens)
    for windows in batches:
        assert windows.dtype == np.int64 and len(windows) <= batch and (np.diff(windows) == 1).all()
        assert windows.shape[1] == length + 1 or (windows is batches[-1] and len(windows) == 1)
    assert all((a == b).all() for a, b in zip(batches, validation_windows(tokens, length, batch)))


def test_some_validation_windows_lie_evenly_over_the_split(tmp_path):
    tokens = tokens_of(tmp_path, 1006)      # 100 full windows of 10, and a rest of 5 that is not among them
    windows = np.concatenate(list(validation_windows(tokens, 10, 3, count=4)))
    assert windows.tolist() == [list(range(start, start + 11)) for start in (0, 250, 500, 750)]
    every = list(validation_windows(tokens, 10, 100, count=100))
    assert len(every) == 1 and (every[0][:, 0] == np.arange(0, 1000, 10)).all()
    for count in (0, 101):
        with pytest.raises(DataError, match=f"100 full windows of length 10; {count} of them cannot be chosen"):
            next(validation_windows(tokens, 10, 3, count))


def test_validation_on_too_little_is_a_clear_error(tmp_path):
    with pytest.raises(DataError, match="has 1 token"):
        next(validation_windows(tokens_of(tmp_path, 1), 8, 8))


# Tokenizers


def test_an_unknown_tokenizer_is_a_clear_error():
    with pytest.raises(DataError, match="no tokenizer 'gpt5'.*gpt2"):
        load_tokenizer("gpt5")


def test_toyworld_tokenizer_needs_no_files(tmp_path, monkeypatch):
    pytest.importorskip("data.toyworld")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    encoding = load_tokenizer("toyworld")
    assert encoding.decode(encoding.encode_ordinary("Rain, 7 é 😀\n")) == "Rain, 7 é 😀\n"


def pairs_merged(word: bytes, ranks: dict[bytes, int]) -> list[int]:
    """Byte-pair encoding by its definition: the neighbours that make the lowest rank become one, until none do."""
    parts = [bytes([byte]) for byte in word]
    while True:
        joined = [(ranks[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in ranks]
        if not joined:
            return [ranks[part] for part in parts]
        i = min(joined)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


@needs_gpt2
def test_a_shortened_tokenizer_is_the_same_encoding_with_its_first_merges_only(monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(CACHE))
    gpt2, text = load_tokenizer("gpt2"), "The mayor's 1856 voyage, naïve: 😀\n\n  it didn't end<|endoftext|>"
    for size in (257, 300, 4000, 50256):
        encoding = load_tokenizer(f"gpt2:{size}")
        first = {token: rank for token, rank in gpt2._mergeable_ranks.items() if rank < size - 1}
        tokens = [token for word in regex.findall(gpt2._pat_str, text) for token in pairs_merged(word.encode(), first)]
        assert encoding.encode_ordinary(text) == tokens and encoding.decode(tokens) == text
        assert encoding.n_vocab == size == encoding.eot_token + 1
    assert len(load_tokenizer("gpt2:257").encode_ordinary(text)) == len(text.encode())
    assert load_tokenizer("gpt2:50257").encode_ordinary(text) == gpt2.encode_ordinary(text)


@needs_gpt2
@pytest.mark.parametrize("size", ["", "256", "50258", "4k", "-1", "²"])
def test_a_tokenizer_cannot_be_shortened_to_that(monkeypatch, size):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(CACHE))
    with pytest.raises(DataError, match="257 .* to 50,257 tokens"):
        load_tokenizer(f"gpt2:{size}")
