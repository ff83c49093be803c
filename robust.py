"""
More than one opinion: a reward that knows where it is unsure.

One reward model is wrong where it has seen no labels, and a policy finds these places. Models that were trained apart
agree where there were labels and differ elsewhere. `RobustReward` asks k of them, and mixes what they expect with the
worst that they fear:

    score = lambda * nominal + (1 - lambda) * worst

    kind        nominal                             worst
    ensemble    the mean of k reward models         their minimum, WCO              Coste et al. 2024, arXiv:2310.02743
    uwo         the same                            the mean minus the variance     the same paper
    brme        the mean of the head with the       the lowest of the heads' means  Yan et al. 2024, arXiv:2409.15360
                smallest standard deviation

For uwo, 1 - lambda is the paper's coefficient of the variance. With lambda 1 an ensemble is its mean. brme, a Bayesian
reward model ensemble, has heads that each give a mean and a standard deviation, fitted to one trained reward model. In
the paper they share one network. Heads on one trunk do not disagree: nominal and worst then correlate by 0.998, so
lambda changes nothing. So each head has its own network here, and its last block is drawn again.

No kind sees an error that all members share. `python -m studies robust` tries them.

Letters: B batch, C embedding, k members, n samples.
"""

import math
import random
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from checks import check_padding, check_trains, finite, load_parts
from data import collate_pairs, minibatches
from reward import RewardModel, last_hidden, normalise, score_pairs, train_reward_model

KINDS = ("ensemble", "uwo", "brme")


@dataclass
class RobustConfig:
    reward_model: str = "single"  # what gives the score: single, ensemble, uwo or brme
    robust_lambda: float = 0.5    # weight of the nominal reward; the rest is the weight of the worst case
    members: int = 5              # reward models of an ensemble, heads of brme
    head_share: float = 0.6       # share of the pairs that a head of brme learns from


# ---- the reward -----------------------------------------------------------------------------------

def two_opinions(kind, means, stds=None):
    """
    What the members expect and what they fear: means, and for brme stds, (k, B) each -> nominal and worst, (2, B).

    The paper of brme takes one worst head for all responses together, min_i E[r_i]. Here each response has its own,
    E[min_i r_i], which is never higher and is a reward that PPO can be given.
    """
    if kind == "brme":
        surest = stds.argmin(dim=0, keepdim=True)                                             # (1, B)
        return torch.stack([means.gather(0, surest)[0], means.amin(dim=0)])
    mean = means.mean(dim=0)                                                                  # (B,)
    worst = means.amin(dim=0) if kind == "ensemble" else mean - means.var(dim=0, correction=0)
    return torch.stack([mean, worst])


class RobustReward(nn.Module):
    """RobustReward(members, kind, lam)(batch) -> scores (B,). `normalise_robust` gives it mean and deviation."""

    def __init__(self, members, kind, lam):
        super().__init__()
        if kind not in KINDS or not 0 <= lam <= 1:
            raise ValueError(f"a kind of {', '.join(KINDS)} and lambda in [0, 1] are needed, got {kind!r} and {lam}")
        self.members = nn.ModuleList(members)
        self.kind, self.lam, self.pad = kind, lam, members[0].pad
        self.register_buffer("mean", torch.zeros(2))         # of the two opinions
        self.register_buffer("covariance", torch.ones(2, 2))  # of the two; with ones, scores are as they were mixed

    @property
    def device(self):
        return self.mean.device

    def answers(self, batch):
        """Each member's scores, (k, B), and for brme their standard deviations, (k, B), else None."""
        answers = [member(batch) for member in self.members]
        if self.kind == "brme":
            return tuple(torch.stack(side) for side in zip(*answers))
        return torch.stack(answers), None

    def spread(self, batch):
        """How far the members disagree: the population deviation of their scores of each response, (B,)."""
        return self.answers(batch)[0].std(dim=0, correction=0)

    def forward(self, batch):
        opinions = two_opinions(self.kind, *self.answers(batch))                              # (2, B)
        weights = torch.tensor([self.lam, 1 - self.lam], device=opinions.device)              # (2,)
        # the deviation of the mixture, for any lambda: else a lambda would also change what a nat of KL costs
        std = (weights @ self.covariance @ weights).sqrt().clamp(min=1e-6)
        return weights @ (opinions - self.mean[:, None]) / std


@torch.no_grad()
def normalise_robust(reward, batches):
    """
    Give the scores mean 0 and population deviation 1 on these responses (samples of the reference), for every lambda.

    The members of an ensemble are normalised first: raw scores have any offset. Heads of brme learned normalised ones.
    """
    batches = list(batches)
    if reward.kind != "brme":
        for member in reward.members:
            normalise(member, batches)
    opinions = [two_opinions(reward.kind, *reward.answers(batch)) for batch in batches]
    opinions = torch.cat(opinions, dim=1).double()                                            # (2, n)
    reward.mean.copy_(opinions.mean(dim=1))
    reward.covariance.copy_(torch.cov(opinions, correction=0))


# ---- the members ----------------------------------------------------------------------------------

