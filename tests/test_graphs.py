"""graphs.py: on a pretended GPU, whose graphs repeat what was launched while they recorded; on a real one where there is one."""

import pytest
import torch
from helpers import E, random_texts, tiny_gpt
from pretend import Pretend
from test_device import ppo

from graphs import Tape
from model import generate, response_logprobs

PROMPTS = random_texts(B=8)[0]


def rollouts(model, device, tape, batches, temperature=0.7, seed=0):
    generator = torch.Generator(device).manual_seed(seed)
    return [generate(model, prompts, 9, temperature, generator, P=6, loop=tape) for prompts in batches]


def check(model, device, batches):
    """A recorded rollout and replayed ones: what they say of themselves is what the scorer says of them."""
    for prompts, rollout in zip(batches, rollouts(model, device, Tape(), batches)):
        logp = response_logprobs(model, rollout, 0.7).detach()
        torch.testing.assert_close(rollout.logp.cpu(), logp.cpu(), rtol=1e-6, atol=1e-6)  # on the CPU: of "meta" tensors only the shapes are compared
        for row, ids, n, finished in zip(prompts, rollout.ids.tolist(), rollout.response_lens.tolist(), rollout.finished.tolist()):
            assert ids[6 - len(row):6] == row
            assert finished == (ids[6 + n - 1] == E) and E not in ids[6:6 + n - 1] and (finished or n == 9)


BATCHES = [PROMPTS, PROMPTS[::-1], PROMPTS[3:] + PROMPTS[:3]]


def test_replayed_rollouts_know_their_logprobs():
    """The graph reads where the recording read: prompts, lengths or the cache of the first rollout answer all the others."""
    with Pretend() as gpu:
        check(tiny_gpt().to(gpu.device), gpu.device, BATCHES)


def test_replays_differ_and_follow_the_weights():
    """Random numbers or weights are frozen in the recording: every rollout is the first one again, and the policy never moves."""
    with Pretend() as gpu:
        model, tape = tiny_gpt().to(gpu.device), Tape()
        generator = torch.Generator(gpu.device).manual_seed(0)
        a, b = (generate(model, PROMPTS, 9, 1.0, generator, P=6, loop=tape).response_ids() for _ in range(2))
        assert a != b and tape.graph.generators == [generator]
        with torch.no_grad():
            model.ln_f.weight.zero_()
            model.wte.weight[E] *= 100 / model.wte.weight[E].norm()
            model.ln_f.bias.copy_(model.wte.weight[E])
        assert generate(model, PROMPTS, 9, 1.0, generator, P=6, loop=tape).response_ids() == [[E]] * len(PROMPTS)


def test_a_replay_is_launched_without_waiting():
    """A value is read between the first token and the last: the GPU is waited for although nothing is decided."""
    with Pretend() as gpu:
        model, tape, waits = tiny_gpt().to(gpu.device), Tape(), []
        for _ in range(3):
            before = gpu.waits
            rollouts(model, gpu.device, tape, [PROMPTS])
            waits.append(gpu.waits - before)
        assert waits == [3, 3, 3]  # the lengths, the cells of the last prompt tokens, the longest response


def test_other_shapes_are_refused():
    """A tape made for one batch size is played for another and answers with rows of the recording."""
    with Pretend() as gpu:
        model, tape = tiny_gpt().to(gpu.device), Tape()
        with pytest.raises(RuntimeError):
            rollouts(model, gpu.device, tape, [PROMPTS, PROMPTS[:5]])


def test_ppo_learns_from_replayed_rollouts():
    """The flag is not passed on, or the ratio is off 1 because the sampler replays something else than the policy (a canary tells)."""
    with Pretend() as gpu:
        rows = []
        ppo(tiny_gpt().to(gpu.device), log=lambda **row: rows.append(row), cuda_graphs=True)
        assert len(rows) == 2 and all(row["ratio_error"] < 1e-5 for row in rows)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_graphs_on_a_real_gpu():
    """CUDA's own functions do not do what the pretended ones do."""
    check(tiny_gpt().cuda(), "cuda", BATCHES)
