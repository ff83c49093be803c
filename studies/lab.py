"""
The tools that all studies share: statistics over seeds, parallel jobs, laws fitted to points, and the results on disk.

    runs/studies/NAME/   table.txt     the summary           results.csv   every measurement, one setting a line
                         verdict.txt   what was reproduced   picture.png   the curves, if matplotlib is installed

A study is a function (seeds, quick, out) -> (rows, text). Its docstring holds the question, the paper's claim, and the
criterion, which was written down before there were numbers. All random numbers come from the seeds, so a second pass
writes the same files.

Letters: N points.
"""

import csv
import math
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from tqdm import tqdm

from data import UserError

# ---------------------------------------------------------------------------------------------------------------------
# statistics

def mean_se(xs):
    """
    Compute (mean, standard error of the mean) of one number per seed. The error of a single seed is 0.

    Raises ValueError for an empty list.
    """
    xs = [float(x) for x in xs]
    n = len(xs)
    if n == 0:
        raise ValueError("no numbers to take the mean of")
    mean = sum(xs) / n
    if n == 1:
        return mean, 0.0
    variance = sum((x - mean) ** 2 for x in xs) / (n - 1)
    return mean, math.sqrt(variance / n)


def ranks(xs):
    """Rank the numbers from 1. Equal numbers share the average of their ranks."""
    result = []
    for x in xs:
        smaller = sum(y < x for y in xs)
        equal = sum(y == x for y in xs)
        result.append(smaller + (equal + 1) / 2)
    return result


def spearman(x, y):
    """
    Compute Spearman's rank correlation: Pearson's correlation of the ranks. It is NaN when x or y is constant.

    Raises ValueError unless x and y have the same length, at least 2.
    """
    if len(x) != len(y) or len(x) < 2:
        raise ValueError(f"a rank correlation needs two lists of one length, at least 2, got {len(x)} and {len(y)}")
    mean_rank = (len(x) + 1) / 2
    a = [rank - mean_rank for rank in ranks(list(x))]
    b = [rank - mean_rank for rank in ranks(list(y))]
    norm = math.sqrt(sum(p * p for p in a) * sum(q * q for q in b))
    if norm == 0:
        return math.nan
    return sum(p * q for p, q in zip(a, b)) / norm


# ---------------------------------------------------------------------------------------------------------------------
# laws: how a reward depends on the distance from the reference

LAWS = ("rl", "bon", "quadratic")


def law_columns(d, law):
    """Compute the columns, (N, 2) or (N, 3), whose weighted sum is the law. d: (N,)."""
    if law == "rl":
        columns = [d, -torch.special.xlogy(d, d)]  # xlogy: 0 log 0 = 0
    elif law == "bon":
        columns = [d, -d ** 2]
    else:
        columns = [torch.ones_like(d), d ** 2, d ** 4]
    return torch.stack(columns, dim=1)


def fit_law(d, R, law):
    """
    Fit a law of the reward R by least squares. Returns (coefficients, rmse).

        rl         R = d (alpha - beta log d)    (alpha, beta)   Gao et al. 2023, section 3.1
        bon        R = d (alpha - beta d)        (alpha, beta)   the same paper, for best-of-n
        quadratic  R = a + b KL + c KL^2         (a, b, c)       the rival in Rafailov et al. 2024 (arXiv:2406.02900)

    d (N,): sqrt(KL(policy || reference)), KL in nats. R (N,): the reward of each point.
    rl peaks at d = exp(alpha / beta - 1) and bon at d = alpha / (2 beta). Both are 0 at d = 0, so subtract the
    reference's reward before. rmse is the root of the mean squared residual, in units of R. A third coefficient
    lowers it even when the law is wrong.
    Raises ValueError for an unknown law, a negative d, or fewer points than coefficients.
    """
    if law not in LAWS:
        raise ValueError(f"unknown law {law!r}, choose from {', '.join(LAWS)}")
    d = torch.as_tensor(d, dtype=torch.float64, device="cpu")
    R = torch.as_tensor(R, dtype=torch.float64, device="cpu")
    if not (d >= 0).all():  # `not`, because NaN compares as False
        raise ValueError(f"a distance must be at least 0, got {d.min().item()}")
    columns = law_columns(d, law)
    n_coefficients = columns.shape[1]
    if len(d) < n_coefficients:
        raise ValueError(f"the law {law!r} has {n_coefficients} coefficients and cannot be fitted to {len(d)} points")
    coefficients = torch.linalg.lstsq(columns, R[:, None]).solution[:, 0]
    residuals = columns @ coefficients - R                                                    # (N,)
    return tuple(coefficients.tolist()), residuals.square().mean().sqrt().item()


