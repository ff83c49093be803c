"""
Token generation as a Markov decision process, on a tree so small that it is solved exactly.

    python mdp.py              the lesson: solve the tree, then watch PPO and DPO end within 0.01 nats of the solution; seconds on a CPU
    python mdp.py --seed 1     another reference policy, other samples, other labels

Writing a response is an episode ('RLHF Deciphered', arXiv:2404.08555, section 3):

    state        the prompt and the tokens so far          s_t = [prompt, o_1 .. o_t]
    action       the next token, any of the vocabulary     a_t = o_t+1
    transition   append, nothing is random                 s_t+1 = [s_t, a_t]
    end          at the token E, or at the horizon         the R-th token, whatever it is
    reward       the score of the response, at its end     0 before that; gamma = 1

With 4 tokens and 3 steps there are 40 responses: their probabilities, the optimal policy and every gradient are sums over a table, and what the
other files estimate from samples can be checked to the last digit. A policy on the tree is a table of finite logits (S, V), one row for each state
in which there is something to choose; log-probs are logits too. KL is in nats per response, J in the units of the rewards.

Left out: the prompt, because given one everything below is for that prompt; and parameters that states share, because a table has none: what a
network unlearns in one state by learning in another cannot be seen here.

Letters: V vocabulary, R horizon, S states in which an action is taken, Y responses, B sampled responses, M labelled pairs.
"""

import argparse
import time
from typing import NamedTuple

import torch

END = 0  # the action that ends a response on the tree


class TokenMDP:
    """The definition above, to be stepped by hand. A state is a tuple of tokens, and a token is anything: an id or a word."""

    def __init__(self, prompt, horizon, end=END, reward=lambda prompt, response: 0.0):
        self.start, self.horizon, self.end, self.reward = tuple(prompt), horizon, end, reward

    def over(self, state):
        response = state[len(self.start):]
        return len(response) == self.horizon or response[-1:] == (self.end,)

    def step(self, state, action):
        """(next state, reward, whether the episode is over). Raises ValueError when it was over before."""
        if self.over(state):
            raise ValueError(f"the episode is over in {state}: no action can be taken")
        after = (*state, action)
        over = self.over(after)
        return after, self.reward(self.start, after[len(self.start):]) if over else 0.0, over


class Tree:
    """
    All states of the MDP with V tokens, of which 0 is E, and horizon R, after an empty prompt.

    states       S + Y tuples of ids: the S states in which an action is taken, then the Y whole responses; shorter before longer in both
    next_state   (S, V)  the index in `states` that an action leads to; S + y is the end of the episode with response y
    responses    (Y, R)  ids, V (which is no token) after the end
    mask         (Y, R)  True on real tokens, E included
    state_index  (Y, R)  the state in which each token is chosen, 0 outside the mask
    """

    def __init__(self, vocab, horizon):
        if vocab < 2 or horizon < 1:
            raise ValueError(f"a tree has at least 2 tokens and 1 step, got {vocab} and {horizon}")
        mdp = TokenMDP((), horizon)
        inner, whole = [mdp.start], []
        for state in inner:  # the list grows while it is read, until every state has been reached
            for action in range(vocab):
                after, _, over = mdp.step(state, action)
                (whole if over else inner).append(after)
        self.states, self.S, self.Y = inner + whole, len(inner), len(whole)
        index = {state: i for i, state in enumerate(self.states)}
        self.next_state = torch.tensor([[index[(*state, action)] for action in range(vocab)] for state in inner])
        self.responses = torch.tensor([list(y) + [vocab] * (horizon - len(y)) for y in whole])
        self.mask = torch.arange(horizon) < torch.tensor([len(y) for y in whole])[:, None]
        self.state_index = torch.tensor([[index[y[:t]] if t < len(y) else 0 for t in range(horizon)] for y in whole])


# ---------------------------------------------------------------------------------------------------------------------
# exact quantities of a policy

def token_logp(tree, logits):
    """log pi(a_t | s_t) of every token of every response: (Y, R), zeros outside the mask."""
    logp = torch.log_softmax(logits, dim=-1)                                           # (S, V)
    return torch.where(tree.mask, logp[tree.state_index, torch.where(tree.mask, tree.responses, 0)], 0.0)


def response_logp(tree, logits):
    """log pi(y) of every response (Y,): the sum over its tokens, because the transitions add no probability of their own."""
    return token_logp(tree, logits).sum(dim=1)


def kl(tree, logits, other):
    """KL(policy || other) = sum_y pi(y) log pi(y)/other(y), in nats per response."""
    logp = response_logp(tree, logits)
    return (logp.exp() * (logp - response_logp(tree, other))).sum()


def entropy(tree, logits):
    """-sum_y pi(y) log pi(y), in nats per response."""
    logp = response_logp(tree, logits)
    return -(logp.exp() * logp).sum()


