"""The exact lesson on estimators, against closed forms, autograd and an enumeration with plain loops."""

import math

import pytest
import torch
from helpers import close, noise

import estimators
import mdp
from estimators import ESTIMATORS, Estimator, estimates, on_the_way, quality, rest_of_estimator
from lesson import problem
from mdp import policy_gradient, response_logp, token_logp

BETA = 0.5
TREE, REF, REWARDS, _ = problem(0)
BEST = mdp.solve(TREE, REF, REWARDS, BETA)
BY_NAME = {estimator.name: estimator for estimator in ESTIMATORS}
SHARES = (0.0, 0.4, 0.9)


def mean_of(name, share, G=2):
    """The exact mean of an estimator's estimates, and the exact gradient, (D,) each."""
    logits = on_the_way(REF, BEST, share)
    probs, g = estimates(TREE, logits, REF, REWARDS, BETA, BY_NAME[name], G)
    close(probs.sum(), 1.0)
    return probs @ g, policy_gradient(TREE, logits, REF, REWARDS, BETA).flatten()


def scores_of(logits):
    """grad log pi(y) of every response by autograd, (Y, D), and its reward with the KL penalty, (Y,)."""
    jacobian = torch.autograd.functional.jacobian(lambda x: response_logp(TREE, x), logits)
    return jacobian.flatten(1), REWARDS - BETA * (response_logp(TREE, logits) - response_logp(TREE, REF))


def test_the_gradient_of_a_token_is_that_of_autograd():
    """The gradient of a log-softmax with a sign or a probability wrong, or in another state's row."""
    logits = on_the_way(REF, BEST, 0.4)
    expected = torch.autograd.functional.jacobian(lambda x: token_logp(TREE, x), logits)
    close(estimators.token_scores(TREE, logits), expected.flatten(2))


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name, G", [
    ("REINFORCE", 2), ("RLOO", 2), ("RLOO", 3), ("PPO, exact critic", 2)])
def test_unbiased_estimators(name, G, share):
    """A baseline that knows the own response, or a critic that is not V: their mean is not the gradient of J."""
    mean, exact = mean_of(name, share, G)
    close(mean, exact, 1e-10)


def test_the_critic_of_the_root_is_J():
    """The critic leaves the KL penalties out, and PPO is unbiased all the same."""
    logits = on_the_way(REF, BEST, 0.4)
    V = estimators.state_values(TREE, logits, REF, REWARDS, BETA)
    close(V[0], mdp.objective(TREE, logits, REF, REWARDS, BETA))
    close(estimators.state_values(TREE, BEST.logp, REF, REWARDS, BETA), BEST.V)


@pytest.mark.parametrize("G", [2, 3])
def test_dr_grpo_is_a_share_of_rloo(G):
    """The own score in the mean of the group: the gradient is (G - 1) / G as long, and has the same direction."""
    mean, exact = mean_of("Dr. GRPO", 0.4, G)
    close(mean, (G - 1) / G * exact, 1e-10)


@pytest.mark.parametrize("share", SHARES)
def test_grpo_with_two_responses_counts_wins(share):
    """With G = 2 an advantage is +-1/sqrt(2): GRPO's mean is the gradient of a win rate, and not of J."""
    logits = on_the_way(REF, BEST, share)
    grads, rewards = scores_of(logits)
    probs = response_logp(TREE, logits).exp()
    wins = torch.sign(rewards[:, None] - rewards) @ probs                      # (Y,)
    mean, exact = mean_of("GRPO", share)
    close(mean, (probs * wins) @ grads / math.sqrt(2), 1e-4)  # 1e-6 is added to the deviation
    assert torch.cosine_similarity(mean, exact, dim=0) < 0.99


@pytest.mark.parametrize("G", [2, 3])
def test_one_group_is_a_batch_to_reinforce_pp(G):
    """On one prompt and one group, REINFORCE++ is GRPO with G under the deviation in the place of G - 1."""
    close(mean_of("REINFORCE++", 0.4, G)[0], math.sqrt(G / (G - 1)) * mean_of("GRPO", 0.4, G)[0], 1e-4)


