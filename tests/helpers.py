"""Shared by several test files: conveniences, a tiny GPT, random batches, and how well samples fit probabilities."""

import io
import json
import math
import re

import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st

from data import Batch
from model import GPT, GPTConfig
from reward import RewardModel
from tokenizer import frequent_pieces, make_tokenizer

VOCAB = 11
E, PAD = VOCAB - 2, VOCAB - 1
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=64)  # of a Llama
# for hypothesis: the same examples on every run; they are small already, and to shrink one that fails takes a minute
few = settings(max_examples=25, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
any_token = st.integers(0, VOCAB - 1)  # E and PAD are among them: what a token is never decides whether it counts
any_row = st.tuples(st.lists(any_token, min_size=1, max_size=5), st.lists(any_token, max_size=5))
any_rows = st.lists(any_row, min_size=1, max_size=4)  # prompts and responses
PROMPTS = [[1, 2, 3], [4], [5, 6], [7, 8, 0, 1, 2], [3, 3]]
PAIRS = [  # preference pairs of mixed lengths; some responses were cut before their E
    dict(prompt=[1, 2, 3], chosen=[4, 5, E], rejected=[6, E]),
    dict(prompt=[4], chosen=[E], rejected=[7, 7, 7, 7]),
    dict(prompt=[5, 6], chosen=[8, 0, 1, 2, E], rejected=[3]),
    dict(prompt=[7, 8, 0, 1], chosen=[2, E], rejected=[2, 2, E]),
    dict(prompt=[3, 3], chosen=[4], rejected=[1, 5, E]),
    dict(prompt=[0], chosen=[6, 1, E], rejected=[E]),
    dict(prompt=[2, 8, 8], chosen=[0, 0], rejected=[1, 1, E]),
]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(seed, *shape):
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


def double(x):
    return torch.tensor(x, dtype=torch.float64)


def close(a, b, tolerance=1e-9):
    """Assert that two numbers or tensors are equal up to rounding."""
    a = torch.as_tensor(a, dtype=torch.float64)
    b = torch.as_tensor(b, dtype=torch.float64)
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def near(numbers, expected, digits=4):
    """Assert that printed numbers are the expected ones, rounded to so many digits. NaN is NaN."""
    for number, value in zip(numbers, expected, strict=True):
        assert abs(number - value) <= 0.5001 * 10 ** -digits or number != number and value != value, (number, value)


def page_data(folder, name="report.html"):
    """The data that page.html draws, taken out of a page."""
    html = (folder / name).read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)[1])


def weights(module):
    return {name: w.detach().clone() for name, w in module.state_dict().items()}


def unchanged(module, before):
    return all(torch.equal(w, before[name]) for name, w in module.state_dict().items())


def finish(loop):
    """Run a training loop to its end: the metrics of all its steps."""
    return [metrics for metrics, *_ in loop]


def through_a_file(checkpoint):
    """A checkpoint as it comes back from a file."""
    file = io.BytesIO()
    torch.save(checkpoint, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def tiny_gpt(seed=0, dtype=torch.float64, vocab=VOCAB, block=24, layers=2, heads=2, embd=8, std=0.3):
    """A GPT of a few hundred weights, which depend on the seed alone. No bias is 0 and no norm 1."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GPT(GPTConfig(vocab, block, layers, heads, embd)).to(torch.float64)
    generator = rng(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += std * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model.to(dtype)


def tiny_reward_model(seed=0, make=RewardModel):
    """A reward model with a bias, a mean and a deviation, so that none of them can be forgotten."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make(tiny_gpt(seed)).to(torch.float64)
    torch.nn.init.constant_(model.score.bias, 0.9)
    model.mean.fill_(0.4)
    model.std.fill_(1.7)
    return model


def save_llama(folder, texts, template):
    """A folder of Hugging Face: a Llama of random weights, with the tokenizer of some texts and a chat template."""
    import transformers

    from pipeline.export import export_tokenizer
    tokenizer = make_tokenizer(frequent_pieces(texts, 40))
    export_tokenizer(tokenizer, folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    theirs.chat_template = template
    theirs.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=tokenizer.n_vocab, **SIZES)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def make_batch(prompts, responses, P=None, R=None, pad=PAD):
    """Build the batch layout by hand from lists of ids. P and R may be larger than the longest prompt and response."""
    P = max(map(len, prompts)) if P is None else P
    R = max(map(len, responses)) if R is None else R
    ids = torch.full((len(prompts), P + R), pad)
    for row, (prompt, response) in enumerate(zip(prompts, responses)):
        for i, token in enumerate(prompt):
            ids[row, P - len(prompt) + i] = token
        for i, token in enumerate(response):
            ids[row, P + i] = token
    return Batch(ids, torch.tensor([len(p) for p in prompts]), torch.tensor([len(r) for r in responses]), P)


def random_texts(seed=0, B=6, vocab=VOCAB, max_prompt=6, max_response=7, min_response=1):
    """
    B prompts and B responses (lists of ids) of mixed lengths, the longest and the shortest in the first two rows. Every
    other response ends in E.
    """
    generator = rng(seed)

    def integer(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    def tokens(n):
        return torch.randint(vocab - 2, (n,), generator=generator).tolist()  # neither E nor PAD

    prompts, responses = [], []
    for row in range(B):
        p = (max_prompt, 1)[row] if row < 2 else integer(1, max_prompt)
        r = (min_response, max_response)[row] if row < 2 else integer(min_response, max_response)
        prompts.append(tokens(p))
        responses.append(tokens(r))
        if row % 2 and r:
            responses[-1][-1] = vocab - 2
    return prompts, responses


def random_batch(seed=0, B=6, vocab=VOCAB, max_prompt=6, max_response=7, min_response=1, R=None):
    """`random_texts` in the batch layout."""
    return make_batch(*random_texts(seed, B, vocab, max_prompt, max_response, min_response), R=R, pad=vocab - 1)


def rows_of(batch):
    """(prompt, response) of each row as lists of ids, taken from the layout by hand."""
    rows = []
    for ids, p, r in zip(batch.ids.tolist(), batch.prompt_lens.tolist(), batch.response_lens.tolist()):
        rows.append((ids[batch.P - p:batch.P], ids[batch.P:batch.P + r]))
    return rows


def is_pad(batch):
    """(B, T), True where there is no token. Computed from the lengths with a loop."""
    pads = torch.ones_like(batch.ids, dtype=torch.bool)
    for row, (p, r) in enumerate(zip(batch.prompt_lens.tolist(), batch.response_lens.tolist())):
        pads[row, batch.P - p:batch.P + r] = False
    return pads


def surprise(counts, probs):
    """
    How badly counts (V,) fit the probabilities (V,): the chi-square statistic in standard deviations above its mean.

    It is below 4 for samples of these probabilities, and infinite when something of probability 0 was drawn.
    """
    counts = torch.as_tensor(counts, dtype=torch.float64)
    probs = torch.as_tensor(probs, dtype=torch.float64)
    if counts[probs == 0].any():
        return math.inf
    expected = counts.sum() * probs[probs > 0]
    statistic = ((counts[probs > 0] - expected) ** 2 / expected).sum()
    free = len(expected) - 1
    return float((statistic - free) / math.sqrt(2 * free))
