"""model.py: the GPT against a textbook GPT, the cache against the full forward pass, the sampler against the scorer and against enumeration."""

import math

import pytest
import torch
from helpers import (
    PAD,
    VOCAB,
    E,
    few,
    is_pad,
    make_batch,
    naive_hidden,
    naive_logits,
    naive_response_logprobs,
    poison,
    random_batch,
    random_texts,
    rows_of,
    surprise,
    tiny_gpt,
)
from hypothesis import given
from hypothesis import strategies as st

import model as model_module
from model import (
    GPT,
    Cache,
    GPTConfig,
    Rollout,
    attend,
    from_gpt2,
    gelu,
    generate,
    log_softmax,
    response_hidden,
    response_logprobs,
    sample,
    spread,
    to_gpt2,
)

EXACT = dict(atol=1e-9, rtol=1e-9)
any_token = st.integers(0, VOCAB - 1)  # E and PAD among them: what a token is never decides whether it counts
any_rows = st.lists(st.tuples(st.lists(any_token, min_size=1, max_size=5), st.lists(any_token, max_size=5)), min_size=1, max_size=4)


def close(a, b, **tolerance):
    torch.testing.assert_close(a, b, **{**EXACT, **tolerance})


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def gradients(loss, model):
    return torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True, materialize_grads=True)


def batch_of(rows, wider=0):
    """A batch of (prompt, response) rows with `wider` more columns of padding on both sides than needed."""
    prompts, responses = [list(p) for p, _ in rows], [list(r) for _, r in rows]
    return make_batch(prompts, responses, max(map(len, prompts)) + wider, max(map(len, responses)) + wider)


def always(token, **sizes):
    """A GPT that gives all its probability to one token, whatever it reads: the last norm has weight 0 and the token's embedding as its bias."""
    model = tiny_gpt(**sizes)
    with torch.no_grad():
        model.ln_f.weight.zero_()
        model.wte.weight[token] *= 100 / model.wte.weight[token].norm()
        model.ln_f.bias.copy_(model.wte.weight[token])
    return model


# ---------------------------------------------------------------------------------------------------------------------
# the network

@pytest.mark.parametrize("layers, heads, embd", [(1, 1, 4), (2, 2, 8), (3, 4, 12)])
def test_logits_are_those_of_the_textbook_gpt(layers, heads, embd):
    """A wrong network: GELU without tanh, another eps, post-norm, a lost bias, heads mixed up, attention that sees the future, untied logits."""
    model = tiny_gpt(layers, layers=layers, heads=heads, embd=embd)
    ids = torch.randint(VOCAB, (3, 9), generator=rng(layers))
    logits = model(ids)
    assert logits.shape == (3, 9, VOCAB)
    for row, row_logits in zip(ids.tolist(), logits):
        close(row_logits, naive_logits(model, row))


@few
@given(any_rows, st.integers(0, 3), st.integers(0, 9))
def test_padded_rows_are_those_of_the_textbook_gpt_without_padding(rows, wider, seed):
    """Padding seeps in: positions not shifted by the left padding, pads attended to, a result that depends on the neighbours, a row shifted."""
    model, batch = tiny_gpt(seed), batch_of(rows, wider)
    hidden = model.hidden(batch.ids, batch.prompt_lens, batch.response_lens, batch.P)
    assert hidden.shape == (*batch.ids.shape, 8)
    pads = is_pad(batch)
    assert (hidden[pads] == 0).all()
    for row, (prompt, response) in enumerate(rows):
        close(hidden[row][~pads[row]], naive_hidden(model, prompt + response))
    close(model(batch.ids, batch.prompt_lens, batch.response_lens, batch.P), hidden @ model.wte.weight.T)


def test_missing_lengths_mean_no_padding():
    """A default read wrongly: without P the longest prompt fills the prompt columns, without lengths every column is real."""
    model = tiny_gpt()
    prompts = [[1, 2, 3, 4], [5], [6, 7]]
    batch = make_batch(prompts, [[1, 2], [3, 4], [5, 6]])
    close(model(batch.ids, batch.prompt_lens), model(batch.ids, batch.prompt_lens, batch.response_lens, 4))
    left = make_batch(prompts, [[], [], []])
    for row, prompt in enumerate(prompts):
        close(model(left.ids, left.prompt_lens)[row, 4 - len(prompt):], naive_logits(model, prompt))
    close(model(batch.ids[:1]), model(batch.ids[:1], torch.tensor([4]), torch.tensor([2]), 4))


def test_padding_poisoned_with_random_ids_changes_nothing():
    """PAD equals EOS, or masks from `ids != pad`: the ids at pads reach a logit, a log-prob or a gradient. Equal means bit for bit here."""
    model = tiny_gpt()
    batch = random_batch(min_response=0, P=8, R=9)
    results = []
    for version in (batch, poison(batch, 1), poison(batch, 2)):
        logits = model(version.ids, version.prompt_lens, version.response_lens, version.P)
        logp = response_logprobs(model, version, 0.7)
        results.append([logits, logp, *gradients((logits ** 2).sum() + logp.sum(), model)])
    assert not torch.equal(poison(batch, 1).ids, batch.ids)
    assert all(x.abs().sum() > 0 for x in results[0])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_a_row_is_the_same_alone_in_any_batch_and_in_any_order():
    """Outputs depend on the batch: another padding width, other neighbours or another order of rows change a row's log-probs."""
    model, batch = tiny_gpt(), random_batch(3, min_response=0)
    logp = response_logprobs(model, batch)
    for row, (prompt, response) in enumerate(rows_of(batch)):
        close(response_logprobs(model, make_batch([prompt], [response]))[0], logp[row, :len(response)])
        close(response_logprobs(model, make_batch([prompt], [response], 9, 11))[0, :len(response)], logp[row, :len(response)])
    order = torch.tensor([5, 0, 3, 1])
    close(response_logprobs(model, batch.select(order)), logp[order])


