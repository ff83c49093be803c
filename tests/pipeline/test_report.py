"""
The table and the samples: every number that a reader sees, computed a second time.

The second computation reads the files of the tiny run (conftest.Files) and shares no code with the stages. It runs the
network on one row at a time, without padding, and adds up with plain loops.
"""

import json
import math
import re
import statistics
from types import SimpleNamespace

import pytest
import torch
from conftest import SEED, Files

import minirlhf
import world
from evaluate import pass_at_k, share_error, standard_error
from pipeline import report as report_module
from pipeline.errors import printable
from pipeline.files import clean
from pipeline.report import (
    AT_CHANCE,
    add_shares,
    format_notes,
    format_table,
    make_table,
    number,
    percent,
    turning_point,
    turning_points,
    wrapped,
)

NAMES = dict(pretrained="pretrained", sft="SFT", best_of_n="best of n", dpo="DPO", ppo="PPO", ppo_no_kl="PPO, no KL",
             grpo="GRPO")
TRAINED = ("pretrained", "dpo", "ppo", "ppo_no_kl", "grpo")
every_policy = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def measured(files):
    """
    What the report should have measured.

    answers: the response of each policy to each held-out prompt; columns: its numbers in the table, one for each
    prompt; scores and golds: those of the n SFT samples of each prompt.
    """
    prompts, n, beta = files.heldout(), files.config["best_of"], files.config["beta"]
    many = files.sample("sft", [prompt for prompt in prompts for _ in range(n + 4)], 1000 * SEED + 5)
    answers = {name: files.sample(name, prompts, 1000 * SEED + 6) for name in TRAINED}
    answers["sft"], answers["best_of_n"] = [], []
    scores, golds, opponents = [], [], []
    for i, prompt in enumerate(prompts):
        own = many[i * (n + 4):(i + 1) * (n + 4)]
        scores.append([files.scores("reward", prompt + response)[-1] for response in own[:n]])
        golds.append([files.gold(prompt, response) for response in own[:n]])
        opponents.append([files.gold(prompt, response) for response in own[n:]])
        answers["sft"].append(own[0])
        answers["best_of_n"].append(own[scores[-1].index(max(scores[-1]))])
    columns = {}
    for name in NAMES:
        texts = list(zip(prompts, answers[name]))
        gold = [[files.gold(*text)] for text in texts]
        score = [files.scores("reward", prompt + response)[-1] for prompt, response in texts]
        kl = [files.kl(name, *text) for text in texts] if name in TRAINED else [0.0] * len(texts)
        if name == "sft":  # all n samples of a prompt, which count as one
            gold, score = golds, list(map(statistics.mean, scores))
        columns[name] = dict(
            gold=list(map(statistics.mean, gold)), score=score, kl=kl,
            win_rate=[statistics.mean((g > o) + 0.5 * (g == o) for g in row for o in others)
                      for row, others in zip(gold, opponents)])
        if name == "best_of_n":
            columns[name]["kl"] = [math.log(n) - (n - 1) / n] * len(texts)
        columns[name]["objective"] = [s - beta * k for s, k in zip(score, columns[name]["kl"])]
    return SimpleNamespace(answers=answers, scores=scores, golds=golds, columns=columns)


def near(x):
    return pytest.approx(x, abs=2e-4)


# ---- report.json ---------------------------------------------------------------------------------------------------

@every_policy
def test_the_numbers_of_a_policy(files, measured, name):
    """Bug: a number of another policy, of training prompts or in raw points; KL in the wrong direction; a lost win."""
    row = files.report["policies"][name]
    for column, numbers in measured.columns[name].items():
        assert row[column] == near(statistics.mean(numbers)), column
        assert row[f"{column}_se"] == near(statistics.stdev(numbers) / math.sqrt(len(numbers))), column
    assert row["kl"] > 0.05 or name == "sft" and row["kl"] == row["kl_se"] == 0
    responses = measured.answers[name]
    assert row["length"] == near(sum(map(len, responses)) / len(responses))
    assert row["finished"] == near(sum(response[-1] == files.end for response in responses) / len(responses))
    assert 0 < row["finished"] < 1 or name != "sft"


