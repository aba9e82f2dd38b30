"""Real reward models, all of them from transformers: counts, VQAScore, CLIPScore, aesthetics, PickScore.

A model is loaded once (`Finder`, `VisionLanguage`, `Clip`); a judge binds it to a prompt, and is a Reward: pictures
(K, 3, H, W) in [0, 1] -> (K,), `chunk` pictures at a time. Nothing here needs torchvision; transformers is imported by
the loaders only. Weights come as safetensors, from a folder or from the hub.

The judges that rest on CLIP can be differentiated with respect to the pictures. The others see 8-bit pictures, and
count or answer; they give no gradient.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .rewards import chunked

if TYPE_CHECKING:
    from PIL.Image import Image


# ---------------------------------------------------------------------------------------------------------- pictures
def check_pictures(images: Tensor) -> Tensor:
    """The pictures, if they are (K, 3, H, W) with K at least 1, and in [0, 1].

    Raises:
        ValueError: they are not; a picture in [-1, 1], in bytes or of NaN would be judged without a word.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.numel() or not images.is_floating_point():
        raise ValueError(
            f"pictures must be floats of shape (K, 3, H, W), one at least; got {images.dtype} {tuple(images.shape)}"
        )
    low, high = (float(v) for v in images.detach().aminmax())
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # so put, NaN is refused too
        raise ValueError(f"pictures must lie in [0, 1]; got values from {low:g} to {high:g}")
    return images


def to_pil(images: Tensor) -> list[Image]:
    """Pictures (K, 3, H, W) in [0, 1] as PIL images, rounded to 8 bits: the one place where tensors become images.

    Raises:
        ValueError: shape or range is wrong.
    """
    from PIL import Image

    pixels = check_pictures(images).detach().float().clamp(0, 1).mul(255).round().byte()
    return [Image.fromarray(pixel) for pixel in pixels.permute(0, 2, 3, 1).cpu().numpy()]


# ----------------------------------------------------------------------------------------------------------- loading
def _pretrained(cls: Any, name: str | Path, **options: Any) -> Any:
    """cls.from_pretrained(name), with an error that says what to do.

    Raises:
        PermissionError: the model's licence has to be accepted first.
        FileNotFoundError: there is no such model in reach, or no safetensors weights of it.
    """
    from .hub import quiet

    try:
        with quiet(Path(name).exists()):  # a download shows its progress
            return cls.from_pretrained(str(name), **options)
    except (OSError, ValueError) as error:
        causes = _causes(error)
        if any(type(cause).__name__ == "GatedRepoError" for cause in causes):
            raise PermissionError(
                f"{name} asks its users to accept a licence: do so on https://huggingface.co/{name}, then set HF_TOKEN"
            ) from error
        if not isinstance(error, OSError):
            raise
        empty = Path(name).is_dir() and not (Path(name) / "config.json").exists()
        if "safetensors" in str(error) and not empty:
            raise FileNotFoundError(
                f"{name} has no safetensors weights; others are not loaded, they can run code"
            ) from error
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
        raise FileNotFoundError(
            f"no {cls.__name__} {str(name)!r}: it is no folder that holds one, it is not in the cache, and "
            f"the hub gives none{offline}: {str(error).splitlines()[0]}"
        ) from error


def _causes(error: BaseException | None) -> list[BaseException]:
    return [] if error is None else [error, *_causes(error.__cause__ or error.__context__)]


def _model(cls: Any, name: str | Path, device: str, dtype: torch.dtype) -> Any:
    """A model ready for inference.

    Raises:
        ValueError: there is no such device.
    """
    from .hub import check_device

    check_device(device)
    model = _pretrained(cls, name, dtype=dtype, use_safetensors=True)
    return model.eval().requires_grad_(False).to(device)


class _Chunked:
    """A judge that takes `chunk` pictures at a time.

    Raises:
        ValueError: chunk < 1, refused here and not in the middle of a search.
    """

    chunk: int

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise ValueError(f"chunk must be at least 1; got {self.chunk}")


