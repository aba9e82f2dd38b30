"""The command: what it writes, and what it refuses before it computes."""

import json
import subprocess
import sys

import pytest
from PIL import Image

from flowscale_lite import assets, cli

PROMPT = "three red circles and two blue squares"


def flowscale(capsys, *args: str) -> tuple[str, str]:
    cli.main([*args])
    return capsys.readouterr()


def test_picture_table_and_account_agree(capsys, tmp_path):
    out, _ = flowscale(capsys, PROMPT, "--nfe", "40", "--seed", "3", "--out", str(tmp_path / "out.png"))
    account = json.loads((tmp_path / "out.json").read_text())
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.size[0] > 600
    assert account["prompt"] == PROMPT and account["found"]["nfe"] + account["found"]["left"] == 40
    assert account["plain"]["nfe"] == 10 and account["method"]["name"] == "rbf"
    assert account["trace"][-1]["t"] == 0 and account["trace"][-1]["nfe"] == account["found"]["nfe"]
    for key in ("plain", "found"):
        assert f"{account[key]['reward']:.2f}" in out and f"{account[key]['reward_calls']}" in out


def test_same_seed_same_account_and_another_seed_another(capsys, tmp_path):
    def account(name: str, seed: str) -> dict:
        flowscale(capsys, PROMPT, "--method", "best-of-n", "--nfe", "20", "--seed", seed, "--out", str(tmp_path / name))
        found = json.loads((tmp_path / name).with_suffix(".json").read_text())
        found["found"].pop("seconds")
        return found

    assert account("a.png", "0") == account("b.png", "0")
    assert account("c.png", "1")["found"]["reward"] != account("a.png", "0")["found"]["reward"]


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
        ([PROMPT, "--model", "./nowhere"], "no model at"),
        ([PROMPT, "--device", "cuda:7"], "no CUDA GPU"),
        ([PROMPT, "--device", "abacus"], "abacus"),
        ([PROMPT, "--out", "nowhere/out.png"], "existing folder"),
        ([PROMPT, "--out", "out.jpeg"], ".png"),
    ],
)
def test_bad_input_is_one_clear_line_and_no_computing(capsys, monkeypatch, tmp_path, args, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "run", lambda *_: pytest.fail("computed"))
    with pytest.raises(SystemExit) as stop:
        cli.main(args)
    assert stop.value.code not in (0, None)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in last and not list(tmp_path.iterdir())


def test_words_are_checked_before_diffusers_is_imported():
    """A typing mistake is answered at once."""
    code = "import sys; from flowscale_lite import cli\ntry: cli.main(['a sunny day'])\nexcept SystemExit: pass\n"
    code += "assert 'diffusers' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("method", sorted(cli.METHODS))
@pytest.mark.parametrize("model", ["schnell", "dev"])
def test_every_method_runs_with_what_suits_the_model(capsys, tmp_path, method, model):
    folder = str(assets.data(f"tiny-flux/{model}"))
    args = ["--method", method, "--model", folder, "--nfe", "64", "--steps", "6", "--out", str(tmp_path / "out.png")]
    _, err = flowscale(capsys, PROMPT, *args)
    assert ("made for few-step models" in err) == (method == "refine" and model == "dev")
    account = json.loads((tmp_path / "out.json").read_text())
    expected = {"rbf": "sde" if model == "schnell" else "gaussian(1)", "best-of-n": "ode"}
    assert account["kernel"] == expected.get(method, account["kernel"])
    assert account["found"]["nfe"] + account["found"]["left"] == 64 and account["found"]["nfe"] > 50
