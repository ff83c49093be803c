"""
The bench that the studies share: statistics over seeds, independent jobs side by side, and what a study leaves in its folder.

    runs/studies/NAME/   table.txt   the numbers        results.csv   all of them, a line per setting
                         verdict.txt whether the claim was reproduced          picture.png   where matplotlib is there

A study is a plain function (seeds, quick, out) -> (rows, text): its docstring has the question, the paper's claim, and the criterion that was
written down before there were numbers. All its random numbers come from its seeds, so a second pass gives the same file to the last byte.
"""

import csv
import math
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from tqdm import tqdm


def mean_se(xs):
    """(mean, standard error of the mean) of one number per seed; the error is 0 for a single seed. Raises ValueError when there is none."""
    xs = [float(x) for x in xs]
    if not xs:
        raise ValueError("no numbers to take the mean of")
    mean = sum(xs) / len(xs)
    if len(xs) == 1:
        return mean, 0.0
    return mean, math.sqrt(sum((x - mean) ** 2 for x in xs) / (len(xs) - 1) / len(xs))


def ranks(xs):
    """Ranks from 1, of equal numbers the average of their places."""
    return [sum(y < x for y in xs) + (sum(y == x for y in xs) + 1) / 2 for x in xs]


def spearman(x, y):
    """Pearson's correlation of the average ranks; NaN when x or y is constant. Raises ValueError unless they are equally long, two numbers or more."""
    if len(x) != len(y) or len(x) < 2:
        raise ValueError(f"a rank correlation is of two equally long lists, got {len(x)} and {len(y)} numbers")
    a, b = ([rank - (len(x) + 1) / 2 for rank in ranks(list(xs))] for xs in (x, y))
    norm = math.sqrt(sum(p * p for p in a) * sum(q * q for q in b))
    return sum(p * q for p, q in zip(a, b)) / norm if norm else math.nan


def cores():
    """How many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parallel(function, jobs):
    """
    [function(*job) for job in jobs], on as many processes as there are cores, one torch thread each; the results in the order of the jobs.

    The function stands at the top level of a module and what it returns can be pickled. With one core, one job or LAB_SERIAL=1 all runs in this
    process, with the same results. An exception ends the whole and comes out as RuntimeError with the job's arguments.
    """
    jobs, results = list(jobs), {}

    def outcome(i, call, *arguments):
        try:
            results[i] = call(*arguments)
        except Exception as fault:
            raise RuntimeError(f"{function.__name__}{tuple(jobs[i])!r}: {type(fault).__name__}: {fault}") from fault
        bar.update()

    with tqdm(total=len(jobs), desc=function.__name__, unit="job", dynamic_ncols=True) as bar:
        if min(cores(), len(jobs)) < 2 or os.environ.get("LAB_SERIAL") == "1":
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                for i, job in enumerate(jobs):
                    outcome(i, function, *job)
            finally:
                torch.set_num_threads(threads)
        else:
            spawn = multiprocessing.get_context("spawn")  # a fork of a process that has used torch's threads can hang
            with ProcessPoolExecutor(min(cores(), len(jobs)), spawn, torch.set_num_threads, (1,)) as pool:
                futures = {pool.submit(function, *job): i for i, job in enumerate(jobs)}
                try:
                    for future in as_completed(futures):
                        outcome(futures[future], future.result)
                except BaseException:  # Ctrl-C too: no job that has not begun is begun
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
    return [results[i] for i in range(len(jobs))]


def cell(value):
    return "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def table(rows, columns):
    """Rows (dicts) as aligned text under the names of the columns: words on the left, numbers on the right, blank where a row has no such key."""
    cells = [list(columns)] + [[cell(row.get(name)) for name in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    words = [any(isinstance(row.get(name), str) for row in rows) for name in columns]
    lines = ["  ".join(text.ljust(n) if word else text.rjust(n) for text, n, word in zip(line, widths, words)).rstrip() for line in cells]
    return "\n".join(lines)


def write_csv(path, rows):
    """Rows (dicts) as a CSV file; the columns are all keys in the order in which they first occur."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def picture(path, panels):
    """
    Panels side by side, a PNG: [dict(title, xlabel, ylabel, xscale="linear", lines=[dict(label, x, y, yerr=None, style="-")])].

    Returns whether it was drawn: without matplotlib one line says what to install, and the study goes on.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # of its own, so that a caller's pyplot stays as it is
        from matplotlib.figure import Figure
    except ImportError:
        print(f"no {path}: pip install matplotlib to have it drawn")
        return False
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for line in panel["lines"]:
            axes.errorbar(line["x"], line["y"], line.get("yerr"), fmt=line.get("style", "-"), label=line["label"], capsize=2)
        axes.set(title=panel["title"], xlabel=panel["xlabel"], ylabel=panel["ylabel"], xscale=panel.get("xscale", "linear"))
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    return True


def verdict(reproduced, why):
    """One line; reproduced is True, False, or None for what this study cannot tell."""
    return f"{ {True: 'reproduced', False: 'not reproduced', None: 'not tested here'}[reproduced] }: {why}".strip()


def publish(out, rows, text, verdicts, panels):
    """Leave a study's folder; returns (rows, text) with the verdicts, a list of lines, at the end of the text."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.txt").write_text(text + "\n", encoding="utf-8")
    (out / "verdict.txt").write_text("\n".join(verdicts) + "\n", encoding="utf-8")
    write_csv(out / "results.csv", rows)
    picture(out / "picture.png", panels)
    return rows, text + "\n\n" + "\n".join(verdicts)
