"""The same code on a GPU: the loops and the pipeline on a pretended one (pretend.py), which minds where every tensor is and counts the waits."""

import copy
import json
from unittest import mock

import pytest
import torch
from helpers import PAD, PAIRS, random_batch, tiny_gpt
from pretend import Pretend

import minirlhf
from dpo import train_dpo
from model import generate, response_logprobs
from ppo import train_ppo
from report import format_table, peak_memory
from reward import GaussianHeads, RewardModel, train_brme, train_reward_model
from run import Run

TINY = ("--quick --n-embd 32 --documents 500 --pretrain-steps 8 --demonstrations 200 --sft-steps 5 --pairs 40 --ppo-iterations 2 --ppo-batch 16 "
        "--minibatch 8 --reward-epochs 1 --eval-prompts 6 --best-of 2 --response-tokens 16").split()


def policy_on(device):
    torch.manual_seed(0)
    return tiny_gpt().to(device)


def reward_model(policy):
    torch.manual_seed(0)
    return RewardModel(policy).to(policy.wte.weight)


def ppo(policy, iterations=2, epochs=2, **options):
    train_ppo(policy, copy.deepcopy(policy), reward_model(policy), [[1, 2, 3], [4], [5, 6]], iterations, 8, 4, epochs, max_new_tokens=6, **options)
    return policy


def dpo(policy):
    train_dpo(policy, copy.deepcopy(policy), PAIRS, PAD, 1, 3)
    return policy


def reward(policy):
    model = reward_model(policy)
    train_reward_model(model, PAIRS, PAD, 1, 3)
    return model


def brme(policy):
    torch.manual_seed(1)
    heads = GaussianHeads(policy, 3).to(policy.wte.weight)
    train_brme(heads, reward_model(policy), PAIRS, PAD, batch_size=3)
    return heads


def test_the_pretended_gpu_minds_where_tensors_are():
    """The pretence is none: what a GPU would refuse, or wait for, goes unnoticed, and with it every bug that the tests below are for."""
    with Pretend() as gpu:
        x = torch.arange(6, device=gpu.device)
        assert x.device == gpu.device and (x + 1).tolist() == [1, 2, 3, 4, 5, 6] and gpu.waits == 1
        with pytest.raises(AssertionError, match="meets one on the GPU"):
            x + torch.ones(6)
        with pytest.raises(AssertionError, match="meets one on the GPU"):
            x[torch.tensor([0, 1])]
        before = gpu.waits
        int(x.sum()), x[x > 2], x.nonzero(), x.cpu(), x.repeat_interleave(x), torch.zeros(6).copy_(x), x.copy_(torch.ones(6)), torch.ones(6).to(x.device)
        assert gpu.waits == before + 8
        x[x], x.repeat_interleave(x, output_size=6), torch.where(x > 2, x, 0), x.copy_(torch.ones(6), non_blocking=True), x.clone()
        assert gpu.waits == before + 8


@pytest.mark.parametrize("loop", [ppo, dpo, reward, brme])
def test_the_loops_learn_the_same_on_a_gpu(loop):
    """A tensor made on the CPU in the middle of a loop: an error that only a GPU shows."""
    here = loop(policy_on("cpu"))
    with Pretend() as gpu:
        there = loop(policy_on(gpu.device))
        for a, b in zip(here.parameters(), there.parameters()):
            assert b.device == gpu.device
            torch.testing.assert_close(a.detach(), b.detach().cpu(), rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def tiny_report(tmp_path_factory):
    """The report of the whole pipeline on a pretended GPU, with its memory pretended and its sampling in PPO replayed."""
    folder = tmp_path_factory.mktemp("runs")
    run = Run(minirlhf.parse_config([*TINY, "--device", "cpu", "--out", str(folder)]))
    run.config.cuda_graphs = True
    with Pretend() as gpu, mock.patch("report.peak_memory", lambda device: 1234 * 2 ** 20):
        run.device = gpu.device
        minirlhf.run_stages(run)
    return dict(json.loads((folder / "report.json").read_text()), replays=[graph.replays for graph in gpu.graphs])


def test_the_whole_pipeline_runs_on_a_gpu(tiny_report):
    """A stage forgets the device: a batch, a checkpoint, the judge or the report stays on the CPU while the networks are elsewhere."""
    assert tiny_report["device"] == "meta" and tiny_report["replays"] == [2] and set(tiny_report["policies"]) == {"pretrained", "sft", "best_of_n", "dpo", "ppo"}


def test_the_peak_of_a_gpus_memory_is_told(tiny_report):
    """The report of a run on a GPU is silent about its memory, or about a flag that decides which random numbers are drawn."""
    assert tiny_report["peak_memory"] == 1234 * 2 ** 20 and tiny_report["cuda_graphs"] is True
    assert "at most 1,234 MiB of tensors on the GPU" in format_table(tiny_report, 2)
    assert peak_memory(torch.device("cpu")) is None


def test_a_step_of_sampling_waits_once():
    """A value is read in the loop over tokens: every step then stands still until the GPU has caught up, several times over."""
    with Pretend() as gpu:
        model = tiny_gpt(layers=1).to(gpu.device)
        waits = []
        for steps in (2, 12):
            before = gpu.waits
            generate(model, [[1, 2]] * 4, steps, generator=torch.Generator(gpu.device).manual_seed(0), end=-1)  # no token is E
            waits.append(gpu.waits - before)
        assert waits[1] - waits[0] == 10


def test_a_pass_waits_for_shapes_only():
    """The network reads lengths one by one: a forward pass over many rows then waits for a GPU once a row, or once a group of rows."""
    with Pretend() as gpu:
        model, batch = tiny_gpt().to(gpu.device), random_batch(B=70).to(gpu.device)
        before = gpu.waits
        response_logprobs(model, batch).sum().backward()
        assert gpu.waits - before == 4  # the lengths, the cells that are wanted, the tokens whose log-probs they are, and on the way back the mask


def test_an_update_of_ppo_waits_for_shapes_and_a_canary():
    """Metrics are read between two updates, or rows are copied to the GPU: it is done with one before it hears of the next."""
    with Pretend() as gpu:
        waits = []
        for epochs in (1, 2):
            before = gpu.waits
            ppo(policy_on(gpu.device), 1, epochs)
            waits.append(gpu.waits - before)
        assert waits[1] - waits[0] == 2 * (4 + 3 + 1)  # two minibatches: passes of policy and critic, and whether the loss is finite


def test_a_gpu_attends_all_rows_at_once():
    """More rows are more kernels, because a GPU is asked for a group at a time; or its one group is attended otherwise than the CPU's several."""
    here, batches = policy_on("cpu"), [random_batch(B=B) for B in (10, 100)]
    with Pretend() as gpu:
        there, launches = policy_on(gpu.device), []
        for batch in batches:
            far, before = batch.to(gpu.device), gpu.launches
            logp = response_logprobs(there, far)
            launches.append(gpu.launches - before)
            torch.testing.assert_close(logp.detach().cpu(), response_logprobs(here, batch).detach())
        assert launches[0] == launches[1]
