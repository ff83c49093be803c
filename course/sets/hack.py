"""
Hack your own reward model: climb its score without any price for KL, and watch gold.

    python minirlhf.py --stages pretrain,sft,preferences,reward --pairs 300 --out runs/hack
    python hack.py runs/hack --iterations 60

REINFORCE with the batch as its baseline, beta 0. Prints score and gold (both in standard deviations of the SFT policy),
KL from the SFT policy, length, and the first answer; writes them to RUN/hack.csv. Gold is only looked at.
"""

import argparse
import copy
import csv

import torch

from data import decode, printable
from model import generate, response_logprobs
from pipeline.config import parse_config
from pipeline.run import Run
from ppo import exact_kl

ROWS = 128


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--iterations", type=int, default=60)
    args = parser.parse_args()
    run = Run(parse_config(["--stages", "sample", "--prompt", "x", "--out", args.run]))
    reference, scorer = run.load_network("sft"), run.load_network("reward")
    policy = copy.deepcopy(reference).requires_grad_(True)
    prompts, _ = run.prompts()
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(policy.parameters(), lr=5e-4)
    rows = []
    for iteration in range(args.iterations + 1):
        picked = [prompts[i] for i in torch.randint(len(prompts), (ROWS,), generator=generator).tolist()]
        rollout = generate(policy, picked, run.config.response_tokens, 1.0, generator)
        with torch.no_grad():
            scores = scorer(rollout)                                                          # (B,)
        if iteration % 5 == 0:
            row = dict(iteration=iteration, score=scores.mean().item(),
                       gold=run.rollout_gold(picked, rollout).mean().item(),
                       kl=exact_kl(policy, reference, rollout).mean().item(),
                       length=rollout.response_lens.float().mean().item())
            rows.append(row)
            answer = printable(decode(run.tokenizer, rollout.response_ids()[0]))
            print("  ".join(f"{name} {x:.2f}" if isinstance(x, float) else f"{name} {x:3d}" for name, x in row.items()),
                  f" {answer[:70]}", flush=True)
        advantages = (scores - scores.mean()) / scores.std().clamp(min=1e-6)                  # (B,)
        logp = response_logprobs(policy, rollout).sum(dim=1)                                  # (B,)
        optimizer.zero_grad()
        (-(advantages * logp).mean() / 20).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
    with open(f"{args.run}/hack.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
