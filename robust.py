"""
More than one opinion: rewards that know where they are unsure.

One reward model is wrong where it has seen no labels, and a policy finds these places. Models that were trained apart
agree where there were labels and differ elsewhere. Two ways to use that:

    ensembles  k reward models; score by their mean, their minimum, or their mean minus their variance
               (Coste et al. 2024, arXiv:2310.02743)
    BRME       Bayesian reward model ensemble: k heads on one network, each with a mean and a standard deviation; score
               by a mixture of the surest head and of the most pessimistic one (Yan et al. 2024, arXiv:2409.15360)

`Ensemble` and `RobustReward` take the place of a reward model in train_ppo. They have no `values`, so the critic must
come from elsewhere. No method here sees an error that all members share. `python -m studies robust` tries it.

Letters: B batch, C embedding, k members or heads, n scores that heads learn from.
"""

import copy

import torch
import torch.nn as nn
import torch.nn.functional as F

from checks import check_padding, check_trains, finite, load_parts
from data import collate_pairs, minibatches
from reward import RewardModel, last_hidden, score_pairs, train_reward_model

# ---- ensembles ------------------------------------------------------------------------------------

def aggregate(scores, how, lam=0.5):
    """
    Turn the scores of k members (k, B) into one score per response (B,) (Coste et al. 2024):

        mean  m = 1/k sum_i r_i
        wco   min_i r_i                                   the worst case
        uwo   m - lam 1/k sum_i (r_i - m)^2               the mean minus the population variance

    Raises ValueError for another `how` or a negative lam.
    """
    if how not in ("mean", "wco", "uwo") or lam < 0:
        raise ValueError(f"scores are aggregated by mean, wco or uwo with lam at least 0, got {how!r} with {lam}")
    if how == "wco":
        return scores.amin(dim=0)
    mean = scores.mean(dim=0)
    if how == "mean":
        return mean
    return mean - lam * scores.var(dim=0, correction=0)


class Ensemble(nn.Module):
    """Ensemble(members, how, lam)(batch) -> scores (B,). Normalise the members first: raw scores have any offset."""

    def __init__(self, members, how="mean", lam=0.5):
        super().__init__()
        self.members = nn.ModuleList(members)
        self.how = how
        self.lam = lam

    def forward(self, batch):
        scores = torch.stack([member(batch) for member in self.members])                      # (k, B)
        return aggregate(scores, self.how, self.lam)


def make_members(trunk, k, seed):
    """k untrained reward models (a list) that differ in the first score layer."""
    members = []
    for i in range(k):
        with torch.random.fork_rng():  # the caller's random numbers stay as they were
            torch.manual_seed(k * seed + i)
            members.append(RewardModel(trunk).to(trunk.device).requires_grad_(True))
    return members


def train_ensemble(members, pairs, config, seed):
    """
    Train all members, in place, on the same pairs, each in another order. Ensembles of other seeds share no order.

    A generator: it yields (metrics, parts) after each step, with the number of the member in the metrics.
    """
    for i, member in enumerate(members):
        for metrics, parts in train_reward_model(member, pairs, config, len(members) * seed + i):
            yield dict(member=i, **metrics), parts


# ---- BRME -----------------------------------------------------------------------------------------

class GaussianHeads(nn.Module):
    """GaussianHeads(trunk, k)(batch) -> means, stds, (k, B) each: from every head a Gaussian of the reward."""

    def __init__(self, trunk, k):
        super().__init__()
        self.trunk = copy.deepcopy(trunk)
        C = trunk.width
        self.heads = nn.Linear(C, 2 * k)
        nn.init.normal_(self.heads.weight, std=(C + 1) ** -0.5)
        nn.init.zeros_(self.heads.bias)

    def forward(self, batch):
        outputs = self.heads(last_hidden(self.trunk, batch)).float()                          # (B, 2k)
        means, raw = outputs.T.chunk(2)                                                       # (k, B) each
        return means, F.softplus(raw) + 1e-4  # a std of 0 would make the likelihood infinite


def brme_loss(means, stds, target, noise):
    """
    The paper's loss: mean squared error of sampled rewards, mean + std * noise; all of one shape.

    Its trap: over noise ~ N(0, 1) its expectation is (mean - target)^2 + std^2, which is lowest at std = 0, however
    wrong the mean is. The std then says how long a head was trained, not how sure it is. `gaussian_nll` corrects that.
    """
    return (means + stds * noise - target).square().mean()


