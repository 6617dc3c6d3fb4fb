"""What an encoder's states know: labels of words by a linear probe, similarity of sentences by Spearman's rank correlation.

    task = cut(load_task("data/tagging/ewt-pos"), 1000)
    print(word_probe(encoder, task, position="i", epochs=3))        # frozen states, a linear head, as in LLM2Vec's probes
    print(sts(encoder, read_sts("data/sts/stsb-en-test.csv")))      # cosine of two sentences against people's scores

Position "i" reads a word from its own first token, "i-1" from the token before it, where a model of next tokens may
keep what it expects.
"""

from __future__ import annotations

import csv
from pathlib import Path

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor

from data.tokens import DataError
from experiments.backbone import Backbone
from experiments.encoder import Encoder
from experiments.tagging_data import Task, scores
from experiments.token_classification import Features, Settings, fit, tag

POSITIONS = ("i", "i-1")


class Read(Backbone):
    """An encoder's backbone with its mask and layer, as the features of words want it."""

    def __init__(self, encoder: Encoder, position: str) -> None:
        super().__init__()
        self.encoder, self.name, self.width = encoder, "encoder", encoder.backbone.width
        self.spans = encoder.backbone.spans
        self.read = encoder.backbone.previous if position == "i-1" else encoder.backbone.states

    def states(self, tokens: Tensor, present: Tensor, mask: str, depth: int | None = None) -> Tensor:
        return self.read(tokens, present, self.encoder.mask, self.encoder.depth)


def cut(task: Task, most: int | None) -> Task:
    """The first `most` sentences of each split."""
    return Task(task.name, task.train[:most], task.dev[:most], task.test[:most])


def word_probe(encoder: Encoder, task: Task, position: str = "i", epochs: int = 3, lr: float = 1e-3, seed: int = 10) -> dict[str, float]:
    """Trains a linear head on frozen states; the epoch with the best dev score is scored on the test split -> accuracy,
    for spans also precision, recall and F1."""
    settings = Settings(task=task.name, model="encoder", features="none", head="linear", dropout=0.0, epochs=epochs, lr=lr, seed=seed,
                        device=encoder.device.type)  # fmt: skip
    features = Features(settings, {"encoder": Read(encoder, position)})
    features.freeze(task.train + task.dev + task.test, {})
    head, _, dev = fit(settings, task, task.train, features)
    return {"dev": dev} | scores([s.labels for s in task.test], tag(head, features, task.test, task.labels))


def read_sts(path: str | Path) -> list[tuple[str, str, float]]:
    """(sentence, sentence, similarity) per row of a CSV file without a header."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return [(first, second, float(score)) for first, second, score in csv.reader(file)]
    except (OSError, ValueError, csv.Error) as error:  # also UnicodeDecodeError
        raise DataError(f"{path} is no list of sentence, sentence, similarity: {error}") from None


def sts(encoder: Encoder, pairs: list[tuple[str, str, float]]) -> float:
    """Spearman's rank correlation between the cosine of the sentences' vectors and the given similarity."""
    first, second, gold = zip(*pairs)
    similarity = F.cosine_similarity(encoder.encode(list(first)), encoder.encode(list(second)), dim=-1)
    return float(spearmanr(similarity.cpu().numpy(), torch.tensor(gold).numpy()).statistic)
