"""Judges: counting equals hand-counted truth; every reward runs on a small random model of its real class."""

import itertools
import json
import subprocess
import sys
from functools import cache

import httpx
import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.errors import GatedRepoError
from torch import nn

from flowscale_lite import judges
from flowscale_lite.judges import Clip, Finder, Found, VisionLanguage, clean, grounded_counts
from flowscale_lite.judges.pictures import pretrained, to_pil

GRID = 96


def pictures(number, height=48, width=48, seed=0):
    return torch.rand(number, 3, height, width, generator=torch.Generator().manual_seed(seed))


# --------------------------------------------------------------------------------------- counting, constructed finds
Y, X = np.mgrid[:GRID, :GRID] + 0.5


def disk(x, y, r):
    return (X - x) ** 2 + (Y - y) ** 2 <= r**2


def block(left, top, right, bottom):
    return (left <= X) & (right > X) & (top <= Y) & (bottom > Y)


def find(mask, label=0, score=0.5, box=None):
    """One find: its box is its mask's unless given, in pixels."""
    if box is None:
        rows, columns = np.nonzero(mask)
        box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    return box, mask, score, label


def gather(finds):
    boxes = torch.tensor([[float(v) / GRID for v in f[0]] for f in finds]).view(-1, 4)
    masks = torch.from_numpy(np.stack([f[1] for f in finds])) if finds else torch.zeros(0, GRID, GRID, dtype=torch.bool)
    return Found(boxes, masks, torch.tensor([f[2] for f in finds]), torch.tensor([f[3] for f in finds]).long())


def counts(finds, labels=3, **limits):
    found = clean(gather(finds), **limits)
    return found.labels.bincount(minlength=labels).tolist()


