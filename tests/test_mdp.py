"""
The tree against brute force, and the other files against the tree.

Everything is enumerated in float64, so the tolerance is 1e-9 where nothing is sampled. Letters as in mdp.py.
"""

import itertools
import math
import runpy
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mdp
from data import collate
from dpo import dpo_loss
from evaluate import exact_kl, optimum, optimum_mean
from mdp import TokenMDP, Tree, entropy, kl, objective, policy_gradient, response_logp, rollout, solve, solve_ipo, token_logp, win_probabilities
from model import GPT, GPTConfig, Rollout, generate, response_logprobs
from ppo import experience, gae, kl_estimates, policy_loss, token_rewards


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors this small are slower on many threads, and far slower beside other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


SIZES = [(3, 2), (3, 4), (4, 3), (5, 2)]
seeds = st.integers(0, 2 ** 30)


def close(a, b, tolerance=1e-9):
    a, b = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
    assert a.shape == b.shape and (a - b).abs().max() < tolerance, f"{a} is not {b}"


def draw(seed, vocab=3, horizon=3):
    """A tree, two policies and rewards at random."""
    tree, generator = Tree(vocab, horizon), torch.Generator().manual_seed(seed)
    logits, ref = torch.randn(2, tree.S, vocab, generator=generator, dtype=torch.float64)
    return tree, logits, ref, torch.randn(tree.Y, generator=generator, dtype=torch.float64)


def brute_force(vocab, horizon):
    """Every response, by cutting every string of tokens after its first 0."""
    strings = itertools.product(range(vocab), repeat=horizon)
    return {string[:string.index(0) + 1] if 0 in string else string for string in strings}


def probability(tree, logits, response):
    """pi(response) as a plain product, with states looked up by their tokens."""
    probs = torch.softmax(logits, dim=-1).tolist()
    return math.prod(probs[tree.states.index(response[:t])][token] for t, token in enumerate(response))


def state_probability(tree, logits):
    """How likely an episode comes through each state (S,)."""
    return torch.tensor([probability(tree, logits, state) for state in tree.states[:tree.S]], dtype=torch.float64)


def policy_value(tree, logits, ref, rewards, beta):
    """V of a policy that need not be optimal, (S,): E[score - beta log pi/ref of what is still to come], from the ends to the root."""
    logp, ref_logp = logits.log_softmax(-1), ref.log_softmax(-1)
    value = torch.cat([torch.zeros(tree.S, dtype=torch.float64), rewards])
    for s in reversed(range(tree.S)):
        value[s] = (logp[s].exp() * (value[tree.next_state[s]] - beta * (logp[s] - ref_logp[s]))).sum()
    return value[:tree.S]


# ---------------------------------------------------------------------------------------------------------------------
# the MDP and the tree

def test_an_episode_by_hand():
    """Bugs: an episode that goes on after E or beyond the horizon, a reward before the end or for the prompt, a horizon that counts the prompt."""
    process = TokenMDP((7, 0), horizon=3, reward=lambda prompt, response: 100 * len(prompt) + sum(response))  # the prompt's own 0 ends nothing
    assert process.start == (7, 0) and not process.over(process.start)
    assert process.step((7, 0), 2) == ((7, 0, 2), 0.0, False)
    assert process.step((7, 0, 2), 0) == ((7, 0, 2, 0), 202, True)
    assert process.step((7, 0, 2), 1) == ((7, 0, 2, 1), 0.0, False)
    assert process.step((7, 0, 2, 1), 1) == ((7, 0, 2, 1, 1), 204, True)
    for state in ((7, 0, 0), (7, 0, 2, 1, 1)):
        with pytest.raises(ValueError, match="over"):
            process.step(state, 1)


@pytest.mark.parametrize("vocab,horizon", SIZES)
def test_the_tree_holds_every_response_once(vocab, horizon):
    """Bugs: responses cut at the horizon left out, a response counted once for every way to fill it up after E, tables that disagree."""
    tree = Tree(vocab, horizon)
    whole = tree.states[tree.S:]
    assert set(whole) == brute_force(vocab, horizon) and len(whole) == len(set(whole)) == tree.Y
    assert tree.S == sum((vocab - 1) ** t for t in range(horizon)) and tree.states[0] == ()
    for y, response in enumerate(whole):
        assert tree.mask[y].tolist() == [t < len(response) for t in range(horizon)]
        assert tree.responses[y].tolist() == list(response) + [vocab] * (horizon - len(response))
        state = 0
        for t, token in enumerate(response):
            assert tree.state_index[y, t] == state and state < tree.S
            state = tree.next_state[state, token].item()
        assert state == tree.S + y


