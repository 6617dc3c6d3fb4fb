"""Where text comes from: WikiText on the Hugging Face hub; local .txt, .jsonl, .jsonl.gz and .parquet; their splits.

    splits, size = local_splits(Path("texts"), field="text", val_fraction=0.01)
    for blocks, ends in splits["val"]:              # a document: its text in blocks, and whether end-of-text follows
        print(sum(len(text) for text, read in blocks))

Everything is read as it is asked for. Whatever is wrong with a file is a DataError that names the place.
"""

from __future__ import annotations

import codecs
import gzip
import io
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from data.encode import Blocks, Document
from data.tokens import DataError, OfflineError

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
SPLIT_WORDS = {"train": "train", "training": "train", "test": "test",
               "val": "val", "valid": "val", "validation": "val", "dev": "val"}
READ = 1 << 20              # bytes read at a time


# --------------------------------------------------------------------------------------------------------------------
# Reading


def invalid_utf8(path: Path, offset: int, error: UnicodeDecodeError) -> DataError:
    where = " of the uncompressed text" if zipped(path) else ""
    return DataError(f"{path} is not valid UTF-8: {error.reason} at byte offset {offset:,}{where}; "
                     f"convert it to UTF-8 or repair that place")


@dataclass(frozen=True)
class TextPart:
    """Bytes start..stop of a text file, line ends as they are: blocks of text, or smaller parts, which nobody has read yet."""

    path: Path
    start: int
    stop: int

    def __iter__(self) -> Iterator[tuple[str, int]]:
        """(text, bytes read for it), a block at a time."""
        decoder, start = codecs.getincrementaldecoder("utf-8")(), self.start
        with open(self.path, "rb") as file:
            file.seek(start)
            while start < self.stop:
                block = file.read(min(READ, self.stop - start))
                if not block:
                    raise DataError(f"{self.path} became shorter while it was read")
                undecoded = len(decoder.getstate()[0])          # start of a character that the last block cut in two
                try:
                    text = decoder.decode(block, final=start + len(block) == self.stop)
                except UnicodeDecodeError as error:
                    raise invalid_utf8(self.path, start - undecoded + error.start, error) from None
                start += len(block)
                yield text, len(block)

    def text(self) -> str:
        return "".join(text for text, _ in self)

    def split(self, cut: re.Pattern, size: int) -> Iterator[TextPart]:
        """Parts of at least `size` bytes, up to the first byte of the next match of `cut` (two bytes of ASCII, which are
        never parts of other characters). Only what lies around the cuts is read."""
        start = self.start
        with open(self.path, "rb") as file:
            while (end := self.behind_match(file, cut, start + size - 1)) < self.stop:
                yield TextPart(self.path, start, end)
                start = end
        yield TextPart(self.path, start, self.stop)

    def behind_match(self, file: BinaryIO, cut: re.Pattern, position: int) -> int:
        """Behind the first byte of the first match at or after `position`; `stop` without one."""
        length = 1 << 12
        while position < self.stop:
            file.seek(position)
            window = file.read(min(length, self.stop - position))
            if found := cut.search(window):
                return position + found.start() + 1
            if not window:          # became shorter: whoever reads this part will say so
                break
            position, length = position + max(1, len(window) - 1), READ        # a match may lie across two windows
        return self.stop


def read_jsonl(path: Path, field: str) -> Iterator[tuple[str, int]]:
    """(text, bytes of the file read for it) of every non-empty line."""
    with open(path, "rb") as raw:
        lines = io.BufferedReader(gzip.open(raw), READ) if zipped(path) else raw
        offset = done = 0
        try:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    position = raw.tell()
                    text = line if offset else line.removeprefix(codecs.BOM_UTF8)
                    yield json_text(path, number, offset, text, field), position - done
                    done = position
                offset += len(line)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{path} is damaged: {error}") from None


