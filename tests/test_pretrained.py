"""
Tests of pretrained.py: models of four architectures with random weights, against transformers' own numbers.
"""

import copy

import pytest
import torch
from helpers import close, finish, make_batch, random_texts, rng, unchanged, weights

from data import pad_prompts
from model import generate, response_logprobs
from ppo import PPOConfig, masked_mean, train_ppo
from reward import RewardModel
from tokenizer import frequent_pieces, make_tokenizer

transformers = pytest.importorskip("transformers")
from pipeline.export import export_tokenizer  # noqa: E402
from pretrained import Pretrained, load_pretrained  # noqa: E402

VOCAB, E = 40, 7  # E is in the middle of the vocabulary: nobody may take the last ids
SIZES = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=32)
CONFIGS = {
    "gpt2": lambda: transformers.GPT2Config(vocab_size=VOCAB, n_positions=32, n_embd=32, n_layer=2, n_head=4),
    "llama": lambda: transformers.LlamaConfig(**SIZES), "qwen2": lambda: transformers.Qwen2Config(**SIZES),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=8)}


def network(kind, dtype=torch.float32, rank=0):
    """A model whose weights are large enough that every token matters. kind: a key of CONFIGS, or a configuration."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]() if isinstance(kind, str) else kind).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return Pretrained(model.to(dtype), E, rank).eval()


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_padded_rows_are_the_models_own(kind, dtype, tolerance):
    """Bug: positions count the padding, the padding is seen, or logits are shifted: each row alone, by transformers."""
    net = network(kind, dtype)
    prompts, responses = random_texts(B=5, vocab=VOCAB)
    batch = make_batch(prompts, responses, pad=net.pad)
    logp = response_logprobs(net, batch).detach()
    assert logp.dtype == torch.float32
    for row, (prompt, response) in enumerate(zip(prompts, responses)):
        logits = net.model(torch.tensor([prompt + response])).logits[0].float()
        own = torch.log_softmax(logits, dim=-1)[len(prompt) - 1:-1]
        own = own[torch.arange(len(response)), torch.tensor(response)]
        close(logp[row, :len(response)], own.detach(), tolerance)
        assert not logp[row, len(response):].any()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", CONFIGS)
def test_sampled_log_probs_are_the_scored_ones(kind):
    """Bug: the cache, or rows dropped from it, change the samples; E is not the model's; a name is deprecated."""
    net = network(kind)
    rollout = generate(net, [[1, 2, 3], [4], [5, 6, 9, 9, 9], [8, 8]] * 8, 12, generator=rng())
    close(response_logprobs(net, rollout).detach(), rollout.logp, 1e-4)
    for ids, finished in zip(rollout.response_ids(), rollout.finished.tolist()):
        assert E not in ids[:-1] and finished == (ids[-1] == E)
    assert rollout.finished.any() and len({len(ids) for ids in rollout.response_ids()}) > 2


SCRIPTS = ["the film was good .", "это хороший фильм", "映画はとても良い", "यह अच्छा है", "الفيلم جيد", "👍🏽 ok", "x"]


@pytest.mark.parametrize("kind", CONFIGS)
def test_texts_are_continued_as_by_transformers(kind, tmp_path):
    """Bug: the tokens of a text, E, padding or the cache are others than in transformers' own generate."""
    tokenizer = make_tokenizer(frequent_pieces(SCRIPTS * 2, 30))
    export_tokenizer(tokenizer, tmp_path)
    config = CONFIGS[kind]()
    config.vocab_size, config.max_position_embeddings = tokenizer.n_vocab, 64
    model = network(config).model
    model.save_pretrained(tmp_path)
    net, ours = load_pretrained(tmp_path)
    batch = transformers.AutoTokenizer.from_pretrained(tmp_path)(SCRIPTS, padding=True, return_tensors="pt")
    prompts = [ours.encode_ordinary(text) for text in SCRIPTS]
    assert prompts == [row[mask].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"].bool())]
    rollout = generate(net, prompts, 16, temperature=1e-6)  # the most probable token
    theirs = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], do_sample=False,
                            max_new_tokens=16, eos_token_id=net.end, pad_token_id=net.pad)[:, rollout.P:]
    assert rollout.response_ids() == [row[:len(ids)].tolist() for row, ids in zip(theirs, rollout.response_ids())]
    assert [int((row == net.end).any()) for row in theirs] == rollout.finished.tolist()


def test_the_block_is_the_models():
    """Bug: a text that does not fit the model's positions is read all the same."""
    net = network("llama")
    ids, lengths = pad_prompts([[1] * 32, [2]], net.pad)
    assert net.hidden(ids, 32 - lengths).shape == (2, 32, net.width)
    with pytest.raises(ValueError, match="more than 32 columns"):
        net.hidden(torch.ones(1, 33, dtype=torch.long))


