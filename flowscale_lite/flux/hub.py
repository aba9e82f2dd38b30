"""Pipelines from a folder or from the Hugging Face hub, with plain words for what can go wrong on the way."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import torch
import transformers
from diffusers.utils import logging as diffusers_logging
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from packaging.version import Version
from torch import nn
from transformers.utils import logging as transformers_logging

from . import families

_imports = logging.getLogger("transformers.utils.import_utils")
_imports.addFilter(lambda record: "torchvision" not in record.getMessage())  # it warns of its lack; nothing needs it
_DTYPE = "torch_dtype" if Version(diffusers.__version__) < Version("0.42") else "dtype"
TOKEN = "HF_TOKEN"
"""The name of the hub's access token, as an environment variable and among Colab's secrets."""


def load(model: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """A pipeline ready for inference, all on one device and in one precision.

    For a model that is large for its GPU see `memory.load_planned`.

    Args:
        model: a folder that diffusers can read, or the name of a model on the Hugging Face hub.

    Raises:
        FileNotFoundError: the folder holds no pipeline, the hub has no such model, or its weights are pickles, which
            are not loaded.
        PermissionError: the hub wants the model's licence accepted, or a token.
        ConnectionError: the hub cannot be reached or refuses to answer, and the model is not in the local cache.
        ValueError: there is no such device, or the model's pipeline is not supported.
    """
    check_device(device)
    return fetch(model, dtype).to(device)


def check_device(device: str | torch.device) -> None:
    """Put a number on a device and read it back.

    Raises:
        ValueError: there is no such device here, or it holds no numbers, as "meta" does not.
    """
    try:
        torch.zeros(1, device=device).tolist()
    except (RuntimeError, AssertionError, ImportError) as error:  # backends differ in how they say that they lack one
        if str(device).startswith("cuda"):
            which = "such CUDA GPU" if torch.cuda.is_available() else "CUDA GPU"
            raise ValueError(f"device '{device}' asked for, but torch sees no {which}; use 'cpu'") from error
        raise ValueError(f"no such device: '{device}'; use 'cpu' or 'cuda'") from error


def token() -> str | None:
    """The hub's access token: from the environment, Colab's secrets or `hf auth login`; None if there is none."""
    if os.environ.get(TOKEN):
        return os.environ[TOKEN]
    try:
        from google.colab import userdata

        return userdata.get(TOKEN)
    except Exception:  # not on Colab, no such secret, or no access to it: each has an exception of its own
        return huggingface_hub.get_token()


def index(model: str | Path) -> dict[str, Any]:
    """The contents of a pipeline's model_index.json: its class, and the library and class of each of its parts.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError, ValueError: see `load`.
    """
    folder = Path(model)
    if folder.exists() or folder.is_absolute() or str(model).startswith("."):
        path = folder / "model_index.json"
        if not path.exists():
            raise FileNotFoundError(f"no model at {folder}: expected a diffusers folder with a model_index.json")
    else:
        with explained(model):
            path = Path(huggingface_hub.hf_hub_download(str(model), "model_index.json", token=token()))
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        name = found["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not say which pipeline it is of: {error!r}") from error
    families.family(name)
    return found


def fetch(model: str | Path, dtype: torch.dtype | dict[str, torch.dtype] = torch.float32, **arguments: Any) -> Any:
    """Load a pipeline by `from_pretrained`; its models are frozen and set to inference.

    Args:
        dtype: the precision of all parts; or that of each part by its name, and that of the others as "default".
        arguments: further arguments of `from_pretrained`.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError, ValueError: see `load`.
    """
    index(model)
    arguments |= {_DTYPE: dtype, "use_safetensors": True, **_access(model)}
    with explained(model), quiet(Path(model).exists()):  # a download shows its progress, a folder is read at once
        pipe = diffusers.DiffusionPipeline.from_pretrained(str(model), **arguments)
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)
    if pipe.vae is not None and all(p.ndim < 5 for p in pipe.vae.parameters()):  # a video's have 5
        pipe.vae.to(memory_format=torch.channels_last)  # the layout in which convolutions are fast
    return pipe


def preview(
    model: str | Path = "madebyollin/taef1", device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> nn.Module:
    """Load a small autoencoder for `FlowModel.encode(..., preview=...)`. The default is TAEF1, made for FLUX.1.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError, ValueError: see `load`.
    """
    check_device(device)
    arguments = {_DTYPE: dtype, "use_safetensors": True, **_access(model)}
    with explained(model), quiet(Path(model).exists()):
        vae = diffusers.AutoencoderTiny.from_pretrained(str(model), **arguments)
    return vae.eval().requires_grad_(False).to(device)


def skeleton(model: str | Path) -> Any:
    """A pipeline without weights and tokenizers, on the meta device, built from its config files alone.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError, ValueError: see `load`.
    """
    found, parts = index(model), {}
    with explained(model), quiet(), torch.device("meta"):
        for name, part in found.items():
            if isinstance(part, list):
                parts[name] = _weightless(model, name, *part)
    settings = {name: found[name] for name in ("is_distilled",) if name in found}
    return getattr(diffusers, found["_class_name"])(**parts, **settings)


def _weightless(model: str | Path, name: str, library: str, cls: str) -> Any:
    """A part of a pipeline, built from its config; None for a tokenizer and the like."""
    where = {"subfolder": name, **_access(model)}
    if name == "scheduler":
        return getattr(diffusers, cls).from_pretrained(str(model), **where)
    if library == "diffusers":
        kind = getattr(diffusers, cls)
        return kind.from_config(kind.load_config(str(model), **where))
    if library == "transformers" and name.startswith("text_encoder"):
        kind = getattr(transformers, cls)
        return kind(kind.config_class.from_pretrained(str(model), **where))
    return None


def _access(model: str | Path) -> dict[str, str | None]:
    """The access token, as an argument of `from_pretrained`, for a model that is not in a folder here."""
    return {} if Path(model).exists() else {"token": token()}


@contextmanager
def explained(model: str | Path) -> Iterator[None]:
    """What diffusers, transformers and the hub's client raise while `model` is loaded, in plain words.

    Raises:
        PermissionError: the hub wants its licence accepted.
        FileNotFoundError: there is no such model, or a file of it is missing; or its weights are pickles only.
        ConnectionError: the hub cannot be reached or refuses to answer, and the model is not in the cache.
    """
    try:
        yield
    except OSError as error:
        told = _plain(model, error)
        if told is error:
            raise
        raise told from error


def _plain(model: str | Path, error: OSError) -> OSError:
    """The error to raise for one that a library raised; the same one if it says enough, such as that a disk is full."""
    page = f"https://huggingface.co/{model}"
    secret = f"environment variable {TOKEN}, or Colab's secret of that name; never put it in a cell"
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, (HfHubHTTPError, ConnectionError, LocalEntryNotFoundError)):
        cause = cause.__cause__  # transformers wraps what the hub's client raised
    if isinstance(cause, GatedRepoError):
        hint = f" No token was found: create one at https://huggingface.co/settings/tokens ({secret})."
        return PermissionError(
            f"{model} is given to those who accept its licence: log in at {page}, accept it there, and use a token of "
            f"that account.{'' if token() else hint}"
        )
    if isinstance(cause, RepositoryNotFoundError):
        return FileNotFoundError(
            f"the hub has no model {model}, or it is private and the token ({secret}) does not open it"
        )
    if isinstance(cause, (RemoteEntryNotFoundError, RevisionNotFoundError)):
        return FileNotFoundError(f"the hub's {model} lacks what is asked for: {_line(cause)}")
    if cause is not None:
        offline = " (HF_HUB_OFFLINE is set)" if huggingface_hub.constants.HF_HUB_OFFLINE else ""
        reason = _line(cause.__cause__ or cause)  # such as that of being asked too often
        return ConnectionError(f"{page} cannot be reached{offline}, and the model is not in the local cache: {reason}")
    if "safetensors" in str(error):
        return FileNotFoundError(
            f"{model} lacks safetensors weights; others are not loaded, they can run code: {_line(error)}"
        )
    return error if error.errno else FileNotFoundError(f"no model {model}, or it lacks a file: {_line(error)}")


def _line(error: BaseException) -> str:
    """The message of an error on one line."""
    return " ".join(str(error).split())


@contextmanager
def quiet(really: bool = True) -> Iterator[None]:
    """Within it, the libraries show no loading bars and no warnings. Afterwards all is as it was before."""
    if not really:
        yield
        return
    logs, bars = (diffusers_logging, transformers_logging), huggingface_hub.utils
    before = [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs]
    restore = bars.disable_progress_bars if bars.are_progress_bars_disabled() else bars.enable_progress_bars
    for log in logs:
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log, (level, shown) in zip(logs, before, strict=True):
            log.set_verbosity(level)
            if shown:
                log.enable_progress_bar()
        restore()  # transformers switches the hub's bars with its own
