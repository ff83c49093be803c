"""Tests of dpo.py: the losses against formulas in plain float64 and known optima, the loop against a slow replay."""

import itertools
import math

import pytest
import torch
from helpers import PAIRS, close, double, finish, naive_logits, naive_response_logprobs, noise, slow_step, tiny_gpt

import dpo
import estimators
import mdp
from data import minibatches
from lesson import problem
from ppo import PPOConfig


def slow_loss_of_pair(h, beta, kind, e):
    """The loss of one pair, in Python floats. Only for moderate h."""
    p = 1 / (1 + math.exp(-beta * h))
    if kind == "dpo":
        return -(1 - e) * math.log(p) - e * math.log(1 - p)
    if kind == "robust":
        return (-(1 - e) * math.log(p) + e * math.log(1 - p)) / (1 - 2 * e)
    if kind == "ipo":
        return (h - 1 / (2 * beta)) ** 2
    return max(0.0, 1 - beta * h)


def slow_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1, kind="dpo", e=0.0):
    total = 0.0
    for i in range(len(chosen)):
        h = (chosen[i] - ref_chosen[i]) - (rejected[i] - ref_rejected[i])
        total += slow_loss_of_pair(h.item(), beta, kind, e)
    return total / len(chosen)


# ---- the losses ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, e", [("dpo", 0.0), ("dpo", 0.1), ("dpo", 0.49), ("ipo", 0.0), ("slic", 0.0),
                                     ("robust", 0.0), ("robust", 0.1), ("robust", 0.45)])
@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0, 3.0])
def test_loss_equals_its_formula(beta, kind, e):
    """
    Bug: a wrong sign or factor, a missing reference or beta, chosen and rejected exchanged, a sum over pairs and not
    their mean, another default than beta 0.1 and dpo without smoothing, or a term that is detached.
    """
    four = [3 * noise(seed, 7) for seed in range(4)]
    close(dpo.dpo_loss(*four, beta, kind, e).item(), slow_loss(*four, beta, kind, e))
    close(dpo.dpo_loss(*four).item(), slow_loss(*four, 0.1, "dpo", 0.0))
    inputs = [x.requires_grad_() for x in four]
    assert torch.autograd.gradcheck(lambda *four: dpo.dpo_loss(*four, beta, kind, e), inputs)


@pytest.mark.parametrize("h, loss", [(-1000.0, 1000.0), (1000.0, 0.0)])
def test_loss_of_a_large_margin_is_finite(h, loss):
    """Bug: log(sigmoid(x)), which is -inf for x = -1000."""
    zero = torch.zeros(1)
    close(dpo.dpo_loss(torch.tensor([h]), zero, zero, zero, beta=1.0), loss)


@pytest.mark.parametrize("e", [0.05, 0.3, 0.45])
def test_robust_loss_is_the_clean_loss_on_average_over_flips(e):
    """
    Bug: a wrong sign of the second term, or a missing 1 - 2e.

    Each label is flipped with probability e. Over all 2^5 ways to flip five labels, the robust loss has the plain loss
    of the true labels as its mean, with the same gradient. The smoothed loss has another mean.
    """
    beta, h, zero = 0.7, noise(3, 5).requires_grad_(), torch.zeros(5)

    def mean_over_flips(kind):
        total = 0.0
        for flips in itertools.product((0, 1), repeat=5):
            signs = 1 - 2 * double(flips)
            probability = e ** sum(flips) * (1 - e) ** (5 - sum(flips))
            total = total + probability * dpo.dpo_loss(signs * h, zero, zero, zero, beta, kind, e)
        return total

    clean, robust = dpo.dpo_loss(h, zero, zero, zero, beta), mean_over_flips("robust")
    close(robust.item(), clean.item(), 1e-12)
    close(torch.autograd.grad(robust, h)[0], torch.autograd.grad(clean, h)[0], 1e-12)
    assert abs(mean_over_flips("dpo").item() - clean.item()) > 1e-3


