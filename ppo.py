"""
PPO for language models, written out: rollout -> rewards -> advantages -> clipped losses -> update.

A response is an episode, a token is an action, the text so far is the state. The reward model's score is paid once, at
the last token. At every token the policy pays beta for each nat of log pi/ref, so that it stays near the reference:

    maximise  J(pi) = E[ score ] - beta KL(pi || reference)

Choices, where the published systems differ (Ziegler et al. 2019, Stiennon et al. 2020, InstructGPT):
1) beta is fixed. An adaptive beta would change the objective, and with it the optimum, during training.
2) The cap of response_tokens is the horizon of the MDP. A response that is cut there is scored as it is.
3) Scores are normalised once, before training. Rewards are not whitened. Advantages are whitened over the rollout.
4) Policy and critic are two networks. The critic starts as a copy of the reward model.
5) No entropy bonus, no pretraining loss mixed in.

Letters: B batch (one rollout), b rows of a minibatch or of another part, R response columns, V vocabulary.
Masks (B, R) are True on real response tokens.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn

from checks import canary, check_first_ratio, check_kl, check_padding, check_scores, check_trains, finite, load_parts
from data import by_length, minibatches
from model import SamplingConfig, generate, log_softmax, response_hidden, response_logprobs


@dataclass
class PPOConfig(SamplingConfig):
    beta: float = 0.2          # KL penalty coefficient, in standard deviations of the score per nat
    ppo_iterations: int = 60   # rollouts of PPO and GRPO; 40 with --data
    ppo_batch: int = 256       # episodes of a rollout; 128 with --data
    minibatch: int = 64        # episodes of an update; 32 with --data
    ppo_epochs: int = 2        # passes over a rollout
    ppo_lr: float = 5e-4       # learning rate of PPO's policy; 2e-4 with --data
    critic_lr: float = 1e-3    # learning rate of the critic
    gamma: float = 1.0         # discount; 1, because an episode is short
    lam: float = 0.95          # lambda of GAE: 0 has the most bias, 1 the most variance
    clip: float = 0.2          # the ratio is rewarded within 1 - CLIP to 1 + CLIP
    value_clip: float = 0.2    # how far a value may move in an iteration, in standard deviations of the score

# ---- the maths ------------------------------------------------------------------------------------

def masked_mean(x, mask):
    """The mean of x over the True cells of the mask, 0 when there are none. Other cells do not matter, even NaN."""
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)


def kl_estimates(logp, ref_logp):
    """
    Three estimates of KL(policy || reference), a dict, in nats per token, from tokens that the *policy* sampled
    (Schulman, 'Approximating KL divergence', 2020). All have one shape.

        k1 = log pi/ref                   unbiased, can be negative
        k2 = (log pi/ref)^2 / 2           biased, low variance
        k3 = ref/pi - 1 + log pi/ref      unbiased, never negative
    """
    log_ratio = logp - ref_logp
    k3 = torch.expm1(-log_ratio) + log_ratio  # expm1(x) keeps the digits near 0 that exp(x) - 1 loses
    return {"k1": log_ratio, "k2": log_ratio ** 2 / 2, "k3": k3.clamp(min=0)}  # k3 is below 0 by rounding only


@torch.no_grad()
def exact_kl(policy, reference, batch, temperature=1.0):
    """
    KL(policy || reference) along each response, in nats per response, (B,): the exact KL of the two next-token
    distributions, summed over the response. For responses of the *policy* its mean estimates the KL of whole responses,
    with less noise than k1.
    """
    def kl(part):
        logp = log_softmax(policy.head(response_hidden(policy, part)), temperature)           # (b, R, V)
        ref_logp = log_softmax(reference.head(response_hidden(reference, part)), temperature)
        kl_per_token = (logp.exp() * (logp - ref_logp)).sum(dim=2)                            # (b, R)
        return torch.where(part.mask, kl_per_token, 0.0).sum(dim=1)
    return by_length(kl, batch, policy.micro_batch)


def token_rewards(scores, logp, ref_logp, mask, beta):
    """
    The reward of every action, (B, R): -beta * k1 at each real token, plus the score (B,) at the last one. Else 0.

    The sum over t is score - beta * log pi/ref of the response (Ziegler et al. 2019, equation 2). Its mean estimates
    the objective J. The last real token is E, or the token at the cap. A row without real tokens gets nothing.
    """
    k1 = kl_estimates(logp, ref_logp)["k1"]
    columns = torch.arange(mask.shape[1], device=mask.device)                                 # (R,)
    is_last = columns == mask.sum(dim=1, keepdim=True) - 1                                    # (B, R)
    return torch.where(mask, -beta * k1, 0.0) + torch.where(is_last, scores[:, None], 0.0)


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """
    Generalised advantage estimation (Schulman et al. 2016, equation 16), of rewards and values (B, R):

        delta_t = r_t + gamma V_{t+1} - V_t        V is 0 after the last real token, also of a cut response
        A_t     = delta_t + gamma lam A_{t+1}      returns = A + V, the critic's targets

    Returns (advantages, returns), (B, R) each, zero outside the mask, in the units of the rewards.
    """
    rewards = torch.where(mask, rewards, 0.0)
    values = torch.where(mask, values, 0.0)
    advantages = torch.zeros_like(values)
    next_value = torch.zeros_like(values[:, 0])                                               # (B,)
    next_advantage = torch.zeros_like(values[:, 0])                                           # (B,)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]                             # (B,)
        next_advantage = delta + gamma * lam * next_advantage
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, torch.where(mask, advantages + values, 0.0)


def whiten(x, mask):
    """
    Shift and scale x to mean 0 and variance 1 (population variance) over the True cells. Zero elsewhere.

    Equal values give exactly 0: they differ by rounding from their mean, and to divide by that would make noise of it.
    """
    mean = masked_mean(x, mask)
    variance = masked_mean((torch.where(mask, x, 0.0) - mean) ** 2, mask)
    whitened = (x - mean) * torch.rsqrt(variance + 1e-8)
    smallest = torch.where(mask, x, math.inf).amin()
    largest = torch.where(mask, x, -math.inf).amax()
    return torch.where(mask & (smallest != largest), whitened, 0.0)


def clipped_surrogate(logp, old_logp, advantages, mask, clip=0.2):
    """
    The clipped surrogate of each token (Schulman et al. 2017, equation 7), negated, to be minimised: (B, R).

        objective  min(A r, A clamp(r, 1 - clip, 1 + clip))        r = pi/pi_old = exp(logp - old_logp)

    There is no gradient where A > 0 and r > 1 + clip, or A < 0 and r < 1 - clip. Raises ValueError unless clip > 0.
    """
    if clip <= 0:
        raise ValueError(f"clip must be above 0, got {clip}")
    ratio = torch.exp(torch.where(mask, logp - old_logp, 0.0))  # 1 at the pads
    return -torch.minimum(advantages * ratio, advantages * ratio.clamp(1 - clip, 1 + clip))


def policy_loss(logp, old_logp, advantages, mask, clip=0.2):
    """The mean of `clipped_surrogate` over the real tokens of the whole batch: a scalar."""
    return masked_mean(clipped_surrogate(logp, old_logp, advantages, mask, clip), mask)


def value_loss(values, old_values, returns, mask, clip=0.2):
    """
    0.5 * the masked mean of the larger of two squared errors: of the value, and of the value kept within `clip` of
    the old value (the value clipping of lm-human-preferences). A scalar, in squared units of the reward.
    """
    values = torch.where(mask, values, 0.0)  # a NaN at a pad must not reach the gradient
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * masked_mean(torch.maximum((values - returns) ** 2, (clipped - returns) ** 2), mask)


# ---- the loop -------------------------------------------------------------------------------------

def check_start(policy, reference, rollout, temperature):
    """Before the first update the policy is the reference: every KL must be exactly 0. Returns the largest one."""
    largest = exact_kl(policy, reference, rollout, temperature).abs().max().item()
    canary(largest == 0, f"KL(policy || reference) is {largest:.3g} nats before the first update, not 0: "
                         "the reference is not the network that the policy started from, or dropout is on")
    check_padding(lambda batch: response_logprobs(policy, batch, temperature), rollout)
    return largest


def rollout_metrics(rollout, scores, ref_logp, beta):
    """The metrics of a rollout, before the updates on it: a dict."""
    score = scores.mean().item()
    kl = kl_estimates(rollout.logp, ref_logp)["k1"].sum(dim=1).mean().item()
    return dict(score=score, kl=kl, objective=score - beta * kl,
                length=rollout.response_lens.float().mean().item(), finished=rollout.finished.float().mean().item(),
                entropy=-masked_mean(rollout.logp, rollout.mask).item())


def explained_variance(values, returns, mask):
    """1 - Var(returns - values) / Var(returns) over the real tokens: 1 for a perfect critic, 0 for a constant one."""
    error = (returns - values)[mask].var(correction=0)
    return 1 - (error / returns[mask].var(correction=0).clamp(min=1e-8)).item()


@torch.no_grad()
def update_metrics(logp, batch, clip):
    """The share of tokens with |ratio - 1| > clip, and KL(rollout's policy || policy) in nats per token: a dict."""
    clipped = torch.expm1(logp - batch.logp).abs() > clip                                     # (b, R)
    approx_kl = kl_estimates(batch.logp, logp)["k3"]                                          # (b, R)
    return dict(clip_fraction=masked_mean(clipped.float(), batch.mask).item(),
                approx_kl=masked_mean(approx_kl, batch.mask).item())


def mean_metrics(rows):
    """The mean of each metric over several updates: a list of dicts with the same names -> a dict."""
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def train_ppo(policy, critic, reference, reward_model, prompts, config, seed, checkpoint=None):
    """
    Train policy and critic, in place, to maximise score - beta KL(policy || reference).

    reference: frozen. critic: has `values(batch)` -> (B, R), and starts as a copy of the reward model.
    reward_model: any function of a Rollout -> scores (B,). prompts: lists of token ids, drawn with replacement.
    A generator: it yields (metrics, parts, rollout) after each iteration; docs/metrics.md explains the metrics.
    Raises CanaryError when a canary fails, ValueError when policy and reference are one object.
    """
    if policy is reference:
        raise ValueError("policy and reference are the same object, so the KL would stay 0: pass a frozen copy")
    # two, because a generator belongs to one device: the order of the rows is drawn on the CPU
    shuffle = torch.Generator().manual_seed(seed)               # which prompts, which minibatches
    sampler = torch.Generator(policy.device).manual_seed(seed)  # which tokens
    # no weight decay: it would pull the policy to 0, and not to the reference. A run has a few hundred updates, and
    # with the usual 0.999 Adam would average the squared gradients over all of them
    optimizer = torch.optim.AdamW([{"params": policy.parameters(), "lr": config.ppo_lr},
                                   {"params": critic.parameters(), "lr": config.critic_lr}],
                                  betas=(0.9, 0.99), eps=1e-5, weight_decay=0.0, fused=True)
    check_trains("policy", policy, config.ppo_lr)
    check_trains("critic", critic, config.critic_lr)
    parts = dict(policy=policy, critic=critic, optimizer=optimizer, shuffle=shuffle, sampler=sampler)
    for iteration in range(load_parts(parts, checkpoint), config.ppo_iterations):
        # 1. rollout: the policy answers prompts
        picks = torch.randint(len(prompts), (config.ppo_batch,), generator=shuffle)           # (B,)
        picked = [prompts[i] for i in picks.tolist()]
        rollout = generate(policy, picked, config.response_tokens, config.temperature, sampler)
        mask = rollout.mask                                                                   # (B, R)
        old_logp = rollout.logp  # (B, R) of the policy that sampled: it stays fixed during the updates

        # 2. rewards: the score at the last token, the KL penalty at every token
        with torch.no_grad():  # rewards and targets are constants: only the new logp and values have a gradient
            scores = reward_model(rollout)                                                    # (B,)
            ref_logp = response_logprobs(reference, rollout, config.temperature)              # (B, R)
            old_values = critic.values(rollout)                                               # (B, R)
        check_scores(scores, len(rollout))
        rewards = token_rewards(scores, old_logp, ref_logp, mask, config.beta)                # (B, R)

        # 3. advantages and returns. Only the advantages are whitened: the critic learns returns in units of the score
        advantages, returns = gae(rewards, old_values, mask, config.gamma, config.lam)        # (B, R) each
        advantages = whiten(advantages, mask)  # their scale changes in training, the best learning rate with it
        metrics = dict(step=iteration, **rollout_metrics(rollout, scores, ref_logp, config.beta))
        metrics["explained_variance"] = explained_variance(old_values, returns, mask)
        check_kl(metrics["kl"], metrics["length"])
        if iteration == 0:
            metrics["kl_at_start"] = check_start(policy, reference, rollout, config.temperature)

        # 4. update: a few epochs of minibatches of the same rollout; the learning rate falls linearly towards 0
        left = 1 - iteration / config.ppo_iterations  # with small last steps the policy settles at its optimum
        optimizer.param_groups[0]["lr"] = config.ppo_lr * left
        optimizer.param_groups[1]["lr"] = config.critic_lr * left
        updates = []
        for rows in minibatches(config.ppo_batch, config.minibatch, config.ppo_epochs, shuffle):
            rows = rows.to(policy.device)                                                     # (b,)
            batch = rollout.select(rows)
            logp = response_logprobs(policy, batch, config.temperature)                       # (b, R)
            values = critic.values(batch)                                                     # (b, R)
            pg_loss = policy_loss(logp, batch.logp, advantages[rows], batch.mask, config.clip)
            vf_loss = value_loss(values, old_values[rows], returns[rows], batch.mask, config.value_clip)
            loss = pg_loss + vf_loss  # no parameter is shared, so each network is trained by its own loss
            finite(loss, "PPO", "lower --ppo-lr")  # before the step: the last weights are still good
            if not updates:  # nothing is updated yet, so the policy is the one that sampled
                metrics["ratio_error"] = check_first_ratio(logp - batch.logp)
            optimizer.zero_grad()
            loss.backward()
            # each network by itself: a large error of the critic must not shorten the policy's step
            nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            nn.utils.clip_grad_norm_(critic.parameters(), 1.0)
            optimizer.step()
            updates.append(dict(policy_loss=pg_loss.item(), value_loss=vf_loss.item(),
                                **update_metrics(logp, batch, config.clip)))

        # 5. the caller logs, saves, and stops
        metrics.update(mean_metrics(updates))
        yield metrics, parts, rollout
