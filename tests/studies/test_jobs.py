"""
The jobs that make the rows of the studies with a GPT, on the tiny run, and what they share.

What they share is computed again from texts and networks: one response at a time, without padding, with plain loops.
Of the jobs it is asked what they train and measure, with which settings, and what they make of the numbers.
"""

import copy
import math
import random
from types import SimpleNamespace

import pytest
import slow
import torch
from conftest import SEED, SMALLEST
from helpers import PAIRS, finish, noise, tiny_gpt, tiny_reward_model

import world
from data import collate
from dpo import DPOConfig, train_dpo
from evaluate import best_of_n
from model import generate
from pipeline.config import Config, read_settings
from pipeline.run import Run
from reward import RewardConfig, RewardModel, train_reward_model
from robust import RobustConfig, make_members, member_pairs, train_members
from studies import common, direct, estimators, frontier, limits, overopt, robust
from studies.lab import mean_se, source_key


@pytest.fixture
def run(tiny, monkeypatch):
    """The tiny run, for reading. It is the base run of all jobs; `run.asked` collects which one they ask for."""
    run = Run(tiny, Config(**read_settings(tiny)), "cpu")
    run.asked = []
    run.pairs = [run.pairs[0][:264], run.pairs[1][:39]]
    run.prompts = [run.prompts[0], run.prompts[1][:24]]
    monkeypatch.setattr(common, "base", lambda *which, **changes: run.asked.append((*which, changes)) or run)
    return run


@pytest.fixture
def named(run, monkeypatch):
    """The tiny run, whose networks are their names: for jobs that only hand them on."""
    monkeypatch.setattr(run, "load_network", lambda name: name)
    return run


def spy(monkeypatch, module, name, result=None):
    """Replace a function by one that returns `result`. Returns the list of its calls, (arguments, keywords) each."""
    calls = []
    monkeypatch.setattr(module, name, lambda *args, **kwargs: calls.append((args, kwargs)) or result)
    return calls


def made_up(monkeypatch, run, module, M, N, model="reward", rollouts="rollouts"):
    """Made-up gold and scores (M, N) of SFT samples, for a job that asks for as many, and for the scores of a model."""
    gold, score = noise(1, M, N), noise(2, M, N)

    def reference_samples(*asked):
        assert asked == (run, M, N, 7)
        return rollouts, gold

    def score_batches(*asked):
        assert asked == (model, rollouts)
        return score.flatten()

    monkeypatch.setattr(common, "reference_samples", reference_samples)
    monkeypatch.setattr(module, "score_batches", score_batches)
    return gold, score


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


# ---- oracles --------------------------------------------------------------------------------------

def score_of(model, prompt, response):
    return slow.values(model, prompt, response)[1].item()


def total_logp(policy, prompt, response):
    return slow.logprobs(policy, prompt, response).sum().item()


def sample(run, policy, prompts, seed, temperature=1.0):
    """[(prompt, response)] for at most 256 prompts."""
    generator = torch.Generator().manual_seed(seed)
    rollout = generate(policy, prompts, run.config.response_tokens, temperature, generator)
    return list(zip(prompts, rollout.response_ids()))


def logged_rows(n):
    """What `optimise` logs, with another number in every column."""
    return [dict(step=i, score=0.1 * i, gold=2.0 - 0.3 * i, kl=1.0 * i, objective=0.7 * i, loss=5.0) for i in range(n)]


# ---- what the studies share -----------------------------------------------------------------------

def test_a_base_run_is_what_minirlhf_makes(smallest, tmp_path, monkeypatch):
    """Bug: a second copy of the stages, another seed or order of them; a base run of older source that is taken."""
    monkeypatch.setattr(common, "HOME", tmp_path)
    monkeypatch.setattr(common, "QUICK_BASE", dict(SMALLEST, sft_steps=4))
    run = common.base(SEED, True, sft_steps=SMALLEST["sft_steps"])
    assert run.folder == tmp_path / f"base-3-{source_key('common')}-quick-sft_steps-12"
    for name in ("config.json", "pretrained.pt", "sft.pt", "preferences.jsonl", "gold.json", "reward.pt"):
        assert (run.folder / name).read_bytes() == (smallest / name).read_bytes(), name


