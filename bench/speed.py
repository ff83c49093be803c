"""
Time this repository beside transformers and TRL, and against the limit of the machine.

    python -m bench                    here, and beside the libraries that this interpreter has
    python -m bench --device cuda      on a GPU
    python -m bench --peers ~/trlenv/bin/python ~/trlnow/bin/python      beside libraries in environments of their own

The two environments, one with the last TRL that has PPO and one with the newest:

    python -m venv ~/trlenv && ~/trlenv/bin/pip install torch transformers==4.57.1 trl==0.24.0 datasets accelerate
    python -m venv ~/trlnow && ~/trlnow/bin/pip install torch transformers trl datasets accelerate

All sides get the same weights, prompts, pairs, batch, response cap, epochs and threads, and compute in float32. They
take turns, one step each, so that a machine that slows down for a while slows all sides. Only steps are timed.

A ratio is that of the medians. Its spread goes from the lowest to the highest ratio of two steps that were neighbours
in time. The share of the limit is the useful operations (those of real tokens) over the time, as a share of the rate
of a large float32 matrix product.
"""

import argparse
import contextlib
import functools
import json
import sys
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm

from bench import tasks
from bench.gpt2 import peer_sizes, peer_weights
from bench.tasks import BATCH, CAP, EPOCHS, PAIRS, forward_flops
from bench.worker import copy_rate, product_rate, start_worker, take_turns
from data import collate_pairs
from evaluate import sample_policy
from pipeline.progress import ProgressBar

# ---- the report ------------------------------------------------------------------------------------------------------

def summarise(steps, flops, rate=None):
    """
    Summarise the steps of one side: the values, their median, lowest and highest, the median seconds and the median
    share of the limit, and the peak memory.

    A value is milliseconds, or with rate="tokens" the tokens per second. flops: useful operations of a step.
    """
    if rate is None:
        values = [1000 * step["seconds"] for step in steps]
    else:
        values = [step[rate] / step["seconds"] for step in steps]
    shares = [flops / step["seconds"] / step["limit"] for step in steps]
    return dict(median=median(values), lowest=min(values), highest=max(values), values=values,
                seconds=median(step["seconds"] for step in steps), share_of_limit=median(shares),
                memory=steps[-1]["memory"])


def times_faster(ours, theirs, rate=None):
    """Return how many times faster we are. Milliseconds are better when they are fewer, a rate when it is higher."""
    if rate is None:
        return theirs / ours
    return ours / theirs


def format_side(side, unit):
    text = f"{side['median']:>8,.0f} {unit:<8} {side['share_of_limit']:4.0%} of limit"
    if side["memory"]:
        text += f" {side['memory'] / 2 ** 20:,.0f} MiB"
    return text


def compare(name, ours, theirs, flops, rate=None):
    """Print and return one row of the report, with a line for each peer. theirs: {peer: steps}."""
    unit = "ms" if rate is None else f"{rate}/s"
    here = summarise(ours, flops, rate)
    row = dict(name=name, unit=unit, here=here, peers={})
    lines = []
    for peer, steps in theirs.items():
        there = summarise(steps, flops, rate)
        ratio = times_faster(here["median"], there["median"], rate)
        neighbours = [times_faster(a, b, rate) for a, b in zip(here["values"], there["values"])]
        lowest = min(neighbours)
        highest = max(neighbours)
        row["peers"][peer] = dict(there, ratio=ratio, ratio_lowest=lowest, ratio_highest=highest)
        lines.append(f"{peer} {format_side(there, unit)}  {ratio:.1f}x faster ({lowest:.1f} to {highest:.1f})")

    left = f"{name:<34}  {format_side(here, unit)}"
    for line in lines or [""]:
        tqdm.write(f"{left}  {line}".rstrip())
        left = " " * len(left)  # our side stands in the first line only
    return row


