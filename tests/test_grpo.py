"""Group advantages, means of token losses, ratios, the k3 loss and the loop, against plain loops and closed forms."""

import copy
import math
import statistics
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers import close, noise, rows_of, tiny_gpt

import grpo
from checks import CanaryError
from grpo import KINDS, MEANS, cispo_loss, equal_groups, group_advantages, gspo_loss, kl_loss, loss_mean
from model import generate, response_logprobs
from ppo import policy_loss
from reward import RewardModel

# ---- advantages ------------------------------------------------------------------------------------------------------

def slow_advantages(rewards, group, kind):
    """Plain loops over lists."""
    advantages = []
    for i, r in enumerate(rewards):
        first = i - i % group
        own_group = rewards[first:first + group]
        others = own_group[:i - first] + own_group[i - first + 1:]
        if kind == "rloo":
            advantages.append(r - statistics.mean(others))
        elif kind == "dr_grpo":
            advantages.append(r - statistics.mean(own_group))
        elif kind == "grpo":
            advantages.append((r - statistics.mean(own_group)) / statistics.stdev(own_group))
        else:
            advantages.append((r - statistics.mean(rewards)) / statistics.pstdev(rewards))
    return advantages


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [2, 3, 6])
def test_advantages_equal_plain_loops(kind, group):
    """
    Catches groups along the wrong axis, a baseline that includes the own score in RLOO, the deviation of the batch in
    the place of the group's, one with G instead of G - 1 under it, and a mean that is not subtracted.
    """
    rewards = noise(group, 12) * 3 + 1
    rewards[:group] *= 10  # the groups have deviations of their own
    close(group_advantages(rewards, group, kind), slow_advantages(rewards.tolist(), group, kind), 1e-5)


def test_rloo_by_hand():
    """The baseline of RLOO is the mean of the other two: 4, 3.5 and 1.5; of Dr. GRPO that of all three: 3."""
    rewards = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)
    close(group_advantages(rewards, 3, "rloo"), [-3.0, -1.5, 4.5])
    close(group_advantages(rewards, 3, "dr_grpo"), [-2.0, -1.0, 3.0])


@pytest.mark.parametrize("kind", ["rloo", "grpo", "dr_grpo"])
def test_another_group_does_not_matter(kind):
    """A baseline, or a deviation, that is shared by the groups."""
    rewards = noise(0, 12)
    others = rewards.clone()
    others[4:] = noise(1, 8) * 5
    assert torch.equal(group_advantages(rewards, 4, kind)[:4], group_advantages(others, 4, kind)[:4])


@pytest.mark.parametrize("kind", KINDS)
def test_equal_rewards_teach_nothing(kind):
    """0 / 0 is NaN: a group whose answers are all right ends the run."""
    close(group_advantages(torch.full((6,), 0.7, dtype=torch.float64), 3, kind), [0.0] * 6)


@pytest.mark.parametrize("rewards, group, kind", [
    (noise(0, 6), 1, "rloo"), (noise(0, 6), 1, "grpo"), (noise(0, 6), 4, "dr_grpo"), (noise(0, 6), 0, "reinforce++"),
    (noise(0, 6, 1), 2, "grpo"), (noise(0, 0), 2, "grpo"), (noise(0, 6), 5, "reinforce++")])
def test_rewards_that_are_not_groups_are_refused(rewards, group, kind):
    """A rest of a group, or rewards of another shape, get advantages that mean nothing."""
    with pytest.raises(ValueError, match=rf"groups of at least \d, got \(.*\) in groups of {group}"):
        group_advantages(rewards, group, kind)


def test_an_unknown_kind_or_mean_is_refused():
    """A misspelt kind falls through to another one."""
    with pytest.raises(ValueError, match="kind must be one of rloo, grpo, dr_grpo, reinforce"):
        group_advantages(noise(0, 6), 2, "ppo")
    with pytest.raises(ValueError, match="mean must be one of response, token, constant, got 'batch'"):
        loss_mean(noise(0, 2, 3), torch.ones(2, 3, dtype=torch.bool), "batch", 3)


def test_the_share_of_groups_with_equal_rewards():
    """The share of rows, or of groups with any two rewards equal."""
    rewards = torch.tensor([1.0, 1.0, 1.0, 2.0, 2.0, 1.0, 0.0, 0.0, 0.0, 3.0, 4.0, 5.0])
    assert equal_groups(rewards, 3).item() == 0.5
    assert equal_groups(rewards, 1).item() == 1


# ---- token losses become one number ----------------------------------------------------------------------------------

MASK = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]], dtype=torch.bool)


