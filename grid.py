"""Many runs in one study folder, by any number of processes on any number of hosts that see it.

    python train.py --study results/mine --depth 4 8 --p_bw 0 0.05 --seed 100 101      # start it as often as you like
    python train.py --status results/mine                                              # how far it is, from any of them

A run's folder says what became of it, so there is no list to keep and nothing to repair:
  claim.N         a process is training it. The N-th owner; whoever creates N+1 takes the run over from a dead one
  failed.json     why it failed; it is tried again by the next command, not by the ones that are at work
  finished.json   it is done (train.py writes it)
  none of these   it is planned, or was interrupted and goes on from its last checkpoint
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tqdm import tqdm

import runs
from data.tokens import DataError, find_folder, read_meta
from flags import UserError
from machine import Group
from recipe import Settings, share_done
from runs import RunError

BEAT = 20.0  # seconds between two signs of life
STALE = 300.0  # seconds without one after which an owner on another host counts as dead: file servers cache for a minute
LOOK = 1.0  # seconds between two looks at runs that others are training


def run_folder(settings: Settings) -> Path:
    """A run is named by every setting that changes its result and differs from the default, and by its seed."""
    default = Settings()
    named = {name: value for name, value in asdict(settings).items() if name not in runs.OPERATIONAL and value != getattr(default, name)}
    named |= {name: getattr(settings, name) for name in ("depth", "width", "p_bw", "seed")}
    return Path(settings.study) / runs.run_name(named)


# ---------------------------------------------------------------------------------------------------------------------
# Claims
# ---------------------------------------------------------------------------------------------------------------------


class LostClaim(RunError):
    """This process seemed dead (it was suspended, or lost the file system), and another has taken its run over."""


class Claim:
    """The right to train a run. A thread renews it; if this process dies, others see that and take the run over."""

    def __init__(self, path: Path) -> None:
        """Creates the file. FileExistsError if another process was faster."""
        self.path, self.over = path, threading.Event()
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)  # the one atomic step: of several processes, one creates it
        try:
            os.write(file, json.dumps(identity(os.getpid())).encode())
        except OSError as error:
            path.unlink()
            raise RunError(f"{path} could not be written ({error.strerror}): make room, then run the same command again") from None
        finally:
            os.close(file)
        threading.Thread(target=self.beat, daemon=True).start()

    def beat(self) -> None:
        while not self.over.wait(BEAT):
            try:
                os.utime(self.path)
            except OSError:  # gone, as `check` will find, or a file system that comes back
                pass

    def check(self) -> None:
        """LostClaim if the run is another's by now. Called before every table, state and model that is written."""
        try:
            mine = claims(self.path.parent)[-1] == self.path and json.loads(self.path.read_text()) == identity(os.getpid())
        except (FileNotFoundError, IndexError, ValueError):
            mine = False
        if not mine:
            raise LostClaim(f"{self.path.parent} was taken over by another process while this one gave no sign of life")

    def release(self) -> None:
        self.over.set()
        try:
            self.check()
            self.path.unlink()
        except (LostClaim, OSError):
            pass


def identity(pid: int) -> dict[str, str | int]:
    """Tells a process from all others: its host (containers may share a host's name), number and time of start."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux: then only the signs of life count
        namespace = ""
    try:
        state, *values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        start = "dead" if state == "Z" else values[18]
    except OSError:
        start = "dead" if namespace else "unknown"
    return {"host": platform.node(), "namespace": namespace, "pid": pid, "start": start}


def claims(folder: Path) -> list[Path]:
    """The claims in a run's folder; the last one is in force."""
    return sorted(folder.glob("claim.*"), key=lambda path: int(path.suffix[1:]))


def owner(folder: Path) -> dict | None:
    """Who trains this run now, as far as can be told; None if nobody does."""
    found = claims(folder)
    return living(found[-1]) if found else None


def living(claim: Path) -> dict | None:
    """A claim's owner (empty if it has still to write its name), None if it is dead or the claim is gone."""
    try:
        fresh = time.time() - claim.stat().st_mtime < STALE
        text = claim.read_text()
        found = json.loads(text) if text.endswith("}") else {}
    except FileNotFoundError:
        return None
    here = identity(found.get("pid", 0))
    same_place = all(found.get(key) == here[key] for key in ("host", "namespace"))
    return found if fresh and (found == here or not same_place) else None


def take(folder: Path) -> Claim | None:
    """Claims a run; None if another process has it."""
    old = claims(folder)
    if old and living(old[-1]) is not None:
        return None
    try:
        claim = Claim(folder / f"claim.{int(old[-1].suffix[1:]) + 1 if old else 0}")
    except FileExistsError:
        return None
    for path in old:
        path.unlink(missing_ok=True)
    if claims(folder)[-1] != claim.path:  # a takeover that was seen too late
        claim.release()
        return None
    return claim


