"""
The jobs that make the rows of the studies with a GPT, on the tiny run, and what they share.

Every number is computed again from texts and networks: one response at a time, without padding, with plain loops.
"""

import copy
import itertools
import json
import math
import random
from types import SimpleNamespace

import pytest
import torch
from helpers import finish, make_batch, noise

import minirlhf
import world
from dpo import DPOConfig, train_dpo
from model import generate
from pipeline import config as pipeline_config
from pipeline.config import Config, read_settings
from pipeline.errors import UserError
from pipeline.run import Run
from reward import RewardConfig, RewardModel, parse_bias, preference_probability, train_reward_model
from robust import RobustConfig, RobustReward, make_members, member_pairs, train_members
from studies import common, direct, estimators, frontier, limits, overopt, robust
from studies.lab import mean_se, source_key

MICRO = dict(n_layer=1, n_head=1, n_embd=8, response_tokens=12, documents=200, pretrain_steps=3, demonstrations=40,
             sft_steps=3, pairs=24, eval_prompts=8, best_of=2, policies="dpo")


@pytest.fixture
def run(tiny, monkeypatch):
    """The tiny run, for reading. It is the base run of all jobs; `run.asked` collects which one they ask for."""
    run = Run(tiny, Config(**read_settings(tiny)), "cpu")
    run.asked = []
    run.pairs = [run.pairs[0][:264], run.pairs[1][:39]]
    monkeypatch.setattr(common, "base", lambda *which, **changes: run.asked.append((*which, changes)) or run)
    return run


def spy(monkeypatch, module, name, result=None):
    """Replace a function by one that returns `result`. Returns the list of its calls, (arguments, keywords) each."""
    calls = []
    monkeypatch.setattr(module, name, lambda *args, **kwargs: calls.append((args, kwargs)) or result)
    return calls


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


# ---- oracles --------------------------------------------------------------------------------------

def text(run, ids):
    return run.tokenizer.decode([token for token in ids if token < run.tokenizer.n_vocab - 2])


def gold_of(run, prompt, response):
    scale = json.loads((run.folder / "gold.json").read_text())
    return (world.gold(text(run, prompt), text(run, response)) - scale["mean"]) / scale["std"]


@torch.no_grad()
def score_of(model, prompt, response):
    return model.scale(model.trunk.hidden(torch.tensor([prompt + response]))[0, -1]).item()


@torch.no_grad()
def logp_of(policy, prompt, response):
    """Log-probs of all tokens at each place of the response, (len(response), V)."""
    return policy(torch.tensor([prompt + response]))[0].log_softmax(-1)[len(prompt) - 1:-1]


def total_logp(policy, prompt, response):
    return sum(row[token].item() for row, token in zip(logp_of(policy, prompt, response), response))


def sample(run, policy, prompts, seed, temperature=1.0):
    """A response to each of at most 256 prompts."""
    generator = torch.Generator().manual_seed(seed)
    rollout = generate(policy, prompts, run.config.response_tokens, temperature, generator)
    return [ids[rollout.P:rollout.P + n] for ids, n in zip(rollout.ids.tolist(), rollout.response_lens.tolist())]


def heldout(run, M):
    return [run.prompts[1][i % len(run.prompts[1])] for i in range(M)]


def sft_samples(run, M, N, seed):
    """[(prompt, response)] of N samples of the SFT policy for each of M held-out prompts, side by side."""
    prompts = [prompt for prompt in heldout(run, M) for _ in range(N)]
    return list(zip(prompts, sample(run, run.load_network("sft"), prompts, seed)))


def best_of(n, scores, golds, N=16):
    """The mean gold of the best of n by score, over all subsets of n of the N samples of each prompt."""
    means = []
    for at in range(0, len(scores), N):
        bests = [max(subset, key=lambda i: (scores[i], i)) for subset in itertools.combinations(range(at, at + N), n)]
        means.append(sum(golds[best] for best in bests) / len(bests))
    return sum(means) / len(means)


def accuracy_of(model, pairs):
    right = [(score_of(model, p["prompt"], p["chosen"]) > score_of(model, p["prompt"], p["rejected"]))
             == (p["gold"][0] > p["gold"][1]) for p in pairs if p["gold"][0] != p["gold"][1]]
    return sum(right) / len(right)


def logged_rows(n):
    """What `optimise` logs, with another number in every column."""
    return [dict(step=i, score=0.1 * i, gold=2.0 - 0.3 * i, kl=1.0 * i, objective=0.7 * i, length=9.0 + i, loss=5.0)
            for i in range(n)]


# ---- what the studies share -----------------------------------------------------------------------

