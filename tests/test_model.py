"""
Tests of model.py: the GPT against a textbook GPT, decoding with a cache against the full forward pass, parts of a batch
against the whole, and the sampler against the scorer and against enumeration.
"""

import copy
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
    rng,
    rows_of,
    surprise,
    tiny_gpt,
)
from hypothesis import given
from hypothesis import strategies as st

import model as model_module
from data import Batch, by_length
from model import (
    GPT,
    GPTConfig,
    KVCache,
    Rollout,
    attention_mask,
    generate,
    log_softmax,
    response_hidden,
    response_logprobs,
    sample,
)
from ppo import exact_kl
from reward import RewardModel

EXACT = dict(atol=1e-9, rtol=1e-9)
any_token = st.integers(0, VOCAB - 1)  # E and PAD are among them: what a token is never decides whether it counts
any_row = st.tuples(st.lists(any_token, min_size=1, max_size=5), st.lists(any_token, max_size=5))
any_rows = st.lists(any_row, min_size=1, max_size=4)


def close(a, b, **tolerance):
    torch.testing.assert_close(a, b, **{**EXACT, **tolerance})


def gradients(loss, model):
    """The gradient of a loss for every parameter, as a list. It is 0 for a parameter that the loss does not use."""
    return torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True,
                               materialize_grads=True)


def batch_of(rows, wider=0):
    """A batch of (prompt, response) rows, with `wider` more columns of padding on both sides than needed."""
    prompts = [list(prompt) for prompt, _ in rows]
    responses = [list(response) for _, response in rows]
    return make_batch(prompts, responses, max(map(len, prompts)) + wider, max(map(len, responses)) + wider)


def always(token, **sizes):
    """
    A GPT that gives all its probability to one token, whatever it reads.

    Its last norm has weight 0 and the token's embedding as its bias.
    """
    model = tiny_gpt(**sizes)
    with torch.no_grad():
        model.ln_f.weight.zero_()
        model.wte.weight[token] *= 100 / model.wte.weight[token].norm()
        model.ln_f.bias.copy_(model.wte.weight[token])
    return model


def make_caches(model, B, columns):
    return [KVCache(model.config, B, columns, model.wte.weight) for _ in model.h]


# ---- the network -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("layers, heads, embd", [(1, 1, 4), (2, 2, 8), (3, 4, 12)])
def test_logits_are_those_of_the_textbook_gpt(layers, heads, embd):
    """Another network: GELU without tanh, another eps, post-norm, a missing bias, mixed heads, an untied head."""
    model = tiny_gpt(layers, layers=layers, heads=heads, embd=embd)
    ids = torch.randint(VOCAB, (3, 9), generator=rng(layers))
    logits = model(ids)
    assert logits.shape == (3, 9, VOCAB)
    for row, row_logits in zip(ids.tolist(), logits):
        close(row_logits, naive_logits(model, row))


@few
@given(any_rows, st.integers(0, 3), st.integers(0, 9))
def test_padded_rows_are_those_of_the_textbook_gpt_without_padding(rows, wider, seed):
    """Padding changes a row: positions count the pads, pads are attended to, or a row depends on its neighbours."""
    model = tiny_gpt(seed)
    batch = batch_of(rows, wider)
    hidden = model.hidden(batch.ids, batch.start)
    assert hidden.shape == (*batch.ids.shape, 8)
    real = ~is_pad(batch)
    for row, (prompt, response) in enumerate(rows):
        close(hidden[row][real[row]], naive_hidden(model, prompt + response))
    close(model(batch.ids, batch.start), hidden @ model.wte.weight.T)


def test_no_start_means_no_padding_on_the_left():
    """A wrong default: without `start` every row begins in column 0. Padding on the right needs no mask."""
    model = tiny_gpt()
    batch = make_batch([[1, 2, 3, 4], [5, 6, 7, 8]], [[1, 2], [3]])
    assert torch.equal(model(batch.ids), model(batch.ids, torch.tensor([0, 0])))
    close(model(batch.ids)[1, :5], naive_logits(model, [5, 6, 7, 8, 3]))
    padded = make_batch([[1, 2, 3, 4], [5]], [[], []])
    assert (model(padded.ids)[1, 3] - model(padded.ids, padded.start)[1, 3]).abs().max() > 0.01


def test_pads_make_no_nan():
    """A softmax over nothing: a pad on the left sees no other token. The NaN would reach every weight."""
    model = tiny_gpt()
    batch = make_batch([[1, 2, 3], [4]], [[5], [6, E]], P=8, R=9)
    hidden = model.hidden(batch.ids, batch.start)
    assert hidden.isfinite().all()
    logits = model.head(hidden)[~is_pad(batch)]
    for gradient in gradients((logits ** 2).sum(), model):
        assert gradient.isfinite().all()


