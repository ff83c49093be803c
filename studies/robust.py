"""
Robust rewards: do rewards that know where they are unsure resist over-optimisation? See `robust`.

Letters: M prompts, N samples of a prompt, k members or heads, S seeds, W windows of iterations (for best-of-n:
values of n).
"""

import itertools
import math
from types import SimpleNamespace

import torch

from data import pad_id
from evaluate import best_of_n
from reward import score_batches
from robust import Ensemble, GaussianHeads, RobustReward, aggregate, robust_reward, train_brme
from studies.common import (
    base,
    curves_by_seed,
    fit_ensemble,
    labelled,
    mean_curve,
    optimise,
    peak_and_fall,
    powers,
    reference_samples,
    ruled,
    select,
    together,
    windows,
)
from studies.lab import mean_se, parallel, publish, table
from studies.robust_exact import robust_exact

FLIPS = (0.0, 0.25)  # shares of wrong labels
NOISY = 0.25  # where the criteria apply
BRME = {"brme 1.0": 1.0, "brme 0.6": 0.6, "brme 0.2": 0.2, "brme 0.0": 0.0}  # reward -> lambda
BON_REWARDS = ("single", "mean", "wco", "uwo", *BRME)
PPO_REWARDS = {0.0: ("single", "wco", "uwo"), 0.25: ("single", "mean", "wco", "uwo", "brme 1.0", "brme 0.2")}
PPO_QUICK_REWARDS = {0.0: ("single",), 0.25: ("single", "wco")}
ENSEMBLES = ("wco", "uwo")  # what the criteria compare with the single model
COLUMNS = ["optimiser", "flipped", "reward", "peak", "end", "end_se", "fall", "fall_se", "end-single", "its se",
           "fluctuation"]
TRAP_COLUMNS = ["loss", "flipped", "std", "std_se", "error", "error_se"]


def robust(seeds, quick, out):
    """
    Question: does a reward that knows its own uncertainty resist over-optimisation?

    Claims: an ensemble's minimum (WCO) or mean minus variance (UWO) gives more gold than a single reward model and
    falls less, above all with 25% wrong labels (Coste et al. 2024, arXiv:2310.02743). A mixture of the nominal
    reward and the worst case over heads is more stable at the end of long PPO than the nominal one (Yan et al.
    2024, arXiv:2409.15360). Where all members share an error, no ensemble helps (Eisenstein et al. 2023).

    Criteria, with 25% flipped labels:
    - best of n: at the largest n both WCO and UWO have more gold than the average single model, by more than 2
      standard errors over seeds. They also fall less from their peaks. If the single model does not fall by more
      than 2 standard errors, there is nothing to resist and no verdict on the fall.
    - PPO: the same at the end of a run with beta 0, where the single model is the first of the ensemble.
    - BRME: lambda 0.2 ends PPO with more gold than lambda 1, by more than 2 standard errors.
    - control: on the exact table where the members share their error, the ensemble gains nothing. See robust_exact.

    The verdict is that of best of n and PPO together. The table of 8 x 8 cells is reported below it.
    """
    small = quick or seeds < 3
    ppo_rewards = PPO_QUICK_REWARDS if quick else PPO_REWARDS
    rows = run_jobs(seeds, quick, ppo_rewards)

    bon_summary = summarise_all(rows, seeds, "best of n", dict.fromkeys(FLIPS, BON_REWARDS))
    ppo_summary = summarise_all(rows, seeds, "ppo", ppo_rewards)
    trap = [summarise_trap(rows, loss, flip) for flip in FLIPS for loss in ("mse", "nll")]
    _, exact_text = robust_exact(None, quick, out / "exact")

    bon_held, bon_verdicts = judge_ensembles(bon_summary, "best of n", small)
    ppo_held, ppo_verdicts = judge_ensembles(ppo_summary, "ppo", small)
    held = together(bon_held + ppo_held)
    verdicts = [ruled(small, held, "best of n and PPO with 25% flipped labels, all of the four below")]
    verdicts += bon_verdicts + ppo_verdicts
    if not quick:  # a quick pass has no BRME in PPO
        verdicts.append(judge_brme(rows, seeds, small))
    verdicts.append(describe_trap(trap))

    text = "\n\n".join([table(bon_summary + ppo_summary, COLUMNS), table(trap, TRAP_COLUMNS), exact_text])
    return publish(out, rows, text, verdicts, draw(bon_summary, "best of n") + draw(ppo_summary, "ppo"))


# ---------------------------------------------------------------------------------------------------------------------
# jobs

