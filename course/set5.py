"""Set 5, without a critic and without a reward model: inputs of the cases, and how some functions are called."""

import torch
from set1 import on_trees

import mdp


def draw_group_advantages(draw):
    kinds = ("rloo", "dr_grpo", "grpo", "reinforce++")
    cases = [dict(rewards=2 * draw.normal(12) + 1, group=3, kind=kind, part=kind) for kind in kinds]
    cases += [dict(rewards=2 * draw.normal(8) + 1, group=4, kind=kind, part=kind) for kind in kinds]
    cases.append(dict(rewards=draw.normal(4), group=1, kind="reinforce++", part="reinforce++"))
    equal = draw.between(0.1, 0.9) / 3
    cases += [dict(rewards=torch.full((6,), equal, dtype=torch.float64), group=3, kind=kind, part="equal rewards")
              for kind in kinds]
    x = draw.normal(6)
    wrong = [dict(rewards=x, group=2, kind="other"), dict(rewards=x[:5], group=2, kind="grpo"),
             dict(rewards=x, group=1, kind="rloo"), dict(rewards=x, group=1, kind="grpo"),
             dict(rewards=x[:4].view(2, 2), group=2, kind="dr_grpo")]
    return [*cases, *(dict(case, raises="", part="errors") for case in wrong)]


def draw_loss_mean(draw):
    mask = draw.mask(4, 5)
    return [dict(losses=draw.masked(mask), mask=mask, kind=kind, cap=cap, part=kind)
            for kind in ("grpo", "dr_grpo", "rloo", "reinforce++") for cap in (7, 9)]


def draw_gspo_surrogate(draw):
    mask = draw.mask(4, 5)
    cases = []
    for clip in (0.02, 0.2):
        old = draw.masked(mask, 0.0)
        advantages = draw.normal(4)[:, None].repeat(1, 5)
        logp = old + 0.1 * draw.masked(mask)
        cases.append(dict(logp=logp, old_logp=old, advantages=advantages, mask=mask, clip=clip))
    return cases


def draw_cispo_surrogate(draw):
    cases = draw_gspo_surrogate(draw)
    return [dict(case, logp=case["old_logp"] + 0.4 * draw.masked(case["mask"])) for case in cases]


def draw_kl_loss(draw):
    return [dict(logp=draw.normal(4, 5), ref_logp=draw.normal(4, 5))]


def draw_implicit_reward(draw):
    return [dict(logp=draw.normal(5), ref_logp=draw.normal(5), beta=draw.beta()) for _ in range(2)]


def draw_dpo_loss(draw):
    def four(n=5, **more):
        return dict(chosen=3 * draw.normal(n), rejected=3 * draw.normal(n), ref_chosen=draw.normal(n),
                    ref_rejected=draw.normal(n), beta=draw.beta(), **more)
    kinds = (("dpo", 0.0), ("dpo", 0.2), ("ipo", 0.0), ("slic", 0.0), ("robust", 0.3), ("robust", 0.0))
    cases = [four(kind=kind, label_smoothing=e, part=f"{kind}, smoothed" if e and kind == "dpo" else kind)
             for kind, e in kinds]
    far = four(kind="dpo", label_smoothing=0.0, part="dpo")
    cases.append(dict(far, chosen=far["chosen"] - 5000))
    wrong = [dict(beta=0.0), dict(kind="other"), dict(kind="ipo", label_smoothing=0.1), dict(label_smoothing=0.5)]
    return [*cases, *(dict(four(kind="dpo", label_smoothing=0.0), **change, raises="", part="errors")
                      for change in wrong)]


def draw_solve_ipo(draw):
    cases = on_trees(draw, "ref_logits", "rewards", "beta")
    for case in cases:  # the arguments in their order
        rewards, beta = case.pop("rewards"), case.pop("beta")
        case.update(wins=torch.sigmoid(2 * (rewards[:, None] - rewards)), beta=beta)
    return cases


def draw_learn_dpo(draw):
    tree, cases = mdp.Tree(3, 3), []
    for part, options in dict(dpo=dict(steps=3), ipo=dict(steps=3, lr=0.05), rate=dict(steps=120),
                              minibatches=dict(size=64, steps=3)).items():
        cases.append(dict(ref=draw.normal(tree.S, 3), rewards=draw.normal(tree.Y), beta=draw.between(0.4, 0.8),
                          seed=draw.seed(), options=options, part=part))
    return cases


def run_learn_dpo(case):
    generator = torch.Generator().manual_seed(case["seed"])
    wins = torch.sigmoid(case["rewards"][:, None] - case["rewards"])
    tree = mdp.Tree(3, 3)
    chosen, rejected = mdp.draw_labels(wins, 20, generator)
    kind = "ipo" if case["part"] == "ipo" else "dpo"
    training = mdp.FOR_DPO._replace(**case["options"])
    steps = list(mdp.learn_dpo(tree, case["ref"], chosen, rejected, case["beta"], generator, kind, training))
    return dict(steps=[step for step, _ in steps], first=[logits for _, logits in steps[:3]], last=steps[-1][1])


def draw_pair_losses(draw):
    return on_trees(draw, "logits", "ref_logits", "beta", sizes=((3, 2), (2, 3)))
