"""Tests of micro.py: its maths against the lessons, its loops against slow replays, and its table."""

import copy
import math
import random
import re
import runpy
import sys
from collections import Counter, defaultdict

import pytest
import torch
from helpers import surprise

import micro
import ppo

MASK = torch.arange(5) < torch.tensor([[1], [3], [5], [2]])  # (B, R)


def value_and_gradients(function, inputs, arguments):
    leaves = [x.clone().requires_grad_() for x in inputs]
    value = function(*[x * MASK if x.dim() == 2 else x for x in leaves], *arguments)
    value = torch.stack(value) if isinstance(value, tuple) else value
    weights = torch.arange(1.0, value.numel() + 1, dtype=torch.float64).view_as(value)
    return value.detach(), *torch.autograd.grad((weights * value).sum(), leaves)


@pytest.mark.parametrize("name, shapes, arguments", [
    ("whiten", [(4, 5)], (MASK,)),
    ("token_rewards", [(4,), (4, 5), (4, 5)], (MASK, 0.3)),
    ("gae", [(4, 5)] * 2, (MASK, 0.9, 0.8)),
    ("policy_loss", [(4, 5)] * 3, (MASK,)),
    ("value_loss", [(4, 5)] * 3, (MASK,)),
])
def test_the_maths_is_the_lessons_maths(name, shapes, arguments):
    """Bug: a sign, a clip, a mean or a shift differs from ppo.py, forward or backward."""
    for _ in range(5):
        inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
        mine, theirs = [value_and_gradients(getattr(module, name), inputs, arguments) for module in (micro, ppo)]
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("text, points", [
    ("film : plot was very great , cast was not awful", 2.0),
    ("meal : soup was not very good", -1.0),
    ("meal : plot was great", -1.0),
    ("film : plot was great , plot was good , plot was great", -1.0),
    ("film : plot great , cast was good", -0.5),
    ("meal : cake was not dull , wine was very awful", -1.25),
])
def test_gold_by_hand(text, points):
    """Bug: a clause that is broken, off the subject or a repetition is paid for."""
    assert micro.gold(text) == points


def demonstrations(n):
    return torch.tensor([micro.make_demonstration() for _ in range(n)])                       # (n, T)


def test_demonstrations_are_reviews_of_every_kind():
    """Bug: praise alone; a thing twice or of the other subject; a clause that is cut; a text of one length."""
    texts = [text.split(" : ") for text in micro.decode(demonstrations(2000))]
    reviews = [(subject, answer.split(" , ")) for subject, answer in texts]
    for subject, clauses in reviews:
        paid = sum(micro.OPINIONS[clause.partition(" ")[2]] for clause in clauses)
        assert micro.gold(f"{subject} : {' , '.join(clauses)}") == paid
    for seen, n in (([subject for subject, _ in reviews], 2), ([len(clauses) for _, clauses in reviews], 2),
                    ([clause.partition(" ")[0] for _, clauses in reviews for clause in clauses], 8),
                    ([clause.partition(" ")[2] for _, clauses in reviews for clause in clauses], 12)):
        counts = Counter(seen)
        assert len(counts) == n and surprise([*counts.values()], [1 / n] * n) < 4


def test_labels_follow_bradley_and_terry(monkeypatch):
    """Bug: the worse answer is chosen more often, or the better one always; two prompts in a pair, or one in all."""
    prompts, answers = [], [demonstrations(3000), demonstrations(3000)]
    left = list(answers)
    monkeypatch.setattr(micro, "generate", lambda policy, ids: prompts.append(ids) or left.pop())
    pairs = micro.label_pairs(None, 3000)                                                     # (n, T) each
    assert torch.equal(sum(pairs), sum(answers))  # one is chosen, the other is not
    assert torch.equal(*prompts) and len(prompts[0].unique(dim=0)) == 2
    gains = torch.tensor([micro.gold(a) - micro.gold(b) for a, b in zip(*map(micro.decode, pairs))])      # (n,)
    expected = torch.sigmoid(gains.abs())[gains != 0]
    right = (gains[gains != 0] > 0).sum()
    assert abs(right - expected.sum()) < 4 * (expected * (1 - expected)).sum().sqrt()


@pytest.fixture
def policy(monkeypatch):
    """A policy far from uniform, in float64. Within the test, networks are small."""
    monkeypatch.setattr(micro, "C", 8)
    policy = micro.GPT().double()
    policy.head.weight.data *= 3
    return policy


@pytest.fixture
def scorer(policy):
    scorer = micro.GPT().double()
    scorer.head = torch.nn.Linear(micro.C, 1).double()
    return scorer


def length_of(row):
    """The words of an answer, its full stop included."""
    words = [micro.WORDS[i] for i in row.tolist()][micro.P:]
    return words.index(".") + 1 if "." in words else micro.R