@pytest.mark.parametrize("kind", CONFIGS)
def test_adapters_share_the_weights(kind):
    """Bug: a copy has the adapter of its original, an adapter changes the model at first, or weights are trained."""
    plain, policy = network(kind), network(kind, rank=2)
    reference = copy.deepcopy(policy).requires_grad_(False)
    ids = torch.tensor([[1, 2, 3, 9, 4]])
    assert reference.model is policy.model and len(policy.state_dict()) == len(policy.adapter) > 0
    assert torch.equal(policy(ids), plain(ids))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    assert not torch.allclose(policy(ids), plain(ids), atol=1e-2) and torch.equal(reference(ids), plain(ids))
    policy(ids).sum().backward()
    assert all(parameter.grad is not None for parameter in policy.parameters())
    assert all(parameter.grad is None for parameter in policy.model.parameters())


def test_ppo_trains_adapters_in_bfloat16():
    """Bug: critic and policy have one adapter, bfloat16 stops a canary, or scores are half of them ties."""
    policy = network("llama", rank=4)
    reference = copy.deepcopy(policy).requires_grad_(False)
    critic = RewardModel(reference).requires_grad_(True)
    adapters = [parameter.data_ptr() for part in (policy, critic, reference) for parameter in part.parameters()]
    assert len(set(adapters)) == len(adapters)
    before = weights(policy), weights(critic)
    config = PPOConfig(ppo_iterations=2, ppo_batch=16, minibatch=8, response_tokens=6, ppo_lr=1e-2, critic_lr=1e-2)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        finish(train_ppo(policy, critic, reference, lambda rollout: rollout.response_lens.float(), [[1, 2], [4]],
                         config, seed=0))
        scores = critic(generate(policy, [[1, 2], [4]], 6, generator=rng()))
    assert scores.dtype == torch.float32 and (scores.bfloat16() != scores).any()
    assert not unchanged(policy, before[0]) and not unchanged(critic, before[1])
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(reference(ids), network("llama")(ids))


@pytest.mark.parametrize("rank", [0, 2])
def test_micro_batches_have_the_same_gradient(rank):
    """Bug: a mean over each micro-batch, the adapter of another network, or activations are kept."""
    prompts, responses = random_texts(B=7, vocab=VOCAB)

    def gradients(micro_batch):
        """Of a loss of a policy and a critic that share their weights, and the numbers kept for the backward pass."""
        policy = network("qwen3", rank=rank)
        with torch.no_grad():
            for parameter in policy.adapter.values():
                parameter += 0.1
        critic = RewardModel(policy)
        policy.micro_batch = critic.trunk.micro_batch = micro_batch
        batch, kept = make_batch(prompts, responses, pad=policy.pad), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            logp, values, scores = response_logprobs(policy, batch), critic.values(batch), critic(batch)
        loss = masked_mean(logp * values.detach(), batch.mask) + masked_mean(values ** 2, batch.mask) + scores.sum()
        loss.backward()
        found = [parameter.grad for parameter in (*policy.parameters(), *critic.parameters())]
        return torch.cat([gradient.flatten() for gradient in found if gradient is not None]), sum(kept)

    whole, kept = gradients(0)
    for size in (1, 3, 64):
        parts, kept_by_parts = gradients(size)
        close(parts, whole, 1e-5)
        assert kept_by_parts < kept / 10


def test_a_folder_is_loaded(tmp_path):
    """Bug: another dtype, dropout, another E, a PAD that is in many texts, or a prompt without the chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    words = {word: i for i, word in enumerate("<unk> user : hi there <end> bot".split())}
    own = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    own.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=own, eos_token="<end>", unk_token="<unk>")
    net = network("llama", torch.bfloat16)
    net.model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, tokenizer = load_pretrained(tmp_path)
    assert (loaded.end, loaded.dtype, loaded.training) == (5, torch.float32, False)
    assert loaded.pad == 4  # id 0 is "!" in many vocabularies, at which an exported reward model would not look
    for (name, saved), (_, read) in zip(net.named_parameters(), loaded.named_parameters()):
        assert torch.equal(saved.float(), read), name
    assert tokenizer.encode_ordinary("hi there") == [3, 4]
    tokenizer.own.chat_template = "user : {{ messages[0]['content'] }}{% if add_generation_prompt %} bot{% endif %}"
    assert tokenizer.encode_chat([dict(role="user", content="hi there")]) == [1, 2, 3, 4, 6]
    tokenizer.own.clean_up_tokenization_spaces = True  # as many old folders say
    tokenizer.own.add_tokens(["."])
    assert tokenizer.decode([3, 7]) == "hi ."