@pytest.mark.parametrize("sizes", [(1, 3), (3, 0)])
def test_a_tree_without_choices_is_refused(sizes):
    """Bug: an empty tree that fails later, far from its cause."""
    with pytest.raises(ValueError):
        Tree(*sizes)


@pytest.mark.parametrize("vocab,horizon", SIZES)
def test_probabilities_of_responses(vocab, horizon):
    """Bugs: log-probs of the wrong state's row, of tokens after E, of unnormalised logits."""
    tree, logits, _, _ = draw(0, vocab, horizon)
    probs = [probability(tree, logits, response) for response in tree.states[tree.S:]]
    close(response_logp(tree, logits).exp(), probs)
    close(sum(probs), 1.0)
    close(response_logp(tree, logits.log_softmax(-1) + 3.0), response_logp(tree, logits))
    assert (token_logp(tree, logits)[~tree.mask] == 0).all() and (token_logp(tree, logits)[tree.mask] < 0).all()


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_kl_and_entropy_are_sums_over_tokens(seed):
    """Bugs: KL with its arguments swapped, a sum of per-state KLs that forgets how likely a state is, per token instead of per response."""
    tree, logits, ref, _ = draw(seed, 4, 3)
    visits, logp, ref_logp = state_probability(tree, logits), logits.log_softmax(-1), ref.log_softmax(-1)
    close(kl(tree, logits, ref), visits @ (logp.exp() * (logp - ref_logp)).sum(-1))
    close(entropy(tree, logits), -visits @ (logp.exp() * logp).sum(-1))
    close(kl(tree, logits, logits), 0.0)


def test_entropy_of_a_known_policy():
    """Bug: an entropy with the wrong sign or base. Uniform tokens, V = 3, R = 2: one response of probability 1/3 and six of 1/9."""
    close(entropy(Tree(3, 2), torch.zeros(3, 3, dtype=torch.float64)), math.log(3) / 3 + 6 * math.log(9) / 9)


# ---------------------------------------------------------------------------------------------------------------------
# the solution

@pytest.mark.parametrize("vocab,horizon", SIZES)
@pytest.mark.parametrize("beta", [0.3, 1.0, 4.0])
def test_value_iteration_is_the_reweighted_reference(vocab, horizon, beta):
    """Bugs in soft value iteration: a max for the soft max, the reference forgotten, beta on the wrong side, a state solved before its successors."""
    tree, _, ref, rewards = draw(1, vocab, horizon)
    weights = [probability(tree, ref, y) * math.exp(r / beta) for y, r in zip(tree.states[tree.S:], rewards.tolist())]
    best = solve(tree, ref, rewards, beta)
    close(best.J, beta * math.log(sum(weights)))
    close(response_logp(tree, best.logp).exp(), [w / sum(weights) for w in weights])
    close(best.logp.logsumexp(-1), torch.zeros(tree.S))
    close(best.J, objective(tree, best.logp, ref, rewards, beta))
    close(best.Q[0, 0], rewards[tree.next_state[0, 0] - tree.S])  # E at once: the response is over and paid
    for s, state in enumerate(tree.states[:tree.S]):  # each state is the root of a tree of its own
        below = sum(w for w, y in zip(weights, tree.states[tree.S:]) if y[:len(state)] == state)
        close(best.V[s], beta * math.log(below / probability(tree, ref, state)))


@given(seeds, st.floats(0.2, 5.0))
@settings(max_examples=20, deadline=None)
def test_what_a_policy_lacks_is_its_kl_from_the_optimum(seed, beta):
    """Bugs: a KL penalty of the wrong sign, direction or weight in J; a J* that some policy beats."""
    tree, logits, ref, rewards = draw(seed)
    best = solve(tree, ref, rewards, beta)
    J = objective(tree, logits, ref, rewards, beta)
    close(J, best.J - beta * kl(tree, logits, best.logp))
    assert J < best.J
    close(J, sum(probability(tree, logits, y) * (r - beta * math.log(probability(tree, logits, y) / probability(tree, ref, y)))
                 for y, r in zip(tree.states[tree.S:], rewards.tolist())))


