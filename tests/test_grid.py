"""Many runs at once: each is trained by one process at a time, none is lost, and what failed is told."""

import json
import os
import random
import shutil
import time

import pytest
from tiny import assert_same_tables, corpus, flags, kill, start  # noqa: F401

import grid
import runs
import train
from grid import Claim, Grid, LostClaim, owner, status, take

TWENTY = "--steps 4 --p_bw 0 0.5 --seed 1 2 3 4 5 6 7 8 9 10"


def test_three_processes_one_killed_write_the_tables_of_one(corpus, tmp_path):  # noqa: F811
    logs = [tmp_path / f"log{k}" for k in range(3)]
    shared, alone = tmp_path / "shared", tmp_path / "alone"
    processes = [start(log, *flags(corpus, shared, TWENTY)) for log in logs]
    victim = random.choice(processes)
    while not any((owner(folder) or {}).get("pid") == victim.pid for folder in shared.glob("*/")):
        assert victim.is_alive(), "it was meant to be killed at work"
        time.sleep(0.001)
    time.sleep(random.random() / 4)
    kill(victim)
    train.main(flags(corpus, alone, TWENTY))
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes if process is not victim] == [0, 0]
    train.main(flags(corpus, shared, TWENTY))  # tidies up after a victim that was killed in its last line
    assert_same_tables(shared, alone)
    begun = "".join(log.read_text() for log in logs).count(" parameters, ")
    assert 20 <= begun <= 21, "only the killed process's run may be begun again"


def test_what_a_process_killed_in_its_last_line_leaves_is_tidied_up(corpus, tmp_path):  # noqa: F811
    train.main(flags(corpus, tmp_path, "--steps 2"))
    (folder,) = tmp_path.glob("*/")
    (folder / "state.pt").write_bytes(b"of a finished run")
    (folder / "claim.0").write_text(json.dumps({**grid.identity(os.getpid()), "pid": 999999999}))
    train.main(flags(corpus, tmp_path, "--steps 2"))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "curve.csv", "finished.json", "model.safetensors"]


def test_a_claim_is_exclusive_and_that_of_a_dead_process_is_taken_over(tmp_path):
    first = take(tmp_path)
    assert owner(tmp_path)["pid"] == os.getpid() and take(tmp_path) is None
    first.path.write_text(first.path.read_text().replace(f'"pid": {os.getpid()}', '"pid": 999999999'))
    second = take(tmp_path)
    assert [path.name for path in grid.claims(tmp_path)] == ["claim.1"]
    with pytest.raises(LostClaim, match="taken over"):
        first.check()
    first.release()
    second.check()
    second.release()
    assert not grid.claims(tmp_path) and owner(tmp_path) is None


@pytest.mark.parametrize("change", ['"start": "1"', '"host": "another"'])
def test_numbers_of_processes_are_not_trusted_alone(tmp_path, change):
    """A later process of the same number is not the owner; of another host's, only signs of life tell."""
    claim = take(tmp_path)
    mine = json.loads(claim.path.read_text())
    claim.path.write_text(json.dumps(mine | json.loads("{" + change + "}")))
    assert (owner(tmp_path) is None) == ("start" in change)
    os.utime(claim.path, (time.time() - grid.STALE - 1,) * 2)
    assert owner(tmp_path) is None
    claim.over.set()


def test_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "BEAT", 0.01)
    claim = take(tmp_path)
    os.utime(claim.path, (0, 0))
    deadline = time.monotonic() + 60
    while claim.path.stat().st_mtime == 0 and time.monotonic() < deadline:
        time.sleep(0.005)
    assert claim.path.stat().st_mtime > 0
    claim.release()


def test_of_those_that_see_a_dead_claim_one_takes_it_over(tmp_path, monkeypatch):
    """The second creates its claim while the first is between looking and creating."""
    (tmp_path / "claim.3").write_text(json.dumps({"pid": 1, "host": "gone"}))
    os.utime(tmp_path / "claim.3", (0, 0))
    faster = []

    class Slow(Claim):
        def __init__(self, path):
            if not faster:
                faster.append(Claim(path))
            super().__init__(path)

    monkeypatch.setattr(grid, "Claim", Slow)
    assert take(tmp_path) is None and len(faster) == 1
    faster[0].check()
    faster[0].release()