@pytest.mark.parametrize("short", [0, 256], ids=["kernel", "formula"])
def test_attend_weighs_what_is_seen(short, monkeypatch):
    """Scores not divided by the root of D, weights that reach into the future, past the mask, or do not add up to 1; or the two ways differ."""
    monkeypatch.setattr(model_module, "SHORT", short)
    q, k, v = (torch.randn(3, 6, 4, generator=rng(i), dtype=torch.float64) for i in range(3))
    hidden = torch.rand(3, 2, 6, generator=rng(3)) < 0.5
    hidden[:, :, 0] = False
    mask = torch.zeros(3, 2, 6, dtype=torch.float64).masked_fill(hidden, -math.inf)
    causal, masked = attend(q, k, v), attend(q[:, 4:], k, v, mask)

    def mixture(row, t, seen):
        weights = [math.exp(sum(a * b for a, b in zip(q[row, t].tolist(), k[row, s].tolist())) / 2) for s in seen]
        return sum(w * v[row, s] for w, s in zip(weights, seen)) / sum(weights)

    for row in range(3):
        for t in range(6):
            close(causal[row, t], mixture(row, t, range(t + 1)))
        for t in range(2):
            close(masked[row, t], mixture(row, 4 + t, [s for s in range(6) if not hidden[row, t, s]]))


def test_both_ways_of_attention_give_the_same_gradients_and_samples(monkeypatch):
    """The formula and the kernel differ where the log-probs do not show it: in the backward pass, or in the steps of decoding."""
    model, batch = tiny_gpt(), random_batch(min_response=0)
    both = []
    for short in (0, 256):
        monkeypatch.setattr(model_module, "SHORT", short)
        rollout = generate(model, [[1, 2, 3], [4], [5, 6]], 8, generator=rng())
        both.append([*gradients(response_logprobs(model, batch).sum(), model), rollout.ids, rollout.logp])
    for kernel, formula in zip(*both):
        close(kernel, formula)


def test_gelu_and_its_slope():
    """A sign or a factor lost in the backward pass that is written by hand; or training and sampling see two different functions."""
    x = torch.linspace(-6, 6, 101, dtype=torch.float64).requires_grad_()
    u = math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)
    close(gelu(x), x / 2 * (1 + torch.tanh(u)))
    close(gelu(x.detach()), gelu(x))
    assert torch.autograd.gradcheck(gelu, x)


def test_the_future_has_no_gradient():
    """Attention is not causal, or off by one: a hidden state depends on a later token, or fails to depend on its own or an earlier one."""
    model = tiny_gpt()
    ids = torch.arange(2, 9)[None]  # all different, so that a row of the embedding is a column of the batch
    hidden = model.hidden(ids)[0]
    for t in range(7):
        wte, wpe, *_ = gradients((hidden[t] * torch.arange(8)).sum(), model)
        for touched in (wte[2:9], wpe[:7]):
            assert (touched[:t + 1].abs().sum(1) > 0).all() and (touched[t + 1:] == 0).all()
        assert (wpe[7:] == 0).all()


def test_positions_start_at_zero_on_the_first_real_token():
    """Position ids counted from the padding: with left padding the learned positions used are not 0 .. length - 1."""
    model = tiny_gpt()
    batch = make_batch([[1, 2, 3]], [[4, 5]], P=7, R=6)
    hidden = model.hidden(batch.ids, batch.prompt_lens, batch.response_lens, 7)
    wpe = gradients((hidden * torch.arange(8)).sum(), model)[1]
    assert (wpe[:5].abs().sum(1) > 0).all() and (wpe[5:] == 0).all()


def test_dropout_is_absent():
    """Dropout: two forward passes in training mode differ, so ratio and KL are not 1 and 0 before the first step."""
    model, batch = tiny_gpt(), random_batch()
    model.train()
    first, second = response_logprobs(model, batch), response_logprobs(model, batch)
    assert torch.equal(first, second) and torch.equal(first, response_logprobs(model.eval(), batch)) and first.abs().sum() > 0


