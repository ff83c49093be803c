"""
Every number that the report prints, and the canaries that stand in the loops.

A policy is judged on held-out prompts by sampling from it: gold (the true reward, where there is one), score (what it was trained on), KL from the
reference, and the share of the best possible. The best possible is known without training anything: the optimum of  E[score] - beta KL(pi || reference)
is the reference reweighted by exp(score / beta), so samples of the reference estimate its value.

Letters: B batch, R response columns, V vocabulary, M prompts, N samples.
"""

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from tqdm import tqdm

from model import generate, log_softmax, response_hidden, spread


class CanaryError(RuntimeError):
    """An invariant of a training loop is broken; the message names the likely cause."""


def canary(alive, message):
    if not alive:
        raise CanaryError(message)


def finite(loss, name, advice):
    """The loss as a number; raises CanaryError when it is none."""
    value = loss.item()
    canary(math.isfinite(value), f"the {name} loss is {value}: the training diverged; {advice}")
    return value


@torch.no_grad()
def pads_are_inert(function, batch):
    """Raise CanaryError unless function(batch) stays the same to the last bit when every pad holds another token: then pads have no gradient either."""
    columns = torch.arange(batch.ids.shape[1], device=batch.ids.device)
    pads = (columns < batch.P - batch.prompt_lens[:, None]) | (columns >= batch.P + batch.response_lens[:, None])  # (B, T)
    poisoned = replace(batch, ids=torch.where(pads, (batch.ids + 1) % (batch.ids.max() + 1), batch.ids))
    canary(torch.equal(function(batch), function(poisoned)),
           "what stands in the padding changes the result: a mask or a position comes from the ids and not from the lengths")


# ---------------------------------------------------------------------------------------------------------------------
# estimates

@torch.no_grad()
def exact_kl(policy, reference, batch, temperature=1.0):
    """
    KL(policy || reference) along each response, in nats per response, (B,): the sum over its tokens of the exact KL between the two next-token
    distributions. Its mean over responses sampled from the *policy* is the KL of whole responses, with less noise than log pi/ref of the samples.
    """
    logp, ref_logp = (log_softmax(model.head(response_hidden(model, batch)), temperature) for model in (policy, reference))  # (n, V)
    return spread((logp.exp() * (logp - ref_logp)).sum(dim=-1), batch.mask).sum(dim=1)


class Optimum(NamedTuple):
    objective: float  # J*
    ess: float        # effective sample size of the reweighting


def optimum(scores, beta):
    """
    The best value of  E[score] - beta KL(pi || reference)  that any policy can have (Rafailov et al. 2023, equation 4):

        J* = beta log mean exp(score / beta)        scores: N samples of the reference, any shape

    Trust it only when the effective sample size (sum w)^2 / sum w^2 is large (100 or more). With samples of many prompts pooled it is an upper bound:
    the reweighting may then prefer prompts, which no policy can. Raises ValueError for beta <= 0.
    """
    if beta <= 0:
        raise ValueError(f"beta is above 0, got {beta}")
    x = scores.cpu().double().flatten() / beta  # float64 is for the CPU: not every device has it
    return Optimum(beta * (x.logsumexp(0).item() - math.log(len(x))), (2 * x.logsumexp(0) - (2 * x).logsumexp(0)).exp().item())


def optimum_mean(values, scores, beta):
    """The mean of any quantity under the optimal policy: the mean over reference samples weighted by exp(score / beta)."""
    weights = torch.softmax(scores.cpu().double().flatten() / beta, dim=0)
    return (weights * values.cpu().double().flatten()).sum().item()


