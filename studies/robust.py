"""
Robust rewards: do rewards that know where they are unsure resist over-optimisation? See `robust`.

Letters: M prompts, N samples of a prompt, k members or heads, S seeds, W windows of iterations (for best-of-n:
values of n).
"""

import itertools
from dataclasses import replace

import torch

from evaluate import best_of_n
from reward import score_batches
from robust import Ensemble, GaussianHeads, RobustReward, aggregate, robust_reward, train_brme
from studies import common
from studies.common import curves_by_seed
from studies.lab import column, difference, mean_se, parallel, publish, select, table, together, verdict
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

    The verdict is about best of n and PPO together. The table of 8 x 8 cells is reported below it.
    """
    small = quick or seeds < 3
    ppo_rewards = PPO_QUICK_REWARDS if quick else PPO_REWARDS
    rows = run_jobs(seeds, quick, ppo_rewards)

    bon = summarise_all(rows, seeds, "best of n", dict.fromkeys(FLIPS, BON_REWARDS))
    ppo = summarise_all(rows, seeds, "ppo", ppo_rewards)
    trap = [summarise_trap(rows, loss, flip) for flip in FLIPS for loss in ("mse", "nll")]
    _, exact_text = robust_exact(None, quick, out / "exact")

    bon_held, bon_verdicts = judge_ensembles(bon, "best of n", small)
    ppo_held, ppo_verdicts = judge_ensembles(ppo, "ppo", small)
    why = "best of n and PPO with 25% flipped labels, all of the four below"
    verdicts = [verdict(small, together(bon_held + ppo_held), why), *bon_verdicts, *ppo_verdicts]
    if not quick:  # a quick pass has no BRME in PPO
        verdicts.append(judge_brme(rows, seeds, small))
    verdicts.append(describe_trap(trap))
    text = "\n\n".join([table(bon + ppo, COLUMNS), table(trap, TRAP_COLUMNS), exact_text])
    return publish(out, rows, text, verdicts, draw(bon, "best of n", "n", "log")
                   + draw(ppo, "ppo", "window of iterations", "linear"))


# ---- jobs -----------------------------------------------------------------------------------------

def run_jobs(seeds, quick, ppo_rewards):
    """Run every setting for every seed. Best of n comes first: it leaves the rewards that PPO loads."""
    bon_jobs = [(seed, quick, flip) for flip in FLIPS for seed in range(seeds)]
    ppo_jobs = [(seed, quick, flip, how) for flip in FLIPS for how in ppo_rewards[flip] for seed in range(seeds)]
    return list(itertools.chain(*parallel(robust_bon, bon_jobs), *parallel(robust_ppo, ppo_jobs)))


def rewards_path(run, flip):
    return run.folder / f"robust-{flip}.pt"


def robust_bon(seed, quick, flip):
    """
    Choose the best of n SFT samples by each reward. Returns one row for each reward and n, and two for the trap.

    All rewards score the same samples. The members and heads are left in the base run's folder for robust_ppo.
    """
    run = common.base(seed, quick)
    M, N = (8, 16) if quick else (48, 128)
    pairs = common.labelled(run, 64 if quick else 400, seed, flip)
    members = common.fit_ensemble(run, pairs, 2 if quick else 5, seed)
    fitted = {loss: fit_heads(run, members[0], pairs, seed, loss, 1 if quick else 4) for loss in ("mse", "nll")}
    heads = fitted["nll"][0]
    torch.save((members, heads), rewards_path(run, flip))
    rows = [dict(study="trap", seed=seed, flip=flip, how=loss, **last_steps(logged))
            for loss, (_, logged) in fitted.items()]

    rollouts, gold = common.reference_samples(run, M, N, seed)                                # gold (M, N)
    scores = torch.stack([score_batches(model, rollouts) for model in members])               # (k, M N)
    means, stds = head_outputs(heads, rollouts)                                               # (k, M N) each
    for how in BON_REWARDS:
        proxies = reward_scores(how, scores, means, stds)
        for n in common.powers(N):
            golds = [best_of_n(proxy.view(M, N), gold, n).mean().item() for proxy in proxies]
            rows.append(dict(study="best of n", seed=seed, flip=flip, how=how, n=n, gold=sum(golds) / len(golds)))
    return rows


def fit_heads(run, reward_model, pairs, seed, loss, epochs):
    """Fit BRME's five heads on a copy of the reward model's trunk. Returns (heads, logged rows)."""
    torch.manual_seed(seed)  # of the first weights of the heads
    heads = GaussianHeads(reward_model.trunk, 5).requires_grad_(True)
    config = replace(run.config, reward_epochs=epochs, reward_batch=32, reward_lr=1e-3, weight_decay=0.1)
    logged = [metrics for metrics, _ in train_brme(heads, reward_model, pairs, loss, 0.6, config, seed)]
    return heads.requires_grad_(False), logged


def last_steps(logged):
    """The std of the heads and the error of their means, averaged over the last ten steps of their training."""
    return {name: sum(column(logged[-10:], name)) / len(logged[-10:]) for name in ("std", "error")}


@torch.no_grad()
def head_outputs(heads, rollouts):
    """Means and stds of all heads for all responses, (k, M N) each."""
    means, stds = zip(*[heads(rollout) for rollout in rollouts])
    return torch.cat(means, dim=1), torch.cat(stds, dim=1)


def reward_scores(how, scores, means, stds):
    """The scores of one reward, (1, M N). For the single model: of each member on its own, (k, M N)."""
    if how == "single":
        return scores
    if how in BRME:
        return robust_reward(means, stds, BRME[how])[None]
    return aggregate(scores, how)[None]


def robust_ppo(seed, quick, flip, how):
    """Train with PPO, for long and with beta 0, on one of the rewards. Returns one row for each window."""
    run = common.base(seed, quick)
    members, heads = torch.load(rewards_path(run, flip), weights_only=False)
    if how == "single":
        reward_model = members[0]
    else:
        reward_model = RobustReward(heads, BRME[how]) if how in BRME else Ensemble(members, how)
    _, logged = common.optimise(run, reward_model, seed, critic=members[0], beta=0.0,
                                ppo_iterations=4 if quick else 18, ppo_lr=3e-4)
    where = dict(study="ppo", seed=seed, flip=flip, how=how)
    return [dict(where, n=row["window"], gold=row["gold"], d=row["d"])
            for row in common.windows(logged, 1 if quick else 3)]


# ---- the summary ----------------------------------------------------------------------------------

def summarise_all(rows, seeds, study, rewards):
    """Summarise the curves of one optimiser; rewards: {share of flips: the rewards that were optimised}."""
    return [summarise(rows, seeds, study, flip, how) for flip, hows in rewards.items() for how in hows]


def summarise(rows, seeds, study, flip, how):
    """The curves of one setting as a row of the table. It also keeps the mean curve, for the picture."""
    curves = curves_by_seed(rows, "gold", seeds, study=study, flip=flip, how=how)             # (S, W)
    mean, mean_error = common.mean_curve(curves)                                              # (W,) each
    peak, fall, fall_se = common.peak_and_fall(curves)
    gain, gain_se = gain_at_end(rows, seeds, study, flip, how, "single")
    return {"optimiser": study, "flipped": flip, "reward": how, "peak": mean[peak], "end": mean[-1],
            "end_se": mean_error[-1], "fall": fall, "fall_se": fall_se, "end-single": gain, "its se": gain_se,
            "fluctuation": fluctuation(curves), "gold": mean, "gold_se": mean_error,
            "x": column(rows, "n", study=study, flip=flip, how=how, seed=0)}


def gain_at_end(rows, seeds, study, flip, how, other):
    """By how much gold ends above another reward's, seed by seed: (mean, standard error)."""
    return difference(*[[curve[-1] for curve in curves_by_seed(rows, "gold", seeds, study=study, flip=flip, how=reward)]
                        for reward in (how, other)])


