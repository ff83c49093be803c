"""
GRPO: PPO without a critic. It has the rollout, the ratio and the clip of ppo.py.

Gone: the critic, its loss, and GAE, which gives every token its own advantage.
New: a group of G responses to each prompt. A response is compared with the others of its group.
Its advantage is one number, the same at each of its tokens: the whole response is one action, as in a bandit.
So a rollout of B responses has B / G prompts, and a group whose rewards are all equal teaches nothing. If a score is
0 or 1, many groups are like that: `redraws` draws them again.

GRPO as published (Shao et al. 2024, arXiv:2402.03300) makes three more choices, and each relative changes some of them:

                 advantage                     mean of the token losses       KL
    grpo         (r - mean of G) / deviation   per response, then over them   k3 in the loss
    dr_grpo      r - mean of G                 sum / cap                      k3 in the loss
    rloo         r - mean of the G - 1 others  sum / cap                      in the reward, as in PPO
    reinforce++  whitened over the rollout     over all tokens                in the reward, as in PPO

The loss says nothing about progress: look at score, KL and objective. At the first update every ratio is 1, and the
advantages of a group add up to 0, so GRPO's loss is 0 there. Its gradient is not 0.

Left out: DAPO's upper clip and length penalty, and REINFORCE++'s variant with a group mean.

Letters: G group, B responses of a rollout (groups are adjacent rows), b rows of a minibatch, R response columns.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from checks import check_first_ratio, check_kl, check_scores, check_trains, finite, load_parts
from data import minibatches
from model import Rollout, generate, response_logprobs
from ppo import (
    PPOConfig,
    check_start,
    clipped_surrogate,
    kl_estimates,
    masked_mean,
    mean_metrics,
    rollout_metrics,
    token_rewards,
    update_metrics,
    whiten,
)

KINDS = ("grpo", "dr_grpo", "rloo", "reinforce++")
KL_IN_LOSS = ("grpo", "dr_grpo")


@dataclass
class GRPOConfig(PPOConfig):
    kind: str = "grpo"     # grpo, dr_grpo, rloo or reinforce++
    group: int = 4         # responses to each prompt
    grpo_lr: float = 5e-4  # learning rate of the policy of GRPO and its relatives; 2e-4 with --data
    redraws: int = 0       # most times that groups of equal scores are drawn again (DAPO)


# ---- the maths ------------------------------------------------------------------------------------

def group_advantages(rewards, group, kind):
    """
    The advantage of each response, (B,), from one reward each (B,). Rows of a group of G are adjacent.

        grpo         (r - mean of the G) / deviation   easy and hard prompts count   Shao et al. 2024, 2402.03300
                                                       more than others
        dr_grpo      r - mean of the G                 (G - 1) / G of rloo           Liu et al. 2025, 2503.20783
        rloo         r - mean of the G - 1 others      unbiased                      Ahmadian et al. 2024, 2402.14740
        reinforce++  (r - mean of B) / deviation of B  knows no groups               Hu et al. 2025, 2501.03262

    grpo divides by the sample deviation (G - 1), as TRL, verl and the code of Dr. GRPO do; its paper does not say.
    reinforce++ divides by the population deviation over responses; its paper takes it over all tokens.
    Equal rewards give exactly 0. Raises ValueError for an unknown kind, for rewards that are not (B,) with B a multiple
    of G, and for G below 2 (reinforce++ takes G = 1).
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    least = 1 if kind == "reinforce++" else 2
    if rewards.dim() != 1 or group < least or len(rewards) == 0 or len(rewards) % group:
        raise ValueError(f"{kind} needs rewards (B,) in groups of at least {least}, "
                         f"got {tuple(rewards.shape)} in groups of {group}")
    if kind == "reinforce++":
        return whiten(rewards, torch.ones_like(rewards, dtype=torch.bool))
    grouped = rewards.view(-1, group)                                                         # (B / G, G)
    advantages = grouped - grouped.mean(dim=1, keepdim=True)
    if kind == "rloo":
        others = (grouped.sum(dim=1, keepdim=True) - grouped) / (group - 1)                   # the mean without its own
        advantages = grouped - others
    if kind == "grpo":
        advantages = advantages / (grouped.std(dim=1, keepdim=True) + 1e-6)
    # equal rewards differ from their mean by rounding, and grpo would divide that by next to nothing
    return torch.where(is_equal(rewards, group)[:, None], 0.0, advantages).flatten()


