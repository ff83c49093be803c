"""
Text generation as a Markov decision process, on a tree so small that it can be solved exactly.

`python lesson.py` solves it, and shows how PPO and DPO come within 0.01 nats of the solution. With 4 tokens and at most
3 steps there are 40 responses. So every probability, every gradient and the optimal policy is a sum over a table, and
the estimates that ppo.py and dpo.py make from samples can be compared with it.
A policy is a table of finite logits (S, V), one row for each state in which a token is chosen. Log-probs are
logits too, so a solution is also a policy.

Left out: the prompt, which never changes, and a network. Rows of a table share no parameters, so training in one
state does not change another.

Letters: V vocabulary, R horizon, S inner states, Y responses, B sampled responses, M labelled pairs.
"""

import itertools
from typing import NamedTuple

import torch

from dpo import dpo_loss
from ppo import gae, policy_loss, token_rewards, value_loss, whiten

DEFINITION = """
   state        the prompt and the tokens so far         s_t = [prompt, o_1 .. o_t]
   action       the next token, any of the vocabulary    a_t = o_{t+1}
   transition   append the token, nothing is random      s_{t+1} = [s_t, a_t]
   done         after the token E, or at the horizon     the R-th token, whatever it is
   reward       the score of the response, when done     0 before that; gamma = 1
"""
END = 0  # the id of E, the token that ends a response on the tree


class TokenMDP:
    """The DEFINITION as code (RLHF Deciphered, arXiv:2404.08555, section 3). A state is a tuple of tokens."""

    def __init__(self, prompt, horizon, end=END, reward=lambda prompt, response: 0.0):
        self.start = tuple(prompt)
        self.horizon = horizon
        self.end = end
        self.reward = reward

    def done(self, state):
        response = state[len(self.start):]
        return len(response) == self.horizon or self.end in response

    def step(self, state, action):
        """Take an action. Returns (next state, reward, done). Raises ValueError if the episode was done."""
        if self.done(state):
            raise ValueError(f"the episode is done in {state}: no action can be taken")
        next_state = (*state, action)
        if not self.done(next_state):
            return next_state, 0.0, False
        return next_state, self.reward(self.start, next_state[len(self.start):]), True


class Tree:
    """
    All states of the MDP with V tokens (0 is E), horizon R and an empty prompt.

    In an inner state a token is chosen. A leaf is a finished response. `states` lists all inner states, then
    all leaves: state S + y is response y. The tree for V = 2 and R = 2, with the index of each state:

        0 ()  --token 0-->  2 (0,)                              S = 2 inner states: 0 and 1
              --token 1-->  1 (1,)  --token 0-->  3 (1, 0)      Y = 3 leaves: 2, 3 and 4
                                    --token 1-->  4 (1, 1)      next_state = [[2, 1], [3, 4]]

    next_state   (S, V) index of the state that each action leads to
    responses    (Y, R) ids; V, which is no token, after the end
    mask         (Y, R) True on real tokens, E included
    state_index  (Y, R) index of the state in which each token was chosen, 0 outside the mask
    """

    def __init__(self, vocab, horizon):
        mdp = TokenMDP((), horizon)
        inner = []
        for t in range(horizon):
            inner += itertools.product(range(1, vocab), repeat=t)  # all strings of t tokens that are not E
        children = [(*state, action) for state in inner for action in range(vocab)]  # S * V
        self.leaves = [child for child in children if mdp.done(child)]
        self.states = inner + self.leaves
        self.S, self.Y = len(inner), len(self.leaves)
        index = {state: i for i, state in enumerate(self.states)}
        self.next_state = torch.tensor([index[child] for child in children]).view(self.S, vocab)
        self.responses = torch.full((self.Y, horizon), vocab)
        self.state_index = torch.zeros(self.Y, horizon, dtype=torch.long)
        for y, response in enumerate(self.leaves):
            for t, token in enumerate(response):
                self.responses[y, t] = token
                self.state_index[y, t] = index[response[:t]]
        self.mask = self.responses < vocab


# ---- exact quantities of a policy -----------------------------------------------------------------

def token_logp(tree, logits):
    """Compute log pi(a_t|s_t) of every token of every response, (Y, R), zeros outside the mask."""
    logp = torch.log_softmax(logits, dim=-1)                                   # (S, V)
    tokens = torch.where(tree.mask, tree.responses, 0)  # outside the mask: any valid token
    return torch.where(tree.mask, logp[tree.state_index, tokens], 0.0)