def test_beta_between_its_extremes():
    """Bugs: 1/beta where beta belongs. A dear KL leaves the reference alone, a cheap one buys the best response; beta 0 has no soft maximum."""
    tree, _, ref, rewards = draw(2)
    close(solve(tree, ref, rewards, 1e6).logp, ref.log_softmax(-1), 1e-5)
    close(solve(tree, ref, rewards, 1e6).J, response_logp(tree, ref).exp() @ rewards, 1e-5)
    close(solve(tree, ref, rewards, 1e-4).J, rewards.max(), 1e-2)
    assert response_logp(tree, solve(tree, ref, rewards, 1e-4).logp).argmax() == rewards.argmax()
    for beta in (0.0, -1.0):
        with pytest.raises(ValueError, match="beta"):
            solve(tree, ref, rewards, beta)


def test_rewards_may_be_integers():
    """Bug: value iteration in the rewards' type, which rounds every value down to an integer."""
    tree, _, ref, _ = draw(3)
    rewards = torch.arange(tree.Y)
    close(solve(tree, ref, rewards, 2.0).J, solve(tree, ref, rewards.double(), 2.0).J)
    close(objective(tree, ref, ref, rewards, 2.0), objective(tree, ref, ref, rewards.double(), 2.0))


@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_of_J(seed):
    """Bugs: a gradient that misses that the sampling distribution moves, or the KL term; a sign; a gradient that is not 0 at the optimum."""
    tree, logits, ref, rewards = draw(seed)
    beta, eps = 0.7, 1e-5
    gradient = policy_gradient(tree, logits, ref, rewards, beta)

    numeric = torch.zeros_like(logits)
    for s, a in itertools.product(*map(range, logits.shape)):
        up, down = logits.clone(), logits.clone()
        up[s, a] += eps
        down[s, a] -= eps
        numeric[s, a] = (objective(tree, up, ref, rewards, beta) - objective(tree, down, ref, rewards, beta)) / (2 * eps)
    close(gradient, numeric, 1e-8)  # the error of the differences themselves

    # REINFORCE: E[(score - beta log pi/ref) d log pi], the bracket held constant; d log pi(a|s) / d logits = one-hot - pi
    probs, logp, ref_logp = logits.softmax(-1), response_logp(tree, logits), response_logp(tree, ref)
    reinforce = torch.zeros_like(logits)
    for y, response in enumerate(tree.states[tree.S:]):
        for t, token in enumerate(response):
            s = tree.states.index(response[:t])
            score_function = torch.nn.functional.one_hot(torch.tensor(token), 3) - probs[s]
            reinforce[s] += logp[y].exp() * (rewards[y] - beta * (logp[y] - ref_logp[y])) * score_function
    close(gradient, reinforce)

    # the policy gradient theorem: d(s) pi(a|s) (Q - V), where an action pays for its own KL
    value = policy_value(tree, logits, ref, rewards, beta)
    Q = torch.cat([value, rewards])[tree.next_state] - beta * (logits.log_softmax(-1) - ref.log_softmax(-1))
    close(gradient, state_probability(tree, logits)[:, None] * probs * (Q - value[:, None]))

    close(policy_gradient(tree, solve(tree, ref, rewards, beta).logp, ref, rewards, beta), torch.zeros_like(logits))
    assert gradient.abs().max() > 1e-3


# ---------------------------------------------------------------------------------------------------------------------
# the GPT's rollout is an episode

