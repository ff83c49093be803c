"""
The tree against brute force, the other files against the tree, and its two loops against slow replays.

Everything is enumerated in float64, so the tolerance is 1e-9 where nothing is sampled. Letters as in mdp.py.
"""

import itertools
import math

import pytest
import torch
from helpers import close, noise, surprise, tiny_gpt  # and one thread: the tensors are tiny

import mdp
from data import collate
from dpo import dpo_loss
from estimators import state_values
from mdp import (
    TokenMDP,
    Training,
    Tree,
    draw_labels,
    kl,
    learn_dpo,
    learn_ppo,
    objective,
    policy_gradient,
    response_logp,
    rollout,
    solve,
    solve_ipo,
    token_logp,
    win_probabilities,
)
from model import Rollout, response_logprobs
from ppo import exact_kl, gae, policy_loss, token_rewards

SIZES = [(3, 2), (3, 4), (4, 3), (5, 2)]
IDS = [2, 0, 1, 3]  # the GPT's id of each token of the tree: 0 is E, and 3, PAD, is a token that can be sampled


def draw(seed, vocab=3, horizon=3):
    """Draw a tree, two policies and rewards."""
    tree = Tree(vocab, horizon)
    generator = torch.Generator().manual_seed(seed)
    logits, ref = torch.randn(2, tree.S, vocab, generator=generator, dtype=torch.float64)
    return tree, logits, ref, torch.randn(tree.Y, generator=generator, dtype=torch.float64)


def brute_force(vocab, horizon):
    """Every response: cut every string of tokens after its first 0."""
    strings = itertools.product(range(vocab), repeat=horizon)
    return {string[:string.index(0) + 1] if 0 in string else string for string in strings}


def probability(tree, logits, response):
    """pi(response) as a plain product. The states are looked up by their tokens."""
    probs = torch.softmax(logits, dim=-1).tolist()
    return math.prod(probs[tree.states.index(response[:t])][token] for t, token in enumerate(response))


def state_probability(tree, logits):
    """The probability that an episode reaches each inner state, (S,)."""
    return torch.tensor([probability(tree, logits, state) for state in tree.states[:tree.S]], dtype=torch.float64)


# ---- the MDP and the tree -----------------------------------------------------------------------------------------

def test_an_episode_by_hand():
    """
    Bug: an episode that continues after E or beyond the horizon; a reward before the end, or for the prompt;
    a horizon that counts the prompt's tokens.
    """
    def reward(prompt, response):
        return 100 * len(prompt) + sum(response)

    process = TokenMDP((7, 0), horizon=3, reward=reward)  # the 0 in the prompt does not end the episode
    assert process.start == (7, 0) and not process.done(process.start)
    assert process.step((7, 0), 2) == ((7, 0, 2), 0.0, False)
    assert process.step((7, 0, 2), 0) == ((7, 0, 2, 0), 202, True)
    assert process.step((7, 0, 2), 1) == ((7, 0, 2, 1), 0.0, False)
    assert process.step((7, 0, 2, 1), 1) == ((7, 0, 2, 1, 1), 204, True)
    for state in ((7, 0, 0), (7, 0, 2, 1, 1)):
        with pytest.raises(ValueError, match="done"):
            process.step(state, 1)


@pytest.mark.parametrize("vocab,horizon", SIZES)
def test_the_tree_holds_every_response_once(vocab, horizon):
    """
    Bug: responses that are cut at the horizon are missing; a response is counted once for every way to fill it up
    after E; the tables of the tree disagree.
    """
    tree = Tree(vocab, horizon)
    leaves = tree.states[tree.S:]
    assert leaves == tree.leaves
    assert set(leaves) == brute_force(vocab, horizon) and len(leaves) == len(set(leaves)) == tree.Y
    assert tree.S == sum((vocab - 1) ** t for t in range(horizon)) and tree.states[0] == ()
    for y, response in enumerate(leaves):
        assert tree.mask[y].tolist() == [t < len(response) for t in range(horizon)]
        assert tree.responses[y].tolist() == list(response) + [vocab] * (horizon - len(response))
        state = 0
        for t, token in enumerate(response):
            assert tree.state_index[y, t] == state and state < tree.S
            state = tree.next_state[state, token].item()
        assert state == tree.S + y


def test_a_tree_without_choices_is_refused():
    """Bug: an empty tree that fails later, far from its cause."""
    with pytest.raises(ValueError, match="at least 2 tokens and 1 step"):
        Tree(1, 3)