def test_initialisation_is_that_of_gpt2():
    """Scale of the initial weights: std 0.02, what enters the residual stream smaller by sqrt(2 layers), biases 0, norms 1, one tied head."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=200, block_size=100, n_layer=8, n_head=4, n_embd=64))
    for name, w in model.named_parameters():
        if w.dim() == 2:
            std = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02
            assert abs(w.std().item() / std - 1) < 6 / math.sqrt(2 * w.numel()) and abs(w.mean().item()) < 6 * std / math.sqrt(w.numel()), name
        else:
            assert (w == (1.0 if name.endswith("weight") else 0.0)).all(), name
    C = 64
    expected = 200 * C + 100 * C + 8 * (12 * C * C + 13 * C) + 2 * C  # no output matrix of its own
    assert sum(w.numel() for w in model.parameters()) == expected


def test_what_does_not_fit_the_block_is_refused():
    """Positions past the block: a row of block_size tokens fits, one more is a ValueError; columns of padding do not count."""
    model = tiny_gpt(block=6)
    assert model(torch.zeros(2, 6, dtype=torch.long)).shape == (2, 6, VOCAB)
    with pytest.raises(ValueError, match="7 tokens.* block of 6"):
        model(torch.zeros(2, 7, dtype=torch.long))
    wide = make_batch([[1, 2, 3, 4], [1]], [[1], [1, 2, 3, 4]])
    close(response_logprobs(model, wide)[1], naive_response_logprobs(model, [1], [1, 2, 3, 4]))
    with pytest.raises(ValueError, match="7 tokens"):
        model(wide.ids, wide.prompt_lens, torch.tensor([3, 1]), 4)


@pytest.mark.parametrize("field", ["vocab_size", "block_size", "n_layer", "n_head", "n_embd"])
def test_config_refuses_sizes_below_one(field):
    """A size of 0 gives a model that fails far from the mistake."""
    sizes = dict(vocab_size=5, block_size=5, n_layer=1, n_head=1, n_embd=4)
    GPTConfig(**{**sizes, field: 1})
    for size in (0, -1):
        with pytest.raises(ValueError, match="at least 1"):
            GPTConfig(**{**sizes, field: size})


def test_config_refuses_heads_that_do_not_divide_the_embedding():
    """Heads that do not divide the width: the last channels would be left out of attention."""
    with pytest.raises(ValueError, match="n_embd 6 .* 4 heads"):
        GPTConfig(5, 5, 1, 4, 6)
    assert GPTConfig(5, 5, 1, 3, 6).n_head == 3


# ---------------------------------------------------------------------------------------------------------------------
# the cache

@few
@given(any_rows, st.lists(st.integers(1, 3), min_size=1, max_size=4), st.integers(0, 3), st.integers(0, 9))
def test_decoding_in_steps_equals_the_full_forward_pass(rows, steps, wider, seed):
    """Cache against full forward: a step reads wrong slots, writes one off, or counts positions from the padding. Any split, any padding."""
    model, texts = tiny_gpt(seed), [prompt + response for prompt, response in rows]
    batch = make_batch(texts, [[]] * len(rows), P=max(map(len, texts)) + wider)
    more = torch.randint(VOCAB, (len(rows), sum(steps)), generator=rng(seed))
    cache = Cache(model.config, len(rows), batch.P + sum(steps), model.wte.weight)
    with torch.no_grad():
        first = model.hidden(batch.ids, batch.prompt_lens, P=batch.P, cache=cache)
        assert torch.equal(first, model.hidden(batch.ids, batch.prompt_lens, P=batch.P))
        stepped = torch.cat([model.step(ids, cache) for ids in more.split(steps, dim=1)], dim=1)
    assert stepped.shape == (*more.shape, 8)
    for row, text in enumerate(texts):
        close(stepped[row], naive_hidden(model, text + more[row].tolist())[-sum(steps):])
        assert cache.used - cache.first[row] == len(text) + sum(steps)


def test_the_cache_can_start_empty():
    """A fresh cache that is not empty: decoding from nothing, without a prompt read before, equals the full forward pass."""
    model, ids = tiny_gpt(), torch.tensor([[1, 2, 3], [4, 5, 6]])
    cache = Cache(model.config, 2, 3, model.wte.weight)
    with torch.no_grad():
        stepped = torch.cat([model.step(ids[:, :2], cache), model.step(ids[:, 2:], cache)], dim=1)
    close(stepped, torch.stack([naive_hidden(model, row) for row in ids.tolist()]).detach())
    assert cache.used == 3 and cache.first.tolist() == [0, 0]


def test_a_cache_is_not_filled_from_rows_that_end_in_different_columns():
    """A ragged cache: the next token of a short row would be written behind its padding, which would be attended to."""
    model, batch = tiny_gpt(), make_batch([[1, 2], [3]], [[4, 5], [6]])
    with pytest.raises(ValueError, match="one column"):
        model.hidden(batch.ids, batch.prompt_lens, batch.response_lens, batch.P, cache=Cache(model.config, 2, 8, model.wte.weight))


@few
@given(any_rows, st.integers(0, 3), st.integers(0, 9))
def test_wanted_states_are_those_of_the_full_pass_in_reading_order(rows, wider, seed):
    """The last layer run on the wrong tokens: rows sorted by length and not put back, or a token that lost what it attended to."""
    model, batch = tiny_gpt(seed), batch_of(rows, wider)
    wanted = ~is_pad(batch) & (torch.rand(batch.ids.shape, generator=rng(seed)) < 0.5)
    arguments = (batch.ids, batch.prompt_lens, batch.response_lens, batch.P)
    close(model.hidden(*arguments, wanted), model.hidden(*arguments)[wanted])


def test_nobody_wants_a_pad():
    """A slice that is off by one reads a pad and gets another token's state, a plausible number."""
    model, batch = tiny_gpt(), make_batch([[1, 2], [3]], [[4], [5, 6]])
    with pytest.raises(IndexError):
        model.hidden(batch.ids, batch.prompt_lens, batch.response_lens, batch.P, torch.ones_like(batch.ids, dtype=torch.bool))


