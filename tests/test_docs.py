"""The snippets of docs/library.md run, one after another, on the tiny run."""

import copy
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import dpo

PAGE = Path(__file__).parent.parent / "docs" / "library.md"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


class Board(list):
    """TensorBoard's SummaryWriter, without TensorBoard: the scalars that it is given."""

    def __call__(self, folder):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *fault):
        pass

    def add_scalar(self, name, value, step):
        self.append((name, value, step))


def save_small_model(folder):
    """A Llama with random weights and a tokenizer of a few words, as Hugging Face saves them."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers
    words = {word: i for i, word in enumerate("<unk> <end> why do we sleep ?".split())}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    theirs.chat_template = "{{ messages[0]['content'] }}"
    theirs.save_pretrained(folder)
    config = transformers.LlamaConfig(vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                      num_attention_heads=2, max_position_embeddings=64)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


@pytest.mark.slow
def test_the_snippets_of_the_library_page_run(tiny, files, tmp_path, monkeypatch, capsys):
    """Bug: a snippet names what is not there any more, its reward is not learned, its loss is not the one used."""
    save_small_model(tmp_path / "model")
    board = Board()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=board))
    monkeypatch.setattr(dpo, "dpo_loss", dpo.dpo_loss)  # so that it is put back after the test
    text = PAGE.read_text(encoding="utf-8").replace(MODEL, str(tmp_path / "model"))
    snippets = re.findall(r"^```python\n(.*?)^```", text.replace("runs/default", str(tiny)), re.M | re.S)
    names, printed = {}, []
    for snippet in snippets:
        exec(compile(snippet, PAGE.name, "exec"), names)
        printed.append(capsys.readouterr().out)
    answer, ppo, loss, scalars, pretrained = printed
    assert names["rollout"].response_ids() and answer and pretrained.strip() and not scalars
    scores = [float(score) for score in re.findall(r"score +(-?[\d.]+)", ppo)]
    assert len(scores) == 12 and sum(scores[-3:]) > sum(scores[:3]) + 6
    assert eval(loss)["margin"] > 0
    reference, own = names["reference"], names["run"]
    policy = copy.deepcopy(reference).requires_grad_(True)
    first, _ = next(dpo.train_dpo(policy, reference, own.pairs[0], own.config, seed=0))
    assert first["loss"] == pytest.approx(1, abs=1e-4)  # of the exponential loss; DPO's starts at log 2
    logged = [(f"{row['stage']}/{name}", row[name], row["step"]) for row in files.rows("metrics.jsonl") if "step" in row
              for name in row if name not in ("stage", "step")]
    assert sorted(board) == sorted(logged)
