"""Tests of micro.py: its maths against the lessons, its loops by what they hand to the maths, and a tiny run."""

import ast
import copy
import re
import sys
from pathlib import Path

import pytest
import torch

import dpo
import evaluate
import micro
import ppo
import reward

MASK = torch.arange(5) < torch.tensor([[1], [3], [5], [2]])  # (B, R)
MATHS = [  # name, lesson, shapes of the inputs, further arguments
    ("whiten", ppo, [(4, 5)], (MASK,)),
    ("token_rewards", ppo, [(4,), (4, 5), (4, 5)], (MASK, 0.3)),
    ("gae", ppo, [(4, 5)] * 2, (MASK, 0.9, 0.8)),
    ("policy_loss", ppo, [(4, 5)] * 3, (MASK,)),
    ("value_loss", ppo, [(4, 5)] * 3, (MASK,)),
    ("bradley_terry_loss", reward, [(4,)] * 2, ()),
    ("dpo_loss", dpo, [(4,)] * 4, (0.3,)),
]


def value_and_gradients(function, inputs, arguments):
    leaves = [x.clone().requires_grad_() for x in inputs]
    value = function(*[x * MASK if x.dim() == 2 else x for x in leaves], *arguments)
    value = torch.stack(value) if isinstance(value, tuple) else value
    weights = torch.arange(1.0, value.numel() + 1, dtype=torch.float64).view_as(value)
    return value.detach(), *torch.autograd.grad((weights * value).sum(), leaves)


@pytest.mark.parametrize("name, lesson, shapes, arguments", MATHS)
def test_the_maths_is_the_lessons_maths(name, lesson, shapes, arguments):
    """Bug: a sign, a clip, a mean or a shift differs from ppo.py, dpo.py or reward.py, forward or backward."""
    for _ in range(20):
        inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
        mine, theirs = [value_and_gradients(getattr(module, name), inputs, arguments) for module in (micro, lesson)]
        torch.testing.assert_close(mine, theirs)


def test_the_optimum_is_the_lessons_optimum():
    """Bug: beta multiplies where it divides, or the mean is a sum."""
    scores = torch.randn(50)
    assert micro.optimum(scores, 0.3) == pytest.approx(evaluate.optimum(scores, 0.3).objective)


def test_cells_after_the_end_do_not_matter():
    """Bug: a mask is missing, so that a NaN after the end reaches a loss."""
    a, b, c = [torch.where(MASK, torch.randn(4, 5), torch.nan) for _ in range(3)]
    rewards = micro.token_rewards(torch.randn(4), a, b, MASK, 0.3)
    results = [rewards, *micro.gae(rewards, c, MASK), micro.whiten(a, MASK), micro.policy_loss(a, b, c, MASK),
               micro.value_loss(a, b, c, MASK)]
    assert all(result.isfinite().all() for result in results)


# ---- the language and the network -----------------------------------------------------------------

@pytest.mark.parametrize("text, points", [
    ("film : plot was very great , cast was not awful", 2.0),
    ("meal : soup was not very good", -1.0),
    ("meal : plot was great", -1.0),
    ("film : plot was great , plot was good , plot was great", -1.0),
    ("film : plot great , cast was good", -0.5),
])
def test_gold_by_hand(text, points):
    """Bug: a clause that is broken, off the subject or a repetition is paid for."""
    assert micro.gold(text) == points


def demonstrations(n):
    return torch.tensor([micro.make_demonstration() for _ in range(n)])                       # (n, T)


def test_labels_follow_bradley_and_terry(monkeypatch):
    """Bug: the worse answer is chosen more often, or the better one always."""
    monkeypatch.setattr(micro, "generate", lambda policy, ids: demonstrations(len(ids)))
    chosen, rejected = [micro.decode(ids) for ids in micro.label_pairs(None, 3000)]
    gains = torch.tensor([micro.gold(a) - micro.gold(b) for a, b in zip(chosen, rejected)])   # (n,)
    expected = torch.sigmoid(gains.abs())[gains != 0]
    right = (gains[gains != 0] > 0).sum()
    assert abs(right - expected.sum()) < 4 * (expected * (1 - expected)).sum().sqrt()


@pytest.fixture
def policy():
    """A policy far from uniform, in float64."""
    policy = micro.GPT().double()
    policy.head.weight.data *= 3
    return policy


