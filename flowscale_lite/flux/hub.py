"""Pipelines from a folder or from the Hugging Face hub, with plain words for what can be wrong with them."""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import torch
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import errors
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.utils import logging as transformers_logging

from . import families

_imports = logging.getLogger("transformers.utils.import_utils")
_imports.addFilter(lambda record: "torchvision" not in record.getMessage())  # it warns of its lack; nothing needs it
TOKEN = "HF_TOKEN"
"""The name of the hub's access token, as an environment variable and among Colab's secrets."""


def load(model: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """A pipeline ready for inference, on one device and in one precision, from a folder or by its name on the hub.

    For a model that is large for its GPU see `memory.load_planned`.

    Raises:
        FileNotFoundError: there is no such pipeline, a file is missing, or the weights are pickles, never loaded.
        PermissionError: the hub wants the model's licence accepted, or a token.
        ConnectionError: the hub cannot be reached or refuses to answer, and the model is not in the local cache.
        ValueError: no such device, pipeline not supported, a file damaged, or parts that do not belong together.
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
    """A pipeline's model_index.json: its class, and library and class of each part. Raises what `load` does."""
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
    model: str | Path, dtype: torch.dtype | Mapping[str, torch.dtype] = torch.float32, absent: Collection[str] = (),
    quantised: Mapping[str, Any] | None = None,
) -> Any:  # fmt: skip
    """A pipeline on the CPU, all of its parts read and checked; its models are frozen and set to inference.

    If the folder has a file SHA256SUMS, as `sha256sum` writes it, its files must be those that are listed there.
    `dtype` is the precision of all parts, or of each by its name with "default" for the others; `absent` names parts
    that are not loaded; `quantised` has quantisation configs by name. Raises what `load` does.
    """
    found, folder = index(model), Path(model)
    dtypes = {"default": dtype} if isinstance(dtype, torch.dtype) else dtype
    parts: dict[str, Any] = dict.fromkeys(absent)
    with explained(model), quiet(folder.exists()):  # a download shows its progress, a folder is read at once
        if not folder.exists():
            options = {"use_safetensors": True, "token": token(), **parts}
            folder = Path(diffusers.DiffusionPipeline.download(str(model), **options))
        _check_sums(folder)
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
    """A small autoencoder for `FlowModel.encode`; the default is TAEF1, made for FLUX.1. Raises what `load` does."""
    check_device(device)
    with explained(model), quiet(Path(model).exists()):
        return weights(diffusers.AutoencoderTiny, model, torch_dtype=dtype, **_access(model)).to(device)


def weights(cls: Any, model: str | Path, **options: Any) -> Any:
    """A model of diffusers or transformers, frozen and set to inference, from safetensors in a folder or on the hub.

    Raises OSError as `load` does, and ValueError if a file is damaged, or if a layer of the config has no weights or
    weights have no layer, of which the libraries only warn. The heads of a transformers model may be left out.
    """
    files = sorted(Path(model).glob("*.safetensors"))
    if Path(model).is_dir() and not files:
        raise FileNotFoundError(f"no safetensors in {model}")
    for file in files:
        try:
            safe_open(file, "pt")
        except SafetensorError as error:
            raise ValueError(f"{file.name} is damaged or not all there; get it again ({error})") from error
    strict = issubclass(cls, diffusers.ModelMixin)
    if not strict:
        options["ignore_mismatched_sizes"] = True  # so that they are told below
    built, info = cls.from_pretrained(str(model), output_loading_info=True, use_safetensors=True, **options)
    layers = tuple({re.sub(r"\d+", "#", f".{key}") for key in built.state_dict()})
    extra = [k for k in info["unexpected_keys"] if strict or re.sub(r"\d+", "#", f".{k}").endswith(layers)]
    resized = [key for key, *_ in info["mismatched_keys"]]
    wrong = {"no weights": info["missing_keys"], "weights of another size": resized, "weights and no layer": extra}
    for what, keys in wrong.items():
        if keys:
            raise ValueError(f"config and weights disagree: there are {what} for {', '.join(sorted(keys)[:2])}, ...")
    return built.eval().requires_grad_(False)


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
    """A pipeline on the meta device, from its configs alone: no weights, no tokenizers. Raises what `load` does."""
    found, parts = index(model), {}
    with explained(model), quiet(), torch.device("meta"):
        for name, part in found.items():
            if isinstance(part, list):
                parts[name] = _weightless(model, name, *part)
    return getattr(diffusers, found["_class_name"])(**parts, **families.settings(found))


