"""Group advantages, means of token losses, the k3 loss and the loop, against plain loops and closed forms."""

import copy
import math
import statistics

import pytest
import torch
from helpers import (
    PAD,
    E,
    close,
    finish,
    is_pad,
    naive_response_logprobs,
    naive_values,
    noise,
    rows_of,
    slow_step,
    tiny_gpt,
    unchanged,
    weights,
)

import grpo
from data import minibatches
from grpo import GRPOConfig, equal_groups, group_advantages, kl_loss, loss_mean
from model import generate
from reward import RewardModel

KINDS = ("grpo", "dr_grpo", "rloo", "reinforce++")


# ---- advantages ------------------------------------------------------------------------------------------------------

def slow_advantages(rewards, group, kind):
    """Plain loops over lists."""
    advantages = []
    for i, r in enumerate(rewards):
        first = i - i % group
        own_group = rewards[first:first + group]
        others = own_group[:i - first] + own_group[i - first + 1:]
        if kind != "reinforce++" and len(set(own_group)) == 1:
            advantages.append(0.0)
        elif kind == "rloo":
            advantages.append(r - statistics.mean(others))
        elif kind == "dr_grpo":
            advantages.append(r - statistics.mean(own_group))
        elif kind == "grpo":
            advantages.append((r - statistics.mean(own_group)) / (statistics.stdev(own_group) + 1e-6))
        else:
            advantages.append((r - statistics.mean(rewards)) / statistics.pstdev(rewards))
    return advantages


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [2, 3, 6])
def test_advantages_equal_plain_loops(kind, group):
    """
    Bug: groups along the wrong axis, a baseline that includes the own reward in RLOO, the deviation of the batch
    for the deviation of a group, G and not G - 1 under it, or a mean that is not subtracted.
    """
    rewards = noise(group, 12) * 3 + 1
    rewards[:group] *= 10  # the groups have different deviations
    close(group_advantages(rewards, group, kind), slow_advantages(rewards.tolist(), group, kind), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.24, 0.1, 1000.1, -3.3])
@pytest.mark.parametrize("kind", KINDS)
def test_equal_rewards_teach_exactly_nothing(kind, value, dtype):
    """Bug: the rounding of a mean, divided by a deviation that is rounding too: advantages of size 1 for nothing."""
    for group in (2, 4, 8):
        assert (group_advantages(torch.full((8,), value, dtype=dtype), group, kind) == 0).all()
    rewards = torch.tensor([value] * 3 + [1.0, 2.0, 3.0], dtype=dtype)  # the other group still learns
    advantages = group_advantages(rewards, 3, kind)
    assert (advantages[3:] != 0).any() and ((advantages[:3] == 0).all() or kind == "reinforce++")


@pytest.mark.parametrize("group, kind, message", [
    (4, "dr_grpo", r"groups of at least 2, got \(6,\) in groups of 4"), (1, "rloo", "groups of at least 2"),
    (2, "ppo", "kind must be one of grpo")])
def test_what_is_no_group_or_no_kind_is_refused(group, kind, message):
    """Bug: a rest of a group gets advantages that mean nothing, or a misspelt kind falls through to another one."""
    with pytest.raises(ValueError, match=message):
        group_advantages(noise(0, 6), group, kind)


def test_the_share_of_groups_with_equal_scores():
    """Bug: the share of rows, or of groups in which any two scores are equal."""
    scores = torch.tensor([1.0, 1.0, 1.0, 2.0, 2.0, 1.0, 0.0, 0.0, 0.0, 3.0, 4.0, 5.0])
    assert equal_groups(scores, 3).item() == 0.5
    assert equal_groups(scores, 1).item() == 1


# ---- token losses become one number ----------------------------------------------------------------------------------

MASK = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]], dtype=torch.bool)


