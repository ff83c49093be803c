"""
How good is a policy? The estimates behind every number of the report.

A policy is judged by sampling answers to held-out prompts. The best possible objective is known without any training:
the optimum of  E[score] - beta KL(pi || reference)  is the reference reweighted by exp(score / beta), so samples of the
reference are enough to estimate it.

Letters: M prompts, N samples (of a prompt), K opponents, G groups.
"""

import math
from typing import NamedTuple

import torch

from model import generate


class Optimum(NamedTuple):
    objective: float  # J*
    ess: float        # effective sample size of the reweighting


def optimum(scores, beta):
    """
    The largest value of  E[score] - beta KL(pi || reference)  over all policies: the value of the optimal policy
    (Rafailov et al. 2023, equation 4):

        J* = beta log mean exp(score / beta)        scores: N samples of the reference, any shape

    Trust it if the effective sample size (sum w)^2 / sum w^2 is 100 or more. Over many prompts it is an upper bound:
    reweighting also moves weight between prompts, which no policy can. Returns an Optimum. Raises ValueError for
    beta <= 0.
    """
    if beta <= 0:
        raise ValueError(f"beta must be above 0, got {beta}")
    x = scores.cpu().double().flatten() / beta  # on the CPU, because not every device has float64
    log_sum = x.logsumexp(0)
    ess = (2 * log_sum - (2 * x).logsumexp(0)).exp()
    return Optimum(beta * (log_sum.item() - math.log(len(x))), ess.item())


def gain_error(scores, beta, groups):
    """The standard error of optimum(scores, beta).objective - scores.mean(), for scores (M, N) and M prompts."""
    x = scores.cpu().double()
    weights = torch.softmax(x.flatten() / beta, dim=0).view_as(x) * x.numel()                 # (M, N) of mean 1
    return standard_error((beta * weights - x).mean(dim=1), groups)  # the delta method: to first order


def share_error(objectives, scores, beta, groups):
    """
    The standard error of a policy's share of the optimum, (J - J(ref)) / (J* - J(ref)), by the delta method.

    objectives (M,): score - beta KL of the policy's answer to each prompt. scores (M, N): of the reference's answers,
    for J(ref) and J*. All three have the same prompts, so their noise partly cancels. groups: see `standard_error`.
    """
    x = scores.cpu().double()
    weights = torch.softmax(x.flatten() / beta, dim=0).view_as(x) * x.numel()                 # (M, N) of mean 1
    start = x.mean(dim=1)                                                                     # (M,)
    gain = beta * weights.mean(dim=1) - start  # (M,) up to a constant
    total = optimum(scores, beta).objective - x.mean().item()
    share = (objectives.double().mean() - x.mean()) / total
    return standard_error(objectives.double() - start - share * gain, groups) / total


def optimum_mean(values, scores, beta):
    """The mean of any quantity under the optimal policy: over reference samples, weighted by exp(score / beta)."""
    weights = torch.softmax(scores.cpu().double().flatten() / beta, dim=0)
    return (weights * values.cpu().double().flatten()).sum().item()


def best_of_n(proxy, gold, n):
    """
    Unbiased mean gold of the best of n samples by proxy, from N >= n samples (Nakano et al. 2021, arXiv:2112.09332):

        sum over i of  C(i-1, n-1) / C(N, n) * gold of the i-th smallest proxy

    proxy, gold: (N,) or (M, N). Returns a scalar or (M,). Of equal proxies the later one counts as larger.
    ValueError unless 1 <= n <= N.
    """
    N = proxy.shape[-1]
    if not 1 <= n <= N:
        raise ValueError(f"best of {n} cannot be estimated from {N} samples")
    weights = [math.comb(i, n - 1) / math.comb(N, n) for i in range(N)]  # here i counts from 0
    order = proxy.cpu().argsort(dim=-1, stable=True)
    ranked_gold = gold.cpu().double().gather(-1, order)
    return (ranked_gold * torch.tensor(weights, dtype=torch.float64)).sum(dim=-1)


def best_of_n_kl(n):
    """
    An upper bound of the KL of best-of-n from the reference, nats: log n - (n-1)/n. It would be exact if all samples
    had different scores, but a response that is drawn twice ties with itself.
    """
    return math.log(n) - (n - 1) / n