def _weightless(model: str | Path, name: str, library: str | None, cls: str) -> Any:
    """A part of a pipeline, built from its config; None for a tokenizer and the like."""
    if library is None or not (name.startswith(("text_encoder", "scheduler")) or library == "diffusers"):
        return None
    kind, where = getattr(importlib.import_module(library), cls), {"subfolder": name, **_access(model)}
    if name == "scheduler":
        return kind.from_pretrained(str(model), **where)
    if library == "diffusers":
        return kind.from_config(kind.load_config(str(model), **where))
    return kind(kind.config_class.from_pretrained(str(model), **where))


def _access(model: str | Path) -> dict[str, str | None]:
    """The access token, as an argument of `from_pretrained`, for a model that is not in a folder here."""
    return {} if Path(model).exists() else {"token": token()}


@contextmanager
def explained(model: str | Path) -> Iterator[None]:
    """What libraries and the hub's client raise while `model` is loaded, in plain words, as `load` lists it."""
    try:
        yield
    except Exception as error:
        told = _plain(model, error)
        if told is error:
            raise
        raise told from error


def _plain(model: str | Path, error: Exception) -> Exception:
    """The error to raise for one that a library raised; the same one if it says enough: memory or a disk is full."""
    page = f"https://huggingface.co/{model}"
    secret = f"environment variable {TOKEN}, or Colab's secret of that name; never put it in a cell"
    cause: BaseException | None = error
    while cause is not None and not isinstance(
        cause, (errors.HfHubHTTPError, ConnectionError, errors.LocalEntryNotFoundError)
    ):
        cause = cause.__cause__  # transformers wraps what the hub's client raised
    if isinstance(cause, errors.GatedRepoError):
        hint = f" No token was found: create one at https://huggingface.co/settings/tokens ({secret})."
        how = f"log in at {page}, accept it there, and use a token of that account.{'' if token() else hint}"
        return PermissionError(f"{model} is given to those who accept its licence: {how}")
    if isinstance(cause, errors.RepositoryNotFoundError):
        return FileNotFoundError(
            f"the hub has no model {model}, or a private one that the token does not open ({secret})"
        )
    if isinstance(cause, (errors.RemoteEntryNotFoundError, errors.RevisionNotFoundError)):
        modular = "modular pipelines, which have no model_index.json, are not supported"
        return FileNotFoundError(f"the hub's {model} lacks what is asked for: {_line(cause)}; {modular}")
    if cause is not None:
        offline = " (HF_HUB_OFFLINE is set)" if huggingface_hub.constants.HF_HUB_OFFLINE else ""
        reason = _line(cause.__cause__ or cause)  # such as that of being asked too often
        return ConnectionError(f"{page} cannot be reached{offline}, and the model is not in the local cache: {reason}")
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return error
    if not isinstance(error, OSError):
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        return ValueError(f"{model} cannot be loaded: {kind}{_line(error)}")
    if "safetensors" in str(error):
        why = "others are not loaded, they can run code"
        return FileNotFoundError(f"{model} lacks safetensors weights; {why}: {_line(error)}")
    return error if error.errno else FileNotFoundError(f"no model {model}, or it lacks a file: {_line(error)}")


def _line(error: BaseException) -> str:
    """The message of an error on one line."""
    return " ".join(str(error).split())


@contextmanager
def quiet(really: bool = True) -> Iterator[None]:
    """Within it, the libraries show no loading bars and no warnings. Afterwards all is as it was before."""
    bars = huggingface_hub.utils
    with ExitStack() as after:
        if really:  # transformers switches the hub's bars with its own, so these are put back last
            hidden = bars.are_progress_bars_disabled()
            after.callback(bars.disable_progress_bars if hidden else bars.enable_progress_bars)
            for log in (diffusers_logging, transformers_logging):
                after.callback(log.set_verbosity, log.get_verbosity())
                if log.is_progress_bar_enabled():
                    after.callback(log.enable_progress_bar)
                log.set_verbosity_error()
                log.disable_progress_bar()
        yield
