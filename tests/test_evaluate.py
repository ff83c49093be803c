"""
Tests of evaluate.py: every estimate against enumeration, brute force or its own definition.

A docstring names the bugs that its test catches. P1, P2, ... are the pitfalls that tests/mutants.py plants.
"""

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
    known,
    mean_error,
    optimum,
    optimum_mean,
    reward_accuracy,
    sample_policy,
    standard_error,
    win_rate,
    wins,
)
from model import response_logprobs

# ---- the optimum -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("beta", [0.05, 0.5, 5.0])
def test_optimum_of_two_atoms(beta):
    """Catches a missing beta and a sum for a mean. Scores: a (3 of 10) and b (7 of 10)."""
    a, b = 1.0, 0.4
    found = optimum(double([a] * 3 + [b] * 7), beta)
    close(found.objective, beta * math.log(0.3 * math.exp(a / beta) + 0.7 * math.exp(b / beta)))
    w = [math.exp(a / beta)] * 3 + [math.exp(b / beta)] * 7
    close(found.ess, sum(w) ** 2 / sum(x * x for x in w))
    assert isinstance(found.objective, float)
    assert isinstance(found.ess, float)


def test_optimum_of_a_gaussian():
    """
    Catches any wrong factor. For normal scores with mean m and deviation s, J* = m + s^2 / (2 beta), the optimal policy
    has the mean score m + s^2 / beta, and ess is N exp(-s^2 / beta^2).
    """
    m, s, beta = 0.3, 0.8, 1.0
    quantiles = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    scores = m + s * math.sqrt(2) * torch.special.erfinv(2 * quantiles - 1)
    close(optimum(scores, beta).objective, m + s ** 2 / (2 * beta), 1e-3)
    close(optimum_mean(scores, scores, beta), m + s ** 2 / beta, 2e-3)
    close(optimum(scores, beta).ess / 20000, math.exp(-s ** 2 / beta ** 2), 2e-2)


@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_optimum_is_the_best_of_all_policies(beta):
    """
    Catches a J* that some policy exceeds, or that no policy reaches.

    For all weights w of the samples, sum w s - beta KL(w || uniform) is at most J*. It is J* for w = softmax(s / beta).
    """
    scores, N = noise(0, 12), 12

    def objective(w):
        return (w * scores).sum() - beta * (w * (w * N).log()).sum()

    best = optimum(scores, beta).objective
    close(best, objective(torch.softmax(scores / beta, 0)))
    for seed in range(50):
        assert objective(torch.softmax(scores / beta + 0.3 * noise(seed + 1, N), 0)) < best
    assert scores.mean() < best < scores.max()


def test_optimum_between_no_and_full_control():
    """Catches beta in the wrong direction (P61): a large one leaves the mean of the reference, a small one the best."""
    scores = noise(0, 12)
    close(optimum(scores, 1e6).objective, scores.mean(), 1e-5)
    close(optimum(scores, 1e6).ess, 12, 1e-5)
    close(optimum(scores, 1e-4).objective, scores.max() - 1e-4 * math.log(12), 1e-9)
    close(optimum(scores, 1e-4).ess, 1)
    values = [optimum(scores, beta).objective for beta in (0.01, 0.1, 1.0, 10.0)]
    assert values == sorted(values, reverse=True)
    assert len(set(values)) == 4


def test_optimum_survives_large_scores_and_small_beta():
    """Catches exp(1e6) = inf. A constant added to all scores is added to J*, and changes neither weights nor ess."""
    scores, values = noise(0, 12), noise(1, 12)
    for beta in (1e-3, 0.5):
        plain, shifted = optimum(scores, beta), optimum(scores + 1000, beta)
        close(shifted.objective, plain.objective + 1000, 1e-6)
        close(shifted.ess, plain.ess, 1e-6)
        close(optimum_mean(values, scores + 1000, beta), optimum_mean(values, scores, beta), 1e-6)


def test_optimum_pools_any_shape_and_dtype():
    """Catches a sum over prompts only, or in float32: (M, N) scores are M N samples, summed in float64."""
    scores = noise(0, 3, 8)
    close(optimum(scores, 0.3), optimum(scores.flatten(), 0.3))
    close(optimum_mean(scores ** 2, scores, 0.3), optimum_mean(scores.flatten() ** 2, scores.flatten(), 0.3))
    many = noise(1, 5000).float()
    close(optimum(many, 0.3), optimum(many.double(), 0.3), 1e-12)


