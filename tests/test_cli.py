"""The command: what it writes, and what it refuses before it computes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matplotlib import pyplot as plt
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Generator

from flowscale_lite import beyond, cli, judges, methods, plots
from flowscale_lite.tiny import counter, shapes
from flowscale_lite.tiny.data import locate

PROMPT = "three red circles and two blue squares"


def flowscale(capsys, *args: str) -> tuple[str, str]:
    cli.main([*args])
    out, err = capsys.readouterr()
    doing = ("flowscale: loading", "flowscale: drawing", "flowscale: searching")
    return out, "".join(line for line in err.splitlines(keepends=True) if not line.startswith(doing))


def test_picture_table_and_account_agree(capsys, tmp_path):
    out, _ = flowscale(capsys, PROMPT, "--nfe", "40", "--seed", "3", "--out", str(tmp_path / "out.png"))
    account = json.loads((tmp_path / "out.json").read_text())
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.size[0] > 600
    assert account["prompt"] == PROMPT and account["found"]["nfe"] + account["found"]["left"] == 40
    assert account["plain"]["nfe"] == 10 and account["method"]["name"] == "rbf"
    assert account["trace"][-1]["t"] == 0 and account["trace"][-1]["nfe"] == account["found"]["nfe"]
    for key in ("plain", "found"):
        assert f"{account[key]['reward']:z.2f}" in out and f"{account[key]['reward_calls']}" in out


def test_python_m_flowscale_lite_is_the_command():
    command = [sys.executable, "-m", "flowscale_lite", "--help"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.startswith("usage: flowscale ")


def test_same_seed_same_account_and_another_seed_another(capsys, tmp_path):
    def account(name: str, seed: str) -> dict:
        flowscale(capsys, PROMPT, "--method", "best-of-n", "--nfe", "20", "--seed", seed, "--out", str(tmp_path / name))
        found = json.loads((tmp_path / name).with_suffix(".json").read_text())
        found["found"].pop("seconds")
        return found

    assert account("a.png", "0") == account("b.png", "0")
    assert account("c.png", "1")["found"]["reward"] != account("a.png", "0")["found"]["reward"]


def test_previews_are_judged_on_the_way_and_the_picture_in_full(capsys, tmp_path):
    small = shutil.copytree(locate("tiny-flux/schnell") / "vae", tmp_path / "small")
    weights = load_file(small / "diffusion_pytorch_model.safetensors")
    weights["decoder.layers.14.weight"] *= 0.9  # paler pictures
    save_file(weights, small / "diffusion_pytorch_model.safetensors")
    accounts = []
    for name, more in (("preview", ["--preview", str(small)]), ("full", [])):
        out = tmp_path / f"{name}.png"
        flowscale(capsys, PROMPT, *more, "--nfe", "40", "--steps", "4", "--out", str(out))
        accounts.append(json.loads(out.with_suffix(".json").read_text()))
    preview, full = accounts
    assert preview["plain"] == full["plain"], "the same noise, drawn and judged in full"
    assert preview["trace"][0]["best"] != full["trace"][0]["best"], "other pictures were judged"
    with pytest.raises(SystemExit) as end:
        cli.main(["replay", str(tmp_path / "preview.json")])
    assert end.value.code == 0


@pytest.mark.parametrize("method", ["draft", "cascade"])
def test_a_sibling_drafts_and_the_account_replays(capsys, tmp_path, method):
    dev, schnell, out = (str(p) for p in (locate("tiny-flux/dev"), locate("tiny-flux/schnell"), tmp_path / "out.png"))
    flowscale(
        capsys,
        PROMPT,
        "--model",
        dev,
        "--draft",
        schnell,
        "--method",
        method,
        "--nfe",
        "60",
        "--seed",
        "-2",
        "--out",
        out,
    )
    account = json.loads((tmp_path / "out.json").read_text())
    assert account["look_ahead"] == "sibling" and account["found"]["nfe"] > 50
    with pytest.raises(SystemExit) as end:
        flowscale(capsys, "replay", str(tmp_path / "out.json"))
    assert end.value.code == 0 and "the same picture and numbers" in capsys.readouterr().out
    assert (tmp_path / "out.replay.png").exists()
    account["found"]["reward"] += 0.1
    (tmp_path / "out.json").write_text(json.dumps(account))
    with pytest.raises(SystemExit) as end:
        flowscale(capsys, "replay", str(tmp_path / "out.json"))
    assert end.value.code == 1 and "differs in: found" in capsys.readouterr().out


@pytest.mark.parametrize("kernel", ["vp", "sde"])
def test_accounts_of_two_kernels_of_one_kind_replay(capsys, tmp_path, kernel):
    """Both are SDEs, which 0.1.0 told alike."""
    flowscale(capsys, PROMPT, "--kernel", kernel, "--nfe", "30", "--out", str(tmp_path / "out.png"))
    assert json.loads((tmp_path / "out.json").read_text())["kernel"] == kernel
    with pytest.raises(SystemExit) as end:
        flowscale(capsys, "replay", str(tmp_path / "out.json"))
    assert end.value.code == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["a sunny day"], "no known object"),
        ([PROMPT, "--method", "magic"], "invalid choice: 'magic'"),
        ([PROMPT, "--kernel", "magic"], "invalid choice: 'magic'"),
        ([PROMPT, "--nfe", "5"], "max_nfe"),
        ([PROMPT, "--nfe", "0"], "at least 1"),
        ([PROMPT, "--nfe", "many"], "invalid int"),
        ([PROMPT, "--kernel", "ode"], "deterministic"),
        ([PROMPT, "--method", "refine", "--kernel", "vp"], "takes no --kernel"),
        ([PROMPT, "--method", "cascade"], "cascade needs --draft MODEL"),
        ([PROMPT, "--method", "rbf", "--draft", "x"], "--draft is for the methods draft and cascade"),
        ([PROMPT, "--draft", "./nowhere"], "no model at"),
        (["replay"], "expected the account"),
        (["replay", "nowhere.json"], "No such file"),
        (["replay", "out.search"], "a saved search, not an account; go on with it by: flowscale resume out.search"),
        (["resume", "out.json"], "an account, not a saved search; search again by: flowscale replay out.json"),
        ([PROMPT, "--model", "./nowhere"], "no model at"),
        ([PROMPT, "--device", "cuda:7"], "no CUDA GPU"),
        ([PROMPT, "--device", "abacus"], "abacus"),
        ([PROMPT, "--device", "meta"], "no such device: 'meta'"),
        ([PROMPT, "--seed", str(2**64)], "64 bits"),
        ([PROMPT, "--width", "0"], "--width and --height must be at least 1"),
        ([PROMPT, "--width", "60"], "multiples of"),
        ([PROMPT, "--held-out", "beauty"], "--held-out must be one of clip,"),
        (["a cat", "--reward", "mine.py:red", "--held-out", "counts"], "say which: --held-out 'counts:2 red"),
        ([PROMPT, "--held-out", "counts:apples"], "--held-out counts takes"),
        ([PROMPT, "--held-out", "aesthetic:nowhere"], "--held-out aesthetic needs"),
        ([PROMPT, "--memory", "0.2"], "does not fit into 0.2 GiB"),
        ([PROMPT, "--guidance", "nan"], "finite"),
        ([PROMPT, "--out", "folder.png"], "--out must name a .png file"),
        ([PROMPT, "--out", "folder/account.png"], "--out must name a .png file"),
        ([PROMPT, "--out", "nowhere/out.png"], "existing folder"),
        ([PROMPT, "--out", "out.jpeg"], ".png"),
    ],
)
def test_bad_input_is_one_clear_line_and_no_computing(capsys, monkeypatch, tmp_path, args, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def red(pictures): ...\n")
    for name in ("folder.png", "folder/account.json"):
        (tmp_path / name).mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(cli, "run", lambda *_: pytest.fail("computed"))
    with pytest.raises(SystemExit) as stop:
        cli.main(args)
    assert stop.value.code not in (0, None)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in last and sorted(tmp_path.rglob("*")) == before


def test_words_that_the_model_does_not_know_are_said_in_one_line(capsys, tmp_path):
    """The counter skips them, and T5 does not know them."""
    said = "flowscale: the model does not know these words of the prompt: photo"
    for text, lines in ((f"a photo of {PROMPT}", [said]), (f"{PROMPT.capitalize()}.", [])):
        _, err = flowscale(capsys, text, "--nfe", "20", "--steps", "4", "--out", str(tmp_path / "out.png"))
        assert err.splitlines() == lines


def test_a_reward_of_ones_own_takes_any_words(capsys, tmp_path):
    """The counter knows coloured shapes only; here more red is better, and nothing is counted."""
    file, out = tmp_path / "mine.py", tmp_path / "out.png"
    file.write_text("def red(pictures):\n    return pictures[:, 0].mean((1, 2)) - pictures[:, 1:].mean((1, 2, 3))\n")
    args = ["a red drawing", "--reward", f"{file}:red", "--nfe", "40", "--steps", "4", "--out", str(out)]
    table, _ = flowscale(capsys, *args)
    account = json.loads(out.with_suffix(".json").read_text())
    assert account["found"]["reward"] > account["plain"]["reward"] and "counts" not in account["found"]
    assert f"{account['found']['reward']:z.2f}" in table and "nothing" not in table
    assert account["command"][account["command"].index("--reward") + 1] == f"{file}:red"


def test_an_account_replays_from_another_folder(capsys, monkeypatch, tmp_path):
    """Its judge's file and its model's folder are found from it, also when all of them have moved together."""
    here, there = tmp_path / "here", tmp_path / "there"
    (here / "found").mkdir(parents=True)
    (here / "mine.py").write_text("def red(pictures):\n    return pictures[:, 0].mean((1, 2))\n")
    (here / "model").symlink_to(locate("tiny-flux/schnell"))
    monkeypatch.chdir(here)
    args = ["a red drawing", "--reward", "mine.py:red", "--model", "model", "--nfe", "20", "--steps", "4"]
    flowscale(capsys, *args, "--out", "found/out.png")
    account = json.loads(Path("found/out.json").read_text())
    assert (account["model"], account["pipeline"], account["judge"]) == ("model", "FluxPipeline", "mine.py:red")
    here.rename(there)
    for folder, name in ((tmp_path, "there/found/out.json"), (there / "found", "out.json")):
        monkeypatch.chdir(folder)
        with pytest.raises(SystemExit) as end:
            cli.main(["replay", name])
        assert end.value.code == 0 and "the same picture and numbers" in capsys.readouterr().out
    (there / "mine.py").unlink()
    with pytest.raises(SystemExit) as end:
        cli.main(["replay", "out.json"])
    last = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and "got '../mine.py:red'; put it where it was, as seen from out.json" in last


@pytest.mark.parametrize(
    ("option", "word", "moved"),
    [
        ("--reward", "mine.py:red", "../mine.py:red"),
        ("--held-out", "aesthetic:head.safetensors", "aesthetic:../head.safetensors"),
        ("--preview", "small", "../small"),
        ("--reward", "clip", "clip"),
        ("--reward", "counts:3 cat", "counts:3 cat"),
        ("--draft", "someone/model", "someone/model"),
        ("--kernel", "small", "small"),
    ],
)
def test_paths_are_named_as_from_another_folder_and_back(monkeypatch, tmp_path, option, word, moved):
    for name in ("small", "clip", "counts", "aesthetic", "elsewhere"):
        (tmp_path / name).mkdir()
    for name in ("mine.py", "head.safetensors"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    there = cli.words.seen_from(["small", option, word], Path(), Path("elsewhere"))
    assert there == ["small", option, moved]
    assert cli.words.seen_from(there, Path("elsewhere"), Path()) == ["small", option, word]


@pytest.mark.parametrize("word", ["replay", "resume"])
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_for_a_word_is_of_that_word(capsys, word, option):
    cli.main([word, option])
    assert capsys.readouterr().out.startswith(f"usage: flowscale {word} out.")


def test_nothing_is_printed_as_minus_zero():
    entry = {"reward": -0.0004, "nfe": 4, "reward_calls": 1}
    text = cli.searching.table({"plain": entry, "method": {"name": "rbf"}, "found": entry, "held_out": [-0.0, -0.004]})
    assert "-0.00" not in text and text.count("0.00") == 4


def test_size_memory_and_a_held_out_judge(capsys, tmp_path):
    """The second judge sees the two pictures of the table only, and the account replays."""
    file, out = tmp_path / "mine.py", tmp_path / "out.png"
    file.write_text(
        "seen = []\n"
        "def wide(pictures):\n    assert pictures.shape[2:] == (64, 96)\n    return pictures.mean((1, 2, 3))\n"
        "def once(pictures):\n    seen.append(1)\n    assert len(seen) <= 2\n    return pictures.amax((1, 2, 3))\n"
    )
    args = ["a red drawing", "--reward", f"{file}:wide", "--held-out", f"{file}:once", "--width", "96"]
    args += ["--memory", "4", "--nfe", "40", "--steps", "4", "--draft", str(locate("tiny-flux/schnell"))]
    text, _ = flowscale(capsys, *args, "--model", str(locate("tiny-flux/dev")), "--out", str(out))
    account = json.loads(out.with_suffix(".json").read_text())
    assert text.index("drafting") < text.index("reward"), "the memory plan comes first"
    assert "held out: plain {:z.2f}, found {:z.2f}".format(*account["held_out"]) in text
    with pytest.raises(SystemExit) as stop:
        cli.main(["replay", str(out.with_suffix(".json"))])
    assert stop.value.code == 0


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("beauty", "--reward must be one of clip, pickscore, vqascore, counts, "),
        ("counts:apples", "takes numbers and things, as in 'counts:2 red apple, 3 cup'; got 'apples'"),
        ("aesthetic", "--reward aesthetic needs the file of its head, 'aesthetic:head.safetensors'; got no such file"),
        ("aesthetic:mine.py", "mine.py is damaged, or no safetensors file"),
        ("nowhere.py:red", "with an existing file; got 'nowhere.py:red'"),
        ("mine.py:blue", "mine.py has no function 'blue'"),
        ("mine.py:number", "mine.py has no function 'number'"),
        ("broken.py:red", "broken.py cannot be run: ZeroDivisionError"),
    ],
)
def test_a_reward_that_is_none_is_one_clear_line(capsys, monkeypatch, tmp_path, reward, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("number = 3\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(SystemExit):
        cli.main([PROMPT, "--reward", reward])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("flowscale: ") and message in line


@pytest.mark.parametrize("name", cli.words.JUDGES)
def test_judges_are_loaded_by_name_for_the_whole_prompt(monkeypatch, name):
    asked = []
    monkeypatch.setattr(judges.Clip, "load", lambda name, device: asked.append((name, device)) or "clip")
    monkeypatch.setattr(judges.VisionLanguage, "load", lambda device: asked.append(("vlm", device)) or "vlm")
    for score in ("clip_score", "pick_score", "vqa_score"):
        monkeypatch.setattr(judges, score, lambda model, prompt, score=score: (score, model, prompt))
    made = cli.job.named_reward(name, cli.parser().parse_args(["three cats", "--reward", name, "--device", "cpu"]))
    expected = {"clip": ("clip_score", "clip"), "pickscore": ("pick_score", "clip"), "vqascore": ("vqa_score", "vlm")}
    assert made == (*expected[name], "three cats")
    assert asked == [({"clip": "clip-l", "pickscore": "pickscore", "vqascore": "vlm"}[name], "cpu")]


def test_counts_and_an_aesthetic_head_by_name(monkeypatch, tmp_path):
    """The counter of shapes, a detector for other things with their numbers, and linear layers from a file."""
    args = cli.parser().parse_args([PROMPT, "--device", "cpu"])
    pictures = torch.rand(2, 3, 64, 64, generator=Generator().manual_seed(0))
    expected = counter.CountReward(shapes.parse(PROMPT))(pictures)
    assert torch.equal(cli.job.named_reward("counts", args)(pictures), expected)
    cats = cli.parser().parse_args(["three cats", "--device", "cpu"])
    with pytest.raises(ValueError, match="for other things say which: --reward 'counts:2 red apple, 3 cup'"):
        cli.job.named_reward("counts", cats)

    monkeypatch.setattr(judges.Finder, "load", lambda device: f"finder on {device}")
    monkeypatch.setattr(judges, "grounded_counts", lambda *given: given)
    assert cli.job.named_reward("counts:3 cat, 1 red sofa", cats) == ("finder on cpu", {"cat": 3, "red sofa": 1})

    layers = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Dropout(), torch.nn.Linear(3, 1)).eval()
    save_file({f"layers.{name}": part for name, part in layers.state_dict().items()}, tmp_path / "head.safetensors")
    monkeypatch.setattr(judges.Clip, "load", lambda name, device: name)
    monkeypatch.setattr(judges, "aesthetic_score", lambda clip, head: (clip, head))
    clip, head = cli.job.named_reward(f"aesthetic:{tmp_path / 'head.safetensors'}", cats)
    vectors = torch.rand(2, 4, generator=Generator().manual_seed(0))
    assert clip == "clip-l" and torch.equal(head(vectors), layers(vectors))
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="should hold weights and biases of linear layers; it holds x"):
        cli.job.named_reward(f"aesthetic:{tmp_path / 'other.safetensors'}", cats)


def test_the_account_is_json_by_the_letter(capsys, tmp_path):
    """Steps of best-of-N judge nothing before the last, so they have no mean reward: null, not NaN."""
    flowscale(capsys, PROMPT, "--method", "best-of-n", "--nfe", "30", "--steps", "3", "--out", str(tmp_path / "o.png"))
    account = json.loads((tmp_path / "o.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert account["trace"][0]["mean"] is None and account["trace"][-1]["mean"] is not None


def test_what_the_budget_bought_is_saved_even_if_drawing_fails(capsys, monkeypatch, tmp_path):
    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(plots, "before_after", fail)
    with pytest.raises(SystemExit) as end:
        flowscale(capsys, PROMPT, "--nfe", "20", "--steps", "4", "--out", str(tmp_path / "out.png"))
    assert end.value.code == 1 and json.loads((tmp_path / "out.json").read_text())["found"]["nfe"] > 0
    assert "could not be written: MemoryError" in capsys.readouterr().err.splitlines()[-1]


def test_pictures_are_drawn_whatever_they_come_from():
    """From a GPU (a stand-in, which gives no numbers unless brought to the CPU), in half precision, with a gradient."""

    class OnGPU(torch.Tensor):
        def cpu(self):
            return self.as_subclass(torch.Tensor)

        def numpy(self):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")

    image = torch.full((3, 4, 4), 0.5)
    figure, ax = plt.subplots()
    for kind in (image.as_subclass(OnGPU), image.bfloat16(), image.clone().requires_grad_()):
        plots.picture(ax, kind)
        assert (ax.images[-1].get_array() == 0.5).all()
    plt.close(figure)


def test_words_are_checked_before_diffusers_is_imported():
    """A typing mistake is answered at once."""
    code = "import sys; from flowscale_lite import cli\ntry: cli.main(['a sunny day'])\nexcept SystemExit: pass\n"
    code += "assert 'diffusers' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("method", sorted(cli.words.METHODS))
@pytest.mark.parametrize("model", ["schnell", "dev"])
def test_every_method_runs_with_what_suits_the_model(capsys, tmp_path, method, model):
    folder = str(locate(f"tiny-flux/{model}"))
    args = ["--method", method, "--model", folder, "--nfe", "64", "--steps", "6", "--out", str(tmp_path / "out.png")]
    args += ["--draft", str(locate("tiny-flux/schnell"))] if method in cli.words.DRAFTED else []
    _, err = flowscale(capsys, PROMPT, *args)
    assert ("made for few-step models" in err) == (method == "refine" and model == "dev")
    account = json.loads((tmp_path / "out.json").read_text())
    expected = {"rbf": "vp" if model == "schnell" else "ddim", "best-of-n": "ode"}
    assert account["kernel"] == expected.get(method, account["kernel"])
    assert account["found"]["nfe"] + account["found"]["left"] == 64 and account["found"]["nfe"] > 50


def test_the_command_knows_every_method():
    """Also what a contributor adds, as the guide says."""
    public = [kind for room in (methods, beyond) for kind in vars(room).values() if isinstance(kind, type)]
    assert set(cli.words.METHODS.values()) == {kind for kind in public if hasattr(kind, "advance")}
    assert set(cli.words.ON_THE_ODE) | set(cli.words.DRAFTED) <= set(cli.words.METHODS)


def test_more_steps_want_fewer_states():
    """The settings for a multi-step model know the steps, so that what suits it is not refused."""
    folder = str(locate("tiny-flux/dev"))
    for steps, states in ((10, 7), (40, 2)):
        args = cli.parser().parse_args([PROMPT, "--model", folder, "--nfe", "250", "--steps", str(steps)])
        assert cli.prepare(args).method.states == states
