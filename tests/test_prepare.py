"""From text to tokens: sources and splits, errors, offline behaviour, nothing half-written, memory."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import CACHE, ROOT, SHARED, needs_gpt2, tokens_in

from data import encode, prepare, sources
from data.tokens import DataError, OfflineError, open_tokens


def run_script(*args, **environment):
    """The script as a user runs it, on one thread, with nothing but `environment` added."""
    return subprocess.run([sys.executable, str(ROOT / "data" / "prepare.py"), *map(str, args)], capture_output=True,
                          text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1", **environment})


# Sources and splits (with toyworld's tokenizer, which needs no files)


def decoded(folder, split):
    return tiktoken_of(folder).decode(tokens_in(folder, split))


def tiktoken_of(folder):
    return prepare.load_tokenizer(open_tokens(folder, "train").meta["tokenizer"])


def prepared(tmp_path, source, *flags):
    prepare.main([str(source), "--tokenizer", "toyworld", "--out", str(tmp_path / "out"), *flags])
    return decoded(tmp_path / "out", "train"), decoded(tmp_path / "out", "val")


def test_txt_is_one_stream_cut_at_a_line_end(tmp_path):
    lines = [f"line {i} é\n" for i in range(100)]
    (tmp_path / "book.txt").write_text("".join(lines), newline="")
    train, val = prepared(tmp_path, tmp_path / "book.txt", "--val-fraction", "0.1")
    assert train + val == "".join(lines) and train.endswith("\n") and len(val.splitlines()) in (9, 10)


def test_several_txt_end_with_the_end_of_text_token(tmp_path):
    (tmp_path / "in").mkdir()
    for name in "bca":
        (tmp_path / "in" / f"{name}.txt").write_text(f"{name}1\n{name}2\n")
    train, val = prepared(tmp_path, tmp_path / "in", "--val-fraction", "0.33")
    assert train == "a1\na2\n<|endoftext|>b1\nb2\n<|endoftext|>" and val == "c1\nc2\n<|endoftext|>"


def test_a_text_of_one_line_is_cut_between_words(tmp_path):
    (tmp_path / "text8.txt").write_text("word " * 1000)
    train, val = prepared(tmp_path, tmp_path / "text8.txt", "--val-fraction", "0.1")
    assert train + val == "word " * 1000 and train.endswith(" ") and len(val) == 500


def test_links_are_followed_and_hidden_folders_left_out_and_suffixes_have_no_case(tmp_path):
    """Copies in .git and .ipynb_checkpoints would put the validation text into the training text."""
    for place in ("in", "in/.git", "in/.ipynb_checkpoints", "elsewhere"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "A.JSONL.GZ").write_bytes(gzip.compress(b"".join(b'{"text": "%s %d"}\n' % (place.encode(), i) for i in range(5))))
    (tmp_path / "in" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "circle").symlink_to(tmp_path / "in")
    train, val = prepared(tmp_path, tmp_path / "in", "--val-fraction", "0.2")
    assert (train + val).split("<|endoftext|>")[:-1] == [f"{place} {i}" for place in ("in", "elsewhere") for i in range(5)]


def test_last_share_of_documents_and_other_fields_and_parquet(tmp_path):
    rows = [f"text {i}" for i in range(10)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"id": 1, "body": row}) + "\n\n" for row in rows))
    pq.write_table(pa.table({"body": rows}), tmp_path / "d.parquet", row_group_size=3)
    expected = ["".join(row + "<|endoftext|>" for row in part) for part in (rows[:8], rows[8:])]
    for name in ("d.jsonl", "d.parquet"):
        assert [*prepared(tmp_path, tmp_path / name, "--text-field", "body", "--val-fraction", "0.2")] == expected


def test_names_of_files_and_folders_decide_splits_and_test_is_left_out(tmp_path, capsys):
    for name in ("x.train-01.txt", "x.train-00.txt", "validation/0.txt", "x.test.txt", "latest.txt", "README.md", "dev diary.txt"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{name}\n")
    train, val = prepared(tmp_path, tmp_path / "in")
    assert train.replace("<|endoftext|>", "").splitlines() == ["dev diary.txt", "latest.txt", "x.train-00.txt", "x.train-01.txt"]
    assert val == "validation/0.txt\n"
    assert "left out, test split by file name: x.test.txt\n" in capsys.readouterr().out


def test_the_mark_in_front_of_a_file_is_no_text(tmp_path):
    mark = b"\xef\xbb\xbf"
    (tmp_path / "in").mkdir()
    for name in "ab":
        (tmp_path / "in" / f"{name}.txt").write_bytes(mark + f"{name}1\n{name}2\n".encode())
    assert prepared(tmp_path, tmp_path / "in", "--val-fraction", "0.3") == ("a1\na2\n<|endoftext|>", "b1\nb2\n<|endoftext|>")
    (tmp_path / "a.jsonl").write_bytes(mark + b'{"text": "a b"}\n{"text": "c d"}\n')
    assert prepared(tmp_path, tmp_path / "a.jsonl", "--val-fraction", "0.3") == ("a b<|endoftext|>", "c d<|endoftext|>")


def test_a_text_without_lines_or_spaces_is_cut_between_characters(tmp_path):
    text = "\u5317\u4eac" * 500
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    for share in ("0.1", "0.1003", "0.1007"):
        train, val = prepared(tmp_path, tmp_path / "text.txt", "--val-fraction", share)
        assert train + val == text and 90 < len(val) < 110


def test_what_a_killed_preparation_left_is_in_nobodys_way(tmp_path):
    """In a container every process has the same number."""
    (tmp_path / "book.txt").write_text("line one\nline two\n" * 9)
    (tmp_path / f".out.partial-{os.getpid()}").mkdir()
    assert "line one" in prepared(tmp_path, tmp_path / "book.txt")[0]
    assert (tmp_path / "out").stat().st_mode & 0o755 == 0o755


def test_toyworld_by_name(tmp_path):
    meta = prepare.main(["toyworld", "--out", str(tmp_path / "toy"), "--seed", "3", "--train-tokens", "2000"])
    assert meta["command"] == f"python data/prepare.py toyworld --out {tmp_path / 'toy'} --seed 3 --train-tokens 2000"
    assert meta["toyworld"]["seed"] == 3 and 2000 <= len(open_tokens(tmp_path / "toy", "train", verify=True)) < 3000


@needs_gpt2
@pytest.mark.skipif(not (SHARED / "wikitext" / "wiki.valid.raw").is_file(), reason="no WikiText beside the project")
@pytest.mark.parametrize("name", ["wikitext-103", "wikitext-2"])
def test_wikitext_through_datasets_gives_the_raw_files_tokens(tmp_path, gpt2, monkeypatch, name):
    """A stand-in with the hub's layout and schema: rows are lines, and blank lines have become empty strings."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    raw = (SHARED / "wikitext" / "wiki.valid.raw").read_bytes().decode()
    rows = [line if line.strip() else "" for line in raw.splitlines(keepends=True)]
    config = f"{name}-raw-v1"
    hub = tmp_path / "hub" / config
    hub.mkdir(parents=True)
    for split, part in (("train", rows[:500]), ("validation", rows), ("test", rows[:9])):
        pq.write_table(pa.table({"text": part}), hub / f"{split}-00000-of-00001.parquet")
    files = "".join(f"  - split: {s}\n    path: {config}/{s}-*\n" for s in ("test", "train", "validation"))
    (tmp_path / "hub" / "README.md").write_text(f"---\nconfigs:\n- config_name: {config}\n  data_files:\n{files}---\n")
    meta = prepare.main([name, "--hub-path", str(tmp_path / "hub"), "--out", str(tmp_path / "out"), "--workers", "2"])
    assert meta["splits"]["val"]["tokens"] == 249_887
    assert tokens_in(tmp_path / "out", "val") == gpt2.encode_ordinary(raw)
    start = "".join(raw.splitlines(keepends=True)[:500])
    assert tokens_in(tmp_path / "out", "train") == gpt2.encode_ordinary(start)


