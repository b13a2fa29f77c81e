"""The code of docs/schedule.md in the loops it is written for; skipped where a library is missing.

pip install transformers accelerate lightning peft; run with transformers 5.24, lightning 2.6.6, peft
0.21.2.
"""

import re

import pytest
import torch
from conftest import ROOT

from schedule import apply, suf

PAGE = (ROOT / "docs" / "schedule.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n([^`]*)```", PAGE)
EXAMPLES = [{"input_ids": torch.arange(4) + i, "labels": torch.tensor(i % 3)} for i in range(8)]


def run_block(mark, names, instead=None):
    """Execute the page's only block of code that contains `mark`, with these names."""
    (code,) = [block for block in BLOCKS if mark in block]
    exec(code.replace(mark, instead or mark), names)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def layers_that_differ(before, after):
    """Indices of the layers in which any tensor differs."""
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    return {int(number) for number in re.findall(r"layers?\.(\d)\.", " ".join(changed))}


# ---- Hugging Face Trainer

def trainer_names(folder, **options):
    """What the page's code expects (a tiny XLM-R of 6 layers) and its callback, as {name: object}."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    config = transformers.XLMRobertaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=6, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    torch.manual_seed(0)
    model = transformers.XLMRobertaForSequenceClassification(config)
    arguments = transformers.TrainingArguments(
        folder, num_train_epochs=2, per_device_train_batch_size=2, learning_rate=1e-3, save_strategy="epoch",
        lr_scheduler_type="constant", report_to=[], use_cpu=True, disable_tqdm=True, **options)
    names = {"model": model, "arguments": arguments, "examples": EXAMPLES}
    run_block("(TrainerCallback)", names)
    return names


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 3, "gradient_checkpointing": True}],
                         ids=["plain", "accumulation and checkpointing"])
def test_trainer_thaws_and_resumes(tmp_path, options):
    """k = 3 of 6 layers, 2 epochs; stopped after the first and resumed, the same weights."""
    names = trainer_names(tmp_path, **options)
    before = weights(names["model"])
    run_block("trainer.train()", names)
    straight = weights(names["model"])
    checkpoint = min(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    after_first = weights(type(names["model"]).from_pretrained(checkpoint))
    assert layers_that_differ(before, after_first) == {3, 4, 5}
    assert layers_that_differ(before, straight) == {0, 1, 2, 3, 4, 5}

    resumed = trainer_names(tmp_path / "resumed", **options)
    run_block("trainer.train()", resumed, f"trainer.train(resume_from_checkpoint='{checkpoint}')")
    torch.testing.assert_close(weights(resumed["model"]), straight, rtol=0, atol=0)


def test_trainer_with_apply_too_early_is_named(tmp_path):
    """Its optimizer then holds 41 of 105 parameters."""
    names = trainer_names(tmp_path)
    apply(names["model"].roberta.encoder.layer, suf(0, 6, k=2))
    with pytest.raises(ValueError, match=r"encoder\.layer\.0\..* is not in the optimizer"):
        run_block("trainer.train()", names)
    groups = names["trainer"].optimizer.param_groups
    assert sum(len(group["params"]) for group in groups) == 41
    assert len(list(names["model"].parameters())) == 105


def test_peft_adapters_thaw(tmp_path):
    pytest.importorskip("peft")
    names = trainer_names(tmp_path)
    run_block("get_peft_model", names)
    model, before = names["model"], weights(names["model"])
    callback = names["Unfreeze"](names["layers"], names["outside"], 2)
    names["Trainer"](model, names["arguments"], train_dataset=EXAMPLES, callbacks=[callback]).train()
    after = weights(model)
    assert layers_that_differ(before, after) == {2, 3, 4, 5}
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert sum("lora_B" in name for name in moved) == 8  # of queries and values
    assert all("lora_" in name or "modules_to_save" in name for name in moved)


# ---- Lightning

def test_lightning_thaws_and_resumes(tmp_path):
    """k = 1 of 3 layers, 3 epochs; resumed after the first, the same weights."""
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layers = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
            self.head = torch.nn.Linear(4, 1)
            self.history = [weights(self)]  # at the start, and after every epoch

        def training_step(self, batch, _):
            return self.head(self.layers(batch)).square().mean()

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

        def on_train_epoch_end(self):
            self.history.append(weights(self))

    def fit(folder, checkpoint=None):
        names, module = {}, Module()
        run_block("(Callback)", names)
        callbacks = [names["Unfreeze"](list(module.layers), [module.head], 1),
                     lightning.pytorch.callbacks.ModelCheckpoint(folder, "{epoch}", save_top_k=-1)]
        trainer = lightning.Trainer(max_epochs=3, accelerator="cpu", logger=False, enable_progress_bar=False,
                                    enable_model_summary=False, callbacks=callbacks)
        data = torch.utils.data.DataLoader(torch.arange(24.0).view(6, 4) / 24, batch_size=2)
        trainer.fit(module, data, ckpt_path=checkpoint)
        return module.history

    straight = fit(tmp_path / "straight")
    moved = [layers_that_differ(before, after) for before, after in zip(straight, straight[1:])]
    assert moved == [{2}, {1, 2}, {0, 1, 2}]
    resumed = fit(tmp_path / "resumed", str(tmp_path / "straight" / "epoch=0.ckpt"))
    assert len(resumed) == 3  # two epochs
    torch.testing.assert_close(resumed[-1], straight[-1], rtol=0, atol=0)


# ---- safetensors

def test_safetensors_takes_the_official_file(tmp_path, monkeypatch):
    save_file = pytest.importorskip("safetensors.torch").save_file
    monkeypatch.chdir(tmp_path)
    tensors = torch.load(ROOT / "miniature" / "cclm.pt", weights_only=True)["model"]
    with pytest.raises(RuntimeError, match="share memory"):
        save_file(tensors, "model.safetensors")
    run_block("save_file", {"save_file": save_file, "tensors": tensors})
    loaded = pytest.importorskip("safetensors.torch").load_file("model.safetensors")
    torch.testing.assert_close(loaded, dict(tensors), rtol=0, atol=0)
