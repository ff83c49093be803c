"""The tree against brute force, the other files against the tree, its loops against slow replays. Letters: mdp.py."""

import itertools
import math

import pytest
import torch
from helpers import close, noise, rng, surprise, tiny_gpt  # and one thread: the tensors are tiny

import mdp
from data import collate
from dpo import dpo_loss
from estimators import state_values
from mdp import Tree, kl, objective, response_logp, rollout, solve, token_logp
from model import Rollout, response_logprobs
from ppo import exact_kl, gae, token_rewards

IDS = [2, 0, 1, 3]  # the GPT's id of each token of the tree: 0 is E, and 3, PAD, is a token that can be sampled


def draw(seed, vocab=3):
    """Draw a tree, two policies and rewards."""
    tree = Tree(vocab, horizon=3)
    logits, ref = noise(seed, 2, tree.S, vocab)
    return tree, logits, ref, noise(seed + 100, tree.Y)


def path(tree, state):
    """The (state, token) of each step to a state, the states as their indices."""
    return [(tree.states.index(state[:t]), token) for t, token in enumerate(state)]


def probability(tree, logits, state):
    """The probability that an episode reaches a state, as a plain product."""
    probs = torch.softmax(logits, dim=-1).tolist()
    return math.prod(probs[s][token] for s, token in path(tree, state))


# ---- the MDP, the tree and its solution ----------------------------------------------------------------------------

def test_an_episode_by_hand():
    """Bug: no end after E or at the horizon; a reward before the end, or for the prompt; a horizon that counts it."""
    def reward(prompt, response):
        return 100 * len(prompt) + sum(response)

    process = mdp.TokenMDP((7, 0), horizon=3, reward=reward)  # the 0 in the prompt does not end the episode
    assert process.start == (7, 0) and not process.done(process.start)
    assert process.step((7, 0), 2) == ((7, 0, 2), 0.0, False)
    assert process.step((7, 0, 2), 0) == ((7, 0, 2, 0), 202, True)
    assert process.step((7, 0, 2, 1), 1) == ((7, 0, 2, 1, 1), 204, True)
    for state in ((7, 0, 0), (7, 0, 2, 1, 1)):
        with pytest.raises(ValueError, match="done"):
            process.step(state, 1)


def test_the_tree_holds_every_response_once():
    """Bug: responses cut at the horizon are missing; one counts once for each way to fill it up; tables disagree."""
    vocab, horizon = 3, 4
    tree = Tree(vocab, horizon)
    strings = itertools.product(range(vocab), repeat=horizon)
    responses = {string[:string.index(0) + 1] if 0 in string else string for string in strings}
    assert set(tree.leaves) == responses and len(tree.leaves) == tree.Y == len(responses)
    assert tree.S == sum((vocab - 1) ** t for t in range(horizon)) and tree.states[0] == ()
    assert tree.states[tree.S:] == tree.leaves
    for y, response in enumerate(tree.leaves):
        assert tree.mask[y].tolist() == [t < len(response) for t in range(horizon)]
        assert tree.responses[y].tolist() == list(response) + [vocab] * (horizon - len(response))
        state = 0
        for t, token in enumerate(response):
            assert tree.state_index[y, t] == state and state < tree.S
            state = tree.next_state[state, token].item()
        assert state == tree.S + y


def test_probabilities_kl_and_objective_are_enumerated():
    """Bug: log-probs of another state, after E, or of raw logits; a KL swapped, per token, or of the wrong sign."""
    tree, logits, ref, rewards = draw(0, 4)
    pi, q = [[probability(tree, policy, y) for y in tree.leaves] for policy in (logits, ref)]
    close(response_logp(tree, logits).exp(), pi)
    close(sum(pi), 1.0)
    assert (token_logp(tree, logits)[~tree.mask] == 0).all()
    nats = sum(a * math.log(a / b) for a, b in zip(pi, q))
    close(kl(tree, logits, ref), nats)
    close(objective(tree, logits, ref, rewards, 0.7), sum(p * r for p, r in zip(pi, rewards.tolist())) - 0.7 * nats)


def test_samples_come_from_the_policy():
    """Bug: a sampler that draws from another distribution than it reports, or from the numbers of the process."""
    tree, logits, _, _ = draw(2)
    y = rollout(tree, logits, 4000, rng(0))
    assert surprise(torch.bincount(y, minlength=tree.Y), response_logp(tree, logits).exp()) < 4
    assert torch.equal(y, rollout(tree, logits, 4000, rng(0)))