def gaussian_nll(means, stds, target):
    """
    0.5 ((target - mean) / std)^2 + log std, in nats, the mean over all entries; all of one shape.

    This is -log N(target; mean, std^2) without its constant. It is lowest where std^2 is the mean squared error.
    """
    return (0.5 * ((target - means) / stds).square() + stds.log()).mean()


def train_brme(heads, reward_model, pairs, kind, share, config, seed, checkpoint=None):
    """
    Fit the heads, in place, to the scores that a trained and normalised reward model gives to the pairs.

    kind: "mse" (the paper's loss) or "nll". Each head learns from its own random `share` of the pairs, and each pair
    teaches at least one head. A generator: it yields (metrics, parts) after each step: the loss, the mean std and the
    root mean squared error of the means, in units of the score. Raises CanaryError when the loss is not finite,
    ValueError for another kind or share.
    """
    if kind not in ("mse", "nll") or not 0 < share <= 1:
        raise ValueError(f'heads are trained with "mse" or "nll" on a share in (0, 1], got {kind!r} and {share}')
    device, pad = heads.heads.weight.device, heads.trunk.pad
    k = heads.heads.out_features // 2
    generator = torch.Generator().manual_seed(seed)
    targets = torch.stack(score_pairs(reward_model, pairs))                                   # (2, pairs)
    learns = torch.rand(k, len(pairs), generator=generator) < share                           # (k, pairs)
    one_head = torch.randint(k, (len(pairs),), generator=generator)                           # (pairs,)
    learns[one_head, torch.arange(len(pairs))] = True
    optimizer = torch.optim.AdamW(heads.parameters(), betas=(0.9, 0.95), weight_decay=config.weight_decay, fused=True)
    check_trains("heads", heads, optimizer, config.reward_lr)
    batches = minibatches(len(pairs), config.reward_batch, config.reward_epochs, generator)
    parts = dict(heads=heads, optimizer=optimizer, generator=generator)
    for step in range(load_parts(parts, checkpoint), len(batches)):
        # 1. the Gaussians of all heads, and the noise of the paper's loss
        rows = batches[step]                                                                  # (B,)
        batch = collate_pairs([pairs[row] for row in rows.tolist()], pad, device)
        if step == 0:
            check_padding(lambda batch: torch.stack(heads(batch)), batch)
        means, stds = heads(batch)                                                            # (k, 2B) each
        noise = torch.randn(means.shape, generator=generator).to(device)                      # (k, 2B)
        target = targets[:, rows.to(device)].flatten().expand_as(means)                       # (k, 2B)

        # 2. each head sees only its own pairs
        taught = learns[:, rows].repeat(1, 2).to(device)                                      # (k, 2B)
        means, stds = means[taught], stds[taught]                                             # (n,) each
        noise, target = noise[taught], target[taught]                                         # (n,) each
        loss = brme_loss(means, stds, target, noise) if kind == "mse" else gaussian_nll(means, stds, target)
        value = finite(loss, "heads'", "lower the learning rate")

        # 3. a step
        optimizer.param_groups[0]["lr"] = config.reward_lr * (1 - step / len(batches))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(heads.parameters(), 1.0)
        optimizer.step()
        error = (means - target).square().mean().sqrt()
        yield dict(step=step, loss=value, std=stds.mean().item(), error=error.item()), parts


def nominal(means, stds):
    """For each response the mean of the surest head, the one with the smallest std: (k, B) each -> (B,)."""
    surest = stds.argmin(dim=0, keepdim=True)                                                 # (1, B)
    return means.gather(0, surest)[0]


def robust_reward(means, stds, lam):
    """
    lam * nominal + (1 - lam) * min over heads of the means: (k, B) each -> (B,) (Yan et al. 2024).

    lam = 1 trusts the surest head, lam = 0 the most pessimistic one. The paper takes the worst head for all responses
    together, min_i E[r_i]. Here each response has its own worst head, E[min_i r_i], which is never higher and is a
    reward that PPO can be given. Raises ValueError for lam outside [0, 1].
    """
    if not 0 <= lam <= 1:
        raise ValueError(f"lam must be between 0 and 1, got {lam}")
    return lam * nominal(means, stds) + (1 - lam) * means.amin(dim=0)


class RobustReward(nn.Module):
    """RobustReward(heads, lam)(batch) -> scores (B,)."""

    def __init__(self, heads, lam):
        super().__init__()
        self.heads = heads
        self.lam = lam

    def forward(self, batch):
        means, stds = self.heads(batch)                                                       # (k, B) each
        return robust_reward(means, stds, self.lam)
