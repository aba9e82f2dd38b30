"""The repository as a whole: small, safe to load, free of one machine's paths, arrows of import one way."""

import ast
import os
import re
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest

from tools.course.rules import MACHINE

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "flowscale_lite"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# A module may import those before it, never those after it.
ORDER = (
    *("interpolants", "kernels", "schedules", "resampling", "rewards", "look_ahead", "problem", "search", "methods"),
    *("beyond", "tiny", "flux", "judges", "experiments", "plots", "cli"),
)
READERS = {"plots"}  # it reads results; nothing but the command line imports it
HEAVY = {
    "accelerate",
    "diffusers",
    "matplotlib",
    "pandas",
    "ray",
    "transformers",
}  # not needed by `import flowscale_lite`
UNSAFE = re.compile(
    r"trust_remote_code\s*=\s*True|\btorch\.load\(|\b(?:c?[Pp]ickle|joblib|dill)\.loads?\(|allow_pickle=True"
)


def tracked(*patterns: str) -> list[Path]:
    """Files in the repository, as git sees them; those not added yet count as well."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *patterns]
    try:
        names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git repository")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py"))


def room(module: str) -> str:
    """'flowscale_lite.methods.rbf' -> 'methods'; '' for the package itself."""
    return (module + ".").split(".")[1]


def imports(path: Path) -> set[str]:
    """Full names of the package's modules that a file imports, wherever in the file."""
    package = ["flowscale_lite", *path.relative_to(PACKAGE).parent.parts]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names} if base == "flowscale_lite" else {base}
    return {name for name in found if name.split(".")[0] == "flowscale_lite"}


def wrong_arrows(name: str, imported: set[str]) -> list[str]:
    """Which of a room's imports point the wrong way."""
    if name not in ORDER:
        return [f"{name} has no place in ORDER: give it one"]
    found = []
    for other in sorted({room(module) for module in imported} & set(ORDER) - {name}):
        if ORDER.index(other) > ORDER.index(name):
            found.append(f"{name} imports {other}, which comes after it")
        elif other in READERS and name not in {*READERS, "cli"}:
            found.append(f"{name} imports {other}, which only cli may")
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_arrows_point_one_way(path):
    name = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if name not in ("__init__", "__main__"):
        assert wrong_arrows(name, imports(path)) == []


def test_the_package_page_lists_the_rooms_in_their_order():
    page = (PACKAGE / "README.md").read_text(encoding="utf-8")
    table = re.search(r"^\| file or folder \|.*\n\|[-|]+\n((?:\|.*\n)+)", page, re.M)[1]
    rooms = [name for line in table.splitlines() for name in re.findall(r"`(\w+)(?:\.py|/)`", line.split("|")[1])]
    assert rooms == list(ORDER)


def test_wrong_arrows_are_found():
    assert wrong_arrows("search", {"flowscale_lite.kernels"}) == []
    assert wrong_arrows("kernels", {"flowscale_lite.search"}) == ["kernels imports search, which comes after it"]
    assert wrong_arrows("methods", {"flowscale_lite.methods.rbf", "flowscale_lite.search"}) == []
    assert wrong_arrows("experiments", {"flowscale_lite.plots"}) != []
    assert wrong_arrows("cli", {"flowscale_lite.plots", "flowscale_lite.search"}) == []
    assert wrong_arrows("attic", set()) == ["attic has no place in ORDER: give it one"]


def test_the_core_is_read_in_an_evening():
    """What the course derives: the files at the top, figures aside, and the methods."""
    files = [*PACKAGE.glob("*.py"), *PACKAGE.glob("methods/*.py")]
    core = [path for path in files if path.stem not in ("plots", "__main__")]
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in core) <= 2000


def test_import_is_quick_and_light(tmp_path):
    """In CPU seconds, so that a busy machine does not matter; best of three: the first one compiles, into a folder."""
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    code = (
        "import time, sys; import flowscale_lite; print(time.process_time(), *{m.split('.')[0] for m in sys.modules})"
    )
    times = []
    for _ in range(3):
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
        seconds, *loaded = done.stdout.split()
        assert not HEAVY & set(loaded)
        times.append(float(seconds))
        if times[-1] < 2:
            break
    assert min(times) < 2, times


def test_version_is_the_same_everywhere():
    version = PROJECT["version"]
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^version: {re.escape(version)}$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.M)
    declared = re.search(r'^__version__ = "(.+)"$', (PACKAGE / "__init__.py").read_text(encoding="utf-8"), re.M)
    assert declared is None or declared[1] == version