# Errors


@pytest.mark.parametrize("name, content, message", [
    ("a.txt", b"good \xc3\xa9\n" * 10 + b"bad \xff", r"a\.txt is not valid UTF-8: .* at byte offset 84;"),
    ("a.txt", b"a\n" * 2_000_000 + b"\xe2\x82", r"byte offset 4,000,000;"),
    ("a.txt", b"x" * ((1 << 20) - 1) + b"\xe2\x82(" + b"\n" * 99_999, r"byte offset 1,048,575;"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"a\.jsonl is not valid UTF-8: .* byte offset 24;"),
    ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n{"text": "\xff"}\n', mtime=0), r"byte offset 24 of the uncompressed text;"),
    ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', r"a\.jsonl, line 3: not valid JSON"),
    ("a.jsonl", b'{"text": "a"}\n["b"]\n', r"line 2: a JSON object is expected"),
    ("a.jsonl", b'{"text": "a"}\n{"title": "b", "body": "c"}\n',
     r"line 2: .*'text' is missing; .*title, body.*--text-field"),
    ("a.jsonl", b'{"text": "a"}\n{"text": null}\n', r"line 2: the field 'text' is null, not text"),
    ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 999, mtime=0)[:-20], r"a\.jsonl\.gz is damaged"),
    ("a.jsonl.gz", b"not gzip\n", r"a\.jsonl\.gz is damaged"),
    ("a.parquet", b"not parquet", r"a\.parquet cannot be read as parquet"), ("a.jsonl", b'{"text": "only one"}\n', r"has 1 document"),
    ("a.txt", b"", r"split has no text"), ("a.txt", b"word\n", r"split has a single token.*--val-fraction"),
    ("a.txt", b" was born in\n.", r"the val split has a single token"),
    ("a.jsonl", b'{"text": "a"}\n{"text": ' + b"9" * 5000 + b"}\n", r"line 2: .*digits"),
    ("a.jsonl", b'{"text": "a"}\n' + b"[" * 200_000 + b"\n", r"line 2: nested too deeply"),
    ("a.jsonl", b"\n", r"has 0 document"), ("a.pdf", b"x", r"holds no text to train on.*\.txt"),
])
def test_bad_input_is_one_sentence_that_names_the_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit, match=message) as caught:
        prepare.main([str(tmp_path / name), "--tokenizer", "toyworld", "--out", str(tmp_path / "out")])
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [name]     # nothing was left behind


