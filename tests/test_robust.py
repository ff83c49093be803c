"""Tests of robust.py: robust rewards against loops, closed forms and reward models alone."""

import copy
import math

import pytest
import torch
from conftest import SMALLEST, make_run
from helpers import (
    PAD,
    PAIRS,
    close,
    finish,
    naive_hidden,
    noise,
    poison,
    random_batch,
    rows_of,
    through_a_file,
    tiny_gpt,
    unchanged,
    weights,
)

import robust
from checks import save_parts
from data import collate_pairs, minibatches
from model import generate
from pipeline.config import Config, read_settings
from pipeline.files import clean
from pipeline.report import format_notes
from pipeline.run import Run
from reward import RewardConfig, RewardModel, normalise, score_batches, train_reward_model
from robust import (
    GaussianReward,
    RobustConfig,
    RobustReward,
    gaussian_nll,
    make_members,
    member_pairs,
    nominal,
    normalise_robust,
    steps_of,
    train_head,
    train_members,
    two_opinions,
)

ROUNDING = 2e-6  # scores are float32
BATCHES = [random_batch(seed, B=4) for seed in range(3)]


def config(**changes):
    return RewardConfig(**{**dict(reward_batch=3), **changes})


def tiny(make=RewardModel, seed=0, dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make(tiny_gpt(seed)).to(dtype)


def tiny_reward(kind, lam=0.5, k=3):
    return RobustReward([tiny(GaussianReward if kind == "brme" else RewardModel, seed) for seed in range(k)], kind, lam)


# ---- two opinions ----------------------------------------------------------------------------------------------------

def test_opinions_equal_a_loop():
    """
    Bug: the standard deviation or the sample variance for the population variance, a bonus for a penalty, the maximum
    for the minimum, the head with the largest std, one head for the whole batch, a mean over responses.
    """
    means, stds = 2 * noise(0, 4, 9), noise(1, 4, 9).abs()
    found = {kind: two_opinions(kind, means, stds) for kind in ("ensemble", "uwo", "brme")}
    for b in range(9):
        column, deviations = means[:, b].tolist(), stds[:, b].tolist()
        mean = sum(column) / 4
        variance = sum((r - mean) ** 2 for r in column) / 4
        surest = column[deviations.index(min(deviations))]
        close(found["ensemble"][:, b], [mean, sorted(column)[0]])
        close(found["uwo"][:, b], [mean, mean - variance])
        close(found["brme"][:, b], [surest, sorted(column)[0]])
        close(nominal(means, stds)[b], surest)
    assert len(set(stds.argmin(dim=0).tolist())) > 1


def test_other_kinds_and_lambdas_are_refused():
    """Bug: a misspelt name that gives another reward, and a lambda that rewards disagreement."""
    for kind, lam in (("wco", 0.5), ("ensemble", -0.1), ("uwo", 1.1)):
        with pytest.raises(ValueError, match="a kind of ensemble, uwo, brme and lambda in"):
            tiny_reward(kind, lam)


@pytest.mark.parametrize("kind", ["ensemble", "uwo", "brme"])
def test_scores_equal_a_slow_computation(kind):
    """
    Bug: lambda turned round, one normalisation for all members, the opinions of other responses, a score that reads
    pads, members that are left out; a spread of the sample, or of the stds.
    """
    reward, batch = tiny_reward(kind, lam=0.3), BATCHES[0]
    columns = []
    for prompt, response in rows_of(batch):
        x = [naive_hidden(member.trunk, prompt + response)[-1].detach() for member in reward.members]
        means = torch.stack([member.score(h)[0] for member, h in zip(reward.members, x)])
        stds = None
        if kind == "brme":
            stds = torch.stack([torch.log(1 + member.deviation(h)[0].exp()) + 1e-4
                                for member, h in zip(reward.members, x)])[:, None]
        columns.append((two_opinions(kind, means[:, None], stds)[:, 0], means.std(correction=0)))
    raw = torch.stack([opinions for opinions, _ in columns], dim=1).detach()                  # (2, B)
    close(reward(batch), 0.3 * raw[0] + 0.7 * raw[1], 1e-5)
    close(reward.spread(batch), torch.stack([spread for _, spread in columns]), 1e-5)
    assert torch.equal(reward(poison(batch)), reward(batch))
    assert (reward.pad, reward.device.type) == (PAD, "cpu")


@pytest.mark.parametrize("kind", ["ensemble", "uwo", "brme"])
def test_every_lambda_has_mean_0_and_deviation_1(kind):
    """
    Bug: a lambda that changes the scale of the score, and with it what a nat of KL costs; opinions taken as
    independent; moments of one batch; the sample's deviation.
    """
    reward = tiny_reward(kind)
    normalise_robust(reward, iter(BATCHES))
    for lam in (0.0, 0.25, 0.5, 1.0):
        reward.lam = lam
        scores = score_batches(reward, BATCHES).double()
        close(scores.mean(), 0, 1e-5)
        close(scores.std(correction=0), 1, 1e-5)
    reward.lam = 0.4
    once = score_batches(reward, BATCHES)
    normalise_robust(reward, BATCHES)
    close(score_batches(reward, BATCHES), once, 1e-5)
    other = tiny_reward(kind, 0.4)
    other.load_state_dict(through_a_file(reward.state_dict()))
    assert torch.equal(score_batches(other, BATCHES), score_batches(reward, BATCHES))


def test_members_are_normalised_before_they_are_mixed():
    """Bug: the member with the largest offset decides the minimum everywhere."""
    reward = tiny_reward("ensemble", lam=0.0)
    with torch.no_grad():
        reward.members[1].score.bias += 50.0
        reward.members[2].score.weight *= 9
    normalise_robust(reward, BATCHES)
    alone = []
    for member in reward.members:
        one = copy.deepcopy(member)
        normalise(one, BATCHES)
        alone.append(score_batches(one, BATCHES))
    lowest = torch.stack(alone).amin(dim=0).double()
    close(score_batches(reward, BATCHES), (lowest - lowest.mean()) / lowest.std(correction=0), 1e-5)


# ---- the members -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["ensemble", "brme"])
def test_members_differ_in_head_and_last_block(kind):
    """
    Bug: members that are copies, that share a head or a block with each other or with other seeds, that forget the
    lower blocks, that change the SFT network, or that use the caller's random numbers.
    """
    trunk, state = tiny_gpt(0, torch.float32).requires_grad_(False), torch.get_rng_state()
    before = weights(trunk)
    members = make_members(trunk, kind, 3, seed=2) + make_members(trunk, kind, 3, seed=1)
    assert torch.equal(torch.get_rng_state(), state) and unchanged(trunk, before)
    for name in ("score.weight", "trunk.h.1.mlp.c_fc.weight"):
        assert len({str(member.state_dict()[name].tolist()) for member in members}) == 6
    for member in members:
        assert torch.equal(member.trunk.h[0].mlp.c_fc.weight, trunk.h[0].mlp.c_fc.weight)
        assert all(parameter.requires_grad for parameter in member.parameters())
        assert (kind == "brme") == isinstance(member, GaussianReward)
    assert len({parameter.data_ptr() for member in members for parameter in member.parameters()}) == sum(
        len(list(member.parameters())) for member in members)


def test_heads_on_one_trunk_cannot_disagree():
    """
    Bug: brme as in the paper, with one network below all heads: fitted to one reward model, its nominal and its worst
    reward are one ranking, and lambda changes nothing. Heads with last blocks of their own differ.
    """
    torch.manual_seed(0)
    model, batch = tiny(dtype=torch.float32, seed=1), random_batch(9, B=64)
    x = torch.cat([robust.last_hidden(model.trunk, random_batch(seed, B=40)) for seed in range(3)]).detach()
    targets = model.scale(x).detach()
    shared = []
    for seed in range(3):  # linear heads, each on its own half of the responses
        rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:60]
        solution = torch.linalg.lstsq(x[rows], targets[rows, None]).solution[:, 0]
        shared.append(robust.last_hidden(model.trunk, batch) @ solution)
    opinions = two_opinions("ensemble", torch.stack(shared))
    members = make_members(model.trunk, "brme", 3, 0)
    finish(train_members(members, [PAIRS] * 3, config(reward_epochs=20, reward_lr=3e-3), 0, model))
    own = two_opinions("brme", *[torch.stack(x).detach() for x in zip(*[member(batch) for member in members])])
    assert torch.corrcoef(opinions)[0, 1] > 0.998 > 0.95 > torch.corrcoef(own)[0, 1]


