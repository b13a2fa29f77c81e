"""UC2 at full size: both pre-trained files and all fine-tuned ones by name and shape, what
is refused, and texts that share images.
"""

import json
import os
from dataclasses import replace

import pytest
import torch
from conftest import ROOT

import uc2
from model import file_shapes, file_tensors, select

MANIFEST = json.loads((ROOT / "tests" / "golden" / "uc2_base_manifest.json").read_text())
CCLM_NAMES = json.loads((ROOT / "tests" / "golden" / "cclm_base_manifest.json").read_text())["pretrain_checkpoint"]
TASK_MODELS = {"xgqa": "volta_task_model_gqa", "xvnli": "volta_task_model_xvnli",
               "xflickrco": "volta_task_model_retrieval"}
REGION_WORDS = 1333  # the manifest leaves this size of the original file open (-1)
SMALL = uc2.Sizes(width=16, vocabulary=50, layers=3, heads=2, feed_forward=24, positions=20, types=2, features=12,
                  locations=7, labels=5)


def full_size(kind):
    """The pre-trained file of one naming.

    Each tensor is one number, another for every tensor, seen at full size: it takes no memory.
    """
    names, aliases = {"volta": ("volta_pretrained", "_tied_aliases_volta_pretrained"),
                      "original": ("original_uc2_pretrained", "_tied_aliases_original")}[kind]
    numbers = {name: torch.tensor(float(i), dtype=torch.float16) for i, name in enumerate(MANIFEST[names])}
    return {name: numbers[MANIFEST[aliases].get(name, name)].expand(
        [REGION_WORDS if size == -1 else size for size in shape])
            for name, shape in MANIFEST[names].items()}


@pytest.fixture(scope="module")
def volta():
    return full_size("volta")


@pytest.mark.parametrize("kind, task, first, last, text_norm, image_norm", [
    ("volta", "xgqa", "bert.encoder.layer.0.attention_self.query.weight", "bert.encoder.layer.23.output.dense.bias",
     "bert.embeddings.LayerNorm.weight",
     "bert.embeddings.v_LayerNorm.weight"),
    ("original", "xvnli", "roberta.encoder.layer.0.attention.self.query.weight",
     "roberta.encoder.layer.11.output.dense.bias",
     "roberta.embeddings.LayerNorm.weight", "roberta.img_embeddings.LayerNorm.weight")], ids=["volta", "original"])
def test_pretrained_file_loads(kind, task, first, last, text_norm, image_norm):
    tensors = full_size(kind)
    model = uc2.from_pretrained(tensors, {}, task, "file")
    assert (model.variant, model.naming, model.sizes.heads, len(model.layers)) == (kind, "volta", 12, 12)
    for parameter, name in ((model.layers[0].self_attention.query.weight, first), (model.layers[-1].down.bias, last),
                            (model.text_embeddings.norm.weight, text_norm),
                            (model.region_embeddings.norm.weight, image_norm)):
        assert parameter.dtype == torch.float32 and (parameter == tensors[name].float()).all(), name
    for name, official in uc2.official_names(model, kind).items():
        parameter = model.get_parameter(name)
        if official in tensors:
            assert (parameter == tensors[official].float()).all(), name
        elif name in ("answer_head.3.weight", "label_head.weight"):  # no file has the task's head
            assert len(parameter) == (1842 if task == "xgqa" else 3) and 0.018 < parameter.std() < 0.022
        else:
            assert name.startswith(("answer_head.", "label_head."))


@pytest.mark.skipif(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 6e9,
                    reason="needs 6 GB of free memory")
