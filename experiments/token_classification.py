"""Token classification from forward and backward states: named entities, parts of speech.

    python experiments/token_classification.py --task toyworld --model results/demo/RUN --features fw bw fw+bw
    python experiments/token_classification.py --task toyworld-ahead --model RUN --features fw bw fw+bw none
    python experiments/token_classification.py --task data/tagging/wnut17-ner --model RUN_FW --model_bw RUN_BW --features fw+bw
    python experiments/token_classification.py --task data/tagging/wnut17-ner --model RUN_FW --model_bw OTHER_FW --features fw+fw
    python experiments/token_classification.py --task conll2003 --model gpt2 --features fw none --crf true --shots 4 16 64 256
    python experiments/token_classification.py --task toyworld --model RUN --features fw+bw --finetune true --save my_tagger
    python experiments/token_classification.py --task toyworld --load my_tagger --predictions predictions.conll
    python experiments/plot_token_classification.py

A word's features are the states at its first token: of the fw pass, of the bw pass, of both side by side, or of a pass
without a mask. fw+fw, two forward models side by side, is the control: as wide as fw+bw, and as many models as two. The
backbone stays frozen unless --finetune true. A flag with several values makes a grid; each combination adds one row to
--out, and those found there are skipped.

Which side of a word a task needs is known of two: toyworld-ahead tags the subject of a sentence about a person with the
fact (birth, office, death, travel, ...) that the rest of the sentence goes on to tell, which nothing before it gives
away; toyworld-behind, its mirror image, tags the full stop with the fact that has just been told.
"""

from __future__ import annotations

import copy
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import runs
from experiments.backbone import ATTENTIONS, Backbone, load_backbone, pad
from experiments.tagging_data import Sentence, Task, few_shot, load_task, scores, write_conll
from flags import Option, UserError, one_sentence, parse_grid


@dataclass(frozen=True)
class Settings:
    """What makes a row's name comes first; what only says where to work comes after `device`, and is not in the row."""

    task: str = Option("toyworld", "toyworld (entities), toyworld-ahead, toyworld-behind, conll2003, wnut17, ewt-pos, or the X of X.train.conll")
    model: str = Option("", "a run of train.py, or a Hugging Face causal LM by local folder or hub name")
    model_bw: str | None = Option(None, "another model for the bw features, or the second fw ones; its size and its tokenizer may differ")
    features: str = Option("fw+bw", "states at each word", choices=("fw", "bw", "fw+bw", "fw+fw", "none"))
    depth: int | None = Option(None, "layers to take the states after; none: all", low=0)
    subtoken: str = Option("first", "which of a word's tokens stands for it", choices=("first", "last"))
    head: str = Option("mlp", "linear, or the published dropout, linear, ReLU, linear", choices=("linear", "mlp"))
    crf: bool = Option(False, "a linear-chain CRF on top of the head")
    finetune: bool = Option(False, "train the backbone too")
    shots: int | None = Option(None, "train on a sample with every label this many times; none: on all sentences", low=1)
    seed: int = Option(10, "of the head's weights, the order of sentences, dropout and the few-shot sample", low=0)
    epochs: int = Option(20, "passes over the training sentences; the best by dev score is kept", low=1)
    batch: int = Option(32, "sentences per step", low=1)
    lr: float = Option(1e-3, "of the head, decaying linearly to 0", low=0)
    lr_backbone: float = Option(5e-5, "of the backbone, with --finetune true", low=0)
    dropout: float = Option(0.1, "before the head", low=0, high=1)
    device: str = Option("cuda" if torch.cuda.is_available() else "cpu", "where to compute", choices=("cpu", "cuda"))
    attention: str = Option("sdpa", "of Hugging Face models", choices=ATTENTIONS)
    save: str | None = Option(None, "folder for head and settings (and the backbone's weights after --finetune true)")
    load: str | None = Option(None, "a folder written by --save: nothing is trained, the task's test split is tagged")
    predictions: str | None = Option(None, "file for the test split with gold and predicted labels")
    out: str = Option("results/token-classification/scores.csv", "table of results")


