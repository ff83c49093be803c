"""
PPO for language models, written out: rollout -> rewards -> advantages -> clipped losses -> update.

A response is an episode, a token is an action, the text so far is the state. The reward model's score is paid once, at
the last token. At every token the policy pays beta for each nat of log pi/ref, so that it stays near the reference:

    maximise  J(pi) = E[ score ] - beta KL(pi || reference)

Choices, where the published systems differ (Ziegler et al. 2019, Stiennon et al. 2020, InstructGPT):
1) beta is fixed. An adaptive beta would change the objective, and with it the optimum, during training.
2) The cap of response_tokens is the horizon of the MDP. A response that is cut there is scored as it stands.
3) Scores are normalised once, before training. Rewards are not whitened. Advantages are whitened over the rollout.
4) Policy and critic are two networks. The critic starts as a copy of the reward model.
5) No entropy bonus, no pretraining loss mixed in.

Letters: B batch (one rollout), b rows of a minibatch or of another part, R response columns, V vocabulary.
Masks (B, R) are True on real response tokens.
"""

import time

import torch
import torch.nn as nn

from checks import check_first_ratio, check_kl, check_padding, check_start_kl, check_trains, finite
from data import by_length, minibatches
from model import generate, log_softmax, response_hidden, response_logprobs
from pipeline.progress import ProgressBar

# ---- the maths ------------------------------------------------------------------------------------

def masked_mean(x, mask):
    """The mean of x over the True cells of the mask, 0 when there are none. Other cells do not matter, even NaN."""
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)


