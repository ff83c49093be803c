"""
Preference files: other people's pairs of responses, read as texts and split. tokens.py makes token ids of them.

Each line of a .jsonl file, gzipped or not, is a pair in one of these forms:

    {"prompt": text, "chosen": text, "rejected": text}
    {"chosen": text, "rejected": text}                                       two whole HH-RLHF transcripts
    {"prompt": messages or text, "chosen": messages, "rejected": messages}   without "prompt": two whole conversations

Messages, [{"role": ..., "content": ...}, ...], become a transcript:
"\\n\\nHuman: ...\\n\\nAssistant: ...", and "\\n\\nSystem: ..." for the role system.
"""

import gzip
import json
import os
import shlex
import stat
import zlib

from tqdm import tqdm

from data import UserError
from pipeline.tokens import KEYS, same

ASSISTANT = "\n\nAssistant:"
ROLES = {"system": "\n\nSystem: ", "user": "\n\nHuman: ", "assistant": ASSISTANT + " "}
PAIR_FORM = '{"prompt": ..., "chosen": ..., "rejected": ...}'
PYTHON = 'python -c "import csv, json, sys; [print(json.dumps(row)) for row in {rows}]" {path} > converted.jsonl'
ROWS = "csv.DictReader(open(sys.argv[1], encoding='utf-8-sig', newline=''){tabs})"
PANDAS = ('python -c "import pandas, sys; pandas.read_{kind}(sys.argv[1])'
          ".to_json('converted.jsonl', orient='records', lines=True)\" {path}")
UNPACK = ('python -c "import {module}, shutil, sys; shutil.copyfileobj({module}.open(sys.argv[1]), sys.stdout.buffer)"'
          " {path} > converted.jsonl")
FORMATS = {  # the first bytes of a file of another kind -> what it is, and the command that converts it
    b"PAR1": ("Parquet", PANDAS.replace("{kind}", "parquet")),
    b"PK\x03\x04": ("Excel or zip", PANDAS.replace("{kind}", "excel")),
    b"BZh": ("bzip2", UNPACK.replace("{module}", "bz2")),
    b"\xfd7zXZ": ("xz", UNPACK.replace("{module}", "lzma")),
    b"\x28\xb5\x2f\xfd": ("Zstandard", "zstd -dc {path} > converted.jsonl"),
    b"ARROW1": ("Arrow", PANDAS.replace("{kind}", "feather")),
    b"version https://git-lfs": ("a Git LFS pointer", "git lfs pull"),
    b"\xff\xfe": ("UTF-16", "iconv -f UTF-16 -t UTF-8 {path} > converted.jsonl"),
    b"\xfe\xff": ("UTF-16", "iconv -f UTF-16 -t UTF-8 {path} > converted.jsonl"),
    b"[": ("a JSON array", PYTHON.replace("{rows}", "json.load(open(sys.argv[1], encoding='utf-8-sig'))")),
    b"CSV": ("CSV", PYTHON.replace("{rows}", ROWS.replace("{tabs}", ""))),
    b"TSV": ("TSV", PYTHON.replace("{rows}", ROWS.replace("{tabs}", ", delimiter='\\t'"))),
}


# ---- reading --------------------------------------------------------------------------------------

def read_pairs(path):
    """
    Read preference pairs: a list of dicts of texts, "prompt", "chosen" and "rejected".

    A pair from whose responses a repeated prompt was cut off has the key "repeated" too. UserError names the file, the
    line and the fault.
    """
    pairs = []
    try:
        check_file(path)
        with open(path, "rb") as raw, tqdm(total=os.path.getsize(path), desc="read the data", unit="B", unit_scale=True,
                                           delay=3, leave=False, dynamic_ncols=True) as bar:
            start = raw.peek(8)
            file = gzip.open(raw) if start.startswith(b"\x1f\x8b") else raw
            for number, line in enumerate(file, start=1):
                if number == 1:
                    check_kind(path, line)
                if number % 1000 == 0:
                    bar.update(raw.tell() - bar.n)
                if not line.strip():
                    continue
                try:
                    pairs.append(parse_pair(line.decode("utf-8-sig")))  # -sig: without a byte order mark
                except UnicodeDecodeError as fault:
                    raise UserError(f"{path}, line {number}: not UTF-8 ({fault.reason} at byte {fault.start + 1}): "
                                    f"convert the file with {command('iconv -f LATIN1 -t UTF-8 {path}', path)} "
                                    "> converted.jsonl, from its true encoding") from None
                except ValueError as fault:
                    raise UserError(f"{path}, line {number}: {fault}") from None
    except (OSError, EOFError, zlib.error) as fault:
        reason = getattr(fault, "strerror", None) or fault
        raise UserError(f"{path}: cannot be read ({reason})") from None
    if not pairs:
        raise UserError(f"{path}: no pairs in it; each line should be {PAIR_FORM}")
    if all(same(pair["chosen"], pair["rejected"]) for pair in pairs):
        raise UserError(f"{path}: the two responses are the same in every pair, so nothing can be learned: "
                        'write the better one under "chosen" and the other one under "rejected"')
    return pairs


def command(template, path):
    return template.replace("{path}", shlex.quote(str(path)))


def check_file(path):
    """Raise UserError for a folder and for a pipe, which could be read only once. OSError when it is not there."""
    mode = None if str(path) == "-" else os.stat(path).st_mode
    if mode is not None and stat.S_ISDIR(mode):
        raise UserError(f"{path} is a folder: join its files with {command('cat {path}/*.jsonl > all.jsonl', path)}")
    if mode is None or not stat.S_ISREG(mode):
        raise UserError(f"{path} is a pipe or a device, and a run reads its data more than once: write it to a file, "
                        "as with cat > pairs.jsonl, and name that")


