"""Contrastive training: texts that mean the same get vectors that point the same way.

    losses = train(encoder, [(text,) for text in texts], steps=1000, lr=3e-5)         # SimCSE: the same text twice
    losses = train(encoder, read_pairs("pairs.csv"), steps=1000, lr=3e-5)             # pairs, with or without hard negatives

An example is (text,), which is read twice with different dropout, or (text, its positive), or (text, its positive, a
hard negative). A batch's other positives, and all its negatives, are what a text must be told from.
"""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.tokens import DataError
from experiments.backbone import Backbone
from experiments.encoder import Encoder
from experiments.tuning import optimise, precision, trainable

POOL = 16  # batches whose examples are sorted by length together


def contrastive_loss(anchors: Tensor, positives: Tensor, negatives: Tensor | None = None, temperature: float = 0.05) -> Tensor:
    """(B, D) each -> scalar: cross-entropy of finding each anchor's own positive among all positives and negatives by
    cosine / temperature."""
    others = positives if negatives is None else torch.cat([positives, negatives])
    similarity = F.normalize(anchors, dim=-1) @ F.normalize(others, dim=-1).T / temperature
    return F.cross_entropy(similarity, torch.arange(len(anchors), device=anchors.device))


@contextlib.contextmanager
def dropout(backbone: Backbone, share: float) -> Iterator[None]:
    """Drops this share of what every block adds to the residual stream. The same for every kind of backbone: many have
    no dropout of their own, or it was switched off in training."""

    def drop(module: nn.Module, inputs: tuple, output):
        x, first = inputs[0], output[0] if isinstance(output, tuple) else output
        first = x + F.dropout(first - x, share, training=True)
        return (first, *output[1:]) if isinstance(output, tuple) else first

    blocks = next(x for x in backbone.model.modules() if isinstance(x, nn.ModuleList) and len(x) == backbone.depth)
    hooks = [block.register_forward_hook(drop) for block in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def read_pairs(path: str) -> list[tuple[str, ...]]:
    """Rows of a CSV file without a header: text, positive, and in every row or in none a hard negative."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [tuple(cell.strip() for cell in row) for row in csv.reader(file) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    sizes = {len(row) for row in rows}
    if sizes not in ({2}, {3}) or not all(all(row) for row in rows):
        raise DataError(f"{path} must have two columns (text, positive) or three (and a hard negative), none of them empty")
    return rows


def batches(lengths: list[int], size: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of indices, every example once a pass. Neighbours in length meet in a batch: little padding, and
    length is no hint at the right answer. What does not fill a batch waits for another pass."""
    if len(lengths) < size:
        raise DataError(f"{len(lengths)} examples do not fill a batch of {size}: lower --simcse_batch or take more text")
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(lengths), generator=generator).tolist()
        cut = []
        for pool in (order[k : k + POOL * size] for k in range(0, len(order), POOL * size)):
            pool.sort(key=lambda k: lengths[k])
            cut += [pool[k : k + size] for k in range(0, len(pool) - size + 1, size)]
        yield from (cut[k] for k in torch.randperm(len(cut), generator=generator).tolist())


def train(encoder: Encoder, examples: list[tuple[str, ...]], steps: int, lr: float, batch: int = 128, temperature: float = 0.05,
          share: float = 0.3, lora: int | None = 16, seed: int = 0, dtype: str = "auto") -> list[float]:  # fmt: skip
    """Trains the encoder's backbone in place, `share` of each block dropped -> the loss of every step."""
    torch.manual_seed(seed)  # dropout draws from the global generator
    parameters = trainable(encoder.backbone, lora)
    columns = [encoder.rows(list(column)) for column in zip(*examples)]
    columns = columns * 2 if len(columns) == 1 else columns
    draw = batches([len(ids) for ids, _ in columns[0]], batch, seed)
    cast = precision(encoder.device, dtype)

    def loss_of(_: int) -> Tensor:
        chosen = next(draw)
        with cast:
            vectors = encoder.embed([column[k] for column in columns for k in chosen]).split(batch)
        return contrastive_loss(*vectors, temperature=temperature)

    with dropout(encoder.backbone, share):
        return optimise(parameters, steps, lr, loss_of)
