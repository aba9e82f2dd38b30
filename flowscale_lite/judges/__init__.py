"""Real reward models, all of them from transformers.

| judge             | model                     | trusted for                                             | gradient |
|-------------------|---------------------------|---------------------------------------------------------|----------|
| `grounded_counts` | GroundingDINO and SAM     | how many there are of each kind of object               | no       |
| `vqa_score`       | Qwen-VL                   | whether the picture shows what the prompt says          | no       |
| `clip_score`      | CLIP                      | whether picture and prompt are about the same thing     | yes      |
| `pick_score`      | CLIP-H trained on choices | which picture people prefer; to check gains of a search | yes      |
| `aesthetic_score` | CLIP and a linear head    | whether the picture looks good, whatever the prompt     | yes      |

A model (`Finder`, `VisionLanguage`, `Clip`) is loaded once, as safetensors, from a folder or from the hub. A judge
binds it to a prompt, and is a Reward: pictures (K, 3, H, W) in [0, 1] -> (K,), computed for `chunk` pictures at a time.
`weighted` and `lexicographic` make one reward of several. transformers is imported when a model is loaded; torchvision
is not needed. A judge of your own needs no place here: any such function is a Reward. One that others should find is a
new file of this folder, and a name in `cli.job.named_reward` if the command shall know it.
"""

from .clip import Clip, aesthetic_score, clip_score, linear_head, pick_score
from .combined import lexicographic, weighted
from .counts import Finder, Found, clean, grounded_counts
from .vqa import VisionLanguage, vqa_score
