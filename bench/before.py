"""
Time this checkout beside another checkout of this repository: a change of speed is seen best side by side.

    git worktree add /tmp/before HEAD~1
    python -m bench.before /tmp/before

Both sides do the tasks of speed.py with the same weights, prompts, pairs and threads, each in a process of its own.
They take turns, one step here and one step there. The first step of each side is thrown away.
"""

import argparse
import contextlib
import dataclasses
import sys
from pathlib import Path
from statistics import median

import torch

from bench import tasks
from bench.worker import ask, start_worker
from evaluate import sample_policy

ROWS = {"rollout": "rollout", "ppo": "PPO iteration", "dpo": f"DPO step, {tasks.PAIRS} pairs",
        "reward": f"reward-model step, {tasks.PAIRS} pairs", "passes": f"forward + backward, {tasks.BATCH} rows"}


def make_setup(steps, threads):
    """Return the work of both sides, for so many steps."""
    policy = tasks.make_policy(1 / 30, "cpu")
    prompts = tasks.make_prompts(max(tasks.BATCH, tasks.PAIRS * steps))
    pairs = tasks.make_pairs(policy, prompts[:tasks.PAIRS * steps])
    rollout = sample_policy(policy, prompts[:tasks.BATCH], tasks.CAP, 1.0, 0, "batch")[0]
    return dict(weights=policy.state_dict(), sizes=dataclasses.asdict(policy.config), prompts=prompts, pairs=pairs,
                responses=rollout.response_ids(), pad=tasks.PAD, settings=tasks.SETTINGS, device="cpu", threads=threads)


def time_steps(workers, task, steps):
    """
    Let the workers do a task in turn, one step each. workers: {checkout: worker}. Returns {checkout: list of seconds}.

    Ends the program when one of them fails.
    """
    seconds = {}
    for checkout, worker in workers.items():
        answer = ask(worker, task=task, steps=steps)
        if "error" in answer:
            sys.exit(f"{checkout}: {answer['error']}")
        seconds[checkout] = []
    for _ in range(steps):
        for checkout, worker in workers.items():
            answer = ask(worker)
            if "error" in answer:
                sys.exit(f"{checkout}: {answer['error']}")
            seconds[checkout].append(answer["seconds"])
    return seconds


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m bench.before",
                                     description="Time this checkout beside another checkout of this repository.")
    parser.add_argument("checkout", metavar="CHECKOUT", type=Path, help="the folder of the other checkout")
    parser.add_argument("--threads", metavar="N", type=int, default=torch.get_num_threads(),
                        help="CPU threads of each side (%(default)s)")
    parser.add_argument("--repeats", metavar="N", type=int, default=7, help="timed steps of each side (%(default)s)")
    args = parser.parse_args(argv)
    if min(args.repeats, args.threads) < 1:
        parser.error("--repeats and --threads must be at least 1")
    here = Path(__file__).resolve().parents[1]
    there = args.checkout.resolve()
    if there == here or not (there / "model.py").exists():
        parser.error(f"{args.checkout} is not another checkout of this repository")
    steps = 1 + args.repeats
    torch.set_num_threads(args.threads)
    setup = make_setup(steps, args.threads)
    print(f"here: {here}, there: {there}; cpu, {args.threads} threads, torch {torch.__version__}")
    with contextlib.ExitStack() as stack:  # ends both workers
        workers = {}
        for checkout in (here, there):
            worker = start_worker(sys.executable, "checkout.py", dict(setup, checkout=str(checkout)))
            workers[checkout] = stack.enter_context(worker)
        for task, name in ROWS.items():
            seconds = time_steps(workers, task, steps)
            ours = seconds[here][1:]
            theirs = seconds[there][1:]
            ratios = [a / b for a, b in zip(ours, theirs)]  # of steps that were neighbours in time
            print(f"{name:<28} {1000 * median(ours):>8,.0f} ms here {1000 * median(theirs):>8,.0f} ms there  "
                  f"{median(ratios):.2f}x the time ({min(ratios):.2f} to {max(ratios):.2f})", flush=True)


if __name__ == "__main__":
    main()