def kl_estimates(logp, ref_logp):
    """
    Three estimates of KL(policy || reference), in nats per token, from tokens that the *policy* sampled
    (Schulman, 'Approximating KL divergence', 2020). All have one shape.

        k1 = log pi/ref                   unbiased, can be negative
        k2 = (log pi/ref)^2 / 2           biased, low variance
        k3 = ref/pi - 1 + log pi/ref      unbiased, never negative

    Returns {"k1": ..., "k2": ..., "k3": ...}.
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
    return by_length(kl, batch)


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


def whiten(x, mask, shift_mean=True):
    """
    Scale x to variance 1 over the True cells (population variance) and to mean 0. Zero elsewhere.

    Without shift_mean the mean is added again. Constant x gives zeros (or x, without shift_mean), never NaN.
    """
    mean = masked_mean(x, mask)
    variance = masked_mean((torch.where(mask, x, 0.0) - mean) ** 2, mask)
    whitened = (x - mean) * torch.rsqrt(variance + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, 0.0)


def policy_loss(logp, old_logp, advantages, mask, clip=0.2, clip_high=None, mean=masked_mean):
    """
    The clipped surrogate (Schulman et al. 2017, equation 7), negated, to be minimised. A scalar: the mean over
    the real tokens of the whole batch, unless another mean(token losses (B, R), mask) is given.

        objective  min(A r, A clamp(r, 1 - clip, 1 + clip_high))        r = pi/pi_old = exp(logp - old_logp)

    clip_high is clip unless given (Yu et al. 2025, DAPO, equation 10). There is no gradient where A > 0 and
    r > 1 + clip_high, or A < 0 and r < 1 - clip. Raises ValueError for a negative clip.
    """
    clip_high = clip if clip_high is None else clip_high
    if min(clip, clip_high) < 0:
        raise ValueError(f"clip must be at least 0, got {min(clip, clip_high)}")
    ratio = torch.exp(torch.where(mask, logp - old_logp, 0.0))                                # (B, R)
    losses = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip_high)
    # not torch.maximum: where both are equal its gradient needs that of clamp at the bound, which torch 2.14 changed
    return mean(torch.where(clipped > losses, clipped, losses), mask)


def value_loss(values, old_values, returns, mask, clip=0.2):
    """
    0.5 * the masked mean of the larger of two squared errors: of the value, and of the value kept within `clip` of
    the old value (the value clipping of lm-human-preferences). A scalar, in squared units of the reward.
    """
    values = torch.where(mask, values, 0.0)  # a NaN at a pad must not reach the gradient
    old_values = torch.where(mask, old_values, 0.0)
    returns = torch.where(mask, returns, 0.0)
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * masked_mean(torch.maximum((values - returns) ** 2, (clipped - returns) ** 2), mask)


# ---- the loop -------------------------------------------------------------------------------------

def rollout_metrics(rollout, scores, ref_logp, beta):
    """The metrics of a rollout, before the updates on it: a dict."""
    score = scores.mean().item()
    kl = kl_estimates(rollout.logp, ref_logp)["k1"].sum(dim=1).mean().item()
    return dict(score=score, kl=kl, objective=score - beta * kl,
                length=rollout.response_lens.float().mean().item(), finished=rollout.finished.float().mean().item(),
                entropy=-masked_mean(rollout.logp, rollout.mask).item())


@torch.no_grad()
def update_metrics(losses, logp, batch, clip):
    """(n + 2,): n given scalars, the share of tokens with |ratio - 1| > clip, and KL(rollout's policy || policy)."""
    clipped = torch.expm1(logp - batch.logp).abs() > clip                                     # (b, R)
    approx_kl = masked_mean(kl_estimates(batch.logp, logp)["k3"], batch.mask)
    return torch.stack([*losses, masked_mean(clipped.float(), batch.mask), approx_kl])


def train_ppo(policy, critic, reference, reward_model, prompts, config, seed, log=lambda **row: None, gold_fn=None,
              progress=ProgressBar, watch=lambda iterations, policy: None):
    """
    Train policy and critic, in place, to maximise score - beta KL(policy || reference).

    prompts: lists of token ids, drawn with replacement. critic: has `values(batch)`, and starts as a copy of the reward
    model. config: see pipeline/config.py. gold_fn(prompts, rollout) -> gold (B,) is only logged. `log` gets the metrics
    of docs/metrics.md once an iteration; watch(iterations done, policy) is called before the first one and after each.
    Raises CanaryError when a canary fails, ValueError when policy and reference are one object.
    """
    if policy is reference:
        raise ValueError("policy and reference are the same object, so the KL would stay 0: pass a frozen copy")
    device = policy.wte.weight.device
    shuffle = torch.Generator().manual_seed(seed)        # which prompts, which minibatches
    sampler = torch.Generator(device).manual_seed(seed)  # which tokens
    optimizer = torch.optim.AdamW([{"params": policy.parameters(), "lr": config.ppo_lr},
                                   {"params": critic.parameters(), "lr": config.critic_lr}],
                                  betas=(0.9, 0.99), eps=1e-5, weight_decay=0.0, fused=True)
    check_trains("policy", policy, optimizer, config.ppo_lr)
    check_trains("critic", critic, optimizer, config.critic_lr)
    bar = progress(config.ppo_iterations, "ppo", "it", dict(policy=policy, critic=critic, optimizer=optimizer,
                                                            shuffle=shuffle, sampler=sampler))
    watch(bar.start, policy)
    for iteration in bar:
        started = time.perf_counter()

        # 1. rollout: the policy answers prompts
        picks = torch.randint(len(prompts), (config.ppo_batch,), generator=shuffle)           # (B,)
        picked = [prompts[i] for i in picks.tolist()]
        rollout = generate(policy, picked, config.response_tokens, config.temperature, sampler)
        mask = rollout.mask                                                                   # (B, R)
        old_logp = rollout.logp                                                               # (B, R)

        # 2. rewards: the score at the last token, the KL penalty at every token
        with torch.no_grad():
            scores = reward_model(rollout)                                                    # (B,)
            ref_logp = response_logprobs(reference, rollout, config.temperature)              # (B, R)
            old_values = critic.values(rollout)                                               # (B, R)
        rewards = token_rewards(scores, old_logp, ref_logp, mask, config.beta)                # (B, R)

        # 3. advantages, whitened over all real tokens of the rollout; returns stay as they are
        advantages, returns = gae(rewards, old_values, mask, config.gamma, config.lam)        # (B, R) each
        advantages = whiten(advantages, mask)
        metrics = rollout_metrics(rollout, scores, ref_logp, config.beta)
        check_kl(metrics["kl"], metrics["length"])
        error = (returns - old_values)[mask].var(correction=0)
        total = returns[mask].var(correction=0)
        metrics["explained_variance"] = 1 - (error / total.clamp(min=1e-8)).item()
        if iteration == 0:
            metrics["kl_at_start"] = check_start_kl(exact_kl(policy, reference, rollout, config.temperature))
            check_padding(lambda batch: response_logprobs(policy, batch, config.temperature), rollout)

        # 4. update: a few epochs of minibatches of the same rollout; the learning rate falls linearly towards 0
        for group, lr in zip(optimizer.param_groups, (config.ppo_lr, config.critic_lr)):
            group["lr"] = lr * (1 - iteration / config.ppo_iterations)
        updates = []
        for rows in minibatches(config.ppo_batch, config.minibatch, config.ppo_epochs, shuffle):
            rows = rows.to(device, non_blocking=True)                                         # (b,)
            batch = rollout.select(rows)
            logp = response_logprobs(policy, batch, config.temperature)                       # (b, R)
            values = critic.values(batch)                                                     # (b, R)
            pg_loss = policy_loss(logp, batch.logp, advantages[rows], batch.mask, config.clip)
            vf_loss = value_loss(values, old_values[rows], returns[rows], batch.mask, config.value_clip)
            loss = pg_loss + vf_loss  # no parameter is shared, so each network is trained by its own loss
            finite(loss, "PPO", "lower --ppo-lr")
            if not updates:
                metrics["ratio_error"] = check_first_ratio(logp - batch.logp)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            nn.utils.clip_grad_norm_(critic.parameters(), 1.0)
            optimizer.step()
            updates.append(update_metrics([pg_loss, vf_loss], logp, batch, config.clip))

        # 5. log
        names = ("policy_loss", "value_loss", "clip_fraction", "approx_kl")
        metrics.update(zip(names, torch.stack(updates).mean(dim=0).tolist()))
        if gold_fn is not None:
            metrics["gold"] = gold_fn(picked, rollout).mean().item()
        log(step=iteration, **metrics, seconds=time.perf_counter() - started)
        watch(iteration + 1, policy)
        shown = [name for name in ("score", "gold", "kl", "length") if name in metrics]
        bar.set_postfix({name: f"{metrics[name]:.2f}" for name in shown})
