"""
PPO for language models, written out: rollout -> rewards -> advantages -> clipped losses -> the loop.

A response is an episode, a token an action, the text so far the state. The policy is rewarded by the reward model once, at the last token, and pays
beta nats for every nat by which it leaves the reference policy, at every token:

    maximise  J(pi) = E[ score ] - beta KL(pi || reference)

Simplified against the published systems (Ziegler et al. 2019, Stiennon et al. 2020, InstructGPT):
1) beta is fixed: no adaptive controller, so that the objective is one and its optimum is known.
2) The response cap is the horizon of the MDP: a response that is cut there ends there, is scored as it stands, and nothing is bootstrapped.
3) The scores are normalised once, before training, so rewards are not whitened; advantages are, over the real tokens of the whole rollout.
4) Policy and critic are two networks; the critic starts as a copy of the reward model. No entropy bonus, no mixed-in pretraining loss.

Letters: B batch (one rollout), P prompt columns, R response columns. Masks (B, R) are True on real response tokens.
"""

import copy
import time

import torch
import torch.nn as nn
from tqdm import tqdm

from data import minibatches
from evaluate import canary, exact_kl, finite, pads_are_inert
from graphs import Tape
from model import generate, response_logprobs

# ---------------------------------------------------------------------------------------------------------------------
# the maths

def masked_mean(x, mask):
    """Mean of x over the True cells of the mask; what stands in the other cells, NaN even, does not matter. 0 when there are none."""
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)


def kl_estimates(logp, ref_logp):
    """
    Three estimates of KL(policy || reference) from tokens that the *policy* sampled, in nats per token, same shape as the inputs
    (Schulman, 'Approximating KL divergence', 2020, with the two distributions named as here).

        k1 = log pi/ref              unbiased, can be negative
        k2 = (log pi/ref)^2 / 2      biased, low variance
        k3 = ref/pi - 1 + log pi/ref unbiased, never negative
    """
    log_ratio = logp - ref_logp
    # expm1 keeps k3 >= 0 near 0, where exp(x) - 1 rounds; what still rounds below 0 is cut off
    return {"k1": log_ratio, "k2": log_ratio ** 2 / 2, "k3": (torch.expm1(-log_ratio) + log_ratio).clamp(min=0)}


def token_rewards(scores, logp, ref_logp, mask, beta):
    """
    The reward of every action (B, R): -beta * k1 at each real token, and the score (B,) added on the last one (Ziegler et al. 2019, equation 2).

    A sum over t of these is score - beta * log pi/ref of the response, whose mean over responses is the objective J. The last real token is E, or
    the token at the cap; a row without real tokens gets nothing.
    """
    k1 = kl_estimates(logp, ref_logp)["k1"]
    columns = torch.arange(mask.shape[1], device=mask.device)
    last = columns == mask.sum(dim=1, keepdim=True) - 1                                # (B, R), one True in each row with tokens
    return torch.where(mask, -beta * k1, 0.0) + torch.where(last, scores[:, None], 0.0)


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """
    Generalised advantage estimation (Schulman et al. 2016, equation 16), all (B, R), zero outside the mask:

        delta_t = r_t + gamma V_{t+1} - V_t        V after the last real token is 0: the episode is over, be it by E or at the cap
        A_t     = delta_t + gamma lam A_{t+1}      returns = A + V, the critic's targets, taken before any whitening

    Returns (advantages, returns), in the units of the rewards.
    """
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = advantages[:, t] = delta + gamma * lam * next_advantage
        next_value = values[:, t]
    return advantages, torch.where(mask, advantages + values, 0.0)


def whiten(x, mask, shift_mean=True):
    """
    x scaled to variance 1 over the True cells (population variance), and shifted to mean 0 unless shift_mean is False; zero elsewhere.

    Constant x gives zeros (or x itself, unshifted), not NaN.
    """
    mean = masked_mean(x, mask)
    variance = masked_mean((torch.where(mask, x, 0.0) - mean) ** 2, mask)
    whitened = (x - mean) * torch.rsqrt(variance + 1e-8)
    return torch.where(mask, whitened if shift_mean else whitened + mean, 0.0)