# ---------------------------------------------------------------------------------------------------------------------
# parallel jobs

def cores():
    """Count the CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def parallel(function, jobs):
    """
    Compute [function(*job) for job in jobs] in parallel processes, one per core, with one torch thread each.

    Results are in the order of the jobs. The function must be at the top level of a module, and its results must be
    picklable. With one core, one job or LAB_SERIAL=1, everything runs in this process and gives the same results.
    The first job that fails stops the rest: RuntimeError names its arguments. A UserError is passed on unchanged.
    """
    jobs = list(jobs)
    serial = os.environ.get("LAB_SERIAL") == "1" or min(cores(), len(jobs)) < 2
    run_jobs = run_here if serial else run_in_processes
    with tqdm(total=len(jobs), desc=function.__name__, unit="job", dynamic_ncols=True) as bar:
        return run_jobs(function, jobs, bar)


def job_error(function, job, fault):
    return RuntimeError(f"{function.__name__}{tuple(job)!r}: {type(fault).__name__}: {fault}")


def run_here(function, jobs, bar):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes: the number of threads changes how sums are rounded
    results = []
    try:
        for job in jobs:
            try:
                results.append(function(*job))
            except UserError:
                raise
            except Exception as fault:
                raise job_error(function, job, fault) from fault
            bar.update()
    finally:
        torch.set_num_threads(threads)
    return results


def run_in_processes(function, jobs, bar):
    spawn = multiprocessing.get_context("spawn")  # a fork of a process that has used torch's threads can hang
    results = [None] * len(jobs)
    with ProcessPoolExecutor(min(cores(), len(jobs)), spawn, torch.set_num_threads, (1,)) as pool:
        futures = {pool.submit(function, *job): i for i, job in enumerate(jobs)}
        try:
            for future in as_completed(futures):
                i = futures[future]
                try:
                    results[i] = future.result()
                except UserError:
                    raise
                except Exception as fault:
                    raise job_error(function, jobs[i], fault) from fault
                bar.update()
        except BaseException:  # Ctrl-C too: start none of the jobs that still wait
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return results


# ---------------------------------------------------------------------------------------------------------------------
# tables, pictures, verdicts

def cell(value):
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3f}"
    return str(value)


def table(rows, columns):
    """Format rows (dicts) as aligned text: words to the left, numbers to the right, a blank for a missing key."""
    texts = {}
    for name in columns:
        cells = [cell(row.get(name)) for row in rows]
        width = max(len(text) for text in [name, *cells])
        has_words = any(isinstance(row.get(name), str) for row in rows)
        align = str.ljust if has_words else str.rjust
        texts[name] = [align(text, width) for text in [name, *cells]]
    lines = []
    for i in range(len(rows) + 1):
        line = "  ".join(texts[name][i] for name in columns)
        lines.append(line.rstrip())
    return "\n".join(lines)


def write_csv(path, rows):
    """Write rows (dicts) as a CSV file. Its columns are all keys, in the order in which they first occur."""
    columns = {}  # a dict keeps the order of its keys
    for row in rows:
        columns.update(dict.fromkeys(row))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def picture(path, panels):
    """
    Draw panels side by side into a PNG file. Returns whether it was drawn.

    A panel is dict(title, xlabel, ylabel, lines, xscale="linear"), a line is dict(label, x, y, yerr=None, style="-").
    Without matplotlib it prints one line that says what to install, and the study goes on.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # without pyplot: the caller's stays as it is
        from matplotlib.figure import Figure
    except ImportError:
        print(f"no {path}: pip install matplotlib to draw it")
        return False
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, panel in zip(all_axes, panels):
        for line in panel["lines"]:
            style = line.get("style", "-")
            axes.errorbar(line["x"], line["y"], line.get("yerr"), fmt=style, label=line["label"], capsize=2)
        axes.set(title=panel["title"], xlabel=panel["xlabel"], ylabel=panel["ylabel"])
        axes.set_xscale(panel.get("xscale", "linear"))
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    return True


def verdict(reproduced, why):
    """Format one line. reproduced is True, False, or None for what this study cannot tell."""
    words = {True: "reproduced", False: "not reproduced", None: "not tested here"}
    return f"{words[reproduced]}: {why}".strip()


def publish(out, rows, text, verdicts, panels):
    """Write the files of a study. Returns (rows, text), with the verdicts (a list of lines) at the end of the text."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    verdict_lines = "\n".join(verdicts)
    (out / "table.txt").write_text(text + "\n", encoding="utf-8")
    (out / "verdict.txt").write_text(verdict_lines + "\n", encoding="utf-8")
    write_csv(out / "results.csv", rows)
    picture(out / "picture.png", panels)
    return rows, text + "\n\n" + verdict_lines
