"""
The exact part of the study `robust`: the worst of several reward hypotheses, on small tables. See `robust_exact`.

Every policy is an optimum that is computed and not learned. Only the tables are random. A control shows when no
ensemble can help: when all hypotheses share one error.

Letters: N tables, k reward hypotheses.
"""

import torch

from studies.lab import column, difference, mean_se, parallel, publish, select, table, verdict

PROMPTS = 8
RESPONSES = 8
KNOWN = 0.6  # the share of the cells in which a hypothesis knows the gold
BETA = 0.1
WEIGHTS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # of the nominal reward; the rest goes to the worst hypothesis
SMALL = 0.5  # standard deviations of a hypothesis's errors
LARGE = 2.0
SHARED = (0.0, 0.5, 1.0)  # the part of their variance that all hypotheses have in common


def robust_exact(seeds, quick, out):
    """
    Question: is a policy truly better when it is trained against the worst of several reward hypotheses, and when
    is it not?

    Claim (Yan et al. 2024, arXiv:2409.15360): weight E[nominal] + (1 - weight) min_i E[r_i] - beta KL does better
    than the nominal reward alone (weight 1) when labels are right but do not cover everything, and the worst case
    alone (weight 0) learns little. Their toy has 8 prompts and 8 responses, as here, but a network. Here the
    optimum is exact. The nominal reward is one of five hypotheses.

    The paper's min E is not E min. The latter takes each cell's own minimum (`cell`), as Coste et al. 2024 have it
    in arXiv:2310.02743, and is lower. `mean` maximises the mean of the five: it averages, and is not robust.

    Criterion: reproduced if, with the large error and nothing shared, the best weight below 1 beats weight 1 in
    true reward by more than 2 standard errors (paired over tables, 20 at least), and weight 0 is not the best. The
    control is that nothing can help when all hypotheses share one error (Coste et al. 2024, limitations): true
    reward must then differ from weight 1 by less than 1e-6, or the study is wrong and nothing is reproduced.

    seeds: the number of tables; None for the usual one.
    """
    if seeds is None:
        seeds = 6 if quick else 100
    steps = 200 if quick else 3000

    settings = [(size, shared) for size in (SMALL, LARGE) for shared in SHARED]
    jobs = [(size, shared, seeds, steps) for size, shared in settings]
    results = parallel(robust_job, jobs)
    rows = []
    for (size, shared), (golds, _) in zip(settings, results):
        rows += summary_rows(size, shared, golds)
    largest_gap = max(gap for _, gap in results)

    verdicts = [judge_worst_case(rows, largest_gap, quick or seeds < 20)]
    panels = [panel(rows, size) for size in (SMALL, LARGE)]
    return publish(out, rows, table(rows, list(rows[0])), verdicts, panels)


# ---- the optimum ----------------------------------------------------------------------------------

def tilt(ref, rewards, beta):
    """Compute the optimum ref exp(r / beta) / Z of each prompt; ref and rewards (..., prompts, responses)."""
    return torch.softmax(ref.log() + rewards / beta, dim=-1)


def value(policy, rewards):
    """Compute E[r] under a policy, the mean over prompts: (..., prompts, responses) -> (...)."""
    return (policy * rewards).sum(dim=-1).mean(dim=-1)


def solve_robust(ref, nominal, heads, weight, beta, steps=1000):
    """
    Find the policy that maximises the worst case (Yan et al. 2024, equation 7):

        max over pi of  weight E[nominal] + (1 - weight) min_i E[heads_i] - beta KL(pi || ref)

    KL and E are means over prompts. The smallest of k expectations is the smallest of their mixtures, min over w of
    sum_i w_i E[heads_i]. J is concave in pi and linear in w, so max and min can change places. For a given w the
    policy is ref exp((weight nominal + (1 - weight) sum_i w_i heads_i) / beta) / Z, and what w has to minimise is
    the mean over prompts of beta log Z. That is convex in w, and its slope is (1 - weight) E[heads_i].

    The step is w_i <- w_i exp(-rate E[heads_i]), normalised. Each table has its own rate. It grows after a
    step that goes down, and halves after one that does not, which is not taken.

    ref, nominal (N, 8, 8), heads (N, k, 8, 8). Returns the policy (N, 8, 8) and a gap (N,): J is at most that far
    below its maximum.
    """
    def evaluate(w):
        """Return E[heads_i] (N, k), beta log Z (N,) and the policy (N, 8, 8) of the mixture w (N, k)."""
        mixture = (w[:, :, None, None] * heads).sum(dim=1)                                 # (N, 8, 8)
        rewards = weight * nominal + (1 - weight) * mixture
        policy = tilt(ref, rewards, beta)
        height = beta * (ref.log() + rewards / beta).logsumexp(dim=-1).mean(dim=-1)
        return value(policy[:, None], heads), height, policy

    N, k = heads.shape[:2]
    w = torch.full((N, k), 1 / k, dtype=heads.dtype)
    rate = torch.ones(N, 1, dtype=heads.dtype)
    slope, height, policy = evaluate(w)
    for _ in range(steps):
        new_w = torch.softmax(w.clamp(min=1e-30).log() - rate * slope, dim=1)
        new_slope, new_height, new_policy = evaluate(new_w)
        down = new_height <= height                                                        # (N,)
        height = torch.where(down, new_height, height)
        policy = torch.where(down[:, None, None], new_policy, policy)
        down = down[:, None]                                                               # (N, 1)
        w = torch.where(down, new_w, w)
        slope = torch.where(down, new_slope, slope)
        rate = torch.where(down, 1.3 * rate, rate / 2).clamp(1e-6, 1e3)
    mixed = (w * slope).sum(dim=1)                                                         # (N,)
    worst = slope.min(dim=1).values                                                        # (N,)
    return policy, (1 - weight) * (mixed - worst)  # beta log Z bounds the maximum, and J is that far below it