def test_value_iteration_is_the_reweighted_reference():
    """Bug: a max for the soft max; no reference; beta on the wrong side; a state solved before the next ones."""
    tree, logits, ref, rewards = draw(1, 4)
    beta = 0.3
    weights = [probability(tree, ref, y) * math.exp(r / beta) for y, r in zip(tree.leaves, rewards.tolist())]
    best = solve(tree, ref, rewards, beta)
    close(best.J, beta * math.log(sum(weights)))
    close(response_logp(tree, best.logp).exp(), [w / sum(weights) for w in weights])
    close(best.logp.logsumexp(-1), torch.zeros(tree.S))
    close(objective(tree, logits, ref, rewards, beta), best.J - beta * kl(tree, logits, best.logp))  # of any policy
    close(best.Q[0, 0], rewards[tree.next_state[0, 0] - tree.S])  # E as the first token: a leaf with its reward
    for s, state in enumerate(tree.states[:tree.S]):  # each inner state is the root of a subtree
        below = sum(w for w, y in zip(weights, tree.leaves) if y[:len(state)] == state)
        close(best.V[s], beta * math.log(below / probability(tree, ref, state)))


# ---- the other files on the tree ----------------------------------------------------------------------------------

def test_rewards_of_the_gpt_add_up_to_J():
    """Bug: log-probs that are no distribution; a reward or a KL paid twice or at a pad, or shifted; a KL reversed."""
    model, reference, prompt, beta = tiny_gpt(5, vocab=4), tiny_gpt(6, vocab=4), [1, 3], 0.4
    tree, _, _, scores = draw(5, 4)
    ids = [[IDS[token] for token in state] for state in tree.states]
    batch = collate([prompt] * tree.Y, ids[tree.S:], pad=1)  # pads are ordinary ids here
    batch = Rollout(*vars(batch).values(), response_logprobs(model, batch), None)
    logits, ref = [torch.stack([network(torch.tensor([prompt + state]))[0, -1, IDS] for state in ids[:tree.S]])
                   for network in (model, reference)]  # (S, V), one state at a time
    value = state_values(tree, logits, ref, scores, beta)
    values = torch.where(batch.mask, value[tree.state_index], 7.0)
    rewards = token_rewards(scores, batch.logp, response_logprobs(reference, batch), batch.mask, beta)
    advantages, returns = gae(rewards, values, batch.mask, lam=0.9)
    p = batch.logp.sum(1).exp()
    close(p.sum(), 1.0)
    nats = exact_kl(model, reference, batch)
    close(p @ nats, kl(tree, logits, ref))
    close(p @ rewards.sum(1), objective(tree, logits, ref, scores, beta))
    close(p @ advantages, torch.zeros(3))  # because the values are true
    close(p @ returns[:, 0], value[0])
    assert not nats.requires_grad


@pytest.mark.parametrize("kind", ["dpo", "ipo"])
def test_where_losses_on_pairs_have_their_optimum(kind):
    """Bug: a pair swapped, another target, beta missing or squared, no reference, or another closed form."""
    tree, _, ref, rewards = draw(6)
    wins = mdp.win_probabilities(rewards)
    best = solve(tree, ref, rewards, 0.4) if kind == "dpo" else mdp.solve_ipo(tree, ref, wins, 0.4)
    theta = best.logp.requires_grad_()
    logp, ref_logp = response_logp(tree, theta), response_logp(tree, ref)
    total = 0.0
    for a, b in itertools.permutations(range(tree.Y), 2):
        total = total + wins[a, b] * dpo_loss(logp[[a]], logp[[b]], ref_logp[[a]], ref_logp[[b]], 0.4, kind)
    close(torch.autograd.grad(total, theta)[0], torch.zeros_like(ref))


def test_labels_are_drawn_from_bradley_terry():
    """Bug: pairs that are missing or drawn too often; the loser chosen; random numbers of the process."""
    wins = mdp.win_probabilities(torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64))
    close(wins[1, 0], 1 / (1 + math.exp(-1.0)))
    close(wins + wins.T, torch.ones(3, 3))
    chosen, rejected = mdp.draw_labels(wins, 4000, rng(0))
    for a, b in ((0, 1), (0, 2), (1, 2)):
        won = ((chosen == a) & (rejected == b)).sum()
        lost = ((chosen == b) & (rejected == a)).sum()
        assert won + lost == 4000
        close(won / 4000, wins[a, b], 0.03)
    assert len(chosen) == len(rejected) == 3 * 4000
    assert torch.equal(chosen, mdp.draw_labels(wins, 4000, rng(0))[0])


