"""The command when it is stopped: the best so far, its account and one line remain, and it goes on or is replayed."""

import errno
import functools
import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import torch
from conftest import seeded

from flowscale_lite import cli, experiments, flux
from flowscale_lite.experiments import bench
from flowscale_lite.tiny.data import locate

ROOT = Path(__file__).resolve().parent.parent
STOPS = ["interrupt", "raise", "nan"]
MODULE, _, FUNCTION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["flowscale"].partition(
    ":"
)
COMMAND = [sys.executable, "-c", f"from {MODULE} import {FUNCTION}; {FUNCTION}()"]
load = functools.cache(flux.load)


class Red:
    """A judge that likes red, until its call number `at`."""

    def __init__(self, at=None, how=None):
        self.at, self.how, self.calls = at, how, 0

    def __call__(self, pictures):
        self.calls += 1
        if self.calls - 1 == self.at:
            if self.how == "interrupt":
                raise KeyboardInterrupt
            if self.how == "raise":
                raise RuntimeError("the judge\nis out of memory")
        r = pictures[:, 0].mean((1, 2)) - pictures[:, 1:].mean((1, 2, 3))
        return r * float("nan") if (self.calls - 1, self.how) == (self.at, "nan") else r


@pytest.fixture
def flowscale(monkeypatch, tmp_path, capsys):
    """Runs the command with a judge; returns its exit status and the account, and what it said."""
    monkeypatch.setattr(flux, "load", load)
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)

    def run(judge, *args):
        monkeypatch.setattr(cli.job, "named_reward", lambda *_: judge)
        try:
            cli.main([*args] or SEARCH)
            status = 0
        except SystemExit as end:
            status = end.code
        out, err = capsys.readouterr()
        account = Path("out.json")
        return status, json.loads(account.read_text()) if account.exists() else None, out, err.splitlines()

    return run


SEARCH = ["something red", "--reward", "judge.py:red", "--nfe", "60", "--steps", "4", "--method", "refine"]
PARTS = ("plain", "found", "trace")


def parts(account):
    return [cli.known(account, key) for key in PARTS]


def test_at_ten_random_points_the_best_so_far_remains_and_the_search_goes_on(flowscale):
    whole = flowscale(judge := Red())[1]
    assert judge.calls > 10
    points = 1 + torch.randperm(judge.calls - 1, generator=seeded())[:10]  # the first call is the plain sample's
    for number, at in enumerate(points.tolist()):
        how = STOPS[number % 3]
        Path("out.png").unlink(missing_ok=True)
        status, account, _, err = flowscale(Red(at, how))
        assert status == (130 if how == "interrupt" else 1)
        expected = {"interrupt": "interrupted", "raise": "the judge is out of memory", "nan": "must be finite"}[how]
        assert expected in account["stopped"] and expected in err[-1] and "flowscale resume out.search" in err[-1]
        assert Path("out.png").stat().st_size > 10_000 and not list(Path().glob("*.part"))
        assert account["found"]["nfe"] + account["found"]["left"] == 60
        steps = account["trace"]
        assert account["found"]["reward"] >= max([s["best"] for s in steps] or [-9]) - 1e-4
        if number < 3:  # an account of a search that stopped replays to where it stopped
            status, _, out, _ = flowscale(Red(), "replay", "out.json")
            assert status == 0 and "the same picture and numbers" in out
        status, account, _, _ = flowscale(Red(), "resume", "out.search")
        assert status == 0 and parts(account) == parts(whole) and not Path("out.search").exists()


@pytest.mark.parametrize("at", [0, 2])
def test_a_full_disk_stops_no_search_and_the_account_has_its_room(flowscale, monkeypatch, at):
    whole = flowscale(Red())[1]

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    saves, save = [], cli.searching.save_search

    def filling(*args):
        saves.append(1)
        if len(saves) > at:
            monkeypatch.setattr("safetensors.torch.save_file", full)
            monkeypatch.setattr(Path, "write_bytes", full)
        return save(*args)

    monkeypatch.setattr(cli.searching, "save_search", filling)
    status, account, _, err = flowscale(Red())
    assert status == 0 and parts(account) == parts(whole)
    (line,) = (line for line in err if "can no longer be saved" in line)
    assert "No space left on device" in line and len(saves) == at + 1


