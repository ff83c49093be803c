"""
Set 1, words as actions: inputs of the cases, and how each function is called. Expected values come from the true code.

Letters: as in mdp.py.
"""

import torch
from draw import raised

import estimators
import mdp


def tree_of(case):
    return mdp.Tree(case["vocab"], case["horizon"])


def a_tree(draw, sizes=((3, 3), (4, 2))):
    """Inputs on two trees: logits of a policy and of a reference (S, V), rewards (Y,), beta."""
    cases = []
    for vocab, horizon in sizes:
        tree = mdp.Tree(vocab, horizon)
        cases.append(dict(vocab=vocab, horizon=horizon, logits=draw.normal(tree.S, vocab), beta=draw.beta(),
                          ref=draw.normal(tree.S, vocab), rewards=draw.normal(tree.Y)))
    return cases


def draw_step(draw):
    words = draw.words(4)
    weights = {word: draw.between(-2, 2) for word in words}
    prompt = draw.words(2)
    first, second = words[1:3]
    return [dict(prompt=prompt, end=words[0], horizon=3, weights=weights, actions=[first, second, first]),
            dict(prompt=prompt, end=words[0], horizon=3, weights=weights, actions=[second, words[0]]),
            dict(prompt=[words[0]], end=words[0], horizon=2, weights=weights, actions=[words[0]])]


def run_step(case):
    weights = case["weights"]

    def reward(prompt, response):
        return 10.0 * len(prompt) + sum(weights[word] * (at + 1) for at, word in enumerate(response))

    process = mdp.TokenMDP(case["prompt"], case["horizon"], case["end"], reward)
    state, steps = process.start, []
    for action in case["actions"]:
        state, paid, done = process.step(state, action)
        steps.append(dict(state=" ".join(state), reward=float(paid), done=bool(done)))
    return dict(step=steps, after_the_end=raised(process.step, state, case["actions"][0]))


draw_token_logp = draw_kl = draw_policy_gradient = a_tree


def run_token_logp(case):
    return dict(logp=mdp.token_logp(tree_of(case), case["logits"]))


def run_kl(case):
    return dict(kl=mdp.kl(tree_of(case), case["logits"], case["ref"]))


def draw_objective(draw):
    cases = a_tree(draw)
    whole = cases[1]["rewards"].mul(3).round().long()  # rewards may be integers
    return [*cases, dict(cases[1], rewards=whole)]


def run_objective(case):
    return dict(J=mdp.objective(tree_of(case), case["logits"], case["ref"], case["rewards"], case["beta"]))


def run_policy_gradient(case):
    return dict(gradient=mdp.policy_gradient(tree_of(case), case["logits"], case["ref"], case["rewards"], case["beta"]))


def draw_solve(draw):
    return a_tree(draw, ((2, 2), (3, 3), (4, 2)))


def run_solve(case):
    tree = tree_of(case)
    V, Q, logp, J = mdp.solve(tree, case["ref"], case["rewards"], case["beta"])
    return dict(V=V, Q=Q, logp=logp, J=J, beta_of_0=raised(mdp.solve, tree, case["ref"], case["rewards"], 0.0))


def draw_state_values(draw):
    return a_tree(draw)


def run_state_values(case):
    values = estimators.state_values(tree_of(case), case["logits"], case["ref"], case["rewards"], case["beta"])
    return dict(V=values)


def draw_token_scores(draw):
    return a_tree(draw, ((2, 2), (3, 2)))


def run_token_scores(case):
    return dict(scores=estimators.token_scores(tree_of(case), case["logits"]))


def draw_quality(draw):
    cases = []
    for n, D, G in ((5, 3, 2), (9, 4, 3)):
        probs = torch.softmax(draw.normal(n), dim=0)
        cases.append(dict(probs=probs, g=draw.normal(n, D), exact=draw.normal(D, 1), G=G))
    return [*cases, dict(cases[0], exact=torch.zeros(3, 1, dtype=torch.float64))]


def run_quality(case):
    """`quality`, told what the estimates and the exact gradient are."""
    kept = estimators.estimates, mdp.policy_gradient
    estimators.estimates = lambda *args: (case["probs"], case["g"])
    estimators.policy_gradient = mdp.policy_gradient = lambda *args: case["exact"]
    try:
        found = estimators.quality(None, None, None, None, 0.5, estimators.ESTIMATORS[0], case["G"])
    finally:
        estimators.estimates, mdp.policy_gradient = kept
        estimators.policy_gradient = mdp.policy_gradient
    return dict(zip(("cosine", "length", "bias", "variance", "noise"), map(float, found)))
