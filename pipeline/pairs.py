"""
Preference files: other people's pairs of responses, read, split, and made to fit. docs/data.md has all forms of a line.

Messages become a transcript, as ROLES has it. For a pretrained chat model a transcript becomes messages again, and then
what the model's template makes of them.
"""

import gzip
import json
import re
import unicodedata
import zlib
from pathlib import Path

from pipeline.errors import UserError
from tokenizer import end_id

KEYS = ("prompt", "chosen", "rejected")
ASSISTANT = "\n\nAssistant:"
ROLES = {"system": "\n\nSystem: ", "user": "\n\nHuman: ", "assistant": ASSISTANT + " "}
PAIR_FORM = '{"prompt": ..., "chosen": ..., "rejected": ...}'


# ---- reading --------------------------------------------------------------------------------------

def read_pairs(path, prompt_key="prompt"):
    """Read pairs: dicts of texts, "prompt", "chosen", "rejected". UserError names the file, the line and the fault."""
    return read_rows(path, lambda line, number: parse_pair(line, prompt_key))


def read_prompts(path, prompt_key="prompt"):
    """Read prompts: a list of dicts of "prompt" (a text), "line" (its number in the file) and "row" (all it has)."""
    return read_rows(path, lambda line, number: dict(parse_prompt(line, prompt_key), line=number))


def read_rows(path, parse):
    """The lines of a file of JSON lines, gzipped or not, each as parse(text, number of the line) makes it."""
    rows = []
    if not Path(path).is_file():
        there = "is a folder, a pipe or a device" if Path(path).exists() else "is not there"
        raise UserError(f"{path} {there}: name a file of JSON lines, see docs/data.md")
    try:
        with open(path, "rb") as raw:
            file = gzip.open(raw) if raw.peek(2).startswith(b"\x1f\x8b") else raw
            for number, line in enumerate(file, start=1):
                place = f"{path}, line {number}"
                if line.strip():
                    rows.append(parse(line.decode("utf-8-sig"), number))  # -sig: without a byte order mark
    except UnicodeDecodeError:
        raise UserError(f"{place}: not UTF-8 text; docs/data.md tells how to convert a file") from None
    except ValueError as fault:
        raise UserError(f"{place}: {fault}") from None
    except (OSError, EOFError, zlib.error, RecursionError) as fault:  # the last one of brackets in brackets
        raise UserError(f"{path}: cannot be read ({getattr(fault, 'strerror', None) or fault})") from None
    if not rows:
        raise UserError(f"{path}: no lines in it; each line should be {PAIR_FORM}")
    return rows


# ---- one line -------------------------------------------------------------------------------------

def parse_prompt(line, prompt_key):
    """One line of a file of prompts -> a dict of "prompt", a text, and "row". ValueError says what is wrong with it."""
    row = with_prompt(parse_row(line), prompt_key)
    if "prompt" not in row:
        raise ValueError(f'the key "prompt" is missing, found {", ".join(row)}: name the key of the prompt with '
                         "--prompt-key")
    if isinstance(row["prompt"], str):
        text = row["prompt"]
    else:
        messages = to_messages("prompt", row["prompt"], "user")
        if messages and messages[-1][0] == "assistant":  # else the answer would be part of the question
            raise ValueError("the prompt ends with a message of the assistant: leave the answer out")
        text = "".join(ROLES[role] + content for role, content in messages) + ASSISTANT
    text = text.replace("\r\n", "\n")
    check_text(text, text)
    return dict(prompt=text, row=row)


def with_prompt(row, prompt_key):
    """The row with its prompt under "prompt"."""
    if prompt_key not in ("prompt", *row):
        raise ValueError(f"the key {prompt_key!r} of --prompt-key is missing, found {', '.join(row)}")
    if isinstance(row.get("instruction"), str) and (prompt_key == "instruction" or prompt_key not in row):
        return dict(row, prompt="\n\n".join(filter(None, [row["instruction"], str(row.get("input") or "")])))
    if prompt_key not in row:
        return row
    return {"prompt": row[prompt_key], **{key: row[key] for key in row if key not in ("prompt", prompt_key)}}


def with_answers(row):
    """The row of a pair, for UltraFeedback with the best and the worst of its answers."""
    answers = row.get("completions")
    if "chosen" in row or not isinstance(answers, list):
        return row
    try:
        ranked = sorted(answers, key=lambda answer: float(answer["overall_score"]))
        tie = not ranked or float(ranked[-1]["overall_score"]) == float(ranked[0]["overall_score"])
        best, worst = ("", "") if tie else (ranked[-1]["response"], ranked[0]["response"])  # equal ones are dropped
    except (KeyError, TypeError, ValueError):
        raise ValueError('each of "completions" should have a "response" and an "overall_score"') from None
    return dict(row, chosen=best, rejected=worst)


