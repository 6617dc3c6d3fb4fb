"""How far each layer sees: the learned slopes of a study's models, python results/wikipedia-4k-long/slopes.py STUDY > new_rows.csv

A layer's attention logits fall by its slope (softplus of the parameter) per token of distance: with 0.004 a token 255 places
away still has a third of its weight, with 1 the last few count. Of those runs whose weights are there: the repository does
not keep them, so slopes.csv is put together from what each training left.
"""

import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from model import load_model  # noqa: E402
from runs import read_study  # noqa: E402

writer = csv.writer(sys.stdout, lineterminator="\n")
writer.writerow(["run", "layer", "slope"])
for run in read_study(sys.argv[1]):
    if run.finished and (run.folder / "model.safetensors").exists():
        model, _ = load_model(run.folder / "model.safetensors")
        writer.writerows([run.name, layer, f"{slope:.4f}"] for layer, slope in enumerate(model.slopes()))
