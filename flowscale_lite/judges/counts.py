"""Counts of objects: GroundingDINO finds them, SAM outlines them, and `clean` keeps one find an object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .pictures import Chunked, load_model, pretrained, to_pil

if TYPE_CHECKING:
    from PIL.Image import Image


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
            load_model(GroundingDinoForObjectDetection, detector, device, torch.float32),
            pretrained(AutoTokenizer, detector),
            pretrained(GroundingDinoImageProcessorPil, detector),
            load_model(SamModel, segmenter, device, dtype),
            pretrained(SamImageProcessorPil, segmenter),
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
class GroundedCounts(Chunked):
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
