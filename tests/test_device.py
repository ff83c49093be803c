"""
The same code on a GPU: the loops and the pipeline on a pretended one (pretend.py).

It knows on which device every tensor is, and counts how often Python waits for the GPU.
"""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from helpers import PAD, PAIRS, E, random_batch, random_texts, tiny_gpt
from pretend import Pretend

import minirlhf
from data import collate, collate_pairs, pad_prompts
from dpo import train_dpo
from grpo import train_grpo
from model import KVCache, generate, response_logprobs
from pipeline import stages
from pipeline.config import QUICK, STAGES, Config
from pipeline.run import Run
from ppo import exact_kl, train_ppo
from reward import RewardModel, train_reward_model
from robust import GaussianHeads, train_brme

CONFIG = SimpleNamespace(
    response_tokens=6, temperature=0.8, ppo_iterations=2, ppo_batch=8, minibatch=4, ppo_epochs=2, ppo_lr=1e-2,
    critic_lr=1e-2, beta=0.1, gamma=1.0, lam=0.95, clip=0.2, value_clip=0.2, batch_size=3, dpo_epochs=1, dpo_beta=0.1,
    dpo_lr=1e-2, dpo_kind="dpo", label_smoothing=0.0, reward_epochs=1, reward_lr=1e-2, weight_decay=0.1)
TINY = dict(QUICK, n_layer=1, n_head=2, n_embd=16, documents=300, pretrain_steps=3, demonstrations=100, sft_steps=2,
            pairs=32, reward_epochs=1, ppo_iterations=1, ppo_batch=8, minibatch=4, dpo_epochs=1, eval_prompts=4,
            best_of=2, response_tokens=8)


def policy_on(device):
    return tiny_gpt().to(device)


def on_cpu(make, policy):
    """Make a network on the CPU and move it to the policy's device, so that its random weights are the same on both."""
    torch.manual_seed(0)
    return make(tiny_gpt()).to(policy.wte.weight)


def learn_ppo(policy, **settings):
    config = SimpleNamespace(**{**vars(CONFIG), **settings})
    reward_model = on_cpu(RewardModel, policy).requires_grad_(False)
    critic = copy.deepcopy(reward_model).requires_grad_(True)
    train_ppo(policy, critic, copy.deepcopy(policy), reward_model, [[1, 2, 3], [4], [5, 6]], config, 0)
    return [policy, critic]


def learn_grpo(policy):
    config = SimpleNamespace(**vars(CONFIG), group=4, grpo_kind="rloo", grpo_lr=1e-2, grpo_kl="loss", grpo_mean="",
                             grpo_ratio="token", grpo_clip_high=0.2)
    reward_model = on_cpu(RewardModel, policy).requires_grad_(False)
    train_grpo(policy, copy.deepcopy(policy), reward_model, [[1, 2, 3], [4], [5, 6]], config, 0)
    return [policy]


def learn_dpo(policy):
    train_dpo(policy, copy.deepcopy(policy), PAIRS, PAD, CONFIG, 0)
    return [policy]


def learn_reward(policy):
    reward_model = on_cpu(RewardModel, policy)
    train_reward_model(reward_model, PAIRS, PAD, CONFIG, 0)
    return [reward_model]


def learn_heads(policy):
    heads = on_cpu(lambda trunk: GaussianHeads(trunk, 3), policy)
    train_brme(heads, on_cpu(RewardModel, policy), PAIRS, PAD, "nll", 0.5, CONFIG, 0)
    return [heads]


def learn_sft(policy):
    examples = [(pair["prompt"], pair["chosen"]) for pair in PAIRS]
    stages.train_sft(policy, examples, 3, 1e-2, CONFIG, PAD, 0, "sft", lambda **row: None)
    return [policy]


# ---- the pretence ----------------------------------------------------------------------------------------------------

def test_the_pretended_gpu_refuses_what_a_gpu_refuses():
    """A pretence that allows everything: a tensor on the CPU in the middle of the GPU's would go unnoticed."""
    with Pretend() as gpu:
        x = torch.arange(6, device=gpu.device)
        assert x.device == gpu.device
        assert (x + 1).tolist() == [1, 2, 3, 4, 5, 6]
        with pytest.raises(AssertionError, match="meets one on the GPU"):
            x + torch.ones(6)
        with pytest.raises(AssertionError, match="meets one on the GPU"):
            x[torch.tensor([0, 1])]


