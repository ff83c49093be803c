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
from helpers import close, double

import minirlhf
from data import make_tokenizer, printable
from pipeline import report as report_module
from pipeline.config import Config
from pipeline.report import AT_CHANCE, Answers, add_shares, fenced, format_samples, format_table, make_row, number

NAMES = dict(pretrained="pretrained", sft="SFT", best_of_n="best of n", dpo="DPO", ppo="PPO", grpo="GRPO")
PROMPT = "i saw this little film with my sister last night ."


@pytest.fixture(scope="module")
def measured(files):
    """
    What the report should have measured: for each policy a list of (prompt, response, gold), one for each held-out
    prompt, and for each prompt the score and the gold of its n samples, and the gold of its opponents.
    """
    prompts, seed, n = files.heldout(), files.config["seed"], files.config["best_of"]
    many = files.sample("sft", [prompt for prompt in prompts for _ in range(n + 4)], seed + 99)
    answers = {name: files.sample(name, prompts, seed + 100) for name in ("pretrained", "dpo", "ppo", "grpo")}
    answers["sft"], answers["best_of_n"] = [], []
    scores, golds, opponents = [], [], []
    for i, prompt in enumerate(prompts):
        own = many[i * (n + 4):(i + 1) * (n + 4)]
        scores.append([files.scores("reward", prompt + response)[-1] for response in own[:n]])
        golds.append([files.gold(prompt, response) for response in own[:n]])
        opponents.append([files.gold(prompt, response) for response in own[n:]])
        answers["sft"].append(own[0])
        answers["best_of_n"].append(own[scores[-1].index(max(scores[-1]))])
    rows = {name: [(prompt, response, files.gold(prompt, response)) for prompt, response in zip(prompts, answers[name])]
            for name in NAMES}
    return SimpleNamespace(rows=rows, scores=scores, golds=golds, opponents=opponents)


def near(x):
    return pytest.approx(x, abs=2e-4)


def expected_score(files, measured, name):
    if name == "sft":  # all n samples of all prompts
        return statistics.mean(score for scores in measured.scores for score in scores)
    if name == "best_of_n":
        return statistics.mean(max(scores) for scores in measured.scores)
    return statistics.mean(files.scores("reward", prompt + response)[-1] for prompt, response, _ in measured.rows[name])


def expected_kl(files, measured, name):
    """The KL of each response, or the bound for best-of-n."""
    if name == "best_of_n":
        n = files.config["best_of"]
        return [math.log(n) - (n - 1) / n]
    return [files.kl(name, prompt, response) for prompt, response, _ in measured.rows[name]]


# ---- report.json ---------------------------------------------------------------------------------------------------

def test_the_report_is_complete(files):
    """A policy, the optimum or a column is missing, or a number is not a number."""
    report = files.report
    assert set(report) == set("policies optimum frontier reward_model warnings seconds config device torch".split())
    assert report["warnings"] == []
    assert list(report["policies"]) == list(NAMES)
    columns = set("gold gold_se score kl kl_se objective optimum_share win_rate length finished".split())
    for row in report["policies"].values():
        assert set(row) == columns
        assert all(isinstance(x, float) and math.isfinite(x) for x in row.values())
    assert set(report["optimum"]) == {"objective", "kl", "gold", "ess"}
    assert report["config"] == files.config
    assert report["device"] == "cpu" and report["torch"] == torch.__version__


@pytest.mark.parametrize("name", NAMES)
def test_gold_and_its_error(files, measured, name):
    """Gold of another policy, of training prompts, in raw points, or with the error of the population."""
    golds = [gold for _, _, gold in measured.rows[name]]
    row = files.report["policies"][name]
    assert row["gold"] == near(statistics.mean(golds))
    assert row["gold_se"] == near(statistics.stdev(golds) / math.sqrt(len(golds)))
    assert row["gold_se"] > 0.01