def pass_at_k(passed, k):
    """
    Unbiased chance that at least one of k answers passes, from N >= k answers, 0 or 1 (Chen et al. 2021,
    arXiv:2107.03374, equation 1), with c of them passing:

        1 - C(N - c, k) / C(N, k)

    passed: (M, N). Returns (M,). The plain 1 - (1 - c / N)^k is too small.
    """
    N = passed.shape[-1]
    failed = (N - passed.sum(dim=-1)).int().tolist()
    return torch.tensor([1 - math.comb(n, k) / math.comb(N, k) for n in failed], dtype=torch.float64)


def frontier(scores, gold, beta):
    """
    The best score for each KL, from N samples of the reference for each of M prompts; scores, gold: (M, N).

    {"optimum": the optimal policies for many betas, the given one among them; "best_of_n": the best of 1, 2, 4, .. N
    by score}: lists of rows with score, gold (NaN if it is not known) and kl in nats. Betas with an effective sample
    size below 16 are left out.
    """
    betas = sorted({8 / 1.2 ** i for i in range(28)} | ({beta} if beta > 0 else set()))
    curve, bests = [], []
    for other in betas:
        J, ess = optimum(scores, other)
        score = optimum_mean(scores, scores, other)
        if ess >= 16:
            curve.append(dict(beta=other, score=score, gold=optimum_mean(gold, scores, other),
                              kl=(score - J) / other, ess=ess))
    N = scores.shape[1]
    for n in sorted({2 ** i for i in range(N.bit_length())} | {N}):
        score, best_gold = best_of_n(scores, scores, n).mean().item(), best_of_n(scores, gold, n).mean().item()
        bests.append(dict(n=n, score=score, gold=best_gold, kl=best_of_n_kl(n)))
    return dict(optimum=curve, best_of_n=bests)


def wins(a, b):
    """1 where a > b, one half where they tie, else 0. (M, 1) against (M, K) compares each of M with its K, (M, K)."""
    return (a > b).float() + 0.5 * (a == b).float()


def standard_error(x, groups=None):
    """
    The standard error of the mean of samples x (N,); 0 for a single sample.

    groups: what each sample belongs to, N hashables. Answers to one prompt are alike, so the residuals of a group are
    added up before they are squared (the cluster-robust error): an answer repeated k times is one sample. With a single
    group the samples are taken as independent.
    """
    sums = {}
    for group, residual in zip(groups or (), (x - x.mean()).tolist()):
        sums[group] = sums.get(group, 0.0) + residual
    G = len(sums)
    if 1 < G < len(x):
        return math.sqrt(G / (G - 1) * sum(residual ** 2 for residual in sums.values())) / len(x)
    return x.std(correction=1).item() / math.sqrt(len(x)) if len(x) > 1 else 0.0


def sample_policy(policy, prompts, max_new_tokens, temperature, seed, size=256):
    """Answer all prompts (lists of ids). A generator: it yields a Rollout of at most `size` rows at a time."""
    sampler = torch.Generator(policy.device).manual_seed(seed)
    for at in range(0, len(prompts), size):
        yield generate(policy, prompts[at:at + size], max_new_tokens, temperature, sampler)


# ---- does a reward model know how sure it is? -----------------------------------------------------

def reliability(confidence, right, bins=10):
    """
    Compare how sure a reward model is with how often it is right: (rows, expected calibration error).

    confidence (N,): its probability of the response that it prefers, in [0.5, 1]. right (N,): 1 where that one was
    preferred, else 0. Each bin of equal width is a row of its mean confidence, its accuracy and its number n of pairs;
    empty bins are left out. The error is the mean over pairs of |accuracy - confidence| of their bin (Guo et al. 2017,
    arXiv:1706.04599).
    """
    places = ((confidence - 0.5) * 2 * bins).long().clamp(0, bins - 1)                        # (N,)
    rows = [dict(confidence=confidence[places == i].mean().item(), accuracy=right[places == i].mean().item(),
                 n=int((places == i).sum())) for i in range(bins) if (places == i).any()]
    error = sum(row["n"] * abs(row["accuracy"] - row["confidence"]) for row in rows) / len(confidence)
    return rows, error


def spread_and_error(mean, spread, gold):
    """
    Whether the spread of several opinions knows where they are wrong; mean, spread and gold: (N,), in one unit.

    A dict of correlation: Pearson's, of the spread and the error |mean - gold|, NaN if one of them is constant; and of
    coverage: the share of responses with gold within two spreads of the mean, 0.95 for a calibrated Gaussian.
    """
    errors = (mean - gold).abs()
    return dict(correlation=torch.corrcoef(torch.stack([spread, errors]))[0, 1].item(),
                coverage=(errors <= 2 * spread).float().mean().item())