def test_three_means_equal_plain_loops():
    """Catches a mean over padding, the mean of the batch for that of a response, and a length left out."""
    losses = torch.where(MASK, noise(0, 3, 4), math.nan)
    rows = [row[keep].tolist() for row, keep in zip(losses, MASK)]
    close(loss_mean(losses, MASK, "response", 7), statistics.mean(statistics.mean(row) for row in rows))
    close(loss_mean(losses, MASK, "token", 7), statistics.mean(x for row in rows for x in row))
    close(loss_mean(losses, MASK, "constant", 7), sum(sum(row) / 7 for row in rows) / 3)


def test_only_a_constant_length_keeps_tokens_equal():
    """With a mean per response, a token of a response of four counts a quarter of the one of a response of one."""
    weights = {}
    for mean in MEANS:
        losses = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
        loss_mean(losses, MASK, mean, 4).backward()
        weights[mean] = losses.grad
    close(weights["response"][:, 0], [1 / 12, 1 / 3, 1 / 6])
    close(weights["token"][:, 0], [1 / 7] * 3)
    close(weights["constant"][:, 0], [1 / 12] * 3)
    assert all((gradient[~MASK] == 0).all() for gradient in weights.values())


# ---- ratios ----------------------------------------------------------------------------------------------------------

def three_rows(seed=0):
    """logp with a gradient, old_logp and one advantage a row, of both signs, spread over its tokens."""
    old = -noise(seed, 3, 4).abs()
    logp = (old + 0.3 * noise(seed + 1, 3, 4)).requires_grad_()
    return logp, old, torch.tensor([1.5, -2.0, 0.5], dtype=torch.float64)[:, None].expand(3, 4)


def test_the_upper_clip_is_its_own():
    """Catches one clip for both sides, and clip_high on the lower side (DAPO)."""
    one = torch.ones(1, 1, dtype=torch.bool)

    def loss(ratio, advantage, **clips):
        logp = torch.tensor([[math.log(ratio)]], dtype=torch.float64)
        return policy_loss(logp, torch.zeros_like(logp), torch.full_like(logp, advantage), one, **clips).item()

    close(loss(1.5, 1.0, clip=0.2, clip_high=0.28), -1.28)
    close(loss(0.5, -1.0, clip=0.2, clip_high=0.28), 0.8)
    close(loss(1.5, 1.0, clip=0.1), -1.1)
    close(loss(1.5, 1.0, clip=0.1, clip_high=0.0), -1.0)
    with pytest.raises(ValueError, match="clip must be at least 0, got -0.1"):
        loss(1.0, 1.0, clip=0.2, clip_high=-0.1)


def test_gspo_has_one_ratio_for_a_response():
    """Catches the ratio of the whole response without the root, a mean over padding, and a ratio of each token."""
    logp, old, advantages = three_rows()
    loss = gspo_loss(logp, old, advantages, MASK, 0.05, 0.1, partial(loss_mean, mean="response", length=4))
    slow = []
    for row in range(3):
        n = int(MASK[row].sum())
        s = math.exp(sum((logp - old)[row, :n].tolist()) / n)
        a = advantages[row, 0].item()
        slow.append(-min(s * a, max(0.95, min(1.1, s)) * a))
    close(loss.item(), statistics.mean(slow))
    one = torch.ones(3, 1, dtype=torch.bool)
    close(gspo_loss(logp[:, :1], old[:, :1], advantages[:, :1], one).item(),
          policy_loss(logp[:, :1], old[:, :1], advantages[:, :1], one).item())


def test_cispo_weighs_and_does_not_silence():
    """Catches a gradient through the weight, a token past the clip without a gradient, and a clip from below."""
    logp, old, advantages = three_rows()
    cispo_loss(logp, old, advantages, MASK, 0.2, 0.1).backward()
    ratio = torch.exp(logp.detach() - old)
    assert (ratio[MASK] > 1.1).any() and (ratio[MASK] < 0.8).any()
    close(logp.grad, torch.where(MASK, -ratio.clamp(max=1.1) * advantages / 7, 0.0))


# ---- the KL as a loss ------------------------------------------------------------------------------------------------

def test_the_k3_loss_has_the_value_of_a_kl_and_the_gradient_of_another():
    """
    The trap. In one state with five tokens, weighted by how often pi samples them, the k3 loss is KL(pi || ref). Its
    gradient is that of KL(ref || pi), ref's probabilities minus pi's with the sign turned; KL(pi || ref) has another.
    """
    logits, ref = noise(0, 5).requires_grad_(), torch.log_softmax(noise(1, 5), dim=0)
    logp = torch.log_softmax(logits, dim=0)
    pi = logp.exp().detach()
    one = torch.ones(5, 1, dtype=torch.bool)
    loss = kl_loss(logp[:, None], ref[:, None], one, lambda losses, mask: (pi * losses[:, 0]).sum())
    close(loss.item(), (pi * (logp - ref)).sum().item())
    gradient, = torch.autograd.grad(loss, logits, retain_graph=True)
    close(gradient, pi - ref.exp())
    right, = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), logits)
    assert torch.cosine_similarity(gradient, right, dim=0) < 0.99
    assert (gradient - right).norm() > 0.1


