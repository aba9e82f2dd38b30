"""VQAScore: a vision-language model is asked whether a picture shows what the prompt says."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..rewards import chunked
from .pictures import Chunked, load_model, pretrained, to_pil

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
        kind = pretrained(AutoConfig, name).model_type
        if kind not in _FAMILIES:
            raise ValueError(f"{name} is a {kind!r}; models of these kinds can be asked: {', '.join(_FAMILIES)}")
        tokenizer = pretrained(AutoTokenizer, name)
        if tokenizer.chat_template is None:
            tokenizer.chat_template = _chat_template(name)
        pictures = pretrained(Qwen2VLImageProcessorPil, name)
        least, most = (min(pictures.size[edge], max_pixels) for edge in ("shortest_edge", "longest_edge"))
        pictures.size = {"shortest_edge": least, "longest_edge": most}  # of pixels, whatever the names
        return cls(load_model(AutoModelForImageTextToText, name, device, dtype), tokenizer, pictures)

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
class VQAScore(Chunked):
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