@pytest.mark.parametrize("name", NAMES)
def test_score_kl_and_objective(files, measured, name):
    """KL with its roles exchanged or per token, a score that is not normalised, or an objective with another beta."""
    score = expected_score(files, measured, name)
    kls = expected_kl(files, measured, name)
    kl = statistics.mean(kls)
    row = files.report["policies"][name]
    assert row["score"] == near(score) and row["kl"] == near(kl)
    assert row["kl_se"] == near(statistics.stdev(kls) / math.sqrt(len(kls)) if len(kls) > 1 else 0.0)
    assert row["objective"] == near(score - files.config["beta"] * kl)
    if name in ("pretrained", "dpo", "ppo", "grpo"):
        assert kl > 0.05
    if name == "sft":
        assert row["kl"] == row["kl_se"] == 0


def test_the_optimum(files, measured):
    """The optimum with DPO's beta, of the sum and not the mean, or with the KL and the gold of the reference."""
    beta = files.config["beta"]
    total = squares = score = gold = 0.0
    n = 0
    for scores, golds in zip(measured.scores, measured.golds):
        for s, g in zip(scores, golds):
            weight = math.exp(s / beta)
            total += weight
            squares += weight ** 2
            score += weight * s
            gold += weight * g
            n += 1
    assert n == files.config["best_of"] * files.config["eval_prompts"]
    best = files.report["optimum"]
    J = beta * math.log(total / n)
    assert best["objective"] == near(J)
    assert best["kl"] == pytest.approx((score / total - J) / beta, abs=2e-3)
    assert best["gold"] == pytest.approx(gold / total, abs=2e-3)
    assert best["ess"] == pytest.approx(total ** 2 / squares, rel=2e-3)


@pytest.mark.parametrize("name", NAMES)
def test_the_share_of_the_optimum(files, name):
    """The share is counted from 0 and not from the SFT policy, or is a share of the score."""
    rows, best = files.report["policies"], files.report["optimum"]["objective"]
    start = rows["sft"]["objective"]
    assert rows[name]["optimum_share"] == near((rows[name]["objective"] - start) / (best - start))
    if name == "sft":
        assert rows[name]["optimum_share"] == 0


@pytest.mark.parametrize("name", NAMES)
def test_the_win_rate(files, measured, name):
    """A win is counted as a loss, a tie as a win, or the opponents answered another prompt."""
    points, ties, games = 0.0, 0, 0
    for (_, _, gold), opponents in zip(measured.rows[name], measured.opponents):
        for opponent in opponents:
            games += 1
            if abs(gold - opponent) < 1e-9:
                ties += 1
                points += 0.5
            elif gold > opponent:
                points += 1
    assert games == 4 * files.config["eval_prompts"] and ties > 0
    assert files.report["policies"][name]["win_rate"] == near(points / games)


@pytest.mark.parametrize("name", NAMES)
def test_length_and_finished(files, measured, name):
    """The length counts the padding, or a response that was cut counts as finished."""
    responses = [response for _, response, _ in measured.rows[name]]
    row = files.report["policies"][name]
    assert row["length"] == near(sum(map(len, responses)) / len(responses))
    assert row["finished"] == near(sum(response[-1] == files.end for response in responses) / len(responses))


def test_some_responses_end_and_some_are_cut(measured, files):
    """The tiny run is too simple to tell a response that ended from one that was cut."""
    for name in ("sft", "dpo", "ppo", "grpo"):
        assert 0 < files.report["policies"][name]["finished"] < 1


