"""Counts of objects: GroundingDINO finds them, SAM outlines them, and `clean` keeps one find an object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..rewards import Reward, chunked
from .pictures import load_model, pretrained, to_pil

_GRID = (256, 256)  # cells of a mask over the whole picture: SAM itself draws no finer


@dataclass(frozen=True)
class Found:
    """What was found in one picture, a row each, on the CPU.

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


def clean(
    found: Found, *, same: float = 0.5, inside: float = 0.85, made_of: float = 0.3, smallest: float = 2e-4
) -> Found:
    """The objects among the finds of one picture, by falling score. Four mistakes of detectors are mended:

    1. A speck is dropped: a find of less than the share `smallest` of the picture.
    2. A group is dropped: a find around several objects of its label. At least two other finds lie inside it, apart
       from one another, and together they cover the share `made_of` of it. Wheels cover little of a car, so the car
       stays. Where SAM gave a box no mask of its own, any two objects inside suffice.
    3. Of several finds of one object only the best scored stays, whatever their labels. They are of one object if the
       intersection over union of their masks is above `same`.
    4. A part is dropped: a find inside another of its label. It is inside if the share `inside` of its mask is.

    Masks decide and not boxes, since the boxes of neighbours overlap. A box whose mask is empty, or mostly outside of
    it, stands for itself as a rectangle. Raises ValueError if a share is outside [0, 1].
    """
    if not all(0 <= share <= 1 for share in (same, inside, made_of, smallest)):
        raise ValueError(f"shares lie in [0, 1]; got {same=}, {inside=}, {made_of=}, {smallest=}")
    masks, own = _usable(found)
    flat = masks.flatten(1).float()
    area, shared = flat.sum(1), flat @ flat.T
    one = shared > same * (area[:, None] + area - shared)
    # within[i, j]: find j lies inside find i and has its label
    within = (shared >= inside * area) & (area[:, None] > area) & (found.labels[:, None] == found.labels)
    alive = area >= max(1.0, smallest * flat.shape[1])
    for i in area.argsort().tolist():  # small ones first, so that groups of groups are seen through
        members = _apart((within[i] & alive).nonzero()[:, 0], shared, area)
        least = made_of * area[i] if own[i] else 0.0
        if len(members) > 1 and masks[members].any(0).sum() >= least:
            alive[i] = False
    kept: list[int] = []
    for i in found.scores.argsort(descending=True, stable=True).tolist():
        if alive[i] and not one[i, kept].any():
            kept.append(i)
    part = within[kept][:, kept].any(0)
    rows = torch.tensor(kept, dtype=torch.int64)[~part]
    return Found(found.boxes[rows], found.masks[rows], found.scores[rows], found.labels[rows])


def _usable(found: Found) -> tuple[Tensor, Tensor]:
    """Masks (n, h, w), each the segmenter's or, where that is of no use, its box; and which are the segmenter's."""
    left, top, right, bottom = found.boxes.T[:, :, None]
    y, x = ((torch.arange(n) + 0.5) / n for n in found.masks.shape[1:])
    box = ((top <= y) & (y < bottom))[:, :, None] & ((left <= x) & (x < right))[:, None, :]
    own = (found.masks & box).sum((1, 2)) > 0.5 * found.masks.sum((1, 2))
    return torch.where(own[:, None, None], found.masks, box), own


def _apart(finds: Tensor, shared: Tensor, area: Tensor) -> list[int]:
    """Those of the finds that share less than half of their area with a larger one of them."""
    apart: list[int] = []
    for j in finds[area[finds].argsort(descending=True)].tolist():  # wholes before their parts
        if not (shared[j, apart] > 0.5 * area[j]).any():
            apart.append(j)
    return apart


