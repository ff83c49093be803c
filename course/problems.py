"""
The problem sets as data: which function each problem empties, its points, and the hint for who gets it wrong.

A problem is graded by itself: the student's function, in our files, where the functions of earlier problems are true
and those of later ones empty. So a mistake costs points at its own problem and at no other. Points are all or nothing.
"""

import hashlib
from typing import NamedTuple


class Problem(NamedTuple):
    number: str      # "4.3"
    place: str       # "ppo.py::gae"
    points: int
    title: str
    hint: str        # one clause, after a wrong number
    needs: tuple = ()  # places of later problems that stay true while this one is graded
    seconds: int = 40  # wall clock limit in the grader
    tolerance: float = 1e-6

    @property
    def key(self):
        """The name of the function: `draw_KEY` and `run_KEY` stand in setN.py, visible cases in cases/KEY.json."""
        return self.place.rpartition("::")[2].rpartition(".")[2]

    @property
    def set(self):
        return int(self.number.partition(".")[0])


class Set(NamedTuple):
    title: str
    written: int        # points of the written questions, graded by hand
    leaderboard: str    # the problem whose share of the optimum is shown, "" if none
    problems: tuple


SETS = {
    1: Set("Words as actions", 12, "", (
        Problem("1.1", "mdp.py::TokenMDP.step", 4, "a step of the MDP",
                "an action is appended; the score is paid once, when the episode is done"),
        Problem("1.2", "mdp.py::token_logp", 4, "log-probs of tokens",
                "look up the row of the state in which the token was chosen, and zero what is outside the mask"),
        Problem("1.3", "mdp.py::kl", 4, "the exact KL",
                "the mean is over responses of the policy, not of the reference"),
        Problem("1.4", "mdp.py::objective", 4, "the objective J", "KL is a price: it is subtracted, times beta"),
        Problem("1.5", "mdp.py::policy_gradient", 4, "the exact gradient of J",
                "differentiate J, not -J, with respect to the logits and not to probabilities"),
        Problem("1.6", "mdp.py::solve", 8, "soft value iteration",
                "V is a soft maximum under the reference, from the leaves to the root"),
        Problem("1.7", "estimators.py::state_values", 4, "the value of a state",
                "every step pays beta log pi/ref, and the policy's own probabilities weigh what comes"),
        Problem("1.8", "estimators.py::token_scores", 6, "grad log pi of a token",
                "the gradient of a log-softmax is one-hot minus probabilities, in the row of the state"),
        Problem("1.9", "estimators.py::quality", 6, "bias and variance of an estimator",
                "the mean is weighted with the probabilities; the variance is that of the whole vector, times G"))),
    2: Set("A policy that speaks", 10, "", (
        Problem("2.1", "model.py::attention_mask", 5, "who may see whom",
                "a query at column past + t sees keys from `start` to itself, and a pad sees itself"),
        Problem("2.2", "model.py::CausalSelfAttention.forward", 6, "attention",
                "queries, keys and values lie side by side in that order, and the heads go back in their order",
                ("model.py::KVCache.append",)),
        Problem("2.3", "model.py::KVCache.append", 3, "the cache",
                "new columns go behind the old ones, k to k, v to v"),
        Problem("2.4", "model.py::GPT.hidden", 8, "positions under left padding",
                "positions count from `start`, go on after the cache, and no value is read from a tensor unless the "
                "row may be too long"),
        Problem("2.5", "model.py::response_hidden", 4, "the one slice",
                "the logits at column P-1 predict the first response token; return it contiguous"),
        Problem("2.6", "model.py::log_softmax", 4, "log-probs at a temperature",
                "divide the logits, in float32 or better"),
        Problem("2.7", "model.py::generate", 10, "sampling with a cache",
                "a response ends at its first E, which belongs to it; the log-probs are those at the temperature, of "
                "all tokens", (), 60),
        Problem("2.8", "stages.py::train_sft", 6, "the SFT loss and its loop",
                "the loss is the mean over the response tokens of the batch; the rate rises for 20 steps, then falls",
                (), 60, 1e-5))),
    3: Set("What people prefer", 18, "", (
        Problem("3.1", "reward.py::bradley_terry_loss", 5, "Bradley-Terry",
                "-log sigmoid of the difference, which must stay finite at -800; a margin asks for more"),
        Problem("3.2", "reward.py::last_hidden", 5, "the state that is scored",
                "the last real token is at P + response length - 1 of its row, not in the last column"),
        Problem("3.3", "reward.py::RewardModel.scale", 3, "a normalised score", "minus mean, over std, in float32", (),
                40, 1e-5),
        Problem("3.4", "reward.py::normalise", 5, "normalisation",
                "measure raw scores: forget the old mean and std first"),
        Problem("3.5", "evaluate.py::best_of_n", 7, "best-of-n without bias",
                "sort gold by the proxy; the i-th smallest is the best of n in C(i-1, n-1) of C(N, n) draws"),
        Problem("3.6", "evaluate.py::optimum", 5, "the optimum by reweighting",
                "beta times the log of a mean of exp(score / beta), through logsumexp"),
        Problem("3.7", "evaluate.py::optimum_mean", 3, "a mean under the optimum",
                "weights exp(score / beta) that add up to 1"),
        Problem("3.8", "evaluate.py::wins", 2, "wins and ties", "a tie is one half"))),
    4: Set("PPO", 10, "4.9", (
        Problem("4.1", "ppo.py::masked_mean", 3, "a mean over real tokens",
                "sum over the mask, over its count; NaN outside must not matter"),
        Problem("4.2", "ppo.py::kl_estimates", 5, "three estimates of the KL",
                "the tokens come from the policy, so the log ratio is log pi - log ref; k3 needs expm1"),
        Problem("4.3", "ppo.py::token_rewards", 6, "the reward of a token",
                "the score is paid at the last real token only, and each nat of k1 costs beta"),
        Problem("4.4", "ppo.py::gae", 8, "generalised advantage estimation",
                "the reward after E is not yours: nothing outside the mask enters the sum"),
        Problem("4.5", "ppo.py::whiten", 4, "whitening",
                "mean and variance of the True cells alone, zero elsewhere, and the mean back if it is not shifted"),
        Problem("4.6", "ppo.py::policy_loss", 7, "the clipped surrogate",
                "the larger of the two negated terms counts; a NaN of a pad must not reach exp"),
        Problem("4.7", "ppo.py::value_loss", 4, "the clipped value loss",
                "the larger of the two squared errors counts, halved; a NaN of a pad must not reach the square"),
        Problem("4.8", "reward.py::RewardModel.values", 4, "the critic's values",
                "V(s_t) is read where the log-prob of a_t is read, before the action", (), 40, 1e-5),
        Problem("4.9", "mdp.py::learn_ppo", 9, "the loop, to 0.90 of the optimum",
                "one rollout, then epochs of updates on it; old log-probs and values stay as they were",
                (), 90, 1e-5))),
    5: Set("Without a critic, without a reward model", 12, "", (
        Problem("5.1", "grpo.py::group_advantages", 8, "group advantages",
                "rows of a group are side by side; the deviation has G - 1 under it in grpo, B in reinforce++", (),
                40, 1e-3),  # whatever keeps the deviation from 0
        Problem("5.2", "grpo.py::loss_mean", 5, "three means",
                "response, token and constant divide by different counts"),
        Problem("5.3", "grpo.py::gspo_loss", 4, "one ratio for a response",
                "the geometric mean of the ratios: the mean of the log ratios over real tokens"),
        Problem("5.4", "grpo.py::kl_loss", 2, "the KL as a loss", "k3 of the policy from the reference"),
        Problem("5.5", "dpo.py::implicit_reward", 2, "the implicit reward", "beta times the log ratio"),
        Problem("5.6", "dpo.py::dpo_loss", 9, "DPO, IPO and their relatives",
                "h is chosen minus rejected, each measured from the reference"),
        Problem("5.7", "mdp.py::solve_ipo", 4, "where IPO comes to rest",
                "IPO's optimum is that of J for another reward"),
        Problem("5.8", "mdp.py::learn_dpo", 6, "DPO on the tree",
                "the reference's log-probs are computed once; the rate falls linearly",
                (), 60, 1e-5),
        Problem("5.9", "estimators.py::pair_losses", 6, "SimPO, ORPO, KTO",
                "SimPO and ORPO use means over tokens; KTO's z has no gradient"))),
}
# Where the bugs of the hunt may be: functions that no earlier set asks for, so that no visible case gives them away.
HUNTED = tuple(Problem(f"6.{i}", place, 6, "", "") for i, place in enumerate((
    "data.py::Batch.trim", "data.py::by_length", "data.py::collate_pairs", "data.py::minibatches",
    "checks.py::finite", "checks.py::check_padding", "checks.py::check_start_kl", "checks.py::check_first_ratio",
    "checks.py::check_start_margin", "checks.py::check_trains", "model.py::KVCache.keep",
    "reward.py::train_reward_model", "ppo.py::exact_kl", "ppo.py::train_ppo", "grpo.py::equal_groups",
    "grpo.py::cispo_loss", "grpo.py::train_grpo", "dpo.py::reference_logprobs", "dpo.py::train_dpo",
    "evaluate.py::gain_error", "evaluate.py::standard_error", "evaluate.py::reward_accuracy", "lesson.py::taste",
    "estimators.py::estimates", "robust.py::aggregate", "robust.py::gaussian_nll", "robust.py::robust_reward",
    "robust.py::nominal", "world.py::parse_clause", "world.py::gold")))
HUNT = Set("The bug hunt", 10, "", HUNTED)      # set 6: hunt.py
OPEN = Set("Open end", 20, "7.1", ())           # set 7: open_end.py
TITLES = {**{n: part.title for n, part in SETS.items()}, 6: HUNT.title, 7: OPEN.title}
PROBLEMS = [problem for part in SETS.values() for problem in part.problems]


def variant_seed(course, student):
    """The hexadecimal seed of a student's variant; the common variant for two empty texts."""
    return hashlib.sha256(f"{course.strip()}\n{student.strip().lower()}".encode()).hexdigest()


def points_of(number):
    """The points of a set that are graded by machine."""
    return sum(problem.points for problem in SETS[number].problems)
