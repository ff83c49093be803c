"""The three studies that need no GPT, each run twice as a whole."""

import pytest

from studies.limits_exact import limits_exact
from studies.robust_exact import robust_exact
from studies.tree import tree


@pytest.mark.slow
@pytest.mark.parametrize("study", [tree, limits_exact, robust_exact])
def test_a_quick_pass_writes_its_folder_and_is_the_same_twice(study, tmp_path, monkeypatch):
    """Bug: a random number that does not come from a seed, a verdict on a quick pass, or a file that is missing."""
    monkeypatch.setenv("LAB_SERIAL", "1")
    passes = []
    for name in ("first", "second"):
        out = tmp_path / name
        rows, text = study(2, True, out)
        verdicts = (out / "verdict.txt").read_text(encoding="utf-8").strip()
        assert rows
        assert (out / "table.txt").stat().st_size > 0
        assert text.endswith(verdicts)
        for line in verdicts.split("\n"):
            assert "not tested here: " in line
        passes.append((text, (out / "results.csv").read_bytes()))
    assert passes[0] == passes[1]