@pytest.mark.parametrize("vocab,horizon", SIZES)
def test_probabilities_of_responses(vocab, horizon):
    """Bug: log-probs from the row of another state, of tokens after E, or of unnormalised logits."""
    tree, logits, _, _ = draw(0, vocab, horizon)
    probs = [probability(tree, logits, response) for response in tree.leaves]
    close(response_logp(tree, logits).exp(), probs)
    close(sum(probs), 1.0)
    close(response_logp(tree, logits.log_softmax(-1) + 3.0), response_logp(tree, logits))
    assert (token_logp(tree, logits)[~tree.mask] == 0).all() and (token_logp(tree, logits)[tree.mask] < 0).all()


@pytest.mark.parametrize("seed", range(3))
def test_kl_is_a_sum_over_tokens(seed):
    """
    Bug: KL with its arguments swapped; a sum over states that does not weight them by their probability; KL per token
    instead of per response.
    """
    tree, logits, ref, _ = draw(seed, 4, 3)
    logp, ref_logp = logits.log_softmax(-1), ref.log_softmax(-1)
    close(kl(tree, logits, ref), state_probability(tree, logits) @ (logp.exp() * (logp - ref_logp)).sum(-1))
    close(kl(tree, logits, logits), 0.0)


# ---- the solution -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("vocab,horizon", SIZES)
@pytest.mark.parametrize("beta", [0.3, 1.0, 4.0])
def test_value_iteration_is_the_reweighted_reference(vocab, horizon, beta):
    """
    Bug in soft value iteration: a max in place of the soft max; the reference is missing; beta on the wrong side;
    a state is solved before the states that follow it.
    """
    tree, _, ref, rewards = draw(1, vocab, horizon)
    weights = [probability(tree, ref, y) * math.exp(r / beta) for y, r in zip(tree.leaves, rewards.tolist())]
    best = solve(tree, ref, rewards, beta)
    close(best.J, beta * math.log(sum(weights)))
    close(response_logp(tree, best.logp).exp(), [w / sum(weights) for w in weights])
    close(best.logp.logsumexp(-1), torch.zeros(tree.S))
    close(best.J, objective(tree, best.logp, ref, rewards, beta))
    close(best.Q[0, 0], rewards[tree.next_state[0, 0] - tree.S])  # E as the first token: a leaf with its reward
    for s, state in enumerate(tree.states[:tree.S]):  # each inner state is the root of a subtree
        below = sum(w for w, y in zip(weights, tree.leaves) if y[:len(state)] == state)
        close(best.V[s], beta * math.log(below / probability(tree, ref, state)))


@pytest.mark.parametrize("seed, beta", [(0, 0.2), (1, 1.0), (2, 5.0)])
def test_what_a_policy_lacks_is_its_kl_from_the_optimum(seed, beta):
    """Bug: a KL penalty of the wrong sign, direction or weight in J; a J* that some policy exceeds."""
    tree, logits, ref, rewards = draw(seed)
    best = solve(tree, ref, rewards, beta)
    J = objective(tree, logits, ref, rewards, beta)
    close(J, best.J - beta * kl(tree, logits, best.logp))
    assert J < best.J
    expected = 0.0
    for y, reward in zip(tree.leaves, rewards.tolist()):
        pi = probability(tree, logits, y)
        expected += pi * (reward - beta * math.log(pi / probability(tree, ref, y)))
    close(J, expected)


def test_rewards_may_be_integers_and_beta_must_be_above_0():
    """Bug: value iteration in the type of the rewards, which rounds down to integers; or a beta of 0 that is taken."""
    tree, _, ref, _ = draw(3)
    rewards = torch.arange(tree.Y)
    close(solve(tree, ref, rewards, 2.0).J, solve(tree, ref, rewards.double(), 2.0).J)
    close(objective(tree, ref, ref, rewards, 2.0), objective(tree, ref, ref, rewards.double(), 2.0))
    with pytest.raises(ValueError, match="beta"):
        solve(tree, ref, rewards, 0.0)