def test_the_pretended_gpu_counts_waits():
    """A pretence that waits for nothing: the tests of waits below would always pass."""
    with Pretend() as gpu:
        x = torch.arange(6, device=gpu.device)

        def waits(function):
            before = gpu.waits
            function()
            return gpu.waits - before

        assert waits(lambda: int(x.sum())) == 1
        assert waits(lambda: x[x > 2]) == 1
        assert waits(lambda: x.nonzero()) == 1
        assert waits(lambda: x.cpu()) == 1
        assert waits(lambda: x.tolist()) == 1
        assert waits(lambda: x.repeat_interleave(x)) == 1
        assert waits(lambda: torch.zeros(6).copy_(x)) == 1
        assert waits(lambda: x.copy_(torch.ones(6))) == 1
        assert waits(lambda: torch.ones(6).to(x.device)) == 1
        assert waits(lambda: torch.tensor([1, 2], device=x.device)) == 1

        assert waits(lambda: x[x]) == 0
        assert waits(lambda: x.repeat_interleave(x, output_size=6)) == 0
        assert waits(lambda: torch.where(x > 2, x, 0)) == 0
        assert waits(lambda: x.copy_(torch.ones(6), non_blocking=True)) == 0
        assert waits(lambda: torch.ones(6).to(x.device, non_blocking=True)) == 0
        assert waits(lambda: x.clone()) == 0


# ---- everything runs there -------------------------------------------------------------------------------------------

def test_batches_are_made_and_moved_where_they_should_be():
    """A field of a batch that stays on the CPU: when it is made, when it is moved, and in what is computed from it."""
    with Pretend() as gpu:
        batch = collate([[1, 2], [3]], [[4], []], PAD, device=gpu.device)
        left, lengths = pad_prompts([[1, 2], [3]], PAD, device=gpu.device)
        pairs = collate_pairs(PAIRS, PAD, device=gpu.device)
        moved = random_batch().to(gpu.device)
        trimmed = moved.trim()
        for x in (batch, pairs, moved, trimmed, moved.select(torch.arange(2, device=gpu.device))):
            for tensor in (x.ids, x.prompt_lens, x.response_lens, x.mask, x.start, x.responses):
                assert tensor.device == gpu.device
        assert left.device == lengths.device == gpu.device
        assert torch.equal(moved.to("cpu").ids, random_batch().ids)
        assert moved.response_ids() == random_batch().response_ids()


@pytest.mark.parametrize("learn", [
    learn_dpo, learn_reward, learn_heads, learn_sft, *[pytest.param(learn, marks=pytest.mark.slow)
                                                       for learn in (learn_ppo, learn_grpo)]])
def test_the_loops_learn_the_same_on_a_gpu(learn):
    """A tensor made on the CPU in the middle of a loop: an error that only a GPU shows."""
    here = learn(policy_on("cpu"))
    with Pretend() as gpu:
        there = learn(policy_on(gpu.device))
        for network, far_network in zip(here, there):
            for a, b in zip(network.parameters(), far_network.parameters()):
                assert b.device == gpu.device
                torch.testing.assert_close(a.detach(), b.detach().cpu(), rtol=1e-5, atol=1e-6)


@pytest.mark.slow  # twenty thousand operations on the pretended GPU, and 4,500 prompts that four stages tokenise
def test_the_whole_pipeline_runs_on_a_gpu(tmp_path):
    """A stage forgets the device: a batch, a checkpoint or the report stays on the CPU, and the networks do not."""
    run = Run(Config(out=str(tmp_path), device="cpu", stages=",".join(STAGES), **TINY))
    with Pretend() as gpu:
        run.device = gpu.device
        minirlhf.run_stages(run)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["device"] == "meta"
    assert set(report["policies"]) == {"pretrained", "sft", "best_of_n", "dpo", "ppo", "grpo"}


# ---- nothing waits without need --------------------------------------------------------------------------------------

def waits_of(gpu, function):
    before = gpu.waits
    function()
    return gpu.waits - before


