"""Numbers of the reference implementations, reproduced: every file of the folder GOLDEN_DIR (default tests/golden).

A file's kind is the end of its name, its sizes are its content: files of other sizes and
seeds run through the same tests unchanged.
"""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from PIL import Image

import cclm
import data
import eval as evaluation
import train
import uc2
from cclm import AnswerTrie, best_answers
from model import copy_tensors, file_tensors, key_mask, select
from vit import IMAGE_STD, geometric_offsets, normalize, resize_position_table


def files(ending, but=()):
    """Every golden file of one kind, as pytest parameters; `but`: longer endings that are another kind."""
    found = [path for path in sorted(GOLDEN.glob(f"*{ending}")) if not path.name.endswith(tuple(but))]
    return pytest.mark.parametrize("path",
                                   found or [pytest.param(None, marks=pytest.mark.skip(f"no *{ending} in {GOLDEN}"))],
                                   ids=[path.stem for path in found] or ["none"])


def load(path):
    return torch.load(path, weights_only=True)


def assert_close(actual, expected, tolerance=1e-5):
    """Largest error relative to the largest expected value."""
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-12)
    assert error <= tolerance, f"relative error {error:.2e}"


def assert_gradients(model, norms, tolerance=1e-4):
    """Gradient norm of every parameter the reference lists (-1: it has none there).

    Key biases have no gradient but rounding noise: skipped.
    """
    ours = {theirs: name for name, theirs in model.checkpoint_names().items()}
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    largest = max(float(norm) for norm in norms.values())
    compared = 0
    for theirs, norm in norms.items():
        if theirs not in ours or theirs.endswith("key.bias"):
            continue
        gradient = gradients[ours[theirs]]
        if norm < 0:
            assert gradient is None, theirs
            continue
        difference = f"{theirs}: {gradient.norm():.6g}, reference {norm:.6g}"
        assert abs(gradient.norm() - norm) <= tolerance * max(float(norm), 1e-4 * largest), difference
        compared += 1
    assert compared > 0.8 * len(norms)


# ---------------------------------------------------------------------------------------------------------------------
# CCLM


def file_config(golden):
    config = golden["config"]
    return {"text_heads": config["text_heads"], "cross_heads": config["cross_heads"],
            "decoder_positions": config["bert_max_pos"]}


def cclm_pretrained(golden, task, resolution):
    model = cclm.from_pretrained(golden["state_dict"], file_config(golden), task,
                                 golden["config"][resolution], "golden")
    return model.eval()


@files("_core.pt")
def test_cclm_core(path):
    golden = load(path)
    model = cclm_pretrained(golden, "pretraining", "res_pretrain")

    images = golden["vision"]["image"]
    hidden = []
    hooks = [block.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0]))
             for block in model.vision.blocks]
    assert_close(model.encode_images({"images": images}), golden["vision"]["last_hidden_state"])
    for hook in hooks:
        hook.remove()
    for i, state in enumerate(hidden):
        assert_close(state, golden["vision"]["hidden_states"][i])

    text = golden["text"]
    state, mask = model.text_embeddings(text["input_ids"]), key_mask(text["attention_mask"])
    for i, layer in enumerate(model.text_layers):
        assert_close(state, text["hidden_states"][i])
        state = layer(state, mask)
    assert_close(model.encode_texts(text["input_ids"], text["attention_mask"]), text["last_hidden_state"])

    cross = golden["cross"]
    image_states = model.encode_images({"images": cross["image"]})
    assert_close(image_states, cross["image_embeds"])
    memory = model.image_memory(image_states)
    state, mask = cross["text_embeds"], key_mask(cross["text_atts"])
    partial = state
    for i, (layer, keys_values) in enumerate(zip(model.cross_layers, memory)):
        assert_close(state, cross["hidden_states"][i])
        state = layer(state, mask, memory_kv=keys_values)
        partial = layer(partial, mask, memory_kv=keys_values, memory_mask=key_mask(cross["image_atts_partial"]))
    assert_close(state, cross["last_hidden_state"])
    assert_close(partial, cross["last_hidden_state_partial_image_mask"])
    fused = model.fuse(cross["text_embeds"], cross["text_atts"], memory)
    assert_close(fused, cross["last_hidden_state"])
    assert_close(model.fuse(cross["text_embeds"], cross["text_atts"], memory, first_token=True), fused[:, :1])

    assert_close(model.image_features(image_states), golden["itc"]["image_feat"])
    assert_close(model.text_features(cross["text_embeds"]), golden["itc"]["text_feat"])
    to_images, to_texts = model.contrast(image_states, cross["text_embeds"])
    assert_close(to_texts, golden["itc"]["sim_i2t"])
    assert_close(to_images, golden["itc"]["sim_i2t"].T)
    assert_close(model.match_logits(cross["text_embeds"], cross["text_atts"], memory), golden["itm"]["logits"])
    assert_close(model.mlm_head(fused), golden["mlm"]["logits"])
    assert_close(model.bbox_head(fused[:, 0]).sigmoid(), golden["bbox"]["coord"])


