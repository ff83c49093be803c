"""
How fast is it? Side by side with what people use, and against what the machine can do.

    python bench.py                                  here, and transformers where it is installed
    python bench.py --device cuda                    on a GPU, with two rows more: rollout and PPO with the sampling as a CUDA graph
    python bench.py --peers ~/trlenv/bin/python ~/trlnow/bin/python      the peers in environments of their own, made like this:

    python -m venv ~/trlenv && ~/trlenv/bin/pip install torch transformers==4.57.1 trl==0.24.0 datasets accelerate     (a TRL with PPO)
    python -m venv ~/trlnow && ~/trlnow/bin/pip install torch transformers trl datasets accelerate                     (the newest)

All sides get the same weights, prompts, pairs, batch, response cap, epochs, threads and float32, and take turns: one step here, one step there, each
waiting while the others work, so that what slows the machine for a while slows all. Only steps are timed: what builds a trainer is not, and the
first step of each side is thrown away. A ratio is that of the medians, its spread goes from the lowest to the highest ratio of two steps that were
neighbours. The share of the limit is the useful floating-point operations (real tokens only: what is computed for a pad counts for nothing) over the
time, as a share of the rate of a large float32 matrix product, which is measured after every step, because a machine's pace changes.

The policy has random weights, except that it says E at each step with a probability of 1/30 in the geometric mean: responses then have natural
lengths, about 20 tokens in the mean, and end at different times. The learning rate is too small to change that.

Letters: B batch, P prompt tokens, R response tokens, C embedding, V vocabulary.
"""

import argparse
import contextlib
import copy
import functools
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from tqdm import tqdm

import dpo
import evaluate
import ppo
import reward
from evaluate import sample_policy
from graphs import Tape
from model import GPT, GPTConfig, generate, response_logprobs, sample_tokens, to_gpt2

CONFIG = GPTConfig(vocab_size=560, block_size=96, n_layer=4, n_head=4, n_embd=128)
END, PAD = CONFIG.vocab_size - 2, CONFIG.vocab_size - 1
BATCH, CAP, EPOCHS, PAIRS = 128, 40, 3, 32
LR = 1e-6  # weights that hardly move: every iteration meets responses of the same lengths


# ---------------------------------------------------------------------------------------------------------------------
# what is worked on

def make_policy(end_probability, device):
    """Random weights, except that the last bias points along the row of E: far enough that E has the probability in the geometric mean."""
    torch.manual_seed(0)
    model = GPT(CONFIG)
    with torch.no_grad():
        row = model.wte.weight[END]
        model.ln_f.bias += row * math.log(CONFIG.vocab_size * end_probability / (1 - end_probability)) / row.square().sum()
        model.wte.weight[PAD] = -row  # hardly ever sampled: TRL tells pads by their id and would take a sampled one for the end
    return model.to(device)


def make_pairs(policy, prompts):
    """Two samples for each prompt. Their last token is E even at the cap, because TRL ends every response so."""
    sides = [[ids[:-1] + [END] for rollout in sample_policy(policy, prompts, CAP, 1.0, seed, "pairs") for ids in rollout.response_ids()]
             for seed in (1, 2)]
    return [dict(prompt=prompt, chosen=chosen, rejected=rejected) for prompt, chosen, rejected in zip(prompts, *sides)]


def forward_flops(batch, head=True):
    """
    Operations of one forward pass over the real tokens: 2 for each weight of a matrix and each token, and in each layer 4C for each token and each
    token that it sees. The output matrix is needed only where a response token is predicted. A backward pass costs twice as much. This is the usual
    count for both sides; that we do less for the prompt's tokens in the last layer, and do not read a response's last token for its log-probs, shows as
    speed, not as fewer operations.
    """
    lengths, C = (batch.prompt_lens + batch.response_lens).cpu().double(), CONFIG.n_embd
    trunk = CONFIG.n_layer * (2 * 12 * C * C * lengths + 4 * C * lengths * (lengths + 1) / 2).sum().item()
    return trunk + head * 2 * C * CONFIG.vocab_size * batch.response_lens.sum().item()


def ppo_flops(batch):
    """Useful operations of an iteration: generation, three passes for the experience, forward and backward of two networks in every epoch."""
    actor, critic = forward_flops(batch), forward_flops(batch, head=False)
    return actor + (actor + 2 * critic) + EPOCHS * 3 * (actor + critic)


def decode_bytes(batch):
    """Bytes that generation cannot avoid reading: every weight at each step, and the keys and values of what each running row has read."""
    weights = 12 * CONFIG.n_layer * CONFIG.n_embd ** 2 + CONFIG.n_embd * CONFIG.vocab_size
    seen = sum(sum(range(p + 1, p + r)) for p, r in zip(batch.prompt_lens.tolist(), batch.response_lens.tolist()))
    return 4 * (weights * batch.R + 2 * CONFIG.n_layer * CONFIG.n_embd * seen)