def test_flipped_labels_are_turned_around_and_nothing_else(run):
    """Bug: flips that change which pairs there are, or that forget the gold; a share that is not the one asked for."""
    clean, noisy = common.labelled(run, 140), common.labelled(run, 140, 3, 0.25)
    assert clean == run.pairs[0][:140]
    turned = [(before, after) for before, after in zip(clean, noisy, strict=True) if before != after]
    for before, after in turned:
        assert after == dict(before, chosen=before["rejected"], rejected=before["chosen"], gold=before["gold"][::-1])
    assert abs(len(turned) / 140 - 0.25) < 0.12  # three standard deviations


@pytest.mark.parametrize("kind", ["single", "ensemble", "brme"])
def test_rewards_are_fitted_to_their_pairs_and_normalised(kind, run):
    """Bug: scores with another offset or scale, another seed, rate or share, the heads learn no model's scores."""
    pairs, sft = run.pairs[0][:40], run.load_network("sft")
    run.prompts[0] = run.prompts[0][:60]
    if kind == "single":
        model = common.fit(run, pairs, 1)
        torch.manual_seed(1)
        other = RewardModel(sft).requires_grad_(True)
        finish(train_reward_model(other, pairs, RewardConfig(1e-3, 2, run.config.weight_decay, 5), 1))
    else:
        shares, judge = [pairs, pairs[:20]], run.load_network("reward") if kind == "brme" else None
        model, other = common.fit_robust(run, kind, shares, 1, judge), make_members(sft, kind, 2, 1)
        finish(train_members(other, shares, RewardConfig(1e-3, 2, run.config.weight_decay, 2), 1, judge))
        other = torch.nn.ModuleList(other)
    assert equal(model, other)
    scores = model(generate(sft, run.prompts[0], run.config.response_tokens, 1.0, torch.Generator().manual_seed(1)))
    assert (scores.mean().item(), scores.std(correction=0).item()) == pytest.approx((0, 1), abs=1e-4)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert common.reward_settings(run, range(999)).reward_batch == 32  # at most


def test_accuracies(run):
    """Bug: the label for gold's order, pairs of equal gold that count, an implicit reward without the reference."""
    model, policy, sft = [run.load_network(name) for name in ("reward", "ppo", "sft")]
    pairs = [pair for pair in run.pairs[1] if pair["gold"][0] != pair["gold"][1]]
    pairs[:9] = [dict(pair, gold=pair["gold"][::-1]) for pair in pairs[:9]]
    right, implicit = [], []
    for pair in pairs:
        sides = [(pair["prompt"], pair[side]) for side in ("chosen", "rejected")]
        chosen, rejected = [score_of(model, *side) for side in sides]
        right.append((chosen > rejected) == (pair["gold"][0] > pair["gold"][1]))
        chosen, rejected = [total_logp(policy, *side) - total_logp(sft, *side) for side in sides]
        implicit.append(chosen > rejected)
    equals = [dict(pairs[0], gold=[1.0, 1.0])] * 9
    assert common.gold_accuracy(model, pairs + equals) == pytest.approx(sum(right) / len(right))
    assert direct.implicit_accuracy(policy, sft, pairs) == pytest.approx(sum(implicit) / len(implicit))


