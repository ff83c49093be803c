"""Tests of model.py: the GPT against a textbook GPT, the sampler against the scorer and against enumeration."""

import copy
import math
import warnings

import pytest
import slow
import torch
from helpers import any_rows, close, few, is_pad, make_batch, noise, random_batch, rng, rows_of, surprise, tiny_gpt
from hypothesis import given
from hypothesis import strategies as st

from model import GPT, GPTConfig, generate, response_hidden, response_logprobs, sample
from ppo import exact_kl
from reward import RewardModel


@few
@given(any_rows, st.integers(0, 3), st.sampled_from([(1, 1, 4), (2, 2, 8), (1, 4, 12)]), st.integers(0, 9))
def test_padded_rows_equal_the_textbook_gpt_without_padding(rows, wider, sizes, seed):
    """Bug: another GELU, eps or norm, mixed heads, an untied head, dropout; positions count pads, or pads are seen."""
    model = tiny_gpt(seed, layers=sizes[0], heads=sizes[1], embd=sizes[2])
    prompts, responses = zip(*rows)
    batch = make_batch(prompts, responses, max(map(len, prompts)) + wider, max(map(len, responses)) + wider)
    hidden = model.hidden(batch.ids, batch.start)
    real = ~is_pad(batch)
    for row, (prompt, response) in enumerate(rows):
        close(hidden[row][real[row]], slow.hidden(model, prompt + response))
    close(model(batch.ids, batch.start), hidden @ model.wte.weight.T)
    close(model(batch.ids), model(batch.ids, 0 * batch.start))


def test_weights_start_as_in_gpt2():
    """Bug: a wrong scale. Std 0.02, divided by sqrt(2 layers) where a layer adds to the stream, biases 0, norms 1."""
    model = GPT(GPTConfig(vocab_size=200, block_size=100, n_layer=8, n_head=4, n_embd=64))
    for name, w in model.named_parameters():
        if w.dim() == 2:
            std = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02
            assert abs(w.std().item() / std - 1) < 6 / math.sqrt(2 * w.numel()), name
        else:
            assert (w == (1.0 if name.endswith("weight") else 0.0)).all(), name


def test_a_row_longer_than_the_block_is_refused():
    """Bug: positions beyond the block. Padding on the left does not count, but what is in the cache does."""
    model = tiny_gpt(block=6)
    batch = make_batch([[1, 2], [3]], [[1, 2, 3, 4], [5, 6]], P=9)
    assert model.hidden(batch.ids, batch.start).shape == (2, 13, 8)
    with pytest.raises(ValueError, match="more than 6 columns"):
        model(batch.ids, batch.start - 1)
    caches = model.caches(1, 9)
    with torch.no_grad():
        model.hidden(torch.tensor([[1, 2, 3, 4, 5, 6]]), None, caches)
        with pytest.raises(ValueError, match="more than 6 columns"):
            model.hidden(torch.tensor([[7]]), None, caches)


@few
@given(any_rows, st.sampled_from([1.0, 0.7]), st.integers(0, 9))
def test_response_logprobs_equal_a_loop_over_tokens(rows, temperature, seed):
    """Bug: logits off by one, no temperature, E or a token that looks like PAD masked, the first or last token lost."""
    model = tiny_gpt(seed)
    batch = make_batch(*zip(*rows))
    logp = response_logprobs(model, batch, temperature)
    assert logp.shape == (len(rows), batch.R)
    for row, (prompt, response) in enumerate(rows):
        close(logp[row, :len(response)], slow.logprobs(model, prompt, response, temperature))
        assert (logp[row, len(response):] == 0).all()
    if temperature == 1:  # the default, which SFT and DPO train with
        assert torch.equal(response_logprobs(model, batch), logp)


def test_response_logprobs_have_the_gradient_of_finite_differences():
    """Bug: a detached or doubled path, in the network or between the parts. The value is right, the gradient is not."""
    model, batch = tiny_gpt(2), random_batch(2, B=18, min_response=0)
    coefficients = noise(7, 18, batch.R)

    def total():
        return (coefficients * response_logprobs(model, batch, 0.7)).sum()

    gradients = torch.autograd.grad(total(), list(model.parameters()))
    for seed, (w, gradient) in enumerate(zip(model.parameters(), gradients)):
        direction, values = noise(seed, *w.shape), []
        with torch.no_grad():
            for shift in (1e-5, -2e-5, 1e-5):  # the last one puts the parameter back
                w += shift * direction
                values.append(total())
        close((gradient * direction).sum(), (values[0] - values[1]) / 2e-5, 1e-6)


@pytest.mark.parametrize("vocab, embd, heads", [(11, 8, 2), (64, 16, 2), (100, 32, 4), (300, 64, 4)])
def test_equal_weights_give_equal_bits_frozen_or_trained(vocab, embd, heads):
    """Bug: KL at the start is 1e-7, not 0: PyTorch multiplies a strided slice by a trained matrix in another way."""
    trained = tiny_gpt(0, torch.float32, vocab, block=64, heads=heads, embd=embd, std=0.1)
    critic = RewardModel(trained)
    frozen, reward_model = copy.deepcopy([trained, critic])
    for network in (frozen, reward_model):
        network.requires_grad_(False)
    shapes = [(1, 1, 5), (2, 9, 1), (3, 3, 17), (7, 12, 40), (16, 9, 2), (17, 3, 5), (33, 12, 17), (40, 5, 7)]
    for seed, (B, max_prompt, max_response) in enumerate(shapes):
        batch = random_batch(seed, B, vocab, max_prompt, max_response)
        assert torch.equal(critic.values(batch), reward_model.values(batch))
        assert (exact_kl(trained, frozen, batch, 0.8) == 0).all()