NOTHING = np.zeros((GRID, GRID), dtype=bool)
A, B, C, D = disk(20, 20, 10), disk(60, 20, 10), disk(20, 60, 10), disk(60, 60, 10)
SMALL = [find(disk(8 + 10 * (i % 9), 8 + 10 * (i // 9), 4), score=0.3 + 0.005 * i) for i in range(81)]
RING = disk(48, 48, 40) & ~disk(48, 48, 30)
BIG = disk(30, 40, 20)
CAR, WHEELS = block(10, 30, 86, 60), disk(25, 58, 5) | disk(70, 58, 5)
ROW = [disk(12 + 18 * i, 48, 9) for i in range(5)]

# name: (finds, objects of each label)
CASES = {
    "nothing": ([], [0, 0, 0]),
    "one": ([find(A)], [1, 0, 0]),
    "four apart": ([find(m) for m in (A, B, C, D)], [4, 0, 0]),
    "two labels": ([find(A), find(B), find(C, 1)], [2, 1, 0]),
    "three labels": ([find(A), find(B, 1), find(C, 2)], [1, 1, 1]),
    "found twice": ([find(A, score=0.9), find(A, score=0.4)], [1, 0, 0]),
    "found five times": ([find(disk(20 + d, 20, 10), score=0.5 + d / 10) for d in range(5)], [1, 0, 0]),
    "found twice, a pixel apart, beside another": ([find(A), find(disk(21, 20, 10)), find(B)], [2, 0, 0]),
    "two labels claim it: the surer": ([find(A, 0, 0.4), find(A, 1, 0.6)], [0, 1, 0]),
    "two labels claim it: the surer, in the other order": ([find(A, 0, 0.6), find(A, 1, 0.4)], [1, 0, 0]),
    "three labels claim it": ([find(A, 0, 0.4), find(A, 1, 0.5), find(A, 2, 0.6)], [0, 0, 1]),
    "wrong class is not wanted class": ([find(A, 1), find(B, 1)], [0, 2, 0]),
    "touching": ([find(m) for m in ROW], [5, 0, 0]),
    "overlapping by a third": ([find(disk(40, 40, 15)), find(disk(56, 40, 15))], [2, 0, 0]),
    "one before the other": ([find(disk(40, 40, 15)), find(disk(55, 40, 15) & ~disk(40, 40, 15))], [2, 0, 0]),
    "boxes overlap, masks do not": ([find(block(0, 0, 90, 8)), find(block(0, 8, 8, 90))], [2, 0, 0]),
    "crossed, as boxes the same": ([find(np.abs(X - Y) < 3), find(np.abs(X + Y - GRID) < 3)], [2, 0, 0]),
    "group of two": ([find(A), find(B), find(A | B, score=0.9)], [2, 0, 0]),
    "group of four, least sure": ([find(A | B | C | D, score=0.2), *(find(m) for m in (A, B, C, D))], [4, 0, 0]),
    "group of touching ones": ([find(np.any(ROW, 0), score=0.8), *(find(m) for m in ROW)], [5, 0, 0]),
    "group with gaps filled": ([find(block(10, 50, 70, 70), score=0.8), find(C), find(D)], [2, 0, 0]),
    "group of groups": ([find(A), find(B), find(C), find(D), find(A | B), find(A | B | C | D)], [4, 0, 0]),
    "group found twice": (
        [find(A), find(B), find(A | B, score=0.9), find(A | B | block(30, 18, 50, 22), score=0.8)], [2, 0, 0],
    ),
    "group of unequal ones, surer than the large": (
        [find(BIG, score=0.4), find(disk(62, 40, 8), score=0.4), find(BIG | disk(62, 40, 8), score=0.9)], [2, 0, 0],
    ),
    "box around two, mask of one": ([find(A), find(B), find(A, box=(10, 10, 70, 30), score=0.9)], [2, 0, 0]),
    "box around two, empty mask": ([find(A), find(B), find(NOTHING, box=(5, 5, 75, 35), score=0.9)], [2, 0, 0]),
    "box around four, mask elsewhere": (
        [*(find(m) for m in (A, B, C, D)), find(disk(90, 90, 4), box=(8, 8, 74, 74), score=0.9)], [4, 0, 0],
    ),
    "group of another label stays out of this one": ([find(A), find(B), find(A | B, 1, 0.9)], [2, 1, 0]),
    "car with wheels": ([find(CAR | WHEELS, score=0.6), find(disk(25, 58, 5)), find(disk(70, 58, 5))], [1, 0, 0]),
    "car with wheels asked for": ([find(CAR | WHEELS), find(disk(25, 58, 5), 1), find(disk(70, 58, 5), 1)], [1, 2, 0]),
    "part surer than the whole": ([find(CAR, score=0.4), find(block(10, 30, 45, 60), score=0.8)], [1, 0, 0]),
    "part of a part": ([find(CAR), find(block(12, 32, 40, 58)), find(block(15, 35, 25, 50))], [1, 0, 0]),
    "part that sticks out a little": ([find(CAR), find(block(12, 27, 40, 57))], [1, 0, 0]),
    "ring around a disk": ([find(RING), find(disk(48, 48, 12))], [2, 0, 0]),
    "ring around two disks": ([find(RING), find(disk(38, 48, 8)), find(disk(60, 48, 8))], [3, 0, 0]),
    "duplicate inside a group": (
        [find(A), find(disk(20, 20, 9)), find(A | disk(22, 20, 10), score=0.9), find(B)], [2, 0, 0],
    ),
    "speck": ([find(A), find(disk(80.5, 80.5, 0.6))], [1, 0, 0]),
    "empty mask: its box counts": ([find(NOTHING, box=(10, 10, 30, 30))], [1, 0, 0]),
    "empty mask twice": ([find(NOTHING, box=(10, 10, 30, 30)), find(NOTHING, box=(11, 10, 31, 30))], [1, 0, 0]),
    "empty box and mask": ([find(NOTHING, box=(10, 10, 10, 10)), find(B)], [1, 0, 0]),
    "whole picture": ([find(block(0, 0, GRID, GRID))], [1, 0, 0]),
    "whole picture around one": ([find(block(0, 0, GRID, GRID), 1), find(A, 0)], [1, 1, 0]),
    "eighty-one small": (SMALL, [81, 0, 0]),
    "eighty-one small, each four times": (SMALL * 4, [81, 0, 0]),
    "eighty-one small, two labels by turns": (
        [find(f[1], i % 2, f[2]) for i, f in enumerate(SMALL)], [41, 40, 0],
    ),
    "eighty-one small, and rows of nine as groups": (
        [*SMALL, *(find(np.any([f[1] for f in SMALL[9 * i : 9 * i + 9]], 0)) for i in range(9))], [81, 0, 0],
    ),
    "hundreds of faint guesses at three": (
        [find(disk(x + d % 3, 40 + d // 30 % 3, 10), score=0.3 + d / 1e3) for d in range(100) for x in (20, 48, 76)],
        [3, 0, 0],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_counts_equal_the_hand_counted_truth_in_any_order(name):
    finds, expected = CASES[name]
    assert counts(finds) == expected
    for seed in range(5):
        assert counts([finds[i] for i in np.random.default_rng(seed).permutation(len(finds))]) == expected


def test_plain_detectors_mistakes_are_what_cleaning_mends():
    """Without the rules, most of the cases with duplicates, groups and parts are miscounted: the cases have teeth."""
    raw = {name: np.bincount([f[3] for f in finds], minlength=3).tolist() for name, (finds, _) in CASES.items()}
    assert sum(raw[name] != expected for name, (_, expected) in CASES.items()) >= 20
    for limits, broken in (
        ({"same": 1.0}, "two labels claim it: the surer"),
        ({"same": 0.1}, "overlapping by a third"),
        ({"inside": 1.0}, "part that sticks out a little"),
        ({"made_of": 1.0}, "group with gaps filled"),
        ({"made_of": 0.0}, "car with wheels"),
        ({"smallest": 0.0}, "speck"),
    ):
        assert counts(CASES[broken][0], **limits) != CASES[broken][1], broken


class Staged(Finder):
    """A finder that finds what it is told to, picture by picture."""

    def find(self, images, phrases, threshold):
        self.detector.append((len(images), phrases, threshold))
        return [gather(next(self.segmenter)) for _ in images]


def test_grounded_counts_are_minus_rss_and_zero_when_all_are_right():
    named = ("two labels", "group of four, least sure", "nothing", "wrong class is not wanted class")
    asked = []
    finder = Staged(asked, None, itertools.cycle(CASES[name][0] for name in named), None)
    reward = grounded_counts(finder, {"red apple": 2, "bottle": 1}, threshold=0.25, chunk=3)
    assert reward(pictures(4)).tolist() == [0, -(4 + 1), -(4 + 1), -(4 + 1)]
    assert asked == [(3, ["red apple", "bottle"], 0.25), (1, ["red apple", "bottle"], 0.25)]
    assert finder.count(pictures(4), ["red apple", "bottle"]).tolist() == [[2, 1], [4, 0], [0, 0], [0, 2]]


# ------------------------------------------------------------------------------------------------------- small models
def save_clip(root):
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": 40, "max_position_embeddings": 12, "bos_token_id": 0, "eos_token_id": 1}
    vision = {"image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=size | text, vision_config=size | vision, projection_dim=24)).save_pretrained(root)
    words = ["<|startoftext|>", "<|endoftext|>", "red</w>", "blue</w>", "circle</w>", "square</w>"]
    vocabulary = {word: index for index, word in enumerate([*words, *"abcdefghijklmnopqr"])}
    CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=12).save_pretrained(root)


def save_dino(root):
    """With BERT's special tokens where GroundingDINO expects them."""
    from transformers import (
        BertTokenizer,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        GroundingDinoImageProcessorPil,
    )

    config = GroundingDinoConfig(
        backbone_config={"model_type": "swin", "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 2],
                         "window_size": 4, "image_size": 64, "out_indices": [2, 3, 4]},
        text_config={"model_type": "bert", "vocab_size": 1040, "hidden_size": 32, "num_hidden_layers": 1,
                     "num_attention_heads": 2, "intermediate_size": 64},
        d_model=32, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
        encoder_attention_heads=2, decoder_attention_heads=2, num_queries=12, max_text_len=32,
        disable_custom_kernels=True, fusion_droppath=0.0, dropout=0.0,
    )  # fmt: skip
    GroundingDinoForObjectDetection(config).save_pretrained(root)
    special = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1012: ".", 1029: "?"}
    words = [special.get(i, f"[unused{i}]") for i in range(1030)] + ["red", "blue", "circle", "square", "small"]
    BertTokenizer(vocab={word: index for index, word in enumerate(words)}).save_pretrained(root)
    GroundingDinoImageProcessorPil(size={"shortest_edge": 96, "longest_edge": 144}).save_pretrained(root)


def save_sam(root):
    from transformers import SamConfig, SamImageProcessorPil, SamModel

    config = SamConfig(
        vision_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 64,
                       "patch_size": 8, "output_channels": 16, "num_pos_feats": 8,
                       "global_attn_indexes": [0], "window_size": 4},
        prompt_encoder_config={"hidden_size": 16, "image_size": 64, "patch_size": 8, "mask_input_channels": 4},
        mask_decoder_config={"hidden_size": 16, "mlp_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                             "iou_head_hidden_dim": 16, "iou_head_depth": 2},
    )  # fmt: skip
    SamModel(config).save_pretrained(root)
    SamImageProcessorPil(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64}).save_pretrained(root)


TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_vlm(root, kind="qwen2_vl", template=TEMPLATE, words=("Yes", "No")):
    """A Qwen-VL with a byte-level tokenizer in which `words` are tokens."""
    from tokenizers import AddedToken
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import AutoConfig, AutoModelForImageTextToText, Qwen2Tokenizer, Qwen2VLImageProcessorPil

    names = ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")
    special = [f"<|{name}|>" for name in names]
    merges = [(word[:i], word[i]) for word in words for i in range(1, len(word))]
    tokens = [*sorted(ByteLevel.alphabet()), *dict.fromkeys(a + b for a, b in merges), *special]
    vocab = {word: index for index, word in enumerate(tokens)}
    tokenizer = Qwen2Tokenizer(
        vocab=vocab, merges=merges, additional_special_tokens=[AddedToken(word, special=True) for word in special]
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(root)
    text = {"vocab_size": len(vocab), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
            "rope_scaling": {"rope_type": "default", "type": "mrope", "mrope_section": [2, 3, 3]}}  # fmt: skip
    vision = {"depth": 2, "num_heads": 2, "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2} | {
        "qwen2_vl": {"embed_dim": 32, "hidden_size": 32},
        "qwen2_5_vl": {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48,
                       "fullatt_block_indexes": [1], "window_size": 32},
        "qwen3_vl": {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48,
                     "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    }[kind]  # fmt: skip
    ids = {f"{name}_token_id": vocab[f"<|{name}|>"] for name in ("vision_start", "vision_end")}
    ids |= {f"{name}_token_id": vocab[f"<|{name}_pad|>"] for name in ("image", "video")}
    config = AutoConfig.for_model(kind, text_config=text, vision_config=vision, **ids)
    AutoModelForImageTextToText.from_config(config).save_pretrained(root)
    Qwen2VLImageProcessorPil(patch_size=8, size={"shortest_edge": 256, "longest_edge": 4096}).save_pretrained(root)
    return root


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Small random models of the real classes, saved as a hub's repository holds them."""
    root = tmp_path_factory.mktemp("judges")
    torch.manual_seed(0)
    for name, save in (("clip", save_clip), ("dino", save_dino), ("sam", save_sam)):
        save(root / name)
    torch.manual_seed(2)
    save_vlm(root / "vlm", "qwen3_vl")
    return root


def mlp(*widths):
    """Linear layers with dropout between them, as in the LAION predictor."""
    layers = [(nn.Linear(a, b), nn.Dropout(0.5)) for a, b in itertools.pairwise(widths)]
    return nn.Sequential(*itertools.chain(*layers))


# --------------------------------------------------------------------------------------------------------------- CLIP
def test_clip_scores_equal_the_models_own_answer(folder):
    """The oracle is transformers' whole CLIPModel.forward on its own preprocessing of the same 8-bit pictures."""
    from transformers import CLIPImageProcessorPil

    smooth = nn.functional.interpolate(pictures(5, 10, 14), (40, 56), mode="bilinear")
    images = smooth.mul(153).add(51).round() / 255  # far from 0 and 1, where bicubic overshoots would be cut
    clip = Clip.load(folder / "clip")
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    pixels = processor(to_pil(images), return_tensors="pt")["pixel_values"]
    assert (clip.pixels(images) - pixels).abs().max() < 2 / 255 / 0.26 + 1e-5  # two roundings to 8 bits, normalised
    with torch.no_grad():
        answer = clip.model(**clip.tokenizer("red circle", return_tensors="pt"), pixel_values=pixels)
    pick, score = judges.pick_score(clip, "red circle")(images), judges.clip_score(clip, "red circle")(images)
    torch.testing.assert_close(pick, answer.logits_per_image[:, 0], atol=0.02, rtol=0)
    cosine = answer.image_embeds @ answer.text_embeds[0]
    torch.testing.assert_close(score, 2.5 * cosine.clamp_min(0), atol=5e-3, rtol=0)
    assert (pick - judges.pick_score(clip, "blue square")(images)).abs().max() > 1e-3


def test_an_aesthetic_score_is_the_head_over_unit_vectors(folder):
    clip, images, head = Clip.load(folder / "clip"), pictures(5), mlp(24, 16, 8, 1)
    score = judges.aesthetic_score(clip, head, chunk=2)(images)
    vectors = clip.pictures(images)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(5))
    for layer in head[::2]:  # without dropout
        vectors = vectors @ layer.weight.T + layer.bias
    torch.testing.assert_close(score, vectors[:, 0])
    for widths in ((25, 1), (24, 8)):
        with pytest.raises(ValueError, match=r"must lead from vectors \(K, 24\) to \(K, 1\)"):
            judges.aesthetic_score(clip, mlp(*widths))


@pytest.mark.parametrize("kind", ["clip", "pick", "aesthetic"])
def test_clip_judges_are_differentiable_and_leave_the_weights_alone(folder, kind):
    """The gradient is the slope that finite differences see."""
    reward = build(kind, folder)
    images = pictures(2, seed=3).requires_grad_()
    reward(images).sum().backward()
    slope = float(images.grad.norm())
    assert slope > 0 and all(
        p.grad is None for p in load(Clip, folder / "clip", dtype=torch.float32, device="cpu").model.parameters()
    )
    step = 1e-2 * images.grad / slope
    with torch.no_grad():
        change = reward((images + step).clamp(0, 1)) - reward((images - step).clamp(0, 1))
    assert change.sum() == pytest.approx(2e-2 * slope, rel=0.2)
    assert not reward(images.detach()).requires_grad


# ----------------------------------------------------------------------------------------------------------- VQAScore
@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_vqa_score_is_the_probability_of_yes(kind, tmp_path):
    """The oracle is one picture at a time through the model, its prompt written out by hand."""
    torch.manual_seed(1)
    vlm = VisionLanguage.load(save_vlm(tmp_path, kind), dtype=torch.float32)
    images = pictures(5, 48, 32)
    score = judges.vqa_score(vlm, "a red circle", chunk=2)(images)
    text = (
        "<|im_start|>user\n<|vision_start|>" + "<|image_pad|>" * 6 + '<|vision_end|>Does this figure show "a red '
        'circle"? Please answer yes or no.<|im_end|>\n<|im_start|>assistant\n'
    )
    ids = vlm.tokenizer(text, return_tensors="pt").input_ids
    places = (ids == vlm.model.config.image_token_id).int()
    yes = vlm.tokenizer.convert_tokens_to_ids("Yes")
    for k, image in enumerate(to_pil(images)):
        seen = vlm.pictures(image, return_tensors="pt")
        assert seen["image_grid_thw"].tolist() == [[1, 6, 4]]
        with torch.no_grad():
            logits = vlm.model(input_ids=ids, mm_token_type_ids=places, **seen).logits[0, -1]
        torch.testing.assert_close(score[k], logits.softmax(-1)[yes])
    assert score.std() > 0 and (judges.vqa_score(vlm, "four blue squares")(images) - score).abs().max() > 1e-6


def test_a_yes_of_two_tokens_or_a_template_without_picture_is_refused(tmp_path):
    two = VisionLanguage.load(save_vlm(tmp_path / "two", words=("Ye", "No")), dtype=torch.float32)
    with pytest.raises(ValueError, match="'Yes' must be one token"):
        judges.vqa_score(two, "a red circle")
    blind = save_vlm(tmp_path / "blind", template="{{ messages[0].content[1].text }}")
    reward = judges.vqa_score(VisionLanguage.load(blind, dtype=torch.float32), "a red circle")
    with pytest.raises(ValueError, match="must place one picture"):
        reward(pictures(1))


def test_a_chat_template_in_a_file_of_its_own_is_found(tmp_path):
    (template,) = save_vlm(tmp_path).glob("chat_template*")
    template.unlink()
    with pytest.raises(FileNotFoundError, match="no chat template"):
        VisionLanguage.load(tmp_path)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    assert VisionLanguage.load(tmp_path).tokenizer.chat_template == TEMPLATE


def test_large_pictures_are_reduced(folder):
    vlm = VisionLanguage.load(folder / "vlm", dtype=torch.float32, max_pixels=48 * 48)
    seen = vlm.pictures(to_pil(pictures(1, 96, 96)), return_tensors="pt")
    assert seen["image_grid_thw"].tolist() == [[1, 6, 6]]
    assert judges.vqa_score(vlm, "a red circle")(pictures(1, 96, 96)).shape == (1,)


# ------------------------------------------------------------------------------------------------------------ finding
def test_finds_equal_the_detectors_own_postprocessing(folder):
    """Boxes and scores against transformers' own, for each phrase of several: all other words are taken out first."""
    finder, images, phrases = Finder.load(folder / "dino", folder / "sam"), pictures(3, 60, 90), ["Red circle", "blue "]
    found, processor = finder.find(images, phrases, threshold=0.0), finder.detector_processor
    inputs = processor(images=to_pil(images), text=["red circle. blue."] * 3, return_tensors="pt")
    theirs = []
    for words in (["red", "circle"], ["blue"]):
        with torch.no_grad():
            answer = finder.detector(**inputs)
        mine = torch.isin(inputs["input_ids"], torch.tensor(processor.tokenizer.convert_tokens_to_ids(words)))
        answer.logits[:, :, : mine.shape[1]].masked_fill_(~mine[:, None], -torch.inf)
        theirs.append(processor.post_process_grounded_object_detection(answer, inputs["input_ids"], -1.0))
    for k, mine in enumerate(found):
        scores = torch.stack([one[k]["scores"] for one in theirs])
        torch.testing.assert_close(mine.scores, scores.amax(0), atol=1e-5, rtol=1e-4)
        assert torch.equal(mine.labels, scores.argmax(0))
        torch.testing.assert_close(mine.boxes, theirs[0][k]["boxes"].clamp(0, 1), atol=1e-5, rtol=1e-4)
    assert {0, 1} == set(torch.cat([mine.labels for mine in found]).tolist())


@pytest.mark.parametrize("size", [(48, 96), (512, 384)])
def test_masks_equal_sams_own(folder, size):
    """Against SamModel and SamProcessor from picture to mask."""
    finder, images = Finder.load(folder / "dino", folder / "sam"), pictures(2, *size)
    found, processor = finder.find(images, ["red circle", "blue square"], threshold=0.0), finder.segmenter_processor
    for image, mine in zip(to_pil(images), found, strict=True):
        corners = (mine.boxes * torch.tensor([size[1], size[0]] * 2)).tolist()
        inputs = processor(image, input_boxes=[corners], return_tensors="pt")
        with torch.no_grad():
            drawn = finder.segmenter(
                pixel_values=inputs["pixel_values"], input_boxes=inputs["input_boxes"].float(), multimask_output=False
            ).pred_masks
        (logits,) = processor.post_process_masks(drawn, [(256, 256)], inputs["reshaped_input_sizes"], binarize=False)
        differ = mine.masks != (logits[:, 0] > 0)
        assert mine.masks.shape == (12, 256, 256) and mine.masks.any() and not mine.masks.all()
        assert (logits[:, 0][differ].abs() < 1e-3).all()  # rounding of the boxes' corners only


@pytest.mark.parametrize(
    ("phrases", "message"),
    [
        ([], "one kind of thing each"),
        (["red", " "], "one kind of thing each"),
        (["red. blue"], "one kind of thing each"),
        (["small red square"] * 12, "of which the model reads 32"),
    ],
)
def test_phrases_that_cannot_be_looked_for_are_refused(folder, phrases, message):
    with pytest.raises(ValueError, match=message):
        Finder.load(folder / "dino", folder / "sam").find(pictures(1), phrases)


def test_a_picture_in_which_nothing_is_found_counts_zero(folder):
    finder = Finder.load(folder / "dino", folder / "sam")
    reward = grounded_counts(finder, {"red circle": 2, "blue square": 1}, threshold=1.0)
    assert reward(pictures(2)).tolist() == [-5, -5]


# --------------------------------------------------------------------------------------------------------- all judges
@cache
def load(model, *folders, **how):
    return model.load(*folders, **how)


def build(kind, folder, dtype=torch.float32, device="cpu", **options):
    """A judge of this kind on the small models."""
    how = {"dtype": dtype, "device": device}
    if kind == "vqa":
        return judges.vqa_score(load(VisionLanguage, folder / "vlm", **how), "a red circle", **options)
    if kind == "counts":
        finder = load(Finder, folder / "dino", folder / "sam", **how)
        return grounded_counts(finder, {"red circle": 1, "blue square": 1}, threshold=0.4, **options)
    clip = load(Clip, folder / "clip", **how)
    if kind == "aesthetic":
        torch.manual_seed(3)
        return judges.aesthetic_score(clip, mlp(24, 1), **options)
    return {"clip": judges.clip_score, "pick": judges.pick_score}[kind](clip, "red circle", **options)


KINDS = pytest.mark.parametrize("kind", ["clip", "pick", "aesthetic", "vqa", "counts"])


@KINDS
def test_a_judge_is_a_reward_whatever_the_chunks(folder, kind):
    """One finite number a row, in the same order, and no row influences another."""
    reward, images = build(kind, folder), pictures(5)
    values = reward(images)
    assert values.shape == (5,) and values.dtype == torch.float32 and values.isfinite().all()
    torch.testing.assert_close(build(kind, folder, chunk=2)(images), values, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(reward(images.flip(0)).flip(0), values, atol=1e-5, rtol=1e-4)


@KINDS
def test_half_precision_gives_about_the_same(folder, kind):
    full, half = (build(kind, folder, dtype)(pictures(3)) for dtype in (torch.float32, torch.bfloat16))
    assert half.dtype == torch.float32 and half.isfinite().all()
    if kind != "counts":  # masks that differ by a cell may be one object or two
        torch.testing.assert_close(half, full, atol=0.05 * float(full.abs().max()), rtol=0)


@KINDS
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_about_the_same(folder, kind):
    images = pictures(3)
    expected, answer = build(kind, folder)(images), build(kind, folder, device="cuda")(images.cuda())
    assert answer.device.type == "cuda"
    torch.testing.assert_close(answer.cpu(), expected, atol=0.02 * float(expected.abs().max()), rtol=0)


@KINDS
def test_pictures_that_are_none_and_chunks_of_none_are_refused(folder, kind):
    reward = build(kind, folder)
    for images, message in (
        (pictures(2) * 2 - 1, "must lie in"),
        (pictures(2) * 255, "must lie in"),
        (torch.full((1, 3, 48, 48), torch.nan), "must lie in"),
        (pictures(2).index_fill(3, torch.tensor([7]), torch.nan), "must lie in"),
        (pictures(2)[:0], "floats of shape"),
        (pictures(2)[0], "floats of shape"),
        (pictures(2)[:, :1], "floats of shape"),
        (pictures(2).mul(255).byte(), "floats of shape"),
    ):
        with pytest.raises(ValueError, match=message):
            reward(images)
    for chunk in (0, -1):
        with pytest.raises(ValueError, match="chunk must be at least 1"):
            build(kind, folder, chunk=chunk)


def test_to_pil_keeps_every_pixel():
    images = pictures(3, 5, 7).mul(255).round() / 255
    back = torch.stack([torch.from_numpy(np.array(image)) for image in to_pil(images)]).permute(0, 3, 1, 2) / 255
    assert torch.equal(back, images)


# ------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: clean(gather([]), same=1.5), "shares lie in"),
        (lambda: grounded_counts(None, {}), "how many of each phrase"),
        (lambda: grounded_counts(None, {"apple": -1}), "how many of each phrase"),
        (lambda: Clip.load("anything", device="gpu"), "no such device"),
        (lambda: Clip.load("anything", device="meta"), "no such device"),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_model_out_of_reach_is_named(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match=r"nobody/nothing cannot be reached \(HF_HUB_OFFLINE is set\)"):
        Clip.load("nobody/nothing")
    with pytest.raises(FileNotFoundError, match=r"no model .+nowhere"):
        Clip.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is a 'clip'; models of these kinds can be asked: qwen2_vl"):
        VisionLanguage.load(folder / "clip")


def test_a_licence_not_accepted_is_said(monkeypatch):
    """transformers wraps what the hub's client raises."""

    class Gated:
        @classmethod
        def from_pretrained(cls, name, **_):
            try:
                raise GatedRepoError("403", response=httpx.Response(403, request=httpx.Request("GET", "https://a.b")))
            except GatedRepoError as error:
                raise OSError("You are trying to access a gated repo.") from error

    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(PermissionError, match=r"accept its licence: log in at https://huggingface.co/some/model"):
        pretrained(Gated, "some/model")


def test_weights_that_are_pickles_are_refused(tmp_path, folder):
    for path in (folder / "clip").iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(FileNotFoundError, match="lacks safetensors weights"):
        Clip.load(tmp_path)


def test_importing_the_judges_loads_no_model_library():
    code = "import sys, flowscale_lite.judges; print({'diffusers', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
