"""CCLM and UC2: the official files by name and shape, what else is read and what is refused, the
answer search against brute force, every place of dropout, and texts that share images.
"""

import gzip
import io
import json
import math
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, Bomb, refused
from torch.nn import functional as F

import cclm
import uc2
from cclm import EOS, AnswerTrie, best_answers, draw
from model import file_tensors, read_checkpoint
from tools import uc2_original
from vit import Block, relative_position_index

TASKS = ["xgqa", "xvnli", "xflickrco"]
CCLM_FILES = json.loads((ROOT / "tests/golden/cclm_base_manifest.json").read_text())
CCLM_NAMES = dict(zip(TASKS, ["vqa_model", "classification_model", "retrieval_model"]))
UC2_FILES = json.loads((ROOT / "tests/golden/uc2_base_manifest.json").read_text())
UC2_NAMES = {task: f"volta_task_model_{name}"
             for task, name in zip(TASKS, ["gqa", "xvnli", "retrieval"])}
SMALL_CCLM = cclm.Sizes(
    width=16, vocabulary=50, text_layers=3, cross_layers=2, text_heads=2, cross_heads=2,
    text_feed_forward=24, cross_feed_forward=20, text_positions=30, text_types=1, vision_width=16,
    vision_layers=2, vision_heads=2, vision_feed_forward=32, patch_size=8, image_size=24,
    embed_dim=6, decoder_positions=12)
SMALL_UC2 = uc2.Sizes(width=16, vocabulary=50, layers=3, heads=2, feed_forward=24, positions=20,
                      types=2, features=12, locations=7, labels=5)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def full_size(shapes, aliases=None):
    """A file of full size: every tensor one number, which takes no memory. -1 in a shape: 1,333."""
    tensors = {}
    for i, (name, shape) in enumerate(shapes.items()):
        shape = [1333 if size == -1 else size for size in shape]
        tensors[name] = torch.tensor(float(i), dtype=torch.float16).expand(shape)
    for alias, first in (aliases or {}).items():
        tensors[alias] = tensors[first]
    return tensors


@pytest.fixture(scope="module")
def official_cclm():
    return full_size(CCLM_FILES["pretrain_checkpoint"])


@pytest.fixture(scope="module")
def official_uc2():
    return full_size(UC2_FILES["volta_pretrained"], UC2_FILES["_tied_aliases_volta_pretrained"])


def shapes_of(tensors):
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def small(kind, task="pretraining", **options):
    if kind == "cclm":
        return cclm.CCLM(SMALL_CCLM, task, **options)
    return uc2.UC2(SMALL_UC2, task, **options)


# ---- The official files

@pytest.mark.parametrize("task", TASKS)
def test_official_cclm(task, official_cclm):
    """It loads, and what we would save has the reference model's names, shapes, index buffers and
    aliases; weight decay and rates are the reference's for every parameter.
    """
    with torch.device("meta"):  # names and shapes only
        model = cclm.from_pretrained(official_cclm, {}, task, "file")
    assert cclm.read_sizes(official_cclm, {}, "file") == cclm.Sizes(
        768, 250002, 12, 6, 12, 12, 3072, 3072, 514, 1, 768, 12, 12, 3072, 16, 224, 256)
    expected = CCLM_FILES[CCLM_NAMES[task]]
    assert shapes_of(file_tensors(model)) == expected
    assert len(model.layers) == 18 and model.longest_text == 512
    assert cclm.LABELS == ("contradiction", "entailment", "neutral")  # the reference's class ids
    # parameters, without aliases and buffers: facts on the reference's models
    counts = {"xgqa": 670_089_426, "xvnli": 421_327_683, "xflickrco": 421_719_875}
    assert sum(parameter.numel() for parameter in model.parameters()) == counts[task]

    # what starts anew, and what is left out
    names = set(model.checkpoint_names().values())
    new = {"xgqa": {"text_decoder"}, "xvnli": {"cls_head"}, "xflickrco": set()}[task]
    assert {name.split(".")[0] for name in names - official_cclm.keys()} == new
    unused = {name.split(".")[0] for name in official_cclm.keys() - expected.keys()
              if not name.endswith(("position_ids", "position_index"))}
    contrast = {"temp", "vision_proj", "text_proj", "itm_head"} if task != "xflickrco" else set()
    assert unused == {"mlm_head", "bbox_head"} | contrast

    groups = json.loads((ROOT / "tests/golden/cclm_base_param_groups.json").read_text())
    for name, theirs in model.checkpoint_names().items():
        group = groups["groups"][str(groups[CCLM_NAMES[task]][theirs])]
        assert model.decays(name) == (group["weight_decay"] > 0), theirs
        assert (model.group_of(name) == "vision") == (group["lr"] == "vision_lr"), theirs


