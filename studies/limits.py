"""
The limits of reward models: what can go wrong even when everything is done right? See `limits`.

Letters: n labels, k subjects, T texts.
"""

import itertools
import math
import random

import torch

import world
from data import collate
from model import response_logprobs
from studies import common
from studies.lab import Claim, column, judge, mean_se, parallel, publish, slope, table
from studies.limits_exact import limits_exact
from tokenizer import decode

HELD_OUT = "film"  # the subject that the base run of limits_subject never trains on
SIDES = ("labelled", "unlabelled")  # subjects
TESTED_ON = ("other subjects", "held-out subject")
POLICIES = ("pretrained", "sft", "ppo", "dpo")


def limits(seeds, quick, out):
    """
    Question: what can go wrong with a reward model even when everything is done right?

    Claims ("RLHF Deciphered", arXiv:2404.08555, sections 5, 5.1 and 7.7, which has no experiments): a small
    error on labelled data says nothing about other data (misgeneralisation). Noise and few labels make it
    worse. Alignment costs likelihood elsewhere (the alignment tax). Coverage of outputs, the trade-off in beta,
    sparse rewards, and two annotators in one reward are computed exactly, on a tree: see limits_exact, which has
    its own criteria.

    Criteria, one number a seed, Student's t, Holm's correction over all of them:
    - labels: accuracy rises with the logarithm of the number of labels, and falls with flips at the largest number
    - coverage: with labels on prompts about one subject, accuracy on the others is lower, and it rises with the number
      of subjects
    - subject: accuracy on a subject that the demonstrations left out too is lower than on the others
    - tax: held-out texts are less likely after PPO and after DPO than under SFT
    """
    small = quick or seeds < 3
    sizes = (16, 64) if quick else (125, 500, 2000)
    flips = (0.0, 0.4) if quick else (0.0, 0.1, 0.25, 0.4)
    subjects = (1, 4) if quick else (1, 2, 3, 4)
    grid = [(n, 0.0) for n in sizes] + [(sizes[-1], flip) for flip in flips[1:]]
    rows = run_jobs(seeds, quick, grid, subjects, out)

    accuracy = {(n, flip): mean_se(column(rows, "accuracy", part="labels", labels=n, flip=flip)) for n, flip in grid}
    by_size = [accuracy[n, 0.0] for n in sizes]
    by_flip = [accuracy[sizes[-1], flip] for flip in flips]
    coverage = {side: [mean_se(column(rows, side, part="coverage", subjects=k)) for k in subjects] for side in SIDES}

    summary = summarise(rows, accuracy, coverage, subjects)
    _, exact_text = limits_exact(None, quick, out / "exact")
    verdicts = judge(make_claims(rows, seeds, sizes, flips, subjects), small)
    panels = [
        panel("coverage", "subjects that labels are about", subjects, coverage),
        panel("labels", "labels", sizes, {"no flips": by_size}, xscale="log"),
        panel(f"noise, {sizes[-1]} labels", "share of labels flipped", flips, {"accuracy": by_flip}),
    ]
    return publish(out, rows, table(summary, ["part", "what", "value", "se"]) + "\n\n" + exact_text, verdicts, panels)


# ---- jobs -----------------------------------------------------------------------------------------

def run_jobs(seeds, quick, grid, subjects, out):
    """Run all four parts for every setting and seed. Returns their rows."""
    rows = parallel(limits_labels, [(seed, quick, n, flip) for n, flip in grid for seed in range(seeds)], out)
    rows += parallel(limits_coverage, [(seed, quick, k) for k in subjects for seed in range(seeds)], out)
    by_seed = [(seed, quick) for seed in range(seeds)]
    return rows + list(itertools.chain(*parallel(limits_subject, by_seed, out), *parallel(limits_tax, by_seed, out)))


def limits_labels(seed, quick, n, flip):
    """The accuracy of a reward model fitted to n labels, of which a share `flip` is wrong."""
    run = common.base(seed, quick)
    model = common.fit(run, common.labelled(run, n, seed, flip), seed)
    return dict(part="labels", seed=seed, labels=n, flip=flip, accuracy=common.gold_accuracy(model, run.pairs[1]))


def limits_coverage(seed, quick, k):
    """
    The accuracy of a reward model whose labels are about k of the five subjects, on these and on the other ones.

    The number of labels is the same for every k.
    """
    run = common.base(seed, quick)
    subjects = list(world.ASPECTS)
    seen = [subjects[(seed + i) % len(subjects)] for i in range(k)]
    about, _ = split_by_subject(run, run.pairs[0], seen)
    model = common.fit(run, about[:24 if quick else 400], seed)
    heldout = split_by_subject(run, run.pairs[1], seen)
    accuracies = {side: common.gold_accuracy(model, pairs) for side, pairs in zip(SIDES, heldout)}
    return dict(part="coverage", seed=seed, subjects=k, **accuracies)


def split_by_subject(run, pairs, subjects):
    """Pairs whose prompt is about one of the subjects, and the others."""
    about, others = [], []
    for pair in pairs:
        known = world.subject_of(decode(run.tokenizer, pair["prompt"])) in subjects
        (about if known else others).append(pair)
    return about, others


