"""GPT-2 weights and sizes under the names of Hugging Face: what peers.py loads."""

PREFIX = "transformer."


def is_linear(name):
    """Whether a weight belongs to a linear layer. Hugging Face stores these transposed (its Conv1D)."""
    return ".c_" in name and name.endswith(".weight")


def to_gpt2(model):
    """The weights of a GPT as a state dict for Hugging Face's GPT2LMHeadModel, on the CPU and in their own memory."""
    state = {PREFIX + name: weight.t() if is_linear(name) else weight for name, weight in model.state_dict().items()}
    state["lm_head.weight"] = model.wte.weight  # the output matrix is the token embedding
    return {name: weight.detach().cpu().clone().contiguous() for name, weight in state.items()}


def gpt2_sizes(config):
    """The sizes of a GPT under the names of Hugging Face's GPT2Config."""
    return dict(vocab_size=config.vocab_size, n_positions=config.block_size, n_embd=config.n_embd,
                n_layer=config.n_layer, n_head=config.n_head)