@pytest.mark.parametrize("kept, again", [([0, 1, 2, 3], [3, 2, 1, 0]), ([1, 3], [1]), ([4, 2, 0], [0, 2]), ([3], [0])])
def test_the_cache_keeps_the_rows_it_is_told_to_keep(kept, again):
    """A shrunk cache holds the wrong rows: neighbours' keys, a neighbour's length, rows overwritten while they move, or slots that were cut off."""
    model = tiny_gpt(5)
    prompts, _ = random_texts(5, B=5)
    batch = make_batch(prompts, [[]] * 5)
    more = torch.randint(VOCAB, (5, 4), generator=rng())
    cache = Cache(model.config, 5, 12, model.wte.weight)
    with torch.no_grad():
        model.hidden(batch.ids, batch.prompt_lens, cache=cache)
        model.step(more[:, :1], cache)
        rows = torch.tensor(kept)
        cache.keep(rows)
        second = model.step(more[rows, 1:2], cache)
        cache.keep(torch.tensor(again))
        last = rows[again]
        third = model.step(more[last, 2:4], cache)
    assert cache.kv.shape == (2, 2, len(again), 2, 12, 4)
    for i, row in enumerate(rows.tolist()):
        close(second[i], naive_hidden(model, prompts[row] + more[row, :2].tolist())[-1:])
    for i, row in enumerate(last.tolist()):
        close(third[i], naive_hidden(model, prompts[row] + more[row].tolist())[-2:])
        assert cache.used - cache.first[i] == len(prompts[row]) + 4


# ---------------------------------------------------------------------------------------------------------------------
# log-probs of responses

@few
@given(any_rows, st.integers(0, 3), st.sampled_from([1.0, 0.7, 2.5]), st.integers(0, 9))
def test_response_logprobs_equal_a_loop_over_tokens(rows, wider, temperature, seed):
    """Logits off by one against the tokens, the temperature forgotten, E or a token that looks like PAD masked out, the first or last token lost."""
    model, batch = tiny_gpt(seed), batch_of(rows, wider)
    logp = response_logprobs(model, batch, temperature)
    assert logp.shape == (len(rows), batch.R) and logp.dtype == torch.float64
    for row, (prompt, response) in enumerate(rows):
        close(logp[row, :len(response)], naive_response_logprobs(model, prompt, response, temperature))
        assert (logp[row, len(response):] == 0).all()


def test_the_default_temperature_is_one():
    """A default temperature other than 1 in the scorer: SFT and DPO would train another distribution than the one that is sampled."""
    model, batch = tiny_gpt(), random_batch()
    assert torch.equal(response_logprobs(model, batch), response_logprobs(model, batch, 1.0))
    assert torch.equal(log_softmax(torch.arange(4.0)), torch.log_softmax(torch.arange(4.0), 0))


def test_a_planted_model_that_reads_positions_only():
    """Logits off by one: this GPT predicts at slot p the token p + 1 for certain, so a correct response is free and one shifted by one is not."""
    model = tiny_gpt(vocab=12, embd=12, heads=2)
    with torch.no_grad():
        for name, w in model.named_parameters():
            if "c_proj" in name or "ln_f.bias" in name:
                w.zero_()
        model.wte.weight.copy_(torch.eye(12))
        model.ln_f.weight.fill_(20)
        model.wpe.weight.zero_()
        for p in range(11):
            model.wpe.weight[p, p + 1] = 1000
    rows = [([5, 5, 5], [3, 4, 5, 6]), ([5], [1, 2, 3, 4, 5]), ([5, 5], [2, 3])]
    batch = batch_of(rows, 1)
    assert response_logprobs(model, batch).abs().max() < 1e-9
    shifted = batch_of([(p, [t + 1 for t in r]) for p, r in rows], 1)
    assert (response_logprobs(model, shifted)[shifted.mask] < -10).all()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_response_logprobs_have_the_gradient_of_the_loop(temperature):
    """A detached or doubled path: the value is right but the gradient is not, compared with autograd through the loop and with finite differences."""
    model, batch = tiny_gpt(2), random_batch(2, B=4, min_response=0)
    weights = torch.randn(4, batch.R, generator=rng(), dtype=torch.float64)

    def total():
        return (weights * response_logprobs(model, batch, temperature)).sum()

    def slow():
        return sum((weights[b, :len(r)] * naive_response_logprobs(model, p, r, temperature)).sum() for b, (p, r) in enumerate(rows_of(batch)))

    grads = gradients(total(), model)
    for fast, loop, (name, _) in zip(grads, gradients(slow(), model), model.named_parameters()):
        close(fast, loop, msg=name)
    generator, step = rng(7), 1e-5
    directions = [torch.randn(w.shape, generator=generator, dtype=torch.float64) for w in model.parameters()]
    values = []
    with torch.no_grad():
        for sign in (1, -2):
            for w, d in zip(model.parameters(), directions):
                w += sign * step * d
            values.append(total().item())
    slope = sum((g * d).sum().item() for g, d in zip(grads, directions))
    assert slope == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-6) and abs(slope) > 1e-3


def test_response_hidden_are_the_states_before_each_token():
    """Values aligned with the token they should foresee: the hidden state of response token t is the one at the token before it, rows in order."""
    model, batch = tiny_gpt(), random_batch(4, min_response=0, P=8, R=9)
    expected = [naive_hidden(model, p + r)[len(p) - 1:-1] for p, r in rows_of(batch)]
    close(response_hidden(model, batch), torch.cat(expected))