def test_optimum_mean_is_a_weighted_mean():
    """Catches weights from the values instead of the scores, and weights that do not sum to 1."""
    values, scores, beta = noise(0, 9), noise(1, 9), 0.4
    w = [math.exp(s / beta) for s in scores.tolist()]
    close(optimum_mean(values, scores, beta), sum(x * v for x, v in zip(w, values.tolist())) / sum(w))
    close(optimum_mean(torch.full((9,), 3.0), scores, beta), 3)


@pytest.mark.parametrize("beta", [0.0, -0.1])
def test_optimum_needs_a_positive_beta(beta):
    """Catches a division by 0, and the worst policy in place of the best."""
    with pytest.raises(ValueError, match="beta must be above 0"):
        optimum(torch.zeros(3), beta)


@few
@given(st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=8), st.sampled_from([0.01, 0.3, 10.0]))
def test_optimum_lies_between_mean_and_maximum(scores, beta):
    """Catches finite scores that overflow: mean <= J* <= max, 1 <= ess <= N, and mean <= optimal mean <= max."""
    x = double(scores)
    found, slack = optimum(x, beta), 1e-7 * (1 + x.abs().max().item())
    assert x.mean() - slack <= found.objective <= x.max() + slack
    assert 1 - 1e-7 <= found.ess <= len(scores) + 1e-7
    assert x.mean() - slack <= optimum_mean(x, x, beta) <= x.max() + slack


# ---- best of n -------------------------------------------------------------------------------------------------------

def slow_best_of_n(proxy, gold, n):
    """
    The mean, over all subsets of n samples, of the gold of the sample with the highest proxy.

    Of two samples with equal proxy the later one is taken.
    """
    golds = []
    for subset in itertools.combinations(range(len(proxy)), n):
        best = max(subset, key=lambda i: (proxy[i], i))
        golds.append(gold[best])
    return sum(golds) / len(golds)


@pytest.mark.parametrize("n", range(1, 9))
def test_best_of_n_equals_all_subsets(n):
    """
    Catches binomials off by one, the worst of n, and gold that is not sorted with the proxy (P68).

    n = 1 is the mean, and n = N is the gold of the sample with the highest proxy.
    """
    proxy, gold = noise(0, 8), noise(2, 8)
    found = best_of_n(proxy, gold, n)
    close(found, slow_best_of_n(proxy.tolist(), gold.tolist(), n))
    if n == 1:
        close(found, gold.mean())
    if n == 8:
        close(found, gold[proxy.argmax()])
        assert gold[proxy.argmax()] < gold.max()  # so the best by proxy is not the best by gold


def test_best_of_n_of_many_prompts():
    """Catches samples that are pooled over prompts or sorted along the wrong axis: (M, N) gives (M,)."""
    proxy, gold = noise(0, 3, 6), noise(1, 3, 6)
    found = best_of_n(proxy, gold, 3)
    assert found.shape == (3,)
    close(found, [slow_best_of_n(p, g, 3) for p, g in zip(proxy.tolist(), gold.tolist())])
    assert best_of_n(proxy[0], gold[0], 3).shape == ()


def test_best_of_n_breaks_ties_by_position():
    """Catches a sort that is not stable. The result would depend on the machine."""
    proxy, gold = double([1.0, 0, 1, 0, 1, 0, 1, 1]), noise(1, 8)
    for n in range(1, 9):
        close(best_of_n(proxy, gold, n), slow_best_of_n(proxy.tolist(), gold.tolist(), n))
    close(best_of_n(torch.zeros(300), torch.arange(300), 300), 299)


def test_best_of_n_of_constant_gold_is_that_constant():
    """Catches weights that do not sum to 1, also where the binomials are too large for a float64."""
    for N, n in ((8, 3), (256, 128), (1200, 600)):
        close(best_of_n(noise(0, N), torch.full((N,), 0.7, dtype=torch.float64), n), 0.7)


def test_best_of_n_accepts_float32_and_sums_in_float64():
    """Catches sums in float32, which lose the digits that differ between policies."""
    proxy, gold = noise(0, 8).float(), noise(1, 8).float()
    found = best_of_n(proxy, gold, 3)
    assert found.dtype == torch.float64
    close(found, slow_best_of_n(proxy.tolist(), gold.tolist(), 3))


