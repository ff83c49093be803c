"""Tests of evaluate.py: every estimate against enumeration, brute force or its definition."""

import itertools
import math

import pytest
import torch
from helpers import close, double, few, noise, rows_of, tiny_gpt
from hypothesis import given
from hypothesis import strategies as st

from evaluate import (
    best_of_n,
    best_of_n_kl,
    frontier,
    gain_error,
    optimum,
    optimum_mean,
    pass_at_k,
    reliability,
    sample_policy,
    share_error,
    spread_and_error,
    standard_error,
    win_rate,
    wins,
)
from model import response_logprobs


@pytest.mark.parametrize("beta", [0.05, 0.5, 5.0])
def test_optimum_of_a_few_samples(beta):
    """Bug: a missing beta, a sum for a mean, or weights from the values. Compared with sums over all samples."""
    scores, values = noise(0, 12), noise(1, 12)
    w = [math.exp(s / beta) for s in scores.tolist()]
    found = optimum(scores, beta)
    close(found.objective, beta * math.log(sum(w) / 12))
    close(found.ess, sum(w) ** 2 / sum(x * x for x in w))
    close(optimum_mean(values, scores, beta), sum(x * v for x, v in zip(w, values.tolist())) / sum(w))
    # samples of several prompts are pooled, and added up in float64
    close(optimum(scores.view(3, 4), beta), found)
    close(optimum_mean(values.view(3, 4), scores.view(3, 4), beta), optimum_mean(values, scores, beta))
    close(optimum(scores.float(), beta), optimum(scores.float().double(), beta), 1e-12)


@few
@given(st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=8), st.sampled_from([0.01, 0.3, 10.0]))
def test_optimum_of_any_scores(scores, beta):
    """Bug: exp(1e6) = inf. A constant c is added to J* and changes no weight; mean <= J* <= max; 1 <= ess <= N."""
    x = double(scores)
    found, slack = optimum(x, beta), 1e-7 * (1 + x.abs().max().item())
    assert x.mean() - slack <= found.objective <= x.max() + slack
    assert 1 - 1e-7 <= found.ess <= len(scores) + 1e-7
    assert x.mean() - slack <= optimum_mean(x, x, beta) <= x.max() + slack
    shifted = optimum(x + 1000, beta)
    assert shifted.objective == pytest.approx(found.objective + 1000, abs=slack)
    assert shifted.ess == pytest.approx(found.ess, rel=1e-6)


@pytest.mark.parametrize("refused, message", [
    (lambda: optimum(torch.zeros(3), 0.0), "beta must be above 0, got 0.0"),  # a division by 0
    (lambda: optimum(torch.zeros(3), -0.1), "beta must be above 0, got -0.1"),  # the worst policy
    (lambda: best_of_n(torch.zeros(8), torch.zeros(8), 0), "best of 0 cannot be estimated from 8 samples"),
    (lambda: best_of_n(torch.zeros(8), torch.zeros(8), 9), "best of 9 cannot be estimated from 8 samples")])
def test_what_cannot_be_estimated_is_refused(refused, message):
    """Bug: a number where there is none."""
    with pytest.raises(ValueError, match=message):
        refused()


def test_the_error_of_the_gain_is_its_spread():
    """
    Bug: a wrong derivative, by its purpose: 400 estimates of the gain have it as their deviation. Or answers to a
    prompt that comes twice count as independent.
    """
    beta, scores = 3.0, noise(0, 400, 50, 4) + noise(1, 400, 50, 1)
    gains = double([optimum(x, beta).objective - x.mean().item() for x in scores])
    errors = [gain_error(x, beta, list(range(50))) for x in scores]
    assert sum(errors) / 400 == pytest.approx(gains.std().item(), rel=0.1)
    assert gain_error(scores[0].repeat(2, 1), beta, 2 * list(range(50))) == pytest.approx(errors[0])
    assert gain_error(torch.full((5, 4), 3.0), beta, list(range(5))) == pytest.approx(0, abs=1e-12)


def slow_best_of_n(proxy, gold, n):
    """The mean, over all subsets of n samples, of the gold of the highest proxy: the later one of two equal ones."""
    golds = []
    for subset in itertools.combinations(range(len(proxy)), n):
        best = max(subset, key=lambda i: (proxy[i], i))
        golds.append(gold[best])
    return sum(golds) / len(golds)


@pytest.mark.parametrize("n", [1, 3, 8])
def test_best_of_n_equals_all_subsets(n):
    """
    Bug: binomials off by one, the worst of n, gold that is not sorted with the proxy, or an order of ties that depends
    on the machine. (M, N) gives one number for each of M prompts, and float32 is added up in float64.
    """
    proxy, gold = noise(0, 3, 8).float(), noise(2, 3, 8).float()
    proxy[2] = torch.tensor([1, 0, 1, 0, 1, 0, 1, 1])  # ties
    found = best_of_n(proxy, gold, n)
    assert (found.shape, found.dtype) == ((3,), torch.float64)
    close(found, [slow_best_of_n(p, g, n) for p, g in zip(proxy.tolist(), gold.tolist())])


