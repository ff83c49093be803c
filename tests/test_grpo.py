"""Tests of grpo.py: the loop against a slow replay, and groups that are drawn again."""

import statistics

import pytest
import slow
import torch
from helpers import PAD, PROMPTS, E, is_pad, rng, rows_of, tiny_gpt, tiny_reward_model

import grpo
from grpo import KINDS, GRPOConfig, group_advantages


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


def test_equal_rewards_teach_exactly_nothing():
    """Bug: a mean's rounding, divided by a deviation that is rounding too; NaN for a response without tokens."""
    advantages = group_advantages(torch.tensor([1000.1] * 3 + [1.0, 2.0, 3.0]), 3, "grpo")
    assert (advantages[:3] == 0).all() and (advantages[3:] != 0).any()  # the other group still learns
    assert grpo.loss_mean(torch.ones(2, 3), torch.arange(3) < torch.tensor([[3], [0]]), "grpo", cap=9) == 0.5


def paper_loss(kind, logp, old, ref, advantages, beta, clip, cap):
    """
    The loss of a minibatch as the papers write it: 1/G sum_i 1/|o_i| sum_t (clipped surrogate - beta k3), negated.

    logp, old and ref have a (|o_i|,) for each response. |o_i| is the cap but for grpo; reinforce++ has one mean.
    """
    total, tokens = 0.0, 0
    for i, x in enumerate(logp):
        ratio = torch.exp(x - old[i])                                                         # (|o_i|,)
        objective = torch.min(ratio * advantages[i], ratio.clamp(1 - clip, 1 + clip) * advantages[i])
        if kind in ("grpo", "dr_grpo"):
            objective = objective - beta * (torch.exp(ref[i] - x) - (ref[i] - x) - 1)
        total = total + objective.sum() / {"grpo": len(x), "reinforce++": 1}.get(kind, cap)
        tokens += len(x)
    return -total / (tokens if kind == "reinforce++" else len(logp))


@pytest.mark.parametrize("kind", KINDS)
def test_the_loop_equals_a_slow_replay(kind):
    """
    Bug: advantages of other rows, groups that mix prompts, another setting, a KL that is paid twice or not at all, the
    widest response for the cap, another kind's mean, gradients that add up, equal groups of rewards, a wrong metric.
    """
    beta, temperature, cap = 0.3, 0.8, 17
    config = GRPOConfig(kind=kind, ppo_iterations=2, ppo_batch=9, minibatch=5, group=3, grpo_lr=0.03, clip=0.1,
                        beta=beta, temperature=temperature, response_tokens=cap)
    reward_model = tiny_reward_model(7)

    def score(rollout):
        """Rounded, so that some groups have equal scores. The model could be trained: it must not be."""
        return (4 * slow.scores(reward_model, rows_of(rollout))).round()

    policy, slow_policy, reference = [tiny_gpt(13) for _ in range(3)]  # a network of short responses
    adam = torch.optim.AdamW(slow_policy.parameters(), betas=(0.9, 0.99), eps=1e-5, weight_decay=0.0)
    shuffle, sampler, norms, shares, widths = rng(4), rng(4), [], [], []
    loop = grpo.train_grpo(policy, tiny_gpt(13), score, PROMPTS, config, seed=4)
    for iteration, (metrics, _, rollout) in enumerate(loop):
        prompts = [PROMPTS[i] for i in torch.randint(5, (3,), generator=shuffle) for _ in range(3)]
        texts, old, ref = slow.sample(rollout, slow_policy, reference, prompts, config, sampler)
        scores = score(rollout)
        in_reward = beta if kind in ("rloo", "reinforce++") else 0.0
        rewards = [r - in_reward * (a - b).sum().item() for r, a, b in zip(scores.tolist(), old, ref)]
        advantages = slow_advantages(rewards, 3, kind)
        updates = []
        for rows in slow.orders(9, 2, shuffle):
            logp = [slow.logprobs(slow_policy, *texts[i], temperature) for i in rows]
            loss = paper_loss(kind, logp, [old[i] for i in rows], [ref[i] for i in rows],
                              [advantages[i] for i in rows], beta, 0.1, cap)
            norms.append(slow.step(slow_policy, adam, 0.03 * (2 - iteration) / 2, loss))
            updates.append(dict(loss=loss.item(), grad_norm=norms[-1],
                                **slow.update_metrics(torch.cat(logp), torch.cat([old[i] for i in rows]), 0.1)))
        groups = scores.split(9 if kind == "reinforce++" else 3)  # reinforce++ compares with all answers
        shares.append(sum(len(set(group.tolist())) == 1 for group in groups) / len(groups))
        widths.append(rollout.R)
        expected = dict(equal_groups=shares[-1], **slow.metrics(texts, scores, old, ref, beta, updates))
        slow.same_metrics(metrics, expected, iteration)
        slow.same_weights(policy, slow_policy, 1e-5)
    assert iteration == 1 and min(widths) < cap and (max(shares) > 0) == (kind != "reinforce++")
    assert max(norms) > 1 or kind in ("rloo", "dr_grpo")


def test_groups_of_equal_scores_are_drawn_again(monkeypatch):
    """Bug: mixed groups are drawn again, no end of tries, scores, log-probs or pads of other rows, a wrong count."""
    scores = [[1, 1, 0, 1, 0, 0, 1, 1], [1, 0, 0, 0, 1, 0], [0, 0], [0, 1]]  # of each draw; in the first, 3 are equal
    seen = []

    def score(batch):
        seen.append(rows_of(batch))
        return torch.tensor(scores[len(seen) - 1], dtype=torch.float64)

    learned = {}
    advantages = grpo.group_advantages
    monkeypatch.setattr(grpo, "group_advantages",
                        lambda rewards, *rest: learned.update(rewards=rewards) or advantages(rewards, *rest))
    for tries, drawn, kept, redrawn in [(0, [8], scores[0], None), (1, [8, 6], [0, 1, 1, 0, 0, 0, 1, 0], 3),
                                        (9, [8, 6, 2, 2], [0, 1, 1, 0, 1, 0, 0, 1], 5)]:
        seen.clear()
        config = GRPOConfig(response_tokens=9, ppo_iterations=1, ppo_batch=8, group=2, redraws=tries)
        (metrics, _, rollout), = grpo.train_grpo(tiny_gpt(13), tiny_gpt(13), score, PROMPTS, config, seed=7)
        assert [len(rows) for rows in seen] == drawn and learned["rewards"].tolist() == kept
        assert metrics["equal_groups"] == 0.75 and metrics.get("redrawn") == redrawn
        assert rows_of(rollout)[:2] == (seen[0][2:4] if tries else seen[0][:2])  # the group that was mixed at once
        asked = rollout.prompt_ids()
        assert len(rollout) == 8 and asked[0::2] == asked[1::2] and all(prompt in PROMPTS for prompt in asked)
        assert rollout.finished.tolist() == [response[-1] == E for response in rollout.response_ids()]
        assert (rollout.ids[is_pad(rollout)] == PAD).all()
    loop = grpo.train_grpo(tiny_gpt(0), tiny_gpt(0), lambda batch: torch.arange(8.0), PROMPTS, config, seed=0)
    assert next(loop)[0]["redrawn"] == 0  # it is a metric of every iteration