def limits_subject(seed, quick):
    """Accuracy on a subject that no label is about, and on the others. No demonstration is about it either."""
    run = common.base(seed, quick, held_out=HELD_OUT)
    model = common.fit(run, common.labelled(run, 64 if quick else 1000), seed)
    unseen, others = split_by_subject(run, run.pairs[1], [HELD_OUT])
    return [dict(part="subject", seed=seed, subject=subject, accuracy=common.gold_accuracy(model, pairs))
            for subject, pairs in zip(TESTED_ON, (others, unseen))]


def limits_tax(seed, quick):
    """The cost of alignment elsewhere: the log-likelihood of held-out texts before and after PPO and DPO."""
    run = common.base(seed, quick)
    pairs = common.labelled(run, 64 if quick else 1000)
    ppo, _ = common.optimise(run, common.fit(run, pairs, seed), seed, beta=0.1, ppo_iterations=3 if quick else 24,
                             ppo_lr=1e-3)
    dpo = common.fit_policy(run, pairs, seed, dpo_beta=0.5, dpo_batch=8 if quick else 32)
    texts = heldout_texts(run, seed, 32 if quick else 256)
    networks = [run.load_network("pretrained"), run.load_network("sft"), ppo, dpo]
    return [dict(part="tax", seed=seed, policy=name, loglik=log_likelihood(policy, texts))
            for name, policy in zip(POLICIES, networks)]


def heldout_texts(run, seed, T):
    """A Batch of T documents of the built-in world. Each is a response after E, as in pretraining."""
    rng = random.Random(seed + 1000)  # not the seed of the pretraining texts
    network = run.load_network("pretrained")
    texts = [run.tokenizer.encode_ordinary(world.make_document(rng)) + [network.end] for _ in range(T)]
    return collate([[network.end]] * T, [text[:network.block_size - 1] for text in texts], network.pad)


@torch.no_grad()
def log_likelihood(policy, batch):
    """The mean log-prob of a batch's response tokens, in nats a token."""
    return (response_logprobs(policy, batch).sum() / batch.mask.sum()).item()


# ---- the summary ----------------------------------------------------------------------------------

def summarise(rows, accuracy, coverage, subjects):
    """The rows of the table: what was measured, its mean over seeds and the standard error."""
    values = {("labels", f"{n} labels, {flip:.0%} flipped"): x for (n, flip), x in accuracy.items()}
    for i, k in enumerate(subjects):
        for side in SIDES:
            values["coverage", f"{k} subjects labelled, {side} ones"] = coverage[side][i]
    for subject in TESTED_ON:
        values["accuracy", subject] = mean_se(column(rows, "accuracy", subject=subject))
    for policy in POLICIES:
        values["nats a token", policy] = mean_se(column(rows, "loglik", policy=policy))
    return [dict(part=part, what=what, value=mean, se=se) for (part, what), (mean, se) in values.items()]


# ---- the verdicts ---------------------------------------------------------------------------------

def means_of(pairs):
    return [mean for mean, _ in pairs]


def make_claims(rows, seeds, sizes, flips, subjects):
    """The criteria, as claims about one number for each seed."""
    def accuracies(name, key, values, seed, **where):
        return [column(rows, name, seed=seed, **{key: value}, **where)[0] for value in values]

    def loss(name, key, before, after, **where):
        return [a - b for a, b in zip(column(rows, name, **{key: before}, **where),
                                      column(rows, name, **{key: after}, **where), strict=True)]

    by_size = [slope([math.log(n) for n in sizes],
                     accuracies("accuracy", "labels", sizes, seed, part="labels", flip=0.0)) for seed in range(seeds)]
    by_flip = [-slope(flips, accuracies("accuracy", "flip", flips, seed, part="labels", labels=sizes[-1]))
               for seed in range(seeds)]
    narrow = [row["labelled"] - row["unlabelled"] for row in rows
              if row["part"] == "coverage" and row["subjects"] == 1]
    wider = [slope(subjects, accuracies("unlabelled", "subjects", subjects, seed, part="coverage"))
             for seed in range(seeds)]
    return [Claim("labels: accuracy rises with their number", by_size),
            Claim("labels: accuracy falls with flips", by_flip),
            Claim("coverage: less accurate on subjects without labels", narrow),
            Claim("coverage: more subjects, more accurate on the others", wider),
            Claim("subject: less accurate where no demonstration is", loss("accuracy", "subject", *TESTED_ON)),
            Claim("tax: PPO costs likelihood", loss("loglik", "policy", "sft", "ppo")),
            Claim("tax: DPO costs likelihood", loss("loglik", "policy", "sft", "dpo"))]


# ---- the picture ----------------------------------------------------------------------------------

def panel(title, xlabel, x, curves, xscale="linear"):
    """Plot accuracy against x; curves: {label: (mean, standard error) at each x}."""
    lines = [dict(label=label, x=x, y=means_of(pairs), yerr=[error for _, error in pairs])
             for label, pairs in curves.items()]
    return dict(title=title, xlabel=xlabel, ylabel="accuracy against gold", xscale=xscale, lines=lines)