def test_the_k3_loss_pulls_towards_the_reference():
    """Catches the sign of the KL in the loss: a step downhill must bring policy and reference together."""
    logits, ref = noise(0, 5).requires_grad_(), torch.log_softmax(noise(1, 5), dim=0)
    logp = torch.log_softmax(logits, dim=0)
    pi = logp.exp().detach()
    one = torch.ones(5, 1, dtype=torch.bool)
    loss = kl_loss(logp[:, None], ref[:, None], one, lambda losses, mask: (pi * losses[:, 0]).sum())
    loss.backward()
    after = torch.log_softmax(logits.detach() - 0.1 * logits.grad, dim=0)
    assert (after.exp() * (after - ref)).sum() < loss.item()


# ---- the loop --------------------------------------------------------------------------------------------------------

PROMPTS = [[1, 2, 3], [4], [5, 6], [7, 8, 0, 1, 2], [3, 3]]
SETTINGS = dict(ppo_iterations=2, ppo_batch=12, minibatch=12, ppo_epochs=2, grpo_lr=1e-2, beta=0.2, clip=0.2,
                temperature=1.0, response_tokens=5, group=3, grpo_kind="rloo", grpo_kl="reward", grpo_mean="",
                grpo_ratio="token", grpo_clip_high=0.2)


def train(policy=None, reference=None, seed=0, gold_fn=None, **changes):
    """Run train_grpo on tiny networks, with changes to SETTINGS. Returns the policy and the logged rows."""
    policy = policy or tiny_gpt(0)
    reference = reference or copy.deepcopy(policy)
    torch.manual_seed(7)
    reward_model = RewardModel(tiny_gpt(7)).double()
    rows = []
    grpo.train_grpo(policy, reference, reward_model, PROMPTS, SimpleNamespace(**{**SETTINGS, **changes}), seed,
                    log=lambda **row: rows.append(row), gold_fn=gold_fn)
    return policy, rows


def test_a_group_answers_one_prompt(monkeypatch):
    """Catches responses to one prompt that are not side by side, so that answers to other prompts are the baseline."""
    seen = []

    def spy(policy, prompts, *rest):
        seen.append(prompts)
        return generate(policy, prompts, *rest)

    monkeypatch.setattr(grpo, "generate", spy)
    train(ppo_iterations=6)
    for prompts in seen:
        assert len(prompts) == 12 and all(prompts[i] == prompts[i - i % 3] for i in range(12))
    assert len({tuple(prompts[0]) for prompts in seen}) > 2


def slow_step(model, adam, lr, loss):
    """One step with the gradient clipped to length 1. Returns the length before."""
    adam.param_groups[0]["lr"] = lr
    adam.zero_grad()
    loss.backward()
    norm = math.sqrt(sum((p.grad ** 2).sum().item() for p in model.parameters()))
    for p in model.parameters():
        p.grad /= max(1.0, norm)
    adam.step()
    return norm


@pytest.mark.parametrize("kind, kl_place, mean", [
    ("rloo", "reward", "constant"), ("grpo", "loss", "response"), ("reinforce++", "reward", "token")])
