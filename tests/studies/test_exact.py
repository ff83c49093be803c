"""The studies without a GPT, `tree` and the exact parts of `limits` and `robust`, against enumeration and loops."""

import itertools

import pytest
import torch

from mdp import Training, learn_ppo, objective, response_logp, win_probabilities
from studies import limits_exact, limits_rewards, robust_exact, tree
from studies.lab import select

# ---- limits ---------------------------------------------------------------------------------------

def best_policy(p, rewards, beta):
    """ref exp(r / beta) / Z over all responses, and J* = beta log Z."""
    weights = p * (rewards / beta).exp()
    return weights / weights.sum(), (beta * weights.sum().log()).item()


def J_of(pi, p, rewards, beta):
    return (pi @ rewards - beta * (pi * (pi / p).log()).sum()).item()


def fit_by_hand(mdp_tree, rewards, labelled):
    """The smallest weights of n-grams and of an indicator a response that give the labelled rewards, by the pinv."""
    features = torch.cat([limits_rewards.ngram_counts(mdp_tree), torch.eye(mdp_tree.Y, dtype=torch.float64)], dim=1)
    return features @ (torch.linalg.pinv(features[labelled]) @ rewards[labelled])


def test_coverage_beta_and_annotators_equal_an_enumeration():
    """Bug: the gap in the learned reward, the first responses for the labelled ones, another beta, seed or whim."""
    found = limits_exact.limits_job(7, 2)
    mdp_tree, ref, rewards, generator = limits_rewards.tree_with_taste(7, 4, 0.5)
    order = torch.randperm(mdp_tree.Y, generator=generator)
    p, beta = response_logp(mdp_tree, ref).exp(), limits_exact.BETA
    for row in select(found, part="coverage", seed=7):
        n = round(row["x"] * mdp_tree.Y)
        learned = fit_by_hand(mdp_tree, rewards, order[:n])
        pi, _ = best_policy(p, learned, beta)
        gap = best_policy(p, rewards, beta)[1] - J_of(pi, p, rewards, beta)
        unlabelled = (learned - rewards)[order[n:]].square().mean().sqrt().item()
        assert (row["labelled"], row["unlabelled"], row["gap"]) == pytest.approx((0, unlabelled, gap), abs=1e-7)
    learned = fit_by_hand(mdp_tree, rewards, order[:round(0.2 * mdp_tree.Y)])
    for row in select(found, part="beta", seed=7):
        own, oracle = [(best_policy(p, r, row["x"])[0] @ rewards).item() for r in (learned, rewards)]
        expected = (own, oracle, oracle - own)
        assert (row["learned"], row["oracle"], row["gap"]) == pytest.approx(expected, abs=1e-7)

    draws = torch.randn(2, mdp_tree.Y, generator=generator, dtype=torch.float64)
    for row in select(found, part="annotators", seed=7)[1:4]:
        utilities = [(1 - row["x"]) ** 0.5 * draws[0] + sign * row["x"] ** 0.5 * draws[1] for sign in (1, -1)]
        pooled = limits_rewards.fit_bradley_terry(sum(win_probabilities(u) for u in utilities) / 2)
        pi, _ = best_policy(p, pooled, beta)
        kept = [(J_of(pi, p, u, beta) - J_of(p, p, u, beta)) / (best_policy(p, u, beta)[1] - J_of(p, p, u, beta))
                for u in utilities]
        assert row["kept"] == pytest.approx(sum(kept) / 2, abs=1e-7)
    assert [len(select(found, part=part)) for part in ("coverage", "beta", "annotators")] == [6, 7, 5]


def test_episodes_are_counted_to_nine_tenths_of_the_optimum(monkeypatch):
    """Bug: an iteration for an episode, the first share above one half, shaping in the sparse part, J of the start."""
    mdp_tree, ref, rewards, _ = limits_rewards.tree_with_taste(2, 5, 0.1)
    p = response_logp(mdp_tree, ref).exp()
    start, best = (p @ rewards).item(), best_policy(p, rewards, 0.2)[1]
    for row, shaping in zip(limits_exact.dense_part(2, 2), (None, limits_rewards.shape_rewards(mdp_tree, rewards))):
        training = Training(2, 32, lr=0.05)
        *_, (_, logits, _) = learn_ppo(mdp_tree, ref, rewards, 0.2, torch.Generator().manual_seed(2), training, shaping)
        last = (objective(mdp_tree, logits, ref, rewards, 0.2).item() - start) / (best - start)
        assert (row["curve"][0], row["curve"][2], len(row["curve"])) == pytest.approx((0, last, 3), abs=1e-7)
    monkeypatch.setattr(limits_exact, "learning_curve", lambda *asked: [0.0, 0.6, 0.91, 1.0])
    assert [(row["x"], row["episodes"]) for row in limits_exact.dense_part(2, 3)] == [("sparse", 64), ("dense", 64)]


def test_bradley_terry_finds_the_rewards_that_made_the_labels():
    """Bug: a wrong sign or a transposed gradient."""
    rewards = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wins = win_probabilities(rewards)
    assert torch.allclose(limits_rewards.fit_bradley_terry(wins), rewards - rewards.mean(), atol=1e-9)