def best_of_n(proxy, gold, n):
    """
    Mean gold of the best of n samples by proxy, estimated without bias from N >= n samples a prompt (Nakano et al. 2021, appendix I):

        sum over i of  C(i-1, n-1) / C(N, n) * gold of the i-th smallest proxy

    proxy, gold: (N,) or (M, N); returns a scalar or (M,). Ties in the proxy go by position. Raises ValueError unless 1 <= n <= N.
    """
    N = proxy.shape[-1]
    if not 1 <= n <= N:
        raise ValueError(f"best of {n} cannot be estimated from {N} samples")
    weights = torch.tensor([math.comb(i, n - 1) / math.comb(N, n) for i in range(N)], dtype=torch.float64)
    ranked = gold.cpu().double().gather(-1, proxy.cpu().argsort(dim=-1, stable=True))
    return (ranked * weights).sum(dim=-1)


def best_of_n_kl(n):
    """KL of best-of-n from the reference in nats: log n - (n-1)/n, an upper bound that is exact when no two samples tie."""
    return math.log(n) - (n - 1) / n


LAWS = {  # how a reward R depends on d = sqrt(KL): the columns whose weighted sum it is
    "rl": lambda d: [d, -torch.special.xlogy(d, d)],        # 0 log 0 = 0
    "bon": lambda d: [d, -d ** 2],
    "quadratic": lambda d: [torch.ones_like(d), d ** 2, d ** 4],
}


def fit_law(d, R, law):
    """
    Least squares of a reward on its distance d = sqrt(KL(pi || reference)), KL in nats; d, R: (N,) each. Returns (coefficients, rmse).

        rl         R = d (alpha - beta log d)       (alpha, beta)    Gao et al. 2023, section 3.1; peaks at d = exp(alpha / beta - 1)
        bon        R = d (alpha - beta d)           (alpha, beta)    the same, for best-of-n; peaks at d = alpha / (2 beta)
        quadratic  R = a + b KL + c KL^2            (a, b, c)        the rival in Rafailov et al. 2024 (arXiv:2406.02900)

    The first two take R to be 0 at d = 0: subtract the reference's. rmse is the root of the mean squared residual, in units of R, and a third
    coefficient lowers it for nothing. Raises ValueError for an unknown law, a d that is negative, or fewer points than coefficients.
    """
    if law not in LAWS:
        raise ValueError(f"unknown law {law!r}, choose from {', '.join(LAWS)}")
    d, R = (torch.as_tensor(x, dtype=torch.float64, device="cpu") for x in (d, R))  # (N,) each
    if not (d >= 0).all():
        raise ValueError(f"a distance is at least 0, got {d.min().item()}")
    columns = torch.stack(LAWS[law](d), dim=1)                                         # (N, 2) or (N, 3)
    if len(d) < columns.shape[1]:
        raise ValueError(f"the law {law!r} has {columns.shape[1]} coefficients and cannot be fitted to {len(d)} points")
    fitted = torch.linalg.lstsq(columns, R[:, None]).solution[:, 0]
    return tuple(fitted.tolist()), (columns @ fitted - R).square().mean().sqrt().item()


def win_rate(a, b):
    """Share of pairs in which a > b, ties counting one half; shapes that broadcast, so (M, 1) against (M, K) is each of M against K."""
    return ((a > b).float() + 0.5 * (a == b).float()).mean().item()


def standard_error(x):
    """Standard error of the mean of independent samples (N,); 0 when there is only one."""
    return x.std(correction=1).item() / math.sqrt(len(x)) if len(x) > 1 else 0.0


# ---------------------------------------------------------------------------------------------------------------------
# policies

@torch.no_grad()
def sample_policy(policy, prompts, max_new_tokens, temperature, seed, name, size=256):
    """Rollouts of at most `size` prompts each, made with one seed, so that two evaluations of one policy are the same; `name` is for the bar."""
    generator = torch.Generator(policy.wte.weight.device).manual_seed(seed)
    bar = tqdm(range(0, len(prompts), size), desc=name, unit="batch", dynamic_ncols=True, leave=False)
    return [generate(policy, prompts[at:at + size], max_new_tokens, temperature, generator) for at in bar]
