"""
Set 4, PPO: inputs of the cases, and how each function is called. Expected values come from the true code.

Outside the mask the inputs hold NaN where the docstring says that nothing there matters. Letters: as in ppo.py.
"""

import itertools
import math

import torch
from draw import batch_of, network, raised, with_gradient

import mdp
import ppo
import reward


def outside(x, mask, value=math.nan):
    return torch.where(mask, x, value)


def draw_masked_mean(draw):
    mask = draw.mask(4, 5)
    return [dict(x=draw.normal(4, 5) + 3, mask=mask), dict(x=outside(draw.normal(4, 5) + 3, mask), mask=mask),
            dict(x=draw.normal(2, 3), mask=torch.zeros(2, 3, dtype=torch.bool)),
            dict(x=draw.normal(3) + 3, mask=torch.ones(3, dtype=torch.bool))]


def run_masked_mean(case):
    return dict(mean=ppo.masked_mean(case["x"], case["mask"]))


def draw_kl_estimates(draw):
    logp = draw.normal(3, 4)
    return [dict(logp=logp, ref_logp=logp + 0.5 * draw.normal(3, 4), scale=1.0),
            dict(logp=logp, ref_logp=logp + 1e-6 * (1 + draw.normal(3, 4).abs()), scale=1e12)]  # k3 keeps its digits


def run_kl_estimates(case):
    found = ppo.kl_estimates(case["logp"], case["ref_logp"])
    return dict(k1=found["k1"], k2=case["scale"] * found["k2"], k3=case["scale"] * found["k3"])


def draw_token_rewards(draw):
    mask = draw.mask(4, 5)
    logp, ref = torch.where(mask, draw.normal(4, 5), 0.0), torch.where(mask, draw.normal(4, 5), 0.0)
    return [dict(scores=draw.normal(4), logp=logp, ref=ref, mask=mask, beta=draw.beta()),
            dict(scores=draw.normal(2), logp=draw.normal(2, 3), ref=draw.normal(2, 3), beta=draw.beta(),
                 mask=torch.tensor([[True, True, True], [False, False, False]]))]


def run_token_rewards(case):
    return dict(rewards=ppo.token_rewards(case["scores"], case["logp"], case["ref"], case["mask"], case["beta"]))


def draw_gae(draw):
    mask = draw.mask(4, 5)
    rewards, values = draw.normal(4, 5), draw.normal(4, 5)
    return [dict(rewards=rewards, values=values, mask=mask, gamma=1.0, lam=0.95),
            dict(rewards=rewards, values=values, mask=mask, gamma=draw.between(0.8, 0.95), lam=draw.between(0.3, 0.8)),
            dict(rewards=outside(rewards, mask), values=outside(values, mask), mask=mask, gamma=1.0, lam=1.0),
            dict(rewards=rewards, values=values, mask=mask, gamma=0.9, lam=0.0)]


def run_gae(case):
    advantages, returns = ppo.gae(case["rewards"], case["values"], case["mask"], case["gamma"], case["lam"])
    return dict(advantages=advantages, returns=returns)


def draw_whiten(draw):
    mask = draw.mask(4, 5)
    x = 3 * draw.normal(4, 5) + 2
    constant = torch.full((4, 5), draw.between(1, 2), dtype=torch.float64)
    return [dict(x=x, mask=mask, shift_mean=True), dict(x=x, mask=mask, shift_mean=False),
            dict(x=outside(x, mask), mask=mask, shift_mean=True), dict(x=constant, mask=mask, shift_mean=True)]


def run_whiten(case):
    return dict(whitened=ppo.whiten(case["x"], case["mask"], case["shift_mean"]))