def parse_pair(line, prompt_key="prompt"):
    """One line of a preference file -> a dict of three texts. ValueError says what is wrong with it."""
    found = parse_row(line)
    row, names = with_answers(with_prompt(found, prompt_key)), ", ".join(found) or "nothing"
    for key in ("chosen", "rejected"):
        if key not in row:
            raise ValueError(f'the key "{key}" is missing, each line should be {PAIR_FORM}, found {names}; '
                             "docs/data.md tells how to convert a file")
    if any(isinstance(row.get(key), list) for key in KEYS):
        prompt, chosen, rejected = split_messages(row)
    else:
        for key in KEYS:
            if key in row and not isinstance(row[key], str):
                raise ValueError(f'"{key}" should be a text, found {type(row[key]).__name__}, see docs/data.md')
        prompt, chosen, rejected = [row.get(key, "").replace("\r\n", "\n") for key in KEYS]
        if "prompt" in row:
            chosen, rejected = cut_repeats(prompt, chosen, rejected)
        else:
            prompt, chosen, rejected = split_transcripts(chosen, rejected)
    if prompt in ("", ASSISTANT) and row.get("prompt") != "":
        raise ValueError(f"the two share no prompt that ends with '\\n\\nAssistant:', found {names}: if one of these "
                         "is the prompt, name it with --prompt-key")
    check_text(prompt, prompt + chosen + rejected)
    if not prompt[-1].isspace():  # a word's token includes the space before it
        chosen = chosen if chosen[:1].isspace() else " " + chosen
        rejected = rejected if rejected[:1].isspace() else " " + rejected
    return dict(prompt=prompt, chosen=chosen, rejected=rejected)


def check_text(prompt, text):
    """Raise ValueError for an empty prompt, and for a text that cannot be written."""
    if not prompt.strip().removesuffix(ASSISTANT.strip()):
        raise ValueError("the prompt is empty: write one, as \"Review:\"")
    if re.search("[\ud800-\udfff]", text):
        raise ValueError("it holds half a character, such as \\ud83d: write it whole or remove it")


def parse_row(line):
    """The dict that a line holds. ValueError for what is not JSON or not a dict."""
    try:
        row = json.loads(line, parse_constant=lambda name: None)  # Python writes NaN, which is no JSON, for "unknown"
    except json.JSONDecodeError as fault:
        raise ValueError(f"not JSON ({fault.msg} at column {fault.colno}): write each pair on its own line, as "
                         f"{PAIR_FORM}; docs/data.md tells how to convert a file") from None
    if not isinstance(row, dict):
        raise ValueError(f"expected {PAIR_FORM}, found {type(row).__name__}; docs/data.md tells how to convert a file")
    return row


def cut_repeats(prompt, chosen, rejected):
    """Cut off a prompt that both responses repeat at their start: (chosen, rejected)."""
    start = prompt.strip()
    rests = [response.lstrip().removeprefix(start) for response in (chosen, rejected)]
    repeated = all(response.lstrip().startswith(start) for response in (chosen, rejected))
    whole = not any(start[-1:].isalnum() and rest[:1].isalnum() for rest in rests)  # unlike "go" in "gone" and "good"
    return rests if repeated and whole else (chosen, rejected)


def split_transcripts(chosen, rejected):
    """Two HH-RLHF transcripts -> (prompt, chosen, rejected): the prompt ends with the last ASSISTANT they share."""
    cut, at = 0, chosen.find(ASSISTANT)
    while at >= 0 and rejected.startswith(chosen[cut:at + len(ASSISTANT)], cut):
        cut = at + len(ASSISTANT)
        at = chosen.find(ASSISTANT, cut)
    return chosen[:cut], chosen[cut:], rejected[cut:]


def split_messages(row):
    """A row with lists of messages -> (prompt, chosen, rejected) as texts. docs/data.md has the forms of a list."""
    prompt = to_messages("prompt", row["prompt"], "user") if "prompt" in row else []
    transcripts = []
    for key in ("chosen", "rejected"):
        messages = to_messages(key, row[key], "assistant")
        # a list that begins with the prompt or, if that is a text, with another role's message is a conversation
        whole = isinstance(row.get("prompt"), str) and messages[:1] and messages[0][0] != "assistant"
        if not whole and messages[:len(prompt)] != prompt:
            messages = prompt + messages
        transcripts.append("".join(ROLES[role] + content for role, content in messages).replace("\r\n", "\n"))
    return split_transcripts(*transcripts)


def to_messages(key, value, role):
    """A list of (role, content) from a list of messages, or from a text of the given role."""
    if isinstance(value, str):
        return [(role, value)]
    messages = []
    for message in value if isinstance(value, list) else [None]:
        pair = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if not all(isinstance(text, str) for text in pair) or pair[0] not in ROLES:
            raise ValueError(f'"{key}" should be a text or a list of {{"role": "user", "content": a text}}, with the '
                             f"roles {', '.join(ROLES)}")
        messages.append(pair)
    return messages


