"""Tests of what the benchmarks count: operations against loops, arrivals by hand, the weights that the peers are given against their own networks."""

import pytest
import torch
from helpers import close, make_batch, random_batch, rows_of, tiny_gpt

import bench
from bench_race import arrival, reward_weights, shares
from reward import RewardModel, normalise


def test_operations_are_those_of_a_loop_over_tokens():
    """Operations that count padding, or forget attention, the head or a layer: a share of the limit that is too high or too low."""
    batch, C, V = random_batch(3), bench.CONFIG.n_embd, bench.CONFIG.vocab_size
    trunk = head = 0
    for prompt, response in rows_of(batch):
        for seen in range(1, len(prompt) + len(response) + 1):
            for _ in range(bench.CONFIG.n_layer):
                trunk += 2 * (3 * C * C + C * C + 4 * C * C + 4 * C * C) + 2 * C * seen + 2 * seen * C  # the four matrices, the scores, the mixture
        head += 2 * C * V * len(response)
    assert bench.forward_flops(batch) == trunk + head and bench.forward_flops(batch, head=False) == trunk


def test_the_policy_of_the_benchmark_ends_as_often_as_it_is_told():
    """Responses that all run to the cap, or all end at once: then nothing is measured of rows that end at different times."""
    model, ids = bench.make_policy(1 / 30, "cpu"), torch.randint(bench.END, (8, 20), generator=torch.Generator().manual_seed(0))
    logp = torch.log_softmax(model(ids), dim=-1)[..., bench.END]
    assert 1 / 40 < logp.mean().exp() < 1 / 20


def test_the_race_is_over_when_the_mean_of_five_has_arrived():
    """An arrival by one lucky rollout, in a window that is not full, or with the seconds of later iterations."""
    objectives = [9.0, 0.0, 0.0, 0.0, 0.0, 2.0, 2.0, 2.0, 2.0, 2.0, 0.0]
    assert shares(objectives, 0.0, 2.0) == pytest.approx([0, 0, 0, 0, 0.9, 0.2, 0.4, 0.6, 0.8, 1.0, 0.8])
    steps = [(9.0 if i == 0 else 0.5, objective) for i, objective in enumerate(objectives)]  # the first is slow, and the median does not mind
    assert arrival(steps, 0.8, 0.0, 2.0) == (5, 2.5) and arrival(steps, 0.95, 0.0, 2.0) == (10, 5.0) and arrival(steps, 1.1, 0.0, 2.0) is None
    assert arrival([], 0.8, 0.0, 2.0) is None and shares([1.0] * 5, -1.0, 3.0)[-1] == 0.5


def test_the_peers_reward_model_gives_the_same_scores():
    """A race on another reward: the bias, the mean or the deviation of the scores lost on the way into weights that have no place for them."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = RewardModel(tiny_gpt(1, torch.float32))
    torch.nn.init.constant_(model.score.bias, 0.7)
    normalise(model, [random_batch(5)])
    c = model.trunk.config
    config = transformers.GPT2Config(vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
                                     num_labels=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, pad_token_id=0)
    peer = transformers.GPT2ForSequenceClassification(config).eval()
    assert peer.load_state_dict(reward_weights(model), strict=False).missing_keys == []
    for prompt, response in rows_of(random_batch(6)):
        hidden = peer.transformer(torch.tensor([prompt + response])).last_hidden_state
        close(peer.score(hidden)[0, -1, 0], model(make_batch([prompt], [response]))[0], 1e-5)
