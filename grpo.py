"""
GRPO and its relatives. The rollout, the rewards, the ratio and the clip are those of ppo.py. There is no critic.

Gone: the critic, its loss, and GAE, which gives every token an advantage of its own.
New: a group of G responses to each prompt. A response is compared with the others of its group.
Its advantage is one number, the same at each of its tokens: the whole response is one action, as in a bandit.
So a rollout of B responses has B / G prompts, and a group whose rewards are all equal teaches nothing (but for
reinforce++, which compares the whole rollout).
Two more choices: how the token losses are averaged, and whether the KL is in the reward or in the loss.

The loss says nothing about progress: look at score, KL and objective. At the first update every ratio is 1. With a mean
per response the advantages of a group then add up to a loss of 0, whose gradient is not 0.

Left out: DAPO's resampling of groups with equal rewards, and REINFORCE++'s variant with a group mean.

Letters: G group, B responses of a rollout (groups are adjacent rows), b rows of a minibatch, R response columns.
"""

import time
from functools import partial

import torch
import torch.nn as nn

from checks import check_first_ratio, check_kl, check_padding, check_start_kl, check_trains, finite
from data import minibatches
from model import generate, response_logprobs
from pipeline.progress import ProgressBar
from ppo import (
    exact_kl,
    kl_estimates,
    masked_mean,
    policy_loss,
    rollout_metrics,
    token_rewards,
    update_metrics,
    whiten,
)

MEAN_OF_KIND = {"rloo": "constant", "grpo": "response", "dr_grpo": "constant", "reinforce++": "token"}
KINDS = tuple(MEAN_OF_KIND)
MEANS = ("response", "token", "constant")

# ---- the maths ------------------------------------------------------------------------------------