def test_best_of_many():
    """Bug: weights that do not sum to 1 where binomials are too large for a float64, or a sort that is not stable."""
    for N, n in ((8, 3), (256, 128), (1200, 600)):
        close(best_of_n(noise(0, N), torch.full((N,), 0.7, dtype=torch.float64), n), 0.7)
    close(best_of_n(torch.zeros(300), torch.arange(300), 300), 299)


@pytest.mark.parametrize("n", [1, 4, 16])
def test_best_of_n_kl_is_the_limit_of_many_atoms(n):
    """Bug: log n alone, or (n-1)/n added. Best of n takes the k-th of K equal responses (k/K)^n - ((k-1)/K)^n often."""
    def exact(K):
        p = [(k / K) ** n - ((k - 1) / K) ** n for k in range(1, K + 1)]
        return sum(x * math.log(x * K) for x in p if x)

    bound = best_of_n_kl(n)
    assert exact(4) <= exact(64) <= bound + 1e-12
    close(bound, exact(20000), 1e-3)


def test_win_rate_counts_ties_as_a_half():
    """Bug: ties as wins or as losses, the two sides exchanged, or the samples of other prompts."""
    a, b = double([1.0, 2, 3, 4, 5]), double([0.0, 2, 4, 4, 1])  # two wins, two ties, one loss
    assert wins(a, b).tolist() == [1.0, 0.5, 0.0, 0.5, 1.0]
    assert win_rate(a, b) == pytest.approx(0.6)
    one, many = noise(0, 4, 1), noise(1, 4, 6)  # of four prompts
    won = [float(one[i, 0] > x) for i in range(4) for x in many[i]]
    assert wins(one, many).flatten().tolist() == won
    assert win_rate(one, many) == pytest.approx(sum(won) / 24)


def test_standard_error_by_hand():
    """
    Bug: the population deviation, a missing root of n or G / (G - 1), means of groups for sums, a division by G, NaN
    for a single sample, or an error of 0 for a single group.
    """
    x = double([1.0, 3.0, 2.0, 6.0])  # residuals -2, 0, -1, 3
    plain = math.sqrt((4 + 0 + 1 + 9) / 3 / 4)
    assert standard_error(x) == pytest.approx(plain)
    assert standard_error(x, ["a", "a", "b", "c"]) == pytest.approx(math.sqrt(3 / 2 * (4 + 1 + 9)) / 4)
    assert standard_error(x, list("abcd")) == standard_error(x, ["a"] * 4) == standard_error(x)
    assert standard_error(x[:1]) == standard_error(x[:1], ["a"]) == 0


PROMPTS = [[1, 2, 3], [4], [5, 6], [1, 2, 3], [7], [8, 0], [1, 2, 3]]


def test_sample_policy_draws_from_its_seed_and_continues():
    """Bug: the seed has no effect or is used again for every part, or the global generator is used."""
    def answers(seed):
        parts = sample_policy(tiny_gpt(), [[1, 2, 3]] * 8, 6, 1.0, seed, size=1)
        return [row for rollout in parts for row in rows_of(rollout)]

    state = torch.get_rng_state()
    first = answers(0)
    assert torch.equal(torch.get_rng_state(), state)
    assert answers(0) == first != answers(1)
    assert len({tuple(response) for _, response in first}) > 3


@pytest.mark.parametrize("size", [3, 256])
def test_sample_policy_answers_every_prompt_once_in_order(size):
    """Bug: a last part is lost, or answers come in another order: gold would judge the answers of other prompts."""
    rollouts = list(sample_policy(tiny_gpt(), PROMPTS, 4, 1.0, 0, size))
    assert [prompt for rollout in rollouts for prompt in rollout.prompt_ids()] == PROMPTS
    assert [len(rollout) for rollout in rollouts] == [min(size, 7 - at) for at in range(0, 7, size)]
    assert max(int(rollout.response_lens.max()) for rollout in rollouts) == 4


def test_sample_policy_passes_the_temperature_on():
    """Bug: evaluation at another temperature, or a graph that nobody needs."""
    policy = tiny_gpt()
    (rollout,) = sample_policy(policy, PROMPTS, 5, 0.5, 0)
    assert not rollout.logp.requires_grad
    with torch.no_grad():
        close(rollout.logp, response_logprobs(policy, rollout, 0.5))
        assert (rollout.logp - response_logprobs(policy, rollout)).abs().max() > 0.01