def test_the_loop_equals_a_slow_replay(kind, kl_place, mean, monkeypatch):
    """
    Catches advantages of other rows (P44), a setting that is not passed on, a KL that is paid twice, not at all or with
    the other sign, a mean that is not the kind's, gradients that add up or are not clipped, a rate that does not fall.

    Only the rollouts and the order of the rows are recorded. All the rest is computed again, with plain loops.
    """
    beta, temperature, lr = 0.3, 0.8, 0.03
    rollouts, orders = [], []

    def recorded_generate(*arguments):
        rollouts.append(generate(*arguments))
        return rollouts[-1]

    def recorded_minibatches(n, size, epochs, generator):
        assert (n, size, epochs) == (12, 8, 2)
        orders.append([rows for _ in range(epochs) for rows in torch.randperm(n, generator=generator).split(8)])
        return orders[-1]

    monkeypatch.setattr(grpo, "generate", recorded_generate)
    monkeypatch.setattr(grpo, "minibatches", recorded_minibatches)
    policy, rows = train(minibatch=8, grpo_kind=kind, grpo_kl=kl_place, beta=beta, temperature=temperature, grpo_lr=lr,
                         clip=0.1, grpo_clip_high=0.15)
    torch.manual_seed(7)
    reward_model = RewardModel(tiny_gpt(7)).double()
    slow_policy, reference = tiny_gpt(0), tiny_gpt(0)
    adam = torch.optim.AdamW(slow_policy.parameters(), betas=(0.9, 0.99), eps=1e-5, weight_decay=0.0)
    for iteration, (rollout, order, row) in enumerate(zip(rollouts, orders, rows, strict=True)):
        lengths = rollout.response_lens.tolist()
        with torch.no_grad():
            old = response_logprobs(slow_policy, rollout, temperature)
            ref = response_logprobs(reference, rollout, temperature)
            scores = reward_model(rollout).double()
        close(old, rollout.logp, 1e-4)
        paid = [(old - ref)[i, :n].sum().item() for i, n in enumerate(lengths)]
        rewards = [score - (beta * k if kl_place == "reward" else 0.0) for score, k in zip(scores.tolist(), paid)]
        advantages = slow_advantages(rewards, 3, kind)
        losses, norms = [], []
        for picks in order:
            logp = response_logprobs(slow_policy, rollout.select(picks), temperature)
            per_response, tokens = [], 0
            for place, i in enumerate(picks.tolist()):
                total = 0.0
                for t in range(lengths[i]):
                    ratio = torch.exp(logp[place, t] - old[i, t])
                    total = total - torch.min(ratio * advantages[i], ratio.clamp(0.9, 1.15) * advantages[i])
                    if kl_place == "loss":
                        x = ref[i, t] - logp[place, t]
                        total = total + beta * (torch.exp(x) - 1 - x)
                per_response.append(total / dict(constant=5, response=lengths[i], token=1)[mean])
                tokens += lengths[i]
            loss = sum(per_response) / (tokens if mean == "token" else len(picks))
            losses.append(loss.item())
            norms.append(slow_step(slow_policy, adam, lr * (2 - iteration) / 2, loss))
        close(row["loss"], statistics.mean(losses), 1e-5)
        close(row["grad_norm"], statistics.mean(norms), 1e-4)
        close(row["kl"], statistics.mean(paid), 1e-5)
        close(row["score"], scores.mean().item(), 1e-5)
        close(row["objective"], scores.mean().item() - beta * statistics.mean(paid), 1e-5)
        assert row["step"] == iteration and row["equal_groups"] == 0
    for mine, theirs in zip(policy.parameters(), slow_policy.parameters()):
        close(mine, theirs, 1e-3)  # scores are float32, and Adam divides small gradients by their size


def test_the_first_loss_is_0_and_its_gradient_is_not():
    """The most frequent question about GRPO. With one minibatch, every ratio is 1 and advantages add up to 0."""
    for kind in ("rloo", "grpo", "dr_grpo", "reinforce++"):
        _, (row,) = train(ppo_iterations=1, ppo_epochs=1, grpo_kind=kind, grpo_mean="response")
        assert abs(row["loss"]) < 1e-6 and row["grad_norm"] > 1e-3
        assert row["kl_at_start"] == 0 and row["ratio_error"] < 1e-5


@pytest.mark.parametrize("ratio", grpo.RATIOS)
def test_a_ratio_is_the_one_that_was_asked_for(ratio, monkeypatch):
    """All ratios are PPO's."""
    seen = []

    def spy(*arguments):
        seen.append(arguments[4:6])
        return original(*arguments)

    original = grpo.RATIOS[ratio]
    monkeypatch.setitem(grpo.RATIOS, ratio, spy)
    train(grpo_ratio=ratio, ppo_iterations=1, clip=0.1, grpo_clip_high=0.3)
    assert seen == [(0.1, 0.3)] * 2


def test_gold_is_logged_with_the_prompts_of_all_rows():
    """gold_fn gets a prompt for each group, and not for each response."""
    asked = []

    def gold_fn(prompts, rollout):
        asked.append([prompt for prompt, _ in rows_of(rollout)] == prompts)
        return rollout.response_lens.double()

    _, rows = train(gold_fn=gold_fn)
    assert asked == [True, True] and all(row["gold"] == pytest.approx(row["length"]) for row in rows)


def test_the_canaries_watch_grpo_too():
    """A reference that learns along, or is another network, goes unnoticed."""
    policy = tiny_gpt(0)
    with pytest.raises(ValueError, match="same object"):
        train(policy, policy)
    with pytest.raises(CanaryError, match="before the first update"):
        train(policy, tiny_gpt(1))


@pytest.mark.parametrize("kind", ["rloo", *[pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:]]])
def test_the_score_rises(kind):
    """A sign is wrong somewhere: the policy moves away from what is rewarded."""
    _, rows = train(ppo_iterations=12, ppo_batch=48, minibatch=24, grpo_lr=0.02, beta=0.02, grpo_kind=kind)
    first, last = rows[0]["score"], statistics.mean(row["score"] for row in rows[-3:])
    assert last > first + 0.1
