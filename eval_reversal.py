"""The reversal curse: a fact that the text states in one order only, asked in both orders and read in both directions.

    python eval_reversal.py results/demo            # every finished run of a study whose text is a toyworld
    python plot_results.py results/demo --figure reversal

Half of toyworld's pairs of teacher and pupil are stated in both orders ("X was the teacher of Y", "Y was a pupil of X"),
half of them as "teacher ... pupil" only. Both sentences are asked of both halves, for the name at either end: fw reads
"END X was the teacher of" and predicts Y, bw reads "was the teacher of Y." and predicts X. So "who taught Y?" can be asked
forward, by a sentence that no text ever held, or backward, by the sentence that was read in training.

reversal.csv, a row per
    direction   fw, bw
    sentence    teacher: "X was the teacher of Y"; pupil: "Y was a pupil of X"
    orders      in how many orders the text states these pairs, 1 or 2; sentence pupil with orders 1 was never stated
with
    pairs       how many are asked
    acc, loss   share of right answers, and nats of the right one, among the answers to the `pairs` questions of this row alone:
                chance is 1 / pairs and ln pairs. A teacher of the first half is never named after "was a pupil of", which
                is a fact about the text as well: here all candidates share it
    acc_people, loss_people     the same among all people of the world
A name is two tokens; its score is their log-probability. Before a sentence, a name may open a document or not: both count.
With the flipped mask, which sees its targets, only fw can be asked.
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
from flags import Parser
from model import GPT, MASK_OF
from runs import RunError
from trained import Trained, add_run_flags, finished, open_trained

SENTENCES = ("teacher", "pupil")


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


def ask(model: GPT, direction: str, sentence: str, asked: list[Question], people: list[str], direction_tokens: bool = True,
        batch_tokens: int = 2**14) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Scores (Q, people) of everybody as the missing name of each sentence, and who is right (Q,)."""
    tokenizer = encoding()
    contexts, answers, spellings = [], [], [" {}"] if direction == "fw" else ["{}", " {}"]
    for q in asked:
        prompt, right, left = (q.prompt, q.answer, q.reversed_answer) if sentence == "teacher" else (q.reversed_prompt, q.reversed_answer, q.answer)
        contexts.append([tokenizer.eot_token, *tokenizer.encode_ordinary(prompt)] if direction == "fw"
                        else tokenizer.encode_ordinary(f"{prompt.removeprefix(left)} {right}."))  # fmt: skip
        answers.append(people.index(right if direction == "fw" else left))
    names = [tokenizer.encode_ordinary(spelling.format(name)) for spelling in spellings for name in people]
    contexts, names = (torch.tensor(x, device=model.head.device) for x in (contexts, names))
    scores = name_scores(model, direction, contexts, names, direction_tokens, batch_tokens)
    return scores.unflatten(1, (len(spellings), len(people))).logsumexp(1), torch.tensor(answers, device=scores.device)


def accuracy_and_loss(scores: Tensor, answers: Tensor) -> tuple[float, float]:
    """scores (Q, N), answers (Q,) -> share of right answers, nats of the right one among the N."""
    return (scores.argmax(1) == answers).double().mean().item(), F.cross_entropy(scores.double(), answers).item()


def measure(trained: Trained, batch_tokens: int = 2**14) -> list[dict]:
    """The rows of reversal.csv. DataError (one sentence) if the text is not a toyworld's."""
    about = trained.val.meta.get("toyworld")
    if about is None:
        raise DataError(f"{trained.val.folder} is not a toyworld, whose facts are known: python data/prepare.py toyworld makes one")
    world, rows = World(about["seed"], about["people"], about["towns"]), []
    people, asked = [person.name for person in world.people], questions(world)
    for (direction, mask), sentence, orders in product(trained.tasks, SENTENCES, (1, 2)):
        group = [q for q in asked if q.held_out == (orders == 1)]
        if mask != MASK_OF[direction] or not group:
            continue
        scores, answers = ask(trained.model, direction, sentence, group, people, trained.direction_tokens, batch_tokens)
        acc, loss = accuracy_and_loss(scores[:, answers], torch.arange(len(group), device=scores.device))
        acc_people, loss_people = accuracy_and_loss(scores, answers)
        rows.append({"direction": direction, "sentence": sentence, "orders": orders, "pairs": len(group), "acc": acc, "loss": loss,
                     "acc_people": acc_people, "loss_people": loss_people})  # fmt: skip
    return rows


def evaluate_run(run: runs.Run, device: str, batch_tokens: int, again: bool) -> str:
    """Writes a finished run's table unless it is there; returns what to tell the user."""
    path = run.folder / "reversal.csv"
    if path.exists() and not again:
        return f"{path}: done before (--again measures once more)"
    runs.write_table(path, measure(open_trained(run, device), batch_tokens), runs.REVERSAL_COLUMNS)
    return str(path)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    add_run_flags(parser, windows=False)
    args = parser.parse_args(argv)
    try:
        for run in tqdm(finished(args.folders, tqdm.write), unit="run", leave=False):
            tqdm.write(evaluate_run(run, args.device, args.batch_tokens, args.again))
    except (RunError, ValueError, OSError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
