"""
Set 5, without a critic and without a reward model: inputs of the cases, and how each function is called. Expected
values come from the true code.

Letters: as in grpo.py, dpo.py and mdp.py.
"""

import torch
from draw import raised, with_gradient
from set1 import a_tree

import dpo
import estimators
import grpo
import mdp


def draw_group_advantages(draw):
    cases = []
    for kind, too_small in (("rloo", 1), ("dr_grpo", 1), ("grpo", 1), ("reinforce++", 0)):
        cases.append(dict(rewards=2 * draw.normal(12) + 1, group=3, kind=kind, too_small=too_small))
        equal = torch.full((4,), 0.5, dtype=torch.float64)
        cases.append(dict(rewards=equal, group=2, kind=kind, too_small=too_small))
    return [*cases, dict(rewards=draw.normal(4), group=1, kind="reinforce++", too_small=0)]


def run_group_advantages(case):
    rewards, group, kind = case["rewards"], case["group"], case["kind"]
    return dict(advantages=grpo.group_advantages(rewards, group, kind),
                unknown_kind=raised(grpo.group_advantages, rewards, 2, "other"),
                rest_of_a_group=raised(grpo.group_advantages, torch.zeros(5), 2, kind),
                too_small=raised(grpo.group_advantages, torch.zeros(4), case["too_small"], kind),
                two_dimensions=raised(grpo.group_advantages, torch.zeros(2, 2), 2, kind))


def draw_loss_mean(draw):
    mask = draw.mask(4, 5)
    losses = torch.where(mask, draw.normal(4, 5), float("nan"))
    return [dict(losses=losses, mask=mask, mean=mean, length=7) for mean in ("response", "token", "constant")]


def run_loss_mean(case):
    return dict(mean=grpo.loss_mean(case["losses"], case["mask"], case["mean"], case["length"]),
                unknown=raised(grpo.loss_mean, case["losses"], case["mask"], "other", 5))


def draw_gspo_loss(draw):
    mask = draw.mask(4, 5)
    old = draw.normal(4, 5)
    advantages = draw.normal(4)[:, None].expand(4, 5).contiguous()
    return [dict(logp=old + 0.1 * draw.normal(4, 5), old=old, advantages=advantages, mask=mask, clip=clip)
            for clip in (0.02, 0.2)]


def run_gspo_loss(case):
    return with_gradient(lambda x: grpo.gspo_loss(x, case["old"], case["advantages"], case["mask"], case["clip"]),
                         case["logp"])


def draw_kl_loss(draw):
    mask = draw.mask(4, 5)
    return [dict(logp=draw.normal(4, 5), ref=draw.normal(4, 5), mask=mask)]


def run_kl_loss(case):
    return with_gradient(lambda x: grpo.kl_loss(x, case["ref"], case["mask"]), case["logp"])


def draw_implicit_reward(draw):
    return [dict(logp=draw.normal(5), ref=draw.normal(5), beta=draw.beta())]


def run_implicit_reward(case):
    return dict(reward=dpo.implicit_reward(case["logp"], case["ref"], case["beta"]))


def draw_dpo_loss(draw):
    beta = draw.beta()
    four = dict(chosen=3 * draw.normal(5), rejected=3 * draw.normal(5), ref_chosen=draw.normal(5),
                ref_rejected=draw.normal(5), beta=beta)
    kinds = (("dpo", 0.0), ("dpo", 0.2), ("ipo", 0.0), ("slic", 0.0), ("robust", 0.2), ("robust", 0.0))
    return [dict(four, kind=kind, e=e) for kind, e in kinds] + [dict(four, chosen=four["chosen"] - 5000, kind="dpo",
                                                                      e=0.0)]


def run_dpo_loss(case):
    rest = case["rejected"], case["ref_chosen"], case["ref_rejected"]
    found = with_gradient(lambda x: dpo.dpo_loss(x, *rest, case["beta"], case["kind"], case["e"]), case["chosen"])
    return dict(found, beta_of_0=raised(dpo.dpo_loss, case["chosen"], *rest, 0.0),
                unknown_kind=raised(dpo.dpo_loss, case["chosen"], *rest, 0.1, "other"),
                smoothing_of_ipo=raised(dpo.dpo_loss, case["chosen"], *rest, 0.1, "ipo", 0.1),
                half_of_the_labels=raised(dpo.dpo_loss, case["chosen"], *rest, 0.1, "dpo", 0.5))


def draw_solve_ipo(draw):
    return [dict(case, wins=torch.sigmoid(2 * (case["rewards"][:, None] - case["rewards"]))) for case in a_tree(draw)]


def run_solve_ipo(case):
    best = mdp.solve_ipo(mdp.Tree(case["vocab"], case["horizon"]), case["ref"], case["wins"], case["beta"])
    return dict(logp=best.logp, J=best.J)


def draw_learn_dpo(draw):
    tree = mdp.Tree(3, 3)
    ref, rewards = draw.normal(tree.S, 3), draw.normal(tree.Y)
    return [dict(vocab=3, horizon=3, ref=ref, rewards=rewards, beta=draw.between(0.4, 0.8), kind=kind, size=size,
                 steps=steps, seed=draw.integer(0, 10 ** 6))
            for kind, size, steps in (("dpo", 10 ** 6, 120), ("ipo", 10 ** 6, 120), ("dpo", 64, 3))]


def run_learn_dpo(case):
    generator = torch.Generator().manual_seed(case["seed"])
    wins = torch.sigmoid(case["rewards"][:, None] - case["rewards"])
    tree = mdp.Tree(case["vocab"], case["horizon"])
    chosen, rejected = mdp.draw_labels(wins, 200 if case["size"] > 64 else 20, generator)
    steps = list(mdp.learn_dpo(tree, case["ref"], chosen, rejected, case["beta"], generator, case["kind"],
                               case["steps"], case["size"]))
    return dict(steps=[step for step, _ in steps], first=[logits for _, logits in steps[:3]], last=steps[-1][1])


def draw_pair_losses(draw):
    return a_tree(draw, ((3, 2), (2, 3)))


def run_pair_losses(case):
    tree = mdp.Tree(case["vocab"], case["horizon"])
    logits = case["logits"].clone().requires_grad_()
    found = estimators.pair_losses(tree, logits, case["ref"], case["beta"])
    slopes = {name: torch.autograd.grad(found[name].sum(), logits, retain_graph=True)[0] for name in sorted(found)}
    return dict(losses={name: found[name].detach() for name in sorted(found)}, slopes=slopes)
