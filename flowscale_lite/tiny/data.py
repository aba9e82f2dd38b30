"""Where the files that the project ships are found: the `data` folder of the clone, or FLOWSCALE_DATA."""

from __future__ import annotations

import os
from pathlib import Path


def locate(name: str) -> Path:
    """The path of a shipped file or folder, e.g. locate("tiny-flux/dev").

    Raises:
        FileNotFoundError: it is not there; the message says where it was looked for.
    """
    root = Path(os.environ.get("FLOWSCALE_DATA", Path(__file__).resolve().parents[2] / "data"))
    if not (root / name).exists():
        raise FileNotFoundError(f"no {name} in {root}: clone the repository, or set FLOWSCALE_DATA to its data folder")
    return root / name
