"""Text -> a token folder by a Hugging Face model's own tokenizer, for finetune.py; whether a token folder fits a model.

    python experiments/finetune_data.py my_texts/ --model gpt2 --out data/my_texts-gpt2

Takes what data/prepare.py takes (.txt, .jsonl(.gz), .parquet, files or folders) and writes what it writes, so that
data/tokens.py reads it. Folders of data/prepare.py serve a model as they are if its tokenizer is the same (GPT-2's, say).
A document is encoded whole, which holds it in memory; a .txt is one document.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import shlex
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

ROOT = Path(__file__).resolve().parent.parent
if not __package__:
    sys.path.insert(0, str(ROOT))

import numpy as np

from data.encode import Document
from data.sources import local_splits
from data.tokens import DTYPES, DataError, check_out, check_split, load_tokenizer, replaced_folder
from experiments.backbone import BackboneError, find_hugging_face, open_tokenizer
from flags import Parser, one_sentence

# Two tokenizers that agree on this agree, for all that is likely, on everything: several scripts, numbers, white space.
PROBE = ("The 1,984 naïve cafés' façades weren't re-opened;  in Zürich, Ελλάδα and 東京 they'd cost $12.50\n\n"
         "\tdef f(x): return x**2  # Überraschung! Unbelievably antidisestablishmentarian 🙂 привет\n")  # fmt: skip
BATCH = 1 << 20  # characters given to the tokenizer at a time; it encodes documents in parallel


def ids_of(tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of whole texts, without the special tokens that a tokenizer may put around a text."""
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [text.ids for text in encoded]


def check_tokens(meta: dict, folder: Path, tokenizer, name: str) -> None:
    """DataError unless the token folder was written with this model's tokenizer."""
    theirs = meta.get("probe") or load_tokenizer(meta["tokenizer"]).encode_ordinary(PROBE)
    if theirs != ids_of(tokenizer, [PROBE])[0]:
        raise DataError(f"{folder} holds tokens of {meta['tokenizer']}, not of {name}: prepare the text for this model with "
                        f"python experiments/finetune_data.py TEXT --model {name} --out FOLDER")  # fmt: skip


def batches(split: Iterable[Document]) -> Iterator[tuple[list[str], list[bool]]]:
    """Whole documents, and whether an end-of-text token follows each, about BATCH characters at a time."""
    texts, ends, size = [], [], 0
    for blocks, end in split:
        text = "".join(text for text, _ in blocks)
        texts.append(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))  # JSON can spell half a surrogate pair
        ends.append(end)
        size += len(texts[-1])
        if size >= BATCH:
            yield texts, ends
            texts, ends, size = [], [], 0
    yield texts, ends


def write_split(file: BinaryIO, split: Iterable[Document], tokenizer, dtype: np.dtype) -> dict:
    """Writes a split's tokens; returns its entry for meta.json, without the file's name."""
    digest, tokens, documents, size = hashlib.sha256(), 0, 0, 0
    for texts, ends in batches(split):
        if any(ends) and tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no end-of-text token to put between documents: give the text as one .txt file")
        for text, ids, end in zip(texts, ids_of(tokenizer, texts), ends):
            data = np.array([*ids, tokenizer.eos_token_id] if end else ids, dtype).tobytes()
            file.write(data)
            digest.update(data)
            tokens += len(data) // dtype.itemsize
            documents, size = documents + 1, size + len(text.encode())
    return {"tokens": tokens, "documents": documents, "bytes": size, "sha256": digest.hexdigest()}


def prepare(source: str, tokenizer, name: str, out: Path, text_field: str = "text", val_fraction: float = 0.01, command: str = "") -> dict:
    """Encodes a file or folder of text into the token folder `out`; returns its meta.json."""
    if not Path(source).exists():
        raise DataError(f"{source} does not exist: give a file or folder of text")
    check_out(out)
    splits, _ = local_splits(Path(source), text_field, val_fraction)
    dtype = "uint16" if len(tokenizer) <= 65535 else "uint32"
    with replaced_folder(out) as partial:
        entries = {}
        for split, documents in splits.items():
            with open(partial / f"{split}.bin", "wb") as file:
                entries[split] = {"file": f"{split}.bin", **write_split(file, documents, tokenizer, DTYPES[dtype])}
            check_split(source, split, entries[split]["tokens"])
        meta = {"name": out.name, "tokenizer": name, "probe": ids_of(tokenizer, [PROBE])[0], "vocab_size": len(tokenizer), "dtype": dtype,
                "eot_token": tokenizer.eos_token_id, "splits": entries, "source": source,
                "licence": "that of the source, which is not recorded here", "date": datetime.date.today().isoformat(),
                "command": command}  # fmt: skip
        (partial / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    return meta


@one_sentence
def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("source", help="a file or folder of text")
    parser.add_argument("--model", required=True, help="whose tokenizer: a Hugging Face causal LM by local folder or hub name")
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument("--val-fraction", type=float, default=0.01, metavar="SHARE",
                        help="last share for validation, where the files name no splits (default: %(default)s)")
    parser.add_argument("--text-field", default="text", metavar="NAME",
                        help="field of .jsonl and .parquet that holds the text (default: %(default)s)")
    args = parser.parse_args(argv)
    if not 0 < args.val_fraction < 1:
        parser.error(f"--val-fraction must lie between 0 and 1, not {args.val_fraction}")
    command = "python experiments/finetune_data.py " + shlex.join(sys.argv[1:] if argv is None else argv)
    tokenizer = open_tokenizer(find_hugging_face(args.model))
    if tokenizer is None:
        raise BackboneError(f"{args.model} has no fast tokenizer: add its tokenizer.json")
    meta = prepare(args.source, tokenizer, args.model, args.out, args.text_field, args.val_fraction, command)
    for split, entry in meta["splits"].items():
        print(f"{args.out / entry['file']}: {entry['tokens']:,} tokens, {entry['documents']:,} document(s)")
    print(f"next: python experiments/finetune.py --model {args.model} --data {args.out}")


if __name__ == "__main__":
    main()
