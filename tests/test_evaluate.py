"""Tests of evaluate.py: every estimate against enumeration, brute force or its own definition, every canary with its bug planted."""

import itertools
import math

import pytest
import torch
from helpers import (
    PAD,
    VOCAB,
    close,
    double,
    few,
    is_pad,
    make_batch,
    naive_logits,
    naive_response_logprobs,
    noise,
    random_batch,
    rows_of,
    tiny_gpt,
)
from hypothesis import given
from hypothesis import strategies as st

import evaluate
from evaluate import (
    CanaryError,
    best_of_n,
    best_of_n_kl,
    exact_kl,
    fit_law,
    optimum,
    optimum_mean,
    pads_are_inert,
    sample_policy,
    standard_error,
    win_rate,
)
from model import Rollout, generate, response_logprobs

# ---------------------------------------------------------------------------------------------------------------------
# canaries

def test_canary_sings_only_when_it_is_dead():
    """A canary that is deaf, or sings all the time, or loses its message."""
    evaluate.canary(True, "no")
    with pytest.raises(CanaryError, match="^the cause$"):
        evaluate.canary(False, "the cause")
    assert issubclass(CanaryError, RuntimeError)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_finite_names_the_loss_and_the_advice(value):
    """NaN and both infinities must stop the run; a sentence without the loss or the remedy."""
    with pytest.raises(CanaryError, match="the PPO loss is -?(nan|inf).*lower it"):
        evaluate.finite(torch.tensor(value), "PPO", "lower it")
    for healthy in (0.0, -3.0, 1e30):
        evaluate.finite(torch.tensor(healthy), "PPO", "lower it")


def readers():
    """Functions of a batch that read exactly one column of padding, one beside the first and last real token, or take ids for pads."""
    def prompt_edge(batch):
        return batch.ids.gather(1, (batch.P - batch.prompt_lens - 1).clamp(min=0)[:, None])

    def response_edge(batch):
        return batch.ids.gather(1, (batch.P + batch.response_lens).clamp(max=batch.ids.shape[1] - 1)[:, None])

    return dict(first=lambda batch: batch.ids[:, 0], last=lambda batch: batch.ids[:, -1], prompt_edge=prompt_edge, response_edge=response_edge,
                by_id=lambda batch: (batch.ids != PAD).sum(1), mean=lambda batch: batch.ids.double().mean())


@pytest.mark.parametrize("name", list(readers()))
def test_pads_are_inert_hears_every_reader(name):
    """A poison that misses pads on one side, or the ones next to real tokens, or that leaves PAD's id where it was."""
    with pytest.raises(CanaryError, match="what stands in the padding changes the result"):
        pads_are_inert(readers()[name], random_batch(0, R=8))


def test_pads_are_inert_leaves_real_tokens_alone():
    """A canary that cries wolf: what reads only real tokens, all of them, and the lengths passes, and so does the real scorer."""
    batch = random_batch(0, min_response=0, P=8, R=9)
    pads_are_inert(lambda b: torch.where(is_pad(b), 0, b.ids), batch)
    pads_are_inert(lambda b: b.prompt_lens * 100 + b.response_lens, batch)
    pads_are_inert(lambda b: response_logprobs(tiny_gpt(), b), batch)
    pads_are_inert(lambda b: b.ids, make_batch([[1, 2], [3, 4]], [[5], [6]]))  # there are no pads


def test_pads_are_inert_changes_no_batch_and_keeps_rollouts():
    """A batch that stays poisoned, or a rollout that loses its log-probs on the way."""
    rollout = generate(tiny_gpt(), [[1, 2], [3]], 4, generator=torch.Generator().manual_seed(0))
    before, seen = rollout.ids.clone(), []
    pads_are_inert(lambda batch: (seen.append(batch), batch.logp)[1], rollout)
    assert torch.equal(rollout.ids, before)
    assert len(seen) == 2 and all(type(batch) is Rollout and torch.equal(batch.logp, rollout.logp) for batch in seen)
    pads = is_pad(rollout)
    assert pads.any() and all((a != b)[pads].all() and (a == b)[~pads].all() for a, b in [(seen[0].ids, seen[1].ids)])
    assert all(0 <= batch.ids.min() and batch.ids.max() < VOCAB for batch in seen)  # a poison that no embedding knows would crash


