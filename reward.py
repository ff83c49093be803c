"""
The reward model: what people prefer, as a number that can be maximised.

A reward model is the SFT network with its output matrix replaced by one vector: it reads prompt and response and says a scalar at the last token.
It never sees a score, only which of two responses to a prompt was preferred; Bradley-Terry turns differences of scores into probabilities of
preference. So only differences mean anything: training leaves the offset free and the scale to the labels' noise, and `normalise` fixes both
before a policy is trained on it.

The Bayesian view ('RLHF Deciphered', arXiv:2404.08555, section 2.1): Pr(phi | labels) is proportional to Pr(labels | R_phi) Pr(phi). Bradley-Terry is
the likelihood; weight decay is a Gaussian prior on the parameters; minimising their sum finds the posterior's mode and says nothing of its width.

That width is what reward hacking lives on: where there were no labels a score is a guess. The last section asks for k opinions instead of one, of k
networks (ensembles) or of k heads on one network that say how sure they are (BRME).

Left out: K-wise rankings (pairs are K = 2), the centring penalty on scores (normalising does it once and exactly).

Letters: B batch, P prompt columns, R response columns, T = P + R, C embedding, k members of an ensemble or heads.
"""

import copy

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from data import collate, minibatches
from evaluate import finite, pads_are_inert, win_rate
from model import response_hidden, spread


def last_hidden(trunk, batch):
    """The hidden state that has read prompt and response, (B, C)."""
    last = batch.P + batch.response_lens - 1                                                   # (B,) from lengths: E included, pads never
    wanted = torch.arange(batch.ids.shape[1], device=last.device) == last[:, None]             # (B, T), one True in each row
    return trunk.hidden(batch.ids, batch.prompt_lens, batch.response_lens, batch.P, wanted)    # (B, C)


class RewardModel(nn.Module):
    """RewardModel(trunk)(batch) -> scores (B,): one scalar for each response, read at its last real token, in units of `std` around `mean`."""

    def __init__(self, trunk):
        super().__init__()
        self.trunk = copy.deepcopy(trunk)
        C = trunk.config.n_embd
        self.score = nn.Linear(C, 1)
        nn.init.normal_(self.score.weight, std=(C + 1) ** -0.5)  # scores of the untrained model have a spread of about 1
        nn.init.zeros_(self.score.bias)
        self.register_buffer("mean", torch.zeros(()))  # buffers, so that a checkpoint carries its normalisation with it
        self.register_buffer("std", torch.ones(()))

    def forward(self, batch):
        return self._scale(last_hidden(self.trunk, batch))                                     # (B,)

    def values(self, batch):
        """
        The same network as a critic: V(s_t) for the state before each response token, (B, R), zeros outside the mask.

        The slice is the log-probs' own, so the value of a state never sees the action that is taken in it.
        """
        return spread(self._scale(response_hidden(self.trunk, batch)), batch.mask)             # (B, R)

    def _scale(self, x):
        return (self.score(x).squeeze(-1).float() - self.mean) / self.std


def bradley_terry_loss(r_chosen, r_rejected, margin=0.0):
    """
    -log sigmoid(r_chosen - r_rejected - margin), in nats, mean over pairs ('RLHF Deciphered', section 4.2; InstructGPT, equation 1).

    r_chosen, r_rejected: scores (B,). The sum of a constant and both scores changes nothing. Finite for any finite scores: a difference of -100
    costs 100 nats.
    """
    return -F.logsigmoid(r_chosen - r_rejected - margin).mean()


def rating_loss(scores, ratings):
    """Mean squared error, scores and ratings (B,): the other way to fit a reward ('RLHF Deciphered', section 4.2). ValueError for unequal shapes."""
    if scores.shape != ratings.shape:
        raise ValueError(f"every score has a rating, got shapes {tuple(scores.shape)} and {tuple(ratings.shape)}")
    return (scores - ratings).square().mean()