def test_the_reward_model_and_the_seconds(files):
    """The report shows the reward model of another run, or seconds that no stage took."""
    assert files.report["reward_model"] == json.loads((files.folder / "reward.json").read_text())
    lines = (files.folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    expected = {row["stage"]: row["stage_seconds"] for row in rows if "stage_seconds" in row}
    del expected["report"]
    assert list(files.report["seconds"]) == ["pretrain", "sft", "preferences", "reward", "ppo", "grpo", "dpo"]
    for stage, seconds in expected.items():
        assert files.report["seconds"][stage] == pytest.approx(seconds, abs=0.051)


def test_a_text_stays_in_its_block():
    """A line of a user's text looks like another policy's answer, ends the block of report.md, or clears the screen."""
    tokenizer = make_tokenizer([])
    encode = tokenizer.encode_ordinary
    answers = {"sft": SimpleNamespace(responses=[encode("one\n  PPO  two\x1b[2J")])}
    text = format_samples(SimpleNamespace(tokenizer=tokenizer), [encode("```\nprompt")], answers)
    assert text == f"```\n{' ' * 14}prompt\n  SFT         one\n{' ' * 14}  PPO  two\\x1b[2J"
    assert fenced(text) == f"````\n{text}\n````\n"
    assert fenced("a `b`") == "```\na `b`\n```\n"


def shown(text):
    """A text of samples.txt: without control characters, and its later lines below the first."""
    return printable(text).replace("\n", "\n" + " " * 14)


def test_the_samples_are_those_of_the_policies(files, measured):
    """A response stands under another policy's name or another prompt; or best-of-n is picked by gold."""
    blocks = []
    for i in range(16):
        lines = [shown(files.text(measured.rows["sft"][i][0]))]
        for name, label in NAMES.items():
            lines.append("  " + label.ljust(12) + shown(files.text(measured.rows[name][i][1]).strip()))
        blocks.append("\n".join(lines))
    samples = (files.folder / "samples.txt").read_text(encoding="utf-8")
    assert samples == "\n\n".join(blocks)
    table = format_table(files.report)
    few = "\n\n".join(blocks[:3])
    report_md = (files.folder / "report.md").read_text(encoding="utf-8")
    assert report_md == f"# {files.folder.name}\n\n```\n{table}\n```\n\n```\n{few}\n```\n"


def test_the_best_by_score_is_not_the_best_by_gold(measured):
    """The tiny run is too simple to tell which of the two picks best-of-n."""
    picked = [gold for _, _, gold in measured.rows["best_of_n"]]
    assert sum(gold < max(golds) for gold, golds in zip(picked, measured.golds)) > 3


@pytest.mark.slow
def test_without_beta_and_without_dpo(tiny_copy, files, capsys):
    """A division by beta = 0, or a policy that was not trained ends the report."""
    (tiny_copy / "dpo.pt").unlink()
    settings = {**json.loads((tiny_copy / "config.json").read_text()), "beta": 0.0}
    (tiny_copy / "config.json").write_text(json.dumps(settings))
    assert minirlhf.main(["--stages", "report", "--out", str(tiny_copy)]) == 0
    report = json.loads((tiny_copy / "report.json").read_text())
    assert list(report["policies"]) == ["pretrained", "sft", "best_of_n", "ppo", "grpo"]
    assert report["optimum"] is None and report["config"]["beta"] == 0
    for name, row in report["policies"].items():
        before = files.report["policies"][name]
        assert row["objective"] == row["score"] == before["score"]
        assert row["kl"] == before["kl"] and row["optimum_share"] is None
    out = capsys.readouterr().out
    assert "the optimum" not in out and "DPO  " not in out and "objective = score - 0 KL" in out


# ---- the row of a policy, on made-up answers -----------------------------------------------------------------------

def made_up(gold):
    M = len(gold)
    return Answers([[1]] * M, double(gold), double([1.0, 2.0, 6.0][:M]), double([0.0, 0.5, 1.0][:M]),
                   double([4.0, 5.0, 9.0][:M]), double([1.0, 0.0, 1.0][:M]))


def test_a_row_by_hand():
    """A column is the mean of another one, or a tie counts as a win."""
    opponents = double([[0.0, 1.0], [1.0, 3.0], [3.0, 2.0]])  # two losses and ties, two wins, a win and a tie
    row = make_row(made_up([0.0, 5.0, 3.0]), opponents, beta=2.0)
    wins = (0.5 + 0 + 1 + 1 + 0.5 + 1) / 6
    expected = dict(gold=8 / 3, gold_se=statistics.stdev([0, 5, 3]) / math.sqrt(3), score=3.0, kl=0.5,
                    kl_se=0.5 / math.sqrt(3), objective=2.0, win_rate=wins, length=6.0, finished=2 / 3)
    assert row.pop("optimum_share") is None
    assert row == pytest.approx(expected)


def test_a_row_without_an_oracle():
    """A win rate against NaN is 0, or JSON gets a NaN."""
    row = make_row(made_up([math.nan] * 3), torch.full((3, 2), math.nan), beta=0.1)
    assert row["gold"] is None and row["gold_se"] is None and row["win_rate"] is None
    json.dumps(row, allow_nan=False)


def test_a_row_of_a_single_prompt():
    """The standard error of one answer is NaN."""
    row = make_row(made_up([1.0]), double([[1.0, 0.0]]), beta=0.1)
    assert row["gold_se"] == row["kl_se"] == 0 and row["win_rate"] == 0.75


def test_a_row_counts_prompts():
    """The error of an answer that was repeated shrinks, of gold or of KL."""
    row = make_row(made_up([0.0, 5.0, 3.0]), double([[1.0]] * 3), 0.1, prompts=["a", "b", "b"])
    assert row["gold_se"] == pytest.approx(math.sqrt(2 * 2 * (8 / 3) ** 2) / 3)
    assert row["kl_se"] == pytest.approx(math.sqrt(2 * 2 * 0.5 ** 2) / 3)


def test_a_row_of_a_broken_network():
    """JSON gets an infinity when a network diverged in its last step."""
    row = make_row(made_up([0.0, 5.0, 3.0])._replace(score=double([1.0, math.inf, 2.0])), double([[1.0]] * 3), 0.1)
    assert row["score"] is None and row["objective"] is None and row["kl"] == 0.5
    json.dumps(row, allow_nan=False)


def made_up_rows(**objectives):
    return {name: dict(objective=objective, kl=238.4, optimum_share=None) for name, objective in objectives.items()}


def test_shares_by_hand():
    """A share of another gain, or one that is kept from a row that has one."""
    rows = made_up_rows(pretrained=-9.0, sft=0.5, best_of_n=1.0, ppo=1.5)
    assert add_shares(rows, J=1.5, error=0.49) == []
    assert [row["optimum_share"] for row in rows.values()] == pytest.approx([-9.5, 0.0, 0.5, 1.0])


@pytest.mark.parametrize("J, error", [(0.6, 0.051), (0.5, 0.0), (0.4, 0.0), (math.nan, 0.0), (0.6, math.nan)])
def test_no_share_of_a_gain_that_may_be_none(J, error):
    """A division by 0, or thousands of percent, when the reference is at the optimum already."""
    rows = made_up_rows(sft=0.5, ppo=1.5)
    (warning,) = add_shares(rows, J, error)
    assert warning.startswith("the SFT policy is at the optimum")
    assert all(row["optimum_share"] is None for row in rows.values())


def test_no_share_of_a_policy_that_is_far_away():
    """A policy 238 nats away stands at -2244% as if that were a result; or a broken one ends the report."""
    rows = made_up_rows(sft=0.0, dpo=-10.0, ppo=-10.1, best_of_n=None)
    warnings = add_shares(rows, 1.0, 0.1)
    assert [row["optimum_share"] for row in rows.values()] == [0.0, -10.0, None, None]
    assert [warning.split(",")[0] for warning in warnings] == [
        "PPO is 238.40 nats from SFT", "best of n is 238.40 nats from SFT"]


def test_picking_answers():
    """The scores of one answer stand beside the text of another."""
    answers = Answers([[1], [2], [3]], *[double([10.0 * k + i for i in range(3)]) for k in range(5)])
    picked = answers.pick([2, 0])
    assert picked.responses == [[3], [1]]
    for k, tensor in enumerate(picked[1:]):
        close(tensor, [10.0 * k + 2, 10.0 * k])


@pytest.mark.parametrize("gold, score, turned", [
    ([0, 1, 2, 1.5, 1], [0, 1, 2, 3, 4], True),       # gold falls while the score climbs
    ([0, 1, 2, 1.95, 1.92], [0, 1, 2, 3, 4], False),  # it falls by less than noise
    ([0, 1, 2, 1, 3], [0, 1, 2, 3, 4], False),        # it recovers
    ([0, 1, 2, 1, 0], [0, 1, 4, 3, 2], False),        # the score falls too: not over-optimisation
    ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4], False)])
