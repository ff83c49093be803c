"""
Every option of the command line does what its help says, in the stages that it belongs to, and nothing anywhere else.

A row of OPTIONS has the flags that set the option, the stages that use it, and a check of what they left. A row runs on
a copy of the tiny run, from the option's first stage on. The arguments of some calls are recorded on the way.
"""

import dataclasses
import inspect
import json
import math
import random
import re
import shutil
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY

import dpo
import grpo
import minirlhf
import ppo
import world
from pipeline import config, report, stages, views
from pipeline.config import PROMPTED, STAGES, VIEWS, Config
from pipeline.folder import MADE_BY

FIELDS = {field.name: field for field in dataclasses.fields(Config)}
PROMPT = "i saw this little film with my sister last night ."
TRACE = ["--stages", "trace", "--prompt", PROMPT]
RECORDED = {  # the calls that the checks look at: name in the check -> (module, name of the function)
    "train_sft": (stages, "train_sft"), "collate": (stages, "collate"), "train_ppo": (stages, "train_ppo"),
    "sample_policy": (stages, "sample_policy"), "evaluate": (report, "sample_policy"), "answer": (views, "generate"),
    "rollout": (ppo, "generate"), "rewards": (ppo, "token_rewards"), "gae": (ppo, "gae"),
    "policy_loss": (ppo, "policy_loss"), "value_loss": (ppo, "value_loss"), "trace_gae": (views, "gae"),
    "dpo_loss": (dpo, "dpo_loss"), "train_grpo": (stages, "train_grpo"), "grpo_rollout": (grpo, "generate"),
    "group_advantages": (grpo, "group_advantages"), "kl_loss": (grpo, "kl_loss"), "optimum": (report, "optimum"),
}


class Left:
    """What is in a folder of a run."""

    def __init__(self, folder):
        self.folder = folder
        self.rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    def json(self, name):
        return json.loads((self.folder / name).read_text())

    def sizes(self):
        return torch.load(self.folder / "pretrained.pt", weights_only=True)["config"]

    def weights(self, name):
        """The weights of a network, under the names that they have in a GPT."""
        saved = torch.load(self.folder / f"{name}.pt", weights_only=True)["network"]
        return {key.removeprefix("trunk."): tensor for key, tensor in saved.items()}

    def metrics(self, stage):
        return [row for row in self.rows if row["stage"] == stage and "step" in row]

    def pairs(self, split):
        rows = [json.loads(line) for line in (self.folder / "preferences.jsonl").read_text().splitlines()]
        return [row for row in rows if row["split"] == split]

    def artefacts(self, stage):
        """The bytes of the files that a stage made, and its rows of metrics without the seconds."""
        made = [name for name, maker in MADE_BY.items() if maker == stage and name != "data.json"]
        if stage == "report":
            made = ["samples.txt"]
        found = {name: (self.folder / name).read_bytes() for name in made}
        rows = [row for row in self.rows if row["stage"] == stage]
        found["metrics"] = [{**row, "seconds": 0, "stage_seconds": 0} for row in rows]
        if stage == "report":
            numbers = self.json("report.json")
            found["report"] = {name: numbers[name] for name in ("policies", "optimum", "reward_model")}
        return found


def same(a, b):
    """Whether two networks have the same weights, where they have the same names."""
    shared = set(a) & set(b)
    assert len(shared) > 10
    return all(torch.equal(a[name], b[name]) for name in shared)


# ---- the checks: old is the tiny run, new is its copy after the command, calls are the recorded arguments -----------

def check_out(old, new, calls, out):
    assert f"writing to {new.folder}\n" in out
    assert len(new.metrics("sft")) == 1 and len(old.metrics("sft")) == TINY["sft_steps"]


def check_device(old, new, calls, out):
    """The row pretends that there is a GPU, which would be taken by default."""
    assert "seed 3, cpu, torch" in out
    assert calls["train_sft"][0]["network"].wte.weight.device.type == "cpu"