def objective(tree, logits, ref_logits, rewards, beta):
    """J(pi) = sum_y pi(y) rewards(y) - beta KL(pi || ref), scalar; rewards (Y,) in the order of `tree.responses`."""
    return response_logp(tree, logits).exp() @ rewards.to(logits.dtype) - beta * kl(tree, logits, ref_logits)


def policy_gradient(tree, logits, ref_logits, rewards, beta):
    """dJ/d logits (S, V), by differentiating the sum over all responses: what PPO's gradient is an estimate of."""
    logits = logits.detach().requires_grad_()
    return torch.autograd.grad(objective(tree, logits, ref_logits, rewards, beta), logits)[0]


# ---------------------------------------------------------------------------------------------------------------------
# the solution

class Solution(NamedTuple):
    V: torch.Tensor     # (S,) soft value of each state
    Q: torch.Tensor     # (S, V) soft value of each action
    logp: torch.Tensor  # (S, V) log pi*(a|s), the optimal policy
    J: torch.Tensor     # scalar J*, the best value that J can have


def solve(tree, ref_logits, rewards, beta):
    """
    The policy that maximises J, by soft value iteration from the ends of the tree to its root (rewards (Y,), at the end of a response):

        Q(s,a) = r(s,a) + V(s')         V(s) = beta log sum_a ref(a|s) exp(Q(s,a) / beta)        pi*(a|s) = ref(a|s) exp((Q(s,a) - V(s)) / beta)

    It is the token by token form of  pi*(y) = ref(y) exp(r(y) / beta) / Z,  J* = beta log Z  (Rafailov et al. 2023, equation 4), and for any policy
    J(pi) = J* - beta KL(pi || pi*). Raises ValueError for beta <= 0.
    """
    if beta <= 0:
        raise ValueError(f"beta is above 0, got {beta}")
    ref = torch.log_softmax(ref_logits, dim=-1)                                        # (S, V)
    reward_on = torch.cat([ref.new_zeros(tree.S), rewards])                            # (S + Y,) paid on arrival in a state
    V, Q = torch.zeros_like(reward_on), torch.zeros_like(ref)                          # after the end there is nothing: V stays 0
    for s in reversed(range(tree.S)):  # a state's successors stand after it
        Q[s] = (reward_on + V)[tree.next_state[s]]
        V[s] = beta * torch.logsumexp(ref[s] + Q[s] / beta, dim=0)
    V = V[:tree.S]
    return Solution(V, Q, ref + (Q - V[:, None]) / beta, V[0])


# ---------------------------------------------------------------------------------------------------------------------
# learning it instead, with the functions that train the GPT

def rollout(tree, logits, B, generator=None):
    """B episodes of the policy, token by token: the indices (B,) of the responses that came out."""
    probs = torch.softmax(logits.detach(), dim=-1)
    state = torch.zeros(B, dtype=torch.long)
    while (running := state < tree.S).any():
        action = torch.multinomial(probs[state[running]], 1, generator=generator)[:, 0]
        state[running] = tree.next_state[state[running], action]
    return state - tree.S


def learn_ppo(tree, ref_logits, rewards, beta, generator, iterations=100, B=1024, epochs=2, lr=0.1, shaping=None):
    """
    PPO with a table for a policy and a table for a critic; yields (iteration, logits, J of the sample) before each update and after the last.
    `shaping` (Y, R), zeros outside the mask, is paid besides; where each row sums to 0 no return changes, and so no optimum.
    """
    from ppo import gae, policy_loss, token_rewards, value_loss, whiten  # here, because ppo.py stands above this file in the reading order
    logits, values = ref_logits.clone().requires_grad_(), ref_logits.new_zeros(tree.S).requires_grad_()
    optimizer = torch.optim.Adam([logits, values], lr=lr)
    for iteration in range(iterations + 1):
        y = rollout(tree, logits, B, generator)                                        # (B,)
        mask, states = tree.mask[y], tree.state_index[y]                               # (B, R) each
        old_logp, old_values = token_logp(tree, logits).detach()[y], values.detach()[states]
        paid = token_rewards(rewards[y], old_logp, token_logp(tree, ref_logits)[y], mask, beta)
        paid = paid if shaping is None else paid + shaping[y]
        advantages, returns = gae(paid, old_values, mask, gamma=1.0, lam=1.0)
        advantages = whiten(advantages, mask)
        yield iteration, logits.detach().clone(), paid.sum(dim=1).mean()
        optimizer.param_groups[0]["lr"] = lr * (1 - iteration / iterations)
        for _ in range(epochs):
            loss = policy_loss(token_logp(tree, logits)[y], old_logp, advantages, mask) + value_loss(values[states], old_values, returns, mask)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def win_probabilities(rewards):
    """Bradley-Terry: the probability sigmoid(r_a - r_b) that a wins against b, (Y, Y)."""
    return torch.sigmoid(rewards[:, None] - rewards)


