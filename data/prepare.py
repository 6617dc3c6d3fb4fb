"""Text -> tokens: data/<name>/{train,val}.bin and meta.json, which data/tokens.py reads.

    python data/prepare.py toyworld                     the embedded corpus, offline, in seconds
    python data/prepare.py toyworld-facts               its facts in documents of a sentence each (eval_reversal.py)
    python data/prepare.py wikitext-103                 from the Hugging Face hub (about 300 MB)
    python data/prepare.py ~/texts --out data/texts     a folder (or one file) of .txt, .jsonl, .jsonl.gz, .parquet
    python data/prepare.py books.jsonl.gz --text-field body --val-fraction 0.02 --workers 8
    python data/prepare.py ~/texts --out data/small --tokenizer gpt2:4000       a vocabulary for small models

The tokens are exactly tiktoken's `encode_ordinary` of each whole document. A .txt file is one document, all of
WikiText's split too. Documents of .jsonl and .parquet, and of several .txt files, each end with the tokenizer's
end-of-text token. The text streams through: memory does not grow with it. The folder appears complete or not at all.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if not __package__:                         # run as a script: the project's root is not on the path yet
    sys.path.insert(0, str(ROOT))

from data.encode import workers, write_tokens  # noqa: E402
from data.sources import local_splits, read_hub  # noqa: E402
from data.tokens import DataError, check_out, check_split, load_tokenizer, replaced_folder  # noqa: E402
from flags import Parser, one_sentence  # noqa: E402

HUB = {"wikitext-103": "wikitext-103-raw-v1", "wikitext-2": "wikitext-2-raw-v1"}       # our name -> configuration
HUB_SPLITS = {"train": "train", "val": "validation"}
WIKITEXT = "Salesforce/wikitext"
PUBLISHED = {("wikitext-103", "train"): 119_192_782, ("wikitext-103", "val"): 249_887,     # GPT-2 tokens, raw files
             ("wikitext-2", "val"): 249_887}
WIKITEXT_LICENCE = "CC BY-SA 3.0 and GFDL (Wikipedia contributors; WikiText, Merity et al. 2016)"

TOYWORLDS = {"toyworld": False, "toyworld-facts": True}         # our name -> documents of a single sentence
SMALL = 4_000_000           # bytes of input for which starting workers costs more than it saves


# --------------------------------------------------------------------------------------------------------------------
# Writing


def prepare_text(args: argparse.Namespace, out: Path, command: str) -> dict:
    """Encode a WikiText data set or local text into the folder `out`. Returns its meta.json."""
    from tqdm import tqdm
    encoding = load_tokenizer(args.tokenizer)
    dtype = "uint16" if encoding.n_vocab <= 65535 else "uint32"
    if args.source in HUB:
        config, size = HUB[args.source], None
        splits = {name: [(read_hub(args.hub_path, config, split), False)] for name, split in HUB_SPLITS.items()}
        source, licence = f"{args.hub_path}, {config}", WIKITEXT_LICENCE
    else:
        splits, size = local_splits(Path(args.source), args.text_field, args.val_fraction)
        source, licence = args.source, "that of the source, which is not recorded here"
    count = args.workers or (1 if size is not None and size < SMALL else os.cpu_count() or 1)
    start, entries = time.perf_counter(), {}
    with replaced_folder(out) as partial:
        with workers(count, args.tokenizer) as pool, \
                tqdm(total=size, unit="B", unit_scale=True, desc="tokenising", disable=None) as bar:
            for name, split in splits.items():
                with open(partial / f"{name}.bin", "wb") as file:
                    entry = write_tokens(file, split, args.tokenizer, dtype, pool, progress=bar.update)
                check_split(args.source, name, entry["tokens"])
                entries[name] = {"file": f"{name}.bin", **entry}
        meta = {"name": out.name, "tokenizer": args.tokenizer, "vocab_size": encoding.n_vocab, "dtype": dtype,
                "eot_token": encoding.eot_token, "splits": entries, "source": source, "licence": licence,
                "date": datetime.date.today().isoformat(), "command": command}
        (partial / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    seconds = time.perf_counter() - start
    megabytes = sum(entry["bytes"] for entry in entries.values()) / 1e6
    print(f"{megabytes:,.1f} MB of text in {seconds:.1f} s: {megabytes / seconds:.1f} MB/s with {count} worker(s)")
    return meta


def report(meta: dict, args: argparse.Namespace, out: Path) -> None:
    for name, entry in meta["splits"].items():
        print(f"{out / entry['file']}: {entry['tokens']:,} tokens, {entry['documents']:,} document(s)")
        published = PUBLISHED.get((args.source, name)) if args.tokenizer == "gpt2" else None
        if published and published != entry["tokens"]:
            print(f"  note: the published {name} split of {args.source} has {published:,} tokens")
    sizes = {name: entry["tokens"] for name, entry in meta["splits"].items()}
    if sizes["train"] < sizes["val"]:
        print("  note: there is less text to train on than to validate on")
    standard = out.parent == ROOT / "data"
    small = meta["vocab_size"] < 10_000 or sizes["train"] < 5_000_000
    settings = ", with settings for small models as in the Makefile" if small else ""
    print(f"next: python train.py --data {out.name if standard else out}{settings}")


# --------------------------------------------------------------------------------------------------------------------
# Command line


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("source", metavar="NAME_OR_PATH",
                        help="toyworld, toyworld-facts, wikitext-2, wikitext-103, or a file or folder")
    parser.add_argument("--out", type=Path, help="folder to write (default: data/<name> of this project)")
    parser.add_argument("--tokenizer", help="gpt2, another of tiktoken's, its first tokens only as in gpt2:4000, or "
                                            "toyworld (default: gpt2)")
    parser.add_argument("--workers", type=int, help="processes that encode (default: one per core)")
    parser.add_argument("--val-fraction", type=float, default=0.01, metavar="SHARE",
                        help="last share for validation, where the files name no splits (default: %(default)s)")
    parser.add_argument("--text-field", default="text", metavar="NAME",
                        help="field of .jsonl and .parquet that holds the text (default: %(default)s)")
    parser.add_argument("--hub-path", default=WIKITEXT, metavar="PATH",
                        help="WikiText: its place on the hub, a mirror, or the folder of a copy (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="toyworld: its seed (default: 0)")
    parser.add_argument("--train-tokens", type=int, help="toyworld: size of the training split (default: 750,000)")
    args = parser.parse_args(argv)
    toyworld = args.source in TOYWORLDS
    if not 0 < args.val_fraction < 1:
        parser.error(f"--val-fraction must lie between 0 and 1, not {args.val_fraction}")
    if args.workers is not None and args.workers < 1:
        parser.error(f"--workers must be at least 1, not {args.workers}")
    if args.train_tokens is not None and args.train_tokens < 1:
        parser.error(f"--train-tokens must be at least 1, not {args.train_tokens}")
    if not toyworld and (args.seed is not None or args.train_tokens is not None):
        parser.error("--seed and --train-tokens belong to toyworld; other texts have no random choices")
    if toyworld and args.tokenizer not in (None, "toyworld"):
        parser.error(f"toyworld has its own tokenizer, not {args.tokenizer!r}")
    args.tokenizer = args.tokenizer or ("toyworld" if toyworld else "gpt2")
    return args


def run(args: argparse.Namespace, command: str) -> dict:
    if args.source in TOYWORLDS or args.source in HUB:
        name = args.source
    elif Path(args.source).exists():
        path = Path(args.source).resolve()
        name = path.name if path.is_dir() else path.name.split(".")[0]
    else:
        raise DataError(f"{args.source!r} is neither a data set ({', '.join([*TOYWORLDS, *sorted(HUB)])}) "
                        f"nor an existing file or folder")
    out = (args.out or ROOT / "data" / name).resolve()
    check_out(out)
    if args.source in TOYWORLDS:
        from data.toyworld import write_corpus
        meta = write_corpus(out, seed=args.seed or 0, train_tokens=args.train_tokens or 750_000, single=TOYWORLDS[args.source], command=command)
    else:
        meta = prepare_text(args, out, command)
    report(meta, args, out)
    return meta


@one_sentence
def main(argv: list[str] | None = None) -> dict:
    """Prepare as the command line says. Returns the contents of meta.json."""
    args = parse(argv)
    command = "python data/prepare.py " + shlex.join(sys.argv[1:] if argv is None else argv)
    try:
        return run(args, command)
    except KeyboardInterrupt:
        raise SystemExit("prepare.py: interrupted; nothing was written") from None


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("prepare.py: ended by a signal; nothing was written"))
    main()