def json_text(path: Path, number: int, offset: int, line: bytes, field: str) -> str:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise invalid_utf8(path, offset + error.start, error) from None
    except RecursionError:
        raise DataError(f"{path}, line {number:,}: nested too deeply") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {number:,}: not valid JSON ({error.msg} at column {error.colno})") from None
    except ValueError as error:         # a number of thousands of digits
        raise DataError(f"{path}, line {number:,}: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"{path}, line {number:,}: a JSON object is expected, not {type(row).__name__}")
    if not isinstance(row.get(field), str):
        what = f"is {json.dumps(row[field])[:40]}, not text" if field in row else "is missing"
        raise DataError(f"{path}, line {number:,}: the field {field!r} {what}; "
                        f"the fields are {', '.join(row) or 'none'}; choose one with --text-field")
    return row[field]


def read_parquet(path: Path, field: str) -> Iterator[tuple[str, int]]:
    """(text, its share of the file's bytes) of every row."""
    with open_parquet(path) as table:
        names = table.schema_arrow.names
        if field not in names:
            raise DataError(f"{path}: the field {field!r} is missing; the fields are {', '.join(names)}; "
                            f"choose one with --text-field")
        share = path.stat().st_size // max(1, table.metadata.num_rows)
        values = (value for batch in table.iter_batches(batch_size=64, columns=[field]) for value in batch.column(0))
        for number, value in enumerate(values):
            try:
                text = value.as_py()
            except UnicodeDecodeError as error:
                raise DataError(f"{path}, row {number:,}: the field {field!r} is not valid UTF-8: {error.reason} "
                                f"at byte offset {error.start:,} of the field") from None
            if not isinstance(text, str):
                raise DataError(f"{path}, row {number:,}: the field {field!r} is {text!r:.40}, not text")
            yield text, share


@contextmanager
def open_parquet(path: Path):
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile
    try:
        with ParquetFile(path, pre_buffer=False) as table:      # pre_buffer would hold whole row groups in memory
            yield table
    except (ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as parquet: {str(error).splitlines()[0]}") from None


def read_hub(hub_path: str, config: str, split: str) -> Blocks:
    """A split of WikiText as one stream, the raw file's text. Raises OfflineError if the hub cannot be reached."""
    source = f"data set {hub_path!r} ({config}, split {split})"
    try:
        if not Path(hub_path).is_dir():
            from huggingface_hub import HfApi
            HfApi().dataset_info(hub_path, timeout=10)      # fails at once where load_dataset would retry for long
        import datasets
        rows = datasets.load_dataset(hub_path, config, split=split, streaming=True)
        for batch in rows.iter(batch_size=1000):
            if "text" not in batch:
                raise DataError(f"The {source} has no column 'text', only {', '.join(batch)}")
            # The hub's rows are the raw file's lines with their line ends, but a line of nothing but white space,
            # which in the raw file is " \n" throughout, became "".
            text = "".join(row or " \n" for row in batch["text"])
            yield text, len(text.encode())
    except DataError:
        raise
    except Exception as error:      # requests, httpx, fsspec, datasets: each has exceptions of its own for "no network"
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise OfflineError(f"The {source} could not be read from the Hugging Face hub ({type(error).__name__}: "
                           f"{reason}); without a network, prepare a local file or folder of text, point --hub-path "
                           f"at a copy of the data set, or use toyworld, which needs nothing.") from None


# --------------------------------------------------------------------------------------------------------------------
# Splits


def suffix_of(path: Path) -> str | None:
    return next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), None)


def zipped(path: Path) -> bool:
    return path.name.lower().endswith(".gz")


def text_files(folder: Path) -> list[Path]:
    """All files of text below a folder, through links; hidden files and folders (.git, .ipynb_checkpoints) are none."""
    found, seen = [], set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = [] if real in seen else [name for name in folders if not name.startswith(".")]  # links may lead in circles
        found += [] if real in seen else [Path(place, name) for name in files if suffix_of(Path(name)) and not name.startswith(".")]
        seen.add(real)
    return sorted(found)


def split_of(path: Path) -> str | None:
    """"train", "val" or "test" if a part of the file's name (or else of its folders' names) says so."""
    for part in reversed(path.parts):
        for word in re.split(r"[._\-\d]+", part.lower()):      # not at spaces: "Val Kilmer.txt" is an article
            if word in SPLIT_WORDS:
                return SPLIT_WORDS[word]
    return None


def some(files: list[Path], folder: Path) -> str:
    names = ", ".join(str(path.relative_to(folder)) for path in files[:3])
    return names + (f" and {len(files) - 3} more" if len(files) > 3 else "")