@files("_core.pt")
def test_cclm_at_another_resolution(path):
    golden = load(path)
    model, hires = cclm_pretrained(golden, "pretraining", "res_finetune"), golden["vision_hires"]
    for i, block in enumerate(model.vision.blocks):
        assert_close(block.attn.relative_position_bias_table, hires["relative_position_bias_tables"][i])
    assert torch.equal(model.vision.position_index, hires["relative_position_index"])
    assert_close(model.encode_images({"images": hires["image"]}), hires["last_hidden_state"])


@files("_core.pt")
def test_cclm_names_round_trip(path):
    golden = load(path)
    model = cclm_pretrained(golden, "pretraining", "res_pretrain")
    stored = file_tensors(model)
    assert stored.keys() == golden["state_dict"].keys()
    for name, tensor in golden["state_dict"].items():
        assert torch.equal(stored[name], tensor), name


@files("_retrieval.pt", but=("_volta_retrieval.pt", "_train_retrieval.pt"))
def test_cclm_retrieval(path):
    golden = load(path)
    model, inputs = cclm_pretrained(golden, "xflickrco", "res_pretrain"), golden["inputs"]
    mask = inputs["attention_mask"]
    image_states = model.encode_images({"images": inputs["image"]})
    text_states = model.encode_texts(inputs["input_ids"], mask)
    to_images, to_texts = model.contrast(image_states, text_states)
    for key, image_ids in (("with_idx", inputs["idx"]), ("no_idx", torch.arange(len(mask)))):
        reference = golden[key]
        same_image = image_ids[:, None] == image_ids[None, :]
        assert_close(cclm.contrastive_loss(to_images, to_texts, same_image), reference["loss_itc"])
        assert_close(cclm.negative_weights(to_images, same_image), reference["weights_t2i"])
        assert_close(cclm.negative_weights(to_texts, same_image), reference["weights_i2t"])
        itm = model.matching_loss(image_states, text_states, mask, reference["image_neg_idx"],
                                  reference["text_neg_idx"])
        assert_close(itm, reference["loss_itm"])
        if key == "with_idx":  # the training loss itself, with uniform draws that pick the reference's negatives
            batch = {"images": inputs["image"], "input_ids": inputs["input_ids"], "attention_mask": mask,
                     "image_ids": image_ids,
                     "uniform": torch.stack([uniform_for(reference["weights_t2i"], reference["image_neg_idx"]),
                                             uniform_for(reference["weights_i2t"], reference["text_neg_idx"])], 1)}
            loss = model(batch)
            assert_close(loss, reference["loss_itc"] + reference["loss_itm"])
            loss.backward()
            assert_gradients(model, reference["grad_norms_of_itc_plus_itm"])
    clamped = golden["temp_clamped"]
    model.temp.data.copy_(clamped["temp_before"])
    model(batch)
    assert_close(model.temp, clamped["temp_after"])
    same_image = inputs["idx"][:, None] == inputs["idx"][None, :]
    assert_close(cclm.contrastive_loss(*model.contrast(image_states, text_states), same_image), clamped["loss_itc"])


def uniform_for(weights, index):
    """A draw in [0,1) that makes `cclm.draw` pick column `index` of each row."""
    cumulative = weights.double().cumsum(1)
    upper = cumulative.gather(1, index[:, None])
    return ((upper - weights.double().gather(1, index[:, None]) / 2) / cumulative[:, -1:])[:, 0]


@files("_classification.pt")
def test_cclm_classification(path):
    golden = load(path)
    model, inputs = cclm_pretrained(golden, "xvnli", "res_finetune"), golden["inputs"]
    fill(model, golden["extra_state_dict"])
    batch = {"images": inputs["image"], "input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"],
             "labels": inputs["labels"]}
    memory = model.memory(batch)
    logits = model.label_logits(model.encode_texts(batch["input_ids"], batch["attention_mask"]),
                                batch["attention_mask"], memory)
    assert_close(logits, golden["outputs"]["logits"])
    loss = model(batch)
    assert_close(loss, golden["outputs"]["loss"])
    loss.backward()
    assert_gradients(model, golden["outputs"]["grad_norms"])


def fill(model, tensors):
    """Put some official tensors into a model."""
    names = {ours: theirs for ours, theirs in model.checkpoint_names().items() if theirs in tensors}
    copy_tensors(model, tensors, names)


