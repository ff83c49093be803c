"""
Seconds of PPO iterations of a finished run, to see how much other programs slow torch's threads down:

    python -m bench.spin runs/default            and the same after GOMP_SPINCOUNT=10000, which minirlhf.py sets
"""

import copy
import dataclasses
import statistics
import sys
import time

from pipeline.config import Config, read_settings
from pipeline.run import Run
from ppo import train_ppo


def main(folder, iterations=5):
    run = Run(folder, Config(**read_settings(folder)))
    config = dataclasses.replace(run.config, ppo_iterations=iterations)
    reference, reward_model = run.load_network("sft"), run.load_network("reward")
    policy, critic = [copy.deepcopy(x).requires_grad_(True) for x in (reference, reward_model)]
    seconds, clock = [], time.perf_counter()
    for _ in train_ppo(policy, critic, reference, reward_model, run.prompts[0], config, seed=0):
        seconds.append(time.perf_counter() - clock)
        clock = time.perf_counter()
    print(f"{statistics.median(seconds[1:]):.2f} s, the median without the first iteration")


if __name__ == "__main__":
    main(sys.argv[1])