def test_pads_are_inert_notices_the_last_bit():
    """A comparison with a tolerance: a leak of 1e-12 is a leak."""
    with pytest.raises(CanaryError):
        pads_are_inert(lambda batch: 1e-12 * batch.ids[:, -1].double(), random_batch(0, R=9))


# ---------------------------------------------------------------------------------------------------------------------
# KL

@torch.no_grad()
def slow_kl(policy, reference, batch, temperature=1.0):
    """Token by token and word by word."""
    out = []
    for prompt, response in rows_of(batch):
        total = 0.0
        for t in range(len(response)):
            p, q = (torch.softmax(naive_logits(model, prompt + response[:t])[-1] / temperature, 0).tolist() for model in (policy, reference))
            total += sum(a * math.log(a / b) for a, b in zip(p, q))
        out.append(total)
    return out


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_exact_kl_equals_brute_force(temperature):
    """The other direction, KL(reference || policy); the prompt's KL counted (P4); pads counted; the temperature forgotten; a mean over tokens."""
    policy, reference = tiny_gpt(0), tiny_gpt(1)
    for batch in (random_batch(0, min_response=0), random_batch(1, B=3, P=8, R=9)):
        kl = exact_kl(policy, reference, batch, temperature)
        close(kl, slow_kl(policy, reference, batch, temperature))
        assert kl.shape == (len(batch),) and not kl.requires_grad and kl.max() > 0.1


def test_exact_kl_defaults_to_temperature_1():
    """A default that differs from the sampler's."""
    batch = random_batch(0)
    close(exact_kl(tiny_gpt(0), tiny_gpt(1), batch), exact_kl(tiny_gpt(0), tiny_gpt(1), batch, 1.0))


def test_exact_kl_of_a_policy_with_itself_is_exactly_0():
    """Rounding noise in the first canary of PPO."""
    policy = tiny_gpt(0, torch.float32)
    assert (exact_kl(policy, tiny_gpt(0, torch.float32), random_batch(0)) == 0).all()


def test_mean_of_exact_kl_is_the_kl_of_whole_responses():
    """A KL per token or of one step only: by enumeration of all responses of up to two tokens, E[exact_kl] = sum of p(y) log p(y)/q(y)."""
    policy, reference, prompt, end = tiny_gpt(0, vocab=3), tiny_gpt(1, vocab=3), [0, 2], 1
    responses = [[end]] + [[a, b] for a in (0, 2) for b in range(3)]
    batch = make_batch([prompt] * len(responses), responses, pad=2)
    with torch.no_grad():
        p, q = (torch.stack([naive_response_logprobs(model, prompt, response).sum() for response in responses]) for model in (policy, reference))
    close(p.exp().sum(), 1)
    close((p.exp() * exact_kl(policy, reference, batch)).sum(), (p.exp() * (p - q)).sum())


def test_exact_kl_agrees_with_samples():
    """The same by Monte Carlo with the sampler itself: log p/q and exact_kl have one mean, and exact_kl has less noise."""
    policy, reference = tiny_gpt(0, std=0.2), tiny_gpt(1, std=0.2)
    rollout = generate(policy, [[1, 2, 3]] * 2000, 4, 0.8, torch.Generator().manual_seed(0))
    with torch.no_grad():
        samples = (rollout.logp - response_logprobs(reference, rollout, 0.8)).sum(1)
    exact = exact_kl(policy, reference, rollout, 0.8)
    error = (samples - exact).std() / math.sqrt(2000)
    assert abs((samples - exact).mean()) < 4 * error and exact.mean() > 10 * error and exact.std() < samples.std()


# ---------------------------------------------------------------------------------------------------------------------
# the optimum