@files("_vqa.pt")
def test_cclm_generation(path):
    golden = load(path)
    loaded = cclm_pretrained(golden, "xgqa", "res_finetune")
    after_load = golden["vqa_state_dict_after_load"]
    fresh = set(golden["decoder_keys_not_in_checkpoint"].split("\n"))
    stored = file_tensors(loaded)
    assert {name for name in stored if not name.endswith("relative_position_index")} == after_load.keys()
    for name, tensor in after_load.items():  # what the official loading procedure puts where
        if name not in fresh:
            assert_close(stored[name], tensor, 1e-6)

    model = cclm.from_finetuned(after_load, file_config(golden), "xgqa", "golden").eval()
    train = golden["train"]
    question_states = model.fuse(model.encode_texts(train["question_ids"], train["question_mask"]),
                                 train["question_mask"],
                                 model.memory({"images": train["image"]}))
    assert_close(question_states, train["question_states"])
    decoder, mask = model.decoder, train["question_mask"]
    answer_question = torch.arange(len(train["k"])).repeat_interleave(train["k"])
    hidden = decoder.embeddings(train["answer_ids"])
    assert_close(hidden, train["decoder_hidden_states"][0])
    memory = select(decoder.memory(question_states), answer_question)
    hidden = decoder.decode(train["answer_ids"], memory, mask[answer_question])
    assert_close(hidden, train["decoder_hidden_states"][len(decoder.layers)])
    assert_close(decoder.logits(hidden), train["decoder_logits"])
    assert_close(decoder.answer_losses(question_states, mask, train["answer_ids"], answer_question),
                 train["answer_losses"])
    batch = {"images": train["image"], "input_ids": train["question_ids"], "attention_mask": mask,
             "answer_ids": train["answer_ids"],
             "answer_question": answer_question, "answer_weight": train["weights"]}
    loss = model(batch)
    assert_close(loss, train["loss"])
    loss.backward()
    assert_gradients(model, train["grad_norms"])

    rank = golden["rank"]
    for reference in (rank["k_cut"], rank["k_all"]):
        top, probabilities = decoder.rank_answers(question_states, mask, rank["candidate_ids"], reference["k"])
        assert torch.equal(top, reference["topk_ids"])
        assert_close(probabilities, reference["topk_probs"])
    # the exact argmax through the trie equals brute force over all candidates
    candidates, questions = rank["candidate_ids"], len(question_states)
    rows = torch.arange(questions).repeat_interleave(len(candidates))
    everything = -decoder.answer_losses(question_states, mask, candidates.repeat(questions, 1),
                                        rows).view(questions, -1)
    trie = AnswerTrie([[t for t in ids[1:].tolist() if t not in (cclm.EOS, cclm.PAD)] for ids in candidates], "cpu")
    labels, scores = best_answers(decoder, question_states, mask, trie)
    assert_close(scores, everything.max(1).values)
    assert torch.equal(labels, everything.argmax(1))


@files("_preproc.pt")
def test_relative_position_tables(path):
    for example in load(path)["relpos_interpolation"].values():
        assert_close(resize_position_table(example["table_in"], len(example["table_out"])), example["table_out"], 1e-6)
        sides = (round((len(example[key]) - 3) ** 0.5) for key in ("table_in", "table_out"))
        assert_close(geometric_offsets(*sides), example["source_positions"], 1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# UC2

UC2_TASKS = {"gqa": "xgqa", "xvnli": "xvnli", "retrieval": "xflickrco"}


def uc2_config(golden):
    return {"heads": golden["config"]["num_attention_heads"]}


def uc2_batch(inputs):
    """The reference's inputs under our names; items of four pairs [B,4,...] become 4B pairs."""
    return {"features": inputs["features"].flatten(0, -3), "locations": inputs["locations"].flatten(0, -3),
            "region_mask": inputs["image_mask"].flatten(0, -2), "input_ids": inputs["input_ids"].flatten(0, -2),
            "attention_mask": inputs["input_mask"].flatten(0, -2), "targets": inputs.get("targets")}


def with_region_head(tensors, width):
    """The converted file without the reference's region head, which the conversion leaves
    at random values: any values will do.
    """
    part = "cls.imagePredictions."
    shapes = {"transform.dense.weight": (width, width), "transform.dense.bias": (width,),
              "transform.LayerNorm.weight": (width,),
              "transform.LayerNorm.bias": (width,), "decoder_dict.0.weight": (5, width), "decoder_dict.0.bias": (5,)}
    return tensors | {part + name: torch.zeros(shape) for name, shape in shapes.items()}


def run_uc2(model, batch):
    """-> states of [text ; regions] before the first layer and after every layer, after
    every self-attention block, and pooled.
    """
    hidden, attended = [], []
    hooks = [model.layers[0].register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0]))]
    for layer in model.layers:
        hooks.append(layer.register_forward_hook(lambda *call: hidden.append(call[2])))
        hooks.append(layer.self_norm.register_forward_hook(lambda *call: attended.append(call[2])))
    memory = model.memory(batch)
    text_states = model.encode_texts(batch["input_ids"], batch["attention_mask"])
    fused = model.fuse(text_states, batch["attention_mask"], memory)
    for hook in hooks:
        hook.remove()
    first = model.fuse(text_states, batch["attention_mask"], memory, first_token=True)
    assert_close(first, fused[:, :1], 1e-6)
    return hidden, attended, model.pooled(first)