def test_means_equal_plain_loops():
    """Bug: a mean over padding, a length where the cap belongs or the other way round, or NaN of an empty response."""
    losses = torch.where(MASK, noise(0, 3, 4), math.nan)
    rows = [row[keep].tolist() for row, keep in zip(losses, MASK)]
    by_response = statistics.mean(statistics.mean(row) for row in rows)
    by_cap = sum(sum(row) / 7 for row in rows) / 3
    by_token = statistics.mean(x for row in rows for x in row)
    expected = {"grpo": by_response, "dr_grpo": by_cap, "rloo": by_cap, "reinforce++": by_token}
    for kind in KINDS:
        close(loss_mean(losses, MASK, kind, 7), expected[kind])
        assert loss_mean(losses[:1], torch.zeros_like(MASK[:1]), kind, 7) == 0


# ---- the KL as a loss ------------------------------------------------------------------------------------------------

def test_the_k3_loss_has_the_value_of_a_kl_and_the_gradient_of_another():
    """
    Bug: a k3 of the inverted ratio, or with the sign that pushes away from the reference.

    In one state with five tokens, weighted by how often pi samples them, the k3 loss is KL(pi || ref). Its gradient is
    the gradient of KL(ref || pi), pi - ref, and not of KL(pi || ref).
    """
    logits, ref = noise(0, 5).requires_grad_(), torch.log_softmax(noise(1, 5), dim=0)
    logp = torch.log_softmax(logits, dim=0)
    pi = logp.exp().detach()
    loss = (pi * kl_loss(logp[:, None], ref[:, None])[:, 0]).sum()
    close(loss.item(), (pi * (logp - ref)).sum().item())
    gradient, = torch.autograd.grad(loss, logits, retain_graph=True)
    close(gradient, pi - ref.exp())
    right, = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), logits)
    assert (gradient - right).norm() > 0.1


# ---- the loop --------------------------------------------------------------------------------------------------------

PROMPTS = [[1, 2, 3], [4], [5, 6], [7, 8, 0, 1, 2], [3, 3]]


def untrained(seed=7):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return RewardModel(tiny_gpt(seed)).double()


@torch.no_grad()
def slow_scores(batch):
    """The scores of an untrained reward model, row by row in float64."""
    model = untrained()
    return torch.stack([naive_values(model, *text)[1] for text in rows_of(batch)])


def loop(policy, reward_model, **changes):
    """train_grpo from `policy` on tiny networks: the generator."""
    config = GRPOConfig(**{**dict(ppo_iterations=3, ppo_batch=12, group=3), **changes})
    return grpo.train_grpo(policy, copy.deepcopy(policy), reward_model, PROMPTS, config, seed=0)


def paper_loss(kind, logp, old, ref, advantages, beta, clip, cap):
    """
    The loss of a minibatch as the papers write it. logp, old and ref: for each response a list over its tokens.

        grpo         1/G sum_i 1/|o_i| sum_t  (clipped surrogate - beta k3), negated
        dr_grpo      the same with the cap for |o_i|
        rloo         the same, without k3
        reinforce++  one mean over all tokens, without k3
    """
    total, tokens = 0.0, 0
    for i in range(len(logp)):
        of_response = 0.0
        for t in range(len(logp[i])):
            ratio = torch.exp(logp[i][t] - old[i][t])
            of_response = of_response + torch.min(ratio * advantages[i],
                                                  ratio.clamp(1 - clip, 1 + clip) * advantages[i])
            if kind in ("grpo", "dr_grpo"):
                of_response = of_response - beta * (
                    torch.exp(ref[i][t] - logp[i][t]) - (ref[i][t] - logp[i][t]) - 1)
        total = total + of_response / {"grpo": len(logp[i]), "reinforce++": 1}.get(kind, cap)
        tokens += len(logp[i])
    return -total / (tokens if kind == "reinforce++" else len(logp))