def contrastive(scores, baseline):
    """
    Scores (B,) minus the mean score of k reference responses to the same prompt, baseline (B, k) (Shen et al. 2024, arXiv:2403.07708).

    What is subtracted depends on the prompt alone, so no prompt's optimal policy changes, and its J* falls by as much. It acts across prompts: a hard
    prompt no longer looks like a bad response to the critic and the whitening. Raises ValueError unless every score has a row of the baseline.
    """
    if baseline.dim() != 2 or len(baseline) != len(scores):
        raise ValueError(f"the baseline has k scores for each of {len(scores)} prompts, got shape {tuple(baseline.shape)}")
    return scores - baseline.mean(dim=1)


@torch.no_grad()
def score_batches(reward_model, batches):
    """Scores of the responses of several batches, one after another (B,)."""
    return torch.cat([reward_model(batch) for batch in batches])


def normalise(reward_model, batches):
    """Set `mean` and `std` so that the scores of these responses (samples of the reference policy) have mean 0 and standard deviation 1."""
    reward_model.mean.zero_()
    reward_model.std.fill_(1.0)
    scores = score_batches(reward_model, batches)
    reward_model.mean.copy_(scores.mean())
    reward_model.std.copy_(scores.std(correction=0).clamp(min=1e-6))


def collate_pairs(pairs, pad, device="cpu"):
    """Pairs of token ids -> one Batch of 2B rows, the chosen responses first: both sides in one forward pass, with the same padding."""
    prompts = [pair["prompt"] for pair in pairs]
    return collate(prompts + prompts, [pair["chosen"] for pair in pairs] + [pair["rejected"] for pair in pairs], pad, device)


def score_pairs(reward_model, pairs, pad, device="cpu", size=128):
    """Scores of the chosen and of the rejected responses, (B,) each."""
    batches = [collate_pairs(pairs[at:at + size], pad, device) for at in range(0, len(pairs), size)]
    sides = [scores.chunk(2) for scores in score_batches(reward_model, batches).split([len(batch) for batch in batches])]
    return torch.cat([chosen for chosen, _ in sides]), torch.cat([rejected for _, rejected in sides])