def assert_states(model, batch, outputs):
    hidden, attended, pooled = run_uc2(model, batch)
    assert len(hidden) == len(outputs["hidden_text"])
    for i, state in enumerate(hidden):
        assert_close(state, torch.cat([outputs["hidden_text"][i], outputs["hidden_image"][i]], 1))
    for i, state in enumerate(attended if "attn_text" in outputs else []):
        assert_close(state, torch.cat([outputs["attn_text"][i], outputs["attn_image"][i]], 1))
    assert_close(pooled, outputs["pooled"])
    return hidden[-1]


def assert_stored(model, tensors):
    """What the model would save is what it was loaded from, to the last name and bit."""
    stored = file_tensors(model)
    assert stored.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(stored[name], tensor), name


@files("_volta_*.pt", but=("_volta_pretrained.pt",))
def test_uc2_task(path):
    golden = load(path)
    task, outputs, batch = UC2_TASKS[golden["meta"]["task"]], golden["outputs"], uc2_batch(golden["inputs"])
    model = uc2.from_finetuned(golden["state_dict"], uc2_config(golden), task, "golden").eval()
    assert_states(model, batch, outputs)
    inputs = model.encode_texts(batch["input_ids"],
                                batch["attention_mask"]), batch["attention_mask"], model.memory(batch)
    if task == "xflickrco":
        assert_close(model.match_scores(*inputs), outputs["logits"][:, 0])
    else:
        assert_close(model.label_logits(*inputs), outputs["logits"])
        score = batch["targets"].gather(1, model.predict(*inputs)[:, None]).mean()
        assert_close(score, outputs["batch_score"], 1e-6)
    loss = model(batch)
    assert_close(loss, outputs["loss"])
    loss.backward()
    assert_gradients(model, outputs["grad_norms"])
    assert_stored(model, golden["state_dict"])


@files("_volta_pretrained.pt")
def test_uc2_pretrained(path):
    golden = load(path)
    batch, outputs = uc2_batch(golden["inputs"]), golden["outputs"]
    model = uc2.from_pretrained(golden["state_dict"], uc2_config(golden), "pretraining", "golden").eval()
    assert model.variant == "volta"
    hidden = assert_states(model, batch, outputs)
    assert_close(model.itm_logits(hidden), outputs["itm_logits"])
    assert_close(model.mlm_logits(hidden[:, : batch["input_ids"].shape[1]]), outputs["mlm_scores"])
    assert_stored(model, golden["state_dict"])


@files("_original.pt")
def test_uc2_original(path):
    golden = load(path)
    inputs, outputs = golden["inputs"], golden["outputs"]
    model = uc2.from_pretrained(golden["state_dict"], uc2_config(golden), "pretraining", "golden").eval()
    assert model.variant == "original"
    text_mask = (torch.arange(inputs["input_ids"].shape[1]) < inputs["txt_lens"][:, None]).long()
    region_mask = (torch.arange(inputs["img_feat"].shape[1]) < inputs["num_bbs"][:, None]).long()
    batch = {"features": inputs["img_feat"], "locations": inputs["img_pos_feat"], "region_mask": region_mask,
             "input_ids": inputs["input_ids"], "attention_mask": text_mask}
    hidden, _, pooled = run_uc2(model, batch)
    real = torch.cat([text_mask, region_mask], 1).bool()  # the reference moves each row's real positions to its front
    for i, state in enumerate(hidden):
        assert_close(state[real], outputs["hidden"][i][inputs["attn_masks"].bool()])
    assert_close(model.mlm_logits(hidden[-1][real]), outputs["mlm_scores"][inputs["attn_masks"].bool()])
    assert_close(pooled, outputs["pooled"])
    assert_close(model.itm_logits(hidden[-1]), outputs["itm_logits"])
    assert_stored(model, golden["state_dict"])

    # fine-tuned from this file: the same states, and after saving and loading the same again
    tuned = uc2.from_pretrained(golden["state_dict"], uc2_config(golden), "xvnli", "golden").eval()
    again = uc2.from_finetuned(file_tensors(tuned), tuned.config(), "xvnli", "saved").eval()
    for model in (tuned, again):
        assert model.variant == "original"
        assert_close(run_uc2(model, batch)[0][-1][real], outputs["hidden"][-1][inputs["attn_masks"].bool()])


@files("_convert.pt")
def test_uc2_conversion(path):
    golden = load(path)
    converted = with_region_head(golden["converted_state_dict"], golden["config"]["hidden_size"])
    faithful = uc2.from_pretrained(converted, uc2_config(golden), "pretraining", "converted").eval()
    corrected = uc2.from_pretrained(golden["original_state_dict"], uc2_config(golden), "pretraining", "original").eval()
    assert (faithful.variant, corrected.variant) == ("volta", "original")
    batch = uc2_batch(golden["inputs"])
    assert_states(faithful, batch, golden["outputs"])

    # the two differ in the LayerNorms that the conversion mixed up, and in nothing else that both files hold
    theirs = dict(faithful.named_parameters())
    shared = {name: parameter for name, parameter in corrected.named_parameters() if name in theirs
              and not name.startswith("region_classes.")}
    different = {name for name, parameter in shared.items() if not torch.equal(parameter, theirs[name])}
    assert different == {f"{part}.norm.{kind}" for part in ("text_embeddings", "region_embeddings")
                         for kind in ("weight", "bias")}
    assert torch.equal(faithful.text_embeddings.norm.weight, corrected.region_embeddings.norm.weight)
    assert uc2.image_norm_is_identity(converted) and not uc2.image_norm_is_identity(golden["original_state_dict"])
    assert (run_uc2(faithful, batch)[0][0] - run_uc2(corrected, batch)[0][0]).abs().max() > 1e-2