def response_logp(tree, logits):
    """Compute log pi(y) of every response, (Y,): the sum over its tokens, as no transition is random."""
    return token_logp(tree, logits).sum(dim=1)


def kl(tree, logits, ref_logits):
    """Compute KL(policy || reference) = sum_y pi(y) log pi(y)/ref(y), scalar, in nats per response."""
    logp = response_logp(tree, logits)                                         # (Y,)
    return (logp.exp() * (logp - response_logp(tree, ref_logits))).sum()


def objective(tree, logits, ref_logits, rewards, beta):
    """Compute J(pi) = sum_y pi(y) rewards(y) - beta KL(pi || ref), a scalar. The rewards (Y,) may be integers."""
    score = response_logp(tree, logits).exp() @ rewards.to(logits.dtype)
    return score - beta * kl(tree, logits, ref_logits)


def policy_gradient(tree, logits, ref_logits, rewards, beta):
    """Compute dJ / d logits, (S, V). PPO estimates its direction from samples."""
    logits = logits.detach().clone().requires_grad_()
    return torch.autograd.grad(objective(tree, logits, ref_logits, rewards, beta), logits)[0]


# ---- the solution ---------------------------------------------------------------------------------

class Solution(NamedTuple):
    V: torch.Tensor     # (S,) soft value of each inner state
    Q: torch.Tensor     # (S, V) soft value of each action
    logp: torch.Tensor  # (S, V) log pi*(a|s), the optimal policy
    J: torch.Tensor     # scalar J*, the largest J of all policies


def solve(tree, ref_logits, rewards, beta):
    """
    Find the policy that maximises J, by soft value iteration from the leaves to the root. rewards: (Y,).

        Q(s,a)   = r(s,a) + V(s')          r is 0 unless s' is a leaf; the V of a leaf is 0
        V(s)     = beta log sum_a ref(a|s) exp(Q(s,a) / beta)
        pi*(a|s) = ref(a|s) exp((Q(s,a) - V(s)) / beta)

    For whole responses,  pi*(y) = ref(y) exp(r(y) / beta) / Z  (Rafailov et al. 2023, equation 4), so
    J* = beta log Z. Every policy has  J(pi) = J* - beta KL(pi || pi*).  Raises ValueError for beta <= 0.
    """
    if beta <= 0:
        raise ValueError(f"beta must be above 0, got {beta}")
    ref_logp = torch.log_softmax(ref_logits, dim=-1)                           # (S, V)
    Q = torch.zeros_like(ref_logp)                                             # (S, V)
    # worth[s'] is r + V on arrival in s': for an inner state its V, for a leaf its score
    worth = torch.cat([ref_logp.new_zeros(tree.S), rewards])                   # (S + Y,)
    for s in reversed(range(tree.S)):  # the next states have larger indices, so their worth is known
        Q[s] = worth[tree.next_state[s]]
        worth[s] = beta * torch.logsumexp(ref_logp[s] + Q[s] / beta, dim=0)
    V = worth[:tree.S]                                                         # (S,)
    return Solution(V, Q, ref_logp + (Q - V[:, None]) / beta, V[0])


# ---- learning the solution, with the functions that train the GPT ---------------------------------

def rollout(tree, logits, B, generator=None):
    """Sample B responses token by token. Returns their indices y, (B,)."""
    probs = torch.softmax(logits.detach(), dim=-1)                             # (S, V)
    state = torch.zeros(B, dtype=torch.long)
    running = torch.ones(B, dtype=torch.bool)
    while running.any():
        action = torch.multinomial(probs[state[running]], 1, generator=generator)[:, 0]
        state[running] = tree.next_state[state[running], action]
        running = state < tree.S
    return state - tree.S


class Training(NamedTuple):
    steps: int       # iterations of PPO, or steps of DPO
    size: int        # sampled responses of an iteration, or labels of a step
    lr: float        # the learning rate at the start; it falls linearly to 0
    epochs: int = 2  # updates of PPO on the responses of an iteration


FOR_PPO = Training(steps=100, size=1024, lr=0.1)
FOR_DPO = Training(steps=200, size=4096, lr=0.2)