def test_sampled_and_scored_log_probs_are_equal(policy, monkeypatch):
    """Bug: the slice is off by one, the sampler has another temperature, or a word after the end counts."""
    seen = []
    draw = torch.multinomial
    monkeypatch.setattr(torch, "multinomial", lambda probs, n: (seen.append(probs), draw(probs, n))[1])
    ids = micro.generate(policy, micro.PROMPTS.repeat(20, 1))
    logp = torch.stack(seen, dim=1).log().gather(2, ids[:, micro.P:, None])[:, :, 0]          # (B, R)
    for row, scored, sampled, mask in zip(ids, micro.response_logprobs(policy, ids), logp, micro.answer_mask(ids)):
        n = length_of(row)
        torch.testing.assert_close(scored[:n], sampled[:n])
        assert (scored[n:] == 0).all() and mask.sum() == n


# ---- the loops ------------------------------------------------------------------------------------

def row_logp(policy, row):
    """log pi of each word of an answer, (n,), read alone and without what follows its end."""
    n = length_of(row)
    logp = torch.log_softmax(policy(row[None, :micro.P + n])[0, micro.P - 1:-1], dim=1)
    return logp[range(n), row[micro.P:micro.P + n]]


def row_score(reward_model, row):
    return reward_model(row[None, :micro.P + length_of(row)])[0, -1, 0]


@pytest.fixture
def draws(monkeypatch):
    """All that torch.randint gives during the test."""
    found, randint = [], torch.randint
    monkeypatch.setattr(torch, "randint", lambda *size, **options: found.append(randint(*size, **options)) or found[-1])
    return found


def slow_step(adam, loss):
    adam.zero_grad()
    loss.backward()
    adam.step()