def test_the_turning_point_by_hand(gold, score, turned):
    """A turn is seen where gold only jitters or where the score falls too, or it is missed, or seen at another step."""
    gold = [g + jitter for g in gold for jitter in (0.2, -0.2, 0.2, -0.2)]  # 20 steps, averaged over two at a time
    score = [s for s in score for _ in range(4)]
    assert report_module.turning_point(list(range(2, 42, 2)), gold, score) == (20 if turned else None)
    more = [gold[0], *gold], [score[0], *score]  # the last tenth ends with the run
    assert report_module.turning_point(list(range(21)), *more) == (10 if turned else None)
    assert report_module.turning_point([7], [1.0], [1.0]) is None


# ---- the table -----------------------------------------------------------------------------------------------------

def result(**changes):
    sft = dict(gold=0.0, gold_se=0.1, score=0.0, kl=0.0, kl_se=0.0, objective=0.0, optimum_share=0.0, win_rate=0.5,
               length=20.04, finished=0.995)
    best_of_n = dict(gold=0.5, gold_se=0.04, score=1.4, kl=1.84, kl_se=0.0, objective=1.03, optimum_share=0.86,
                     win_rate=0.7, length=18.0, finished=1.0)
    ppo = dict(gold=-1.234, gold_se=0.056, score=1.5, kl=2.5, kl_se=0.125, objective=1.0, optimum_share=-0.8333,
               win_rate=0.25, length=7.96, finished=0.5)
    best = dict(objective=1.2, kl=3.0, gold=0.8, ess=412.4)
    default = dict(policies=dict(sft=sft, best_of_n=best_of_n, ppo=ppo), optimum=best,
                   config=dict(beta=0.2, best_of=16, eval_prompts=512))
    return {**default, **changes}


