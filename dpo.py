"""
Direct preference optimisation (DPO): preferences without a reward model and without sampling.

The optimum of  E[score] - beta KL(pi || reference)  is  pi* = reference * exp(score / beta) / Z, and so
score = beta log pi*/reference + beta log Z. Every policy pi has an *implicit reward*, beta log pi/reference, for which
it is the optimum. Z depends on the prompt alone and cancels in a pair. So a policy can be fitted to preferences like a
reward model.

Only the difference of the log-probs of chosen and rejected is trained. Usually both fall. The pairs are never sampled
again, and nothing checks how good the policy's own answers are. So DPO over-optimises too (Rafailov et al. 2024,
arXiv:2406.02900). Four remedies are small changes:

    chipo        a ratio pi/ref costs more than its logarithm    dpo_loss, kind="chipo"
    length       a token costs alpha                             train_dpo, length_penalty
    SFT term     the chosen response keeps its log-prob          train_dpo, sft_weight
    online DPO   pairs of the policy's own answers               train_online_dpo

Left out: SimPO and ORPO (no reference) and KTO (no pairs). Their goal is not pi*. estimators.py shows where they end.

Letters: B pairs, b pairs of a minibatch, R response columns.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from checks import check_kl, check_padding, check_scores, check_start_margin, check_trains, finite, load_parts
from data import collate_pairs, minibatches
from model import generate, response_logprobs
from ppo import check_start, mean_metrics, rollout_metrics

SMOOTHED = ("dpo", "robust")  # the losses that use label_smoothing


@dataclass
class DPOConfig:
    dpo_kind: str = "dpo"         # dpo, ipo, slic, robust or chipo
    dpo_beta: float = 0.5         # beta of the implicit reward: not in units of the score, but of the labels' log-odds
    dpo_lr: float = 2e-4          # highest learning rate of DPO and its relatives
    dpo_epochs: int = 2           # passes over the pairs
    label_smoothing: float = 0.0  # share of wrong labels that dpo and robust assume
    dpo_batch: int = 32           # pairs in a step
    length_penalty: float = 0.0   # alpha, what a token costs, in units of the labels' log-odds
    sft_weight: float = 0.0       # weight of the SFT term: the chosen response's nats per token


def implicit_reward(logp, ref_logp, beta, kind="dpo"):
    """
    beta log pi(y)/ref(y), the reward whose optimum is pi, up to a constant of the prompt (Rafailov et al. 2023,
    equation 5). For chipo it is beta (pi/ref + log pi/ref).
    """
    log_ratio = logp - ref_logp
    if kind == "chipo":
        log_ratio = log_ratio + log_ratio.clamp(max=20).exp()  # a float32 holds no exp of more than 88
    return beta * log_ratio


def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1, kind="dpo", label_smoothing=0.0):
    """
    The loss of a batch of pairs, a scalar mean. The four inputs (B,) are *sums* of the log-probs of a response's
    tokens, in nats, under the policy and under the reference. e = label_smoothing is the assumed share of wrong labels,
    a number or one for each pair, (B,).

        h = (chosen - ref_chosen) - (rejected - ref_rejected)          beta h is the difference of implicit rewards
        dpo     -(1-e) log sigmoid(beta h) - e log sigmoid(-beta h)                 Rafailov et al. 2023, eq. 7
        ipo     (h - 1 / (2 beta))^2                                                Azar et al. 2023, eq. 17
        slic    max(0, 1 - beta h)                                                  Zhao et al. 2023, with a reference
        robust  (-(1-e) log sigmoid(beta h) + e log sigmoid(-beta h)) / (1 - 2e)    Chowdhury et al. 2024 (2403.00409)
        chipo   dpo with phi(z) = z + log z of the ratio z = pi/ref in h            Huang et al. 2024 (2407.13399)

    chipo pays for the chi-squared divergence too: it rests where beta phi(pi/ref) = score - constant, the optimum of
    E[score] - beta (KL + E_ref[(pi/ref - 1)^2] / 2). There, no ratio is above 1 + range of the scores / beta; for dpo
    the bound is exp(range / beta). (The paper also clips beta h, at twice the largest score.)
    dpo with e > 0 is conservative DPO (cDPO, Mitchell 2023). If a share e of the labels is flipped, the expected
    `robust` loss is the dpo loss of the true label. But for e > 0 the loss of a single pair has no lower bound, so on
    few pairs the margins grow without end.
    At the start h = 0, and dpo and robust are log 2, ipo is 1 / (4 beta^2), slic is 1.
    Raises ValueError for beta <= 0, an unknown kind, or a label_smoothing outside [0, 0.5) or with ipo or slic.
    """
    if beta <= 0:
        raise ValueError(f"beta must be above 0, got {beta}")
    share = torch.as_tensor(label_smoothing)
    if not ((share >= 0) & (share < 0.5)).all() or (share.any() and kind not in SMOOTHED):
        raise ValueError(f"label smoothing must be in [0, 0.5) and belongs to {' and '.join(SMOOTHED)}, "
                         f"got {label_smoothing} with {kind!r}")
    e = label_smoothing
    h = implicit_reward(chosen, ref_chosen, 1, kind) - implicit_reward(rejected, ref_rejected, 1, kind)       # (B,)
    label_is_right = -F.logsigmoid(beta * h)
    label_is_wrong = -F.logsigmoid(-beta * h)
    if kind in ("dpo", "chipo"):
        losses = (1 - e) * label_is_right + e * label_is_wrong
    elif kind == "robust":
        losses = ((1 - e) * label_is_right - e * label_is_wrong) / (1 - 2 * e)
    elif kind == "ipo":
        losses = (h - 1 / (2 * beta)) ** 2
    elif kind == "slic":
        losses = F.relu(1 - beta * h)
    else:
        raise ValueError(f"unknown kind {kind!r}, choose from dpo, ipo, slic, robust, chipo")
    return losses.mean()


@torch.no_grad()
def reference_logprobs(reference, pairs, temperature=1.0):
    """The log-probs of whole responses under the reference, computed once: (pairs, 2), chosen and rejected."""
    parts = []
    for at in range(0, len(pairs), 128):
        batch = collate_pairs(pairs[at:at + 128], reference.pad, reference.device)
        logp = response_logprobs(reference, batch, temperature).sum(dim=1)                    # (2B,)
        parts.append(torch.stack(logp.chunk(2), dim=1))
    return torch.cat(parts)


def train_dpo(policy, reference, pairs, config, seed, checkpoint=None, temperature=1.0):
    """
    Fit a policy, in place, to pairs of token ids: dicts of "prompt", "chosen" and "rejected". reference: frozen.
    temperature: the one at which the policy is sampled. It is a part of the policy, so all log-probs are taken at it.

    length_penalty = alpha > 0 (Park et al. 2024, arXiv:2403.19159) adds alpha (|chosen| - |rejected|) to beta h. It is
    DPO with a reference that costs alpha a token, ref(y) exp(-alpha |y| / beta), so it rests at
    ref exp((score - alpha |y|) / beta) / Z. sft_weight = w > 0 (Pang et al. 2024, arXiv:2404.19733) adds
    -w log pi(chosen) / |chosen|. This weighs the labels twice, and moves the rest away from pi*.

    The learning rate rises over about a tenth of the steps and then falls linearly towards 0. A generator: it yields
    (metrics, parts) after each step; docs/metrics.md explains the metrics. Raises CanaryError when a canary fails,
    ValueError when policy and reference are one object.
    """
    if policy is reference:
        raise ValueError("policy and reference are the same object, so nothing can be learned: pass a frozen copy")
    beta = config.dpo_beta
    shuffle = torch.Generator().manual_seed(seed)
    # the reference never changes, so it reads each pair once, and not in every epoch
    ref_logp = reference_logprobs(reference, pairs, temperature)                              # (pairs, 2)
    # no weight decay: it would pull the policy to 0, and not to the reference
    optimizer = torch.optim.AdamW(policy.parameters(), betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    check_trains("policy", policy, config.dpo_lr)
    batches = minibatches(len(pairs), config.dpo_batch, config.dpo_epochs, shuffle)
    steps = len(batches)
    parts = dict(policy=policy, optimizer=optimizer)  # the order of the pairs follows from the seed
    for step in range(load_parts(parts, checkpoint), steps):
        # 1. log-probs of whole responses, chosen and rejected in one forward pass
        rows = batches[step]                                                                  # (B,)
        batch = collate_pairs([pairs[row] for row in rows.tolist()], policy.pad, policy.device)
        logp = response_logprobs(policy, batch, temperature).sum(dim=1)                       # (2B,)
        chosen, rejected = logp.chunk(2)                                                      # (B,) each
        ref_chosen, ref_rejected = ref_logp[rows.to(policy.device)].unbind(dim=1)             # (B,) each

        # 2. the loss. Before the first step the policy is the reference, so all margins are 0
        lengths, rejected_lengths = batch.response_lens.chunk(2)                              # (B,) each
        alpha = config.length_penalty / beta
        loss = dpo_loss(chosen, rejected, ref_chosen - alpha * lengths, ref_rejected - alpha * rejected_lengths, beta,
                        config.dpo_kind, config.label_smoothing)  # dpo with label_smoothing is cDPO
        if config.sft_weight:
            loss = loss - config.sft_weight * (chosen / lengths).mean()
        value = finite(loss, "DPO", "lower --dpo-lr or raise --dpo-beta")
        chosen_reward = implicit_reward(chosen, ref_chosen, beta, config.dpo_kind).detach()   # (B,)
        rejected_reward = implicit_reward(rejected, ref_rejected, beta, config.dpo_kind).detach()             # (B,)
        margin = chosen_reward - rejected_reward  # (B,) of pairs that this step has not learned yet
        if step == 0:
            check_start_margin(margin / beta, logp)
            check_padding(lambda other: response_logprobs(policy, other), batch)

        # 3. a step: the learning rate rises first, because Adam's averages are empty at the start
        warm_up = (step + 1) / (0.1 * steps + 1)
        optimizer.param_groups[0]["lr"] = config.dpo_lr * min(warm_up, 1 - step / steps)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)  # a pair with the wrong label has the largest gradient
        optimizer.step()
        # both log-probs, because the margin hides that usually both fall
        yield dict(step=step, loss=value, margin=margin.mean().item(), accuracy=(margin > 0).float().mean().item(),
                   chosen_logp=chosen.mean().item(), rejected_logp=rejected.mean().item(),
                   chosen_reward=chosen_reward.mean().item(), rejected_reward=rejected_reward.mean().item(),
                   tokens=batch.tokens), parts


def train_online_dpo(policy, reference, reward_model, prompts, config, seed, checkpoint=None):
    """
    DPO on pairs of the policy's own answers (Guo et al. 2024, arXiv:2402.04792): nothing is learned about texts that
    the policy no longer writes.

    Arguments, yields and errors are like train_ppo's; config: a PPOConfig. The scorer is an annotator in the model of
    Bradley and Terry: a wins with probability sigmoid(score_a - score_b). So beta is PPO's, and the policy rests at
    PPO's pi*. (In the paper the better answer always wins. Then no margin is large enough, as lesson.py shows.)
    """
    if policy is reference:
        raise ValueError("policy and reference are the same object, so the KL would stay 0: pass a frozen copy")
    shuffle = torch.Generator().manual_seed(seed)               # which prompts, which minibatches
    sampler = torch.Generator(policy.device).manual_seed(seed)  # which tokens
    optimizer = torch.optim.AdamW(policy.parameters(), betas=(0.9, 0.99), eps=1e-5, weight_decay=0.0, fused=True)
    check_trains("policy", policy, config.ppo_lr)
    parts = dict(policy=policy, optimizer=optimizer, shuffle=shuffle, sampler=sampler)
    for iteration in range(load_parts(parts, checkpoint), config.ppo_iterations):
        # 1. rollout: two answers to each prompt, in adjacent rows
        picks = torch.randint(len(prompts), (config.ppo_batch // 2,), generator=shuffle)      # (B,)
        picked = [prompts[i] for i in picks.tolist() for _ in range(2)]
        rollout = generate(policy, picked, config.response_tokens, config.temperature, sampler)
        with torch.no_grad():
            scores = reward_model(rollout)                                                    # (2B,)
            ref_logp = response_logprobs(reference, rollout, config.temperature)              # (2B, R)
        check_scores(scores, len(rollout))
        metrics = dict(step=iteration, **rollout_metrics(rollout, scores, ref_logp, config.beta))
        check_kl(metrics["kl"], metrics["length"])
        if iteration == 0:
            metrics["kl_at_start"] = check_start(policy, reference, rollout, config.temperature)

        # 2. labels: the better answer is chosen. This annotator errs with a known probability, so cDPO takes the mean
        # over all labels, which has less noise than a label that is drawn.
        order = scores.view(-1, 2).argsort(dim=1, descending=True)                            # (B, 2) better first
        rows = order + 2 * torch.arange(len(order), device=order.device)[:, None]             # (B, 2) of the rollout
        margin = scores[rows[:, 0]] - scores[rows[:, 1]]                                      # (B,)
        errs = torch.sigmoid(-margin).clamp(max=0.499)              # (B,) label_smoothing is below 0.5

        # 3. update: a few epochs of minibatches of the same pairs; the learning rate falls linearly towards 0
        optimizer.param_groups[0]["lr"] = config.ppo_lr * (1 - iteration / config.ppo_iterations)
        updates = []
        for pairs in minibatches(len(rows), -(-config.minibatch // 2), config.ppo_epochs, shuffle):
            pairs = pairs.to(policy.device)                                                   # (b,)
            both = rows[pairs].T.flatten()                                                    # (2b,) chosen first
            logp = response_logprobs(policy, rollout.select(both), config.temperature).sum(dim=1)             # (2b,)
            loss = dpo_loss(*logp.chunk(2), *ref_logp[both].sum(dim=1).chunk(2), config.beta,
                            label_smoothing=errs[pairs])
            finite(loss, "online DPO", "lower --ppo-lr")
            optimizer.zero_grad()
            loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            updates.append(dict(loss=loss.item(), grad_norm=grad_norm.item()))
        metrics.update(mean_metrics(updates))
        yield metrics, parts, rollout
