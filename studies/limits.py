"""
The limits of reward models: what can go wrong even when everything is done right? See `limits`.

Letters: n labels, k subjects, T texts.
"""

import copy
import itertools
import random
from dataclasses import replace

import torch

import world
from data import collate, end_id, pad_id
from dpo import train_dpo
from model import response_logprobs
from studies.common import base, fit, gold_accuracy, labelled, optimise, ruled, select
from studies.lab import mean_se, parallel, publish, spearman, table
from studies.limits_exact import limits_exact

HELD_OUT = "film"  # the subject that the base run of limits_subject never trains on
SIDES = ("labelled", "unlabelled")  # subjects
TESTED_ON = ("other subjects", "held-out subject")
POLICIES = ("pretrained", "sft", "ppo", "dpo")


def limits(seeds, quick, out):
    """
    Question: what can go wrong with a reward model even when everything is done right?

    Claims ("RLHF Deciphered", arXiv:2404.08555, sections 5, 5.1 and 7.7, which has no experiments of its own): a
    small error on labelled data says nothing about other data (misgeneralisation). Noise and few labels make it
    worse. Alignment costs likelihood elsewhere (the alignment tax). Coverage of outputs, the trade-off in beta,
    sparse rewards, and two annotators in one reward are computed exactly, on a tree: see limits_exact, which has
    its own criteria.

    Criteria:
    - labels: accuracy rises with the number of labels without flips, and falls with flips at the largest number.
      Both have a Spearman correlation beyond 0.9, of the means over seeds.
    - coverage: with labels on prompts about one subject, accuracy on the others is lower by more than 2 standard
      errors over seeds, and it rises with the number of subjects, Spearman beyond 0.9.
    - subject: accuracy on a subject that the demonstrations left out too is lower than on the others, by more than
      2 standard errors.
    - tax: held-out texts are less likely after PPO and after DPO than under SFT, by more than 2 standard errors.
    """
    small = quick or seeds < 3
    if quick:
        sizes = (16, 64)
        flips = (0.0, 0.4)
        subjects = (1, 4)
    else:
        sizes = (125, 500, 2000)
        flips = (0.0, 0.1, 0.25, 0.4)
        subjects = (1, 2, 3, 4)
    grid = [(n, 0.0) for n in sizes] + [(sizes[-1], flip) for flip in flips[1:]]
    rows = run_jobs(seeds, quick, grid, subjects)

    accuracy = {}
    for n, flip in grid:
        accuracy[n, flip] = mean_se(column(rows, "accuracy", part="labels", labels=n, flip=flip))
    by_size = [accuracy[n, 0.0] for n in sizes]
    by_flip = [accuracy[sizes[-1], flip] for flip in flips]
    coverage = {}
    for side in SIDES:
        coverage[side] = [mean_se(column(rows, side, part="coverage", subjects=k)) for k in subjects]

    summary = summarise(rows, accuracy, coverage, subjects)
    _, exact_text = limits_exact(None, quick, out / "exact")
    verdicts = [
        judge_labels(sizes, by_size, flips, by_flip, small),
        judge_coverage(rows, subjects, coverage, small),
        judge_subject(rows, small),
        judge_tax(rows, small),
    ]
    panels = [
        panel("coverage", "subjects that labels are about", subjects, coverage),
        panel("labels", "labels", sizes, {"no flips": by_size}, xscale="log"),
        panel(f"noise, {sizes[-1]} labels", "share of labels flipped", flips, {"accuracy": by_flip}),
    ]
    text = table(summary, ["part", "what", "value", "se"]) + "\n\n" + exact_text
    return publish(out, rows, text, verdicts, panels)


# ---------------------------------------------------------------------------------------------------------------------
# jobs