def same(network, other):
    torch.testing.assert_close(dict(network.state_dict()), dict(other.state_dict()), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name, lr", [("sft", 3e-3), ("reward", 1e-3), ("dpo", 5e-4)])
def test_a_loop_equals_a_slow_replay(name, lr, policy, scorer, draws):
    """Bug: uphill, chosen and rejected exchanged, a mean over pads or rows, a learning reference, adding gradients."""
    chosen, rejected = demonstrations(8), micro.generate(policy, micro.PROMPTS.repeat(4, 1))
    network, reference = scorer if name == "reward" else policy, micro.GPT().double()
    slow, frozen = copy.deepcopy(network), copy.deepcopy(reference)
    if name == "sft":
        micro.train_sft(policy, chosen, 3)
    elif name == "reward":
        micro.train_reward_model(scorer, chosen, rejected, 3)
    else:
        micro.train_dpo(policy, reference, chosen, rejected, 0.3, 3)
    rows, = draws
    assert rows.shape == (3, 64) and set(rows.flatten().tolist()) == set(range(8))
    adam = torch.optim.Adam(slow.parameters(), lr=lr)
    for batch in rows.tolist():
        total, weight = 0.0, 0
        for a, b, times in [(chosen[i], rejected[i], batch.count(i)) for i in range(8)]:
            if name == "sft":
                loss, words = -row_logp(slow, a).sum(), length_of(a)
            else:
                h = row_score(slow, a) - row_score(slow, b) if name == "reward" else 0.3 * (
                    (row_logp(slow, a) - row_logp(frozen, a).detach()).sum()
                    - (row_logp(slow, b) - row_logp(frozen, b).detach()).sum())
                loss, words = torch.log(1 + torch.exp(-h)), 1
            total, weight = total + times * loss, weight + times * words
        slow_step(adam, total / weight)
    same(network, slow)
    same(reference, frozen)


def test_the_ppo_loop_equals_a_slow_replay(policy, scorer, draws, monkeypatch):
    """Bug: a learning reference, a fresh critic, old log-probs that move, another lambda, one prompt for all rows."""
    reference = micro.GPT().double()
    slow, slow_critic, frozen, judge = [copy.deepcopy(network) for network in (policy, scorer, reference, scorer)]
    rollouts, generate = [], micro.generate
    monkeypatch.setattr(micro, "generate", lambda *args: rollouts.append((args, generate(*args))) or rollouts[-1][1])
    micro.train_ppo(policy, reference, scorer, 0.3, iterations=2, B=12)
    assert len(rollouts) == 2 and not any(torch.equal(one, two) for one, two in zip(draws[:2], draws[2:]))
    adam = torch.optim.Adam([*slow.parameters(), *slow_critic.parameters()], lr=1e-3)
    for ((sampler, prompts), ids), picks, minibatches in zip(rollouts, draws[::2], draws[1::2]):
        assert sampler is policy and torch.equal(prompts, micro.PROMPTS[picks]) and len(picks.unique()) == 2
        assert minibatches.shape == (8, 64) and len(prompts) == 12
        mask = micro.answer_mask(ids)
        with torch.no_grad():
            old, ref = [micro.response_logprobs(network, ids) for network in (slow, frozen)]
            old_values = slow_critic(ids)[:, micro.P - 1:-1, 0]
            rewards = ppo.token_rewards(micro.get_scores(judge, ids), old, ref, mask, 0.3)
        advantages, returns = ppo.gae(rewards, old_values, mask, gamma=1.0, lam=0.95)
        white = ppo.whiten(advantages, mask)
        for rows in minibatches:
            logp = micro.response_logprobs(slow, ids)[rows]
            values = slow_critic(ids)[rows, micro.P - 1:-1, 0]
            slow_step(adam, ppo.policy_loss(logp, old[rows], white[rows], mask[rows], clip=0.2)
                      + ppo.value_loss(values, old_values[rows], returns[rows], mask[rows], clip=0.2))
    for network, expected in ((policy, slow), (reference, frozen), (scorer, judge)):
        same(network, expected)


@torch.no_grad()
def test_the_table_is_computed_again(monkeypatch, capsys):
    """Bug: a column of another policy, an optimum of both prompts at once, a policy with another start or beta."""
    calls = defaultdict(list)  # of each function: the network before the call, the arguments, the result

    def record(name, function):
        def call(*args):
            start = copy.deepcopy(args[0])
            calls[name].append((start, *args, function(*args)))
            return calls[name][-1][-1]
        monkeypatch.setattr(micro, name, call)

    def move(policy, *args):  # in place of a training
        policy.head.bias.data += torch.randn(micro.V)

    record("train_sft", lambda *args: None)
    record("train_reward_model", lambda network, *args: network.head.bias.data.add_(100))
    record("train_dpo", move)
    record("train_ppo", move)
    record("label_pairs", micro.label_pairs)
    record("generate", micro.generate)
    micro.main(seed=0, steps=4, pairs=64, iterations=3, samples=8, beta=0.3)
    (start, sft, texts, *steps), = calls["train_sft"]
    assert steps == [4, None] and len(texts) == 1000 and len(texts.unique(dim=0)) > 300
    same(start, sft)  # nothing but its own training moves it
    (_, labelled, n, (chosen, rejected)), = calls["label_pairs"]
    assert labelled is sft and n == 64 and not torch.equal(chosen, rejected)
    (start, judge, *settings), = calls["train_reward_model"]
    same(start.blocks, sft.blocks)
    assert all(x is y for x, y in zip(settings, (chosen, rejected, 4)))
    trained = [*calls["train_dpo"], *calls["train_ppo"]]
    expected = [(sft, chosen, rejected, 0.3, 2), (sft, judge, 0.3, 3), (sft, judge, 0.0, 3)]
    for (start, _, *settings), its_expected in zip(trained, expected, strict=True):
        same(start, sft)
        assert all(x is y or x == y for x, y in zip(settings, its_expected))

    (_, policy, _, zero), *samples = [call for call in calls["generate"] if len(call[-1]) == 16]
    assert policy is sft
    same(samples[0][1], sft)
    assert all(sample[1] is call[1] for sample, call in zip(samples[1:], trained))
    scores = [row_score(judge, row).item() for row in zero]
    mean = sum(scores) / 16
    best = 0.0
    for prompt in micro.PROMPTS.tolist():
        tilts = [math.exp((s - mean) / 0.3) for s, row in zip(scores, zero) if row[:micro.P].tolist() == prompt]
        best += 0.3 * math.log(sum(tilts) / 8) / 2
    _, header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == "policy gold score KL share an answer".split()
    for name, line, (_, policy, _, found) in zip(("SFT", "DPO", "PPO", "PPO, no KL"), lines, samples, strict=True):
        *numbers, answer = re.split("%?  +", line.removeprefix(name).strip())
        texts = [" ".join(micro.WORDS[i] for i in ids[:micro.P + length_of(ids)]).removesuffix(" .") for ids in found]
        gold = sum(micro.gold(text) for text in texts) / 16
        score = sum(row_score(judge, ids).item() for ids in found) / 16 - mean
        kl = sum((row_logp(policy, ids) - row_logp(sft, ids)).sum().item() for ids in found) / 16
        expected = (gold, score, kl, 100 * (score - 0.3 * kl) / best)
        for number, value, error in zip(numbers, expected, (.01, .01, .1, 1), strict=True):
            assert abs(float(number) - value) <= 0.51 * error
        assert answer == texts[0]


@pytest.mark.parametrize("arguments, seeds, status", [
    ([], [0, 0], 0), (["9" * 9], [10 ** 9 - 1] * 2, 0), (["-1"], [], 2), (["1" * 10], [], 2), (["1", "2"], [], 2)])
def test_the_seed_is_the_argument(arguments, seeds, status, monkeypatch, capsys):
    """Bug: the argument has no effect, or not on all random numbers; a bad one is more than one line."""
    found = []
    monkeypatch.setattr(sys, "argv", ["micro.py", *arguments])
    monkeypatch.setattr(random, "seed", found.append)
    monkeypatch.setattr(torch, "manual_seed", lambda seed: found.append(seed) or sys.exit(0))  # no need to run on
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(micro.__file__, run_name="__main__")
    assert (found, stop.value.code) == (seeds, status)
    assert capsys.readouterr().err.count("\n") == (status == 2)