def local_splits(source: Path, field: str, val_fraction: float) -> tuple[dict[str, Iterator[Document]], int]:
    """Documents of each split of a file or folder, and the bytes of its files. Files of a test split are left out, which is said."""
    if source.is_file():
        files, named = [source], {None: [source]}
    else:
        files = text_files(source)
        named = {}
        for path in files:
            named.setdefault(split_of(path.relative_to(source)), []).append(path)
    if test := named.pop("test", []):
        print(f"left out, test split by file name: {some(test, source)}")
        files = sorted({*files} - {*test})
    if not files or not suffix_of(files[0]):
        raise DataError(f"{source} holds no text to train on: it takes files of type {', '.join(SUFFIXES)}")
    size = sum(path.stat().st_size for path in files)
    val = named.get("val", [])
    train = sorted({*files} - {*val})
    if train and val:
        print(f"validation split, by file name: {some(val, source)} (no share of the text is set aside)")
        return {"train": documents(train, field), "val": documents(val, field)}, size
    if all(suffix_of(path) == ".txt" for path in files):
        return share_of_bytes(files, val_fraction), size
    if any(suffix_of(path) == ".txt" for path in files):
        raise DataError(f"{source} mixes .txt files with documents and names no splits; "
                        f"put 'train' and 'val' into the file names, or prepare one kind")
    count = sum(count_documents(path) for path in files)
    if count < 2:
        raise DataError(f"{source} has {count} document(s); a training and a validation split take two")
    first_val = count - min(count - 1, max(1, round(count * val_fraction)))
    stream = documents(files, field)        # read once: the training split is taken before the validation split
    return {"train": itertools.islice(stream, first_val), "val": stream}, size


def documents(files: list[Path], field: str) -> Iterator[Document]:
    for path in files:
        if suffix_of(path) == ".txt":
            yield TextPart(path, beginning(path), path.stat().st_size), len(files) > 1
        else:
            for block in (read_parquet if suffix_of(path) == ".parquet" else read_jsonl)(path, field):
                yield (block,), True


def share_of_bytes(files: list[Path], val_fraction: float) -> dict[str, Iterator[Document]]:
    """The last share of the bytes of all .txt files, or a little more: cut where a line begins, or if all is one line, a word or a character."""
    sizes = [path.stat().st_size for path in files]
    edge = int(sum(sizes) * (1 - val_fraction))
    train, val = [], []
    for path, size in zip(files, sizes):
        cut = 0 if edge <= 0 else size if edge >= size else behind(path, edge, b"\n") or behind(path, edge, b" ") or character(path, edge)
        edge -= size
        start = beginning(path)
        train += [(path, start, cut)] * (cut > start)
        val += [(path, max(start, cut), size)] * (cut < size)
    ends = len(files) > 1
    return {"train": ((TextPart(*part), ends) for part in train), "val": ((TextPart(*part), ends) for part in val)}


def behind(path: Path, position: int, mark: bytes) -> int:
    """Where what follows the last mark (one byte) before byte `position` begins; 0 without one."""
    with open(path, "rb") as file:
        while position > 0:
            start = max(0, position - READ)
            file.seek(start)
            if (found := file.read(position - start).rfind(mark)) >= 0:
                return start + found + 1
            position = start
    return 0


def character(path: Path, position: int) -> int:
    """Where the character that byte `position` belongs to begins."""
    with open(path, "rb") as file:
        file.seek(start := max(0, position - 3))
        window = file.read(position + 1 - start)
    return start + max((i for i, byte in enumerate(window) if byte & 0xC0 != 0x80), default=0)


def beginning(path: Path) -> int:
    """Where a text file's text begins: behind the mark that some editors put in front of UTF-8."""
    with open(path, "rb") as file:
        return 3 if file.read(3) == codecs.BOM_UTF8 else 0


def count_documents(path: Path) -> int:
    if suffix_of(path) == ".parquet":
        with open_parquet(path) as table:
            return table.metadata.num_rows
    with gzip.open(path) if zipped(path) else open(path, "rb") as lines:
        try:
            return sum(1 for line in lines if line.strip())
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{path} is damaged: {error}") from None