@pytest.mark.parametrize("beta", [0.05, 0.5, 5.0])
def test_optimum_of_two_atoms(beta):
    """A lost beta, a sum for a mean: with scores a (3 of 10) and b (7 of 10), J* = beta log(.3 e^(a/beta) + .7 e^(b/beta))."""
    a, b = 1.0, 0.4
    found = optimum(double([a] * 3 + [b] * 7), beta)
    close(found.objective, beta * math.log(0.3 * math.exp(a / beta) + 0.7 * math.exp(b / beta)))
    w = [math.exp(a / beta)] * 3 + [math.exp(b / beta)] * 7
    close(found.ess, sum(w) ** 2 / sum(x * x for x in w))
    assert isinstance(found.objective, float) and isinstance(found.ess, float)


def test_optimum_of_a_gaussian():
    """Scores of a normal distribution with mean m and deviation s: J* = m + s^2 / (2 beta), and the optimal policy's mean score is m + s^2 / beta."""
    m, s, beta = 0.3, 0.8, 1.0
    quantiles = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    scores = m + s * math.sqrt(2) * torch.special.erfinv(2 * quantiles - 1)
    close(optimum(scores, beta).objective, m + s ** 2 / (2 * beta), 1e-3)
    close(optimum_mean(scores, scores, beta), m + s ** 2 / beta, 2e-3)
    close(optimum(scores, beta).ess / 20000, math.exp(-s ** 2 / beta ** 2), 2e-2)


@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_optimum_is_the_best_of_all_policies(beta):
    """J* that some policy beats, or that no policy reaches: over all reweightings of the samples, sum w s - beta KL(w || uniform) is at most J*, with
    equality at w = softmax(s / beta)."""
    scores, N = noise(0, 12), 12

    def objective(w):
        return (w * scores).sum() - beta * (w * (w * N).log()).sum()

    best = optimum(scores, beta).objective
    close(best, objective(torch.softmax(scores / beta, 0)))
    for seed in range(50):
        assert objective(torch.softmax(scores / beta + 0.3 * noise(seed + 1, N), 0)) < best
    assert scores.mean() < best < scores.max()


def test_optimum_between_no_and_full_control():
    """The direction of beta (P61): a large one leaves the mean of the reference, a small one the best sample."""
    scores = noise(0, 12)
    close(optimum(scores, 1e6).objective, scores.mean(), 1e-5)
    close(optimum(scores, 1e6).ess, 12, 1e-5)
    close(optimum(scores, 1e-4).objective, scores.max() - 1e-4 * math.log(12), 1e-9)
    close(optimum(scores, 1e-4).ess, 1)
    values = [optimum(scores, beta).objective for beta in (0.01, 0.1, 1.0, 10.0)]
    assert values == sorted(values, reverse=True) and len(set(values)) == 4


def test_optimum_survives_large_scores_and_small_beta():
    """exp(1e6) is infinite: adding a constant to all scores adds it to J*, and changes neither weights nor sample size."""
    scores = noise(0, 12)
    for beta in (1e-3, 0.5):
        a, b = optimum(scores, beta), optimum(scores + 1000, beta)
        close([b.objective, b.ess], [a.objective + 1000, a.ess], 1e-6)
        close(optimum_mean(noise(1, 12), scores + 1000, beta), optimum_mean(noise(1, 12), scores, beta), 1e-6)


def test_optimum_pools_any_shape_and_dtype():
    """A logsumexp over prompts only, or in float32: (M, N) scores are M N samples, and float32 scores are summed in float64."""
    scores = noise(0, 3, 8)
    close(optimum(scores, 0.3), optimum(scores.flatten(), 0.3))
    close(optimum_mean(scores ** 2, scores, 0.3), optimum_mean(scores.flatten() ** 2, scores.flatten(), 0.3))
    many = noise(1, 5000).float()
    close(optimum(many, 0.3), optimum(many.double(), 0.3), 1e-12)


def test_optimum_mean_is_a_weighted_mean():
    """Weights of the values instead of the scores, or no normalisation."""
    values, scores, beta = noise(0, 9), noise(1, 9), 0.4
    w = [math.exp(s / beta) for s in scores.tolist()]
    close(optimum_mean(values, scores, beta), sum(x * v for x, v in zip(w, values.tolist())) / sum(w))
    close(optimum_mean(torch.full((9,), 3.0), scores, beta), 3)