def draw_labels(wins, n, generator=None):
    """Every pair of responses, labelled n times by a coin that falls for a against b with probability wins[a, b]: chosen, rejected (M,)."""
    a, b = torch.triu_indices(len(wins), len(wins), 1).repeat(1, n)                    # (M,) each
    a_wins = torch.rand(len(a), dtype=wins.dtype, generator=generator) < wins[a, b]
    return torch.where(a_wins, a, b), torch.where(a_wins, b, a)


def learn_dpo(tree, ref_logits, chosen, rejected, beta, generator=None, kind="dpo", steps=200, size=4096, lr=0.2):
    """A loss of dpo.py, with a table for a policy, on `size` of the labels (M,) a step; yields (step, logits) before each step and after the last."""
    from dpo import dpo_loss  # here, because dpo.py stands above this file in the reading order
    logits, ref_logp = ref_logits.clone().requires_grad_(), response_logp(tree, ref_logits)  # (S, V), (Y,)
    optimizer = torch.optim.Adam([logits], lr=lr)
    for step in range(steps + 1):
        yield step, logits.detach().clone()
        rows = torch.randint(len(chosen), (size,), generator=generator) if size < len(chosen) else slice(None)
        logp, a, b = response_logp(tree, logits), chosen[rows], rejected[rows]         # (Y,), (size,), (size,)
        loss = dpo_loss(logp[a], logp[b], ref_logp[a], ref_logp[b], beta, kind)
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def solve_ipo(tree, ref_logits, wins, beta):
    """
    Where IPO stops, when all pairs are equally frequent and a wins against b with probability wins[a, b] = p_ab (Y, Y).

    With f = log pi/ref, h = f_a - f_b and c = 1 / (2 beta), a pair's mean loss is  p (h - c)^2 + (1 - p) (h + c)^2 = (h - c (2p - 1))^2 + constant:
    least squares for the differences of f. Setting the derivative by f_a, a sum over b, to 0 gives  f_a = c mean_b (2 p_ab - 1) = mean_b p_ab / beta
    up to a constant. So IPO's optimum is  ref exp(win rate / beta) / Z: that of a J whose reward is the win rate against a response drawn uniformly.
    Win rates lie between 0 and 1, so no h exceeds 1 / beta, even when every label is certain (Azar et al. 2023, who derive the loss from this J).
    """
    return solve(tree, ref_logits, wins.mean(dim=1), beta)  # the mean includes p_aa = 1/2, the same for all


# ---------------------------------------------------------------------------------------------------------------------
# the lesson

WORDS = (".", "good", "bad", "very")  # the first one is E


def taste(prompt, response):
    """The score of a response in words: 0.5 for good, -0.5 for bad, three times as much right after very, and -1 for a response that is cut."""
    score, weight = 0.0, 1.0
    for word in response:
        score += weight * {"good": 0.5, "bad": -0.5}.get(word, 0.0)
        weight = 3.0 if word == "very" else 1.0
    return score - (response[-1] != WORDS[END])


def problem(seed):
    """A tree, a random reference policy (S, V), and rewards (Y,): `taste`, and a little whim, so that no two responses are worth the same."""
    tree, generator = Tree(len(WORDS), 3), torch.Generator().manual_seed(seed)
    ref_logits = torch.randn(tree.S, len(WORDS), generator=generator, dtype=torch.float64)
    scores = torch.tensor([taste((), [WORDS[a] for a in y]) for y in tree.states[tree.S:]], dtype=torch.float64)
    return tree, ref_logits, scores + 0.1 * torch.randn(tree.Y, generator=generator, dtype=torch.float64), generator


