"""
The problem sets as data: which function each problem empties, its points, and the hint for who gets it wrong.

A problem is graded by itself: the student's file, with the true functions in the places of earlier problems. So a
mistake costs points at its own problem and at no other.
"""

import hashlib
from typing import NamedTuple


class Problem(NamedTuple):
    number: str      # "4.4"
    place: str       # "ppo.py::gae"
    points: int
    hint: str        # one clause, after a wrong value
    learns: bool = False  # a step between network and loss: its gradients are compared
    seconds: int = 40     # wall clock limit
    tolerance: float = 1e-6

    @property
    def key(self):
        """The name of the function. `draw_KEY` is in setN.py, and visible cases in cases/KEY.json."""
        return self.place.rpartition("::")[2].rpartition(".")[2]

    @property
    def file(self):
        return self.place.partition("::")[0]

    @property
    def set(self):
        return int(self.number.partition(".")[0])


class Set(NamedTuple):
    title: str
    written: int  # points of the written questions, graded by hand
    problems: tuple = ()


SETS = {
    1: Set("Words as actions", 12, (
        Problem("1.1", "mdp.py::TokenMDP.step", 4,
                "an action is appended; the score is paid once, when the episode is done"),
        Problem("1.2", "mdp.py::token_logp", 4,
                "look up the row of the state in which the token was chosen, and zero what is outside the mask", True),
        Problem("1.3", "mdp.py::kl", 4, "the mean is over responses of the policy, not of the reference", True),
        Problem("1.4", "mdp.py::objective", 4, "KL is a price: it is subtracted, times beta", True),
        Problem("1.5", "mdp.py::policy_gradient", 4,
                "differentiate J, not -J, with respect to the logits and not to probabilities"),
        Problem("1.6", "mdp.py::solve", 8, "V is a soft maximum under the reference, from the leaves to the root"),
        Problem("1.7", "estimators.py::state_values", 4,
                "every step pays beta log pi/ref, and the policy's own probabilities weigh what comes"),
        Problem("1.8", "estimators.py::token_scores", 6,
                "the gradient of a log-softmax is one-hot minus probabilities, in the row of the state"),
        Problem("1.9", "estimators.py::quality", 6,
                "the mean is weighted with the probabilities; the variance is of the whole vector, times G"))),
    2: Set("A policy that speaks", 10, (
        Problem("2.1", "model.py::attention_mask", 5,
                "a query at column past + t sees keys from `start` to itself, and a pad sees itself"),
        Problem("2.2", "model.py::KVCache.append", 3, "new columns go behind the old ones, k to k, v to v"),
        Problem("2.3", "model.py::CausalSelfAttention.forward", 6,
                "queries, keys and values lie side by side in that order, and the heads go back in their order", True),
        Problem("2.4", "model.py::GPT.hidden", 8,
                "positions count from `start`, also after a cache, and no value is read from a tensor unless a row may "
                "be too long"),
        Problem("2.5", "model.py::response_hidden", 4,
                "the logits at column P-1 predict the first response token; return it contiguous", True),
        Problem("2.6", "model.py::log_softmax", 4, "divide the logits, in float32 or better", True),
        Problem("2.7", "model.py::generate", 10,
                "a response ends at its first E, which belongs to it; the log-probs are those at the temperature, of "
                "all tokens", seconds=60),
        Problem("2.8", "sft.py::sft_loss", 2, "the mean over all response tokens of the batch, not of rows", True),
        Problem("2.9", "sft.py::train_sft", 4, "the rate rises for 20 steps, then falls", False, 60, 1e-5))),
    3: Set("What people prefer", 18, (
        Problem("3.1", "reward.py::preference_probability", 3,
                "the sigmoid of the difference over the temperature; a flip turns the label round"),
        Problem("3.2", "reward.py::bradley_terry_loss", 4,
                "-log sigmoid of the difference, which must stay finite at -800", True),
        Problem("3.3", "reward.py::last_hidden", 5,
                "the last real token is at P + response length - 1 of its row, not in the last column", True),
        Problem("3.4", "reward.py::RewardModel.scale", 3, "minus mean, over std, in float32", True, 40, 1e-5),
        Problem("3.5", "reward.py::normalise", 5, "measure raw scores: forget the old mean and std first"),
        Problem("3.6", "evaluate.py::best_of_n", 7,
                "sort gold by the proxy; the i-th smallest is the best of n in C(i-1, n-1) of C(N, n) draws"),
        Problem("3.7", "evaluate.py::optimum", 5,
                "beta times the log of a mean of exp(score / beta), through logsumexp"),
        Problem("3.8", "evaluate.py::optimum_mean", 3, "weights exp(score / beta) that add up to 1"),
        Problem("3.9", "evaluate.py::wins", 2, "a tie is one half"))),
    4: Set("PPO", 10, (
        Problem("4.1", "ppo.py::masked_mean", 3, "the sum over the mask, over its count; NaN outside does not matter",
                True),
        Problem("4.2", "ppo.py::kl_estimates", 5,
                "the tokens come from the policy, so the log ratio is log pi - log ref; k3 needs expm1", True),
        Problem("4.3", "ppo.py::token_rewards", 6,
                "the score is paid at the last real token only, and each nat of k1 costs beta"),
        Problem("4.4", "ppo.py::gae", 8, "the reward after E is not yours: nothing outside the mask enters the sum"),
        Problem("4.5", "ppo.py::whiten", 4, "mean and variance of the True cells alone, zero elsewhere",
                tolerance=1e-4),  # whatever keeps the deviation from 0
        Problem("4.6", "ppo.py::clipped_surrogate", 7,
                "the larger of the two negated terms counts; a NaN of a pad must not reach exp", True),
        Problem("4.7", "ppo.py::value_loss", 4,
                "the larger of the two squared errors counts, halved; a NaN of a pad must not reach the square", True),
        Problem("4.8", "reward.py::RewardModel.values", 4,
                "V(s_t) is read where the log-prob of a_t is read, before the action", True, 40, 1e-5),
        Problem("4.9", "mdp.py::learn_ppo", 9,
                "one rollout, then epochs of updates on it; old log-probs and values stay as they were", False, 90,
                1e-5))),
    5: Set("Without a critic, without a reward model", 12, (
        Problem("5.1", "grpo.py::group_advantages", 9,
                "rows of a group are side by side; the deviation has G - 1 under it in grpo, B in reinforce++",
                tolerance=1e-3),  # whatever keeps the deviation from 0
        Problem("5.2", "grpo.py::loss_mean", 5, "the three means divide by different counts", True),
        Problem("5.3", "ratios.py::gspo_surrogate", 4,
                "the geometric mean of the ratios: the mean of the log ratios over real tokens", True),
        Problem("5.4", "ratios.py::cispo_surrogate", 3,
                "the ratio is a weight without a gradient; the gradient comes from log pi", True),
        Problem("5.5", "grpo.py::kl_loss", 2, "k3 of the policy from the reference", True),
        Problem("5.6", "dpo.py::implicit_reward", 2, "beta times the log ratio", True),
        Problem("5.7", "dpo.py::dpo_loss", 9, "h is chosen minus rejected, each measured from the reference", True),
        Problem("5.8", "mdp.py::solve_ipo", 4, "IPO's optimum is that of J for another reward"),
        Problem("5.9", "mdp.py::learn_dpo", 6,
                "the reference's log-probs are computed once; the rate falls linearly", False, 60, 1e-5),
        Problem("5.10", "estimators.py::pair_losses", 6,
                "SimPO and ORPO use means over tokens; KTO's z has no gradient", True))),
    6: Set("The bug hunt", 10),  # hunt.py
    7: Set("Open end", 20),      # open_end.py
}
PROBLEMS = [problem for part in SETS.values() for problem in part.problems]


def variant_seed(course, student):
    """The hexadecimal seed of a student's variant; the common variant for two empty texts."""
    return hashlib.sha256(f"{course.strip()}\n{student.strip().lower()}".encode()).hexdigest()


def points_of(number):
    """The points of a set that are graded by machine."""
    return {6: 40, 7: 20}.get(number) or sum(problem.points for problem in SETS[number].problems)