@pytest.mark.parametrize("beta", [0.0, -0.1])
def test_optimum_needs_a_positive_beta(beta):
    """A division by 0, or the worst policy in place of the best."""
    with pytest.raises(ValueError, match="beta is above 0"):
        optimum(torch.zeros(3), beta)


@few
@given(st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=8), st.sampled_from([0.01, 0.3, 10.0]))
def test_optimum_lies_between_mean_and_maximum(scores, beta):
    """Any finite scores that overflow: mean <= J* <= max, 1 <= effective sample size <= N, and so for the optimal mean."""
    x = double(scores)
    found, slack = optimum(x, beta), 1e-7 * (1 + x.abs().max().item())
    assert x.mean() - slack <= found.objective <= x.max() + slack
    assert 1 - 1e-7 <= found.ess <= len(scores) + 1e-7
    assert x.mean() - slack <= optimum_mean(x, x, beta) <= x.max() + slack


# ---------------------------------------------------------------------------------------------------------------------
# best of n

def slow_best_of_n(proxy, gold, n):
    """The mean over all subsets of n samples of the gold of the one with the highest proxy; of two that tie, the later one."""
    subsets = list(itertools.combinations(range(len(proxy)), n))
    return sum(gold[max(subset, key=lambda i: (proxy[i], i))] for subset in subsets) / len(subsets)


@pytest.mark.parametrize("n", range(1, 9))
def test_best_of_n_equals_all_subsets(n):
    """P68: binomials off by one, the worst of n, gold in its own order instead of the proxy's; n = 1 is the mean, n = N the gold of the favourite."""
    proxy, gold = noise(0, 8), noise(2, 8)
    found = best_of_n(proxy, gold, n)
    close(found, slow_best_of_n(proxy.tolist(), gold.tolist(), n))
    if n == 1:
        close(found, gold.mean())
    if n == 8:
        close(found, gold[proxy.argmax()])
        assert gold[proxy.argmax()] < gold.max()  # so that the proxy's favourite can be told from the best


def test_best_of_n_of_many_prompts():
    """Samples pooled over prompts, or sorted along the wrong axis: (M, N) gives one number for each prompt."""
    proxy, gold = noise(0, 3, 6), noise(1, 3, 6)
    found = best_of_n(proxy, gold, 3)
    assert found.shape == (3,)
    close(found, [slow_best_of_n(p, g, 3) for p, g in zip(proxy.tolist(), gold.tolist())])
    assert best_of_n(proxy[0], gold[0], 3).shape == ()


def test_best_of_n_breaks_ties_by_position():
    """A sort that is not stable: the result would depend on the machine."""
    proxy, gold = double([1.0, 0, 1, 0, 1, 0, 1, 1]), noise(1, 8)
    for n in range(1, 9):
        close(best_of_n(proxy, gold, n), slow_best_of_n(proxy.tolist(), gold.tolist(), n))
    wide = torch.zeros(300)
    close(best_of_n(wide, torch.arange(300), 300), 299)


def test_best_of_n_of_constant_gold_is_that_constant():
    """Weights that do not sum to 1, also where the binomials are far beyond a float64."""
    for N, n in ((8, 3), (256, 128), (2000, 1000)):
        close(best_of_n(noise(0, N), torch.full((N,), 0.7, dtype=torch.float64), n), 0.7)


def test_best_of_n_accepts_float32_and_keeps_float64():
    """Sums in float32, which lose the digits that tell policies apart."""
    proxy, gold = noise(0, 8).float(), noise(1, 8).float()
    found = best_of_n(proxy, gold, 3)
    assert found.dtype == torch.float64
    close(found, slow_best_of_n(proxy.tolist(), gold.tolist(), 3))