def test_the_optimum(files, measured):
    """Bug: the optimum with DPO's beta, of the sum and not the mean, or with the KL and the gold of the reference."""
    beta = files.config["beta"]
    samples = [(s, g) for scores, golds in zip(measured.scores, measured.golds) for s, g in zip(scores, golds)]
    total = sum(math.exp(s / beta) for s, _ in samples)
    J = beta * math.log(total / len(samples))
    score, gold = [sum(math.exp(s[0] / beta) * s[k] for s in samples) / total for k in (0, 1)]
    best = files.report["optimum"]
    assert best["objective"] == near(J)
    assert best["kl"] == pytest.approx((score - J) / beta, abs=2e-3)
    assert best["gold"] == pytest.approx(gold, abs=2e-3)
    assert best["ess"] == pytest.approx(total ** 2 / sum(math.exp(2 * s / beta) for s, _ in samples), rel=2e-3)


@every_policy
def test_the_share_of_the_optimum(files, measured, name):
    """Bug: the share is counted from 0 and not from the SFT policy, or its noise is not paired with the reference's."""
    rows, J, beta = files.report["policies"], files.report["optimum"]["objective"], files.config["beta"]
    row, start = rows[name], rows["sft"]["objective"]
    assert row["optimum_share"] == near((row["objective"] - start) / (J - start))
    if name == "sft":
        assert row["optimum_share"] == row["optimum_share_se"] == 0
        return
    objectives, scores = torch.tensor(measured.columns[name]["objective"]), torch.tensor(measured.scores)
    error = share_error(objectives, scores, beta, range(len(scores)))  # which test_evaluate.py compares with its spread
    assert row["optimum_share_se"] == pytest.approx(error, rel=2e-3)


def test_the_reward_model_and_the_seconds(files):
    """Bug: the report shows the reward model of another run, or seconds that no stage took."""
    reward = json.loads((files.folder / "reward.json").read_text())
    assert files.report["reward_model"] == clean(reward)
    expected = {row["stage"]: row["stage_seconds"] for row in files.rows("metrics.jsonl") if "stage_seconds" in row}
    del expected["report"]
    assert list(files.report["seconds"]) == ["pretrain", "sft", "preferences", "reward", *files.policies]
    assert files.report["seconds"] == pytest.approx(expected, abs=0.051)


def test_the_samples_are_those_of_the_policies(files, measured):
    """Bug: a response is under another policy's name or another prompt; or best-of-n is picked by gold."""
    blocks = []
    for i, prompt in enumerate(files.heldout()[:16]):
        lines = [wrapped("", files.text(prompt))[14:].replace("\n" + 14 * " ", "\n")]
        for name, label in NAMES.items():
            response = measured.answers[name][i]
            score, gold = files.scores("reward", prompt + response)[-1], files.gold(prompt, response)
            text = printable(files.text(response)).strip() or "(empty)"
            lines.append(wrapped(label, f"{text}  [score {score:.1f}, gold {gold:.1f}]"))
        blocks.append("\n".join(lines))
    assert (files.folder / "samples.txt").read_text(encoding="utf-8") == "\n\n".join(blocks)


# ---- shares and turning points -------------------------------------------------------------------------------------

def made_up_rows(**objectives):
    return {name: dict(objective=objective, kl=238.4, optimum_share=None) for name, objective in objectives.items()}


def test_shares_by_hand():
    """Bug: a share of another gain; a policy 238 nats away shows -2244% as if it were a result."""
    rows = made_up_rows(pretrained=-9.0, sft=0.5, best_of_n=1.0, ppo=1.5)
    assert add_shares(rows, J=1.5, ess=3.1, error=0.49) == []
    assert [row["optimum_share"] for row in rows.values()] == pytest.approx([-9.5, 0.0, 0.5, 1.0])
    rows = made_up_rows(sft=0.0, dpo=-10.0, ppo=-10.1)
    (warning,) = add_shares(rows, 1.0, 50, 0.1)
    assert warning.startswith("PPO is 238.4 nats from SFT")
    assert [row["optimum_share"] for row in rows.values()] == [0.0, -10.0, None]