@pytest.mark.parametrize("name", ["RLOO", "GRPO", "GRPO, 1/length", "GRPO as published"])
def test_mean_and_variance_equal_plain_loops(name):
    """All pairs of responses, one after the other: a probability, a 1/G, a length or the k3 loss is wrong."""
    logits = on_the_way(REF, BEST, 0.4)
    logp, ref_logp = response_logp(TREE, logits), response_logp(TREE, REF)
    by_length = name in ("GRPO, 1/length", "GRPO as published")
    in_loss = name == "GRPO as published"
    jacobian = torch.autograd.functional.jacobian(lambda x: token_logp(TREE, x), logits).flatten(2)
    slope = 1 - torch.exp(token_logp(TREE, REF) - token_logp(TREE, logits))
    own, pull, rewards = [], [], []
    for y, leaf in enumerate(TREE.leaves):
        length = len(leaf) if by_length else 1
        own.append(sum(jacobian[y, t] for t in range(len(leaf))) / length)
        pull.append(sum(slope[y, t] * jacobian[y, t] for t in range(len(leaf))) / length if in_loss else 0.0)
        rewards.append((REWARDS[y] - (0 if in_loss else BETA * (logp[y] - ref_logp[y]))).item())
    mean, second = 0.0, 0.0
    for i in range(TREE.Y):
        for j in range(TREE.Y):
            p = (logp[i] + logp[j]).exp()
            difference = rewards[i] - rewards[j]
            if name != "RLOO" and i != j:  # the deviation of two is |difference| / sqrt(2), the half of it on each side
                difference /= abs(difference) * math.sqrt(2)
            g = (difference * own[i] - difference * own[j]) / 2 - BETA * (pull[i] + pull[j]) / 2
            mean = mean + p * g
            second = second + p * (g ** 2).sum()
    found, exact = mean_of(name, 0.4)
    close(found, mean, 1e-4)
    row = quality(TREE, logits, REF, REWARDS, BETA, BY_NAME[name], 2)
    close(row.variance, 2 * (second - (mean ** 2).sum()), 1e-4)
    close(row.length, mean.norm() / exact.norm(), 1e-4)
    close(row.bias, (mean - exact).norm() / exact.norm(), 1e-4)
    close(row.noise, math.sqrt(row.variance) / mean.norm(), 1e-4)
    close(row.cosine, torch.dot(mean, exact) / mean.norm() / exact.norm(), 1e-4)


def test_reinforce_has_the_variance_of_single_responses():
    """The variance of a mean of G is G times too small, or too large."""
    logits = on_the_way(REF, BEST, 0.4)
    grads, rewards = scores_of(logits)
    probs = response_logp(TREE, logits).exp()
    exact = policy_gradient(TREE, logits, REF, REWARDS, BETA)
    variance = probs @ (rewards[:, None] * grads).square().sum(dim=1) - exact.square().sum()
    for G in (2, 3):
        close(quality(TREE, logits, REF, REWARDS, BETA, BY_NAME["REINFORCE"], G).variance, variance, 1e-10)


def test_the_k3_loss_is_another_gradient():
    """
    The pull of the k3 loss is that of KL(ref || pi) in each state, ref - pi, weighted with how often pi is there; the
    states that an action leads to are missing. It is not the gradient of -KL(pi || ref).
    """
    logits = on_the_way(REF, BEST, 0.4)
    pi, ref = torch.softmax(logits, dim=-1), torch.softmax(REF, dim=-1)
    visits = torch.zeros(TREE.S + TREE.Y, dtype=torch.float64)
    visits[0] = 1
    for s in range(TREE.S):
        for a in range(pi.shape[1]):
            visits[TREE.next_state[s, a]] += visits[s] * pi[s, a]
    pull = BETA * visits[:TREE.S, None] * (ref - pi)
    score_only, _ = mean_of("RLOO, k3 loss", 0.4)
    grads, _ = scores_of(logits)
    probs = response_logp(TREE, logits).exp()
    score = (probs * REWARDS) @ grads
    close(score_only - score, pull.flatten(), 1e-10)
    right = policy_gradient(TREE, logits, REF, 0 * REWARDS, BETA)              # the gradient of -beta KL(pi || ref)
    assert (pull - right).norm() > 0.3 * right.norm()