def check_stages(old, new, calls, out):
    assert re.findall(r"^(\d)/8  (\w+):", out, re.MULTILINE) == [("4", "reward"), ("2", "sft")]


def check_quick(old, new, calls, out):
    assert new.sizes()["n_embd"] == config.QUICK["n_embd"] and "4,000 texts" in out
    assert calls["train_sft"][0]["peak_lr"] == config.QUICK["pretrain_lr"]


def check_data(old, new, calls, out):
    assert "144 texts" in out and " xylophone" in new.json("tokenizer.json")
    assert " xylophone" not in old.json("tokenizer.json")


def check_prompt(old, new, calls, out):
    assert out.splitlines()[0] == PROMPT
    tokenizer = calls["run"].tokenizer
    for call in calls["answer"]:
        assert [tokenizer.decode(ids) for ids in call["prompts"]] == [PROMPT]
    assert len(calls["answer"]) == 5 + 1  # sample asks five policies, trace one
    assert repr(PROMPT[-30:]) in out


def check_n_layer(old, new, calls, out):
    assert {name.split(".")[1] for name in new.weights("pretrained") if name.startswith("h.")} == {"0", "1", "2"}


def check_n_head(old, new, calls, out):
    assert old.sizes()["n_head"] == 2 and new.sizes()["n_head"] == 4
    assert calls["train_sft"][0]["network"].config.n_head == 4


def check_n_embd(old, new, calls, out):
    assert new.weights("pretrained")["wte.weight"].shape[1] == 16


def check_block_size(old, new, calls, out):
    assert len(new.weights("pretrained")["wpe.weight"]) == 50
    assert max(len(ids) for _, ids in calls["train_sft"][0]["examples"]) == 49


def check_response_tokens(old, new, calls, out):
    assert max(len(response) for _, response in calls["train_sft"][0]["examples"]) == 9
    assert max(len(row["chosen"]) for row in new.pairs("train")) == 9
    assert [call["max_new_tokens"] for call in calls["sample_policy"]] == [9, 9]  # preferences, normalisation
    assert calls["rollout"][0]["max_new_tokens"] == 9
    assert {call["max_new_tokens"] for call in calls["evaluate"]} == {9}
    lengths = [row["length"] for row in new.json("report.json")["policies"].values()]
    assert max(lengths) <= 9 < old.json("report.json")["policies"]["sft"]["length"]


def check_pretrain_steps(old, new, calls, out):
    assert len(new.metrics("pretrain")) == 2


def check_sft_steps(old, new, calls, out):
    assert len(new.metrics("sft")) == 3


def check_batch_size(old, new, calls, out):
    assert Counter(len(call["prompts"]) for call in calls["collate"]) == {100: 2}  # a step of each of the two stages
    steps = 2 * math.ceil(len(new.pairs("train")) / 100)
    assert len(new.metrics("reward")) == len(new.metrics("dpo")) == steps < len(old.metrics("dpo"))


def check_pairs(old, new, calls, out):
    assert 30 <= len(new.pairs("train")) <= 40 < len(old.pairs("train"))
    assert len(calls["sample_policy"][0]["prompts"]) == 2 * (40 + 512)
    assert len(new.pairs("heldout")) > 400


def check_label_temperature(old, new, calls, out):
    def wrong(rows):
        return sum(row["gold"][0] < row["gold"][1] for row in rows)

    assert wrong(old.pairs("train")) > 0 and wrong(new.pairs("train") + new.pairs("heldout")) == 0
    assert {row["ceiling"] for row in new.pairs("train")} == {0.5, 1.0}