def test_no_share_of_a_gain_that_may_be_none():
    """Bug: thousands of percent when the reference is at the optimum already; 291% of the best of eight samples."""
    at_optimum = "the SFT policy is at the optimum"
    for J, ess, error, start in ((0.6, 50, 0.051, at_optimum), (0.5, 50, 0.0, at_optimum),
                                 (math.nan, 50, 0.0, at_optimum), (1.0, 2.9, 0.1, "the optimum is known from too few")):
        rows = made_up_rows(sft=0.5, ppo=1.5)
        (warning,) = add_shares(rows, J, ess, error)
        assert warning.startswith(start) and rows["ppo"]["optimum_share"] is None


@pytest.mark.parametrize("gold, score, turned", [
    ([0, 1, 2.5, 2, 0.3], [0, 1, 2, 3, 4], True),    # gold falls while the score climbs, by 3.6 errors
    ([0, 1, 2, 1.4, 1], [0, 1, 2, 3, 4], False),     # it falls by less than three errors
    ([0, 1, 4, 1, 5], [0, 1, 2, 3, 4], False),       # it recovers
    ([0, 1, 4, 2, 0], [0, 1, 4, 3, 2], False)])      # the score falls too: not over-optimisation
def test_the_turning_point_by_hand(gold, score, turned):
    """Bug: a turn is seen where gold only jitters or where the score falls too, is missed, or is at another step."""
    gold = [g + jitter for g in gold for jitter in (0.3, -0.3, 0.3, -0.3)]  # 20 steps, averaged over two at a time
    score = [s for s in score for _ in range(4)]
    assert turning_point(list(range(2, 42, 2)), gold, score) == (20 if turned else None)
    assert turning_point(list(range(21)), [gold[0], *gold], [score[0], *score]) == (10 if turned else None)
    assert turning_point([7], gold[:1], score[:1]) is None


def test_turning_points_are_of_gold():
    """Bug: score and gold change places, a fall that nobody would see is told, or DPO is asked for its gold."""
    steps = [dict(step=i, score=i / 10, gold=min(i, 40 - i) / 10) for i in range(40)]
    healthy = [dict(step=i, score=min(i, 40 - i) / 10, gold=i / 10) for i in range(40)]
    small = [dict(step=i, score=i, gold=0.02 * min(i, 20) - 0.005 * max(0, i - 20)) for i in range(40)]
    found = turning_points(dict(ppo=steps, grpo=healthy, rloo=small, dpo=[dict(step=0, loss=0.7)]))
    assert found == dict(ppo=22, grpo=None, rloo=None)


# ---- the table -----------------------------------------------------------------------------------------------------

def result(**changes):
    sft = dict(gold=0.0, gold_se=0.1, score=0.0, score_se=0.02, kl=0.0, kl_se=0.0, objective=0.0, objective_se=0.03,
               optimum_share=0.0, optimum_share_se=0.0, win_rate=0.5, win_rate_se=0.01, length=20.04)
    best_of_n = dict(gold=0.5, gold_se=0.04, score=1.4, score_se=0.05, kl=1.84, kl_se=0.0, objective=1.03,
                     objective_se=0.06, optimum_share=0.86, optimum_share_se=0.07, win_rate=0.7, win_rate_se=0.08,
                     length=18.0)
    ppo = dict(gold=-1.234, gold_se=0.056, score=1.5, score_se=1.021, kl=2.5, kl_se=0.125, objective=1.0,
               objective_se=0.09, optimum_share=-0.8333, optimum_share_se=0.0512, win_rate=0.25, win_rate_se=0.03,
               length=7.96)
    best = dict(objective=1.2, kl=3.0, gold=0.8, ess=412.4)
    return {**dict(policies=dict(sft=sft, best_of_n=best_of_n, ppo=ppo), optimum=best, warnings=[], diagnosis=[],
                   config=dict(beta=0.2, best_of=16, eval_prompts=512)), **changes}


