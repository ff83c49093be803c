"""
Call one function on the inputs of its cases, in a process of its own: python child.py FOLDER DESCRIPTOR

The request comes on the standard input: {"set": 4, "key": "gae", "cases": [inputs, ...]}. The outputs go to the file
descriptor, which the parent has opened: a list with one dict a case, or a text. The process never sees what is
expected.
"""

import importlib
import json
import os
import re
import sys
import traceback


def say(fault, folder):
    """An exception as one sentence: what, and in which line of the student's code."""
    if isinstance(fault, NotImplementedError):
        return f"not solved yet ({fault})"
    ours = re.compile(r"/(child|draw|loops|play|game|set\d|values)\.py$")
    frames = [frame for frame in traceback.extract_tb(fault.__traceback__)
              if frame.filename.startswith(folder) and not ours.search(frame.filename)]
    where = f", in {frames[-1].name}: {frames[-1].line}"[:160] if frames else ""
    message = re.sub(r"0x[0-9a-f]+", "0x...", " ".join(str(fault).split()))[:200].replace(folder, "")
    return f"{type(fault).__name__}: {message}{where}"


def outputs(module, key, cases, folder):
    """The encoded outputs of all cases, or a sentence."""
    from values import decode, encode

    try:
        run = getattr(importlib.import_module(module), f"run_{key}")
        return [encode(run(decode(case))) for case in cases]
    except KeyboardInterrupt:
        raise
    except BaseException as fault:  # SystemExit too
        return say(fault, folder)


def main():
    folder, descriptor = os.path.realpath(sys.argv[1]), int(sys.argv[2])
    sys.dont_write_bytecode = True
    sys.path[:0] = [folder]
    request = json.load(sys.stdin)
    found = outputs(f"set{request['set']}", request["key"], request["cases"], folder)
    with open(descriptor, "w", encoding="utf-8") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main()
