"""Exact tokens in parallel: documents -> one file of tokens, encoded in pieces by several processes.

    with workers(4, "gpt2") as pool, open("val.bin", "wb") as file:
        entry = write_tokens(file, [([("Some text.", 10)], True)], "gpt2", "uint16", pool)

The tokens are those of tiktoken's `encode_ordinary` of each whole document; CUTS below says why pieces may be encoded
alone. A run of text without a place to cut (a megabyte of letters, say) is held in memory and encoded by one process.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np

from data.tokens import DTYPES, DataError, load_tokenizer

TASK = 1 << 19              # characters given to a worker at a time: about 20 ms of work

# Where a text may be cut so that its parts, encoded alone, give the tokens of the whole: in front of a space (GPT-2's
# patterns: or newline) that follows a non-space. The tokenizer first splits text by a pattern, then merges bytes within
# each piece, so two things must hold. (1) A piece ends at the cut: in these patterns white space stands only at the
# start of a piece that goes on with something else - except newlines after punctuation in the newer patterns, hence no
# cut at newlines there. (2) The pieces on either side do not change: the only look at what comes later is that of a
# run of white space at the character after the run, and no such run ends at the cut; nothing looks back. "Space" in
# Python's sense includes all that Unicode (hence the tokenizer) calls white space. Others are encoded whole.
GPT2_CUT, NEWER_CUT = re.compile(r"\S[ \n]"), re.compile(r"\S ")
BYTE_CUTS = {GPT2_CUT: re.compile(rb"[!-~][ \n]"), NEWER_CUT: re.compile(rb"[!-~] ")}        # the same in ASCII's part of UTF-8
CUTS = {**dict.fromkeys(("gpt2", "r50k_base", "p50k_base", "p50k_edit"), GPT2_CUT),
        **dict.fromkeys(("cl100k_base", "o200k_base", "o200k_harmony"), NEWER_CUT)}

# A document is (blocks, ends): blocks yields (text, bytes of input read for it); `ends` asks for an end-of-text token.
# Blocks that can be split unread (sources.TextPart) are: the workers read them then, and this process none of the text.
Blocks = Iterable[tuple[str, int]]
Document = tuple[Blocks, bool]


def chunks(blocks: Blocks, cut: re.Pattern | None, size: int) -> Iterator[tuple[str, int]]:
    """The text in pieces of at least `size` characters that may be encoded alone (see CUTS), and the bytes read.

    Without a place to cut, a piece grows until there is one, or to the whole document. Linear time.
    """
    text, read, searched = "", 0, 0
    for block, count in blocks:
        text += block           # in place, so that a long text without a place to cut is not copied for every block
        read, start = read + count, 0
        while cut and (found := cut.search(text, max(start + size - 1, searched))):
            yield text[start : found.start() + 1], read
            start, read, searched = found.start() + 1, 0, 0
        if cut and len(text) - start >= size:
            searched = len(text) - 1 - start        # the next block need not look at these characters again
        text = text[start:]
    yield text, read


def pieces_of(blocks: Blocks, cut: re.Pattern | None, size: int) -> Iterator[tuple[Any, int, int]]:
    """(text, or a part of a file that holds it; its size, in characters or bytes; bytes read)."""
    if cut and hasattr(blocks, "split"):
        for part in blocks.split(BYTE_CUTS[cut], size):
            yield part, part.stop - part.start, part.stop - part.start
    else:
        for text, read in chunks(blocks, cut, size):
            yield text, len(text), read


def tasks(split: Iterable[Document], cut: re.Pattern | None, size: int) -> Iterator[tuple[list, int, int]]:
    """(pieces of text, None for an end-of-text token; bytes read; documents ended) for one worker at a time."""
    pieces, length, total_read, ended = [], 0, 0, 0
    for blocks, ends in split:
        for piece, more, read in pieces_of(blocks, cut, size):
            pieces.append(piece)
            length, total_read = length + more, total_read + read
            if length >= size:
                yield pieces, total_read, ended
                pieces, length, total_read, ended = [], 0, 0, 0
        pieces += [None] * ends
        ended += 1
    yield pieces, total_read, ended


def encode(tokenizer: str, dtype: str, pieces: list) -> tuple[bytes, int]:
    """Tokens of the pieces one after the other, as bytes, and the size of the text in UTF-8."""
    encoding, parts, size = load_tokenizer(tokenizer), [], 0
    for piece in pieces:
        if piece is None:
            parts.append(np.array([encoding.eot_token], DTYPES[dtype]))
            continue
        text = piece if isinstance(piece, str) else piece.text()
        try:
            size += len(text) if text.isascii() else len(text.encode())
        except UnicodeEncodeError:      # JSON can spell half a surrogate pair: replaced as encode_ordinary does
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            size += len(text.encode())
        # As encode_ordinary, without the detour over a list of Python integers.
        parts.append(encoding.encode_to_numpy(text, disallowed_special=()).astype(DTYPES[dtype]))
    return b"".join(part.tobytes() for part in parts), size


def start_worker(tokenizer: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()      # a killed parent ends us
    load_tokenizer(tokenizer)       # a worker forked from a process that has it has it, too


@contextmanager
def workers(count: int, tokenizer: str) -> Iterator[ProcessPoolExecutor | None]:
    """A pool of processes, or None for one worker, which is this process.

    Forked where that is safe, so that the workers share the tokenizer's memory, and at once, while this process has
    one thread.
    """
    if count == 1:
        yield None
        return
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(count, context, initializer=start_worker, initargs=(tokenizer,))
    try:
        pool.submit(int).result()
        yield pool
    except BrokenProcessPool:
        raise DataError("A worker ended unexpectedly, perhaps for lack of memory; try fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def in_order(pool: ProcessPoolExecutor | None, work: Iterable, tokenizer: str, dtype: str) -> Iterator:
    """(token bytes, text bytes, bytes read, documents ended) of every task in order, four per worker in flight."""
    pending, ahead = deque(), 4 * pool._max_workers if pool else 0
    for pieces, read, ended in work:
        if pool is None:
            yield *encode(tokenizer, dtype, pieces), read, ended
            continue
        pending.append((pool.submit(encode, tokenizer, dtype, pieces), read, ended))
        if len(pending) >= ahead:
            future, read, ended = pending.popleft()
            yield *future.result(), read, ended
    for future, read, ended in pending:
        yield *future.result(), read, ended


def write_tokens(file: BinaryIO, split: Iterable[Document], tokenizer: str, dtype: str,
                 pool: ProcessPoolExecutor | None = None,
                 progress: Callable[[int], object] = lambda read: None) -> dict:
    """Encode all documents of a split into `file`; returns its entry for meta.json, without the file's name.

    `progress` is called with the bytes of input that each finished piece of work took.
    """
    digest, tokens, documents, text_bytes = hashlib.sha256(), 0, 0, 0
    work = tasks(split, CUTS.get(tokenizer.partition(":")[0]), TASK)
    for data, size, read, ended in in_order(pool, work, tokenizer, dtype):
        file.write(data)
        digest.update(data)
        tokens += len(data) // DTYPES[dtype].itemsize
        documents, text_bytes = documents + ended, text_bytes + size
        progress(read)
    return {"tokens": tokens, "documents": documents, "bytes": text_bytes, "sha256": digest.hexdigest()}