def test_bad_parquet_names_the_row(tmp_path):
    invalid = pa.StringArray.from_buffers(2, pa.py_buffer(np.array([0, 1, 3], "<i4")), pa.py_buffer(b"ab\xff"))
    for column, message in ((["a", None], "row 1: the field 'text' is None, not text"), ([1, 2], "row 0: .* is 1, not"),
                            (invalid, r"row 1: the field 'text' is not valid UTF-8: .* byte offset 1 of the field")):
        pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
        with pytest.raises(DataError, match=message):
            list(sources.read_parquet(tmp_path / "a.parquet", "text"))
    with pytest.raises(DataError, match="the field 'body' is missing; the fields are text; .*--text-field"):
        list(sources.read_parquet(tmp_path / "a.parquet", "body"))
    table = pa.table({"text": [f"{i} {i * i}" for i in range(5000)]})
    pq.write_table(table, tmp_path / "a.parquet", compression="gzip")
    damaged = bytearray((tmp_path / "a.parquet").read_bytes())
    damaged[3000:9000] = bytes(6000)
    (tmp_path / "a.parquet").write_bytes(damaged)
    with pytest.raises(DataError, match="cannot be read as parquet"):
        list(sources.read_parquet(tmp_path / "a.parquet", "text"))


def test_a_worker_that_dies_is_a_clear_error():
    with pytest.raises(DataError, match="A worker ended unexpectedly.*--workers"):
        with encode.workers(2, "toyworld") as pool:
            pool.submit(os._exit, 1).result()


def test_unknown_name_and_impossible_flags_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit, match="'wikitext-104' is neither a data set"):
        prepare.main(["wikitext-104"])
    for flags in (["--val-fraction", "1"], ["--workers", "0"], ["--seed", "1"], ["--train-tokens", "9"]):
        with pytest.raises(SystemExit):
            prepare.main([str(tmp_path), *flags])
        assert flags[0] in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(SystemExit, match="neither|no tokenizer"):
        prepare.main([str(tmp_path), "--tokenizer", "gpt5"])


def test_offline_is_one_sentence_and_never_a_substitute(tmp_path):
    (tmp_path / "a.txt").write_text("a\nb\n")
    empty = {"TIKTOKEN_CACHE_DIR": str(tmp_path / "none"), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"),
             "HTTPS_PROXY": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}      # nobody answers there
    done = run_script(tmp_path / "a.txt", "--out", tmp_path / "out", **empty)
    assert done.returncode != 0 and "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert all(word in done.stderr for word in ("'gpt2'", "vocab.bpe", "TIKTOKEN_CACHE_DIR", "toyworld"))
    done = run_script("wikitext-103", "--tokenizer", "toyworld", "--out", tmp_path / "out", **empty)
    assert done.returncode != 0 and "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert all(word in done.stderr for word in ("Salesforce/wikitext", "--hub-path", "local file", "toyworld"))
    assert not (tmp_path / "out").exists()


