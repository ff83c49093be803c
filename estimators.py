"""
A lesson: what REINFORCE, RLOO, GRPO and their relatives really estimate, and where they end. Exactly, on the tree.

    python estimators.py             all groups of 2 of the 40 responses, in about ten seconds
    python estimators.py --trees 12  a dozen trees: least, mean and most of each number, in a few minutes

An estimate of the gradient of J is made from a group of G sampled responses. On the tree all Y^G groups can be listed
with their probabilities, so its mean and its variance are sums, and not samples. An estimator is unbiased if its mean
is the gradient of J. A biased one may still end at pi*: it rests where its mean is 0.

The second part asks the same of losses on pairs, also of SimPO, ORPO and KTO, whose goal is not pi*.

Letters: as in mdp.py, and G group, n = Y^G groups, D = S V parameters.
"""

import argparse
import signal
from typing import NamedTuple

import torch
import torch.nn.functional as F

import mdp
from grpo import group_advantages
from lesson import problem
from mdp import kl, objective, policy_gradient, response_logp, token_logp
from ppo import gae, token_rewards


class Estimator(NamedTuple):
    name: str
    kind: str              # reinforce, ppo, or a kind of group_advantages
    kl: str = "reward"     # where the KL is paid: reward, or loss (k3)
    mean: str = "constant"  # of token losses: constant, response, or token: all tokens of the group


ESTIMATORS = (
    Estimator("REINFORCE", "reinforce"),
    Estimator("PPO, exact critic", "ppo"),
    Estimator("RLOO", "rloo"),
    Estimator("Dr. GRPO", "dr_grpo"),
    Estimator("GRPO", "grpo"),
    Estimator("GRPO, 1/length", "grpo", mean="response"),
    Estimator("REINFORCE++", "reinforce++", mean="token"),
    Estimator("RLOO, k3 loss", "rloo", kl="loss"),
    Estimator("Dr. GRPO, k3 loss", "dr_grpo", kl="loss"),
    Estimator("GRPO as published", "grpo", kl="loss", mean="response"),
)

# ---- exact quantities of an estimator -------------------------------------------------------------

def token_scores(tree, logits):
    """Compute d log pi(a_t|s_t) / d logits for every token of every response, (Y, R, D), zeros outside the mask."""
    probs = torch.softmax(logits, dim=-1)                                      # (S, V)
    scores = logits.new_zeros(*tree.mask.shape, *logits.shape)                 # (Y, R, S, V)
    y, t = tree.mask.nonzero().T
    s, a = tree.state_index[y, t], tree.responses[y, t]
    scores[y, t, s] = -probs[s]
    scores[y, t, s, a] += 1
    return scores.flatten(2)


def state_values(tree, logits, ref_logits, rewards, beta):
    """Compute V(s), (S,): the expected sum of rewards from s on, KL penalties included. V of the root is J."""
    logp, ref_logp = torch.log_softmax(logits, dim=-1), torch.log_softmax(ref_logits, dim=-1)      # (S, V) each
    worth = torch.cat([rewards.new_zeros(tree.S), rewards])                    # (S + Y,) on arrival, as in mdp.solve
    for s in reversed(range(tree.S)):
        worth[s] = (logp[s].exp() * (worth[tree.next_state[s]] - beta * (logp[s] - ref_logp[s]))).sum()
    return worth[:tree.S]


def estimates(tree, logits, ref_logits, rewards, beta, estimator, G):
    """
    List all groups of G responses. Returns their probabilities (n,) and their estimates of dJ / d logits, (n, D):

        mean over the group of   A_i sum_t grad log pi(a_t|s_t)      and, with the k3 loss,  - beta sum_t grad k3

    With mean="response" each sum is divided by the length, with mean="token" by the mean length of the group. In PPO's
    estimate each token has its own A, from GAE with lambda 0.95 and the exact V.
    """
    _, kind, kl_place, mean = estimator
    logp, ref_logp = token_logp(tree, logits), token_logp(tree, ref_logits)    # (Y, R) each
    grads = token_scores(tree, logits)                                         # (Y, R, D)
    step_rewards = token_rewards(rewards, logp, ref_logp, tree.mask, beta if kl_place == "reward" else 0.0)
    total = step_rewards.sum(dim=1)                                            # (Y,)
    lengths = tree.mask.sum(dim=1, keepdim=True) if mean == "response" else 1  # (Y, 1) or 1
    weights = tree.mask.to(total) / lengths                                    # (Y, R)
    slope = torch.where(tree.mask, 1 - torch.exp(ref_logp - logp), 0.0)        # d k3 / d log pi
    token_penalty = beta * slope * weights                                     # (Y, R)
    if kind == "ppo":
        V = state_values(tree, logits, ref_logits, rewards, beta)              # (S,)
        weights, _ = gae(step_rewards, V[tree.state_index], tree.mask, gamma=1.0, lam=0.95)          # (Y, R)
    own = (weights[:, :, None] * grads).sum(dim=1)                             # (Y, D)
    penalty = (token_penalty[:, :, None] * grads).sum(dim=1)                   # (Y, D)

    groups = torch.cartesian_prod(*[torch.arange(tree.Y)] * G).view(-1, G)     # (n, G)
    probs = logp.sum(dim=1).exp()[groups].prod(dim=1)                          # (n,)
    if kind == "ppo":
        A = torch.ones_like(total)[groups]                                     # (n, G)
    elif kind == "reinforce":
        A = total[groups]                                                      # (n, G)
    else:  # each group is a whole rollout
        A = torch.vmap(lambda rollout: group_advantages(rollout, G, kind))(total[groups])           # (n, G)
    zeros = torch.zeros(len(groups), tree.Y, dtype=A.dtype)                    # (n, Y)
    g = zeros.scatter_add(1, groups, A) @ own  # the sum of A_i own[y_i] over the group
    if kl_place == "loss":
        g = g - zeros.scatter_add(1, groups, torch.ones_like(A)) @ penalty
    if mean == "token":
        return probs, g / tree.mask.sum(dim=1)[groups].sum(dim=1, keepdim=True)
    return probs, g / G