def test_the_table_by_hand():
    """A number stands in the wrong column, or with another one's error."""
    table = format_table(result())
    cells = [re.split(r" {2,}", line.strip()) for line in table.splitlines()]
    assert cells[0] == ["policy", "gold", "score", "KL", "objective", "optimum", "wins", "tokens", "finished"]
    assert cells[2] == ["SFT", "0.00 ±0.10", "0.00", "0.00", "0.00", "0%", "0.50", "20.0", "100%"]
    assert cells[3] == ["best of 16", "0.50 ±0.04", "1.40", "1.84", "1.03", "86%", "0.70", "18.0", "100%"]
    assert cells[4] == ["PPO", "-1.23 ±0.06", "1.50", "2.50 ±0.12", "1.00", "-83%", "0.25", "8.0", "50%"]
    assert cells[5] == ["the optimum", "0.80", "1.80", "3.00", "1.20", "100%"]  # its score is objective + beta KL
    assert len({len(line) for line in table.splitlines()[:7]}) == 1  # the columns stand below each other
    assert "objective = score - 0.2 KL" in table
    assert "by reweighting 8,192 SFT samples, effective sample size 412" in table
    assert "loose" not in table and "no oracle" not in table and "MiB" not in table


def test_the_table_says_what_grpo_was():
    """RLOO and GRPO stand under one name, and nobody knows which."""
    settings = dict(beta=0.2, best_of=16, eval_prompts=512, grpo_kind="dr_grpo", group=8, grpo_kl="loss")
    policies = result()["policies"]
    table = format_table(result(policies=dict(policies, grpo=policies["ppo"]), config=settings))
    assert "GRPO with the advantages of dr_grpo, groups of 8, the KL in the loss" in table.splitlines()
    assert re.search(r"^GRPO +-1.23", table, re.MULTILINE) and "advantages of" not in format_table(result())