@pytest.mark.parametrize("n", [0, -1, 9])
def test_best_of_n_needs_n_samples(n):
    """A best of 9 out of 8, which has no unbiased estimate, given as 0."""
    with pytest.raises(ValueError, match=f"best of {n} cannot be estimated from 8 samples"):
        best_of_n(torch.zeros(8), torch.zeros(8), n)


@few
@given(st.lists(st.tuples(st.integers(-2, 2), st.floats(-10, 10)), min_size=1, max_size=6), st.data())
def test_best_of_n_property(samples, data):
    """Any combination of ties and sizes in which the closed form and the subsets differ."""
    n = data.draw(st.integers(1, len(samples)))
    proxy, gold = zip(*samples)
    close(best_of_n(double([float(p) for p in proxy]), double(gold), n), slow_best_of_n(proxy, gold, n))


@pytest.mark.parametrize("n", [1, 2, 4, 16])
def test_best_of_n_kl_is_the_limit_of_many_atoms(n):
    """P68: log n alone, or (n-1)/n added. Of K equally likely responses best of n picks the k-th with probability (k/K)^n - ((k-1)/K)^n:
    the exact KL stays below the bound and reaches it as K grows."""
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


# ---------------------------------------------------------------------------------------------------------------------
# laws of overoptimisation

def slow_law(law, coefficients, d):
    """R at one distance, in Python floats."""
    if law == "rl":
        alpha, beta = coefficients
        return d * (alpha - beta * math.log(d)) if d else 0.0
    if law == "bon":
        alpha, beta = coefficients
        return d * (alpha - beta * d)
    a, b, c = coefficients
    KL = d ** 2
    return a + b * KL + c * KL ** 2


DISTANCES = [0.0, 0.3, 0.7, 1.0, 1.6, 2.5, 4.0]
COEFFICIENTS = {"rl": (1.4, 0.6), "bon": (1.4, 0.6), "quadratic": (0.2, 0.5, -0.03)}


@pytest.mark.parametrize("law", list(COEFFICIENTS))
def test_fit_law_finds_the_law_that_made_the_points(law):
    """A wrong sign of beta, d for KL, the logarithm of KL, or NaN from 0 log 0: the points lie on the law, one of them at d = 0, and rmse is 0."""
    fitted, rmse = fit_law(DISTANCES, [slow_law(law, COEFFICIENTS[law], d) for d in DISTANCES], law)
    assert isinstance(fitted, tuple) and fitted == pytest.approx(COEFFICIENTS[law]) and isinstance(rmse, float) and rmse < 1e-12


@pytest.mark.parametrize("law", list(COEFFICIENTS))
def test_fit_law_is_least_squares(law):
    """Coefficients of something else than the smallest squares, an rmse divided by the degrees of freedom or left squared: at the optimum the slope of
    the squared error vanishes in every coefficient, by finite differences, and rmse is that of a loop."""
    R = [slow_law(law, COEFFICIENTS[law], d) + noise for d, noise in zip(DISTANCES, noise(0, 7).tolist())]

    def squares(coefficients):
        return sum((slow_law(law, coefficients, d) - r) ** 2 for d, r in zip(DISTANCES, R))

    fitted, rmse = fit_law(double(DISTANCES), double(R), law)
    assert rmse == pytest.approx(math.sqrt(squares(fitted) / 7)) and rmse > 0.1
    for i in range(len(fitted)):
        up, down = ([c + h * (i == j) for j, c in enumerate(fitted)] for h in (1e-5, -1e-5))
        assert abs(squares(up) - squares(down)) / 2e-5 < 1e-5 and min(squares(up), squares(down)) > squares(fitted)


def test_fit_law_counts_a_point_at_0_as_reward_0():
    """0 log 0: at d = 0 the laws say 0 whatever the coefficients are, so the point moves none of them, and its reward is all residual."""
    R = noise(0, 6)
    for law in ("rl", "bon"):
        without, rmse = fit_law(DISTANCES[1:], R, law)
        with_it, more = fit_law(DISTANCES, torch.cat([double([0.5]), R]), law)
        assert with_it == pytest.approx(without) and 7 * more ** 2 == pytest.approx(6 * rmse ** 2 + 0.25)