def check_flip(old, new, calls, out):
    """The samples are the same as before, so the ceiling of each pair is known: 0.2 + 0.6 of what it was."""
    before, after = old.pairs("train") + old.pairs("heldout"), new.pairs("train") + new.pairs("heldout")
    assert len(before) == len(after)
    for a, b in zip(before, after):
        assert sorted([a["chosen"], a["rejected"]]) == sorted([b["chosen"], b["rejected"]])
        assert b["ceiling"] == pytest.approx(0.2 + 0.6 * a["ceiling"])
    exchanged = sum(a["chosen"] != b["chosen"] for a, b in zip(before, after)) / len(before)
    clear = [(a["gold"][0] - a["gold"][1], b["gold"][0] - b["gold"][1]) for a, b in zip(before, after)]
    clear = [b > 0 for a, b in clear if abs(a) > 2]
    assert 0.02 < exchanged < 0.4
    assert sum(clear) / len(clear) == pytest.approx(0.8, abs=4 * (0.16 / len(clear)) ** 0.5)


def check_held_out(old, new, calls, out):
    decode = calls["run"].tokenizer.decode

    def hotels(prompts):
        return sum(world.subject_of(decode(list(prompt))) == "hotel" for prompt in prompts)

    preferences, normalisation = [call["prompts"] for call in calls["sample_policy"]]
    trained_on = [prompt for prompt, _ in calls["train_sft"][1]["examples"]] + preferences[:2 * 60] + normalisation
    assert hotels(trained_on) == hotels(calls["train_ppo"][0]["prompts"]) == 0
    assert hotels(row["prompt"] for row in old.pairs("train")) > 10
    assert hotels(row["prompt"] for row in new.pairs("train")) == 0
    assert hotels(row["prompt"] for row in new.pairs("heldout")) > 50
    assert all(hotels(call["prompts"]) > 0 for call in calls["evaluate"]) and len(calls["evaluate"]) == 3
    assert " hotel " in (new.folder / "samples.txt").read_text()


def check_reward_lr(old, new, calls, out):
    assert not same(old.weights("reward"), old.weights("sft")) and same(new.weights("reward"), new.weights("sft"))


def check_beta(old, new, calls, out):
    """A higher price of KL: PPO stays nearer to the SFT policy, and the best policy reweights it less."""
    assert {call["beta"] for call in calls["rewards"]} == {5.0}
    for row in new.metrics("ppo"):
        assert row["objective"] == pytest.approx(row["score"] - 5 * row["kl"], abs=1e-5)
    assert new.metrics("ppo")[-1]["kl"] < 0.5 * old.metrics("ppo")[-1]["kl"]
    result, before = new.json("report.json"), old.json("report.json")
    for row in result["policies"].values():
        assert row["objective"] == pytest.approx(row["score"] - 5 * row["kl"], abs=1e-5)
    samples = 4 * 24
    assert result["optimum"]["ess"] > 0.9 * samples > 0.5 * samples > before["optimum"]["ess"]
    gain = result["optimum"]["objective"] - result["policies"]["sft"]["score"]
    assert 0.02 < gain < 0.2  # half a variance of the score, about 1, in 5
    assert 0 < result["optimum"]["kl"] < 0.1
    assert "objective = score - 5 KL" in out
    score, kl, total = re.search(r"= (\S+) - 5 \* (\S+) = (\S+);", out).groups()
    assert float(total) == pytest.approx(float(score) - 5 * float(kl), abs=0.01)
    *_, kl_terms, rewards = re.search(r"^sum(.*)$", out, re.MULTILINE)[1].split()
    assert float(rewards) == pytest.approx(float(total), abs=0.01)
    assert float(kl_terms) == pytest.approx(-5 * float(kl), abs=0.01)


def check_ppo_iterations(old, new, calls, out):
    assert len(new.metrics("ppo")) == 2


def check_ppo_batch(old, new, calls, out):
    assert [len(call["prompts"]) for call in calls["rollout"]] == [48]
    assert [len(call["mask"]) for call in calls["policy_loss"]] == 2 * [32, 16]


def check_minibatch(old, new, calls, out):
    assert [len(call["mask"]) for call in calls["policy_loss"]] == 2 * [24, 24, 16]


def check_ppo_epochs(old, new, calls, out):
    assert len(calls["policy_loss"]) == 3 * 2


def check_ppo_lr(old, new, calls, out):
    assert same(new.weights("ppo"), new.weights("sft"))
    assert not same(new.weights("critic"), new.weights("reward"))