class GaussianReward(RewardModel):
    """GaussianReward(trunk)(batch) -> mean, std, (B,) each: a head of brme, a Gaussian of the reward."""

    def __init__(self, trunk):
        super().__init__(trunk)
        self.deviation = nn.Linear(trunk.width, 1)
        nn.init.normal_(self.deviation.weight, std=(trunk.width + 1) ** -0.5)
        nn.init.zeros_(self.deviation.bias)

    def forward(self, batch):
        x = last_hidden(self.trunk, batch)                                                    # (B, C)
        std = F.softplus(self.deviation(x)[:, 0].float()) + 1e-4  # a std of 0 would make the likelihood infinite
        return self.scale(x), std


def make_members(trunk, kind, k, seed):
    """k untrained members (a list), which differ in their score layer and in their last block, both drawn again."""
    members = []
    for i in range(k):
        with torch.random.fork_rng():  # the caller's random numbers stay as they were
            torch.manual_seed(k * seed + i)
            member = (GaussianReward if kind == "brme" else RewardModel)(trunk).to(trunk.device)
            for weight in member.trunk.h[-1].parameters():
                if weight.dim() == 2:
                    nn.init.normal_(weight, std=0.02)
        members.append(member.requires_grad_(True))
    return members


def member_pairs(pairs, kind, config, seed):
    """The pairs that each member learns from: all of them, or for brme a random share, another one for each head."""
    if kind != "brme":
        return [pairs] * config.members
    rng, n = random.Random(seed), math.ceil(config.head_share * len(pairs))
    return [rng.sample(pairs, n) for _ in range(config.members)]


def gaussian_nll(means, stds, target):
    """
    0.5 ((target - mean) / std)^2 + log std, in nats, the mean over all entries; all of one shape.

    This is -log N(target; mean, std^2) without its constant. It is lowest where std^2 is the mean squared error. The
    paper of brme has the squared error of a sampled reward, (mean + std * noise - target)^2. Over the noise its
    expectation is (mean - target)^2 + std^2, lowest at std = 0 however wrong the mean is: a trap.
    """
    return (0.5 * ((target - means) / stds).square() + stds.log()).mean()


def train_head(head, reward_model, pairs, config, seed, checkpoint=None):
    """
    Fit a head of brme, in place, to the scores that a trained and normalised reward model gives to the pairs.

    A generator: it yields (metrics, parts) after each step: the loss in nats. Raises CanaryError when a canary fails.
    """
    targets = score_pairs(reward_model, pairs)                                                # (2, pairs)
    shuffle = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(head.parameters(), betas=(0.9, 0.95), weight_decay=config.weight_decay, fused=True)
    check_trains("head", head, config.reward_lr)
    batches = minibatches(len(pairs), config.reward_batch, config.reward_epochs, shuffle)
    parts = dict(reward_model=head, optimizer=optimizer)
    for step in range(load_parts(parts, checkpoint), len(batches)):
        # 1. responses of both kinds: whether one was chosen does not matter here, only what the model says of it
        rows = batches[step]                                                                  # (B,)
        batch = collate_pairs([pairs[row] for row in rows.tolist()], head.pad, head.device)
        if step == 0:
            check_padding(lambda batch: torch.stack(head(batch)), batch)

        # 2. the likelihood of its scores, and a step
        means, stds = head(batch)                                                             # (2B,) each
        target = targets[:, rows.to(head.device)].flatten()                                   # (2B,)
        loss = gaussian_nll(means, stds, target)
        value = finite(loss, "head's", "lower reward_lr")
        optimizer.param_groups[0]["lr"] = config.reward_lr * (1 - step / len(batches))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(head.parameters(), 1.0)  # divided by a small std, one error would outweigh a batch
        optimizer.step()
        yield dict(step=step, loss=value, tokens=batch.tokens), parts


def steps_of(shares, config):
    """The steps in which each member learns from its share of the pairs, a list."""
    return [config.reward_epochs * math.ceil(len(share) / config.reward_batch) for share in shares]


def train_members(members, shares, config, seed, reward_model=None, checkpoint=None):
    """
    Train all members, in place, one after another, each on its share of the pairs and in its own order.

    reward_model: for brme, the trained model that the heads are fitted to. A generator: it yields (metrics, parts)
    after each step, with the number of the member. The steps of all members are counted through.
    """
    # a checkpoint holds all members, those that are trained already too
    everyone, steps = nn.ModuleList(members), steps_of(shares, config)
    begin = load_parts(dict(members=everyone), checkpoint)
    for i, (member, share) in enumerate(zip(members, shares, strict=True)):
        before = sum(steps[:i])
        if begin >= before + steps[i]:
            continue  # trained before the checkpoint
        inner = dict(checkpoint, step=begin - before) if begin > before else None
        if reward_model is None:
            loop = train_reward_model(member, share, config, len(members) * seed + i, inner)
        else:
            loop = train_head(member, reward_model, share, config, len(members) * seed + i, inner)
        for metrics, parts in loop:
            yield dict(metrics, member=i, step=before + metrics["step"]), dict(parts, members=everyone)