def test_shaping_pays_on_the_way_and_takes_it_back():
    """Bug: the potential is not taken back at the end, so that writing itself is paid; a reward of another response."""
    mdp_tree, _, rewards, _ = limits_rewards.tree_with_taste(0, 3, 0.0)
    shaping = limits_rewards.shape_rewards(mdp_tree, rewards)                                 # (Y, R)
    assert shaping.sum(dim=1).abs().max() < 1e-9 and (shaping[~mdp_tree.mask] == 0).all()
    good, bad = mdp_tree.leaves.index((1, 0)), mdp_tree.leaves.index((2, 0))  # "good ." and "bad ."
    assert rewards[good] > rewards[bad] and shaping[good, 0] > 0 > shaping[bad, 0]
    assert (shaping[good, 0] - shaping[bad, 0]).item() == pytest.approx((rewards[good] - rewards[bad]).item())
    assert (rewards.mean().item(), rewards.var().item()) == pytest.approx((0, 1))
    assert limits_rewards.tree_with_taste(0, 4, 1e3)[2].abs().max() > 2  # normal noise; a uniform one ends at sqrt(3)
    counts = limits_rewards.ngram_counts(mdp_tree)[mdp_tree.leaves.index((1, 2, 0))]
    assert counts.nonzero()[:, 0].tolist() == [0, 1, 2, 4 + 4 * 1 + 2, 4 + 4 * 2 + 0]  # four words, then their pairs


# ---- robust ---------------------------------------------------------------------------------------

def robust_objective(policy, ref, nominal, heads, weight, beta):
    """J of a policy (N, 8, 8), written out: (N,)."""
    worst = (policy[:, None] * heads).sum(-1).mean(-1).min(dim=1).values
    kl = (policy * (policy / ref).log()).sum(-1).mean(-1)
    return weight * (policy * nominal).sum(-1).mean(-1) + (1 - weight) * worst - beta * kl


def test_the_robust_optimum_beats_every_policy_near_it():
    """Bug: max and min in the wrong order, a wrong sign in the mixture's step, or a gap that is no bound."""
    _, ref, heads = robust_exact.draw_tables(range(3), "both", k=3)
    nominal = heads[:, 0]
    policy, gap = robust_exact.solve_robust(ref, nominal, heads, 0.3, 0.5, 400)
    best = robust_objective(policy, ref, nominal, heads, 0.3, 0.5)
    assert gap.min() >= -1e-12 and gap.max() < 0.01
    assert robust_exact.solve_robust(ref, nominal, heads, 1.0, 0.5, 9)[1].max() == 0  # no worst case has any weight
    generator = torch.Generator().manual_seed(0)
    for size in (0.01, 0.1, 1.0) * 50:
        noise = size * torch.randn(policy.shape, generator=generator, dtype=torch.float64)
        other = torch.softmax(policy.log() + noise, dim=-1)
        assert (robust_objective(other, ref, nominal, heads, 0.3, 0.5) <= best + gap + 1e-9).all()


def test_the_true_reward_of_every_robust_policy():
    """Bug: the weight turned round, the learned reward for the true one, one hypothesis for the mean, a gap of one."""
    golds, gap = robust_exact.robust_job("both", 4, 50)
    gold, ref, heads = robust_exact.draw_tables(range(4), "both")
    lowest, mean = heads.min(dim=1).values, heads.sum(dim=1) / 5
    rewards = {("expectation", 1.0): mean, ("cell", 0.0): lowest, ("cell", 0.2): 0.2 * mean + 0.8 * lowest,
               ("one of five", None): heads[:, 0], ("oracle", None): gold}
    for kind, r in rewards.items():
        weights = ref * (r / 0.1).exp()
        policy = weights / weights.sum(-1, keepdim=True)
        assert golds[kind] == pytest.approx((policy * gold).sum(-1).mean(-1).tolist(), abs=1e-9), kind
    solved = {w: robust_exact.solve_robust(ref, mean, heads, w, 0.1, 50) for w in robust_exact.WEIGHTS}
    assert 0 < gap == pytest.approx(max(gaps.max().item() for _, gaps in solved.values()))
    assert golds["expectation", 0.2] == pytest.approx((solved[0.2][0] * gold).sum(-1).mean(-1).tolist(), abs=1e-9)


def test_the_kinds_of_errors():
    """Bug: over-scoring with the sign of under-scoring, errors in all cells, one error for five, or five for one."""
    tables = {error: robust_exact.draw_tables(range(200), error) for error in robust_exact.ERRORS}
    errors = {error: heads - gold[:, None] for error, (gold, _, heads) in tables.items()}
    for error, size, share in (("over", 4, 0.1), ("under", -4, 0.1), ("shared", 4, 0.1)):
        wrong = errors[error].abs() > 1e-9
        assert abs(wrong.double().mean() - share) < 0.01 and (errors[error][wrong] - size).abs().max() < 1e-9
    wrong = errors["both"].abs() > 1e-9
    assert abs(wrong.double().mean() - 0.4) < 0.01 and abs(errors["both"][wrong].std() - 2) < 0.1
    differ = {error: (x[:, 0] != x[:, 1]).any().item() for error, x in errors.items()}
    assert differ == dict(over=True, under=True, both=True, shared=False)


