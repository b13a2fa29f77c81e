"""CCLM at full size and at none: official files by name and shape, what is refused, one training
step at 384x384, answers through the trie.
"""

import json
import os
from dataclasses import replace

import pytest
import torch
from conftest import ROOT

import cclm
import vit
from cclm import EOS, PAD, AnswerTrie, best_answers
from model import attention, check_file, file_shapes, file_tensors, read_checkpoint

MANIFEST = json.loads((ROOT / "tests" / "golden" / "cclm_base_manifest.json").read_text())
UC2_NAMES = json.loads((ROOT / "tests" / "golden" / "uc2_base_manifest.json").read_text())["volta_pretrained"]
TASK_MODELS = {"xgqa": "vqa_model", "xvnli": "classification_model", "xflickrco": "retrieval_model"}
SMALL = cclm.Sizes(width=16, vocabulary=50, text_layers=3, cross_layers=2, text_heads=2, cross_heads=2,
                   text_feed_forward=24, cross_feed_forward=20,
                   text_positions=30, text_types=1, vision_width=16, vision_layers=2, vision_heads=2,
                   vision_feed_forward=32, patch_size=8, image_size=24,
                   embed_dim=6, decoder_positions=12)


@pytest.fixture(scope="module")
def official():
    """A file with every name and shape of cclm_x2vlm_base.th.

    A tensor is one number, another for each, seen at full size: it takes no memory.
    """
    tensors = {name: torch.tensor(0.001 * (i % 7 + 1)).expand(shape)
               for i, (name, shape) in enumerate(MANIFEST["pretrain_checkpoint"].items())}
    return tensors | {"mlm_head.predictions.decoder.bias": tensors["mlm_head.predictions.bias"]}


def small_file(task="pretraining"):
    torch.manual_seed(0)
    model = cclm.CCLM(SMALL, task)
    return file_tensors(model), model.config()


# ---------------------------------------------------------------------------------------------------------------------
# The official file


def test_sizes_are_read_from_the_file(official):
    sizes = cclm.read_sizes(official, {}, "file")
    assert sizes == cclm.Sizes(768, 250002, 12, 6, 12, 12, 3072, 3072, 514, 1, 768, 12, 12, 3072, 16, 224, 256)


@pytest.mark.parametrize("task", TASK_MODELS)
def test_official_file_gives_the_official_model(task, official):
    """The manifest's checkpoint loads, and what we would save has exactly the reference model's names
    and shapes, buffers and aliases included.
    """
    with torch.device("meta"):  # names and shapes only
        model = cclm.from_pretrained(official, {}, task, 384, "file")
        constants = model.constants()
    expected = {name: tuple(shape) for name, shape in MANIFEST[TASK_MODELS[task]].items()}
    assert file_shapes(model) | {name: tuple(tensor.shape) for name, tensor in constants.items()} == expected
    missing = {name for name in model.checkpoint_names().values() if name not in official}
    new = {"xgqa": lambda name: name.startswith("text_decoder."), "xvnli": lambda name: name.startswith("cls_head."),
           "xflickrco": lambda name: False}[task]
    assert missing == {name for name in expected if new(name)} - constants.keys() - model.aliases().keys()
    unused = {name.split(".")[0] for name in official if name not in expected and name not in constants}
    assert unused == {"mlm_head", "bbox_head"} | ({"temp", "vision_proj", "text_proj", "itm_head"}
                                                  if task != "xflickrco" else set())
    assert len(model.layers) == 18


def test_images_divide_into_patches():
    tensors, config = small_file()
    with pytest.raises(ValueError, match="^file: an image of 33 pixels a side does not divide into patches of 8$"):
        cclm.from_pretrained(tensors, config, "xgqa", 33, "file")


def test_groups_of_parameters_are_the_references(official):
    """Weight decay and the parts with their own learning rate, for every parameter of the three full-size models."""
    groups = json.loads((ROOT / "tests" / "golden" / "cclm_base_param_groups.json").read_text())
    for task, kind in TASK_MODELS.items():
        with torch.device("meta"):
            model = cclm.from_pretrained(official, {}, task, 384, "file")
        for name, official_name in model.checkpoint_names().items():
            group = groups["groups"][str(groups[kind][official_name])]
            assert model.decays(name) == (group["weight_decay"] > 0), official_name
            assert (model.group_of(name) == "vision") == (group["lr"] == "vision_lr"), official_name


