"""The reversal curse: facts that a text states in one order only, asked in both orders and read in both directions.

    python data/prepare.py toyworld-facts           # and train on it: train.py --data toyworld-facts
    python eval_reversal.py results/mine            # every finished run of the study
    python plot_results.py results/mine --figure reversal

The text states half of its pairs of teacher and pupil in both orders ("X was the teacher of Y.", "Y was a pupil of X."), the
others as "teacher ... pupil" only. A document is one sentence, so the names of a pair meet in no other way (toyworld itself,
whose documents go on about X after naming Y, is refused). Each question can be asked by either sentence:

    pupil: whom did X teach?    fw reads "X was the teacher of" and predicts Y; bw reads "was a pupil of X." and predicts Y
    teacher: who taught Y?      fw reads "Y was a pupil of" and predicts X; bw reads "was the teacher of Y." and predicts X

reversal.csv, a row per direction, question and orders (in how many orders the text states these pairs, 1 or 2), with
    stated   1: the text holds the sentences asked by; 0: it holds none of them (fw, teacher, 1 and bw, pupil, 1)
    pairs    how many are asked. The candidates are the right answers of all of them, so that no name can be ruled out just
             because it never stands in this place
    acc      share of right answers; by chance 1 / pairs
    auc      share of the other candidates that score below the right one; by chance 1/2
A name is two tokens, and scored by their log-probability. With the flipped mask, which sees its targets, only fw is asked.
"""

from __future__ import annotations

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import runs
from data.tokens import DataError
from data.toyworld import Question, World, encoding, questions
from flags import Parser, one_sentence
from model import GPT, MASK_OF
from trained import Trained, add_run_flags, finished, open_trained

QUESTIONS = ("pupil", "teacher")  # who is asked for


@torch.no_grad()
def name_scores(model: GPT, direction: str, contexts: Tensor, names: Tensor, direction_tokens: bool = True, batch_tokens: int = 2**14) -> Tensor:
    """Log-probability of each name (N, 2) after (fw) or before (bw) each context (Q, P) -> (Q, N), float32.

    Tokens are in reading order. A backward pass is a causal one over the mirrored text, as in sample.py.
    """
    if direction == "bw":
        contexts, names = contexts.flip(1), names.flip(1)
    if direction_tokens:
        contexts = F.pad(contexts, (1, 0), value=model.config.vocab_size - (2 if direction == "fw" else 1))
    first, which = names[:, 0].unique(return_inverse=True)  # many names share it, and so a text to read
    scores = []
    for some in contexts.split(max(1, batch_tokens // (len(first) * (contexts.shape[1] + 1)))):
        texts = torch.cat([some[:, None].expand(-1, len(first), -1), first.expand(len(some), -1)[..., None]], -1)
        states = model.hidden(texts.flatten(0, 1), "causal")[:, -2:]
        chosen, next_one = F.linear(states, model.head).float().log_softmax(-1).unflatten(0, texts.shape[:2]).unbind(2)
        chosen = chosen[:, 0, first]  # the context alone decides it: the same in all texts of a context
        scores.append(chosen[:, which] + next_one[:, which, names[:, 1]])
    return torch.cat(scores)


def teacher_first(direction: str, question: str) -> bool:
    """Which of the two sentences ends (fw) or begins (bw) with who is asked for: "X was the teacher of Y", or the other one."""
    return (direction == "fw") == (question == "pupil")


def ask(model: GPT, direction: str, question: str, asked: list[Question], direction_tokens: bool = True, batch_tokens: int = 2**14) -> Tensor:
    """Scores (Q, Q) of the answer to question j as an answer to question i: the right ones are on the diagonal."""
    tokenizer, contexts, names = encoding(), [], []
    for q in asked:
        stated = q.prompt, q.answer, q.reversed_answer
        prompt, last, first = stated if teacher_first(direction, question) else (q.reversed_prompt, q.reversed_answer, q.answer)
        contexts.append([tokenizer.eot_token, *tokenizer.encode_ordinary(prompt)] if direction == "fw"
                        else [*tokenizer.encode_ordinary(f"{prompt.removeprefix(first)} {last}."), tokenizer.eot_token])  # fmt: skip
        names.append(tokenizer.encode_ordinary(f" {last}" if direction == "fw" else first))  # without a space where a document begins
    contexts, names = (torch.tensor(x, device=model.head.device) for x in (contexts, names))
    return name_scores(model, direction, contexts, names, direction_tokens, batch_tokens)


def accuracy_and_auc(scores: Tensor) -> tuple[float, float]:
    """Scores (Q, Q), the right ones on the diagonal -> share of right answers, share of the others below the right one.

    Equal scores count half in the second one, and as wrong in the first. A single question has no others: NaN.
    """
    right, others = scores.diagonal()[:, None], ~torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    below = (scores < right).double() + (scores == right).double() / 2
    return (((scores < right) | ~others).all(1)).double().mean().item(), below[others].mean().item()


def measure(trained: Trained, batch_tokens: int = 2**14) -> list[dict]:
    """The rows of reversal.csv. DataError (one sentence) if it is not a text whose facts are known, and stated one by one."""
    about = trained.val.meta.get("toyworld", {})
    if not about.get("single"):
        raise DataError(f"{trained.val.folder} is no text of single facts, so what it states in which order is not known: "
                        f"train on toyworld-facts (python data/prepare.py toyworld-facts)")  # fmt: skip
    world, rows = World(about["seed"], about["people"], about["towns"], single=True), []
    for (direction, mask), question, orders in product(trained.tasks, QUESTIONS, (1, 2)):
        group = [q for q in questions(world) if q.held_out == (orders == 1)]
        if mask == MASK_OF[direction] and group:
            acc, auc = accuracy_and_auc(ask(trained.model, direction, question, group, trained.direction_tokens, batch_tokens))
            rows.append({"direction": direction, "question": question, "orders": orders, "pairs": len(group), "acc": acc, "auc": auc,
                         "stated": int(orders == 2 or teacher_first(direction, question))})  # fmt: skip
    return rows


def evaluate_run(run: runs.Run, device: str, batch_tokens: int, again: bool) -> str:
    """Writes a finished run's table unless it is there; returns what to tell the user."""
    path = run.folder / "reversal.csv"
    if path.exists() and not again:
        return f"{path}: done before (--again measures once more)"
    runs.write_table(path, measure(open_trained(run, device), batch_tokens), runs.REVERSAL_COLUMNS)
    return str(path)


@one_sentence
def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    add_run_flags(parser, windows=False)
    args = parser.parse_args(argv)
    for run in tqdm(finished(args.folders, tqdm.write), unit="run", leave=False):
        tqdm.write(evaluate_run(run, args.device, args.batch_tokens, args.again))


if __name__ == "__main__":
    main()
