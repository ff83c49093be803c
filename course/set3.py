"""
Set 3, what people prefer: inputs of the cases, and how each function is called. Expected values come from the true
code.

Letters: as in reward.py and evaluate.py.
"""

import torch
from draw import Trunk, batch_of, network, raised, with_gradient

import evaluate
import reward


def draw_bradley_terry_loss(draw):
    return [dict(chosen=draw.normal(5), rejected=draw.normal(5), margin=0.0),
            dict(chosen=draw.normal(4), rejected=draw.normal(4), margin=draw.between(0.3, 1.0)),
            dict(chosen=draw.normal(2) - 800.0, rejected=draw.normal(2), margin=0.0)]


def run_bradley_terry_loss(case):
    return with_gradient(lambda x: reward.bradley_terry_loss(x, case["rejected"], case["margin"]), case["chosen"])


def draw_last_hidden(draw):
    texts = draw.texts()
    return [dict(texts=texts, states=draw.normal(*batch_of(texts).ids.shape, 3))]


def run_last_hidden(case):
    return dict(hidden=reward.last_hidden(Trunk(case["states"]), batch_of(case["texts"])))


def draw_scale(draw):
    seed = draw.integer(0, 10 ** 6)
    return [dict(seed=seed, x=draw.normal(3, 8), weight=draw.normal(1, 8), mean=0.0, std=1.0),
            dict(seed=seed, x=draw.normal(2, 3, 8), weight=draw.normal(1, 8), mean=draw.between(0.5, 2),
                 std=draw.between(2, 3))]


def run_scale(case):
    model = reward.RewardModel(network(case["seed"])).double()
    with torch.no_grad():
        model.score.weight.copy_(case["weight"])
    model.mean.fill_(case["mean"])
    model.std.fill_(case["std"])
    scores = model.scale(case["x"])
    return dict(scores=scores, dtype=str(scores.dtype))


def draw_normalise(draw):
    return [dict(raw=[3 * draw.normal(5) + 2, draw.normal(4)], mean=draw.between(1, 2), std=draw.between(2, 3)),
            dict(raw=[torch.full((3,), draw.between(1, 2), dtype=torch.float64)], mean=0.0, std=1.0)]


class Scores(torch.nn.Module):
    """A reward model whose raw scores are its batches."""

    def __init__(self, mean, std):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float64))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float64))

    def forward(self, raw):
        return (raw - self.mean) / self.std


def run_normalise(case):
    model = Scores(case["mean"], case["std"])
    reward.normalise(model, case["raw"])
    finite = all(bool(torch.isfinite(model(raw)).all()) for raw in case["raw"])
    return dict(mean=model.mean, std=model.std, finite=finite)


def draw_best_of_n(draw):
    proxy, gold = draw.normal(7), draw.normal(7)
    ties = torch.tensor([draw.integer(0, 2) for _ in range(12)], dtype=torch.float64).view(2, 6)
    return [dict(proxy=proxy, gold=gold, n=1), dict(proxy=proxy, gold=gold, n=3), dict(proxy=proxy, gold=gold, n=7),
            dict(proxy=draw.normal(3, 6), gold=draw.normal(3, 6), n=4), dict(proxy=ties, gold=draw.normal(2, 6), n=2)]


def run_best_of_n(case):
    proxy, gold = case["proxy"], case["gold"]
    return dict(gold=evaluate.best_of_n(proxy, gold, case["n"]), n_of_0=raised(evaluate.best_of_n, proxy, gold, 0),
                n_too_large=raised(evaluate.best_of_n, proxy, gold, proxy.shape[-1] + 1))


def draw_optimum(draw):
    return [dict(scores=draw.normal(6), beta=draw.beta()), dict(scores=draw.normal(3, 4) + 400, beta=0.1)]


def run_optimum(case):
    best = evaluate.optimum(case["scores"], case["beta"])
    return dict(objective=best.objective, ess=best.ess, beta_of_0=raised(evaluate.optimum, case["scores"], 0.0))


def draw_optimum_mean(draw):
    return [dict(values=draw.normal(6), scores=draw.normal(6), beta=draw.beta()),
            dict(values=draw.normal(2, 5), scores=draw.normal(2, 5) + 400, beta=0.1)]


def run_optimum_mean(case):
    return dict(mean=evaluate.optimum_mean(case["values"], case["scores"], case["beta"]))


def draw_wins(draw):
    a = torch.tensor([draw.integer(0, 3) for _ in range(6)], dtype=torch.float64)
    return [dict(a=torch.cat([a, a]), b=torch.cat([a, a.flip(0)])), dict(a=a[:3, None], b=a.view(3, 2))]


def run_wins(case):
    return dict(wins=evaluate.wins(case["a"], case["b"]))