@pytest.mark.skipif(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 12e9,
                    reason="needs 12 GB of free memory")
def test_full_size_step_and_evaluation(official):
    """At base size, 384x384, random weights: one training step and one evaluation batch on a CPU."""
    torch.manual_seed(0)
    # the largest matrix; the others begin with the same numbers
    noise = torch.empty(250002 * 768).uniform_(-0.03, 0.03)
    tensors = {name: noise[: tensor.numel()].view(tensor.shape) if tensor.dim() > 1 else tensor
               for name, tensor in official.items() if not name.endswith(("position_index", "position_ids"))}
    model = cclm.from_pretrained(tensors, {}, "xgqa", 384, "file")
    del tensors, noise
    assert sum(parameter.numel() for parameter in model.parameters()) == 670_089_426
    batch = {"images": torch.randint(256, (1, 3, 384, 384), dtype=torch.uint8),
             "input_ids": torch.tensor([[0, 100, 2000, 30000, 2]]),
             "attention_mask": torch.ones(1, 5, dtype=torch.long), "answer_ids": torch.tensor([[0, 4000, 2]]),
             "answer_question": torch.tensor([0]),
             "answer_weight": torch.tensor([1.0])}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    loss = model(batch)
    assert 0 < loss.item() < 100
    loss.backward()
    optimizer.step()
    model.eval()
    model.set_answers([[4000], [5, 6], [7]])
    with torch.inference_mode():
        states = model.encode_texts(batch["input_ids"], batch["attention_mask"])
        assert model.predict(states, batch["attention_mask"], model.memory(batch)).shape == (1,)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize("change, message", [
    (lambda t: t.pop("cross_encoder.encoder.layer.1.output.dense.bias"),
     "file: tensor 'cross_encoder.encoder.layer.1.output.dense.bias' is missing"),
    (lambda t: t.pop("bbox_head.0.weight"), "file: tensor 'bbox_head.0.weight' is missing"),
    (lambda t: t.update({"text_encoder.pooler.dense.weight": torch.zeros(1)}),
     "file: unknown tensor 'text_encoder.pooler.dense.weight'"),
    (lambda t: t.update({"text_proj.bias": torch.zeros(7)}),
     "file: tensor 'text_proj.bias' has shape [7], expected [6]"),
    (lambda t: t.pop("vision_encoder.patch_embed.proj.weight"),
     "file: not a CCLM checkpoint (no tensor 'vision_encoder.patch_embed.proj.weight')"),
])
@pytest.mark.parametrize("task", TASK_MODELS)
def test_other_files_are_refused(change, message, task):
    tensors, config = small_file()
    change(tensors)
    with pytest.raises(ValueError) as error:
        cclm.from_pretrained(tensors, config, task, 24, "file")
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_another_models_file_is_refused():
    with pytest.raises(ValueError, match="not a CCLM checkpoint"):
        cclm.from_pretrained({name: torch.zeros(1) for name in UC2_NAMES}, {}, "xgqa", 384, "file")


def test_buffers_may_be_there_or_not():
    tensors, config = small_file()
    without = {name: tensor for name, tensor in tensors.items()
               if not name.endswith(("position_index", "position_ids"))}
    assert len(without) < len(tensors)
    first, second = (cclm.from_pretrained(t, config, "xvnli", 40, "file") for t in (tensors, without))
    assert all(torch.equal(a, b) for (name, a), b in zip(first.named_parameters(), second.parameters())
               if not name.startswith("cls_head"))


@pytest.mark.parametrize("task", TASK_MODELS)
def test_finetuned_round_trip(task, tmp_path):
    model = cclm.CCLM(SMALL, task)
    torch.save({"model": file_tensors(model), "config": model.config()}, tmp_path / "model.pt")
    tensors, config = read_checkpoint(tmp_path / "model.pt")
    again = cclm.from_finetuned(tensors, config, task, "file")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    with pytest.raises(ValueError):  # a fine-tuned file is no pre-trained one
        cclm.from_pretrained(tensors, config, task, 24, "file")