def run_jobs(seeds, quick, ppo_rewards):
    """Run every setting for every seed. Best of n comes first: it leaves the rewards that PPO loads."""
    bon_jobs = [(seed, quick, flip) for flip in FLIPS for seed in range(seeds)]
    ppo_jobs = [(seed, quick, flip, how) for flip in FLIPS for how in ppo_rewards[flip] for seed in range(seeds)]
    results = parallel(robust_bon, bon_jobs) + parallel(robust_ppo, ppo_jobs)
    return list(itertools.chain.from_iterable(results))


def rewards_path(run, flip):
    return run.folder / f"robust-{flip}.pt"


def robust_bon(seed, quick, flip):
    """
    Choose the best of n SFT samples by each reward. Returns one row for each reward and n, and two for the trap.

    All rewards score the same samples. The members and heads are left in the base run's folder for robust_ppo.
    """
    run = base(seed, quick)
    M, N = (8, 16) if quick else (48, 128)
    pairs = labelled(run, 64 if quick else 400, seed, flip)
    members = fit_ensemble(run, pairs, 2 if quick else 5, seed)
    mse_heads, mse_rows = fit_heads(run, members[0], pairs, seed, "mse", quick)
    heads, nll_rows = fit_heads(run, members[0], pairs, seed, "nll", quick)
    torch.save((members, heads), rewards_path(run, flip))

    rollouts, gold = reference_samples(run, M, N, seed)                                       # gold (M, N)
    scores = torch.stack([score_batches(model, rollouts) for model in members])               # (k, M N)
    means, stds = head_outputs(heads, rollouts)                                               # (k, M N) each
    rows = [trap_row(seed, flip, "mse", mse_rows), trap_row(seed, flip, "nll", nll_rows)]
    for how in BON_REWARDS:
        proxies = reward_scores(how, scores, means, stds)
        for n in powers(N):
            golds = [best_of_n(proxy.view(M, N), gold, n).mean().item() for proxy in proxies]
            rows.append(dict(study="best of n", seed=seed, flip=flip, how=how, n=n, gold=sum(golds) / len(golds)))
    return rows


def fit_heads(run, reward_model, pairs, seed, loss, quick):
    """Fit BRME's five heads on a copy of the reward model's trunk. Returns (heads, logged rows)."""
    torch.manual_seed(seed)  # of the first weights of the heads
    heads = GaussianHeads(reward_model.trunk, 5).requires_grad_(True)
    config = SimpleNamespace(reward_epochs=1 if quick else 4, batch_size=32, reward_lr=1e-3, weight_decay=0.1)
    rows = []

    def log(**row):
        rows.append(row)

    train_brme(heads, reward_model, pairs, pad_id(run.tokenizer), loss, 0.6, config, seed, log=log)
    return heads.requires_grad_(False), rows


def trap_row(seed, flip, loss, logged):
    """Average what the heads' training logged over its last ten steps: their std, and the error of their means."""
    last = logged[-10:]
    std = sum(row["std"] for row in last) / len(last)
    error = sum(row["error"] for row in last) / len(last)
    return dict(study="trap", seed=seed, flip=flip, how=loss, std=std, error=error)


@torch.no_grad()
def head_outputs(heads, rollouts):
    """Compute means and stds of all heads for all responses, (k, M N) each."""
    outputs = [heads(rollout) for rollout in rollouts]
    means, stds = zip(*outputs)
    return torch.cat(means, dim=1), torch.cat(stds, dim=1)


def reward_scores(how, scores, means, stds):
    """Compute the scores of one reward, (1, M N). For the single model: of each member on its own, (k, M N)."""
    if how == "single":
        return scores
    if how in BRME:
        return robust_reward(means, stds, BRME[how])[None]
    return aggregate(scores, how)[None]


def robust_ppo(seed, quick, flip, how):
    """Train with PPO, for long and with beta 0, on one of the rewards. Returns one row for each window."""
    run = base(seed, quick)
    members, heads = torch.load(rewards_path(run, flip), weights_only=False)
    if how == "single":
        reward_model = members[0]
    elif how in BRME:
        reward_model = RobustReward(heads, BRME[how])
    else:
        reward_model = Ensemble(members, how)
    _, logged = optimise(run, reward_model, 0.0, 4 if quick else 18, seed, lr=3e-4, critic=members[0])
    size = 1 if quick else 3
    golds = windows(logged, "gold", size)
    kls = windows(logged, "kl", size)
    rows = []
    for w, (gold, kl) in enumerate(zip(golds, kls)):
        d = math.sqrt(max(kl, 0.0))  # rounding can make a KL of 0 negative
        rows.append(dict(study="ppo", seed=seed, flip=flip, how=how, n=w, gold=gold, d=d))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# the summary

def summarise_all(rows, seeds, study, rewards):
    """Summarise the curves of one optimiser; rewards: {share of flips: the rewards that were optimised}."""
    summary = []
    for flip, hows in rewards.items():
        for how in hows:
            summary.append(summarise(rows, seeds, study, flip, how))
    return summary