def check_critic_lr(old, new, calls, out):
    assert same(new.weights("critic"), new.weights("reward"))
    assert not same(new.weights("ppo"), new.weights("sft"))


def sum_of_returns(calls):
    """The sum of all returns that the critic learns in the first of two passes over a rollout."""
    first = calls["value_loss"][:len(calls["value_loss"]) // 2]
    return sum(call["returns"].sum().item() for call in first)


def check_gamma(old, new, calls, out):
    """Without a future, the return of a token is its reward."""
    assert {call["gamma"] for call in calls["gae"] + calls["trace_gae"]} == {0.0}
    assert len(calls["gae"]) == len(calls["trace_gae"]) == 1
    assert sum_of_returns(calls) == pytest.approx(calls["gae"][0]["rewards"].sum().item(), abs=1e-3)


def check_lam(old, new, calls, out):
    """At lambda 0, the return of a token is its reward and the discounted value of the next state."""
    assert {call["lam"] for call in calls["gae"] + calls["trace_gae"]} == {0.0}
    assert len(calls["gae"]) == len(calls["trace_gae"]) == 1
    rewards, values = calls["gae"][0]["rewards"], calls["gae"][0]["values"]
    assert sum_of_returns(calls) == pytest.approx((rewards.sum() + 0.98 * values[:, 1:].sum()).item(), abs=1e-3)


def check_clip(old, new, calls, out):
    assert {call["clip"] for call in calls["policy_loss"]} == {0.0}
    assert new.metrics("ppo")[0]["clip_fraction"] > 0.6 > old.metrics("ppo")[0]["clip_fraction"] + 0.2


def check_reward_from(old, new, calls, out):
    """PPO, GRPO, the report and the trace: what was the score is gold, and the reward model is not asked."""
    run = calls["run"]
    for call in [*calls["train_ppo"], *calls["train_grpo"]]:
        rollout = call["policy"], calls["rollout"][0]["prompts"][:8]
        batch = grpo.generate(*rollout, 20, 1.0, torch.Generator().manual_seed(0))
        golds = run.gold(rollout[1], batch.response_ids())
        assert torch.equal(call["reward_model"](batch), golds) and golds.std() > 0
    for stage in ("ppo", "grpo"):
        assert all(row["score"] == row["gold"] for row in new.metrics(stage))
    rows, before = new.json("report.json")["policies"], old.json("report.json")["policies"]
    for name in ("pretrained", "ppo", "grpo"):
        assert rows[name]["score"] == pytest.approx(rows[name]["gold"])
        assert before[name]["score"] != pytest.approx(before[name]["gold"])
    assert rows["best_of_n"]["gold"] > before["best_of_n"]["gold"]  # the best by gold, and not by the reward model
    assert calls["optimum"][0]["scores"].mean() == pytest.approx(rows["sft"]["score"], abs=1e-5)
    score, gold = re.search(r"= (\S+) - \S+ \* \S+ = \S+; gold (\S+?)[;\n]", out).groups()
    assert float(score) == pytest.approx(float(gold), abs=0.006)


def check_grpo_kind(old, new, calls, out):
    """GRPO divides by the deviation of a group: its advantages have the deviation 1."""
    assert {call["kind"] for call in calls["group_advantages"]} == {"grpo"}
    assert new.weights("grpo").keys() == old.weights("grpo").keys()
    assert not same(new.weights("grpo"), old.weights("grpo"))


def check_group(old, new, calls, out):
    assert [call["group"] for call in calls["group_advantages"]] == [8]
    prompts = calls["grpo_rollout"][0]["prompts"]
    assert len(prompts) == 64 and all(prompts[i:i + 8] == [prompts[i]] * 8 for i in range(0, 64, 8))
    assert len({tuple(prompt) for prompt in prompts}) > 6


def check_grpo_lr(old, new, calls, out):
    assert same(new.weights("grpo"), new.weights("sft")) and not same(old.weights("grpo"), old.weights("sft"))


def check_grpo_kl(old, new, calls, out):
    """The KL is paid once: in the loss, and no longer in the reward, which is the score alone."""
    assert len(calls["kl_loss"]) == 2 * 2
    reward_model = calls["train_grpo"][0]["reward_model"]
    assert reward_model is not None
    assert calls["group_advantages"][0]["rewards"].mean().item() == pytest.approx(
        new.metrics("grpo")[0]["score"], abs=1e-5)
    assert new.metrics("grpo")[0]["loss"] != old.metrics("grpo")[0]["loss"]


def dpo_margins(calls, beta):
    """The mean margin and the mean reward of the chosen response of each step, from what the loss was given."""
    margins, chosen = [], []
    for call in calls["dpo_loss"]:
        a, b = call["chosen"] - call["ref_chosen"], call["rejected"] - call["ref_rejected"]
        margins.append(beta * (a - b).mean().item())
        chosen.append(beta * a.mean().item())
    return margins, chosen


def check_dpo_beta(old, new, calls, out):
    assert {call["beta"] for call in calls["dpo_loss"]} == {1.5}
    margins, chosen = dpo_margins(calls, 1.5)
    rows = new.metrics("dpo")
    assert [row["margin"] for row in rows] == pytest.approx(margins, abs=1e-5)
    assert [row["chosen_reward"] for row in rows] == pytest.approx(chosen, abs=1e-5)
    assert rows[-1]["margin"] > 0.1


def check_dpo_lr(old, new, calls, out):
    assert same(new.weights("dpo"), new.weights("sft")) and not same(old.weights("dpo"), old.weights("sft"))


def check_dpo_kind(old, new, calls, out):
    assert {call["kind"] for call in calls["dpo_loss"]} == {"ipo"}
    assert new.metrics("dpo")[0]["loss"] == pytest.approx(1 / (4 * 0.4 ** 2), rel=0.01)
    assert old.metrics("dpo")[0]["loss"] == pytest.approx(math.log(2), rel=0.01)


def check_label_smoothing(old, new, calls, out):
    for row, call in zip(new.metrics("dpo"), calls["dpo_loss"], strict=True):
        assert call["label_smoothing"] == 0.4
        h = call["chosen"] - call["ref_chosen"] - call["rejected"] + call["ref_rejected"]
        right, wrong = [-torch.log(torch.sigmoid(x)).mean().item() for x in (0.4 * h, -0.4 * h)]
        assert row["loss"] == pytest.approx(0.6 * right + 0.4 * wrong, abs=1e-4)
    last = [[row["margin"] for row in left.metrics("dpo")[-5:]] for left in (old, new)]
    assert sum(last[1]) < 0.7 * sum(last[0])


# ---- the table -----------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Row:
    flags: str            # the text that sets the option
    stages: str           # which stages run, from the first one that the option may change
    check: object
    others: str = ""      # flags beside it that make the command cheaper
    acts: str = ""        # the stages that use the option, if not all stages of the command
    trace: bool = False   # whether the episode is traced too


FAST = "--pretrain-steps 1 --sft-steps 1"
ONE_ROLLOUT = "--ppo-iterations 1"
SMALL = f"--sft-steps 2 --pairs 60 {ONE_ROLLOUT} --ppo-batch 32"
MOST = "sft,preferences,reward,ppo,report"
OPTIONS = dict(
    out=Row("", "sft", check_out, FAST),
    device=Row("--device cpu", "sft", check_device, FAST),
    stages=Row("", "reward,sft", check_stages, "--sft-steps 1"),
    quick=Row("--quick", "pretrain", check_quick, "--pretrain-steps 1"),
    data=Row("--data pairs.jsonl", "pretrain", check_data, "--pretrain-steps 1 --n-embd 16"),
    prompt=Row(f"--prompt '{PROMPT}'", "sample", check_prompt, trace=True),
    n_layer=Row("--n-layer 3", "pretrain", check_n_layer, FAST),
    n_head=Row("--n-head 4", "pretrain", check_n_head, FAST),
    n_embd=Row("--n-embd 16", "pretrain", check_n_embd, FAST),
    block_size=Row("--block-size 50", "pretrain", check_block_size, FAST),
    response_tokens=Row("--response-tokens 9", MOST, check_response_tokens, SMALL, acts=f"{MOST},grpo"),
    pretrain_steps=Row("--pretrain-steps 2", "pretrain", check_pretrain_steps),
    sft_steps=Row("--sft-steps 3", "sft", check_sft_steps),
    batch_size=Row("--batch-size 100", "pretrain,sft,preferences,reward,dpo", check_batch_size, FAST,
                   acts="pretrain,sft,reward,dpo"),
    pairs=Row("--pairs 40", "preferences", check_pairs),
    label_temperature=Row("--label-temperature 0", "preferences", check_label_temperature),
    flip=Row("--flip 0.2", "preferences", check_flip),
    held_out=Row("--held-out hotel", f"pretrain,{MOST}", check_held_out, f"--pretrain-steps 30 {SMALL}",
                 acts=f"pretrain,{MOST},grpo"),
    reward_lr=Row("--reward-lr 1e-30", "reward", check_reward_lr),
    beta=Row("--beta 5", "ppo,report", check_beta, trace=True, acts="ppo,grpo,report"),
    ppo_iterations=Row("--ppo-iterations 2", "ppo", check_ppo_iterations, "--ppo-batch 32", acts="ppo,grpo"),
    ppo_batch=Row("--ppo-batch 48", "ppo", check_ppo_batch, ONE_ROLLOUT, acts="ppo,grpo"),
    minibatch=Row("--minibatch 24", "ppo", check_minibatch, ONE_ROLLOUT, acts="ppo,grpo"),
    ppo_epochs=Row("--ppo-epochs 3", "ppo", check_ppo_epochs, ONE_ROLLOUT, acts="ppo,grpo"),
    ppo_lr=Row("--ppo-lr 1e-30", "ppo", check_ppo_lr, ONE_ROLLOUT),
    critic_lr=Row("--critic-lr 1e-30", "ppo", check_critic_lr, ONE_ROLLOUT),
    gamma=Row("--gamma 0", "ppo", check_gamma, ONE_ROLLOUT, trace=True),
    lam=Row("--lam 0", "ppo", check_lam, ONE_ROLLOUT, trace=True),
    clip=Row("--clip 0", "ppo", check_clip, ONE_ROLLOUT, acts="ppo,grpo"),
    reward_from=Row("--reward-from gold", "ppo,grpo,report", check_reward_from, ONE_ROLLOUT, trace=True),
    grpo_kind=Row("--grpo-kind grpo", "grpo", check_grpo_kind, ONE_ROLLOUT),
    group=Row("--group 8", "grpo", check_group, ONE_ROLLOUT),
    grpo_lr=Row("--grpo-lr 1e-30", "grpo", check_grpo_lr, ONE_ROLLOUT),
    grpo_kl=Row("--grpo-kl loss", "grpo", check_grpo_kl, ONE_ROLLOUT),
    dpo_beta=Row("--dpo-beta 1.5", "dpo", check_dpo_beta),
    dpo_lr=Row("--dpo-lr 1e-30", "dpo", check_dpo_lr),
    dpo_kind=Row("--dpo-kind ipo", "dpo", check_dpo_kind),
    label_smoothing=Row("--label-smoothing 0.4", "dpo", check_label_smoothing),
)
SLOW = ("response_tokens", "held_out", "beta", "batch_size", "stages", "quick", "reward_from")


def record(monkeypatch):
    """Record the arguments of the calls in RECORDED, by name, and the run. Returns the dict that fills up."""
    calls = {name: [] for name in RECORDED}

    def recording(name, function):
        signature = inspect.signature(function)

        def call(*positional, **named):
            bound = signature.bind(*positional, **named)
            bound.apply_defaults()
            calls[name].append(bound.arguments)
            return function(*positional, **named)
        return call

    for name, (module, function) in RECORDED.items():
        monkeypatch.setattr(module, function, recording(name, getattr(module, function)))
    make_run = minirlhf.Run

    def keep(*arguments):
        calls["run"] = make_run(*arguments)
        return calls["run"]

    monkeypatch.setattr(minirlhf, "Run", keep)
    return calls


def write_pairs(path):
    lines = []
    for i in range(80):
        lines.append(json.dumps({"prompt": f"number {i} :", "chosen": "the xylophone was good", "rejected": "no"}))
    path.write_text("\n".join(lines) + "\n")


def words(flags):
    """The words of a command line, where a text may stand in quotes."""
    return [word.strip("'") for word in re.findall(r"'[^']*'|\S+", flags)]


def fitting(row):
    """The words of a row's other flags, without options of stages that do not run."""
    flags = words(row.others)
    fit = []
    for i, word in enumerate(flags):
        name = word.removeprefix("--").replace("-", "_")
        owners = [stage for stage, names in config.OWNED.items() if name in names]
        if word.startswith("--") and (not owners or set(owners) & set(row.stages.split(","))):
            fit += [word] if FIELDS[name].type is bool else flags[i:i + 2]
    return fit




def marked(name, stages):
    """A parameter of a test that reads what these stages left, and what those before them did."""
    marks = [pytest.mark.slow] if name in SLOW else []
    if set(stages) <= set(STAGES):
        marks.append(pytest.mark.until(max(stages, key=STAGES.index)))
    return pytest.param(name, marks=marks)


ROWS = [marked(name, row.stages.split(",")) for name, row in OPTIONS.items()]


@pytest.mark.parametrize("name", ROWS)
def test_an_option_does_what_it_says(name, tiny, tiny_copy, tmp_path, monkeypatch, capsys):
    """An option goes nowhere, to another place, or changes what was made before the stages that it belongs to."""
    row = OPTIONS[name]
    monkeypatch.chdir(tmp_path)
    if name == "data":
        write_pairs(tmp_path / "pairs.jsonl")
    if name != "quick" and row.stages.startswith("pretrain"):  # a new run does not read the settings of the old one
        monkeypatch.setattr(config, "QUICK", {**json.loads((tiny / "config.json").read_text()), "quick": True})
        row = dataclasses.replace(row, others=f"--quick {row.others}")
    if row.stages.startswith("pretrain"):
        row = dataclasses.replace(row, others=f"--overwrite {row.others}")
    if name == "device":
        # for our code alone: a torch that was built for CUDA would look for the driver
        monkeypatch.setattr(torch.cuda, "is_available",
                            lambda: sys._getframe(1).f_globals["__name__"].startswith("pipeline"))
    calls = record(monkeypatch)
    command = ["--stages", row.stages, "--out", str(tiny_copy), *fitting(row), *words(row.flags)]
    assert minirlhf.main(command) == 0
    if row.trace:
        assert minirlhf.main([*TRACE, "--out", str(tiny_copy), *words(row.flags)]) == 0
    old, new = Left(tiny), Left(tiny_copy)
    row.check(old, new, calls, capsys.readouterr().out)
    assert not (tmp_path / "runs").exists()
    ran = row.stages.split(",")
    for stage in STAGES if ran[0] != "pretrain" else []:  # a new run leaves nothing of the old one
        if stage not in ran:
            assert new.artefacts(stage) == old.artefacts(stage), f"{stage} was changed by {row.flags}"


def test_every_option_has_a_row():
    """A new option that no test looks at."""
    options = [field.name for field in dataclasses.fields(Config) if field.metadata]
    own_tests = ["seed", "resume", "overwrite"]  # the seed's is below, theirs are in test_folder.py
    assert sorted([*OPTIONS, *own_tests]) == sorted(options)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_an_option_changes_no_stage_that_is_not_its_own(stage, tiny, tiny_copy, tmp_path, monkeypatch):
    """An option of a later stage, or of another method, decides what this stage leaves: dpo_lr for ppo_lr."""
    changed = dataclasses.asdict(Config(**json.loads((tiny / "config.json").read_text())))
    for name, row in OPTIONS.items():
        acts = (row.acts or row.stages).split(",")
        if stage not in acts and not set(acts) & set(VIEWS) and name not in ("data", "quick", "out", "stages"):
            if "pretrain" not in acts and name != "label_smoothing":  # it does not go with the row's --dpo-kind
                text = words(row.flags)[1]
                changed[name] = type(changed[name])(text)
    assert len(changed) > 10
    changed.update(stages=stage, out=str(tiny_copy), overwrite=True)
    run = minirlhf.Run(Config(**changed))
    run.use = lambda stage, trained: None  # or it would take the settings of the networks
    minirlhf.run_stages(run)
    assert Left(tiny_copy).artefacts(stage) == Left(tiny).artefacts(stage)


# ---- the seed ------------------------------------------------------------------------------------------------------

def seeds_of(command, folder, monkeypatch):
    """Every number that a generator of random numbers was seeded with, in order, while a command ran."""
    seeds = []
    torch.optim.AdamW([torch.zeros(1)])  # the first one imports modules that make generators of their own
    with monkeypatch.context() as patch:
        for module, name in ((torch, "manual_seed"), (torch, "Generator"), (random, "Random")):
            patch.setattr(module, name, seeding(name, getattr(module, name), seeds))
        assert minirlhf.main([*command, "--out", str(folder)]) == 0
    return seeds


def seeding(name, make, seeds):
    """Like `make`, torch.manual_seed, torch.Generator or random.Random, but what it is seeded with goes to seeds."""
    def call(*arguments):
        if name == "manual_seed":
            seeds.append(("everything", arguments[0]))
            return make(*arguments)
        made = make(*arguments)
        if name == "Random":
            seeds.append(("python", arguments[0]))
            return made

        def manual_seed(seed):
            seeds.append(("torch", seed))
            return made.manual_seed(seed)
        return SimpleNamespace(manual_seed=manual_seed)
    return call


FEW = "--ppo-iterations 1 --ppo-batch 8 --minibatch 8"
CHEAP = dict(pretrain="--pretrain-steps 1 --overwrite", sft="--sft-steps 1", preferences="--pairs 20", report="",
             reward="--batch-size 150", ppo=FEW, grpo=FEW, dpo="--batch-size 150", sample="", trace="", page="")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [marked(stage, [stage]) for stage in (*STAGES, *VIEWS)])
