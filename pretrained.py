"""
Any causal language model of Hugging Face in place of the GPT: GPT-2, Llama, SmolLM2, Qwen2.5, Qwen3 and others.

    network, tokenizer = load_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")    a name, or a folder

The loops ask a network for `hidden`, `head`, `caches`, its width, its block size and the ids of E and PAD. `Pretrained`
answers with the model's own parts. So nothing in a lesson changes. Needs `pip install transformers`.

E is the token that ends a turn of a chat model, or a text of a base model. A model need not have a PAD: the lessons
find padding by lengths, so any other id will do.

Left out: dropout, as in the GPT. A model is loaded in evaluation mode, and no loop changes that.

Letters: B batch, T columns read now, L columns read so far, V vocabulary, C width.
"""

import torch
import torch.nn as nn


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
    """Pretrained(model, end)(ids, start) -> logits (B, T, V). model: an AutoModelForCausalLM; end: the id of E."""

    def __init__(self, model, end):
        super().__init__()
        self.model = model
        self.config = model.config
        self.width = model.config.hidden_size
        self.block_size = model.config.max_position_embeddings
        self.vocab_size = model.get_input_embeddings().weight.shape[0]
        self.end = end
        self.pad = 0 if end != 0 else 1  # any token but E: it is never asked for

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
        cache = caches[0].cache if caches else None
        output = self.model.base_model(input_ids=ids, attention_mask=mask, position_ids=positions,
                                       past_key_values=cache, use_cache=cache is not None)
        return output.last_hidden_state


def load_pretrained(name, dtype=torch.float32):
    """
    Load a model and its tokenizer from a folder, or by name where there is a network: (Pretrained, tokenizer).

    Only safetensors are read, and no code of a model is run. Raises ImportError without transformers, its OSError or
    ValueError for a folder that holds no causal language model, and ValueError for a tokenizer without an E.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {name} has no end of text (eos_token): a response could not end")
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, use_safetensors=True, trust_remote_code=False)
    return Pretrained(model, tokenizer.eos_token_id).eval(), tokenizer


def encode_chat(tokenizer, text):
    """The token ids of a user's message, as the model's chat template writes it; the plain text for a base model."""
    if tokenizer.chat_template is None:
        return tokenizer.encode(text, add_special_tokens=False)
    messages = [{"role": "user", "content": text}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)
