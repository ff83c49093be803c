"""
Tests of pipeline/export.py: transformers loads the folders, and its numbers are ours.
"""

import pytest
import torch
from helpers import SIZES, close, make_batch, random_texts

from model import GPT, GPTConfig, response_logprobs
from reward import RewardModel
from tokenizer import PAD, decode, end_id, frequent_pieces, make_tokenizer

transformers = pytest.importorskip("transformers")
from pipeline.export import export_policy, export_reward_model, export_tokenizer  # noqa: E402
from pretrained import Pretrained  # noqa: E402

VOCAB, E = 40, 7
TEXTS = ["the film was not good .", " superb !!", "größe", "今日は良い天気です", "\n\n  x\t y", "don't 3.1 e\u0301"]


def pretrained(kind, rank):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, vocab_size=VOCAB, **SIZES)
    return Pretrained(transformers.AutoModelForCausalLM.from_config(config), E, rank).eval()


@pytest.mark.parametrize("kind, rank", [("gpt", 0), ("phi", 0), ("llama", 2), ("gpt2", 2)])
def test_a_policy_and_a_reward_model(kind, rank, tmp_path):
    """Bug: a matrix is transposed; LoRA, E, a bias or the scores' scale is lost; LoRA is rounded to bfloat16."""
    network = GPT(GPTConfig(VOCAB, 32, 2, 2, 16)) if kind == "gpt" else pretrained(kind, rank)
    for parameter in network.model.parameters() if rank else []:
        parameter.data = parameter.data.bfloat16()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    reward_model = RewardModel(network)
    with torch.no_grad():
        for parameter in reward_model.parameters():  # another LoRA than the policy's, on the same weights
            parameter += 0.3 * torch.randn_like(parameter)
        reward_model.score.bias.fill_(0.7)
        reward_model.mean.fill_(-0.4)
        reward_model.std.fill_(1.7)
    export_policy(network, tmp_path / "policy")
    constant = export_reward_model(reward_model, tmp_path / "reward")
    if rank:
        network.model.float()
    policy = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    scorer = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    assert kind != "gpt" or policy.generation_config.eos_token_id == network.end  # where `generate` stops
    assert scorer.config.num_labels == 1 and (constant == 0) == kind.startswith("gpt")
    prompts, responses = random_texts(B=6, vocab=VOCAB)
    batch = make_batch(prompts, responses, pad=network.pad)
    logp, scores = response_logprobs(network, batch).detach(), reward_model(batch).detach()
    for row, (prompt, response) in enumerate(zip(prompts, responses)):
        ids = torch.tensor([prompt + response])
        own = policy(ids).logits[0, len(prompt) - 1:-1].log_softmax(dim=-1)
        close(logp[row, :len(response)], own[range(len(response)), response].detach(), 1e-5)
        if network.pad not in prompt + response:
            close(scores[row], scorer(ids).logits[0, 0].detach() + constant, 1e-5)


def test_our_tokenizer(tmp_path):
    """Bug: another id for any text, as by merges in another order or a pattern that is read in another way."""
    ours = make_tokenizer(frequent_pieces(TEXTS * 3 + ["the film was bad . the film is long ."], 60))
    export_tokenizer(ours, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in (*TEXTS, "filmwas thefilm strasse " + "".join(TEXTS), "".join(map(chr, range(32, 1500)))):
        ids = ours.encode_ordinary(text)
        assert theirs.encode(text) == ids and theirs.decode(ids) == decode(ours, ids) == text
    assert (theirs.eos_token_id, theirs.pad_token_id) == (end_id(ours), ours.encode_single_token(PAD))
    assert (len(theirs), theirs.decode([end_id(ours)]), theirs.padding_side) == (ours.n_vocab, "<|end|>", "left")
