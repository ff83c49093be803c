"""GPT-2 weights: there and back, against Hugging Face's own network."""

import pytest
import torch
from helpers import is_pad, make_batch, tiny_gpt

from bench.gpt2 import from_gpt2, peer_weights, to_gpt2
from model import GPT, GPTConfig, response_logprobs


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def test_gpt2_weights_come_back_unchanged():
    """Weights lost on the way: layer 10 sorted before 2, sizes misread, a matrix transposed only once, no prefix."""
    model = tiny_gpt(vocab=7, block=5, layers=11, heads=2, embd=4, dtype=torch.float32)
    state = to_gpt2(model)
    without_prefix = {name.removeprefix("transformer."): weight for name, weight in state.items()}
    with_mask = {**state, "transformer.h.0.attn.bias": torch.ones(1)}  # old files hold the causal mask as well
    for version in (state, without_prefix, with_mask):
        back = from_gpt2(version, n_head=2)
        assert isinstance(back, GPT) and back.config == model.config
        for name, weight in model.state_dict().items():
            assert torch.equal(back.state_dict()[name], weight)


def test_gpt2_stores_linear_layers_transposed():
    """Conv1D's orientation: a square matrix (attn.c_proj) left as it is, or an embedding transposed, fits any shape."""
    model = tiny_gpt()
    state = to_gpt2(model)
    for n, block in enumerate(model.h):
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            layer = block.get_submodule(name)
            x = torch.randn(3, layer.in_features, generator=rng(), dtype=torch.float64)
            weight = state[f"transformer.h.{n}.{name}.weight"]
            bias = state[f"transformer.h.{n}.{name}.bias"]
            torch.testing.assert_close(x @ weight + bias, layer(x), atol=1e-9, rtol=1e-9)
    assert torch.equal(state["lm_head.weight"], model.wte.weight)
    assert torch.equal(state["transformer.wte.weight"], model.wte.weight)
    assert torch.equal(state["transformer.wpe.weight"], model.wpe.weight)


def test_models_from_one_state_dict_have_their_own_memory():
    """Shared memory: training the policy that came from a state dict would train the reference from the same one."""
    model = tiny_gpt(dtype=torch.float32)
    state = to_gpt2(model)
    a = from_gpt2(state, 2)
    b = from_gpt2(state, 2)
    for_peers = peer_weights(model)["transformer.wte.weight"]
    before = for_peers.clone()
    with torch.no_grad():
        for weight in a.parameters():
            weight.zero_()
    for x, y in zip(b.parameters(), model.parameters(), strict=True):
        assert torch.equal(x, y) and x.abs().sum() > 0
    with torch.no_grad():
        model.wte.weight.zero_()
    assert torch.equal(for_peers, before)


@pytest.fixture(scope="module")
def hugging_face():
    transformers = pytest.importorskip("transformers", reason="parity with GPT-2 needs transformers")
    config = transformers.GPT2Config(vocab_size=37, n_positions=20, n_embd=24, n_layer=3, n_head=4)
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    generator = rng()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight += 0.2 * torch.randn(weight.shape, generator=generator)
    return theirs


@pytest.mark.slow
def test_gpt2_of_hugging_face_gives_the_same_logits(hugging_face):
    """Not GPT-2: a formula, eps, name or orientation differs from the published model's; also with left padding."""
    ours = from_gpt2(hugging_face.state_dict(), n_head=4)
    assert ours.config == GPTConfig(37, 20, 3, 4, 24)
    ids = torch.randint(37, (4, 15), generator=rng())
    batch = make_batch([[1, 2, 3, 4], [5], [6, 7]], [[8, 9], [10, 11, 12, 13], [14]], P=6, pad=36)
    real = ~is_pad(batch)                                                                     # (B, T)
    positions = (real.cumsum(dim=1) - 1).clamp(min=0)                                         # (B, T)
    close = dict(atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), hugging_face(ids).logits, **close)
        theirs = hugging_face(batch.ids, attention_mask=real.long(), position_ids=positions).logits
        logits = ours(batch.ids, batch.start)
        torch.testing.assert_close(logits[real], theirs[real], **close)
        logp = theirs[:, 5:-1].log_softmax(-1).gather(2, batch.responses[..., None])[..., 0]  # (B, R)
        torch.testing.assert_close(response_logprobs(ours, batch), logp * batch.mask, **close)


@pytest.mark.slow
def test_gpt2_of_hugging_face_takes_the_weights_back(hugging_face):
    """A trained model that cannot be given back: names, shapes or values differ from GPT2LMHeadModel's own."""
    theirs = hugging_face.state_dict()
    ours = to_gpt2(from_gpt2(theirs, n_head=4))
    assert set(ours) == set(theirs)
    for name, weight in theirs.items():
        assert torch.equal(ours[name], weight)
