"""Set 6: a student's variant decides which planted bugs are in the copy, and which others the student's tests meet."""

import random
import tempfile

import handed_in
import sandbox
from project import write
from rewrite import REWRITES, padded, rewritten

BUGS, MORE = 5, 5    # in the working copy, and others that the student has not met
OWN, OTHER = 6, 2    # points for a test that shows one of them
SECONDS = 35         # of each run of the test file
FILE = "test_hunt.py"
LINES = [*((f"6.{i + 1}", f"6.{i + 1} a test shows bug {i + 1} of your copy", OWN) for i in range(BUGS)),
         (f"6.{BUGS + 1}", f"6.{BUGS + 1} the tests show {MORE} bugs of other copies", OTHER * MORE)]
PYTEST = "[pytest]\npythonpath = .\naddopts = -q -x -p no:cacheprovider --import-mode=importlib\n"


def choose(bugs, seed):
    """
    The bugs of a variant; the first BUGS are in the working copy. First functions are drawn, and then a bug in each: a
    long loop with many bugs is as likely as a small function.
    """
    rng = random.Random(seed)
    by_place = {}
    for bug in sorted(bugs, key=lambda bug: bug["name"]):
        by_place.setdefault(bug["place"], []).append(bug)
    return [rng.choice(by_place[place]) for place in rng.sample(sorted(by_place), BUGS + MORE)]


def planted(files, bugs):
    """The files with these bugs in them, the last place first, so that the others stay where they were."""
    files = dict(files)
    for bug in sorted(bugs, key=lambda bug: -bug["start"]):
        text = files[bug["path"]]
        files[bug["path"]] = text[:bug["start"]] + bug["wrong"] + text[bug["end"]:]
    return files


def run_tests(files, test, seconds):
    """The exit status of pytest, 0 if all passed and 1 if some failed; None if it had to be stopped."""
    with tempfile.TemporaryDirectory(prefix="graded-", ignore_cleanup_errors=True) as folder:
        write(folder, {**files, FILE: test, "pytest.ini": PYTEST})
        try:
            return sandbox.run_status(["-m", "pytest", FILE], folder, seconds)[0]
        except (TimeoutError, OSError):
            return None


def versions_of(files, bugs, secret):
    """
    [(number of the bug, or None for the true code, files), ...] in a secret order, but that the plain true code is
    first. The true code comes in every rewriting, and a bug in any of them: the style tells nothing.
    """
    rng = random.Random(f"{secret} order")
    versions = [(None, files, rewrite) for rewrite in REWRITES]
    versions += [(i, planted(files, [bug]), rng.choice(REWRITES)) for i, bug in enumerate(bugs)]
    versions = [(i, rewritten(version, lambda text, how=how: padded(how(text), rng))) for i, version, how in versions]
    rng.shuffle(versions)
    return [(None, files), *versions]


def statuses(versions, test, run):
    """{number of a bug: exit status}. Raises Refused if a test fails on the true code, however it is written."""
    found = {}
    for bug, version in versions:
        status = run(version, test, SECONDS)
        if bug is not None:
            found[bug] = status
        elif status is None:
            raise handed_in.Refused(f"{FILE} was stopped on the true code: all its tests together have {SECONDS} "
                                    "seconds, on half a core")
        elif status != 0:
            raise handed_in.Refused(f"{FILE} does not pass on the true code, or not if that is written in another way")
    return found


def grade(files, bugs, submission, seed, secret, results, run=run_tests):
    """Set the lines of a hunt."""
    try:
        test, remark = handed_in.read(submission, FILE)
        found = statuses(versions_of(files, choose(bugs, seed), secret), test, run)
    except handed_in.Refused as fault:
        for number, _, _ in LINES:
            results.set(number, 0, str(fault))
        return
    told = {0: "all tests pass with this bug", 1: "shown", None: f"stopped after {SECONDS} seconds: not shown"}
    for i in range(BUGS):
        results.set(f"6.{i + 1}", OWN if found[i] == 1 else 0, remark + told.get(found[i], "pytest could not run"))
    others = sum(found[i] == 1 for i in range(BUGS, BUGS + MORE))
    results.set(f"6.{BUGS + 1}", OTHER * others, f"{others} of {MORE} shown")
