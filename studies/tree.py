"""
Where a loss on preferences moves probability, on a tree small enough to list every trajectory. See `tree`.

There are three actions and three steps, so there are 27 trajectories. A policy learns from one preference pair.
While it learns, the probability of the chosen trajectory, of the rejected one and of all others is computed
exactly. Only the weights and the pairs are random.

Letters: n policies trained side by side, H hidden units, t steps taken so far.
"""

import itertools

import torch

from dpo import dpo_loss
from studies.lab import Claim, column, judge, mean_curve, mean_se, paired, parallel, publish, table

TRAJECTORIES = torch.tensor(list(itertools.product(range(3), repeat=3)))  # (27, 3)
BASE_3 = torch.tensor([9, 3, 1])  # a trajectory's index is its actions read as a number in base 3
POLICIES = ("rnn", "table")
TREE_LOSSES = ("dpo", "ipo", "slic")  # not "robust": without label noise it is DPO
ONE_APART = "one token apart"
PAIRS = (ONE_APART, "all tokens apart")
FITTED = "fitted to the chosen"
REFERENCES = ("random", FITTED)
EVERY = 20  # steps between two measurements


def tree(seeds, quick, out):
    """
    Question: does a loss on preferences move probability to responses in no pair, and away from the chosen one?

    Claim: Rafailov et al. 2024, arXiv:2406.02900, the tree MDP. In words, with the criteria: docs/studies.md#tree. The
    policy is a tanh RNN of 16 units, whose states share weights. The control is a table of logits, whose states share
    none. With a table, the gradient of h = log p(chosen)/p(rejected) raises the chosen trajectory's actions from the
    state where the two part, and no other action in those states. So p(chosen) cannot fall.
    """
    steps = 60 if quick else 1000
    betas = (0.01, 0.5) if quick else (0.01, 0.1, 0.5)

    settings = list(itertools.product(POLICIES, TREE_LOSSES, betas))
    jobs = [(*setting, seeds, steps) for setting in settings]
    tracks = dict(zip(settings, parallel(tree_job, jobs)))
    rows = [summary_row(*setting, *cell, p) for setting, found in tracks.items() for cell, p in found.items()]
    verdicts = judge(make_claims(tracks, rows, betas), seeds < 20 or quick)
    return publish(out, rows, table(rows, list(rows[0])), verdicts, draw(tracks, rows, betas))


# ---- the policies, n of them side by side ---------------------------------------------------------

def draw_weights(policy, generator, H=16):
    """
    Draw the weights of one policy, a dict of tensors.

    The RNN's have the distributions of torch's Embedding, RNN and Linear. The table has standard normal logits for
    each of the 13 states in which an action is taken.
    """
    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def uniform(*shape):
        return (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1) * H ** -0.5

    if policy == "table":
        return dict(logits=normal(13, 3))
    embed = normal(4, H)  # one row for each action; the fourth is the beginning
    return dict(embed=embed, recur=uniform(H, H), bias=uniform(1, H), out=uniform(H, 3), out_bias=uniform(1, 3))


def rnn_levels(weights):
    """Compute log pi(action | state) of n RNNs: a tensor (n, 3^t, 3) for each step t. Each state is computed once."""
    levels = []
    hidden = torch.tanh(weights["embed"][:, 3:] + weights["bias"])                         # (n, 1, H)
    for _ in range(3):
        logits = hidden @ weights["out"] + weights["out_bias"]
        levels.append(logits.log_softmax(-1))                                              # (n, 3^t, 3)
        recurrent = hidden @ weights["recur"] + weights["bias"]                            # (n, 3^t, H)
        actions = weights["embed"][:, None, :3]                                            # (n, 1, 3, H)
        hidden = torch.tanh(recurrent[:, :, None] + actions).flatten(1, 2)                 # (n, 3^(t+1), H)
    return levels


def trajectory_logp(weights):
    """Compute log p of all trajectories under n policies, (n, 27). The weights are stacked, (n, ...) each."""
    if "logits" in weights:
        levels = weights["logits"].log_softmax(-1).split([1, 3, 9], dim=1)                 # (n, 3^t, 3) for each t
    else:
        levels = rnn_levels(weights)
    logp = levels[0].new_zeros(len(levels[0]), 1)
    for level in levels:
        logp = (logp[:, :, None] + level).flatten(1)                                       # (n, 3^(t+1))
    return logp


def descend(weights, loss, steps, lr):
    """
    Train n policies with Adam, and yield their log p (n, 27) before each step and after the last.

    `loss` maps log p to a sum over the policies, so each one learns as if it were alone.
    """
    optimizer = torch.optim.Adam(weights.values(), lr=lr)
    for step in range(steps + 1):
        logp = trajectory_logp(weights)
        yield logp.detach()
        if step < steps:
            optimizer.zero_grad()
            loss(logp).backward()
            optimizer.step()


# ---- one job: every kind of pair, both references and all seeds side by side ----------------------

def draw_pair(pair, generator):
    """Draw [chosen, rejected]: indices of two trajectories that differ in one action, at any step, or in all three."""
    chosen = torch.randint(0, 3, (3,), generator=generator)
    shift = torch.randint(1, 3, (3,), generator=generator)
    if pair == ONE_APART:
        place = torch.randint(3, (), generator=generator)
        shift = torch.where(torch.arange(3) == place, shift, 0)
    rejected = (chosen + shift) % 3
    return [int(chosen @ BASE_3), int(rejected @ BASE_3)]


