"""A text encoder: a backbone, a mask, a pooling. Texts become vectors; a folder keeps them all.

    encoder = Encoder(load_backbone("results/demo/RUN"), mask="none", pooling="mean")
    vectors = encoder.encode(["A man plays.", "Somebody is playing."])        # (2, width), on the backbone's device
    vectors = encoder.encode(questions, instruction="Find the answer: ")      # attended to, not pooled
    save(encoder, "my_encoder"); encoder = load_encoder("my_encoder")

A saved Hugging Face backbone is also a folder that sentence-transformers opens, where that can compute the same vectors:
no mask is then a setting of its config.json ("is_causal": false), which transformers >= 5 reads. Our own model has no
class there; load_encoder reads everything that save wrote.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor

import runs
from experiments.backbone import Backbone, BackboneError, OwnBackbone, load_backbone, pad
from flags import UserError
from model import model_bytes

POOLINGS = ("mean", "weighted_mean", "last", "first")
# of a saved backbone in its folder; "apart" keeps from sentence-transformers what it would take for a causal model under a mean
PLACES = {"own": "model.safetensors", "hugging face": "", "hugging face, apart": "model"}


class EncoderError(UserError, ValueError):
    """A text, folder or setting that does not fit; the message is one sentence for the user."""


def pool(states: Tensor, pooled: Tensor, how: str) -> Tensor:
    """states (B, T, D), pooled (B, T) bool: the tokens that count, at least one a row -> (B, D), float32.

    "weighted_mean" gives the k-th of them the weight k: under a causal mask later tokens have read more.
    """
    place = pooled.cumsum(1)
    if how == "mean":
        weights = pooled
    elif how == "weighted_mean":
        weights = place * pooled
    elif how in ("last", "first"):
        weights = pooled & (place == (place[:, -1:] if how == "last" else 1))
    else:
        raise EncoderError(f"pooling must be one of {', '.join(POOLINGS)}, got {how!r}")
    weights = weights.float()
    return torch.einsum("bt,btd->bd", weights / weights.sum(1, keepdim=True), states.float())


class Encoder:
    def __init__(self, backbone: Backbone, mask: str = "none", pooling: str = "mean", depth: int | None = None, instruction: str = "") -> None:
        """`instruction` stands in front of every text unless `encode` is given another one, with its own white space."""
        if pooling not in POOLINGS:
            raise EncoderError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
        self.backbone, self.mask, self.pooling, self.depth, self.instruction = backbone, mask, pooling, depth, instruction

    @property
    def device(self) -> torch.device:
        return next(self.backbone.parameters()).device

    def rows(self, texts: list[str], instruction: str | None = None) -> list[tuple[list[int], int]]:
        """Texts -> token ids, and from which token on they are pooled: behind the instruction, else from the first,
        special tokens of the tokenizer included. What is longer than the backbone reads is cut off behind."""
        instruction = self.instruction if instruction is None else instruction
        found = []
        for number, text in enumerate(texts, 1):
            if not text.strip():
                raise EncoderError(f"text number {number} is empty: it has no vector")
            ids, first = self.backbone.encode([instruction, text] if instruction else [text])
            begin = first[1] if instruction else 0
            if begin >= self.backbone.max_tokens:
                raise EncoderError(f"the instruction has {begin} tokens and leaves no room for a text: {self.backbone.name} "
                                   f"reads {self.backbone.max_tokens}")  # fmt: skip
            found.append((ids[: self.backbone.max_tokens], begin))
        return found

    def embed(self, rows: list[tuple[list[int], int]]) -> Tensor:
        """What `rows` gave -> (B, width); gradients reach the backbone."""
        tokens, present = (x.to(self.device) for x in pad([ids for ids, _ in rows]))
        begin = torch.tensor([begin for _, begin in rows], device=self.device)
        pooled = present & (torch.arange(tokens.shape[1], device=self.device) >= begin[:, None])
        return pool(self.backbone.states(tokens, present, self.mask, self.depth), pooled, self.pooling)

    @torch.no_grad()
    def encode(self, texts: list[str], instruction: str | None = None, batch: int = 64, to: str | None = None) -> Tensor:
        """(N, width) float32 in the texts' order, on the backbone's device, or on device `to`. Longest texts first, so
        that a batch is hardly padded and one that does not fit into memory shows at once."""
        rows = self.rows(texts, instruction)
        order = sorted(range(len(rows)), key=lambda k: -len(rows[k][0]))
        out = torch.zeros(len(rows), self.backbone.width, device=to or self.device)
        for piece in (order[k : k + batch] for k in range(0, len(order), batch)):
            out[torch.tensor(piece, device=out.device)] = self.embed([rows[k] for k in piece]).to(out.device)
        return out


# ---------------------------------------------------------------------------------------------------------------------
# Saving and loading
# ---------------------------------------------------------------------------------------------------------------------


def save(encoder: Encoder, folder: str | Path) -> bool:
    """Writes weights (adapters merged in), tokenizer and settings -> whether sentence-transformers computes the same from
    the folder. encoder.json comes last, so that what was interrupted is no encoder."""
    folder, backbone = Path(folder), encoder.backbone
    if (folder / "encoder.json").exists():  # another encoder was here: nothing of it may seem to describe this one
        for name in ("encoder.json", "config.json", "modules.json"):
            (folder / name).unlink(missing_ok=True)
    if isinstance(backbone, OwnBackbone):
        kind = "own"
        runs.write_atomically(folder / PLACES[kind], model_bytes(backbone.model, **backbone.metadata))
    else:
        kind = "hugging face" if expressible(encoder) else "hugging face, apart"
        save_hugging_face(backbone, folder / PLACES[kind])
        if kind == "hugging face":
            describe(encoder, folder)
    settings = {name: getattr(encoder, name) for name in ("mask", "pooling", "depth", "instruction")}
    runs.write_json(folder / "encoder.json", {"backbone": kind} | settings)
    return kind == "hugging face"


def save_hugging_face(backbone: Backbone, folder: Path) -> None:
    model = backbone.model
    if hasattr(model, "merge_and_unload"):
        model = copy.deepcopy(model).merge_and_unload()
    model.save_pretrained(folder)
    if backbone.tokenizer is not None:
        tokenizer = copy.deepcopy(backbone.tokenizer)
        tokenizer.padding_side = "right"
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token or tokenizer.bos_token
        tokenizer.save_pretrained(folder)


def expressible(encoder: Encoder) -> bool:
    """Whether sentence-transformers (6.2 was tried) can mean the same. It has no anti-causal mask, no depth and no
    direction tokens. It takes an instruction for as many tokens as it has alone, one more than in front of a text where
    a tokenizer glues its last space to the next word, and its weighted mean counts them."""
    backbone, tokenizer = encoder.backbone, encoder.backbone.tokenizer
    plain = encoder.mask in ("none", "causal", "fw") and encoder.depth in (None, backbone.depth) and not backbone.directions
    if not plain or tokenizer is None or not encoder.instruction or encoder.pooling == "last":
        return plain and tokenizer is not None
    alone, (_, first) = backbone.encode([encoder.instruction])[0], backbone.encode([encoder.instruction, "A"])[1]
    return encoder.pooling != "weighted_mean" and len(alone) - (alone[-1] in tokenizer.all_special_ids) == first


def describe(encoder: Encoder, folder: Path) -> None:
    """What sentence-transformers looks for around a model's files."""
    runs.write_json(folder / "config.json", runs.read_json(folder / "config.json") | {"is_causal": encoder.mask != "none"})
    kinds = {"mean": "mean_tokens", "weighted_mean": "weightedmean_tokens", "last": "lasttoken", "first": "cls_token"}
    pooling = {f"pooling_mode_{kind}": how == encoder.pooling for how, kind in kinds.items()}
    pooling |= {"word_embedding_dimension": encoder.backbone.width, "include_prompt": False}
    runs.write_json(folder / "1_Pooling" / "config.json", pooling)
    runs.write_json(folder / "sentence_bert_config.json", {"max_seq_length": min(encoder.backbone.max_tokens, 8192), "do_lower_case": False})
    modules = [("0", "", "Transformer"), ("1", "1_Pooling", "Pooling")]
    kind = "sentence_transformers.models."
    listed = [{"idx": int(name), "name": name, "path": path, "type": kind + what} for name, path, what in modules]
    runs.write_json(folder / "modules.json", listed)
    prompts = {"prompts": {"text": encoder.instruction}, "default_prompt_name": "text"} if encoder.instruction else {}
    runs.write_json(folder / "config_sentence_transformers.json", prompts)


def load_encoder(folder: str | Path, device: str = "cpu", attention: str = "sdpa") -> Encoder:
    """What `save` wrote. EncoderError for a folder that holds no encoder, or a damaged one."""
    folder = Path(folder)
    if not (folder / "encoder.json").exists():
        raise EncoderError(f"{folder} holds no encoder: python experiments/text_encoder.py --save {folder} writes one")
    try:
        about = runs.read_json(folder / "encoder.json")
        place = folder / PLACES[about.pop("backbone")]
        return Encoder(load_backbone(str(place), device, attention), **about)
    except (KeyError, TypeError, BackboneError, runs.RunError) as error:
        raise EncoderError(f"{folder} holds a damaged encoder ({error}): write it again with --save") from None