def summarise(rows, seeds, study, flip, how):
    """Summarise the curves of one setting as a row of the table. It also keeps the mean curve, for the picture."""
    curves = curves_by_seed(rows, "gold", seeds, study=study, flip=flip, how=how)             # (S, W)
    mean, mean_error = mean_curve(curves)                                                     # (W,) each
    peak, fall, fall_se = peak_and_fall(curves)
    single = curves_by_seed(rows, "gold", seeds, study=study, flip=flip, how="single")
    gain, gain_se = mean_gain(curves, single)
    x = [row["n"] for row in select(rows, study=study, flip=flip, how=how, seed=0)]
    row = {"optimiser": study, "flipped": flip, "reward": how, "peak": mean[peak], "end": mean[-1],
           "end_se": mean_error[-1], "fall": fall, "fall_se": fall_se, "end-single": gain, "its se": gain_se,
           "fluctuation": fluctuation(curves)}
    return dict(row, x=x, gold=mean, gold_se=mean_error)


def mean_gain(curves, others):
    """Compute by how much the curves (S, W) end above the others, seed by seed: (mean, standard error)."""
    return mean_se(curve[-1] - other[-1] for curve, other in zip(curves, others))


def fluctuation(curves):
    """Compute how far gold jumps from one window to the next in the second half of the curves (S, W), on average."""
    jumps = []
    for curve in curves:
        late = curve[len(curve) // 2:]
        jumps += [abs(after - before) for before, after in itertools.pairwise(late)]
    return mean_se(jumps)[0]


def summarise_trap(rows, loss, flip):
    """Summarise the training of the heads under one loss as a row of the second table."""
    selected = select(rows, study="trap", how=loss, flip=flip)
    std, std_se = mean_se(row["std"] for row in selected)
    error, error_se = mean_se(row["error"] for row in selected)
    return dict(loss=loss, flipped=flip, std=std, std_se=std_se, error=error, error_se=error_se)


# ---------------------------------------------------------------------------------------------------------------------
# the verdicts

def judge_ensembles(summary, study, small):
    """Compare the ensembles with the single model, with wrong labels. Returns ([end held, fall held], two verdicts)."""
    noisy = select(summary, flipped=NOISY)
    single = select(noisy, reward="single")[0]
    ensembles = [row for row in noisy if row["reward"] in ENSEMBLES]
    ends = all(row["end-single"] > 2 * row["its se"] for row in ensembles)
    falls = None  # if the single model does not fall, there is nothing to resist
    if single["fall"] > 2 * single["fall_se"]:
        falls = all(row["fall"] < single["fall"] for row in ensembles)

    end_texts = []
    fall_texts = [f"single falls {single['fall']:.2f} ± {single['fall_se']:.2f}"]
    for row in ensembles:
        end_texts.append(f"{row['reward']} ends {row['end-single']:+.2f} ± {row['its se']:.2f} from single")
        fall_texts.append(f"{row['reward']} {row['fall']:.2f}")
    verdicts = [f"{study}, end: " + ruled(small, ends, "; ".join(end_texts)),
                f"{study}, fall: " + ruled(small, falls, ", ".join(fall_texts))]
    return [ends, falls], verdicts


def judge_brme(rows, seeds, small):
    """Compare PPO on lambda 0.2 with PPO on lambda 1, with wrong labels."""
    cautious = curves_by_seed(rows, "gold", seeds, study="ppo", flip=NOISY, how="brme 0.2")
    nominal = curves_by_seed(rows, "gold", seeds, study="ppo", flip=NOISY, how="brme 1.0")
    gain, gain_se = mean_gain(cautious, nominal)
    return "BRME: " + ruled(small, gain > 2 * gain_se, f"lambda 0.2 ends {gain:+.2f} ± {gain_se:.2f} from lambda 1")


def describe_trap(trap):
    """Say how the heads' std compares with their error, under both losses."""
    ratio = {row["loss"]: row["std"] / row["error"] for row in select(trap, flipped=NOISY)}
    return (f"trap: under MSE the heads' std ends at {ratio['mse']:.2f} of their error, "
            f"under the likelihood at {ratio['nll']:.2f}")


# ---------------------------------------------------------------------------------------------------------------------
# the picture

def draw(summary, study):
    """Make the panels of one optimiser, one for each share of flips."""
    panels = []
    for flip in FLIPS:
        lines = []
        for row in select(summary, flipped=flip):
            lines.append(dict(label=row["reward"], x=row["x"], y=row["gold"], yerr=row["gold_se"]))
        panel = dict(title=f"{study}, {flip:.0%} flipped", ylabel="gold", lines=lines)
        if study == "ppo":
            panel.update(xlabel="window of iterations", xscale="linear")
        else:
            panel.update(xlabel="n", xscale="log")
        panels.append(panel)
    return panels
