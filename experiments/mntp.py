"""Masked next-token prediction: a causal model learns to use what stands behind a word.

    masking = Masking.of(backbone, share=0.2, style="bert")
    head = output_head(backbone, "results/demo/RUN")
    curve = train(backbone, head, train_tokens, val_tokens, masking, steps=1000, lr=1e-3)
    print(evaluate(backbone, head, validation(val_tokens, masking, length=128, windows=64)))      # loss and accuracy

Without a mask, some tokens of a window are hidden, and each is predicted from the state of the token before it
(target "i-1", as in LLM2Vec: that is where a causal model has learned to predict it) or from its own (target "i", as in
BERT). Everything else is not scored. Our models have FW in front of the first token; a Hugging Face model has nothing,
so there the first token of a window is never hidden with target "i-1".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from data.tokens import DataError, Tokens, TrainingWindows, load_tokenizer, validation_windows
from experiments.backbone import Backbone, BackboneError, OwnBackbone, find_hugging_face, open_hugging_face
from experiments.tuning import optimise, precision, trainable
from gradients import HeadLoss

STYLES = ("bert", "all")
TARGETS = ("i-1", "i")


@dataclass(frozen=True)
class Masking:
    """What is hidden, and how. "bert": of the chosen tokens 80 % become the mask token, 10 % a random one, 10 % stay;
    "all": all become the mask token."""

    share: float  # of the tokens, each chosen by a draw of its own
    style: str
    token: int  # what stands for a hidden token
    vocabulary: int  # random tokens are below this
    special: tuple[int, ...] = ()  # never hidden
    target: str = "i-1"
    first: bool = True  # whether a window's first token may be hidden

    @staticmethod
    def of(backbone: Backbone, share: float = 0.2, style: str = "bert", target: str = "i-1", text: str | None = None) -> Masking:
        """The mask token is `text`, which must be one token. Default for our models: the last unused row of the padded
        vocabulary, which no direction and no p_bw has trained; for Hugging Face models: the tokenizer's mask token if
        it has one, else "_", as published."""
        if isinstance(backbone, OwnBackbone):
            rows, tokenizer = backbone.model.config.vocab_size, load_tokenizer(backbone.metadata["tokenizer"])
            ids = tokenizer.encode_ordinary(text) if text else [rows - 3]
            if ids == [rows - 3] and tokenizer.n_vocab > rows - 3:
                raise BackboneError(f"{backbone.name} has no unused row in its vocabulary: name a mask token by its text")
            return Masking(share, style, one_token(ids, text), tokenizer.n_vocab, (), target, target == "i" or backbone.framed)
        tokenizer = backbone.tokenizer
        if tokenizer is None:
            raise BackboneError(f"{backbone.name} has no fast tokenizer beside its weights: add its tokenizer.json")
        known = text is None and tokenizer.mask_token_id is not None
        ids = [tokenizer.mask_token_id] if known else tokenizer(text or "_", add_special_tokens=False)["input_ids"]
        special = tuple(tokenizer.all_special_ids)
        directions = backbone.directions  # the last ids: no random token is one of them
        return Masking(share, style, one_token(ids, text or "_"), len(tokenizer) - len(directions), special, target, target == "i" or bool(directions))

    def hide(self, tokens: Tensor, present: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """tokens, present (B, T) -> what the model reads (B, T), and which tokens it is asked for (B, T) bool."""
        draw, kind = (torch.rand(tokens.shape, generator=generator).to(tokens.device) for _ in range(2))
        random = torch.randint(self.vocabulary, tokens.shape, generator=generator).to(tokens.device)
        hidden = (draw < self.share) & present & ~torch.isin(tokens, tokens.new_tensor(self.special))
        if not self.first:
            hidden &= present.cumsum(1) > 1
        if self.style == "all":
            return tokens.masked_fill(hidden, self.token), hidden
        inputs = tokens.masked_fill(hidden & (kind < 0.8), self.token)
        return torch.where(hidden & (kind >= 0.9), random, inputs), hidden


def one_token(ids: list[int], text: str | None) -> int:
    if len(ids) != 1:
        raise BackboneError(f"the mask token must be one token of the model, {text!r} is {len(ids)}")
    return ids[0]


def output_head(backbone: Backbone, name: str) -> Tensor:
    """The matrix (V, D) from states to logits. Ours, and one tied to the embedding, are trained with the model; that of
    an untied Hugging Face model is read from the model `name` and stays as it is."""
    if isinstance(backbone, OwnBackbone):
        return backbone.model.head
    if getattr(backbone.model.config, "tie_word_embeddings", True):
        return backbone.model.get_input_embeddings().weight
    if (Path(name) / "encoder.json").exists():
        raise BackboneError(f"{name} was saved without its head, which masked prediction needs: give the model that it was made from")
    place = Path(name) / "model"  # where finetune.py puts a model
    name = str(place) if (place / "config.json").exists() else name
    whole, _ = open_hugging_face(find_hugging_face(name), name, "AutoModelForCausalLM", "sdpa", torch.float32)
    return whole.get_output_embeddings().weight.detach().to(next(backbone.parameters()).device)


def asked(backbone: Backbone, inputs: Tensor, present: Tensor, hidden: Tensor, target: str, mask: str = "none") -> Tensor:
    """(B, T) each -> the states from which the hidden tokens are predicted, (N, D)."""
    states = (backbone.previous if target == "i-1" else backbone.states)(inputs, present, mask)
    return states[hidden]


def validation(tokens: Tokens, masking: Masking, length: int, windows: int, batch: int = 32) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The first windows of a split with the same tokens hidden at every call -> inputs, tokens, hidden, (b, length) each."""
    if len(tokens) < length + 1:
        raise DataError(f"the validation text has {len(tokens):,} tokens, too few for a window of {length}: lower --mntp_length or take more text")
    pieces = [torch.from_numpy(piece[:, :-1]) for piece in islice(validation_windows(tokens, length, 1), windows)]
    chosen = torch.cat([piece for piece in pieces if piece.shape[1] == length])  # without a shorter window at the end
    inputs, hidden = masking.hide(chosen, torch.ones_like(chosen, dtype=torch.bool), torch.Generator().manual_seed(0))
    yield from zip(inputs.split(batch), chosen.split(batch), hidden.split(batch))