def draw_policy_loss(draw):
    grid = list(itertools.product((1.0, -1.0), (0.5, 0.9, 1.1, 1.5)))  # advantage, ratio: both sides of both clips
    advantages = torch.tensor([[draw.between(0.5, 2) * a for a, _ in grid]], dtype=torch.float64)
    old = draw.normal(1, 8)
    logp = old + torch.tensor([[math.log(ratio) for _, ratio in grid]], dtype=torch.float64)
    mask, x = draw.mask(3, 5), draw.normal(3, 5)
    every = torch.ones(1, 8, dtype=torch.bool)
    return [dict(logp=logp, old=old, advantages=advantages, mask=every, clip=0.2, high=None),
            dict(logp=logp, old=old, advantages=advantages, mask=every, clip=0.2, high=0.7),
            dict(logp=outside(x, mask, 5.0), old=outside(x + 0.3 * draw.normal(3, 5), mask, -900.0),
                 advantages=draw.normal(3, 5), mask=mask, clip=0.1, high=None)]


def run_policy_loss(case):
    def loss(logp, **options):
        return ppo.policy_loss(logp, case["old"], case["advantages"], case["mask"], case["clip"], case["high"],
                               **options)
    other_mean = loss(case["logp"], mean=lambda losses, mask: torch.where(mask, losses, 0.0).sum(dim=1))
    negative = raised(ppo.policy_loss, case["logp"], case["old"], case["advantages"], case["mask"], -0.1)
    return dict(with_gradient(loss, case["logp"]), other_mean=other_mean, negative_clip=negative)


def draw_value_loss(draw):
    mask = draw.mask(3, 5)
    values, old, returns = draw.normal(3, 5), draw.normal(3, 5), draw.normal(3, 5)
    near = old + 0.1 * draw.normal(3, 5)
    return [dict(values=near, old=old, returns=returns, mask=mask, clip=0.2),
            dict(values=values, old=old, returns=returns, mask=mask, clip=draw.between(0.3, 0.6)),
            dict(values=outside(values, mask), old=outside(old, mask), returns=outside(returns, mask), mask=mask,
                 clip=0.2)]


def run_value_loss(case):
    return with_gradient(lambda x: ppo.value_loss(x, case["old"], case["returns"], case["mask"], case["clip"]),
                         case["values"])


def draw_values(draw):
    return [dict(seed=draw.integer(0, 10 ** 6), texts=draw.texts(), weight=draw.normal(1, 8), mean=draw.between(1, 2),
                 std=draw.between(2, 3))]


def run_values(case):
    critic = reward.RewardModel(network(case["seed"])).double()
    with torch.no_grad():
        critic.score.weight.copy_(case["weight"])
    critic.mean.fill_(case["mean"])
    critic.std.fill_(case["std"])
    return dict(values=critic.values(batch_of(case["texts"])))


def draw_learn_ppo(draw):
    cases = []
    for _ in range(3):
        tree = mdp.Tree(4, 3)
        cases.append(dict(vocab=4, horizon=3, ref=draw.normal(tree.S, 4), rewards=draw.normal(tree.Y),
                          beta=draw.between(0.4, 0.8), seed=draw.integer(0, 10 ** 6), iterations=60, B=512))
    return cases


def run_learn_ppo(case):
    """The first two iterations, which are compared; and where the last one ends, whose share of the optimum counts."""
    generator = torch.Generator().manual_seed(case["seed"])
    tree = mdp.Tree(case["vocab"], case["horizon"])
    steps = list(mdp.learn_ppo(tree, case["ref"], case["rewards"], case["beta"], generator, case["iterations"],
                               case["B"]))
    shaping = torch.where(tree.mask, torch.linspace(-1, 1, tree.Y, dtype=torch.float64)[:, None], 0.0)
    shaped = next(iter(mdp.learn_ppo(tree, case["ref"], case["rewards"], case["beta"], generator, 1, 16,
                                     shaping=shaping)))
    return dict(iterations=[step[0] for step in steps], first=[list(step[1:]) for step in steps[:3]],
                shaped_J=shaped[2], logits=steps[-1][1])
