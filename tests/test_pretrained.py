"""Tests of pretrained.py: models of four architectures with random weights, against transformers' own numbers."""

import copy

import pytest
import torch
from helpers import SIZES, close, make_batch, random_texts, rng

from data import pad_prompts
from model import generate, response_logprobs
from ppo import masked_mean
from reward import RewardModel
from tokenizer import frequent_pieces, make_tokenizer

transformers = pytest.importorskip("transformers")
from pipeline.export import export_tokenizer  # noqa: E402
from pretrained import Pretrained, load_pretrained  # noqa: E402

VOCAB, E = 40, 7  # E is in the middle of the vocabulary: nobody may take the last ids
KINDS = ("gpt2", "llama", "qwen2", "qwen3")


def network(kind, dtype=torch.float32, rank=0, vocab=VOCAB):
    """A model whose weights are large enough that every token matters."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, vocab_size=vocab, **SIZES)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return Pretrained(model.to(dtype), E, rank).eval()


@pytest.mark.parametrize("kind, dtype, tolerance", [*[(kind, torch.float32, 1e-5) for kind in KINDS],
                                                    ("llama", torch.bfloat16, 0.1)])
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
@pytest.mark.parametrize("kind", KINDS)
def test_sampled_log_probs_are_the_scored_ones(kind):
    """Bug: the cache, or rows dropped from it, change the samples; E is not the model's; a name is deprecated."""
    net = network(kind)
    rollout = generate(net, [[1, 2, 3], [4], [5, 6, 9, 9, 9], [8, 8]] * 8, 16, 10.0, rng())
    close(response_logprobs(net, rollout, 10.0).detach(), rollout.logp, 1e-4)
    for ids, finished in zip(rollout.response_ids(), rollout.finished.tolist()):
        assert E not in ids[:-1] and finished == (ids[-1] == E)
    assert (rollout.response_lens < 16).sum() > 7  # rows that ended are dropped when they are a fifth


SCRIPTS = ["the film was good .", "это хороший фильм", "映画はとても良い", "यह अच्छा है", "الفيلم جيد", "👍🏽 ok", "x"]


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_continued_as_by_transformers(kind, tmp_path):
    """Bug: the tokens of a text, E, padding or the cache are others than in transformers' own generate."""
    tokenizer = make_tokenizer(frequent_pieces(SCRIPTS * 2, 30))
    export_tokenizer(tokenizer, tmp_path)
    model = network(kind, vocab=tokenizer.n_vocab).model
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
    ids, lengths = pad_prompts([[1] * 64, [2]], net.pad)
    assert net.hidden(ids, 64 - lengths).shape == (2, 64, net.width)
    with pytest.raises(ValueError, match="more than 64 columns"):
        net.hidden(torch.ones(1, 65, dtype=torch.long))


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_share_the_weights(kind):
    """Bug: a copy has its original's adapter; one that changes the model at first, is coarse, or of another size."""
    plain, policy = network(kind), network(kind, rank=2)
    reference = copy.deepcopy(policy).requires_grad_(False)
    ids = torch.tensor([[1, 2, 3, 9, 4]])
    assert reference.model is policy.model and len(policy.state_dict()) == len(policy.adapter) > 0
    assert torch.equal(policy(ids), plain(ids))
    assert {part.scaling["default"] for part in policy.model.modules() if hasattr(part, "lora_A")} == {2.0}  # 2 B A
    assert {parameter.dtype for parameter in network(kind, torch.bfloat16, rank=2).parameters()} == {torch.float32}
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    assert not torch.allclose(policy(ids), plain(ids), atol=1e-2) and torch.equal(reference(ids), plain(ids))
    policy(ids).sum().backward()
    assert all(parameter.grad is not None for parameter in policy.parameters())
    assert all(parameter.grad is None for parameter in policy.model.parameters())


def test_scores_under_autocast_are_float32():
    """Bug: in bfloat16 half of all scores are ties."""
    reward_model = RewardModel(network("llama", rank=4))
    with torch.autocast("cpu", torch.bfloat16):
        scores = reward_model(make_batch(*random_texts(B=9, vocab=VOCAB)))
    assert scores.dtype == torch.float32 and (scores.bfloat16() != scores).any()


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
    for size in (3, 64):
        parts, kept_by_parts = gradients(size)
        close(parts, whole, 1e-5)
        assert kept_by_parts < kept / 10


def test_a_folder_is_loaded(tmp_path):
    """Bug: another dtype, dropout, another E, a PAD that is in many texts, or spaces that are cleaned up."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    words = {word: i for i, word in enumerate("<unk> a b hi there <end>".split())}
    own = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    own.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=own, eos_token="<end>", unk_token="<unk>")
    net = network("llama", torch.bfloat16)
    net.model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, tokenizer = load_pretrained(tmp_path)
    assert (loaded.end, loaded.dtype, loaded.training) == (5, torch.float32, False)
    assert Pretrained(loaded.model, 0).pad == 1
    assert loaded.pad == 4  # id 0 is "!" in many vocabularies, at which an exported reward model would not look
    for (name, saved), (_, read) in zip(net.named_parameters(), loaded.named_parameters()):
        assert torch.equal(saved.float(), read), name
    assert tokenizer.encode_ordinary("hi there") == [3, 4]
    tokenizer.own.clean_up_tokenization_spaces = True  # as many old folders say
    tokenizer.own.add_tokens(["."])
    assert tokenizer.decode([3, 6]) == "hi ."