@dataclass(frozen=True)
class Finder:
    """GroundingDINO, which boxes what a phrase names, SAM, which outlines what is in a box, and their processors."""

    detector: Any
    detector_processor: Any
    segmenter: Any
    segmenter_processor: Any

    @classmethod
    def load(
        cls,
        detector: str | Path = "IDEA-Research/grounding-dino-tiny",
        segmenter: str | Path = "facebook/sam-vit-base",
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Finder:
        """From folders or hub ids. `dtype` is SAM's. The detector is small and stays in float32: its attention fails in
        half precision in some versions of transformers. Raises what `pictures.load_model` does.
        """
        from transformers import GroundingDinoForObjectDetection, GroundingDinoProcessor, SamModel, SamProcessor

        return cls(
            load_model(GroundingDinoForObjectDetection, detector, device, torch.float32),
            pretrained(GroundingDinoProcessor, detector),
            load_model(SamModel, segmenter, device, dtype),
            pretrained(SamProcessor, segmenter),
        )

    @torch.no_grad()
    def find(self, images: Tensor, phrases: Sequence[str], threshold: float = 0.3) -> list[Found]:
        """Everything that scores above `threshold` for a phrase, a Found for each picture; not cleaned.

        Raises ValueError for no phrases, an empty one, one with a full stop, or more than the model can read.
        """
        pictures = to_pil(images)
        scores, labels, boxes = self._detect(pictures, phrases)
        inputs = self.segmenter_processor(pictures, return_tensors="pt").to(self.segmenter.device)
        embeddings = self.segmenter.get_image_embeddings(inputs["pixel_values"].to(self.segmenter.dtype))
        found = []
        for k, size in enumerate(inputs["reshaped_input_sizes"].tolist()):
            rows = scores[k] > threshold
            masks = self._outline(embeddings[k : k + 1], boxes[k, rows], size)
            found.append(Found(boxes[k, rows].cpu(), masks.cpu(), scores[k, rows].cpu(), labels[k, rows].cpu()))
        return found

    def count(self, images: Tensor, phrases: Sequence[str], threshold: float = 0.3) -> Tensor:
        """How many objects of each phrase are left of `find` by `clean`: (K, phrases) int64, on the CPU."""
        found = [clean(one) for one in self.find(images, phrases, threshold)]
        return torch.stack([one.labels.bincount(minlength=len(phrases)) for one in found])

    def _detect(self, pictures: list[Any], phrases: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Scores (K, Q), labels (K, Q) and boxes (K, Q, 4) of the detector's Q guesses, in float32."""
        if not phrases or any(not phrase.strip() or "." in phrase for phrase in phrases):
            raise ValueError(f"phrases name one kind of thing each, without full stops; got {list(phrases)}")
        processor, limit = self.detector_processor, self.detector.config.max_text_len
        inputs = processor(images=pictures, text=[list(phrases)] * len(pictures), return_tensors="pt")
        ids = inputs["input_ids"][0]  # of "phrase. phrase."
        stops = (ids == processor.tokenizer.convert_tokens_to_ids(".")).nonzero()[:, 0].tolist()
        if len(ids) > limit or len(stops) != len(phrases):
            raise ValueError(f"{len(phrases)} phrases take {len(ids)} tokens, of which the model reads {limit}")
        answer = self.detector(**inputs.to(self.detector.device))
        # A phrase scores by its own words. The processor's post_process_grounded_object_detection lets full stops count
        # too, and names a guess by a string of words, which may come from several phrases.
        words = answer.logits.float().sigmoid()
        each = [words[:, :, start + 1 : stop].amax(-1) for start, stop in pairwise([0, *stops])]
        scores, labels = torch.stack(each, -1).max(-1)
        centre, size = answer.pred_boxes.float().chunk(2, -1)
        return scores, labels, torch.cat([centre - size / 2, centre + size / 2], -1).clamp(0, 1)

    def _outline(self, embedding: Tensor, boxes: Tensor, size: list[int]) -> Tensor:
        """Masks (n, *_GRID) of what is in each box (n, 4) of a picture which SAM sees at this size."""
        high, wide = size
        masks = [boxes.new_zeros(0, 1, *_GRID, dtype=torch.bool)]
        for part in (boxes * boxes.new_tensor([wide, high, wide, high])).split(64):
            if len(part):
                drawn = self.segmenter(image_embeddings=embedding, input_boxes=part[None], multimask_output=False)
                masks += self.segmenter_processor.post_process_masks(drawn.pred_masks, [_GRID], [size])
        return torch.cat(masks)[:, 0]


def grounded_counts(finder: Finder, target: Mapping[str, int], *, threshold: float = 0.3, chunk: int = 4) -> Reward:
    """Minus the residual sum of squares of counts, the quantity reward of arXiv 2503.19385: (K, 3, H, W) -> (K,), 0
    where every count is right and negative elsewhere.

    Args:
        finder: the models.
        target: how many are wanted of what each phrase names, such as {"red apple": 3, "bottle": 2}; 0 is allowed.
        threshold: score from which the detector is believed.
        chunk: pictures a forward pass.

    Raises ValueError if there is no target or a negative one, and for chunk < 1.
    """
    if not target or any(number < 0 for number in target.values()):
        raise ValueError(f"target says how many of each phrase are wanted, 0 or more; got {dict(target)}")
    phrases, wanted = list(target), torch.tensor(list(target.values()))

    def score(images: Tensor) -> Tensor:
        off = finder.count(images, phrases, threshold) - wanted
        return -off.square().sum(1).to(images.device, torch.float32)

    return chunked(score, chunk)