class Quality(NamedTuple):
    cosine: float    # between the mean of the estimates and the gradient of J
    length: float    # of the mean, in lengths of the gradient
    bias: float      # distance of the mean from the gradient, in lengths of the gradient
    variance: float  # of an estimate, times G, to compare equal numbers of responses: E |g - E g|^2 G
    noise: float     # sqrt(variance) / length of the mean; noise^2 responses make signal and noise equal


def quality(tree, logits, ref_logits, rewards, beta, estimator, G):
    """Compare all estimates with the exact gradient: Quality. If that is 0, as at pi*, all but variance is NaN."""
    exact = policy_gradient(tree, logits, ref_logits, rewards, beta).flatten()                      # (D,)
    probs, g = estimates(tree, logits, ref_logits, rewards, beta, estimator, G)
    mean = probs @ g                                                           # (D,)
    variance = G * (probs @ (g - mean).square().sum(dim=1))
    if exact.norm() < 1e-12:
        return Quality(*[float("nan")] * 3, variance.item(), float("nan"))
    return Quality(F.cosine_similarity(mean, exact, dim=0).item(), (mean.norm() / exact.norm()).item(),
                   ((mean - exact).norm() / exact.norm()).item(), variance.item(),
                   (variance.sqrt() / mean.norm()).item())


# ---- where an update comes to rest ----------------------------------------------------------------

def rest(start, gradient, *args, steps=250):
    """Follow gradient(logits, *args) downhill with Adam, whose rate falls to 0. -> logits, last gradient norm."""
    logits = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], betas=(0.9, 0.99))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.3 * (1 - step / steps) ** 2
        logits.grad = gradient(logits.detach(), *args)
        optimizer.step()
    return logits.detach(), gradient(logits.detach(), *args).norm().item()


def pair_losses(tree, logits, ref_logits, beta):
    """
    The losses of every pair (chosen a, rejected b), (Y, Y) each. f = log pi/ref of a response, l = log pi(y) / |y|.

        SimPO  -log sigmoid(2 (l_a - l_b) - 1)                          Meng et al. 2024, 2405.14734, eq. 6
        ORPO   -l_a - 0.1 log sigmoid(log odds_a - log odds_b)          Hong et al. 2024, 2403.07691, eqs. 6, 7
        KTO    2 - sigmoid(beta (f_a - z)) - sigmoid(beta (z - f_b))    Ethayarajh et al. 2024, 2402.01306, section 4.1

    odds = e^l / (1 - e^l). z = KL(pi || ref), without a gradient. Both weights of KTO are 1.
    Returns {"SimPO": ..., "ORPO": ..., "KTO": ...}.
    """
    logp = response_logp(tree, logits)                                         # (Y,)
    f = logp - response_logp(tree, ref_logits)                                 # (Y,)
    z = kl(tree, logits, ref_logits).detach()
    per_token = logp / tree.mask.sum(dim=1)                                    # (Y,)
    log_odds = per_token - torch.log(-torch.expm1(per_token))                  # (Y,)
    return {"SimPO": -F.logsigmoid(2 * (per_token[:, None] - per_token) - 1),
            "ORPO": -per_token[:, None] - 0.1 * F.logsigmoid(log_odds[:, None] - log_odds),
            "KTO": 2 - torch.sigmoid(beta * (f - z))[:, None] - torch.sigmoid(beta * (z - f))}


