"""The scripts as a user runs them, one after the other: hub data set -> tokens -> training -> cuts -> figures -> text."""

import os
import re
import subprocess
import sys

import pytest
from conftest import CACHE, ROOT, SHARED
from tiny import corpus, flags  # noqa: F401

import train

RAW = SHARED / "wikitext" / "wiki.valid.raw"


def script(name, *flags, **environment):
    done = subprocess.run([sys.executable, str(ROOT / name), *map(str, flags)], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"} | environment)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not RAW.is_file(), reason="WikiText and the GPT-2 tokenizer's files are not beside the project")
def test_from_the_hub_to_the_figures(tmp_path):
    """A stand-in with the hub's schema (lines as rows, blank lines as ""), read by `datasets` itself."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [line if line.strip() else "" for line in RAW.read_text().splitlines(keepends=True)]
    hub = tmp_path / "hub" / "wikitext-2-raw-v1"
    hub.mkdir(parents=True)
    for split, part in (("train", rows[100:400]), ("validation", rows[:25]), ("test", rows[:5])):
        pq.write_table(pa.table({"text": part}), hub / f"{split}-00000-of-00001.parquet")
    files = "".join(f"  - split: {s}\n    path: wikitext-2-raw-v1/{s}-*\n" for s in ("train", "validation", "test"))
    (hub.parent / "README.md").write_text(f"---\nconfigs:\n- config_name: wikitext-2-raw-v1\n  data_files:\n{files}---\n")

    data, study = tmp_path / "data", tmp_path / "study"
    tiktoken = {"TIKTOKEN_CACHE_DIR": str(CACHE)}
    out = script("data/prepare.py", "wikitext-2", "--hub-path", hub.parent, "--out", data, HF_HOME=str(tmp_path / "hf"), **tiktoken)
    assert f"next: python train.py --data {data}" in out
    small = "--depth 2 --width 64 --max_seq_len 64 --batch_tokens 256 --micro_batches 1 --epochs none --tokens 2048 --eval_every 2 --eval_epochs none --device cpu"
    out = script("train.py", "--data", data, "--study", study, *small.split(), "--p_bw", 0, 0.5)
    assert out.count("parameters") == 2 and "fw loss" in out
    script("eval_layers.py", study, "--device", "cpu")
    out = script("plot_results.py", study)
    for figure in ("curves_2x64", "ratio1_training", "ratio1_heatmap", "layers_ratio1_ppl", "layers_ratio2_loss", "layers_cut_loss", "layers_drop_loss"):
        assert (study / "figures" / f"{figure}.png").stat().st_size > 10_000, figure
    assert "ratio 1" in out and "ratio 2" in out
    run = next(path.parent for path in study.glob("*pbw0.5*/config.json"))
    out = script("sample.py", run, "--prompt", "the town", "--direction", "bw", "--length", 8, "--device", "cpu", **tiktoken)
    assert out.rstrip().endswith(">>the town<<")


def test_the_readme_s_notebook_runs(corpus, tmp_path, capsys):  # noqa: F811
    """On a study and a text of the test's own, in place of those of `make demo`."""
    train.main(flags(corpus, tmp_path, "--steps 2 --p_bw 0 0.05 --depth 3 --max_seq_len 32"))
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    names = {}
    exec(code.replace("results/demo", str(tmp_path)).replace("data/toyworld", str(corpus)), names)
    width = names["model"].config.width
    assert names["logits"].shape == (4, 32, names["model"].config.vocab_size) and names["states"].shape == (4, 32, width)
    assert names["run"]["p_bw"] == 0.05 and "0.05" in capsys.readouterr().out
