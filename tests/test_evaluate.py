"""Tests of evaluate.py: every estimate against enumeration, brute force or its definition."""

import itertools
import math

import pytest
import torch
from helpers import close, double, noise, tiny_gpt

import evaluate
from model import response_logprobs


@pytest.mark.parametrize("beta", [0.05, 0.5, 5.0])
def test_optimum_of_a_few_samples(beta):
    """Bug: a missing beta, a sum for a mean, weights from the values, float32, or exp(1e6) = inf."""
    scores, values = noise(0, 3, 4).float(), noise(1, 3, 4)  # samples of several prompts are pooled
    w = [math.exp(s / beta) for s in scores.flatten().tolist()]
    mean = sum(x * v for x, v in zip(w, values.flatten().tolist())) / sum(w)
    found = evaluate.optimum(scores, beta)
    close(found.objective, beta * math.log(sum(w) / 12))
    close(found.ess, sum(w) ** 2 / sum(x * x for x in w))
    close(evaluate.optimum_mean(values, scores, beta), mean)
    far = evaluate.optimum(scores.double() + 1e5, beta)  # a constant is added to J* and changes no weight
    close(far.objective, found.objective + 1e5)
    close(far.ess, found.ess, 1e-6)


@pytest.mark.parametrize("n", [1, 3, 8])
def test_best_of_n_equals_all_subsets(n):
    """Bug: binomials off by one, the worst of n, gold that is not sorted with the proxy, or another order of ties."""
    proxy, gold = noise(0, 3, 8).float(), noise(2, 3, 8).float()
    proxy[2] = torch.tensor([1, 0, 1, 0, 1, 0, 1, 1])  # ties: the later one of two equal ones counts as larger
    found = evaluate.best_of_n(proxy, gold, n)
    assert (found.shape, found.dtype) == ((3,), torch.float64)
    for row, p, g in zip(found, proxy.tolist(), gold.tolist()):
        bests = [max(subset, key=lambda i: (p[i], i)) for subset in itertools.combinations(range(8), n)]
        close(row, sum(g[i] for i in bests) / len(bests))


def test_best_of_many():
    """Bug: weights that do not sum to 1 where binomials are too large for a float64; a sort that is not stable."""
    close(evaluate.best_of_n(noise(0, 1200), torch.full((1200,), 0.7, dtype=torch.float64), 600), 0.7)
    close(evaluate.best_of_n(torch.zeros(300), torch.arange(300), 300), 299)


@pytest.mark.parametrize("n", [1, 4, 16])
def test_best_of_n_kl_is_the_limit_of_many_atoms(n):
    """Bug: log n alone, or (n-1)/n added. Best of n takes the k-th of K equal responses (k/K)^n - ((k-1)/K)^n often."""
    def exact(K):
        p = [(k / K) ** n - ((k - 1) / K) ** n for k in range(1, K + 1)]
        return sum(x * math.log(x * K) for x in p if x)

    assert exact(4) <= exact(64) <= evaluate.best_of_n_kl(n) + 1e-12
    close(evaluate.best_of_n_kl(n), exact(20000), 1e-3)


@pytest.mark.parametrize("passed", [[0, 0, 0, 0, 0], [0, 1, 1, 0, 1], [1, 1, 1, 1, 1]])
def test_pass_at_k_is_the_share_of_subsets_with_a_pass(passed):
    """Bug: draws with replacement, c and N - c exchanged, or the mean over prompts."""
    for k in range(1, 6):
        subsets = list(itertools.combinations(passed, k))
        expected = sum(any(subset) for subset in subsets) / len(subsets)
        close(evaluate.pass_at_k(torch.tensor([passed, [0.0] * 5]), k), [expected, 0.0])


def test_the_frontier_is_made_of_optima_and_of_best_of_n():
    """Bug: a point has another beta, the gold of the score, or another KL; an n between powers of 2 is lost."""
    scores, gold, beta = noise(0, 50, 6), noise(1, 50, 6), 0.87
    curves = evaluate.frontier(scores, gold, beta)
    betas = [row["beta"] for row in curves["optimum"]]
    assert betas == sorted(betas) and beta in betas and betas[-1] == 8
    assert evaluate.optimum(scores, betas[0] / 1.2).ess < 16  # those below are left out for this reason only
    for row in curves["optimum"]:
        weights = (scores.flatten() / row["beta"]).exp()
        p = weights / weights.sum()
        close(row["kl"], (p * (p * 300).log()).sum())  # from the uniform distribution over the samples
        close([row["score"], row["gold"]], [p @ scores.flatten(), p @ gold.flatten()])
        close(row["ess"], 1 / (p ** 2).sum())
        assert row["ess"] >= 16
    assert [row["n"] for row in curves["best_of_n"]] == [1, 2, 4, 6]
    first, *_, last = [[row["score"], row["gold"], row["kl"]] for row in curves["best_of_n"]]
    close(first, [scores.mean(), gold.mean(), 0])
    best = scores.argmax(dim=1, keepdim=True)
    close(last, [scores.gather(1, best).mean(), gold.gather(1, best).mean(), math.log(6) - 5 / 6])
    assert 0 < min(row["beta"] for row in evaluate.frontier(scores, gold, 0.0)["optimum"])


