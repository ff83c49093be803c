"""The bench and the exact studies against brute force, closed forms and plain loops."""

import csv
import itertools
import math
import sys

import pytest
import torch

import lab
import studies_tree as studies
from mdp import Tree, kl, objective, response_logp, solve, win_probabilities


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setenv("LAB_SERIAL", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---------------------------------------------------------------------------------------------------------------------
# the bench

def test_mean_and_standard_error_by_hand():
    """Bug: the population's deviation, or the deviation of the seeds instead of the error of their mean. 1, 2, 6: variance 7, error sqrt(7/3)."""
    assert lab.mean_se([1, 2, 6]) == pytest.approx((3, math.sqrt(7 / 3)))
    assert lab.mean_se([4]) == (4, 0)
    with pytest.raises(ValueError):
        lab.mean_se([])


def test_rank_correlation_is_pearson_of_ranks_counted_by_hand():
    """Bug: ties ranked by position. x = 1 2 2 3 has ranks 1 2.5 2.5 4; y = 1 3 2 4 has its own: 4.5 / sqrt(4.5 * 5)."""
    assert lab.spearman([1, 2, 2, 3], [10, 30, 20, 40]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert lab.spearman([1, 2, 3], [1, 10, 1000]) == pytest.approx(1) and lab.spearman([1, 2, 3], [3, 2, -9]) == pytest.approx(-1)
    assert math.isnan(lab.spearman([1, 2], [5, 5]))
    with pytest.raises(ValueError):
        lab.spearman([1, 2], [1])


def test_rank_correlation_without_ties_is_the_textbook_sum():
    """Bug: a wrong norm. Without ties it is 1 - 6 sum d^2 / (n (n^2 - 1)), for every order of five numbers."""
    for order in itertools.permutations(range(5)):
        textbook = 1 - 6 * sum((i - j) ** 2 for i, j in enumerate(order)) / (5 * 24)
        assert lab.spearman(range(5), order) == pytest.approx(textbook)


def slow_first(x, y):
    torch.manual_seed(x)
    if x == 7:
        raise KeyError("seven")
    total = sum(i for i in range(3_000_000 if x == 0 else 10))
    return x, y, total > 0, torch.get_num_threads(), torch.randn(3).sum().item()


@pytest.mark.parametrize("serial", ["0", "1"])
def test_jobs_come_back_in_order_on_one_thread_each(serial, monkeypatch):
    """Bug: results in the order in which jobs finish; or processes that give other numbers than a loop."""
    monkeypatch.setenv("LAB_SERIAL", serial)
    monkeypatch.setattr(lab, "cores", lambda: 2)
    jobs = [(x, "abc"[x]) for x in range(3)]
    assert lab.parallel(slow_first, jobs) == [slow_first(*job)[:3] + (1, slow_first(*job)[4]) for job in jobs]
    assert lab.parallel(slow_first, []) == []
    with pytest.raises(RuntimeError, match=r"slow_first\(7, 'b'\).*seven"):
        lab.parallel(slow_first, [(0, "a"), (7, "b")])


def test_table_aligns_and_csv_keeps_all_keys(tmp_path):
    """Bug: a row with fewer keys shifts the columns, or a key that only a later row has is lost."""
    rows = [dict(name="a", x=1.0), dict(name="long", x=-12.5, y=3)]
    lines = lab.table(rows, ("name", "x", "y")).split("\n")
    assert lines == ["name        x  y", "a       1.000", "long  -12.500  3"]
    lab.write_csv(tmp_path / "r.csv", rows)
    with open(tmp_path / "r.csv", encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == [dict(name="a", x="1.0", y=""), dict(name="long", x="-12.5", y="3")]


def test_a_study_goes_on_without_matplotlib(tmp_path, monkeypatch, capsys):
    """Bug: an ImportError at the end of an hour of runs."""
    panels = [dict(title="t", xlabel="x", ylabel="y", lines=[dict(label="l", x=[1, 2], y=[3, 4], yerr=[0.1, 0.1])])]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    assert lab.picture(tmp_path / "p.png", panels) is False and "pip install matplotlib" in capsys.readouterr().out
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    assert lab.picture(tmp_path / "p.png", panels) and (tmp_path / "p.png").read_bytes()[1:4] == b"PNG"


def test_verdicts():
    """Bug: None, which is nothing that was tested, told as a failure."""
    assert [lab.verdict(held, "w") for held in (True, False, None)] == ["reproduced: w", "not reproduced: w", "not tested here: w"]


# ---------------------------------------------------------------------------------------------------------------------
# tree

def one_probability(w, y):
    """p of one trajectory under one policy, state by state: a dot product at a time for the RNN, a row of the table otherwise."""
    p, state, h = 1.0, 0, None
    for t, action in enumerate(y):
        if "logits" in w:
            logits = w["logits"][(0, 1, 4)[t] + state]
            state = 3 * state + action
        else:
            before = w["bias"][0] if t == 0 else h @ w["recur"] + w["bias"][0]
            h = torch.tanh(before + w["embed"][3 if t == 0 else y[t - 1]])
            logits = h @ w["out"] + w["out_bias"][0]
        p = p * torch.softmax(logits, dim=0)[action]
    return p


@pytest.mark.parametrize("policy", ["rnn", "table"])
def test_policies_side_by_side_are_policies_alone(policy):
    """Bug: one policy's weights or loss leak into its neighbour's, or states are numbered in another order than trajectories."""
    drawn = [studies.draw_weights(policy, torch.Generator().manual_seed(seed), H=4) for seed in range(3)]
    weights = {name: torch.stack([w[name] for w in drawn]).requires_grad_() for name in drawn[0]}
    logp = studies.trajectory_logp(weights)
    for n, y in itertools.product(range(3), range(27)):
        assert logp[n, y].exp().item() == pytest.approx(one_probability(drawn[n], studies.TRAJECTORIES[y].tolist()).item(), abs=1e-12)
    assert torch.allclose(logp.exp().sum(dim=1), torch.ones(3, dtype=torch.float64))
    *_, together = studies.descend(weights, lambda logp: (logp[:, 5] ** 2).sum(), 5, 0.1)
    for n, w in enumerate(drawn):
        alone = {name: x.clone().requires_grad_() for name, x in w.items()}
        optimizer = torch.optim.Adam(alone.values(), lr=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            (one_probability(alone, studies.TRAJECTORIES[5].tolist()).log() ** 2).backward()
            optimizer.step()
        assert together[n, 5].exp().item() == pytest.approx(one_probability(alone, studies.TRAJECTORIES[5].tolist()).item(), abs=1e-9)


def test_a_seed_is_the_same_in_any_number_of_seeds():
    """Bug: numbers drawn for all seeds from one stream, or a loss that is a mean over seeds where it should be a sum."""
    few, many = (studies.tree_job("rnn", "dpo", 0.1, seeds, 20) for seeds in (1, 3))
    for cell, p in few.items():
        assert abs(p[:, 0] - many[cell][:, 0]).max() < 1e-8
        assert abs(p.sum(axis=2) - 1).max() < 1e-9


def test_pairs_differ_where_they_should():
    """Bug: a 'pair' of one trajectory, or a kind that draws the other."""
    generator = torch.Generator().manual_seed(0)
    for kind, apart in zip(studies.PAIRS, (1, 3)):
        for _ in range(50):
            a, b = studies.TRAJECTORIES[studies.draw_pair(kind, generator)]
            assert (a != b).sum() == apart


# ---------------------------------------------------------------------------------------------------------------------
# limits

def test_ratings_are_fitted_by_the_smallest_weights():
    """Bug: labelled rows of the kernel where its columns belong. Oracle: the pseudo-inverse's solution with the indicators written out."""
    tree, _, rewards, generator = studies.tree_with_taste(0, 3, 0.5)
    features, labelled = studies.ngram_counts(tree), torch.randperm(tree.Y, generator=generator)[:9]
    full = torch.cat([features, torch.eye(tree.Y, dtype=torch.float64)], dim=1)
    weights = torch.linalg.pinv(full[labelled]) @ rewards[labelled]
    learned = studies.fit_ratings(features, rewards, labelled)
    assert torch.allclose(learned, full @ weights, atol=1e-9) and torch.allclose(learned[labelled], rewards[labelled], atol=1e-9)


def test_bradley_terry_finds_the_rewards_that_made_the_labels():
    """Bug: a sign or a transposed gradient; two opposite annotators have to leave nothing."""
    rewards = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wins = win_probabilities(rewards)
    assert torch.allclose(studies.fit_bradley_terry(wins), rewards - rewards.mean(), atol=1e-9)
    assert studies.fit_bradley_terry((wins + win_probabilities(-rewards)) / 2).abs().max() < 1e-9


def test_shaping_changes_no_return_and_no_optimum():
    """Bug: a potential that is not taken back at the end pays for writing. Oracle: soft value iteration with the shaped rewards, token by token."""
    tree, ref, rewards, _ = studies.tree_with_taste(0, 3, 0.1)
    shaping = studies.shape(tree, rewards)
    assert shaping.sum(dim=1).abs().max() < 1e-9 and shaping.abs().max() > 0.1 and (shaping[~tree.mask] == 0).all()
    paid = {tuple(y[:t + 1]): shaping[i, t] + (rewards[i] if t + 1 == len(y) else 0)
            for i, y in enumerate(tree.states[tree.S:]) for t in range(len(y))}
    logref, V, logp = ref.log_softmax(-1), {tuple(y): 0.0 for y in tree.states[tree.S:]}, torch.zeros_like(ref)
    for s in reversed(range(tree.S)):
        after = [(*tree.states[s], a) for a in range(4)]
        z = logref[s] + torch.stack([paid[y] + V[y] for y in after]) / 0.2
        V[tree.states[s]], logp[s] = 0.2 * z.logsumexp(0), z.log_softmax(0)
    best = solve(tree, ref, rewards, 0.2)
    assert torch.allclose(logp, best.logp, atol=1e-9) and abs(V[()] - best.J) < 1e-9


# ---------------------------------------------------------------------------------------------------------------------
# robust

def J(policy, ref, nominal, heads, weight, beta):
    worst = studies.value(policy[:, None], heads).min(dim=1).values
    return weight * studies.value(policy, nominal) + (1 - weight) * worst - beta * (policy * (policy / ref).log()).sum(-1).mean(-1)


def test_the_robust_optimum_beats_every_policy_near_it():
    """Bug: max and min in the wrong order, a wrong sign in the mixture's step, or a gap that is none. Oracle: J itself, at and around the solution."""
    gold, ref, heads = studies.draw_tables(range(3), 2.0, 0.0, k=3)
    policy, gap = studies.solve_robust(ref, heads[:, 0], heads, 0.3, 0.5, 400)
    best = J(policy, ref, heads[:, 0], heads, 0.3, 0.5)
    assert (gap >= -1e-12).all() and gap.max() < 0.01
    generator = torch.Generator().manual_seed(0)
    for size in (0.01, 0.1, 1.0) * 100:
        other = torch.softmax(policy.log() + size * torch.randn(policy.shape, generator=generator, dtype=torch.float64), dim=-1)
        assert (J(other, ref, heads[:, 0], heads, 0.3, 0.5) <= best + gap + 1e-9).all()
    for weights in itertools.product(range(11), repeat=3):  # any mixture's optimum is an upper bound: none is below
        if sum(weights) == 10:
            w = torch.tensor(weights, dtype=torch.float64) / 10
            z = ref.log() + (0.3 * heads[:, 0] + 0.7 * (w[:, None, None] * heads).sum(dim=1)) / 0.5
            assert (0.5 * z.logsumexp(-1).mean(-1) >= best - 1e-9).all()


def test_weight_one_is_the_nominal_optimum_and_cell_minima_are_lower():
    """Bug: the weight turned round; or E min taken for min E, which it never exceeds."""
    gold, ref, heads = studies.draw_tables(range(4), 1.0, 0.0)
    policy, gap = studies.solve_robust(ref, heads[:, 0], heads, 1.0, 0.2, 5)
    assert torch.allclose(policy, ref * (heads[:, 0] / 0.2).exp() / (ref * (heads[:, 0] / 0.2).exp()).sum(-1, keepdim=True)) and gap.max() == 0
    assert (studies.value(ref, heads.min(dim=1).values) < studies.value(ref[:, None], heads).min(dim=1).values).all()


def test_hypotheses_know_the_gold_where_there_is_no_hole():
    """Bug: an error everywhere, or one that is not shared although it should be; 40% of 64 cells are holes."""
    gold, _, heads = studies.draw_tables(range(20), 2.0, 0.0)
    assert abs((heads != gold[:, None]).double().mean() - 0.4) < 0.03
    gold, _, heads = studies.draw_tables(range(20), 2.0, 1.0)
    assert (heads == heads[:, :1]).all() and (heads != gold[:, None]).any()


# ---------------------------------------------------------------------------------------------------------------------
# whole studies

@pytest.mark.parametrize("study", [studies.tree, studies.limits_exact, studies.robust_exact])
def test_a_quick_pass_leaves_its_folder_and_is_the_same_twice(study, tmp_path):
    """Bug: a random number that no seed rules, a verdict that a quick pass has no right to, a file that is missing."""
    texts = []
    for out in (tmp_path / "a", tmp_path / "b"):
        rows, text = study(2, True, out)
        texts.append((text, (out / "results.csv").read_bytes()))
        assert rows and (out / "table.txt").stat().st_size and "not tested here: " in text.split("\n")[-1]
        assert (out / "verdict.txt").read_text().strip() == text[-len((out / "verdict.txt").read_text().strip()):]
    assert texts[0] == texts[1]


def test_with_one_shared_error_no_weight_changes_anything(tmp_path):
    """Bug: an ensemble that helps where all its members are one: then the gain comes from somewhere else."""
    rows, _ = studies.robust_exact(3, True, tmp_path)
    assert max(abs(row["gain"]) for row in rows if row["shared"] == 1.0 and row["minimum_of"] in ("expectation", "cell", "mean")) < 1e-9
    assert max(abs(row["gain"]) for row in rows if row["shared"] == 0.0 and row["minimum_of"] == "expectation") > 1e-3


def test_objective_of_the_optimum_on_the_study_trees():
    """Bug: rewards that are not in the order of the responses. J(pi) = J* - beta KL(pi || pi*) for the reference."""
    tree, ref, rewards, _ = studies.tree_with_taste(1, 4, 0.5)
    best = solve(tree, ref, rewards, 0.3)
    assert isinstance(tree, Tree) and abs(best.J - 0.3 * kl(tree, ref, best.logp) - objective(tree, ref, ref, rewards, 0.3)) < 1e-9
    good, bad = (tree.states.index(y) - tree.S for y in ((1, 0), (2, 0)))  # "good ." and "bad ."
    sure = studies.tree_with_taste(1, 4, 0.0)[2]
    assert sure[good] > sure[bad] and response_logp(tree, ref).exp().sum().item() == pytest.approx(1)