def test_implicit_reward_of_the_optimum_is_the_reward():
    """Bug: another beta or sign: for pi = ref exp(r / beta) / Z, beta log pi/ref is r minus beta log Z."""
    beta, r, ref = 0.3, noise(0, 6), torch.log_softmax(noise(1, 6), 0)
    Z = (ref + r / beta).exp().sum()
    close(dpo.implicit_reward(torch.log_softmax(ref + r / beta, 0), ref, beta), r - beta * Z.log())


def test_each_pair_can_have_its_own_share_of_wrong_labels():
    """Bug: one share for all pairs, or a share that is too large for one of them."""
    four, shares = [noise(seed, 3) for seed in range(4)], [0.0, 0.1, 0.4]
    expected = [slow_loss(*[x[i:i + 1] for x in four], 0.7, "dpo", e) for i, e in enumerate(shares)]
    close(dpo.dpo_loss(*four, 0.7, label_smoothing=double(shares)).item(), sum(expected) / 3)
    with pytest.raises(ValueError, match="must be in"):
        dpo.dpo_loss(*four, 0.7, label_smoothing=double([0.0, 0.1, 0.5]))


@pytest.mark.parametrize("arguments, message", [
    (dict(beta=0.0), "beta must be above 0"),
    (dict(kind="kto"), "unknown kind 'kto', choose from dpo, ipo, slic, robust"),
    (dict(label_smoothing=0.1, kind="ipo"), "belongs to dpo and robust"),
    (dict(label_smoothing=0.5, kind="robust"), r"must be in \[0, 0.5\)"),
    (dict(label_smoothing=-0.1), r"must be in \[0, 0.5\)"),
])
def test_bad_arguments_are_refused(arguments, message):
    """Bug: a setting that has no effect, turns the loss around, or falls through to another loss, without an error."""
    x = torch.zeros(2)
    with pytest.raises(ValueError, match=message):
        dpo.dpo_loss(x, x, x, x, **arguments)


# ---- the loop --------------------------------------------------------------------------------------------------------

def slow_sums(model):
    """log pi of PAIRS, (pairs, 2): chosen and rejected."""
    return double([[naive_response_logprobs(model, pair["prompt"], response).sum().item()
                    for response in (pair["chosen"], pair["rejected"])] for pair in PAIRS])


@pytest.mark.parametrize("size", [2, 128])
def test_reference_log_probs_are_sums_over_each_response_alone(size):
    """
    Bug: a mean over tokens, the prompt in the sum, an effect of the padding of the part in which a pair was computed,
    or chosen and rejected exchanged.
    """
    reference = tiny_gpt(3)
    logp = dpo.reference_logprobs(reference, PAIRS, size)
    close(logp, slow_sums(reference))
    assert not logp.requires_grad