def test_decoder_starts_from_the_cross_modal_layers():
    tensors, config = small_file()
    model = cclm.from_pretrained(tensors, config, "xgqa", 24, "file")
    for cross, decoder in zip(model.cross_layers, model.decoder.layers):
        assert all(torch.equal(a, b) for a, b in zip(cross.parameters(), decoder.parameters()))
    check_file(model, file_tensors(model), "file")


# ---------------------------------------------------------------------------------------------------------------------
# Answers


def brute_force(decoder, states, mask, answers):
    """log p(answer </s> | question) of every answer by teacher forcing, one answer at a time: [Q,A]."""
    columns = []
    for answer in answers:
        ids = torch.tensor([[cclm.BOS, *answer, EOS]]).expand(len(states), -1)
        columns.append(-decoder.answer_losses(states, mask, ids, torch.arange(len(states))))
    return torch.stack(columns, 1)


@pytest.mark.parametrize("sharpness", [0.0, 1.0, 8.0], ids=["flat", "as initialised", "sharp"])
def test_trie_equals_brute_force(sharpness):
    """Answers that share prefixes, are prefixes of each other, or have up to six tokens; flat and peaked decoders."""
    torch.manual_seed(1)
    model = cclm.CCLM(SMALL, "xgqa").eval()
    model.decoder.embeddings.word.weight.data.mul_(sharpness * 20)
    generator = torch.Generator().manual_seed(2)
    answers = [[4], [4, 5], [4, 5, 6], [5], [6, 4], [6, 4, 7, 8, 9, 10]]
    answers += [torch.randint(4, 50, (int(n),), generator=generator).tolist()
                for n in torch.randint(1, 5, (60,), generator=generator)]
    answers = [list(answer) for answer in dict.fromkeys(map(tuple, answers))]
    states, mask = torch.randn(9, 5, 16), torch.ones(9, 5, dtype=torch.long)
    mask[3, 2:] = 0
    with torch.inference_mode():
        expected = brute_force(model.decoder, states, mask, answers)
        for logits_at_once in (50 * 7, 1 << 20):
            labels, scores = best_answers(model.decoder, states, mask, AnswerTrie(answers, "cpu"), logits_at_once)
            assert torch.allclose(scores, expected.max(1).values, atol=1e-4)
            assert torch.allclose(expected.gather(1, labels[:, None])[:, 0], expected.max(1).values, atol=1e-4)


def test_trie_runs_no_prefix_twice_and_skips_most():
    torch.manual_seed(1)
    model = cclm.CCLM(SMALL, "xgqa").eval()
    model.decoder.bias.data[[5, EOS]] = 10.0  # sure of "5 5 5 </s>" whatever the question
    answers = [[a, b, c] for a in range(4, 14) for b in range(4, 14) for c in range(4, 14)]
    trie, seen = AnswerTrie(answers, "cpu"), []
    step = model.decoder.step
    model.decoder.step = lambda tokens, positions, path, memory, mask: seen.append(
        len(tokens)) or step(tokens, positions, path, memory, mask)
    with torch.inference_mode():
        best_answers(model.decoder, torch.randn(4, 5, 16), torch.ones(4, 5, dtype=torch.long), trie)
    assert len(trie.tokens) == 1 + 10 + 100 + 1000
    assert sum(seen) == 4 * 4  # <s>, 5, 5, 5 for each of four questions: nothing else can beat that answer


def test_bounds_spare_the_vocabulary():
    """A decoder that knows nothing: every first token has to be tried, but few against the whole vocabulary."""
    torch.manual_seed(1)
    model = cclm.CCLM(replace(SMALL, vocabulary=4000), "xgqa").eval()
    answers = [[token] for token in range(4, 304)] + [[token, token + 1] for token in range(4, 304, 3)]
    run, exact = [], []
    step, whole = model.decoder.step, cclm.Normalizer.exact
    model.decoder.step = lambda tokens, *rest: run.append(len(tokens)) or step(tokens, *rest)
    states, mask = torch.randn(5, 5, 16), torch.ones(5, 5, dtype=torch.long)
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(cclm.Normalizer, "exact", lambda self, states: exact.append(len(states)) or whole(self, states))
        labels, scores = best_answers(model.decoder, states, mask, AnswerTrie(answers, "cpu"))
        expected = brute_force(model.decoder, states, mask, answers)
    assert torch.equal(labels, expected.argmax(1)) and torch.allclose(scores, expected.max(1).values, atol=1e-4)
    assert sum(run) >= 5 * 300 and sum(exact) < 5 * 30


