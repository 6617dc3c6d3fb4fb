"""Token folders: memory-mapped files, training windows, validation windows, tokenizers. NumPy only.

A token folder (written by data/prepare.py) holds train.bin and val.bin, little-endian tokens without a header, and
meta.json, which says what they are. A window is length + 1 tokens: `length` of them are scored.

    from data.tokens import open_tokens, TrainingWindows, validation_windows, load_tokenizer

    train, val = open_tokens("data/toyworld", "train"), open_tokens("data/toyworld", "val")
    windows = TrainingWindows(train, sampling="shuffled", seed=0).next(count=8, length=128)    # (8, 129) int64
    for windows in validation_windows(val, length=128, batch=16): ...                          # (16, 129) int64
    print(load_tokenizer(train.meta["tokenizer"]).decode(windows[0].tolist()))
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flags import UserError

if TYPE_CHECKING:
    import tiktoken

DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
FEWEST = {"train": 1, "val": 2}           # tokens that a split must have to be learned from, or scored
PREPARED_BY_NAME = ("toyworld", "toyworld-facts", "wikitext-2", "wikitext-103")      # data sets that prepare.py can get by name


class DataError(UserError, ValueError):
    """Token files, text or settings that do not fit together; the message is one sentence for the user."""


class OfflineError(UserError, RuntimeError):
    """Something had to come from the network and did not; the message says what was tried and what works instead."""


# --------------------------------------------------------------------------------------------------------------------
# Token files


@dataclass
class Tokens:
    """One split of a prepared text. `data` is memory-mapped: reading it costs file cache, not process memory."""

    folder: Path
    split: str
    data: np.memmap         # (N,) uint16 or uint32
    meta: dict              # the folder's meta.json

    def __len__(self) -> int:
        return len(self.data)

    @property
    def floor(self) -> tuple[float | None, float]:
        """The lowest loss possible on a validation split and its standard error, nats per token, where that is known: of toyworld."""
        world = self.meta.get("toyworld")
        return (world["val_nll"], world["val_nll_se"]) if world else (None, 0.0)

    def first(self, count: int) -> "Tokens":
        """The same split, ended after `count` tokens. DataError if it has fewer."""
        if count > len(self):
            raise DataError(f"split {self.split!r} in {self.folder} has {len(self):,} tokens, fewer than the {count:,} "
                            f"asked for; choose fewer or a larger text")
        return Tokens(self.folder, self.split, self.data[:count], self.meta)


def describe_tokens(train: Tokens, val: Tokens) -> dict:
    """What config.json of a run says of its data."""
    meta, (floor, error) = train.meta, val.floor
    return {"name": meta["name"], "tokenizer": meta["tokenizer"], "train_tokens": len(train), "val_tokens": len(val),
            "sha256": {split: meta["splits"][split]["sha256"] for split in ("train", "val")}, "floor": floor, "floor_se": error}


def open_tokens(folder: str | Path, split: str, verify: bool = False) -> Tokens:
    """Open `folder`/`split`.bin and check its size and type (with `verify` also its sha256) against meta.json.

    Raises DataError if anything is missing or does not match; the message names the command that repairs it.
    """
    folder = Path(folder)
    meta = read_meta(folder)
    repair = f"prepare it again with: {repair_command(folder, meta)}"
    try:
        entry = meta["splits"][split]
        path, count, dtype = folder / entry["file"], entry["tokens"], DTYPES[meta["dtype"]]
        sha256 = entry["sha256"]
    except (KeyError, TypeError) as error:
        raise DataError(f"{folder / 'meta.json'} does not describe a split {split!r} ({error} is unknown or missing); "
                        f"{repair}") from None
    if not path.is_file():
        raise DataError(f"{path} is missing; {repair}")
    size = path.stat().st_size
    if size != count * dtype.itemsize:
        raise DataError(f"{path} has {size:,} bytes where meta.json promises {count:,} tokens of type {meta['dtype']} "
                        f"({count * dtype.itemsize:,} bytes); {repair}")
    if count < FEWEST[split]:
        raise DataError(f"{path} holds {count or 'no'} token{'s' * (count != 1)}, too few to {'score' if split == 'val' else 'train on'}; {repair}")
    if verify and file_sha256(path) != sha256:
        raise DataError(f"{path} is not the file that was prepared (its sha256 differs from meta.json's); {repair}")
    return Tokens(folder, split, np.memmap(path, dtype=dtype, mode="r"), meta)


def find_folder(name: str | Path) -> Path:
    """A token folder given as a path, or by its name under this project's data/."""
    return Path(name) if (Path(name) / "meta.json").exists() else Path(__file__).parent / name


