"""Run the notebooks as they run on Colab, twice each, and print how long that took.

    python -m tools.course.colab [04 08 ...]

Each notebook lies alone in an empty folder. The environment holds the versions of colab.txt and nothing of this
repository, so that the first run's set-up cell installs the wheel, which is built for the occasion, from a file in the
place of the release's address. The second run, in a new kernel, is what follows a restart: set-up does nothing.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from tools.course import build as notebooks

FOLDER = notebooks.ROOT / "build" / "colab"
VERSIONS = Path(__file__).with_name("colab.txt")
LEFT = {"my_pictures"}  # what a notebook may leave behind: 11 saves the picture that its reader chose


def command(*arguments: str | Path, **options) -> str:
    """What a command prints.

    Raises:
        RuntimeError: it failed; the message is the last line of what it said.
    """
    done = subprocess.run([*map(str, arguments)], capture_output=True, text=True, **options)
    if done.returncode:
        raise RuntimeError((done.stdout + done.stderr).strip().splitlines()[-1])
    return done.stdout


def prepare(folder: Path) -> tuple[Path, Path]:
    """The Python of an environment with Colab's versions, made once, and a wheel of this tree, made anew."""
    python, stamp = folder / "venv" / "bin" / "python", folder / "venv" / "installed.txt"
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != VERSIONS.read_text(encoding="utf-8"):
        print("Installing Colab's versions (minutes, once)", flush=True)
        command(sys.executable, "-m", "venv", folder / "venv")
        command(python, "-m", "pip", "--disable-pip-version-check", "-qq", "install", "-r", VERSIONS)
        stamp.write_text(VERSIONS.read_text(encoding="utf-8"), encoding="utf-8")
    (site,) = (folder / "venv" / "lib").glob("python3*/site-packages")
    # On Colab the module google.colab is loaded when the kernel starts; the set-up cell looks for it.
    (site / "google" / "colab").mkdir(parents=True, exist_ok=True)
    (site / "google" / "colab" / "__init__.py").touch()
    (site / "colab_stand_in.pth").write_text("import google.colab\n", encoding="utf-8")
    kernel = folder / "jupyter" / "kernels" / "colab"
    kernel.mkdir(parents=True, exist_ok=True)
    launch = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    about = {"argv": launch, "display_name": "Colab", "language": "python", "env": notebooks.ONE_THREAD}
    (kernel / "kernel.json").write_text(json.dumps(about), encoding="utf-8")
    command(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder / "dist", cwd=notebooks.ROOT)
    return python, folder / "dist" / Path(notebooks.project()["wheel"]).name


def installed(python: Path) -> set[str]:
    """The packages of an environment, with their versions."""
    return set(command(python, "-m", "pip", "--disable-pip-version-check", "list", "--format=freeze").split())


def seconds(cell: NotebookNode) -> float:
    """How long an executed cell took."""
    times = cell.metadata["execution"]
    start, end = (datetime.datetime.fromisoformat(times[f"iopub.status.{at}"]) for at in ("busy", "idle"))
    return (end - start).total_seconds()


def run(notebook: Path, folder: Path) -> tuple[float, float]:
    """Seconds of the set-up cell and of the whole notebook, run alone in its folder by the kernel of `prepare`.

    Raises:
        RuntimeError: a cell failed.
    """
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "FLOWSCALE_DATA")}
    environment["JUPYTER_PATH"] = str(folder / "jupyter")
    # At a widget nbclient can miss that a reply has come; it then looks again when the time for a cell is over.
    options = ("--ExecutePreprocessor.kernel_name=colab", "--ExecutePreprocessor.timeout=240", "--output=ran.ipynb")
    start = time.perf_counter()
    execute = (sys.executable, "-m", "nbconvert", "--log-level=ERROR", "--to=notebook", "--execute")
    command(*execute, *options, notebook, cwd=notebook.parent, env=environment)
    whole = time.perf_counter() - start
    (setup,) = (c for c in nbformat.read(notebook.parent / "ran.ipynb", 4).cells if "setup" in notebooks.tags(c))
    return seconds(setup), whole


def twice(source: Path, python: Path, wheel: Path, folder: Path) -> list[tuple[float, float]]:
    """Run a notebook from a bare environment, and again after a restart.

    Raises:
        RuntimeError: a cell failed, or the set-up cell changed another package than ours.
    """
    command(python, "-m", "pip", "--disable-pip-version-check", "uninstall", "-qq", "-y", "flowscale-lite")
    before, times = installed(python), []
    for _ in range(2):
        with tempfile.TemporaryDirectory() as empty:
            alone = Path(empty) / f"{source.stem}.ipynb"
            text = notebooks.targets(source)[False].read_text(encoding="utf-8")
            alone.write_text(text.replace(notebooks.project()["wheel"], str(wheel)), encoding="utf-8")
            times.append(run(alone, folder))
            strays = {path.name for path in Path(empty).iterdir()} - {alone.name, "ran.ipynb"} - LEFT
        changed = {one.split("==")[0].split(" @")[0] for one in installed(python) ^ before} - {"@", str(wheel)}
        if strays or not all("flowscale" in one for one in changed):
            raise RuntimeError(f"left {sorted(strays)} behind and changed the packages {sorted(changed)}")
    return times


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("only", nargs="*", help="names, or beginnings of names, of notebooks")
    options = parser.parse_args(argv)
    sources = notebooks.chosen(notebooks.ROOT.glob("notebooks/src/[0-9][0-9]_*.py"), options.only)
    python, wheel = prepare(FOLDER)
    print(f"Wheel: {wheel.stat().st_size / 2**20:.1f} MiB. Seconds, of the set-up cell and of the whole run:")
    print(f"{'':28}{'set-up':>8}{'first':>8}{'set-up':>8}{'again':>8}", flush=True)
    failed = 0
    for source in sources:
        try:
            times = twice(source, python, wheel, FOLDER)
            print(f"{source.stem:28}" + "".join(f"{one:8.1f}" for pair in times for one in pair), flush=True)
        except RuntimeError as error:
            failed += 1
            print(f"{source.stem:28} FAILED: {error}", flush=True)
    print(f"{len(sources) - failed} passed, {failed} failed")
    return 1 if failed or not sources else 0


if __name__ == "__main__":
    sys.exit(main())
