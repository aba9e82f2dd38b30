"""Judges: counting equals hand-counted truth; every reward runs on a small random model of its real class."""

import copy
import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from flowscale_lite import judges
from flowscale_lite.judges import Cleaning, Clip, Found, GroundedCounts, clean

GRID = 96


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(number, height=48, width=48, seed=0):
    return torch.rand(number, 3, height, width, generator=seeded(seed))


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


def counts(finds, labels=3, rules=None):
    found = clean(gather(finds), rules or Cleaning())
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


def test_there_are_at_least_thirty_cases():
    assert len(CASES) >= 30


@pytest.mark.parametrize("name", CASES)
def test_counts_equal_the_hand_counted_truth(name):
    finds, expected = CASES[name]
    assert counts(finds) == expected


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_finds_does_not_matter(seed):
    rng = np.random.default_rng(seed)
    for name, (finds, expected) in CASES.items():
        if len(finds) < 20:
            assert counts([finds[i] for i in rng.permutation(len(finds))]) == expected, name


def test_plain_detectors_mistakes_are_what_cleaning_mends():
    """Without the rules, most of the cases with duplicates, groups and parts are miscounted: the cases have teeth."""
    raw = {name: np.bincount([f[3] for f in finds], minlength=3).tolist() for name, (finds, _) in CASES.items()}
    wrong = [name for name, (_, expected) in CASES.items() if raw[name] != expected]
    assert len(wrong) >= 20
    for rules, broken in (
        (Cleaning(same=1.0), "two labels claim it: the surer"),
        (Cleaning(same=0.1), "overlapping by a third"),
        (Cleaning(made_of=1.0), "group with gaps filled"),
        (Cleaning(made_of=0.0), "car with wheels"),
        (Cleaning(smallest=0.0), "speck"),
    ):
        assert counts(CASES[broken][0], rules=rules) != CASES[broken][1], broken


def test_rules_outside_their_range_are_refused():
    with pytest.raises(ValueError, match="shares lie in"):
        Cleaning(same=1.5)


class Staged:
    """A finder that finds what it is told to."""

    def __init__(self, *finds):
        self.finds, self.asked = [gather(f) for f in finds], []

    def find(self, images, phrases, threshold):
        self.asked.append((len(images), phrases, threshold))
        start = sum(k for k, _, _ in self.asked[:-1])
        return self.finds[start : start + len(images)]


def test_grounded_counts_are_minus_rss_and_exact_when_all_are_right():
    finder = Staged(
        CASES["two labels"][0], CASES["group of four, least sure"][0], [], CASES["wrong class is not wanted class"][0]
    )
    judge = GroundedCounts(finder, {"red apple": 2, "bottle": 1}, threshold=0.25, chunk=3)
    assert judge(pictures(4)).tolist() == [0, -(4 + 1), -(4 + 1), -(4 + 1)]
    assert finder.asked == [(3, ["red apple", "bottle"], 0.25), (1, ["red apple", "bottle"], 0.25)]
    finder.asked.clear()
    assert judge.exact(pictures(4)).tolist() == [True, False, False, False]
    finder.asked.clear()
    assert judge.counts(pictures(4)).tolist() == [[2, 1], [4, 0], [0, 0], [0, 2]]
    for target in ({}, {"apple": -1}):
        with pytest.raises(ValueError, match="how many of each phrase"):
            GroundedCounts(finder, target)