@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_of_J(seed):
    """
    Bug: a gradient without the part that moves the sampling distribution, or without the KL term; a wrong sign.

    The policy gradient theorem: d(s) pi(a|s) (Q - V), where an action pays for its own KL.
    """
    tree, logits, ref, rewards = draw(seed)
    value = state_values(tree, logits, ref, rewards, 0.7)
    Q = torch.cat([value, rewards])[tree.next_state] - 0.7 * (logits.log_softmax(-1) - ref.log_softmax(-1))
    expected = state_probability(tree, logits)[:, None] * logits.softmax(-1) * (Q - value[:, None])
    close(policy_gradient(tree, logits, ref, rewards, 0.7), expected)


def test_samples_come_from_the_policy():
    """Bug: a sampler that draws from another distribution than it reports. No check of log-probs can see that."""
    tree, logits, _, _ = draw(2, 4, 2)
    y = rollout(tree, logits, 4000, torch.Generator().manual_seed(0))
    assert surprise(torch.bincount(y, minlength=tree.Y), response_logp(tree, logits).exp()) < 4


# ---- the GPT on the tree ------------------------------------------------------------------------------------------

def test_rewards_of_the_gpt_add_up_to_J():
    """
    Bug: log-probs that are no distribution over responses; a reward that is paid twice or at a pad; a KL penalty of the
    wrong sign; exact_kl per token; values that are shifted against the states. With the true values, E[A] is 0.
    """
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
    close(p @ advantages, torch.zeros(3))
    close(p @ returns[:, 0], value[0])


# ---- ppo.py on the tree -------------------------------------------------------------------------------------------

def exact_policy_loss_gradient(tree, logits, ref, rewards, beta, values, lam):
    """
    The expected gradient, (S, V), of policy_loss at ratio 1, summed over the tokens of a response.

    The loss is a mean over tokens. So each response goes through it alone, and its loss is multiplied by pi(y) and
    by the length of the response.
    """
    old_logp = token_logp(tree, logits)
    step_rewards = token_rewards(rewards, old_logp, token_logp(tree, ref), tree.mask, beta)
    advantages, _ = gae(step_rewards, values[tree.state_index], tree.mask, lam=lam)
    theta = logits.clone().requires_grad_()
    logp = token_logp(tree, theta)
    total = 0.0
    for y in range(tree.Y):
        row = slice(y, y + 1)
        loss = policy_loss(logp[row], old_logp[row], advantages[row], tree.mask[row])
        total = total + old_logp[y].sum().exp() * tree.mask[y].sum() * loss
    return torch.autograd.grad(total, theta)[0]


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(2))
def test_policy_loss_has_the_gradient_of_J(seed, lam):
    """
    Bug: a wrong sign; a ratio that passes no gradient; advantages that contain the future of another token.

    Transitions are not random. So with a true critic delta_t is the advantage itself, and every lambda gives the
    gradient of J. With any other critic only lambda 1 does.
    """
    tree, logits, ref, rewards = draw(seed)
    exact = policy_gradient(tree, logits, ref, rewards, 0.3)
    true_critic = state_values(tree, logits, ref, rewards, 0.3)
    wrong_critic = true_critic + torch.linspace(-1, 1, tree.S, dtype=torch.float64)
    close(exact_policy_loss_gradient(tree, logits, ref, rewards, 0.3, true_critic, lam), -exact)
    wrong = exact_policy_loss_gradient(tree, logits, ref, rewards, 0.3, wrong_critic, lam)
    assert torch.allclose(wrong, -exact, rtol=0, atol=1e-9) == (lam == 1.0)


# ---- dpo.py on the tree -------------------------------------------------------------------------------------------

def population_gradient(tree, logits, ref, wins, beta, kind="dpo", **options):
    """The gradient, (S, V), of the loss over all ordered pairs, where (a, b) has the weight wins[a, b], (Y, Y)."""
    theta = logits.detach().clone().requires_grad_()
    logp = response_logp(tree, theta)
    ref_logp = response_logp(tree, ref)
    total = 0.0
    for a, b in itertools.permutations(range(tree.Y), 2):
        loss = dpo_loss(logp[[a]], logp[[b]], ref_logp[[a]], ref_logp[[b]], beta, kind, **options)
        total = total + wins[a, b] * loss
    return torch.autograd.grad(total, theta)[0]