def test_the_table_by_hand():
    """Bug: a number is in the wrong column, or with another one's error; points are called standard deviations."""
    found, table = make_table(result()), format_table(result(warnings=["PPO is 238.4 nats away"]))
    assert found == [
        ["policy", "gold", "score", "KL", "objective", "optimum", "wins", "tokens"],
        ["SFT", "0.00 ±.10", "0.00 ±.02", "0.00", "0.00 ±.03", "0%", "50% ±1", "20.0"],
        ["best of 16", "0.50 ±.04", "1.40 ±.05", "1.84", "1.03 ±.06", "86% ±7", "70% ±8", "18.0"],
        ["PPO", "-1.23 ±.06", "1.50 ±1.02", "2.50 ±.12", "1.00 ±.09", "-83% ±5", "25% ±3", "8.0"],
        ["the optimum", "0.80", "1.80", "3.00", "1.20", "100%", "-", "-"]]  # score: objective + beta KL
    assert table.splitlines()[4] == "PPO         -1.23 ±.06 1.50 ±1.02 2.50 ±.12 1.00 ±.09 -83% ±5 25% ±3    8.0"
    text = " ".join(table.split())
    assert "score - 0.2 KL" in text and "8,192 SFT samples, effective sample size 412." in text
    assert table.splitlines()[-1] == "warning: PPO is 238.4 nats away" and "is not the aim" not in text
    rows = result()["policies"]
    with_dpo = result(policies={**rows, "ipo": rows["ppo"], "online_dpo": rows["ppo"]})
    assert format_notes(with_dpo)[-1].startswith("IPO: trained on the labels and not on the score")
    for source, scaled in (("model", "gold and score"), ("task", "gold"), ("x.py:f", "gold")):
        [units, *_] = format_notes(result(config=dict(result()["config"], reward_from=source)))
        assert units.startswith(f"{scaled} in standard deviations of SFT's, KL in nats")


def test_the_table_says_what_is_not_known():
    """Bug: a bound from three samples is shown as a fact, an unknown gold or share as 0, or beta = 0 is a traceback."""
    few = result(optimum=dict(objective=1.2, kl=3.0, gold=None, ess=99.4))
    for row in few["policies"].values():
        row.update(gold=None, gold_se=None, win_rate=None, optimum_share=None)
    table = format_table(few)
    text, found = " ".join(table.split()), make_table(few)
    assert "effective sample size 99, below 100: the optimum is uncertain." in text
    assert "this data has no oracle" in text and "wins against" not in text
    assert found[0] == ["policy", "score", "KL", "objective", "optimum", "tokens"]
    assert found[3] == ["PPO", "1.50 ±1.02", "2.50 ±.12", "1.00 ±.09", "-", "8.0"]
    table = format_table(result(optimum=None, config=dict(beta=0.0, best_of=16, eval_prompts=512)))
    assert "the optimum" not in table and "effective" not in table and "objective" not in table
    numbers = [number(x, se) for x, se in ((None, None), (1.234, None), (1.234, 0.0), (-0.004, None), (-38.23, 1.04))]
    assert numbers == ["-", "1.23", "1.23", "0.00", "-38.2 ±1.0"]
    assert number(0.8234, 0.0169, 3) == "0.823 ±0.017" and percent(-1.5, 0.2) == "-150%"


