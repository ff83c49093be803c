"""
How soon is PPO there? Seconds from the SFT policy to 0.80 and 0.90 of the way to the optimum, here and with TRL's PPO at its best of a small grid of
settings.

    python minirlhf.py --out runs/race
    python bench_race.py runs/race --peers ~/trlenv/bin/python        (the environment of bench.py; half an hour on two slow cores)

Both sides start from the run's SFT policy with its reward model, prompts, beta, batch and number of iterations, and maximise the same objective,
score - beta KL, estimated from each rollout before its updates. A share is reached at the first iteration at which the mean of the last five
objectives has that much of what separates SFT from the optimum (report.json). The way from 0.8 to 0.9 is a plateau, where chance decides over ten
iterations and more: 0.80 is the surer number, and one run of one seed is one run of one seed. The time is the number of iterations times the median seconds of one.

Here run the settings of minirlhf.py, before TRL and once more after it. TRL runs the same updates a rollout, and its own default of four epochs in one
piece, each with three learning rates; a setting is stopped when it has arrived, or has taken longer than the best so far. Left as TRL has them: one
learning rate for policy and critic, and no clipping of gradients.
"""

import argparse
import copy
import json
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm

import minirlhf
from bench import ask, last_words, start_worker
from data import end_id, pad_id
from model import to_gpt2
from ppo import train_ppo
from run import Run

GOALS, WINDOW = (0.80, 0.90), 5


def shares(objectives, sft, best):
    """Of each iteration, the share of the optimum in the mean of the last five objectives; 0 while there are fewer."""
    means = [sum(objectives[i - WINDOW:i]) / WINDOW for i in range(WINDOW, len(objectives) + 1)]
    return [0.0] * min(WINDOW - 1, len(objectives)) + [(mean - sft) / (best - sft) for mean in means]


def arrival(steps, goal, sft, best):
    """steps: (seconds, objective) of each iteration -> (iterations, as many times the median seconds) until the goal, None when it is not reached."""
    for i, share in enumerate(shares([objective for _, objective in steps], sft, best), start=1):
        if share >= goal:
            return i, i * median(seconds for seconds, _ in steps)
    return None


def reward_weights(model):
    """The reward model as Hugging Face has it, whose score has no bias and no normalisation: the scale goes into the weight, the offset into ln_f."""
    weight = (model.score.weight / model.std).detach()                                 # (1, C)
    state = {**to_gpt2(model.trunk), "score.weight": weight}
    offset = (model.score.bias - model.mean) / model.std
    state["transformer.ln_f.bias"] = state["transformer.ln_f.bias"] + offset * weight[0] / weight.square().sum()
    return {name: w.detach().contiguous().cpu() for name, w in state.items() if name != "lm_head.weight"}


def ours(run):
    """(seconds, objective) of every iteration of PPO, as minirlhf.py runs it."""
    steps, sft, config = [], run.load_network("sft", "sft"), run.config
    train_ppo(copy.deepcopy(sft).requires_grad_(True), sft, run.load_network("reward", "reward"), run.prompts()[0], iterations=config.ppo_iterations,
              batch_size=config.ppo_batch, minibatch_size=config.minibatch, epochs=config.ppo_epochs, beta=config.beta, lr=config.ppo_lr,
              critic_lr=config.critic_lr, gamma=config.gamma, lam=config.lam, clip=config.clip, value_clip=config.value_clip,
              temperature=config.temperature, max_new_tokens=config.response_tokens, seed=config.seed + 4,
              log=lambda **row: steps.append((row["seconds"], row["objective"])))
    return steps


