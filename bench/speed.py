"""
Time this repository, transformers and TRL, and compare them with the limit of the machine.

    python -m bench                    here, and the libraries that this interpreter has
    python -m bench --repeats 1        the same in a minute, with one timed step
    python -m bench --device cuda      on a GPU
    python -m bench --peers ~/trlenv/bin/python ~/trlnow/bin/python      libraries in their own environments

The two environments, one with the last TRL that has PPO and one with the newest:

    python -m venv ~/trlenv && ~/trlenv/bin/pip install torch transformers==4.57.1 trl==0.24.0 datasets accelerate
    python -m venv ~/trlnow && ~/trlnow/bin/pip install torch transformers trl datasets accelerate

All sides get the same weights, prompts, pairs, batch, response cap, epochs and threads, and compute in float32. They
take turns, one step each, so that a machine that slows down for a while slows all sides. Only steps are timed.

A ratio compares the medians. Its spread goes from the lowest to the highest ratio of two steps that were neighbours
in time. The share of the limit is the useful operations (of the real tokens) over the time, as a share of the rate of
a large float32 matrix product.
"""

import argparse
import contextlib
import functools
import sys
from statistics import median

import torch

from bench import tasks
from bench.tasks import BATCH, CAP, EPOCHS, PAIRS, forward_flops
from bench.worker import product_rate, start_worker, take_turns
from data import collate_pairs
from evaluate import sample_policy
from pipeline.export import plain_weights

# ---- the report -----------------------------------------------------------------------------------

def values_of(steps, rate=None):
    """Milliseconds of each step, or with rate="tokens" its tokens per second."""
    return [step[rate] / step["seconds"] if rate else 1000 * step["seconds"] for step in steps]


def share_of_limit(steps, flops):
    """The median over the steps of their useful operations a second, as a share of the limit at that time."""
    return median(flops / step["seconds"] / step["limit"] for step in steps)


def times_faster(ours, theirs, rate=None):
    """How many times faster we are: (ratio of the medians, the lowest and the highest of two neighbouring steps)."""
    a, b = values_of(ours, rate), values_of(theirs, rate)
    if not rate:  # fewer milliseconds are better
        a, b = b, a
    neighbours = [x / y for x, y in zip(a, b)]
    return median(a) / median(b), min(neighbours), max(neighbours)


def format_side(steps, flops, rate):
    unit = f"{rate}/s" if rate else "ms"
    text = f"{median(values_of(steps, rate)):>8,.0f} {unit:<8} {share_of_limit(steps, flops):4.0%} of limit"
    memory = steps[-1]["memory"]
    return text + (f" {memory / 2 ** 20:,.0f} MiB" if memory else "")


def report(name, ours, theirs, flops, rate=None):
    """Print one row of the report, with a line for each peer. theirs: {peer: steps}; flops: operations of a step."""
    left = f"{name:<28}  {format_side(ours, flops, rate)}"
    lines = []
    for peer, steps in theirs.items():
        ratio, lowest, highest = times_faster(ours, steps, rate)
        lines.append(f"{peer} {format_side(steps, flops, rate)}  {ratio:.1f}x faster ({lowest:.1f} to {highest:.1f})")
    for line in lines or [""]:
        print(f"{left}  {line}".rstrip(), flush=True)
        left = " " * len(left)  # our side is in the first line only


# ---- the measurements -----------------------------------------------------------------------------

def peers_with(package, workers):
    """{package and version: worker} of the workers that have the package."""
    return {f"{package} {worker.versions[package]}": worker for worker in workers if worker.versions.get(package)}


def report_missing(python, worker):
    if not worker.versions:
        print(f"{python} is left out: {worker.last_line()}")
        return
    missing = [package for package in ("transformers", "trl") if not worker.versions[package]]
    if missing:
        print(f"{python} lacks {' and '.join(missing)}; the top of bench/speed.py says how to install them")


def measure(policy, prompts, pairs, workers, steps, device):
    """Time rollout, PPO and DPO, here and in the workers, and print a row for each."""
    batches = next(sample_policy(policy, prompts[:2 * BATCH], CAP, 1.0, 0, size=2 * BATCH))
    pair_flops = forward_flops(collate_pairs(pairs, policy.pad)) / len(pairs)
    transformers, trl = peers_with("transformers", workers), peers_with("trl", workers)
    tokens = int((batches.prompt_lens + batches.response_lens).sum())
    print(f"{sum(weight.numel() for weight in policy.parameters()):,} parameters, {BATCH} rows of "
          f"{tokens / len(batches):.0f} real tokens")

    def compare(name, work, data, flops, peers, rate=None, **order):
        ours, theirs = take_turns(functools.partial(work, policy, data), steps, device, peers, **order)
        report(name, ours, theirs, flops, rate)

    # every rollout is a new one: its operations are the mean of two batches
    compare("rollout", tasks.rollouts, prompts, forward_flops(batches) / 2, transformers, "tokens", task="rollout",
            batch=BATCH)
    compare("PPO iteration", tasks.ppo_iterations, prompts, tasks.ppo_flops(batches) / 2, trl, task="ppo", batch=BATCH,
            epochs=EPOCHS)
    compare(f"DPO step, {PAIRS} pairs", tasks.dpo_steps, pairs, 3 * PAIRS * pair_flops, trl, task="dpo", batch=PAIRS)


def parse_args(argv):
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Time this repository, transformers and TRL, and compare them with the limit of the machine.")
    parser.add_argument("--peers", metavar="PYTHON", nargs="+", default=[sys.executable],
                        help="interpreters that have torch, transformers and trl (default: this one)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"],
                        help="where all sides compute (%(default)s)")
    parser.add_argument("--threads", metavar="N", type=int, default=torch.get_num_threads(),
                        help="CPU threads of each side (%(default)s)")
    parser.add_argument("--repeats", metavar="N", type=int, default=7,
                        help="timed steps of each side in every comparison (%(default)s)")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    policy = tasks.make_policy(args.device)
    pairs_needed = PAIRS * (1 + args.repeats)  # a step of each side is thrown away
    prompts = tasks.make_prompts(max(2 * BATCH, pairs_needed))
    pairs = tasks.make_pairs(policy, prompts[:pairs_needed])
    print(f"{args.device}, {args.threads} threads, torch {torch.__version__}; the machine's limit: "
          f"{product_rate(args.device, times=10) / 1e9:,.0f} GFLOP/s in a float32 matrix product")
    # the names of GPT-2 in transformers, whose output matrix is the token embedding
    weights = {f"transformer.{name}": weight.cpu() for name, weight in plain_weights(policy).items()}
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    config = policy.config
    sizes = dict(vocab_size=config.vocab_size, n_positions=config.block_size, n_embd=config.n_embd,
                 n_layer=config.n_layer, n_head=config.n_head)
    setup = dict(weights=weights, sizes=sizes, prompts=prompts, pairs=pairs, cap=CAP, end=policy.end, pad=policy.pad,
                 lr=tasks.LR, device=args.device, threads=args.threads)
    with contextlib.ExitStack() as stack:  # ends all workers
        workers = []
        for python in args.peers:
            workers.append(stack.enter_context(start_worker(python, "peers.py", setup)))
            report_missing(python, workers[-1])
        measure(policy, prompts, pairs, workers, args.repeats, args.device)