def test_the_report_warns(smallest, monkeypatch):
    """Bug: shares of the optimum of a coin, copies of a prompt that pass for new ones, a turn of gold is not told."""
    def error(x, prompts=()):
        assert len(prompts) == len(x) and len(set(prompts)) == 2
        return standard_error(x, prompts)

    monkeypatch.setattr(report_module, "standard_error", error)
    monkeypatch.setattr(report_module, "turning_points", lambda metrics: dict.fromkeys(metrics) | dict(ppo=7))
    lines = (smallest / "split.jsonl").read_text().splitlines(keepends=True)
    heldout = [line for line in lines if '"heldout"' in line]
    kept = [line for line in lines if line not in heldout[2:]]  # two held-out prompts, which are asked twice
    (smallest / "split.jsonl").write_text("".join(kept))
    reward = json.loads((smallest / "reward.json").read_text())
    (smallest / "reward.json").write_text(json.dumps({**reward, "at_chance": True}))
    (smallest / "report.json").unlink()
    assert minirlhf.main(["--out", str(smallest), "--quick", "--seed", str(SEED)]) == 0
    report = json.loads((smallest / "report.json").read_text())
    assert report["warnings"] == [
        AT_CHANCE, "4 answers to 2 different prompts: the errors count prompts, not answers",
        "PPO over-optimised: from iteration 7 on gold fell while the score rose"]
    assert {row["optimum_share"] for row in report["policies"].values()} == {None}


def test_gold_as_the_reward_without_beta(smallest):
    """Bug: with --reward-from gold something still asks the reward model; a row still pays for its KL, or 0 divides."""
    folder, reward = smallest.parent / "gold", json.loads((smallest / "reward.json").read_text())
    (smallest / "reward.json").write_text(json.dumps({**reward, "at_chance": True}))
    command = ["--from", str(smallest), "--reward-from", "gold", "--beta", "0", "--policies", "ppo,grpo"]
    assert minirlhf.main([*command, "--out", str(folder)]) == 0
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for name in ("ppo", "grpo"):
        steps = [row for row in rows if row["stage"] == name and "step" in row]
        assert len(steps) == 3 and all(row["score"] == pytest.approx(row["gold"], abs=1e-5) for row in steps)
    report = json.loads((folder / "report.json").read_text())
    assert AT_CHANCE not in report["warnings"] and report["optimum"] is None
    for row in report["policies"].values():
        assert row["objective"] == row["score"] == pytest.approx(row["gold"], abs=1e-5)
        assert row["optimum_share"] is None


def test_the_task_as_the_reward(smallest, device, monkeypatch, capsys):
    """Bug: with --reward-from task something else is the score, redraws go nowhere, pass@k mixes up the prompts."""
    folder = smallest.parent / "task"
    monkeypatch.setattr(report_module, "TRIED", 3)
    monkeypatch.setattr(report_module, "TRIES", 10)
    monkeypatch.setattr(world, "task", lambda prompt, response: float("was" in response))  # the small policy can do it
    command = ["--from", str(smallest), "--reward-from", "task", "--redraws", "2", "--out", str(folder),
               "--policies", "rloo,online_dpo"]
    assert minirlhf.main(command) == 0
    headings = re.findall("^policy .*", capsys.readouterr().out, re.MULTILINE)
    assert [heading.split()[-2:] for heading in headings] == [["wins", "pass@8"]]  # with the tokens too: 82 columns
    files = Files(folder, device)
    rloo, online_dpo = files.metrics("rloo"), files.metrics("online_dpo")
    assert len(rloo) == len(online_dpo) == 3
    for row in rloo + online_dpo:
        assert row["score"] * 8 == pytest.approx(round(row["score"] * 8)) and row["score"] != row["gold"]
    assert "redrawn" in rloo[0] and "redrawn" not in online_dpo[0]
    tried = [prompt for prompt in files.heldout()[:3] for _ in range(10)]
    for name in ("pretrained", "sft", "rloo", "online_dpo"):
        texts = map(files.text, files.sample(name, tried, 1000 * SEED + 7))
        passed = torch.tensor([float("was" in text) for text in texts]).view(3, 10)
        assert 0 < passed.sum() < 30
        found = files.report["policies"][name]["pass_at_k"]
        assert found == pytest.approx(pass_at_k(passed, 8).mean().item(), rel=1e-5)