def readers(model):
    """Functions of a batch with their networks: log-probs, values, scores, and hidden states of an untrimmed batch."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        critic = RewardModel(model).to(model.wte.weight)
    return dict(
        logp=(model, lambda batch: response_logprobs(model, batch, 0.7)),
        values=(critic, critic.values),
        scores=(critic, critic),
        hidden=(model, lambda batch: model.hidden(batch.ids, batch.start)[~is_pad(batch)]),
        response_hidden=(model, lambda batch: response_hidden(model, batch)[batch.mask]),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["logp", "values", "scores", "hidden", "response_hidden"])
def test_random_ids_at_the_pads_change_no_bit(name, dtype):
    """PAD equals E, or a mask from `ids != pad`: the ids at pads reach a log-prob, a value, a score or a gradient."""
    network, function = readers(tiny_gpt(dtype=dtype))[name]
    batch = random_batch(B=20, min_response=1 if name == "scores" else 0, P=8, R=9)
    results = []
    for version in (batch, poison(batch, 1), poison(batch, 2)):
        result = function(version)
        results.append([result, *gradients((result ** 2).sum(), network)])
    assert not torch.equal(poison(batch, 1).ids, batch.ids)
    assert results[0][0].abs().sum() > 0
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert torch.equal(a, b)


def test_a_row_is_the_same_alone_in_any_batch_and_in_any_order():
    """Log-probs that depend on the batch: on the width of the padding, on other rows or on the order of rows."""
    model = tiny_gpt()
    batch = random_batch(3, min_response=0)
    logp = response_logprobs(model, batch)
    for row, (prompt, response) in enumerate(rows_of(batch)):
        expected = logp[row, :len(response)]
        close(response_logprobs(model, make_batch([prompt], [response]))[0], expected)
        close(response_logprobs(model, make_batch([prompt], [response], 9, 11))[0, :len(response)], expected)
    order = torch.tensor([5, 0, 3, 1])
    close(response_logprobs(model, batch.select(order)), logp[order])


@few
@given(st.integers(0, 4), st.integers(1, 5), st.lists(st.integers(0, 8), min_size=1, max_size=4))
def test_the_mask_hides_the_future_and_the_padding_on_the_left(past, T, starts):
    """A query sees the future, a pad of its row, or not itself. Compared with the rule for one query and one key."""
    mask = attention_mask(torch.tensor(starts), past, T)
    assert mask.shape == (len(starts), 1, T, past + T)
    assert mask.dtype == torch.bool
    for row, start in enumerate(starts):
        for t in range(T):
            query = past + t
            for key in range(past + T):
                sees = key == query or start <= key < query
                assert mask[row, 0, t, key] == sees


def test_the_mask_by_hand():
    """The same rule as a picture: two rows, the first with one pad on the left, and one column in the cache."""
    mask = attention_mask(torch.tensor([1, 0]), 1, 2)[:, 0].long()
    assert mask.tolist() == [[[0, 1, 0], [0, 1, 1]], [[1, 1, 0], [1, 1, 1]]]
    pads = attention_mask(torch.tensor([2]), 0, 3)[0, 0].long()
    assert pads.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_the_future_has_no_gradient():
    """Attention is not causal, or off by one: a state depends on a later token, or not on its own or an earlier one."""
    model = tiny_gpt()
    ids = torch.arange(2, 9)[None]  # all different, so that a row of the embedding belongs to one column
    hidden = model.hidden(ids)[0]
    for t in range(7):
        wte, wpe, *_ = gradients((hidden[t] * torch.arange(8)).sum(), model)
        for used in (wte[2:9], wpe[:7]):
            assert (used[:t + 1].abs().sum(1) > 0).all()
            assert (used[t + 1:] == 0).all()
        assert (wpe[7:] == 0).all()


def test_positions_start_at_zero_on_the_first_real_token():
    """Positions that count the padding: the learned positions in use must be 0 to length - 1."""
    model = tiny_gpt()
    batch = make_batch([[1, 2, 3]], [[4, 5]], P=7, R=6)
    hidden = model.hidden(batch.ids, batch.start)[~is_pad(batch)]
    wpe = gradients((hidden * torch.arange(8)).sum(), model)[1]
    assert (wpe[:5].abs().sum(1) > 0).all()
    assert (wpe[5:] == 0).all()


def test_dropout_is_absent():
    """Dropout: two forward passes in training mode differ, so ratio and KL are not 1 and 0 before the first step."""
    model = tiny_gpt().train()
    batch = random_batch()
    first = response_logprobs(model, batch)
    assert torch.equal(first, response_logprobs(model, batch))
    assert torch.equal(first, response_logprobs(model.eval(), batch))
    assert first.abs().sum() > 0


def test_initialisation_is_that_of_gpt2():
    """Wrong scale: std 0.02, smaller by sqrt(2 layers) where a layer adds to the residual stream, biases 0, norms 1."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=200, block_size=100, n_layer=8, n_head=4, n_embd=64))
    for name, w in model.named_parameters():
        if w.dim() == 2:
            std = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02
            assert abs(w.std().item() / std - 1) < 6 / math.sqrt(2 * w.numel()), name
            assert abs(w.mean().item()) < 6 * std / math.sqrt(w.numel()), name
        else:
            assert (w == (1.0 if name.endswith("weight") else 0.0)).all(), name
    C = 64
    expected = 200 * C + 100 * C + 8 * (12 * C * C + 13 * C) + 2 * C  # the head has no matrix of its own
    assert sum(w.numel() for w in model.parameters()) == expected


def test_a_row_longer_than_the_block_is_refused():
    """Positions beyond the block: block_size tokens fit, one more does not. Padding on the left does not count."""
    model = tiny_gpt(block=6)
    assert model(torch.zeros(2, 6, dtype=torch.long)).shape == (2, 6, VOCAB)
    with pytest.raises(ValueError, match="more than 6 columns"):
        model(torch.zeros(2, 7, dtype=torch.long))
    batch = make_batch([[1, 2], [3]], [[1, 2, 3, 4], [5, 6]], P=9)
    real = ~is_pad(batch)
    hidden = model.hidden(batch.ids, batch.start)
    close(hidden[0][real[0]], naive_hidden(model, [1, 2, 1, 2, 3, 4]))
    with pytest.raises(ValueError, match="more than 6 columns"):
        model(batch.ids, batch.start - 1)