def random_gpt(seed, vocab=4):
    """A GPT whose next-token distributions are far from uniform. PAD = vocab is no token of it: nothing may look a pad up."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab, block_size=8, n_layer=2, n_head=2, n_embd=8)).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model.requires_grad_(False)


def table(model, prompt, tree):
    """The GPT as a policy on the tree, (S, V): one plain forward pass for every state, without padding, cache or batch."""
    return torch.stack([model(torch.tensor([[*prompt, *state]]))[0, -1] for state in tree.states[:tree.S]])


def all_responses(model, prompt, tree):
    """Every response of the tree as one rollout of the GPT."""
    batch = collate([prompt] * tree.Y, tree.states[tree.S:], pad=4)
    return Rollout(*vars(batch).values(), response_logprobs(model, batch), None)


def test_a_rollout_of_the_gpt_is_an_episode():
    """Bugs: sampling on after E, a cap off by one, `finished` for a cut response, log-probs of other states than those the tokens were chosen in."""
    model, tree, R = random_gpt(3), Tree(4, 3), 3
    prompts = [[1, 2], [3], [1, 0, 2]] * 16
    out = generate(model, prompts, R, generator=torch.Generator().manual_seed(0), end=0, pad=4)
    tables = {tuple(prompt): response_logp(tree, table(model, prompt, tree)) for prompt in prompts[:3]}
    for prompt, response, logp, finished in zip(prompts, out.response_ids(), out.logp, out.finished.tolist()):
        process = TokenMDP(prompt, R, end=0, reward=lambda prompt, response: 1.0)
        state, over = process.start, False
        for t, action in enumerate(response):
            assert not over
            close(logp[t], model(torch.tensor([state]))[0, -1].log_softmax(-1)[action])
            state, reward, over = process.step(state, action)
            assert reward == over
        assert over and state == (*prompt, *response) and finished == (response[-1] == 0)
        close(logp.sum(), tables[tuple(prompt)][tree.states.index(tuple(response)) - tree.S])
    assert 0 < out.finished.sum() < len(prompts) and len(set(out.response_lens.tolist())) == R  # every kind of ending was seen


def test_the_gpt_scores_the_whole_tree():
    """Bug: log-probs that are no distribution over responses, from a slice that is off by one, padding that counts or a forgotten E."""
    model, tree, prompt = random_gpt(1), Tree(4, 3), [2, 1]
    batch = all_responses(model, prompt, tree)
    close(batch.logp.sum(1).exp().sum(), 1.0)
    close(batch.logp, token_logp(tree, table(model, prompt, tree)))


@pytest.mark.parametrize("sampler", ["generate", "rollout"])
def test_samples_come_from_the_policy(sampler):
    """Bug: a sampler that draws from another distribution than the one that it reports, which no check of log-probs can see."""
    model, tree, n = random_gpt(2), Tree(4, 2), 4000
    logits, generator = table(model, [3], tree), torch.Generator().manual_seed(0)
    if sampler == "generate":
        out = generate(model, [[3]] * n, 2, generator=generator, end=0, pad=4)
        y = torch.tensor([tree.states.index(tuple(response)) - tree.S for response in out.response_ids()])
    else:
        y = rollout(tree, logits, n, generator)
    expected = n * response_logp(tree, logits).exp()
    chi2 = ((torch.bincount(y, minlength=tree.Y) - expected) ** 2 / expected).sum()
    assert chi2 < 33, f"chi-square {chi2:.1f} on 12 degrees of freedom: one in a thousand is above 33"


def test_exact_kl_of_two_gpts():
    """Bugs: exact_kl per token instead of per response, in the other direction, or with the tokens after E."""
    model, other, tree, prompt = random_gpt(3), random_gpt(4), Tree(4, 3), [1]
    batch = all_responses(model, prompt, tree)
    close(batch.logp.sum(1).exp() @ exact_kl(model, other, batch), kl(tree, table(model, prompt, tree), table(other, prompt, tree)))


def test_experience_of_the_gpt_adds_up_to_J():
    """Bugs: a reward paid twice or at a pad, a KL penalty of the wrong sign, values out of step with the states (a true critic's E[A] is 0)."""
    model, reference, tree, prompt, beta = random_gpt(5), random_gpt(6), Tree(4, 3), [1, 3], 0.4
    batch, rewards = all_responses(model, prompt, tree), draw(5, 4, 3)[3]
    logits, ref = table(model, prompt, tree), table(reference, prompt, tree)
    value = policy_value(tree, logits, ref, rewards, beta)

    class Critic:
        def values(self, batch):
            return torch.where(tree.mask, value[tree.state_index], 7.0)

    lesson = experience(batch, reference, lambda batch: rewards, Critic(), beta, lam=0.9)
    p = batch.logp.sum(1).exp()
    close(p @ lesson["rewards"].sum(1), objective(tree, logits, ref, rewards, beta))
    close(p @ lesson["advantages"], torch.zeros(3))
    close(p @ lesson["returns"][:, 0], value[0])


# ---------------------------------------------------------------------------------------------------------------------
# ppo.py on the tree

def exact_policy_loss_gradient(tree, logits, ref, rewards, beta, values, lam):
    """
    The gradient of policy_loss at ratio 1, summed over the tokens of a response and in expectation over responses, by (S, V).

    The loss is a mean over tokens, so each response goes through it alone and is weighted by pi(y) and its length.
    """
    old_logp = token_logp(tree, logits)
    paid = token_rewards(rewards, old_logp, token_logp(tree, ref), tree.mask, beta)
    advantages, _ = gae(paid, values[tree.state_index], tree.mask, lam=lam)
    theta = logits.clone().requires_grad_()
    logp, total = token_logp(tree, theta), 0.0
    for y in range(tree.Y):
        row = slice(y, y + 1)
        loss = policy_loss(logp[row], old_logp[row], advantages[row], tree.mask[row])
        total = total + old_logp[y].sum().exp() * tree.mask[y].sum() * loss
    return torch.autograd.grad(total, theta)[0]


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(2))
def test_policy_loss_has_the_gradient_of_J(seed, lam):
    """Bugs: a sign, a ratio whose gradient is cut, advantages that include the future of another token. Transitions are certain, so with a true
    critic delta_t is the advantage itself and any lambda gives the gradient of J; with any critic at all, lambda 1 does."""
    tree, logits, ref, rewards = draw(seed)
    exact = policy_gradient(tree, logits, ref, rewards, 0.3)
    true_critic = policy_value(tree, logits, ref, rewards, 0.3)
    close(exact_policy_loss_gradient(tree, logits, ref, rewards, 0.3, true_critic, lam), -exact)
    wrong = exact_policy_loss_gradient(tree, logits, ref, rewards, 0.3, true_critic + torch.linspace(-1, 1, tree.S, dtype=torch.float64), lam)
    assert torch.allclose(wrong, -exact, rtol=0, atol=1e-9) == (lam == 1.0)