NAMED = [field.name for field in fields(Settings)][: [field.name for field in fields(Settings)].index("device")]
MEASURED = ("metric", "sentences", "trained", "best_epoch", "dev", "test", "test_precision", "test_recall", "test_acc", "seconds")
COLUMNS = (*NAMED, *MEASURED)


class TaggingError(UserError, ValueError):
    """Flags that do not fit together; the message is one sentence for the user."""


# ---------------------------------------------------------------------------------------------------------------------
# Heads
# ---------------------------------------------------------------------------------------------------------------------


class CRF(nn.Module):
    """A linear-chain conditional random field over C labels. Emissions (B, W, C) and labels (B, W) are padded on the
    right; present (B, W) says where words are, and nothing behind a sentence's last word counts."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.start, self.end = nn.Parameter(torch.zeros(classes)), nn.Parameter(torch.zeros(classes))
        self.transitions = nn.Parameter(torch.zeros(classes, classes))  # from row to column

    def loss(self, emissions: Tensor, labels: Tensor, present: Tensor) -> Tensor:
        """-log p(labels), summed over the sentences, per word: comparable to a cross-entropy."""
        return (self.log_partition(emissions, present) - self.score(emissions, labels, present)).sum() / present.sum()

    def score(self, emissions: Tensor, labels: Tensor, present: Tensor) -> Tensor:
        """The unnormalised log-probability of each labelling: (B,)."""
        words = emissions.gather(-1, labels[..., None])[..., 0].masked_fill(~present, 0).sum(1)
        steps = self.transitions[labels[:, :-1], labels[:, 1:]].masked_fill(~present[:, 1:], 0).sum(1)
        last = labels.gather(1, present.sum(1, keepdim=True) - 1)[:, 0]
        return self.start[labels[:, 0]] + words + steps + self.end[last]

    def log_partition(self, emissions: Tensor, present: Tensor) -> Tensor:
        """log of the sum over all labellings: (B,)."""
        alpha = self.start + emissions[:, 0]
        for t in range(1, emissions.shape[1]):
            longer = (alpha[:, :, None] + self.transitions).logsumexp(1) + emissions[:, t]
            alpha = torch.where(present[:, t, None], longer, alpha)
        return (alpha + self.end).logsumexp(-1)

    @torch.no_grad()
    def decode(self, emissions: Tensor, present: Tensor) -> Tensor:
        """The likeliest labelling (Viterbi): (B, W), anything at padding."""
        best, back = self.start + emissions[:, 0], []
        stay = torch.arange(len(self.start), device=emissions.device).expand_as(best)
        for t in range(1, emissions.shape[1]):
            longer, choice = (best[:, :, None] + self.transitions).max(1)
            best = torch.where(present[:, t, None], longer + emissions[:, t], best)
            back.append(torch.where(present[:, t, None], choice, stay))
        path = [(best + self.end).argmax(-1)]
        for choice in reversed(back):
            path.append(choice.gather(1, path[-1][:, None])[:, 0])
        return torch.stack(path[::-1], 1)


class Head(nn.Module):
    """Features of words -> labels. The published head is dropout, Linear(d, d), ReLU, Linear(d, classes)."""

    def __init__(self, width: int, classes: int, kind: str = "mlp", crf: bool = False, dropout: float = 0.1) -> None:
        super().__init__()
        hidden = [nn.Linear(width, width), nn.ReLU()] if kind == "mlp" else []
        self.layers = nn.Sequential(nn.Dropout(dropout), *hidden, nn.Linear(width, classes))
        self.crf = CRF(classes) if crf else None

    def emissions(self, features: Tensor, present: Tensor) -> Tensor:
        """features (B, W, D) -> (B, W, classes), computed for words only: most of a mixed batch is padding."""
        logits = self.layers(features[present])
        return logits.new_zeros(*present.shape, logits.shape[-1]).index_put((present,), logits)

    def loss(self, features: Tensor, present: Tensor, labels: Tensor) -> Tensor:
        if self.crf is None:
            return F.cross_entropy(self.layers(features[present]), labels[present])
        return self.crf.loss(self.emissions(features, present), labels, present)

    def predict(self, features: Tensor, present: Tensor) -> Tensor:
        emissions = self.emissions(features, present)
        return emissions.argmax(-1) if self.crf is None else self.crf.decode(emissions, present)


# ---------------------------------------------------------------------------------------------------------------------
# Features
# ---------------------------------------------------------------------------------------------------------------------


def encode(backbone: Backbone, sentence: Sentence, subtoken: str) -> tuple[list[int], list[int]]:
    """Token ids, and the place of the token that stands for each word."""
    ids, spans = backbone.spans(sentence.words)
    return ids, [span[subtoken == "last"] for span in spans]


class Features:
    """The words' features under some settings: parts (backbone, direction or mask), concatenated. Words, not tokens,
    are what two backbones have in common, so each part may have its own tokenizer."""

    def __init__(self, settings: Settings, backbones: dict[str, Backbone]) -> None:
        """`backbones` keeps what is loaded, by name; those to be fine-tuned are always loaded afresh."""
        if not settings.model:
            raise TaggingError("--model is missing: a run of train.py, or a Hugging Face causal LM")
        if settings.features == "fw+fw" and settings.model_bw in (None, settings.model):
            raise TaggingError("--features fw+fw needs a second forward model: give it as --model_bw")
        own = {} if settings.finetune else backbones
        self.settings, self.parts, self.frozen = settings, [], {}
        for place, mask in enumerate(settings.features.split("+")):
            name = settings.model_bw if settings.model_bw and (mask == "bw" or place == 1) else settings.model
            if name not in own:
                own[name] = load_backbone(name, settings.device, settings.attention)
                own[name].float() if settings.finetune else own[name].requires_grad_(False)
            self.parts.append((own[name], mask))
        self.width = sum(backbone.width for backbone, _ in self.parts)
        self.modules = nn.ModuleList({backbone.name: backbone for backbone, _ in self.parts}.values())

    def states(self, part: int, sentences: list[Sentence]) -> list[Tensor]:
        """(words, width) for each sentence, of one part."""
        backbone, mask = self.parts[part]
        encoded = [encode(backbone, sentence, self.settings.subtoken) for sentence in sentences]
        tokens, present = (x.to(self.settings.device) for x in pad([ids for ids, _ in encoded]))
        states = backbone.states(tokens, present, mask, self.settings.depth)
        return [states[row, places].float() for row, (_, places) in enumerate(encoded)]

    @torch.no_grad()
    def freeze(self, sentences: list[Sentence], cache: dict, batch: int = 64) -> None:
        """Computes the features of sentences once. `cache` is shared by a grid: fw serves "fw" and "fw+bw"."""
        order = sorted(sentences, key=lambda sentence: len(sentence.words))  # equal lengths together: little padding
        for part, (backbone, mask) in enumerate(self.parts):
            known = cache.setdefault((backbone.name, mask, self.settings.depth, self.settings.subtoken), {})
            new = [sentence for sentence in order if id(sentence) not in known]
            for piece in (new[k : k + batch] for k in range(0, len(new), batch)):
                known.update(zip(map(id, piece), self.states(part, piece)))
            self.frozen[part] = known

    def batch(self, sentences: list[Sentence]) -> tuple[Tensor, Tensor]:
        """-> features (B, W, width), zero at padding, and present (B, W)."""
        parts = [[self.frozen[part][id(s)] for s in sentences] if self.frozen else self.states(part, sentences)
                 for part in range(len(self.parts))]  # fmt: skip
        features = pad_sequence([torch.cat(pieces, -1) for pieces in zip(*parts)], batch_first=True)
        lengths = torch.tensor([len(s.words) for s in sentences], device=features.device)
        return features, torch.arange(features.shape[1], device=features.device) < lengths[:, None]


# ---------------------------------------------------------------------------------------------------------------------
# Training and tagging
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def tag(head: Head, features: Features, sentences: list[Sentence], labels: list[str], batch: int = 64) -> list[list[str]]:
    """The predicted label of every word of every sentence."""
    head.eval(), features.modules.eval()
    order = sorted(range(len(sentences)), key=lambda k: len(sentences[k].words))
    found: list[list[str]] = [[] for _ in sentences]
    for piece in (order[k : k + batch] for k in range(0, len(order), batch)):
        ids = head.predict(*features.batch([sentences[k] for k in piece])).tolist()
        for k, row in zip(piece, ids):
            found[k] = [labels[label] for label in row[: len(sentences[k].words)]]
    return found


def fit(settings: Settings, task: Task, train: list[Sentence], features: Features) -> tuple[Head, int, float]:
    """Trains a head (and the backbone, if asked to) -> head and backbone at their best epoch, that epoch, its dev score."""
    torch.manual_seed(settings.seed)
    head = Head(features.width, len(task.labels), settings.head, settings.crf, settings.dropout).to(settings.device)
    trained = nn.ModuleList([head, features.modules] if settings.finetune else [head])
    groups = [{"params": list(head.parameters()), "lr": settings.lr}]
    if settings.finetune:
        groups.append({"params": list(features.modules.parameters()), "lr": settings.lr_backbone})
    optimizer = torch.optim.AdamW(groups)
    steps = settings.epochs * -(-len(train) // settings.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    number = {label: k for k, label in enumerate(task.labels)}
    best: tuple[float, int, dict] = (-1.0, 0, {})
    for epoch in range(1, settings.epochs + 1):
        trained.train()
        order = torch.randperm(len(train)).tolist()
        for piece in (order[k : k + settings.batch] for k in range(0, len(order), settings.batch)):
            sentences = [train[k] for k in piece]
            labels = pad([[number[label] for label in s.labels] for s in sentences])[0].to(settings.device)
            loss = head.loss(*features.batch(sentences), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        dev = scores([s.labels for s in task.dev], tag(head, features, task.dev, task.labels))[task.metric]
        if dev > best[0]:
            best = dev, epoch, copy.deepcopy(trained.state_dict())
    trained.load_state_dict(best[2])
    return head, best[1], best[0]


def save(folder: Path, settings: Settings, labels: list[str], head: Head, features: Features) -> None:
    """settings.json and tagger.safetensors: the head, and the backbone if it was trained."""
    kept = nn.ModuleDict({"head": head} | ({"backbones": features.modules} if settings.finetune else {}))
    weights = {name: x.detach().cpu().contiguous().clone() for name, x in kept.state_dict().items()}
    runs.write_atomically(folder / "tagger.safetensors", safetensors.torch.save(weights))
    runs.write_json(folder / "settings.json", {"settings": {name: getattr(settings, name) for name in NAMED}, "labels": labels})


def load(folder: Path, device: str = "cpu", attention: str = "sdpa") -> tuple[Settings, list[str], Head, Features]:
    """What `save` wrote, ready to tag. TaggingError for a folder that is none; the backbone is loaded from its own place."""
    try:
        content = runs.read_json(folder / "settings.json")
        settings, labels = Settings(**content["settings"], device=device, attention=attention), content["labels"]
        weights = safetensors.torch.load_file(folder / "tagger.safetensors", device)
    except (OSError, KeyError, TypeError, runs.RunError, safetensors.SafetensorError) as error:
        raise TaggingError(f"{folder} holds no tagger, or a damaged one ({error}): write it with --save") from None
    features = Features(settings, {})
    head = Head(features.width, len(labels), settings.head, settings.crf, settings.dropout).to(device)
    kept = nn.ModuleDict({"head": head} | ({"backbones": features.modules} if settings.finetune else {}))
    try:
        kept.load_state_dict(weights)
    except RuntimeError:
        raise TaggingError(f"{folder} belongs to another model than {settings.model} is now: train the tagger again") from None
    return settings, labels, head, features


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def named(settings: Settings) -> dict:
    """The settings that name a row. Of a task only its name: where its files lie differs from machine to machine."""
    models = {name: value and value.rstrip("/") for name in ("model", "model_bw") for value in [getattr(settings, name)]}  # as shells complete a folder's name
    return {name: getattr(settings, name) for name in NAMED} | models | {"task": Path(settings.task).name}


def measure(settings: Settings, task: Task, backbones: dict, cache: dict) -> dict:
    """One row: trains, tags the test split with the best epoch's head, saves what was asked for."""
    started = time.perf_counter()
    train = task.train if settings.shots is None else few_shot(task.train, settings.shots, settings.seed)
    features = Features(settings, backbones)
    if not settings.finetune:
        features.freeze(train + task.dev + task.test, cache)
    head, best_epoch, dev = fit(settings, task, train, features)
    predicted = tag(head, features, task.test, task.labels)
    test = scores([s.labels for s in task.test], predicted)
    if settings.predictions:
        write_conll(settings.predictions, task.test, predicted)
    if settings.save:
        save(Path(settings.save), settings, task.labels, head, features)
    trained = [*head.parameters(), *(features.modules.parameters() if settings.finetune else ())]
    return named(settings) | {
        "metric": task.metric, "sentences": len(train), "trained": sum(p.numel() for p in trained), "best_epoch": best_epoch, "dev": dev,
        "test": test[task.metric], "test_precision": test.get("precision"), "test_recall": test.get("recall"), "test_acc": test["acc"],
        "seconds": round(time.perf_counter() - started, 2),
    }  # fmt: skip