def test_e_inside_the_prompt_ends_nothing():
    """PAD equals EOS, E searched in the prompt: an E or PAD id inside the prompt is a token like any other, and E in the response has a gradient."""
    model = tiny_gpt()
    rows = [([1, E, PAD, 2], [3, 4, E]), ([E], [E]), ([PAD, PAD], [PAD, E]), ([3], [E, PAD, 5])]
    batch = batch_of(rows, 2)
    for row, (prompt, response) in enumerate(rows):
        close(response_logprobs(model, batch)[row, :len(response)], naive_response_logprobs(model, prompt, response))
    last = response_logprobs(model, batch)[0, 2]
    assert max(g.abs().max() for g in gradients(last, model)) > 1e-3
    torch.manual_seed(0)
    rollout = generate(model, [[1, E, 2], [E, E], [PAD, E]] * 20, 5, generator=rng())
    assert rollout.response_lens.min() >= 1 and not rollout.finished.all() and rollout.response_lens.max() == 5
    close(rollout.logp, response_logprobs(model, rollout))


def test_a_batch_of_empty_responses_has_no_logprobs():
    """Zero response tokens: an empty response makes a NaN, an error, or a log-prob out of nothing."""
    model = tiny_gpt()
    for R in (0, 3):
        batch = make_batch([[1, 2], [3]], [[], []], R=R)
        logp = response_logprobs(model, batch)
        assert logp.shape == (2, R) and (logp == 0).all()
    mixed = response_logprobs(model, make_batch([[1, 2], [3]], [[], [4]]))
    assert mixed[0, 0] == 0 and all(g.isfinite().all() for g in gradients(mixed.sum(), model))


def test_spread_puts_values_back_in_reading_order():
    """Values spread over the wrong places: down the columns instead of along the rows, or gradients lost on the way."""
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 1]]).bool()
    x = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64, requires_grad=True)
    out = spread(x, mask)
    assert out.tolist() == [[1, 2, 0], [0, 0, 0], [3, 0, 4]] and out.dtype == torch.float64
    weights = torch.arange(9.0, dtype=torch.float64).view(3, 3)
    (out * weights).sum().backward()
    assert x.grad.tolist() == [0, 1, 6, 8]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_half_precision_logits_are_scored_in_float32(dtype, temperature):
    """bf16 log-probs: rounding before the softmax or before dividing by the temperature makes a ratio of 1.03 out of nothing."""
    logits = (4 * torch.randn(50, 30, generator=rng())).to(dtype)
    logp = log_softmax(logits, temperature)
    assert logp.dtype == torch.float32
    exact = torch.log_softmax(logits.double() / temperature, -1)
    close(logp.double(), exact, atol=1e-5, rtol=0)
    close(logp.exp().sum(-1), torch.ones(50), atol=1e-5, rtol=0)
    assert log_softmax(logits.double()).dtype == torch.float64


def test_a_bf16_model_scores_and_samples_in_float32():
    """bf16 log-probs on the way: the scorer or the sampler rounds its log-probs to three digits."""
    model, batch = tiny_gpt(dtype=torch.bfloat16), random_batch()
    hidden = response_hidden(model, batch)
    exact = torch.log_softmax(model.head(hidden).double() / 0.7, -1).gather(1, batch.responses[batch.mask][:, None])[:, 0]
    logp = response_logprobs(model, batch, 0.7)
    assert hidden.dtype == torch.bfloat16 and logp.dtype == torch.float32
    close(logp[batch.mask].double(), exact, atol=1e-5, rtol=0)
    rollout = generate(model, [[1, 2, 3], [4]] * 8, 4, generator=rng())
    assert rollout.logp.dtype == torch.float32
    assert not torch.equal(rollout.logp, rollout.logp.bfloat16().float())
    close(rollout.logp, response_logprobs(model, rollout), atol=0.1, rtol=0)


# ---------------------------------------------------------------------------------------------------------------------
# the sampler

def test_samples_follow_their_probabilities():
    """Biased sampling: 20,000 draws do not fit the probabilities, an impossible token is drawn, or the rarest never is (top-k, top-p)."""
    probs = torch.tensor([0.0, 0.3, 0.0, 0.005, 0.2, 0.0, 0.445, 0.05, 0.0], dtype=torch.float64)
    draws = sample(probs.expand(20_000, -1), rng(1))
    assert draws.shape == (20_000, 1) and draws.dtype == torch.long
    counts = draws.flatten().bincount(minlength=9)
    assert surprise(counts, probs) < 4 and (counts[probs > 0] > 0).all()
    assert surprise(counts.roll(1), probs) > 100 and surprise(counts, probs.sqrt() / probs.sqrt().sum()) > 100  # the yardstick can tell


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_random_number_draws_what_has_probability_zero(dtype, monkeypatch):
    """The edges of the uniform number: exactly 0 or almost 1 falls on a token of probability 0 or past the end of the vocabulary."""
    probs = torch.tensor([[0, 0.25, 0, 0.75, 0]], dtype=dtype)
    for uniform in (0.0, 1 - torch.finfo(dtype).eps / 2, 0.1, 0.5, 0.9):
        monkeypatch.setattr(torch, "rand", lambda *shape, u=uniform, **options: torch.full(shape, u, dtype=dtype))
        assert sample(probs).item() in (1, 3)
    monkeypatch.undo()
    tenths = torch.full((1, 10), 0.1, dtype=dtype)  # their sum is not exactly 1
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: torch.zeros(shape, dtype=dtype))
    assert 0 <= sample(tenths).item() < 10


