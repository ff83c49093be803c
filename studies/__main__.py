"""
The research that minirlhf comes from, repeated at toy scale.

    python -m studies NAME [--quick] [--seeds N]

    overopt    what does the true reward do while a policy climbs a learned one?
    direct     does fitting pairs directly escape over-optimisation?
    tree       does a loss on preferences move probability to responses in no pair?
    robust     does a reward that knows its own uncertainty resist over-optimisation?
    limits     what can go wrong with a reward model even when everything is done right?
    frontier   how much reward does each method get for the KL that it spends?
    estimators what does a critic buy, and what do group baselines cost?
    robust_exact, limits_exact   the parts of robust and limits that need no GPT

A study prints a table and its verdicts, and writes them to runs/studies/NAME with a CSV file and, if matplotlib is
installed, a picture. The same command again continues a study with a GPT that was interrupted. docs/studies.md shows
the results.
"""

import argparse
import sys
import time

from pipeline.config import OneLineParser
from pipeline.errors import UserError, need
from studies import common
from studies.direct import direct
from studies.estimators import estimators
from studies.frontier import frontier
from studies.lab import cores, parallel
from studies.limits import limits
from studies.limits_exact import limits_exact
from studies.overopt import overopt
from studies.robust import robust
from studies.robust_exact import robust_exact
from studies.tree import tree

STUDIES = dict(overopt=overopt, direct=direct, tree=tree, robust=robust, limits=limits, frontier=frontier,
               estimators=estimators, robust_exact=robust_exact, limits_exact=limits_exact)
WITHOUT_GPT = dict(tree=24, robust_exact=100, limits_exact=40)  # seeds; they cost little
SEEDS = dict.fromkeys(STUDIES, 10) | WITHOUT_GPT
QUICK_SEEDS = dict.fromkeys(STUDIES, 1) | dict(tree=4, robust_exact=6, limits_exact=2)


def parse(argv):
    """(name, quick, seeds). Raises UserError for an unknown study or option."""
    parser = OneLineParser(prog="python -m studies", description=__doc__, allow_abbrev=False,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=STUDIES, metavar="NAME", help=", ".join(STUDIES))
    parser.add_argument("--quick", action="store_true", help="small, in seconds: shows that it works, gives no verdict")
    parser.add_argument("--seeds", type=int, metavar="N", help="number of seeds (10; more without a GPT)")
    given = parser.parse_args(argv)
    need(given.seeds is None or given.seeds > 0, f"--seeds must be at least 1, got {given.seeds}")
    return given.name, given.quick, given.seeds or (QUICK_SEEDS if given.quick else SEEDS)[given.name]


def run_study(name, quick, seeds):
    """Run one study and print its question, its table and its verdicts."""
    started = time.perf_counter()
    out = common.HOME / (name + "-quick" * quick)
    print(STUDIES[name].__doc__.split("\n\n")[0].strip(), flush=True)
    if name not in WITHOUT_GPT:
        parallel(common.make_base, [(seed, quick) for seed in range(seeds)])
    text = STUDIES[name](seeds, quick, out)
    print(f"\n{text}\n\n{seeds} seeds, {time.perf_counter() - started:.0f} s on {cores()} cores; written to {out}")


def main(argv=None):
    """Run the study that the command line names. Returns the exit status: 2 after a mistake, 130 after Ctrl-C."""
    try:
        run_study(*parse(argv))
    except UserError as fault:
        print(f"studies: {fault}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstudies: stopped. The same command does the jobs again that were not kept", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
