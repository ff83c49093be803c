"""The file that a student handed in, as bytes: which one is meant. Nothing is run."""

import os
import re
import stat
from pathlib import Path

LIMIT = 2_000_000                               # bytes of a file
OURS = ("hunt", "cases", "course", "__pycache__", "__MACOSX")  # folders of a handout that hold no work


class Refused(Exception):
    """A file that cannot be graded. The message is a sentence for the student."""


def plain(name):
    """The name without what browsers and careful people add: "PPO (1).py" is "ppo.py"."""
    return re.sub(r"([ _-]*(\(\d+\)|copy))+(?=\.)", "", name.lower()).strip()


def usable(path):
    """Whether it is a regular file, readable and not too large. No link is followed."""
    kind = os.lstat(path)
    return stat.S_ISREG(kind.st_mode) and kind.st_size <= LIMIT and os.access(path, os.R_OK)


def candidates(folder, name):
    """The files in a folder, however deep, that may be the file of this name: first those that are not in OURS."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(inner for inner in folders if not inner.startswith("."))
        for other in sorted(names):
            path = Path(place, other)
            if plain(other) == name.lower() and usable(path):
                found.append(path)
    return [path for path in found if not {*path.relative_to(folder).parts} & {*OURS}] or found


def read(folder, name):
    """
    (bytes, remark) of a file: the remark says where it was found if that is not its usual place. Raises Refused if
    there is none, or if several files of different content may be meant.
    """
    found = candidates(folder, name)
    if not found:
        raise Refused(f"{name} was not handed in: there is no readable file of this name with at most {LIMIT} bytes")
    contents = {path: path.read_bytes() for path in found}
    shown = ", ".join(ascii(path.relative_to(folder).as_posix()) for path in found[:5])
    if len(set(contents.values())) > 1:
        raise Refused(f"{len(found)} files may be {name}: {shown}. Hand in one of them")
    remark = "" if found[0] == Path(folder, name) else f"{name} was found as {shown}. "
    return contents[found[0]], remark


def helpers(folder, graded, known):
    """{name: bytes} of other modules next to the files that are graded: a student may have written some."""
    places = sorted({path.parent for name in graded for path in candidates(folder, name)})
    found = [path for place in places for path in sorted(place.glob("*.py"))
             if path.name not in known and usable(path)]
    return {path.name: path.read_bytes() for path in found[:20]}  # the grader's memory is small
