"""What outlives a failure: the saved search, the account, and the room on the disk for both."""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..search import Search
from .words import command, seen_from

INTERRUPTED = "interrupted"


def say(text: str) -> None:
    """One line on standard error, at once."""
    print(f"flowscale: {text}", file=sys.stderr, flush=True)


def line_of(error: BaseException) -> str:
    """An error in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def failure(error: BaseException) -> str:
    """What stopped a search, and where, in one line."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {line_of(error)}, {Path(last.filename).name} line {last.lineno}"


def parts(out: Path) -> tuple[Path, Path]:
    """Where account and picture are written before they get their names."""
    return out.with_suffix(".json.part"), out.with_suffix(".png.part")


def reserve(out: Path, size: int = 2**20) -> None:
    """Room for account and picture, a mebibyte each: should the disk become full, they can be written.

    Raises OSError: it is full already, or may not be written to.
    """
    try:
        for part in parts(out):
            part.write_bytes(os.urandom(size))
    except OSError as error:
        clear(out)
        raise OSError(f"no room for account and picture in {out.parent.absolute()}: {error.strerror}") from error


def clear(out: Path) -> None:
    """Give the reserved room back."""
    for part in parts(out):
        part.unlink(missing_ok=True)


def fill(part: Path, data: bytes) -> None:
    """Write a file, whole or not at all, in the room that was reserved."""
    with part.open("r+b") as file:
        file.write(data)
        file.truncate()
    part.replace(part.with_suffix(""))


def saved_at(out: Path) -> Path:
    """Where a search under way is saved."""
    return out.with_suffix(".search")


def save_search(found: Search, args: argparse.Namespace) -> bool:
    """Save the search as it is, with its command, as safetensors. Says so if that fails, and whether it did not."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = saved_at(args.out)
    part = path.with_name(path.name + ".part")
    state = {name: tensor.cpu().clone().contiguous() for name, tensor in found.state().items()}
    try:
        save_file(state, part, {"command": json.dumps(command(args))})
        part.replace(path)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        say(f"the search goes on, but can no longer be saved: {line_of(error)}")
        return False
    return True


def read_search(words: Sequence[str]) -> tuple[dict[str, Tensor], list[str]]:
    """The state of a saved search, and its command. Raises ValueError or OSError: there is none."""
    from safetensors import SafetensorError, safe_open

    if len(words) != 1:
        raise ValueError("expected a saved search: flowscale resume out.search")
    path = Path(words[0])
    if path.suffix == ".json":
        raise ValueError(f"{path} is an account, not a saved search; search again by: flowscale replay {path}")
    if not path.is_file():
        raise FileNotFoundError(f"no saved search at {path}")
    try:
        with safe_open(path, "pt") as file:
            command = json.loads((file.metadata() or {})["command"])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} is no search that flowscale saved: {line_of(error)}") from error
    return state, [*seen_from(command, path.parent, Path()), "--out", str(path.with_suffix(".png"))]


def read_account(words: Sequence[str]) -> dict[str, Any]:
    """The account to replay, its command set to write beside it. Raises ValueError or OSError: there is none."""
    if len(words) != 1:
        raise ValueError("expected the account of a search: flowscale replay out.json")
    path = Path(words[0])
    if path.suffix == ".search":
        raise ValueError(f"{path} is a saved search, not an account; go on with it by: flowscale resume {path}")
    account = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(account, dict) or not {"command", "plain", "found", "trace"} <= set(account):
        raise ValueError(f"{path} is not an account that flowscale wrote")
    command = seen_from(account["command"], path.parent, Path())
    return account | {"command": [*command, "--out", str(path.with_suffix(".replay.png"))]}
