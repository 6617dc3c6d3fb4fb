"""Merging: both ends are the runs themselves, the middle is the mean of their weights, what does not fit is refused."""

import json

import pytest
import torch
from tiny import corpus, flags  # noqa: F401

import merge
import runs
import train
from model import load_model


@pytest.fixture(scope="module")
def study(corpus, tmp_path_factory):  # noqa: F811
    study = tmp_path_factory.mktemp("study")
    train.main(flags(corpus, study, "--steps 30 --p_bw 0 0.5"))
    train.main(flags(corpus, study, "--steps 2 --width 24"))
    return study


def test_the_ends_are_the_runs_and_the_middle_their_mean(study, capsys):
    a, b = sorted(path.parent for path in study.glob("1x16*/config.json"))
    merge.main([str(a), str(b), "--points", "3", "--device", "cpu"])
    first = (study / "merge.csv").read_bytes()
    merge.main([str(a), str(b), "--points", "3", "--device", "cpu"])
    assert (study / "merge.csv").read_bytes() == first, "rows of the same two runs are replaced"
    merge.main([str(b), str(a), "--points", "2", "--device", "cpu"])
    table = runs.read_table(study / "merge.csv", runs.MERGE_COLUMNS)
    assert table.weight.tolist() == [0, 0.5, 1, 0, 1] and set(table.run_a) == {a.name, b.name}
    for folder, row in ((a, 0), (b, 2), (b, 3), (a, 4)):
        end = runs.read_run(folder).curve.iloc[-1]
        assert table.fw_loss[row] == pytest.approx(end.fw_loss, rel=1e-5) and table.bw_loss[row] == pytest.approx(end.bw_loss, rel=1e-5)
    assert table.fw_loss[1] not in (table.fw_loss[0], table.fw_loss[2])
    models = [load_model(folder / "model.safetensors")[0] for folder in (a, b)]
    heads = [model.head.clone() for _, model in merge.line(*models, 3)]
    assert torch.equal(heads[0], models[0].head) and torch.equal(heads[2], models[1].head)
    assert torch.allclose(heads[1], (models[0].head + models[1].head) / 2)
    assert "0.50   fw" in capsys.readouterr().out


def test_what_does_not_fit_is_refused(study, tmp_path):
    a, b = sorted(path.parent for path in study.glob("*/config.json"))[1:]
    with pytest.raises(SystemExit, match="differ in size"):
        merge.main([str(a), str(b), "--device", "cpu"])
    with pytest.raises(SystemExit, match="is not a run"):
        merge.main([str(a), str(tmp_path), "--device", "cpu"])
    (b / "finished.json").unlink()
    with pytest.raises(SystemExit, match="is unfinished"):
        merge.main([str(a), str(b), "--device", "cpu"])


def test_a_study_is_merged_pair_by_pair(corpus, tmp_path, capsys):  # noqa: F811
    train.main(flags(corpus, tmp_path, "--steps 2 --p_bw 0 0.5 1 --seed 100 101"))
    train.main(flags(corpus, tmp_path, "--steps 2 --p_bw 0.5 --seed 102"))  # without a partner
    train.main(flags(corpus, tmp_path, "--steps 3 --p_bw 0 --seed 102"))  # differs in more
    merge.main([str(tmp_path), "--p_bw", "0.5", "0", "--points", "2", "--device", "cpu"])
    table = runs.read_table(tmp_path / "merge.csv", runs.MERGE_COLUMNS)
    ends = [(runs.read_run(tmp_path / a), runs.read_run(tmp_path / b)) for a, b in zip(table.run_a[::2], table.run_b[::2])]
    assert [(a["seed"], a["p_bw"], b["seed"], b["p_bw"]) for a, b in ends] == [(100, 0.5, 100, 0), (101, 0.5, 101, 0)]
    with pytest.raises(SystemExit, match="has no two finished runs that differ in p_bw = 0 and 0.05 alone"):
        merge.main([str(tmp_path), "--device", "cpu"])
    with pytest.raises(SystemExit):
        merge.main([str(ends[0][0].folder), "--device", "cpu"])
    assert "name two runs, or one study" in capsys.readouterr().err


def test_pairs_are_of_one_task_and_settings_that_came_later_do_not_part_them(corpus, tmp_path):  # noqa: F811
    train.main(flags(corpus, tmp_path / "other", "--steps 2 --p_bw 0 0.5 --task fw-or-bw"))
    assert merge.pairs(tmp_path / "other", (0, 0.5)) == []
    train.main(flags(corpus, tmp_path / "s", "--steps 2 --p_bw 0 0.5"))
    older = next((tmp_path / "s").glob("*pbw0_*/config.json"))
    content = json.loads(older.read_text())
    del content["settings"]["optimizer"], content["settings"]["dropout"]
    older.write_text(json.dumps(content))
    assert len(merge.pairs(tmp_path / "s", (0, 0.5))) == 1


def test_runs_of_different_masks_are_not_merged(corpus, tmp_path):  # noqa: F811
    for mask in ("anticausal", "flipped"):
        train.main(flags(corpus, tmp_path, f"--steps 2 --p_bw 0.5 --bw_mask {mask}"))
    a, b = (str(path.parent) for path in tmp_path.glob("*/config.json"))
    with pytest.raises(SystemExit, match="differ in size, tokens, bw_mask"):
        merge.main([a, b, "--device", "cpu"])