@files("_retrieval_eval.pt")
def test_uc2_retrieval_scores(path):
    golden = load(path)
    inputs, scores = golden["inputs"], golden["outputs"]["score_matrix_caption_by_image"]
    model = uc2.from_finetuned(golden["state_dict"], uc2_config(golden), "xflickrco", "golden").eval()
    features = inputs["features_first12"]
    features = torch.nn.functional.pad(features, (0, golden["config"]["v_feature_size"] - features.shape[-1]))
    memory = model.memory({"features": features, "locations": inputs["locations"], "region_mask": inputs["image_mask"]})
    texts, mask = model.encode_texts(inputs["input_ids"], inputs["input_mask"]), inputs["input_mask"]
    # one image that all captions share
    columns = [model.match_scores(texts, mask, select(memory, slice(i, i + 1))) for i in range(scores.shape[1])]
    assert_close(torch.stack(columns, 1), scores)
    pairs = torch.cartesian_prod(torch.arange(len(scores)), torch.arange(scores.shape[1]))  # or any pairs
    every = model.match_scores(texts[pairs[:, 0]], mask[pairs[:, 0]], select(memory, pairs[:, 1]))
    assert_close(every.view_as(scores), scores)


@files("_train_*.pt")
def test_uc2_first_losses_and_weight_decay(path):
    golden = load(path)
    task, initial = UC2_TASKS[golden["meta"]["task"]], golden["initial_state_dict"]
    model = uc2.UC2(uc2.read_sizes(initial, uc2_config(golden), "golden"), task).eval()
    copy_tensors(model, initial)
    assert set(model.checkpoint_names().values()) == initial.keys() == golden["no_weight_decay"].keys()
    for ours, theirs in model.checkpoint_names().items():
        assert model.decays(ours) != golden["no_weight_decay"][theirs], theirs
    for i in range(2 * golden["train"]["gradient_accumulation_steps"]):  # the first update has learning rate 0
        assert_close(model(uc2_batch(golden["micro_batches"][i])), golden["outputs"]["micro_losses"][i])


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer traces: the references' training loops, step by step, with train.py's parameter groups, rates and optimizer


@files("_classification.pt")
def test_cclm_training_trace(path):
    golden = load(path)
    model, inputs, trace = cclm_pretrained(golden, "xvnli", "res_finetune"), golden["inputs"], golden["train"]
    fill(model, golden["extra_state_dict"])
    total, warmup = map(int, re.search(r"T=(\d+), W=(\d+)", trace["sched"]).groups())
    part, names = train.part_of(model), model.checkpoint_names()
    second, group = trace["lrs_per_step_per_group"][1], trace["param_group_index"]
    rates = {part[name]: second[group[names[name]]].item() / train.lr_factor(1, total, warmup) for name in part}
    decay = trace["group_weight_decay"]
    for name, theirs in names.items():
        assert model.decays(name) == (decay[trace["param_group_index"][theirs]] > 0), theirs
    recipe = train.Recipe(epochs=1, batch_size=1, lr=1.0)
    optimizer = train.make_optimizer(train.parameter_groups(model, part, rates, decay.max().item()), recipe)
    batch = {"images": inputs["image"], "input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"],
             "labels": inputs["labels"]}
    owner = {id(parameter): name for name, parameter in model.named_parameters()}
    losses = []
    for step, lrs in enumerate(trace["lrs_per_step_per_group"]):
        train.set_rates(optimizer, train.lr_factor(step, total, warmup), recipe)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                assert group["lr"] == pytest.approx(
                    lrs[trace["param_group_index"][names[owner[id(parameter)]]]].item(), abs=1e-12)
        loss = model(batch)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    losses.append(model(batch).item())
    # torch's AdamW decays weights before the update, the reference after it: facts, section 14
    assert torch.allclose(torch.tensor(losses), trace["losses"], rtol=0, atol=5e-4)
    ours = {theirs: model.get_parameter(name) for name, theirs in names.items()}
    for theirs, final in trace["params_after_5_steps"].items():
        assert (ours[theirs] - final).abs().max() < 2e-3 and (ours[theirs] - final).abs().mean() < 1e-4, theirs


@files("_train_gqa.pt")
def test_uc2_training_trace_gqa(path):
    check_uc2_trace(path, "xgqa")


@files("_train_xvnli.pt")
def test_uc2_training_trace_xvnli(path):
    check_uc2_trace(path, "xvnli")