def policy_loss(logp, old_logp, advantages, mask, clip=0.2):
    """
    The clipped surrogate (Schulman et al. 2017, equation 7), sign turned for minimising; scalar, mean over the real tokens of the whole batch.

        objective  min(A r, A clamp(r, 1 - clip, 1 + clip))        r = pi/pi_old = exp(logp - old_logp)

    No gradient where the ratio has already moved past the clip in the direction that the advantage rewards. Raises ValueError for a negative clip.
    """
    if clip < 0:
        raise ValueError(f"clip is at least 0, got {clip}")
    ratio = torch.exp(torch.where(mask, logp - old_logp, 0.0))                          # (B, R)
    return masked_mean(torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)), mask)


def value_loss(values, old_values, returns, mask, clip=0.2):
    """
    0.5 * the masked mean of the larger of two squared errors: of the value, and of the value kept within `clip` of what it was at the rollout
    (lm-human-preferences' value clipping). Scalar, in squared units of the reward.
    """
    values, old_values, returns = (torch.where(mask, x, 0.0) for x in (values, old_values, returns))
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * masked_mean(torch.maximum((values - returns) ** 2, (clipped - returns) ** 2), mask)


# ---------------------------------------------------------------------------------------------------------------------
# the loop

@torch.no_grad()
def experience(rollout, reference, reward_model, critic, beta, gamma=1.0, lam=0.95, temperature=1.0):
    """What an episode taught, as a dict: scores (B,) and, all (B, R), ref_logp, rewards, values, advantages (not whitened), returns."""
    scores = reward_model(rollout)
    ref_logp = response_logprobs(reference, rollout, temperature)
    rewards = token_rewards(scores, rollout.logp, ref_logp, rollout.mask, beta)
    values = critic.values(rollout)
    advantages, returns = gae(rewards, values, rollout.mask, gamma, lam)
    return dict(scores=scores, ref_logp=ref_logp, rewards=rewards, values=values, advantages=advantages, returns=returns)