def draw_cells(policy, cells):
    """Draw a policy and a pair for each cell (pair, reference, seed): stacked weights (n, ...) and pairs (n, 2)."""
    drawn, pairs = [], []
    for pair, _, seed in cells:
        # each cell has its own generator, so that a seed's numbers do not depend on how many seeds there are
        generator = torch.Generator().manual_seed(seed)
        drawn.append(draw_weights(policy, generator))
        pairs.append(draw_pair(pair, generator))
    weights = {name: torch.stack([one[name] for one in drawn]).requires_grad_() for name in drawn[0]}
    return weights, torch.tensor(pairs)


def fit_to_chosen(weights, pairs, fitted, steps):
    """
    Raise p(chosen), in place, of the policies that `fitted` (n,) marks.

    The loss is 0 once p(chosen) is above 1/2. Adam's momentum carries it on to about 0.85.
    """
    def loss(logp):
        chosen = logp.gather(1, pairs)[:, 0]                                               # (n,)
        return torch.relu(-0.6931 - chosen)[fitted].sum()

    for _ in descend(weights, loss, steps, 1e-2):
        pass


def train_on_pairs(weights, pairs, kind, beta, steps, lr):
    """
    Train each policy on its pair; its reference is the policy as it was at the start.

    Returns p of the chosen, of the rejected and of all other trajectories, (measurements, n, 3): one measurement
    every EVERY steps, the first before the first step.
    """
    ref_chosen, ref_rejected = trajectory_logp(weights).detach().gather(1, pairs).unbind(1)  # (n,) each

    def loss(logp):
        chosen, rejected = logp.gather(1, pairs).unbind(1)                                 # (n,) each
        mean = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta, kind)
        return len(pairs) * mean  # a sum over the policies

    track = []
    for step, logp in enumerate(descend(weights, loss, steps, lr)):
        if step % EVERY == 0:
            in_pair = logp.exp().gather(1, pairs)                                          # (n, 2)
            others = 1 - in_pair.sum(dim=1, keepdim=True)                                  # (n, 1)
            track.append(torch.cat([in_pair, others], dim=1))
    return torch.stack(track)


def tree_job(policy, kind, beta, seeds, steps):
    """Train under one loss, and return the array of train_on_pairs by pair and reference: {(pair, reference): p}."""
    cells = list(itertools.product(PAIRS, REFERENCES, range(seeds)))
    weights, pairs = draw_cells(policy, cells)
    fitted = torch.tensor([reference == FITTED for _, reference, _ in cells])              # (n,)
    fit_to_chosen(weights, pairs, fitted, min(300, steps))
    lr = 2e-3 if policy == "rnn" else 1e-2
    track = train_on_pairs(weights, pairs, kind, beta, steps, lr)                          # (measurements, n, 3)
    track = track.unflatten(1, (len(PAIRS), len(REFERENCES), seeds)).numpy()
    return {(pair, reference): track[:, i, j]
            for i, pair in enumerate(PAIRS) for j, reference in enumerate(REFERENCES)}


# ---- the summary, the verdict and the picture -----------------------------------------------------

def summary_row(policy, kind, beta, pair, reference, p):
    """Summarise one setting: shares of its seeds; p (measurements, seeds, 3): chosen, rejected, others."""
    rises = p[-1, :, 2] > p[0, :, 2] + 1e-9                                                   # (seeds,)
    return dict(policy=policy, loss=kind, beta=beta, pair=pair, reference=reference, others_rise=mean_se(rises)[0],
                both=mean_se(shows(p))[0])


def shows(p):
    """1.0 for each seed that shows the effect, else 0.0."""
    return ((p[-1, :, 0] < p[0, :, 0] - 1e-9) & (p[-1, :, 2] > p[0, :, 2] + 1e-9)).astype(float).tolist()


def make_claims(tracks, rows, betas):
    """The criteria, as claims about one number for each seed; tracks: {setting: {(pair, reference): p}}."""
    low, high = [tracks["rnn", "dpo", beta] for beta in (betas[0], betas[-1])]
    control = max(column(rows, "others_rise", policy="table", loss="dpo", beta=betas[0]))
    claims = [Claim(f"effect, reference {reference}", [x - 0.25 for x in shows(low[ONE_APART, reference])],
                    f"with a table the other mass rises in {control:.0%} of seeds (0% asked)")
              for reference in REFERENCES]
    more = [mean_curve(map(shows, cells.values()))[0] for cells in (low, high)]
    return [*claims, Claim("most at small beta", paired(*more))]


def draw(tracks, rows, betas):
    """The panels: how the two policies learn at the smallest beta, and the effect against beta."""
    panels = []
    for policy in POLICIES:
        p = tracks[policy, "dpo", betas[0]][ONE_APART, FITTED].mean(axis=1)                   # (measurements, 3)
        steps = [EVERY * i for i in range(len(p))]
        lines = [dict(label=label, x=steps, y=p[:, i].tolist())
                 for i, label in enumerate(("chosen", "rejected", "all others"))]
        panels.append(dict(title=f"{policy}, DPO, beta {betas[0]}, {ONE_APART}", xlabel="step",
                           ylabel="probability, mean of seeds", lines=lines))
    lines = []
    for kind, pair in itertools.product(TREE_LOSSES, PAIRS):
        y = [mean_se(column(rows, "both", policy="rnn", loss=kind, beta=beta, pair=pair))[0] for beta in betas]
        lines.append(dict(label=f"{kind}, {pair}", x=list(betas), y=y, style="o-" if pair == ONE_APART else "s--"))
    panels.append(dict(title="rnn: seeds that show the effect", xlabel="beta", ylabel="share of seeds", xscale="log",
                       lines=lines))
    return panels