def test_a_bf16_model_scores_and_samples_in_float32():
    """Bug: the scorer or the sampler of a bfloat16 model rounds its log-probs to three digits."""
    model = tiny_gpt(dtype=torch.bfloat16)
    rollout = generate(model, [[1, 2, 3], [4]] * 8, 4, generator=rng())
    logp, logits = response_logprobs(model, rollout), model.head(response_hidden(model, rollout))
    exact = torch.log_softmax(logits.double(), -1).gather(2, rollout.responses[:, :, None])[:, :, 0]
    close(logp[rollout.mask], exact[rollout.mask], 1e-5)
    close(rollout.logp, logp, 0.1)
    for scored in (logp, rollout.logp):
        assert scored.dtype == torch.float32
        assert not torch.equal(scored, scored.bfloat16().float())


def test_no_random_number_draws_what_has_probability_zero(monkeypatch):
    """Bug: a uniform number of exactly 0, or almost 1, draws a token of probability 0 or one beyond the vocabulary."""
    for value in (0.0, 1 - 2 ** -24):
        monkeypatch.setattr(torch, "rand", lambda *shape, value=value, **options: torch.full(shape, value))
        assert sample(torch.tensor([[0, 0.25, 0, 0.75, 0]])).item() in (1, 3)
        tenths = torch.full((1, 10), 0.1, dtype=torch.float64)  # their sum is not exactly 1
        assert sample(tenths).item() < 10


def tree_of_responses(model, prompt, horizon, temperature, response=(), chance=1.0):
    """{response: probability} of all responses of at most `horizon` tokens."""
    if len(response) == horizon or model.end in response:
        return {response: chance}
    probs = torch.softmax(slow.logits(model, prompt + list(response))[-1] / temperature, 0).tolist()
    tree = {}
    for token, p in enumerate(probs):
        tree.update(tree_of_responses(model, prompt, horizon, temperature, (*response, token), chance * p))
    return tree


def test_whole_responses_follow_the_tree_of_all_responses():
    """Bug: any error of the decoding loop, no temperature, top-k or top-p, that 6,000 rollouts can show."""
    model, prompt = tiny_gpt(2, vocab=6, std=0.2), [0, 3]  # no token is rare
    tree = tree_of_responses(model, prompt, 3, 0.7)
    seen = dict.fromkeys(tree, 0)
    for response in generate(model, [prompt] * 6_000, 3, 0.7, rng(4)).response_ids():
        seen[tuple(response)] += 1
    assert len(tree) == 156 and surprise(list(seen.values()), list(tree.values())) < 4


@few
@given(any_rows, st.integers(1, 9), st.integers(1, 9), st.sampled_from([1.0, 0.7]), st.integers(0, 99))
def test_a_rollout_is_well_formed_and_knows_its_logprobs(rows, copies, horizon, temperature, seed):
    """Bug: E not in the mask, tokens after E, other log-probs than the scorer's, wrong rows when some are dropped."""
    model = tiny_gpt(seed, std=0.4)
    prompts = [prompt for prompt, _ in rows] * copies
    rollout = generate(model, prompts, horizon, temperature, rng(seed))
    assert rollout.R == max(rollout.response_lens) <= horizon
    assert rollout.logp.shape == rollout.mask.shape == (len(prompts), rollout.R)
    assert (rollout.ids[is_pad(rollout)] == model.pad).all()
    for row, (prompt, response) in enumerate(rows_of(rollout)):
        assert prompt == prompts[row]
        assert model.end not in response[:-1]
        assert bool(rollout.finished[row]) == (response[-1] == model.end)
        assert rollout.finished[row] or len(response) == horizon
    close(rollout.logp, response_logprobs(model, rollout, temperature).detach())


def test_the_seed_decides_and_nothing_else():
    """Bug: two calls with one generator give the same rollout, or the global generator is used."""
    model, prompts, generator, state = tiny_gpt(), [[1, 2], [3], [4]], rng(5), torch.get_rng_state()
    first, second = [generate(model, prompts, 8, generator=generator).response_ids() for _ in range(2)]
    assert torch.equal(state, torch.get_rng_state())
    assert first == generate(model, prompts, 8, 1.0, rng(5)).response_ids()  # 1 is the default of the temperature
    assert first != second


def test_a_step_of_sampling_waits_once_for_a_gpu(device):
    """Bug: values are read in the loop over tokens: the GPU then does nothing several times in every step."""
    if device == "cpu":
        pytest.skip("pytest --device cuda runs the tests of the GPU")
    model = tiny_gpt(layers=1).to(device)
    model.end = -1  # no row ends
    waits = []
    for steps in (2, 12):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")  # torch warns each time that Python waits
            generate(model, [[1, 2]] * 4, steps, generator=torch.Generator(device).manual_seed(0))
            torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchronizing CUDA operation" in str(warning.message) for warning in caught))
    assert waits[1] - waits[0] <= 10 and waits[0] <= 8