def learn_ppo(tree, ref_logits, rewards, beta, generator, training=FOR_PPO, shaping=None):
    """
    Train logits (S, V) with PPO. Yields (iteration, logits, sampled J) before each update and at the end.

    shaping (Y, R), zeros outside the mask, is added to the token rewards. If each of its rows sums to 0, the
    optimum stays the same.
    """
    iterations, B, lr, epochs = training
    logits = ref_logits.clone().requires_grad_()
    critic = ref_logits.new_zeros(tree.S).requires_grad_()                     # (S,) a table of values
    optimizer = torch.optim.Adam([logits, critic], lr=lr)
    for iteration in range(iterations + 1):
        # 1. rollout
        y = rollout(tree, logits, B, generator)                                # (B,)
        mask, states = tree.mask[y], tree.state_index[y]                       # (B, R) each
        old_logp = token_logp(tree, logits).detach()[y]                        # (B, R)
        ref_logp = token_logp(tree, ref_logits)[y]                             # (B, R)
        old_values = critic.detach()[states]                                   # (B, R)
        # 2. rewards, advantages, returns
        step_rewards = token_rewards(rewards[y], old_logp, ref_logp, mask, beta)  # (B, R)
        if shaping is not None:
            step_rewards = step_rewards + shaping[y]
        # lambda 1: whole returns, which a table of values after few samples cannot bias
        advantages, returns = gae(step_rewards, old_values, mask, gamma=1.0, lam=1.0)
        advantages = whiten(advantages, mask)
        yield iteration, logits.detach().clone(), step_rewards.sum(dim=1).mean()
        if iteration == iterations:
            return  # there is one rollout more than updates: it measures the final policy
        # 3. update
        optimizer.param_groups[0]["lr"] = lr * (1 - iteration / iterations)
        for _ in range(epochs):
            pg_loss = policy_loss(token_logp(tree, logits)[y], old_logp, advantages, mask)
            vf_loss = value_loss(critic[states], old_values, returns, mask)
            optimizer.zero_grad()
            (pg_loss + vf_loss).backward()
            optimizer.step()


def win_probabilities(rewards):
    """Compute the probability sigmoid(r_a - r_b) that response a wins against b (Bradley-Terry), (Y, Y)."""
    return torch.sigmoid(rewards[:, None] - rewards)


def draw_labels(wins, n, generator=None):
    """Label every pair n times; a wins with probability wins[a, b]. Returns chosen and rejected y, (M,)."""
    a, b = torch.triu_indices(len(wins), len(wins), 1).repeat(1, n)            # (M,) each; a < b
    a_wins = torch.rand(len(a), dtype=wins.dtype, generator=generator) < wins[a, b]
    return torch.where(a_wins, a, b), torch.where(a_wins, b, a)


def learn_dpo(tree, ref_logits, chosen, rejected, beta, generator, kind="dpo", training=FOR_DPO):
    """
    Train logits (S, V) with a loss of dpo.py on labels chosen, rejected (M,), at most `size` of them a step.

    Yields (step, logits) before each step and at the end.
    """
    steps, size, lr, _ = training
    logits = ref_logits.clone().requires_grad_()
    ref_logp = response_logp(tree, ref_logits)                                 # (Y,)
    optimizer = torch.optim.Adam([logits], lr=lr)
    for step in range(steps + 1):
        yield step, logits.detach().clone()
        if step == steps:
            return
        rows = torch.arange(len(chosen))
        if size < len(chosen):
            rows = torch.randint(len(chosen), (size,), generator=generator)
        a, b = chosen[rows], rejected[rows]                                    # (size,) each
        logp = response_logp(tree, logits)                                     # (Y,)
        loss = dpo_loss(logp[a], logp[b], ref_logp[a], ref_logp[b], beta, kind)
        # at a constant rate the logits would hover around the optimum, driven by the noise of the labels
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def solve_ipo(tree, ref_logits, wins, beta):
    """
    Find the policy that IPO converges to if all pairs are equally frequent (Azar et al. 2023). wins: (Y, Y).
    Returns the Solution of `solve` for another reward: a mean over all Y responses, the response itself included.

    Let p_ab = wins[a, b], f = log pi/ref, h = f_a - f_b and c = 1 / (2 beta). The mean loss of a pair is
    p (h - c)^2 + (1 - p) (h + c)^2 = (h - c (2p - 1))^2 + constant. Its least-squares solution is
    f_a = c mean_b (2 p_ab - 1) = mean_b p_ab / beta, up to a constant. So IPO converges to
    ref exp(win rate / beta) / Z: the optimum of J if the reward is the win rate against a uniform response.
    Win rates lie between 0 and 1, so no h exceeds 1 / beta, even if the labels are certain.
    """
    return solve(tree, ref_logits, wins.mean(dim=1), beta)  # p_aa = 1/2 is in every mean: a constant
