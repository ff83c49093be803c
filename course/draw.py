"""
Random inputs for the cases of the problems, and how a function is called with them. The names of a case are the
arguments of the function, in order; `part` and `raises` are not among them.
"""

import hashlib
import importlib
import operator
import warnings

import torch
from problems import PROBLEMS, SETS
from values import decode, encode

import mdp
import model as gpt
from data import collate

E, PAD, VOCAB = 9, 10, 11  # of the tiny networks
LEARNED = ("logits", "logp", "values", "x", "losses", "chosen", "rejected", "r_chosen", "r_rejected")


class Draw:
    """Numbers that follow from a text."""

    def __init__(self, text):
        digest = hashlib.sha256(text.encode()).digest()
        self.generator = torch.Generator().manual_seed(int.from_bytes(digest[:6], "big"))

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def integer(self, low, high):
        """An integer from low to high, both included."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def seed(self):
        return self.integer(0, 10 ** 6)

    def between(self, low, high):
        return round(low + (high - low) * float(torch.rand((), generator=self.generator, dtype=torch.float64)), 3)

    def beta(self):
        return self.between(0.2, 0.9)

    def mask(self, B, R):
        """A mask (B, R) of responses of mixed lengths: 1, R, and others between."""
        lengths = torch.tensor([1, R, *(self.integer(1, R) for _ in range(B - 2))])
        return torch.arange(R) < lengths[:, None]

    def masked(self, mask, outside=float("nan")):
        """Normal numbers in the True cells of a mask."""
        return torch.where(mask, self.normal(*mask.shape), outside)

    def texts(self, B=5, prompt=5, response=6):
        """B prompts and responses as ids, of mixed lengths; every other response ends with E."""
        prompts, responses = [], []
        for row in range(B):
            p = (prompt, 1)[row] if row < 2 else self.integer(1, prompt)
            r = (2, response)[row] if row < 2 else self.integer(1, response)
            prompts.append([self.integer(0, E - 1) for _ in range(p)])
            responses.append([self.integer(0, E - 1) for _ in range(r)])
            prompts[-1][0] = PAD  # a word as others: masks come from lengths
            responses[-1][-1] = E if row % 2 else PAD
        return dict(prompts=prompts, responses=responses)


def batch_of(texts):
    return collate(texts["prompts"], texts["responses"], PAD)


def network(seed, block=24, embd=8, heads=2, std=0.3):
    """A tiny GPT in float64 whose weights follow from the seed."""
    model = gpt.GPT(gpt.GPTConfig(VOCAB, block, 2, heads, embd)).to(torch.float64)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


BUILD = {  # arguments that JSON cannot hold
    "tree": lambda sizes: mdp.Tree(*sizes),
    "model": network, "trunk": network, "network": network, "batch": batch_of,
}


def arguments(case):
    return {name: BUILD[name](x) if name in BUILD else x for name, x in case.items() if name not in ("part", "raises")}


def raised(function, *args):
    """The exception that a call raises, "" if none. Subclasses count as the exception that was asked for."""
    try:
        function(*args)
    except NotImplementedError:
        raise
    except Exception as fault:
        return "ValueError" if isinstance(fault, ValueError) else type(fault).__name__
    return ""


def tensors(x):
    """The float tensors in a result, in an order that does not depend on the order of a dict."""
    if isinstance(x, torch.Tensor):
        return [x] if x.is_floating_point() else []
    parts = [x[key] for key in sorted(x)] if isinstance(x, dict) else x if isinstance(x, (list, tuple)) else []
    return [tensor for part in parts for tensor in tensors(part)]


def gradients(output, learned):
    """
    The gradient of a randomly weighted sum of the output with respect to each tensor: zeros where there is none. In a
    plain sum gradients of different cells may cancel.
    """
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in tensors(output)]
    total = sum((x.double() * weight).sum() for x, weight in zip(tensors(output), weights))
    if not getattr(total, "requires_grad", False):
        return {name: torch.zeros_like(x) for name, x in learned.items()}
    found = torch.autograd.grad(total, list(learned.values()), allow_unused=True)
    return {name: torch.zeros_like(x) if slope is None else slope for (name, x), slope in zip(learned.items(), found)}


def called(function, args, compare="gradients"):
    """
    The output of a call. If gradients are compared, also the gradients of its learned inputs, and for the weights of a
    network the lengths of theirs.
    """
    learned = {}
    for name, x in args.items() if compare != "values" else ():
        if isinstance(x, torch.nn.Module):
            learned.update({f"{name}.{key}": weight for key, weight in x.named_parameters()})
        elif name in LEARNED and x.dtype in (torch.float32, torch.float64):
            learned[name] = args[name] = x.detach().requires_grad_()
    batch = str(args.get("batch"))
    output = function(*args.values())
    if compare == "real tokens":  # losses of pads mean nothing
        output = torch.where(args["mask"], output, 0.0)
    found = dict(output=output)
    if "batch" in args:
        found["batch_is_the_same"] = batch == str(args["batch"])
    if learned:
        slopes = gradients(output, learned)
        found["gradient"] = {name: x if name in args else x.norm() for name, x in slopes.items()}
    return found


def runner(module, key):
    """The function that runs a case of a problem: run_KEY of its set, if there is one, or a call as the case says."""
    problem = next(problem for problem in PROBLEMS if problem.key == key)
    lesson, _, name = problem.place.partition(".py::")
    function = operator.attrgetter(name)(importlib.import_module(lesson))

    def run(case):
        if "raises" in case:
            return dict(raised=raised(function, *arguments(case).values()))
        return called(function, arguments(case), problem.compare)
    return getattr(module, f"run_{key}", run)


def expected(number, seed):
    """{key: cases and outputs} of the problems of a set. Trusted: it runs the functions that it finds, here."""
    module, found = importlib.import_module(f"set{number}"), {}
    for problem in SETS[number].problems:
        cases = [encode(case) for case in getattr(module, f"draw_{problem.key}")(Draw(f"{seed} {problem.key}"))]
        run = runner(module, problem.key)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found[problem.key] = dict(cases=cases, expected=[encode(run(decode(case))) for case in cases])
    return found