def test_rows_are_sampled_independently():
    """One random number for all rows: the responses of a group are copies of each other."""
    probs = torch.full((4000, 2), 0.5, dtype=torch.float64)
    draws = sample(probs, rng()).view(-1, 2)
    assert surprise((2 * draws[:, 0] + draws[:, 1]).bincount(minlength=4), torch.full((4,), 0.25)) < 4
    different = torch.eye(5, dtype=torch.float64)[[3, 0, 4, 1]]
    assert sample(different, rng()).flatten().tolist() == [3, 0, 4, 1]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_first_token_follows_the_model_at_the_temperature(temperature):
    """Sampler and model disagree: temperature missing, inverted or used twice, top-k or top-p in the sampler, prompt read at the wrong column."""
    model = tiny_gpt(1, std=0.4)
    for prompt in ([3], [1, 2, 5, 0]):
        probs = torch.softmax(naive_logits(model, prompt)[-1] / temperature, 0).detach()
        with torch.no_grad():
            rollout = generate(model, [prompt] * 20_000 + [[7] * 5], 1, temperature, rng(3))  # the last row makes the others padded
        counts = rollout.responses[:-1].flatten().bincount(minlength=VOCAB)
        assert surprise(counts, probs) < 4 and (counts > 0).all()
        for wrong in (probs ** 0.7, probs ** 1.4):
            assert surprise(counts, wrong / wrong.sum()) > 20


def test_whole_responses_follow_the_tree_of_all_responses():
    """Anything wrong in the decoding loop: every response up to three tokens is enumerated with its probability and 20,000 rollouts must fit them."""
    model, prompt, end, horizon = tiny_gpt(2, vocab=4, std=0.4), [0, 3], 2, 3
    tree, stack = {}, [((), 1.0)]
    while stack:
        response, chance = stack.pop()
        if len(response) == horizon or end in response:
            tree[response] = chance
            continue
        probs = torch.softmax(naive_logits(model, prompt + list(response))[-1], 0).tolist()
        stack += [(response + (token,), chance * p) for token, p in enumerate(probs)]
    assert len(tree) == 40 and sum(tree.values()) == pytest.approx(1)
    rollout = generate(model, [prompt] * 20_000, horizon, generator=rng(4))
    seen = dict.fromkeys(tree, 0)
    for response in rollout.response_ids():
        seen[tuple(response)] += 1
    assert surprise(list(seen.values()), list(tree.values())) < 4
    assert rollout.finished.tolist() == [end in response for response in rollout.response_ids()]
    for response, logp in zip(rollout.response_ids()[:50], rollout.logp):
        assert logp.sum().item() == pytest.approx(math.log(tree[tuple(response)]), abs=1e-9)


@few
@given(any_rows, st.integers(1, 5), st.sampled_from([1.0, 0.7]), st.integers(0, 99))
def test_a_rollout_is_well_formed_and_knows_its_logprobs(rows, horizon, temperature, seed):
    """Lengths off by one, E not counted or not in the mask, tokens recorded after E, sampled log-probs that are not those of the scorer."""
    model, prompts = tiny_gpt(seed, std=0.4), [prompt for prompt, _ in rows] * 2
    rollout = generate(model, prompts, horizon, temperature, rng(seed))
    assert isinstance(rollout, Rollout) and rollout.P == max(map(len, prompts)) and not rollout.logp.requires_grad
    assert rollout.R == max(rollout.response_lens) <= horizon
    assert rollout.logp.shape == rollout.mask.shape == (len(prompts), rollout.R) and rollout.finished.dtype == torch.bool
    assert (rollout.ids[is_pad(rollout)] == PAD).all() and (rollout.logp[~rollout.mask] == 0).all()
    for row, (prompt, response) in enumerate(rows_of(rollout)):
        assert prompt == prompts[row] and E not in response[:-1]
        assert bool(rollout.finished[row]) == (response[-1] == E)
        assert rollout.finished[row] or len(response) == horizon
        close(rollout.logp[row, :len(response)], naive_response_logprobs(model, prompt, response, temperature).detach())
    close(rollout.logp, response_logprobs(model, rollout, temperature).detach())


@pytest.mark.parametrize("B", [2, 5, 40])
def test_rows_that_end_early_do_not_disturb_the_others(B, monkeypatch):
    """The shrinking batch: once rows have ended, tokens or log-probs go to the wrong rows, or the cache keeps the wrong ones."""
    kept = []
    keep = Cache.keep
    monkeypatch.setattr(Cache, "keep", lambda cache, rows: (kept.append(len(rows)), keep(cache, rows))[1])
    model = tiny_gpt(3)
    prompts, _ = random_texts(1, B=B)
    for seed in range(4):
        rollout = generate(model, prompts, 12, 1.0, rng(seed))
        close(rollout.logp, response_logprobs(model, rollout).detach())
        assert [prompt for prompt, _ in rows_of(rollout)] == prompts
        for response, finished in zip(rollout.response_ids(), rollout.finished.tolist()):
            assert E not in response[:-1] and finished == (response[-1] == E) and (finished or len(response) == 12)
    assert len(set(rollout.response_lens.tolist())) > 1
    assert kept and min(kept) < B


def test_float32_sampler_and_scorer_agree():
    """Ratio not 1 before the first step, in the precision that training uses."""
    model = tiny_gpt(dtype=torch.float32)
    rollout = generate(model, random_texts(2, B=30)[0], 10, 0.7, rng())
    assert rollout.logp.dtype == torch.float32
    close(rollout.logp, response_logprobs(model, rollout, 0.7).detach(), atol=1e-5, rtol=0)
    assert (rollout.logp[rollout.mask] < 0).all()


