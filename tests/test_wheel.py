"""Where data are looked for; and the wheel alone, in an empty folder with an empty home."""

import json
import os
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from PIL import Image
from test_repository import PROJECT, ROOT, tracked

from flowscale_lite.tiny.data import locate

DATA = ("judge", "prompts", "results", "tiny-flux")
IMPORT = """\
import json
import flowscale_lite
from flowscale_lite import flux
from flowscale_lite.tiny.data import locate
from flowscale_lite.tiny.judge import HeldOutJudge

HeldOutJudge.load(locate("judge/held_out.safetensors"))
pipelines = [type(flux.load(locate(f"tiny-flux/{model}"))).__name__ for model in ("dev", "schnell")]
prompts = locate("prompts/hard.txt").read_text().splitlines()
rows = locate("results/bench.jsonl").read_text().splitlines()
print(json.dumps([flowscale_lite.__file__, pipelines, len(prompts), len(rows)]))
"""


def command(*args: str | Path, **options) -> str:
    done = subprocess.run([*map(str, args)], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_clone_reads_its_own_data_folder(monkeypatch):
    monkeypatch.delenv("FLOWSCALE_DATA", raising=False)
    assert locate("tiny-flux/dev") == ROOT / "data" / "tiny-flux" / "dev"
    with pytest.raises(FileNotFoundError, match=r"no tiny-flux/large in .*data: clone the repository"):
        locate("tiny-flux/large")


def test_the_environment_names_another_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("FLOWSCALE_DATA", str(tmp_path))
    (tmp_path / "mine.txt").write_text("")
    assert locate("mine.txt") == tmp_path / "mine.txt"
    with pytest.raises(FileNotFoundError, match=f"in {tmp_path}, which FLOWSCALE_DATA names"):
        locate("tiny-flux/dev")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built the long way: the tree makes the source distribution, that makes the wheel."""
    folder = tmp_path_factory.mktemp("dist")
    command(sys.executable, "-m", "hatchling", "build", "--target", "sdist", "--directory", folder, cwd=ROOT)
    (source,) = folder.iterdir()
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index")
    command(*pip, "--wheel-dir", folder, source, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.slow
def test_wheel_holds_package_and_data_and_nothing_else(wheel):
    package = {path.relative_to(ROOT).as_posix(): path for path in tracked("flowscale_lite", "flowscale.py")}
    data = {path.relative_to(ROOT).as_posix(): path for name in DATA for path in tracked(f"data/{name}")}
    wanted = package | {f"flowscale_lite/{name}": path for name, path in data.items()}
    about = f"flowscale_lite-{PROJECT['version']}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.startswith(about)}
        assert names == set(wanted)
        assert [name for name in names if archive.read(name) != wanted[name].read_bytes()] == []
        assert archive.read(f"{about}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        metadata = message_from_bytes(archive.read(f"{about}/METADATA"))
    assert (metadata["Version"], metadata["License-Expression"]) == (PROJECT["version"], PROJECT["license"])
    assert metadata.get_payload(decode=True) == (ROOT / "README.md").read_bytes()
    assert wheel.stat().st_size < 25 * 2**20


@pytest.mark.slow
def test_wheel_works_alone(wheel, tmp_path):
    """Installed apart and put before this clone on the path; neither the clone nor a home is there to help."""
    site, home, empty = (tmp_path / name for name in ("site", "home", "empty"))
    home.mkdir()
    empty.mkdir()
    command(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", site, wheel, cwd=empty)
    environment = {"HOME": str(home), "PATH": os.defpath, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
    alone = {"cwd": empty, "env": environment | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}}
    file, pipelines, prompts, rows = json.loads(command(sys.executable, "-c", IMPORT, **alone).splitlines()[-1])
    assert Path(file).is_relative_to(site)
    assert prompts == len((ROOT / "data" / "prompts" / "hard.txt").read_text().splitlines())
    assert pipelines == ["FluxPipeline", "FluxPipeline"]
    assert rows == len((ROOT / "data" / "results" / "bench.jsonl").read_text().splitlines())
    printed = command(site / "bin" / "flowscale", "three red circles and two blue squares", "--nfe", "30", **alone)
    assert json.loads((empty / "out.json").read_text())["found"]["nfe"] <= 30
    assert "out.png" in printed
    with Image.open(empty / "out.png") as picture:
        assert picture.size[0] > 600