# ------------------------------------------------------------------------------------------------------- small models
def bert_vocabulary():
    """BERT's special tokens where GroundingDINO expects them (0, 100 to 103, full stop 1012, question mark 1029)."""
    words = [f"[unused{i}]" for i in range(1030)]
    for index, word in (
        (0, "[PAD]"),
        (100, "[UNK]"),
        (101, "[CLS]"),
        (102, "[SEP]"),
        (103, "[MASK]"),
        (1012, "."),
        (1029, "?"),
    ):
        words[index] = word
    return [*words, "red", "blue", "circle", "square", "small"]  # fmt: skip


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Small random models of the real classes, saved as a hub's repository holds them."""
    from transformers import (
        BertTokenizer,
        CLIPConfig,
        CLIPModel,
        CLIPTokenizer,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        GroundingDinoImageProcessorPil,
        SamConfig,
        SamImageProcessorPil,
        SamModel,
    )

    root = tmp_path_factory.mktemp("judges")
    torch.manual_seed(0)
    clip = CLIPConfig(
        text_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                     "vocab_size": 40, "max_position_embeddings": 12, "bos_token_id": 0, "eos_token_id": 1},
        vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                       "image_size": 32, "patch_size": 8},
        projection_dim=24,
    )  # fmt: skip
    CLIPModel(clip).save_pretrained(root / "clip")
    words = [
        "<|startoftext|>",
        "<|endoftext|>",
        *(f"{w}</w>" for w in ("red", "blue", "circle", "square")),
        *"abcdefghijklmnopqr",
    ]
    CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=12).save_pretrained(
        root / "clip"
    )
    dino = GroundingDinoConfig(
        backbone_config={"model_type": "swin", "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 2],
                         "window_size": 4, "image_size": 64, "out_indices": [2, 3, 4]},
        text_config={"model_type": "bert", "vocab_size": 1040, "hidden_size": 32, "num_hidden_layers": 1,
                     "num_attention_heads": 2, "intermediate_size": 64},
        d_model=32, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
        encoder_attention_heads=2, decoder_attention_heads=2, num_queries=12, max_text_len=32,
        disable_custom_kernels=True, fusion_droppath=0.0, dropout=0.0,
    )  # fmt: skip
    GroundingDinoForObjectDetection(dino).save_pretrained(root / "dino")
    BertTokenizer(vocab={w: i for i, w in enumerate(bert_vocabulary())}).save_pretrained(root / "dino")
    GroundingDinoImageProcessorPil(size={"shortest_edge": 96, "longest_edge": 144}).save_pretrained(root / "dino")
    sam = SamConfig(
        vision_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 64,
                       "patch_size": 8, "output_channels": 16, "num_pos_feats": 8,
                       "global_attn_indexes": [0], "window_size": 4},
        prompt_encoder_config={"hidden_size": 16, "image_size": 64, "patch_size": 8, "mask_input_channels": 4},
        mask_decoder_config={"hidden_size": 16, "mlp_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                             "iou_head_hidden_dim": 16, "iou_head_depth": 2},
    )  # fmt: skip
    SamModel(sam).save_pretrained(root / "sam")
    SamImageProcessorPil(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64}).save_pretrained(root / "sam")
    return root


TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_vlm(kind, root, template=TEMPLATE, words=("Yes", "No")):
    """A small random model of a Qwen-VL class, with a byte-level tokenizer in which `words` are tokens."""
    from tokenizers import AddedToken
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import AutoConfig, AutoModelForImageTextToText, Qwen2Tokenizer, Qwen2VLImageProcessorPil

    special = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
        "<|video_pad|>",
    ]
    letters, merges = sorted(ByteLevel.alphabet()), []
    for word in words:
        merges += [(word[:i], word[i]) for i in range(1, len(word))]
    vocab = {w: i for i, w in enumerate([*letters, *dict.fromkeys(a + b for a, b in merges), *special])}
    tokenizer = Qwen2Tokenizer(
        vocab=vocab, merges=merges, additional_special_tokens=[AddedToken(w, special=True) for w in special]
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(root)
    text = {"vocab_size": len(vocab), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
            "rope_scaling": {"rope_type": "default", "type": "mrope", "mrope_section": [2, 3, 3]}}  # fmt: skip
    vision = {"depth": 2, "num_heads": 2, "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2} | (
        {"embed_dim": 32, "hidden_size": 32} if kind == "qwen2_vl" else
        {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48} | (
            {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]} if kind == "qwen3_vl" else
            {"fullatt_block_indexes": [1], "window_size": 32})
    )  # fmt: skip
    ids = {name: vocab[f"<|{name}|>"] for name in ("vision_start", "vision_end", "image_pad", "video_pad")}
    config = AutoConfig.for_model(
        kind, text_config=text, vision_config=vision, image_token_id=ids["image_pad"], video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"], vision_end_token_id=ids["vision_end"],
    )  # fmt: skip
    AutoModelForImageTextToText.from_config(config).save_pretrained(root)
    Qwen2VLImageProcessorPil(patch_size=8, size={"shortest_edge": 256, "longest_edge": 4096}).save_pretrained(root)
    return root


