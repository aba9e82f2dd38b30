"""Pipelines from a folder or from the Hugging Face hub, with plain words for what can go wrong on the way."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import families

_logger = logging.getLogger("transformers.utils.import_utils")
_level = _logger.level
_logger.setLevel(logging.ERROR)  # it would warn that torchvision is missing, which nothing here needs
import diffusers  # noqa: E402
import huggingface_hub  # noqa: E402
import transformers  # noqa: E402
from diffusers import DiffusionPipeline, FluxPipeline  # noqa: E402, F401  the latter's import is what would warn
from diffusers.utils import logging as diffusers_logging  # noqa: E402
from huggingface_hub.errors import (  # noqa: E402
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from packaging.version import Version  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

_logger.setLevel(_level)

_DTYPE = "torch_dtype" if Version(diffusers.__version__) < Version("0.42") else "dtype"
TOKEN = "HF_TOKEN"
"""The name of the access token, in the environment and among Colab's secrets."""


def load(model: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """A pipeline ready for inference on one device, whole and in one precision. For models that are large for their GPU
    see `memory.load_planned`.

    Raises:
        FileNotFoundError: `model` is a path that holds no pipeline, or not known to the hub; or weights of it are
            pickles, which are not loaded.
        PermissionError: the hub wants its licence accepted, or a token.
        ConnectionError: the hub cannot be reached or refuses to answer, and the model is not in the cache.
        ValueError: there is no such device, or the model's pipeline is not supported.
    """
    check_device(device)
    return fetch(model, dtype).to(device)


def check_device(device: str | torch.device) -> None:
    """Raises ValueError if there is no such device here, or none that holds numbers: a number is put there."""
    try:
        torch.zeros(1, device=device).tolist()
    except (RuntimeError, AssertionError, ImportError) as error:  # backends differ in how they say that they lack one
        if str(device).startswith("cuda"):
            which = "such CUDA GPU" if torch.cuda.is_available() else "CUDA GPU"
            raise ValueError(f"device '{device}' asked for, but torch sees no {which}; use 'cpu'") from error
        raise ValueError(f"no such device: '{device}'; use 'cpu' or 'cuda'") from error


def token() -> str | None:
    """The access token, from the environment, Colab's secrets or `hf auth login`; None if there is none."""
    if os.environ.get(TOKEN):
        return os.environ[TOKEN]
    try:
        from google.colab import userdata

        return userdata.get(TOKEN)
    except Exception:  # not on Colab, no such secret, or the notebook has no access to it: each has its own exception
        return huggingface_hub.get_token()


def index(model: str | Path) -> dict[str, Any]:
    """The pipeline's model_index.json: its class, and library and class of each of its parts.

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
    """The pipeline by `from_pretrained` with these arguments, its models frozen and set to inference.

    Args:
        dtype: of all parts, or of each by its name, with a "default".

    Raises:
        FileNotFoundError, PermissionError, ConnectionError, ValueError: see `load`.
    """
    index(model)
    here = Path(model).exists()
    arguments |= {_DTYPE: dtype, "use_safetensors": True} | ({} if here else {"token": token()})
    with explained(model), quiet(here):  # a download shows its progress, a folder is read at once
        pipe = DiffusionPipeline.from_pretrained(str(model), **arguments)
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)
    if pipe.vae is not None and all(p.ndim < 5 for p in pipe.vae.parameters()):  # a video's have a layout of their own
        pipe.vae.to(memory_format=torch.channels_last)  # the layout in which convolutions are fast
    return pipe


def preview(
    model: str | Path = "madebyollin/taef1", device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> nn.Module:
    """A small autoencoder for `FlowModel.encode(..., preview=...)`; the default is TAEF1, made for FLUX.1.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError, ValueError: see `load`.
    """
    check_device(device)
    here = Path(model).exists()
    arguments = {_DTYPE: dtype, "use_safetensors": True} | ({} if here else {"token": token()})
    with explained(model), quiet(here):
        vae = diffusers.AutoencoderTiny.from_pretrained(str(model), **arguments)
    return vae.eval().requires_grad_(False).to(device)


def skeleton(model: str | Path) -> Any:
    """The pipeline without weights, on the meta device, and without tokenizers: built from its configs alone.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError, ValueError: see `load`.
    """
    found = index(model)
    where = {} if Path(model).exists() else {"token": token()}
    parts: dict[str, Any] = {}
    with explained(model), quiet(), torch.device("meta"):
        for name, part in found.items():
            if not isinstance(part, list):
                continue
            library, cls = part
            parts[name] = None
            if name == "scheduler":
                parts[name] = getattr(diffusers, cls).from_pretrained(str(model), subfolder=name, **where)
            elif library == "diffusers":
                kind = getattr(diffusers, cls)
                parts[name] = kind.from_config(kind.load_config(str(model), subfolder=name, **where))
            elif library == "transformers" and name.startswith("text_encoder"):
                kind = getattr(transformers, cls)
                parts[name] = kind(kind.config_class.from_pretrained(str(model), subfolder=name, **where))
    settings = {name: found[name] for name in ("is_distilled",) if name in found}
    return getattr(diffusers, found["_class_name"])(**parts, **settings)


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
    return " ".join(str(error).split())


@contextmanager
def quiet(really: bool = True) -> Iterator[None]:
    """Without the libraries' loading bars and their surprise at a small autoencoder; all is put back as it was."""
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