def test_a_claim_that_another_makes_meanwhile_is_respected(tmp_path, monkeypatch):
    """It takes over while this one finds the old owner dead."""
    (tmp_path / "claim.3").write_text(json.dumps({"pid": 1, "host": "gone"}))
    os.utime(tmp_path / "claim.3", (0, 0))
    real, faster = grid.living, []

    def living(path):
        found = real(path)
        if not faster:
            faster.append(Claim(tmp_path / "claim.4"))
        return found

    monkeypatch.setattr(grid, "living", living)
    assert take(tmp_path) is None
    faster[0].check()
    faster[0].release()


def test_a_process_that_lost_its_claim_writes_nothing_more(corpus, tmp_path, monkeypatch):  # noqa: F811
    """It was suspended for long; meanwhile another has taken its run over, and still has it."""
    real, other = train.Training.evaluate, []

    def evaluate(self):
        (folder,) = tmp_path.glob("1x16*")
        if self.progress.step == 4 and not other:
            before = {path.name: path.read_bytes() for path in folder.iterdir()}
            (claim,) = grid.claims(folder)
            os.utime(claim, (0, 0))
            with monkeypatch.context() as patch:
                patch.setattr(grid, "identity", lambda pid: {"host": "there", "namespace": "", "pid": 5, "start": "1"})
                other.extend([take(folder), before])
        return real(self)

    def wait(seconds):
        (folder,) = tmp_path.glob("1x16*")
        assert other[1]["curve.csv"] == (folder / "curve.csv").read_bytes() and not (folder / "failed.json").exists()
        other[0].path.unlink()

    monkeypatch.setattr(train.Training, "evaluate", evaluate)
    monkeypatch.setattr(grid.time, "sleep", wait)
    train.main(flags(corpus, tmp_path, "--steps 6"))
    assert list(runs.read_study(tmp_path)[0].curve.step) == [2, 4, 6]


def test_a_failure_after_the_run_was_taken_over_is_the_others_business(tmp_path):
    grid_of_one = Grid({tmp_path: None})
    assert grid_of_one.next() == tmp_path
    grid_of_one.claim.path.write_text('{"pid": 5, "host": "there"}')  # suspended for long, it wakes up and fails
    grid_of_one.fail(tmp_path, "out of memory")
    assert not (tmp_path / "failed.json").exists() and not grid_of_one.failed
    grid_of_one.close()
    grid_of_one.bar.close()


def test_a_failure_is_kept_and_tried_again_by_the_next_command(corpus, tmp_path, monkeypatch):  # noqa: F811
    real = train.Training.step

    def step(self):
        if self.settings.seed == 2:
            raise runs.RunError("it is the wrong day")
        real(self)

    monkeypatch.setattr(train.Training, "step", step)
    with pytest.raises(SystemExit, match=r"1 of 3 runs failed:\nit is the wrong day \(1x16_pbw0.05_seed2_\w+\)$"):
        train.main(flags(corpus, tmp_path, "--steps 2 --seed 1 2 3"))
    assert len(list(tmp_path.glob("*/finished.json"))) == 2
    (failed,) = tmp_path.glob("*/failed.json")
    assert json.loads(failed.read_text())["reason"] == "it is the wrong day"
    monkeypatch.undo()
    rows = train.main(flags(corpus, tmp_path, "--steps 2 --seed 1 2 3"))
    assert len(rows) == 3 and not failed.exists()


def test_what_another_process_saw_fail_is_told_but_not_tried_again(tmp_path):
    work = grid.Grid(dict.fromkeys([tmp_path / "a", tmp_path / "b"]))
    runs.write_json(tmp_path / "a" / "failed.json", {"reason": "seen by another"})
    assert work.next() == tmp_path / "b" and work.failed == {tmp_path / "a": "seen by another"}
    work.close()
    assert grid.Grid({tmp_path / "a": None}).next() == tmp_path / "a"
    assert not (tmp_path / "a" / "failed.json").exists()