def test_the_table_says_what_is_not_known():
    """A bound from three samples is shown as a fact, or an unknown gold as 0."""
    few = result(optimum=dict(objective=1.2, kl=3.0, gold=None, ess=99.4))
    for row in few["policies"].values():
        row.update(gold=None, gold_se=None, win_rate=None)
    table = format_table(few)
    assert "effective sample size 99, below 100: the optimum is uncertain" in table
    assert "this data has no oracle: gold and wins are not known" in table
    cells = [re.split(r" {2,}", line.strip()) for line in table.splitlines()]
    assert cells[4] == ["PPO", "-", "1.50", "2.50 ±0.12", "1.00", "-83%", "-", "8.0", "50%"]
    assert cells[5] == ["the optimum", "-", "1.80", "3.00", "1.20", "100%"]


def test_the_table_warns():
    """A warning is in report.json and nobody sees it; or a share that is not known is 0%."""
    table = format_table(result(warnings=["PPO is 238.40 nats away", "one more"]))
    assert table.splitlines()[-2:] == ["warning: PPO is 238.40 nats away", "warning: one more"]
    assert "warning" not in format_table(result(warnings=[]))
    rows = result()["policies"]
    rows["ppo"]["optimum_share"] = None
    assert re.split(r" {2,}", format_table(result(policies=rows)).splitlines()[4])[5] == "-"


def test_a_number_and_its_error():
    """An error that is not known is 0.00, or digits are lost."""
    assert [number(x, se) for x, se in ((None, None), (1.234, None), (1.234, 0.0))] == ["-", "1.23", "1.23"]
    assert number(1.234, 0.056) == "1.23 ±0.06"
    assert number(0.8234, 0.0169, 3) == "0.823 ±0.017"


def test_the_table_without_an_optimum():
    """beta = 0 has no optimum, and the table ends in a traceback or shows one."""
    without = result(optimum=None, config=dict(beta=0.0, best_of=16, eval_prompts=512))
    for row in without["policies"].values():
        row["optimum_share"] = None
    table = format_table(without)
    assert "the optimum" not in table and "effective sample size" not in table
    assert re.split(r" {2,}", table.splitlines()[4])[5] == "-"


def test_the_table_tells_the_peak_of_a_gpus_memory():
    """The report of a run on a GPU is silent about its memory, or in a unit that nobody knows."""
    table = format_table(result(peak_memory=1234.4 * 2 ** 20))
    assert table.splitlines()[-1] == "at most 1,234 MiB of tensors on the GPU"


def stub_run(tmp_path, device):
    """What `report` needs of a run, without networks."""
    config = Config(best_of=2, eval_prompts=3, beta=0.5)
    for name in ("pretrained", "ppo"):
        (tmp_path / f"{name}.pt").touch()
    written = {}
    return SimpleNamespace(
        config=config, folder=tmp_path, device=SimpleNamespace(type=device), tokenizer=make_tokenizer(["a"]),
        prompts=lambda: (None, [[97], [98], [99]]), load_network=lambda name: name, scorer=lambda: "reward",
        read=lambda name: {},
        used=lambda name: {}, finished=dict, saw=lambda **sets: None, saved_config=lambda: vars(config),
        write=written.__setitem__, written=written)