def test_at_the_optimum_all_rewards_are_equal():
    """At pi* the reward with its KL penalty is J* for every response: nothing is left to learn, and no noise."""
    _, rewards = scores_of(BEST.logp)
    close(rewards, BEST.J.expand(TREE.Y), 1e-9)
    for name in ("RLOO", "Dr. GRPO", "GRPO", "PPO, exact critic"):
        row = quality(TREE, BEST.logp, REF, REWARDS, BETA, BY_NAME[name], 2)
        assert math.isnan(row.cosine) and row.variance < 1e-12
    grads, _ = scores_of(BEST.logp)
    probs = response_logp(TREE, BEST.logp).exp()
    row = quality(TREE, BEST.logp, REF, REWARDS, BETA, BY_NAME["REINFORCE"], 2)
    close(row.variance, BEST.J ** 2 * (probs @ grads.square().sum(dim=1)), 1e-9)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("RLOO", "GRPO, 1/length")]


@pytest.mark.parametrize("name", ["GRPO", *SLOW])
def test_with_the_kl_in_the_reward_all_kinds_rest_at_the_optimum(name):
    """GRPO is biased, and ends at pi* all the same, because there all rewards are equal."""
    logits, _ = rest_of_estimator(TREE, REF, REWARDS, BETA, BY_NAME[name], steps=150)
    assert mdp.kl(TREE, logits, BEST.logp) < 0.02


@pytest.mark.slow
def test_with_a_k3_loss_the_rest_is_elsewhere():
    """A k3 loss rests where its own mean is 0, and there the gradient of J is not."""
    logits, update = rest_of_estimator(TREE, REF, REWARDS, BETA, BY_NAME["RLOO, k3 loss"], steps=200)
    assert update < 1e-3 and mdp.kl(TREE, logits, BEST.logp) > 0.2
    assert policy_gradient(TREE, logits, REF, REWARDS, BETA).norm() > 0.1


def test_losses_of_pairs_by_hand():
    """A sum in the place of a mean over tokens, odds of a whole response, z with the wrong sign, pairs exchanged."""
    logits = REF + 0.3 * noise(5, *REF.shape)
    losses = estimators.pair_losses(TREE, logits, REF, BETA)
    logp, ref_logp = response_logp(TREE, logits).tolist(), response_logp(TREE, REF).tolist()
    z = sum(math.exp(x) * (x - r) for x, r in zip(logp, ref_logp))

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    for a, b in ((3, 17), (0, 39)):
        la, lb = logp[a] / len(TREE.leaves[a]), logp[b] / len(TREE.leaves[b])
        close(losses["SimPO"][a, b], -math.log(sigmoid(2 * la - 2 * lb - 1)))
        odds = [math.exp(x) / (1 - math.exp(x)) for x in (la, lb)]
        close(losses["ORPO"][a, b], -la - 0.1 * math.log(sigmoid(math.log(odds[0] / odds[1]))))
        close(losses["KTO"][a, b], 2 - sigmoid(BETA * (logp[a] - ref_logp[a] - z))
              - sigmoid(BETA * (z - logp[b] + ref_logp[b])))


@pytest.mark.slow
def test_the_lesson_is_shown(monkeypatch, capsys):
    """The table loses a row or a column, or a mistake ends in a traceback."""
    monkeypatch.setattr(estimators, "ESTIMATORS", (Estimator("RLOO", "rloo"), Estimator("a", "rloo"), BY_NAME["GRPO"]))
    monkeypatch.setattr(estimators, "rest", lambda start, gradient, steps: (start, 0.5))
    estimators.main(["--seed", "0"])
    out = capsys.readouterr().out
    assert out.count("   RLOO                 1.000   1.000   0.000") == 3
    assert "100% of the way to pi*: KL(pi||pi*) = 0.0000 nats" in out
    assert [line.split()[0] for line in out.splitlines()[-6:]] == ["GRPO", "DPO", "IPO", "SimPO", "ORPO", "KTO"]
    assert "   DPO                  1.0000        0.0000" in out
    with pytest.raises(SystemExit) as stop:
        estimators.main(["--seed", "-1"])
    assert stop.value.code == 2 and "--seed must be at least 0" in capsys.readouterr().err
