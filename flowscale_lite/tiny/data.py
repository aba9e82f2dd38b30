"""Where the files that this project ships are found: tiny-flux, the held-out judge, the prompts, the stored runs."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def locate(name: str) -> Path:
    """The path of a shipped file or folder, e.g. locate("tiny-flux/dev").

    It is looked for in the folder that the environment variable FLOWSCALE_DATA names. Where that is not set, an
    installed package looks in its own `data` folder, and a clone of the repository in the clone's.

    Raises FileNotFoundError: it is not there. The message says where it was looked for and what to do.
    """
    chosen = os.environ.get("FLOWSCALE_DATA")
    installed = (PACKAGE / "data").is_dir()
    if chosen:
        folder = Path(chosen)
    else:
        folder = PACKAGE / "data" if installed else PACKAGE.parent / "data"
    if (folder / name).exists():
        return folder / name
    where = f"{folder}, which FLOWSCALE_DATA names" if chosen else str(folder)
    raise FileNotFoundError(f"no {name} in {where}: clone the repository and set FLOWSCALE_DATA to its data folder")