# --------------------------------------------------------------------------------------------------------------- CLIP
def test_clip_score_equals_the_models_own_answer(folder):
    """The oracle is transformers' whole CLIPModel.forward on its own preprocessing of the same 8-bit pictures."""
    from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

    smooth = nn.functional.interpolate(pictures(5, 10, 14), (40, 56), mode="bilinear")
    images = smooth.mul(153).add(51).round() / 255  # far from 0 and 1, where bicubic overshoots would be cut
    clip = Clip.load(folder / "clip")
    model, tokenizer = CLIPModel.from_pretrained(folder / "clip").eval(), AutoTokenizer.from_pretrained(folder / "clip")
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    pixels = processor(judges.to_pil(images), return_tensors="pt")["pixel_values"]
    assert (clip.pixels(images) - pixels).abs().max() < 2 / 255 / 0.26 + 1e-5  # two roundings to 8 bits, normalised
    with torch.no_grad():
        answer = model(**tokenizer("red circle", return_tensors="pt"), pixel_values=pixels)
    score, pick = judges.CLIPScore(clip, "red circle", chunk=2)(images), judges.PickScore(clip, "red circle")(images)
    torch.testing.assert_close(pick, answer.logits_per_image[:, 0], atol=0.02, rtol=0)
    torch.testing.assert_close(
        score, 2.5 * (answer.image_embeds @ answer.text_embeds[0]).clamp_min(0), atol=5e-3, rtol=0
    )
    assert (pick - judges.PickScore(clip, "blue square")(images)).abs().max() > 1e-3


def test_clip_judges_are_differentiable_and_leave_the_weights_alone(folder):
    clip = Clip.load(folder / "clip")
    judge = judges.PickScore(clip, "red circle")
    images = pictures(2, seed=3).requires_grad_()
    judge(images).sum().backward()
    assert images.grad.abs().max() > 0 and all(p.grad is None for p in clip.model.parameters())
    step, direction = 1e-2, images.grad / images.grad.norm()
    with torch.no_grad():
        change = judge((images + step * direction).clamp(0, 1)) - judge((images - step * direction).clamp(0, 1))
    assert change.sum() == pytest.approx(2 * step * float(images.grad.norm()), rel=0.2)
    assert not judge(images.detach()).requires_grad


def save_head(path, widths, prefix="layers.", numbers=None):
    from safetensors.torch import save_file

    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    numbers = numbers or range(len(layers))
    save_file(
        {
            f"{prefix}{n}.{k}": v
            for n, layer in zip(numbers, layers, strict=True)
            for k, v in layer.state_dict().items()
        },
        path,
    )
    return nn.Sequential(*layers)


def test_aesthetic_score_is_the_head_over_unit_vectors(folder, tmp_path):
    clip = Clip.load(folder / "clip")
    expected = save_head(
        tmp_path / "mlp.safetensors", (24, 16, 8, 8, 4, 1), numbers=(0, 2, 4, 6, 10)
    )  # dropout between
    judge = judges.Aesthetic(clip, judges.aesthetic_head(tmp_path / "mlp.safetensors", clip), chunk=2)
    images = pictures(5)
    vectors = clip.pictures(images)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(judge(images), expected(vectors)[:, 0])
    images.requires_grad_()
    judge(images).sum().backward()
    assert images.grad.abs().max() > 0
    single = save_head(tmp_path / "linear.safetensors", (24, 1), prefix="")
    judge = judges.Aesthetic(clip, judges.aesthetic_head(tmp_path / "linear.safetensors", clip))
    torch.testing.assert_close(judge(images), single(vectors)[:, 0])


def test_heads_that_do_not_fit_are_refused(folder, tmp_path):
    clip = Clip.load(folder / "clip")
    with pytest.raises(FileNotFoundError, match="no file"):
        judges.aesthetic_head(tmp_path / "none.safetensors", clip)
    (tmp_path / "pickle.pth").write_bytes(b"\x80\x04\x95nothing of the kind")
    with pytest.raises(ValueError, match="no safetensors file; pickles are not loaded"):
        judges.aesthetic_head(tmp_path / "pickle.pth", clip)
    for widths in ((25, 1), (24, 8), (24, 8, 2)):
        save_head(tmp_path / "bad.safetensors", widths)
        with pytest.raises(ValueError, match="no chain of linear layers from 24 numbers to one"):
            judges.aesthetic_head(tmp_path / "bad.safetensors", clip)


