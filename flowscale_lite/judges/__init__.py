"""Real reward models, all of them from transformers: counts, VQAScore, CLIPScore, aesthetics, PickScore.

A model is loaded once (`Finder`, `VisionLanguage`, `Clip`); a judge binds it to a prompt, and is a Reward: pictures
(K, 3, H, W) in [0, 1] -> (K,), `chunk` pictures at a time. Nothing here needs torchvision; transformers is imported by
the loaders only. Weights come as safetensors, from a folder or from the hub.

The judges that rest on CLIP can be differentiated with respect to the pictures. The others see 8-bit pictures, and
count or answer; they give no gradient.
"""

from .clip import CLIPS, Aesthetic, Clip, CLIPScore, PickScore, aesthetic_head
from .counts import Cleaning, Finder, Found, GroundedCounts, clean
from .pictures import check_pictures, to_pil
from .vqa import VLMS, VisionLanguage, VQAScore

__all__ = [
    "CLIPS",
    "VLMS",
    "Aesthetic",
    "CLIPScore",
    "Cleaning",
    "Clip",
    "Finder",
    "Found",
    "GroundedCounts",
    "PickScore",
    "VQAScore",
    "VisionLanguage",
    "aesthetic_head",
    "check_pictures",
    "clean",
    "to_pil",
]
