"""
Sampling without waiting: the loop over tokens as a CUDA graph (`python minirlhf.py --cuda-graphs`).

A GPU is done with a small network's kernels sooner than Python can ask for them. A graph asks for them all at once: it records what one rollout
launches, and replays that. It can only repeat the same kernels on the same memory, so every row takes all steps, even after its E; all prompts have
the same number of columns; and what goes in is copied to where it was at the recording. With the same seed the samples are others than without a
graph, because a rehearsal uses up random numbers and rows that have ended go on drawing them; the distribution that they are drawn from is the same.

Letters: B batch, C embedding.
"""

import torch

from model import sample_tokens


class Tape:
    """
    Takes the place of `model.sample_tokens`, with its arguments and results: recorded at the first call, replayed at all calls.

    A tape serves one model, whose weights change in place, one number of rows, prompt columns and steps, one temperature, one generator, one E and one PAD. Raises
    ValueError when a call wants something else.
    """

    def __init__(self):
        self.settings = None

    def __call__(self, model, x, cache, max_new_tokens, temperature, generator, end, pad):
        inputs = (x, cache.kv, cache.first)                                            # x (B, C)
        settings = (model, x.shape, cache.used, max_new_tokens, temperature, generator, end, pad)
        with torch.cuda.device(x.device):  # streams and graphs belong to the current device
            if self.settings is None:
                self.graph, self.inputs = torch.cuda.CUDAGraph(), inputs
                if generator is not None:
                    self.graph.register_generator_state(generator)
                side = torch.cuda.Stream()
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):  # what a kernel sets up at its first use cannot be recorded
                    sample_tokens(model, x, cache, max_new_tokens, temperature, generator, end, pad, watch=False)
                torch.cuda.current_stream().wait_stream(side)
                cache.used = settings[2]
                with torch.cuda.graph(self.graph):
                    self.results = sample_tokens(model, x, cache, max_new_tokens, temperature, generator, end, pad, watch=False)
                self.settings = settings  # last: a recording that failed is no recording
            elif settings != self.settings:
                raise ValueError("a tape replays one model, batch size, prompt columns, steps, temperature and generator: make another one")
            for recorded, new in zip(self.inputs, inputs):
                recorded.copy_(new)
            self.graph.replay()
            return [result.clone() for result in self.results]