def is_equal(scores, group):
    """(B / G,), True for groups whose scores (B,) are all equal: the score teaches nothing there. All for G = 1."""
    grouped = scores.view(-1, group)                                                          # (B / G, G)
    return grouped.amax(dim=1) == grouped.amin(dim=1)


def loss_mean(losses, mask, kind, cap):
    """
    Token losses (B, R) become one number. cap: the most tokens that a response can have.

        grpo           the mean over a response, then over responses          Shao et al. 2024, equation 3
        dr_grpo, rloo  the sum over tokens / cap, then over responses         Liu et al. 2025
        reinforce++    the mean over all tokens                               as PPO; DAPO, equation 8 (2503.14476)

    grpo weighs a token by 1 / length of its response. So a long bad response is punished less per token than a short
    one, and responses grow. The other two weigh all tokens of a batch alike, as the gradient of sum_t log pi(a_t|s_t)
    does. They differ in scale: the number of all tokens changes from batch to batch, the cap does not.
    """
    if kind == "reinforce++":
        return masked_mean(losses, mask)
    lengths = mask.sum(dim=1).clamp(min=1) if kind == "grpo" else cap                         # (B,) or a number
    return (torch.where(mask, losses, 0.0).sum(dim=1) / lengths).mean()


def kl_loss(logp, ref_logp):
    """
    The KL penalty of each token as a loss: k3 of the current policy (GRPO, equation 4). (B, R), nats.

    A trap (Tang and Munos 2025, 2506.09477): its value estimates KL(pi || ref), its gradient does not. The tokens are
    fixed, so the gradient misses how pi chooses them. In a state, for tokens of pi,

        E[grad k3] = E[(1 - ref/pi) grad log pi] = -sum_a ref(a) grad log pi(a) = grad KL(ref || pi)

    the gradient of the KL in the other direction; and what a token does to later states is ignored. k1 as a loss would
    be worse: its gradient, E[grad log pi], is 0. Close to the reference the two KLs agree. See estimators.py.
    """
    return kl_estimates(logp, ref_logp)["k3"]


# ---- the loop -------------------------------------------------------------------------------------

def draw_groups(policy, reward_model, prompts, n, config, shuffle, sampler):
    """Draw n prompts, and answer each of them G times: a Rollout of n G rows, and their scores (n G,)."""
    picks = torch.randint(len(prompts), (n,), generator=shuffle)                              # (n,)
    picked = [prompts[i] for i in picks.tolist() for _ in range(config.group)]                # a group: adjacent rows
    rollout = generate(policy, picked, config.response_tokens, config.temperature, sampler)
    with torch.no_grad():
        scores = reward_model(rollout)                                                        # (n G,)
    check_scores(scores, len(rollout))
    return rollout, scores


def join(rollouts, pad):
    """The rows of several Rollouts, below each other. Columns of padding make their widths equal."""
    P, R = max(rollout.P for rollout in rollouts), max(rollout.R for rollout in rollouts)
    ids = [F.pad(rollout.ids, (P - rollout.P, R - rollout.R), value=pad) for rollout in rollouts]
    logp = [F.pad(rollout.logp, (0, R - rollout.R)) for rollout in rollouts]
    prompt_lens, response_lens, finished = (torch.cat([getattr(rollout, name) for rollout in rollouts])
                                            for name in ("prompt_lens", "response_lens", "finished"))
    return Rollout(torch.cat(ids), prompt_lens, response_lens, P, torch.cat(logp), finished)