def test_a_finished_run_on_other_tokens_is_told(corpus, tmp_path, capsys):  # noqa: F811
    """The text was prepared again under the same name: new runs of the command would see another one."""
    data, study = tmp_path / "data", tmp_path / "study"
    shutil.copytree(corpus, data)
    train.main(flags(data, study, "--steps 2"))
    train.main(flags(data, study, "--steps 2"))
    assert "is finished\n" in capsys.readouterr().out
    meta = json.loads((data / "meta.json").read_text())
    meta["splits"]["train"]["sha256"] = "0" * 64
    (data / "meta.json").write_text(json.dumps(meta))
    train.main(flags(data, study, "--steps 2"))
    assert f"is finished, but it was trained on other tokens than {data} holds now" in capsys.readouterr().out


def test_a_run_that_lost_its_config_is_told_what_to_do(corpus, tmp_path, capsys):  # noqa: F811
    train.main(flags(corpus, tmp_path, "--steps 2"))
    (config,) = tmp_path.glob("*/config.json")
    config.unlink()
    with pytest.raises(SystemExit, match="has lost its config.json: restore it, or delete the folder"):
        train.main(flags(corpus, tmp_path, "--steps 2"))
    assert "1 failed" in status(tmp_path)


def test_status_counts_and_estimates(corpus, tmp_path, monkeypatch, capsys):  # noqa: F811
    with pytest.raises(SystemExit, match="is one run: name its study"):
        (tmp_path / "s" / "run").mkdir(parents=True)
        (tmp_path / "s" / "run" / "config.json").write_text("{}")
        train.main(["--status", str(tmp_path / "s" / "run")])
    with pytest.raises(SystemExit, match="does not exist: train some with"):
        train.main(["--status", str(tmp_path / "nothing")])
    train.main(flags(corpus, tmp_path, "--steps 4 --seed 1 2"))
    monkeypatch.setattr(train.Training, "check", lambda *_: (_ for _ in ()).throw(runs.RunError("stopped")))
    with pytest.raises(SystemExit):
        train.main(flags(corpus, tmp_path, "--steps 4 --seed 3"))
    grid.Grid(dict.fromkeys(tmp_path / f"1x16_pbw0.05_seed{k}_000000" for k in (4, 5, 6)))
    claim = take(tmp_path / "1x16_pbw0.05_seed4_000000")
    for path in tmp_path.glob("*/finished.json"):
        content = json.loads(path.read_text())
        assert content["seconds_in_all"] >= content["seconds"] > 0
        path.write_text(json.dumps(content | {"seconds_in_all": 1800.0}))
    train.main(["--status", str(tmp_path)])
    first, *lines = capsys.readouterr().out.rpartition(f"{tmp_path}: ")[2].splitlines()
    assert first == "6 runs: 2 done, 1 running, 2 planned, 1 failed; about 1 h 30 min left with 1 at work"
    assert len(lines) == 2 and "stopped" in lines[0] and f"not evaluated yet (process {os.getpid()} on " in lines[1]
    claim.release()
    assert "about 1 h 30 min left once a process is at work" in status(tmp_path)
    for path in tmp_path.glob("*/finished.json"):  # as if stopped after an evaluation before the first step
        path.unlink()
        table = runs.read_table(path.parent / "curve.csv", runs.CURVE_COLUMNS).head(1).assign(step=0, tokens_total=0, tokens_fw=0)
        table.to_csv(path.parent / "curve.csv", index=False)
    assert "0 done" in status(tmp_path) and "0%, fw" in status(tmp_path) and "the time left is known after" in status(tmp_path)


def test_what_is_left_of_a_run_is_estimated_from_its_share():
    standings = [grid.Standing("a", "running", share=0.75, seconds=4 * 3600), grid.Standing("b", "done", share=1.0, seconds=60)]
    assert grid.time_left(standings) == "about 1 h 00 min left with 1 at work"


def test_claims_are_counted_beyond_nine(tmp_path):
    for number in (9, 10):
        (tmp_path / f"claim.{number}").write_text("{}")
    assert [path.name for path in grid.claims(tmp_path)] == ["claim.9", "claim.10"]


def test_a_run_that_another_finished_meanwhile_is_not_trained_again(tmp_path, monkeypatch):
    real = grid.take

    def take(folder):
        runs.write_json(folder / "finished.json", {})  # between the look and the claim
        return real(folder)

    work = grid.Grid({tmp_path / "a": None})
    monkeypatch.setattr(grid, "take", take)
    assert work.next() is None and not grid.claims(tmp_path / "a")
