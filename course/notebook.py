"""tour.ipynb: made from these cells, never edited. It lies beside the folder `solution` and only calls its modules."""

CELLS = [
    """# A tour of RLHF

Text generation as a decision process, its exact solution, PPO and DPO finding it, and then the same with a small GPT.
Every cell calls a module of `solution/`; nothing is defined here. It runs from top to bottom in about two minutes.""",
    ("import sys, tempfile\n"
     "sys.path.insert(0, 'solution')\n"
     "import torch\n"
     "import estimators, evaluate, lesson, mdp, minirlhf, world"),
    """## 1. A world in which the true reward is known

A prompt sets the scene, a response is a review. `gold` is what people really want: praise, on topic, no repetition.""",
    ("import random\n"
     "rng = random.Random(0)\n"
     "prompt = world.make_prompt(rng)\n"
     "for _ in range(4):\n"
     "    answer = world.make_demonstration(rng, prompt)\n"
     "    print(f'{world.gold(prompt, answer):5.2f}', answer)\n"
     "prompt"),
    """## 2. A decision process that can be solved

Four tokens, three steps, 40 responses. The optimum of E[score] - beta KL(pi || ref) by soft value iteration.""",
    ("beta = 0.5\n"
     "tree, ref, rewards, generator = lesson.problem(0)\n"
     "best = mdp.solve(tree, ref, rewards, beta)\n"
     "J_ref = mdp.objective(tree, ref, ref, rewards, beta)\n"
     "print(f'J(ref) {J_ref:.4f}   J* {best.J:.4f}   KL(pi*||ref) {mdp.kl(tree, best.logp, ref):.4f} nats')\n"
     "for y in mdp.response_logp(tree, best.logp).argsort(descending=True)[:5].tolist():\n"
     "    words = ' '.join(lesson.VOCABULARY[token] for token in tree.leaves[y])\n"
     "    print(f'{mdp.response_logp(tree, best.logp)[y].exp():.3f}  score {rewards[y]:5.2f}  {words}')"),
    """## 3. PPO sees scores of samples, and not the tree""",
    ("for i, policy, sampled in mdp.learn_ppo(tree, ref, rewards, beta, generator):\n"
     "    if i in (0, 5, 10, 20, 50, 100):\n"
     "        share = (mdp.objective(tree, policy, ref, rewards, beta) - J_ref) / (best.J - J_ref)\n"
     "        print(f'iteration {i:3d}   sampled J {sampled:7.4f}   share of the optimum {share:.4f}')"),
    """## 4. DPO sees preferences alone

The labels are drawn from Bradley-Terry. IPO comes to rest elsewhere: at the optimum for the win rate.""",
    ("wins = mdp.win_probabilities(rewards)\n"
     "chosen, rejected = mdp.draw_labels(wins, 400, generator)\n"
     "for kind in ('dpo', 'ipo'):\n"
     "    *_, (step, policy) = mdp.learn_dpo(tree, ref, chosen, rejected, beta, generator, kind)\n"
     "    print(kind, f'KL from pi* {mdp.kl(tree, policy, best.logp):.4f}',\n"
     "          f'from the optimum of IPO {mdp.kl(tree, policy, mdp.solve_ipo(tree, ref, wins, beta).logp):.4f}')"),
    """## 5. What an estimator of the gradient really estimates

All groups of two responses are listed, so mean and variance are sums.""",
    ("for estimator in estimators.ESTIMATORS[:5]:\n"
     "    q = estimators.quality(tree, ref, ref, rewards, beta, estimator, 2)\n"
     "    print(f'{estimator.name:<18} cosine {q.cosine:.3f}   bias {q.bias:.3f}   variance {q.variance:.3f}')"),
    """## 6. The same with a GPT

The whole pipeline, small: pretraining, SFT, preferences, a reward model, PPO, DPO, and the report.""",
    ("folder = tempfile.mkdtemp()\n"
     "minirlhf.main(['--quick', '--overwrite', '--out', folder])"),
    """## 7. Best-of-n needs no training

The mean of the best of n by a proxy that is gold plus noise: the proxy promises more than gold keeps.""",
    ("gold = torch.randn(64, 256, dtype=torch.float64, generator=generator)\n"
     "proxy = gold + torch.randn(64, 256, dtype=torch.float64, generator=generator)\n"
     "for n in (1, 4, 16, 64):\n"
     "    print(f'best of {n:2d}: proxy {evaluate.best_of_n(proxy, proxy, n).mean():.2f}',\n"
     "          f'gold {evaluate.best_of_n(proxy, gold, n).mean():.2f}',\n"
     "          f'KL at most {evaluate.best_of_n_kl(n):.2f} nats')"),
]


def notebook():
    """The notebook as JSON, nbformat 4.5. A text is Markdown if it starts with '#'."""
    cells = []
    for number, source in enumerate(CELLS):
        cell = dict(id=f"cell-{number}", metadata={}, source=source.splitlines(keepends=True))
        if source.startswith("#"):
            cells.append(dict(cell, cell_type="markdown"))
        else:
            cells.append(dict(cell, cell_type="code", execution_count=None, outputs=[]))
    kernel = dict(display_name="Python 3", name="python3")
    return dict(cells=cells, metadata=dict(kernelspec=kernel, language_info=dict(name="python")), nbformat=4,
                nbformat_minor=5)
