"""Set 5, without a critic and without a reward model: inputs of the cases, and how some functions are called."""

import itertools
from functools import partial

import torch
from set1 import on_trees

import mdp


def draw_group_advantages(draw):
    kinds, cases = ("rloo", "dr_grpo", "grpo", "reinforce++"), []
    for kind, (B, G) in itertools.product(kinds, ((12, 3), (8, 4))):
        x = draw.normal(B // G, G)
        x = (x - x.mean(dim=1, keepdim=True)) / x.std(dim=1, keepdim=True)
        x = x * torch.linspace(0.3, 2, B // G)[:, None] + draw.normal(B // G, 1)  # deviations of 0.3 to 2
        cases.append(dict(rewards=x.flatten(), group=G, kind=kind, part=kind))
    cases.append(dict(rewards=draw.normal(4), group=1, kind="reinforce++", part="reinforce++"))
    equal = [(draw.normal(8, 1).repeat(1, 11).flatten(), kind) for kind in kinds[:3]]
    equal += [(draw.normal(1).repeat(11), kinds[3]) for _ in range(8)]
    cases += [dict(rewards=x.float(), group=11, kind=kind, part="equal rewards") for x, kind in equal]
    x = draw.normal(6)
    wrong = [dict(rewards=x, group=2, kind="other"), dict(rewards=x[:4].view(2, 2), group=2, kind="dr_grpo"),
             *(dict(rewards=x[:5], group=2, kind=kind) for kind in kinds),
             *(dict(rewards=x, group=1, kind=kind) for kind in kinds[:3])]
    return [*cases, *(dict(case, raises="", part="errors") for case in wrong)]


def draw_loss_mean(draw):
    mask = draw.mask(4, 5)
    return [dict(losses=draw.masked(mask, outside), mask=mask, kind=kind, cap=cap, part=kind)
            for kind in ("grpo", "dr_grpo", "rloo", "reinforce++") for cap, outside in ((7, 2.0), (9, float("nan")))]


def draw_gspo_surrogate(draw):
    mask = draw.mask(6, 5)
    signs, shift = torch.tensor([[1.0, 1, 1, -1, -1, -1], [-0.4, 0, 0.4, -0.4, 0, 0.4]]).double()[:, :, None]  # (6, 1)
    cases = []
    for clip, outside in ((0.02, 2.0), (0.2, float("nan"))):
        old = draw.masked(mask, 0.0)
        advantages = (signs * (0.1 + draw.normal(6, 1).abs())).repeat(1, 5)
        logp = old + shift + 0.1 * draw.masked(mask, outside)
        cases.append(dict(logp=logp, old_logp=old, advantages=advantages, mask=mask, clip=clip))
    return cases


draw_cispo_surrogate = draw_gspo_surrogate


def draw_kl_loss(draw):
    return [dict(logp=draw.normal(4, 5), ref_logp=draw.normal(4, 5))]


def draw_implicit_reward(draw):
    return [dict(logp=draw.normal(5), ref_logp=draw.normal(5), beta=draw.beta()) for _ in range(2)]


def draw_dpo_loss(draw):
    def four(n=24, **more):  # that many, so that some margins are on each side of 1 / beta
        return dict(chosen=3 * draw.normal(n), rejected=3 * draw.normal(n), ref_chosen=draw.normal(n),
                    ref_rejected=draw.normal(n), beta=draw.beta(), **more)
    kinds = (("dpo", 0.0), ("dpo", 0.2), ("ipo", 0.0), ("slic", 0.0), ("robust", 0.3), ("robust", 0.0))
    cases = [four(kind=kind, label_smoothing=e, part=f"{kind}, smoothed" if e and kind == "dpo" else kind)
             for kind, e in kinds]
    far = four(kind="dpo", label_smoothing=0.0, part="dpo")
    cases.append(dict(far, chosen=far["chosen"] - 5000))
    wrong = [dict(beta=0.0), dict(beta=-0.1), dict(kind="other"), dict(kind="ipo", label_smoothing=0.1),
             dict(kind="slic", label_smoothing=0.1), dict(label_smoothing=0.5), dict(label_smoothing=-0.1)]
    return [*cases, *(dict(four(kind="dpo", label_smoothing=0.0), **change, raises="", part="errors")
                      for change in wrong)]


def draw_solve_ipo(draw):
    cases = on_trees("ref_logits rewards beta", draw)
    return [dict(tree=case["tree"], ref_logits=case["ref_logits"], wins=mdp.win_probabilities(2 * case["rewards"]),
                 beta=case["beta"]) for case in cases]


def draw_learn_dpo(draw):
    tree = mdp.Tree(3, 3)
    parts = dict(dpo=dict(steps=3, size=2100), ipo=dict(steps=3, lr=0.05), rate=dict(steps=120),
                 minibatches=dict(size=64, steps=3))  # there are 2100 labels
    return [dict(ref=draw.normal(tree.S, 3), rewards=draw.normal(tree.Y), beta=draw.between(0.4, 0.8),
                 seed=draw.seed(), options=options, part=part) for part, options in parts.items()]


def run_learn_dpo(case):
    generator = torch.Generator().manual_seed(case["seed"])
    wins = torch.sigmoid(case["rewards"][:, None] - case["rewards"])
    tree = mdp.Tree(3, 3)
    chosen, rejected = mdp.draw_labels(wins, 20, generator)
    kind = "ipo" if case["part"] == "ipo" else "dpo"
    training = mdp.FOR_DPO._replace(**case["options"])
    steps = list(mdp.learn_dpo(tree, case["ref"], chosen, rejected, case["beta"], generator, kind, training))
    return dict(steps=[step for step, _ in steps], first=[logits for _, logits in steps[:3]], last=steps[-1][1])


draw_pair_losses = partial(on_trees, "logits ref_logits beta", sizes=((3, 2), (2, 3)))