@pytest.mark.parametrize("task", TASKS)
def test_official_uc2(task, official_uc2):
    with torch.device("meta"):
        model = uc2.from_pretrained(official_uc2, {}, task, "file")
    assert shapes_of(file_tensors(model)) == UC2_FILES[UC2_NAMES[task]]
    assert model.variant == "volta" and model.sizes.heads == 12 and model.longest_text == 512
    counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
    total = {"xgqa": 281_637_426, "xvnli": 279_631_107, "xflickrco": 279_629_569}[task]
    embeddings = [count for name, count in counts.items() if model.group_of(name) == "embeddings"]
    assert (sum(counts.values()), sum(embeddings)) == (total, 193_983_744)


def test_original_uc2_at_full_size():
    tensors = full_size(UC2_FILES["original_uc2_pretrained"], UC2_FILES["_tied_aliases_original"])
    content, unused = uc2_original.convert(tensors, {}, "file")
    assert shapes_of(content["model"]) == UC2_FILES["volta_pretrained"]
    assert content["config"] == {"variant": "original"} and len(unused) == 16
    extra = tensors | {"extra": torch.zeros(1)}
    for function, arguments, message in (
            (uc2.from_pretrained, (tensors, {}, "xgqa"),
             "not a checkpoint of UC2 (IGLUE's; tools.uc2_original makes it of the authors' own)"),
            (uc2_original.convert, (extra, {}), "unknown tensor 'extra'"),
            (uc2_original.convert, (content["model"], {}), "not UC2's original file")):
        assert message in refused(function, *arguments, "file")


# ---- Strict loading