def group_advantages(rewards, group, kind):
    """
    The advantage of each response, (B,), from one reward each (B,). Rows of a group of G are adjacent.

        rloo         r - mean of the G - 1 others      unbiased                      Ahmadian et al. 2024, 2402.14740
        dr_grpo      r - mean of the G                 (G - 1) / G of rloo           Liu et al. 2025, 2503.20783
        grpo         (r - mean of the G) / deviation   easy and hard prompts count   Shao et al. 2024, 2402.03300
                                                       more than others
        reinforce++  (r - mean of B) / deviation of B  knows no groups, G may be 1   Hu et al. 2025, 2501.03262

    grpo divides by the sample deviation (G - 1), as TRL, verl and the code of Dr. GRPO do. The GRPO paper does not say.
    That of reinforce++ is the population deviation, over responses here and over all tokens in its paper. Equal rewards
    give zeros.
    Raises ValueError for an unknown kind, rewards that are not (B,) with B a multiple of G, or G below 2.
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
    centred = grouped - grouped.mean(dim=1, keepdim=True)
    if kind == "rloo":
        others = (grouped.sum(dim=1, keepdim=True) - grouped) / (group - 1)                   # the mean without its own
        return (grouped - others).flatten()
    if kind == "grpo":
        centred = centred / (grouped.std(dim=1, keepdim=True) + 1e-6)
    return centred.flatten()


def equal_groups(scores, group):
    """The share of groups whose scores (B,) are all equal, a scalar: the score teaches nothing there. 1 for G = 1."""
    grouped = scores.view(-1, group)                                                          # (B / G, G)
    return (grouped.amax(dim=1) == grouped.amin(dim=1)).float().mean()


def loss_mean(losses, mask, mean, length):
    """
    Token losses (B, R) become one number:

        response   the mean over a response, then over responses                     GRPO, equation 3
        token      the mean over all tokens: long responses count more               DAPO, equation 8 (2503.14476)
        constant   the sum over tokens / length, then the mean over responses        Dr. GRPO; length is the cap

    With `response`, a token of a long response counts less. So a long bad response is punished less per token than a
    short one, and responses grow. Only `constant` leaves the gradient of  sum_t log pi(a_t|s_t)  as it is, up to scale.
    Raises ValueError for an unknown mean.
    """
    if mean not in MEANS:
        raise ValueError(f"mean must be one of {', '.join(MEANS)}, got {mean!r}")
    if mean == "token":
        return masked_mean(losses, mask)
    per_response = torch.where(mask, losses, 0.0).sum(dim=1)                                  # (B,)
    lengths = mask.sum(dim=1).clamp(min=1) if mean == "response" else length
    return (per_response / lengths).mean()


def gspo_loss(logp, old_logp, advantages, mask, clip=0.2, clip_high=None, mean=masked_mean):
    """
    `policy_loss` with one ratio for a whole response, the geometric mean of its tokens' ratios (Zheng et al. 2025,
    GSPO, 2507.18071, equation 7). Sensible clips are far smaller: 3e-4 and 4e-4 in the paper.
    """
    log_ratio = torch.where(mask, logp - old_logp, 0.0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)    # (B,)
    log_ratio = log_ratio[:, None].expand(mask.shape)                                         # (B, R)
    return policy_loss(log_ratio, torch.zeros_like(log_ratio), advantages, mask, clip, clip_high, mean)


def cispo_loss(logp, old_logp, advantages, mask, clip=0.2, clip_high=None, mean=masked_mean):
    """
    -A log pi, weighted with the ratio, which is clipped from above and has no gradient (MiniMax-M1, 2506.13585, eq. 4):
    a token past the clip has less weight, but keeps a gradient. There is no lower clip, as in the paper's runs.
    """
    high = 1 + (clip if clip_high is None else clip_high)
    logp = torch.where(mask, logp, 0.0)
    weight = torch.exp(torch.where(mask, logp - old_logp, 0.0)).clamp(max=high).detach()      # (B, R)
    return mean(-weight * advantages * logp, mask)


RATIOS = {"token": policy_loss, "gspo": gspo_loss, "cispo": cispo_loss}


def kl_loss(logp, ref_logp, mask, mean=masked_mean):
    """
    The KL penalty as a loss: k3 of the current policy, at the sampled tokens (GRPO, equation 4). A scalar, nats.

    A trap (Tang and Munos 2025, 2506.09477): its value estimates KL(pi || ref), its gradient does not. The tokens are
    fixed, so the gradient misses how pi chooses them. In a state, for tokens of pi,

        E[grad k3] = E[(1 - ref/pi) grad log pi] = -sum_a ref(a) grad log pi(a) = grad KL(ref || pi)

    the gradient of the KL in the other direction; and what a token does to later states is ignored. k1 as a loss would
    be worse: its gradient, E[grad log pi], is 0. Close to the reference the two KLs agree. See estimators.py.
    """
    return mean(kl_estimates(logp, ref_logp)["k3"], mask)


# ---- the loop -------------------------------------------------------------------------------------

def train_grpo(policy, reference, reward_model, prompts, config, seed, log=lambda **row: None, gold_fn=None,
               progress=ProgressBar, watch=lambda iterations, policy: None):
    """
    Train a policy, in place, to maximise score - beta KL(policy || reference), without a critic.

    The arguments are those of train_ppo, and so is what is raised; config.ppo_batch is a multiple of config.group.
    """
    if policy is reference:
        raise ValueError("policy and reference are the same object, so the KL would stay 0: pass a frozen copy")
    device = policy.wte.weight.device
    shuffle = torch.Generator().manual_seed(seed)        # which prompts, which minibatches
    sampler = torch.Generator(device).manual_seed(seed)  # which tokens
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.grpo_lr, betas=(0.9, 0.99), eps=1e-5,
                                  weight_decay=0.0, fused=True)
    surrogate = RATIOS[config.grpo_ratio]
    mean = partial(loss_mean, mean=config.grpo_mean or MEAN_OF_KIND[config.grpo_kind], length=config.response_tokens)
    check_trains("policy", policy, optimizer, config.grpo_lr)
    bar = progress(config.ppo_iterations, "grpo", "it", dict(policy=policy, optimizer=optimizer, shuffle=shuffle,
                                                             sampler=sampler))
    watch(bar.start, policy)
    for iteration in bar:
        started = time.perf_counter()

        # 1. rollout: the policy answers fewer prompts than in PPO, each of them G times
        picks = torch.randint(len(prompts), (config.ppo_batch // config.group,), generator=shuffle)   # (B / G,)
        picked = [prompts[i] for i in picks.tolist() for _ in range(config.group)]            # a group is side by side
        rollout = generate(policy, picked, config.response_tokens, config.temperature, sampler)
        mask = rollout.mask                                                                   # (B, R)

        # 2. rewards, one per response: score - beta log pi/ref, or the score alone if the KL is in the loss
        with torch.no_grad():
            scores = reward_model(rollout)                                                    # (B,)
            ref_logp = response_logprobs(reference, rollout, config.temperature)              # (B, R)
        beta = config.beta if config.grpo_kl == "reward" else 0.0
        rewards = token_rewards(scores, rollout.logp, ref_logp, mask, beta).sum(dim=1)        # (B,)

        # 3. advantages: the reward beside those of its group
        advantages = group_advantages(rewards, config.group, config.grpo_kind)                # (B,)
        advantages = advantages[:, None].expand(mask.shape)                                   # (B, R)
        metrics = rollout_metrics(rollout, scores, ref_logp, config.beta)
        check_kl(metrics["kl"], metrics["length"])
        metrics["equal_groups"] = equal_groups(scores, config.group).item()
        if iteration == 0:
            metrics["kl_at_start"] = check_start_kl(exact_kl(policy, reference, rollout, config.temperature))
            check_padding(lambda batch: response_logprobs(policy, batch, config.temperature), rollout)

        # 4. update: a few epochs of minibatches of the same rollout; the learning rate falls linearly towards 0
        optimizer.param_groups[0]["lr"] = config.grpo_lr * (1 - iteration / config.ppo_iterations)
        updates = []
        for rows in minibatches(config.ppo_batch, config.minibatch, config.ppo_epochs, shuffle):
            rows = rows.to(device, non_blocking=True)                                         # (b,)
            batch = rollout.select(rows)
            logp = response_logprobs(policy, batch, config.temperature)                       # (b, R)
            loss = surrogate(logp, batch.logp, advantages[rows], batch.mask, config.clip, config.grpo_clip_high, mean)
            if config.grpo_kl == "loss":
                loss = loss + config.beta * kl_loss(logp, ref_logp[rows], batch.mask, mean)
            finite(loss, "GRPO", "lower --grpo-lr")
            if not updates:
                metrics["ratio_error"] = check_first_ratio(logp - batch.logp)
            optimizer.zero_grad()
            loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            updates.append(update_metrics([loss, grad_norm], logp, batch, config.clip))

        # 5. log
        names = ("loss", "grad_norm", "clip_fraction", "approx_kl")
        metrics.update(zip(names, torch.stack(updates).mean(dim=0).tolist()))
        if gold_fn is not None:
            metrics["gold"] = gold_fn(picked, rollout).mean().item()
        log(step=iteration, **metrics, seconds=time.perf_counter() - started)
        watch(iteration + 1, policy)
        shown = [name for name in ("score", "gold", "kl", "length") if name in metrics]
        bar.set_postfix({name: f"{metrics[name]:.2f}" for name in shown})