# ---------------------------------------------------------------------------------------------------------------------
# clocks and turns

def clock(device):
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(function, device):
    started = clock(device)
    function()
    return clock(device) - started


def product_rate(device, times=1):
    """FLOP/s of a large float32 matrix product, the best of so many."""
    n = 8192 if device == "cuda" else 2048
    a = torch.ones(n, n, device=device)
    product = torch.ones_like(a)
    return 2 * n ** 3 / min(seconds_of(lambda: torch.mm(a, a, out=product), device) for _ in range(times))


def copy_rate(device, times):
    """Bytes/s of a copy, its bytes counted once read and once written, the best of so many."""
    source = torch.ones(2 ** 25, device=device)
    target = torch.ones_like(source)
    return 2 * source.nbytes / min(seconds_of(lambda: target.copy_(source), device) for _ in range(times))


class Worker(NamedTuple):
    process: subprocess.Popen
    log: Path       # what it says on its standard error
    versions: dict  # of torch, transformers and trl, None where it has none; empty when it did not start


def start_worker(python, setup, folder):
    """bench_peers.py in another interpreter; the folder is its own. Ends the program when the interpreter cannot be started."""
    torch.save(dict(setup, folder=str(folder)), folder / "setup.pt")
    with open(folder / "peers.log", "w") as log:
        try:
            process = subprocess.Popen([os.path.expanduser(python), Path(__file__).with_name("bench_peers.py"), folder / "setup.pt"], text=True, bufsize=1,
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
        except OSError as fault:
            sys.exit(f"--peers {python}: {fault.strerror}")
    return Worker(process, folder / "peers.log", json.loads(process.stdout.readline() or "{}"))


def last_words(worker):
    return (worker.log.read_text().strip().splitlines() or ["not a word of why"])[-1]


def ask(worker, **order):
    """Send a line and wait for the answer, which has an "error" when the peer cannot do it."""
    try:
        print(json.dumps(order), file=worker.process.stdin, flush=True)
        return json.loads(worker.process.stdout.readline())
    except (BrokenPipeError, json.JSONDecodeError):
        return dict(error=f"its process has died: {last_words(worker)}")


def take_turns(ours, steps, device, bar, peers=None, **order):
    """
    Run ours(tick), which calls tick after each of its 1 + steps steps; at each tick every one of the peers {name: worker} takes its own.

    Returns our steps and theirs, {name: steps}: dicts with "seconds", "memory" (peak bytes, on a GPU; a peer's up to then), "limit" (FLOP/s of a matrix
    product then) and what else a step told. A peer that cannot do it is left out, and why is told.
    """
    here, theirs = [], {name: [ask(worker, **order, steps=1 + steps)] for name, worker in (peers or {}).items()}

    def tick(**told):
        nonlocal started
        seconds = clock(device) - started
        memory = torch.cuda.max_memory_allocated() if device == "cuda" else None
        limit = product_rate(device)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()  # the product is not part of a step
        here.append(dict(seconds=seconds, memory=memory, limit=limit, **told))
        for name, answers in theirs.items():
            if "error" not in answers[-1]:
                answers.append(dict(ask(peers[name]), limit=limit))
        bar.update()
        started = clock(device)

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = clock(device)
    ours(tick)
    for name, answers in theirs.items():
        if "error" in answers[-1]:
            tqdm.write(f"{name} is left out: {answers[-1]['error']}")
    return here[1:], {name: answers[2:] for name, answers in theirs.items() if "error" not in answers[-1]}


# ---------------------------------------------------------------------------------------------------------------------
# our side of each task: a function of tick that runs all steps

def rollouts(policy, prompts, steps, loop=sample_tokens):
    def run(tick):
        for _ in range(1 + steps):
            rollout = generate(policy, prompts, CAP, loop=loop)
            tick(tokens=int(rollout.response_lens.sum()))
    return run


def new_reward_model(policy):
    return reward.RewardModel(policy).to(policy.wte.weight.device)


def ppo_iterations(policy, prompts, steps, batch=BATCH, cap=CAP, **options):
    return lambda tick: ppo.train_ppo(copy.deepcopy(policy), policy, new_reward_model(policy), prompts, 1 + steps, batch, batch, EPOCHS, lr=LR,
                                      critic_lr=LR, max_new_tokens=cap, log=lambda **row: tick(), **options)


def dpo_steps(policy, pairs):
    return lambda tick: dpo.train_dpo(copy.deepcopy(policy), policy, pairs, PAD, 1, PAIRS, lr=LR, log=lambda **row: tick())


def reward_steps(policy, pairs):
    return lambda tick: reward.train_reward_model(new_reward_model(policy), pairs, PAD, 1, PAIRS, lr=LR, log=lambda **row: tick())


def forward_backwards(policy, batch, steps):
    def run(tick):
        for _ in range(1 + steps):
            policy.zero_grad()
            response_logprobs(policy, batch).sum().backward()
            tick()
    return run


# ---------------------------------------------------------------------------------------------------------------------
# the report

def summary(steps, rate, flops):
    """Medians and extremes of one side: milliseconds, or `rate` a second; flops: useful operations of a step."""
    values = [step[rate] / step["seconds"] if rate else 1e3 * step["seconds"] for step in steps]
    share = median(flops / step["seconds"] / step["limit"] for step in steps)
    return dict(median=median(values), lowest=min(values), highest=max(values), share_of_limit=share, memory=steps[-1]["memory"], values=values)


def compare(name, here, theirs, flops, rate=None):
    """Print and return a row of the report, a line for each peer in theirs {name: steps}. A ratio above 1 says that this repository is faster."""
    def cell(side):
        memory = f" {side['memory'] / 2 ** 20:,.0f} MiB" if side["memory"] else ""
        return f"{side['median']:>8,.0f} {row['unit']:<8} {side['share_of_limit']:4.0%} of limit{memory}"

    row = dict(name=name, unit=f"{rate}/s" if rate else "ms", here=summary(here, rate, flops), peers={})
    lead = f"{name:<34}  {cell(row['here'])}"
    for peer, steps in theirs.items():
        there = summary(steps, rate, flops)
        faster = [(a / b) if rate else (b / a) for a, b in zip(row["here"]["values"], there["values"])]
        a, b = row["here"]["median"], there["median"]
        ratio = a / b if rate else b / a
        row["peers"][peer] = dict(there, ratio=ratio, ratio_lowest=min(faster), ratio_highest=max(faster))
        tqdm.write(f"{lead}  {peer} {cell(there)}  {ratio:.1f}x faster ({min(faster):.1f} to {max(faster):.1f})")
        lead = " " * len(lead)
    if not theirs:
        tqdm.write(lead.rstrip())
    return row


def scaling(name, once, variants, repeats, device, bar):
    """Time of each variant over the time of `once`, neighbours in time; each is a function of tick whose second step is the one that counts."""
    factors = {variant: [] for variant in variants}
    for _ in range(repeats):
        base, *times = (take_turns(run, 1, device, bar)[0][0]["seconds"] for run in (once, *variants.values()))
        for variant, seconds in zip(variants, times):
            factors[variant].append(seconds / base)
    tqdm.write(f"{name:<34}  " + ", ".join(f"{variant}: {median(x):.2f}x the time ({min(x):.2f} to {max(x):.2f})" for variant, x in factors.items()))
    return dict(name=name, **{variant: dict(median=median(x), lowest=min(x), highest=max(x)) for variant, x in factors.items()})


def main(argv=None):
    parser = argparse.ArgumentParser(description="Time this repository beside transformers and TRL, and against the limit of the machine.")
    parser.add_argument("--peers", metavar="PYTHON", nargs="+", default=[sys.executable],
                        help="interpreters that have torch, transformers and trl (this one)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of every side (%(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="timed steps a side of each comparison (%(default)s)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the numbers to a file")
    args = parser.parse_args(argv)
    if min(args.repeats, args.threads) < 1:
        parser.error("--repeats and --threads are at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine, or this build of torch, has no CUDA")
    if args.json and not args.json.parent.is_dir():
        parser.error(f"--json {args.json}: there is no folder {args.json.parent}")
    n, device = args.repeats, args.device
    torch.set_num_threads(args.threads)
    for module in (ppo, dpo, reward, evaluate):  # there is one bar here, and it is not theirs
        module.tqdm = functools.partial(tqdm, disable=True)

    rng = random.Random(0)
    prompts = [[rng.randrange(END) for _ in range(rng.randint(8, 12))] for _ in range(max(2 * BATCH, PAIRS * (1 + n)))]
    policy, patient = make_policy(1 / 30, device), make_policy(1 / 60, device)  # one that ends its responses, and one that takes twice as long
    pairs = make_pairs(policy, prompts[:PAIRS * (1 + n)])
    wide, long = (sample_policy(model, prompts[:count], cap, 1.0, 0, "batch")[0]
                  for model, count, cap in ((policy, 2 * BATCH, CAP), (patient, BATCH, 2 * CAP)))
    batch = wide.select(torch.arange(BATCH, device=device))
    both = reward.collate_pairs(pairs, PAD)
    flops, bandwidth = product_rate(device, times=10), copy_rate(device, times=10)
    sizes = dict(vocab_size=CONFIG.vocab_size, n_positions=CONFIG.block_size, n_embd=CONFIG.n_embd, n_layer=CONFIG.n_layer, n_head=CONFIG.n_head)
    setup = dict(weights={name: w.contiguous().cpu() for name, w in to_gpt2(policy).items()}, sizes=sizes, prompts=prompts, pairs=pairs, end=END, pad=PAD,
                 cap=CAP, lr=LR, device=device, threads=args.threads)
    tokens = int((batch.prompt_lens + batch.response_lens).sum())
    tqdm.write(f"{sum(w.numel() for w in policy.parameters()):,} parameters, {BATCH} rows of {tokens / BATCH:.0f} real tokens; {device}, "
               f"{args.threads} threads, torch {torch.__version__}")
    tqdm.write(f"the machine's limit: {flops / 1e9:,.0f} GFLOP/s in a float32 matrix product, {bandwidth / 1e9:,.0f} GB/s in a copy")

    with contextlib.ExitStack() as stack:
        workers = [start_worker(python, setup, Path(stack.enter_context(tempfile.TemporaryDirectory()))) for python in args.peers]
        peers = {package: {f"{package} {worker.versions[package]}": worker for worker in workers if worker.versions.get(package)}
                 for package in ("transformers", "trl")}
        for python, worker in zip(args.peers, workers):
            missing = [package for package in peers if not worker.versions.get(package)]
            if not worker.versions:
                tqdm.write(f"{python} is left out: {last_words(worker)}")
            elif missing:
                tqdm.write(f"{python} has no {' and no '.join(missing)}; the head of bench.py says what to install")
        bar = tqdm(total=(7 if device == "cuda" else 5) * (1 + n) + 6 * 3 + 6 * 2, desc="bench", unit="step", dynamic_ncols=True, leave=False)
        turns = functools.partial(take_turns, steps=n, device=device, bar=bar)
        rows = []

        here, theirs = turns(rollouts(policy, prompts[:BATCH], n), peers=peers["transformers"], task="rollout", batch=BATCH)
        rows.append(compare("rollout", here, theirs, forward_flops(wide) / 2, rate="tokens"))
        reading = decode_bytes(batch) / median(step["seconds"] for step in here) / bandwidth
        tqdm.write(f"{'    what it must read':<34}  {reading:8.0%} of the copy's bandwidth")

        here, theirs = turns(ppo_iterations(policy, prompts, n), peers=peers["trl"], task="ppo", batch=BATCH, epochs=EPOCHS)
        rows.append(compare("PPO iteration", here, theirs, ppo_flops(wide) / 2))
        here, theirs = turns(dpo_steps(policy, pairs), peers=peers["trl"], task="dpo", batch=PAIRS)
        rows.append(compare(f"DPO step, {PAIRS} pairs", here, theirs, 3 * forward_flops(both) / (1 + n)))
        here, theirs = turns(reward_steps(policy, pairs), peers=peers["trl"], task="reward", batch=PAIRS)
        rows.append(compare(f"reward-model step, {PAIRS} pairs", here, theirs, 3 * forward_flops(both, head=False) / (1 + n)))
        for worker in workers:
            with contextlib.suppress(BrokenPipeError):  # one that has died has said so
                worker.process.stdin.close()
            worker.process.wait()

    if device == "cuda":
        rows.append(compare("rollout, CUDA graph", *turns(rollouts(policy, prompts[:BATCH], n, Tape())), forward_flops(wide) / 2, rate="tokens"))
        rows.append(compare("PPO iteration, CUDA graph", *turns(ppo_iterations(policy, prompts, n, cuda_graphs=True)), ppo_flops(wide) / 2))
    rows.append(compare(f"forward + backward, {BATCH} rows", *turns(forward_backwards(policy, batch, n)), 3 * forward_flops(batch)))
    rows.append(scaling("forward + backward", forward_backwards(policy, batch, 1), {
        "twice the batch": forward_backwards(policy, wide, 1), "twice the response length": forward_backwards(policy, long, 1)}, 3, device, bar))
    rows.append(scaling("PPO iteration", ppo_iterations(policy, prompts, 1), {
        "twice the batch": ppo_iterations(policy, prompts, 1, batch=2 * BATCH),
        "twice the response length": ppo_iterations(patient, prompts, 1, cap=2 * CAP)}, 2, device, bar))
    bar.close()
    if args.json:
        machine = dict(device=device, threads=args.threads, torch=torch.__version__, flops=flops, bandwidth=bandwidth, decode_share_of_bandwidth=reading)
        args.json.write_text(json.dumps(dict(machine=machine, repeats=n, rows=rows), indent=1))


if __name__ == "__main__":
    main()
