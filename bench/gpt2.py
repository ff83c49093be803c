"""
GPT-2 weights under the names of Hugging Face. `to_gpt2` turns a GPT into a state dict, `from_gpt2` does the reverse.

Letters: V vocabulary, C embedding.
"""

from model import GPT, GPTConfig

PREFIX = "transformer."


def is_linear(name):
    """Tell whether a weight belongs to a linear layer. Hugging Face stores these transposed (its Conv1D)."""
    return ".c_" in name and name.endswith(".weight")


def to_gpt2(model):
    """Return the weights of a GPT as a state dict for Hugging Face's GPT2LMHeadModel. They share the GPT's memory."""
    state = {}
    for name, weight in model.state_dict().items():
        if is_linear(name):
            weight = weight.t()
        state[PREFIX + name] = weight
    state["lm_head.weight"] = model.wte.weight.detach()  # the output matrix is the token embedding
    return state


def from_gpt2(state, n_head):
    """
    Make a GPT with the weights of a GPT-2 state dict. The names may lack the prefix "transformer.".

    The other sizes are read off the shapes of the weights, but the number of heads shows in no shape.
    """
    weights = {name.removeprefix(PREFIX): weight for name, weight in state.items()}
    V, C = weights["wte.weight"].shape
    block_size = len(weights["wpe.weight"])
    layers = {int(name.split(".")[1]) for name in weights if name.startswith("h.")}
    model = GPT(GPTConfig(V, block_size, len(layers), n_head, C))
    ours = {}
    for name in model.state_dict():  # a state dict may hold more, such as the causal mask of old files
        ours[name] = weights[name].t() if is_linear(name) else weights[name]
    model.load_state_dict(ours)
    return model


def peer_weights(model):
    """Return the weights of a GPT as peers.py loads them: `to_gpt2`, on the CPU and in memory of their own."""
    return {name: weight.detach().cpu().clone().contiguous() for name, weight in to_gpt2(model).items()}


def peer_sizes(config):
    """Return the sizes of a GPT under the names of Hugging Face's GPT2Config."""
    return dict(vocab_size=config.vocab_size, n_positions=config.block_size, n_embd=config.n_embd,
                n_layer=config.n_layer, n_head=config.n_head)