def test_a_base_run_is_what_minirlhf_makes(tmp_path, monkeypatch):
    """Bug: a second copy of the stages, another seed or order of them; a base run of older source that is taken."""
    monkeypatch.setattr(common, "HOME", tmp_path)
    monkeypatch.setattr(common, "QUICK_BASE", MICRO)
    monkeypatch.setattr(pipeline_config, "QUICK", MICRO)
    run = common.base(3, True, sft_steps=4)
    assert run.folder == tmp_path / f"base-3-{source_key('common')}-quick-sft_steps-4"
    first_four = dict(list(common.all_stages(run.config).items())[:4])
    monkeypatch.setattr(minirlhf, "all_stages", lambda config: first_four)
    assert minirlhf.main(["--quick", "--seed", "3", "--sft-steps", "4", "--out", str(tmp_path / "whole")]) == 0
    for name in ("config.json", "pretrained.pt", "sft.pt", "preferences.jsonl", "gold.json", "reward.pt"):
        assert (run.folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_flipped_labels_are_turned_around_and_nothing_else(run):
    """Bug: flips that change which pairs there are, or that forget the gold; a share that is not the one asked for."""
    clean, noisy = common.labelled(run, 150), common.labelled(run, 150, 3, 0.25)
    assert clean == run.pairs[0][:150]
    turned = [(before, after) for before, after in zip(clean, noisy, strict=True) if before != after]
    for before, after in turned:
        assert after == dict(before, chosen=before["rejected"], rejected=before["chosen"], gold=before["gold"][::-1])
    assert abs(len(turned) / 150 - 0.25) < 0.12  # three standard deviations


@pytest.mark.parametrize("kind", ["single", "ensemble", "brme"])
def test_rewards_are_fitted_to_their_pairs_and_normalised(kind, run):
    """Bug: scores with another offset or scale, another seed, rate or share, that prefer the rejected responses."""
    pairs, sft = common.labelled(run, 120), run.load_network("sft")
    model = common.fit(run, pairs, 1)
    torch.manual_seed(1)
    other = RewardModel(sft).requires_grad_(True)
    finish(train_reward_model(other, pairs, RewardConfig(1e-3, 2, run.config.weight_decay, 15), 1))
    if kind != "single":
        shares, judge, other = [pairs, pairs[:60]], model if kind == "brme" else None, make_members(sft, kind, 2, 1)
        finish(train_members(other, shares, RewardConfig(1e-3, 2, run.config.weight_decay, 7), 1, judge))
        model, other = common.fit_robust(run, kind, shares, 1, judge), torch.nn.ModuleList(other)
    assert equal(model, other)
    generator = torch.Generator().manual_seed(1)
    R, prompts = run.config.response_tokens, run.prompts[0]
    scores = torch.cat([model(generate(sft, prompts[at:at + 256], R, 1.0, generator)) for at in (0, 256)])
    assert (scores.mean().item(), scores.std(correction=0).item()) == pytest.approx((0, 1), abs=1e-4)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(UserError, match="has 7 pairs for a reward model, and 8 are needed"):
        common.fit_robust(run, kind, [pairs, pairs[:7]], 0) if kind != "single" else common.fit(run, pairs[:7], 0)
    if kind != "brme":  # few pairs: the heads learn little
        right = [(model(make_batch([p["prompt"]], [p["chosen"]])) > model(make_batch([p["prompt"]], [p["rejected"]])))
                 for p in pairs]
        assert sum(right) / 120 > 0.55


@pytest.mark.parametrize("method, group", [("ppo", 1), ("rloo", 4)])
def test_what_optimise_logs(method, group, run):
    """Bug: gold or score of other responses than the rollout's: the first rollout is sampled by SFT itself."""
    model, sft = run.load_network("reward"), run.load_network("sft")
    policy, rows = common.optimise(run, model, 5, method, ppo_iterations=2, ppo_batch=16, group=group)
    picks = torch.randint(len(run.prompts[0]), (16 // group,), generator=torch.Generator().manual_seed(5)).tolist()
    prompts = [run.prompts[0][i] for i in picks for _ in range(group)]
    responses = sample(run, sft, prompts, 5, run.config.temperature)
    for name, function in (("gold", lambda *ids: gold_of(run, *ids)), ("score", lambda *ids: score_of(model, *ids))):
        assert rows[0][name] == pytest.approx(sum(map(function, prompts, responses)) / 16, abs=1e-5)
    assert [row["step"] for row in rows] == [0, 1] and not equal(policy, sft)


def test_what_optimise_trains_with(run, monkeypatch):
    """Bug: another critic, kind or batch than asked for, a policy that is the reference itself, or trained on gold."""
    model, other = run.load_network("reward"), run.load_network("ppo_critic")
    ppo, grpo = spy(monkeypatch, common, "train_ppo", []), spy(monkeypatch, common, "train_grpo", [])
    run.config.ppo_batch = 256
    common.optimise(run, model, 3, beta=0.7, ppo_lr=0.01)
    common.optimise(run, model, 3, critic=other)
    common.optimise(run, model, 3, "dr_grpo", ppo_batch=192, group=8)
    (policy, critic, reference, reward_model, prompts, config, seed), _ = ppo[0]
    assert policy is not reference and equal(policy, reference) and equal(reference, run.load_network("sft"))
    assert reward_model is model and critic is not model and equal(critic, model) and equal(ppo[1][0][1], other)
    assert (config.beta, config.ppo_lr, config.ppo_batch, seed) == (0.7, 0.01, 128, 3) and prompts is run.prompts[0]
    config = grpo[0][0][4]
    assert (config.kind, config.group, config.ppo_batch) == ("dr_grpo", 8, 192) and grpo[0][0][2] is model


def test_a_policy_that_is_fitted_to_pairs(run):
    """Bug: another loss, beta or rate than asked for. Oracle: the loop of dpo.py with all settings written out."""
    pairs, sft = run.pairs[0][:40], run.load_network("sft")
    policy = common.fit_policy(run, pairs, 2, dpo_kind="ipo", dpo_beta=0.5, dpo_batch=8)
    other = copy.deepcopy(sft).requires_grad_(True)
    for _ in train_dpo(other, sft, pairs, DPOConfig("ipo", 0.5, 2e-4, 1, 0.0, 8), 2):
        pass
    assert equal(policy, other)


def test_judge_equals_a_loop_over_answers(run):
    """Bug: wins reversed, gold in place of the score, a KL of the wrong side, an error of the population."""
    policy, sft, model = run.load_network("ppo"), run.load_network("sft"), run.load_network("reward")
    prompts = heldout(run, 30)  # more than there are
    answers = list(zip(prompts, sample(run, policy, prompts, 4)))
    golds = [gold_of(run, *pair) for pair in answers]
    scores = [score_of(model, *pair) for pair in answers]
    kls = [(logp_of(policy, *pair).exp() * (logp_of(policy, *pair) - logp_of(sft, *pair))).sum().item()
           for pair in answers]
    opponents = torch.tensor(golds[:3] + [9.0] * 20 + [-9.0] * 7)
    expected = dict(gold=mean_se(golds)[0], gold_se=mean_se(golds)[1], kl=sum(kls) / 30, d=math.sqrt(sum(kls) / 30),
                    wins=(1.5 + 7) / 30, length=sum(len(response) for _, response in answers) / 30,
                    score=mean_se(scores)[0], score_se=mean_se(scores)[1])
    assert common.judge(run, policy, sft, opponents, 4, model) == pytest.approx(expected, abs=1e-4)
    theirs = [gold_of(run, *pair) for pair in zip(prompts, sample(run, sft, prompts, 5))]
    assert common.opponents_of(run, sft, 30, 4).tolist() == pytest.approx(theirs, abs=1e-5)


# ---- the jobs of each study -----------------------------------------------------------------------

def test_windows_of_overopt(run, monkeypatch):
    """Bug: gold and score exchanged, labels that are not those asked for, a window that mixes two, d for KL."""
    model = run.load_network("reward")
    fits, optimised = spy(monkeypatch, common, "fit", model), spy(monkeypatch, common, "optimise", (0, logged_rows(5)))
    rows = overopt.overopt_ppo(7, False, 30, 0.1)
    assert fits[0][0][1:] == (run.pairs[0][:30], 7) and run.asked == [(7, False, {})]
    assert optimised[0] == ((run, model, 7), dict(beta=0.1, ppo_iterations=30, ppo_lr=3e-4))
    for row, steps in zip(rows, ((0, 1), (2, 3), (4,)), strict=True):
        means = {name: sum(logged_rows(5)[i][name] for i in steps) / len(steps)
                 for name in ("score", "gold", "kl", "length", "objective")}
        expected = dict(means, method="ppo", seed=7, labels=30, beta=0.1, window=steps[0] // 2, d=means["kl"] ** 0.5)
        assert row == pytest.approx(expected)


def test_best_of_n_is_chosen_by_score_and_measured_by_gold(run, monkeypatch):
    """Bug: the best of n by gold, gold in the units of the score, or a KL that is not best-of-n's."""
    model = run.load_network("reward")
    fits = spy(monkeypatch, common, "fit", model)
    rows = {2 ** row["window"]: row for row in overopt.overopt_bon(7, True, 20)}
    assert fits[0][0][1:] == (run.pairs[0][:20], 7) and sorted(rows) == [1, 2, 4, 8, 16]
    samples = sft_samples(run, 8, 16, 7)
    values = dict(gold=[gold_of(run, *pair) for pair in samples], score=[score_of(model, *pair) for pair in samples])
    for n, name in itertools.product((1, 2, 16), values):
        assert rows[n][name] == pytest.approx(best_of(n, values["score"], values[name]), abs=1e-4)
        assert rows[n]["d"] ** 2 == pytest.approx(math.log(n) - (n - 1) / n)


def tiny_rewards(run):
    """Rewards as fit_rewards returns them, made from the tiny run's reward model without training."""
    model, sft = run.load_network("reward"), run.load_network("sft")
    members = [copy.deepcopy(model) for _ in range(2)]
    members[1].score.weight.data += 0.3 * noise(1, *members[1].score.weight.shape).float()
    kinds = dict(ensemble=members, brme=make_members(sft, "brme", 3, 0))
    robust_rewards = {kind: RobustReward(kinds[kind], kind, 0.5).requires_grad_(False) for kind in kinds}
    return dict(robust_rewards, pooled=model)


def scores_by_hand(rewards, pairs):
    """The scores of every robust reward, from each member alone."""
    means = torch.tensor([[score_of(member, *pair) for pair in pairs] for member in rewards["ensemble"].members])
    heads = torch.stack([torch.stack([torch.stack(member(make_batch([p], [r])))[:, 0] for p, r in pairs], dim=1)
                         for member in rewards["brme"].members], dim=1)                       # (2, k, n)
    surest = heads[0][heads[1].argmin(dim=0), range(len(pairs))]
    mean, worst = means.mean(dim=0), means.amin(dim=0)
    return {"mean": mean, "wco": worst, "half": (mean + worst) / 2, "uwo": mean - means.var(dim=0, correction=0) / 2,
            "brme 1.0": surest, "brme 0.5": (surest + heads[0].amin(dim=0)) / 2,
            "pooled": torch.tensor([score_of(rewards["pooled"], *pair) for pair in pairs])}, means


def test_labels_of_five_annotators(run):
    """Bug: clean labels for biased ones, one annotator for five, gold with the bias in it, pairs that are lost."""
    pairs = robust.annotated(run, 150, 3, bias="phrase:the=2")
    assert pairs != robust.annotated(run, 150, 4, bias="phrase:the=2")
    assert [pair["annotator"] for pair in pairs] == [i % 5 for i in range(150)]
    for old, new in zip(run.pairs[0], pairs):
        assert {old["gold"][0], old["gold"][1]} == set(new["gold"])
        for side, gold in zip(("chosen", "rejected"), new["gold"]):
            assert gold == pytest.approx(gold_of(run, new["prompt"], new[side]), abs=1e-5)
        a, b = [new["annotator"] == 0 and "the" in text(run, new[side]) for side in ("chosen", "rejected")]
        p = preference_probability(new["gold"][0] - new["gold"][1] + 2 * (a - b), run.config.label_temperature)
        assert new["ceiling"] == pytest.approx(max(p, 1 - p))
    right = [sum(pair["gold"][0] > pair["gold"][1] for pair in robust.annotated(run, 150, 3, flip=flip))
             for flip in (0.0, 1.0)]
    assert right[0] > right[1] + 20  # labels that agree with gold


def test_each_member_learns_from_its_annotator(run, monkeypatch):
    """Bug: every member has all labels, the heads learn another model's scores, another arm's bias or flips."""
    pairs = [dict(annotator=i % 5, i=i) for i in range(60)]
    fits, asked = spy(monkeypatch, common, "fit", "pooled"), spy(monkeypatch, robust, "annotated", pairs)
    ensembles = spy(monkeypatch, common, "fit_robust", SimpleNamespace(members="members"))
    rewards = robust.fit_rewards(run, "annotators", 60, 7)
    assert fits[0][0] == (run, pairs, 7)
    assert ensembles[0][0] == (run, "ensemble", [pairs[i::5] for i in range(5)], 7)
    heads = member_pairs(pairs, "brme", RobustConfig(members=5), 7)
    assert ensembles[1][0] == (run, "brme", heads, 7, "pooled") and rewards["pooled"] == "pooled"
    assert set(robust.fit_rewards(run, "flips", 60, 7)) == {"pooled", "ensemble"}
    assert [named for _, named in asked] == [robust.ARMS["annotators"], dict(flip=0.25)] and asked[1][0] == (run, 60, 7)
    strengths = [{strength for _, strength in parse_bias(robust.ARMS[arm]["bias"])} for arm in ("annotators", "bonus")]
    assert strengths == [{2.0}, {4.0}]  # deviations of gold


def test_best_of_n_by_every_robust_reward(run, monkeypatch):
    """Bug: an ensemble's maximum, the best of n by gold, a lambda that stays from the reward before it."""
    rewards = tiny_rewards(run)
    fits = spy(monkeypatch, robust, "fit_rewards", rewards)
    *rows, spread = robust.robust_arm(7, True, "bonus")
    assert fits == [((run, "bonus", 120, 7), {})]
    samples = sft_samples(run, 8, 16, 7)
    golds = [gold_of(run, *pair) for pair in samples]
    proxies, means = scores_by_hand(rewards, samples)
    for n in (2, 16):
        found = {row["how"]: row["gold"] for row in rows if (row["seed"], row["arm"], row["n"]) == (7, "bonus", n)}
        expected = {how: best_of(n, proxy.tolist(), golds) for how, proxy in proxies.items()}
        expected["single"] = sum(best_of(n, own.tolist(), golds) for own in means) / 2
        assert found == pytest.approx(expected, abs=1e-4)
    errors = (means.mean(dim=0) - torch.tensor(golds)).abs()
    inside = (errors <= 2 * means.std(dim=0, correction=0)).float().mean().item()
    assert spread["study"] == "spread" and spread["coverage"] == pytest.approx(inside, abs=0.01)


def test_ppo_on_every_robust_reward(run, monkeypatch):
    """Bug: another reward than the one named, another critic, another KL penalty, score in the place of gold."""
    rewards, sft = tiny_rewards(run), run.load_network("sft")
    fits = spy(monkeypatch, robust, "fit_rewards", rewards)
    spy(monkeypatch, robust, "best_rows", [])
    batch = generate(sft, heldout(run, 6), run.config.response_tokens)
    scores, critics = [], []

    def optimise(run, scorer, seed, critic, **settings):
        assert (seed, settings) == (7, dict(beta=0.02, ppo_iterations=16, ppo_lr=4e-4))
        critics.append(critic)
        scores.append(scorer(batch).tolist())  # now: its lambda will change
        return None, logged_rows(5)

    monkeypatch.setattr(common, "optimise", optimise)
    rows = robust.robust_arm(7, False, "annotators")
    expected, means = scores_by_hand(rewards, list(zip(heldout(run, 6), batch.response_ids())))
    expected["single"] = means[0]
    for how, found in zip(robust.PPO_REWARDS, scores, strict=True):
        assert found == pytest.approx(expected[how].tolist(), abs=1e-4), how
        assert [row["gold"] for row in rows if row["how"] == how] == pytest.approx([1.85, 1.25, 0.8])
    assert all(critic is rewards["pooled"] for critic in critics) and rows[0]["arm"] == "annotators"
    assert fits == [((run, "annotators", 3500, 7), {})] and run.asked == [(7, False, {})]


def test_marks_of_direct(run, monkeypatch):
    """Bug: a mark before its step, another loss or beta, wins over another policy, chosen and rejected exchanged."""
    monkeypatch.setattr(direct, "MARKS", (2, 5, 9))
    rows = direct.direct_job(7, False, "ipo", 0.3)
    pairs, sft = run.pairs[0], run.load_network("sft")
    opponents = common.opponents_of(run, sft, 192, 7)
    policy = copy.deepcopy(sft).requires_grad_(True)
    config = Config(dpo_kind="ipo", dpo_beta=0.3, dpo_epochs=2, dpo_batch=32)  # 9 steps of 32 pairs an epoch
    direct.set_rate(config, 0, 18)
    left = list(rows)
    for metrics, _ in train_dpo(policy, sft, pairs, config, 7):
        step = metrics["step"] + 1
        direct.set_rate(config, min(step, 17), 18)
        if step in (2, 5, 9):
            expected = dict(metrics, step=step, seed=7, kind="ipo", beta=0.3,
                            **common.judge(run, policy, sft, opponents, 7))
            row = left.pop(0)
            assert {name: row[name] for name in expected} == pytest.approx(expected)
        if step == 9:
            break
    assert not left
    rewards = [[total_logp(policy, pair["prompt"], pair[side]) - total_logp(sft, pair["prompt"], pair[side])
                for side in ("chosen", "rejected")] for pair in run.pairs[1]]
    right = sum(chosen > rejected for chosen, rejected in rewards) / len(rewards)
    assert rows[-1]["implicit_accuracy"] == pytest.approx(right) and "implicit_accuracy" not in rows[0]
    assert run.asked == [(7, False, {})]


def test_remedies_of_direct(run, monkeypatch):
    """Bug: a remedy is trained as DPO, or online DPO on other prompts, on gold, or with another rate or beta."""
    given = {}

    def loop(name):
        def train(policy, reference, *rest):
            given[name] = rest
            for step in range(2):
                given[name + " rates"] = rest[-2].dpo_lr, rest[-2].ppo_lr
                yield dict(step=step), {}
        return train

    monkeypatch.setattr(direct, "MARKS", (2,))
    monkeypatch.setattr(direct, "train_dpo", loop("dpo"))
    monkeypatch.setattr(direct, "train_online_dpo", loop("online"))
    for kind, own in (("chipo", dict(dpo_kind="chipo")), ("dpo_length", dict(length_penalty=0.05)),
                      ("dpo_sft", dict(sft_weight=1.0)), ("online_dpo", {})):
        [row] = direct.direct_job(7, False, kind, 0.02)
        assert (row["kind"], row["beta"], row["step"]) == (kind, 0.02, 2) and "implicit_accuracy" in row
        if own:
            pairs, config, seed = given["dpo"]
            assert (pairs, seed, config.dpo_beta) == (run.pairs[0], 7, 0.02)
            assert {name: getattr(config, name) for name in own} == own
    scorer, prompts, config, seed = given["online"]
    assert score_of(scorer, [5], [6]) == score_of(run.load_network("reward"), [5], [6]) and prompts == run.prompts[0]
    assert (config.beta, config.ppo_batch, config.minibatch, config.ppo_epochs, seed) == (0.02, 64, 64, 1, 7)
    assert given["online rates"][1] * (1 - 1 / 18) == pytest.approx(2e-5)


def test_points_of_the_frontier(run, monkeypatch):
    """Bug: PPO on gold that is trained on the score, a setting that is not the beta, wins over the policy itself."""
    policy, sft, model = run.load_network("ppo"), run.load_network("sft"), run.load_network("reward")
    optimised = spy(monkeypatch, common, "optimise", (policy, []))
    fitted = spy(monkeypatch, common, "fit_policy", policy)
    expected = common.judge(run, policy, sft, common.opponents_of(run, sft, 32, 7), 7, model)
    batch = generate(sft, heldout(run, 6), run.config.response_tokens)
    pairs = list(zip(heldout(run, 6), batch.response_ids()))
    score, gold = [[f(where, *pair) for pair in pairs] for f, where in ((score_of, model), (gold_of, run))]
    n = run.config.ppo_iterations
    for method, scores, iterations in (("ppo", score, n), ("ppo on gold", gold, n), (frontier.LONGER, gold, 2 * n)):
        assert frontier.frontier_job(7, True, method, 0.3) == dict(expected, seed=7, method=method, setting=0.3)
        (_, scorer, _), settings = optimised[-1]
        assert scorer(batch).tolist() == pytest.approx(scores, abs=1e-4)
        assert equal(settings.pop("critic"), model)
        assert settings == dict(beta=0.3, ppo_iterations=iterations)
    assert frontier.frontier_job(7, True, "ipo", 0.5) == dict(expected, seed=7, method="ipo", setting=0.5)
    assert fitted == [((run, run.pairs[0], 7), dict(dpo_kind="ipo", dpo_beta=0.5))]


def test_curves_of_the_frontier(run):
    """Bug: best-of-n by gold, the optimum of the other reward, a KL of another beta, an error of the samples."""
    model = run.load_network("reward")
    samples = sft_samples(run, 16, 16, 7)
    rewards = dict(score=[score_of(model, *pair) for pair in samples], gold=[gold_of(run, *pair) for pair in samples])
    rows = frontier.frontier_reference(7, True)
    assert (rows[0]["method"], rows[0]["kl"], rows[1]["setting"]) == ("SFT", 0, 2)
    for name, values in rewards.items():
        mean, error = mean_se([sum(values[at:at + 16]) / 16 for at in range(0, 256, 16)])
        assert (rows[0][name], rows[0][f"{name}_se"]) == pytest.approx((mean, error), abs=1e-4)
        assert rows[1][name] == pytest.approx(best_of(2, rewards["score"], values), abs=1e-4)
        curve = [row for row in rows if row["method"] == f"optimum of {name}"]
        assert len(curve) > 5
        for row in curve[::5]:
            weights = [math.exp(value / row["setting"]) for value in values]
            p = [weight / sum(weights) for weight in weights]
            best = sum(a * x for a, x in zip(p, values))
            kl = sum(a * math.log(256 * a) for a in p)
            error = math.sqrt(sum(a * (x - best) ** 2 for a, x in zip(p, values)) * sum(a * a for a in p))
            assert (row[name], row["kl"], row[f"{name}_se"]) == pytest.approx((best, kl, error), abs=1e-4)
            assert sum(a * a for a in p) <= 1 / 10


def test_full_passes_have_enough_samples(run, monkeypatch):
    """Bug: a full pass has the samples of a quick one, or judges a curve where a few of them carry all the weight."""
    def ask(*arguments):
        raise LookupError(*arguments)

    def asked(job, *arguments):
        with pytest.raises(LookupError) as error:
            job(*arguments)
        return error.value.args

    spy(monkeypatch, common, "fit_policy")
    monkeypatch.setattr(common, "reference_samples", ask)
    assert asked(robust.best_rows, run, {}, False, 7) == (run, 32, 256, 7)
    assert asked(overopt.overopt_bon, 7, False, 20) == (run, 48, 64, 7)
    monkeypatch.setattr(common, "opponents_of", ask)
    assert asked(frontier.frontier_job, 7, False, "dpo", 0.2)[2:] == (512, 7)
    samples = spy(monkeypatch, common, "reference_samples", ([], torch.zeros(256, 64)))
    spy(monkeypatch, frontier, "score_batches", torch.zeros(256 * 64))
    curves, opponents = spy(monkeypatch, frontier, "optimum_rows", []), spy(monkeypatch, common, "opponents_of")
    frontier.frontier_reference(7, False)
    assert [arguments[-1] for arguments, _ in curves] == [100, 100] and samples == [((run, 256, 64, 7), {})]
    for module, name, result in ((estimators, "sample_policy", []), (common, "response_lists", range(8192)),
                                 (estimators, "score_batches", torch.arange(8192.0))):
        spy(monkeypatch, module, name, result)
    monkeypatch.setattr(estimators, "train_sft", ask)
    _, examples, settings, _ = asked(estimators.rejection_job, 7, False)
    assert examples == list(zip(run.prompts[0][:1024], range(7, 8192, 8)))  # the last of each eight scores most
    assert (settings.sft_steps, opponents[0][0][2:]) == (64, (512, 7)) and run.asked == [(7, False, {})] * 4


def test_accuracies_of_limits(run, monkeypatch):
    """Bug: clean labels for flipped ones, labels about other subjects, the two sides exchanged, another base run."""
    model = run.load_network("reward")
    fits = spy(monkeypatch, common, "fit", model)

    def about(pairs, subjects):
        return [pair for pair in pairs if any(subject in text(run, pair["prompt"]).split() for subject in subjects)]

    def accuracies(subjects):
        known = about(run.pairs[1], subjects)
        return accuracy_of(model, known), accuracy_of(model, [pair for pair in run.pairs[1] if pair not in known])

    row = limits.limits_labels(3, False, 50, 0.4)
    assert fits[-1][0][1:] == (common.labelled(run, 50, 3, 0.4), 3)
    assert (row["labels"], row["flip"], row["value"]) == pytest.approx((50, 0.4, accuracy_of(model, run.pairs[1])))
    rows = limits.limits_coverage(3, True, 2)
    assert fits[-1][0][1:] == (about(run.pairs[0], ["book", "concert"])[:24], 3)
    assert [row["side"] for row in rows] == ["labelled", "unlabelled"]
    assert tuple(row["value"] for row in rows) == pytest.approx(accuracies(["book", "concert"]))
    rows = limits.limits_subject(3, False)
    assert fits[-1][0][1:] == (run.pairs[0][:1000], 3)
    assert run.asked == [(3, False, {}), (3, True, {}), (3, False, dict(held_out="film"))]
    found = {row["subject"]: row["value"] for row in rows}
    assert (found["held-out subject"], found["other subjects"]) == pytest.approx(accuracies(["film"]))


def test_the_tax_of_limits(run, monkeypatch):
    """
    Bug: texts of pretraining itself, the log-likelihood of a text and not of a token, two policies exchanged, another
    KL for each, or the end although the KL was passed.
    """
    names = ("sft", "ppo", "pretrained", "dpo")
    networks = {name: run.load_network(name) for name in names}
    def heldout_texts(run, seed, T, make=limits.heldout_texts):
        assert T == 256
        return make(run, seed, 6)

    def train(run, source, seed, watch, **settings):
        seen.append((run, source, seed, settings))
        for name in ("sft", "ppo", "sft", "pretrained", "sft", "dpo"):  # every second step is measured
            watch(networks[name])

    def judged(run, policy, sft, opponents, seed):
        assert len(opponents) == 64 and seed == 3
        return dict(kl=next(kl for name, kl in kls.items() if equal(policy, networks[name])))

    seen, kls = [], dict(ppo=1.0, pretrained=3.0, dpo=2.0)
    monkeypatch.setattr(limits, "heldout_texts", heldout_texts)
    monkeypatch.setattr(common, "judge", judged)
    fits = spy(monkeypatch, common, "fit", "fitted")
    for name in ("optimise", "fit_policy"):
        monkeypatch.setattr(common, name, train)
    rows = {row["policy"]: row for row in limits.limits_tax(3, False)}
    rng, end = random.Random(1003), run.tokenizer.n_vocab - 2
    texts = [run.tokenizer.encode_ordinary(world.make_document(rng)) + [end] for _ in range(6)]
    texts = [ids[:run.config.block_size - 1] for ids in texts]
    value = {name: sum(total_logp(policy, [end], ids) for ids in texts) / sum(map(len, texts))
             for name, policy in networks.items()}
    passed = dict(kl=2.0, value=(value["ppo"] + value["pretrained"]) / 2)  # from 1 to 3 nats; what follows is no more
    expected = dict(ppo=passed, rloo=passed, dpo=passed, pretrained=dict(kl=0.0, value=value["pretrained"]),
                    sft=dict(kl=0.0, value=value["sft"]))
    assert list(rows) == list(expected)
    for name, row in rows.items():
        assert row == pytest.approx(dict(part="tax", seed=3, policy=name, **expected[name]), abs=1e-4)
    kls["pretrained"] = kls["dpo"] = 1.5  # never passed: the end
    for row in limits.limits_tax(3, False)[:3]:
        assert (row["kl"], row["value"]) == pytest.approx((1.5, value["dpo"]), abs=1e-4)
    assert fits[0][0][1:] == (run.pairs[0], 3) and run.asked == [(3, False, {})] * 2
    shared = dict(beta=0.1, ppo_iterations=16)
    assert seen[:3] == [(run, "fitted", 3, dict(ppo_lr=3e-4, **shared)),
                        (run, "fitted", 3, dict(method="rloo", grpo_lr=3e-4, **shared)),
                        (run, run.pairs[0], 3, dict(dpo_beta=0.05, dpo_batch=32))]


@pytest.mark.parametrize("method, reward", [("ppo", "gold"), ("dr_grpo", "model")])
def test_a_curve_of_estimators(method, reward, run, monkeypatch):
    """Bug: another budget, reward or seed than asked for, a share from the wrong end, seconds that do not add up."""
    clock = [100.0]

    def optimise(run, scorer, seed, kind, critic, **settings):
        assert (seed, kind, settings) == (7, method, dict(ppo_iterations=30, ppo_batch=128, group=4))
        expected = gold_of(run, *pair) if reward == "gold" else score_of(run.load_network("reward"), *pair)
        assert scorer(make_batch(*[[ids] for ids in pair])).item() == pytest.approx(expected, abs=1e-4)
        assert equal(critic, run.load_network("reward"))
        clock[0] += 60.0
        return None, logged_rows(30)

    pair, values = (run.prompts[0][0], [5, 6]), torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    monkeypatch.setattr(common, "optimise", optimise)
    golds, scores = (values, 9 * values) if reward == "gold" else (9 * values, values)
    asked = spy(monkeypatch, common, "reference_samples", ([], golds))
    monkeypatch.setattr(estimators, "score_batches", lambda scorer, rollouts: scores)
    monkeypatch.setattr(estimators.time, "process_time", lambda: clock[0])
    curve = estimators.curve_job(7, False, reward, method)
    assert asked == [((run, 256, 32, 7), {})] and run.asked == [(7, False, {})]
    beta = run.config.beta
    best = beta * math.log(sum(math.exp(x / beta) for x in range(4)) / 4)
    assert [row["seconds"] for row in curve] == pytest.approx([10, 20, 30, 40, 50, 60])
    assert [row["kl"] for row in curve] == pytest.approx([2, 7, 12, 17, 22, 27])
    assert [row["share"] for row in curve] == pytest.approx([(0.7 * row["kl"] - 1.5) / (best - 1.5) for row in curve])


def test_best_of_n_distilled_is_the_best_by_score(run, monkeypatch):
    """Bug: the best by gold, the worst, an answer to another prompt, or a random one among all of them."""
    model, sft, ppo = run.load_network("reward"), run.load_network("sft"), run.load_network("ppo")
    taught = []

    def train_sft(policy, examples, config, seed):
        taught.append((examples, config.sft_steps, config.sft_lr, seed))
        policy.load_state_dict(ppo.state_dict())
        return []

    monkeypatch.setattr(estimators, "train_sft", train_sft)
    rows = estimators.rejection_job(7, True)
    prompts = [prompt for prompt in run.prompts[0][:16] for _ in range(4)]
    pairs = list(zip(prompts, sample(run, sft, prompts, 7, run.config.temperature)))
    groups = [pairs[at:at + 4] for at in range(0, 64, 4)]
    draws = torch.randint(4, (16,), generator=torch.Generator().manual_seed(7)).tolist()
    best = [max(group, key=lambda pair: score_of(model, *pair)) for group in groups]
    assert taught == [(examples, 4, run.config.sft_lr / 4, 7)
                      for examples in (best, [group[draw] for group, draw in zip(groups, draws)])]
    expected = common.judge(run, ppo, sft, common.opponents_of(run, sft, 32, 7), 7, model)
    assert rows == [dict(expected, study="rejection", seed=7, pick=pick) for pick in ("best", "random")]