def test_a_tie_is_half_a_win():
    """Bug: ties as wins or as losses, or the two sides exchanged."""
    a, b = double([1.0, 2, 3, 4, 5]), double([0.0, 2, 4, 4, 1])  # two wins, two ties, one loss
    assert evaluate.wins(a, b).tolist() == [1.0, 0.5, 0.0, 0.5, 1.0]


def test_standard_error_by_hand():
    """Bug: the population deviation, a missing G / (G - 1), means of groups for sums, or NaN for a single sample."""
    x = double([1.0, 3.0, 2.0, 6.0])  # residuals -2, 0, -1, 3
    plain = math.sqrt((4 + 0 + 1 + 9) / 3 / 4)
    assert evaluate.standard_error(x) == pytest.approx(plain)
    assert evaluate.standard_error(x, ["a", "a", "b", "c"]) == pytest.approx(math.sqrt(3 / 2 * (4 + 1 + 9)) / 4)
    assert evaluate.standard_error(x, list("abcd")) == evaluate.standard_error(x, list("aaaa")) == pytest.approx(plain)
    assert evaluate.standard_error(x[:1]) == evaluate.standard_error(x[:1], ["a"]) == 0


def test_the_errors_of_gain_and_share_are_their_spread():
    """Bug: the errors of policy, reference and optimum as if independent, or answers to a prompt that comes twice."""
    gains, shares, gain_errors, share_errors, prompts, beta = [], [], [], [], list(range(100)), 3.0
    for seed in range(300):  # worlds: the errors should be the deviation of their gains and shares
        scores = 0.5 * noise(seed, 100, 1) + noise(1000 + seed, 100, 8)
        objectives = scores.amax(dim=1) + 0.5 * noise(2000 + seed, 100)
        gains.append(evaluate.optimum(scores, beta).objective - scores.mean())
        shares.append((objectives.mean() - scores.mean()) / gains[-1])
        gain_errors.append(evaluate.gain_error(scores, beta, prompts))
        share_errors.append(evaluate.share_error(objectives, scores, beta, prompts))
    assert sum(gain_errors) / 300 == pytest.approx(torch.stack(gains).std().item(), rel=0.1)
    assert sum(share_errors) / 300 == pytest.approx(torch.stack(shares).std().item(), rel=0.12)
    scores, objectives, prompts = scores.repeat(2, 1), objectives.repeat(2), 2 * prompts
    assert evaluate.gain_error(scores, beta, prompts) == pytest.approx(gain_errors[-1])
    assert evaluate.share_error(objectives, scores, beta, prompts) == pytest.approx(share_errors[-1])


def test_sample_policy_answers_every_prompt_once_from_its_seed():
    """Bug: answers are lost or come in another order; another temperature; a seed without effect, or the global one."""
    policy, prompts = tiny_gpt(), [[1, 2, 3], [4], [5, 6], [1, 2, 3], [7], [8, 0], [1, 2, 3]]
    state = torch.get_rng_state()
    rollouts = list(evaluate.sample_policy(policy, prompts, 4, 0.5, 0, size=3))
    assert torch.equal(torch.get_rng_state(), state)
    assert [prompt for rollout in rollouts for prompt in rollout.prompt_ids()] == prompts
    assert [len(rollout) for rollout in rollouts] == [3, 3, 1]
    assert max(int(rollout.response_lens.max()) for rollout in rollouts) == 4
    for rollout in rollouts:
        close(rollout.logp, response_logprobs(policy, rollout, 0.5))

    def answers(seed):
        parts = evaluate.sample_policy(policy, [[1, 2, 3]] * 8, 6, 1.0, seed, size=1)
        return [response for rollout in parts for response in rollout.response_ids()]

    assert answers(0) == answers(0) != answers(1)
    assert len(set(map(tuple, answers(0)))) > 3  # the seed is not used again for every part


def test_reliability_by_hand():
    """Bug: bins over [0, 1] of which half are empty, a bin that loses 1.0, an error that does not count the pairs."""
    confidence, right = double([0.5, 0.56, 0.62, 0.97, 1.0]), double([1, 0, 1, 1, 0])
    rows, error = evaluate.reliability(confidence, right)
    expected = [(0.5, 1.0, 1), (0.56, 0.0, 1), (0.62, 1.0, 1), (0.985, 0.5, 2)]
    assert [tuple(row.values()) for row in rows] == [pytest.approx(row) for row in expected]
    assert error == pytest.approx((0.5 + 0.56 + 0.38 + 2 * 0.485) / 5)


def test_spread_and_error_by_hand():
    """Bug: the correlation with the signed error, one spread for two, the error's own spread."""
    mean, gold = double([0, 1, 2, 3]), double([1, 0, 2, 7])  # errors 1 1 0 4
    found = evaluate.spread_and_error(mean, double([0.4, 0.5, 0.0, 1.9]), gold)
    a, b = [-0.3, -0.2, -0.7, 1.2], [-0.5, -0.5, -1.5, 2.5]  # less their means
    pearson = sum(x * y for x, y in zip(a, b)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
    assert found == pytest.approx(dict(correlation=pearson, coverage=0.5))