def test_a_disk_full_from_the_start_is_refused_before_any_compute(flowscale, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    monkeypatch.setattr(cli, "run", lambda *_: pytest.fail("computed"))
    status, account, _, err = flowscale(Red())
    assert status == 2 and "No space left" in err[-1] and account is None and not list(Path().iterdir())


def test_an_account_that_cannot_be_written_is_printed(flowscale, monkeypatch):
    def broken(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(cli.searching, "fill", broken)
    status, account, out, err = flowscale(Red())
    assert status == 1 and account is None and "Read-only" in err[-1] and "standard output" in err[-1]
    assert json.loads(out)["found"]["nfe"] == 60 and not list(Path().glob("*.part"))


def test_a_failure_before_the_search_is_one_line(flowscale):
    for how, status in (("raise", 1), ("interrupt", 130)):
        found = flowscale(Red(0, how))
        assert found[0] == status and found[1] is None and "stopped before the search" in found[3][-1]


def test_where_nothing_was_judged_the_plain_sample_is_the_best(flowscale):
    status, account, _, _ = flowscale(Red(1, "raise"), *SEARCH[:-1], "zero-order")
    assert status == 1 and account["found"]["reward"] == account["plain"]["reward"]
    assert account["found"]["picture"] == account["plain"]["picture"] and account["found"]["nfe"] == 4


@pytest.mark.parametrize("text", [None, "notes", b"\x08\0\0\0\0\0\0\0{}      "])
def test_what_is_no_saved_search_is_one_line(flowscale, text):
    if text is not None:
        Path("out.search").write_bytes(text.encode() if isinstance(text, str) else text)
    status, _, _, err = flowscale(Red(), "resume", "out.search")
    assert status == 2 and len(err) == 1 and "saved" in err[0]
    assert flowscale(Red(), "resume")[0] == 2


# A process of its own


def begun(*args, cwd, **options):
    # A background job of a shell ignores SIGINT, and so would its children.
    options |= {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    return subprocess.Popen([*COMMAND, *args], stderr=subprocess.PIPE, text=True, cwd=cwd, **options)


@pytest.mark.parametrize("terminal", [True, False])
def test_it_says_what_it_does_within_a_second(tmp_path, terminal):
    """From before Python starts; best of three, for the machine may be busy."""
    waits = []
    for _ in range(3):
        theirs, ours = os.openpty() if terminal else os.pipe()[::-1]
        read, write = (theirs, ours) if terminal else (ours, theirs)
        start = time.monotonic()
        process = subprocess.Popen([*COMMAND, "a red circle"], stderr=write, stdout=write, cwd=tmp_path)
        os.close(write)
        said = os.read(read, 100)
        waits.append(time.monotonic() - start)
        process.kill()
        process.wait()
        os.close(read)
        assert said.startswith(b"flowscale: loading")
        if waits[-1] < 1:
            break
    assert min(waits) < 1, waits


@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_killed_it_goes_on_to_the_same_result(tmp_path, kill):
    """Ctrl-C, a cluster's notice to end, and an end without notice, from outside, while it searches."""
    prompt, whole = "two red circles", tmp_path / "whole.png"
    args = [prompt, "--nfe", "200", "--method", "refine"]
    process = begun(*args, cwd=tmp_path)
    while not (tmp_path / "out.search").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(kill)
    last = process.communicate(timeout=300)[1].splitlines()[-1]
    if kill != signal.SIGKILL:
        assert process.returncode == 130 and "stopped after" in last
        account = json.loads((tmp_path / "out.json").read_text())
        assert account["stopped"] == "interrupted" and 0 <= account["found"]["nfe"] < 200
    torch.set_num_threads(1)
    cli.main([*args, "--out", str(whole)])
    cli.main(["resume", str(tmp_path / "out.search")])
    accounts = [json.loads((tmp_path / name).read_text()) for name in ("out.json", "whole.json")]
    assert accounts[0]["found"]["nfe"] == 200 and parts(accounts[0]) == parts(accounts[1])


ON_A_SMALL_DISK = 'mount -t tmpfs -o size=2052k tmpfs "$0" && cd "$0" && "$@" && cat out.json'


def test_on_a_real_disk_that_is_full_the_search_ends_with_its_account(tmp_path):
    """A file system in memory, with room for account and picture and nearly nothing more."""
    shell = ["unshare", "-rm", "sh", "-c"]
    if subprocess.run([*shell, 'mount -t tmpfs tmpfs "$0"', tmp_path], capture_output=True).returncode:
        pytest.skip("this system lets nobody but root mount a disk")
    search = [*COMMAND, "two red circles", "--nfe", "60", "--steps", "4", "--method", "refine"]
    done = subprocess.run([*shell, ON_A_SMALL_DISK, tmp_path, *search], capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(done.stdout[done.stdout.index("{") :])["found"]["nfe"] == 60
    (line,) = (line for line in done.stderr.splitlines() if "can no longer be saved" in line)
    assert "No space left on device" in line and "the search goes on" in line


# Rows of sweeps


def test_rows_of_the_bench_replay(tmp_path, capsys):
    """A stored one, whose last digits depend on the processor; and one of a method of one's own, told by its file."""
    torch.set_num_threads(1)
    path, mine = tmp_path / "rows.jsonl", tmp_path / "mine.py"
    mine.write_text("from flowscale_lite import BestOfN\ndef mine(nfe):\n    return BestOfN()\n")
    entry, digest = bench.imported(f"{mine}:mine")
    tasks = bench.tasks("few-step", ["mine"], [20], 1, [0])
    run = functools.partial(bench.run, entry=entry, source=f"{mine}:mine")
    experiments.sweep([task | {"digest": digest} for task in tasks], run, path)
    with pytest.raises(SystemExit) as end:
        cli.main(["replay", f"{path}:1"])
    out = capsys.readouterr().out
    assert end.value.code == 0 and "replayed: the same numbers" in out and '"nfe": 20' in out
    row = json.loads(path.read_text())
    path.write_text(json.dumps(row | {"given": row["given"] + 1}) + "\n")
    with pytest.raises(SystemExit) as end:
        cli.main(["replay", f"{path}:1"])
    assert end.value.code == 1 and "differs in: given" in capsys.readouterr().out
    mine.write_text(mine.read_text() + "\n")
    for args, message in (
        ([f"{path}:1"], "mine.py:mine has changed"),
        ([f"{path}:2"], "has 1 rows"),
        ([f"{path}:x"], "expected the line"),
        ([f"{path}:1", "tools.runs.noise:run"], "is not a row of tools.runs.noise"),
        ([f"{path}:1", "tools.runs.magic:run"], "no function tools.runs.magic:run"),
    ):
        with pytest.raises(SystemExit) as end:
            cli.main(["replay", *args])
        assert end.value.code == 2 and message in capsys.readouterr().err


def test_rows_of_the_stored_runs_replay(capsys):
    """By the function that made them: what does not depend on a processor's last digits is the same anywhere."""
    for name, runner in (("toy", "tools.runs.toy_table:run"), ("paper", "tools.runs.paper:run")):
        row = experiments.read(locate(f"results/{name}.jsonl"))[0]
        with pytest.raises(SystemExit):
            cli.main(["replay", f"{locate('results')}/{name}.jsonl:1", runner])
        found = json.loads(capsys.readouterr().out.splitlines()[0])
        assert {key: found[key] for key in ("nfe", "reward_calls", "drawn")} == {
            key: row[key] for key in ("nfe", "reward_calls", "drawn")
        }