def train_reward_model(reward_model, pairs, pad, epochs=2, batch_size=64, lr=5e-4, weight_decay=0.1, seed=0, loss="bradley_terry",
                       log=lambda **row: None):
    """
    Fit a reward model to pairs of token ids, in place, by the loss "bradley_terry", or "ratings", for which each pair's "gold" is its two ratings.

    The learning rate falls linearly to 0. `log` is called once a step with the loss (nats, or ratings squared) and the share of the batch's pairs
    that the model orders right before it learns from them. Raises CanaryError when the loss is not finite, ValueError for another one or no ratings.
    """
    rated = loss == "ratings"
    if loss not in ("bradley_terry", "ratings") or rated and not all("gold" in pair for pair in pairs):
        raise ValueError(f'the loss is "bradley_terry", or "ratings" of pairs with "gold": [of chosen, of rejected], got {loss!r}')
    device = reward_model.score.weight.device
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(reward_model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True)
    steps = epochs * -(-len(pairs) // batch_size)
    bar = tqdm(total=steps, desc="reward model", unit="step", dynamic_ncols=True)
    step, right = 0, []
    for epoch in range(epochs):
        for rows in minibatches(len(pairs), batch_size, generator):
            picked = [pairs[row] for row in rows.tolist()]
            batch = collate_pairs(picked, pad, device)
            if step == 0:
                pads_are_inert(reward_model, batch)
            scores = reward_model(batch)                                                       # (2B,)
            r_chosen, r_rejected = scores.chunk(2)                                             # (B,) each
            if rated:
                loss = rating_loss(scores, torch.tensor([pair["gold"] for pair in picked], device=device).T.flatten())  # (2B,) chosen first
            else:
                loss = bradley_terry_loss(r_chosen, r_rejected)
            row = dict(loss=finite(loss, "reward model's", "lower --reward-lr"))
            optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(reward_model.parameters(), 1.0)
            optimizer.step()
            right = (right + [win_rate(r_chosen, r_rejected)])[-20:]
            bar.set_postfix(loss=f"{row['loss']:.3f}", accuracy=f"{sum(right) / len(right):.2f}")
            log(step=step, epoch=epoch, **row, accuracy=right[-1])
            bar.update()
            step += 1
    bar.close()


# ---------------------------------------------------------------------------------------------------------------------
# more than one opinion: ensembles (Coste et al. 2024, arXiv:2310.02743), Bayesian reward model ensembles (BRME, Yan et al. 2024, arXiv:2409.15360)

def aggregate(scores, how, lam=0.5):
    """
    One score of each response from those of k members, (k, B) -> (B,) (Coste et al. 2024):

        mean  m = 1/k sum_i r_i
        wco   min_i r_i                                    worst case
        uwo   m - lam 1/k sum_i (r_i - m)^2                mean minus the population variance: what the members dispute is worth less

    Raises ValueError for another `how`, or a negative lam.
    """
    if how not in ("mean", "wco", "uwo") or lam < 0:
        raise ValueError(f"scores are aggregated by mean, wco or uwo with lam at least 0, got {how!r} with {lam}")
    if how == "wco":
        return scores.amin(dim=0)
    mean = scores.mean(dim=0)
    return mean if how == "mean" else mean - lam * scores.var(dim=0, correction=0)


class Ensemble(nn.Module):
    """
    Ensemble(members, how, lam)(batch) -> scores (B,), in the place of a reward model, but with no `values`: give train_ppo a critic.

    `normalise` each member before, or the variance is that of their offsets. An error that the pairs force on all members stays.
    """

    def __init__(self, members, how="mean", lam=0.5):
        super().__init__()
        self.members, self.how, self.lam = nn.ModuleList(members), how, lam

    def member_scores(self, batch):
        return torch.stack([member(batch) for member in self.members])                         # (k, B)

    def forward(self, batch):
        return aggregate(self.member_scores(batch), self.how, self.lam)                        # (B,)


def train_ensemble(trunk, pairs, pad, k=5, seed=0, log=lambda **row: None, **settings):
    """
    A list of k reward models, trained on the same pairs from heads and in orders of their own. The rest goes to train_reward_model; a logged row says
    which member it is of. Ensembles of one size and different seeds share no member.
    """
    members = []
    for i in range(k):
        with torch.random.fork_rng():  # the caller's random numbers go on as if nothing had been drawn
            torch.manual_seed(k * seed + i)
            members.append(RewardModel(trunk).to(trunk.wte.weight).requires_grad_(True))
        train_reward_model(members[i], pairs, pad, seed=k * seed + i, log=lambda i=i, **row: log(member=i, **row), **settings)
    return members


class GaussianHeads(nn.Module):
    """GaussianHeads(trunk, k)(batch) -> means, stds, (k, B) each: a Gaussian of the reward from every head. A frozen trunk stays frozen."""

    def __init__(self, trunk, k):
        super().__init__()
        self.trunk = copy.deepcopy(trunk)
        C = trunk.config.n_embd
        self.heads = nn.Linear(C, 2 * k)
        nn.init.normal_(self.heads.weight, std=(C + 1) ** -0.5)
        nn.init.zeros_(self.heads.bias)

    def forward(self, batch):
        means, raw = self.heads(last_hidden(self.trunk, batch)).float().T.chunk(2)             # (k, B) each
        return means, F.softplus(raw) + 1e-4  # a std of 0 would make the likelihood infinite


def brme_loss(means, stds, target, noise):
    """
    The paper's loss: mean squared error of sampled rewards, mean + std * noise, against the maximum-likelihood reward. (k, B) each, target (B,).

    The trap: E over noise ~ N(0, 1) is (mean - target)^2 + std^2, so MSE drives every std to 0, however wrong its mean is. The std then tells how
    long a head was trained and not how sure it is; `gaussian_nll` does.
    """
    return (means + stds * noise - target).square().mean()


def gaussian_nll(means, stds, target):
    """
    0.5 ((target - mean) / std)^2 + log std, in nats, mean over heads and responses; means, stds (k, B), target (B,).

    It is -log N(target; mean, std^2) without its constant, and lowest where std^2 is the mean squared error.
    """
    return (0.5 * ((target - means) / stds).square() + stds.log()).mean()


def train_brme(heads, reward_model, pairs, pad, loss="mse", share=0.6, epochs=2, batch_size=64, lr=5e-4, weight_decay=0.1, seed=0,
               log=lambda **row: None):
    """
    The second stage: fit the heads, in place, to a trained and normalised reward model's scores of the pairs; loss "mse" (the paper's) or "nll".

    Every head learns from its own random `share` of the pairs, and every pair teaches at least one head. The learning rate falls linearly to 0. `log`
    is called once a step with the loss, the mean std, and the root mean squared error of the means, in units of the score. Raises CanaryError when
    the loss is not finite, ValueError for another loss or a share outside (0, 1].
    """
    if loss not in ("mse", "nll") or not 0 < share <= 1:
        raise ValueError(f'heads are trained with loss "mse" or "nll" on a share in (0, 1], got {loss!r} and {share}')
    sampled, device = loss == "mse", heads.heads.weight.device
    k, generator = heads.heads.out_features // 2, torch.Generator().manual_seed(seed)
    targets = torch.stack(score_pairs(reward_model, pairs, pad, device))                       # (2, pairs)
    learns = torch.rand(k, len(pairs), generator=generator) < share                            # (k, pairs)
    learns[torch.randint(k, (len(pairs),), generator=generator), torch.arange(len(pairs))] = True
    optimizer = torch.optim.AdamW(heads.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True)
    order = [(epoch, rows) for epoch in range(epochs) for rows in minibatches(len(pairs), batch_size, generator)]
    bar = tqdm(order, desc="heads", unit="step", dynamic_ncols=True)
    for step, (epoch, rows) in enumerate(bar):
        batch = collate_pairs([pairs[row] for row in rows.tolist()], pad, device)
        if step == 0:
            pads_are_inert(lambda batch: torch.stack(heads(batch)), batch)
        means, stds = heads(batch)                                                             # (k, 2B) each
        noise = torch.randn(means.shape, generator=generator).to(device)                       # (k, 2B)
        mine = learns[:, rows].repeat(1, 2).to(device)                                         # (k, 2B) both responses of a pair
        means, stds, noise = means[mine], stds[mine], noise[mine]                              # (n,) each, what is learned from
        target = targets[:, rows.to(device)].flatten().expand_as(mine)[mine]                   # (n,)
        loss = brme_loss(means, stds, target, noise) if sampled else gaussian_nll(means, stds, target)
        row = dict(loss=finite(loss, "heads'", "lower lr"))
        optimizer.param_groups[0]["lr"] = lr * (1 - step / len(order))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(heads.parameters(), 1.0)
        optimizer.step()
        row.update(std=stds.mean().item(), error=(means - target).square().mean().sqrt().item())
        bar.set_postfix({name: f"{value:.3f}" for name, value in row.items()})
        log(step=step, epoch=epoch, **row)


def nominal(means, stds):
    """For each response the mean of the head that is surest of it, that with the lowest std: (k, B) each -> (B,)."""
    return means.gather(0, stds.argmin(dim=0, keepdim=True)).squeeze(0)


def robust_reward(means, stds, lam):
    """
    lam * nominal + (1 - lam) * min over heads of the means, (k, B) each -> (B,): 1 trusts the surest head, 0 the most pessimistic (Yan et al. 2024).

    The paper's worst case is one head for all responses, min_i E[r_i]; here every response has its own, E[min_i r_i], which is never higher, and is a
    reward that PPO can be given. Raises ValueError for lam outside [0, 1].
    """
    if not 0 <= lam <= 1:
        raise ValueError(f"lam is between 0 and 1, got {lam}")
    return lam * nominal(means, stds) + (1 - lam) * means.amin(dim=0)


class RobustReward(nn.Module):
    """RobustReward(heads, lam)(batch) -> scores (B,), in the place of a reward model, but with no `values`: give train_ppo a critic."""

    def __init__(self, heads, lam):
        super().__init__()
        self.heads, self.lam = heads, lam

    def forward(self, batch):
        return robust_reward(*self.heads(batch), self.lam)                                     # (B,)
