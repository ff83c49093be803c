"""
The exact part of the study `limits`: what RLHF loses by its reward model, on trees. See `limits_exact`.

A tree is a token MDP of mdp.py. Every optimum is computed. Nothing is learned by sampling, except in the part `dense`.

Letters: Y responses.
"""

import itertools
import math

import torch

from mdp import Training, learn_ppo, objective, response_logp, solve, win_probabilities
from studies import lab
from studies.lab import Claim, column, curves_by_seed, judge, mean_se, parallel, publish, select, table
from studies.limits_rewards import fit_bradley_terry, fit_ratings, ngram_counts, shape_rewards, tree_with_taste

SHARES = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8)  # of the responses that are labelled
BETAS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
DISAGREEMENTS = (0.0, 0.25, 0.5, 0.75, 1.0)  # the part of the variance in which two annotators are opposed
BETA = 0.3  # where beta is not what is studied
DENSE_BETA = 0.2
EPISODES = 32  # in an iteration of PPO
COLUMNS = dict(
    coverage=("labelled", "unlabelled", "gap"),
    beta=("learned", "oracle", "gap"),
    annotators=("kept",),
)  # of each part, averaged over seeds
XLABELS = dict(coverage="share labelled", beta="beta, 20% labelled", annotators="disagreement")


def limits_exact(seeds, quick, out):
    """
    Question: what does RLHF lose by a reward model that has seen few responses, by a reward at the end only, and by
    pooling people of different tastes?

    Claims: "RLHF Deciphered", arXiv:2404.08555, sections 5 and 6. In words, with the criteria: docs/studies.md#limits.
    In `dense` the same return is paid at the end or word by word. With a table for a critic, word by word is the same
    as at the end with a critic that starts with good guesses of the values (Wiewiora 2003).
    """
    iterations = 20 if quick else 300

    rows = list(itertools.chain(*parallel(limits_job, [(seed, iterations) for seed in range(seeds)], out)))
    sections = [averaged(rows, part) for part in COLUMNS]
    texts = [table(section, list(section[0])) for section in sections]
    texts.append("episodes to 90% of the optimum, blank where it was not reached\n"
                 + table(select(rows, part="dense"), ["seed", "x", "episodes"]))
    panels = draw(list(itertools.chain(*sections)), rows)
    measured = [{name: x for name, x in row.items() if name != "curve"} for row in rows]
    return publish(out, measured, "\n\n".join(texts), judge(make_claims(rows, iterations), quick), panels)


# ---- jobs: one seed of all four parts -------------------------------------------------------------

def limits_job(seed, iterations):
    """Compute all four parts for one seed: one row for each setting x of each part."""
    tree, ref, rewards, generator = tree_with_taste(seed, 4, 0.5)
    features = ngram_counts(tree)
    order = torch.randperm(tree.Y, generator=generator)  # the first ones are labelled
    parts = dict(
        coverage=coverage_part(tree, ref, rewards, features, order),
        beta=beta_part(tree, ref, rewards, features, order),
        dense=dense_part(seed, iterations),
        annotators=annotators_part(tree, ref, generator),
    )
    return [dict(part=part, seed=seed, **row) for part, rows in parts.items() for row in rows]


def coverage_part(tree, ref, rewards, features, order):
    """For each share of labelled responses: the errors of the fitted reward (root mean square), and J* - J."""
    best = solve(tree, ref, rewards, BETA)
    rows = []
    for share in SHARES:
        labelled, unlabelled = order.tensor_split([round(share * tree.Y)])
        learned = fit_ratings(features, rewards, labelled)                                    # (Y,)
        error = (learned - rewards) ** 2
        gap = best.J - objective(tree, solve(tree, ref, learned, BETA).logp, ref, rewards, BETA)
        rows.append(dict(x=share, labelled=error[labelled].mean().sqrt().item(),
                         unlabelled=error[unlabelled].mean().sqrt().item(), gap=gap.item()))
    return rows


def beta_part(tree, ref, rewards, features, order):
    """For each beta: the true reward of the optimum for a learned reward (20% labelled), and of the true optimum."""
    learned = fit_ratings(features, rewards, order[:round(0.2 * tree.Y)])                     # (Y,)
    rows = []
    for beta in BETAS:
        policies = [response_logp(tree, solve(tree, ref, r, beta).logp).exp() for r in (learned, rewards)]  # (Y,) each
        own, oracle = [(policy @ rewards).item() for policy in policies]
        rows.append(dict(x=beta, learned=own, oracle=oracle, gap=oracle - own))
    return rows