# ----------------------------------------------------------------------------------------------------------- VQAScore
@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_vqa_score_is_the_probability_of_yes(kind, tmp_path):
    """The oracle is one picture at a time through the model, its prompt written out by hand."""
    torch.manual_seed(1)
    vlm = judges.VisionLanguage.load(build_vlm(kind, tmp_path), dtype=torch.float32)
    images = pictures(5, 48, 32)
    score = judges.VQAScore(vlm, "a red circle", chunk=2)(images)
    text = (
        "<|im_start|>user\n<|vision_start|>" + "<|image_pad|>" * 6 + '<|vision_end|>Does this figure show "a red '
        'circle"? Please answer yes or no.<|im_end|>\n<|im_start|>assistant\n'
    )
    ids = vlm.tokenizer(text, return_tensors="pt").input_ids
    for image, value in zip(images, score, strict=True):
        seen = vlm.pictures(judges.to_pil(image[None]), return_tensors="pt")
        assert seen["image_grid_thw"].tolist() == [[1, 6, 4]]
        with torch.no_grad():
            logits = vlm.model(
                input_ids=ids, mm_token_type_ids=(ids == vlm.model.config.image_token_id).int(), **seen
            ).logits
        yes, no = (vlm.tokenizer.convert_tokens_to_ids(word) for word in ("Yes", "No"))
        torch.testing.assert_close(value, logits[0, -1].softmax(-1)[yes])
        ratio = judges.VQAScore(vlm, "a red circle", against_no=True)(image[None])[0]
        torch.testing.assert_close(ratio, logits[0, -1, [yes, no]].softmax(-1)[0])
    assert score.std() > 0 and (judges.VQAScore(vlm, "four blue squares")(images) - score).abs().max() > 1e-6


def test_a_yes_of_two_tokens_or_a_template_without_picture_is_refused(tmp_path):
    two = judges.VisionLanguage.load(build_vlm("qwen2_vl", tmp_path / "two", words=("Ye", "No")), dtype=torch.float32)
    with pytest.raises(ValueError, match="'Yes' must be one token"):
        judges.VQAScore(two, "a red circle")
    blind = build_vlm("qwen2_vl", tmp_path / "blind", template="{{ messages[0].content[1].text }}")
    judge = judges.VQAScore(judges.VisionLanguage.load(blind, dtype=torch.float32), "a red circle")
    with pytest.raises(ValueError, match="must place one picture"):
        judge(pictures(1))


