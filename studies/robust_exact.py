"""
The exact part of the study `robust`: the worst of several reward hypotheses, on small tables. See `robust_exact`.

Every policy is an optimum that is computed and not learned. Only the tables are random.

Letters: N tables, k reward hypotheses.
"""

import torch

from studies.lab import Claim, column, judge, mean_se, paired, parallel, publish, select, table

PROMPTS = 8
RESPONSES = 8
BETA = 0.1
WEIGHTS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # of the nominal reward; the rest goes to the worst hypothesis
ERRORS = ("over", "under", "both", "shared")


def robust_exact(seeds, quick, out):
    """
    Question: is a policy truly better when it is trained against the worst of several reward hypotheses, and when
    is it not?

    Claim (Yan et al. 2024, arXiv:2409.15360): weight E[nominal] + (1 - weight) min_i E[r_i] - beta KL does better
    than the nominal reward alone. Criteria: docs/studies.md#robust. The paper's min E is not E min, which takes each
    cell's own minimum (`cell`), as Coste et al. 2024 have it in arXiv:2310.02743, and is lower. The nominal reward is
    the mean of five hypotheses: against one of the five, any mixture averages, and averaging alone helps.

    seeds: the number of tables.
    """
    jobs = [(error, seeds, 200 if quick else 3000) for error in ERRORS]
    results = parallel(robust_job, jobs)
    golds = {error: found for error, (found, _) in zip(ERRORS, results)}
    rows = [row for error in ERRORS for row in summary_rows(error, golds[error])]
    lines = judge(make_claims(golds), seeds < 20 or quick)
    control = max(abs(row["gain"]) for row in select(rows, error="shared") if row["weight"] is not None)
    gap = max(gap for _, gap in results)
    lines.append(f"control: with one shared error the true reward changes by at most {control:.0e}; the solver is "
                 f"within {gap:.0e} of the optimum")
    return publish(out, rows, table(rows, list(rows[0])), lines, [panel(rows, error) for error in ERRORS])


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


# ---- jobs: a kind of error, all tables side by side -----------------------------------------------

def draw_tables(seeds, error, k=5):
    """Draw N tables: gold and ref (N, 8, 8), and k hypotheses (N, k, 8, 8), which are wrong by this kind of error."""
    tables = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        gold, ref, *draws = torch.randn(k + 2, PROMPTS, RESPONSES, generator=generator, dtype=torch.float64)
        places = torch.rand(k, PROMPTS, RESPONSES, generator=generator, dtype=torch.float64)
        if error == "both":
            errors = 2 * torch.stack(draws) * (places > 0.6)                                  # (k, 8, 8)
        else:
            errors = (-4.0 if error == "under" else 4.0) * (places > 0.9)
        if error == "shared":
            errors = errors[:1].expand(k, -1, -1)
        tables.append((gold, torch.softmax(ref, dim=-1), gold + errors))
    return [torch.stack(part) for part in zip(*tables)]


def robust_job(error, seeds, steps):
    """Compute the true reward of every policy: {(minimum of, weight): list of N}, and the largest gap of the solver."""
    gold, ref, heads = draw_tables(range(seeds), error)
    nominal = heads.mean(dim=1)
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
    found["one of five", None] = value(tilt(ref, heads[:, 0], BETA), gold).tolist()
    found["oracle", None] = value(tilt(ref, gold, BETA), gold).tolist()
    return found, largest_gap


# ---- the summary, the verdict and the picture -----------------------------------------------------

def summary_rows(error, golds):
    """Summarise one kind of error over its tables. The gain is the true reward above the mean's on the same table."""
    rows = []
    for (kind, weight), policy_golds in golds.items():
        gold, gold_se = mean_se(policy_golds)
        gain, gain_se = mean_se(paired(policy_golds, golds["cell", 1.0]))
        rows.append(dict(error=error, minimum_of=kind, weight=weight, gold=gold, gold_se=gold_se, gain=gain,
                         gain_se=gain_se))
    return rows


def make_claims(golds):
    """The criteria, one number for each table; golds: {error: what robust_job found}."""
    def gain(error, kind):
        return paired(golds[error][kind, 0.0], golds[error]["cell", 1.0])

    def loss(error, kind):
        return paired(golds[error]["cell", 1.0], golds[error][kind, 0.0])

    return [Claim("over: the cell minimum above the mean", gain("over", "cell")),
            Claim("over: the minimum of expectations above the mean", gain("over", "expectation")),
            Claim("under: the mean above the cell minimum", loss("under", "cell")),
            Claim("both: the mean above the cell minimum", loss("both", "cell"))]


def panel(rows, error):
    """Plot true reward against the weight of the nominal reward, for one kind of error."""
    lines = []
    for kind, style in (("expectation", "o-"), ("cell", "s--")):
        curve = select(rows, error=error, minimum_of=kind)
        lines.append(dict(label=f"min of {kind}", x=list(WEIGHTS), y=column(curve, "gold"),
                          yerr=column(curve, "gold_se"), style=style))
    return dict(title=f"errors: {error}", xlabel="weight of the nominal reward", ylabel="true reward", lines=lines)