def test_which_pairs_a_member_learns_from():
    """Bug: heads that learn from the same share, a share of another size, an ensemble with fewer pairs."""
    pairs = [dict(prompt=[i]) for i in range(50)]
    settings = RobustConfig(members=4, head_share=0.3)
    assert member_pairs(pairs, "ensemble", settings, 0) == member_pairs(pairs, "uwo", settings, 0) == [pairs] * 4
    shares = member_pairs(pairs, "brme", settings, 0)
    assert [len({pair["prompt"][0] for pair in share}) for share in shares] == [15] * 4 == [len(s) for s in shares]
    assert len({str(share) for share in shares}) == 4
    assert shares == member_pairs(pairs, "brme", settings, 0) != member_pairs(pairs, "brme", settings, 1)


def test_gaussian_nll_is_the_density():
    """Bug: a variance for a std, and a missing half or logarithm: it is PyTorch's Gaussian without its constant."""
    means, stds, target = noise(0, 3, 5), noise(1, 3, 5).abs() + 0.1, noise(2, 5)
    log_prob = torch.distributions.Normal(means, stds).log_prob(target)
    close(gaussian_nll(means, stds, target), -log_prob.mean() - 0.5 * math.log(2 * math.pi))


def test_a_head_is_a_gaussian_of_the_last_hidden_state():
    """Bug: a std that is not positive, a hidden state that is read at a pad, a std that is the mean."""
    head, batch = tiny(GaussianReward), random_batch(0)
    means, stds = head(batch)
    with torch.no_grad():
        for b, (prompt, response) in enumerate(rows_of(batch)):
            x = naive_hidden(head.trunk, prompt + response)[-1]
            close(means[b], head.score(x)[0], ROUNDING)
            close(stds[b], math.log(1 + math.exp(head.deviation(x)[0])) + 1e-4, ROUNDING)
        head.deviation.bias[:] = -1e4
    assert (head(batch)[1] > 0).all()  # a std of 0 would make the likelihood infinite