def test_attention_with_a_trained_bias():
    """The ViT's own backward pass on a CPU: torch's numbers, for the bias too, which sums over images."""
    torch.manual_seed(0)
    inputs = [torch.randn(3, 2, 7, 4, dtype=torch.double, requires_grad=True) for _ in range(3)]
    inputs.append(torch.randn(1, 2, 7, 7, dtype=torch.double, requires_grad=True))
    gradient = torch.randn(3, 7, 8, dtype=torch.double)
    outputs = [function(*inputs) for function in (attention, vit.BiasedAttention.apply)]
    expected, ours = (torch.autograd.grad(output, inputs, gradient) for output in outputs)
    assert torch.equal(*outputs) and all(torch.allclose(a, b, atol=1e-12) for a, b in zip(expected, ours))


def test_scores_under_bf16_do_not_tie():
    torch.manual_seed(0)
    model = cclm.CCLM(SMALL, "xflickrco").eval()
    ids, mask = torch.randint(4, 50, (500, 8)), torch.ones(500, 8, dtype=torch.long)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        image = model.memory({"images": torch.randint(256, (1, 3, 24, 24), dtype=torch.uint8)})
        scores = model.match_scores(model.encode_texts(ids, mask), mask, image)
    assert len(scores.unique()) > 450


def test_an_answer_of_no_weight_teaches_nothing():
    """What data.py gives for a batch in which no question has an answer; otherwise such questions count in the mean."""
    torch.manual_seed(0)
    model = cclm.CCLM(SMALL, "xgqa", dropout=0.0, drop_path=0.0)
    batch = {"images": torch.randint(256, (2, 3, 24, 24), dtype=torch.uint8),
             "input_ids": torch.tensor([[0, 5, 6, 2], [0, 8, 9, 2]]), "answer_ids": torch.tensor([[0, 4, 2]]),
             "attention_mask": torch.ones(2, 4, dtype=torch.long), "answer_question": torch.tensor([0])}
    first = {name: tensor[:1] for name, tensor in batch.items()}
    one, alone, none = (model(inputs | {"answer_weight": torch.tensor([weight])})
                        for inputs, weight in ((batch, 1.0), (first, 1.0), (batch, 0.0)))
    assert torch.allclose(one, alone / 2) and none == 0
    none.backward()
    assert all(not parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)


def test_texts_sharing_images_share_their_loss():
    """Questions over fewer images, each encoded once: the loss and gradients of the ungrouped batch."""
    torch.manual_seed(0)
    model = cclm.CCLM(SMALL, "xgqa", dropout=0.0, drop_path=0.0)
    images, index = torch.randint(256, (2, 3, 24, 24), dtype=torch.uint8), torch.tensor([0, 1, 1, 0])
    batch = {"input_ids": torch.tensor([[0, 5, 6, 2], [0, 7, 2, PAD], [0, 8, 9, 2], [0, 9, 2, PAD]]),
             "answer_ids": torch.tensor([[0, 4, 2]] * 4),
             "answer_question": torch.arange(4), "answer_weight": torch.ones(4)}
    batch["attention_mask"] = (batch["input_ids"] != PAD).long()
    gradients = []
    for inputs in ({"images": images, "image_index": index}, {"images": images[index]}):
        model.zero_grad()
        loss = model(batch | inputs)
        loss.backward()
        gradients.append((loss.detach(), [parameter.grad.clone() for parameter in model.parameters()]))
    assert torch.allclose(gradients[0][0], gradients[1][0], rtol=1e-6)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(gradients[0][1], gradients[1][1]))