# ---- all pairs ------------------------------------------------------------------------------------

def plain(text):
    """A text in one spelling (NFC), without white space around it."""
    return unicodedata.normalize("NFC", text).strip()


def split_pairs(pairs, share, rng):
    """Split pairs into (training, held-out) lists, in random order: by prompt or, if there are few prompts, by pair."""
    keys = [plain(pair["prompt"]) for pair in pairs]
    if len(set(keys)) < 10:
        keys = [(key, *sorted([plain(pair["chosen"]), plain(pair["rejected"])])) for key, pair in zip(keys, pairs)]
    different = sorted(set(keys))
    heldout_keys = set(rng.sample(different, max(1, round(share * len(different)))))
    train = [pair for pair, key in zip(pairs, keys) if key not in heldout_keys]
    heldout = [pair for pair, key in zip(pairs, keys) if key in heldout_keys]
    rng.shuffle(train)
    rng.shuffle(heldout)
    return train, heldout


def can_chat(tokenizer):
    """Whether the texts of a conversation must look as a pretrained model's template writes them."""
    return hasattr(tokenizer, "own") and tokenizer.own.chat_template is not None


def encode_prompt(tokenizer, text):
    """The ids of a prompt. For a chat model a transcript becomes its messages, another text a message of the user."""
    if not can_chat(tokenizer):
        own = getattr(tokenizer, "own", None)  # a base model's tokenizer: for Llama it puts a BOS before the text
        return own.encode(text) if own else tokenizer.encode_ordinary(text)
    special = [token.content for token in tokenizer.own.added_tokens_decoder.values() if token.special]
    if text.lstrip().startswith(tuple(special)):  # it is as the template writes it already
        return tokenizer.own.encode(text, add_special_tokens=False)
    names = {sign.strip(): role for role, sign in ROLES.items()}                        # {"Human:": "user", ...}
    text = re.sub(r"^\s*(?=Human:.*\n\nAssistant:)", r"\n\n", text, flags=re.S)  # as HH-RLHF, but stripped
    text = text if re.match(r"\n\n(System|Human|Assistant):", text) else ROLES["user"] + text
    _, *parts = re.split(r"\n\n(System:|Human:|Assistant:) ?", text)
    messages = [dict(role=names[name], content=content.strip()) for name, content in zip(parts[::2], parts[1::2])]
    if messages[-1:] and messages[-1]["role"] == "assistant":  # the place of the response: the template opens it
        messages.pop()
    try:
        return tokenizer.encode_chat(messages)
    except Exception as fault:  # of jinja2: some templates have no system message, or want turns that alternate
        raise UserError(f"the chat template of the model refuses {text.strip()[:60]!r}: {fault}") from None


def encode_response(tokenizer, text):
    """The ids of a response, without E. A chat template ends before the response, so it begins with no space."""
    ids = tokenizer.encode_ordinary(text.lstrip() if can_chat(tokenizer) else text)
    end = end_id(tokenizer)
    return ids[:ids.index(end)] if end in ids else ids  # a pretrained model's tokenizer reads the name of E as E


def fit_pair(pair, tokenizer, prompt_tokens, response_tokens):
    """A pair of texts as token ids that fit, as docs/data.md has it. None for a pair that teaches nothing."""
    prompt = encode_prompt(tokenizer, pair["prompt"])
    chosen, rejected = [(encode_response(tokenizer, pair[side]) + [end_id(tokenizer)])[:response_tokens]
                        for side in ("chosen", "rejected")]
    if chosen == rejected or pair["chosen"].split() == pair["rejected"].split():
        return None
    return dict(prompt=prompt[-prompt_tokens:], chosen=chosen, rejected=rejected)


def describe(texts, fitted, tokenizer, prompt_tokens):
    """What became of all pairs, in words. texts, fitted: {"train" or "heldout": pairs}, before and after `fit_pair`."""
    pairs, kept = texts["train"] + texts["heldout"], fitted["train"] + fitted["heldout"]
    prompts_cut = sum(len(encode_prompt(tokenizer, pair["prompt"])) > prompt_tokens for pair in pairs)
    responses_cut = sum(pair[side][-1] != end_id(tokenizer) for pair in kept for side in ("chosen", "rejected"))
    known = {plain(pair[side]) for pair in texts["train"] for side in ("chosen", "rejected")}
    tested = [plain(pair[side]) in known for pair in texts["heldout"] for side in ("chosen", "rejected")]
    seen = sum(tested) / len(tested)  # an answer that was trained on tests nothing
    return (f"{len(fitted['train']):,} pairs to train on, {len(fitted['heldout']):,} held out; {prompts_cut:,} prompts "
            f"cut on the left, {responses_cut:,} responses cut on the right, {len(pairs) - len(kept):,} pairs dropped "
            "because their two responses are the same"
            + (f"; {seen:.0%} of the held-out responses are trained on, in other pairs" if seen else ""))