@torch.no_grad()
def evaluate(backbone: Backbone, head: Tensor, batches, target: str = "i-1", mask: str = "none") -> dict[str, float]:
    """Loss in nats per hidden token, share of top-1 hits, and how many tokens were scored."""
    total, hits, scored = 0.0, 0, 0
    for inputs, tokens, hidden in batches:
        inputs, tokens, hidden = (x.to(head.device) for x in (inputs, tokens, hidden))
        states = asked(backbone, inputs, torch.ones_like(hidden), hidden, target, mask)
        for part, gold in zip(states.split(256), tokens[hidden].split(256)):
            logits = F.linear(part.float(), head.float())
            total += F.cross_entropy(logits, gold, reduction="sum").item()
            hits += (logits.argmax(-1) == gold).sum().item()
            scored += len(gold)
    if not scored:
        raise DataError("no token of the validation text was hidden: take more windows or a larger share")
    return {"loss": total / scored, "acc": hits / scored, "tokens": scored}


def train(backbone: Backbone, head: Tensor, text: Tokens, val: Tokens, masking: Masking, steps: int, lr: float, batch: int = 32,
          length: int = 128, lora: int | None = 16, seed: int = 0, val_windows: int = 64, dtype: str = "auto") -> list[dict]:  # fmt: skip
    """Trains in place on `steps` batches of windows -> rows of step, train loss (mean since the last row), and the
    validation loss and accuracy, at the beginning and after every fifth of the steps."""
    torch.manual_seed(seed)  # of LoRA's first matrices
    parameters = trainable(backbone, lora)
    windows, generator = TrainingWindows(text, seed=seed), torch.Generator().manual_seed(seed)
    held = list(validation(val, masking, length, val_windows))
    cast, rows, recent = precision(head.device, dtype), [], []

    def measure(step: int) -> None:
        score = evaluate(backbone, head, held, masking.target)
        loss = sum(recent) / len(recent) if recent else None
        rows.append({"step": step, "train_loss": loss, "val_loss": score["loss"], "val_acc": score["acc"]})
        recent.clear()

    def loss_of(_: int) -> Tensor:
        tokens = torch.from_numpy(windows.next(batch, length)[:, :-1])
        inputs, hidden = masking.hide(tokens, torch.ones_like(tokens, dtype=torch.bool), generator)
        inputs, tokens, hidden = (x.to(head.device) for x in (inputs, tokens, hidden))
        with cast:
            states = asked(backbone, inputs, torch.ones_like(hidden), hidden, masking.target)
            kind = torch.get_autocast_dtype(head.device.type) if torch.is_autocast_enabled(head.device.type) else states.dtype
        return HeadLoss.apply(states.to(kind), head.to(kind), tokens[hidden], max(1, len(states)))[0]

    def after(step: int, loss: float) -> None:
        recent.append(loss)
        if step % max(1, steps // 5) == 0 or step == steps:
            measure(step)

    measure(0)
    optimise(parameters, steps, lr, loss_of, after)
    return rows
