"""The picture of the README."""

import json

import pytest

from studies import picture


def test_iterations_have_whole_numbers(tmp_path, monkeypatch):
    """Bug: an axis of iterations has a tick at 17.5, or a panel has the numbers of the other policy."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure
    rows = [dict(stage=stage, step=i, score=0.1 * i, gold=sign * 0.05 * i)
            for stage, n, sign in (("ppo", 60, 1), ("ppo_no_kl", 20, -1)) for i in range(n)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = dict(optimum=dict(objective=1.0, kl=2.0), config=dict(beta=0.2))
    (tmp_path / "report.json").write_text(json.dumps(report))
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, dpi: (figure.canvas.draw(), drawn.append(figure)))
    picture.main([str(tmp_path), str(tmp_path / "run.png")])
    with_kl, without = drawn[0].axes
    for axes, n, last in ((with_kl, 60, 2.95), (without, 20, -0.95)):
        assert all(tick == round(tick) for tick in axes.get_xticks())
        score, gold, *_ = axes.get_lines()
        assert len(score.get_xdata()) == n and gold.get_ydata()[-1] == pytest.approx(last)
    assert with_kl.get_lines()[2].get_ydata()[0] == pytest.approx(1.4)