def test_training_of_a_head_equals_a_slow_replay(monkeypatch):
    """
    Bug: targets of other pairs, chosen and rejected exchanged, a learning rate that does not fall, gradients that are
    not cleared or not clipped, weight decay that is not passed on, metrics after the step, a target that is trained.

    The order of the pairs is recorded. All the rest is computed in float64, one response at a time.
    """
    orders = []

    def recorded(n, size, epochs, generator):
        assert (n, size, epochs) == (7, 3, 2)
        orders.extend(minibatches(n, size, epochs, generator))
        return orders

    monkeypatch.setattr(robust, "minibatches", recorded)
    model, head = tiny(seed=1), tiny(GaussianReward)
    normalise(model, [collate_pairs(PAIRS, PAD)])
    slow, before = copy.deepcopy(head), weights(model)
    rows = finish(train_head(head, model, PAIRS, config(reward_lr=0.01, weight_decay=0.3), 5))
    assert len(orders) == len(rows) == 6 and unchanged(model, before) and str(orders[:3]) != str(orders[3:])
    adam = torch.optim.AdamW(slow.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.3)
    norms = []
    for step, (order, row) in enumerate(zip(orders, rows)):
        losses = []
        for pair in order.tolist():
            for side in ("chosen", "rejected"):
                text = PAIRS[pair]["prompt"] + PAIRS[pair][side]
                x = naive_hidden(slow.trunk, text)[-1]
                with torch.no_grad():
                    target = model.score(naive_hidden(model.trunk, text)[-1])[0]
                    target = ((target - model.mean) / model.std).item()
                mean, std = slow.score(x)[0], torch.log(1 + torch.exp(slow.deviation(x)[0])) + 1e-4
                losses.append(0.5 * ((target - mean) / std) ** 2 + torch.log(std))
        loss = sum(losses) / len(losses)
        adam.zero_grad()
        loss.backward()
        norms.append(math.sqrt(sum((p.grad ** 2).sum().item() for p in slow.parameters() if p.grad is not None)))
        for p in slow.parameters():
            if p.grad is not None:
                p.grad /= max(1.0, norms[-1])
        adam.param_groups[0]["lr"] = 0.01 * (6 - step) / 6
        adam.step()
        expected = dict(step=step, loss=loss.item())
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-5) and list(row) == list(expected)
    assert max(norms) > 1
    for name, w in head.state_dict().items():
        close(w, slow.state_dict()[name], 1e-5)


SHARES = [PAIRS, PAIRS[:4], PAIRS[2:]]


