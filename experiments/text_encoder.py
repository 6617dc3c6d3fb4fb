"""From a causal model to a text encoder, step by step: no mask, masked prediction (MNTP), contrastive training (SimCSE).

    python experiments/text_encoder.py --model results/demo/RUN --stage causal none mntp mntp+simcse --task toyworld
    python experiments/text_encoder.py --model RUN --stage mntp+simcse --task data/sts/stsb-en --pooling mean last
    python experiments/text_encoder.py --model gpt2 --data my_text.txt --stage mntp --lora 16 --task data/tagging/ewt-pos --position i i-1
    python experiments/text_encoder.py --model RUN --stage mntp+pairs --pairs pairs.csv --task data/sts/stsb-en --save my_encoder
    python experiments/plot_text_encoder.py

A stage's training is done once and kept under --encoders; each combination of flags adds one row to --out, and those
found there are skipped, so the same command completes what was interrupted. The recipe is LLM2Vec's; its parts stand in
mntp.py, simcse.py, encoder.py (in a notebook: load_encoder("my_encoder").encode(texts)) and probes.py.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import runs
from data.tokens import file_sha256, find_folder, read_meta
from experiments import mntp, probes, simcse, tuning
from experiments.backbone import ATTENTIONS, Backbone, OwnBackbone, load_backbone
from experiments.encoder import POOLINGS, Encoder, EncoderError, load_encoder, save
from experiments.tagging_data import load_task
from flags import Option, one_sentence, parse_grid

STAGES = ("causal", "none", "mntp", "simcse", "pairs", "mntp+simcse", "mntp+pairs", "mntp+simcse+pairs")


@dataclass(frozen=True)
class Settings:
    """What names a row comes first; what only says where to work comes after `device`, and is not in the row."""

    model: str = Option("", "a run of train.py, a Hugging Face causal LM by local folder or hub name, or a folder of --save")
    stage: str = Option("mntp+simcse", "the model as it is (causal), its mask taken away (none), and what it is trained on then", choices=STAGES)
    task: str = Option("toyworld", "masked; X of X-test.csv: similarity; or labelled words, as in token_classification.py")
    position: str = Option("i", "labelled words: read at their own token or at the one before", choices=probes.POSITIONS)
    pooling: str = Option("mean", "of the tokens' states to a text's vector", choices=POOLINGS)
    instruction: str = Option("", "stands in front of every text, attended to but not pooled")
    depth: int | None = Option(None, "layers to take the states after; none: all", low=0)
    seed: int = Option(10, "of the order of text, hidden tokens, dropout, and a probe's head", low=0)
    sentences: int | None = Option(None, "labelled words: the first so many sentences of each split; none: all", low=1)
    probe_epochs: int = Option(20, "labelled words: passes of the linear head; the best by dev score is kept", low=1)
    probe_lr: float = Option(1e-3, "labelled words: of the linear head", low=0)
    data: str | None = Option(None, "text to train on: a token folder or a .txt file; none: what our model was trained on")
    lora: int | None = Option(None, "rank of the adapters of a Hugging Face model; none: 16; 0: all its weights. Ours: always all", low=0)
    mntp_steps: int = Option(1000, "optimiser steps", low=1)
    mntp_batch: int = Option(32, "windows per step", low=1)
    mntp_length: int = Option(128, "tokens per window, or fewer if the model reads fewer", low=2)
    mntp_share: float = Option(0.2, "of the tokens, hidden", low=0, high=1)
    mntp_style: str = Option("bert", "80 % mask token, 10 % random, 10 % kept; or all the mask token", choices=mntp.STYLES)
    mntp_target: str = Option("i-1", "the state that predicts hidden token i", choices=mntp.TARGETS)
    mntp_token: str | None = Option(None, "the mask token by its text; none: ours an unused id, others their own or _")
    mntp_lr: float | None = Option(None, "none: 0.001 for all weights, 0.00005 for adapters", low=0)
    mntp_windows: int = Option(64, "validation windows, with the same tokens hidden every time", low=1)
    simcse_steps: int = Option(1000, "optimiser steps, of SimCSE and of pairs", low=1)
    simcse_batch: int = Option(128, "texts per step: a text is told from that many", low=2)
    simcse_temperature: float = Option(0.05, "divides the cosine", low=1e-3)
    simcse_dropout: float = Option(0.3, "of what each block adds", low=0, high=1)
    simcse_lr: float | None = Option(None, "none: 0.0001 for all weights, 0.00003 for adapters", low=0)
    pairs: str | None = Option(None, "CSV file of text, positive (, hard negative) for the stages with pairs")
    device: str = Option("cuda" if torch.cuda.is_available() else "cpu", "where to compute", choices=("cpu", "cuda"))
    attention: str = Option("sdpa", "of Hugging Face models", choices=ATTENTIONS)
    dtype: str = Option("auto", "of matrix products in training", choices=("auto", "float32", "bfloat16"))
    encoders: str = Option("results/text-encoder/encoders", "folder for what was trained")
    out: str = Option("results/text-encoder/scores.csv", "table of results")
    save: str | None = Option(None, "another folder for the encoder, of one row only")


NAMED = [field.name for field in fields(Settings)][: [field.name for field in fields(Settings)].index("device")]
MEASURED = ("metric", "score", "acc", "precision", "recall", "dev", "loss", "scored", "seconds")
COLUMNS = (*NAMED, *MEASURED)
CURVE = ("step", "train_loss", "val_loss", "val_acc")


def kind_of(task: str) -> str:
    return "masked" if task == "masked" else "sts" if Path(f"{task}-test.csv").exists() else "words"


def named(settings: Settings, task: str | None = None) -> dict:
    """The settings that name a row, None where one changes nothing: a causal row holds for any number of MNTP steps.
    With `task` None: those that name what was trained. Of files only their names: places differ between machines."""
    parts, kind = settings.stage.split("+"), kind_of(task) if task else None
    tuned, contrastive = parts[0] not in ("causal", "none"), "simcse" in parts or "pairs" in parts
    masked = "mntp" in parts or kind == "masked"
    used = {
        "model": True, "stage": True, "task": kind, "position": kind == "words", "depth": kind in ("words", "sts") or contrastive,
        "pooling": kind == "sts" or contrastive, "instruction": kind == "sts" or contrastive, "seed": tuned or kind == "words",
        "sentences": kind == "words", "data": masked or "simcse" in parts, "lora": tuned, "pairs": "pairs" in parts,
        "mntp_windows": kind == "masked",
    }  # fmt: skip
    prefixes = {"probe": kind == "words", "mntp": "mntp" in parts, "simcse": contrastive}
    if kind == "masked":
        used |= dict.fromkeys(("mntp_share", "mntp_style", "mntp_target", "mntp_token", "mntp_length"), True)
    values = {name: getattr(settings, name) for name in NAMED}
    values["model"] = values["model"] and values["model"].rstrip("/")  # as shells complete a folder's name
    values |= {name: values[name] and Path(values[name]).name for name in ("task", "data", "pairs")}
    return {name: value if used.get(name, prefixes.get(name.split("_")[0])) else None for name, value in values.items()}


# ---------------------------------------------------------------------------------------------------------------------
# The stages
# ---------------------------------------------------------------------------------------------------------------------


def text_of(settings: Settings) -> str:
    """The text to train on. Our runs know theirs."""
    if settings.data:
        return settings.data
    try:
        return runs.read_config(Path(settings.model))["settings"]["data"]
    except (runs.RunError, KeyError):
        raise EncoderError(f"--data is missing: {settings.model} does not say what text it was trained on") from None


def untuned(settings: Settings) -> Encoder:
    """The model as it is, in float32, with the stage's mask."""
    if not settings.model:
        raise EncoderError("--model is missing: a run of train.py, or a Hugging Face causal LM")
    if (Path(settings.model) / "encoder.json").exists():
        backbone = load_encoder(settings.model, settings.device, settings.attention).backbone
    else:
        backbone = load_backbone(settings.model, settings.device, settings.attention)
    mask = "causal" if settings.stage == "causal" else "none"
    return dressed(backbone, settings, mask)


