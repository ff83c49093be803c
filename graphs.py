"""
Sampling without waiting: the loop over tokens as a CUDA graph (`python minirlhf.py --cuda-graphs`).

A GPU is done with a small network's kernels sooner than Python can ask for them. A graph asks for them all at once: it records what one pass of the
loop launches, and replays that. It can only repeat the same kernels on the same memory, so every rollout takes all steps for all rows, none ends early
and none is dropped; the prompts have the same number of columns; and what goes in is copied to where it was at the recording. The samples are not the
same as without it, because other random numbers meet them; their distribution is.

Letters: B batch, C embedding.
"""

import torch

from model import decode


class Tape:
    """
    Takes the place of `model.decode`, with its arguments and results: recorded at the first call, replayed at all calls.

    A tape serves one model, whose weights change in place, one number of rows, of prompt columns and of steps, one temperature and one generator.
    Raises RuntimeError when the shapes are not those of the first call.
    """

    def __init__(self):
        self.graph = None

    def __call__(self, model, x, cache, max_new_tokens, temperature, generator, end, pad):
        inputs = (x, cache.keys, cache.values, cache.first)                            # x (B, C)
        if self.graph is None:
            self.graph, self.inputs, used = torch.cuda.CUDAGraph(), inputs, cache.used
            if generator is not None:
                self.graph.register_generator_state(generator)
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # what a kernel sets up at its first use cannot be recorded
                decode(model, x, cache, max_new_tokens, temperature, generator, end, pad, watch=False)
            torch.cuda.current_stream().wait_stream(side)
            cache.used = used
            with torch.cuda.graph(self.graph):
                self.results = decode(model, x, cache, max_new_tokens, temperature, generator, end, pad, watch=False)
        for recorded, new in zip(self.inputs, inputs):
            recorded.copy_(new)
        self.graph.replay()
        return [result.clone() for result in self.results]
