"""graphs.py: on a pretended GPU, whose graphs repeat what was launched while they recorded, and on a real one where there is one."""

import copy

import pytest
import torch
from helpers import E, random_texts, tiny_gpt
from pretend import Pretend

from graphs import Tape
from model import generate, response_logprobs
from ppo import train_ppo
from reward import RewardModel

PROMPTS = random_texts(B=8)[0]  # the longest has six tokens


@pytest.fixture(params=["pretended", pytest.param("real", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"))])
def device(request):
    if request.param == "real":
        yield torch.device("cuda")
    else:
        with Pretend() as gpu:
            yield gpu.device


def seeded(device, seed=0):
    return torch.Generator(device).manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_replayed_rollouts_know_their_logprobs(device, dtype):
    """The graph reads where the recording read: prompts, lengths or the cache of the first rollout answer all the others."""
    model, tape, generator = tiny_gpt(dtype=dtype).to(device), Tape(), seeded(device)
    for prompts in (PROMPTS, PROMPTS[::-1], PROMPTS[3:] + PROMPTS[:3]):
        rollout = generate(model, prompts, 9, 0.7, generator, P=6, loop=tape)
        logp = response_logprobs(model, rollout, 0.7).detach()
        torch.testing.assert_close(rollout.logp.cpu(), logp.cpu(), rtol=1e-4, atol=1e-5)  # on the CPU: of "meta" tensors only the shapes are compared
        for row, ids, n, finished in zip(prompts, rollout.ids.tolist(), rollout.response_lens.tolist(), rollout.finished.tolist()):
            assert ids[6 - len(row):6] == row
            assert finished == (ids[6 + n - 1] == E) and E not in ids[6:6 + n - 1] and (finished or n == 9)


def test_replays_differ_and_follow_the_weights(device):
    """Random numbers or weights are frozen in the recording: every rollout is the first one again, and the policy never moves."""
    model, tape, generator = tiny_gpt().to(device), Tape(), seeded(device)
    a, b = (generate(model, PROMPTS, 9, 1.0, generator, P=6, loop=tape).response_ids() for _ in range(2))
    assert a != b
    with torch.no_grad():
        model.ln_f.weight.zero_()
        model.wte.weight[E] *= 100 / model.wte.weight[E].norm()
        model.ln_f.bias.copy_(model.wte.weight[E])
    assert generate(model, PROMPTS, 9, 1.0, generator, P=6, loop=tape).response_ids() == [[E]] * len(PROMPTS)


def test_the_generator_is_registered():
    """CUDA refuses to record the random numbers of a generator that the graph was not told of; the pretended graph takes them."""
    with Pretend() as gpu:
        generator = seeded(gpu.device)
        generate(tiny_gpt().to(gpu.device), PROMPTS, 9, 1.0, generator, P=6, loop=Tape())
        assert [graph.generators for graph in gpu.graphs] == [[generator]]


def test_a_replay_is_launched_without_waiting():
    """A value is read between the first token and the last: the GPU is waited for although nothing is decided."""
    with Pretend() as gpu:
        model, tape, generator, waits = tiny_gpt().to(gpu.device), Tape(), seeded(gpu.device), []
        for _ in range(3):
            before = gpu.waits
            generate(model, PROMPTS, 9, 1.0, generator, P=6, loop=tape)
            waits.append(gpu.waits - before)
        assert waits == [5, 5, 5]  # prompts and lengths there, the sorted lengths back, the cells of the last prompt tokens; the longest response


@pytest.mark.parametrize("change", ["model", "rows", "columns", "steps", "temperature", "generator"])
def test_a_tape_serves_what_it_was_recorded_with(device, change):
    """A tape that was recorded for something else answers all the same: with another temperature's samples, or the rows of the recording."""
    model, tape, generator = tiny_gpt().to(device), Tape(), seeded(device)
    asked = dict(model=model, prompts=PROMPTS, max_new_tokens=9, temperature=1.0, generator=generator, P=6)
    other = dict(model=dict(model=copy.deepcopy(model)), rows=dict(prompts=PROMPTS[:1]), columns=dict(P=7, max_new_tokens=8), steps=dict(max_new_tokens=8),
                 temperature=dict(temperature=0.5), generator=dict(generator=seeded(device)))[change]
    generate(**asked, loop=tape)
    generate(**asked, loop=tape)
    with pytest.raises(ValueError, match="a tape replays one model"):
        generate(**{**asked, **other}, loop=tape)


def test_ppo_learns_from_replayed_rollouts():
    """The flag is not passed on, batches without the longest prompt have other columns, or the sampler replays something else than the policy."""
    with Pretend() as gpu:
        policy, rows = tiny_gpt().to(gpu.device), []
        reward_model = RewardModel(policy).to(policy.wte.weight)
        train_ppo(policy, copy.deepcopy(policy), reward_model, [[token] for token in range(8)] + [[1, 2, 3, 4]], 6, 3, 3, 1, max_new_tokens=6,
                  cuda_graphs=True, log=lambda **row: rows.append(row))
        assert len(rows) == 6 and all(row["ratio_error"] < 1e-5 for row in rows)
        assert [graph.replays for graph in gpu.graphs] == [6]