def dressed(backbone: Backbone, settings: Settings, mask: str = "none") -> Encoder:
    return Encoder(backbone.float(), mask, settings.pooling, settings.depth, settings.instruction)


def folder_of(settings: Settings) -> Path:
    """Where a stage's encoder is kept: named by everything that its training depends on."""
    name = {key: value for key, value in named(settings).items() if key != "mntp_windows"}
    digest = hashlib.sha256(json.dumps(name, sort_keys=True).encode()).hexdigest()[:6]
    return Path(settings.encoders) / f"{Path(settings.model).name}_{settings.stage}_{digest}"


def texts(settings: Settings) -> dict[str, str]:
    """{flag: sha256} of the texts that a stage is trained on, as far as they are here: names do not tell files apart."""
    found = {}
    for flag in ("data", "pairs"):
        source = getattr(settings, flag) if named(settings)[flag] else None
        if source and Path(source).is_file():
            found[flag] = file_sha256(Path(source))
        elif source and (find_folder(source) / "meta.json").exists():
            found[flag] = read_meta(find_folder(source))["splits"]["train"]["sha256"]
    return found


def check_texts(folder: Path, settings: Settings) -> None:
    """EncoderError if what is kept in the folder was trained on other texts of the same names."""
    path = folder / "settings.json"
    kept = json.loads(path.read_text()).get("texts", {}) if path.exists() else {}
    for flag, digest in texts(settings).items():
        if kept.get(flag, digest) != digest:
            name = Path(getattr(settings, flag)).name
            raise EncoderError(f"{folder} was trained on another --{flag} {name}: rename the text, or remove the folder")


