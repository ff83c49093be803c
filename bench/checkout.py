"""
One side of `python -m bench.before`: the tasks of tasks.py on the core of another checkout.

before.py starts this file as a script, once for each checkout, and talks to it as worker.py talks to peers.py.
Here `bench` would be a package of the other checkout. So the files beside this one are imported by their flat names.
"""

import copy
import functools
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from peers import converse  # this folder is on the path, because it holds the script


def make_policy(setup):
    from model import GPT, GPTConfig

    policy = GPT(GPTConfig(**setup["sizes"]))
    policy.load_state_dict(setup["weights"])  # the names are those of GPT-2, in every commit
    return policy


def make_batch(setup):
    from data import collate

    responses = setup["responses"]
    return collate(setup["prompts"][:len(responses)], responses, setup["pad"])


# ---- one adapter for each interface of the core ----------------------------------------------------------------------
# Each returns {task: function(steps, tick)}. A function does all steps and calls tick() after each.

def new_tasks(setup):
    """Return the tasks of a checkout that has pipeline/: tasks.py of this checkout runs on the core of the other."""
    import tasks

    policy = make_policy(setup)
    prompts = setup["prompts"]
    pairs = setup["pairs"]
    return dict(
        rollout=functools.partial(tasks.rollouts, policy, prompts[:tasks.BATCH]),
        ppo=functools.partial(tasks.ppo_iterations, policy, prompts),
        dpo=functools.partial(tasks.dpo_steps, policy, pairs),
        reward=functools.partial(tasks.reward_steps, policy, pairs),
        passes=functools.partial(tasks.forward_backwards, policy, make_batch(setup)),
    )


def old_tasks(setup):
    """Return the tasks of commit 337537d, whose training loops take every setting as a parameter."""
    from dpo import train_dpo
    from model import generate, response_logprobs
    from ppo import train_ppo
    from reward import RewardModel, train_reward_model

    s = SimpleNamespace(**setup["settings"])
    policy = make_policy(setup)
    prompts = setup["prompts"]
    pairs = setup["pairs"]
    batch = make_batch(setup)

    def rollouts(steps, tick):
        for _ in range(steps):
            generate(policy, prompts[:s.ppo_batch], s.response_tokens)
            tick()

    def ppo_iterations(steps, tick):
        train_ppo(copy.deepcopy(policy), policy, RewardModel(policy), prompts, iterations=steps,
                  batch_size=s.ppo_batch, minibatch_size=s.minibatch, epochs=s.ppo_epochs, beta=s.beta, lr=s.ppo_lr,
                  critic_lr=s.critic_lr, gamma=s.gamma, lam=s.lam, clip=s.clip, value_clip=s.value_clip,
                  temperature=s.temperature, max_new_tokens=s.response_tokens, seed=0, log=lambda **row: tick())

    def dpo_steps(steps, tick):
        train_dpo(copy.deepcopy(policy), policy, pairs[:s.batch_size * steps], setup["pad"], epochs=s.dpo_epochs,
                  batch_size=s.batch_size, beta=s.dpo_beta, lr=s.dpo_lr, kind=s.dpo_kind,
                  label_smoothing=s.label_smoothing, seed=0, log=lambda **row: tick())

    def reward_steps(steps, tick):
        train_reward_model(RewardModel(policy), pairs[:s.batch_size * steps], setup["pad"], epochs=s.reward_epochs,
                           batch_size=s.batch_size, lr=s.reward_lr, weight_decay=s.weight_decay, seed=0,
                           log=lambda **row: tick())

    def passes(steps, tick):
        for _ in range(steps):
            policy.zero_grad()
            response_logprobs(policy, batch).sum().backward()
            tick()

    return dict(rollout=rollouts, ppo=ppo_iterations, dpo=dpo_steps, reward=reward_steps, passes=passes)


def main(path):
    setup = torch.load(path)
    sys.path.insert(0, setup["checkout"])
    new = Path(setup["checkout"], "pipeline").exists()
    tasks = new_tasks(setup) if new else old_tasks(setup)

    def build(setup, order, tick):
        torch.manual_seed(0)  # both sides then make the same reward model and sample the same responses
        return functools.partial(tasks[order["task"]], steps=order["steps"], tick=tick)

    converse(setup, {name: build for name in tasks})


if __name__ == "__main__":
    main(sys.argv[1])
