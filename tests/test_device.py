"""
The loops on a GPU learn what they learn on the CPU, and do not wait for it without need: `pytest --device cuda`.

Without that option these tests are skipped. The option makes the runs of all other tests on the GPU too.
"""

import copy
import warnings

import pytest
import torch
from helpers import PAIRS, finish, tiny_gpt

from dpo import DPOConfig, train_dpo
from grpo import GRPOConfig, train_grpo
from model import generate
from ppo import train_ppo
from reward import RewardConfig, RewardModel, train_reward_model
from sft import SFTConfig, train_sft

RL = GRPOConfig(ppo_iterations=2, ppo_batch=8, minibatch=4, response_tokens=6, ppo_lr=1e-2, grpo_lr=1e-2)
PROMPTS = [[1, 2, 3], [4], [5, 6]]
EXAMPLES = [(pair["prompt"], pair["chosen"]) for pair in PAIRS]


def scorer_on(device):
    torch.manual_seed(0)
    return RewardModel(tiny_gpt()).double().to(device).requires_grad_(False)


LOOPS = dict(
    sft=lambda policy, critic, device: train_sft(policy, EXAMPLES, SFTConfig(3, 1e-2, 3), 0),
    reward=lambda policy, critic, device: train_reward_model(critic, PAIRS, RewardConfig(reward_batch=3), 0),
    dpo=lambda policy, critic, device: train_dpo(policy, tiny_gpt().to(device), PAIRS, DPOConfig(dpo_batch=3), 0),
    ppo=lambda policy, critic, device: train_ppo(policy, critic, tiny_gpt().to(device), scorer_on(device), PROMPTS, RL,
                                                 0),
    grpo=lambda policy, critic, device: train_grpo(policy, tiny_gpt().to(device), scorer_on(device), PROMPTS, RL, 0))


@pytest.fixture(autouse=True)
def on_a_gpu(device):
    if device == "cpu":
        pytest.skip("pytest --device cuda runs the tests of the GPU")


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_learns_on_the_device(name, device):
    """Bug: a tensor is made on the CPU in the middle of a loop: an error that only a GPU shows."""
    policy, critic = tiny_gpt().to(device), scorer_on(device).requires_grad_(True)
    before = [copy.deepcopy(network).cpu() for network in (policy, critic)]
    finish(LOOPS[name](policy, critic, device))
    changed = [any(not torch.equal(a, b.cpu()) for a, b in zip(old.parameters(), new.parameters()))
               for old, new in zip(before, (policy, critic))]
    assert changed == [name != "reward", name in ("reward", "ppo")]
    if name in ("sft", "reward", "dpo"):  # those that sample have other random numbers on a GPU
        here, there = (tiny_gpt(), scorer_on("cpu").requires_grad_(True)), (policy, critic)
        finish(LOOPS[name](*here, "cpu"))
        for network, far_network in zip(here, there):
            for a, b in zip(network.parameters(), far_network.parameters()):
                torch.testing.assert_close(a.detach(), b.detach().cpu(), rtol=1e-5, atol=1e-6)


def waits(function):
    """How often Python waits for the GPU in a call, by torch's own count."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def test_a_step_of_sampling_waits_once(device):
    """Bug: values are read in the loop over tokens: the GPU then does nothing several times in every step."""
    model = tiny_gpt(layers=1).to(device)
    model.end = -1  # no row ends
    sampler = torch.Generator(device).manual_seed(0)
    counts = [waits(lambda steps=steps: generate(model, [[1, 2]] * 4, steps, generator=sampler)) for steps in (2, 12)]
    assert counts[1] - counts[0] <= 10 and counts[0] <= 8