def encoder_of(settings: Settings) -> Encoder:
    """The stage's encoder: found, or trained from the stage before it and kept. It is always read from its folder, so
    that what was interrupted goes on from the same weights."""
    if settings.stage in ("causal", "none"):
        return untuned(settings)
    folder = folder_of(settings)
    check_texts(folder, settings)
    if not (folder / "encoder.json").exists():
        before, _, last = settings.stage.rpartition("+")
        encoder = encoder_of(replace(settings, stage=before or "none"))
        rows = {"mntp": train_masked, "simcse": train_contrastive, "pairs": train_contrastive}[last](encoder, settings, last)
        runs.write_table(folder / "curve.csv", rows, CURVE)
        runs.write_json(folder / "settings.json", named(settings) | {"texts": texts(settings)})
        save(encoder, folder)
    return dressed(load_encoder(folder, settings.device, settings.attention).backbone, settings)


def masking_of(backbone: Backbone, settings: Settings) -> mntp.Masking:
    return mntp.Masking.of(backbone, settings.mntp_share, settings.mntp_style, settings.mntp_target, settings.mntp_token)


def window_of(backbone: Backbone, settings: Settings) -> int:
    return min(settings.mntp_length, backbone.max_tokens)


def train_masked(encoder: Encoder, settings: Settings, _: str) -> list[dict]:
    backbone, text = encoder.backbone, text_of(settings)
    lr = settings.mntp_lr if settings.mntp_lr is not None else 1e-3 if full(backbone, settings) else 5e-5
    streams = (tuning.token_stream(backbone, text, split) for split in ("train", "val"))
    head = mntp.output_head(backbone, settings.model)
    return mntp.train(backbone, head, *streams, masking_of(backbone, settings), settings.mntp_steps, lr, settings.mntp_batch,
                      window_of(backbone, settings), rank_of(settings), settings.seed, settings.mntp_windows, settings.dtype)  # fmt: skip