def test_a_chat_template_in_a_file_of_its_own_is_found(tmp_path):
    root = build_vlm("qwen2_vl", tmp_path)
    templates = [path for path in root.iterdir() if path.name.startswith("chat_template")]
    assert templates
    for path in templates:
        path.unlink()
    with pytest.raises(FileNotFoundError, match="no chat template"):
        judges.VisionLanguage.load(root)
    (root / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    assert judges.VisionLanguage.load(root).tokenizer.chat_template == TEMPLATE


def test_large_pictures_are_reduced(tmp_path):
    vlm = judges.VisionLanguage.load(build_vlm("qwen2_vl", tmp_path), dtype=torch.float32, max_pixels=48 * 48)
    seen = vlm.pictures(judges.to_pil(pictures(1, 96, 96)), return_tensors="pt")
    assert seen["image_grid_thw"].tolist() == [[1, 6, 6]]
    assert judges.VQAScore(vlm, "a red circle")(pictures(1, 96, 96)).shape == (1,)


# ------------------------------------------------------------------------------------------------------------ finding
def test_finds_equal_the_detectors_own_postprocessing(folder):
    """Boxes and scores against transformers' GroundingDinoProcessor, for one phrase, where the two mean the same."""
    from transformers import AutoTokenizer, GroundingDinoProcessor

    finder = judges.Finder.load(folder / "dino", folder / "sam")
    images = pictures(3, 60, 90)
    found = finder.find(images, ["red circle"], threshold=0.0)
    processor = GroundingDinoProcessor(finder.pictures, AutoTokenizer.from_pretrained(folder / "dino"))
    inputs = processor(images=judges.to_pil(images), text=["red circle."] * 3, return_tensors="pt")
    with torch.no_grad():
        answer = finder.detector(**inputs)
    # the processor's score takes the special tokens and the full stop in; leave them out of the answer first
    words = torch.isin(inputs["input_ids"], torch.tensor([1030, 1032]))
    answer.logits[:, :, : words.shape[1]].masked_fill_(~words[:, None], -torch.inf)
    theirs = processor.post_process_grounded_object_detection(
        answer, inputs["input_ids"], 0.0, target_sizes=[(60, 90)] * 3
    )
    for mine, other in zip(found, theirs, strict=True):
        assert len(mine) == 12 and set(mine.labels.tolist()) == {0}
        torch.testing.assert_close(mine.scores, other["scores"], atol=1e-5, rtol=1e-4)
        boxes = other["boxes"] / torch.tensor([90.0, 60, 90, 60])
        torch.testing.assert_close(mine.boxes, boxes.clamp(0, 1), atol=1e-5, rtol=1e-4)


def test_masks_equal_sams_own(folder):
    """Against SamModel and SamProcessor from picture to mask, at the resolution of its mask logits."""
    from transformers import SamProcessor

    finder = judges.Finder.load(folder / "dino", folder / "sam")
    images = pictures(2, 48, 96)
    found = finder.find(images, ["red circle", "blue square"], threshold=0.0)
    processor = SamProcessor(finder.segmenter_pictures)
    for image, mine in zip(images, found, strict=True):
        corners = (mine.boxes * torch.tensor([96.0, 48, 96, 48])).tolist()
        inputs = processor(judges.to_pil(image[None]), input_boxes=[corners], return_tensors="pt")
        inputs = {k: v.float() if k == "input_boxes" else v for k, v in inputs.items()}
        with torch.no_grad():
            masks = finder.segmenter(
                pixel_values=inputs["pixel_values"], input_boxes=inputs["input_boxes"], multimask_output=False
            ).pred_masks[0, :, 0]
        assert mine.masks.shape == (12, 16, 32)
        differ = mine.masks != (masks[:, :16] > 0)
        assert (masks[:, :16][differ].abs() < 1e-3).all()  # rounding of the boxes' corners only


def test_a_phrase_scores_by_its_own_words_only(folder):
    finder = judges.Finder.load(folder / "dino", folder / "sam")
    ids, spans = finder._text(["Red circle", "blue square ", "small red square"])
    words = [finder.tokenizer.convert_ids_to_tokens(ids[0, span].tolist()) for span in spans]
    assert words == [["red", "circle"], ["blue", "square"], ["small", "red", "square"]]
    for phrases in ([], ["red", " "], ["red. blue"]):
        with pytest.raises(ValueError, match="one kind of thing each"):
            finder.find(pictures(1), phrases)
    with pytest.raises(ValueError, match="of which the model reads 32"):
        finder.find(pictures(1), ["small red square"] * 12)


def test_a_picture_in_which_nothing_is_found_counts_zero(folder):
    finder = judges.Finder.load(folder / "dino", folder / "sam")
    judge = GroundedCounts(finder, {"red circle": 2, "blue square": 1}, threshold=1.0)
    assert judge.counts(pictures(2)).tolist() == [[0, 0], [0, 0]] and judge(pictures(2)).tolist() == [-5, -5]


# --------------------------------------------------------------------------------------------------------- all judges
@pytest.fixture(scope="session")
def every(folder, tmp_path_factory):
    """One judge of each kind, by precision; loaded once."""
    root = tmp_path_factory.mktemp("vlm")
    torch.manual_seed(2)
    build_vlm("qwen3_vl", root)
    save_head(folder / "head.safetensors", (24, 1))

    def load(dtype):
        clip, finder = (
            Clip.load(folder / "clip", dtype=dtype),
            judges.Finder.load(folder / "dino", folder / "sam", dtype=dtype),
        )
        return {
            "clip": judges.CLIPScore(clip, "red circle"),
            "pick": judges.PickScore(clip, "red circle"),
            "aesthetic": judges.Aesthetic(clip, judges.aesthetic_head(folder / "head.safetensors", clip)),
            "vqa": judges.VQAScore(judges.VisionLanguage.load(root, dtype=dtype), "a red circle"),
            "counts": GroundedCounts(finder, {"red circle": 1, "blue square": 1}, threshold=0.4),
        }

    return {dtype: load(dtype) for dtype in (torch.float32, torch.bfloat16)}


KINDS = ("clip", "pick", "aesthetic", "vqa", "counts")


@pytest.mark.parametrize("kind", KINDS)
def test_a_judge_is_a_reward_whatever_the_chunks(every, kind):
    """One finite number a row, in the same order, and no row influences another."""
    judge, images = every[torch.float32][kind], pictures(5)
    values = judge(images)
    assert values.shape == (5,) and values.dtype == torch.float32 and values.isfinite().all()
    torch.testing.assert_close(replace(judge, chunk=2)(images), values, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(judge(images.flip(0)).flip(0), values, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_gives_about_the_same(every, kind):
    images = pictures(3)
    full, half = (every[dtype][kind](images) for dtype in (torch.float32, torch.bfloat16))
    assert half.dtype == torch.float32 and half.isfinite().all()
    if kind != "counts":  # masks that differ by a cell may be one object or two
        torch.testing.assert_close(half, full, atol=0.05 * float(full.abs().max()), rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_about_the_same(every, kind):
    images = pictures(3)
    expected = every[torch.float32][kind](images)
    moved = copy.deepcopy(every[torch.float32][kind])
    vars(moved).pop("_text", None)  # computed on the CPU
    for value in vars(moved).values():
        for part in [value, *(vars(value).values() if hasattr(value, "__dict__") else ())]:
            if isinstance(part, nn.Module):
                part.to("cuda")
    answer = moved(images.cuda())
    assert answer.device.type == "cuda"
    torch.testing.assert_close(answer.cpu(), expected, atol=0.02 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_that_are_none_are_refused(every, kind):
    judge = every[torch.float32][kind]
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
            judge(images)


@pytest.mark.parametrize("kind", KINDS)
def test_a_chunk_of_no_pictures_is_refused_before_any_are_judged(every, kind):
    for chunk in (0, -1):
        with pytest.raises(ValueError, match="chunk must be at least 1"):
            replace(every[torch.float32][kind], chunk=chunk)


def test_to_pil_keeps_every_pixel():
    images = pictures(3, 5, 7).mul(255).round() / 255
    back = torch.stack([torch.from_numpy(np.array(image)) for image in judges.to_pil(images)]).permute(0, 3, 1, 2) / 255
    assert torch.equal(back, images)


# ------------------------------------------------------------------------------------------------------------- errors
def test_a_model_out_of_reach_is_named(tmp_path, folder, monkeypatch):
    import huggingface_hub.constants
    import transformers.utils.hub

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(transformers.utils.hub, "is_offline_mode", lambda: True, raising=False)
    with pytest.raises(FileNotFoundError, match=r"no CLIPModel 'nobody/nothing'.*HF_HUB_OFFLINE is set"):
        Clip.load("nobody/nothing")
    with pytest.raises(FileNotFoundError, match="no CLIPModel"):
        Clip.load(tmp_path)
    with pytest.raises(ValueError, match="is a 'clip'; models of these kinds can be asked: qwen2_vl"):
        judges.VisionLanguage.load(folder / "clip")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA GPU"):
            Clip.load(folder / "clip", device="cuda")
    for device in ("gpu", "meta"):
        with pytest.raises(ValueError, match="no such device"):
            Clip.load(folder / "clip", device=device)


def test_a_licence_not_accepted_is_said():
    class GatedRepoError(OSError):
        pass

    class Gated:
        @classmethod
        def from_pretrained(cls, name, **_):
            try:
                raise GatedRepoError("403")
            except GatedRepoError as error:
                raise OSError("You are trying to access a gated repo.") from error

    with pytest.raises(
        PermissionError, match=r"accept a licence: do so on https://huggingface.co/some/model.*HF_TOKEN"
    ):
        judges.pictures.pretrained(Gated, "some/model")


def test_weights_that_are_pickles_are_refused(tmp_path, folder):
    for path in (folder / "clip").iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(FileNotFoundError, match=r"no safetensors weights|no CLIPModel"):
        Clip.load(tmp_path)
