"""
Direct preference optimisation: the reward model and the reinforcement learning folded into one loss on pairs.

The optimum of  E[score] - beta KL(pi || reference)  is  pi* = reference * exp(score / beta) / Z. Read backwards, every policy is the optimum for the
score  beta log pi/reference  (up to a constant of the prompt, which cancels in a pair): its *implicit reward*. So a policy can be fitted to
preferences as a reward model would be, and is then its own optimum. No sampling, no critic, no reward model.

What surprises most: the log-probs of the chosen *and* of the rejected responses usually fall. Only their difference is trained.

Left out: the length-normalised and reference-free relatives (SimPO, ORPO, KTO), because they have no optimum that could be checked against.

Letters: B pairs, R response columns.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from data import minibatches
from evaluate import canary, finite, pads_are_inert
from model import response_logprobs
from reward import collate_pairs

KINDS = ("dpo", "ipo", "slic", "robust")
SMOOTHED = ("dpo", "robust")  # those that can be told of wrong labels


def implicit_reward(logp, ref_logp, beta):
    """beta (log pi(y) - log ref(y)), the score whose optimum the policy is, up to a constant of the prompt (Rafailov et al. 2023, equation 5)."""
    return beta * (logp - ref_logp)


def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1, kind="dpo", label_smoothing=0.0):
    """
    The loss of a batch of pairs, scalar mean. The four are (B,) *sums* of the log-probs of a response's tokens, in nats, under policy and reference.

        h = (chosen - ref_chosen) - (rejected - ref_rejected)          beta h is the difference of the implicit rewards
        dpo   -(1-e) log sigmoid(beta h) - e log sigmoid(-beta h)      Rafailov et al. 2023, equation 7; e = label_smoothing, the share of wrong labels
        ipo   (h - 1 / (2 beta))^2                                     Azar et al. 2023, equation 17; stops at a margin of 1 / (2 beta) nats
        slic  max(0, 1 - beta h)                                       Zhao et al. 2023, the hinge, relative to the reference
        robust  (-(1-e) log sigmoid(beta h) + e log sigmoid(-beta h)) / (1 - 2e)      Chowdhury et al. 2024 (arXiv:2403.00409)

    When a share e of labels is flipped, the mean of robust over the flips is the plain loss of the true label: unbiased, where the smoothed dpo only
    stops at a margin. The price is that of one pair it has no lower bound, so on few pairs the margins grow for ever.

    At the start (policy = reference, h = 0) dpo and robust are log 2, ipo 1 / (4 beta^2) and slic 1. Raises ValueError for beta <= 0, an unknown
    kind, or a smoothing outside [0, 0.5), or with a kind that has none.
    """
    if beta <= 0:
        raise ValueError(f"beta is above 0, got {beta}")
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}, choose from {', '.join(KINDS)}")
    if not 0 <= label_smoothing < 0.5 or (label_smoothing and kind not in SMOOTHED):
        raise ValueError(f"label smoothing is in [0, 0.5) and belongs to {' and '.join(SMOOTHED)}, got {label_smoothing} with {kind!r}")
    h = (chosen - ref_chosen) - (rejected - ref_rejected)                              # (B,)
    if kind == "ipo":
        return ((h - 1 / (2 * beta)) ** 2).mean()
    if kind == "slic":
        return F.relu(1 - beta * h).mean()
    e = label_smoothing
    right, wrong = (1 - e, e) if kind == "dpo" else ((1 - e) / (1 - 2 * e), -e / (1 - 2 * e))
    return (-right * F.logsigmoid(beta * h) - wrong * F.logsigmoid(-beta * h)).mean()


@torch.no_grad()
def reference_logprobs(reference, pairs, pad, device, size=128):
    """The reference's log-probs of whole responses, (pairs, 2): chosen, rejected. They never change, so they are computed once."""
    parts = []
    for at in range(0, len(pairs), size):
        logp = response_logprobs(reference, collate_pairs(pairs[at:at + size], pad, device)).sum(dim=1)
        parts.append(torch.stack(logp.chunk(2), dim=1))
    return torch.cat(parts)


def train_dpo(policy, reference, pairs, pad, epochs=1, batch_size=64, beta=0.1, lr=1e-4, kind="dpo", label_smoothing=0.0, seed=0,
              log=lambda **row: None):
    """
    Fit a policy, in place, to pairs of token ids. The learning rate rises over the first tenth of the steps and falls linearly to 0.

    `log` is called once a step with the metrics of the README's glossary. Raises CanaryError when an invariant of the loop breaks.
    """
    if policy is reference:
        raise ValueError("the policy and the reference are the same object: nothing could be learned; pass a frozen copy")
    device = policy.wte.weight.device
    generator = torch.Generator().manual_seed(seed)
    ref_logp = reference_logprobs(reference, pairs, pad, device)                       # (pairs, 2)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    steps = epochs * -(-len(pairs) // batch_size)
    bar = tqdm(total=steps, desc="dpo", unit="step", dynamic_ncols=True)
    step, right = 0, []
    for epoch in range(epochs):
        for rows in minibatches(len(pairs), batch_size, generator):
            batch = collate_pairs([pairs[row] for row in rows.tolist()], pad, device)
            logp = response_logprobs(policy, batch)                                    # (2B, R)
            chosen, rejected = logp.sum(dim=1).chunk(2)                                # (B,) each
            ref_chosen, ref_rejected = ref_logp[rows.to(device)].unbind(dim=1)         # (B,) each
            loss = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta, kind, label_smoothing)
            row = dict(loss=finite(loss, "DPO", "lower --dpo-lr or raise --dpo-beta"))
            rewards = [implicit_reward(*side, beta).detach() for side in ((chosen, ref_chosen), (rejected, ref_rejected))]
            margin = rewards[0] - rewards[1]                                           # (B,)
            if step == 0:
                off = margin.abs().max().item()
                canary(off < 1e-3, f"the margins are up to {off:.3g} before the first step, not 0: the reference is not the network that the policy "
                                   "started from, or its log-probs were computed with other padding")
                pads_are_inert(lambda batch: response_logprobs(policy, batch), batch)
            for group in optimizer.param_groups:
                group["lr"] = lr * min((step + 1) / (0.1 * steps + 1), 1 - step / steps)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            means = torch.stack([margin, (margin > 0).float(), chosen, rejected, *rewards]).mean(dim=1).tolist()
            row.update(zip(("margin", "accuracy", "chosen_logp", "rejected_logp", "chosen_reward", "rejected_reward"), means))
            right = (right + [row["accuracy"]])[-20:]
            bar.set_postfix(loss=f"{row['loss']:.3f}", margin=f"{row['margin']:.2f}", accuracy=f"{sum(right) / len(right):.2f}")
            log(step=step, epoch=epoch, **row)
            bar.update()
            step += 1
    bar.close()
