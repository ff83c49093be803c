"""
Hack your own reward model: climb its score without any price for KL, and watch gold.

    python hack.py runs/hack

REINFORCE with the batch as its baseline, beta 0. Prints score and gold (both in standard deviations of the SFT policy),
KL from the SFT policy, and the first answer; writes them to RUN/hack.csv. Gold is only looked at.
"""

import copy
import sys

import torch

from model import generate, response_logprobs
from pipeline.config import Config, read_settings
from pipeline.run import Run
from pipeline.scores import scaled_gold
from ppo import exact_kl
from tokenizer import decode

ROWS, ITERATIONS = 128, 60


def main(folder):
    run = Run(folder, Config(**read_settings(folder)))
    reference, scorer = run.load_network("sft"), run.load_network("reward")
    policy = copy.deepcopy(reference).requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(policy.parameters(), lr=5e-4)
    with open(f"{folder}/hack.csv", "w", encoding="utf-8") as file:
        print("iteration,score,gold,kl", file=file)
        for iteration in range(ITERATIONS + 1):
            picks = torch.randint(len(run.prompts[0]), (ROWS,), generator=generator).tolist()
            rollout = generate(policy, [run.prompts[0][i] for i in picks], run.config.response_tokens, 1.0, generator)
            with torch.no_grad():
                scores = scorer(rollout)                                                      # (B,)
            if iteration % 5 == 0:
                gold = scaled_gold(run, rollout.prompt_ids(), rollout.response_ids()).mean().item()
                row = dict(score=scores.mean().item(), gold=gold, kl=exact_kl(policy, reference, rollout).mean().item())
                print(iteration, *row.values(), sep=",", file=file, flush=True)
                print(f"{iteration:3d} ", "  ".join(f"{name} {x:.2f}" for name, x in row.items()),
                      f" {decode(run.tokenizer, rollout.response_ids()[0])[:70]}", flush=True)
            advantages = (scores - scores.mean()) / scores.std().clamp(min=1e-6)              # (B,)
            logp = response_logprobs(policy, rollout).sum(dim=1)                              # (B,)
            optimizer.zero_grad()
            (-(advantages * logp).mean() / 20).backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()


if __name__ == "__main__":
    main(sys.argv[1])