# ---- the loops ----------------------------------------------------------------------------------------------------

def test_learn_ppo_equals_a_slow_replay(monkeypatch):
    """Bug: no whitening; old log-probs or values that move; a rate that stays; another reward; a lost shaping."""
    tree, _, ref, rewards = draw(9)
    beta, generator, training = 0.4, rng(0), mdp.Training(steps=3, size=16, lr=0.3, epochs=3)
    shaping = torch.where(tree.mask, noise(0, tree.Y, 3), 0.0)
    sampled = []

    def recorded(*arguments):
        assert arguments[3] is generator
        sampled.append(rollout(*arguments))
        return sampled[-1]

    monkeypatch.setattr(mdp, "rollout", recorded)
    yielded = list(mdp.learn_ppo(tree, ref, rewards, beta, generator, training, shaping))
    assert len({str(y.tolist()) for y in sampled}) == len(yielded) == 4

    logits = ref.clone().requires_grad_()
    critic = torch.zeros(tree.S, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([logits, critic], lr=0.3)
    ref_logp = ref.log_softmax(-1)
    clipped = 0
    for iteration, (number, its_logits, its_J) in enumerate(yielded):
        old, old_V = logits.detach().log_softmax(-1), critic.detach().clone()
        tokens, total = [], 0.0  # of each token: state, action, return
        for y in sampled[iteration].tolist():
            steps = path(tree, tree.leaves[y])
            paid = [shaping[y, t] - beta * (old[s, a] - ref_logp[s, a]) for t, (s, a) in enumerate(steps)]
            paid[-1] = paid[-1] + rewards[y]
            total += sum(paid)
            tokens += [(s, a, sum(paid[t:])) for t, (s, a) in enumerate(steps)]
        assert number == iteration
        close(its_logits, logits.detach(), 1e-7)
        close(its_J, total / 16)
        advantages = torch.stack([to_go - old_V[s] for s, _, to_go in tokens])
        advantages = (advantages - advantages.mean()) / (advantages.var(correction=0) + 1e-8).sqrt()
        adam.param_groups[0]["lr"] = 0.3 * (3 - iteration) / 3
        for _ in range(3):
            loss, logp = 0.0, logits.log_softmax(-1)
            for (s, a, to_go), A in zip(tokens, advantages):
                ratio = torch.exp(logp[s, a] - old[s, a])
                clipped += abs(ratio.item() - 1) > 0.2
                near = old_V[s] + (critic[s] - old_V[s]).clamp(-0.2, 0.2)
                error = torch.maximum((critic[s] - to_go) ** 2, (near - to_go) ** 2)
                loss = loss - torch.minimum(A * ratio, A * ratio.clamp(0.8, 1.2)) + 0.5 * error
            adam.zero_grad()
            (loss / len(tokens)).backward()
            adam.step()
    assert clipped > 10


@pytest.mark.parametrize("kind, size", [("dpo", 7), ("ipo", 105)])
def test_learn_dpo_equals_a_slow_replay(kind, size):
    """Bug: labels of other rows, or the same ones in every step; no reference or beta; a rate that does not fall."""
    tree, _, ref, rewards = draw(10)
    beta, steps = 0.4, 3
    chosen, rejected = mdp.draw_labels(mdp.win_probabilities(rewards), 1, rng(1))  # 105
    yielded = list(mdp.learn_dpo(tree, ref, chosen, rejected, beta, rng(2), kind, mdp.Training(steps, size, lr=0.3)))

    generator, logits = rng(2), ref.clone().requires_grad_()
    adam = torch.optim.Adam([logits], lr=0.3)

    def log_ratio(y):
        logp, ref_logp = logits.log_softmax(-1), ref.log_softmax(-1)
        return sum(logp[s, a] - ref_logp[s, a] for s, a in path(tree, tree.leaves[y]))

    for step, (number, its_logits) in enumerate(yielded):
        assert number == step
        close(its_logits, logits.detach(), 1e-7)
        rows = range(105)
        if size < 105:
            rows = torch.randint(105, (size,), generator=generator).tolist()
        loss = 0.0
        for row in rows:
            h = log_ratio(chosen[row]) - log_ratio(rejected[row])
            loss = loss + (torch.log(1 + torch.exp(-beta * h)) if kind == "dpo" else (h - 1 / (2 * beta)) ** 2)
        adam.param_groups[0]["lr"] = 0.3 * (steps - step) / steps
        adam.zero_grad()
        (loss / len(rows)).backward()
        adam.step()
    assert len(yielded) == steps + 1
