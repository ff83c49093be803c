"""
minirlhf: how a language model learns from human feedback, from the first line to the last.

    python minirlhf.py                       all stages, about six minutes on two slow CPU cores
    python minirlhf.py --quick               the same, small, in half a minute
    python minirlhf.py --data pairs.jsonl    the same on your own pairs of {"prompt", "chosen", "rejected"}
    python minirlhf.py --stages trace --prompt "i saw this little film with my sister last night ."

Read in this order: data.py, model.py, reward.py, ppo.py, grpo.py, dpo.py, mdp.py, lesson.py, estimators.py,
evaluate.py, then pipeline/stages.py, which puts them together, and this file. The rest of pipeline/ is what a program
needs besides: options, files, report. A run that was stopped goes on with --resume.
"""

import codecs
import os
import signal
import sys
import time

import torch

from checks import CanaryError
from data import UserError
from pipeline.config import STAGES, VIEWS, parse_config
from pipeline.page import page
from pipeline.progress import Stopped, stop_if_asked, stoppable
from pipeline.run import Run, read_data
from pipeline.stages import run_dpo, run_grpo, run_ppo, run_preferences, run_pretrain, run_report, run_reward, run_sft
from pipeline.views import sample_prompt, trace

FUNCTIONS = dict(pretrain=run_pretrain, sft=run_sft, preferences=run_preferences, reward=run_reward, ppo=run_ppo,
                 grpo=run_grpo, dpo=run_dpo, report=run_report, sample=sample_prompt, trace=trace, page=page)
USED_BY = dict(pretrain=STAGES[1:], sft=STAGES[2:], preferences=("reward", "ppo", "grpo", "dpo", "report"),
                reward=("ppo", "grpo", "report"), ppo=("report",), grpo=("report",), dpo=("report",), report=())


def run_stages(run):
    """Run the stages of the command, one after another: a heading, a progress bar, and the result in one line."""
    config = run.config
    stages = config.stages.split(",")
    done = run.begin(stages)
    print(f"minirlhf  seed {config.seed}, {run.device}, torch {torch.__version__}, writing to {run.folder}")
    for stage in stages[done:]:
        run.stage = stage
        number = STAGES.index(stage)
        print(f"\n{number + 1}/{len(STAGES)}  {stage}: {FUNCTIONS[stage].__doc__}", flush=True)
        torch.manual_seed(1000 * config.seed + number)  # a stage run alone gives what it gives after the others
        log = run.begin_metrics(stage)
        started = time.perf_counter()
        result = FUNCTIONS[stage](run, log)
        seconds = time.perf_counter() - started
        log(stage_seconds=seconds)
        run.finish(stage, seconds)
        print(f"     {result}  [{seconds:.0f} s]", flush=True)
        stop_if_asked()
    run.end()
    outdated = outdated_stages(list(run.finished()))
    if outdated:
        print(f"\noutdated, because what they are built on is newer: go on with --stages {','.join(outdated)}")


def outdated_stages(done):
    """The stages that ended before a stage whose result they use. done: stages in the order in which they ended."""
    outdated = []
    for stage in STAGES:
        ended_later = done[done.index(stage) + 1:] if stage in done else []
        if any(stage in USED_BY[other] for other in ended_later):
            outdated.append(stage)
    return outdated


def make_printable():
    """
    From here on printing never fails: a sign that the terminal cannot show becomes "?" (± becomes +-), and a stream
    that was closed leads nowhere.
    """
    codecs.register_error("plain", lambda fault: ({"±": "+-"}.get(fault.object[fault.start], "?"), fault.start + 1))
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="plain")


def silence():
    """Nobody reads the output any more: what Python still writes at its end goes to the null device."""
    for descriptor in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def main(argv=None):
    """The exit status: 2 with one line for a mistake of the user, 1 for a canary, 141 when nobody reads (`| head`)."""
    make_printable()
    run = None
    try:
        with stoppable():
            config = parse_config(argv, __doc__)
            stages = config.stages.split(",")
            run = Run(config, read_data(config))
            if stages[0] in VIEWS:
                for stage in stages:
                    FUNCTIONS[stage](run)
            else:
                with run.lock():
                    run_stages(run)
            sys.stdout.flush()  # here, where a reader that is gone is noticed
        return 0
    except BrokenPipeError:
        silence()
        return 141
    except UserError as fault:
        print(f"minirlhf: {fault}", file=sys.stderr)
        return 2
    except OSError as fault:  # most faults of files are UserErrors; this one is the output's, if it names no file
        print(f"minirlhf: {fault.filename or 'the output'} cannot be used ({fault.strerror})", file=sys.stderr)
        if not fault.filename:
            silence()
        return 2
    except CanaryError as fault:
        print(f"\nminirlhf: stopped: {fault}.{run.where()} The checkpoints of earlier stages are as they were.",
              file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        number = stop.number if isinstance(stop, Stopped) else signal.SIGINT
        advice = f": go on with --resume --out {run.folder}" if run and run.planned else ""
        print(f"\nminirlhf: stopped by {signal.Signals(number).name}{advice}", file=sys.stderr)
        return 128 + number


if __name__ == "__main__":
    sys.exit(main())