def train_grpo(policy, reference, reward_model, prompts, config, seed, checkpoint=None):
    """
    Train a policy, in place, to maximise score - beta KL(policy || reference), without a critic.

    Arguments, yields and errors are like train_ppo's. config: a GRPOConfig, whose ppo_batch is a multiple of its group.
    """
    if policy is reference:
        raise ValueError("policy and reference are the same object, so the KL would stay 0: pass a frozen copy")
    kind, cap = config.kind, config.response_tokens
    kl_in_loss = kind in KL_IN_LOSS  # never in both places: the penalty would be paid twice
    compared = config.ppo_batch if kind == "reinforce++" else config.group  # rows whose rewards make one mean
    shuffle = torch.Generator().manual_seed(seed)               # which prompts, which minibatches
    sampler = torch.Generator(policy.device).manual_seed(seed)  # which tokens
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.grpo_lr, betas=(0.9, 0.99), eps=1e-5,
                                  weight_decay=0.0, fused=True)
    check_trains("policy", policy, config.grpo_lr)
    parts = dict(policy=policy, optimizer=optimizer, shuffle=shuffle, sampler=sampler)
    for iteration in range(load_parts(parts, checkpoint), config.ppo_iterations):
        # 1. rollout: the policy answers fewer prompts than in PPO, each of them G times
        n = config.ppo_batch // config.group  # B / G
        rollout, scores = draw_groups(policy, reward_model, prompts, n, config, shuffle, sampler)     # (B,)
        # from the scores: with the KL in the reward no two rewards are ever equal
        metrics = dict(step=iteration, equal_groups=is_equal(scores, compared).float().mean().item())
        # dynamic sampling (DAPO, section 3.2): other prompts take the place of groups that teach nothing. The policy is
        # then trained on the prompts that it sometimes passes, and the metrics below are theirs
        redrawn = 0
        for _ in range(config.redraws):
            equal = is_equal(scores, config.group)                                            # (B / G,)
            n = int(equal.sum())
            if n == 0:
                break
            redrawn += n
            again, again_scores = draw_groups(policy, reward_model, prompts, n, config, shuffle, sampler)
            mixed = ~equal.repeat_interleave(config.group)                                    # (B,)
            rollout = join([rollout.select(mixed), again], policy.pad)
            scores = torch.cat([scores[mixed], again_scores])                                 # (B,)
        mask = rollout.mask                                                                   # (B, R)

        # 2. one reward for each response: the score, or score - beta log pi/ref if the loss does not hold the KL
        with torch.no_grad():
            ref_logp = response_logprobs(reference, rollout, config.temperature)              # (B, R)
        beta = 0.0 if kl_in_loss else config.beta
        rewards = token_rewards(scores, rollout.logp, ref_logp, mask, beta).sum(dim=1)        # (B,)

        # 3. advantages: each reward compared with its group, the same at all tokens of a response
        advantages = group_advantages(rewards, config.group, kind)                            # (B,)
        # without a critic nobody knows which token did it, so each has the advantage of the whole response
        advantages = advantages[:, None].expand(mask.shape)                                   # (B, R)
        metrics.update(rollout_metrics(rollout, scores, ref_logp, config.beta))
        if config.redraws:
            metrics["redrawn"] = redrawn
        check_kl(metrics["kl"], metrics["length"])
        if iteration == 0:
            metrics["kl_at_start"] = check_start(policy, reference, rollout, config.temperature)

        # 4. update: a few epochs of minibatches of the same rollout; the learning rate falls linearly towards 0
        optimizer.param_groups[0]["lr"] = config.grpo_lr * (1 - iteration / config.ppo_iterations)
        updates = []
        for rows in minibatches(config.ppo_batch, config.minibatch, config.ppo_epochs, shuffle):
            # rows are in random order, so a minibatch splits groups: the advantages know their groups already
            rows = rows.to(policy.device)                                                     # (b,)
            batch = rollout.select(rows)
            logp = response_logprobs(policy, batch, config.temperature)                       # (b, R)
            losses = clipped_surrogate(logp, batch.logp, advantages[rows], batch.mask, config.clip)   # (b, R)
            if kl_in_loss:
                losses = losses + config.beta * kl_loss(logp, ref_logp[rows])
            loss = loss_mean(losses, batch.mask, kind, cap)
            finite(loss, "GRPO", "lower --grpo-lr")
            if not updates:  # nothing is updated yet, so the policy is the one that sampled
                metrics["ratio_error"] = check_first_ratio(logp - batch.logp)
            optimizer.zero_grad()
            loss.backward()
            # logged, because the loss is near 0 however much is learned
            grad_norm = nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            updates.append(dict(loss=loss.item(), grad_norm=grad_norm.item(),
                                **update_metrics(logp, batch, config.clip)))

        # 5. the caller logs, saves, and stops
        metrics.update(mean_metrics(updates))
        yield metrics, parts, rollout
