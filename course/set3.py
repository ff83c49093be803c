"""Set 3, what people prefer: inputs of the cases, and how some functions are called."""

import torch
from draw import batch_of, called, network

import reward


def draw_preference_probability(draw):
    x = draw.between(0.2, 1)
    flip = draw.between(0.1, 0.4)
    cases = ((x, draw.between(0.2, 0.4), 0.0), (-x, draw.between(1, 2), flip), (900.0, 0.5, 0.0), (-900.0, 0.5, 0.0),
             (x, 0.0, 0.0), (-x, 0.0, flip), (0.0, 0.0, 0.3))
    return [dict(difference=d, temperature=t, flip=f, part="noise" if t else "temperature 0") for d, t, f in cases]


def draw_bradley_terry_loss(draw):
    return [dict(r_chosen=draw.normal(5), r_rejected=draw.normal(5)),
            dict(r_chosen=draw.normal(2) - 800.0, r_rejected=draw.normal(2)),
            dict(r_chosen=draw.normal(3) + 800.0, r_rejected=draw.normal(3))]


def draw_last_hidden(draw):
    return [dict(trunk=draw.seed(), batch=draw.texts(B=B)) for B in (5, 2)]


def reward_model(case):
    model = reward.RewardModel(network(case["seed"])).double()
    with torch.no_grad():
        model.score.weight.copy_(case["weight"])
    model.mean.fill_(case["mean"])
    model.std.fill_(case["std"])
    return model


def scorer(draw, mean=0.0, std=1.0):
    return dict(seed=draw.seed(), weight=draw.normal(1, 8), mean=mean, std=std)


def draw_scale(draw):
    return [dict(scorer(draw), x=draw.normal(3, 8)),
            dict(scorer(draw, draw.between(0.5, 2), draw.between(2, 3)), x=draw.normal(2, 3, 8))]


def run_scale(case):
    model = reward_model(case)
    model.score.bias.data.fill_(0.7)
    found = called(model.scale, dict(x=case["x"]))
    return dict(found, dtype=str(found["output"].dtype))


def draw_normalise(draw):
    equal = dict(scorer(draw, 1.5, 2.5), weight=torch.zeros(1, 8, dtype=torch.float64), part="equal scores")
    return [dict(scorer(draw, draw.between(1, 2), draw.between(2, 3)), batches=[draw.texts(B=5), draw.texts(B=4)]),
            dict(equal, batches=[draw.texts(B=3)])]


def run_normalise(case):
    model = reward_model(case)
    reward.normalise(model, [batch_of(texts) for texts in case["batches"]])
    learns = model.mean.requires_grad or model.std.requires_grad
    return dict(mean=model.mean.item(), inverse_of_std=1 / model.std.item(), learns=learns)


def draw_best_of_n(draw):
    proxy, gold = draw.normal(7), draw.normal(7)
    ties = torch.tensor([draw.integer(0, 2) for _ in range(12)], dtype=torch.float64).view(2, 6)
    cases = [dict(proxy=proxy, gold=gold, n=n) for n in (1, 3, 7)]
    cases.append(dict(proxy=draw.normal(3, 6), gold=draw.normal(3, 6), n=4))
    errors = [dict(cases[0], n=n, raises="", part="errors") for n in (0, 8)]
    return [*cases, dict(proxy=ties, gold=draw.normal(2, 6), n=2, part="ties"), *errors]


def draw_optimum(draw):
    return [dict(scores=draw.normal(6), beta=draw.beta()),
            dict(scores=draw.normal(3, 4) + 400, beta=0.1, part="large scores"),
            *(dict(scores=draw.normal(3), beta=beta, raises="", part="errors") for beta in (0.0, -1.0))]


def draw_optimum_mean(draw):
    return [dict(values=draw.normal(6), scores=draw.normal(6), beta=draw.beta()),
            dict(values=draw.normal(2, 5), scores=draw.normal(2, 5) + 400, beta=0.1, part="large scores")]


def draw_wins(draw):
    a = torch.tensor([draw.integer(0, 3) for _ in range(6)], dtype=torch.float64)
    return [dict(a=torch.cat([a, a]), b=torch.cat([a, a.flip(0)])), dict(a=a[:3, None], b=a.view(3, 2))]