def test_the_seed_decides_every_random_number(stage, tiny, tmp_path, monkeypatch):
    """--seed is ignored by one stage, or by one of its generators; or it changes what an earlier stage left."""
    found, left = [], []
    for seed in (3, 4):
        folder = tmp_path / str(seed)
        shutil.copytree(tiny, folder)
        flags = ["--stages", stage, "--seed", str(seed), *CHEAP[stage].split()]
        if stage == "pretrain":
            sizes = dict(n_layer=1, n_embd=16, documents=60)
            monkeypatch.setattr(config, "QUICK", {**json.loads((tiny / "config.json").read_text()), **sizes})
            flags.append("--quick")
        if stage in PROMPTED:
            flags += ["--prompt", PROMPT]
        found.append(seeds_of(flags, folder, monkeypatch))
        left.append(Left(folder))
    assert len(found[0]) == len(found[1]) > 0
    for (kind, a), (other_kind, b) in zip(*found):
        assert kind == other_kind and b - a == (1000 if kind == "everything" else 1), (kind, a, b)
    if stage in STAGES:
        mine, other = [files.artefacts(stage) for files in left]
        assert set(mine) == set(other) and all(mine[name] != other[name] for name in mine if name != "metrics")
    for earlier in STAGES:
        if stage not in (earlier, "pretrain"):
            assert left[1].artefacts(earlier) == Left(tiny).artefacts(earlier)
