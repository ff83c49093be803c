"""
The other side of the benchmarks: the same work done by transformers and TRL, in any interpreter that has them.

worker.py starts this file as a script and talks to it in lines of JSON. One line from us, one line back:

    (the start)                                     {"torch": "2.13.0", "transformers": "4.57.1", "trl": "0.24.0"}
    {"task": "dpo", "steps": 8, "batch": 32}        {"ready": true}                     the task is built, untimed
    {}, once for each step                          {"seconds": 0.4, "memory": null}    one step is done

An answer with the key "error" ends the task. Weights, prompts and pairs come in a file, so that both sides work on the
same ones. This file imports nothing of this repository, because the other interpreter may lack what that needs.
"""

import copy
import importlib.metadata
import json
import os
import sys
import time
import traceback

import torch


def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# ---- what the tasks share -------------------------------------------------------------------------

def make_network(setup, kind):
    """Make a GPT-2 of transformers, of the class named `kind`, with the weights of the setup and without dropout."""
    import transformers

    config = transformers.GPT2Config(
        **setup["sizes"], num_labels=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=setup["end"], eos_token_id=setup["end"], pad_token_id=setup["pad"])
    model = getattr(transformers, kind)(config)
    missing = model.load_state_dict(setup["weights"], strict=False).missing_keys
    if any(name != "score.weight" for name in missing):  # only the head of a new reward model may keep its own
        raise RuntimeError(f"{kind} has weights that the benchmark lacks: {missing}")
    return model.to(setup["device"])


def make_tokenizer(setup):
    """Make a tokenizer that reads "t<i>" as token i. TRL takes texts, and gets the ids of the benchmark from these."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [f"t{i}" for i in range(setup["sizes"]["vocab_size"])]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=words[setup["end"]],
                                   pad_token=words[setup["pad"]], padding_side="left")


def to_text(ids):
    return " ".join(f"t{i}" for i in ids)


def trainer_arguments(setup):
    """Return the arguments that all trainers of TRL get: float32, no checkpointing, nothing logged, nothing saved."""
    return dict(output_dir=setup["folder"], report_to="none", save_strategy="no", logging_strategy="no",
                disable_tqdm=True, bf16=False, gradient_checkpointing=False, dataloader_pin_memory=False,
                use_cpu=setup["device"] == "cpu", learning_rate=setup["lr"])


def make_callback(tick):
    """Make a callback of a trainer that calls tick() after each step."""
    from transformers import TrainerCallback

    class Ticker(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            tick()

    return Ticker()


# ---- the tasks ------------------------------------------------------------------------------------
# Each function builds what it needs and returns another one, which does all steps and calls tick() after each.

def rollout(setup, order, tick):
    model = make_network(setup, "GPT2LMHeadModel").eval()
    prompts = setup["prompts"][:order["batch"]]
    P = max(len(prompt) for prompt in prompts)
    ids = [[setup["pad"]] * (P - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (P - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    ids = torch.tensor(ids, device=setup["device"])                                           # (B, P)
    mask = torch.tensor(mask, device=setup["device"])                                         # (B, P)

    @torch.no_grad()
    def run():
        for _ in range(order["steps"]):
            output = model.generate(ids, attention_mask=mask, max_new_tokens=setup["cap"], do_sample=True,
                                    temperature=1.0, top_k=0, top_p=1.0, use_cache=True,
                                    eos_token_id=setup["end"], pad_token_id=setup["pad"])
            is_end = output[:, P:] == setup["end"]                                            # (B, R)
            earlier_ends = is_end.cumsum(dim=1) - is_end.long()                               # (B, R)
            tick(tokens=int((earlier_ends == 0).sum()))  # up to and including E
    return run


def ppo(setup, order, tick):
    import trl
    from datasets import Dataset

    if not hasattr(trl, "PPOTrainer"):
        raise RuntimeError("it has no trl.PPOTrainer")
    policy = make_network(setup, "GPT2LMHeadModel")
    reward_model = make_network(setup, "GPT2ForSequenceClassification")
    data = Dataset.from_list([{"input_ids": prompt} for prompt in setup["prompts"]])
    config = trl.PPOConfig(
        **trainer_arguments(setup), temperature=1.0, per_device_train_batch_size=order["batch"],
        local_rollout_forward_batch_size=order["batch"], num_mini_batches=1, num_ppo_epochs=order["epochs"],
        total_episodes=order["batch"] * order["steps"], response_length=setup["cap"], stop_token="eos",
        num_sample_generations=0)
    trainer = trl.PPOTrainer(
        config, make_tokenizer(setup), policy, copy.deepcopy(policy), reward_model, data, copy.deepcopy(reward_model),
        eval_dataset=data, callbacks=[make_callback(tick)])
    return trainer.train


def dpo(setup, order, tick):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = []
    for pair in setup["pairs"]:
        chosen = to_text(pair["chosen"][:-1])  # without E, which TRL adds itself
        rejected = to_text(pair["rejected"][:-1])
        rows.append(dict(prompt=to_text(pair["prompt"]), chosen=" " + chosen, rejected=" " + rejected))
    config = DPOConfig(**trainer_arguments(setup), per_device_train_batch_size=order["batch"],
                       max_steps=order["steps"], precompute_ref_log_probs=True)
    trainer = DPOTrainer(make_network(setup, "GPT2LMHeadModel"), None, config, train_dataset=Dataset.from_list(rows),
                         processing_class=make_tokenizer(setup), callbacks=[make_callback(tick)])
    return trainer.train


TASKS = dict(rollout=rollout, ppo=ppo, dpo=dpo)


# ---- the conversation -----------------------------------------------------------------------------

def converse(setup, tasks, **hello):
    """Say hello, then carry out the orders that come on standard input, until it is closed."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print goes to standard error, and not between the answers
    on_gpu = setup["device"] == "cuda"
    torch.set_num_threads(setup["threads"])
    torch.manual_seed(0)
    started = 0.0
    steps_left = 0

    def answer(**message):
        print(json.dumps(message), file=answers, flush=True)

    def clock():
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def tick(**counts):
        """Answer with the seconds of the step that has just been done, and wait until the next one is asked for."""
        nonlocal started, steps_left
        seconds = clock() - started
        memory = torch.cuda.max_memory_allocated() if on_gpu else None
        steps_left -= 1
        answer(seconds=seconds, memory=memory, **counts)
        if steps_left > 0:
            sys.stdin.readline()
            started = clock()

    answer(**hello)
    for line in iter(sys.stdin.readline, ""):
        order = json.loads(line)
        steps_left = order["steps"]
        try:
            run = tasks[order["task"]](setup, order, tick)
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            answer(ready=True)
            sys.stdin.readline()
            started = clock()
            run()
        except Exception as error:  # what this version cannot do becomes one line of the report
            traceback.print_exc()
            if steps_left > 0:
                message = f"{order['task']}: {type(error).__name__}: {error}"
                answer(error=message.splitlines()[0])


if __name__ == "__main__":
    converse(torch.load(sys.argv[1]), TASKS, torch=torch.__version__, transformers=version("transformers"),
             trl=version("trl"))
