"""Set 1, words as actions: inputs of the cases. Letters: as in mdp.py."""

from functools import partial
from unittest.mock import patch

import torch
from draw import raised

import estimators
import mdp


def on_trees(names, draw, sizes=((3, 3), (4, 2))):
    """Cases on some trees, with these arguments: logits of a policy and of a reference (S, V), rewards (Y,), beta."""
    cases = []
    for vocab, horizon in sizes:
        tree = mdp.Tree(vocab, horizon)
        every = dict(tree=[vocab, horizon], logits=draw.normal(tree.S, vocab), ref_logits=draw.normal(tree.S, vocab),
                     rewards=draw.normal(tree.Y), beta=draw.beta())
        cases.append({name: every[name] for name in ("tree", *names.split())})
    return cases


def draw_step(draw):
    words, prompt = ["end", "good", "bad", "very"], ["the", "film"]
    weights = {word: draw.between(-2, 2) for word in words}
    first, second = words[1:3]
    return [dict(prompt=prompt, end=words[0], horizon=3, weights=weights, actions=[first, second, first]),
            dict(prompt=prompt, end=words[0], horizon=3, weights=weights, actions=[second, words[0]]),
            dict(prompt=[first], end=first, horizon=2, weights=weights, actions=[second, first])]


def run_step(case):
    weights = case["weights"]

    def reward(prompt, response):
        return 10.0 * len(prompt) + sum(weights[word] * (at + 1) for at, word in enumerate(response))

    process = mdp.TokenMDP(case["prompt"], case["horizon"], case["end"], reward)
    state, steps = process.start, []
    for action in case["actions"]:
        state, paid, done = process.step(state, action)
        steps.append(dict(state=" ".join(state), is_tuple=isinstance(state, tuple), reward=float(paid), done=done))
    return dict(step=steps, after_the_end=raised(process.step, state, case["actions"][0]))


draw_token_logp = partial(on_trees, "logits")
draw_token_scores = partial(on_trees, "logits", sizes=((2, 2), (3, 2)))
draw_kl = partial(on_trees, "logits ref_logits")
draw_policy_gradient = draw_state_values = partial(on_trees, "logits ref_logits rewards beta")


def draw_objective(draw):
    cases = draw_policy_gradient(draw)
    whole = cases[1]["rewards"].mul(3).round().long()  # rewards may be integers
    return [*cases, dict(cases[1], rewards=whole)]


def draw_solve(draw):
    cases = on_trees("ref_logits rewards beta", draw, sizes=((2, 2), (3, 3), (4, 2)))
    errors = [dict(cases[0], beta=beta, raises="", part="errors") for beta in (0.0, -1.0)]
    return [*cases, *errors]


def draw_quality(draw):
    """Three problems, and an optimum, where the gradient is 0."""
    cases = []
    for number, G in ((0, 1), (2, 2), (7, 3), (2, 2)):
        case, = draw_policy_gradient(draw, sizes=((3, 2),))
        cases.append(dict(case, estimator=number, G=G, probs=torch.softmax(draw.normal(7), dim=0), g=draw.normal(7, 9)))
    last = cases[-1]  # the reference is the best policy if all rewards are equal
    last.update(ref_logits=last["logits"], rewards=torch.ones(7, dtype=torch.float64), part="at the optimum")
    return cases


def run_quality(case):
    """`quality`, told the estimates: numbers that depend on everything that it hands over."""
    def told(tree, logits, ref_logits, rewards, beta, estimator, G):
        shift = (logits - ref_logits).flatten() + rewards.mean() + len(estimator.name)
        return case["probs"], case["g"] * (beta + G) + shift

    args = [case[name] for name in ("logits", "ref_logits", "rewards", "beta")]
    with patch.object(estimators, "estimates", told):
        found = estimators.quality(mdp.Tree(*case["tree"]), *args, estimators.ESTIMATORS[case["estimator"]], case["G"])
    return dict(zip(("cosine", "length", "bias", "variance", "noise"), map(float, found)))
