"""VQAScore: a vision-language model is asked whether a picture shows what the prompt says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..rewards import Reward, chunked
from .pictures import load_model, pretrained, to_pil

VLMS = {"small": "Qwen/Qwen3-VL-2B-Instruct", "large": "Qwen/Qwen3-VL-8B-Instruct"}
"""Short names of vision-language models."""
_FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")  # they prepare pictures, and place them in the text, alike


@dataclass(frozen=True)
class VisionLanguage:
    """A vision-language model of the Qwen-VL family, its tokenizer with a chat template, and its image processor. The
    family's processor for texts and pictures together is not used: its part for videos needs torchvision.
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

        Raises ValueError for a model of another family, and what `pictures.load_model` does.
        """
        from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, ProcessorMixin
        from transformers import Qwen2VLImageProcessorPil as ImageProcessor

        name = VLMS.get(str(name), name)
        kind = pretrained(AutoConfig, name).model_type
        if kind not in _FAMILIES:
            raise ValueError(f"{name} is a {kind!r}; models of these kinds can be asked: {', '.join(_FAMILIES)}")
        tokenizer, pictures = pretrained(AutoTokenizer, name), pretrained(ImageProcessor, name)
        if tokenizer.chat_template is None:  # older models keep it in a file of their processor
            tokenizer.chat_template = ProcessorMixin.get_processor_dict(str(name))[0].get("chat_template")
        if tokenizer.chat_template is None:
            raise FileNotFoundError(f"{name} has no chat template, neither in its tokenizer nor in chat_template.json")
        # transformers says "edge" here, but these are the least and the largest number of pixels of a picture
        pictures.size = {edge: min(pictures.size[edge], max_pixels) for edge in ("shortest_edge", "longest_edge")}
        return cls(load_model(AutoModelForImageTextToText, name, device, dtype), tokenizer, pictures)

    @torch.no_grad()
    def next_word(self, images: Tensor, question: str) -> Tensor:
        """Log-probabilities (K, vocabulary), float32, of the first token of the answer to `question`.

        Raises ValueError if shape or range of the pictures is wrong, or if the chat template does not place a picture.
        """
        seen = self.pictures(to_pil(images), return_tensors="pt").to(self.model.device)
        places = int(seen["image_grid_thw"][0].prod()) // self.pictures.merge_size**2
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        text = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
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
            pixel_values=seen["pixel_values"].to(self.model.dtype),
            image_grid_thw=seen["image_grid_thw"],
            logits_to_keep=1,
        )
        return answer.logits[:, -1].float().log_softmax(-1)

    def token(self, word: str) -> int:
        """The one token that is `word`. Raises ValueError if it takes several: only one token has a probability."""
        ids = self.tokenizer.encode(word, add_special_tokens=False)
        if len(ids) != 1:
            raise ValueError(f"{word!r} must be one token of this model to be scored; it is {len(ids)}: {ids}")
        return int(ids[0])


def vqa_score(
    vlm: VisionLanguage,
    prompt: str,
    *,
    question: str = 'Does this figure show "{}"? Please answer yes or no.',
    chunk: int = 4,
) -> Reward:
    """VQAScore, the probability that the model answers Yes when asked for the prompt: (K, 3, H, W) -> (K,), in [0, 1].

    The score of Lin et al. (arXiv 2404.01291) with a Qwen-VL in place of their CLIP-FlanT5. So its values cannot be
    compared with published ones.

    Args:
        vlm: the model.
        prompt, question: what the picture should show, and what the model is asked, with {} for the prompt.
        chunk: pictures a forward pass.

    Raises ValueError if "Yes" is not one token of the model, and for chunk < 1.
    """
    yes = vlm.token("Yes")
    asked = question.format(prompt)
    return chunked(lambda images: vlm.next_word(images, asked)[:, yes].exp().to(images.device), chunk)