def test_a_step_of_sampling_waits_once():
    """Values are read in the loop over tokens: the GPU then stands still several times in every step."""
    with Pretend() as gpu:
        model = tiny_gpt(layers=1).to(gpu.device)
        generator = torch.Generator(gpu.device).manual_seed(0)

        def waits(steps):
            return waits_of(gpu, lambda: generate(model, [[1, 2]] * 4, steps, generator=generator, end=-1))  # no E

        assert waits(12) - waits(2) == 10
        assert waits(1) == 4  # prompts and their lengths are copied, how many rows run, the longest response


def test_dropping_rows_waits_once_more(monkeypatch):
    """Rows that are dropped one by one, or counted twice."""
    dropped = []
    keep = KVCache.keep

    def spy(cache, rows):
        dropped.append(rows)
        keep(cache, rows)

    monkeypatch.setattr(KVCache, "keep", spy)
    with Pretend() as gpu:
        model = tiny_gpt(layers=1).to(gpu.device)
        prompts = [[1, 2]] * 40
        before = gpu.waits
        rollout = generate(model, prompts, 12, generator=torch.Generator(gpu.device).manual_seed(0), end=E)
        waits = gpu.waits - before
        assert dropped
        assert rollout.R == 12
        assert waits == 2 + 12 + len(dropped) + 1


def test_a_pass_waits_for_two_numbers():
    """The network reads lengths row by row: forward and backward wait for the columns that a batch needs, no more."""
    with Pretend() as gpu:
        model = policy_on(gpu.device)
        batch = random_batch(B=70).to(gpu.device)
        critic = on_cpu(RewardModel, model)
        assert waits_of(gpu, lambda: response_logprobs(model, batch).sum().backward()) == 2  # first and last column
        assert waits_of(gpu, lambda: critic.values(batch).sum().backward()) == 2
        assert waits_of(gpu, lambda: critic(batch).sum().backward()) == 2
        assert waits_of(gpu, lambda: exact_kl(model, model, batch)) == 2  # both networks share them
        assert waits_of(gpu, lambda: model.hidden(batch.ids, batch.start).sum().backward()) == 0


@pytest.mark.slow
def test_an_update_of_ppo_waits_for_columns_and_for_its_canary():
    """Metrics are read between two updates, or rows are copied with a wait: the GPU stands still in between."""
    with Pretend() as gpu:
        waits = []
        for epochs in (1, 2):
            policy = policy_on(gpu.device)
            waits.append(waits_of(gpu, lambda p=policy, n=epochs: learn_ppo(p, ppo_iterations=1, ppo_epochs=n)))
        assert waits[1] - waits[0] == 2 * (2 + 2 + 1)  # two minibatches: policy, critic, and is the loss finite?


def test_a_gpu_takes_all_rows_at_once():
    """More rows mean more kernels, because the GPU gets 16 rows at a time; or its one part gives other values."""
    policy = policy_on("cpu")
    launches = []
    with Pretend() as gpu:
        far_policy = policy_on(gpu.device)
        for B in (10, 100):
            batch = random_batch(B=B)
            far_batch = batch.to(gpu.device)
            before = gpu.launches
            logp = response_logprobs(far_policy, far_batch)
            launches.append(gpu.launches - before)
            torch.testing.assert_close(logp.detach().cpu(), response_logprobs(policy, batch).detach())
    assert launches[0] == launches[1]


def test_a_rollout_on_a_gpu_is_that_of_the_cpu():
    """Sampling on a GPU: rows that are dropped, the caches and the log-probs are those of the CPU, for one seed."""
    prompts, _ = random_texts(1, B=20)
    here = generate(tiny_gpt(), prompts, 10, 0.7, torch.Generator().manual_seed(0))
    with Pretend() as gpu:
        generator = torch.Generator(gpu.device).manual_seed(0)
        there = generate(policy_on(gpu.device), prompts, 10, 0.7, generator)
        for name in ("ids", "prompt_lens", "response_lens", "logp", "finished", "mask"):
            assert getattr(there, name).device == gpu.device, name
        assert there.response_ids() == here.response_ids()
        torch.testing.assert_close(there.logp.cpu(), here.logp)
        assert torch.equal(there.finished.cpu(), here.finished)