def check_kind(path, line):
    """Raise UserError, with the command that converts it, for a file whose first line is not JSON lines."""
    line = line.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not line.startswith((b"{", b"[")) and b"chosen" in line:  # the heads of the columns
        line = b"TSV" if b"\t" in line else b"CSV" if b"," in line else line
    for start, (kind, convert) in FORMATS.items():
        if line.startswith(start):
            raise UserError(f"{path}: {kind}, and not one pair a line: convert it with {command(convert, path)}")


# ---- one line -------------------------------------------------------------------------------------

def parse_pair(line):
    """One line of a preference file -> a dict of three texts. ValueError says what is wrong with it."""
    row = parse_row(line)
    for key in ("chosen", "rejected"):
        if key not in row:
            raise ValueError(f'the key "{key}" is missing, each line should be {PAIR_FORM}')
    if any(isinstance(row.get(key), list) for key in KEYS):
        prompt, chosen, rejected = split_messages(row)
        repeated = False
    else:
        for key in KEYS:
            if key in row and not isinstance(row[key], str):
                raise ValueError(f'"{key}" should be a text, found {type(row[key]).__name__}')
        prompt, chosen, rejected = [row.get(key, "").replace("\r\n", "\n") for key in KEYS]
        if "prompt" in row:
            chosen, rejected, repeated = cut_repeats(prompt, chosen, rejected)
        else:
            prompt, chosen, rejected = split_transcripts(chosen, rejected)
            repeated = False
    if not prompt.strip():
        raise ValueError("the prompt is empty: write one, as \"Review:\"")
    if not prompt[-1].isspace():  # a word's token includes the space before it
        chosen = chosen if chosen[:1].isspace() else " " + chosen
        rejected = rejected if rejected[:1].isspace() else " " + rejected
    pair = dict(prompt=prompt, chosen=chosen, rejected=rejected)
    for key, text in pair.items():
        try:
            text.encode()
        except UnicodeEncodeError as fault:
            half = ascii(text[fault.start])[1:-1]
            raise ValueError(f'"{key}" holds half a character, {half}: write it whole or remove it') from None
    return dict(pair, repeated=True) if repeated else pair


def parse_row(line):
    """The dict that a line holds. ValueError for what is not JSON, not a dict, or has a key twice."""
    try:
        row = json.loads(line, object_pairs_hook=unique)
    except json.JSONDecodeError as fault:
        raise ValueError(f"not JSON ({fault.msg} at column {fault.colno}): write each pair on a line of its own, as "
                         f"{PAIR_FORM}") from None
    except RecursionError:
        raise ValueError("its brackets are nested too deeply to read") from None
    if not isinstance(row, dict):
        raise ValueError(f"expected {PAIR_FORM}, found {type(row).__name__}")
    return row


def unique(items):
    row = dict(items)
    if len(row) < len(items):
        raise ValueError("it has a key twice: remove one of the two")
    return row


def cut_repeats(prompt, chosen, rejected):
    """
    Cut off a prompt that a response repeats at its start -> (chosen, rejected, whether something was cut).

    Both must begin with it, or it is so long (20 characters) that a response begins with it by no chance.
    """
    start = prompt.strip()
    rests = []
    for response in (chosen, rejected):
        begins, rest = response.lstrip().startswith(start), response.lstrip()[len(start):]
        word_goes_on = start[-1:].isalnum() and rest[:1].isalnum()  # as "go" in "gone"
        rests.append(rest if start and begins and not word_goes_on else None)
    both = None not in rests
    cuts = [rest is not None and (both or len(start) >= 20) for rest in rests]
    return (rests[0] if cuts[0] else chosen), (rests[1] if cuts[1] else rejected), any(cuts)


def split_transcripts(chosen, rejected):
    """Two HH-RLHF transcripts -> (prompt, chosen, rejected): the prompt ends with the last ASSISTANT they share."""
    cut, at = 0, chosen.find(ASSISTANT)
    while at >= 0 and rejected.startswith(chosen[cut:at + len(ASSISTANT)], cut):
        cut = at + len(ASSISTANT)
        at = chosen.find(ASSISTANT, cut)
    if cut == 0:
        raise ValueError("it has no \"prompt\", and the two transcripts share no '\\n\\nAssistant:'")
    return chosen[:cut], chosen[cut:], rejected[cut:]


def split_messages(row):
    """
    A row with lists of messages -> (prompt, chosen, rejected) as texts.

    A text beside lists is a message of the user ("prompt") or of the assistant. Lists hold whole conversations when
    they begin with the prompt or, beside a prompt that is a text, with a message that is not the assistant's.
    """
    prompt = to_messages("prompt", row["prompt"], "user") if "prompt" in row else []
    transcripts = []
    for key in ("chosen", "rejected"):
        messages = to_messages(key, row[key], "assistant")
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


def split_pairs(pairs, share, rng):
    """
    Split pairs into (training, held-out) lists; about `share` of the prompts are held out, with all their pairs.

    With fewer than ten different prompts, pairs are split one by one.
    """
    keys = [pair["prompt"] if isinstance(pair["prompt"], str) else tuple(pair["prompt"]) for pair in pairs]
    groups = sorted(set(keys))
    if len(groups) < 10:
        keys = list(range(len(pairs)))
        groups = keys
    heldout_keys = set(rng.sample(groups, max(1, round(share * len(groups)))))
    train = [pair for pair, key in zip(pairs, keys) if key not in heldout_keys]
    heldout = [pair for pair, key in zip(pairs, keys) if key in heldout_keys]
    return train, heldout