def test_repository_is_small():
    sizes = {path: path.stat().st_size / 2**20 for path in tracked()}
    assert {path.name: size for path, size in sizes.items() if size > 25} == {}
    assert sum(sizes.values()) < 100


def test_nothing_unsafe_is_loaded():
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in tracked("*.py", "*.ipynb")
        if path != Path(__file__).resolve()
        for match in UNSAFE.finditer(path.read_text(encoding="utf-8"))
    ]
    assert found == []
    assert [path.name for path in tracked("*.pkl", "*.pickle", "*.pt", "*.pth", "*.ckpt", "*.joblib")] == []


@pytest.mark.parametrize(
    "text", ["torch.load(path)", "trust_remote_code=True", "pickle.load(f)", "np.load(f, allow_pickle=True)"]
)
def test_unsafe_loading_is_recognised(text):
    assert UNSAFE.search(text)


def test_no_machine_paths():
    tests = {ROOT / "tests" / "test_notebooks.py", Path(__file__).resolve()}  # they hold examples of such paths
    kinds = ("*.py", "*.md", "*.toml", "*.yml", "*.yaml", "*.cff", "*.txt", "*.json", "*.ipynb", "Makefile", ".ci/run")
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in tracked(*kinds)
        if path not in tests
        for match in MACHINE.finditer(re.sub(r"base64,[A-Za-z0-9+/=]+", "", path.read_text(encoding="utf-8")))
    ]
    assert found == []


@pytest.mark.parametrize(
    "text, found",
    [
        ("cd /work/project", True),
        ('"/root/x"', True),
        ("(/tmp/x)", True),
        ("https://example.org/home/page", False),
        ("../work/x", False),
        ("and/or", False),
    ],
)
def test_machine_paths_are_recognised(text, found):
    assert bool(MACHINE.search(text)) is found


def test_make_targets_are_documented():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.search(r"^\.PHONY: (.+)$", text, re.M)[1].split()
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for target in targets:
        assert re.search(rf"^{target}:.*## \w", text, re.M), f"{target} has no description in the Makefile"
        assert target == "help" or f"`make {target}`" in guide, f"CONTRIBUTING.md does not tell of make {target}"


def test_readme_examples_run(monkeypatch):
    """The blocks of Python on both pages, in their order; with a toy for your model, and tiny-flux for FLUX.1."""
    from flowscale_lite import flux
    from flowscale_lite.flux import memory
    from flowscale_lite.tiny import counter, shapes
    from flowscale_lite.tiny.data import locate

    pipe = flux.load(locate("tiny-flux/schnell"))
    monkeypatch.setattr(memory, "load_planned", lambda name, plan, prompts: pipe)
    monkeypatch.setattr(memory, "free_gib", lambda: 24.0)
    names = {
        "model": lambda x, t: x / (1 + t).view(-1, 1, 1, 1),
        "judge": lambda x0: -x0.square().mean((1, 2, 3)),
        "reward": counter.CountReward(shapes.parse("three red circles and two blue squares")),
    }
    pages = "".join((ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "flowscale_lite/README.md"))
    blocks = re.findall(r"^```python\n(.+?)^```$", pages, re.M | re.S)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the model does not know these words")  # tiny-flux does not, of FLUX's prompt
        for block in blocks:
            exec(compile(block, "README.md", "exec"), names)
    assert len(blocks) >= 3 and names["result"].nfe <= 250 and names["picture"].shape == (1, 3, 64, 64)
    assert names["plan"].chunk >= 1
    assert type(names["pipe"].scheduler).__name__ == "FlowSDEScheduler"


def test_environment_file_installs_the_project():
    text = (ROOT / "environment.yml").read_text(encoding="utf-8")
    assert "-c constraints.txt" in text and "-e .[notebooks,dev]" in text


def test_direct_dependencies_are_pinned():
    """Those of the package and of the extras that `make` installs, and torchao and nbgrader, which it installs apart;
    other extras are for machines of another kind."""
    pins = re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M)
    extras = PROJECT["optional-dependencies"]
    installed = [line for name in ("notebooks", "dev", "book", "browser", "grading") for line in extras[name]]
    wanted = [re.match(r"[\w-]+", line)[0] for line in [*PROJECT["dependencies"], *installed]]
    assert sorted(pins) == sorted([*wanted, "torchao"])
