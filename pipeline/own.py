"""
Brought by users: a pretrained model, and a reward that is a Python function.

    --init FOLDER                    see pretrained.py
    --reward-from FILE.py:FUNCTION   reward(prompt, response, **row) -> float, row: what else the line of --prompts has
"""

import inspect
import math
import reprlib
import runpy
import sys
import textwrap
from pathlib import Path

import torch

from pipeline.errors import UserError, need
from pipeline.pairs import encode_prompt
from tokenizer import decode


def load_model(config, device):
    """(network, tokenizer) of --init. Whatever is wrong with the folder is one line: UserError."""
    # with LoRA the model's weights are never trained, so nothing is lost if they stay in bfloat16
    dtype = torch.bfloat16 if config.dtype == "bfloat16" and config.lora else torch.float32
    try:
        import transformers

        from pretrained import load_pretrained
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        # the first adapter is random. It follows from the seed alone: a stage may load a model before it draws
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(config.seed)
            network, tokenizer = load_pretrained(config.init, config.lora, dtype, device)
    except ModuleNotFoundError as fault:
        raise UserError(f"--init and --lora need a package that is not there: pip install {fault.name}") from None
    except Exception as fault:  # transformers and safetensors raise many kinds
        reason = textwrap.shorten(str(fault) or type(fault).__name__, 300)
        raise UserError(f"--init {config.init} cannot be loaded: {reason}") from None
    need(not getattr(network.model, "_hf_peft_config_loaded", False), f"--init {config.init} is an adapter: merge it "
         "into its model, by merge_and_unload of peft, and save that")
    need(network.block_size >= config.block_size, f"--block-size {config.block_size} is more than the "
         f"{network.block_size} positions of {config.init}: lower it")
    a, b = torch.tensor([[1, 2, 3], [1, 2, 4]], device=device)
    with torch.no_grad():
        blind = torch.equal(network.hidden(a[None])[:, :2], network.hidden(b[None])[:, :2])
        same = torch.allclose(network(a[None]).float(), network.model(a[None]).logits.float(), rtol=0.01, atol=0.01)
    need(blind, f"--init {config.init} is not a causal language model: a token changes what comes before it")
    # as Granite, Cohere and Gemma 2: log-probs would be of another policy than the model
    need(same, f"--init {config.init} changes its logits after the output matrix, which no loop here does: take "
         "another model")
    need(max(network.end, *encode_prompt(tokenizer, "a")) < network.vocab_size, f"--init {config.init} has tokens that "
         f"its model does not know: its embedding has {network.vocab_size} rows; resize it, by resize_token_embeddings")
    network.block_size = config.block_size
    return network.requires_grad_(False), tokenizer


def load_function(name, alone=False):
    """The function of FILE.py:FUNCTION. alone: no row will be given to it. Raises UserError."""
    path, _, function = name.rpartition(":")
    try:
        sys.path.append(str(Path(path).resolve().parent))  # as Python does for a program: it may import its neighbours
        found = runpy.run_path(path).get(function)
    except (Exception, SystemExit) as fault:
        raise UserError(f"--reward-from {path} cannot be run: {type(fault).__name__}: {fault}") from None
    need(callable(found), f"--reward-from {path} has no function {function!r}")
    try:
        if alone:
            inspect.signature(found).bind("a prompt", "a response")
    except (TypeError, ValueError) as fault:
        raise UserError(f"--reward-from {name} gets a prompt and a response: {fault}") from None
    return found


def function_scorer(name, tokenizer, rows):
    """A reward function as a scorer of batches, (B,). rows: {tuple of prompt ids: what read_prompts has of it}."""
    function = load_function(name)

    def score(prompt, response):
        known = rows.get(tuple(prompt), {})
        extra = {key: value for key, value in known.get("row", {}).items() if key not in ("prompt", "response")}
        place = f"line {known['line']}" if "line" in known else f"the prompt {decode(tokenizer, prompt)!r}"
        try:
            value = function(known.get("prompt", decode(tokenizer, prompt)), decode(tokenizer, response), **extra)
            number = float(value) if hasattr(value, "__float__") else math.nan  # numbers have it, a text has not
        except (Exception, SystemExit) as fault:
            if tuple(prompt) not in rows:  # one that was typed: the function may need the rest of a row
                return math.nan
            raise UserError(f"{name} failed at {place}: {type(fault).__name__}: {fault}") from None
        need(abs(number) <= torch.finfo(torch.float32).max,
             f"{name} returned {reprlib.repr(value)} at {place}: a finite number is needed")
        return number

    def scorer(batch):
        scores = [score(prompt, response) for prompt, response in zip(batch.prompt_ids(), batch.response_ids())]
        return torch.tensor(scores, device=batch.ids.device)
    return scorer