@pytest.mark.parametrize("kind, e", [("dpo", 0.0), ("dpo", 0.2), ("ipo", 0.0), ("slic", 0.0), ("robust", 0.2)])
def test_loop_equals_a_slow_replay(monkeypatch, kind, e):
    """
    Bug: a beta, kind or smoothing that is not passed on, a mean over tokens, reference log-probs of other rows after
    the shuffle, one order for two epochs, gradients that are not cleared or not clipped, weights that decay, a learning
    rate that does not rise and fall, or a metric of the wrong quantity.

    Only the order of the pairs is recorded. All the rest is computed again, one response after the other.
    """
    beta, lr, steps = 0.3, 0.02, 12
    orders = []

    def recorded(n, size, epochs, generator):
        assert (n, size, epochs) == (7, 2, 3)
        orders.extend(minibatches(n, size, epochs, generator))
        return orders

    monkeypatch.setattr(dpo, "minibatches", recorded)
    policy = tiny_gpt(0)
    config = dpo.DPOConfig(dpo_kind=kind, dpo_beta=beta, dpo_lr=lr, dpo_epochs=3, label_smoothing=e, dpo_batch=2)
    rows = [metrics for metrics, _ in dpo.train_dpo(policy, tiny_gpt(0), PAIRS, config, seed=0)]
    assert len(orders) == len(rows) == steps
    epochs = [torch.cat(orders[at:at + 4]).tolist() for at in (0, 4, 8)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != list(range(7)) != epochs[0]

    slow, ref = tiny_gpt(0), slow_sums(tiny_gpt(0))
    adam = torch.optim.AdamW(slow.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    norms = []
    for step, (order, row) in enumerate(zip(orders, rows)):
        pairs = [PAIRS[i] for i in order]
        chosen, rejected = [
            torch.stack([naive_response_logprobs(slow, pair["prompt"], pair[side]).sum() for pair in pairs])
            for side in ("chosen", "rejected")]
        loss = dpo.dpo_loss(chosen, rejected, *ref[order].T, beta, kind, e)  # equal to its formula, above
        # a tenth of the steps is 1.2, so the rise ends in the second step
        rate = lr * min((step + 1) / 2.2, (steps - step) / steps)
        norms.append(slow_step(slow, adam, rate, loss))

        chosen_reward = beta * (chosen.detach() - ref[order, 0])
        rejected_reward = beta * (rejected.detach() - ref[order, 1])
        margin = chosen_reward - rejected_reward
        expected = dict(step=step, loss=loss.item(), margin=margin.mean().item(), chosen_logp=chosen.mean().item(),
                        rejected_logp=rejected.mean().item(), chosen_reward=chosen_reward.mean().item(),
                        rejected_reward=rejected_reward.mean().item())
        assert set(row) == {*expected, "accuracy"} and next(iter(row)) == "step"
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, rel=1e-5, abs=1e-5), (step, name)
        if step:  # before the first step the margins are rounding noise around 0
            assert row["accuracy"] == pytest.approx((margin > 0).double().mean().item())
    assert max(norms) > 1
    for name, w in policy.state_dict().items():
        close(w, slow.state_dict()[name], 1e-5)


def test_the_first_margins_are_measured_in_nats_with_whole_responses(monkeypatch):
    """Bug: margins times beta, or a tolerance from log-probs of tokens, which makes a fault of long responses."""
    seen = []
    monkeypatch.setattr(dpo, "check_start_margin", lambda h, logp: seen.append((h, logp)))
    next(dpo.train_dpo(tiny_gpt(1), tiny_gpt(0), PAIRS, dpo.DPOConfig(dpo_batch=7, dpo_beta=0.3), seed=0))
    (h, logp), = seen
    logps = slow_sums(tiny_gpt(1))
    moved = logps - slow_sums(tiny_gpt(0))
    assert sorted(h.tolist()) == pytest.approx(sorted((moved[:, 0] - moved[:, 1]).tolist()), abs=1e-5)
    assert sorted(logp.tolist()) == pytest.approx(sorted(logps.flatten().tolist()), abs=1e-5)


def test_a_tie_is_not_accurate():
    """Bug: margins of 0 count as learned, and the accuracy begins at 1."""
    pairs = [dict(prompt=[1, 2], chosen=[3, 4], rejected=[3, 4])] * 2
    (metrics, _), = dpo.train_dpo(tiny_gpt(0), tiny_gpt(0), pairs, dpo.DPOConfig(dpo_epochs=1), seed=0)
    assert metrics["margin"] == metrics["accuracy"] == 0


def test_the_defaults():
    """Bug: a default that differs from the one with which the figures of the README were made."""
    assert vars(dpo.DPOConfig()) == dict(
        dpo_kind="dpo", dpo_beta=0.5, dpo_lr=2e-4, dpo_epochs=2, label_smoothing=0.0, dpo_batch=32,
        length_penalty=0.0, sft_weight=0.0)


def test_policy_as_its_own_reference_is_refused():
    """Bug: the same object passed twice: nothing would be learned."""
    policy = tiny_gpt()
    with pytest.raises(ValueError, match="same object"):
        next(dpo.train_dpo(policy, policy, PAIRS, dpo.DPOConfig(), seed=0))


# ---- the remedies ----------------------------------------------------------------------------------------------------

TREE, REF, REWARDS, _ = problem(0)


def rest_of_loss(beta, **changes):
    """log pi (Y,) where dpo_loss rests, if each pair of the tree is labelled with probability sigmoid(r_a - r_b)."""
    a, b = torch.triu_indices(TREE.Y, TREE.Y, 1)
    a_wins = torch.sigmoid(REWARDS[a] - REWARDS[b])
    ref = mdp.response_logp(TREE, REF) - changes.pop("fee", 0.0) * TREE.mask.sum(dim=1)

    def gradient(logits):
        logp = mdp.response_logp(TREE, logits.requires_grad_())

        def losses(a, b):  # dpo_loss is a mean over pairs: one pair at a time
            return torch.vmap(lambda *four: dpo.dpo_loss(*four, beta, **changes))(logp[a], logp[b], ref[a], ref[b])

        loss = (a_wins * losses(a, b) + (1 - a_wins) * losses(b, a)).mean()
        return torch.autograd.grad(loss, logits)[0]

    logits, update = estimators.rest(REF, gradient, steps=240)
    assert update < 1e-5
    return mdp.response_logp(TREE, logits)


def test_chipo_rests_at_the_optimum_of_kl_plus_chi_squared():
    """
    Bug: a ratio of the wrong sign, the logarithm alone, or a clamp that cuts ratios which the optimum has.

    The optimum is pi = ref z with beta (z + log z) = r - c, where c makes the sum of pi one: two searches by halves.
    """
    beta, ref = 0.3, mdp.response_logp(TREE, REF).exp()

    def halves(low, high, too_large):
        for _ in range(200):
            middle = (low + high) / 2
            large = too_large(middle)
            low, high = torch.where(large, low, middle), torch.where(large, middle, high)
        return low

    def ratios(c):
        x = (REWARDS - c) / beta
        logs = halves(torch.full_like(x, -200), torch.full_like(x, 200), lambda y: y + y.exp() > x)
        return logs.exp()

    c = halves(double(-100), double(100), lambda c: (ref * ratios(c)).sum() < 1)
    pi = ref * ratios(c)
    close(pi.sum(), 1.0)
    close(rest_of_loss(beta, kind="chipo").exp(), pi, 1e-4)
    assert (pi / ref).max() < 1 + (REWARDS.max() - REWARDS.min()) / beta


def test_a_price_of_tokens_rests_at_the_optimum_of_the_score_without_it():
    """Bug: a price that is paid to long responses, or not in units of the score. The replay has the loop's part."""
    beta, alpha = 0.5, 0.4
    pi = rest_of_loss(beta, fee=alpha / beta).exp()
    best = mdp.solve(TREE, REF, REWARDS - alpha * TREE.mask.sum(dim=1), beta)
    close(pi, mdp.response_logp(TREE, best.logp).exp(), 1e-4)


@pytest.mark.parametrize("kind, alpha, weight", [("dpo", 0.3, 0.0), ("dpo", 0.0, 0.7), ("ipo", 0.3, 0.7),
                                                 ("chipo", 0.0, 0.0)])
def test_the_remedies_in_the_loop_equal_plain_formulas(monkeypatch, kind, alpha, weight):
    """
    Bug: a price that is paid to long responses, an SFT term that raises nothing, that takes the rejected response or
    forgets to divide by the length, or a link function that the loop does not pass on.
    """
    monkeypatch.setattr(dpo, "check_start_margin", lambda h, logp: None)  # this policy is not the reference
    beta = 0.5
    config = dpo.DPOConfig(dpo_kind=kind, dpo_beta=beta, dpo_batch=7, length_penalty=alpha, sft_weight=weight)
    metrics, _ = next(dpo.train_dpo(tiny_gpt(1), tiny_gpt(0), PAIRS, config, seed=0))
    expected, rewards = 0.0, [0.0, 0.0]
    for pair, logp, ref in zip(PAIRS, slow_sums(tiny_gpt(1)).tolist(), slow_sums(tiny_gpt(0)).tolist()):
        lengths = [len(pair["chosen"]), len(pair["rejected"])]
        implicit = [beta * (a - b + (math.exp(a - b) if kind == "chipo" else 0.0)) for a, b in zip(logp, ref)]
        u = implicit[0] - implicit[1] + alpha * (lengths[0] - lengths[1])
        loss = (u / beta - 1 / (2 * beta)) ** 2 if kind == "ipo" else math.log(1 + math.exp(-u))
        expected += (loss - weight * logp[0] / lengths[0]) / 7
        rewards = [x + y / 7 for x, y in zip(rewards, implicit)]
    assert metrics["loss"] == pytest.approx(expected, rel=1e-5)
    assert [metrics["chosen_reward"], metrics["rejected_reward"]] == pytest.approx(rewards, rel=1e-5, abs=1e-5)


def test_chipo_is_finite_far_from_the_reference():
    """Bug: exp(log pi/ref) overflows, and a step writes NaN into the weights."""
    chosen = torch.tensor([500.0, -500.0], requires_grad=True)
    loss = dpo.dpo_loss(chosen, torch.zeros(2), torch.zeros(2), torch.zeros(2), kind="chipo")
    loss.backward()
    assert loss.isfinite() and chosen.grad.isfinite().all()


# ---- online ----------------------------------------------------------------------------------------------------------

def test_online_dpo_rests_at_the_optimum_of_the_scorer():
    """
    Bug: the worse answer is chosen, an annotator who never errs or errs too often, another beta, answers to different
    prompts in a pair, log-probs of other rows, or a rate that does not fall.

    Responses of one token: pi* of every prompt is ref exp(score / beta) / Z over eleven tokens.
    """
    beta, scores, prompts = 0.5, noise(3, 11), [[1], [2]]
    policy, reference = tiny_gpt(0, layers=1), tiny_gpt(0, layers=1)
    config = PPOConfig(beta=beta, ppo_iterations=25, ppo_batch=128, minibatch=64, ppo_lr=0.05, response_tokens=1)
    loop = dpo.train_online_dpo(policy, reference, lambda batch: scores[batch.responses[:, 0]], prompts, config, 0)
    rows = finish(loop)
    for prompt in prompts:
        ref, logp = (torch.log_softmax(naive_logits(model, prompt)[-1], 0).detach() for model in (reference, policy))
        best = torch.log_softmax(ref + scores / beta, 0)
        assert (best.exp() * (best - logp)).sum() < 0.05 * (best.exp() * (best - ref)).sum()
    assert rows[0]["kl_at_start"] == 0


def test_online_dpo_learns_from_pairs_of_one_prompt_and_of_its_own_rows(monkeypatch):
    """Bug: pairs across prompts, a winner or an error of another pair, or a loss of other rows."""
    seen, prompts = [], [[1, 2, 3], [4], [5, 6]]
    config = PPOConfig(beta=0.3, ppo_iterations=1, ppo_batch=12, minibatch=4, ppo_epochs=2, ppo_lr=1e-30,
                       response_tokens=5, temperature=0.8)
    loss = dpo.dpo_loss
    scores = double([3, 1, 2, 4, 0, 0, 7, 8, 0, 5, 9, 0])

    def recorded(*five, label_smoothing):
        seen.append((*five, label_smoothing))
        return loss(*five, label_smoothing=label_smoothing)

    def score(batch):
        return scores

    monkeypatch.setattr(dpo, "dpo_loss", recorded)
    for _, _, rollout in dpo.train_online_dpo(tiny_gpt(1), tiny_gpt(1), score, prompts, config, seed=0):
        asked = rollout.prompt_ids()
        assert asked[0::2] == asked[1::2] and len({str(ids) for ids in asked}) > 1
        own, won = rollout.logp.sum(dim=1).tolist(), []
        for i in range(0, 12, 2):
            a, b = (i, i + 1) if scores[i] >= scores[i + 1] else (i + 1, i)
            won.append((own[a], own[b], min(0.499, 1 / (1 + math.exp(scores[a] - scores[b])))))
        pairs = [row for chosen, rejected, _, _, _, errs in seen
                 for row in zip(chosen.tolist(), rejected.tolist(), errs.tolist())]
        close(sorted(pairs), sorted(2 * won), 1e-5)
        for chosen, rejected, ref_chosen, ref_rejected, beta, _ in seen:
            close(chosen.detach(), ref_chosen, 1e-5)
            close(rejected.detach(), ref_rejected, 1e-5)
            assert beta == 0.3 and len(chosen) == 2