def test_what_is_in_the_cache_counts_for_the_block():
    """Positions beyond the block in decoding: what was read before counts too."""
    model = tiny_gpt(block=6)
    caches = make_caches(model, 1, 9)
    with torch.no_grad():
        model.hidden(torch.tensor([[1, 2, 3, 4]]), None, caches)
        model.hidden(torch.tensor([[5, 6]]), None, caches)
        with pytest.raises(ValueError, match="more than 6 columns"):
            model.hidden(torch.tensor([[7]]), None, caches)


@pytest.mark.parametrize("field", ["vocab_size", "block_size", "n_layer", "n_head", "n_embd"])
def test_config_refuses_sizes_below_one(field):
    """A size of 0 gives a model that fails far from the mistake."""
    sizes = dict(vocab_size=5, block_size=5, n_layer=1, n_head=1, n_embd=4)
    GPTConfig(**{**sizes, field: 1})
    for size in (0, -1):
        with pytest.raises(ValueError, match="at least 1"):
            GPTConfig(**{**sizes, field: size})


def test_config_refuses_heads_that_do_not_divide_the_embedding():
    """Heads that do not divide the width would leave the last channels out of attention."""
    with pytest.raises(ValueError, match="n_embd 6 .* 4 heads"):
        GPTConfig(5, 5, 1, 4, 6)
    assert GPTConfig(5, 5, 1, 3, 6).n_head == 3


# ---- the cache -------------------------------------------------------------------------------------------------------

def test_a_cache_appends_and_returns_all_columns():
    """A cache that overwrites, exchanges keys and values, or returns columns that nothing was written to."""
    cache = KVCache(GPTConfig(5, 5, 1, 2, 6), 3, 7, torch.zeros(1, dtype=torch.float64))
    k, v = torch.randn(2, 3, 2, 5, 3, generator=rng(), dtype=torch.float64)                   # (B, H, T, D) each
    assert cache.used == 0
    for first, last in ((0, 2), (2, 3), (3, 5)):
        keys, values = cache.append(k[:, :, first:last], v[:, :, first:last])
        assert cache.used == last
        assert torch.equal(keys, k[:, :, :last])
        assert torch.equal(values, v[:, :, :last])


def test_a_cache_has_the_dtype_and_device_of_a_tensor():
    """A float32 cache in a bfloat16 or float64 network, or one on the CPU."""
    for dtype in (torch.bfloat16, torch.float64):
        cache = KVCache(GPTConfig(5, 5, 1, 1, 2), 1, 2, torch.zeros(1, dtype=dtype))
        assert {x.dtype for x in cache.append(*torch.zeros(2, 1, 1, 1, 2, dtype=dtype))} == {dtype}
    cache = KVCache(GPTConfig(5, 5, 1, 1, 2), 1, 2, torch.zeros(1, device="meta"))
    assert cache.kv.device.type == "meta"


def test_a_cache_keeps_rows_and_goes_on():
    """Rows of neighbours, or columns that are lost when rows are dropped."""
    cache = KVCache(GPTConfig(5, 5, 1, 2, 6), 4, 5, torch.zeros(1))
    k, v = torch.randn(2, 4, 2, 3, 3, generator=rng())                                        # (B, H, T, D) each
    cache.append(k[:, :, :2], v[:, :, :2])
    rows = torch.tensor([3, 0])
    cache.keep(rows)
    assert cache.used == 2
    keys, values = cache.append(k[rows, :, 2:], v[rows, :, 2:])
    assert torch.equal(keys, k[rows])
    assert torch.equal(values, v[rows])


@few
@given(any_rows, st.lists(st.integers(1, 3), min_size=1, max_size=4), st.integers(0, 3), st.integers(0, 9))
def test_decoding_in_any_split_equals_the_full_forward_pass(rows, sizes, wider, seed):
    """The cache against one pass over everything: a step reads wrong columns, or counts positions from the padding."""
    model = tiny_gpt(seed)
    texts = [prompt + response for prompt, response in rows]
    batch = make_batch(texts, [[]] * len(rows), P=max(map(len, texts)) + wider)
    more = torch.randint(VOCAB, (len(rows), sum(sizes)), generator=rng(seed))
    ids = torch.cat([batch.ids, more], dim=1)
    caches = make_caches(model, len(rows), ids.shape[1])
    with torch.no_grad():
        parts = [model.hidden(part, batch.start, caches) for part in ids.split([batch.P, *sizes], dim=1)]
        whole = model.hidden(ids, batch.start)
    stepped = torch.cat(parts, dim=1)
    assert stepped.shape == (*ids.shape, 8)
    close(stepped, whole)
    assert all(cache.used == ids.shape[1] for cache in caches)
    for row, text in enumerate(texts):
        n = len(text) + sum(sizes)
        close(stepped[row, -n:], naive_hidden(model, text + more[row].tolist()).detach())


@pytest.mark.parametrize("sizes", [[1] * 7, [7], [3, 4], [1, 5, 1], [2, 2, 3]])
def test_a_cache_can_start_anywhere_in_the_padding(sizes):
    """A split inside the padding: parts that are only pads for one row, and a first part of one column."""
    model = tiny_gpt(1)
    batch = make_batch([[1, 2, 3, 4, 5, 6, 7], [8, 0], [3]], [[], [], []])
    caches = make_caches(model, 3, 7)
    with torch.no_grad():
        parts = [model.hidden(part, batch.start, caches) for part in batch.ids.split(sizes, dim=1)]
    hidden = torch.cat(parts, dim=1)
    assert hidden.isfinite().all()
    for row, (prompt, _) in enumerate(rows_of(batch)):
        close(hidden[row, -len(prompt):], naive_hidden(model, prompt).detach())