def annotators_part(tree, ref, generator):
    """For each disagreement: what two annotators keep of their gain when one reward model is fitted to both."""
    common, disputed = torch.randn(2, tree.Y, generator=generator, dtype=torch.float64)
    rows = []
    for w in DISAGREEMENTS:
        agreed = (1 - w) ** 0.5 * common
        utilities = [agreed + w ** 0.5 * disputed, agreed - w ** 0.5 * disputed]              # (Y,) each
        pooled = fit_bradley_terry((win_probabilities(utilities[0]) + win_probabilities(utilities[1])) / 2)
        shared = solve(tree, ref, pooled, BETA).logp
        kept = []
        for utility in utilities:
            before, after = [objective(tree, logits, ref, utility, BETA).item() for logits in (ref, shared)]
            own = solve(tree, ref, utility, BETA).J.item()
            kept.append((after - before) / (own - before))
        rows.append(dict(x=w, kept=sum(kept) / 2))
    return rows


def dense_part(seed, iterations):
    """For the reward at the end (sparse) and word by word (dense): how PPO approaches the optimum."""
    tree, ref, rewards, _ = tree_with_taste(seed, 5, 0.1)
    rows = []
    for name, shaping in (("sparse", None), ("dense", shape_rewards(tree, rewards))):
        generator = torch.Generator().manual_seed(seed)
        curve = learning_curve(tree, ref, rewards, shaping, generator, iterations)
        reached = [EPISODES * i for i, share in enumerate(curve) if share >= 0.9]
        rows.append(dict(x=name, episodes=reached[0] if reached else None, curve=curve))
    return rows


def learning_curve(tree, ref, rewards, shaping, generator, iterations):
    """Train with PPO. Returns the share of the optimum before each iteration and after the last."""
    best = solve(tree, ref, rewards, DENSE_BETA).J
    start = objective(tree, ref, ref, rewards, DENSE_BETA)
    training, curve = Training(iterations, EPISODES, lr=0.05), []
    for _, logits, _ in learn_ppo(tree, ref, rewards, DENSE_BETA, generator, training, shaping):
        J = objective(tree, logits, ref, rewards, DENSE_BETA)
        curve.append(((J - start) / (best - start)).item())
    return curve


# ---- summary, criteria, picture -------------------------------------------------------------------

def averaged(rows, part):
    """A part averaged over seeds: a row for each setting."""
    summary = []
    for x in dict.fromkeys(column(rows, "x", part=part)):
        row = dict(part=part, x=x)
        for name in COLUMNS[part]:
            row[name], row[f"{name}_se"] = mean_se(column(rows, name, part=part, x=x))
        summary.append(row)
    return summary


def make_claims(rows, iterations):
    """The criteria, as claims about one number for each seed."""
    def ranks_below(part, name, limit=-0.5):
        """By how much Spearman's correlation of a column with the setting is below the limit, in each seed."""
        curves = zip(curves_by_seed(rows, "x", part=part), curves_by_seed(rows, name, part=part))
        return [limit - lab.spearman(x, y) for x, y in curves]

    learned = curves_by_seed(rows, "learned", part="beta")                                    # [seed][beta]
    rooms = [[reward - max(curve[0], curve[-1]) for reward in curve[1:-1]] for curve in learned]  # above both ends
    best, tested = lab.chosen_and_tested(rooms)
    never = EPISODES * 2 * iterations  # episodes of a run that does not get there
    sparse, dense = [[episodes or never for episodes in column(rows, "episodes", x=x)] for x in ("sparse", "dense")]
    largest = max(column(rows, "labelled", part="coverage"))
    return [
        Claim("coverage: the unlabelled error falls", ranks_below("coverage", "unlabelled"),
              f"largest error on labelled responses {largest:.0e}"),
        Claim("coverage: J* - J falls", ranks_below("coverage", "gap")),
        Claim("beta: the gap to the oracle falls", ranks_below("beta", "gap")),
        Claim("beta: the oracle's reward falls", ranks_below("beta", "oracle")),
        Claim("beta: best inside", [room[best] for room in tested], f"the best beta inside is {BETAS[best + 1]}"),
        Claim("dense: fewer episodes", [math.log2(a / max(b, 1)) for a, b in zip(sparse, dense, strict=True)]),
        Claim("annotators: the kept share falls", ranks_below("annotators", "kept"))]


def draw(summary, rows):
    """A panel for each part: its columns against its settings, and for dense rewards the curves of PPO."""
    panels = []
    for part, names in COLUMNS.items():
        settings = select(summary, part=part)
        xs = column(settings, "x")
        lines = [dict(label=name, x=xs, y=column(settings, name), yerr=column(settings, f"{name}_se"), style="o-")
                 for name in names]
        panels.append(dict(title=part, xlabel=XLABELS[part], ylabel="mean of seeds", lines=lines,
                           xscale="linear" if part == "annotators" else "log"))
    lines = []
    for name in ("sparse", "dense"):
        share, _ = lab.mean_curve(column(rows, "curve", x=name))
        lines.append(dict(label=name, x=[EPISODES * i for i in range(len(share))], y=share))
    return [*panels, dict(title="reward at the end or word by word", xlabel="episodes of PPO",
                          ylabel="share of the optimum", lines=lines)]