@pytest.mark.parametrize("kind", ["ensemble", "brme"])
def test_members_are_trained_as_they_would_be_alone(kind):
    """Bug: members with one order, the pairs of another member, heads that are fitted to labels, steps miscounted."""
    settings, judge = config(reward_epochs=1), tiny(seed=1, dtype=torch.float32)
    members = make_members(tiny_gpt(0, torch.float32), kind, 3, seed=2)
    alone = copy.deepcopy(members)
    assert steps_of(SHARES, settings) == [3, 2, 2]
    rows = finish(train_members(members, SHARES, settings, 2, judge if kind == "brme" else None))
    assert [(row["member"], row["step"]) for row in rows] == list(zip((0, 0, 0, 1, 1, 2, 2), range(7)))
    for i, (member, one) in enumerate(zip(members, alone)):
        if kind == "brme":
            metrics = finish(train_head(one, judge, SHARES[i], settings, 6 + i))
        else:
            metrics = finish(train_reward_model(one, SHARES[i], settings, 6 + i))
        assert unchanged(member, weights(one))
        assert [row["loss"] for row in rows if row["member"] == i] == [row["loss"] for row in metrics]


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_members_continue_from_a_checkpoint(stop):
    """Bug: a member that is trained twice or not at all, or whose optimizer is another's, after an interruption."""
    settings = config(reward_epochs=1)
    whole, broken, fresh = [make_members(tiny_gpt(0, torch.float32), "ensemble", 3, seed=2) for _ in range(3)]
    rows = finish(train_members(whole, SHARES, settings, 2))
    for metrics, parts in train_members(broken, SHARES, settings, 2):
        if metrics["step"] + 1 == stop:
            saved = through_a_file(save_parts(parts, stop))
            break
    assert finish(train_members(fresh, SHARES, settings, 2, checkpoint=saved)) == rows[stop:]
    assert all(unchanged(a, weights(b)) for a, b in zip(fresh, whole))


# ---- a robust reward at the front door -------------------------------------------------------------------------------

@pytest.mark.parametrize("settings", [
    dict(reward_model="brme", members=2), dict(reward_model="ensemble", annotators=3, bias="length=1,phrase:the=3")])
def test_a_run_on_a_robust_reward(settings, tmp_path):
    """
    Bug: a policy, the report or the page still has the score of the single reward model; a member learns from another
    annotator's labels; the critic starts from the robust reward; the spread is not logged.
    """
    make_run(tmp_path, dict(SMALLEST, robust_lambda=0.25, **settings))
    run = Run(tmp_path, Config(**read_settings(tmp_path)), "cpu")
    scorer, single, sft = run.scorer(), run.load_network("reward"), run.load_network("sft")
    assert (scorer.kind, scorer.lam, len(scorer.members)) == (settings["reward_model"], 0.25, 2 + ("bias" in settings))
    report = run.read("report.json")
    assert report["reward_model"] == clean(run.read("robust.json")) != run.read("reward.json")

    rows = {name: [row for row in run.rows() if row["stage"] == name and "step" in row] for name in ("robust", "ppo")}
    shares = [run.pairs[0]] * 3
    if "bias" in settings:
        shares = [[pair for pair in run.pairs[0] if pair["annotator"] == i] for i in range(3)]
        assert '"the", which an annotator likes: pretrained' in " ".join(format_notes(report))
    counts = [sum(row["member"] == i for row in rows["robust"]) for i in range(len(scorer.members))]
    shares = member_pairs(run.pairs[0], "brme", run.config, 0) if settings["reward_model"] == "brme" else shares
    assert counts == steps_of(shares, run.config)

    first = rows["ppo"][0]  # before any update: the SFT policy's own answers
    seed = 1000 * run.config.seed + 4
    picks = torch.randint(len(run.prompts[0]), (8,), generator=torch.Generator().manual_seed(seed)).tolist()
    rollout = generate(sft, [run.prompts[0][i] for i in picks], run.config.response_tokens, run.config.temperature,
                       torch.Generator().manual_seed(seed))
    assert first["score"] == pytest.approx(scorer(rollout).mean().item(), abs=1e-5)
    assert first["score"] != pytest.approx(single(rollout).mean().item(), abs=1e-3)
    assert first["spread"] == pytest.approx(scorer.spread(rollout).mean().item(), abs=1e-5)
    answers = [row["score"] for row in run.rows("watch.jsonl")]
    assert len(answers[0]) == 8 and "spread" in (tmp_path / "report.html").read_text()