def test_the_frontier_is_made_of_optima_and_of_best_of_n():
    """Bug: a point of the frontier has another beta, the gold of the score, or the KL of something else."""
    scores, gold, beta = noise(0, 50, 8), noise(1, 50, 8), 0.87
    curves = frontier(scores, gold, beta)
    betas = [row["beta"] for row in curves["optimum"]]
    assert betas == sorted(betas) and beta in betas and betas[-1] == 8
    assert optimum(scores, betas[0] / 1.2).ess < 16  # those below are left out for this reason only
    for row in curves["optimum"]:
        weights = [math.exp(s / row["beta"]) for s in scores.flatten().tolist()]
        total = sum(weights)
        p = [w / total for w in weights]
        close(row["kl"], sum(x * math.log(x * 400) for x in p))  # from the uniform distribution over the samples
        close(row["score"], sum(x * s for x, s in zip(p, scores.flatten().tolist())))
        close(row["gold"], sum(x * g for x, g in zip(p, gold.flatten().tolist())))
        close(row["ess"], 1 / sum(x * x for x in p))
        assert row["ess"] >= 16
    assert [row["n"] for row in curves["best_of_n"]] == [1, 2, 4, 8]
    first, last = curves["best_of_n"][0], curves["best_of_n"][-1]
    close([first["score"], first["gold"], first["kl"]], [scores.mean().item(), gold.mean().item(), 0])
    best = scores.argmax(dim=1)
    close(last["score"], scores.amax(dim=1).mean())
    close(last["gold"], gold[torch.arange(50), best].mean())
    close(last["kl"], math.log(8) - 7 / 8)


def test_the_frontier_without_gold_or_a_beta():
    """Bug: a score is NaN where gold is not known, a beta of 0 divides by it, or an n between powers of 2 is lost."""
    scores = noise(0, 50, 6)
    curves = frontier(scores, torch.full((50, 6), math.nan), 0.0)
    rows = curves["optimum"] + curves["best_of_n"]
    assert all(math.isnan(row["gold"]) for row in rows)
    assert not any(math.isnan(row[name]) for row in rows for name in ("score", "kl"))
    assert min(row["beta"] for row in curves["optimum"]) > 0
    assert [row["n"] for row in curves["best_of_n"]] == [1, 2, 4, 6]


# ---- pass at k -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("passed", [[0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [0, 1, 1, 0, 1], [1, 1, 1, 1, 1]])
def test_pass_at_k_is_the_share_of_subsets_with_a_pass(passed):
    """Bug: draws with replacement, c and N - c exchanged, or the mean over prompts."""
    for k in range(1, 6):
        subsets = list(itertools.combinations(passed, k))
        expected = sum(any(subset) for subset in subsets) / len(subsets)
        close(pass_at_k(torch.tensor([passed, [0.0] * 5]), k), [expected, 0.0])
    for k in (0, 6):
        with pytest.raises(ValueError, match=f"pass at {k} cannot"):
            pass_at_k(torch.zeros(1, 5), k)


# ---- does a reward model know how sure it is? ------------------------------------------------------------------------

def test_reliability_by_hand():
    """Bug: bins over [0, 1] of which half are empty, a bin that loses 1.0, an error that does not count the pairs."""
    confidence, right = double([0.5, 0.54, 0.62, 0.97, 1.0]), double([1, 0, 1, 1, 0])
    rows, error = reliability(confidence, right)
    expected = [(0.52, 0.5, 2), (0.62, 1.0, 1), (0.985, 0.5, 2)]
    assert [tuple(row.values()) for row in rows] == [pytest.approx(row) for row in expected]
    assert error == pytest.approx((2 * 0.02 + 0.38 + 2 * 0.485) / 5)
    certain = torch.sigmoid(3 * noise(0, 20000).abs())
    luck = torch.rand(20000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert reliability(certain, (luck < certain).double())[1] < 0.01  # a calibrated model
    assert reliability(certain, (luck < 0.6).double())[1] > 0.1


def test_spread_and_error_by_hand():
    """Bug: the correlation with the signed error, one spread for two, the error's own spread."""
    mean, gold = double([0, 1, 2, 3]), double([1, 0, 2, 7])  # errors 1 1 0 4
    spread = double([0.4, 0.5, 0.0, 3.0])
    found = spread_and_error(mean, spread, gold)
    a, b = [x - sum(row) / 4 for row in ([0.4, 0.5, 0.0, 3.0],) for x in row], [-0.5, -0.5, -1.5, 2.5]
    pearson = sum(x * y for x, y in zip(a, b)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
    assert found == pytest.approx(dict(correlation=pearson, coverage=0.75))
    z = noise(1, 20000)
    assert abs(spread_and_error(z, torch.ones_like(z), 0 * z)["coverage"] - 0.954) < 0.005


@pytest.mark.parametrize("beta", [0.8, 2.0])
def test_the_error_of_a_share_is_its_spread(beta):
    """
    Bug: the errors of policy, reference and optimum taken as independent, a share that is forgotten, an error in nats.

    Many worlds of 100 prompts are drawn. The deviation of their shares is what the error should be.
    """
    shares, errors = [], []
    for seed in range(300):
        level = noise(seed, 100)  # of a prompt, the same for the policy and the reference
        scores = 0.5 * level[:, None] + noise(1000 + seed, 100, 8)
        objectives = 0.5 * level + 0.3 + 0.5 * noise(2000 + seed, 100)
        J = optimum(scores, beta).objective
        shares.append(((objectives.mean() - scores.mean()) / (J - scores.mean())).item())
        errors.append(share_error(objectives, scores, beta, list(range(100))))
    found = torch.tensor(shares).std().item()
    assert sum(errors) / 300 == pytest.approx(found, rel=0.12)
