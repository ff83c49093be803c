"""
Networks as folders of Hugging Face, which other libraries load: AutoModelForCausalLM for a policy,
AutoModelForSequenceClassification for a reward model. Our GPT becomes a GPT-2, a pretrained model what it was.

Letters: C embedding, V vocabulary.
"""

import copy
import json
from pathlib import Path

import torch

from pipeline.errors import UserError, need
from pipeline.files import write_file
from tokenizer import END, PAD, PIECES, decode

GPT2_LINEAR = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # GPT-2 keeps these transposed


def gpt2_config(network):
    from transformers import GPT2Config
    config = network.config
    return GPT2Config(vocab_size=config.vocab_size, n_positions=config.block_size, n_embd=config.n_embd,
                      n_layer=config.n_layer, n_head=config.n_head, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
                      bos_token_id=network.end, eos_token_id=network.end)


def plain_weights(network):
    """The weights of a network without its head, by the names of transformers. LoRA is merged: W + 2 B A."""
    if not hasattr(network, "adapter"):
        return {name: weight.T if name.endswith(GPT2_LINEAR) else weight for name, weight in
                network.state_dict().items()}
    base = network.model.base_model
    weights = base.state_dict()
    for name, module in base.named_modules():
        if hasattr(module, "get_delta_weight"):
            B, A = [network.adapter[f"{name}.lora_{side}.default.weight".replace(".", "/")] for side in "BA"]
            delta = 2 * (B @ A).T if module.fan_in_fan_out else 2 * B @ A  # GPT-2 keeps its matrices transposed
            # in float32, whatever W is: a small change would be rounded away in a weight of bfloat16
            weights[f"{name}.base_layer.weight"] = module.base_layer.weight.float() + delta
    return {name.replace(".base_layer", ""): weight for name, weight in weights.items() if "lora_" not in name}


@torch.no_grad()
def export_policy(network, folder):
    """Save a policy so that AutoModelForCausalLM loads it, with the same logits."""
    from transformers import AutoModelForCausalLM
    config = copy.deepcopy(network.config) if hasattr(network, "adapter") else gpt2_config(network)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.base_model.load_state_dict(plain_weights(network))
    own = network.model.get_output_embeddings() if hasattr(network, "adapter") else network.wte  # Phi's has a bias too
    model.get_output_embeddings().load_state_dict(own.state_dict())
    model.save_pretrained(folder)


@torch.no_grad()
def export_reward_model(reward_model, folder):
    """
    Save a reward model so that AutoModelForSequenceClassification loads it. Returns a constant (a number).

    The folder's scores and this constant add up to ours. A score layer there has no bias. Where the last norm has one,
    as in GPT-2, the constant is part of that bias and 0 is returned.
    """
    from transformers import AutoModelForSequenceClassification
    trunk = reward_model.trunk
    config = copy.deepcopy(trunk.config) if hasattr(trunk, "adapter") else gpt2_config(trunk)
    config.num_labels, config.pad_token_id = 1, trunk.pad  # the score is read at the last token that is not PAD
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    weights = plain_weights(trunk)
    score = reward_model.score.weight / reward_model.std                                      # (1, C)
    constant = (reward_model.score.bias - reward_model.mean) / reward_model.std               # (1,)
    if "ln_f.bias" in weights:  # moved by d along the score layer, all scores rise by d times its squared length
        weights["ln_f.bias"] = weights["ln_f.bias"] + constant * score[0] / score[0].pow(2).sum()
        constant = torch.zeros(1)
    model.base_model.load_state_dict(weights)
    model.score.weight.copy_(score)
    model.save_pretrained(folder)
    return constant.item()


def export_tokenizer(tokenizer, folder):
    """Save a tokenizer so that AutoTokenizer loads it: a pretrained model's own, or ours with the same ids."""
    if hasattr(tokenizer, "own"):
        tokenizer.own.save_pretrained(folder)
        return
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    letters = bytes_to_unicode()  # a byte as the letter that byte-level vocabularies write for it
    ranks = {token: rank for rank in range(tokenizer.n_vocab - 2)
             for token in [tokenizer.decode_single_token_bytes(rank)]}
    spelt = {token: "".join(letters[byte] for byte in token) for token in ranks}
    # tiktoken joins the two neighbours whose union has the lowest rank: every way to cut a token in two is a merge
    merges = [(spelt[token[:at]], spelt[token[at:]]) for token in ranks for at in range(1, len(token))
              if token[:at] in ranks and token[at:] in ranks]
    own = Tokenizer(models.BPE({spelt[token]: rank for token, rank in ranks.items()}, merges, ignore_merges=True))
    own.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    own.decoder = decoders.ByteLevel()
    own.add_special_tokens([AddedToken(END, special=True), AddedToken(PAD, special=True)])
    PreTrainedTokenizerFast(tokenizer_object=own, eos_token=END, pad_token=PAD, padding_side="left",
                            clean_up_tokenization_spaces=False).save_pretrained(folder)


def export(run, folder):
    """Save the policies and the reward model of a finished run with its tokenizer, and prompts and pairs as TRL has."""
    folder = Path(folder)
    need(not folder.exists(), f"{folder} is there already: name another folder")
    need(run.has(["report.json"]), f"{run.folder} is not finished: give its command again, and then export")
    try:
        import transformers
    except ModuleNotFoundError:
        raise UserError("--export needs a package that is not there: pip install transformers") from None
    transformers.utils.logging.disable_progress_bar()
    for name in ("sft", *run.config.policies.split(",")):
        export_policy(run.load_network(name), folder / name)
        export_tokenizer(run.tokenizer, folder / name)
        print(f"{folder / name}: a policy")
    if run.has(["reward.pt"]):
        constant = export_reward_model(run.load_network("reward"), folder / "reward")
        export_tokenizer(run.tokenizer, folder / "reward")
        print(f"{folder / 'reward'}: the reward model" + (f"; add {constant:.4f} to its scores" if constant else ""))

    def text(ids):
        return decode(run.tokenizer, ids)

    # a row of --prompts keeps what else it has: a function may need it
    prompts = [dict(row.get("row", {}), prompt=text(ids)) for row, ids in zip(run.texts["train"], run.prompts[0])]
    write_file(folder / "prompts.jsonl", "".join(json.dumps(row) + "\n" for row in prompts))
    if run.has(["preferences.jsonl"]):
        pairs = [{key: text(pair[key]) for key in ("prompt", "chosen", "rejected")} for pair in run.pairs[0]]
        write_file(folder / "pairs.jsonl", "".join(json.dumps(row) + "\n" for row in pairs))
    print(f"{folder}: prompts and pairs for other libraries; examples/trl_continue.py trains on them")