# ---- tree -----------------------------------------------------------------------------------------

def probability_alone(weights, trajectory):
    """p of one trajectory under one policy, state by state: a row of the table, or a step of the RNN at a time."""
    probability, row, hidden = 1.0, 0, None  # row: of the table's states at this depth
    for t, action in enumerate(trajectory):
        if "logits" in weights:
            logits = weights["logits"][(0, 1, 4)[t] + row]
            row = 3 * row + action
        else:
            before = weights["embed"][3 if t == 0 else trajectory[t - 1]] + weights["bias"][0]
            hidden = torch.tanh(before if t == 0 else before + hidden @ weights["recur"])
            logits = hidden @ weights["out"] + weights["out_bias"][0]
        probability = probability * torch.softmax(logits, dim=0)[action]
    return probability


@pytest.mark.parametrize("policy", ["rnn", "table"])
def test_policies_trained_side_by_side_are_policies_trained_alone(policy):
    """Bug: states numbered in another order than trajectories, or one policy's loss leaks into another's gradient."""
    drawn = [tree.draw_weights(policy, torch.Generator().manual_seed(seed), H=4) for seed in range(3)]
    stacked = {name: torch.stack([weights[name] for weights in drawn]).requires_grad_() for name in drawn[0]}
    first, *_, last = tree.descend(stacked, lambda logp: (logp[:, 5] ** 2).sum(), 3, 0.1)
    for n, y in itertools.product(range(3), range(27)):
        alone = probability_alone(drawn[n], tree.TRAJECTORIES[y].tolist())
        assert first[n, y].exp().item() == pytest.approx(alone.item(), abs=1e-12)
    for n in range(3):
        alone = {name: x.clone().requires_grad_() for name, x in drawn[n].items()}
        optimizer = torch.optim.Adam(alone.values(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            (probability_alone(alone, tree.TRAJECTORIES[5].tolist()).log() ** 2).backward()
            optimizer.step()
        expected = probability_alone(alone, tree.TRAJECTORIES[5].tolist()).item()
        assert last[n, 5].exp().item() == pytest.approx(expected, abs=1e-9)


def test_a_seed_is_the_same_in_any_number_of_seeds():
    """Bug: all seeds from one stream or the global one, a mean over seeds for a sum, pairs exchanged."""
    few, many = tree.tree_job("rnn", "dpo", 0.1, 1, 20), tree.tree_job("rnn", "dpo", 0.1, 3, 20)
    for cell, p in few.items():
        assert abs(p[:, 0] - many[cell][:, 0]).max() < 1e-8
    for pair, apart in ((tree.PAIRS[0], 1), (tree.PAIRS[1], 3)):
        generator = torch.Generator().manual_seed(0)
        drawn = torch.tensor([tree.draw_pair(pair, generator) for _ in range(30)])            # (30, 2)
        differ = tree.TRAJECTORIES[drawn].diff(dim=1)[:, 0] != 0                              # (30, 3)
        assert (differ.sum(dim=1) == apart).all() and differ.any(dim=0).all()  # at any step
        assert (many[pair, tree.FITTED][0, :, 0] > many[pair, "random"][0, :, 0]).all()


@pytest.mark.parametrize("policy, lr", [("rnn", 2e-3), ("table", 1e-2)])
def test_what_a_pair_teaches(policy, lr):
    """Bug: another loss, beta or rate than asked for, no reference, others that hold the rejected trajectory too."""
    found = tree.tree_job(policy, "ipo", 0.5, 1, 20)[tree.ONE_APART, "random"][:, 0]          # (2, 3)
    weights, pairs = tree.draw_cells(policy, [(tree.ONE_APART, "random", 0)])
    ref = tree.trajectory_logp(weights).detach()
    first, *_, last = tree.descend(
        weights, lambda logp: ((logp - ref)[0, pairs[0]].diff() + 1).square().sum(), 20, lr)  # 1 / (2 beta) is 1
    for p, logp in zip(found, (first, last), strict=True):
        chosen, rejected = logp[0, pairs[0]].exp().tolist()
        assert p.tolist() == pytest.approx([chosen, rejected, 1 - chosen - rejected], abs=1e-9)


def test_a_reference_is_fitted_to_the_chosen_trajectory():
    """Bug: p(chosen) stays below 1/2, the rejected one is fitted, the random reference is fitted too."""
    weights, pairs = tree.draw_cells("rnn", [(tree.ONE_APART, tree.FITTED, 0), (tree.ONE_APART, "random", 1)])
    before = tree.trajectory_logp(weights).exp().gather(1, pairs)
    tree.fit_to_chosen(weights, pairs, torch.tensor([True, False]), 300)
    after = tree.trajectory_logp(weights).exp().gather(1, pairs)                              # (2, 2)
    assert after[0, 0] > 0.8 and torch.allclose(after[1], before[1])