def lesson(seed=0, beta=0.5):
    """Print the lesson. Returns each policy's last KL, in nats: ppo and dpo from pi*, ipo from its own optimum; certain_: with certain labels."""
    tree, ref, rewards, generator = problem(seed)
    best, J_ref, ref_logp = solve(tree, ref, rewards, beta), objective(tree, ref, ref, rewards, beta), response_logp(tree, ref)
    final, policies = {}, {"ref": ref, "pi*": best.logp}

    def row(*cells):
        print("   " + "".join(f"{cell:>14}" if isinstance(cell, (str, int)) else f"{round(float(cell), 4) + 0.0:>14.4f}" for cell in cells))

    print("1. Writing as an MDP\n\n" + __doc__.split("section 3):\n\n")[1].split("\n\n")[0])  # the definition, told once
    print("\n   An episode: '.' is E, and the horizon is the third step.\n")
    mdp = TokenMDP(("the", "film", "was"), 3, WORDS[END], taste)
    state = mdp.start
    for action in ("very", "good", "."):
        after, reward, over = mdp.step(state, action)
        print(f"   state [{' '.join(state)}]  action [{action}]  reward {reward:.1f}{'  over' if over else ''}")
        state = after

    print(f"\n2. Solved: {len(WORDS)} tokens, {tree.S} states, {tree.Y} responses; a random reference; score = taste and a whim; beta = {beta}.\n")
    print(f"   J(ref) = {J_ref:.4f}   J* = V(first state) = {best.J:.4f}   KL(pi*||ref) = {kl(tree, best.logp, ref):.4f} nats")
    print(f"   J* - J(ref) = {best.J - J_ref:.6f} = beta KL(ref||pi*) = {beta * kl(tree, ref, best.logp):.6f}: what J lacks is KL from pi*")

    print("\n3. PPO, with the functions of ppo.py, on 1024 responses of the policy an iteration. It sees their scores, and no more of the tree.\n")
    row("iteration", "J, sampled", "J, exact", "J*", "KL(pi||pi*)")
    for i, logits, J in learn_ppo(tree, ref, rewards, beta, generator):
        if i in (0, 5, 10, 20, 50, 100):
            row(i, J, objective(tree, logits, ref, rewards, beta), best.J, kl(tree, logits, best.logp))
    final["ppo"], policies["PPO"] = kl(tree, logits, best.logp).item(), logits

    def margin(logits, chosen, rejected):
        f = response_logp(tree, logits) - ref_logp
        return (f[chosen] - f[rejected]).mean()

    print(f"\n4. DPO and IPO, with the loss of dpo.py, on all {tree.Y * (tree.Y - 1) // 2} pairs, each labelled 400 times by a coin that falls for")
    print("   the first with probability sigmoid(difference in score); a step sees 4096 of these labels. Coins are random, so DPO ends a little")
    print("   off pi*: the fewer the labels, the further. IPO has an optimum of its own, ref exp(win rate / beta) / Z, and stops there.\n")
    certain = (torch.sign(rewards[:, None] - rewards) + 1) / 2
    for prefix, wins, n, steps in (("", win_probabilities(rewards), 400, 200), ("certain_", certain, 1, 500)):
        if prefix:
            print("\n5. The same pairs, but the better one always wins. DPO wants sigmoid(beta h) = 1 for the margin h = log pi/ref of the chosen")
            print("   minus that of the rejected, and no finite h is enough: the margins grow as long as it runs, past pi*, and beta, which only")
            print("   scales h, holds nothing back. (KL(pi||pi*) ends at -log pi*(best response), once nothing else is left; KL(pi*||pi) never.)")
            print(f"   IPO wants h = 1 / (2 beta) = {1 / (2 * beta):.1f} in every pair, which is finite: it stops where the squares are least.\n")
        chosen, rejected = draw_labels(wins, n, generator)
        stop = solve_ipo(tree, ref, wins, beta).logp
        row("step", "DPO: mean h", "KL(pi||pi*)", "KL(pi*||pi)", "IPO: mean h", "KL(pi||pi*)", "KL to its own")
        for (i, dpo), (_, ipo) in zip(*(learn_dpo(tree, ref, chosen, rejected, beta, generator, kind, steps) for kind in ("dpo", "ipo"))):
            if i in (0, 10, 20, 50, 100, 200, 500):
                row(i, margin(dpo, chosen, rejected), kl(tree, dpo, best.logp), kl(tree, best.logp, dpo),
                    margin(ipo, chosen, rejected), kl(tree, ipo, best.logp), kl(tree, ipo, stop))
        final |= {prefix + "dpo": kl(tree, dpo, best.logp).item(), prefix + "ipo": kl(tree, ipo, stop).item()}
        policies |= {prefix + "DPO": dpo, prefix + "IPO": ipo}

    print("\n6. The probabilities of the responses that pi* prefers.\n")
    row("response", "score", *policies)
    for y in response_logp(tree, best.logp).argsort(descending=True)[:8].tolist():
        row(" ".join(WORDS[a] for a in tree.states[tree.S + y]), rewards[y], *(response_logp(tree, x)[y].exp() for x in policies.values()))
    return final


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"mdp: {message}; see --help\n")


if __name__ == "__main__":
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--seed", type=int, default=0, help="of the reference policy, the whims, the samples and the labels")
    started, seed = time.perf_counter(), parser.parse_args().seed
    torch.set_num_threads(1)  # tensors this small are slower on many
    final = lesson(seed)
    print(f"\nKL from pi*: PPO {final['ppo']:.4f}, DPO {final['dpo']:.4f} nats, to be below 0.01; IPO from its own optimum {final['ipo']:.4f}. "
          f"{time.perf_counter() - started:.0f} s, seed {seed}.")
