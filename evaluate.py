"""
How good is a policy? The estimates behind every number of the report.

A policy is judged by sampling answers to held-out prompts. The best possible objective is known without any training:
the optimum of  E[score] - beta KL(pi || reference)  is the reference reweighted by exp(score / beta), so samples of the
reference are enough to estimate it.

Letters: M prompts, N samples of a prompt, K opponents.
"""

import math
from typing import NamedTuple

import torch

from model import generate
from progress import ProgressBar


class Optimum(NamedTuple):
    objective: float  # J*
    ess: float        # effective sample size of the reweighting


def optimum(scores, beta):
    """
    The largest value of  E[score] - beta KL(pi || reference)  over all policies. It follows from equation 4 of
    Rafailov et al. 2023, the policy that has it:

        J* = beta log mean exp(score / beta)        scores: N samples of the reference, any shape

    Trust it if the effective sample size (sum w)^2 / sum w^2 is 100 or more. Over many prompts it is an upper bound:
    reweighting may favour some prompts, and no policy can. Raises ValueError for beta <= 0.
    """
    if beta <= 0:
        raise ValueError(f"beta is above 0, got {beta}")
    x = scores.cpu().double().flatten() / beta  # on the CPU, because not every device has float64
    log_sum = x.logsumexp(0)
    ess = (2 * log_sum - (2 * x).logsumexp(0)).exp()
    return Optimum(beta * (log_sum.item() - math.log(len(x))), ess.item())


def optimum_mean(values, scores, beta):
    """The mean of any quantity under the optimal policy: over reference samples, weighted by exp(score / beta)."""
    weights = torch.softmax(scores.cpu().double().flatten() / beta, dim=0)
    return (weights * values.cpu().double().flatten()).sum().item()


def best_of_n(proxy, gold, n):
    """
    Unbiased mean gold of the best of n samples by proxy, from N >= n samples (Nakano et al. 2021, arXiv:2112.09332):

        sum over i of  C(i-1, n-1) / C(N, n) * gold of the i-th smallest proxy

    proxy, gold: (N,) or (M, N). Returns a scalar or (M,). Ties in the proxy go by position. ValueError unless
    1 <= n <= N.
    """
    N = proxy.shape[-1]
    if not 1 <= n <= N:
        raise ValueError(f"best of {n} cannot be estimated from {N} samples")
    weights = [math.comb(i, n - 1) / math.comb(N, n) for i in range(N)]  # here i counts from 0
    order = proxy.cpu().argsort(dim=-1, stable=True)
    ranked_gold = gold.cpu().double().gather(-1, order)
    return (ranked_gold * torch.tensor(weights, dtype=torch.float64)).sum(dim=-1)


def best_of_n_kl(n):
    """An upper bound of the KL of best-of-n from the reference, nats: log n - (n-1)/n. Exact if no two scores tie."""
    return math.log(n) - (n - 1) / n


def win_rate(a, b):
    """The share of pairs with a > b; a tie counts one half. (M, 1) against (M, K) compares each of M with its K."""
    return ((a > b).float() + 0.5 * (a == b).float()).mean().item()


def standard_error(x):
    """The standard error of the mean of independent samples x (N,); 0 for a single sample."""
    return x.std(correction=1).item() / math.sqrt(len(x)) if len(x) > 1 else 0.0


@torch.no_grad()
def sample_policy(policy, prompts, max_new_tokens, temperature, seed, name, size=256):
    """Answer all prompts: a list of Rollouts of at most `size` rows. `name` stands beside the progress bar."""
    generator = torch.Generator(policy.wte.weight.device).manual_seed(seed)
    rollouts = []
    parts = [prompts[at:at + size] for at in range(0, len(prompts), size)]
    for i in ProgressBar(len(parts), name, "batch", leave=False):
        rollouts.append(generate(policy, parts[i], max_new_tokens, temperature, generator))
    return rollouts
