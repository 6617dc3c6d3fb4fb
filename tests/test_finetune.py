"""Fine-tuning a Hugging Face model in both directions: masks, direction rows, LoRA, tables, figures, resume, the command."""

import copy
import json
import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

transformers = pytest.importorskip("transformers", reason="pip install -r experiments/requirements.txt")
pytest.importorskip("peft", reason="pip install -r experiments/requirements.txt")

import plot_results
import runs
from conftest import ROOT
from data.tokens import DataError, open_tokens, validation_windows
from eval_layers import ABLATIONS, Similarity, ablate
from experiments import finetune, finetune_data
from experiments.backbone import BackboneError, load_backbone, pad
from experiments.finetune_model import TwoWayModel, describe_model
from experiments.tuning import sentences, token_stream
from grid import status
from model import MASK_OF, evaluate, frame

LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "max_position_embeddings": 64, "initializer_range": 0.2}  # fmt: skip
GPT2 = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}


def tokenizer():
    """Bytes: 256 of them and an end of text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = Tokenizer(models.BPE(vocab={x: k for k, x in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[]))
    letters.pre_tokenizer, letters.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="<|endoftext|>")


def language_model(kind: str, vocab_size: int = 257, **sizes):
    """GPT-2 (positions learned, head tied), Llama (rotary, untied) and Llama with rows to spare and a tied head."""
    torch.manual_seed(1)
    config = {
        "gpt2": lambda: transformers.GPT2Config(vocab_size=vocab_size, **GPT2 | sizes),
        "llama": lambda: transformers.LlamaConfig(vocab_size=vocab_size, **LLAMA | sizes),
        "llama-tied": lambda: transformers.LlamaConfig(vocab_size=vocab_size + 7, tie_word_embeddings=True, **LLAMA | sizes),
    }[kind]()
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def two_way(kind: str = "gpt2", lora: int = 0) -> TwoWayModel:
    return TwoWayModel(language_model(kind), tokenizer(), kind, lora, seed=3)


KINDS = ("gpt2", "llama", "llama-tied")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two models as the hub would give them, and a text in their tokens."""
    place = tmp_path_factory.mktemp("finetune")
    for kind in ("gpt2", "llama"):
        language_model(kind).save_pretrained(place / kind)
        tokenizer().save_pretrained(place / kind)
    (place / "text.txt").write_text("The river Arvel flows through Alderby. Adela Belling was born in Elmham, in 1777.\n" * 40)
    finetune_data.main([str(place / "text.txt"), "--model", str(place / "gpt2"), "--out", str(place / "tokens"), "--val-fraction", "0.1"])
    return place


def flags(folders, study, more=""):
    return (f"--model {folders / 'gpt2'} --data {folders / 'tokens'} --study {study} --epochs none --steps 6 --seq_len 32 --batch_tokens 128 "
            f"--lora 4 --lr 0.01 --warmup_steps 2 --eval_every 2 --device cpu --dtype float32 {more}").split()  # fmt: skip


# ---- masks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_what_the_direction_may_see_and_nothing_else(kind):
    """Of distinct tokens: a token's row has a gradient from a position's state exactly if it stands where it may be seen."""
    model = two_way(kind)
    tokens = torch.randperm(200, generator=torch.Generator().manual_seed(2))[:11][None]
    rows = model.lm.get_input_embeddings().weight
    for mask in ("causal", "anticausal"):
        states = model.hidden(tokens, mask)[0]
        for query in range(11):
            (grad,) = torch.autograd.grad(states[query].square().sum(), rows, retain_graph=True)
            seen = grad[tokens[0]].abs().sum(-1) > 0
            assert torch.equal(seen, torch.arange(11) <= query if mask == "causal" else torch.arange(11) >= query)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_target_never_changes_its_own_prediction(kind):
    model, V = two_way(kind), 200
    windows = torch.randint(V, (2, 13), generator=torch.Generator().manual_seed(4))
    for direction, mask in MASK_OF.items():
        before = model.hidden(frame(windows, direction, model.config.vocab_size)[0], mask)
        for k in range(12):
            changed = windows.clone()
            changed[:, k] = (changed[:, k] + 1) % V
            inputs, targets = frame(changed, direction, model.config.vocab_size)
            moved = (model.hidden(inputs, mask) - before).abs().amax(-1) > 1e-5
            assert not moved[:, k].any() and (targets != windows[:, :-1])[:, k].all()
            assert moved.any() or (direction, k) in (("fw", 11), ("bw", 0))  # the last one read is nobody's context


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_backward_is_forward_over_the_mirrored_text(kind):
    """bw(x) = flip(fw(flip(x))): with positions counted from BW, no position and no distance is new to the model."""
    model = two_way(kind)
    inputs, _ = frame(torch.randint(200, (3, 21)), "bw", model.config.vocab_size)
    torch.testing.assert_close(model.hidden(inputs, "anticausal"), model.hidden(inputs.flip(1), "causal").flip(1), rtol=1e-4, atol=1e-4)