def test_advantages_vanish_at_the_optimum():
    """Bugs: V(s') of the wrong column, a bootstrap after E or at the cap. At pi*, with V*, no action is better than another: every delta is 0."""
    tree, _, ref, rewards = draw(4, 4, 3)
    best = solve(tree, ref, rewards, 0.6)
    paid = token_rewards(rewards, token_logp(tree, best.logp), token_logp(tree, ref), tree.mask, 0.6)
    advantages, returns = gae(paid, best.V[tree.state_index], tree.mask)
    close(advantages, torch.zeros(tree.Y, 3))
    close(returns, torch.where(tree.mask, best.V[tree.state_index], 0.0))
    close(paid.sum(1), best.J.expand(tree.Y))  # every response is worth J*, paid for its KL


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_kl_estimates_on_samples_of_the_policy(seed):
    """Bugs: k1 or k3 of the swapped ratio, which samples of the policy do not average to KL(pi||ref); k2 without its square or its half."""
    tree, logits, ref, _ = draw(seed)
    p, logp, ref_logp = response_logp(tree, logits).exp(), token_logp(tree, logits), token_logp(tree, ref)
    right, swapped = kl_estimates(logp, ref_logp), kl_estimates(ref_logp, logp)
    exact = kl(tree, logits, ref)
    close(p @ right["k1"].sum(1), exact)
    close(p @ right["k3"].sum(1), exact)
    close(p @ swapped["k1"].sum(1), -exact)
    assert abs(p @ swapped["k3"].sum(1) - exact) > 1e-6
    close(p @ right["k2"].sum(1), sum(p[y] * (logp[y, t] - ref_logp[y, t]) ** 2 / 2 for y in range(tree.Y) for t in range(3)))
    near = logits + 1e-4 * (ref - logits)
    k2 = response_logp(tree, near).exp() @ kl_estimates(token_logp(tree, near), token_logp(tree, logits))["k2"].sum(1)
    assert abs(k2 / kl(tree, near, logits) - 1) < 1e-2  # biased, but by the third order only


# ---------------------------------------------------------------------------------------------------------------------
# dpo.py on the tree

