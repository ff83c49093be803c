"""
The picture of the README: PPO with and without its KL penalty, as a finished run logged them.

    python -m studies.picture runs/default docs/run.png
"""

import json
import sys
from pathlib import Path

PANELS = {"ppo": "PPO pays for its KL: the true reward climbs with the score",
          "ppo_no_kl": "without the KL penalty: the score climbs, the true reward falls"}


def draw(folder, path):
    """Draw a finished run with the policies ppo and ppo_no_kl into a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "gold" in row]
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (policy, title) in zip(figure.subplots(1, 2, sharey=True), PANELS.items()):
        steps = [row["step"] for row in rows if row["stage"] == policy]
        for key, label in (("score", "score: what it maximises"), ("gold", "gold: the true reward")):
            axes.plot(steps, [row[key] for row in rows if row["stage"] == policy], label=label)
        if policy == "ppo":
            best = report["optimum"]["objective"] + report["config"]["beta"] * report["optimum"]["kl"]
            axes.axhline(best, color="black", linestyle=":", label="score of the best possible policy")
        axes.set(title=title, xlabel="iteration")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(loc="lower right", fontsize="small")
    figure.axes[0].set_ylabel("standard deviations of SFT's")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
