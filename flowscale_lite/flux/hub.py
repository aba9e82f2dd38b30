"""Pipelines from a folder or from the Hugging Face hub, with plain words for what can be wrong with them."""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import torch
from diffusers.utils import logging as diffusers_logging
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.utils import logging as transformers_logging

from . import families

_imports = logging.getLogger("transformers.utils.import_utils")
_imports.addFilter(lambda record: "torchvision" not in record.getMessage())  # it warns of its lack; nothing needs it
TOKEN = "HF_TOKEN"
"""The name of the hub's access token, as an environment variable and among Colab's secrets."""


def load(model: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """A pipeline ready for inference, all on one device and in one precision.

    `model` is a folder that diffusers can read, or the name of a model on the Hugging Face hub. For a model that is
    large for its GPU see `memory.load_planned`.

    Raises:
        FileNotFoundError: the folder holds no pipeline, a file is missing, the hub has no such model, or its weights
            are pickles, which are not loaded.
        PermissionError: the hub wants the model's licence accepted, or a token.
        ConnectionError: the hub cannot be reached or refuses to answer, and the model is not in the local cache.
        ValueError: there is no such device, the pipeline is not supported, a file is damaged, or the parts do not
            belong together.
    """
    check_device(device)
    return fetch(model, dtype).to(device)


def check_device(device: str | torch.device) -> None:
    """Raises ValueError unless a number can be put on the device and read back, which "meta" does not allow."""
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

    Raises OSError or ValueError as `load` does.
    """
    folder = Path(model)
    if folder.exists() or folder.is_absolute() or str(model).startswith("."):
        path = folder / "model_index.json"
        if not path.exists():
            modular = "; it holds a modular pipeline, which is not supported" if list(folder.glob("modular_*")) else ""
            raise FileNotFoundError(f"no model at {folder}: expected a diffusers folder with model_index.json{modular}")
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


def fetch(
    model: str | Path,
    dtype: torch.dtype | Mapping[str, torch.dtype] = torch.float32,
    absent: Collection[str] = (),
    quantised: Mapping[str, Any] | None = None,
) -> Any:
    """A pipeline on the CPU, all of its parts read and checked; its models are frozen and set to inference.

    If the folder has a file SHA256SUMS, as `sha256sum` writes it, its files must be those that are listed there.

    Args:
        dtype: the precision of all parts; or that of each part by its name, and that of the others as "default".
        absent: names of parts that are not loaded.
        quantised: quantisation configs by the names of parts.

    Raises OSError or ValueError as `load` does.
    """
    found = index(model)
    dtypes = {"default": dtype} if isinstance(dtype, torch.dtype) else dtype
    with explained(model), quiet(Path(model).exists()):  # a download shows its progress, a folder is read at once
        folder = Path(model)
        if not folder.exists():
            missing = dict.fromkeys(absent)
            folder = Path(
                diffusers.DiffusionPipeline.download(str(model), use_safetensors=True, token=token(), **missing)
            )
        _check_sums(folder)
    parts: dict[str, Any] = dict.fromkeys(absent)
    entries = {name: part for name, part in found.items() if isinstance(part, list) and part[0] and name not in absent}
    for name in sorted(entries, key=lambda name: not name.startswith(("scheduler", "tokenizer"))):  # the small first
        options = {"torch_dtype": dtypes.get(name, dtypes["default"])}
        if quantised and name in quantised:
            options["quantization_config"] = quantised[name]
        with explained(folder / name), quiet():
            parts[name] = _part(folder / name, entries[name], options)
    with explained(model), quiet():
        pipe = diffusers.DiffusionPipeline.from_pretrained(str(folder), **parts)
        _check_vocabularies(pipe)
    pipe.set_progress_bar_config(disable=True)
    if pipe.vae is not None and all(p.ndim < 5 for p in pipe.vae.parameters()):  # a video's have 5
        pipe.vae.to(memory_format=torch.channels_last)  # the layout in which convolutions are fast
    return pipe


def preview(
    model: str | Path = "madebyollin/taef1", device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> nn.Module:
    """A small autoencoder for `FlowModel.encode(..., preview=...)`; the default is TAEF1, made for FLUX.1.

    Raises OSError or ValueError as `load` does.
    """
    check_device(device)
    with explained(model), quiet(Path(model).exists()):
        return weights(diffusers.AutoencoderTiny, model, torch_dtype=dtype, **_access(model)).to(device)


def weights(cls: Any, model: str | Path, **options: Any) -> Any:
    """A model of diffusers or transformers, frozen and set to inference, from safetensors in a folder or on the hub.

    The libraries only warn where a config and the weights beside it do not describe the same layers.

    Raises:
        OSError: see `load`; a folder holds no safetensors.
        ValueError: a file of weights is damaged; or a layer has no weights, or weights have no layer. The heads of a
            transformers model may be left out.
    """
    if Path(model).is_dir():
        files = sorted(Path(model).glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"no safetensors in {model}")
        for file in files:
            try:
                with safe_open(file, "pt"):
                    pass
            except SafetensorError as error:
                raise ValueError(f"{file.name} is damaged or not all there; get it again ({error})") from error
    strict = issubclass(cls, diffusers.ModelMixin)
    if not strict:
        options["ignore_mismatched_sizes"] = True  # so that they are told below
    built, info = cls.from_pretrained(str(model), output_loading_info=True, use_safetensors=True, **options)
    known = {_numberless(key) for key in built.state_dict()}
    wrong = {
        "no weights for": info["missing_keys"],
        "weights of another size for": [key for key, *_ in info["mismatched_keys"]],
        "weights and no layer for": [
            key for key in info["unexpected_keys"] if strict or any(_numberless(key).endswith(one) for one in known)
        ],
    }
    for what, keys in wrong.items():
        if keys:
            raise ValueError(f"config and weights disagree: there are {what} {', '.join(sorted(keys)[:2])}, ...")
    return built.eval().requires_grad_(False)


def _numberless(key: str) -> str:
    """The name of a weight, with its layers' numbers left out."""
    return "." + re.sub(r"\d+", "#", key)


def _part(folder: Path, entry: list[str], options: dict[str, Any]) -> Any:
    """A part of a pipeline from its folder, which must be made for the class that model_index.json names."""
    library, cls = entry
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    for file in sorted(folder.glob("*config.json")):
        config = json.loads(file.read_text(encoding="utf-8"))
        own = (config.get("_class_name") or config.get("tokenizer_class") or cls).removesuffix("Fast")
        if own not in (cls.removesuffix("Fast"), "TokenizersBackend", "PreTrainedTokenizer"):  # the last two suit any
            raise ValueError(f"{file.name} is that of a {own}; model_index.json names {cls}")
    kind = getattr(importlib.import_module(library), cls)
    if issubclass(kind, nn.Module):
        return weights(kind, folder, **options)
    files = getattr(kind, "vocab_files_names", {}).values()
    if files and not any((folder / file).exists() for file in files):
        raise FileNotFoundError(f"the tokenizer has no vocabulary: none of {', '.join(sorted(files))}")
    part = kind.from_pretrained(str(folder))
    if folder.name == "scheduler":
        families.check_scheduler(part)
    return part


def _check_sums(folder: Path) -> None:
    """Raises ValueError if a file is not the one that the folder's SHA256SUMS lists, where it has such a list."""
    sums = folder / "SHA256SUMS"
    for line in sums.read_text(encoding="utf-8").splitlines() if sums.exists() else ():
        digest, name = line.split(maxsplit=1)
        file = folder / name
        if file.exists() and hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            raise ValueError(f"{name} is not the file listed in SHA256SUMS: get it again, or delete an outdated list")


def _check_vocabularies(pipe: Any) -> None:
    """Raises ValueError if a tokenizer has tokens that its text encoder does not know."""
    for name, tokenizer in pipe.components.items():
        encoder = getattr(pipe, name.replace("tokenizer", "text_encoder"))
        if name.startswith("tokenizer") and tokenizer is not None and encoder is not None:
            known = encoder.config.get_text_config().vocab_size
            if len(tokenizer) > known:
                raise ValueError(f"{name} is another model's: of its {len(tokenizer)} tokens the encoder knows {known}")


def skeleton(model: str | Path) -> Any:
    """A pipeline without weights and tokenizers, on the meta device, built from its config files alone.

    Raises OSError or ValueError as `load` does.
    """
    found, parts = index(model), {}
    with explained(model), quiet(), torch.device("meta"):
        for name, part in found.items():
            if isinstance(part, list):
                parts[name] = _weightless(model, name, *part)
    settings = {name: found[name] for name in ("is_distilled",) if name in found}
    return getattr(diffusers, found["_class_name"])(**parts, **settings)


def transformer_config(model: str | Path) -> dict[str, Any]:
    """The config of a pipeline's transformer. Raises OSError or ValueError as `load` does."""
    library, cls = index(model)["transformer"]
    with explained(model), quiet():
        return getattr(importlib.import_module(library), cls).load_config(
            str(model), subfolder="transformer", **_access(model)
        )


def _weightless(model: str | Path, name: str, library: str | None, cls: str) -> Any:
    """A part of a pipeline, built from its config; None for a tokenizer and the like."""
    if library is None:
        return None
    kind = getattr(importlib.import_module(library), cls)
    where = {"subfolder": name, **_access(model)}
    if name == "scheduler":
        return kind.from_pretrained(str(model), **where)
    if library == "diffusers":
        return kind.from_config(kind.load_config(str(model), **where))
    if name.startswith("text_encoder"):
        return kind(kind.config_class.from_pretrained(str(model), **where))
    return None


def _access(model: str | Path) -> dict[str, str | None]:
    """The access token, as an argument of `from_pretrained`, for a model that is not in a folder here."""
    return {} if Path(model).exists() else {"token": token()}


@contextmanager
def explained(model: str | Path) -> Iterator[None]:
    """What diffusers, transformers and the hub's client raise while `model` is loaded, in plain words on one line.

    Raises OSError or ValueError as `load` does.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        told = _plain(model, error)
        if told is error:
            raise
        raise told from error


def _plain(model: str | Path, error: Exception) -> Exception:
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
        modular = "; modular pipelines, which have no model_index.json, are not supported"
        return FileNotFoundError(f"the hub's {model} lacks what is asked for: {_line(cause)}{modular}")
    if cause is not None:
        offline = " (HF_HUB_OFFLINE is set)" if huggingface_hub.constants.HF_HUB_OFFLINE else ""
        reason = _line(cause.__cause__ or cause)  # such as that of being asked too often
        return ConnectionError(f"{page} cannot be reached{offline}, and the model is not in the local cache: {reason}")
    if not isinstance(error, OSError):
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        return ValueError(f"{model} cannot be loaded: {kind}{_line(error)}")
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