def test_a_response_ends_at_e_and_e_is_part_of_it():
    """E not counted: a model that always says E gives responses of one token, finished, with a log-prob of (almost) 0."""
    rollout = generate(always(E), [[1, 2], [3], [4, 5, 6]], 5, generator=rng())
    assert rollout.ids.tolist() == [[PAD, 1, 2, E], [PAD, PAD, 3, E], [4, 5, 6, E]]
    assert rollout.response_lens.tolist() == [1, 1, 1] and rollout.prompt_lens.tolist() == [2, 1, 3]
    assert rollout.finished.all() and rollout.mask.all() and rollout.P == 3
    assert rollout.logp.shape == (3, 1) and rollout.logp.abs().max() < 1e-9


def test_a_response_cut_at_the_horizon_is_not_finished():
    """Truncated taken for terminal: a model that never says E runs to the horizon, unfinished, and PAD as a sampled token is a token."""
    for token in (5, PAD):
        rollout = generate(always(token), [[1, 2], [3]], 4, generator=rng())
        assert rollout.responses.tolist() == [[token] * 4] * 2
        assert rollout.response_lens.tolist() == [4, 4] and not rollout.finished.any() and rollout.mask.all()


def test_the_ids_of_e_and_pad_can_be_named():
    """E or PAD hard-wired: with other ids the response must end there, and the fill must be that PAD; id 0 is an id."""
    rollout = generate(always(0), [[1, 2], [3]], 4, generator=rng(), end=0, pad=7)
    assert rollout.ids.tolist() == [[1, 2, 0], [7, 3, 0]] and rollout.finished.all()
    rollout = generate(always(E), [[1, 2], [3]], 2, generator=rng(), end=4, pad=0)
    assert rollout.ids.tolist() == [[1, 2, E, E], [0, 3, E, E]] and not rollout.finished.any()
    rollout = generate(tiny_gpt(), [[1]] * 60, 6, generator=rng(), end=3, pad=3)  # GPT-2 has one id for both
    assert rollout.finished.tolist() == [response[-1] == 3 for response in rollout.response_ids()]
    close(rollout.logp, response_logprobs(tiny_gpt(), rollout).detach())


def test_the_seed_decides_and_nothing_else():
    """Seeds: the same generator state must give the same rollout, the next call another one, and the global state is not touched."""
    model, prompts = tiny_gpt(), [[1, 2], [3], [4]]
    generator = rng(5)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, second = generate(model, prompts, 8, generator=generator), generate(model, prompts, 8, generator=generator)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    again, other = generate(model, prompts, 8, generator=rng(5)), generate(model, prompts, 8, generator=rng(6))
    assert first.response_ids() == again.response_ids() and torch.equal(first.logp, again.logp)
    assert first.response_ids() != second.response_ids() and first.response_ids() != other.response_ids()
    assert len({tuple(r) for r in generate(model, [[1]] * 10, 8, generator=rng()).response_ids()}) > 5
    unseeded = [generate(model, prompts, 8).response_ids() for _ in range(2)]
    assert unseeded[0] != unseeded[1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_rollouts_stay_on_the_gpu_of_their_model():
    """A tensor made on the CPU in the middle of the sampler or the scorer: an error that only a GPU shows."""
    model = tiny_gpt().cuda()
    rollout = generate(model, random_texts(1, B=20)[0], 8, 0.7, torch.Generator("cuda").manual_seed(0))
    for name in ("ids", "prompt_lens", "response_lens", "logp", "finished", "mask"):
        assert getattr(rollout, name).is_cuda, name
    close(rollout.logp, response_logprobs(model, rollout, 0.7).detach())
    close(rollout.logp.cpu(), response_logprobs(tiny_gpt(), rollout.to("cpu"), 0.7).detach())


def test_generate_leaves_the_model_as_it_was():
    """The sampler trains: a gradient or a changed weight or mode is left behind, or the prompts of the caller are changed."""
    model, prompts = tiny_gpt().train(), [[1, 2], [3]]
    before = [w.clone() for w in model.parameters()]
    generate(model, prompts, 3, generator=rng())
    assert prompts == [[1, 2], [3]] and model.training
    assert all(w.grad is None and torch.equal(w, b) for w, b in zip(model.parameters(), before))


def test_generate_refuses_what_it_cannot_do():
    """Silent nonsense: an empty prompt is predicted from padding, a long one runs past the block, a temperature of 0 divides by it."""
    model = tiny_gpt(block=8)
    for prompts in ([[]], [[1], []], [[], [1]]):
        with pytest.raises(ValueError, match="empty prompt"):
            generate(model, prompts, 3)
    with pytest.raises(ValueError, match="6 columns and 3 new .* block of 8"):
        generate(model, [[1], [1] * 6], 3)
    with pytest.raises(ValueError, match="no prompts"):
        generate(model, [], 3)
    with pytest.raises(ValueError, match="at least 1"):
        generate(model, [[1]], 0)
    for temperature in (0, 0.0, -1, float("nan")):
        with pytest.raises(ValueError, match="temperature"):
            generate(model, [[1]], 3, temperature)
    full = generate(model, [[1], [1] * 6], 2, generator=rng(), end=-1)  # exactly the block, and no token ends it
    close(full.logp, response_logprobs(model, full).detach())
    assert full.response_lens.tolist() == [2, 2] and (full.logp < 0).all()


def test_select_keeps_everything_of_a_rollout_together():
    """Rollouts shuffled out of step: log-probs or finished flags stay behind when rows are selected, or the type is lost."""
    rollout = generate(tiny_gpt(), random_texts(1, B=12)[0], 6, generator=rng())
    rows = torch.tensor([7, 2, 2, 11])
    part = rollout.select(rows)
    assert isinstance(part, Rollout) and part.P == rollout.P and part.R == rollout.R
    for name in ("ids", "prompt_lens", "response_lens", "logp", "finished"):
        assert torch.equal(getattr(part, name), getattr(rollout, name)[rows]) and len(getattr(part, name)) == 4
    assert torch.equal(rollout.to("cpu").logp, rollout.logp)


# ---------------------------------------------------------------------------------------------------------------------
# GPT-2 weights

def test_gpt2_weights_come_back_as_they_went():
    """Weights lost on the way: a layer numbered 10 sorted before 2, sizes misread, a matrix transposed once only, with and without the prefix."""
    model = tiny_gpt(vocab=7, block=5, layers=11, heads=2, embd=4, dtype=torch.float32)
    state = to_gpt2(model)
    bare = {name.removeprefix("transformer."): w for name, w in state.items()}
    for version in (state, bare, {**state, "transformer.h.0.attn.bias": torch.ones(1)}):  # old files hold the causal mask as well
        back = from_gpt2(version, n_head=2)
        assert back.config == model.config and isinstance(back, GPT)
        assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), model.state_dict().values(), strict=True))