# ---------------------------------------------------------------------------------------------------------------------
# One process's way through the runs
# ---------------------------------------------------------------------------------------------------------------------


def other_tokens(folder: Path, settings: Settings) -> str:
    """What to say of a finished run if its data folder holds other tokens by now; empty if not, or if nothing tells."""
    try:
        seen = runs.read_config(folder)["data"]["sha256"]
        splits = read_meta(find_folder(settings.data))["splits"]
        now = {split: splits[split]["sha256"] for split in seen}
    except (RunError, DataError, KeyError, TypeError):
        return ""
    return "" if seen == now else f", but it was trained on other tokens than {settings.data} holds now: use another --study for those"


class Grid:
    """Gives out the runs of one command, each to one process at a time, and keeps what failed."""

    def __init__(self, named: dict[Path, Settings]) -> None:
        """Announces the runs: creates their folders. OSError if the study cannot be written."""
        self.left = list(named)
        self.failed: dict[Path, str] = {}
        self.claim: Claim | None = None
        for folder in self.left:
            folder.mkdir(parents=True, exist_ok=True)
            if (folder / "finished.json").exists():
                tqdm.write(f"{folder} is finished{other_tokens(folder, named[folder])}")
                for path in (folder / "state.pt", *(claim for claim in claims(folder) if living(claim) is None)):
                    path.unlink(missing_ok=True)  # its process was killed in its last line
        self.earlier = {folder: self.failure(folder) for folder in self.left}
        total, self.left = len(self.left), [folder for folder in self.left if not self.settled(folder)]
        self.bar = tqdm(total=total, initial=total - len(self.left), desc="grid", disable=total < 2 or None,
                        bar_format="{desc} {n_fmt} of {total_fmt} runs |{bar:20}| {elapsed} < {remaining} {postfix}")  # fmt: skip

    @staticmethod
    def failure(folder: Path) -> tuple[str, float] | None:
        """The reason in failed.json, and when it was written."""
        path = folder / "failed.json"
        try:
            return runs.read_json(path).get("reason", ""), path.stat().st_mtime
        except FileNotFoundError:
            return None

    def settled(self, folder: Path) -> bool:
        """Whether nothing is left to do for a run: it is finished, or has failed since this command began."""
        if (folder / "finished.json").exists() or folder in self.failed:
            return True
        failure = self.failure(folder)
        if failure and failure != self.earlier[folder]:
            self.failed[folder] = failure[0]
        return folder in self.failed

    def next(self) -> Path | None:
        """Claims a run. Waits as long as others train all that is left: one of them may die. None if all are settled."""
        while True:
            self.left = [folder for folder in self.left if not self.settled(folder)]
            for folder in self.left:
                self.claim = take(folder)
                if self.claim and not self.settled(folder):
                    (folder / "failed.json").unlink(missing_ok=True)
                    self.show(f"training {folder.name}")
                    return folder
                self.close()
            if not self.left:
                self.show("")
                return None
            self.show(f"waiting for {len(self.left)} that others train")
            time.sleep(LOOK)

    def show(self, what: str) -> None:
        self.bar.n = self.bar.total - len(self.left)
        self.bar.set_postfix_str(f"{len(self.failed)} failed, {what}" if self.failed else what)

    def fail(self, folder: Path, reason: str) -> None:
        """Keeps the reason, here and, as far as the disk allows, in the run's folder; nothing if another process has the run by now."""
        try:
            self.claim.check()
        except LostClaim:
            return
        self.failed[folder] = reason
        try:
            runs.write_json(folder / "failed.json", {"reason": reason, "date": datetime.datetime.now().isoformat(timespec="seconds")})
        except (RunError, OSError):
            pass

    def close(self) -> None:
        """Gives the claim back."""
        if self.claim:
            self.claim.release()
        self.claim = None