def population_gradient(tree, logits, ref, wins, beta, kind="dpo", **options):
    """The gradient, by (S, V), of the loss over all ordered pairs, each as frequent as it is labelled so: wins[a, b] (Y, Y)."""
    theta = logits.detach().clone().requires_grad_()
    logp, ref_logp = response_logp(tree, theta), response_logp(tree, ref)
    total = sum(wins[a, b] * dpo_loss(logp[[a]], logp[[b]], ref_logp[[a]], ref_logp[[b]], beta, kind, **options)
                for a in range(tree.Y) for b in range(tree.Y) if a != b)
    return torch.autograd.grad(total, theta)[0]


def test_dpo_has_its_optimum_at_pi_star():
    """Bugs: a DPO loss with the pair swapped, beta forgotten or squared, the reference left out: none of them is flat at ref exp(r / beta) / Z."""
    tree, logits, ref, rewards = draw(6)
    best, wins = solve(tree, ref, rewards, 0.4), win_probabilities(rewards)
    close(population_gradient(tree, best.logp, ref, wins, 0.4), torch.zeros_like(ref))
    assert population_gradient(tree, logits, ref, wins, 0.4).abs().max() > 1e-2
    f = 0.4 * (response_logp(tree, best.logp) - response_logp(tree, ref))
    close(f - f[0], rewards - rewards[0])  # the implicit reward is the reward
    flipped = 0.8 * wins + 0.2 * wins.T  # one label in five turned around, and the loss told so
    close(population_gradient(tree, best.logp, ref, flipped, 0.4) - population_gradient(tree, best.logp, ref, wins, 0.4, label_smoothing=0.2),
          torch.zeros_like(ref))


@pytest.mark.parametrize("certain", [False, True])
def test_ipo_has_its_optimum_where_solve_ipo_says(certain):
    """Bugs: an IPO target of 1/beta or beta/2, or a closed form with the wrong scale; the oracle is least squares over all pairs."""
    tree, _, ref, rewards = draw(7)
    wins = (torch.sign(rewards[:, None] - rewards) + 1) / 2 if certain else win_probabilities(rewards)
    stop = solve_ipo(tree, ref, wins, 0.4)
    close(population_gradient(tree, stop.logp, ref, wins, 0.4, "ipo"), torch.zeros_like(ref))
    a, b = torch.triu_indices(tree.Y, tree.Y, 1)
    differences = torch.zeros(len(a), tree.Y, dtype=torch.float64)
    differences[range(len(a)), a], differences[range(len(a)), b] = 1.0, -1.0
    f = torch.linalg.lstsq(differences, ((2 * wins[a, b] - 1) / 0.8)[:, None], driver="gelsd").solution[:, 0]  # h = (2p - 1) / (2 beta)
    close((response_logp(tree, ref) + f).log_softmax(0), response_logp(tree, stop.logp))
    assert kl(tree, stop.logp, solve(tree, ref, rewards, 0.4).logp) > 0.05  # it is not pi*


def test_labels_are_drawn_from_bradley_terry():
    """Bugs: pairs left out or drawn unequally often, a response against itself, the winner taken for the loser."""
    rewards = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)
    wins = win_probabilities(rewards)
    close(wins[1, 0], 1 / (1 + math.exp(-1.0)))
    close(wins + wins.T, torch.ones(3, 3))
    chosen, rejected = mdp.draw_labels(wins, 4000, torch.Generator().manual_seed(0))
    for a, b in ((0, 1), (0, 2), (1, 2)):
        won, lost = ((chosen == x) & (rejected == y) for x, y in ((a, b), (b, a)))
        assert won.sum() + lost.sum() == 4000
        close(won.sum() / 4000, wins[a, b], 0.03)
    assert len(chosen) == len(rejected) == 3 * 4000


# ---------------------------------------------------------------------------------------------------------------------
# evaluate.py on the tree

