"""What masked training and contrastive training share: text for any backbone, adapters, one training loop.

    stream = token_stream(backbone, "data/wikipedia", "train")     # its tokens, or the text in another backbone's tokens
    texts = sentences("data/wikipedia", "train", 5000)             # distinct sentences, in the order of the text
    parameters = trainable(backbone, lora=16)                      # all of our model's, or adapters of a Hugging Face one
    losses = optimise(parameters, steps=100, lr=1e-3, loss_of=lambda step: ...)

A source of text is a token folder of data/prepare.py, or a .txt file whose last tenth of lines is the "val" split.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from data.tokens import DataError, Tokens, find_folder, load_tokenizer, open_tokens
from experiments.backbone import Backbone, OwnBackbone, find_hugging_face, open_tokenizer
from experiments.finetune_data import PROBE, ids_of
from machine import fast_bf16

# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------

PIECE = 1 << 20  # tokens of a text that are decoded at once: a sentence in a million tokens is cut in two


def documents(source: str, split: str) -> Iterator[str]:
    """The texts of a source one by one, in pieces of a million tokens; of token folders nothing is read before it is asked for."""
    if Path(source).is_file():
        try:
            lines = [line for line in Path(source).read_text(encoding="utf-8").split("\n") if line.strip()]
        except UnicodeDecodeError as error:
            raise DataError(f"{source} is no UTF-8 text ({error})") from None
        kept = max(1, len(lines) // 10)
        yield from lines[:-kept] if split == "train" else lines[-kept:]
        return
    tokens = open_tokens(find_folder(source), split)
    name, end = tokens.meta["tokenizer"], tokens.meta["eot_token"]
    tokenizer = open_tokenizer(find_hugging_face(name)) if "probe" in tokens.meta else load_tokenizer(name)  # of finetune_data.py or prepare.py
    start = 0
    for stop in [*np.flatnonzero(tokens.data == end), len(tokens)]:
        for first in range(start, stop, PIECE):  # one stream may be all of a text
            yield tokenizer.decode(tokens.data[first : min(first + PIECE, stop)].tolist())
        start = stop + 1


def token_stream(backbone: Backbone, source: str, split: str, most: int = 10_000_000) -> Tokens:
    """A source in a backbone's tokens: the token folder as it is where the tokenizer is the backbone's, else its
    documents (or a million tokens of one) encoded one after the other, with end-of-text between them, until there are `most`."""
    folder = find_folder(source)
    if not Path(source).is_file():
        tokens = open_tokens(folder, split)
        own = isinstance(backbone, OwnBackbone)
        if own and tokens.meta["tokenizer"] == backbone.metadata["tokenizer"] or not own and tokens.meta.get("probe") == ids_of(backbone.tokenizer, [PROBE])[0]:
            return tokens
    ids: list[int] = []
    for text in documents(source, split):
        ids += backbone.encode([text])[0]
        if len(ids) >= most:
            break
        if backbone.end_of_text is not None and ids[-1] != backbone.end_of_text:
            ids.append(backbone.end_of_text)
    return Tokens(folder, split, np.array(ids[:most], np.int64), {})


def sentences(source: str, split: str, count: int, words: tuple[int, int] = (4, 48)) -> list[str]:
    """The first `count` distinct sentences of so many words: pieces of a line that end in . ! or ? before a space.
    A repeated sentence would be its own wrong answer in a batch."""
    found: dict[str, None] = {}
    for text in documents(source, split):
        for sentence in re.split(r"(?<=[.!?])\s+|\n+", text):
            if words[0] <= len(sentence.split()) <= words[1]:
                found[sentence.strip()] = None
        if len(found) >= count:
            break
    return list(found)[:count]


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def trainable(backbone: Backbone, lora: int | None = 16) -> list[nn.Parameter]:
    """The parameters that tuning may change, in float32. Ours: all. Hugging Face: low-rank adapters of that rank beside
    every linear layer, which are added on the first call; `lora` None: all weights.

    Modules stay in evaluation mode: what dropout there is, is asked for by name (simcse.py).
    """
    backbone.float()
    if not isinstance(backbone, OwnBackbone) and lora is not None and not hasattr(backbone.model, "merge_and_unload"):
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=lora, lora_alpha=2 * lora, target_modules="all-linear", lora_dropout=0.0)
        backbone.requires_grad_(False)
        backbone.model = get_peft_model(backbone.model, config).eval()
    elif isinstance(backbone, OwnBackbone) or lora is None:
        backbone.requires_grad_(True)
    return [parameter for parameter in backbone.parameters() if parameter.requires_grad]


def precision(device: torch.device, dtype: str = "auto") -> torch.autocast:
    """Matrix products in bfloat16 where the machine multiplies it fast (auto) or always; weights stay in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=fast_bf16(device) if dtype == "auto" else dtype == "bfloat16")


def optimise(parameters: list[nn.Parameter], steps: int, lr: float, loss_of: Callable[[int], Tensor],
             after: Callable[[int, float], None] | None = None) -> list[float]:  # fmt: skip
    """AdamW: a tenth of the steps of warm-up, then linear decay to 0; gradients clipped to norm 1. `loss_of(step)` is a
    scalar; `after(step, loss)` is called behind every step, counted from 1 -> the losses."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    warmup = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup)))
    losses = []
    for step in range(steps):
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if after:
            after(step + 1, losses[-1])
    return losses
