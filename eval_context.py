"""Losses of trained models by the length of their context and by document, forward and backward.

    python eval_context.py results/demo                      # every finished run of a study
    python eval_context.py results/demo/4x128_... --windows 64      # from 64 windows, into context_64windows.csv
    python eval_context.py results/mine --data wikitext      # another text with the same tokenizer: context_wikitext.csv

context.csv, columns direction, context, tokens, loss. For context = 16, 32, ... max_seq_len the text is cut into
disjoint windows of this length, and the model sees nothing else: fw predicts a token from those before it in its
window, 0 to context - 1 of them, bw from those after it. loss is the mean over all tokens of all windows.
- Why windows, and not tokens with exactly so much context: both directions then predict the same tokens, and by the
  chain rule the same probability, that of each window. A difference between fw and bw is one between models, not
  between texts, and it is far less noisy than that between a token's fw and bw loss. The published figures are also
  means over a context window.
- The windows are parts of those of max_seq_len tokens, so that every context that divides it scores the same tokens.
- What it costs: one pass per context and direction; shorter windows are cheaper. Nothing is shared between contexts:
  a token's state depends on how much the model sees.
Without direction tokens a window predicts `context` tokens from 1 to `context` neighbours, fw all but its first, bw
all but its last one.

documents.csv, columns direction, document, tokens, loss: mean loss of each document of the whole split, in windows of
max_seq_len (their mean weighted by `tokens` is the run's validation loss). A document ends with the tokenizer's
end-of-text token; a text without any is one document.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from tqdm import tqdm

import runs
from data.tokens import DataError, Tokens
from flags import Parser, one_sentence
from model import GPT, frame
from trained import Trained, add_run_flags, finished, open_trained

SHORTEST = 16


def contexts(longest: int) -> list[int]:
    """16, 32, 64, ... and the longest itself."""
    return [SHORTEST << k for k in range(longest.bit_length()) if SHORTEST << k < longest] + [longest]


def pieces(windows: np.ndarray, context: int) -> np.ndarray:
    """Windows (B, L+1) cut into (B * (L div context), context + 1); a piece ends with the next one's first token."""
    starts = np.arange((windows.shape[1] - 1) // context) * context
    return windows[:, starts[:, None] + np.arange(context + 1)].reshape(-1, context + 1)


@torch.no_grad()
def token_losses(model: GPT, batches: Iterable[np.ndarray], direction: str, mask: str, direction_tokens: bool = True) -> np.ndarray:
    """Every scored token's loss in nats, (tokens,) float32, in the order of the windows (B, L+1)."""
    losses = []
    for windows in batches:
        inputs, targets = frame(torch.as_tensor(windows, device=model.head.device), direction, model.config.vocab_size, direction_tokens)
        losses.append(model.score(model.hidden(inputs, mask), targets)[0].flatten())
    return torch.cat(losses).float().cpu().numpy()


def documents(tokens: Tokens) -> np.ndarray:
    """The number of the document that each token belongs to, (N,) from 0 on; the end-of-text token is its last one."""
    ends = np.asarray(tokens.data) == tokens.meta.get("eot_token", -1)
    return np.cumsum(ends) - ends


def measure(trained: Trained, batch_tokens: int = 2**14, windows: int | None = None) -> tuple[list[dict], list[dict]]:
    """The rows of context.csv, and those of documents.csv (none if only some `windows` are measured)."""
    model, length, by_context, by_document = trained.model, trained.model.config.max_seq_len, [], []
    full = trained.num_scored(windows) // length
    if full == 0:
        raise DataError(f"{trained.val.folder} has fewer validation tokens than one window of length {length:,}: prepare a larger text")
    for direction, mask in trained.tasks:
        for context in contexts(length):
            batches = trained.windows(batch_tokens, windows)
            if context < length:
                batches = (pieces(batch, context) for batch in batches if batch.shape[1] == length + 1)
            losses = token_losses(model, batches, direction, mask, trained.direction_tokens)
            scored = losses[: full * (length // context) * context]  # not the last, shorter window
            by_context.append({"direction": direction, "context": context, "tokens": len(scored), "loss": scored.mean(dtype=float)})
        if windows is None:  # the losses are those of the longest context: of the whole split
            first = 1 if direction == "fw" and not trained.direction_tokens else 0
            document = documents(trained.val)[first : first + len(losses)]
            tokens, nats = np.bincount(document), np.bincount(document, losses)
            by_document += [{"direction": direction, "document": k, "tokens": int(tokens[k]), "loss": nats[k] / tokens[k]}
                            for k in np.flatnonzero(tokens).tolist()]  # fmt: skip
    return by_context, by_document


def evaluate_run(run: runs.Run, device: str, batch_tokens: int, data: str | None, windows: int | None, again: bool) -> str:
    """Writes the tables of a finished run unless they are there; returns what to tell the user."""
    trained = open_trained(run, device, data)
    path = run.folder / runs.table_name("context", trained.text, windows)
    if path.exists() and not again:
        return f"{path}: done before (--again measures once more)"
    by_context, by_document = measure(trained, batch_tokens, windows)
    if by_document:
        runs.write_table(run.folder / runs.table_name("documents", trained.text), by_document, runs.DOCUMENTS_COLUMNS)
    runs.write_table(path, by_context, runs.CONTEXT_COLUMNS)  # the last one: where it is, both are
    return str(path)


@one_sentence
def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    add_run_flags(parser)
    parser.add_argument("--data", help="a token folder whose validation split is measured instead of the run's own")
    args = parser.parse_args(argv)
    for run in tqdm(finished(args.folders, tqdm.write), unit="run", leave=False):
        tqdm.write(evaluate_run(run, args.device, args.batch_tokens, args.data, args.windows, args.again))


if __name__ == "__main__":
    main()
