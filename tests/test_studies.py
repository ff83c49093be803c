"""Tests of studies.py: every study runs in quick mode, and its tools are compared with plain loops."""

import csv
import math

import pytest
import torch

import studies
from lab import mean_se


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder of its own, and jobs in this process: five spawned pools would spend their time on starting."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(studies, "HOME", tmp_path_factory.mktemp("studies"))
        patch.setenv("LAB_SERIAL", "1")
        yield studies.HOME


@pytest.mark.parametrize("name", studies.STUDIES)
def test_every_study_runs_in_quick_mode(home, name, capsys):
    """A study that ends in a traceback, gives a verdict on a quick pass, leaves a number that is not finite, or leaves nothing."""
    assert studies.main([name, "--quick", "--seeds", "1"]) == 0
    out, folder = capsys.readouterr().out, home / f"{name}-quick"
    assert "not tested here: " in out and "reproduced: " not in out
    assert (folder / "verdict.txt").read_text() in out + "\n" and (folder / "table.txt").read_text().splitlines()[0] in out
    with open(folder / "results.csv") as file:
        rows = list(csv.DictReader(file))
    assert rows and all(math.isfinite(float(row[key])) for row in rows for key in ("gold", "kl", "d") if row.get(key))


def test_an_unknown_study_is_one_line(home, capsys):
    """A traceback for a name that is none of the studies, or for no seeds."""
    for argv in (["overfit"], ["tree", "--seeds", "0"]):
        with pytest.raises(SystemExit) as stopped:
            studies.main(argv)
        assert stopped.value.code == 2 and "Traceback" not in capsys.readouterr().err


def test_flipped_labels_are_turned_around_and_nothing_else(home):
    """Flips that change which pairs there are, or that leave the ratings behind; a share that is not the one asked for."""
    run = studies.base(0, True)
    clean, noisy = studies.labelled(run, 150), studies.labelled(run, 150, 3, 0.25)
    turned = [a["chosen"] == b["rejected"] and a["rejected"] == b["chosen"] and a["gold"] == b["gold"][::-1] for a, b in zip(clean, noisy)]
    assert len(noisy) == len(clean) and all(t or a == b for t, a, b in zip(turned, clean, noisy))
    assert abs(sum(turned) / len(turned) - 0.25) < 0.12  # three standard deviations


def test_gold_in_a_reward_models_place(home):
    """The oracle is asked about padding, or about another row's prompt."""
    run = studies.base(0, True)
    rollouts, gold = studies.reference_samples(run, 6, 2, 5)
    close = torch.cat([studies.Gold(run)(rollout) for rollout in rollouts])
    torch.testing.assert_close(close, gold.flatten())


def test_peak_and_fall():
    """The peak of one seed instead of the mean's, or the fall from each seed's own luckiest point: noise alone would fall by two deviations."""
    curves = [[0.0, 2.0, 1.0], [0.0, 1.0, 1.5]]
    assert studies.peak_and_fall(curves) == (1, *mean_se([0.0, -0.5]))  # the first seed has its peak at 1, the second at 2
    assert studies.peak_and_fall([[0.0, 3.0, 1.0]]) == (1, 2.0, 0.0)
    noise = torch.randn(300, 3, 8, generator=torch.Generator().manual_seed(0)).tolist()
    assert abs(mean_se([studies.peak_and_fall(curves)[1] for curves in noise])[0]) < 0.12  # three standard errors; 0.9 when a seed helps to choose


def test_together():
    """A study that is reproduced although a part of it failed, or could not be told."""
    assert studies.together([True, True]) is True and studies.together([True, None]) is None and studies.together([None, False, True]) is False


def test_windows_and_interpolation():
    """A window that mixes two, a last one that is divided by the full size; a line through the wrong points."""
    rows = [dict(x=float(i)) for i in range(7)]
    assert studies.windows(rows, "x", 3) == [1.0, 4.0, 6.0]
    assert [studies.interpolate(x, [2.0, 0.0, 1.0], [5.0, 1.0, 2.0]) for x in (-1, 0, 0.5, 1, 1.5, 2, 9)] == [1.0, 1.0, 1.5, 2.0, 3.5, 5.0, 5.0]
    assert studies.powers(16) == [1, 2, 4, 8, 16]