@pytest.fixture
def scorer():
    scorer = micro.GPT().double()
    scorer.head = torch.nn.Linear(micro.C, 1).double()
    return scorer


def test_sampled_and_scored_log_probs_are_equal(policy, monkeypatch):
    """Bug: the slice is off by one, the sampler has another temperature, or a word after the end counts."""
    seen = []
    draw = torch.multinomial
    monkeypatch.setattr(torch, "multinomial", lambda probs, n: (seen.append(probs), draw(probs, n))[1])
    ids = micro.generate(policy, micro.PROMPTS.repeat(20, 1))
    logp = torch.stack(seen, dim=1).log().gather(2, ids[:, micro.P:, None])[:, :, 0]          # (B, R)
    scored = micro.response_logprobs(policy, ids)
    for row in range(len(ids)):
        words = [micro.WORDS[i] for i in ids[row, micro.P:]]
        length = words.index(".") + 1 if "." in words else micro.R
        torch.testing.assert_close(scored[row, :length], logp[row, :length])
        assert (scored[row, length:] == 0).all() and micro.answer_mask(ids)[row].sum() == length


def test_the_score_is_read_at_the_full_stop(scorer):
    """Bug: the score is read a word too early or too late."""
    ids = demonstrations(10)
    for row, score in zip(ids, micro.get_scores(scorer, ids)):
        length = row.tolist().index(micro.WORDS.index(".")) + 1
        torch.testing.assert_close(score, scorer(row[None, :length])[0, -1, 0])


# ---- the loops ------------------------------------------------------------------------------------

def spy(monkeypatch, *names):
    """A list that gets (arguments, result) of every call of these functions of micro.py."""
    calls = []
    for name in names:
        function = getattr(micro, name)

        def recorded(*args, function=function):
            calls.append((args, function(*args)))
            return calls[-1][1]
        monkeypatch.setattr(micro, name, recorded)
    return calls


def among(rows, others):
    """Every row is one of the others."""
    return bool((rows[:, None] == others[None]).all(dim=2).any(dim=1).all())


def test_the_ppo_loop(policy, scorer, monkeypatch):
    """Bug: a wrong or a learning reference, old log-probs that move, whitened returns, a gradient into the targets."""
    reference = copy.deepcopy(policy)
    reference.head.weight.data *= 0.9
    frozen = copy.deepcopy([reference.state_dict(), scorer.state_dict()])
    calls = spy(monkeypatch, "generate", "token_rewards", "gae", "whiten", "policy_loss", "value_loss")
    micro.train_ppo(policy, reference, scorer, 0.3, iterations=2, B=64)
    torch.testing.assert_close([reference.state_dict(), scorer.state_dict()], frozen, rtol=0, atol=0)
    assert len(calls) == 2 * (4 + 8 * 2)
    while calls:
        (_, ids), ((scores, old_logp, ref_logp, mask, beta), rewards), gae, (_, white), *updates = calls[:20]
        (_, values, _), (advantages, returns) = gae
        assert beta == 0.3 and gae[0][0] is rewards and torch.equal(mask, micro.answer_mask(ids))
        torch.testing.assert_close(scores, micro.get_scores(scorer, ids).detach())
        torch.testing.assert_close(ref_logp, micro.response_logprobs(reference, ids).detach())
        assert not any(x.requires_grad for x in (old_logp, rewards, values, advantages, returns, white))
        for (surrogate, _), (squares, _) in zip(updates[::2], updates[1::2]):
            pairs = zip([*surrogate[1:], *squares[1:]], [old_logp, white, mask, values, returns, mask])
            assert all(among(rows, others) for rows, others in pairs)
            assert surrogate[0].requires_grad and squares[0].requires_grad
        (first, _), (first_squares, _), (last, _) = updates[0], updates[1], updates[-2]
        torch.testing.assert_close(first[0].detach(), first[1])
        torch.testing.assert_close(first_squares[0].detach(), first_squares[1])
        assert not torch.allclose(last[0].detach(), last[1])
        del calls[:20]
    _, old_values, _, _ = first_squares
    assert not among(old_values, scorer(ids)[:, micro.P - 1:-1, 0])  # the critic has learned