def run_jobs(seeds, quick, grid, subjects):
    """Run all four parts for every setting and seed. Returns their rows."""
    rows = parallel(limits_labels, [(seed, quick, n, flip) for n, flip in grid for seed in range(seeds)])
    rows += parallel(limits_coverage, [(seed, quick, k) for k in subjects for seed in range(seeds)])
    by_seed = [(seed, quick) for seed in range(seeds)]
    results = parallel(limits_subject, by_seed) + parallel(limits_tax, by_seed)
    return rows + list(itertools.chain.from_iterable(results))


def limits_labels(seed, quick, n, flip):
    """Measure the accuracy of a reward model fitted to n labels, of which a share `flip` is wrong."""
    run = base(seed, quick)
    _, heldout = run.pairs()
    model = fit(run, labelled(run, n, seed, flip), seed)
    return dict(part="labels", seed=seed, labels=n, flip=flip, accuracy=gold_accuracy(run, model, heldout))


def limits_coverage(seed, quick, k):
    """
    Measure the accuracy of a reward model whose labels are about k of the five subjects, on these and on the other
    ones.

    The number of labels is the same for every k.
    """
    run = base(seed, quick)
    subjects = list(world.ASPECTS)
    seen = [subjects[(seed + i) % len(subjects)] for i in range(k)]
    train, heldout = run.pairs()
    train_seen, _ = split_by_subject(train, seen)
    heldout_seen, heldout_others = split_by_subject(heldout, seen)
    model = fit(run, train_seen[:24 if quick else 400], seed)
    return dict(part="coverage", seed=seed, subjects=k, labelled=gold_accuracy(run, model, heldout_seen),
                unlabelled=gold_accuracy(run, model, heldout_others))


def split_by_subject(pairs, subjects):
    """Split pairs into those whose prompt is about one of the subjects, and the others."""
    about = []
    others = []
    for pair in pairs:
        prompt = pair["text"][0]
        if world.subject_of(prompt) in subjects:
            about.append(pair)
        else:
            others.append(pair)
    return about, others


def limits_subject(seed, quick):
    """Measure accuracy on a subject that no label is about, and on the others. No demonstration is about it either."""
    run = base(seed, quick, "--held-out", HELD_OUT)
    model = fit(run, labelled(run, 64 if quick else 1000), seed)
    _, heldout = run.pairs()
    unseen, others = split_by_subject(heldout, [HELD_OUT])
    return [
        dict(part="subject", seed=seed, subject="held-out subject", accuracy=gold_accuracy(run, model, unseen)),
        dict(part="subject", seed=seed, subject="other subjects", accuracy=gold_accuracy(run, model, others)),
    ]


def limits_tax(seed, quick):
    """Measure what alignment costs elsewhere: the log-likelihood of held-out texts before and after PPO and DPO."""
    run = base(seed, quick)
    sft = run.load_network("sft")
    pairs = labelled(run, 64 if quick else 1000)
    ppo, _ = optimise(run, fit(run, pairs, seed), 0.1, 3 if quick else 24, seed)
    dpo = copy.deepcopy(sft).requires_grad_(True)
    config = replace(run.config, dpo_kind="dpo", dpo_beta=0.5, dpo_lr=2e-4, dpo_epochs=1, label_smoothing=0.0,
                     batch_size=8 if quick else 32)
    train_dpo(dpo, sft, pairs, pad_id(run.tokenizer), config, seed)

    texts = heldout_texts(run, seed, 32 if quick else 256)
    policies = dict(pretrained=run.load_network("pretrained"), sft=sft, ppo=ppo, dpo=dpo)
    rows = []
    for name, policy in policies.items():
        rows.append(dict(part="tax", seed=seed, policy=name, loglik=log_likelihood(policy, texts)))
    return rows


def heldout_texts(run, seed, T):
    """Make a Batch of T documents of the built-in world. Each is a response after E, as in pretraining."""
    rng = random.Random(seed + 1000)  # not the seed of the pretraining texts
    end = end_id(run.tokenizer)
    room = run.config.block_size - 1
    texts = []
    for _ in range(T):
        ids = run.tokenizer.encode_ordinary(world.make_document(rng))
        texts.append((ids + [end])[:room])
    return collate([[end]] * T, texts, pad_id(run.tokenizer))


