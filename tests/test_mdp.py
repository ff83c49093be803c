"""
The tree against brute force, the other files against the tree, and its two loops against slow replays.

Everything is enumerated in float64, so the tolerance is 1e-9 where nothing is sampled. Letters as in mdp.py.
"""

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
from ppo import exact_kl, gae, policy_loss, token_rewards

SIZES = [(3, 4), (4, 3)]
IDS = [2, 0, 1, 3]  # the GPT's id of each token of the tree: 0 is E, and 3, PAD, is a token that can be sampled


def draw(seed, vocab=3, horizon=3):
    """Draw a tree, two policies and rewards."""
    tree = Tree(vocab, horizon)
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


@pytest.mark.parametrize("vocab, horizon", SIZES)
def test_the_tree_holds_every_response_once(vocab, horizon):
    """Bug: responses cut at the horizon are missing; one counts once for each way to fill it up; tables disagree."""
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


@pytest.mark.parametrize("vocab, horizon", SIZES)
def test_probabilities_kl_and_objective_are_enumerated(vocab, horizon):
    """Bug: log-probs of another state, after E, or of raw logits; a KL swapped, per token, or of the wrong sign."""
    tree, logits, ref, rewards = draw(0, vocab, horizon)
    pi, q = [[probability(tree, policy, y) for y in tree.leaves] for policy in (logits, ref)]
    close(response_logp(tree, logits).exp(), pi)
    close(sum(pi), 1.0)
    assert (token_logp(tree, logits)[~tree.mask] == 0).all()
    nats = sum(a * math.log(a / b) for a, b in zip(pi, q))
    close(kl(tree, logits, ref), nats)
    close(objective(tree, logits, ref, rewards, 0.7), sum(p * r for p, r in zip(pi, rewards.tolist())) - 0.7 * nats)


def test_samples_come_from_the_policy():
    """Bug: a sampler that draws from another distribution than it reports, or from the numbers of the process."""
    tree, logits, _, _ = draw(2, 4, 2)
    y = rollout(tree, logits, 4000, rng(0))
    assert surprise(torch.bincount(y, minlength=tree.Y), response_logp(tree, logits).exp()) < 4
    assert torch.equal(y, rollout(tree, logits, 4000, rng(0)))


@pytest.mark.parametrize("vocab, horizon", SIZES)
@pytest.mark.parametrize("beta", [0.3, 4.0])
def test_value_iteration_is_the_reweighted_reference(vocab, horizon, beta):
    """Bug: a max for the soft max; no reference; beta on the wrong side; a state solved before the next ones."""
    tree, logits, ref, rewards = draw(1, vocab, horizon)
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
    """Bug: log-probs that are no distribution; a reward paid twice or at a pad; values shifted against the states."""
    model, reference, prompt, beta = tiny_gpt(5, vocab=4), tiny_gpt(6, vocab=4), [1, 3], 0.4
    tree, _, _, scores = draw(5, 4, 3)
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
    close(p @ exact_kl(model, reference, batch), kl(tree, logits, ref))
    close(p @ rewards.sum(1), objective(tree, logits, ref, scores, beta))
    close(p @ advantages, torch.zeros(3))  # because the values are true
    close(p @ returns[:, 0], value[0])


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_policy_loss_has_the_gradient_of_J(lam):
    """
    Bug: a wrong sign; a ratio that passes no gradient; advantages that contain the future of another token.

    With a true critic every lambda gives the gradient of J, as no transition is random. With others only lambda 1 does.
    """
    tree, logits, ref, rewards = draw(4)
    true_critic = state_values(tree, logits, ref, rewards, 0.3)
    old_logp = token_logp(tree, logits)
    step_rewards = token_rewards(rewards, old_logp, token_logp(tree, ref), tree.mask, 0.3)

    def gradient(critic):
        advantages, _ = gae(step_rewards, critic[tree.state_index], tree.mask, lam=lam)
        theta = logits.clone().requires_grad_()
        logp = token_logp(tree, theta)
        total = 0.0
        for y in range(tree.Y):
            row = slice(y, y + 1)  # alone, because the loss is a mean over tokens
            loss = policy_loss(logp[row], old_logp[row], advantages[row], tree.mask[row])
            total = total + old_logp[y].sum().exp() * tree.mask[y].sum() * loss
        return torch.autograd.grad(total, theta)[0]

    exact = mdp.policy_gradient(tree, logits, ref, rewards, 0.3)
    close(gradient(true_critic), -exact)
    wrong = gradient(true_critic + torch.linspace(-1, 1, tree.S, dtype=torch.float64))
    assert torch.allclose(wrong, -exact, rtol=0, atol=1e-9) == (lam == 1.0)