def fluctuation(curves):
    """How far gold jumps from one window to the next in the second half of the curves (S, W), on average."""
    halves = [curve[len(curve) // 2:] for curve in curves]
    return mean_se(abs(after - before) for late in halves for before, after in itertools.pairwise(late))[0]


def summarise_trap(rows, loss, flip):
    """The training of the heads under one loss as a row of the second table."""
    std, std_se = mean_se(column(rows, "std", study="trap", how=loss, flip=flip))
    error, error_se = mean_se(column(rows, "error", study="trap", how=loss, flip=flip))
    return dict(loss=loss, flipped=flip, std=std, std_se=std_se, error=error, error_se=error_se)


# ---- the verdicts ---------------------------------------------------------------------------------

def judge_ensembles(summary, study, small):
    """Compare the ensembles with the single model, with wrong labels. Returns ([end held, fall held], two verdicts)."""
    noisy = {row["reward"]: row for row in select(summary, flipped=NOISY)}
    single, ensembles = noisy["single"], [noisy[how] for how in ENSEMBLES if how in noisy]
    ends = all(row["end-single"] > 2 * row["its se"] for row in ensembles)
    falls = None  # if the single model does not fall, there is nothing to resist
    if single["fall"] > 2 * single["fall_se"]:
        falls = all(row["fall"] < single["fall"] for row in ensembles)

    why_ends = "; ".join(f"{row['reward']} ends {row['end-single']:+.2f} ± {row['its se']:.2f} from single"
                         for row in ensembles)
    why_falls = ", ".join([f"single falls {single['fall']:.2f} ± {single['fall_se']:.2f}",
                           *[f"{row['reward']} {row['fall']:.2f}" for row in ensembles]])
    return [ends, falls], [f"{study}, end: " + verdict(small, ends, why_ends),
                           f"{study}, fall: " + verdict(small, falls, why_falls)]


def judge_brme(rows, seeds, small):
    """Compare PPO on lambda 0.2 with PPO on lambda 1, with wrong labels."""
    gain, gain_se = gain_at_end(rows, seeds, "ppo", NOISY, "brme 0.2", "brme 1.0")
    return "BRME: " + verdict(small, gain > 2 * gain_se, f"lambda 0.2 ends {gain:+.2f} ± {gain_se:.2f} from lambda 1")


def describe_trap(trap):
    """Say how the heads' std compares with their error, under both losses."""
    ratio = {row["loss"]: row["std"] / row["error"] for row in select(trap, flipped=NOISY)}
    return (f"trap: under MSE the heads' std ends at {ratio['mse']:.2f} of their error, "
            f"under the likelihood at {ratio['nll']:.2f}")


# ---- the picture ----------------------------------------------------------------------------------

def draw(summary, study, xlabel, xscale):
    """The panels of one optimiser, one for each share of flips."""
    panels = []
    for flip in FLIPS:
        lines = [dict(label=row["reward"], x=row["x"], y=row["gold"], yerr=row["gold_se"])
                 for row in select(summary, flipped=flip)]
        panels.append(dict(title=f"{study}, {flip:.0%} flipped", xlabel=xlabel, ylabel="gold", xscale=xscale,
                           lines=lines))
    return panels
