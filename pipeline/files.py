"""Files that are written whole or not at all, and whose content is checked when it is read."""

import io
import json
import math
import os

import torch

from pipeline.errors import UserError


def write_file(path, content):
    """
    Write a text, bytes, or anything else with torch.save. The old file stays whole until the new one is on the disk.

    Raises UserError when it cannot be written: a full disk, a folder that is gone or may not be written to.
    """
    if isinstance(content, str):
        content = content.encode()
    if not isinstance(content, bytes):
        buffer = io.BytesIO()  # torch raises no special exception for a full disk
        torch.save(content, buffer)
        content = buffer.getbuffer()
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as fault:
        raise UserError(f"{path} cannot be written ({fault.strerror}): the old content is kept") from None
    finally:
        part.unlink(missing_ok=True)  # there is none after the replace


def clean(x):
    """x as JSON would bring it back: numbers with six digits, None for NaN and infinity."""
    return json.loads(json.dumps(x), parse_float=lambda text: float(f"{float(text):.6g}"),
                      parse_constant=lambda text: None)


def read_file(path, shape):
    """The content of a .json file, the rows of a .jsonl file; None if it cannot be read or does not fit the shape."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.name == "metrics.jsonl":
            text = text[:text.rfind("\n") + 1]  # without half a line, of a process that was killed while it wrote
        content = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
        return content if fits(content, shape) else None
    except (OSError, ValueError, OverflowError, RecursionError):
        return None


def fits(content, shape):
    """
    Whether content is like an example.

    {key: example}, "*" for all other keys; [example of all items]; (one example, or another); 0: an integer;
    0.0: any finite number; "": a text; None: null
    """
    if isinstance(shape, tuple):
        return any(fits(content, other) for other in shape)
    if type(content) is int and abs(content) >= 2 ** 63:  # more than a tensor holds
        return False
    if type(content) in (int, float) and type(shape) is float:
        return math.isfinite(content)
    if type(content) is not type(shape):
        return False
    if isinstance(shape, dict):
        rest = {key: shape["*"] for key in content if "*" in shape}
        needed = {**rest, **{key: shape[key] for key in shape if key != "*"}}
        return all(key in content and fits(content[key], needed[key]) for key in needed)
    if isinstance(shape, list):
        return all(fits(item, shape[0]) for item in content)
    if isinstance(shape, str):
        content.encode()  # ValueError for half a character
    return True