@files("_train_retrieval.pt")
def test_uc2_training_trace_retrieval(path):
    check_uc2_trace(path, "xflickrco")


def check_uc2_trace(path, task):
    golden = load(path)
    meta, loop, outputs = golden["meta"], golden["train"], golden["outputs"]
    sizes = uc2.read_sizes(golden["initial_state_dict"], {"heads": golden["config"]["num_attention_heads"]}, "golden")
    model = uc2.UC2(sizes, task, dropout=0.0)
    copy_tensors(model, golden["initial_state_dict"])
    recipe = train.Recipe(epochs=1, batch_size=1, lr=float(meta["learning_rate"]),
                          betas=tuple(map(float, meta["adam_betas"].split())),
                          eps=float(meta["adam_eps"]), clip=float(meta["clip_grad_norm"]))
    part = train.part_of(model)
    optimizer = train.make_optimizer(train.parameter_groups(model, part, dict.fromkeys(part.values(), recipe.lr),
                                                            float(meta["weight_decay"])), recipe)
    total, accumulation = loop["schedule_total_steps"], loop["gradient_accumulation_steps"]
    losses, norms, rates = [], [], []
    for epoch in range(loop["num_epochs"]):
        for i in range(loop["micro_batches_per_epoch"]):
            micro = golden["micro_batches"][i]
            flat = {ours: micro[theirs].flatten(0, -1 - micro_dimensions) for ours, theirs, micro_dimensions in (
                ("features", "features", 2), ("locations", "locations", 2), ("region_mask", "image_mask", 1),
                ("input_ids", "input_ids", 1),
                ("attention_mask", "input_mask", 1))}
            loss = model(flat | {"targets": micro["targets"]})
            losses.append(loss.item())
            (loss / accumulation).backward()
            if len(losses) % accumulation == 0:
                factor = train.lr_factor(len(norms), total, float(meta["warmup_proportion"]) * total)
                train.set_rates(optimizer, factor, recipe)
                rates.append(optimizer.param_groups[0]["lr"])
                norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip).item())
                optimizer.step()
                optimizer.zero_grad()
    assert rates == pytest.approx(outputs["lr_per_optimizer_step"].tolist(), abs=1e-12)
    assert torch.allclose(torch.tensor(losses), outputs["micro_losses"], rtol=1e-4, atol=3e-5)
    assert torch.allclose(torch.tensor(norms), outputs["grad_norm_before_clip"], rtol=2e-3)
    for name, theirs in model.checkpoint_names().items():
        if not theirs.endswith("key.bias"):  # no gradient but rounding noise, which Adam amplifies
            assert (model.get_parameter(name) - golden["final_state_dict"][theirs]).abs().max() <= 3e-5, theirs


# ---------------------------------------------------------------------------------------------------------------------
# Data


@files("_preproc.pt")
def test_text_clean_up(path):
    for example in load(path)["text_preproc"].values():
        for name, expected in example.items():
            if name != "raw":
                kind, words = re.fullmatch(r"pre_(question|caption)_(\d+)", name).groups()
                clean = {"question": data.clean_question, "caption": data.clean_caption}[kind]
                assert clean(example["raw"], int(words)) == expected, (name, example["raw"])


def golden_tokenizer(golden, tmp_path):
    file = tmp_path / "golden.model"
    file.write_bytes(golden["tokenizer"]["spm_model_bytes"].numpy().tobytes())
    return data.Tokenizer(file)


@files("_preproc.pt")
def test_left_and_right(path, tmp_path):
    golden = load(path)
    sides = list(golden["left_right"].values())
    records = [data.Record(str(i), str(i), side["question"], dict.fromkeys(side["answers"].split("\n"), 1.0))
               for i, side in enumerate(sides)]
    examples = data.Examples("golden", records, data.TextRules("", None, None, None, None),
                             golden_tokenizer(golden, tmp_path), training=True)
    assert examples.may_flip.tolist() == [not side["contains_left_or_right"] for side in sides]


@files("_preproc.pt")
def test_tokenizer(path, tmp_path):
    golden = load(path)["tokenizer"]
    tokenizer = golden_tokenizer({"tokenizer": golden}, tmp_path)
    assert {"cls": data.BOS, "pad": data.PAD, "sep": data.EOS, "unk": data.UNK, "mask": tokenizer.mask,
            "vocab_size": tokenizer.vocabulary,
            "spm_size": tokenizer.vocabulary - 2} == golden["specials"]
    texts, compared = list(golden["texts"].values()), 0
    for name, expected in golden.items():
        limit = re.fullmatch(r"longest|(?:longest_truncate|max_length)_(\d+)", name)
        if limit:
            rows = tokenizer(texts, int(limit[1]) if limit[1] else None)
            input_ids, attention_mask = data.pad([rows[i] for i in range(len(texts))])
            # ours is padded to the longest text, "max_length" to the limit
            more = expected["input_ids"].shape[1] - input_ids.shape[1]
            assert more == 0 or name.startswith("max_length") and more > 0
            assert torch.equal(torch.nn.functional.pad(input_ids, (0, more), value=data.PAD), expected["input_ids"])
            assert torch.equal(torch.nn.functional.pad(attention_mask, (0, more)), expected["attention_mask"])
            compared += 1
    assert compared == len(golden) - 3  # all but the model, the texts and the specials