# -------------------------------------------------------------------------------------------------------------- CLIP
CLIPS = {
    "clip-l": ("openai/clip-vit-large-patch14", None),
    "pickscore": ("yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
}
"""Short names: (weights, tokenizer if it is kept elsewhere)."""
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's training pictures


@dataclass(frozen=True)
class Clip:
    """A CLIP model: pictures and texts as unit vectors of one space.

    Attributes:
        model: a transformers CLIPModel.
        tokenizer: its tokenizer.
    """

    model: Any
    tokenizer: Any

    @classmethod
    def load(
        cls,
        name: str | Path = "clip-l",
        *,
        tokenizer: str | Path | None = None,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Clip:
        """From a folder, a hub id, or a short name of `CLIPS`. Raises what `_pretrained` and `_model` do."""
        from transformers import AutoTokenizer, CLIPModel

        name, elsewhere = CLIPS.get(str(name), (name, None))
        model = _model(CLIPModel, name, device, dtype)
        return cls(model, _pretrained(AutoTokenizer, tokenizer or elsewhere or name))

    def pixels(self, images: Tensor) -> Tensor:
        """Pictures (K, 3, H, W) as the model wants them: the middle square, resized and normalised. Differentiable.

        CLIP's own preprocessing without its 8-bit step, so close to it but not to the bit.
        """
        x, size = check_pictures(images).float(), self.model.config.vision_config.image_size
        scale = size / min(x.shape[2:])
        high, wide = (max(size, int(side * scale)) for side in x.shape[2:])
        if (high, wide) != tuple(x.shape[2:]):
            x = F.interpolate(x, (high, wide), mode="bicubic", antialias=True).clamp(0, 1)
        top, left = (high - size) // 2, (wide - size) // 2
        x = x[:, :, top : top + size, left : left + size].to(self.model.device)
        mean, std = (x.new_tensor(v).view(3, 1, 1) for v in (_MEAN, _STD))
        return ((x - mean) / std).to(self.model.dtype)

    def pictures(self, images: Tensor) -> Tensor:
        """(K, 3, H, W) -> unit vectors (K, d), float32."""
        pooled = self.model.vision_model(pixel_values=self.pixels(images)).pooler_output
        return F.normalize(self.model.visual_projection(pooled).float(), dim=-1)

    @torch.no_grad()
    def text(self, text: str) -> Tensor:
        """A text as a unit vector (d,), float32; cut off at the model's length (77 tokens)."""
        limit = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(text, truncation=True, max_length=limit, return_tensors="pt").to(self.model.device)
        pooled = self.model.text_model(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).pooler_output
        return F.normalize(self.model.text_projection(pooled).float(), dim=-1)[0]


@dataclass(frozen=True)
class CLIPScore(_Chunked):
    """2.5 max(cos, 0) of picture and prompt (Hessel et al., arXiv 2104.08718): (K, 3, H, W) -> (K,)."""

    clip: Clip
    prompt: str
    chunk: int = 16

    @cached_property
    def _text(self) -> Tensor:
        return self.clip.text(self.prompt)

    def __call__(self, images: Tensor, /) -> Tensor:
        cosine = chunked(lambda rows: self.clip.pictures(rows) @ self._text, self.chunk)(images)
        return 2.5 * cosine.clamp_min(0).to(images.device)


@dataclass(frozen=True)
class PickScore(_Chunked):
    """How much people would like the picture for the prompt (Kirstain et al., arXiv 2305.01569): (K, 3, H, W) -> (K,).

    The scaled cosine of a CLIP-H trained on choices between two pictures; a difference d means that the better one is
    chosen with probability 1 / (1 + exp(-d)). Of another kind than the counting and answering judges: use it to hold a
    gain of theirs against, not as the reward.
    """

    clip: Clip
    prompt: str
    chunk: int = 16

    @cached_property
    def _text(self) -> Tensor:
        return self.clip.text(self.prompt) * self.clip.model.logit_scale.detach().float().exp()

    def __call__(self, images: Tensor, /) -> Tensor:
        return chunked(lambda rows: self.clip.pictures(rows) @ self._text, self.chunk)(images).to(images.device)


@dataclass(frozen=True)
class Aesthetic(_Chunked):
    """An aesthetic score of pictures, whatever the prompt: a head over CLIP's unit vectors. (K, 3, H, W) -> (K,).

    The LAION predictor is such a head over "clip-l", on a scale of about 1 to 10. It is published as a pickle: convert
    it once, with PyTorch's weights-only loader and safetensors' `save_file`, and load it with `aesthetic_head`.
    """

    clip: Clip
    head: nn.Module
    chunk: int = 16

    def __call__(self, images: Tensor, /) -> Tensor:
        return chunked(lambda rows: self.head(self.clip.pictures(rows))[:, 0], self.chunk)(images).to(images.device)


def aesthetic_head(path: str | Path, clip: Clip) -> nn.Module:
    """A chain of linear layers read from a safetensors file: a single one, or the MLP of the LAION predictor.

    That MLP has no nonlinearity, and dropout between its layers only, so the shapes in the file say all.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not safetensors, or the layers do not lead from the CLIP's vectors to one number.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path} with an aesthetic head")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file; pickles are not loaded, they can run code") from error
    names = sorted(
        (name.removesuffix("weight") for name in tensors if name.endswith("weight")),
        key=lambda name: [int(n) for n in re.findall(r"\d+", name)],
    )
    layers = [_linear(tensors[f"{name}weight"], tensors.get(f"{name}bias")) for name in names]
    sizes = [clip.model.config.projection_dim, *(layer.out_features for layer in layers)]
    if not layers or sizes[-1] != 1 or any(layer.in_features != n for layer, n in zip(layers, sizes, strict=False)):
        shapes = {name: tuple(t.shape) for name, t in tensors.items()}
        raise ValueError(f"{path} holds no chain of linear layers from {sizes[0]} numbers to one; it holds {shapes}")
    return nn.Sequential(*layers).requires_grad_(False).to(clip.model.device)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    if weight.ndim != 2:
        raise ValueError(f"a linear layer's weight has two dimensions; got {tuple(weight.shape)}")
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.load_state_dict({"weight": weight.float()} | ({} if bias is None else {"bias": bias.float()}))
    return layer


# ---------------------------------------------------------------------------------------------------------- VQAScore
VLMS = {"small": "Qwen/Qwen3-VL-2B-Instruct", "large": "Qwen/Qwen3-VL-8B-Instruct"}
"""Short names of vision-language models."""
_FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")  # one preprocessing, one way of placing a picture in the text


@dataclass(frozen=True)
class VisionLanguage:
    """A vision-language model of the Qwen-VL family, asked one question about each of many pictures.

    Attributes:
        model: it answers with logits.
        tokenizer: with a chat template.
        pictures: its image processor, the one that works on PIL images.
    """

    model: Any
    tokenizer: Any
    pictures: Any

    @classmethod
    def load(
        cls,
        name: str | Path = "small",
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        max_pixels: int = 768 * 768,
    ) -> VisionLanguage:
        """From a folder, a hub id, or a short name of `VLMS`. Larger pictures are reduced to `max_pixels`.

        Raises:
            ValueError: a model of another family.
            FileNotFoundError, PermissionError: no such model in reach, or its licence is not accepted.
        """
        from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, Qwen2VLImageProcessorPil

        name = VLMS.get(str(name), name)
        kind = _pretrained(AutoConfig, name).model_type
        if kind not in _FAMILIES:
            raise ValueError(f"{name} is a {kind!r}; models of these kinds can be asked: {', '.join(_FAMILIES)}")
        tokenizer = _pretrained(AutoTokenizer, name)
        if tokenizer.chat_template is None:
            tokenizer.chat_template = _chat_template(name)
        pictures = _pretrained(Qwen2VLImageProcessorPil, name)
        least, most = (min(pictures.size[edge], max_pixels) for edge in ("shortest_edge", "longest_edge"))
        pictures.size = {"shortest_edge": least, "longest_edge": most}  # of pixels, whatever the names
        return cls(_model(AutoModelForImageTextToText, name, device, dtype), tokenizer, pictures)

    @torch.no_grad()
    def next_word(self, images: Tensor, question: str) -> Tensor:
        """Log-probabilities (K, vocabulary), float32, of the first token of the answer to `question`."""
        seen = self.pictures(to_pil(images), return_tensors="pt")
        places = int(seen["image_grid_thw"][0].prod()) // self.pictures.merge_size**2
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        mark = self.model.config.image_token_id
        word = self.tokenizer.convert_ids_to_tokens(mark)
        ids = self.tokenizer(text.replace(word, word * places), return_tensors="pt", add_special_tokens=False).input_ids
        if int((ids == mark).sum()) != places:
            raise ValueError(f"the chat template must place one picture, with {word}; it gave {text!r}")
        ids = ids.expand(len(images), -1).to(self.model.device)  # one question, pictures of one size: no padding
        answer = self.model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == mark).int(),
            pixel_values=seen["pixel_values"].to(self.model.device, self.model.dtype),
            image_grid_thw=seen["image_grid_thw"].to(self.model.device),
            logits_to_keep=1,
        )
        return answer.logits[:, -1].float().log_softmax(-1)

    def token(self, word: str) -> int:
        """The one token that is `word`.

        Raises:
            ValueError: it takes several, so that its probability is not that of one token.
        """
        ids = self.tokenizer.encode(word, add_special_tokens=False)
        if len(ids) != 1:
            raise ValueError(f"{word!r} must be one token of this model to be scored; it is {len(ids)}: {ids}")
        return int(ids[0])


def _chat_template(name: str | Path) -> str:
    """The chat template where older models keep it: in a file of its own, meant for their processor."""
    from transformers.utils import cached_file

    file = cached_file(str(name), "chat_template.json", _raise_exceptions_for_missing_entries=False)
    if file is None:
        raise FileNotFoundError(f"{name} has no chat template, neither in its tokenizer nor in chat_template.json")
    return str(json.loads(Path(file).read_text())["chat_template"])


@dataclass(frozen=True)
class VQAScore(_Chunked):
    """Probability that the answer to "does the picture show the prompt?" is Yes: (K, 3, H, W) -> (K,), in [0, 1].

    The score of Lin et al. (arXiv 2404.01291), with a Qwen-VL in place of their CLIP-FlanT5, so its values are not to
    be compared with published ones.

    Attributes:
        vlm: the model.
        prompt: put into `question` for {}.
        chunk: pictures a forward pass.
        against_no: divide by P(Yes) + P(No), for models that like to begin their answer otherwise.
    """

    vlm: VisionLanguage
    prompt: str
    chunk: int = 4
    question: str = 'Does this figure show "{}"? Please answer yes or no.'
    against_no: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.vlm.token("Yes")  # likewise refused here
        if self.against_no:
            self.vlm.token("No")

    def __call__(self, images: Tensor, /) -> Tensor:
        return chunked(self._ask, self.chunk)(images).to(images.device)

    def _ask(self, images: Tensor) -> Tensor:
        logp = self.vlm.next_word(images, self.question.format(self.prompt))
        yes = logp[:, self.vlm.token("Yes")]
        return torch.sigmoid(yes - logp[:, self.vlm.token("No")]) if self.against_no else yes.exp()


# ---------------------------------------------------------------------------------------------------------- counting
@dataclass(frozen=True)
class Found:
    """What was found in one picture, a row each.

    Attributes:
        boxes: (n, 4) left, top, right, bottom, as shares of the picture's sides.
        masks: (n, h, w) bool, on a grid over the picture.
        scores: (n,) in [0, 1].
        labels: (n,) which phrase, int64.
    """

    boxes: Tensor
    masks: Tensor
    scores: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, rows: Tensor) -> Found:
        return Found(self.boxes[rows], self.masks[rows], self.scores[rows], self.labels[rows])


@dataclass(frozen=True)
class Cleaning:
    """When two finds are one object, and when a find is none. Shares are of area.

    Attributes:
        same: intersection over union of two masks above which they are one object, whatever their labels.
        inside: share of a mask within another from which it lies inside it.
        made_of: share of a mask covered by the others inside it from which it is a group and no object.
        smallest: share of the picture below which a mask is a speck.

    Raises:
        ValueError: a share outside [0, 1].
    """

    same: float = 0.5
    inside: float = 0.85
    made_of: float = 0.3
    smallest: float = 2e-4

    def __post_init__(self) -> None:
        if not all(0 <= v <= 1 for v in (self.same, self.inside, self.made_of, self.smallest)):
            raise ValueError(f"shares lie in [0, 1]; got {self}")


def clean(found: Found, rules: Cleaning = Cleaning()) -> Found:
    """The objects among what a detector found, by falling score. Four mistakes of such detectors are mended:

    1. Specks are dropped.
    2. A group, one find around several objects of its label, is dropped: two or more others lie inside it, apart from
       one another, and together they make up much of it. (Wheels in a car make up little of it, so the car stays.)
       Where the segmenter gave a box no mask of its own, two objects of its label inside suffice.
    3. Of finds that are one object the best scored stays, whatever the labels: an object has one label.
    4. A part, a find inside another of its label, is dropped.

    Masks decide and not boxes, since the boxes of neighbours overlap. A box whose mask is empty, or mostly outside of
    it, stands for itself as a rectangle.
    """
    masks, own = _usable(found)
    flat = masks.flatten(1).float()
    # Masks stay where they are; what the loops below ask for number by number goes to the CPU at once.
    area, shared, own, labels, scores = (
        part.cpu() for part in (flat.sum(1), flat @ flat.T, own, found.labels, found.scores)
    )
    least = area.clamp_min(1)
    same = shared / (area[:, None] + area - shared).clamp_min(1) > rules.same
    inside = (shared >= rules.inside * least) & (area[:, None] > area)  # [i, j]: j lies inside i
    like = labels[:, None] == labels
    alive = area >= max(1.0, rules.smallest * masks[0].numel() if len(masks) else 1.0)
    for i in area.argsort().tolist():  # small ones first, so that groups of groups are seen through
        members = (inside[i] & like[i] & alive).nonzero()[:, 0]
        alive[i] &= not _is_group(masks, shared, area, i, members, rules.made_of if own[i] else 0.0)
    kept: list[int] = []
    for i in scores.argsort(descending=True, stable=True).tolist():
        if alive[i] and not same[i, kept].any():
            kept.append(i)
    rows = torch.tensor(kept, dtype=torch.int64)
    whole = ~(inside & like)[rows][:, rows].any(0)
    return found[rows[whole].to(found.scores.device)]


def _usable(found: Found) -> tuple[Tensor, Tensor]:
    """Masks (n, h, w), each the segmenter's or, where that is of no use, its box; and which are the segmenter's."""
    high, wide = found.masks.shape[1:]
    boxes = found.boxes[:, :, None]
    y, x = ((torch.arange(n, device=boxes.device) + 0.5) / n for n in (high, wide))
    columns, rows = (boxes[:, 0] <= x) & (x < boxes[:, 2]), (boxes[:, 1] <= y) & (y < boxes[:, 3])
    within = rows[:, :, None] & columns[:, None, :]
    share = (found.masks & within).sum((1, 2)) / found.masks.sum((1, 2)).clamp_min(1)
    own = share > 0.5
    return torch.where(own[:, None, None], found.masks, within), own


def _is_group(masks: Tensor, shared: Tensor, area: Tensor, i: int, members: Tensor, made_of: float) -> bool:
    """Whether two or more of the members, apart from one another, cover the share `made_of` of find i."""
    apart: list[int] = []
    for j in members[area[members].argsort(descending=True)].tolist():  # wholes before their parts
        if not (shared[j, apart] > 0.5 * area[j]).any():
            apart.append(j)
    return len(apart) > 1 and float(masks[apart].any(0).sum()) >= made_of * float(area[i])


@dataclass(frozen=True)
class Finder:
    """GroundingDINO, which boxes what a phrase names, and SAM, which outlines what is in a box.

    Attributes:
        detector, tokenizer, pictures: GroundingDINO with its BERT tokenizer and its image processor for PIL images.
        segmenter, segmenter_pictures: SAM with its own.
    """

    detector: Any
    tokenizer: Any
    pictures: Any
    segmenter: Any
    segmenter_pictures: Any

    @classmethod
    def load(
        cls,
        detector: str | Path = "IDEA-Research/grounding-dino-tiny",
        segmenter: str | Path = "facebook/sam-vit-base",
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Finder:
        """From folders or hub ids. `dtype` is SAM's; the detector, which is small, stays in float32: its deformable
        attention fails in half precision in some versions of transformers.

        Raises:
            FileNotFoundError, PermissionError: no such model in reach, or its licence is not accepted.
        """
        from transformers import (
            AutoTokenizer,
            GroundingDinoForObjectDetection,
            GroundingDinoImageProcessorPil,
            SamImageProcessorPil,
            SamModel,
        )

        return cls(
            _model(GroundingDinoForObjectDetection, detector, device, torch.float32),
            _pretrained(AutoTokenizer, detector),
            _pretrained(GroundingDinoImageProcessorPil, detector),
            _model(SamModel, segmenter, device, dtype),
            _pretrained(SamImageProcessorPil, segmenter),
        )

    @torch.no_grad()
    def find(self, images: Tensor, phrases: Sequence[str], threshold: float = 0.3) -> list[Found]:
        """Everything that scores above `threshold` for a phrase, a Found for each picture; not cleaned.

        Raises:
            ValueError: no phrases, an empty one, one with a full stop, or more than the model can read.
        """
        ids, spans = self._text(phrases)
        pictures = to_pil(images)
        scores, labels, boxes = self._detect(pictures, ids, spans)
        seen = self.segmenter_pictures(pictures, return_tensors="pt")
        pixels = seen["pixel_values"].to(self.segmenter.device, self.segmenter.dtype)
        embeddings = self.segmenter.get_image_embeddings(pixels)
        sizes = [(int(high), int(wide)) for high, wide in seen["reshaped_input_sizes"]]
        found = []
        for k, size in enumerate(sizes):
            rows = scores[k] > threshold
            masks = self._outline(embeddings[k : k + 1], boxes[k, rows], size)
            found.append(Found(boxes[k, rows], masks, scores[k, rows], labels[k, rows]))
        return found

    def _text(self, phrases: Sequence[str]) -> tuple[Tensor, list[Tensor]]:
        """Token ids (1, L) of "phrase. phrase." and the positions of each phrase's tokens."""
        if not phrases or any(not phrase.strip() or "." in phrase for phrase in phrases):
            raise ValueError(f"phrases name one kind of thing each, without full stops; got {list(phrases)}")
        text = " ".join(f"{phrase.strip().lower()}." for phrase in phrases)
        ids = self.tokenizer(text, return_tensors="pt").input_ids
        limit = self.detector.config.max_text_len
        stops = (ids[0] == self.tokenizer.convert_tokens_to_ids(".")).nonzero()[:, 0].tolist()
        if ids.shape[1] > limit or len(stops) != len(phrases):
            raise ValueError(f"{len(phrases)} phrases take {ids.shape[1]} tokens, of which the model reads {limit}")
        spans = [torch.arange(a + 1, b) for a, b in zip([0, *stops], stops, strict=False)]
        return ids.to(self.detector.device), spans

    def _detect(self, pictures: list[Image], ids: Tensor, spans: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Scores (K, Q), labels (K, Q) and boxes (K, Q, 4) of the detector's Q guesses, in float32."""
        seen = self.pictures(pictures, return_tensors="pt").to(self.detector.device)
        ids = ids.expand(len(pictures), -1)
        answer = self.detector(
            pixel_values=seen["pixel_values"],
            pixel_mask=seen["pixel_mask"],
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            token_type_ids=torch.zeros_like(ids),
        )
        words = answer.logits.float().sigmoid()
        scores, labels = torch.stack([words[:, :, span].amax(-1) for span in spans], -1).max(-1)
        centre, size = answer.pred_boxes.float().chunk(2, -1)
        return scores, labels, torch.cat([centre - size / 2, centre + size / 2], -1).clamp(0, 1)

    def _outline(self, embedding: Tensor, boxes: Tensor, size: tuple[int, int], chunk: int = 64) -> Tensor:
        """The mask of each box (n, 4), on the part of SAM's grid, a quarter of its resolution, that is the picture."""
        if not len(boxes):
            return boxes.new_zeros(0, 1, 1, dtype=torch.bool)
        corners = (boxes * boxes.new_tensor([size[1], size[0]] * 2)).to(embedding.dtype)
        logits = [
            self.segmenter(image_embeddings=embedding, input_boxes=part[None], multimask_output=False).pred_masks
            for part in corners.split(chunk)
        ]
        masks = torch.cat([part[0, :, 0] for part in logits]) > 0
        scale = masks.shape[-1] / self.segmenter.config.vision_config.image_size
        return masks[:, : max(1, round(size[0] * scale)), : max(1, round(size[1] * scale))]


@dataclass(frozen=True)
class GroundedCounts(_Chunked):
    """Minus the residual sum of squares of counts, objects found by GroundingDINO and cleaned with SAM's masks: the
    quantity reward of arXiv 2503.19385. (K, 3, H, W) -> (K,), at most 0; 0 where every count is right.

    Attributes:
        finder: the models.
        target: how many are wanted of what each phrase names, such as {"red apple": 3, "bottle": 2}; 0 is allowed.
        threshold: score from which the detector is believed.
        rules: see `clean`.
        chunk: pictures a forward pass.

    Raises:
        ValueError: no target, or a negative one; chunk < 1.
    """

    finder: Finder
    target: Mapping[str, int]
    threshold: float = 0.3
    rules: Cleaning = Cleaning()
    chunk: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.target or any(n < 0 for n in self.target.values()):
            raise ValueError(f"target says how many of each phrase are wanted, 0 or more; got {dict(self.target)}")

    def find(self, images: Tensor) -> list[Found]:
        """The objects of each picture, cleaned; labels number the phrases of `target` in order."""
        found = self.finder.find(images, list(self.target), self.threshold)
        return [clean(picture, self.rules) for picture in found]

    def counts(self, images: Tensor) -> Tensor:
        """(K, phrases) int64, on the CPU."""
        parts = [found for rows in images.split(self.chunk) for found in self.find(rows)]
        return torch.stack([found.labels.cpu().bincount(minlength=len(self.target)) for found in parts])

    def __call__(self, images: Tensor, /) -> Tensor:
        return -self._off(images).square().sum(1).to(images.device, torch.float32)

    def exact(self, images: Tensor) -> Tensor:
        """Whether all counts are right: (K,) bool, on the CPU."""
        return (self._off(images) == 0).all(1)

    def _off(self, images: Tensor) -> Tensor:
        return self.counts(images) - torch.tensor(list(self.target.values()))