def train_ppo(policy, reference, reward_model, prompts, iterations=60, batch_size=128, minibatch_size=128, epochs=2, beta=0.2, lr=3e-4,
              critic_lr=3e-4, gamma=1.0, lam=0.95, clip=0.2, value_clip=0.2, temperature=1.0, max_new_tokens=48, seed=0, judge=None,
              critic=None, cuda_graphs=False, log=lambda **row: None):
    """
    Train a policy, in place, to maximise score - beta KL against a frozen reference; returns the critic.

    prompts: lists of token ids, drawn from with replacement. judge(prompts, rollout) -> gold (B,) is logged and never trained on. critic: where the
    critic starts, anything with `values(batch)`; it is copied, and by default it is the reward model, which an ensemble cannot be. cuda_graphs: record
    the sampling once and replay it (graphs.py). `log` is called once an iteration with the metrics of the README's glossary. Raises CanaryError when
    an invariant of the loop breaks.
    """
    if policy is reference:
        raise ValueError("the policy and the reference are the same object: the KL would stay 0; pass a frozen copy")
    device = policy.wte.weight.device
    shuffle = torch.Generator().manual_seed(seed)  # which prompts, which minibatches
    sampler = torch.Generator(device).manual_seed(seed)  # which tokens
    critic = copy.deepcopy(reward_model if critic is None else critic).requires_grad_(True)
    optimizer = torch.optim.AdamW([{"params": policy.parameters(), "lr": lr}, {"params": critic.parameters(), "lr": critic_lr}],
                                  betas=(0.9, 0.99), eps=1e-5, weight_decay=0.0, fused=True)

    replay = dict(P=max(map(len, prompts)), loop=Tape()) if cuda_graphs else {}
    bar = tqdm(range(iterations), desc="ppo", unit="it", dynamic_ncols=True)
    for iteration in bar:
        started = time.perf_counter()

        # 1. rollout: the policy answers prompts; its log-probs are known from sampling and are what the ratio is measured against
        picked = [prompts[i] for i in torch.randint(len(prompts), (batch_size,), generator=shuffle).tolist()]
        rollout = generate(policy, picked, max_new_tokens, temperature, sampler, **replay)
        mask = rollout.mask                                                            # (B, R)

        # 2. rewards, values, advantages
        lesson = experience(rollout, reference, reward_model, critic, beta, gamma, lam, temperature)
        advantages = whiten(lesson["advantages"], mask)
        if iteration == 0:
            start_kl = exact_kl(policy, reference, rollout, temperature).max().item()
            canary(start_kl == 0, f"KL(policy || reference) is {start_kl:.3g} nats before the first update, not 0: the reference is not the network "
                                  "that the policy started from, or dropout is on")
            pads_are_inert(lambda batch: response_logprobs(policy, batch, temperature), rollout)

        # 3. a few epochs of minibatches on the same rollout; one permutation for all tensors
        losses, ratios = [], []
        for _ in range(epochs):
            for rows in minibatches(batch_size, minibatch_size, shuffle):
                rows = rows.to(device, non_blocking=True)
                part, m = rollout.select(rows), mask[rows]
                logp, values = response_logprobs(policy, part, temperature), critic.values(part)   # (b, R) each
                actor, critics = (logp, part.logp, advantages[rows]), (values, lesson["values"][rows], lesson["returns"][rows])
                pg_loss, vf_loss = policy_loss(*actor, m, clip), value_loss(*critics, m, value_clip)
                finite(pg_loss + vf_loss, "PPO", "lower --ppo-lr")
                if iteration == 0 and not losses:
                    rubbish = [torch.where(m, x, 3.0 + i) for i, x in enumerate((*actor, *critics))]
                    leak = (policy_loss(*rubbish[:3], m, clip) - pg_loss).abs() + (value_loss(*rubbish[3:], m, value_clip) - vf_loss).abs()
                    canary(leak.item() == 0, f"the losses change by {leak.item():.3g} when the pads hold rubbish: a mask was dropped on the way to a mean")
                for group, base in zip(optimizer.param_groups, (lr, critic_lr)):
                    group["lr"] = base * (1 - iteration / iterations)
                optimizer.zero_grad()
                (pg_loss + vf_loss).backward()                                         # no parameter is shared, so the sum trains each by its own loss
                nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
                nn.utils.clip_grad_norm_(critic.parameters(), 1.0)
                optimizer.step()
                with torch.no_grad():
                    log_ratio = torch.where(m, logp - part.logp, 0.0)
                    if not losses:
                        off = torch.expm1(log_ratio).abs().max().item()
                        canary(off < 1e-4, f"the ratio on the first minibatch is off 1 by {off:.3g}: the sampler and the scorer disagree (temperature, "
                                           "positions under padding, the cache, or a slice that is off by one)")
                        ratios.append(off)
                    losses.append(torch.stack([pg_loss, vf_loss, masked_mean(((log_ratio.exp() - 1).abs() > clip).float(), m),
                                               masked_mean(kl_estimates(part.logp, logp)["k3"], m)]).detach())

        # 4. log: means over the rollout, measured before this iteration's updates
        kl = kl_estimates(rollout.logp, lesson["ref_logp"])["k1"].sum(dim=1)           # (B,) pads are 0 in both
        pg, vf, clip_fraction, approx_kl = torch.stack(losses).mean(dim=0).tolist()
        error = (lesson["returns"] - lesson["values"])[mask].var(correction=0) / lesson["returns"][mask].var(correction=0).clamp(min=1e-8)
        row = dict(score=lesson["scores"].mean().item(), kl=kl.mean().item(), length=rollout.response_lens.float().mean().item(),
                   finished=rollout.finished.float().mean().item(), clip_fraction=clip_fraction, approx_kl=approx_kl, ratio_error=ratios[0],
                   policy_loss=pg, value_loss=vf, explained_variance=1 - error.item(), entropy=-masked_mean(rollout.logp, mask).item())
        row["objective"] = row["score"] - beta * row["kl"]
        if iteration == 0:
            row["kl_at_start"] = start_kl
        if judge is not None:
            row["gold"] = judge(picked, rollout).mean().item()
        log(step=iteration, **row, seconds=time.perf_counter() - started)
        bar.set_postfix({name: f"{row[key]:.2f}" for name, key in
                         (("score", "score"), ("gold", "gold"), ("kl", "kl"), ("clip", "clip_fraction"), ("len", "length")) if key in row})
    return critic