@pytest.mark.parametrize("n", [0, -1, 9])
def test_best_of_n_needs_n_samples(n):
    """Catches a best of 9 from 8 samples given as 0. It has no unbiased estimate."""
    with pytest.raises(ValueError, match=f"best of {n} cannot be estimated from 8 samples"):
        best_of_n(torch.zeros(8), torch.zeros(8), n)


@few
@given(st.lists(st.tuples(st.integers(-2, 2), st.floats(-10, 10)), min_size=1, max_size=6), st.data())
def test_best_of_n_property(samples, data):
    """Catches ties and sizes for which the closed form and the subsets differ."""
    n = data.draw(st.integers(1, len(samples)))
    proxy, gold = zip(*samples)
    close(best_of_n(double([float(p) for p in proxy]), double(gold), n), slow_best_of_n(proxy, gold, n))


@pytest.mark.parametrize("n", [1, 2, 4, 16])
def test_best_of_n_kl_is_the_limit_of_many_atoms(n):
    """
    Catches log n alone, and (n-1)/n added (P68).

    Of K equally likely responses, best of n takes the k-th with probability (k/K)^n - ((k-1)/K)^n. The exact KL stays
    below log n - (n-1)/n and converges to it as K grows.
    """
    def exact(K):
        p = [(k / K) ** n - ((k - 1) / K) ** n for k in range(1, K + 1)]
        return sum(x * math.log(x * K) for x in p if x)

    bound = best_of_n_kl(n)
    assert exact(4) <= exact(64) <= bound + 1e-12
    close(bound, exact(20000), 1e-3)
    if n == 1:
        assert bound == 0
    else:
        assert exact(4) < bound - 0.01


# ---- comparisons -----------------------------------------------------------------------------------------------------

def test_win_rate_counts_ties_as_a_half():
    """Catches ties as wins or as losses (P69), and the two sides exchanged (P50)."""
    a, b = double([1.0, 2, 3, 4, 5]), double([0.0, 2, 4, 4, 1])  # two wins, two ties, one loss
    assert win_rate(a, b) == pytest.approx(0.6)
    assert win_rate(b, a) == pytest.approx(0.4)
    assert win_rate(a, a) == 0.5
    assert isinstance(win_rate(a, b), float)


def test_win_rate_compares_one_sample_with_many():
    """Catches the samples of other prompts: (M, 1) against (M, K) compares within each of the M prompts."""
    a, b = noise(0, 4, 1), noise(1, 4, 6)
    wins = sum(a[i, 0].item() > x for i in range(4) for x in b[i].tolist())
    assert win_rate(a, b) == pytest.approx(wins / 24)


def test_standard_error():
    """Catches the population deviation, the variance, a missing root of n, and NaN for a single sample."""
    x = [1.0, 4.0, 2.0, 8.0]
    mean = sum(x) / 4
    assert standard_error(double(x)) == pytest.approx(math.sqrt(sum((y - mean) ** 2 for y in x) / 3 / 4))
    assert standard_error(double([5.0])) == 0
    assert standard_error(double([5.0, 5.0])) == 0
    assert isinstance(standard_error(double(x)), float)


def test_standard_error_is_the_spread_of_means():
    """Catches a wrong factor, by its purpose: 400 means of 25 samples have the standard error as their deviation."""
    samples = noise(0, 400, 25)
    close(samples.mean(dim=1).std(), sum(standard_error(row) for row in samples) / 400, 0.1)


def test_a_repeated_answer_is_one_sample():
    """Catches an error that shrinks when answers are copied: 6 prompts asked 512 times. The order does not matter."""
    x, k = noise(0, 6), 85
    groups = [row % 6 for row in range(6 * k)]
    copied = x.repeat(k)                                                                      # (6 k,)
    close(standard_error(copied, groups), standard_error(x))
    assert standard_error(copied) < 0.2 * standard_error(x)
    order = torch.randperm(6 * k, generator=torch.Generator().manual_seed(0)).tolist()
    close(standard_error(copied[order], [groups[row] for row in order]), standard_error(x))


def test_the_error_of_groups_by_hand():
    """Catches a missing G / (G - 1), means of groups in place of sums, and a division by the number of groups."""
    x, groups = double([1.0, 3.0, 2.0, 6.0]), ["a", "a", "b", "c"]  # residuals -2, 0, -1, 3; by group -2, -1, 3
    assert standard_error(x, groups) == pytest.approx(math.sqrt(3 / 2 * (4 + 1 + 9)) / 4)