def read_meta(folder: str | Path) -> dict:
    """meta.json of a token folder. Raises DataError if the folder is not prepared or the file is unreadable."""
    folder = Path(folder)
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"There are no prepared tokens in {folder} (no meta.json); "
                        f"prepare them with: {repair_command(folder, {})}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); "
                        f"prepare it again with: {repair_command(folder, {})}") from None
    if not isinstance(meta, dict):
        raise DataError(f"{path} is not a table of settings; prepare it again with: {repair_command(folder, {})}")
    return meta


def repair_command(folder: Path, meta: dict) -> str:
    """The command that writes this folder: the recorded one, or the best guess from the folder's name."""
    if meta.get("command"):
        return meta["command"]
    what = folder.name if folder.name in PREPARED_BY_NAME else "FILE_OR_FOLDER_OF_TEXT"
    standard = folder.parent.name == "data" and folder.name in PREPARED_BY_NAME
    return f"python data/prepare.py {what}" + ("" if standard else f" --out {folder}")


def file_sha256(path: Path) -> str:
    """Hex digest of a file of any size, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def replaced_folder(out: Path) -> Iterator[Path]:
    """An empty folder that takes the place of `out` when the block ends well, and vanishes when it does not."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    old = out.with_name(partial.name.replace(".partial-", ".old-"))
    partial.chmod(0o755)
    try:
        yield partial
        if out.exists():
            out.rename(old)
        partial.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        if old.exists() and not out.exists():       # stopped between the two renames
            old.rename(out)
        shutil.rmtree(partial, ignore_errors=True)


def check_split(source: str, split: str, tokens: int) -> None:
    """DataError for a split that cannot be trained on or scored."""
    if tokens < FEWEST[split]:
        raise DataError(f"{source}: the {split} split has {'a single token' if tokens else 'no text'}; give a larger text, "
                        f"another --val-fraction, or files of your own for train and val")


def check_out(out: Path) -> None:
    """Refuse to replace anything but an earlier preparation."""
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file; choose a folder with --out")
    others = sorted({p.name for p in out.iterdir()} - {"train.bin", "val.bin", "meta.json"}) if out.is_dir() else []
    if others:
        raise DataError(f"{out} would be replaced, but holds more than prepared tokens ({', '.join(others[:3])}); "
                        f"choose another folder with --out")


# --------------------------------------------------------------------------------------------------------------------
# Training windows