@pytest.mark.parametrize("reward_from", ["model", "gold"])
@pytest.mark.parametrize("reward, prompts, beta, expected", [
    ({}, [[97], [98], [99]], 0.5, []), (dict(at_chance=False), [[97], [98], [99]], 0.5, []),
    (dict(at_chance=True), [[97], [98], [99]], 0.5, [AT_CHANCE]), (dict(at_chance=True), [[97]] * 3, 0.0, [
        AT_CHANCE, "3 answers to 1 different prompts: the errors count prompts, not answers"])])
def test_the_report_warns(reward, prompts, beta, expected, reward_from, tmp_path, monkeypatch):
    """Shares of the optimum of a reward model that is a coin, or copies of a prompt that pass for new ones."""
    if reward_from == "gold":  # the reward model has no part in the table
        expected = [warning for warning in expected if warning != AT_CHANCE]

    def answer(run, name, policy, reference, reward_model, prompts, seed):
        x = torch.arange(float(len(prompts))) % 5
        return Answers([[97]] * len(prompts), x, x, x, x, x)

    monkeypatch.setattr(report_module, "answer", answer)
    monkeypatch.setattr(report_module, "gain_error", lambda scores, beta, groups: 0.0)
    run = stub_run(tmp_path, "cpu")
    run.read, run.prompts, run.config.beta = lambda name: reward, lambda: (None, prompts), beta
    run.config.reward_from = reward_from
    report_module.report(run)
    report = json.loads(run.written["report.json"])
    assert report["warnings"] == expected
    known_shares = [row["optimum_share"] is not None for row in report["policies"].values()]
    assert known_shares == [not expected] * 4
    for warning in expected:
        assert f"\nwarning: {warning}\n" in run.written["report.md"]


@pytest.mark.slow
def test_policies_trained_for_other_objectives_are_said(tiny_copy):
    """PPO with one beta and GRPO with another stand in one table as if they could be compared."""
    path = tiny_copy / "stages.json"
    stages = json.loads(path.read_text())
    stages["ppo"]["settings"].update(beta=0.7, ppo_batch=8)
    path.write_text(json.dumps(stages))
    assert minirlhf.main(["--stages", "report", "--out", str(tiny_copy)]) == 0
    report = json.loads((tiny_copy / "report.json").read_text())
    assert report["warnings"][-1:] == ["PPO was trained with beta 0.7, ppo_batch 8: its row does not compare"]
    assert not [warning for warning in report["warnings"] if "GRPO was trained" in warning]


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_peak_of_a_gpus_memory_is_in_the_report(device, tmp_path, monkeypatch):
    """The report of a run on a GPU does not hold its memory; or one without a GPU asks for it and fails."""
    def answer(run, name, policy, reference, reward_model, prompts, seed):
        x = torch.arange(float(len(prompts)))
        return Answers([[97]] * len(prompts), x, x, x, x, x)

    monkeypatch.setattr(report_module, "answer", answer)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 77 * 2 ** 20)
    run = stub_run(tmp_path, device)
    report_module.report(run)
    report = json.loads(run.written["report.json"])
    assert report.get("peak_memory") == (77 * 2 ** 20 if device == "cuda" else None)
    assert ("at most 77 MiB" in run.written["report.md"]) == (device == "cuda")


def test_samples_by_hand():
    """A policy that is missing leaves its line to another one."""
    run = SimpleNamespace(tokenizer=make_tokenizer(["yes", "no"]))
    end = run.tokenizer.n_vocab - 2

    def answers(*texts):
        responses = [run.tokenizer.encode_ordinary(text) + [end] for text in texts]
        return Answers(responses, None, None, None, None, None)

    prompts = [run.tokenizer.encode_ordinary(text) for text in ("one ?", "two ?")]
    text = format_samples(run, prompts, dict(ppo=answers(" no", " yes yes"), sft=answers("yes", "")))
    assert text == "one ?\n  SFT         yes\n  PPO         no\n\ntwo ?\n  SFT         \n  PPO         yes yes"