def test_full_size_step_and_evaluation(volta, deterministic):
    """At base size, 36 regions of 2048 numbers, random weights: one training step and one evaluation batch on a CPU."""
    model = uc2.UC2(uc2.read_sizes(volta, {}, "file"), "xgqa")
    batch = {"features": torch.randn(1, 36, 2048).half(), "locations": torch.rand(1, 36, 7),
             "region_mask": torch.ones(1, 36, dtype=torch.long), "image_index": torch.tensor([0, 0]),
             "input_ids": torch.tensor([[0, 100, 2000, 30000, 2], [0, 250000, 2, 1, 1]]),
             "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]), "targets": torch.zeros(2, 1842)}
    batch["targets"][[0, 1], [5, 1841]] = 1
    before = model(batch)
    assert 0 < before.item() < 10_000
    before.backward()
    torch.optim.SGD(model.parameters(), lr=1e-5).step()
    model.eval()
    with torch.inference_mode():
        assert model(batch) < before
        states = model.encode_texts(batch["input_ids"], batch["attention_mask"])
        assert model.predict(states, batch["attention_mask"], model.memory(batch)).shape == (2,)


@pytest.mark.parametrize("task", TASK_MODELS)
def test_finetuned_file_is_the_official_one(task, volta):
    with torch.device("meta"):
        model = uc2.UC2(uc2.read_sizes(volta, {}, "file"), task)
    assert {name: list(shape) for name, shape in file_shapes(model).items()} == MANIFEST[TASK_MODELS[task]]
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert sum(sizes.values()) == {"xgqa": 281_637_426, "xvnli": 279_631_107, "xflickrco": 279_629_569}[task]
    assert sum(size for name, size in sizes.items() if model.group_of(name) == "embeddings") == 193_983_744
    top = sum(parameter.numel() for layer in model.layers[-3:] for parameter in layer.parameters())
    outside = sum(size for name, size in sizes.items() if model.group_of(name) is not None)
    assert task != "xgqa" or top + outside == 217_846_578  # what the paper's schedule trains in the first epoch


@pytest.mark.parametrize("task", TASK_MODELS)
@pytest.mark.parametrize("variant", ["volta", "original"])
def test_finetuned_round_trip(task, variant, deterministic):
    model = uc2.UC2(replace(SMALL, variant=variant), task).eval()
    again = uc2.from_finetuned(file_tensors(model), model.config(), task, "file").eval()
    assert again.sizes == (model.sizes if task == "xgqa" else replace(model.sizes, labels=again.sizes.labels))
    batch = random_batch(images=2, texts=2)
    inputs = model.encode_texts(batch["input_ids"],
                                batch["attention_mask"]), batch["attention_mask"], model.memory(batch)
    assert torch.equal(model.fuse(*inputs), again.fuse(*inputs))


def altered(tensors, drop=(), add=()):
    return {name: tensor for name, tensor in tensors.items() if name not in drop} | dict(add)


def refused(load, message):
    with pytest.raises(ValueError) as error:
        load()
    assert message in str(error.value) and "\n" not in str(error.value)


def test_other_files_are_refused(volta):
    def load(tensors, config=None):
        return lambda: uc2.from_pretrained(tensors, config or {}, "xvnli", "some.bin")

    first = "bert.encoder.layer.6.attention_self.query.weight"
    alias = "bert.encoder.layer.6.attention_self.v_query.weight"
    image_norm = "bert.embeddings.v_LayerNorm.bias"
    refused(load(altered(volta, drop=[image_norm])),
            f"some.bin: tensor '{image_norm}' is missing (expected shape [768])")
    refused(load(altered(volta, drop=[alias])), f"some.bin: tensor '{alias}' is missing (expected shape [768, 768])")
    refused(load(altered(volta, add={"bert.extra": torch.zeros(1)})), "some.bin: unknown tensor 'bert.extra'")
    refused(load(altered(volta, add={image_norm: torch.zeros(767)})),
            f"some.bin: tensor '{image_norm}' has shape [767], expected [768]")
    with pytest.warns(UserWarning, match="are one tensor under two names, but their values differ"):
        assert (load(altered(volta, add={alias: torch.zeros(768, 768)}))().layers[3].self_attention.query.weight
                == volta[first]).all()
    for name in ("bert.embeddings.word_embeddings.weight", "bert.embeddings.position_embeddings.weight"):
        refused(load(altered(volta, drop=[name])), f"some.bin: not a UC2 checkpoint (no tensor '{name}')")
        refused(load(altered(volta, add={name: torch.zeros(768)})),
                f"some.bin: tensor '{name}' has shape [768], expected a matrix")
    refused(load(altered(volta, drop=[name for name in volta if ".layer.7." in name])),
            "some.bin: tensor 'bert.encoder.layer.7.")
    refused(load(volta, {"variant": "other"}), "some.bin: the config's variant is 'other'")

    original = full_size("original")
    for name in ("vis_cls.decoder.weight", "itm_output.bias", "feat_regress.net.2.weight"):
        refused(load(altered(original, drop=[name])), f"'{name}'")
    refused(load(altered(original, add={"cls.bias": torch.zeros(3)})),
            "some.bin: tensor 'cls.bias' has shape [3], expected [250002]")
    refused(load(altered(original, add={"extra": torch.zeros(3)})), "some.bin: unknown tensor 'extra'")

    refused(load({name: torch.zeros(1) for name in CCLM_NAMES}),
            "some.bin: not a UC2 checkpoint (no tensor 'bert.embeddings.word_embeddings.weight')")
    refused(lambda: uc2.from_finetuned(
        volta, {}, "xgqa", "some.bin"), "some.bin: tensor 'clfs_dict.TASK15.logit_fc.0.weight' is missing")


def test_image_norm_of_the_conversion_is_recognised(volta):
    name = "bert.embeddings.v_LayerNorm"
    identity = {f"{name}.weight": torch.ones(768), f"{name}.bias": torch.zeros(768)}
    assert uc2.image_norm_is_identity(altered(volta, add=identity))
    assert not uc2.image_norm_is_identity(volta) and not uc2.image_norm_is_identity(full_size("original"))


def random_batch(images, texts, regions=4, tokens=6):
    attention_mask = (torch.arange(tokens) < torch.randint(2, tokens + 1, (texts, 1))).long()
    return {"features": torch.randn(images, regions, SMALL.features).half(),
            "locations": torch.rand(images, regions, 7),
            "region_mask": (torch.arange(regions) < torch.randint(1, regions + 1, (images, 1))).long(),
            "input_ids": torch.randint(4, SMALL.vocabulary, (texts, tokens)) * attention_mask + 1 - attention_mask,
            "attention_mask": attention_mask}


def test_texts_that_share_images(deterministic):
    batch, image_index = random_batch(images=2, texts=5), torch.tensor([0, 0, 1, 1, 0])
    batch["targets"] = torch.zeros(5, SMALL.labels)
    batch["targets"][torch.arange(4), torch.tensor([0, 3, 1, 1])] = 1
    model = uc2.UC2(SMALL, "xgqa").eval()
    apart = {name: batch[name][image_index] for name in ("features", "locations", "region_mask")}
    assert torch.allclose(model(batch | {"image_index": image_index}), model(batch | apart))
    inputs = model.encode_texts(batch["input_ids"], batch["attention_mask"]), batch["attention_mask"]
    one = select(model.memory(batch), slice(0, 1))  # one image for all texts
    assert torch.allclose(model.label_logits(*inputs, one),
                          model.label_logits(*inputs, select(one, torch.zeros(5, dtype=torch.long))))


def test_retrieval_items_from_distinct_images_and_captions(deterministic):
    batch = random_batch(images=4, texts=6)
    index = {"image_index": torch.tensor([0, 0, 1, 0, 2, 2, 3, 2]),
             "text_index": torch.tensor([0, 1, 0, 2, 3, 4, 3, 5])}
    model = uc2.UC2(SMALL, "xflickrco").eval()
    flat = {name: batch[name][index["text_index" if name in ("input_ids", "attention_mask") else "image_index"]]
            for name in batch}
    assert torch.allclose(model(batch | index), model(flat))
    scores = model.match_scores(model.encode_texts(flat["input_ids"], flat["attention_mask"]), flat["attention_mask"],
                                model.memory(flat)).sigmoid().tolist()
    expected = sum(max(0, 0.2 + scores[4 * item + k] - scores[4 * item]) for item in range(2) for k in (1, 2, 3)) / 6
    assert model(flat).item() == pytest.approx(expected)


def test_padding_changes_nothing(deterministic):
    model, batch = uc2.UC2(SMALL, "xvnli").eval(), random_batch(images=3, texts=3)
    padded = {"features": torch.cat([batch["features"], torch.randn(3, 2, SMALL.features).half()], 1),
              "locations": torch.cat([batch["locations"], torch.rand(3, 2, 7)], 1),
              "region_mask": torch.nn.functional.pad(batch["region_mask"], (0, 2)),
              "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, 3), value=1),
              "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, 3))}
    logits = [model.label_logits(model.encode_texts(b["input_ids"], b["attention_mask"]), b["attention_mask"],
                                 model.memory(b)) for b in (batch, padded)]
    assert torch.allclose(*logits, atol=1e-6)


def test_scores_under_bf16_do_not_tie(deterministic):
    model, batch = uc2.UC2(SMALL, "xflickrco").eval(), random_batch(images=1, texts=500)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        states = model.encode_texts(batch["input_ids"], batch["attention_mask"])
        scores = model.match_scores(states, batch["attention_mask"], model.memory(batch))
    assert len(scores.unique()) > 450
