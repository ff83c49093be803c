"""
Race to the optimum: how many seconds does PPO need, here and in TRL?

    python minirlhf.py --out runs/race
    python -m bench.race runs/race --peers ~/trlenv/bin/python      (the environment of speed.py; half an hour)

Both sides start from the run's SFT policy, with its reward model, prompts, beta, batch and number of iterations. Both
maximise score - beta KL, the objective, estimated from each rollout before its updates.

The share of an iteration is how much of the way from the SFT policy to the optimum (report.json) the mean of the last
five objectives has covered. A goal is reached at the first iteration with that share. The time is the number of
iterations times the median seconds of one. Progress is slow from 0.8 to 0.9, and there chance decides over ten
iterations and more. So 0.80 is the more reliable goal, and one run of one seed is only that.

This side runs the settings of the run, once before TRL and once after it. TRL runs the same number of updates per
rollout, and also its own default of four epochs without minibatches, with three learning rates each. A setting is
stopped once it has reached the last goal, or has taken longer than TRL's best so far. TRL keeps two things of its own:
one learning rate for policy and critic, and no clipping of gradients.
"""

import argparse
import copy
import json
import math
import sys
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from tqdm import tqdm

from bench.gpt2 import peer_sizes, peer_weights
from bench.worker import ask, start_worker
from data import UserError, end_id, pad_id
from pipeline.config import Config, read_saved
from pipeline.run import Run
from ppo import train_ppo

GOALS = (0.80, 0.90)
WINDOW = 5  # objectives in a mean


class Step(NamedTuple):
    """One iteration of PPO."""
    seconds: float
    objective: float


class Scale(NamedTuple):
    """The objectives of the SFT policy and of the optimum: a share of 0 and a share of 1."""
    sft: float
    optimum: float


# ---- when a goal is reached ------------------------------------------------------------------------------------------

def shares(objectives, scale):
    """Return the share of each iteration; 0 until there are five objectives to average."""
    result = []
    for i in range(1, len(objectives) + 1):
        if i < WINDOW:
            result.append(0.0)
        else:
            mean = sum(objectives[i - WINDOW:i]) / WINDOW
            result.append((mean - scale.sft) / (scale.optimum - scale.sft))
    return result


def arrival(steps, goal, scale):
    """Return (iterations, seconds) until the goal, or None when the steps do not reach it."""
    objectives = [step.objective for step in steps]
    for iterations, share in enumerate(shares(objectives, scale), start=1):
        if share >= goal:
            return iterations, iterations * median(step.seconds for step in steps)
    return None


def arrival_seconds(steps, goal, scale):
    """Return the seconds until the goal; infinity when the steps do not reach it."""
    found = arrival(steps, goal, scale)
    return found[1] if found else math.inf


def total_seconds(steps):
    return sum(step.seconds for step in steps)


# ---- both sides ------------------------------------------------------------------------------------------------------

def reward_weights(model):
    """
    Return the weights of a reward model as a state dict of Hugging Face's GPT2ForSequenceClassification.

    Its score is a product with a weight w, without bias and normalisation. So w takes the scale, and the bias of the
    last norm takes the offset: moved by offset * w / |w|^2, it changes the score by the offset.
    """
    weights = peer_weights(model.trunk)
    del weights["lm_head.weight"]
    w = (model.score.weight / model.std).detach().cpu()                                       # (1, C)
    offset = ((model.score.bias - model.mean) / model.std).detach().cpu()                     # (1,)
    weights["score.weight"] = w
    weights["transformer.ln_f.bias"] = weights["transformer.ln_f.bias"] + offset * w[0] / w.square().sum()
    return weights


def run_here(run):
    """Run PPO as minirlhf.py does. Returns its steps."""
    steps = []

    def log(**row):
        steps.append(Step(row["seconds"], row["objective"]))

    sft = run.load_network("sft")
    policy = copy.deepcopy(sft).requires_grad_(True)
    reward_model = run.load_network("reward")
    critic = copy.deepcopy(reward_model).requires_grad_(True)
    prompts, _ = run.prompts()
    train_ppo(policy, critic, sft, reward_model, prompts, run.config, run.config.seed + 4, log)
    return steps


def trl_setup(run, lr):
    """Return what peers.py needs to start where we start."""
    sft = run.load_network("sft")
    prompts, _ = run.prompts()
    copies = math.ceil(run.config.ppo_batch / len(prompts))  # TRL needs at least one batch of prompts
    return dict(weights=peer_weights(sft), reward_weights=reward_weights(run.load_network("reward")),
                sizes=peer_sizes(sft.config), prompts=prompts * copies, end=end_id(run.tokenizer),
                pad=pad_id(run.tokenizer), cap=run.config.response_tokens, lr=lr, device=run.device.type,
                threads=torch.get_num_threads())