@pytest.mark.parametrize("kind", KINDS)
def test_the_loop_equals_a_slow_replay(kind, monkeypatch):
    """
    Bug: advantages of other rows, groups that mix prompts, a setting that is not passed on, a KL that is paid in the
    reward and in the loss, or in neither, or with the other sign; the length or the widest response for the cap; a mean
    that is not the kind's, old log-probs that are computed again, gradients that add up or are not clipped, a rate that
    does not fall, one random number for two iterations, or a metric of the wrong quantity.

    Only the rollouts and the order of the rows are recorded. All the rest is computed again, row by row.
    """
    beta, temperature, lr, cap = 0.3, 0.8, 0.03, 17
    rollouts, orders, generators = [], [], []

    def recorded_generate(policy, prompts, tokens, temperature_of_sampling, generator):
        assert (len(prompts), tokens, temperature_of_sampling) == (12, cap, temperature)
        assert all(prompts[i] == prompts[i - i % 3] for i in range(12))  # a group answers one prompt
        generators.append(generator)
        rollouts.append(generate(policy, prompts, tokens, temperature_of_sampling, generator))
        return rollouts[-1]

    def recorded_minibatches(n, size, epochs, generator):
        assert (n, size, epochs) == (12, 8, 2)
        orders.append(minibatches(n, size, epochs, generator))
        return orders[-1]

    monkeypatch.setattr(grpo, "generate", recorded_generate)
    monkeypatch.setattr(grpo, "minibatches", recorded_minibatches)
    policy = tiny_gpt(13)  # a network of short responses
    yielded = list(loop(policy, slow_scores, minibatch=8, kind=kind, beta=beta, temperature=temperature, grpo_lr=lr,
                        clip=0.1, response_tokens=cap))
    assert len({str(rollout.prompt_ids()) for rollout in rollouts}) == 3
    assert len({str(order) for order in orders}) == 3
    assert all(parts["sampler"] is its for (_, parts, _), its in zip(yielded, generators))
    assert any(rollout.R < cap for rollout in rollouts)

    slow_policy, reference = tiny_gpt(13), tiny_gpt(13)
    adam = torch.optim.AdamW(slow_policy.parameters(), betas=(0.9, 0.99), eps=1e-5, weight_decay=0.0)
    all_norms = []
    assert all(a is b for (_, _, a), b in zip(yielded, rollouts, strict=True)) and len(orders) == 3
    for iteration, (rollout, order) in enumerate(zip(rollouts, orders)):
        metrics, texts = yielded[iteration][0], rows_of(rollout)
        with torch.no_grad():
            old = [naive_response_logprobs(slow_policy, *text, temperature) for text in texts]
            ref = [naive_response_logprobs(reference, *text, temperature) for text in texts]
        scores = slow_scores(rollout).tolist()
        close(torch.cat(old), rollout.logp[rollout.mask], 1e-5)
        paid = [(a - b).sum().item() for a, b in zip(old, ref)]
        in_reward = beta if kind in ("rloo", "reinforce++") else 0.0
        advantages = slow_advantages([score - in_reward * k for score, k in zip(scores, paid)], 3, kind)
        measured, norms = [], []
        for rows in order:
            logp = [naive_response_logprobs(slow_policy, *texts[i], temperature) for i in rows]
            loss = paper_loss(kind, logp, [old[i] for i in rows], [ref[i] for i in rows],
                              [advantages[i] for i in rows], beta, 0.1, cap)
            norms.append(slow_step(slow_policy, adam, lr * (3 - iteration) / 3, loss))
            x = torch.cat(logp).detach() - torch.cat([old[i] for i in rows])
            clipped = ((x.exp() - 1).abs() > 0.1).double().mean().item()
            measured.append([loss.item(), clipped, (x.exp() - 1 - x).mean().item()])
        loss, clipped, approx_kl = torch.tensor(measured).mean(dim=0).tolist()
        lengths = [len(response) for _, response in texts]
        score, kl = statistics.mean(scores), statistics.mean(paid)
        equal = [len(set(scores[first:first + 3])) == 1 for first in range(0, 12, 3)]
        expected = dict(
            step=iteration, score=score, kl=kl, objective=score - beta * kl, length=statistics.mean(lengths),
            finished=statistics.mean(response[-1] == E for _, response in texts), equal_groups=sum(equal) / 4,
            loss=loss, entropy=-torch.cat(old).mean().item(), clip_fraction=clipped, approx_kl=approx_kl,
            grad_norm=statistics.mean(norms))
        if iteration == 0:
            expected["kl_at_start"] = 0
        assert set(metrics) == {*expected, "ratio_error"} and next(iter(metrics)) == "step"
        for name, value in expected.items():
            assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-5), (iteration, name)
        all_norms += norms
    assert max(all_norms) > 1 or kind in ("rloo", "dr_grpo")
    for name, w in policy.state_dict().items():
        close(w, slow_policy.state_dict()[name], 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_groups_are_counted_in_scores(kind):
    """Bug: the share counts rewards: away from the reference, responses of equal scores pay another KL each."""
    def constant(batch):
        return torch.full((len(batch),), 0.24)

    settings = dict(kind=kind, ppo_iterations=2, response_tokens=5, grpo_lr=0.05)
    scorers = [untrained(), constant]  # of the two iterations
    _, (metrics, _, _) = loop(tiny_gpt(0), lambda batch: scorers.pop(0)(batch), **settings)
    assert metrics["kl"] != 0 and metrics["equal_groups"] == 1
    policy = tiny_gpt(0)
    finish(loop(policy, constant, beta=0.0, **settings))  # and without the KL, nothing is learned
    assert unchanged(policy, weights(tiny_gpt(0)))


def test_the_defaults():
    """Bug: a default that differs from the one with which the figures of the README were made."""
    assert vars(GRPOConfig()) == dict(
        response_tokens=48, temperature=1.0, beta=0.2, ppo_iterations=60, ppo_batch=256, minibatch=64, ppo_epochs=2,
        ppo_lr=5e-4, critic_lr=1e-3, gamma=1.0, lam=0.95, clip=0.2, value_clip=0.2, kind="grpo", group=4, redraws=0,
        grpo_lr=5e-4)


# ---- dynamic sampling ------------------------------------------------------------------------------------------------

def test_joined_rollouts_are_the_same_rows():
    """Bug: padding on the wrong side, log-probs of another column, or a length that is forgotten."""
    parts = [generate(tiny_gpt(13), prompts, tokens, 1.0, torch.Generator().manual_seed(tokens))
             for prompts, tokens in (([[1], [2, 3]], 9), ([[4, 5, 6, 7]], 2), ([[8]], 5))]
    joined = grpo.join(parts, PAD)
    assert rows_of(joined) == [row for part in parts for row in rows_of(part)] and len({part.R for part in parts}) > 1
    assert (joined.ids[is_pad(joined)] == PAD).all() and (joined.logp[~joined.mask] == 0).all()
    assert joined.logp[joined.mask].tolist() == [x for part in parts for x in part.logp[part.mask].tolist()]
    assert joined.finished.tolist() == [x for part in parts for x in part.finished.tolist()]


def test_groups_of_equal_scores_are_drawn_again(monkeypatch):
    """
    Bug: mixed groups are drawn again and equal ones kept, no end of the tries, scores of other rows, a count of
    responses, or another number of groups in the end.

    The scores of the draws are given: of four groups three are equal at first, then one of the three new ones, then the
    last one again.
    """
    scores = [[1, 1, 0, 1, 0, 0, 1, 1], [1, 0, 0, 0, 1, 0], [0, 0], [0, 1]]
    seen = []

    def score(batch):
        seen.append(len(batch))
        return torch.tensor(scores[len(seen) - 1], dtype=torch.float64)

    learned = {}
    advantages = grpo.group_advantages
    monkeypatch.setattr(grpo, "group_advantages",
                        lambda rewards, *rest: learned.update(rewards=rewards) or advantages(rewards, *rest))
    for tries, drawn, kept, redrawn in [(0, [8], scores[0], None), (1, [8, 6], [0, 1, 1, 0, 0, 0, 1, 0], 3),
                                        (2, [8, 6, 2], [0, 1, 1, 0, 1, 0, 0, 0], 4),
                                        (9, [8, 6, 2, 2], [0, 1, 1, 0, 1, 0, 0, 1], 5)]:
        seen.clear()
        settings = dict(response_tokens=6, ppo_iterations=1, ppo_batch=8, group=2, redraws=tries)
        (metrics, _, rollout), = loop(tiny_gpt(0), score, **settings)
        assert seen == drawn and learned["rewards"].tolist() == kept
        assert metrics["equal_groups"] == 0.75 and metrics.get("redrawn") == redrawn
        asked = rollout.prompt_ids()
        assert len(rollout) == 8 and asked[0::2] == asked[1::2]
