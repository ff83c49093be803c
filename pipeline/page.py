"""The page of a run, report.html, and of several runs, compare.html. `gather` collects what page.html draws."""

import json
import textwrap
import time
from pathlib import Path

import torch

from pipeline import report
from pipeline.config import POLICIES, VERSION, policy_config
from pipeline.diagnose import healthy, verdicts
from pipeline.episode import make_episode
from pipeline.files import clean, write_file
from pipeline.run import SHOWN
from pipeline.scores import make_scorer
from tokenizer import decode

UNTRAINED = "PPO before training"


def thin(rows, most):
    """Rows of numbers as columns {metric: at most this many means of equal parts}, and how many rows a part has."""
    size = -(-len(rows) // most)
    columns = {}
    for metric in rows[-1]:
        if metric != "stage":
            parts = [[row[metric] for row in rows[at:at + size]] for at in range(0, len(rows), size)]
            columns[metric] = [sum(part) / len(part) for part in parts]
    return columns, size


def make_episodes(run):
    """{policy: its episodes after SHOWN held-out prompts}. UNTRAINED: what PPO sees in its first iteration."""
    def of(name, policy, critic):
        critic = run.load_network(critic) if run.has([f"{critic}.pt"]) else None
        return [make_episode(run, name, policy, reference, scorer, critic, ids) for ids in run.prompts[1][:SHOWN]]

    reference, scorer, policies = run.load_network("sft"), make_scorer(run), run.config.policies.split(",")
    episodes = {name: of(name, run.load_network(name), f"{name}_critic") for name in ("pretrained", "sft", *policies)}
    if "ppo" in policies:
        episodes[UNTRAINED] = of("ppo", reference, "reward")
    return episodes


def make_frontier(result, metrics):
    """The curves up to a KL that shows all trained policies, how they got there, and what is too far away to draw."""
    rows, curves = result["policies"], result["frontier"]
    far = 1.6 * max(row["kl"] for name, row in rows.items() if name != "pretrained")
    return dict(optimum=[point for point in curves["optimum"] if point["kl"] <= far], best_of_n=curves["best_of_n"],
                trails={name: thin(logged, 12)[0] for name, logged in metrics.items() if "kl" in logged[0]},
                near=[name for name, row in rows.items() if name != "best_of_n" and row["kl"] <= far],
                away=[name for name, row in rows.items() if row["kl"] > far])


def make_curves(run, metrics):
    """{stage: its loop, its unit, the healthy ranges and the thinned columns of what it logged}."""
    curves = {}
    for stage, rows in metrics.items():
        columns, size = thin(rows, 300)
        if policy_config(run.config, stage).beta == 0:
            columns.pop("objective", None)  # it is the score
        loop = POLICIES[stage][1] if stage in POLICIES else stage
        limits = {metric: row[:2] for metric, row in healthy(loop).items()}
        curves[stage] = dict(loop=loop, unit="iteration" if "kl" in columns else "step", size=size, columns=columns,
                             healthy=limits)
    return curves


def make_facts(run, result):
    """How the run was made, as (name, text): the date, the size, the reward model, versions, and all settings."""
    made = time.localtime((run.folder / "report.json").stat().st_mtime)
    parameters = sum(parameter.numel() for parameter in run.load_network("sft").parameters())
    network = f"{parameters:,} parameters" + (" in an adapter" if run.config.lora else "")
    seconds = ", ".join(f"{stage} {s:.0f}" for stage, s in result["seconds"].items())
    return [("date", time.strftime("%Y-%m-%d %H:%M", made)), ("network", network),
            ("reward model", report.accuracy_text(result["reward_model"])), ("seconds", seconds), ("minirlhf", VERSION),
            ("torch", result["torch"]), ("device", result["device"]),
            *[(name, str(value)) for name, value in result["config"].items()]]


@torch.no_grad()
def gather(run):
    """All that the page shows of a run, as JSON knows it."""
    result, metrics = run.read("report.json"), report.logged_rows(run)
    turns, episodes = report.turning_points(metrics), make_episodes(run)
    prompts = [report.shown(decode(run.tokenizer, ids)) for ids in run.prompts[1][:SHOWN]]
    names = dict(report.NAMES, best_of_n=f"best of {run.config.best_of}", reward="reward model", robust="robust reward",
                 pretrain="pretraining", **{UNTRAINED: UNTRAINED})
    watch = [dict(row, texts=[report.shown(text) for text in row["texts"]]) for row in run.rows("watch.jsonl")]
    for row in watch:
        row["when"] = f"after iteration {row['step'] + 1}" if row["step"] >= 0 else "before training"
    return clean(dict(
        name=run.folder.resolve().name, report=result, names=names, turns=turns, notes=report.format_notes(result),
        table=report.make_table(result), verdicts=verdicts(result),
        curves=make_curves(run, metrics), facts=make_facts(run, result), frontier=make_frontier(result, metrics),
        prompts=prompts, watch=watch, episodes=episodes))


def fill(runs):
    """The page of several runs, from what `gather` says of each."""
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    # in ASCII and without a "<", JSON may be inside <script>, whatever the texts are
    return template.replace("{DATA}", json.dumps(runs, allow_nan=False).replace("<", "\\u003c"))


def compare(runs):
    """Print the tables of several finished runs, and write compare.html next to the first of them."""
    pages = [gather(run) for run in runs]
    first = pages[0]["report"]["config"]
    for run, page in zip(runs, pages):
        page["name"] = str(run.folder)
        page["changes"] = ", ".join(f"{name} {value}" for name, value in page["report"]["config"].items()
                                    if value != first.get(name))
        heading = ": ".join(filter(None, [page["name"], page["changes"]]))
        print(textwrap.fill(heading, report.WIDTH, break_long_words=False, break_on_hyphens=False))
        print("\n".join(report.format_rows(page["table"])) + "\n")
        del page["frontier"]  # each run has its own reward model, and so its own scale
        page["episodes"] = {name: [{key: one[key] for key in ("text", "score", "gold")} for one in episodes]
                            for name, episodes in page["episodes"].items() if name in page["report"]["policies"]}
    path = runs[0].folder.parent / "compare.html"
    write_file(path, fill(pages))
    print(f"open {path}")