@pytest.mark.parametrize("method, group", [("ppo", 1), ("rloo", 4)])
def test_what_optimise_logs(method, group, run, files):
    """Bug: gold or score of other responses than the rollout's: the first rollout is sampled by SFT itself."""
    model, sft = run.load_network("reward"), run.load_network("sft")
    policy, rows = common.optimise(run, model, 5, method, ppo_iterations=2, ppo_batch=16, group=group)
    picks = torch.randint(len(run.prompts[0]), (16 // group,), generator=torch.Generator().manual_seed(5)).tolist()
    pairs = sample(run, sft, [run.prompts[0][i] for i in picks for _ in range(group)], 5, run.config.temperature)
    for name, function in (("gold", files.gold), ("score", lambda *ids: score_of(model, *ids))):
        assert rows[0][name] == pytest.approx(sum(function(*pair) for pair in pairs) / 16, abs=1e-5)
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
    finish(train_dpo(other, sft, pairs, DPOConfig("ipo", 0.5, 2e-4, 1, 0.0, 8), 2))
    assert equal(policy, other)


def test_judge_equals_a_loop_over_answers(run, files):
    """Bug: gold in place of the score, a KL of the wrong side, an error of the population, answers that are mixed."""
    policy, sft, model = run.load_network("ppo"), run.load_network("sft"), run.load_network("reward")
    prompts = run.prompts[1] + run.prompts[1][:6]  # more than there are
    answers = sample(run, policy, prompts, 4)
    golds = [files.gold(*pair) for pair in answers]
    scores = [score_of(model, *pair) for pair in answers]
    kl = 0.0
    for prompt, response in answers:
        logp, ref = [torch.log_softmax(slow.logits(network, prompt + response)[len(prompt) - 1:-1], dim=1)
                     for network in (policy, sft)]
        kl += (logp.exp() * (logp - ref)).sum().item() / 30
    (gold, gold_se), (score, score_se) = mean_se(golds), mean_se(scores)
    length = sum(len(response) for _, response in answers) / 30
    expected = dict(gold=gold, gold_se=gold_se, kl=kl, d=math.sqrt(kl), length=length, score=score, score_se=score_se)
    assert common.judge(run, policy, sft, 30, 4, model) == pytest.approx(expected, abs=1e-4)
    pairs = sample(run, sft, [prompt for prompt in run.prompts[1][:3] for _ in range(2)], 5)
    rollouts, gold = common.reference_samples(run, 3, 2, 5)
    assert gold.flatten().tolist() == pytest.approx([files.gold(*pair) for pair in pairs], abs=1e-5)
    assert common.response_lists(rollouts) == [response for _, response in pairs] and gold.shape == (3, 2)


# ---- the jobs of each study -----------------------------------------------------------------------

def test_windows_of_overopt(named, monkeypatch):
    """Bug: gold and score exchanged, labels that are not those asked for, a window that mixes two, d for KL."""
    fits = spy(monkeypatch, common, "fit", "fitted")
    optimised = spy(monkeypatch, common, "optimise", (0, logged_rows(5)))
    rows = overopt.overopt_ppo(7, False, 30, 0.1)
    assert fits[0][0][1:] == (named.pairs[0][:30], 7) and named.asked == [(7, False, {})]
    assert optimised[0] == ((named, "fitted", 7), dict(beta=0.1, ppo_iterations=30, ppo_lr=3e-4))
    for row, steps in zip(rows, ((0, 1), (2, 3), (4,)), strict=True):
        means = {name: sum(logged_rows(5)[i][name] for i in steps) / len(steps)
                 for name in ("score", "gold", "kl", "objective")}
        expected = dict(means, method="ppo", seed=7, labels=30, beta=0.1, window=steps[0] // 2, d=means["kl"] ** 0.5)
        assert row == pytest.approx(expected)


def test_best_of_n_is_chosen_by_score_and_measured_by_gold(named, monkeypatch):
    """Bug: the best of n by gold, gold in the units of the score, or a KL that is not best-of-n's."""
    gold, score = made_up(monkeypatch, named, overopt, 48, 64, "fitted")
    fits = spy(monkeypatch, common, "fit", "fitted")
    rows = overopt.overopt_bon(7, False, 20)
    assert fits[0][0][1:] == (named.pairs[0][:20], 7)
    for row, n in zip(rows, (1, 2, 4, 8, 16, 32, 64), strict=True):
        expected = dict(gold=best_of_n(score, gold, n).mean().item(), score=best_of_n(score, score, n).mean().item(),
                        d=math.sqrt(math.log(n) - (n - 1) / n))
        assert {name: row[name] for name in expected} == pytest.approx(expected)


def test_labels_of_five_annotators(run, files, monkeypatch):
    """Bug: clean labels for biased ones, one annotator for five, gold or texts of other responses."""
    labels = spy(monkeypatch, robust, "label_pairs", "labels")
    assert robust.annotated(run, 20, 3, bias="phrase:the=2") == "labels"
    (prompts, responses, golds, config, rng, texts), _ = labels[0]
    assert (config.annotators, config.bias, config.flip) == (5, "phrase:the=2", 0.0)  # not the base run's flips
    assert config.label_temperature == run.config.label_temperature
    assert prompts == [pair["prompt"] for pair in run.pairs[0][:20]] and rng.random() == random.Random(3).random()
    assert texts == [files.text(response) for response in responses]
    expected = [files.gold(prompts[i // 2], response) for i, response in enumerate(responses)]
    assert golds == pytest.approx(expected, abs=1e-5) and len(golds) == 40


def test_each_member_learns_from_its_annotator(run, monkeypatch):
    """Bug: every member has all labels, the heads learn another model's scores, another arm's bias or flips."""
    pairs = [dict(annotator=i % 5, i=i) for i in range(60)]
    fits, asked = spy(monkeypatch, common, "fit", "pooled"), spy(monkeypatch, robust, "annotated", pairs)
    ensembles = spy(monkeypatch, common, "fit_robust", "members")
    assert robust.fit_rewards(run, "annotators", 60, 7)["pooled"] == "pooled"
    assert fits[0][0] == (run, pairs, 7)
    assert ensembles[0][0] == (run, "ensemble", [pairs[i::5] for i in range(5)], 7)
    heads = member_pairs(pairs, "brme", RobustConfig(members=5), 7)
    assert ensembles[1][0] == (run, "brme", heads, 7, "pooled")
    assert set(robust.fit_rewards(run, "flips", 60, 7)) == {"pooled", "ensemble"}
    assert [named for _, named in asked] == [robust.ARMS["annotators"], dict(flip=0.25)] and asked[1][0] == (run, 60, 7)


def test_best_of_n_by_every_robust_reward(named, monkeypatch):
    """Bug: an ensemble's maximum, the best of n by gold, a lambda that stays from the reward before it."""
    gold, pooled = made_up(monkeypatch, named, robust, 32, 256, "pooled", [slice(0, 99), slice(99, None)])
    members, heads, stds = noise(3, 2, 32 * 256), noise(4, 3, 32 * 256), noise(5, 3, 32 * 256).abs()
    rewards = dict(pooled="pooled", ensemble=SimpleNamespace(answers=lambda part: (members[:, part], None)),
                   brme=SimpleNamespace(answers=lambda part: (heads[:, part], stds[:, part])))
    fits = spy(monkeypatch, robust, "fit_rewards", rewards)
    *rows, spread = robust.robust_arm(7, False, "bonus")
    assert fits == [((named, "bonus", 3500, 7), {})]
    mean, worst, surest = members.mean(dim=0), members.amin(dim=0), heads.gather(0, stds.argmin(dim=0)[None])[0]
    proxies = {"pooled": pooled, "mean": mean, "wco": worst, "half": (mean + worst) / 2,
               "uwo": mean - members.var(dim=0, correction=0) / 2, "brme 1.0": surest,
               "brme 0.5": (surest + heads.amin(dim=0)) / 2}

    def best(proxy):
        return best_of_n(proxy.view(32, 256), gold, 64).mean().item()

    found = {row["how"]: row["gold"] for row in rows if (row["seed"], row["arm"], row["n"]) == (7, "bonus", 64)}
    expected = {how: best(proxy) for how, proxy in proxies.items()}
    assert found == pytest.approx(dict(expected, single=(best(members[0]) + best(members[1])) / 2))
    errors, spreads = (mean - gold.flatten()).abs(), members.std(dim=0, correction=0)
    assert spread["correlation"] == pytest.approx(torch.corrcoef(torch.stack([errors, spreads]))[0, 1].item())


def test_ppo_on_every_robust_reward(named, monkeypatch):
    """Bug: another reward than the one named, another critic, another KL penalty, score in the place of gold."""
    ensemble, brme = SimpleNamespace(members=["first", "second"], lam=0.5), SimpleNamespace(lam=0.5)
    rewards = dict(pooled="pooled", ensemble=ensemble, brme=brme)
    monkeypatch.setattr(robust, "fit_rewards", lambda *asked: rewards)
    spy(monkeypatch, robust, "best_rows", [])
    scorers = []

    def optimise(run, scorer, seed, critic, **settings):
        assert (seed, critic, settings) == (7, "pooled", dict(beta=0.02, ppo_iterations=16, ppo_lr=4e-4))
        scorers.append((scorer, getattr(scorer, "lam", None)))  # now: its lambda will change
        return None, logged_rows(5)

    monkeypatch.setattr(common, "optimise", optimise)
    rows = robust.robust_arm(7, False, "annotators")
    assert scorers == [("first", None), ("pooled", None), (ensemble, 1.0), (ensemble, 0.0), (brme, 1.0), (brme, 0.5)]
    for how in ("single", "pooled", "mean", "wco", "brme 1.0", "brme 0.5"):
        found = [(row["arm"], row["gold"]) for row in rows if row["how"] == how]
        assert found == [("annotators", pytest.approx(gold)) for gold in (1.85, 1.25, 0.8)]
    assert named.asked == [(7, False, {})]


def test_marks_of_direct(run, monkeypatch):
    """Bug: another loss, beta or data than asked for, a mark before its step, a rate that falls within the epoch."""
    given, rates = [], []

    def train(policy, reference, *rest):
        given.append(rest)
        for step in range(20):
            rates.append((rest[-2].dpo_lr, rest[-2].ppo_lr))
            yield dict(step=step), {}

    judged = spy(monkeypatch, common, "judge", dict(gold=1.0))
    accuracies = spy(monkeypatch, direct, "implicit_accuracy", 0.5)
    monkeypatch.setattr(direct, "MARKS", (2, 12))
    monkeypatch.setattr(direct, "train_dpo", train)
    monkeypatch.setattr(direct, "train_online_dpo", train)
    where = dict(seed=7, kind="dpo_sft", beta=0.02, gold=1.0)
    rows = direct.direct_job(7, False, "dpo_sft", 0.02)
    assert rows == [dict(where, step=2), dict(where, step=12, implicit_accuracy=0.5)]
    assert [asked[3:] for asked, _ in judged] == [(192, 7)] * 2 and accuracies[0][0][2] == run.pairs[1]
    assert run.asked == [(7, False, {})]
    direct.direct_job(7, False, "online_dpo", 0.02)
    (pairs, dpo, seed), (scorer, prompts, online, _) = given
    assert (pairs, seed, dpo.sft_weight) == (run.pairs[0], 7, 1.0)
    assert (dpo.dpo_beta, dpo.dpo_batch, dpo.dpo_epochs, dpo.label_smoothing) == (0.02, 32, 2, 0.0)
    assert equal(scorer, run.load_network("reward")) and prompts == run.prompts[0]
    assert (online.beta, online.ppo_batch, online.minibatch, online.ppo_epochs) == (0.02, 64, 64, 1)
    for i, (dpo_lr, ppo_lr) in enumerate(rates):
        step = i % 12  # of 18 in two epochs
        wanted = pytest.approx(1e-4 * min(1, (step + 1) / 10))
        assert dpo_lr * min((step + 1) / 2.8, 1 - step / 18) == wanted  # what train_dpo makes of it
        assert ppo_lr * (1 - step / 18) == wanted                       # and train_online_dpo


@pytest.mark.parametrize("online", [False, True])
def test_the_loops_of_direct_read_their_rate_in_every_step(online):
    """Bug: a loop copies its settings, and trains on with the rate of its first step."""
    policy, reference, steps = tiny_gpt(0).requires_grad_(True), tiny_gpt(0), 12
    settings = Config(dpo_batch=2, dpo_epochs=3, ppo_iterations=steps, ppo_batch=4, minibatch=4, response_tokens=3)
    loop = direct.train_dpo(policy, reference, PAIRS, settings, 0)
    if online:
        loop = direct.train_online_dpo(policy, reference, tiny_reward_model(), [[1, 2], [3]], settings, 0)
    direct.set_rate(settings, 0, steps)
    for step, (_, parts, *_) in enumerate(loop):
        assert parts["optimizer"].param_groups[0]["lr"] == pytest.approx(1e-4 * min(1, (step + 1) / 10))
        direct.set_rate(settings, min(step + 1, steps - 1), steps)
    assert step == steps - 1


def test_points_of_the_frontier(named, monkeypatch):
    """Bug: PPO on gold that is trained on the score, a setting that is not the beta, another number of iterations."""
    optimised = spy(monkeypatch, common, "optimise", ("policy", []))
    fitted, judged = spy(monkeypatch, common, "fit_policy", "policy"), spy(monkeypatch, common, "judge", dict(kl=2.0))
    monkeypatch.setattr(frontier, "make_scorer", lambda run: run.config.reward_from)
    for method, scorer, times in (("ppo", "model", 1), ("ppo on gold", "gold", 1), (frontier.LONGER, "gold", 2)):
        assert frontier.frontier_job(7, False, method, 0.3) == dict(seed=7, method=method, setting=0.3, kl=2.0)
        settings = dict(critic="reward", beta=0.3, ppo_iterations=times * named.config.ppo_iterations)
        assert optimised[-1] == ((named, scorer, 7), settings)
    assert frontier.frontier_job(7, False, "ipo", 0.5) == dict(seed=7, method="ipo", setting=0.5, kl=2.0)
    assert fitted == [((named, named.pairs[0], 7), dict(dpo_kind="ipo", dpo_beta=0.5))]
    assert judged == [((named, "policy", "sft", 512, 7, "reward"), {})] * 4


def test_curves_of_the_frontier(named, monkeypatch):
    """Bug: best-of-n by gold, the optimum of the other reward, a KL of another beta, an error of the samples."""
    gold, score = made_up(monkeypatch, named, frontier, 256, 64)
    rows = frontier.frontier_reference(7, False)
    assert (rows[0]["method"], rows[0]["kl"], rows[1]["setting"]) == ("SFT", 0, 2)
    for name, x in dict(score=score, gold=gold).items():
        assert (rows[0][name], rows[0][f"{name}_se"]) == pytest.approx(mean_se(x.mean(dim=1).tolist()))
        assert rows[1][name] == pytest.approx(best_of_n(score, x, 2).mean().item())
        curve = [row for row in rows if row["method"] == f"optimum of {name}"]
        assert len(curve) > 5
        for row in curve:
            p = torch.softmax(x.flatten() / row["setting"], dim=0)
            best, kl, squares = p @ x.flatten(), (p * (p * p.numel()).log()).sum(), p @ p
            error = (p @ (x.flatten() - best) ** 2 * squares).sqrt()
            expected = [number.item() for number in (best, kl, error)]
            assert [row[name], row["kl"], row[f"{name}_se"]] == pytest.approx(expected, abs=1e-6)
            assert squares <= 1 / 100  # or a few samples carry all the weight


def test_accuracies_of_limits(run, files, monkeypatch):
    """Bug: clean labels for flipped ones, labels about other subjects, the two sides exchanged, another base run."""
    fits = spy(monkeypatch, common, "fit", "fitted")
    monkeypatch.setattr(common, "gold_accuracy", lambda model, pairs: (model, pairs))

    def about(pairs, *subjects):
        return [pair for pair in pairs if set(subjects) & set(files.text(pair["prompt"]).split())]

    def sides(*subjects):
        known = about(run.pairs[1], *subjects)
        return ("fitted", known), ("fitted", [pair for pair in run.pairs[1] if pair not in known])

    row = limits.limits_labels(3, False, 50, 0.4)
    assert fits[-1][0][1:] == (common.labelled(run, 50, 3, 0.4), 3)
    assert row == dict(part="labels", seed=3, labels=50, flip=0.4, value=("fitted", run.pairs[1]))
    rows = limits.limits_coverage(3, True, 2)
    assert fits[-1][0][1:] == (about(run.pairs[0], "book", "concert")[:24], 3)
    assert [row["side"] for row in rows] == ["labelled", "unlabelled"]
    assert tuple(row["value"] for row in rows) == sides("book", "concert")
    rows = {row["subject"]: row["value"] for row in limits.limits_subject(3, False)}
    assert fits[-1][0][1:] == (run.pairs[0][:1000], 3)
    assert (rows["held-out subject"], rows["other subjects"]) == sides("film")
    assert run.asked == [(3, False, {}), (3, True, {}), (3, False, dict(held_out="film"))]


def test_likelihood_of_held_out_texts(run):
    """Bug: texts of pretraining itself, or the log-likelihood of a text and not of a token."""
    rng, end, policy = random.Random(1003), run.tokenizer.n_vocab - 2, run.load_network("ppo")
    texts = [run.tokenizer.encode_ordinary(world.make_document(rng)) + [end] for _ in range(6)]
    texts = [ids[:run.config.block_size - 1] for ids in texts]
    batch = limits.heldout_texts(run, 3, 6)
    assert batch.prompt_ids() == [[end]] * 6 and batch.response_ids() == texts
    texts = [ids[:9 * i + 1] for i, ids in enumerate(texts)]  # with padding
    expected = sum(total_logp(policy, [end], ids) for ids in texts) / sum(map(len, texts))
    assert limits.log_likelihood(policy, collate([[end]] * 6, texts, policy.pad)) == pytest.approx(expected, abs=1e-4)


def test_the_tax_of_limits(named, monkeypatch):
    """Bug: two policies exchanged, another KL for each, or the end although the KL was passed."""
    def train(run, source, seed, watch, **settings):
        seen.append((source, settings))
        for policy in ("between", "near", "between", "far", "between", "end"):  # every second step is measured
            watch(policy)

    seen, kls = [], dict(near=1.0, far=3.0, end=2.0)
    values = dict(sft=-1.0, near=-2.0, far=-4.0, end=-9.0)
    texts, fits = spy(monkeypatch, limits, "heldout_texts", "texts"), spy(monkeypatch, common, "fit", "fitted")
    monkeypatch.setattr(limits, "log_likelihood", lambda policy, texts: values[policy])
    monkeypatch.setattr(common, "judge", lambda run, policy, sft, n, seed: dict(kl=kls[policy]))
    for name in ("optimise", "fit_policy"):
        monkeypatch.setattr(common, name, train)

    def measured():
        return [(row["policy"], row["kl"], pytest.approx(row["value"])) for row in limits.limits_tax(3, False)]

    assert common.interpolate(1.5, [2, 1, 3], [4, 2, 9]) == 3  # in any order
    # from 1 to 3 nats; what follows is no more
    assert measured() == [("ppo", 2.0, -3.0), ("rloo", 2.0, -3.0), ("dpo", 2.0, -3.0), ("sft", 0.0, -1.0)]
    kls.update(far=1.2, end=1.5)  # never passed: the end
    assert measured()[:3] == [("ppo", 1.5, -9.0), ("rloo", 1.5, -9.0), ("dpo", 1.5, -9.0)]
    assert fits[0][0][1:] == (named.pairs[0], 3) and texts[0][0][1:] == (3, 256)
    assert seen[:3] == [("fitted", dict(beta=0.1, ppo_iterations=16, ppo_lr=3e-4)),
                        ("fitted", dict(beta=0.1, ppo_iterations=16, method="rloo", grpo_lr=3e-4)),
                        (named.pairs[0], dict(dpo_beta=0.05, dpo_batch=32))]


@pytest.mark.parametrize("method, reward", [("ppo", "gold"), ("dr_grpo", "model")])
def test_a_curve_of_estimators(method, reward, named, monkeypatch):
    """Bug: another budget, reward or seed than asked for, a share from the wrong end, seconds that do not add up."""
    clock = [100.0]

    def optimise(run, *asked, **settings):
        assert asked == (reward, 7, method)
        assert settings == dict(critic="reward", ppo_iterations=30, ppo_batch=128, group=4)
        clock[0] += 60.0
        return None, logged_rows(30)

    monkeypatch.setattr(common, "optimise", optimise)
    monkeypatch.setattr(estimators, "make_scorer", lambda run: run.config.reward_from)
    monkeypatch.setattr(estimators.time, "process_time", lambda: clock[0])
    gold, score = made_up(monkeypatch, named, estimators, 256, 32, reward)
    values, beta = gold if reward == "gold" else score, named.config.beta
    start, best = values.mean().item(), beta * (values / beta).exp().mean().log().item()
    curve = estimators.curve_job(7, False, reward, method)
    assert [row["seconds"] for row in curve] == pytest.approx([10, 20, 30, 40, 50, 60])
    assert [row["kl"] for row in curve] == pytest.approx([2, 7, 12, 17, 22, 27])
    shares = [(0.7 * row["kl"] - start) / (best - start) for row in curve]
    assert [row["share"] for row in curve] == pytest.approx(shares) and named.asked == [(7, False, {})]


def test_best_of_n_distilled_is_the_best_by_score(run, monkeypatch):
    """Bug: the worst, an answer to another prompt, a random one among all of them, SFT that goes on from the best."""
    taught, scores, sft = [], noise(2, 8192), run.load_network("sft")

    def train_sft(policy, examples, config, seed):
        assert equal(policy, sft) and (config.sft_steps, config.sft_lr, seed) == (64, run.config.sft_lr / 4, 7)
        taught.append(examples)
        return []

    sampled = spy(monkeypatch, estimators, "sample_policy", [])
    spy(monkeypatch, common, "response_lists", range(8192))
    spy(monkeypatch, estimators, "score_batches", scores)
    judged = spy(monkeypatch, common, "judge", dict(score=1.0))
    monkeypatch.setattr(estimators, "train_sft", train_sft)
    rows = estimators.rejection_job(7, False)
    assert rows == [dict(study="rejection", seed=7, pick=pick, score=1.0) for pick in ("best", "random")]
    prompts, starts = run.prompts[0][:1024], range(0, 8192, 8)
    draws = torch.randint(8, (1024,), generator=torch.Generator().manual_seed(7)).tolist()
    best = [max(range(at, at + 8), key=scores.__getitem__) for at in starts]
    assert taught == [list(zip(prompts, best)), list(zip(prompts, [at + draw for at, draw in zip(starts, draws)]))]
    R, temperature = run.config.response_tokens, run.config.temperature
    assert sampled[0][0][1:] == ([prompt for prompt in prompts for _ in range(8)], R, temperature, 7)
    assert [asked[3:5] for asked, _ in judged] == [(512, 7)] * 2
