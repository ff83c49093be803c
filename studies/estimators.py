"""
Learning without a critic: PPO, RLOO, GRPO and Dr. GRPO on the same episodes, and best-of-n distilled. See `estimators`.

Letters: M prompts, n samples of a prompt.
"""

import copy
import itertools
import time
from dataclasses import replace

import torch

from evaluate import optimum, sample_policy
from pipeline.scores import make_scorer
from reward import score_batches
from sft import train_sft
from studies import common
from studies.lab import Claim, column, judge, mean_se, paired, panel, parallel, publish, select, table

REWARDS = ("model", "gold")
METHODS = ("ppo", "rloo", "grpo", "dr_grpo")
GROUP = 4
COLUMNS = ["reward", "method", "share", "share_se", "kl", "seconds"]


def estimators(seeds, quick, out):
    """
    Question: what does a critic buy, and what do group baselines cost, at equal episodes and at equal seconds?

    Claims and criteria: docs/studies.md#estimators. GRPO and Dr. GRPO are as published: the KL is in the loss, and GRPO
    weighs a token by 1 / length of its response. A policy trains for a quarter of the default run's episodes. Seconds
    are processor time, so that jobs that run at once do not disturb each other.
    """
    jobs = [(seed, quick, reward, method) for reward in REWARDS for method in METHODS for seed in range(seeds)]
    curves = list(itertools.chain(*parallel(curve_job, jobs, out)))
    by_seed = [(seed, quick) for seed in range(seeds)]
    distilled = list(itertools.chain(*parallel(rejection_job, by_seed, out)))

    summary = [summarise(curves, reward, method) for reward in REWARDS for method in METHODS]
    panels = [panel(f"reward: {reward}", select(curves, reward=reward), "window", "share", "method")
              for reward in REWARDS]
    verdicts = judge(make_claims(curves, distilled), quick)
    text = table(summary, COLUMNS) + "\n\n" + table(distilled, ["seed", "pick", "score", "score_se", "gold", "kl"])
    return publish(out, curves + distilled, text, verdicts, panels)


# ---- jobs -----------------------------------------------------------------------------------------

def curve_job(seed, quick, reward, method):
    """Train one policy. Returns a row for each window: share of the optimum, KL, and the seconds at its end."""
    run = common.base(seed, quick)
    run.config = replace(run.config, reward_from=reward)
    scorer, beta = make_scorer(run), run.config.beta
    iterations, batch, size = (4, 64, 2) if quick else (30, 128, 5)
    started = time.process_time()  # of this process: other jobs that run now do not count
    _, logged = common.optimise(run, scorer, seed, method, critic=run.load_network("reward"), ppo_iterations=iterations,
                                ppo_batch=batch, group=GROUP)
    per_iteration = (time.process_time() - started) / iterations

    M, n = (16, 8) if quick else (256, 32)
    rollouts, gold = common.reference_samples(run, M, n, seed)                                # gold (M, n)
    scores = gold if reward == "gold" else score_batches(scorer, rollouts)
    start, best = scores.mean().item(), optimum(scores, beta).objective
    rows = []
    for window in common.windows(logged, size):
        end = min((window["window"] + 1) * size, iterations)
        rows.append(dict(study="curve", seed=seed, reward=reward, method=method, window=window["window"],
                         kl=window["kl"], share=(window["objective"] - start) / (best - start),
                         seconds=end * per_iteration))
    return rows


def rejection_job(seed, quick):
    """SFT on the best of n answers by score, and its control: SFT on a random one of the same n. Returns two rows."""
    run = common.base(seed, quick)
    config, sft, reward_model = run.config, run.load_network("sft"), run.load_network("reward")
    M, n, steps = (16, 4, 4) if quick else (1024, 8, 64)
    prompts = [prompt for prompt in run.prompts[0][:M] for _ in range(n)]
    rollouts = list(sample_policy(sft, prompts, config.response_tokens, config.temperature, seed))
    responses = common.response_lists(rollouts)
    scores = score_batches(reward_model, rollouts).view(M, n)
    picks = {"best": scores.argmax(dim=1),
             "random": torch.randint(n, (M,), generator=torch.Generator().manual_seed(seed))}  # (M,) each
    settings = replace(config, sft_steps=steps, sft_lr=config.sft_lr / 4)
    rows = []
    for pick, places in picks.items():
        examples = [(prompts[i * n], responses[i * n + place]) for i, place in enumerate(places.tolist())]
        policy = copy.deepcopy(sft).requires_grad_(True)
        for _ in train_sft(policy, examples, settings, seed):
            pass
        row = common.judge(run, policy, sft, 32 if quick else 512, seed, reward_model)
        rows.append(dict(study="rejection", seed=seed, pick=pick, **row))
    return rows


# ---- summary and criteria -------------------------------------------------------------------------

def windows_of(curves, reward, method):
    """The windows of one method, a list for each seed."""
    chosen = select(curves, reward=reward, method=method)
    return [select(chosen, seed=seed) for seed in sorted(set(column(chosen, "seed")))]


def ends(curves, reward, method):
    """The share of the optimum in the last window, one for each seed."""
    return [windows[-1]["share"] for windows in windows_of(curves, reward, method)]


def halves(curves, reward, method):
    """The share of the optimum when PPO had spent half of its seconds, one for each seed."""
    ppo = windows_of(curves, reward, "ppo")
    return [share_at(windows, other[-1]["seconds"] / 2)
            for windows, other in zip(windows_of(curves, reward, method), ppo, strict=True)]


def share_at(windows, seconds):
    """The share of the last window that had ended by then, and of the first one before that."""
    ended = [window["share"] for window in windows if window["seconds"] <= seconds]
    return ended[-1] if ended else windows[0]["share"]


def summarise(curves, reward, method):
    last = [windows[-1] for windows in windows_of(curves, reward, method)]
    share, share_se = mean_se(column(last, "share"))
    return dict(reward=reward, method=method, share=share, share_se=share_se, kl=mean_se(column(last, "kl"))[0],
                seconds=mean_se(column(last, "seconds"))[0])


def make_claims(curves, distilled):
    """The criteria, as claims about one number for each seed."""
    claims = []
    for reward in REWARDS:
        for name, measure, a, b, spare in (("episodes: RLOO less than 0.05 below PPO", ends, "rloo", "ppo", 0.05),
                                           ("seconds: RLOO above PPO", halves, "rloo", "ppo", 0.0),
                                           ("bias: Dr. GRPO above GRPO", ends, "dr_grpo", "grpo", 0.0)):
            gains = paired(measure(curves, reward, a), measure(curves, reward, b))
            claims.append(Claim(f"{reward}, {name}", [gain + spare for gain in gains]))
    best, random = [column(distilled, "score", pick=pick) for pick in ("best", "random")]
    return [*claims, Claim("rejection: the best of n above a random one", paired(best, random))]
