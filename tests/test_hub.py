"""Model folders that are damaged, cut short or mixed up: one clear line each, before anything is computed."""

import json
import shutil

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from flowscale_lite.flux import families, hub
from flowscale_lite.tiny.data import locate
from tools.train.tiny_flux import write_sums

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path):
    """A copy of tiny-flux/dev without its list of checksums, as most models come."""
    copied = shutil.copytree(locate("tiny-flux/dev"), tmp_path / "model")
    (copied / "SHA256SUMS").unlink()
    return copied


def edit(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def cut(file, length):
    file.write_bytes(file.read_bytes()[:length])


def swap(first, second):
    aside = first.with_name("aside")
    first.rename(aside)
    second.rename(first)
    aside.rename(second)


def shuffle(file):
    parts = json.loads(file.read_text())
    words = parts["model"]["vocab"]
    if isinstance(words, dict):
        parts["model"]["vocab"] = dict(zip(words, reversed(words.values()), strict=True))
    else:
        parts["model"]["vocab"] = words[:3] + words[:2:-1]
    file.write_text(json.dumps(parts))


def flip(file):
    data = bytearray(file.read_bytes())
    data[-50] ^= 255
    file.write_bytes(data)


def refused(folder, kind, message):
    with pytest.raises(kind, match=message) as told:
        hub.load(folder)
    assert "\n" not in str(told.value) and len(str(told.value)) < 400


# Each is (kind of error, what the line says, what is wrong with the folder).
FAULTS = {
    "weights cut": (
        ValueError,
        "vae cannot be loaded: .*safetensors is damaged",
        lambda f: cut(f / "vae" / WEIGHTS, 999),
    ),
    "weights of a text encoder cut": (
        ValueError,
        "text_encoder cannot be loaded: model.safetensors is damaged",
        lambda f: cut(f / "text_encoder" / "model.safetensors", 5000),
    ),
    "weights empty": (ValueError, "transformer cannot be .* damaged", lambda f: cut(f / "transformer" / WEIGHTS, 0)),
    "a pointer of Git LFS": (
        ValueError,
        "damaged or not all there",
        lambda f: (f / "vae" / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\nsize 3\n"),
    ),
    "no weights": (
        FileNotFoundError,
        "text_encoder_2 lacks safetensors weights",
        lambda f: (f / "text_encoder_2" / "model.safetensors").unlink(),
    ),
    "no folder": (FileNotFoundError, "no folder .*text_encoder_2", lambda f: shutil.rmtree(f / "text_encoder_2")),
    "no config": (FileNotFoundError, "vae.* lacks a file", lambda f: (f / "vae" / "config.json").unlink()),
    "no json": (ValueError, "transformer cannot be", lambda f: (f / "transformer" / "config.json").write_text('{"a":')),
    "a layer fewer": (
        ValueError,
        "weights and no layer for single_transformer_blocks.4",
        lambda f: edit(f / "transformer" / "config.json", num_single_layers=4),
    ),
    "a layer more": (
        ValueError,
        "no weights for single_transformer_blocks.5",
        lambda f: edit(f / "transformer" / "config.json", num_single_layers=6),
    ),
    "an embedding fewer": (
        ValueError,
        "no layer for .*guidance_embedder",
        lambda f: edit(f / "transformer" / "config.json", guidance_embeds=False),
    ),
    "a layer of CLIP fewer": (
        ValueError,
        "no layer for encoder.layers.1",
        lambda f: edit(f / "text_encoder" / "config.json", num_hidden_layers=1),
    ),
    "a layer of T5 fewer": (
        ValueError,
        "no layer for encoder.block.1",
        lambda f: edit(f / "text_encoder_2" / "config.json", num_layers=1),
    ),
    "a layer of T5 more": (
        ValueError,
        "no weights for encoder.block.2",
        lambda f: edit(f / "text_encoder_2" / "config.json", num_layers=3),
    ),
    "another width of T5": (
        ValueError,
        "weights of another size for encoder",
        lambda f: edit(f / "text_encoder_2" / "config.json", d_model=64),
    ),
    "text encoders swapped": (ValueError, "no weights for", lambda f: swap(f / "text_encoder", f / "text_encoder_2")),
    "no tokenizer": (FileNotFoundError, "no folder .*tokenizer_2", lambda f: shutil.rmtree(f / "tokenizer_2")),
    "no vocabulary of T5": (
        FileNotFoundError,
        "tokenizer_2.* no vocabulary: none of spiece.model, tokenizer.json",
        lambda f: (f / "tokenizer_2" / "tokenizer.json").unlink(),
    ),
    "no vocabulary of CLIP": (
        FileNotFoundError,
        "tokenizer.* no vocabulary",
        lambda f: (f / "tokenizer" / "tokenizer.json").unlink(),
    ),
    "tokenizers swapped": (
        ValueError,
        "tokenizer_config.json is that of a T5Tokenizer; model_index.json names CLIPTokenizer",
        lambda f: swap(f / "tokenizer", f / "tokenizer_2"),
    ),
    "vocabularies swapped": (
        ValueError,
        "tokenizer_2 cannot be loaded",
        lambda f: swap(f / "tokenizer" / "tokenizer.json", f / "tokenizer_2" / "tokenizer.json"),
    ),
    "an empty vocabulary": (
        ValueError,
        "tokenizer_2 cannot be loaded",
        lambda f: (f / "tokenizer_2" / "tokenizer.json").write_text("{}"),
    ),
    "another scheduler": (
        ValueError,
        "names DDIMScheduler",
        lambda f: edit(f / "model_index.json", scheduler=["diffusers", "DDIMScheduler"]),
    ),
    "another scheduler's config": (
        ValueError,
        "scheduler_config.json is that of a DDIMScheduler",
        lambda f: edit(f / "scheduler" / "scheduler_config.json", _class_name="DDIMScheduler"),
    ),
    "no scheduler": (FileNotFoundError, "no folder .*scheduler", lambda f: shutil.rmtree(f / "scheduler")),
    "an unknown class": (
        ValueError,
        "transformer cannot be loaded",
        lambda f: edit(f / "model_index.json", transformer=["diffusers", "FluxTransformer9"]),
    ),
    "no autoencoder": (ValueError, "cannot be loaded", lambda f: edit(f / "model_index.json", vae=[None, None])),
    "a modular pipeline": (
        FileNotFoundError,
        "modular pipeline, which is not supported",
        lambda f: (f / "model_index.json").rename(f / "modular_model_index.json"),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_folder_is_one_clear_line(folder, fault):
    kind, message, damage = FAULTS[fault]
    damage(folder)
    refused(folder, kind, message)


def test_a_whole_scheduler_of_another_kind_is_refused(folder):
    diffusers.DDIMScheduler().save_pretrained(folder / "scheduler")
    edit(folder / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    refused(folder, ValueError, "DDIMScheduler, is not made for flow models; use FlowMatchEulerDiscreteScheduler")
    solver = diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    families.check_scheduler(solver)


def test_a_vocabulary_larger_than_the_text_encoders_is_refused(folder):
    file = folder / "tokenizer_2" / "tokenizer.json"
    parts = json.loads(file.read_text())
    parts["model"]["vocab"].append(["\u2581elephants", -1.0])
    file.write_text(json.dumps(parts))
    refused(folder, ValueError, "tokenizer_2 is another model's: of its 55 tokens the encoder knows 54")


@pytest.mark.parametrize("file", ["tokenizer/tokenizer.json", "tokenizer_2/tokenizer.json"])
def test_a_shuffled_vocabulary_is_refused_where_the_folder_lists_its_checksums(folder, file):
    """Nothing else in a folder says which number a word should have."""
    write_sums(folder)
    hub.load(folder)
    shuffle(folder / file)
    refused(folder, ValueError, f"{file} is not the file listed in SHA256SUMS: get it again")


def test_a_flipped_bit_is_refused_where_the_folder_lists_its_checksums(folder):
    write_sums(folder)
    flip(folder / "transformer" / WEIGHTS)
    refused(folder, ValueError, "is not the file listed in SHA256SUMS")


@pytest.mark.parametrize("name", ["dev", "schnell"])
def test_checksums_of_tiny_flux_are_those_of_its_files(name, tmp_path):
    copied = shutil.copytree(locate(f"tiny-flux/{name}"), tmp_path / name)
    listed = (copied / "SHA256SUMS").read_text()
    write_sums(copied)
    assert (copied / "SHA256SUMS").read_text() == listed and len(listed.splitlines()) == 14


def test_a_model_of_transformers_may_leave_out_its_heads_but_no_layer(tmp_path):
    """As a Qwen3Model that is read from the weights of a Qwen3ForCausalLM."""
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

    small = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "head_dim": 8}
    whole = Qwen3ForCausalLM(
        Qwen3Config(**small, num_key_value_heads=1, num_hidden_layers=2, tie_word_embeddings=False)
    )
    whole.save_pretrained(tmp_path)
    assert len(hub.weights(Qwen3Model, tmp_path).layers) == 2
    edit(tmp_path / "config.json", num_hidden_layers=1, layer_types=["full_attention"])
    with pytest.raises(ValueError, match=r"no layer for .*layers\.1"):
        hub.weights(Qwen3Model, tmp_path)


def test_a_preview_and_a_part_with_foreign_weights_are_refused(folder):
    weights = load_file(folder / "vae" / WEIGHTS)
    save_file({**weights, "decoder.extra.weight": torch.zeros(1)}, folder / "vae" / WEIGHTS)
    with pytest.raises(ValueError, match=r"no layer for decoder\.extra\.weight"):
        hub.preview(folder / "vae")


def test_a_model_from_the_hub_is_checked_in_the_cache(folder, monkeypatch):
    asked = {}

    def download(model, **options):
        asked.update(options, model=model)
        return str(folder)

    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", download)
    monkeypatch.setattr(hub, "index", lambda model: json.loads((folder / "model_index.json").read_text()))
    pipe = hub.fetch("someone/model", absent=["text_encoder"])
    assert pipe.text_encoder is None and pipe.text_encoder_2 is not None
    assert asked["model"] == "someone/model" and asked["use_safetensors"] and asked["text_encoder"] is None
    edit(folder / "text_encoder_2" / "config.json", num_layers=1)
    with pytest.raises(ValueError, match=r"no layer for encoder\.block\.1"):
        hub.fetch("someone/model")