def scaling(name, base, variants, repeats, device, bar):
    """
    Print and return how much longer each variant takes than the base, measured one after another.

    base and the values of variants are functions as `take_turns` runs them.
    """
    factors = {variant: [] for variant in variants}
    for _ in range(repeats):
        base_steps, _ = take_turns(base, 1, device, bar)
        for variant, run in variants.items():
            steps, _ = take_turns(run, 1, device, bar)
            factors[variant].append(steps[0]["seconds"] / base_steps[0]["seconds"])
    row = dict(name=name)
    texts = []
    for variant, x in factors.items():
        row[variant] = dict(median=median(x), lowest=min(x), highest=max(x))
        texts.append(f"{variant}: {median(x):.2f}x the time ({min(x):.2f} to {max(x):.2f})")
    tqdm.write(f"{name:<34}  " + ", ".join(texts))
    return row


# ---- the measurements ------------------------------------------------------------------------------------------------

def peers_with(package, workers):
    """Return {package and version: worker} of the workers that have the package."""
    return {f"{package} {worker.versions[package]}": worker for worker in workers if worker.versions.get(package)}


def report_missing(python, worker):
    if not worker.versions:
        tqdm.write(f"{python} is left out: {worker.last_line()}")
        return
    missing = [package for package in ("transformers", "trl") if not worker.versions[package]]
    if missing:
        tqdm.write(f"{python} lacks {' and '.join(missing)}; the top of bench/speed.py says how to install them")


def compare_with_peers(policy, prompts, pairs, workers, turns, rollout_flops, ppo_flops):
    """Time rollout, PPO, DPO and reward model, here and in the workers. Returns the rows of the report."""
    pair_batch = collate_pairs(pairs, tasks.PAD)
    steps = len(pairs) / PAIRS
    dpo_flops = 3 * forward_flops(pair_batch) / steps
    reward_flops = 3 * forward_flops(pair_batch, head=False) / steps
    with_transformers = peers_with("transformers", workers)
    with_trl = peers_with("trl", workers)
    rows = []

    run = functools.partial(tasks.rollouts, policy, prompts[:BATCH])
    ours, theirs = turns(run, peers=with_transformers, task="rollout", batch=BATCH)
    rows.append(compare("rollout", ours, theirs, rollout_flops, rate="tokens"))

    run = functools.partial(tasks.ppo_iterations, policy, prompts)
    ours, theirs = turns(run, peers=with_trl, task="ppo", batch=BATCH, epochs=EPOCHS)
    rows.append(compare("PPO iteration", ours, theirs, ppo_flops))

    run = functools.partial(tasks.dpo_steps, policy, pairs)
    ours, theirs = turns(run, peers=with_trl, task="dpo", batch=PAIRS)
    rows.append(compare(f"DPO step, {PAIRS} pairs", ours, theirs, dpo_flops))

    run = functools.partial(tasks.reward_steps, policy, pairs)
    ours, theirs = turns(run, peers=with_trl, task="reward", batch=PAIRS)
    rows.append(compare(f"reward-model step, {PAIRS} pairs", ours, theirs, reward_flops))
    return rows


def parse_args(argv):
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Time this repository beside transformers and TRL, and against the limit of the machine.")
    parser.add_argument("--peers", metavar="PYTHON", nargs="+", default=[sys.executable],
                        help="interpreters that have torch, transformers and trl (default: this one)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"],
                        help="where all sides compute (%(default)s)")
    parser.add_argument("--threads", metavar="N", type=int, default=torch.get_num_threads(),
                        help="CPU threads of each side (%(default)s)")
    parser.add_argument("--repeats", metavar="N", type=int, default=7,
                        help="timed steps of each side in every comparison (%(default)s)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the numbers to this file")
    args = parser.parse_args(argv)
    if min(args.repeats, args.threads) < 1:
        parser.error("--repeats and --threads must be at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine, or this build of torch, has no CUDA")
    if args.json and not args.json.parent.is_dir():
        parser.error(f"--json {args.json}: there is no folder {args.json.parent}")
    return args