CHANGES = {  # what is done to a file: a tensor's new value, None to drop it; and the message
    "cclm missing": ({"cross_encoder.encoder.layer.1.output.dense.bias": None},
                     "tensor 'cross_encoder.encoder.layer.1.output.dense.bias' is missing"),
    "cclm missing, unused": ({"bbox_head.0.weight": None, "bbox_head.0.bias": None},
                             "tensor 'bbox_head.0.weight' is missing"),
    "cclm unknown": ({"text_encoder.pooler.dense.weight": torch.zeros(1)},
                     "unknown tensor 'text_encoder.pooler.dense.weight'"),
    "cclm shape": ({"text_proj.bias": torch.zeros(7)},
                   "tensor 'text_proj.bias' has shape [7], expected [6]"),
    "cclm alias": ({"mlm_head.predictions.decoder.bias": None},
                   "tensor 'mlm_head.predictions.decoder.bias' is missing"),
    "cclm other": ({"vision_encoder.patch_embed.proj.weight": None},
                   "not a checkpoint of CCLM: no tensor 'vision_encoder.patch_embed.proj.weight'"),
    "uc2 missing": ({"bert.embeddings.v_LayerNorm.bias": None},
                    "tensor 'bert.embeddings.v_LayerNorm.bias' is missing"),
    "uc2 alias": ({"bert.encoder.layer.2.attention_self.v_key.weight": None},
                  "tensor 'bert.encoder.layer.2.attention_self.v_key.weight' is missing"),
    "uc2 other": ({"bert.embeddings.word_embeddings.weight": None},
                  "not a checkpoint of UC2 (IGLUE's;"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_other_files_are_refused(case):
    kind, (changes, message) = case.split()[0], CHANGES[case]
    tensors = file_tensors(small(kind))
    for name, value in changes.items():
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    module, config = {"cclm": cclm, "uc2": uc2}[kind], small(kind).config()
    for task in TASKS:
        found = refused(module.from_pretrained, tensors, config, task, "file", image_size=24)
        assert found.startswith(f"file: {message}")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("kind", ["cclm", "uc2", "original"])
def test_finetuned_files(kind, task, tmp_path):
    """A model is what its file makes of it; a file of one kind is no file of the other."""
    module, other = {"cclm": (cclm, uc2)}.get(kind, (uc2, cclm))
    model = small(kind, task)
    if kind == "original":
        model = uc2.UC2(replace(SMALL_UC2, variant="original"), task)
    model.eval()
    torch.save({"model": file_tensors(model), "config": model.config()}, tmp_path / "model.pt")
    file = read_checkpoint(tmp_path / "model.pt")
    again = module.from_finetuned(*file, task, "file", dropout=0.0, drop_path=0.0).eval()
    for ours, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(ours))
    batch = small_batch(kind)
    states = model.encode_texts(batch["input_ids"], batch["attention_mask"])
    fused = [m.fuse(states, batch["attention_mask"], m.memory(batch)) for m in (model, again)]
    assert torch.equal(*fused)
    refused(module.from_pretrained, *file, task, "file", image_size=24)
    refused(other.from_finetuned, *file, task, "file")
    refused(module.from_finetuned, *file, TASKS[TASKS.index(task) - 1], "file")


def test_cclm_starts_from_the_pretrained_file():
    model = small("cclm")
    tensors, config = file_tensors(model), model.config()
    xgqa = cclm.from_pretrained(tensors, config, "xgqa", "file", image_size=40)
    # index buffers may be there or not
    without = {name: tensor for name, tensor in tensors.items() if name not in model.constants()}
    assert len(without) == len(tensors) - 3
    again = cclm.from_pretrained(without, config, "xgqa", "file", image_size=40)
    for name, parameter in xgqa.named_parameters():
        if not name.startswith("decoder."):
            assert torch.equal(parameter, again.get_parameter(name))
    assert refused(cclm.from_pretrained, tensors, config, "xgqa", "file", image_size=33) == (
        "file: an image of 33 pixels a side does not divide into patches of 8")


# ---- Files as others write them

def prefixed(prefix):
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


ARGUMENTS = Namespace(lr=1e-4, data=ROOT, best=np.float64(51.5))
WRAPPED = {  # how -> what is saved for the tensors t
    "flat": lambda t: t,
    "DDP": prefixed("module."),
    "compiled DDP": prefixed("module._orig_mod."),
    "Lightning": lambda t: {"state_dict": prefixed("model.")(t), "hyper_parameters": ARGUMENTS,
                            "epoch": 3, "optimizer_states": [{}]},
    "compiled layers": lambda t: {name.replace("layer.0.", "layer.0._orig_mod."): tensor
                                  for name, tensor in t.items()},
    "checkpointed layers": lambda t: {
        name.replace("layer.1.", "layer.1._checkpoint_wrapped_module."): tensor
        for name, tensor in t.items()},
    "config": lambda t: {"model": t, "args": ARGUMENTS, "scaler": None, "config": {"heads": 3}},
    "DeepSpeed": lambda t: {"module": prefixed("module.")(t), "global_steps": 7},
    "nested": lambda t: {"model": {"state_dict": t}, "epoch": 1},
    "parameters": lambda t: {name: torch.nn.Parameter(tensor) for name, tensor in t.items()},
}


@pytest.mark.parametrize("how", WRAPPED)
def test_wrapped_checkpoints_are_read(how, tmp_path):
    tensors = file_tensors(small("uc2"))
    content = WRAPPED[how](tensors)
    # also in torch's older format, where it holds nothing but tensors and plain data
    older = () if how in ("Lightning", "config") else (False,)
    for zipped in (True, *older):
        torch.save(content, tmp_path / "file.pt", _use_new_zipfile_serialization=zipped)
        found, config = read_checkpoint(tmp_path / "file.pt")
        assert found.keys() == tensors.keys() and config == content.get("config", {})
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def saved(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


HEADER = b'{"a": {"dtype": "F32"}}'
ONE = torch.zeros(1)
WRONG = {  # how -> the file's content, and what the line says that it is
    "missing": (None, "No such file or directory"),
    "empty": (b"", "damaged or truncated"),
    "LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:", "a Git LFS pointer"),
    "page": (b"\n<!DOCTYPE html><html>Sign in</html>", "a web page"),
    "JSON": (b'{"error": "not found"}', "JSON text"),
    "gzip": (gzip.compress(b"tensors"), "a gzip archive"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(50), "an HDF5 file"),
    "safetensors": (len(HEADER).to_bytes(8, "little") + HEADER, "a safetensors file"),
    "zip": (b"PK\x05\x06" + bytes(18), "another zip archive"),
    "truncated": (saved({"a": torch.zeros(1000)})[:1000], "another zip archive or a truncated one"),
    "list": (saved([ONE]), "another zip archive"),
    "module": (saved(torch.nn.Linear(1, 1)), "holds no tensors by name, such as"),
    "number": (saved({"a": ONE, "epoch": 3}), "entry 'epoch' is not a tensor"),
    "twice": (saved({"a": ONE, "module.a": ONE}), "entry 'module.a' is not a tensor, or there twice"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_named_for_what_it_is(case, tmp_path):
    content, message = WRONG[case]
    if content is not None:
        (tmp_path / "file.pt").write_bytes(content)
    found = refused(read_checkpoint, tmp_path / "file.pt")
    assert found.startswith(f"{tmp_path / 'file.pt'}: ") and message in found


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_file_is_executed(zipped, tmp_path):
    content = {"model": {"a": torch.ones(1)}, "args": Bomb(tmp_path / "executed")}
    torch.save(content, tmp_path / "file.pt", _use_new_zipfile_serialization=zipped)
    if zipped:  # the call beside the tensors is left out
        assert read_checkpoint(tmp_path / "file.pt")[0] == {"a": torch.ones(1)}
    else:
        refused(read_checkpoint, tmp_path / "file.pt")
    assert not (tmp_path / "executed").exists()


# ---- Answers

def brute_force(decoder, states, mask, answers):
    """log p(answer </s> | question) of every answer, one answer at a time: [Q,A]."""
    columns = []
    for answer in answers:
        ids = torch.tensor([[cclm.BOS, *answer, EOS]]).expand(len(states), -1)
        columns.append(-decoder.answer_losses(states, mask, ids, torch.arange(len(states))))
    return torch.stack(columns, 1)


def run_prefixes(decoder):
    """How many prefixes each later pass through the decoder runs, as a list that grows."""
    sizes = []
    decoder.layers[0].register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    return sizes


@pytest.mark.parametrize("sharpness", [0, 1, 20, 80], ids=["ties", "flat", "sharp", "sharper"])
def test_best_answers_equal_brute_force(sharpness):
    """Answers that share prefixes, are prefixes of others, or are there twice: the first counts.

    Without the word matrix, answers of one length are equally likely: the first is the answer.
    """
    decoder = small("cclm", "xgqa").eval().decoder
    for name, parameter in decoder.named_parameters():
        # larger than at the start: answers that depend on the question
        if parameter.dim() > 1:
            parameter.data.mul_(sharpness if name == "embeddings.word.weight" else 20)
    answers = [[6, 4], [4], [4, 5], [4, 5, 6], [5], [6, 4, 7, 8, 9, 10], [4, 5], [5]]
    for length in torch.randint(1, 5, (30,)).tolist():
        answers.append(torch.randint(4, 50, (length,)).tolist())
    states, mask = torch.randn(40, 5, 16), torch.ones(40, 5, dtype=torch.long)
    mask[3, 2:] = 0
    with torch.inference_mode():
        expected = brute_force(decoder, states, mask, answers)
        trie, sizes = AnswerTrie(answers, "cpu"), run_prefixes(decoder)
        for at_once in (3, 64):
            sizes.clear()
            labels, scores = best_answers(decoder, states, mask, trie, at_once)
            assert torch.allclose(scores, expected.amax(1), atol=1e-5)
            assert torch.equal(labels, expected.argmax(1))
            assert max(sizes) <= at_once  # what bounds the memory
            if sharpness >= 20:
                assert len(labels.unique()) > 5
            if sharpness == 0:
                assert labels.tolist() == [1] * 40 and sum(sizes) <= 40 * len(trie.tokens)


def test_few_prefixes_are_run():
    decoder = small("cclm", "xgqa").eval().decoder
    decoder.bias.data[[5, EOS]] = 10.0  # sure of "5 5 5 </s>" whatever the question
    tokens = range(4, 14)
    trie = AnswerTrie([[a, b, c] for a in tokens for b in tokens for c in tokens], "cpu")
    assert len(trie.tokens) == 1 + 10 + 100 + 1000
    sizes = run_prefixes(decoder)
    labels, _ = best_answers(decoder, torch.randn(1, 5, 16), torch.ones(1, 5), trie)
    assert labels.tolist() == [111]
    assert sizes == [1, 2, 4, 8]  # "", the likeliest of each length, and few others beside them


def test_the_references_ranking_counts_the_first_token_twice():
    model = small("cclm", "xgqa").eval()
    model.decoder.embeddings.word.weight.data.zero_()
    model.decoder.bias.data.fill_(-20.0)
    for token, share in {4: 0.5, 5: 0.2, 6: 0.25, EOS: 0.05}.items():
        model.decoder.bias.data[token] = math.log(share)
    # 0.5 * 0.25 < 0.2, but 0.5 * 0.5 * 0.25 > 0.2 * 0.2
    model.set_answers([[4, 6], [5]])
    batch = small_batch("cclm")
    mask = batch["attention_mask"]
    inputs = model.encode_texts(batch["input_ids"], mask), mask, model.memory(batch)
    assert model.predict(*inputs).tolist() == [1, 1, 1]
    model.answers = "reference"
    assert model.predict(*inputs).tolist() == [0, 0, 0]


def test_an_answer_of_no_weight_teaches_nothing():
    """As in a batch where no question has an answer; otherwise such questions count in the mean."""
    model = small("cclm", "xgqa", dropout=0.0, drop_path=0.0)
    two = {name: tensor[:2] for name, tensor in small_batch("cclm").items()}
    two |= {"answer_ids": torch.tensor([[0, 4, 2]]), "answer_question": torch.tensor([0])}
    one = {name: tensor[:1] for name, tensor in two.items()}
    assert model(two | {"answer_weight": torch.tensor([0.0])}) == 0
    weight = {"answer_weight": torch.tensor([1.0])}
    assert torch.allclose(model(two | weight), model(one | weight) / 2)


# ---- Losses

def test_hard_negatives():
    weights = torch.tensor([[0.0, 1.0], [1.0, 1.0], [1.0, 1.0], [3.0, 1.0]])
    uniform = torch.tensor([0.0, 0.5, 0.499, 0.75])
    assert draw(weights, uniform).tolist() == [1, 1, 0, 1]
    same_image = torch.tensor([[True, False, False], [False, True, True]])
    weights = cclm.negative_weights(torch.tensor([[9.0, 0, 0], [0.0, 9, 9]]), same_image)
    assert (weights[same_image] == 0).all() and (weights[~same_image] > 1e-5).all()


def test_retrieval_items_of_uc2():
    """Four pairs an item from distinct images and captions: the loss of eight pairs written out."""
    batch = small_batch("uc2", images=4, texts=6)
    index = {"image_index": torch.tensor([0, 0, 1, 0, 2, 2, 3, 2]),
             "text_index": torch.tensor([0, 1, 0, 2, 3, 4, 3, 5])}
    model = small("uc2", "xflickrco").eval()
    flat = {}
    for name, tensor in batch.items():
        of_text = name in ("input_ids", "attention_mask")
        flat[name] = tensor[index["text_index" if of_text else "image_index"]]
    assert torch.allclose(model(batch | index), model(flat))


# ---- Dropout and stochastic depth

def small_batch(kind, images=3, texts=3, tokens=6, regions=4):
    """Random texts and images, with the targets of all tasks."""
    lengths = torch.randint(3, tokens + 1, (texts, 1))
    mask = (torch.arange(tokens) < lengths).long()
    ids = torch.randint(4, 50, (texts, tokens))
    batch = {"input_ids": ids * mask + 1 - mask, "attention_mask": mask}
    if kind == "cclm":
        return batch | {"images": torch.randint(256, (images, 3, 24, 24), dtype=torch.uint8)}
    region_mask = torch.arange(regions) < torch.randint(1, regions + 1, (images, 1))
    return batch | {"features": torch.randn(images, regions, 12).half(),
                    "locations": torch.rand(images, regions, 7), "region_mask": region_mask.long()}


TARGETS = {
    ("cclm", "xgqa"): {"answer_ids": torch.tensor([[0, 4, 2], [0, 5, 2], [0, 6, 2]]),
                       "answer_question": torch.arange(3), "answer_weight": torch.ones(3)},
    ("cclm", "xvnli"): {"labels": torch.tensor([0, 1, 2])},
    ("cclm", "xflickrco"): {"image_ids": torch.arange(3), "uniform": torch.full((3, 2), 0.5)},
    ("uc2", "xgqa"): {"targets": torch.eye(3, 5)},
    ("uc2", "xvnli"): {"targets": torch.eye(3)},
    ("uc2", "xflickrco"): {"image_index": torch.tensor([0, 1, 2, 1]),
                           "text_index": torch.tensor([0, 1, 2, 2])},
}


DRAWS = {  # dropouts of states and of attention weights in a pass of the small models
    "cclm xgqa": (20, 11), "cclm xvnli": (13, 7), "cclm xflickrco": (13, 7),
    "uc2 xgqa": (9, 3), "uc2 xvnli": (9, 3), "uc2 xflickrco": (9, 3)}


@pytest.mark.parametrize("name", DRAWS)
def test_every_place_of_dropout(name, monkeypatch):
    """Per layer: after each attention and after the feed-forward, and of each attention's weights;
    once in each of the embeddings and before UC2's head. In evaluation nothing draws."""
    kind, task = name.split()
    model, batch = small(kind, task, drop_path=0.0), small_batch(kind) | TARGETS[kind, task]
    states, attentions = [], []
    dropout, attention = F.dropout, F.scaled_dot_product_attention

    def noted_dropout(hidden, p=0.5, training=True, *rest):
        states.append(p * training)
        return dropout(hidden, p, training, *rest)

    def noted_attention(query, key, value, mask=None, dropout_p=0.0):
        attentions.append(dropout_p)
        return attention(query, key, value, mask, dropout_p)

    monkeypatch.setattr(F, "dropout", noted_dropout)
    monkeypatch.setattr(F, "scaled_dot_product_attention", noted_attention)
    model(batch)
    assert (states.count(0.1), attentions.count(0.1)) == DRAWS[name]
    states.clear(), attentions.clear()
    model.eval()(batch)
    assert not any(states) and not any(attentions)


def test_stochastic_depth():
    """Drop path 0.5, gamma 1, 1,000 images: a branch counts twice or not at all, image by image."""
    block = Block(width=4, heads=2, hidden=8, side=2, drop_path=0.5)
    scale = block.scale(torch.ones(4), 1000)
    assert scale.shape == (1000, 1, 4)
    assert scale.unique().tolist() == [0, 2] and 400 < (scale[:, 0, 0] == 2).sum() < 600
    # of the same image: no branch, either, or both
    images = torch.randn(1, 5, 4).expand(1000, -1, -1)
    outputs = block(images, relative_position_index(2))
    assert len(outputs.round(decimals=4).unique(dim=0)) == 4
    assert torch.equal(block.eval().scale(torch.ones(4), 1000), torch.ones(4))
    # from none in the first block to drop_path in the last
    vision = cclm.CCLM(replace(SMALL_CCLM, vision_layers=3), "xvnli").vision
    assert [block.drop_path for block in vision.blocks] == [0, 0.05, 0.1]


# ---- Sharing and padding

def test_texts_of_cclm_share_images():
    """Questions over fewer images, each encoded once: loss and gradients of the ungrouped batch."""
    model = small("cclm", "xgqa", dropout=0.0, drop_path=0.0)
    batch, index = small_batch("cclm", images=2, texts=3), torch.tensor([0, 1, 1])
    batch |= TARGETS["cclm", "xgqa"]
    losses, gradients = [], []
    for images in ({"image_index": index}, {"images": batch["images"][index]}):
        model.zero_grad()
        loss = model(batch | images)
        loss.backward()
        losses.append(loss.detach())
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert torch.allclose(*losses, rtol=1e-6)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients))


@pytest.mark.parametrize("kind", ["cclm", "uc2"])
def test_scores_under_bf16_do_not_tie(kind):
    model, batch = small(kind, "xflickrco").eval(), small_batch(kind, images=1, texts=500)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        states = model.encode_texts(batch["input_ids"], batch["attention_mask"])
        scores = model.match_scores(states, batch["attention_mask"], model.memory(batch))
    assert scores.dtype == torch.float32 and len(scores.unique()) > 450
