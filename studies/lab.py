"""
The tools that all studies share: statistics over seeds, laws fitted to points, parallel jobs, and the results on disk.

A study is a function (seeds, quick, out) -> text. The first paragraph of its docstring, the question, is printed. All
random numbers come from the seeds, so a second pass writes the same numbers, but for seconds.

Letters: N points, S seeds, W points of a curve.
"""

import contextlib
import csv
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import signal
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from pipeline.errors import UserError
from pipeline.files import write_file

ROOT = Path(__file__).parent.parent

# ---- rows and statistics --------------------------------------------------------------------------

def select(rows, **where):
    """The rows that have these values in these columns."""
    return [row for row in rows if where.items() <= row.items()]


def column(rows, name, **where):
    """One column of the selected rows."""
    return [row[name] for row in select(rows, **where)]


def mean_se(xs):
    """(mean, standard error of the mean) of one number per seed. The error of a single seed is 0."""
    xs = [float(x) for x in xs]
    n = len(xs)
    mean = sum(xs) / n
    variance = sum((x - mean) ** 2 for x in xs) / max(n - 1, 1)
    return mean, math.sqrt(variance / n)


def curves_by_seed(rows, name, **where):
    """One column of the selected rows as one curve for each seed, (S, W)."""
    return [column(rows, name, seed=seed, **where) for seed in sorted({row["seed"] for row in rows})]


def mean_curve(curves):
    """Mean and standard error over seeds at every point of the curves (S, W). Returns two lists (W,)."""
    points = [mean_se(numbers) for numbers in zip(*curves)]
    return [mean for mean, _ in points], [error for _, error in points]


def paired(a, b):
    """a - b, one number for each seed."""
    return [x - y for x, y in zip(a, b, strict=True)]


def ranks(xs):
    """Rank the numbers from 1. Equal numbers share the average of their ranks."""
    return [sum(y < x for y in xs) + (sum(y == x for y in xs) + 1) / 2 for x in xs]


def spearman(x, y):
    """Spearman's rank correlation of two lists: Pearson's correlation of the ranks. NaN when one is constant."""
    return torch.corrcoef(torch.tensor([ranks(x), ranks(y)], dtype=torch.float64))[0, 1].item()


# ---- claims and verdicts --------------------------------------------------------------------------

class Claim(NamedTuple):
    """
    One criterion of a study: the mean of these numbers, one a seed, is above 0. Seeds are independent, so differences
    within a seed are paired.

    within: the claim is instead that the mean lies between -within and within. why: what a reader should know.
    """
    name: str
    values: list
    why: str = ""
    within: float | None = None


def student_p(values, bound=0.0):
    """
    The one-sided p-value of "the mean is above the bound": Student's t test with df = len(values) - 1.

    The closed form for a whole df (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4), with t = sqrt(df) tan(angle).
    """
    mean, error = mean_se(values)
    df = len(values) - 1
    if df == 0 or error == 0:
        return 0.5 if df == 0 or mean == bound else float(mean < bound)
    angle = math.atan((mean - bound) / error / math.sqrt(df))
    term, total = (math.cos(angle) if df % 2 else 1.0), 0.0
    for i in range(1 + df % 2, df, 2):
        total += term
        term *= i / (i + 1) * math.cos(angle) ** 2
    middle = math.sin(angle) * total  # the probability between -t and t
    if df % 2:
        middle = (angle + middle) * 2 / math.pi
    return (1 - middle) / 2


def half_width(values):
    """The half width of the 95% interval of the mean, by Student's t: the distance at which the p-value is 0.025."""
    mean, error = mean_se(values)
    low, high = 0.0, 700 * error  # 12.7 errors for two values would do
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if student_p(values, mean - middle) > 0.025 else (low, middle)
    return high


def holm(ps):
    """Holm's correction: p-values such that, of all true hypotheses, one at 0.05 is rejected in 5% of studies."""
    adjusted, largest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = largest
    return adjusted


def p_values(claim):
    """The p-values of a claim and of its opposite."""
    values, within = claim.values, claim.within
    negative = [-x for x in values]
    if within is None:
        return student_p(values), student_p(negative)
    inside = max(student_p(values, -within), student_p(negative, -within))
    outside = min(1.0, 2 * min(student_p(values, within), student_p(negative, within)))
    return inside, outside


def seeds_needed(claim):
    """How many seeds would decide a claim in four of five passes, if mean and deviation stay; None for over 999."""
    mean, error = mean_se(claim.values)
    distance = abs(mean) if claim.within is None else abs(claim.within - abs(mean))
    needed = ((1.96 + 0.84) * error * math.sqrt(len(claim.values)) / distance) ** 2 if distance else math.inf
    return max(len(claim.values) + 1, math.ceil(needed)) if needed < 1000 else None


