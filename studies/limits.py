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
from studies.lab import Claim, column, judge, mean_se, paired, panel, parallel, publish, select, slope, table
from tokenizer import decode

HELD_OUT = "film"  # the subject that no demonstration and no label of limits_subject's base run is about
SIDES = ("labelled", "unlabelled")  # subjects
TESTED_ON = ("other subjects", "held-out subject")
TAX_KL = 2.0  # nats: further away every policy writes other texts, and a tax would measure the distance


def limits(seeds, quick, out):
    """
    Question: what can go wrong with a reward model even when everything is done right?

    Claims: "RLHF Deciphered", arXiv:2404.08555, sections 5, 5.1 and 7.7. In words, with the criteria:
    docs/studies.md#limits. Coverage of outputs, the trade-off in beta, sparse rewards, and two annotators in one reward
    are computed exactly, on a tree, in limits_exact.
    """
    sizes = (16, 64) if quick else (125, 500, 2000)
    flips = (0.0, 0.4) if quick else (0.0, 0.1, 0.25, 0.4)
    subjects = (1, 4) if quick else (1, 2, 3, 4)
    grid = [(n, 0.0) for n in sizes] + [(sizes[-1], flip) for flip in flips[1:]]
    by_seed = [(seed, quick) for seed in range(seeds)]
    rows = parallel(limits_labels, [(seed, quick, n, flip) for n, flip in grid for seed in range(seeds)], out)
    for job, jobs in ((limits_coverage, [(seed, quick, k) for k in subjects for seed in range(seeds)]),
                      (limits_subject, by_seed), (limits_tax, by_seed)):
        rows += itertools.chain(*parallel(job, jobs, out))

    text = table(summarise(rows), ["part", "setting", "value", "se"])
    panels = [panel("accuracy", select(rows, part="labels", flip=0.0), "labels", "value", "flip", "log"),
              panel("accuracy", select(rows, part="labels", labels=sizes[-1]), "flip", "value", "labels"),
              panel("accuracy", select(rows, part="coverage"), "subjects", "value", "side")]
    return publish(out, rows, text, judge(make_claims(rows, seeds, sizes, flips, subjects), quick), panels)


# ---- jobs: the value is an accuracy against gold, in the part `tax` nats a token -------------------

def limits_labels(seed, quick, n, flip):
    """The accuracy of a reward model fitted to n labels, of which a share `flip` is wrong."""
    run = common.base(seed, quick)
    model = common.fit(run, common.labelled(run, n, seed, flip), seed)
    return dict(part="labels", seed=seed, labels=n, flip=flip, value=common.gold_accuracy(model, run.pairs[1]))


def limits_coverage(seed, quick, k):
    """The accuracy of a reward model whose labels are about k of the five subjects, on these and on the others."""
    run = common.base(seed, quick)
    subjects = list(world.ASPECTS)
    seen = [subjects[(seed + i) % len(subjects)] for i in range(k)]
    about, _ = split_by_subject(run, run.pairs[0], seen)
    model = common.fit(run, about[:24 if quick else 400], seed)
    heldout = split_by_subject(run, run.pairs[1], seen)
    return [dict(part="coverage", seed=seed, subjects=k, side=side, value=common.gold_accuracy(model, pairs))
            for side, pairs in zip(SIDES, heldout)]


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
    return [dict(part="subject", seed=seed, subject=subject, value=common.gold_accuracy(model, pairs))
            for subject, pairs in zip(TESTED_ON, (others, unseen))]


def limits_tax(seed, quick):
    """The log-likelihood of held-out texts for each policy, when its KL passes TAX_KL. If it never does, at the end."""
    run = common.base(seed, quick)
    pairs = common.labelled(run, 64 if quick else 1000)
    reward_model, texts = common.fit(run, pairs, seed), heldout_texts(run, seed, 32 if quick else 256)
    shared = dict(beta=0.1, ppo_iterations=4 if quick else 16)
    curves = dict(
        ppo=tax_curve(run, texts, seed, common.optimise, reward_model, ppo_lr=3e-4, **shared),
        rloo=tax_curve(run, texts, seed, common.optimise, reward_model, method="rloo", grpo_lr=3e-4, **shared),
        dpo=tax_curve(run, texts, seed, common.fit_policy, pairs, dpo_beta=0.05, dpo_batch=8 if quick else 32))
    rows = [dict(part="tax", seed=seed, policy=name, kl=min(TAX_KL, kls[-1]),
                 value=common.interpolate(TAX_KL, kls, values)) for name, (kls, values) in curves.items()]
    before = log_likelihood(run.load_network("sft"), texts)
    return [*rows, dict(part="tax", seed=seed, policy="sft", kl=0.0, value=before)]


def tax_curve(run, texts, seed, train, source, **settings):
    """Train, and list KL from SFT and log-likelihood of the texts after every second step, up to a KL of TAX_KL."""
    sft, steps = run.load_network("sft"), itertools.count(1)
    kls, values = [0.0], [log_likelihood(sft, texts)]

    def watch(policy):
        if next(steps) % 2 == 0 and kls[-1] < TAX_KL:
            kls.append(common.judge(run, policy, sft, 64, seed)["kl"])
            values.append(log_likelihood(policy, texts))

    train(run, source, seed, watch=watch, **settings)
    return kls, values


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


# ---- summary and criteria -------------------------------------------------------------------------

def summarise(rows):
    """A row of the table for each setting: the mean over seeds, and the standard error."""
    values = {}
    for row in rows:
        setting = ", ".join(f"{name} {x}" for name, x in row.items() if name not in ("part", "seed", "value", "kl"))
        values.setdefault((row["part"], setting), []).append(row["value"])
    summary = []
    for (part, setting), numbers in values.items():
        mean, error = mean_se(numbers)
        summary.append(dict(part=part, setting=setting, value=mean, se=error))
    return summary


def make_claims(rows, seeds, sizes, flips, subjects):
    """The criteria, as claims about one number for each seed."""
    def slopes(x, **where):
        return [slope(x, column(rows, "value", seed=seed, **where)) for seed in range(seeds)]

    def lost(name, before, after, **where):
        return paired(column(rows, "value", **{name: before}, **where), column(rows, "value", **{name: after}, **where))

    return [Claim("labels: accuracy rises with their number",
                  slopes([math.log(n) for n in sizes], part="labels", flip=0.0)),
            Claim("labels: accuracy falls with flips", [-x for x in slopes(flips, part="labels", labels=sizes[-1])]),
            Claim("coverage: less accurate on subjects without labels", lost("side", *SIDES, subjects=1)),
            Claim("coverage: more subjects, more accurate on the others", slopes(subjects, side="unlabelled")),
            Claim("subject: less accurate where no demonstration is", lost("subject", *TESTED_ON)),
            *[Claim(f"tax: {name.upper()} costs likelihood", lost("policy", "sft", name),
                    f"KL {mean_se(column(rows, 'kl', policy=name))[0]:.1f}") for name in ("ppo", "rloo", "dpo")]]