def train_contrastive(encoder: Encoder, settings: Settings, kind: str) -> list[dict]:
    lr = settings.simcse_lr if settings.simcse_lr is not None else 1e-4 if full(encoder.backbone, settings) else 3e-5
    if kind == "pairs" and not settings.pairs:
        raise EncoderError("--pairs is missing: a CSV file of text, positive and, if you have them, hard negative")
    if kind == "pairs":
        examples = simcse.read_pairs(settings.pairs)
    else:
        count = settings.simcse_steps * settings.simcse_batch
        examples = [(text,) for text in tuning.sentences(text_of(settings), "train", count)]
    losses = simcse.train(encoder, examples, settings.simcse_steps, lr, settings.simcse_batch, settings.simcse_temperature,
                          settings.simcse_dropout, rank_of(settings), settings.seed, settings.dtype)  # fmt: skip
    every = max(1, len(losses) // 5)
    pieces = [losses[k : k + every] for k in range(0, len(losses), every)]
    return [{"step": min((k + 1) * every, len(losses)), "train_loss": sum(piece) / len(piece)} for k, piece in enumerate(pieces)]


def full(backbone: Backbone, settings: Settings) -> bool:
    return isinstance(backbone, OwnBackbone) or rank_of(settings) is None


def rank_of(settings: Settings) -> int | None:
    return 16 if settings.lora is None else settings.lora or None


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def score(encoder: Encoder, settings: Settings, tasks: dict) -> dict:
    """One measurement: `metric` says what `score` is. Losses in nats, everything else as a share of 1."""
    if kind_of(settings.task) == "masked":
        backbone = encoder.backbone
        val = tuning.token_stream(backbone, text_of(settings), "val")
        masking = masking_of(backbone, settings)
        held = mntp.validation(val, masking, window_of(backbone, settings), settings.mntp_windows)
        found = mntp.evaluate(backbone, mntp.output_head(backbone, settings.model), held, masking.target, encoder.mask)
        return {"metric": "loss", "score": found["loss"], "loss": found["loss"], "acc": found["acc"], "scored": found["tokens"]}
    if kind_of(settings.task) == "sts":
        pairs = probes.read_sts(f"{settings.task}-test.csv")
        return {"metric": "spearman", "score": probes.sts(encoder, pairs), "scored": len(pairs)}
    key = (settings.task, settings.sentences)
    if key not in tasks:
        tasks[key] = probes.cut(load_task(settings.task), settings.sentences)
    task = tasks[key]
    found = probes.word_probe(encoder, task, settings.position, settings.probe_epochs, settings.probe_lr, settings.seed)
    row = {"metric": task.metric, "score": found[task.metric], "scored": sum(len(s.words) for s in task.test)}
    return row | {name: found.get(name) for name in ("acc", "precision", "recall", "dev")}


def run_grid(grid: list[Settings]) -> None:
    tasks, encoders = {}, {}
    if len(grid) > 1 and any(settings.save for settings in grid):
        raise EncoderError("--save needs one value for every flag: several encoders would overwrite each other")
    for number, settings in enumerate(grid, 1):
        out = Path(settings.out)
        rows, name = runs.read_rows(out, COLUMNS), named(settings, settings.task)
        key = ["" if value is None else str(value) for value in name.values()]
        check_texts(folder_of(settings), settings)
        label = " ".join(str(name[part]) for part in ("task", "model", "stage", "position", "seed") if name[part] is not None)
        if any([row[column] for column in NAMED] == key for row in rows) and not settings.save:
            print(f"{number}/{len(grid)}  {label}: in {out} already, skipped")
            continue
        started = time.perf_counter()
        about = tuple(named(settings).items()), settings.pooling, settings.depth, settings.instruction
        if about not in encoders:
            encoders.clear()  # one at a time in memory
            encoders[about] = encoder_of(settings)
        row = name | score(encoders[about], settings, tasks)
        row["seconds"] = round(time.perf_counter() - started, 2)
        if settings.save:
            opened = save(encoders[about], settings.save)
            print(f"kept in {settings.save}: for load_encoder" + (" and sentence-transformers" if opened else ", not for sentence-transformers"))
        rows = [old for old in rows if [old[column] for column in NAMED] != key]
        runs.write_table(out, [*rows, row], COLUMNS)
        print(f"{number}/{len(grid)}  {label}: {row['metric']} {row['score']:.4f}", flush=True)


@one_sentence
def main(argv: list[str] | None = None) -> None:
    run_grid(parse_grid(Settings, __doc__, argv))


if __name__ == "__main__":
    main()
