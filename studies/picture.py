"""
The picture of the README: how a finished run learned, and how close each policy came to the optimum.

    python -m studies.picture runs/default docs/run.png
"""

import argparse
import json
from pathlib import Path

LABELS = {"best_of_n": "best of {n}", "dpo": "DPO", "ppo": "PPO"}


def draw(folder, path):
    """Draw the run in a folder into a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["stage"] == "ppo" and "step" in row]
    best, beta = report["optimum"], report["config"]["beta"]
    steps = [row["step"] for row in rows]

    figure = Figure(figsize=(12, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    climb, distance, shares = figure.subplots(1, 3, width_ratios=(4, 3, 3))

    climb.plot(steps, [row["score"] for row in rows], color="C1", label="score: what PPO maximises")
    climb.plot(steps, [row["objective"] for row in rows], color="C0", label=f"objective: score - {beta:g} KL")
    if "gold" in rows[0]:
        climb.plot(steps, [row["gold"] for row in rows], color="C2", linestyle="--", label="gold: the true reward")
    climb.axhline(best["objective"], color="black", linestyle=":", label="the best possible objective")
    climb.set(title="PPO climbs", xlabel="iteration", ylabel="standard deviations of SFT's")
    climb.legend(fontsize="small", loc="lower right")

    distance.plot(steps, [row["kl"] for row in rows], color="C0")
    distance.axhline(best["kl"], color="black", linestyle=":", label="KL of the optimum")
    distance.set(title="and moves away from SFT", xlabel="iteration", ylabel="KL, nats per response")
    distance.legend(fontsize="small", loc="lower right")

    names = [name for name in LABELS if name in report["policies"]]
    values = [100 * report["policies"][name]["optimum_share"] for name in names]
    bars = shares.barh([LABELS[name].format(n=report["config"]["best_of"]) for name in names], values, color="C0")
    shares.bar_label(bars, fmt="%.0f%%", padding=-32, color="white")
    shares.axvline(100, color="black", linestyle=":")
    shares.set(title="share of the best possible gain", xlim=(min(0, *values), 105), xlabel="% of the optimum")
    shares.invert_yaxis()
    figure.savefig(path, dpi=110)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m studies.picture", description="Draw a finished run as a PNG file.")
    parser.add_argument("run", type=Path, help="the folder of a finished run of the built-in world")
    parser.add_argument("png", type=Path, help="the file to write")
    arguments = parser.parse_args(argv)
    if not (arguments.run / "report.json").exists():
        parser.error(f"{arguments.run} is not a finished run: it has no report.json")
    try:
        draw(arguments.run, arguments.png)
    except ImportError:
        parser.error("this needs matplotlib: pip install matplotlib")


if __name__ == "__main__":
    main()