def judge(claims, quick):
    """
    The verdicts on all claims of a study, a list of lines. A quick pass and fewer than four seeds give none.

    reproduced or contradicted: p < 0.05 for the claim or for its opposite, after Holm's correction over the claims of
    the study. Else undecided, with what would decide it.
    """
    both = [p_values(claim) for claim in claims]
    found = zip(claims, holm([p for p, _ in both]), holm([p for _, p in both]))
    lines = []
    for claim, p, opposite in found:
        mean, n = mean_se(claim.values)[0], len(claim.values)
        word = "reproduced" if p < 0.05 else "contradicted" if opposite < 0.05 else "undecided"
        aim = "above 0" if claim.within is None else f"within {claim.within:g}"
        smaller = min(p, opposite)
        p_text = f"p {smaller:.2g}" if smaller >= 0.001 else "p < 0.001"
        numbers = f"{mean:+.3f} ± {half_width(claim.values):.3f} ({aim}; 95%, {n} seeds), {p_text}"
        if word == "undecided":
            needed = seeds_needed(claim)
            numbers += f"; about {needed} seeds would decide it" if needed else "; too near to decide with 999 seeds"
        lines.append(f"{'not tested here' if quick or n < 4 else word}: {claim.name}: {numbers}"
                     + (f"; {claim.why}" if claim.why else ""))
    return lines


def chosen_and_tested(curves):
    """
    The index of the highest mean over the first half of the seeds, and the curves of the second half, which test it.

    A point that is chosen and tested on the same noise is too good.
    """
    half = (len(curves) + 1) // 2
    means = [sum(points) / half for points in zip(*curves[:half])]
    return means.index(max(means)), curves[half:] or curves


