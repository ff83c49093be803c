"""
A pretrained model on this machine: sampled tokens a second, seconds of an iteration, the peak of memory on a GPU, and
the error of the first ratio, in float32 and bfloat16, with all weights trained and with LoRA.

    python -m bench.pretrained FOLDER                     a folder of Hugging Face
    python -m bench.pretrained FOLDER --device cuda --batch 64 --tokens 128 --micro-batch 8

The reward is the length of a response, so no reward model is counted. The first iteration of each loop is not timed.
The share of the peak (MFU) counts 2 operations a weight and token read, 6 when it is trained, and compares with a large
matrix product in the same precision.
"""

import argparse
import copy
import statistics
import time

import torch

from bench.worker import product_rate
from grpo import GRPOConfig, train_grpo
from ppo import PPOConfig, train_ppo
from pretrained import load_pretrained
from reward import RewardModel

QUESTIONS = ["What is the sun?", "Why do we sleep?", "What is a prime number?", "How does a plant grow?"]


def measure(folder, half, rank, loop, command):
    dtype = torch.bfloat16 if half and rank else torch.float32
    policy, tokenizer = load_pretrained(folder, rank, dtype, command.device)
    policy.micro_batch = command.micro_batch
    reference = copy.deepcopy(policy).requires_grad_(False)
    prompts = [tokenizer.encode_ordinary(question) for question in QUESTIONS]
    settings = dict(ppo_batch=command.batch, minibatch=command.batch, ppo_epochs=1, ppo_iterations=command.iterations,
                    response_tokens=command.tokens)

    def length(rollout):
        return rollout.response_lens.float()

    if loop == "ppo":
        critic = RewardModel(policy).to(command.device)
        steps = train_ppo(policy, critic, reference, length, prompts, PPOConfig(**settings, ppo_lr=1e-6), seed=0)
    else:
        steps = train_grpo(policy, reference, length, prompts, GRPOConfig(**settings, kind=loop, grpo_lr=1e-6), seed=0)
    seconds, rates = [], []
    if command.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with torch.autocast(command.device, torch.bfloat16, half, cache_enabled=False):
        clock = time.perf_counter()
        for metrics, _, rollout in steps:
            if metrics["step"] == 0:
                error = metrics["ratio_error"]
            seconds.append(time.perf_counter() - clock)
            rates.append(rollout.response_lens.sum().item() / seconds[-1])
            clock = time.perf_counter()
        weights = sum(parameter.numel() for parameter in policy.model.parameters())
        tokens = (rollout.prompt_lens + rollout.response_lens).sum().item()
        # sampling, reference, training; PPO reads each token with the critic too, and trains it
        operations = tokens * weights * (2 + 2 + 6 + (2 + 6 if loop == "ppo" else 0))
        peak = torch.cuda.max_memory_allocated() / 2 ** 30 if command.device == "cuda" else float("nan")
        limit = product_rate(command.device, 3, torch.bfloat16 if half else torch.float32)
        share = operations / statistics.median(seconds[1:]) / limit
    return dict(seconds=statistics.median(seconds[1:]), rate=statistics.median(rates[1:]), share=share, peak=peak,
                error=error)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--device", default="cpu")
    for name, default in (("batch", 16), ("tokens", 32), ("micro-batch", 0), ("iterations", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    command = parser.parse_args(argv)
    headings = ("computes in", "LoRA", "s / step", "tokens / s", "of the peak", "GiB", "ratio error")
    print("loop  " + "".join(f"{heading:>13}" for heading in headings))
    for loop in ("rloo", "ppo"):
        for half in (False, True):
            for rank in (0, 16):
                row = measure(command.folder, half, rank, loop, command)
                print(f"{loop:6}{'bfloat16' if half else 'float32':>13}{rank:>13}{row['seconds']:>13.2f}"
                      f"{row['rate']:>13.0f}{row['share']:>13.1%}{row['peak']:>13.1f}{row['error']:>13.1e}", flush=True)


if __name__ == "__main__":
    main()