@pytest.mark.parametrize("kept, kept_again", [([0, 1, 2, 3], [3, 2, 1, 0]), ([1, 3], [1]), ([4, 2, 0], [0, 2]),
                                              ([3], [0])])
def test_decoding_goes_on_with_the_rows_that_are_kept(kept, kept_again):
    """The caches keep a neighbour's keys, overwrite rows while they move, or lose columns."""
    model = tiny_gpt(5)
    prompts, _ = random_texts(5, B=5)
    batch = make_batch(prompts, [[]] * 5)
    more = torch.randint(VOCAB, (5, 4), generator=rng())
    caches = make_caches(model, 5, 12)
    first = torch.tensor(kept)
    second = first[kept_again]
    with torch.no_grad():
        model.hidden(batch.ids, batch.start, caches)
        model.hidden(more[:, :1], batch.start, caches)
        for cache in caches:
            cache.keep(first)
        a = model.hidden(more[first, 1:2], batch.start[first], caches)
        for cache in caches:
            cache.keep(torch.tensor(kept_again))
        b = model.hidden(more[second, 2:4], batch.start[second], caches)
    for i, row in enumerate(first.tolist()):
        close(a[i], naive_hidden(model, prompts[row] + more[row, :2].tolist())[-1:].detach())
    for i, row in enumerate(second.tolist()):
        close(b[i], naive_hidden(model, prompts[row] + more[row].tolist())[-2:].detach())


# ---- parts of similar length -----------------------------------------------------------------------------------------

@few
@given(st.integers(0, 99), st.integers(1, 40), st.integers(1, 20), st.integers(0, 3))
def test_any_size_of_part_gives_the_same_values(seed, B, size, wider):
    """Values that depend on how a batch is split, of log-probs (B, R) and of scores (B,)."""
    model = tiny_gpt(seed % 3)
    batch = random_batch(seed, B, min_response=0, P=6 + wider, R=7 + wider)

    def sums(part):
        logits = model.head(response_hidden(model, part))
        return torch.where(part.mask[:, :, None], logits, 0.0).sum(dim=(1, 2))

    def logp(part):
        scores = log_softmax(model.head(response_hidden(model, part)))
        return torch.where(part.mask, scores.gather(2, part.responses[:, :, None])[:, :, 0], 0.0)

    with torch.no_grad():
        close(by_length(sums, batch, size), sums(batch))
        close(by_length(logp, batch, size), logp(batch))
        close(by_length(logp, batch, size), response_logprobs(model, batch))


def test_gradients_come_through_the_parts():
    """A detached or doubled part: gradients of all rows must be those of the rows one by one."""
    model = tiny_gpt()
    batch = random_batch(B=37, min_response=0)
    coefficients = torch.randn(37, batch.R, generator=rng(), dtype=torch.float64)
    together = gradients((coefficients * response_logprobs(model, batch)).sum(), model)
    total = 0
    for row in range(37):
        logp = response_logprobs(model, batch.select([row]))
        total = total + (coefficients[row] * logp[0]).sum()
    for a, b in zip(together, gradients(total, model)):
        close(a, b)


def test_by_length_changes_no_batch():
    """The caller's batch is trimmed or sorted, or a rollout loses its log-probs."""
    rollout = generate(tiny_gpt(), random_texts(1, B=20)[0], 6, generator=rng())
    before = copy.deepcopy(rollout)
    response_logprobs(tiny_gpt(), rollout)
    for name, value in vars(before).items():
        assert torch.equal(torch.as_tensor(getattr(rollout, name)), torch.as_tensor(value))


@pytest.mark.parametrize("vocab, embd, heads", [(11, 8, 2), (64, 16, 2), (100, 32, 4), (300, 64, 4)])
def test_equal_weights_give_equal_bits_frozen_or_trained(vocab, embd, heads):
    """
    KL at the start is 1e-7 instead of 0: PyTorch multiplies a strided slice in one way by a trained matrix and in
    another way by a frozen one. Batches of many shapes, because the two round differently for some of them only.
    """
    trained = tiny_gpt(0, torch.float32, vocab, block=64, heads=heads, embd=embd, std=0.1)
    frozen = copy.deepcopy(trained).requires_grad_(False)
    torch.manual_seed(0)
    critic = RewardModel(trained)
    reward_model = copy.deepcopy(critic).requires_grad_(False)
    shapes = [(1, 1, 5), (2, 9, 1), (3, 3, 17), (7, 12, 40), (16, 9, 2), (17, 3, 5), (33, 12, 17), (40, 5, 7)]
    for seed, (B, max_prompt, max_response) in enumerate(shapes):
        batch = random_batch(seed, B, vocab, max_prompt, max_response)
        logp = response_logprobs(trained, batch, 0.8)
        assert torch.equal(logp, response_logprobs(frozen, batch, 0.8)), (B, max_prompt, max_response)
        assert torch.equal(critic.values(batch), reward_model.values(batch))
        assert torch.equal(critic(batch), reward_model(batch))
        assert (exact_kl(trained, frozen, batch, 0.8) == 0).all()
        with torch.no_grad():
            assert torch.equal(response_logprobs(trained, batch, 0.8), logp)
        part = torch.arange(0, B, 2)
        close(response_logprobs(frozen, batch.select(part), 0.8), logp[part].detach(), atol=1e-5, rtol=1e-5)