def test_the_dpo_loop(policy, monkeypatch):
    """Bug: chosen and rejected change places, or the reference learns too."""
    reference = copy.deepcopy(policy)
    frozen = copy.deepcopy(reference.state_dict())
    chosen, rejected = demonstrations(64), micro.generate(policy, micro.PROMPTS.repeat(32, 1))
    calls = spy(monkeypatch, "dpo_loss")
    micro.train_dpo(policy, reference, chosen, rejected, 0.3, steps=20)
    torch.testing.assert_close(dict(reference.state_dict()), dict(frozen), rtol=0, atol=0)
    (_, _, *ref_logps, beta), _ = calls[-1]
    assert beta == 0.3
    for ref_logp, ids in zip(ref_logps, (chosen, rejected)):
        expected = micro.response_logprobs(reference, ids).sum(dim=1)                         # (n,)
        assert not ref_logp.requires_grad and torch.isclose(ref_logp[:, None], expected).any(dim=1).all()
    gains = [(micro.response_logprobs(policy, ids) - micro.response_logprobs(reference, ids)).sum(dim=1).mean()
             for ids in (chosen, rejected)]
    assert gains[0] > gains[1] + 1


# ---- the whole ------------------------------------------------------------------------------------

def table(text):
    """{policy: [gold, score, KL, share]}"""
    row = r"(SFT|DPO|PPO|PPO, no KL) +([-.\d]+) +([-.\d]+) +([-.\d]+) +([-\d]+)%  (?:film|meal) :.*"
    matches = filter(None, [re.fullmatch(row, line) for line in text.splitlines()])
    return {match[1]: [float(x) for x in match.groups()[1:]] for match in matches}


def test_a_small_run_prints_the_table(capsys):
    """Bug: a stage does not fit the next one."""
    micro.main(seed=0, steps=2, pairs=64, iterations=1, samples=20)
    assert list(table(capsys.readouterr().out)) == ["SFT", "DPO", "PPO", "PPO, no KL"]


def test_an_update_forgets_the_last_gradient():
    """Bug: gradients add up from step to step."""
    x = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=1.0)
    for _ in range(3):
        micro.update(optimizer, x.sum())
    assert x.item() == -3


def test_dpo_and_the_reward_model_learn_from_the_same_pairs(monkeypatch):
    """Bug: chosen and rejected are exchanged on the way to one of the two."""
    given = []
    monkeypatch.setattr(micro, "train_reward_model", lambda network, chosen, rejected, steps: given.append(
        (chosen, rejected)))
    monkeypatch.setattr(micro, "train_dpo", lambda policy, reference, chosen, rejected, *rest: given.append(
        (chosen, rejected)))
    micro.main(seed=0, steps=2, pairs=64, iterations=1, samples=20)
    (chosen, rejected), (dpo_chosen, dpo_rejected) = given
    assert torch.equal(chosen, dpo_chosen) and torch.equal(rejected, dpo_rejected)
    assert not torch.equal(chosen, rejected)


def test_the_columns_of_the_table(capsys, monkeypatch):
    """Bug: the KL, its price or the zero of the scores is wrong in the table, or a policy gets the wrong beta."""
    betas = []

    def disturb(policy, reference, *args):
        assert policy is not reference
        betas.extend(x for x in args if isinstance(x, float))
        policy.head.bias.data[::2] += 2  # far from the reference

    monkeypatch.setattr(micro, "train_dpo", disturb)
    monkeypatch.setattr(micro, "train_ppo", disturb)
    monkeypatch.setattr(micro, "optimum", lambda scores, beta: 2.0 if abs(scores.mean()) < 1 else 0.1)
    monkeypatch.setattr(micro, "train_reward_model", lambda network, *args: network.head.bias.data.add_(100))
    micro.main(seed=0, steps=2, pairs=64, samples=200, beta=0.3)
    rows = table(capsys.readouterr().out)
    assert betas == [0.3, 0.3, 0.0] and rows["SFT"][2] == 0
    for gold, score, kl, share in rows.values():
        assert abs(score) < 10 and gold < 0 and share == pytest.approx(100 * (score - 0.3 * kl) / 2, abs=2)
    assert all(rows[name][2] > 3 for name in ("DPO", "PPO", "PPO, no KL"))


def test_one_page_and_torch_alone():
    """Bug: the page grows, or leans on the rest of the repository."""
    source = Path(micro.__file__).read_text(encoding="utf-8")
    nodes = list(ast.walk(ast.parse(source)))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    assert len(source.splitlines()) <= 200 and not any(isinstance(node, ast.ImportFrom) for node in nodes)
    assert names <= {"torch"} | sys.stdlib_module_names