@pytest.mark.parametrize("d, law, said", [
    (DISTANCES, "linear", "unknown law 'linear', choose from rl, bon, quadratic"), ([0.1, -0.2, 1.0], "rl", "at least 0, got -0.2"),
    ([0.1, math.nan, 1.0], "bon", "at least 0"), ([1.0], "rl", "2 coefficients and cannot be fitted to 1 points"),
    ([1.0, 2.0], "quadratic", "3 coefficients and cannot be fitted to 2 points"),
])
def test_fit_law_refuses_what_it_cannot_fit(d, law, said):
    """KL for d where it was estimated below 0, a law by another name, or coefficients that the points leave free."""
    with pytest.raises(ValueError, match=said):
        fit_law(d, [0.0] * len(d), law)


# ---------------------------------------------------------------------------------------------------------------------
# comparisons

def test_win_rate_counts_ties_as_a_half():
    """P50, P69: ties as wins or as losses, the two sides exchanged."""
    a, b = [1.0, 2, 3, 4, 5], [0.0, 2, 4, 4, 1]
    assert win_rate(double(a), double(b)) == pytest.approx(sum((x > y) + 0.5 * (x == y) for x, y in zip(a, b)) / 5) == pytest.approx(0.6)
    assert win_rate(double(b), double(a)) == pytest.approx(0.4)
    assert win_rate(double(a), double(a)) == 0.5
    assert isinstance(win_rate(double(a), double(b)), float)


def test_standard_error():
    """The population deviation, the variance, or the deviation without the root of n; NaN for a single sample."""
    x = [1.0, 4.0, 2.0, 8.0]
    mean = sum(x) / 4
    assert standard_error(double(x)) == pytest.approx(math.sqrt(sum((y - mean) ** 2 for y in x) / 3 / 4))
    assert standard_error(double([5.0])) == 0 and isinstance(standard_error(double(x)), float)
    assert standard_error(double([5.0, 5.0])) == 0


def test_standard_error_covers_the_truth():
    """What it is for: over 400 means of 25 samples, their spread is the standard error."""
    samples = noise(0, 400, 25)
    close(samples.mean(1).std(), sum(standard_error(row) for row in samples) / 400, 0.1)


# ---------------------------------------------------------------------------------------------------------------------
# sampling for evaluation

PROMPTS = [[1, 2, 3], [4], [5, 6], [1, 2, 3], [7], [8, 0], [1, 2, 3]]


def same(a, b):
    return [rows_of(x) for x in a] == [rows_of(x) for x in b]


def test_sample_policy_is_reproducible():
    """P71: two evaluations of one policy that differ; a seed that is not used; a global seed that matters or is moved."""
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
    """A last part that is lost, or prompts in another order: their gold would be compared with other prompts' answers."""
    rollouts = sample_policy(tiny_gpt(), PROMPTS, 4, 1.0, 0, "bar", size=size)
    assert [prompt for rollout in rollouts for prompt, _ in rows_of(rollout)] == PROMPTS
    assert [len(rollout) for rollout in rollouts] == [min(size, 7 - at) for at in range(0, 7, size)]
    assert max(int(rollout.response_lens.max()) for rollout in rollouts) <= 4


def test_sample_policy_goes_on_with_its_generator():
    """P19: every part seeded anew: the same prompt would get the same answer in every part."""
    parts = sample_policy(tiny_gpt(), [[1, 2, 3]] * 8, 6, 1.0, 0, "bar", size=1)
    assert len({tuple(rows_of(part)[0][1]) for part in parts}) > 3


def test_sample_policy_passes_the_temperature_on():
    """P71: evaluation at another temperature than asked for."""
    policy = tiny_gpt()
    (rollout,) = sample_policy(policy, PROMPTS, 5, 0.5, 0, "bar")
    with torch.no_grad():
        close(rollout.logp, response_logprobs(policy, rollout, 0.5))
        assert (rollout.logp - response_logprobs(policy, rollout)).abs().max() > 0.01
    assert not rollout.logp.requires_grad
