"""The exact part of `robust`: the robust optimum, compared with its own objective and with bounds."""

import itertools

import pytest
import torch

from studies import robust_exact


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def robust_objective(policy, ref, nominal, heads, weight, beta):
    """J of a policy (N, 8, 8), written out: (N,)."""
    worst = robust_exact.value(policy[:, None], heads).min(dim=1).values
    kl = (policy * (policy / ref).log()).sum(-1).mean(-1)
    return weight * robust_exact.value(policy, nominal) + (1 - weight) * worst - beta * kl


def test_the_robust_optimum_beats_every_policy_near_it():
    """
    Bug: max and min in the wrong order, a wrong sign in the mixture's step, or a gap that is no bound.

    Oracle: J itself at the solution and around it.
    """
    _, ref, heads = robust_exact.draw_tables(range(3), 2.0, 0.0, k=3)
    nominal = heads[:, 0]
    policy, gap = robust_exact.solve_robust(ref, nominal, heads, 0.3, 0.5, 400)
    best = robust_objective(policy, ref, nominal, heads, 0.3, 0.5)
    assert (gap >= -1e-12).all()
    assert gap.max() < 0.01
    generator = torch.Generator().manual_seed(0)
    for size in (0.01, 0.1, 1.0) * 100:
        noise = size * torch.randn(policy.shape, generator=generator, dtype=torch.float64)
        other = torch.softmax(policy.log() + noise, dim=-1)
        assert (robust_objective(other, ref, nominal, heads, 0.3, 0.5) <= best + gap + 1e-9).all()


def test_the_optimum_of_every_mixture_is_an_upper_bound():
    """Bug: a solution above what is possible. For any mixture of the heads, mean of beta log Z is at least J."""
    _, ref, heads = robust_exact.draw_tables(range(3), 2.0, 0.0, k=3)
    nominal = heads[:, 0]
    policy, _ = robust_exact.solve_robust(ref, nominal, heads, 0.3, 0.5, 400)
    best = robust_objective(policy, ref, nominal, heads, 0.3, 0.5)
    for tenths in itertools.product(range(11), repeat=3):
        if sum(tenths) != 10:
            continue
        w = torch.tensor(tenths, dtype=torch.float64) / 10
        mixture = (w[:, None, None] * heads).sum(dim=1)
        z = ref.log() + (0.3 * nominal + 0.7 * mixture) / 0.5
        assert (0.5 * z.logsumexp(-1).mean(-1) >= best - 1e-9).all()


def test_weight_one_is_the_nominal_optimum_and_cell_minima_are_lower():
    """Bug: the weight is the wrong way round. Or E min is taken for min E, which it never exceeds."""
    _, ref, heads = robust_exact.draw_tables(range(4), 1.0, 0.0)
    nominal = heads[:, 0]
    policy, gap = robust_exact.solve_robust(ref, nominal, heads, 1.0, 0.2, 5)
    unnormalised = ref * (nominal / 0.2).exp()
    assert torch.allclose(policy, unnormalised / unnormalised.sum(-1, keepdim=True))
    assert gap.max() == 0
    cell_minimum = robust_exact.value(ref, heads.min(dim=1).values)
    worst_head = robust_exact.value(ref[:, None], heads).min(dim=1).values
    assert (cell_minimum < worst_head).all()


def test_hypotheses_know_the_gold_where_there_is_no_hole():
    """Bug: an error in every cell, or an error that is not shared although it should be. 40% of the cells are holes."""
    gold, _, heads = robust_exact.draw_tables(range(20), 2.0, 0.0)
    wrong = heads != gold[:, None]
    assert abs(wrong.double().mean() - 0.4) < 0.03
    gold, _, heads = robust_exact.draw_tables(range(20), 2.0, 1.0)
    assert (heads == heads[:, :1]).all()
    assert (heads != gold[:, None]).any()


def gains(size, shared):
    """The gains over weight 1 of all policies on three tables, by kind: {kind: list}."""
    golds, _ = robust_exact.robust_job(size, shared, 3, 50)
    by_kind = {}
    for row in robust_exact.summary_rows(size, shared, golds):
        by_kind.setdefault(row["minimum_of"], []).append(abs(row["gain"]))
    return by_kind


def test_with_one_shared_error_no_weight_changes_anything():
    """Bug: an ensemble helps although all its members are the same. Then the gain has another cause."""
    for size in (0.5, 2.0):
        found = gains(size, 1.0)
        assert max(found["expectation"] + found["cell"] + found["mean"]) < 1e-9
    assert max(gains(2.0, 0.0)["expectation"]) > 1e-3