def train_all(named: dict[Path, Any], train: Callable, group: Group, failed: Sequence[str] = ()) -> list[dict]:
    """Calls train(settings, folder, group, claim) for run after run {folder: settings}, and returns the last rows of all.

    One that fails does not stop the others: SystemExit with all reasons comes at the end, `failed` among them. Where several
    processes train a run together, the first alone looks after the folders, and `grid` and `claim` are None on the others.
    """
    grid = group.together(lambda: Grid(named) if group.rank == 0 else None)
    try:
        while (folder := group.together(lambda: grid.next(), first_only=True)) is not None:
            try:
                train(named[folder], folder, group, grid and grid.claim)
            except LostClaim as error:  # the other finishes it
                group.say(str(error))
            except (UserError, RuntimeError, OSError) as error:
                reason = explain(error, named[folder], group)
                group.say(f"{folder.name} failed: {reason}" if len(named) > 1 else "")
                if grid:
                    grid.fail(folder, reason)
            finally:
                if grid:
                    grid.close()
    finally:
        if grid:
            grid.bar.close()
    if grid is None:
        return []
    wanted = len(named) + len(failed)
    failed = [*failed, *(f"{reason} ({folder.name})" if wanted > 1 else reason for folder, reason in grid.failed.items())]
    if failed:
        raise SystemExit("\n".join([f"{len(failed)} of {wanted} runs failed:", *failed] if wanted > 1 else failed))
    return [runs.read_run(folder).curve.iloc[-1].to_dict() for folder in named]


def explain(error: Exception, settings: Settings, group: Group) -> str:
    """What went wrong, as a sentence. Raises what is nobody's fault but the program's."""
    if isinstance(error, (UserError, OSError)):
        return str(error)
    if "out of memory" not in str(error).lower() and "can't allocate memory" not in str(error).lower():
        raise error
    reason = f"out of memory: set --physical_tokens, or lower it (now {settings.physical_tokens}); results do not change"
    if group.size > 1:  # the others do not know, and wait for this process
        raise SystemExit(reason)
    return reason


# ---------------------------------------------------------------------------------------------------------------------
# Status
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Standing:
    """How far one run is. `seconds`: from its first step to its last, for an unfinished one as it looks now, without evaluations."""

    name: str
    state: str  # done, running, planned or failed
    detail: str = ""
    share: float = 0.0
    seconds: float = 0.0

    @property
    def size(self) -> str:
        return self.name.split("_")[0]


def standing(folder: Path) -> Standing:
    found = Standing(folder.name, "planned")
    try:
        run = runs.read_run(folder) if any((folder / name).exists() for name in ("config.json", "finished.json")) else None
        failure, who = Grid.failure(folder), owner(folder)
    except RunError as error:
        return Standing(folder.name, "failed", str(error))
    if run and len(run.curve):
        row = run.curve.iloc[-1]
        settings = Settings(**{field.name: run[field.name] for field in fields(Settings) if field.name in run.settings})
        found.share = min(1.0, share_done(settings, run.config["data"]["train_tokens"], row.step, row.tokens_total, row.tokens_fw))
        found.seconds = row.seconds / found.share if found.share else 0.0  # evaluated before it began
        found.detail = f"{found.share:.0%}, fw {row.fw_loss:.3f}, bw {row.bw_loss:.3f}"
    if run and run.finished:
        found.state, found.seconds = "done", run.finished.get("seconds_in_all", found.seconds)
    elif who is not None:
        found.state, found.detail = "running", f"{found.detail or 'not evaluated yet'} (process {who.get('pid', '?')} on {who.get('host', '?')})"
    elif failure:
        found.state, found.detail = "failed", failure[0]
    return found


def status(study: str | Path) -> str:
    """How far a study is, in a few lines. RunError if there is no such study."""
    folders = sorted(path for path in Path(study).glob("*/") if (path / "config.json").exists() or runs.RUN_NAME.fullmatch(path.name))
    if not folders:
        raise runs.no_study(Path(study))
    found = [standing(folder) for folder in folders]
    counts = ", ".join(f"{sum(run.state == state for run in found)} {state}" for state in ("done", "running", "planned", "failed"))
    lines = [f"  {'interrupted' if run.state == 'planned' else run.state:12} {run.name}  {run.detail}"
             for run in found if run.detail and run.state != "done"]  # fmt: skip
    return "\n".join([f"{study}: {len(found)} runs: {counts}; {time_left(found)}", *lines])


def time_left(found: list[Standing]) -> str:
    """An estimate from the runs that have a table, those of the same depth and width where there are some."""
    open_runs = [run for run in found if run.state in ("running", "planned")]
    known = [run for run in found if run.seconds]
    if not open_runs or not known:
        return "the time left is known after the first evaluation" if open_runs else "nothing left to do"
    left = []
    for run in open_runs:
        alike = [run] if run.seconds else [other for other in known if other.size == run.size] or known
        left.append((1 - run.share) * sum(other.seconds for other in alike) / len(alike))
    workers = sum(run.state == "running" for run in found)
    minutes = round(max(sum(left) / max(1, workers), *(x for x, run in zip(left, open_runs) if run.state == "running"), 0) / 60)
    text = f"about {minutes // 60} h {minutes % 60:02d} min left" if minutes >= 60 else f"about {minutes} min left"
    return f"{text} with {workers} at work" if workers else f"{text} once a process is at work"