# ---- log-probs of responses ------------------------------------------------------------------------------------------

@few
@given(any_rows, st.integers(0, 3), st.sampled_from([1.0, 0.7, 2.5]), st.integers(0, 9))
def test_response_logprobs_equal_a_loop_over_tokens(rows, wider, temperature, seed):
    """Logits off by one, no temperature, E or a token that looks like PAD masked, the first or last token lost."""
    model = tiny_gpt(seed)
    batch = batch_of(rows, wider)
    logp = response_logprobs(model, batch, temperature)
    assert logp.shape == (len(rows), batch.R)
    assert logp.dtype == torch.float64
    for row, (prompt, response) in enumerate(rows):
        close(logp[row, :len(response)], naive_response_logprobs(model, prompt, response, temperature))
        assert (logp[row, len(response):] == 0).all()


def test_the_default_temperature_is_one():
    """Another default in the scorer: SFT and DPO would train another distribution than the one that is sampled."""
    model = tiny_gpt()
    batch = random_batch()
    assert torch.equal(response_logprobs(model, batch), response_logprobs(model, batch, 1.0))
    assert torch.equal(log_softmax(torch.arange(4.0)), torch.log_softmax(torch.arange(4.0), 0))


def test_a_model_that_reads_positions_only():
    """
    Logits off by one. This GPT predicts at position p the token p + 1 with certainty: a correct response costs
    nothing, and one that is shifted by one costs much.
    """
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
    assert response_logprobs(model, batch_of(rows, 1)).abs().max() < 1e-9
    shifted = batch_of([(prompt, [token + 1 for token in response]) for prompt, response in rows], 1)
    assert (response_logprobs(model, shifted)[shifted.mask] < -10).all()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_response_logprobs_have_the_gradient_of_the_loop(temperature):
    """A detached or doubled path: the value is right, but the gradient is not."""
    model = tiny_gpt(2)
    batch = random_batch(2, B=4, min_response=0)
    coefficients = torch.randn(4, batch.R, generator=rng(), dtype=torch.float64)

    def total():
        return (coefficients * response_logprobs(model, batch, temperature)).sum()

    slow = 0
    for row, (prompt, response) in enumerate(rows_of(batch)):
        logp = naive_response_logprobs(model, prompt, response, temperature)
        slow = slow + (coefficients[row, :len(response)] * logp).sum()
    fast_gradients = gradients(total(), model)
    for a, b, (name, _) in zip(fast_gradients, gradients(slow, model), model.named_parameters()):
        close(a, b, msg=name)

    # finite differences along a random direction
    generator = rng(7)
    step = 1e-5
    directions = [torch.randn(w.shape, generator=generator, dtype=torch.float64) for w in model.parameters()]
    values = []
    with torch.no_grad():
        for sign in (1, -2):
            for w, direction in zip(model.parameters(), directions):
                w += sign * step * direction
            values.append(total().item())
    slope = sum((gradient * direction).sum().item() for gradient, direction in zip(fast_gradients, directions))
    assert slope == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-6)
    assert abs(slope) > 1e-3


def test_response_hidden_are_the_states_before_each_token():
    """Values aligned with the wrong token: the state of a response token is that of the token before it."""
    model = tiny_gpt()
    batch = random_batch(4, min_response=0, P=8, R=9)
    hidden = response_hidden(model, batch)
    assert hidden.shape == (len(batch), 9, 8)
    for row, (prompt, response) in enumerate(rows_of(batch)):
        close(hidden[row, :len(response)], naive_hidden(model, prompt + response)[len(prompt) - 1:-1])


def test_e_inside_the_prompt_ends_nothing():
    """PAD equals E, or E is searched in the prompt: there E and PAD are tokens like any other. E has a gradient."""
    model = tiny_gpt()
    rows = [([1, E, PAD, 2], [3, 4, E]), ([E], [E]), ([PAD, PAD], [PAD, E]), ([3], [E, PAD, 5])]
    logp = response_logprobs(model, batch_of(rows, 2))
    for row, (prompt, response) in enumerate(rows):
        close(logp[row, :len(response)], naive_response_logprobs(model, prompt, response))
    assert max(gradient.abs().max() for gradient in gradients(logp[0, 2], model)) > 1e-3

    rollout = generate(model, [[1, E, 2], [E, E], [PAD, E]] * 20, 5, generator=rng())
    assert rollout.response_lens.min() >= 1
    assert rollout.response_lens.max() == 5
    assert not rollout.finished.all()
    close(rollout.logp, response_logprobs(model, rollout).detach())


@pytest.mark.parametrize("R", [0, 3])
def test_a_batch_of_empty_responses_has_no_logprobs(R):
    """Responses without tokens make a NaN, an error, or a log-prob out of nothing."""
    logp = response_logprobs(tiny_gpt(), make_batch([[1, 2], [3]], [[], []], R=R))
    assert logp.shape == (2, R)
    assert (logp == 0).all()