def test_the_error_of_groups_is_the_spread_of_means():
    """Catches a wrong factor, by its purpose: 400 means of 60 answers, 5 to each of 12 prompts."""
    answers = (noise(0, 400, 12, 1) + noise(1, 400, 12, 5)).flatten(1)                        # (400, 60)
    groups = [row // 5 for row in range(60)]
    close(answers.mean(dim=1).std(), sum(standard_error(row, groups) for row in answers) / 400, 0.1)
    assert sum(standard_error(row) for row in answers) / 400 < 0.65 * answers.mean(dim=1).std()


def test_groups_that_change_nothing():
    """Catches another number, in any digit, where all prompts are different, and an error of 0 for a single prompt."""
    x = noise(0, 7).float()
    assert standard_error(x, list("abcdefg")) == standard_error(x) == standard_error(x, ["a"] * 7)
    assert standard_error(x[:1], ["a"]) == 0


def test_what_is_not_known_is_none():
    """Catches a NaN or an infinity that JSON cannot hold, and a tensor in its place."""
    assert [known(x) for x in (None, math.nan, math.inf, -math.inf, double(2.0))] == [None] * 4 + [2.0]
    assert type(known(double(2.0))) is float
    assert mean_error(double([])) == (None, 0.0)
    assert mean_error(double([math.nan, 1.0]), ["a", "b"]) == (None, None)
    assert mean_error(double([1.0, 3.0]), ["a", "b"]) == (2.0, 1.0)


def test_wins_by_hand():
    """Catches ties as wins, and a mean where each comparison is asked for."""
    assert wins(double([1.0, 2.0, 3.0]), double([2.0, 2.0, 2.0])).tolist() == [0.0, 0.5, 1.0]


def test_the_error_of_the_gain_is_its_spread():
    """Catches a wrong derivative, by its purpose: 400 estimates of the gain have it as their deviation."""
    beta, scores = 3.0, noise(0, 400, 50, 4) + noise(1, 400, 50, 1)
    gains = double([optimum(x, beta).objective - x.mean().item() for x in scores])
    errors = [gain_error(x, beta, list(range(50))) for x in scores]
    assert sum(errors) / 400 == pytest.approx(gains.std().item(), rel=0.1)
    assert gain_error(torch.full((5, 4), 3.0), beta, list(range(5))) == pytest.approx(0, abs=1e-12)


# ---- the reward model ------------------------------------------------------------------------------------------------

class Scores:
    """A reward model that gives the last token of a response as its score."""

    def __call__(self, batch):
        return torch.tensor([float(response[-1]) for _, response in rows_of(batch)])


def made_up_pairs(n, right, prompts):
    """n pairs of which the first `right` are ordered right, with so many different prompts."""
    rows = []
    for i in range(n):
        chosen, rejected = (5, 2) if i < right else (2, 5)
        rows.append(dict(prompt=[1 + i % prompts], chosen=[3, chosen], rejected=[rejected]))
    return rows


@pytest.mark.parametrize("n, right, prompts, chance", [
    (400, 221, 400, False), (400, 219, 400, True), (400, 200, 400, True), (400, 100, 400, True),
    (400, 400, 400, False), (1, 1, 1, True), (4, 4, 4, True), (5, 5, 5, False), (400, 240, 4, True)])
def test_a_coin_is_called_a_coin(n, right, prompts, chance):
    """
    Catches a reward model at chance that passes for one that has learned: 0.55 of 400 pairs is the border.

    Few pairs that are all right prove nothing, and neither do many pairs of 4 prompts when one prompt is lost.
    """
    pairs = made_up_pairs(n, right, prompts)
    if prompts == 4:
        pairs = [dict(pair, chosen=[3, 2 if i % 4 == 0 else 5], rejected=[5 if i % 4 == 0 else 2])
                 for i, pair in enumerate(pairs)]
    result = reward_accuracy(Scores(), pairs, pad=9, device="cpu")
    assert result["accuracy"] == pytest.approx(0.75 if prompts == 4 else right / n)
    assert result["at_chance"] is chance
    assert result["gold_accuracy"] is result["gold_accuracy_se"] is result["label_ceiling"] is None


def test_the_accuracy_against_gold_by_hand():
    """Catches ties in gold that count, the roles of gold and label exchanged, and errors that count pairs."""
    golds = [(1.0, 0.0), (0.0, 1.0), (2.0, 2.0), (1.0, 0.5)]
    pairs = [dict(pair, prompt=[min(i, 1)], gold=list(gold), ceiling=0.6 + 0.1 * i)
             for i, (pair, gold) in enumerate(zip(made_up_pairs(4, 3, 4), golds))]
    result = reward_accuracy(Scores(), pairs, pad=9, device="cpu")
    assert result["gold_accuracy"] == pytest.approx(1 / 3)  # right, wrong, a tie, wrong
    assert result["gold_accuracy_se"] == pytest.approx(math.sqrt(2 * 2 * (2 / 3) ** 2) / 3)
    assert result["accuracy"] == 0.75 and result["label_ceiling"] == pytest.approx(0.75)
    ties = [dict(pair, gold=[1.0, 1.0]) for pair in pairs]
    assert reward_accuracy(Scores(), ties, pad=9, device="cpu")["gold_accuracy"] is None


# ---- sampling for evaluation -----------------------------------------------------------------------------------------

PROMPTS = [[1, 2, 3], [4], [5, 6], [1, 2, 3], [7], [8, 0], [1, 2, 3]]


def same(a, b):
    return [rows_of(x) for x in a] == [rows_of(x) for x in b]


def test_sample_policy_is_reproducible():
    """Catches two evaluations of one policy that differ (P71), an unused seed, and a use of the global generator."""
    policy = tiny_gpt()
    torch.manual_seed(1)
    first = sample_policy(policy, PROMPTS, 6, 1.0, 0, "one", size=3)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert same(first, sample_policy(policy, PROMPTS, 6, 1.0, 0, "two", size=3))
    assert torch.equal(torch.get_rng_state(), state)
    assert not same(first, sample_policy(policy, PROMPTS, 6, 1.0, 1, "three", size=3))


@pytest.mark.parametrize("size", [1, 3, 7, 256])
def test_sample_policy_answers_every_prompt_once_in_order(size):
    """Catches a last part that is lost, and another order: gold would be compared with other prompts' answers."""
    rollouts = sample_policy(tiny_gpt(), PROMPTS, 4, 1.0, 0, "bar", size=size)
    assert [prompt for rollout in rollouts for prompt, _ in rows_of(rollout)] == PROMPTS
    assert [len(rollout) for rollout in rollouts] == [min(size, 7 - at) for at in range(0, 7, size)]
    assert max(int(rollout.response_lens.max()) for rollout in rollouts) <= 4


def test_sample_policy_goes_on_with_its_generator():
    """Catches a generator that is seeded again for every part (P19): equal prompts would get equal answers."""
    parts = sample_policy(tiny_gpt(), [[1, 2, 3]] * 8, 6, 1.0, 0, "bar", size=1)
    assert len({tuple(rows_of(part)[0][1]) for part in parts}) > 3


def test_sample_policy_passes_the_temperature_on():
    """Catches evaluation at another temperature (P71), and a graph that nobody needs."""
    policy = tiny_gpt()
    (rollout,) = sample_policy(policy, PROMPTS, 5, 0.5, 0, "bar")
    assert not rollout.logp.requires_grad
    with torch.no_grad():
        close(rollout.logp, response_logprobs(policy, rollout, 0.5))
        assert (rollout.logp - response_logprobs(policy, rollout)).abs().max() > 0.01


# ---- the frontier ----------------------------------------------------------------------------

def test_the_frontier_is_made_of_optima_and_of_best_of_n():
    """A point of the frontier has another price, the gold of the score, or the KL of something else."""
    scores, gold, beta = noise(0, 50, 8), noise(1, 50, 8), 0.87
    curves = frontier(scores, gold, beta)
    prices = [row["beta"] for row in curves["optimum"]]
    assert prices == sorted(prices) and beta in prices and prices[-1] == 8 and len(prices) > 10
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


def test_the_frontier_without_gold_or_a_price():
    """NaN reaches the report where there is no oracle; a beta of 0 divides by it; an n between powers of 2 is lost."""
    scores = noise(0, 50, 6)
    curves = frontier(scores, torch.full((50, 6), math.nan), 0.0)
    assert all(row["gold"] is None for row in curves["optimum"] + curves["best_of_n"])
    assert min(row["beta"] for row in curves["optimum"]) > 0
    assert [row["n"] for row in curves["best_of_n"]] == [1, 2, 4, 6]
