"""
A causal language model of Hugging Face in place of the GPT: GPT-2, Llama, SmolLM2, Qwen2.5, Qwen3 and others.

The loops ask a network for `hidden`, `head`, `caches`, its width, its block size and the ids of E and PAD. `Pretrained`
answers with the model's own parts, so nothing in a lesson changes. Needs `pip install transformers`, and for LoRA peft.

E is the token that ends a turn of a chat model, or a text of a base model. PAD may be any other id.

LoRA (Hu et al. 2021, arXiv:2106.09685): the weights W are frozen, and W + 2 B A is used, with B A of a low rank. Only A
and B, the adapter, are trained. A copy of such a network shares W and has another adapter, so a run's networks take the
memory of one model.

Letters: B batch, T columns read now, L columns read so far, V vocabulary, C width.
"""

import inspect

import torch
import torch.nn as nn
from torch.func import functional_call


class Cache:
    """The keys and values of all layers. `hidden` takes it in a list, like the KVCaches of the GPT."""

    def __init__(self, cache):
        self.cache = cache

    @property
    def used(self):
        return self.cache.get_seq_length()

    def keep(self, rows):
        self.cache.batch_select_indices(rows)


class Pretrained(nn.Module):
    """
    Pretrained(model, end)(ids, start) -> logits (B, T, V). model: an AutoModelForCausalLM; end: the id of E.

    With a rank above 0, the parameters of the network are its adapter, and the model is shared.
    """

    def __init__(self, model, end, rank=0):
        super().__init__()
        self.adapter = nn.ParameterDict()
        if rank > 0:
            from peft import LoraConfig, inject_adapter_in_model
            inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"), model)
            for name, parameter in model.base_model.named_parameters():
                if "lora_" in name:
                    self.adapter[name.replace(".", "/")] = nn.Parameter(parameter.detach().clone().float())
            model.requires_grad_(False).eval()
            model.__deepcopy__ = lambda memo: model  # a copy of this network shares the model
            self.__dict__["model"] = model           # without registering it: it is no part of state_dict()
        else:
            self.model = model
        self.config = self.model.config
        takes = inspect.signature(self.model.base_model.forward).parameters
        self.cache_name = "cache" if "cache" in takes else "past_key_values"  # its older name
        self.width = self.config.hidden_size
        self.block_size = self.config.max_position_embeddings
        self.vocab_size = self.model.get_input_embeddings().weight.shape[0]
        self.end = end
        self.pad = end - 1 if end > 0 else 1  # any token but E; before E most vocabularies have a rare one
        self.micro_batch = 0

    @property
    def device(self):
        return self.model.device

    @property
    def dtype(self):
        return self.model.dtype

    def forward(self, ids, start=None):
        return self.head(self.hidden(ids, start))

    def head(self, x):
        """Turn hidden states (..., C) into logits (..., V)."""
        return self.model.get_output_embeddings()(x)

    def caches(self, B, columns):
        """An empty cache for `hidden`. It grows by itself, so B and columns are not needed."""
        from transformers import DynamicCache
        return [Cache(DynamicCache(config=self.config))]

    def hidden(self, ids, start=None, caches=None):
        """The last hidden states (B, T, C) of ids (B, T), as GPT.hidden. Positions count from the first real token."""
        B, T = ids.shape
        past = caches[0].used if caches else 0
        if start is None:
            start = torch.zeros(B, dtype=torch.long, device=ids.device)
        if past + T > self.block_size and past + T - int(start.min()) > self.block_size:
            raise ValueError(f"a row of more than {self.block_size} columns does not fit the block")
        columns = torch.arange(past + T, device=ids.device)                                   # (L,)
        mask = (columns >= start[:, None]).long()                                             # (B, L)
        positions = (columns[past:] - start[:, None]).clamp(min=0)                            # (B, T)
        inputs = dict(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=bool(caches))
        inputs[self.cache_name] = caches[0].cache if caches else None
        # the model runs with this network's adapter in the place of the one it was made with
        adapter = {name.replace("/", "."): parameter for name, parameter in self.adapter.items()}
        return functional_call(self.model.base_model, adapter, kwargs=inputs).last_hidden_state


class Tokenizer:
    """A tokenizer of Hugging Face, with the names that ours has (tokenizer.py)."""

    def __init__(self, tokenizer, network):
        self.own = tokenizer
        self.n_vocab = network.vocab_size
        self.special = {"<|end|>": network.end, "<|pad|>": network.pad}

    def encode_single_token(self, text):
        return self.special[text]

    def encode_ordinary(self, text):
        return self.own.encode(text, add_special_tokens=False)

    def encode_chat(self, messages):
        """The ids of messages, as the chat template writes them. A base model has none."""
        return self.encode_ordinary(self.own.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def decode(self, ids):
        return self.own.decode(ids, clean_up_tokenization_spaces=False)  # else "good ." would become "good."

    def decode_single_token_bytes(self, token):
        return self.own.decode([token]).encode()


def load_pretrained(name, rank=0, dtype=torch.float32, device="cpu"):
    """
    Load a model from a folder, or by name where there is a network: (Pretrained, Tokenizer). rank: of LoRA, 0 for none.

    dtype: of weights that are not trained. With bfloat16, train under torch.autocast, as minirlhf.py does.
    Only safetensors are read, and no code of a model is run. Raises ImportError without transformers or peft, and
    OSError or ValueError for a folder without all weights of a causal language model or a tokenizer with an E.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {name} has no end of text (eos_token): a response could not end")
    model, info = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, use_safetensors=True, trust_remote_code=False,
                                                       output_loading_info=True, ignore_mismatched_sizes=True)
    unfit = [*info["missing_keys"], *[weight for weight, *_ in info["mismatched_keys"]]]  # transformers made them up
    if unfit:
        raise ValueError(f"weights of the model are missing in {name}, or have another size: {', '.join(unfit[:2])}")
    network = Pretrained(model.to(device), tokenizer.eos_token_id, rank).eval()  # without dropout, as the GPT
    return network, Tokenizer(tokenizer, network)