# ---- jobs: a size of error and a shared part, all tables side by side -----------------------------

def draw_tables(seeds, size, shared, k=5):
    """
    Draw N tables: gold and ref (N, 8, 8), and k hypotheses (N, k, 8, 8).

    A hypothesis knows the gold of a random 60% of the cells and is off by size * N(0, 1) in the others. A part
    `shared` of the variance is one error that all hypotheses have.
    """
    tables = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        draws = torch.randn(k + 3, PROMPTS, RESPONSES, generator=generator, dtype=torch.float64)
        holes = torch.rand(k + 1, PROMPTS, RESPONSES, generator=generator, dtype=torch.float64) > KNOWN
        errors = size * draws[2:] * holes  # (k + 1, 8, 8) the last one is shared, and its holes are too
        heads = draws[0] + (1 - shared) ** 0.5 * errors[:k] + shared ** 0.5 * errors[k:]      # (k, 8, 8)
        tables.append((draws[0], torch.softmax(draws[1], dim=-1), heads))
    return [torch.stack(part) for part in zip(*tables)]


def robust_job(size, shared, seeds, steps):
    """Compute the true reward of every policy: {(minimum of, weight): list of N}, and the largest gap of the solver."""
    gold, ref, heads = draw_tables(range(seeds), size, shared)
    nominal = heads[:, 0]
    cell_minimum = heads.min(dim=1).values
    found = {}
    largest_gap = 0.0
    for weight in WEIGHTS:
        policy, gap = solve_robust(ref, nominal, heads, weight, BETA, steps)
        largest_gap = max(largest_gap, gap.max().item())
        found["expectation", weight] = value(policy, gold).tolist()
    for weight in WEIGHTS:
        policy = tilt(ref, weight * nominal + (1 - weight) * cell_minimum, BETA)
        found["cell", weight] = value(policy, gold).tolist()
    found["mean", None] = value(tilt(ref, heads.mean(dim=1), BETA), gold).tolist()
    found["oracle", None] = value(tilt(ref, gold, BETA), gold).tolist()
    found["ref", None] = value(ref, gold).tolist()
    return found, largest_gap


# ---- the summary, the verdict and the picture -----------------------------------------------------

def summary_rows(size, shared, golds):
    """Summarise one setting over its tables. The gain is the true reward above weight 1's on the same table."""
    nominal_golds = golds["expectation", 1.0]
    rows = []
    for (kind, weight), policy_golds in golds.items():
        gold, gold_se = mean_se(policy_golds)
        gain, gain_se = difference(policy_golds, nominal_golds)
        rows.append(dict(error=size, shared=shared, minimum_of=kind, weight=weight, gold=gold, gold_se=gold_se,
                         gain=gain, gain_se=gain_se))
    return rows


def select_policies(rows, size, shared, kind):
    """The rows of one setting and kind of policy, in the order of their weights."""
    return select(rows, error=size, shared=shared, minimum_of=kind)


def best_below_one(curve):
    """Return the row with the most gold among those with a weight below 1; weight 1 is the last row of the curve."""
    return max(curve[:-1], key=lambda row: row["gold"])


def judge_worst_case(rows, largest_gap, small):
    """Compare the rows with the criterion. small: the pass is too small for a verdict."""
    curve = select_policies(rows, LARGE, 0.0, "expectation")
    weight_0 = curve[0]
    best = best_below_one(curve)
    best_at_small_error = best_below_one(select_policies(rows, SMALL, 0.0, "expectation"))
    averaged = select_policies(rows, LARGE, 0.0, "mean")[0]
    control = max(abs(row["gain"]) for row in select(rows, shared=1.0, minimum_of="expectation"))
    why = (f"large error: weight {best['weight']} gains {best['gain']:.3f} ± {best['gain_se']:.3f} over weight 1, "
           f"weight 0 gains {weight_0['gain']:.3f}; small error: weight {best_at_small_error['weight']} gains "
           f"{best_at_small_error['gain']:.3f}; the plain mean of the five gains {averaged['gain']:.3f}; one error "
           f"shared by all: at most {control:.0e}; the solver is within {largest_gap:.0e} of the optimum")
    held = best["gain"] > 2 * best["gain_se"] and best["weight"] > 0 and control < 1e-6
    return verdict(small, held, why)


def panel(rows, size):
    """Plot true reward against the weight of the nominal reward, for one size of error."""
    lines = []
    for kind, shared in (("expectation", 0.0), ("expectation", 0.5), ("expectation", 1.0), ("cell", 0.0)):
        curve = select_policies(rows, size, shared, kind)
        lines.append(dict(label=f"min of {kind}, {shared:.0%} shared", x=list(WEIGHTS), y=column(curve, "gold"),
                          yerr=column(curve, "gold_se"), style="o-" if kind == "expectation" else "s--"))
    averaged = select_policies(rows, size, 0.0, "mean")[0]["gold"]
    lines.append(dict(label="mean of five, 0% shared", x=[0, 1], y=[averaged, averaged], style=":"))
    return dict(title=f"error {size}", xlabel="weight of the nominal reward", ylabel="true reward", lines=lines)
