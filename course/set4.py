"""Set 4, PPO: inputs of the cases, NaN outside the mask, and how some functions are called. Letters: as in ppo.py."""

import itertools
from unittest.mock import patch

import torch
from draw import batch_of, called
from set3 import reward_model, scorer

import mdp
import ppo


def draw_masked_mean(draw):
    mask = draw.mask(4, 5)
    return [dict(x=draw.normal(4, 5) + 3, mask=mask), dict(x=draw.masked(mask) + 3, mask=mask),
            dict(x=draw.normal(2, 3), mask=torch.zeros(2, 3, dtype=torch.bool)),
            dict(x=draw.normal(3) + 3, mask=torch.ones(3, dtype=torch.bool))]


def draw_kl_estimates(draw):
    logp = draw.normal(3, 4)
    return [dict(logp=logp, ref_logp=logp + 0.5 * draw.normal(3, 4), scale=1.0),
            dict(logp=draw.normal(2) - 15, ref_logp=draw.normal(2), scale=1.0),
            dict(logp=logp, ref_logp=logp + 1e-6 * (1 + draw.normal(3, 4).abs()), scale=1e12, part="close to 0")]


def run_kl_estimates(case):
    found = called(ppo.kl_estimates, dict(logp=case["logp"], ref_logp=case["ref_logp"]))
    if case["scale"] == 1:
        return found
    return dict(k1=found["output"]["k1"], **{k: case["scale"] * found["output"][k] for k in ("k2", "k3")})


def draw_token_rewards(draw):
    mask = draw.mask(4, 5)
    empty = torch.tensor([[True, True, True], [False, False, False]])
    return [dict(scores=draw.normal(4), logp=draw.normal(4, 5), ref_logp=draw.normal(4, 5), mask=mask, beta=0.3),
            dict(scores=draw.normal(4), logp=draw.masked(mask), ref_logp=draw.masked(mask), mask=mask, beta=0.0),
            dict(scores=draw.normal(2), logp=draw.normal(2, 3), ref_logp=draw.normal(2, 3), mask=empty,
                 beta=draw.beta(), part="a row without tokens")]


def draw_gae(draw):
    mask = draw.mask(4, 5)
    rewards, values = draw.normal(4, 5), draw.normal(4, 5)
    return [dict(rewards=rewards, values=values, mask=mask, gamma=1.0, lam=0.95),
            dict(rewards=rewards, values=values, mask=mask, gamma=draw.between(0.8, 0.95), lam=draw.between(0.3, 0.8)),
            dict(rewards=draw.masked(mask), values=draw.masked(mask), mask=mask, gamma=1.0, lam=1.0),
            dict(rewards=rewards, values=values, mask=mask, gamma=0.9, lam=0.0)]


def draw_whiten(draw):
    mask = draw.mask(4, 5)
    equal = [dict(x=draw.normal(1).float().repeat(8), mask=torch.arange(8) < 7, part="equal values")
             for _ in range(12)]  # in float32 rounding is not small if it is divided by itself
    return [dict(x=0.4 * draw.normal(4, 5) + 2, mask=mask), dict(x=3 * draw.masked(mask) + 2, mask=mask),
            dict(x=3 * draw.normal(6) - 1, mask=torch.arange(6) < 4), *equal]


def draw_clipped_surrogate(draw):
    grid = list(itertools.product((1.0, -1.0), (0.5, 0.9, 1.1, 1.5)))  # advantage, ratio: both sides of both clips
    advantages = torch.tensor([[draw.between(0.5, 2) * a for a, _ in grid]], dtype=torch.float64)
    old = draw.normal(1, 8)
    logp = old + torch.tensor([[ratio for _, ratio in grid]], dtype=torch.float64).log()
    mask, x = draw.mask(3, 5), draw.normal(3, 5)
    usual = dict(logp=logp, old_logp=old, advantages=advantages, mask=torch.ones(1, 8, dtype=torch.bool), clip=0.2)
    padded = dict(logp=torch.where(mask, x, 5.0), old_logp=torch.where(mask, x + 0.3 * draw.normal(3, 5), -900.0),
                  advantages=draw.normal(3, 5), mask=mask, clip=0.1)
    return [usual, dict(usual, clip=0.45), dict(padded, part="padding"),
            dict(padded, logp=draw.masked(mask), part="padding"),
            *(dict(usual, clip=clip, raises="", part="errors") for clip in (0.0, -0.1))]


def draw_value_loss(draw):
    mask = draw.mask(3, 5)
    old = draw.normal(3, 5)
    nan = dict(values=draw.masked(mask), old_values=draw.masked(mask), returns=draw.masked(mask), mask=mask, clip=0.2)
    return [dict(values=old + 0.1 * draw.normal(3, 5), old_values=old, returns=draw.normal(3, 5), mask=mask, clip=0.2),
            dict(values=draw.normal(3, 5), old_values=old, returns=5 * draw.normal(3, 5), mask=mask,
                 clip=draw.between(0.3, 0.6)), nan]


def draw_values(draw):
    return [dict(scorer(draw, draw.between(1, 2), draw.between(2, 3)), texts=draw.texts(B=B)) for B in (5, 2)]


def run_values(case):
    return called(lambda m, batch: m.values(batch), dict(model=reward_model(case), batch=batch_of(case["texts"])))


RULES = {  # of the loop: part -> (its training, which of the things that are yielded count)
    "before the first update": (mdp.Training(steps=1, size=64, lr=0.1), slice(0, 1)),
    "one update": (mdp.Training(steps=1, size=64, lr=0.05, epochs=1), slice(1, 2)),
    "epochs on one rollout": (mdp.Training(steps=2, size=64, lr=0.1, epochs=4), slice(1, 3)),
    "the falling rate": (mdp.Training(steps=3, size=64, lr=0.1), slice(2, 4)),
    "shaping": (mdp.Training(steps=1, size=64, lr=0.1), slice(0, 2)),
}


def draw_learn_ppo(draw):
    tree = mdp.Tree(4, 3)  # large rewards: a gradient that is clipped is seen
    return [dict(tree=[4, 3], ref=draw.normal(tree.S, 4), rewards=5 * draw.normal(tree.Y), beta=draw.between(0.4, 0.8),
                 seed=draw.seed(), part=part) for part in RULES]


def run_learn_ppo(case):
    training, counts = RULES[case["part"]]
    tree = mdp.Tree(*case["tree"])
    shaping = tree.mask * torch.linspace(-1, 1, tree.Y).double()[:, None] if case["part"] == "shaping" else None
    generator = torch.Generator().manual_seed(case["seed"])
    weights = []

    def value_loss(*args, **more):
        loss = ppo.value_loss(*args, **more)
        if loss.requires_grad:
            loss.register_hook(weights.append)  # its weight in the sum: Adam hides a factor
        return loss
    with patch.object(mdp, "value_loss", value_loss, create=True):
        steps = list(mdp.learn_ppo(tree, case["ref"], case["rewards"], case["beta"], generator, training, shaping))
    return dict(iterations=[step[0] for step in steps], steps=[list(step[1:]) for step in steps[counts]],
                other_weights_than_1=[w for w in weights if w != 1 and case["part"] == "one update"])