def test_an_empty_response_beside_another_is_finite():
    """A NaN from one empty response reaches the gradient of the whole batch."""
    model = tiny_gpt()
    logp = response_logprobs(model, make_batch([[1, 2], [3]], [[], [4]]))
    assert logp[0, 0] == 0
    assert all(gradient.isfinite().all() for gradient in gradients(logp.sum(), model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_half_precision_logits_are_scored_in_float32(dtype, temperature):
    """Log-probs in bfloat16: rounding before the softmax makes a ratio of 1.03 out of nothing."""
    logits = (4 * torch.randn(50, 30, generator=rng())).to(dtype)
    logp = log_softmax(logits, temperature)
    assert logp.dtype == torch.float32
    exact = torch.log_softmax(logits.double() / temperature, -1)
    close(logp.double(), exact, atol=1e-5, rtol=0)
    close(logp.exp().sum(-1), torch.ones(50), atol=1e-5, rtol=0)
    assert log_softmax(logits.double()).dtype == torch.float64


def test_a_bf16_model_scores_and_samples_in_float32():
    """The scorer or the sampler of a bfloat16 model rounds its log-probs to three digits."""
    model = tiny_gpt(dtype=torch.bfloat16)
    batch = random_batch()
    hidden = response_hidden(model, batch)
    exact = torch.log_softmax(model.head(hidden).double() / 0.7, -1).gather(2, batch.responses[:, :, None])[:, :, 0]
    logp = response_logprobs(model, batch, 0.7)
    assert hidden.dtype == torch.bfloat16
    assert logp.dtype == torch.float32
    close(logp[batch.mask].double(), exact[batch.mask], atol=1e-5, rtol=0)
    rollout = generate(model, [[1, 2, 3], [4]] * 8, 4, generator=rng())
    assert rollout.logp.dtype == torch.float32
    assert not torch.equal(rollout.logp, rollout.logp.bfloat16().float())
    close(rollout.logp, response_logprobs(model, rollout).detach(), atol=0.1, rtol=0)


# ---- the sampler -----------------------------------------------------------------------------------------------------

def test_samples_follow_their_probabilities():
    """Biased sampling: 20,000 draws do not fit, an impossible token is drawn, or the rarest never is (top-k, top-p)."""
    probs = torch.tensor([0.0, 0.3, 0.0, 0.005, 0.2, 0.0, 0.445, 0.05, 0.0], dtype=torch.float64)
    draws = sample(probs.expand(20_000, -1), rng(1))
    assert draws.shape == (20_000, 1)
    assert draws.dtype == torch.long
    counts = draws.flatten().bincount(minlength=9)
    assert surprise(counts, probs) < 4
    assert (counts[probs > 0] > 0).all()
    # the measure sees wrong probabilities
    assert surprise(counts.roll(1), probs) > 100
    assert surprise(counts, probs.sqrt() / probs.sqrt().sum()) > 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_random_number_draws_what_has_probability_zero(dtype, monkeypatch):
    """A uniform number of exactly 0, or almost 1, draws a token of probability 0 or one beyond the vocabulary."""
    def uniform_is(value):
        monkeypatch.setattr(torch, "rand", lambda *shape, **options: torch.full(shape, value, dtype=dtype))

    probs = torch.tensor([[0, 0.25, 0, 0.75, 0]], dtype=dtype)
    for value in (0.0, 1 - torch.finfo(dtype).eps / 2, 0.1, 0.5, 0.9):
        uniform_is(value)
        assert sample(probs).item() in (1, 3)
    uniform_is(0.0)
    tenths = torch.full((1, 10), 0.1, dtype=dtype)  # their sum is not exactly 1
    assert 0 <= sample(tenths).item() < 10


def test_rows_are_sampled_independently():
    """One random number for all rows: the responses of a group are copies of each other."""
    probs = torch.full((4000, 2), 0.5, dtype=torch.float64)
    draws = sample(probs, rng()).view(-1, 2)
    counts = (2 * draws[:, 0] + draws[:, 1]).bincount(minlength=4)
    assert surprise(counts, torch.full((4,), 0.25)) < 4
    different = torch.eye(5, dtype=torch.float64)[[3, 0, 4, 1]]
    assert sample(different, rng()).flatten().tolist() == [3, 0, 4, 1]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("prompt", [[3], [1, 2, 5, 0]])
def test_the_first_token_follows_the_model_at_the_temperature(prompt, temperature):
    """Sampler and model differ: no temperature, or twice, or inverted; top-k or top-p; the wrong column is read."""
    model = tiny_gpt(1, std=0.4)
    probs = torch.softmax(naive_logits(model, prompt)[-1] / temperature, 0).detach()
    prompts = [prompt] * 20_000 + [[7] * 5]  # the last one is longer, so the others are padded
    rollout = generate(model, prompts, 1, temperature, rng(3))
    counts = rollout.responses[:-1].flatten().bincount(minlength=VOCAB)
    assert surprise(counts, probs) < 4
    assert (counts > 0).all()
    for wrong in (probs ** 0.7, probs ** 1.4):
        assert surprise(counts, wrong / wrong.sum()) > 20


def tree_of_responses(model, prompt, end, horizon):
    """{response: probability} of all responses of at most `horizon` tokens."""
    tree = {}
    stack = [((), 1.0)]
    while stack:
        response, chance = stack.pop()
        if len(response) == horizon or end in response:
            tree[response] = chance
            continue
        probs = torch.softmax(naive_logits(model, prompt + list(response))[-1], 0).tolist()
        stack += [(response + (token,), chance * p) for token, p in enumerate(probs)]
    return tree


def test_whole_responses_follow_the_tree_of_all_responses():
    """Any error of the decoding loop: 20,000 rollouts must fit the probabilities of all short responses."""
    model = tiny_gpt(2, vocab=4, std=0.4)
    prompt, end = [0, 3], 2
    tree = tree_of_responses(model, prompt, end, 3)
    assert len(tree) == 40
    assert sum(tree.values()) == pytest.approx(1)
    rollout = generate(model, [prompt] * 20_000, 3, generator=rng(4))
    responses = [tuple(response) for response in rollout.response_ids()]
    seen = dict.fromkeys(tree, 0)
    for response in responses:
        seen[response] += 1
    assert surprise(list(seen.values()), list(tree.values())) < 4
    assert rollout.finished.tolist() == [end in response for response in responses]
    for response, logp in zip(responses[:50], rollout.logp):
        assert logp.sum().item() == pytest.approx(math.log(tree[response]), abs=1e-9)


@few
@given(any_rows, st.integers(1, 5), st.sampled_from([1.0, 0.7]), st.integers(0, 99))
def test_a_rollout_is_well_formed_and_knows_its_logprobs(rows, horizon, temperature, seed):
    """Lengths off by one, E not in the mask, tokens after E, log-probs that are not those of the scorer."""
    model = tiny_gpt(seed, std=0.4)
    prompts = [prompt for prompt, _ in rows] * 2
    rollout = generate(model, prompts, horizon, temperature, rng(seed))
    assert isinstance(rollout, Rollout)
    assert rollout.P == max(map(len, prompts))
    assert rollout.R == max(rollout.response_lens) <= horizon
    assert rollout.logp.shape == rollout.mask.shape == (len(prompts), rollout.R)
    assert rollout.finished.dtype == torch.bool
    assert not rollout.logp.requires_grad
    assert (rollout.ids[is_pad(rollout)] == PAD).all()
    assert (rollout.logp[~rollout.mask] == 0).all()
    for row, (prompt, response) in enumerate(rows_of(rollout)):
        assert prompt == prompts[row]
        assert E not in response[:-1]
        assert bool(rollout.finished[row]) == (response[-1] == E)
        assert rollout.finished[row] or len(response) == horizon
        expected = naive_response_logprobs(model, prompt, response, temperature).detach()
        close(rollout.logp[row, :len(response)], expected)
    close(rollout.logp, response_logprobs(model, rollout, temperature).detach())


@pytest.mark.parametrize("B", [2, 5, 40])
def test_rows_that_end_early_do_not_disturb_the_others(B, monkeypatch):
    """When ended rows are dropped, tokens or log-probs go to the wrong rows, or the cache keeps the wrong ones."""
    kept = []
    keep = KVCache.keep

    def spy(cache, rows):
        kept.append(len(rows))
        keep(cache, rows)

    monkeypatch.setattr(KVCache, "keep", spy)
    model = tiny_gpt(3)
    prompts, _ = random_texts(1, B=B)
    lengths = set()
    for seed in range(4):
        rollout = generate(model, prompts, 12, 1.0, rng(seed))
        close(rollout.logp, response_logprobs(model, rollout).detach())
        assert [prompt for prompt, _ in rows_of(rollout)] == prompts
        for response, finished in zip(rollout.response_ids(), rollout.finished.tolist()):
            assert E not in response[:-1]
            assert finished == (response[-1] == E)
            assert finished or len(response) == 12
        lengths |= set(rollout.response_lens.tolist())
    assert len(lengths) > 1
    assert kept
    assert min(kept) < B


def test_float32_sampler_and_scorer_agree():
    """The ratio is not 1 before the first step, in the precision of training."""
    model = tiny_gpt(dtype=torch.float32)
    rollout = generate(model, random_texts(2, B=30)[0], 10, 0.7, rng())
    assert rollout.logp.dtype == torch.float32
    close(rollout.logp, response_logprobs(model, rollout, 0.7).detach(), atol=1e-5, rtol=0)
    assert (rollout.logp[rollout.mask] < 0).all()


def test_a_response_ends_at_e_and_e_is_part_of_it():
    """E is not counted: a model that always samples E gives finished responses of one token."""
    rollout = generate(always(E), [[1, 2], [3], [4, 5, 6]], 5, generator=rng())
    assert rollout.ids.tolist() == [[PAD, 1, 2, E], [PAD, PAD, 3, E], [4, 5, 6, E]]
    assert rollout.response_lens.tolist() == [1, 1, 1]
    assert rollout.prompt_lens.tolist() == [2, 1, 3]
    assert rollout.finished.all()
    assert rollout.mask.all()
    assert rollout.P == 3
    assert rollout.logp.shape == (3, 1)
    assert rollout.logp.abs().max() < 1e-9


@pytest.mark.parametrize("token", [5, PAD])
def test_a_response_cut_at_the_horizon_is_not_finished(token):
    """A cut taken for an end: a model that never samples E runs to the horizon. A sampled PAD is a token."""
    rollout = generate(always(token), [[1, 2], [3]], 4, generator=rng())
    assert rollout.responses.tolist() == [[token] * 4] * 2
    assert rollout.response_lens.tolist() == [4, 4]
    assert rollout.mask.all()
    assert not rollout.finished.any()


def test_the_ids_of_e_and_pad_can_be_named():
    """Hard-wired ids of E and PAD. 0 is an id too."""
    rollout = generate(always(0), [[1, 2], [3]], 4, generator=rng(), end=0, pad=7)
    assert rollout.ids.tolist() == [[1, 2, 0], [7, 3, 0]]
    assert rollout.finished.all()
    rollout = generate(always(E), [[1, 2], [3]], 2, generator=rng(), end=4, pad=0)
    assert rollout.ids.tolist() == [[1, 2, E, E], [0, 3, E, E]]
    assert not rollout.finished.any()


def test_one_id_for_e_and_pad():
    """GPT-2 has one id for both. The first E ends a response, and the pads after it are no tokens."""
    model = tiny_gpt()
    rollout = generate(model, [[1]] * 60, 6, generator=rng(), end=3, pad=3)
    assert rollout.finished.tolist() == [response[-1] == 3 for response in rollout.response_ids()]
    assert all(3 not in response[:-1] for response in rollout.response_ids())
    close(rollout.logp, response_logprobs(model, rollout).detach())


def test_the_seed_decides_and_nothing_else():
    """One state of the generator gives one rollout, the next call another one. The global generator is not used."""
    model = tiny_gpt()
    prompts = [[1, 2], [3], [4]]
    generator = rng(5)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = generate(model, prompts, 8, generator=generator)
    second = generate(model, prompts, 8, generator=generator)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    again = generate(model, prompts, 8, generator=rng(5))
    other = generate(model, prompts, 8, generator=rng(6))
    assert first.response_ids() == again.response_ids()
    assert torch.equal(first.logp, again.logp)
    assert first.response_ids() != second.response_ids()
    assert first.response_ids() != other.response_ids()


def test_responses_to_one_prompt_differ():
    """One draw for all rows, or the same draws in every call without a generator."""
    model = tiny_gpt()
    responses = generate(model, [[1]] * 10, 8, generator=rng()).response_ids()
    assert len({tuple(response) for response in responses}) > 5
    first = generate(model, [[1, 2], [3], [4]], 8).response_ids()
    assert first != generate(model, [[1, 2], [3], [4]], 8).response_ids()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_rollouts_stay_on_the_gpu_of_their_model():
    """A tensor made on the CPU in the sampler or the scorer: an error that only a GPU shows."""
    model = tiny_gpt().cuda()
    rollout = generate(model, random_texts(1, B=20)[0], 8, 0.7, torch.Generator("cuda").manual_seed(0))
    for name in ("ids", "prompt_lens", "response_lens", "logp", "finished", "mask"):
        assert getattr(rollout, name).is_cuda, name
    close(rollout.logp, response_logprobs(model, rollout, 0.7).detach())
    close(rollout.logp.cpu(), response_logprobs(tiny_gpt(), rollout.to("cpu"), 0.7).detach())


def test_generate_leaves_the_model_as_it_was():
    """A sampler that trains: it leaves a gradient, a changed weight or mode, or changes the caller's prompts."""
    model = tiny_gpt().train()
    prompts = [[1, 2], [3]]
    before = [w.clone() for w in model.parameters()]
    generate(model, prompts, 3, generator=rng())
    assert prompts == [[1, 2], [3]]
    assert model.training
    assert all(w.grad is None for w in model.parameters())
    assert all(torch.equal(w, b) for w, b in zip(model.parameters(), before))


def test_generate_refuses_what_it_cannot_do():
    """After an empty prompt the first token depends on padding; a long one passes the block; temperature 0 divides."""
    model = tiny_gpt(block=8)
    for prompts in ([[]], [[1], []], [[], [1]]):
        with pytest.raises(ValueError, match="empty prompt"):
            generate(model, prompts, 3)
    with pytest.raises(ValueError, match="no prompts"):
        generate(model, [], 3)
    with pytest.raises(ValueError, match="6 prompt columns and 3 new .* fit.* 8"):
        generate(model, [[1], [1] * 6], 3)
    with pytest.raises(ValueError, match="at least 1"):
        generate(model, [[1]], 0)
    for temperature in (0, 0.0, -1, float("nan")):
        with pytest.raises(ValueError, match="temperature"):
            generate(model, [[1]], 3, temperature)


def test_prompt_and_response_can_fill_the_block():
    """Off by one: exactly block_size columns are refused, or the last position is wrong."""
    model = tiny_gpt(block=8)
    rollout = generate(model, [[1], [1] * 6], 2, generator=rng(), end=-1)  # no token is E
    close(rollout.logp, response_logprobs(model, rollout).detach())
    assert rollout.response_lens.tolist() == [2, 2]
    assert (rollout.logp < 0).all()


def test_select_keeps_the_fields_of_a_rollout_together():
    """Log-probs or finished flags of other rows after a selection, or a rollout that becomes a plain batch."""
    rollout = generate(tiny_gpt(), random_texts(1, B=12)[0], 6, generator=rng())
    rows = torch.tensor([7, 2, 2, 11])
    part = rollout.select(rows)
    assert isinstance(part, Rollout)
    assert (part.P, part.R) == (rollout.P, rollout.R)
    for name in ("ids", "prompt_lens", "response_lens", "logp", "finished"):
        assert torch.equal(getattr(part, name), getattr(rollout, name)[rows]), name
    assert torch.equal(rollout.to("cpu").logp, rollout.logp)
    assert torch.equal(rollout.trim().ids, Batch(*list(vars(rollout).values())[:4]).trim().ids)


def test_the_module_has_the_names_of_the_contract():
    """A renamed function or argument: DESIGN.md promises these to assignments."""
    model = tiny_gpt(dtype=torch.float32)
    rollout = model_module.generate(model, prompts=[[1, 2]], max_new_tokens=2, temperature=1.0, generator=rng())
    assert model_module.response_logprobs(model, rollout, temperature=1.0).shape == (1, rollout.R)
    config = GPTConfig(vocab_size=3, block_size=4, n_layer=1, n_head=1, n_embd=2)
    assert GPT(config)(torch.zeros(1, 2, dtype=torch.long), start=torch.tensor([0])).shape == (1, 2, 3)