def test_no_answer_from_the_hub_fails_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *args, **kwargs: 1 / 0)
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: pytest.fail("would retry for half a minute"))
    with pytest.raises(OfflineError, match="ZeroDivisionError"):
        next(sources.read_hub("some/where", "config", "train"))


# Complete or not at all


def test_a_failure_leaves_the_old_folder_and_success_replaces_it(tmp_path):
    good, bad = tmp_path / "good.txt", tmp_path / "bad.txt"
    good.write_text("a\nb\n" * 50)
    bad.write_bytes(b"c\n" * 3_000_000 + b"\xff\n")
    first = prepared(tmp_path, good)
    for flags in ([], ["--workers", "2"]):
        with pytest.raises(SystemExit, match="not valid UTF-8"):
            prepared(tmp_path, bad, *flags)
        assert (decoded(tmp_path / "out", "train"), decoded(tmp_path / "out", "val")) == first
    good.write_text("d\n" * 100)
    assert prepared(tmp_path, good) != first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.txt", "good.txt", "out"]


def test_a_folder_with_other_files_is_never_replaced(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a\nb\n")
    with pytest.raises(SystemExit, match=r"holds more than prepared tokens \(a\.txt\).*--out"):
        prepare.main([str(tmp_path / "texts"), "--tokenizer", "toyworld", "--out", str(tmp_path / "texts")])
    assert (tmp_path / "texts" / "a.txt").read_text() == "a\nb\n"


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_killed_preparation_leaves_nothing_under_the_final_name(tmp_path, number):
    (tmp_path / "large.jsonl").write_bytes(b'{"text": "a b c"}\n' * 400_000)
    script = subprocess.Popen([sys.executable, str(ROOT / "data" / "prepare.py"), str(tmp_path / "large.jsonl"),
                               "--out", str(tmp_path / "out"), "--tokenizer", "toyworld", "--workers", "2"], stderr=subprocess.PIPE, text=True,
                              preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a shell's background job ignores it
    while not any(path.stat().st_size for path in tmp_path.glob(".out.partial-*/train.bin")):
        assert script.poll() is None, script.stderr.read()
        time.sleep(0.005)
    script.send_signal(number)
    errors = script.communicate(timeout=20)[1]      # returns only when the workers, which share the pipe, are gone too
    assert script.returncode != 0 and "Traceback" not in errors
    left = [path.name for path in tmp_path.iterdir() if path.name != "large.jsonl"]
    assert left == [] if number != signal.SIGKILL else "out" not in left


# Memory


@needs_gpt2
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="memory is read from Linux's /proc")
def test_memory_does_not_grow_with_the_text(tmp_path):
    """Peak of the memory of all three processes (shared pages counted once) for 5 MB and 45 MB of text."""
    script = """
import multiprocessing, re, sys, threading, time
from data import prepare
peak = 0
def watch():
    global peak
    while True:
        total = 0
        for pid in ["self"] + [str(child.pid) for child in multiprocessing.active_children()]:
            try:
                total += int(re.search(r"^Pss: *([0-9]+)", open(f"/proc/{pid}/smaps_rollup").read(), re.M)[1])
            except OSError:
                pass        # it has just ended
        peak = max(peak, total // 1024)
        time.sleep(0.02)
threading.Thread(target=watch, daemon=True).start()
prepare.main(sys.argv[1:])
print(peak)
"""
    lines, peaks = b"".join(b"line %d of some text, 'quoted' and so on\n" % i for i in range(110_000)), []
    for copies in (1, 9):
        (tmp_path / "a.txt").write_bytes(lines * copies)
        done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "a.txt"), "--out", str(tmp_path / "out"),
                               "--workers", "2"], cwd=ROOT, capture_output=True, text=True,
                              env={**os.environ, "PYTHONPATH": str(ROOT), "TIKTOKEN_CACHE_DIR": str(CACHE)})
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.splitlines()[-1]))
    assert 20 < peaks[0] and peaks[1] < min(1000, peaks[0] + 40), f"MB for 5 and 45 MB of text: {peaks}"
