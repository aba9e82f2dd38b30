"""`python -m tools.release`: the notes of the tag, taken from CHANGELOG.md, and what is to be done before it is set.

`make release` runs it when wheel and notebooks are in order. It sets no tag and publishes nothing.
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEADING = re.compile(r"^## \[(.+?)\](?: - (.+))?\n", re.M)


def sections(changelog: str) -> dict[str, tuple[str, str]]:
    """For each version of a changelog its date, as it stands there or empty, and the text below its heading."""
    _, *parts = HEADING.split(changelog)
    found = zip(parts[::3], parts[1::3], parts[2::3], strict=True)
    return {version: (date or "", text.strip()) for version, date, text in found}


def notes(changelog: str, version: str) -> str:
    """The text of a version's section.

    Raises:
        ValueError: there is no such section, or it is empty.
    """
    _, text = sections(changelog).get(version, ("", ""))
    if not text:
        raise ValueError(f"CHANGELOG.md has nothing under [{version}]: write there what is new for a reader")
    return text


def unfinished(changelog: str, version: str) -> list[str]:
    """What must still be done before the tag is set, one line each."""
    found, todo = sections(changelog), []
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", found[version][0]):
        todo.append(f"give [{version}] its date in CHANGELOG.md, as in 2025-12-31")
    if found.get("Unreleased", ("", ""))[1]:
        todo.append(f"move what stands under [Unreleased] in CHANGELOG.md to [{version}]: it is not in the notes")
    return todo


def main() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    print(f"Notes of v{version}:\n\n{notes(changelog, version)}\n")
    for line in unfinished(changelog, version):
        print(f"Before the tag is set: {line}", file=sys.stderr)


if __name__ == "__main__":
    main()