def test_dpo_has_its_optimum_at_pi_star():
    """
    Bug: a DPO loss with the pair swapped, with beta missing or squared, or without the reference.

    None of these has gradient 0 at ref exp(r / beta) / Z.
    """
    tree, logits, ref, rewards = draw(6)
    best = solve(tree, ref, rewards, 0.4)
    wins = win_probabilities(rewards)
    close(population_gradient(tree, best.logp, ref, wins, 0.4), torch.zeros_like(ref))
    assert population_gradient(tree, logits, ref, wins, 0.4).abs().max() > 1e-2
    f = 0.4 * (response_logp(tree, best.logp) - response_logp(tree, ref))
    close(f - f[0], rewards - rewards[0])  # the implicit reward is the reward
    # one label in five is flipped: label_smoothing=0.2 on clean labels has the same gradient
    flipped = population_gradient(tree, best.logp, ref, 0.8 * wins + 0.2 * wins.T, 0.4)
    close(flipped, population_gradient(tree, best.logp, ref, wins, 0.4, label_smoothing=0.2))


@pytest.mark.parametrize("scale", [1.0, 1e9])
def test_ipo_has_its_optimum_where_solve_ipo_says(scale):
    """Bug: an IPO target of 1/beta or beta/2; a closed form with the wrong scale. At scale 1e9 labels are certain."""
    tree, _, ref, rewards = draw(7)
    wins = win_probabilities(scale * rewards)
    ipo_optimum = solve_ipo(tree, ref, wins, 0.4)
    close(population_gradient(tree, ipo_optimum.logp, ref, wins, 0.4, "ipo"), torch.zeros_like(ref))
    assert kl(tree, ipo_optimum.logp, solve(tree, ref, rewards, 0.4).logp) > 0.05  # it is not pi*


def test_labels_are_drawn_from_bradley_terry():
    """Bug: pairs that are missing or drawn more often than others; a response paired with itself; the loser chosen."""
    rewards = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)
    wins = win_probabilities(rewards)
    close(wins[1, 0], 1 / (1 + math.exp(-1.0)))
    close(wins + wins.T, torch.ones(3, 3))
    chosen, rejected = draw_labels(wins, 4000, torch.Generator().manual_seed(0))
    for a, b in ((0, 1), (0, 2), (1, 2)):
        won = ((chosen == a) & (rejected == b)).sum()
        lost = ((chosen == b) & (rejected == a)).sum()
        assert won + lost == 4000
        close(won / 4000, wins[a, b], 0.03)
    assert len(chosen) == len(rejected) == 3 * 4000


# ---- the loops ----------------------------------------------------------------------------------------------------

def path(tree, y):
    """The (state, token) of each step of response y, the state as its index."""
    leaf = tree.leaves[y]
    return [(tree.states.index(leaf[:t]), token) for t, token in enumerate(leaf)]