def test_gpt2_stores_linear_layers_transposed():
    """Conv1D orientation: a square matrix (attn.c_proj) can be left untransposed, or an embedding transposed, without any error of shape."""
    model = tiny_gpt()
    state = to_gpt2(model)
    for n, block in enumerate(model.h):
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            layer = block.get_submodule(name)
            x = torch.randn(3, layer.in_features, generator=rng(), dtype=torch.float64)
            close(x @ state[f"transformer.h.{n}.{name}.weight"] + state[f"transformer.h.{n}.{name}.bias"], layer(x))
    assert torch.equal(state["lm_head.weight"], model.wte.weight) and torch.equal(state["transformer.wte.weight"], model.wte.weight)
    assert torch.equal(state["transformer.wpe.weight"], model.wpe.weight)


def test_the_carried_model_is_a_model_of_its_own():
    """Shared memory: training the policy that came from a state dict would train the reference that came from the same one."""
    model = tiny_gpt(dtype=torch.float32)
    state = to_gpt2(model)
    a, b = from_gpt2(state, 2), from_gpt2(state, 2)
    with torch.no_grad():
        for w in a.parameters():
            w.zero_()
    assert all(torch.equal(x, y) and x.abs().sum() > 0 for x, y in zip(b.parameters(), model.parameters(), strict=True))


@pytest.fixture(scope="module")
def hugging_face():
    transformers = pytest.importorskip("transformers", reason="parity with GPT-2 needs transformers")
    config = transformers.GPT2Config(vocab_size=37, n_positions=20, n_embd=24, n_layer=3, n_head=4)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    generator = rng()
    with torch.no_grad():
        for w in theirs.parameters():
            w += 0.2 * torch.randn(w.shape, generator=generator)
    return theirs


def test_gpt2_of_hugging_face_gives_the_same_logits(hugging_face):
    """Not GPT-2: any difference in formula, eps, name or orientation from the model that published the weights; also with left padding."""
    ours = from_gpt2(hugging_face.state_dict(), n_head=4)
    assert ours.config == GPTConfig(37, 20, 3, 4, 24)
    ids = torch.randint(37, (4, 15), generator=rng())
    with torch.no_grad():
        close(ours(ids), hugging_face(ids).logits, atol=1e-5, rtol=1e-5)
        batch = make_batch([[1, 2, 3, 4], [5], [6, 7]], [[8, 9], [10, 11, 12, 13], [14]], P=6, pad=36)
        theirs = hugging_face(batch.ids, attention_mask=(~is_pad(batch)).long(), position_ids=((~is_pad(batch)).cumsum(1) - 1).clamp(min=0))
        logp = theirs.logits[:, 5:-1].log_softmax(-1).gather(2, batch.responses[..., None])[..., 0]
        close(response_logprobs(ours, batch), logp * batch.mask, atol=1e-5, rtol=1e-5)


def test_gpt2_of_hugging_face_takes_the_weights_back(hugging_face):
    """A trained model that cannot be given back: names or shapes differ from GPT2LMHeadModel's own, or the values do."""
    theirs, ours = hugging_face.state_dict(), to_gpt2(from_gpt2(hugging_face.state_dict(), n_head=4))
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_module_names_what_the_contract_promises():
    """A renamed function: DESIGN.md promises these names and argument orders to assignments and graders."""
    model = tiny_gpt(dtype=torch.float32)
    rollout = model_module.generate(model, [[1, 2]], 2, temperature=1.0)
    assert model_module.response_logprobs(model, rollout, temperature=1.0).shape == (1, rollout.R)
    config = GPTConfig(vocab_size=3, block_size=4, n_layer=1, n_head=1, n_embd=2)
    assert GPT(config)(torch.zeros(1, 2, dtype=torch.long), prompt_lens=torch.tensor([2])).shape == (1, 2, 3)