def measure_scaling(policy, slow_policy, prompts, batch, wide, long, device, bar):
    """Time twice the batch and twice the response length, of one pass and of PPO. Returns the rows of the report."""
    passes = functools.partial(tasks.forward_backwards, policy)
    wider = functools.partial(passes, wide)
    longer = functools.partial(passes, long)
    variants = {"twice the batch": wider, "twice the response length": longer}
    pass_row = scaling("forward + backward", functools.partial(passes, batch), variants, 3, device, bar)

    iterations = functools.partial(tasks.ppo_iterations, policy, prompts)
    wider = functools.partial(tasks.ppo_iterations, policy, prompts, batch=2 * BATCH)
    longer = functools.partial(tasks.ppo_iterations, slow_policy, prompts, cap=2 * CAP)
    variants = {"twice the batch": wider, "twice the response length": longer}
    return [pass_row, scaling("PPO iteration", iterations, variants, 2, device, bar)]


def main(argv=None):
    args = parse_args(argv)
    device = args.device
    steps = 1 + args.repeats  # of each side: the first one is thrown away
    torch.set_num_threads(args.threads)
    ProgressBar.quiet = True  # the benchmark has one bar for everything

    policy = tasks.make_policy(1 / 30, device)
    slow_policy = tasks.make_policy(1 / 60, device)  # its responses are twice as long
    prompts = tasks.make_prompts(max(2 * BATCH, PAIRS * steps))
    pairs = tasks.make_pairs(policy, prompts[:PAIRS * steps])
    wide = sample_policy(policy, prompts[:2 * BATCH], CAP, 1.0, 0, "batch")[0]       # twice the rows of `batch`
    long = sample_policy(slow_policy, prompts[:BATCH], 2 * CAP, 1.0, 0, "batch")[0]  # twice the response length
    batch = wide.select(torch.arange(BATCH, device=device))
    rollout_flops = forward_flops(wide) / 2  # the mean of two batches, because every rollout is a new one
    ppo_flops = tasks.ppo_flops(wide) / 2

    flops = product_rate(device, times=10)
    bandwidth = copy_rate(device, times=10)
    parameters = sum(weight.numel() for weight in policy.parameters())
    tokens = int((batch.prompt_lens + batch.response_lens).sum())
    tqdm.write(f"{parameters:,} parameters, {BATCH} rows of {tokens / BATCH:.0f} real tokens; {device}, "
               f"{args.threads} threads, torch {torch.__version__}")
    tqdm.write(f"the machine's limit: {flops / 1e9:,.0f} GFLOP/s in a float32 matrix product, "
               f"{bandwidth / 1e9:,.0f} GB/s in a copy")

    setup = dict(weights=peer_weights(policy), sizes=peer_sizes(policy.config), prompts=prompts, pairs=pairs,
                 end=tasks.END, pad=tasks.PAD, cap=CAP, lr=tasks.LR, device=device, threads=args.threads)
    total = 5 * steps + 3 * 3 * 2 + 2 * 3 * 2  # five comparisons; repeats x functions x steps of the two scalings
    bar = tqdm(total=total, desc="bench", unit="step", dynamic_ncols=True, leave=False)
    turns = functools.partial(take_turns, steps=args.repeats, device=device, bar=bar)
    with contextlib.ExitStack() as stack:  # ends all workers
        workers = []
        for python in args.peers:
            worker = stack.enter_context(start_worker(python, "peers.py", setup))
            report_missing(python, worker)
            workers.append(worker)
        rows = compare_with_peers(policy, prompts, pairs, workers, turns, rollout_flops, ppo_flops)

    ours, _ = turns(functools.partial(tasks.forward_backwards, policy, batch))
    rows.append(compare(f"forward + backward, {BATCH} rows", ours, {}, 3 * forward_flops(batch)))
    reading = tasks.decode_bytes(batch) / rows[0]["here"]["seconds"] / bandwidth
    tqdm.write(f"{'rollout: weights and cache read':<34}  {reading:8.0%} of the bandwidth of a copy")
    rows += measure_scaling(policy, slow_policy, prompts, batch, wide, long, device, bar)
    bar.close()

    if args.json:
        machine = dict(device=device, threads=args.threads, torch=torch.__version__, flops=flops, bandwidth=bandwidth,
                       decode_share_of_bandwidth=reading)
        args.json.write_text(json.dumps(dict(machine=machine, repeats=args.repeats, rows=rows), indent=1))