class TrainingWindows:
    """An endless stream of training windows. All randomness is a function of (seed, position in the stream).

    "shuffled": each pass cuts the tokens into windows with stride `length` from a random offset below `length` and
    visits them in random order. A window holds length + 1 tokens, so the next one begins with this one's last token
    and each token is scored once a pass (those before the offset and in the incomplete last window wait for another
    pass). A pass that is used up, or a new `length`, begins a new pass with a new order and a new offset.
    "random": every window begins at a uniformly random position, as in hlb-gpt.

    How the stream is split into calls changes nothing: next(8) gives the windows of two next(4). Only the order of
    one pass is in memory (4 bytes per window). Orders are equal under equal NumPy versions.
    """

    def __init__(self, tokens: Tokens, sampling: str = "shuffled", seed: int = 0):
        if sampling not in ("shuffled", "random"):
            raise DataError(f"sampling must be 'shuffled' or 'random', not {sampling!r}")
        self.tokens, self.sampling, self.seed = tokens, sampling, seed
        self.pass_number = -1       # shuffled: the current pass; the first one is 0
        self.length = 0             # shuffled: the window length that this pass was cut for
        self.position = 0           # shuffled: windows of this pass already given; random: windows given so far
        self._order = np.empty(0, np.uint32)
        self._offset = 0

    def next(self, count: int, length: int) -> np.ndarray:
        """The next `count` windows: (count, length + 1) int64. Raises DataError if not even one window fits."""
        if count < 1 or length < 1:
            raise DataError(f"a batch needs at least one window of at least one token, not {count} x {length}")
        if len(self.tokens) < length + 1:
            raise DataError(f"split {self.tokens.split!r} in {self.tokens.folder} has {len(self.tokens):,} tokens, too "
                            f"few for one window of length {length:,}, which takes {length + 1:,}; "
                            f"choose a smaller length or a larger text")
        draw = self._shuffled_starts if self.sampling == "shuffled" else self._random_starts
        return gather(self.tokens.data, draw(count, length), length + 1)

    def _shuffled_starts(self, count: int, length: int) -> np.ndarray:
        if length != self.length:
            self._begin_pass(self.pass_number + 1, length)
        starts = np.empty(count, np.int64)
        filled = 0
        while filled < count:
            if self.position == len(self._order):
                self._begin_pass(self.pass_number + 1, length)
            chosen = self._order[self.position : self.position + count - filled]
            starts[filled : filled + len(chosen)] = self._offset + chosen.astype(np.int64) * length
            self.position += len(chosen)
            filled += len(chosen)
        return starts

    def _begin_pass(self, pass_number: int, length: int) -> None:
        """Draw offset and order of a pass; they depend on nothing but seed, pass, length and number of tokens."""
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, 0, pass_number])))
        count = len(self.tokens)
        self._offset = int(rng.integers(min(length, count - length)))      # leaves room for at least one window
        self._order = np.arange((count - 1 - self._offset) // length, dtype=np.uint32)
        rng.shuffle(self._order)
        self.pass_number, self.length, self.position = pass_number, length, 0

    def _random_starts(self, count: int, length: int) -> np.ndarray:
        # A counter-based generator is asked for draws number position ... position + count - 1. It makes them in
        # blocks of four, so up to three are thrown away in front.
        bits = np.random.Philox(np.random.SeedSequence([self.seed, 1])).advance(self.position // 4)
        skip = self.position % 4
        uniform = (bits.random_raw(skip + count)[skip:] >> np.uint64(11)) * 2.0**-53
        self.position += count
        return (uniform * (len(self.tokens) - length)).astype(np.int64)

    def state(self) -> dict:
        """Where the stream stands, as a small dictionary for a checkpoint."""
        return {"sampling": self.sampling, "seed": self.seed, "tokens": len(self.tokens),
                "pass_number": self.pass_number, "length": self.length, "position": self.position}

    def restore(self, state: dict) -> None:
        """Continue exactly where `state` was taken. Raises DataError if it belongs to another stream."""
        for name, own in (("sampling", self.sampling), ("seed", self.seed), ("tokens", len(self.tokens))):
            if state[name] != own:
                raise DataError(f"the saved position belongs to training windows with {name} = {state[name]!r}, "
                                f"but here it is {own!r}; continue with the same data and settings, or start a new run")
        self.pass_number, self.length = state["pass_number"], state["length"]
        if self.pass_number >= 0:
            self._begin_pass(self.pass_number, self.length)
        self.position = state["position"]


def gather(data: np.ndarray, starts: np.ndarray, size: int) -> np.ndarray:
    """data[s : s + size] for every s in starts: (len(starts), size) int64."""
    return np.asarray(data)[starts[:, None] + np.arange(size)].astype(np.int64)


# --------------------------------------------------------------------------------------------------------------------
# Validation windows


def validation_windows(tokens: Tokens, length: int, batch: int, count: int | None = None) -> Iterator[np.ndarray]:
    """The whole split in its own order, the same for every run: int64 arrays (b, length + 1) with b <= batch.

    Stride = length, so N - 1 tokens are scored exactly once: all but the last (without direction tokens, forward: but
    the first). What is left at the end (fewer than length + 1 tokens) comes as one shorter window (1, r + 1). With `count`, only so many of the full
    windows, spread evenly over the split.
    """
    if length < 1 or batch < 1:
        raise DataError(f"validation needs windows of at least one token in batches of at least one, "
                        f"not length {length}, batch {batch}")
    if len(tokens) < 2:
        raise DataError(f"split {tokens.split!r} in {tokens.folder} has {len(tokens)} token(s), but scoring takes two")
    full, rest = divmod(num_scored(tokens), length)
    if count is not None and not 1 <= count <= full:
        raise DataError(f"split {tokens.split!r} in {tokens.folder} has {full} full windows of length {length:,}; "
                        f"{count} of them cannot be chosen")
    starts = np.arange(full) if count is None else np.arange(count) * full // count
    for first in range(0, len(starts), batch):
        yield gather(tokens.data, starts[first : first + batch] * length, length + 1)
    if rest and count is None:
        yield gather(tokens.data, np.array([full * length]), rest + 1)


def num_scored(tokens: Tokens) -> int:
    """How many tokens validation_windows scores: all but one."""
    return len(tokens) - 1


# --------------------------------------------------------------------------------------------------------------------
# Tokenizers


@functools.cache
def load_tokenizer(name: str) -> tiktoken.Encoding:
    """The tiktoken encoding called `name`: "gpt2" or another of tiktoken's, or "toyworld", which needs no download.

    "gpt2:4000" is GPT-2's with its first 3999 tokens, that is the merges it learned first, and end-of-text: an
    embedding and a head for small models. "gpt2:257" knows bytes only. Raises OfflineError if tiktoken has no copy of
    the files and cannot fetch them, DataError for an unknown name or an impossible size.
    """
    if name == "toyworld":
        from data.toyworld import encoding
        return encoding()
    import tiktoken
    base, colon, size = name.partition(":")
    known = tiktoken.list_encoding_names()
    if base not in known:
        raise DataError(f"there is no tokenizer {name!r}; known are toyworld and tiktoken's {', '.join(sorted(known))}")
    try:
        encoding = tiktoken.get_encoding(base)
    except (OSError, ValueError) as error:      # every failure of requests is an OSError; ValueError: a wrong checksum
        request = getattr(error, "request", None)
        where = getattr(request, "url", None) or "its public address"
        raise OfflineError(f"The files of tokenizer {base!r} could not be fetched from {where} "
                           f"({type(error).__name__}); without a network, point TIKTOKEN_CACHE_DIR at a folder that "
                           f"holds tiktoken's cached copies of them, or use the data set toyworld, which needs "
                           f"nothing.") from None
    return shortened(encoding, size) if colon else encoding


def shortened(encoding: tiktoken.Encoding, size: str) -> tiktoken.Encoding:
    """The encoding with its first `size` - 1 tokens and end-of-text. They are sorted by when they were learned, bytes
    first, so what is left is what the same training would have given had it ended there."""
    import tiktoken
    ranks = encoding._mergeable_ranks           # as tiktoken's own README extends an encoding
    if not size.isdecimal() or not 257 <= int(size) <= len(ranks) + 1:
        raise DataError(f"{encoding.name!r} can be shortened to 257 (bytes and end-of-text) to {len(ranks) + 1:,} tokens, "
                        f"as in \"{encoding.name}:4000\", not to {size!r}")
    last = int(size) - 1
    return tiktoken.Encoding(f"{encoding.name}:{size}", pat_str=encoding._pat_str, special_tokens={"<|endoftext|>": last},
                             mergeable_ranks={token: rank for token, rank in ranks.items() if rank < last})