def rests(tree, ref, rewards, beta, best):
    """
    Where each method comes to rest, from the reference on: {name: (policy (S, V), norm of its last gradient)}.

    An estimator is followed by its mean over all groups of 2, a loss by its mean over all pairs, in which a is chosen
    over b with probability sigmoid(r_a - r_b).
    """
    wins = mdp.win_probabilities(rewards)                                      # (Y, Y)

    def of_estimator(logits, estimator):
        probs, g = estimates(tree, logits, ref, rewards, beta, estimator, G=2)
        return -(probs @ g).view_as(logits)

    def of_loss(logits, name):
        logits = logits.requires_grad_()
        loss = (wins * pair_losses(tree, logits, ref, beta)[name]).mean()
        return torch.autograd.grad(loss, logits)[0]

    ends = {estimator.name: rest(ref, of_estimator, estimator) for estimator in ESTIMATORS[2:]}
    ends["DPO"] = best.logp, 0.0
    ends["IPO"] = mdp.solve_ipo(tree, ref, wins, beta).logp, 0.0
    for name in ("SimPO", "ORPO", "KTO"):
        ends[name] = rest(ref, of_loss, name, steps=500)
    return ends


# ---- the lesson -----------------------------------------------------------------------------------

def on_the_way(ref_logits, best, share):
    """The policy at this share of the way from the reference to pi*, in log-probs of tokens, (S, V)."""
    return (1 - share) * torch.log_softmax(ref_logits, dim=-1) + share * best.logp


def print_table(columns, rows):
    """rows: {name: a list of numbers for each tree}. A number of several trees is shown as its least, mean and most."""
    several = len(next(iter(rows.values()))) > 1
    width = 21 if several else 13
    print(" " * 21 + "".join(f"{column:>{width}}" for column in columns))
    for name, trees in rows.items():
        cells = ""
        for x in torch.tensor(trees, dtype=torch.float64).T:                   # (trees,) of one column
            cells += f"{x.min():7.2f}{x.mean():7.2f}{x.max():7.2f}" if several else f"{x.item():13.4f}"
        print(f"   {name:<18}{cells}")


def lesson(seeds=(0,), beta=0.5):
    """Print the lesson for the trees of these seeds. Returns `rests` of the last one."""
    trees = []
    for seed in seeds:
        tree, ref, rewards, _ = problem(seed)
        trees.append((tree, ref, rewards, mdp.solve(tree, ref, rewards, beta)))
    print("""1. The mean of each estimator of the gradient of J, and its noise (G = 2)

   cosine, length and bias compare the mean of all estimates with the exact gradient; bias is a distance in
   lengths of the gradient. variance: of an estimate from one group, times G. noise is the root of the variance
   over the length of the mean. REINFORCE, RLOO and PPO with an exact critic are unbiased. Dr. GRPO is
   (G - 1) / G of RLOO. GRPO is biased, because it divides by the deviation of its own group's rewards.
   At pi* all rewards, KL included, are equal, so all advantages but REINFORCE's are 0. With a k3 loss the KL
   is not in the rewards, and the loss has another gradient than the KL.""")
    for share in (0.0, 0.5, 0.9, 1.0):
        rows = {}
        for estimator in ESTIMATORS:
            rows[estimator.name] = [quality(tree, on_the_way(ref, best, share), ref, rewards, beta, estimator, G=2)
                                    for tree, ref, rewards, best in trees]
        print(f"\n   {share:.0%} of the way to pi*\n")
        print_table(Quality._fields, rows)

    print("""
2. Where the mean update comes to rest, from the reference on (G = 2)

   share is the part of J* - J(ref) that the policy has. update is the norm of the mean gradient at the end.
   DPO and IPO are closed forms: pi* of the score, and pi* of the win rate. The pairs are labelled at random,
   with probability sigmoid(difference in score).
""")
    rows = {}
    for tree, ref, rewards, best in trees:
        J_ref = objective(tree, ref, ref, rewards, beta)
        ends = rests(tree, ref, rewards, beta, best)
        for name, (logits, update) in ends.items():
            share = (objective(tree, logits, ref, rewards, beta) - J_ref) / (best.J - J_ref)
            score = response_logp(tree, logits).exp() @ rewards
            rows.setdefault(name, []).append([share, kl(tree, logits, best.logp), kl(tree, logits, ref), score, update])
    print_table(("share", "KL(pi||pi*)", "KL(pi||ref)", "score", "update"), rows)
    return ends


def main(argv=None):
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trees", type=int, default=0)
    command = parser.parse_args(argv)
    torch.set_num_threads(1)  # tensors this small are slower on several threads
    lesson(range(command.trees) if command.trees > 0 else [command.seed])


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # with `| head` the program ends quietly
    main()