def tag_only(settings: Settings) -> None:
    """--load: tags the task's test split with a saved tagger."""
    _, labels, head, features = load(Path(settings.load), settings.device, settings.attention)
    task = load_task(settings.task)
    predicted = tag(head, features, task.test, labels)
    if settings.predictions:
        write_conll(settings.predictions, task.test, predicted)
    print("  ".join(f"{name} {value:.4f}" for name, value in scores([s.labels for s in task.test], predicted).items()))


def run_grid(grid: list[Settings]) -> None:
    tasks, backbones, cache, place = {}, {}, {}, None
    if len(grid) > 1 and any(settings.save or settings.predictions or settings.load for settings in grid):
        raise TaggingError("--save, --load and --predictions need one value for every flag: they name a single tagger's files")
    for number, settings in enumerate(grid, 1):
        out = Path(settings.out)
        rows = runs.read_rows(out, COLUMNS)
        key = ["" if value is None else str(value) for value in named(settings).values()]
        label = " ".join(str(getattr(settings, name)) for name in ("task", "model", "model_bw", "features", "shots", "seed"))
        if any([row[name] for name in NAMED] == key for row in rows) and not (settings.save or settings.predictions):
            print(f"{number}/{len(grid)}  {label}: in {out} already, skipped")
            continue
        if settings.task not in tasks:
            tasks[settings.task] = load_task(settings.task)
        if place != (settings.task, settings.model, settings.model_bw):
            place = (settings.task, settings.model, settings.model_bw)
            backbones.clear(), cache.clear()  # a grid over models holds one of them, with its features, at a time
        row = measure(settings, tasks[settings.task], backbones, cache)
        rows = [old for old in rows if [old[name] for name in NAMED] != key]
        runs.write_table(out, [*rows, row], COLUMNS)
        print(f"{number}/{len(grid)}  {label}: dev {row['dev']:.4f} (epoch {row['best_epoch']})  test {row['metric']} {row['test']:.4f}",
              flush=True)  # fmt: skip


@one_sentence
def main(argv: list[str] | None = None) -> None:
    grid = parse_grid(Settings, __doc__, argv)
    if grid[0].load and len(grid) == 1:
        tag_only(grid[0])
    else:
        run_grid(grid)


if __name__ == "__main__":
    main()