def slope(x, y):
    """The slope of the least-squares line through the points (x, y)."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return (sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
            / sum((a - mean_x) ** 2 for a in x))


# ---- laws: how a reward depends on the distance from the reference ---------------------------------

LAWS = {
    "rl": lambda d: [d, -torch.special.xlogy(d, d)],  # xlogy: 0 log 0 = 0
    "bon": lambda d: [d, -d ** 2],
    "quadratic": lambda d: [torch.ones_like(d), d ** 2, d ** 4],
}


def fit_law(d, R, law):
    """
    Fit a law of the reward R by least squares. Returns its coefficients.

        rl         R = d (alpha - beta log d)    (alpha, beta)   Gao et al. 2023, section 3.1
        bon        R = d (alpha - beta d)        (alpha, beta)   the same paper, for best-of-n
        quadratic  R = a + b KL + c KL^2         (a, b, c)       the rival in Rafailov et al. 2024 (arXiv:2406.02900)

    d (N,): sqrt(KL(policy || reference)), KL in nats. R (N,): the reward of each point. rl and bon are 0 at d = 0.
    """
    columns = law_columns(d, law)
    return torch.linalg.lstsq(columns, columns.new_tensor(R)[:, None]).solution[:, 0]         # (2,) or (3,)


def law_columns(d, law):
    return torch.stack(LAWS[law](torch.tensor(d, dtype=torch.float64)), dim=1)                # (N, 2) or (N, 3)


def law_error(d, R, law, coefficients):
    """The root of the mean squared residual of a law with these coefficients, on points d and R (N,)."""
    columns = law_columns(d, law)
    return (columns @ coefficients - columns.new_tensor(R)).square().mean().sqrt().item()


# ---- parallel jobs --------------------------------------------------------------------------------

def cores():
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def source_key(study):
    """
    A hash of all source that the numbers of a study depend on: the lessons, pipeline/, and its own modules.

    study: the first word of the names of its modules. robust.py and robust_exact.py are one study.
    """
    patterns = ("*.py", "pipeline/*.py", "studies/lab.py", "studies/common.py", f"studies/{study}*.py")
    files = sorted({path for pattern in patterns for path in ROOT.glob(pattern)})
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def job_path(out, function, job):
    """Where the result of a job is kept. The name follows from its arguments and from the source."""
    study = function.__module__.split(".")[-1].split("_")[0]
    key = hashlib.sha256(f"{tuple(job)!r} {source_key(study)}".encode()).hexdigest()[:24]
    return out / "jobs" / f"{function.__name__}-{key}.json"


def run_job(function, job, path):
    """
    Call function(*job) on one thread: the number of threads changes how sums are rounded. An error names the job.

    path: where the result is kept, or None. It is read from there if the job was finished before.
    """
    if path and path.exists():
        return json.loads(path.read_text())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        result = function(*job)
    except UserError:
        raise
    except Exception as fault:
        raise RuntimeError(f"{function.__name__}{tuple(job)!r}: {type(fault).__name__}: {fault}") from fault
    finally:
        torch.set_num_threads(threads)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(result))
        return json.loads(path.read_text())
    return result


def parallel(function, jobs, out=None):
    """
    Compute [function(*job) for job in jobs] in parallel processes, one per core.

    The function must be at the top level of a module. With one core, one job or LAB_SERIAL=1 everything runs in this
    process and gives the same results. The first job that fails stops the rest. out: the folder of the study, in which
    each result is kept when its job ends, so that the same study again computes only those that are missing.
    """
    jobs = list(jobs)
    paths = [out and job_path(out, function, job) for job in jobs]
    missing = sum(path is None or not path.exists() for path in paths)
    workers = min(cores(), missing)
    results = []
    with contextlib.ExitStack() as stack:  # ends the processes and the bar
        run_all = map
        if workers > 1 and os.environ.get("LAB_SERIAL") != "1":
            spawn = multiprocessing.get_context("spawn")  # a fork of a process that has used torch's threads can hang
            quiet = signal.signal, (signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a process without a traceback
            run_all = stack.enter_context(ProcessPoolExecutor(workers, spawn, *quiet)).map
        bar = stack.enter_context(tqdm(total=len(jobs), desc=function.__name__, unit="job", dynamic_ncols=True))
        for result in run_all(run_job, itertools.repeat(function), jobs, paths):
            results.append(result)
            bar.update()
    return results


# ---- tables, pictures, verdicts -------------------------------------------------------------------

def cell(value):
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def table(rows, columns):
    """Rows (dicts) as aligned text: words to the left, numbers to the right, a blank for a missing key."""
    texts = []
    for name in columns:
        cells = [name, *[cell(row.get(name)) for row in rows]]
        width = max(map(len, cells))
        align = str.ljust if any(isinstance(row.get(name), str) for row in rows) else str.rjust
        texts.append([align(text, width) for text in cells])
    return "\n".join("  ".join(line).rstrip() for line in zip(*texts))


def write_csv(path, rows):
    """Write rows (dicts) as a CSV file. Its columns are all keys, in the order in which they first occur."""
    columns = list(dict.fromkeys(itertools.chain(*rows)))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def panel(title, rows, x, y, by, xscale="linear"):
    """Column y against column x: a line for each value of the column `by`, means over seeds with the error of y."""
    lines = []
    for value in dict.fromkeys(column(rows, by)):
        chosen = select(rows, **{by: value})
        (means_x, _), (means_y, errors) = [mean_curve(curves_by_seed(chosen, name)) for name in (x, y)]
        lines.append(dict(label=f"{by} {value}", x=means_x, y=means_y, yerr=errors))
    return dict(title=title, xlabel=x, ylabel=y, xscale=xscale, lines=lines)


def picture(path, panels):
    """
    Draw panels side by side into a PNG file. Without matplotlib it prints what to install, and the study continues.

    A panel is dict(title, xlabel, ylabel, lines, xscale="linear"), a line is dict(label, x, y, yerr=None, style="-").
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # without pyplot: the caller's stays as it is
        from matplotlib.figure import Figure
    except ImportError:
        print(f"no {path}: pip install matplotlib to draw it")
        return
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, panel in zip(all_axes, panels):
        for line in panel["lines"]:
            style = line.get("style", "-")
            axes.errorbar(line["x"], line["y"], line.get("yerr"), fmt=style, label=line["label"], capsize=2)
        axes.set(title=panel["title"], xlabel=panel["xlabel"], ylabel=panel["ylabel"])
        if panel.get("xscale") == "log":  # labels at the points: those of a logarithmic axis overlap
            axes.set_xscale("log")
            axes.set_xticks(panel["lines"][0]["x"], [f"{x:g}" for x in panel["lines"][0]["x"]])
            axes.minorticks_off()
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def publish(out, rows, text, verdicts, panels):
    """Write the files of a study. Returns the text with the verdicts (a list of lines) at its end."""
    out.mkdir(parents=True, exist_ok=True)
    verdict_lines = "\n".join(verdicts)
    (out / "table.txt").write_text(text + "\n", encoding="utf-8")
    (out / "verdict.txt").write_text(verdict_lines + "\n", encoding="utf-8")
    write_csv(out / "results.csv", rows)
    picture(out / "picture.png", panels)
    return text + "\n\n" + verdict_lines