@files("_preproc.pt")
def test_image_transform(path):
    golden = load(path)["image"]
    image = Image.fromarray(golden["image_uint8_hwc"].numpy())
    name = next(name for name in golden if name.startswith("test_transform_"))
    pixels = data.to_tensor(data.resize(image, int(name.removeprefix("test_transform_"))))[None]
    std = torch.tensor(IMAGE_STD).view(3, 1, 1)
    assert ((normalize(pixels)[0] - golden[name]) * std).abs().max() <= 2 / 255  # ours is rounded to a byte first


@files("_inputs.pt")
def test_locations(path):
    for image in load(path)["images"].values():
        size = np.array([[image["img_w"], image["img_h"]]])
        assert np.allclose(data.locations(image["boxes_xyxy"].numpy()[None], size)[0], image["uc2_locations"],
                           rtol=1e-6, atol=1e-7)
        assert torch.equal(image["features"], image["uc2_features"])
        assert len(image["boxes_xyxy"]) == image["uc2_num_boxes"]  # no global region


class GivenPieces:
    """Where sentencepiece stands in `data.Tokenizer`: the "text" i is row i of token ids (<s> … </s>), given as pieces.
    """

    def __init__(self, encoded):
        self.encoded = encoded

    def encode(self, texts):
        return [[token - 1 if token != data.UNK else 0 for token in self.encoded[int(text)][1:-1].tolist()]
                for text in texts]


def golden_batch(golden, folder, records, labels):
    """The records as one batch of ours, from a folder of region features with as many
    regions per image as the file has.
    """
    images = list(golden["raw_images"].values())
    counts = [len(image["boxes_xyxy"]) for image in images]
    np.save(folder / "features.npy", torch.cat([image["features_first5"] for image in images]).numpy())
    np.save(folder / "boxes.npy", torch.cat([image["boxes_xyxy"] for image in images]).numpy())
    np.save(folder / "sizes.npy", np.array([[image["img_w"], image["img_h"]] for image in images], dtype=np.int32))
    np.save(folder / "offsets.npy", np.cumsum([0, *counts]))
    (folder / "ids.txt").write_text("".join(f"{i}\n" for i in range(len(images))))
    meta = {"format": 1, "count": len(images), "boxes": golden["max_region_num"],
            "dim": images[0]["features_first5"].shape[1], "complete": True}
    (folder / "meta.json").write_text(json.dumps(meta))
    tokenizer = data.Tokenizer.__new__(data.Tokenizer)
    tokenizer.model = GivenPieces(list(golden["encoded"].values()))
    limit = golden["max_seq_length"]
    examples = data.Examples("golden", records, data.TextRules("", None, None, limit, limit), tokenizer, training=True)
    targets = data.class_targets(examples, {name: i for i, name in enumerate(labels)})
    batch = data.TrainingBatches(examples, data.Regions(str(folder), examples.image_keys), targets, 0, False,
                                 True)[(0, np.arange(len(records)))]
    for name in ("features", "locations", "region_mask"):
        batch[name] = batch[name][batch["image_index"]]
        more = golden["max_region_num"] - batch[name].shape[1]  # ours are padded to the longest of the batch
        batch[name] = torch.nn.functional.pad(batch[name], (0, 0, 0, more) if batch[name].ndim == 3 else (0, more))
    more = limit - batch["input_ids"].shape[1]
    batch["input_ids"] = torch.nn.functional.pad(batch["input_ids"], (0, more), value=data.PAD)
    batch["attention_mask"] = torch.nn.functional.pad(batch["attention_mask"], (0, more))
    return batch


OUR_NAMES = {"features_first5": "features", "locations": "locations", "image_mask": "region_mask",
             "input_ids": "input_ids", "input_mask": "attention_mask", "target": "targets"}


@files("_inputs.pt")
@pytest.mark.parametrize("task", ["xgqa", "xvnli"])
def test_uc2_rows(path, task, tmp_path):
    golden = load(path)
    gqa = golden["gqa_dataset"]
    if task == "xgqa":
        rows, labels = list(gqa["rows"].values()), [str(i) for i in range(gqa["num_labels"])]
        sources = [row["source_index"] for row in rows]
        answers = {source: {str(label): 1.0} if label >= 0 else {}
                   for source, label in enumerate(gqa["labels"].values())}
        records = [data.Record(str(row["question_id"]), str(source), str(source), answers[source])
                   for row, source in zip(rows, sources)]
    else:
        rows, labels = list(golden["xvnli_dataset"]["rows"].values()), uc2.LABELS
        records = [data.Record(str(i), str(i), str(i), label=label)
                   for i, label in enumerate(golden["xvnli_dataset"]["gold_labels"].values())]
    batch = golden_batch(gqa, tmp_path, records, labels)
    for i, row in enumerate(rows):
        for theirs, ours in OUR_NAMES.items():
            if theirs in row:
                assert row[theirs].shape == batch[ours][i].shape and torch.allclose(
                    batch[ours][i].double(), row[theirs].double(), rtol=1e-6, atol=1e-7), (i, theirs)
        assert not row.get("segment_ids", torch.zeros(1)).any()


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation: retrieval through eval.py, from pictures and token rows to recalls