def noise(folder, V=16, size=20_000):
    """A token folder of independent uniform symbols: nobody can predict them better than with ln V nats."""
    folder.mkdir()
    rng, splits = np.random.default_rng(5), {}
    for split, count in (("train", size), ("val", size // 5)):
        data = rng.integers(V, size=count).astype("<u2").tobytes()
        (folder / f"{split}.bin").write_bytes(data)
        splits[split] = {"file": f"{split}.bin", "tokens": count, "sha256": finetune_data.hashlib.sha256(data).hexdigest()}
    (folder / "meta.json").write_text(json.dumps({"name": "noise", "tokenizer": "none", "vocab_size": V, "dtype": "uint16", "splits": splits}))
    return [open_tokens(folder, split) for split in ("train", "val")]


def test_noise_stays_at_ln_v_and_a_leak_does_not(tmp_path, monkeypatch):
    train, val = noise(tmp_path / "noise")
    settings = finetune.Settings(p_bw=1.0, lora=0, lr=0.02, seq_len=16, batch_tokens=256, epochs=None, steps=100, warmup_steps=5)
    lowest = {}
    for leak in (False, True):
        if leak:  # a mask that shows everything, and so each position its own target
            monkeypatch.setitem(MASK_OF, "bw", "none")
        tuning = finetune.Tuning(settings, two_way("llama"), train, val, torch.device("cpu"), torch.float32)
        while tuning.share_done() < 1:
            tuning.step()
        lowest[leak] = tuning.evaluate()
    assert tuning.progress.passes_bw == lowest[True]["passes_bw"] == 100
    assert lowest[False]["bw_loss"] > math.log(16) - 0.01 and lowest[False]["fw_loss"] > math.log(16) - 0.01
    assert lowest[False]["bw_loss"] < math.log(16) + 0.2  # it did learn which symbols there are
    assert lowest[True]["bw_loss"] < math.log(16) - 0.5
    free = finetune.Tuning(replace(settings, clip=0.0), two_way("llama"), train, val, torch.device("cpu"), torch.float32)  # 0: gradients of any length
    before = free.model.head.detach().clone()
    free.step()
    assert not torch.equal(free.model.head, before)


# ---- direction tokens and LoRA --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_new_rows_are_means_and_cost_next_to_nothing(kind):
    lm = language_model(kind).eval()
    tokens = torch.randint(256, (2, 20))
    before = lm(input_ids=tokens).logits[..., :257].log_softmax(-1)
    known = lm.get_input_embeddings().weight[:257].mean(0), lm.get_output_embeddings().weight[:257].mean(0)
    model = TwoWayModel(lm, tokenizer(), kind)
    fw, bw = model.tokenizer.convert_tokens_to_ids(["<|fw|>", "<|bw|>"])
    assert (fw, bw) == (257, 258) and len(lm.get_input_embeddings().weight) == (264 if kind == "llama-tied" else 259)
    for table, mean in zip((lm.get_input_embeddings().weight, lm.get_output_embeddings().weight), known):
        torch.testing.assert_close(table[fw], mean)
        torch.testing.assert_close(table[bw], mean)
    after = model.logits(model.hidden(tokens, "causal"))[..., : bw + 1].log_softmax(-1)
    lost = before - after[..., :257]
    assert -1e-4 < lost.min() and lost.max() < math.log(1 + 2 / 257) + 1e-4


@pytest.mark.parametrize("lora", [0, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_each_direction_trains_its_token_and_lora_freezes_the_rest(kind, lora):
    model = two_way(kind, lora)
    windows = torch.randint(200, (4, 17), generator=torch.Generator().manual_seed(6))
    before = {name: p.detach().clone() for name, p in model.lm.named_parameters()}
    trained = model.trained()
    if lora:
        rows = [p for name, p in trained.items() if "trainable_tokens" in name]
        assert [p.shape for p in rows] == [(2, 32)] * (2 if kind == "llama" else 1)
        assert all("lora_" in name or "trainable_tokens" in name for name in trained) and len(trained) > 8
        assert not any("lm_head" in name and "lora_" in name for name in trained)
    else:
        assert trained.keys() == before.keys()
    embedding = rows[0] if lora else model.lm.get_input_embeddings().weight
    fw, bw = (0, 1) if lora else (257, 258)
    for direction, own, other in (("fw", fw, bw), ("bw", bw, fw)):
        loss, hits = model.loss(windows, direction)
        # as rivals in a tied head both rows have a gradient; as an input only the direction's own
        (grad,) = torch.autograd.grad(loss, embedding)
        assert grad[own].norm() > (1 if kind == "llama" else 2) * grad[other].norm() and 0 <= hits <= 1
        assert kind != "llama" or not grad[other].any()
    optimizer = torch.optim.AdamW(trained.values(), lr=0.01, weight_decay=0.0)
    for direction in ("fw", "bw"):
        model.loss(windows, direction)[0].backward()
    optimizer.step()
    moved = {name for name, p in model.lm.named_parameters() if not torch.equal(p, before[name])}
    assert moved <= set(trained) and len(moved) > 5
    weight = model.lm.get_input_embeddings().weight, model.lm.get_output_embeddings().weight
    assert torch.equal(*weight) == (kind != "llama")  # tied rows stay tied


@torch.no_grad()
def test_loss_is_the_cross_entropy_of_the_framed_window():
    model = two_way("llama")
    windows = torch.randint(200, (3, 18))
    for direction, mask in MASK_OF.items():
        inputs, targets = frame(windows, direction, model.config.vocab_size)
        logits = model.logits(model.hidden(inputs, mask))
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        torch.testing.assert_close(model.loss(windows, direction)[0], expected)
        torch.testing.assert_close(evaluate(model, [windows.numpy()], direction)[0]["loss"], expected.item(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind, lora", [("gpt2", 0), ("llama", 4)])
@torch.no_grad()
def test_layers_left_out_are_layers_taken_out(kind, lora, tmp_path):
    """Every row of eval_layers.py's tables against the library's own model with those layers deleted from its list."""
    val, depth, place = noise(tmp_path / "noise", V=200, size=2000)[1], 4, {"gpt2": "h", "llama": "layers"}[kind]
    model = TwoWayModel(language_model(kind, **{"gpt2": {"n_layer": 4}, "llama": {"num_hidden_layers": 4}}[kind]), tokenizer(), kind, lora)
    for parameter in model.trained().values():  # LoRA's second matrices start at zero
        parameter.add_(0.1 * torch.randn(parameter.shape))
    model.config.max_seq_len = 32
    similarities = {"fw": Similarity(), "bw": Similarity()}
    rows = ablate(model, val, list(ABLATIONS), batch_tokens=128, similarities=similarities)
    assert Counter(row["ablation"] for row in rows) == {"cut": 4, "drop": 4, "block": 3 + 2}
    assert {row["layer"] for row in rows if row["ablation"] == "drop"} == {0, 1, 2, 3} and {row["tokens"] for row in rows} == {len(val) - 1}
    whole, losses = rows[0], set()
    for row in rows:
        small, kept = copy.deepcopy(model), row["layers_remaining"]
        first = kept if row["ablation"] == "cut" else row["layer"]
        del getattr(small.backbone.model, place)[first : first + depth - kept]
        for direction in ("fw", "bw"):
            (expected,) = evaluate(small, validation_windows(val, 32, 4), direction)
            assert row[f"{direction}_loss"] == pytest.approx(expected["loss"], rel=1e-5)
            losses.add(round(row[f"{direction}_loss"], 4))
    assert len(losses) > 15 and kept < depth == whole["layers_remaining"]
    for direction in ("fw", "bw"):
        assert [row["block_size"] for row in similarities[direction].rows(direction)] == [1] * 4 + [2] * 3 + [3] * 2 + [4]


def test_models_that_change_their_logits_are_refused():
    torch.manual_seed(1)
    sizes = {name: LLAMA[name] for name in LLAMA if name != "initializer_range"}
    lm = transformers.GraniteForCausalLM(transformers.GraniteConfig(vocab_size=257, logits_scaling=8.0, **sizes))
    with pytest.raises(BackboneError, match="more to its logits"):
        TwoWayModel(lm, tokenizer(), "granite")


# ---- text and tokens --------------------------------------------------------------------------------------------


def test_documents_become_the_models_own_tokens(tmp_path, folders):
    texts = ["Adela went.", "Zürich 東京", "", "the last one"]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    finetune_data.main([str(tmp_path / "x.jsonl"), "--model", str(folders / "gpt2"), "--out", str(tmp_path / "tokens"), "--val-fraction", "0.3"])
    train, val = (open_tokens(tmp_path / "tokens", split, verify=True) for split in ("train", "val"))
    own = tokenizer()
    joined = lambda part: [x for text in part for x in [*own(text)["input_ids"], own.eos_token_id]]  # noqa: E731
    assert train.data.tolist() == joined(texts[:3]) and val.data.tolist() == joined(texts[3:])
    finetune_data.check_tokens(train.meta, train.folder, own, "gpt2")
    from data.toyworld import write_corpus

    write_corpus(tmp_path / "toyworld", people=5, towns=2, train_tokens=500, val_tokens=100)
    with pytest.raises(DataError, match="holds tokens of toyworld, not of gpt2"):
        finetune_data.check_tokens(open_tokens(tmp_path / "toyworld", "val").meta, tmp_path / "toyworld", own, "gpt2")


# ---- the command ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def study(folders):
    finetune.main(flags(folders, folders / "study", "--p_bw 0 0.9 --seed 100 101"))
    return folders / "study"


def test_tables_are_read_and_drawn_as_those_of_our_own_runs(study, capsys):
    found = runs.read_study(study)
    assert len(found) == 4 and all(run.finished and list(run.curve.step) == [0, 2, 4, 6] for run in found)
    for run in found:
        first, last = run.curve.iloc[0], run.curve.iloc[-1]
        assert last.fw_loss < first.fw_loss - 0.1 and (last.tokens_bw > 0) == (run["p_bw"] > 0)
        assert last.tokens_total == last.tokens_fw + last.tokens_bw and last.tokens_unique == last.tokens_fw == 6 * 128
        assert list(run.layers.layers_remaining) == [2, 1, 1, 1] and run["depth"] == 2 and run["width"] == 32
        assert run.layers.fw_loss[0] == pytest.approx(last.fw_loss, abs=1e-5) and run.layers.bw_loss[0] == pytest.approx(last.bw_loss, abs=1e-5)
        assert 0 < run.config["params_trained"] < run.config["params"] / 2
    by = {(run["p_bw"], run["seed"]): run for run in found}
    measured = ["fw_loss", "bw_loss"]
    assert by[0, 100].curve.iloc[0][measured].equals(by[0.9, 101].curve.iloc[0][measured])  # the model as it came
    assert by[0.9, 100].curve.iloc[-1].bw_loss < by[0, 100].curve.iloc[-1].bw_loss - 0.1
    expected = {"curves", "ratio1_training", "layers_cut_loss", "layers_drop_loss", "blocks_drop", "blocks_influence"}
    plot_results.main([str(study), "--figure", *(name.removesuffix("_loss") for name in expected)])
    drawn = {path.name.removesuffix(".png").removesuffix("_2x32") for path in (study / "figures").glob("*.png")}
    assert drawn == expected
    assert "4 done" in status(study)


def test_finished_runs_are_skipped_and_their_models_serve_as_backbones(study, folders, capsys):
    stamps = {path: path.stat().st_mtime_ns for path in study.glob("*/*")}
    finetune.main(flags(folders, study, "--p_bw 0 0.9 --seed 100 101"))
    assert stamps == {path: path.stat().st_mtime_ns for path in study.glob("*/*")}
    run = next(run for run in runs.read_study(study) if run["p_bw"] > 0)
    backbone = load_backbone(str(run.folder))
    ids, first = backbone.encode(["Adela", " went"])
    assert not {257, 258} & {*ids} and first == [0, 6]  # the space is a token of its own; FW and BW are no text
    # merged weights, framed as in training: the states that the run's own last row was measured with
    model = TwoWayModel(transformers.AutoModelForCausalLM.from_pretrained(run.folder / "model"), backbone.tokenizer)
    val = open_tokens(folders / "tokens", "val")
    for direction in ("fw", "bw"):
        (result,) = evaluate(model, validation_windows(val, 32, 4), direction)
        assert result["loss"] == pytest.approx(run.curve.iloc[-1][f"{direction}_loss"], abs=1e-4)
    with torch.no_grad():
        for direction, mask, alone in (("fw", "causal", [257, *ids]), ("bw", "anticausal", [*ids, 258])):
            states, expected = backbone.states(*pad([ids, ids[:3]]), direction)[0], model.hidden(torch.tensor([alone]), mask)[0]
            torch.testing.assert_close(states, expected[1:] if direction == "fw" else expected[:-1], rtol=1e-4, atol=1e-4)
    # and its own tokens are text for it, in the other experiments
    stream = token_stream(backbone, str(folders / "tokens"), "val")
    assert (stream.data == val.data).all() and next(iter(sentences(str(folders / "tokens"), "val", 1))).endswith(".")


def test_killed_and_continued_is_as_if_nothing_had_happened(study, folders, tmp_path, monkeypatch):
    """Killed in its fourth step: the same command goes on from the evaluation after the second."""
    step, count = finetune.Tuning.step, []

    def dies(self):
        count.append(self.progress.step)
        if len(count) == 4:
            raise KeyboardInterrupt
        step(self)

    monkeypatch.setattr(finetune.Tuning, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        finetune.main(flags(folders, tmp_path, "--p_bw 0.9 --seed 101"))
    finetune.main(flags(folders, tmp_path, "--p_bw 0.9 --seed 101"))
    assert count == [0, 1, 2, 3, 2, 3, 4, 5]
    (folder,) = tmp_path.iterdir()
    for table in ("curve.csv", "layers.csv", "similarity.csv"):
        ours, theirs = (pd.read_csv(place / folder.name / table).drop(columns="seconds", errors="ignore") for place in (tmp_path, study))
        pd.testing.assert_frame_equal(ours, theirs, check_exact=True)
    assert not (folder / "state.pt").exists()


def test_pieces_change_rounding_only(folders, study, tmp_path):
    finetune.main(flags(folders, tmp_path, "--p_bw 0.9 --seed 101 --physical_tokens 32"))
    (folder,) = tmp_path.iterdir()
    ours, theirs = (pd.read_csv(place / folder.name / "curve.csv") for place in (tmp_path, study))
    np.testing.assert_allclose(ours[["fw_loss", "bw_loss", "grad_norm"]].iloc[1:], theirs[["fw_loss", "bw_loss", "grad_norm"]].iloc[1:], rtol=1e-3)


def test_all_weights_and_another_architecture(folders, tmp_path):
    finetune.main(flags(folders, tmp_path, f"--model {folders / 'llama'} --lora 0 --lr 0.001 --steps 2 --p_bw 1"))
    (run,) = runs.read_study(tmp_path)
    assert run.config["params_trained"] == run.config["params"] and run.curve.fw_loss.iloc[-1] < run.curve.fw_loss.iloc[0]


def test_wrong_requests_are_one_sentence(folders, tmp_path, monkeypatch):
    import huggingface_hub

    def no_network(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", no_network)
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text((folders / "gpt2" / "config.json").read_text())
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"")
    train, _ = noise(tmp_path / "noise")
    meta = json.loads((train.folder / "meta.json").read_text())
    (train.folder / "meta.json").write_text(json.dumps(meta | {"probe": [1, 2, 3]}))
    for more, sentence in (
        ("--model nobody/no-such-model", "nobody/no-such-model could not be loaded"), ("--seq_len 65", "reads at most 64"),
        (f"--model {tmp_path / 'pickled'}", "holds no .safetensors"), (f"--model {tmp_path / 'nowhere'}", "neither a run"),
        (f"--data {tmp_path / 'nowhere'}", "no prepared tokens"), (f"--data {train.folder}", "not of"), ("--steps none", "no end is set"),
    ):  # fmt: skip
        with pytest.raises(SystemExit, match=sentence) as error:
            finetune.main(flags(folders, tmp_path / "study", more))
        assert "\n" not in str(error.value)
    with pytest.raises(SystemExit, match="--model and --data"):
        finetune.main([])


def test_other_weights_under_the_same_name_are_another_run(folders):
    settings = finetune.Settings(model=str(folders / "gpt2"))
    before = finetune.run_folder(settings)
    assert finetune.run_folder(replace(settings, device="cpu", study="elsewhere", eval_every=7)).name == before.name
    assert finetune.run_folder(replace(settings, lr=0.1)).name != before.name
    about = describe_model(settings.model)
    assert about["depth"] == 2 and len(about["weights"]) == 12 and about["weights"] != describe_model(str(folders / "llama"))["weights"]


def test_as_a_script():
    done = subprocess.run([sys.executable, ROOT / "experiments" / "finetune.py"], capture_output=True, text=True, cwd="/")
    assert done.returncode == 1 and "--model and --data are needed" in done.stderr and "Traceback" not in done.stderr