def run_trl(run, python, name, lr, epochs, minibatches, is_done):
    """Run TRL's PPO until is_done(steps), the last iteration, or an error. Returns its steps."""
    config = run.config
    settings = dict(kl_coef=config.beta, gamma=config.gamma, lam=config.lam, cliprange=config.clip,
                    cliprange_value=config.value_clip, temperature=config.temperature,
                    adam_beta2=0.99, adam_epsilon=1e-5)
    steps = []
    with start_worker(python, "peers.py", trl_setup(run, lr)) as worker:
        answer = ask(worker, task="ppo", batch=config.ppo_batch, epochs=epochs, minibatches=minibatches,
                     settings=settings, steps=config.ppo_iterations)
        bar = tqdm(total=config.ppo_iterations, desc=name, unit="it", leave=False)
        while "error" not in answer and len(steps) < config.ppo_iterations and not is_done(steps):
            answer = ask(worker)
            if "error" not in answer:
                steps.append(Step(answer["seconds"], answer["objective"]))
                bar.update()
        bar.close()
    if "error" in answer:
        print(f"{name}: {answer['error']}")
        if not steps:
            sys.exit(1)
    return steps


def need_trl(python):
    """End the program when the interpreter has no TRL: better before our own runs than after them."""
    with start_worker(python, "peers.py", dict(threads=1, device="cpu")) as worker:
        if worker.versions.get("trl"):
            return
        reason = "it lacks trl" if worker.versions else worker.last_line()
    sys.exit(f"--peers {python}: {reason}; pip install torch transformers==4.57.1 trl==0.24.0 datasets accelerate")


# ---- the report ------------------------------------------------------------------------------------------------------

def print_head(config, device, scale):
    print(f"objective {scale.sft:.2f} of SFT, {scale.optimum:.2f} of the optimum; "
          f"at most {config.ppo_iterations} rollouts of {config.ppo_batch}; "
          f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    goals = "".join(f"{f'to {goal:.2f}':>24}" for goal in GOALS)
    print(f"{'':<36}{goals}{'s an iteration':>16}")


def print_row(name, steps, config, scale):
    text = f"{name:<36}"
    for goal in GOALS:
        found = arrival(steps, goal, scale)
        if found:
            cell = f"{found[0]} iterations {found[1]:.0f} s"
        elif len(steps) == config.ppo_iterations:
            cell = "not reached"
        else:
            cell = f"not in {total_seconds(steps):.0f} s"  # stopped
        text += f"{cell:>24}"
    pace = median(step.seconds for step in steps) if steps else math.nan
    print(f"{text}{pace:>16.2f}", flush=True)


def load_run(folder, parser):
    """Return the finished run in a folder, and its Scale. Ends the program when there is none."""
    try:
        saved = read_saved(folder)
        report = json.loads((folder / "report.json").read_text())
    except (UserError, OSError, ValueError):
        parser.error(f"{folder} is not a finished run: python minirlhf.py --out {folder}")
    config = Config(**dict(saved, out=str(folder)))
    if not report["optimum"]:
        parser.error(f"{folder} has no optimum, because it was made with --beta 0")
    if config.ppo_batch % config.minibatch:
        parser.error(f"{folder}: TRL needs a --ppo-batch that --minibatch divides")
    return Run(config), Scale(report["policies"]["sft"]["objective"], report["optimum"]["objective"])


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m bench.race", description="Race to the optimum against TRL's PPO.")
    parser.add_argument("run", metavar="RUN", type=Path, help="the folder of a finished run")
    parser.add_argument("--peers", metavar="PYTHON", default=sys.executable,
                        help="an interpreter that has torch, transformers and trl with PPO (default: this one)")
    args = parser.parse_args(argv)
    run, scale = load_run(args.run, parser)
    config = run.config
    need_trl(args.peers)
    print_head(config, run.device, scale)

    minibatches = config.ppo_batch // config.minibatch
    name = f"here, lr {config.ppo_lr}, {config.ppo_epochs} epochs of {minibatches}"
    ours = [run_here(run)]
    print_row(name, ours[0], config, scale)

    theirs = []
    settings = [(config.ppo_epochs, minibatches, factor) for factor in (1, 0.5, 2)]
    settings += [(4, 1, factor) for factor in (1, 2, 4)]
    for epochs, parts, factor in settings:
        lr = factor * config.ppo_lr
        best = min([arrival_seconds(steps, GOALS[-1], scale) for steps in theirs], default=math.inf)

        def is_done(steps, best=best):
            return total_seconds(steps) > best or arrival(steps, GOALS[-1], scale) is not None

        trl_name = f"trl, lr {lr}, {epochs} epochs of {parts}"
        theirs.append(run_trl(run, args.peers, trl_name, lr, epochs, parts, is_done))
        print_row(trl_name, theirs[-1], config, scale)

    ours.append(run_here(run))
    print_row(name, ours[1], config, scale)
    for goal in GOALS:
        here = sum(arrival_seconds(steps, goal, scale) for steps in ours) / len(ours)
        there = min(arrival_seconds(steps, goal, scale) for steps in theirs)
        if max(here, there) < math.inf:
            print(f"to {goal:.2f}: {here:.0f} s here, {there:.0f} s with TRL's best: {there / here:.1f} times sooner")


if __name__ == "__main__":
    main()