def theirs(run, python, lr, epochs, minibatches, done):
    """(seconds, objective) of TRL's iterations, in a process of their own, until done(steps), the last one, or an error, which is told."""
    sft, config, steps = run.load_network("sft", "sft"), run.config, []
    size, prompts = sft.config, run.prompts()[0]
    setup = dict(weights={name: w.detach().contiguous().cpu() for name, w in to_gpt2(sft).items()}, lr=lr,
                 reward_weights=reward_weights(run.load_network("reward", "reward")), prompts=prompts * -(-config.ppo_batch // len(prompts)),
                 sizes=dict(vocab_size=size.vocab_size, n_positions=size.block_size, n_embd=size.n_embd, n_layer=size.n_layer, n_head=size.n_head),
                 end=end_id(run.tokenizer), pad=pad_id(run.tokenizer), cap=config.response_tokens, device=run.device.type, threads=torch.get_num_threads())
    settings = dict(kl_coef=config.beta, gamma=config.gamma, lam=config.lam, cliprange=config.clip, cliprange_value=config.value_clip,
                    temperature=config.temperature, adam_beta2=0.99, adam_epsilon=1e-5)
    name = f"trl, lr {lr}, {epochs} epochs of {minibatches}"
    with tempfile.TemporaryDirectory() as folder, tqdm(total=config.ppo_iterations, desc=name, unit="it", leave=False) as bar:
        worker = start_worker(python, setup, Path(folder))
        try:
            told = ask(worker, task="ppo", batch=config.ppo_batch, epochs=epochs, minibatches=minibatches, settings=settings, steps=config.ppo_iterations)
            while "error" not in told and len(steps) < config.ppo_iterations and not done(steps):
                told = ask(worker)
                if "error" not in told:
                    steps.append((told["seconds"], told["objective"]))
                    bar.update()
        finally:
            worker.process.kill()
            worker.process.wait()
    if "error" in told and not steps:
        sys.exit(f"{name}: {told['error']}")
    if "error" in told:
        print(f"{name}: {told['error']}")
    return steps


def need_trl(python):
    """Ends the program when the interpreter has no TRL: better now than after our own runs."""
    with tempfile.TemporaryDirectory() as folder:
        worker = start_worker(python, dict(threads=1, device="cpu"), Path(folder))
        worker.process.kill()
        worker.process.wait()
        if not worker.versions.get("trl"):
            why = "" if worker.versions else f" ({last_words(worker)})"
            sys.exit(f"--peers {python}: no TRL there{why}; pip install torch transformers==4.57.1 trl==0.24.0 datasets accelerate")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Race to the optimum against TRL's PPO.")
    parser.add_argument("run", type=Path, help="the folder of a finished run")
    parser.add_argument("--peers", metavar="PYTHON", default=sys.executable, help="the interpreter that has torch, transformers and trl (this one)")
    args = parser.parse_args(argv)
    try:
        report, saved = (json.loads((args.run / name).read_text()) for name in ("report.json", "config.json"))
    except OSError:
        parser.error(f"{args.run} is not a finished run: python minirlhf.py --out {args.run}")
    run = Run(minirlhf.Config(**dict(saved, out=str(args.run))))
    config = run.config
    if not report["optimum"] or config.ppo_batch % config.minibatch:
        parser.error(f"{args.run} has no optimum (--beta 0), or its minibatches do not fill its batch")
    need_trl(args.peers)
    sft, best = report["policies"]["sft"]["objective"], report["optimum"]["objective"]
    print(f"objective {sft:.2f} of SFT, {best:.2f} of the optimum; at most {config.ppo_iterations} rollouts of {config.ppo_batch}; {run.device}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'':<36}" + "".join(f"{f'to {goal:.2f}':>24}" for goal in GOALS) + f"{'s an iteration':>16}")

    def tell(name, steps):
        """Print a line; returns the seconds to each goal, infinite when it was not reached."""
        there = [arrival(steps, goal, sft, best) for goal in GOALS]
        missed = "not reached" if len(steps) == config.ppo_iterations else f"not in {sum(seconds for seconds, _ in steps):.0f} s"
        cells = [f"{found[0]} iterations {found[1]:.0f} s" if found else missed for found in there]
        pace = median(seconds for seconds, _ in steps) if steps else float("nan")
        print(f"{name:<36}" + "".join(f"{cell:>24}" for cell in cells) + f"{pace:>16.2f}", flush=True)
        return [found[1] if found else float("inf") for found in there]

    minibatches = config.ppo_batch // config.minibatch
    name = f"here, lr {config.ppo_lr}, {config.ppo_epochs} epochs of {minibatches}"
    mine, found = [tell(name, ours(run))], [[float("inf")] * len(GOALS)]
    for epochs, parts, factors in ((config.ppo_epochs, minibatches, (1, 0.5, 2)), (4, 1, (1, 2, 4))):
        for lr in (factor * config.ppo_lr for factor in factors):
            def done(steps):
                late = sum(seconds for seconds, _ in steps) > min(row[-1] for row in found)
                return late or bool(arrival(steps, GOALS[-1], sft, best))
            found.append(tell(f"trl, lr {lr}, {epochs} epochs of {parts}", theirs(run, args.peers, lr, epochs, parts, done)))
    mine.append(tell(name, ours(run)))
    for goal, here, there in zip(GOALS, zip(*mine), zip(*found)):
        here, there = sum(here) / len(here), min(there)
        if max(here, there) < float("inf"):
            print(f"to {goal:.2f}: {here:.0f} s here, {there:.0f} s with TRL's best: {there / here:.1f}x sooner")


if __name__ == "__main__":
    main()