@pytest.mark.parametrize("shaped", [False, True])
def test_learn_ppo_equals_a_slow_replay(monkeypatch, shaped):
    """
    Bug: advantages that are not whitened, or by the sample deviation; a bootstrap after the end; old log-probs, values
    or advantages that are computed again in every epoch; one epoch; a rate that does not fall, or falls in an epoch; a
    KL of the wrong sign; the reward of another response; a shaping that is left out; the J of another iteration.

    Only the sampled responses are recorded. All the rest is computed again, one token after the other.
    """
    tree, _, ref, rewards = draw(9)
    beta, lr, iterations, B = 0.4, 0.3, 4, 24
    shaping = torch.where(tree.mask, noise(0, tree.Y, 3), 0.0) if shaped else None
    sampled = []

    def recorded(*arguments):
        sampled.append(rollout(*arguments))
        return sampled[-1]

    monkeypatch.setattr(mdp, "rollout", recorded)
    generator = torch.Generator().manual_seed(0)
    yielded = list(learn_ppo(tree, ref, rewards, beta, generator, Training(iterations, B, lr, 3), shaping))
    assert len({str(y.tolist()) for y in sampled}) == len(yielded) == iterations + 1

    logits = ref.clone().requires_grad_()
    critic = torch.zeros(tree.S, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([logits, critic], lr=lr)
    ref_logp = ref.log_softmax(-1)
    clipped = 0
    for iteration, (number, its_logits, its_J) in enumerate(yielded):
        old, old_V = logits.detach().log_softmax(-1), critic.detach().clone()
        tokens, totals = [], []  # of each token: state, action, advantage, return
        for y in sampled[iteration].tolist():
            steps = path(tree, y)
            paid = [-beta * (old[s, a] - ref_logp[s, a]).item() for s, a in steps]
            paid[-1] += rewards[y].item()
            if shaped:
                paid = [r + shaping[y, t].item() for t, r in enumerate(paid)]
            totals.append(sum(paid))
            tokens += [(s, a, sum(paid[t:]) - old_V[s].item(), sum(paid[t:])) for t, (s, a) in enumerate(steps)]
        assert number == iteration
        close(its_logits, logits.detach(), 1e-7)
        close(its_J, sum(totals) / B)
        if iteration == iterations:
            break
        mean = sum(A for _, _, A, _ in tokens) / len(tokens)
        deviation = math.sqrt(sum((A - mean) ** 2 for _, _, A, _ in tokens) / len(tokens) + 1e-8)
        adam.param_groups[0]["lr"] = lr * (iterations - iteration) / iterations
        for _ in range(3):
            loss, logp = 0.0, logits.log_softmax(-1)
            for s, a, A, to_go in tokens:
                A = (A - mean) / deviation
                ratio = torch.exp(logp[s, a] - old[s, a])
                clipped += abs(ratio.item() - 1) > 0.2
                near = old_V[s] + (critic[s] - old_V[s]).clamp(-0.2, 0.2)
                error = torch.maximum((critic[s] - to_go) ** 2, (near - to_go) ** 2)
                loss = loss - torch.minimum(A * ratio, A * ratio.clamp(0.8, 1.2)) + 0.5 * error
            adam.zero_grad()
            (loss / len(tokens)).backward()
            adam.step()
    assert clipped > 10


@pytest.mark.parametrize("kind", ["dpo", "ipo"])
@pytest.mark.parametrize("size", [7, 105])
def test_learn_dpo_equals_a_slow_replay(kind, size):
    """
    Bug: labels of other rows, the same ones in every step, or a part of them where all fit; chosen and rejected
    exchanged; a loss without its reference or its beta; a rate that does not fall.
    """
    tree, _, ref, rewards = draw(10)
    beta, lr, steps = 0.4, 0.3, 5
    chosen, rejected = draw_labels(win_probabilities(rewards), 1, torch.Generator().manual_seed(1))
    assert len(chosen) == 105
    generator = torch.Generator().manual_seed(2)
    yielded = list(learn_dpo(tree, ref, chosen, rejected, beta, generator, kind, Training(steps, size, lr)))

    generator.manual_seed(2)
    logits = ref.clone().requires_grad_()
    adam = torch.optim.Adam([logits], lr=lr)

    def log_ratio(y):
        logp, ref_logp = logits.log_softmax(-1), ref.log_softmax(-1)
        return sum(logp[s, a] - ref_logp[s, a] for s, a in path(tree, y))

    for step, (number, its_logits) in enumerate(yielded):
        assert number == step
        close(its_logits, logits.detach(), 1e-7)
        rows = range(len(chosen))
        if size < len(chosen):
            rows = torch.randint(len(chosen), (size,), generator=generator).tolist()
        loss = 0.0
        for row in rows:
            h = log_ratio(chosen[row]) - log_ratio(rejected[row])
            loss = loss + (torch.log(1 + torch.exp(-beta * h)) if kind == "dpo" else (h - 1 / (2 * beta)) ** 2)
        adam.param_groups[0]["lr"] = lr * (steps - step) / steps
        adam.zero_grad()
        (loss / len(rows)).backward()
        adam.step()
    assert len(yielded) == steps + 1


def test_the_generator_alone_decides():
    """Bug: random numbers of the process, a generator without effect, or one that is seeded in every call."""
    tree, _, ref, rewards = draw(11)
    wins = win_probabilities(rewards)

    def everything(seed, global_seed):
        torch.manual_seed(global_seed)
        generator = torch.Generator().manual_seed(seed)
        samples = [rollout(tree, ref, 40, generator).tolist() for _ in range(2)]
        labels = [draw_labels(wins, 2, generator) for _ in range(2)]
        *_, (_, ppo, J) = learn_ppo(tree, ref, rewards, 0.5, generator, Training(2, 16, 0.1))
        *_, (_, dpo) = learn_dpo(tree, ref, *labels[0], 0.5, generator, "dpo", Training(2, 9, 0.2))
        return [*samples, *[chosen.tolist() for chosen, _ in labels], ppo.tolist(), J.item(), dpo.tolist()]

    one, same, other = everything(0, 1), everything(0, 2), everything(3, 1)
    assert one == same
    assert one[0] != one[1] and one[2] != one[3]
    assert all(a != b for a, b in zip(one, other))