@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_the_optimum_of_reference_samples(beta):
    """Bugs: a sum for the mean, beta on one side only, an effective sample size that is not the weights'. The reference is uniform over three
    tokens, so 27 samples, a response of length l in them 3^(3 - l) times, are exactly its distribution."""
    tree, _, _, rewards = draw(8)
    ref = torch.zeros(tree.S, 3, dtype=torch.float64)
    samples = torch.tensor([y for y in range(tree.Y) for _ in range(3 ** (3 - int(tree.mask[y].sum())))])
    assert len(samples) == 27
    found, best = optimum(rewards[samples], beta), solve(tree, ref, rewards, beta)
    close(found.objective, best.J)
    weights = [math.exp(r / beta) for r in rewards[samples].tolist()]
    close(found.ess, sum(weights) ** 2 / sum(w * w for w in weights))
    close(optimum_mean(rewards[samples], rewards[samples], beta), response_logp(tree, best.logp).exp() @ rewards)


# ---------------------------------------------------------------------------------------------------------------------
# the lesson

@pytest.mark.parametrize("seed", [1, 2])
def test_ppo_and_dpo_find_pi_star(seed):
    """Bugs in any of token_rewards, gae, whiten, policy_loss, value_loss and dpo_loss that leave a gradient but move its zero."""
    tree, ref, rewards, generator = mdp.problem(seed)
    best = solve(tree, ref, rewards, 0.5)
    distances = [kl(tree, logits, best.logp).item() for _, logits, _ in mdp.learn_ppo(tree, ref, rewards, 0.5, generator)]
    assert distances[0] > 0.5 and distances[20] < 0.1 and distances[-1] < 0.01
    labels = mdp.draw_labels(win_probabilities(rewards), 400, generator)
    distances = [kl(tree, logits, best.logp).item() for _, logits in mdp.learn_dpo(tree, ref, *labels, 0.5, generator)]
    assert distances[0] > 0.5 and distances[50] < 0.1 and distances[-1] < 0.01


def test_certain_labels_drive_dpo_away_and_stop_ipo():
    """Bugs: a DPO loss that saturates or is clipped, an IPO loss that keeps pushing once its margin is reached."""
    tree, ref, rewards, generator = mdp.problem(0)
    best, wins = solve(tree, ref, rewards, 0.5), (torch.sign(rewards[:, None] - rewards) + 1) / 2
    chosen, rejected = mdp.draw_labels(wins, 1, generator)
    assert (rewards[chosen] > rewards[rejected]).all()

    def margins(logits):
        f = response_logp(tree, logits) - response_logp(tree, ref)
        return (f[chosen] - f[rejected]).mean().item()

    policies = [logits for _, logits in mdp.learn_dpo(tree, ref, chosen, rejected, 0.5, steps=400)]
    grown = [margins(policies[i]) for i in (0, 50, 100, 200, 400)]
    assert all(a + 1 < b for a, b in itertools.pairwise(grown)) and grown[-1] > 10
    away = [kl(tree, best.logp, policies[i]).item() for i in (50, 100, 200, 400)]
    assert all(a < b for a, b in itertools.pairwise(away)) and away[-1] > 2
    ipo = [logits for _, logits in mdp.learn_dpo(tree, ref, chosen, rejected, 0.5, kind="ipo", steps=400)]
    close(kl(tree, ipo[-1], solve_ipo(tree, ref, wins, 0.5).logp), 0.0, 1e-6)
    close(margins(ipo[-1]), margins(solve_ipo(tree, ref, wins, 0.5).logp), 1e-4)


def command_line(monkeypatch, *arguments):
    """python mdp.py, without another import of torch."""
    monkeypatch.setattr(sys, "argv", ["mdp.py", *arguments])
    runpy.run_path(mdp.__file__, run_name="__main__")


def test_the_lesson_from_the_command_line(monkeypatch, capsys):
    """Bug: a lesson that crashes half-way, or prints a bar that it misses."""
    command_line(monkeypatch, "--seed", "0")
    out = capsys.readouterr().out
    ppo, dpo, ipo = (float(out.splitlines()[-1].split(f"{name} ")[1].split()[0].rstrip(",;.")) for name in ("PPO", "DPO", "own optimum"))
    assert max(ppo, dpo, ipo) < 0.01 and "nan" not in out


@pytest.mark.parametrize("arguments", [["--sede", "1"], ["--seed", "one"], ["1"]])
def test_an_unknown_flag_gets_one_line(arguments, monkeypatch, capsys):
    """Bug: a traceback, a page of usage, or a flag that is silently ignored."""
    with pytest.raises(SystemExit) as stop:
        command_line(monkeypatch, *arguments)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1 and arguments[-1] in err