def population_gradient(tree, logits, ref, wins, kind):
    """The gradient, (S, V), of the loss over all ordered pairs, where (a, b) has the weight wins[a, b], (Y, Y)."""
    theta = logits.detach().clone().requires_grad_()
    logp = response_logp(tree, theta)
    ref_logp = response_logp(tree, ref)
    total = 0.0
    for a, b in itertools.permutations(range(tree.Y), 2):
        loss = dpo_loss(logp[[a]], logp[[b]], ref_logp[[a]], ref_logp[[b]], 0.4, kind)
        total = total + wins[a, b] * loss
    return torch.autograd.grad(total, theta)[0]


def test_dpo_has_its_optimum_at_pi_star():
    """Bug: a pair swapped, beta missing or squared, or no reference: the rest is not ref exp(r / beta) / Z."""
    tree, logits, ref, rewards = draw(6)
    best = solve(tree, ref, rewards, 0.4)
    wins = mdp.win_probabilities(rewards)
    close(population_gradient(tree, best.logp, ref, wins, "dpo"), torch.zeros_like(ref))
    assert population_gradient(tree, logits, ref, wins, "dpo").abs().max() > 1e-2
    f = 0.4 * (response_logp(tree, best.logp) - response_logp(tree, ref))
    close(f - f[0], rewards - rewards[0])  # the implicit reward is the reward


@pytest.mark.parametrize("scale", [1.0, 1e9])
def test_ipo_has_its_optimum_where_solve_ipo_says(scale):
    """Bug: an IPO target of 1/beta or beta/2; a closed form with the wrong scale. At scale 1e9 labels are certain."""
    tree, _, ref, rewards = draw(7)
    wins = mdp.win_probabilities(scale * rewards)
    ipo_optimum = mdp.solve_ipo(tree, ref, wins, 0.4)
    close(population_gradient(tree, ipo_optimum.logp, ref, wins, "ipo"), torch.zeros_like(ref))
    assert kl(tree, ipo_optimum.logp, solve(tree, ref, rewards, 0.4).logp) > 0.05  # it is not pi*


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
    """
    Bug: advantages that are not whitened; old log-probs or values that are computed again in every epoch; a rate that
    does not fall; the reward of another response; a shaping that is left out; the J of another iteration.
    """
    tree, _, ref, rewards = draw(9)
    beta, generator, training = 0.4, rng(0), mdp.Training(steps=4, size=24, lr=0.3, epochs=3)
    shaping = torch.where(tree.mask, noise(0, tree.Y, 3), 0.0)
    sampled = []

    def recorded(*arguments):
        assert arguments[3] is generator
        sampled.append(rollout(*arguments))
        return sampled[-1]

    _, _, plain_J = next(mdp.learn_ppo(tree, ref, rewards, beta, rng(0), training))
    monkeypatch.setattr(mdp, "rollout", recorded)
    yielded = list(mdp.learn_ppo(tree, ref, rewards, beta, generator, training, shaping))
    assert len({str(y.tolist()) for y in sampled}) == len(yielded) == 5
    close(yielded[0][2], plain_J + shaping[sampled[0]].sum(dim=1).mean())

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
        close(its_J, total / 24)
        advantages = torch.stack([to_go - old_V[s] for s, _, to_go in tokens])
        advantages = (advantages - advantages.mean()) / (advantages.var(correction=0) + 1e-8).sqrt()
        adam.param_groups[0]["lr"] = 0.3 * (4 - iteration) / 4
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
    beta, steps = 0.4, 5
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
