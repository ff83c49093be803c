"""
A lesson: token generation as an MDP, solved exactly on a tree of 40 responses, and learned by PPO, DPO and IPO.

    python lesson.py             some seconds; every number is compared with the exact solution
    python lesson.py --seed 1    another reference policy, other samples and labels

The numbers come from mdp.py. Letters: S inner states, V vocabulary, Y responses.
"""

import argparse
import signal

import torch

import mdp
from mdp import END, TokenMDP, Tree, kl, objective, response_logp

VOCABULARY = (".", "good", "bad", "very")  # the first one is E


def taste(prompt, response):
    """Score words: good 0.5, bad -0.5, each three times as much after very; -1 if E is missing."""
    score, weight = 0.0, 1.0
    for word in response:
        score += weight * {"good": 0.5, "bad": -0.5}.get(word, 0.0)
        weight = 3.0 if word == "very" else 1.0
    return score if response[-1] == VOCABULARY[END] else score - 1.0


def problem(seed):
    """Draw a problem: its tree, reference (S, V) and rewards (Y,) = taste + noise, and the generator."""
    tree = Tree(len(VOCABULARY), 3)
    generator = torch.Generator().manual_seed(seed)
    ref = torch.randn(tree.S, len(VOCABULARY), generator=generator, dtype=torch.float64)
    scores = [taste((), [VOCABULARY[token] for token in response]) for response in tree.leaves]
    noise = torch.randn(tree.Y, generator=generator, dtype=torch.float64)  # so that no two rewards are equal
    return tree, ref, torch.tensor(scores, dtype=torch.float64) + 0.1 * noise, generator


def print_row(label, *numbers):
    cells = [f"{round(float(x), 4) + 0.0:12.4f}" for x in numbers]  # + 0.0 turns -0.0 into 0.0
    print(f"   {label:>14}" + "".join(cells))


def show_pairs(tree, ref, beta, best, wins, n, steps, generator):
    """Train DPO and IPO on every pair of responses, labelled n times. Returns both and the optimum of IPO."""
    ipo_optimum = mdp.solve_ipo(tree, ref, wins, beta).logp
    chosen, rejected = mdp.draw_labels(wins, n, generator)

    def mean_h(logits):
        f = response_logp(tree, logits) - response_logp(tree, ref)                            # (Y,)
        return (f[chosen] - f[rejected]).mean()

    print("             step  DPO mean h KL(pi||pi*) KL(pi*||pi)  IPO mean h KL(pi||pi*) KL(pi||own)")
    training = mdp.FOR_DPO._replace(steps=steps)
    dpo_run = mdp.learn_dpo(tree, ref, chosen, rejected, beta, generator, "dpo", training)
    ipo_run = mdp.learn_dpo(tree, ref, chosen, rejected, beta, generator, "ipo", training)
    for (step, dpo), (_, ipo) in zip(dpo_run, ipo_run):  # the two train in turns
        if step in (0, 10, 20, 50, 100, 200, 500):
            print_row(step, mean_h(dpo), kl(tree, dpo, best.logp), kl(tree, best.logp, dpo),
                      mean_h(ipo), kl(tree, ipo, best.logp), kl(tree, ipo, ipo_optimum))
    return dpo, ipo, ipo_optimum


def lesson(seed=0, beta=0.5):
    """Print the lesson. Returns each policy's last KL from pi* in nats; for IPO, from IPO's own optimum."""
    tree, ref, rewards, generator = problem(seed)
    best = mdp.solve(tree, ref, rewards, beta)

    print(f"1. Text generation as an MDP\n{mdp.DEFINITION}\n   An episode with E = '.' and horizon 3:\n")
    process = TokenMDP(("the", "film", "was"), 3, VOCABULARY[END], taste)
    state = process.start
    for action in ("very", "good", "."):
        next_state, reward, done = process.step(state, action)
        print(f"   state [{' '.join(state)}]  action [{action}]  reward {reward:.1f}  done {done}")
        state = next_state

    print(f"\n2. The solution: {tree.S} inner states, {tree.Y} responses, score taste + noise, beta {beta}\n")
    J_ref = objective(tree, ref, ref, rewards, beta)
    print(f"   J(ref) = {J_ref:.4f}   J* = {best.J:.4f}   KL(pi*||ref) = {kl(tree, best.logp, ref):.4f} nats")
    print(f"   J* - J(ref) = {best.J - J_ref:.6f} = beta KL(ref||pi*) = {beta * kl(tree, ref, best.logp):.6f}")

    print("\n3. PPO on 1024 sampled responses an iteration. It sees their scores, but not the tree.\n")
    print("        iteration   sampled J     exact J          J* KL(pi||pi*)")
    for i, ppo, J in mdp.learn_ppo(tree, ref, rewards, beta, generator):
        if i in (0, 5, 10, 20, 50, 100):
            print_row(i, J, objective(tree, ppo, ref, rewards, beta), best.J, kl(tree, ppo, best.logp))

    print("\n4. DPO and IPO on all pairs. Each pair is labelled 400 times at random: one response is chosen with")
    print("   probability sigmoid(difference in score). DPO ends near pi*, nearer with more labels. IPO has")
    print("   its own optimum. h is the margin: log pi/ref of the chosen minus log pi/ref of the other.\n")
    wins = mdp.win_probabilities(rewards)
    dpo, ipo, ipo_optimum = show_pairs(tree, ref, beta, best, wins, 400, 200, generator)

    print("\n5. The same pairs, but the better response is always chosen. DPO needs sigmoid(beta h) = 1. No")
    print("   finite h is enough, so h and KL(pi*||pi) grow as long as training runs. IPO aims at")
    print(f"   h = 1 / (2 beta) = {1 / (2 * beta):.1f} in every pair. This is finite, and IPO converges.\n")
    wins = (torch.sign(rewards[:, None] - rewards) + 1) / 2
    certain_dpo, certain_ipo, certain_optimum = show_pairs(tree, ref, beta, best, wins, 1, 500, generator)

    print("\n6. The probabilities of the eight responses that pi* prefers.\n")
    policies = {"ref": ref, "pi*": best.logp, "PPO": ppo, "DPO": dpo, "IPO": ipo,
                "certain_DPO": certain_dpo, "certain_IPO": certain_ipo}
    print("         response       score" + "".join(f"{name:>12}" for name in policies))
    for y in response_logp(tree, best.logp).argsort(descending=True)[:8].tolist():
        words = " ".join(VOCABULARY[token] for token in tree.leaves[y])
        print_row(words, rewards[y], *[response_logp(tree, logits)[y].exp() for logits in policies.values()])

    runs = {"ppo": (ppo, best.logp), "dpo": (dpo, best.logp), "ipo": (ipo, ipo_optimum),
            "certain_dpo": (certain_dpo, best.logp), "certain_ipo": (certain_ipo, certain_optimum)}
    return {name: kl(tree, logits, optimum).item() for name, (logits, optimum) in runs.items()}


def main(argv=None):
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args(argv).seed
    torch.set_num_threads(1)  # tensors this small are slower on several threads
    final = lesson(seed)
    print(f"\nKL from pi*: PPO {final['ppo']:.4f} nats, DPO {final['dpo']:.4f}. Both aim below 0.01.")
    print(f"KL from its own optimum: IPO {final['ipo']:.4f}. Seed {seed}.")


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # with `| head` the program ends quietly
    main()