@torch.no_grad()
def log_likelihood(policy, batch):
    """Compute the mean log-prob of a batch's response tokens, in nats a token."""
    return (response_logprobs(policy, batch).sum() / batch.mask.sum()).item()


# ---------------------------------------------------------------------------------------------------------------------
# the summary

def column(rows, name, **where):
    """Return one column of the selected rows."""
    return [row[name] for row in select(rows, **where)]


def summarise(rows, accuracy, coverage, subjects):
    """Make the rows of the table: what was measured, its mean over seeds and the standard error."""
    summary = []

    def add(part, what, mean_and_se):
        mean, se = mean_and_se
        summary.append(dict(part=part, what=what, value=mean, se=se))

    for (n, flip), mean_and_se in accuracy.items():
        add("labels", f"{n} labels, {flip:.0%} flipped", mean_and_se)
    for i, k in enumerate(subjects):
        for side in SIDES:
            add("coverage", f"{k} subjects labelled, {side} ones", coverage[side][i])
    for subject in TESTED_ON:
        add("accuracy", subject, mean_se(column(rows, "accuracy", subject=subject)))
    for policy in POLICIES:
        add("nats a token", policy, mean_se(column(rows, "loglik", policy=policy)))
    return summary


# ---------------------------------------------------------------------------------------------------------------------
# the verdicts

def means_of(pairs):
    return [mean for mean, _ in pairs]


def mean_difference(larger, smaller):
    """Compute mean and standard error over seeds of the difference of two columns."""
    return mean_se(a - b for a, b in zip(larger, smaller))


def judge_labels(sizes, by_size, flips, by_flip, small):
    up = spearman(sizes, means_of(by_size))
    down = spearman(flips, means_of(by_flip))
    why = f"Spearman of accuracy with labels {up:+.2f}, with flips {down:+.2f}"
    return "labels: " + ruled(small, up > 0.9 and down < -0.9, why)


def judge_coverage(rows, subjects, coverage, small):
    on_labelled = column(rows, "labelled", part="coverage", subjects=1)
    on_others = column(rows, "unlabelled", part="coverage", subjects=1)
    loss, error = mean_difference(on_labelled, on_others)
    wider = spearman(subjects, means_of(coverage["unlabelled"]))
    why = (f"labels on one subject: {loss:.3f} ± {error:.3f} less accurate on the others; "
           f"Spearman of that accuracy with the number of subjects {wider:+.2f}")
    return "coverage: " + ruled(small, loss > 2 * error and wider > 0.9, why)


def judge_subject(rows, small):
    others = column(rows, "accuracy", subject="other subjects")
    unseen = column(rows, "accuracy", subject="held-out subject")
    loss, error = mean_difference(others, unseen)
    why = f"{loss:.3f} ± {error:.3f} less accurate on the subject that no label and no demonstration is about"
    return "subject: " + ruled(small, loss > 2 * error, why)


def judge_tax(rows, small):
    sft = column(rows, "loglik", policy="sft")
    held = True
    texts = []
    for policy in ("ppo", "dpo"):
        cost, error = mean_difference(sft, column(rows, "loglik", policy=policy))
        if cost <= 2 * error:
            held = False
        texts.append(f"{policy} costs {cost:.3f} ± {error:.3f} nats a token")
    return "tax: " + ruled(small, held, "; ".join(texts))


# ---------------------------------------------------------------------------------------------------------------------
# the picture

def panel(title, xlabel, x, curves, xscale="linear"):
    """Plot accuracy against x; curves: {label: (mean, standard error) at each x}."""
    lines = []
    for label, pairs in curves.items():
        means, errors = zip(*pairs)
        lines.append(dict(label=label, x=x, y=means, yerr=errors))
    return dict(title=title, xlabel=xlabel, ylabel="accuracy against gold", xscale=xscale, lines=lines)
