"""`make mutants` takes minutes; here: every mistake can still be made, and the tool tells caught from survived."""

import pytest

from tools.mutants import MUTANTS, ROOT, Mutant, try_out


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.what)
def test_a_mistake_can_still_be_made(mutant):
    wrong = mutant.apply((ROOT / "flowscale_lite" / mutant.file).read_text(encoding="utf-8"))
    compile(wrong, mutant.file, "exec")
    assert all((ROOT / "tests" / f"test_{name}.py").exists() for name in mutant.tests.split())


def test_mistakes_are_many_and_differ():
    assert len({(m.file, m.old, m.new) for m in MUTANTS}) == len({m.what for m in MUTANTS}) == len(MUTANTS) >= 20


@pytest.mark.parametrize("source", ["", "ab ab"])
def test_a_mistake_that_cannot_be_made_is_an_error(source):
    with pytest.raises(ValueError, match="not once"):
        Mutant("wrong", "rewards.py", "rewards", "ab", "ba").apply(source)


def test_caught_is_told_from_survived():
    caught = try_out(Mutant("wrong", "rewards.py", "rewards", "reward(x).round()", "reward(x)"), ["rewards"])
    assert caught.caught and caught.by.startswith("test_rewards.py::")
    harmless = Mutant("harmless", "rewards.py", "rewards", "reward(x).round()", "torch.round(reward(x))")
    assert not try_out(harmless, ["rewards"]).caught


def test_tests_that_do_not_run_catch_nothing():
    with pytest.raises(RuntimeError, match="did not run"):
        try_out(
            Mutant("no Python", "rewards.py", "rewards", "return lambda x: reward(x).round()", "return ("), ["rewards"]
        )