class GoldenPictures:
    def __init__(self, **tensors):
        self.tensors, self.keys = tensors, [str(i) for i in range(len(next(iter(tensors.values()))))]

    def __len__(self):
        return len(self.keys)

    def batch(self, rows):
        return {name: tensor[rows] for name, tensor in self.tensors.items()}


def golden_retrieval(model, pictures, input_ids, mask, image_of_text, **options):
    """-> (results, per text its images best first and the rank of its own, per image its texts
    best first and the rank of its first own).
    """
    tokens = data.Ragged([row[:length].tolist() for row, length in zip(input_ids, mask.sum(1))])
    examples = SimpleNamespace(tokens=tokens, records=[SimpleNamespace(id=str(i)) for i in range(len(input_ids))])
    chosen = evaluation.EvaluationSet("xflickrco", {"en": examples}, pictures, {"en": image_of_text.numpy()}, [])
    results, predictions = evaluation.evaluate(model, chosen, torch.device("cpu"), **options)
    by_text, by_image = ([entry for entry in predictions["en"] if kind in entry] for kind in ("text", "image"))
    return (results["en"], [(list(map(int, entry["images"])), entry["rank"]) for entry in by_text],
            [(list(map(int, entry["texts"])), entry["rank"]) for entry in by_image])


@files("_retrieval_eval.pt")
def test_uc2_retrieval_metrics(path):
    golden = load(path)
    inputs, outputs = golden["inputs"], golden["outputs"]
    model = uc2.from_finetuned(golden["state_dict"], uc2_config(golden), "xflickrco", "golden")
    features = torch.nn.functional.pad(inputs["features_first12"],
                                       (0, golden["config"]["v_feature_size"] - inputs["features_first12"].shape[-1]))
    pictures = GoldenPictures(features=features, locations=inputs["locations"], region_mask=inputs["image_mask"])
    results, by_text, by_image = golden_retrieval(model, pictures, inputs["input_ids"], inputs["input_mask"],
                                                  golden["caption_image_index"])
    for kind, ranks in (("image", by_text), ("text", by_image)):
        recalls = outputs[f"{kind}_retrieval_r1_r5_r10_medr_meanr"]
        for recall, k in zip(recalls, (1, 5, 10)):
            # the reference rounds fractions
            assert results[f"{kind}_recall_at_{k}"] == pytest.approx(recall.item(), abs=1e-3)
        assert sum(1 + rank for _, rank in ranks) / len(ranks) == pytest.approx(recalls[4].item(), abs=1e-3)
    assert [images for images, _ in by_text] == outputs["top_images_per_caption"].tolist()


@files("_retrieval.pt", but=("_volta_retrieval.pt", "_train_retrieval.pt"))
def test_cclm_reranking(path):
    """The k_test candidates of every text and of every image, in the order of their scores, and the recalls.

    What is not scored stands in arbitrary order behind: a recall beyond k_test is
    only compared where all are within it.
    """
    golden = load(path)
    model, reference = cclm_pretrained(golden, "xflickrco", "res_pretrain"), golden["eval"]
    k, mask = reference["k_test"], reference["attention_mask"]
    image_states = model.encode_images({"images": reference["images"]})
    text_states = model.encode_texts(reference["input_ids"], mask)
    assert_close(model.image_features(image_states) @ model.text_features(text_states).T, reference["cosine_i2t"])
    results, by_text, by_image = golden_retrieval(model, GoldenPictures(images=reference["images"]),
                                                  reference["input_ids"], mask, reference["txt2img"], candidates=k)
    for scores, found in ((reference["score_t2i"], by_text), (reference["score_i2t"], by_image)):
        assert ((scores > -100).sum(1) == k).all()
        assert [order[:k] for order, _ in found] == scores.argsort(1, descending=True)[:, :k].tolist()
    for ours, theirs in (("text", "txt"), ("image", "img")):
        for at in (1, 5, 10):
            if at <= k or at >= max(reference["cosine_i2t"].shape):
                assert results[f"{ours}_recall_at_{at}"] == pytest.approx(
                    reference["metrics"][f"{theirs}_r{at}"].item())
    memory = model.image_memory(image_states)
    for image, row in enumerate(reference["score_i2t"]):
        scored = (row > -100).nonzero()[:, 0]
        assert_close(model.match_scores(text_states[scored], mask[scored], select(memory, slice(image, image + 1))),
                     row[scored])
