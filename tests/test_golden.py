"""Numbers of the reference implementations, reproduced: every file of the folder GOLDEN_DIR.

Default: tests/golden. A file's kind is the end of its name, its sizes are its content: files of
other sizes and seeds run through the same tests unchanged.
"""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from PIL import Image
from torch.nn.functional import pad

import cclm
import data
import eval as evaluation
import train
import uc2
from cclm import rank_answers
from model import file_tensors, key_mask, select
from tools import uc2_original
from vit import IMAGE_MEAN, IMAGE_STD, geometric_offsets, normalize, resize_position_table

NO_LIMITS = SimpleNamespace(clean="", train_words=None, test_words=None, train_tokens=None,
                            test_tokens=None)


def files(ending, but=()):
    """Every golden file of one kind, as pytest parameters; but: longer endings of another kind."""
    found = [p for p in sorted(GOLDEN.glob(f"*{ending}")) if not p.name.endswith(tuple(but))]
    missing = pytest.param(None, marks=pytest.mark.skip(f"no *{ending} in {GOLDEN}"))
    return pytest.mark.parametrize("golden", found or [missing], indirect=True,
                                   ids=lambda path: path and path.stem)


@pytest.fixture
def golden(request):
    return torch.load(request.param, weights_only=True)


def assert_close(actual, expected, tolerance=1e-5):
    """Largest error relative to the largest expected value."""
    assert actual.shape == expected.shape
    error = (actual.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-12)
    assert error <= tolerance, f"relative error {error:.2e}"


def assert_learns(model, batch, loss, norms):
    """The training loss of a batch, and the gradient norm of every parameter that the reference
    lists (-1: it has none there). Key biases have no gradient but rounding noise: skipped.
    """
    found = model(batch)
    assert_close(found, loss)
    found.backward()
    ours = {theirs: name for name, theirs in model.checkpoint_names().items()}
    largest = max(float(norm) for norm in norms.values())
    compared = 0
    for theirs, norm in norms.items():
        if theirs in ours and not theirs.endswith("key.bias"):
            gradient = model.get_parameter(ours[theirs]).grad
            assert (gradient is None) == (norm < 0), theirs
            if gradient is not None:
                assert abs(gradient.norm() - norm) <= 1e-4 * max(float(norm), 1e-4 * largest), theirs
                compared += 1
    assert compared > 0.8 * len(norms)


def fill(model, tensors):
    """Put some official tensors into a model."""
    for ours, theirs in model.checkpoint_names().items():
        if theirs in tensors:
            model.get_parameter(ours).data.copy_(tensors[theirs])


def encoded(model, batch):
    """The arguments of `fuse`, `predict` and the like."""
    mask = batch["attention_mask"]
    return model.encode_texts(batch["input_ids"], mask), mask, model.memory(batch)


def assert_stored(model, tensors):
    """What the model would save is what it was loaded from, to the last name and bit."""
    stored = file_tensors(model)
    assert stored.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(stored[name], tensor), name


# ---- CCLM

def file_config(golden):
    return golden["config"] | {"decoder_positions": golden["config"]["bert_max_pos"]}


def cclm_pretrained(golden, task, resolution):
    return cclm.from_pretrained(golden["state_dict"], file_config(golden), task, "golden",
                                image_size=golden["config"][resolution]).eval()


@files("_core.pt")
def test_cclm_core(golden):
    model = cclm_pretrained(golden, "pretraining", "res_pretrain")
    vision, text, cross = golden["vision"], golden["text"], golden["cross"]

    hidden = []
    for block in model.vision.blocks:
        block.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0]))
    assert_close(model.encode_images({"images": vision["image"]}), vision["last_hidden_state"])
    for i, block in enumerate(model.vision.blocks):
        assert_close(hidden[i], vision["hidden_states"][i])

    state, mask = model.text_embeddings(text["input_ids"]), key_mask(text["attention_mask"])
    for i, layer in enumerate(model.text_layers):
        assert_close(state, text["hidden_states"][i])
        state = layer(state, mask)
    assert_close(model.encode_texts(text["input_ids"], text["attention_mask"]), state)
    assert_close(state, text["last_hidden_state"])

    image_states = model.encode_images({"images": cross["image"]})
    assert_close(image_states, cross["image_embeds"])
    memory = model.image_memory(image_states)
    texts, mask = cross["text_embeds"], cross["text_atts"]
    state = partial = texts
    some = key_mask(cross["image_atts_partial"])
    for i, (layer, keys_values) in enumerate(zip(model.cross_layers, memory)):
        assert_close(state, cross["hidden_states"][i])
        state = layer(state, key_mask(mask), keys_values)
        partial = layer(partial, key_mask(mask), keys_values, some)
    assert_close(partial, cross["last_hidden_state_partial_image_mask"])
    fused = model.fuse(texts, mask, memory)
    assert_close(fused, cross["last_hidden_state"])
    assert_close(model.fuse(texts, mask, memory, first_token=True), fused[:, :1])

    assert_close(model.image_features(image_states), golden["itc"]["image_feat"])
    assert_close(model.text_features(texts), golden["itc"]["text_feat"])
    to_images, to_texts = model.contrast(image_states, texts)
    assert_close(to_texts, golden["itc"]["sim_i2t"])
    assert_close(to_images, golden["itc"]["sim_i2t"].T)
    assert_close(model.match_logits(texts, mask, memory), golden["itm"]["logits"])
    assert_close(model.mlm_head(fused), golden["mlm"]["logits"])
    assert_close(model.bbox_head(fused[:, 0]).sigmoid(), golden["bbox"]["coord"])
    assert_stored(model, golden["state_dict"])

    # fine-tuning's resolution
    model, hires = cclm_pretrained(golden, "pretraining", "res_finetune"), golden["vision_hires"]
    for i, block in enumerate(model.vision.blocks):
        table = block.attn.relative_position_bias_table
        assert_close(table, hires["relative_position_bias_tables"][i])
    assert torch.equal(model.vision.position_index, hires["relative_position_index"])
    assert_close(model.encode_images({"images": hires["image"]}), hires["last_hidden_state"])


@files("_retrieval.pt", but=("_volta_retrieval.pt", "_train_retrieval.pt"))
def test_cclm_retrieval(golden):
    model, inputs = cclm_pretrained(golden, "xflickrco", "res_pretrain"), golden["inputs"]
    mask = inputs["attention_mask"]
    image_states = model.encode_images({"images": inputs["image"]})
    text_states = model.encode_texts(inputs["input_ids"], mask)
    to_images, to_texts = model.contrast(image_states, text_states)
    for key, image_ids in (("no_idx", torch.arange(len(mask))), ("with_idx", inputs["idx"])):
        reference = golden[key]
        same_image = image_ids[:, None] == image_ids
        assert_close(cclm.contrastive_loss(to_images, to_texts, same_image), reference["loss_itc"])
        for logits, weights in ((to_images, "weights_t2i"), (to_texts, "weights_i2t")):
            assert_close(cclm.negative_weights(logits, same_image), reference[weights])
        itm = model.matching_loss(image_states, text_states, mask, reference["image_neg_idx"],
                                  reference["text_neg_idx"])
        assert_close(itm, reference["loss_itm"])

    # the training loss itself, with uniform draws that pick the reference's negatives
    draws = [uniform_for(reference["weights_t2i"], reference["image_neg_idx"]),
             uniform_for(reference["weights_i2t"], reference["text_neg_idx"])]
    batch = inputs | {"images": inputs["image"], "image_ids": inputs["idx"],
                      "uniform": torch.stack(draws, 1)}
    assert_learns(model, batch, reference["loss_itc"] + reference["loss_itm"],
                  reference["grad_norms_of_itc_plus_itm"])

    clamped = golden["temp_clamped"]
    model.temp.data.copy_(clamped["temp_before"])
    model(batch)
    assert_close(model.temp, clamped["temp_after"])
    to_images, to_texts = model.contrast(image_states, text_states)
    assert_close(cclm.contrastive_loss(to_images, to_texts, same_image), clamped["loss_itc"])


def uniform_for(weights, index):
    """A draw in [0,1) that makes `cclm.draw` pick column `index` of each row."""
    cumulative, index = weights.double().cumsum(1), index[:, None]
    middle = cumulative.gather(1, index) - weights.double().gather(1, index) / 2
    return (middle / cumulative[:, -1:])[:, 0]


@files("_classification.pt")
def test_cclm_classification(golden):
    model, batch = cclm_pretrained(golden, "xvnli", "res_finetune"), label_batch(golden)
    fill(model, golden["extra_state_dict"])
    outputs = golden["outputs"]
    assert_close(model.label_logits(*encoded(model, batch)), outputs["logits"])
    assert_learns(model, batch, outputs["loss"], outputs["grad_norms"])


def label_batch(golden):
    return golden["inputs"] | {"images": golden["inputs"]["image"]}


@files("_vqa.pt")
def test_cclm_generation(golden):
    after_load, reference = golden["vqa_state_dict_after_load"], golden["train"]
    # what the official loading procedure puts where
    stored = file_tensors(cclm_pretrained(golden, "xgqa", "res_finetune"))
    names = {name for name in stored if not name.endswith("relative_position_index")}
    assert names == after_load.keys()
    for name in names - set(golden["decoder_keys_not_in_checkpoint"].split("\n")):
        assert_close(stored[name], after_load[name], 1e-6)

    model = cclm.from_finetuned(after_load, file_config(golden), "xgqa", "golden").eval()
    decoder, mask = model.decoder, reference["question_mask"]
    text_states = model.encode_texts(reference["question_ids"], mask)
    states = model.fuse(text_states, mask, model.memory({"images": reference["image"]}))
    assert_close(states, reference["question_states"])
    answer_ids = reference["answer_ids"]
    answer_question = torch.arange(len(reference["k"])).repeat_interleave(reference["k"])
    positions = torch.arange(answer_ids.shape[1]).expand_as(answer_ids)
    hidden = reference["decoder_hidden_states"]
    assert_close(decoder.embeddings(answer_ids, positions), hidden[0])
    memory = select(decoder.memory(states), answer_question)
    decoded = decoder.decode(answer_ids, memory, mask[answer_question])
    assert_close(decoded, hidden[len(decoder.layers)])
    assert_close(decoder.logits(decoded), reference["decoder_logits"])
    losses = decoder.answer_losses(states, mask, answer_ids, answer_question)
    assert_close(losses, reference["answer_losses"])
    batch = {"images": reference["image"], "input_ids": reference["question_ids"],
             "attention_mask": mask, "answer_ids": answer_ids, "answer_question": answer_question,
             "answer_weight": reference["weights"]}
    assert_learns(model, batch, reference["loss"], reference["grad_norms"])

    rank = golden["rank"]
    for expected in (rank["k_cut"], rank["k_all"]):
        top, probabilities = rank_answers(decoder, states, mask, rank["candidate_ids"], expected["k"])
        assert torch.equal(top, expected["topk_ids"])
        assert_close(probabilities, expected["topk_probs"])


@files("_preproc.pt")
def test_relative_position_tables(golden):
    for example in golden["relpos_interpolation"].values():
        before, after = example["table_in"], example["table_out"]
        assert_close(resize_position_table(before, len(after)), after, 1e-6)
        old, new = (round((len(table) - 3) ** 0.5) for table in (before, after))
        assert_close(geometric_offsets(old, new), example["source_positions"], 1e-12)


# ---- UC2

UC2_TASKS = {"gqa": "xgqa", "xvnli": "xvnli", "retrieval": "xflickrco"}


def uc2_config(golden):
    return {"heads": golden["config"]["num_attention_heads"]}


def uc2_batch(inputs):
    """The reference's inputs under our names; items of four pairs [B,4,...] become 4B pairs."""
    batch = {name: inputs[name].flatten(0, -3) for name in ("features", "locations")}
    for ours, theirs in (("region_mask", "image_mask"), ("input_ids", "input_ids"),
                         ("attention_mask", "input_mask")):
        batch[ours] = inputs[theirs].flatten(0, -2)
    return batch | {"targets": inputs.get("targets")}


def run_uc2(model, batch):
    """-> states of [text ; regions] before the first and after every layer, and pooled."""
    hidden, hooks = [], []
    for layer in model.layers:
        hooks.append(layer.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0])))
    inputs = encoded(model, batch)
    hidden.append(model.fuse(*inputs))
    for hook in hooks:
        hook.remove()
    first = model.fuse(*inputs, first_token=True)
    assert_close(first, hidden[-1][:, :1], 1e-6)
    return hidden, model.pooled(first)


def assert_states(model, batch, outputs):
    hidden, pooled = run_uc2(model, batch)
    assert len(hidden) == len(outputs["hidden_text"])
    for state, text, image in zip(hidden, outputs["hidden_text"], outputs["hidden_image"]):
        assert_close(state, torch.cat([text, image], 1))
    assert_close(pooled, outputs["pooled"])
    return hidden[-1]


@files("_volta_*.pt", but=("_volta_pretrained.pt",))
def test_uc2_task(golden):
    outputs, batch = golden["outputs"], uc2_batch(golden["inputs"])
    task = UC2_TASKS[golden["meta"]["task"]]
    model = uc2.from_finetuned(golden["state_dict"], uc2_config(golden), task, "golden").eval()
    assert_states(model, batch, outputs)
    inputs = encoded(model, batch)
    if task == "xflickrco":
        assert_close(model.match_scores(*inputs), outputs["logits"][:, 0])
    else:
        assert_close(model.label_logits(*inputs), outputs["logits"])
        score = batch["targets"].gather(1, model.predict(*inputs)[:, None]).mean()
        assert_close(score, outputs["batch_score"], 1e-6)
    assert_learns(model, batch, outputs["loss"], outputs["grad_norms"])
    assert_stored(model, golden["state_dict"])


@files("_volta_pretrained.pt")
def test_uc2_pretrained(golden):
    batch, outputs, tensors = uc2_batch(golden["inputs"]), golden["outputs"], golden["state_dict"]
    model = uc2.from_pretrained(tensors, uc2_config(golden), "pretraining", "golden").eval()
    assert model.variant == "volta"
    hidden = assert_states(model, batch, outputs)
    assert_close(model.itm_logits(hidden), outputs["itm_logits"])
    texts = hidden[:, : batch["input_ids"].shape[1]]
    assert_close(model.mlm_logits(texts), outputs["mlm_scores"])
    assert_stored(model, tensors)


@files("_original.pt")
def test_uc2_original(golden):
    """The file of UC2's authors through tools/uc2_original.py."""
    inputs, outputs = golden["inputs"], golden["outputs"]
    content, unused = uc2_original.convert(golden["state_dict"], uc2_config(golden), "golden")
    assert {name.split(".")[0] for name in unused} == {"cls", "vis_cls", "feat_regress", "roberta"}
    tensors, config = content["model"], content["config"]
    model = uc2.from_pretrained(tensors, config, "pretraining", "converted").eval()
    assert model.variant == "original"
    text_mask = torch.arange(inputs["input_ids"].shape[1]) < inputs["txt_lens"][:, None]
    region_mask = torch.arange(inputs["img_feat"].shape[1]) < inputs["num_bbs"][:, None]
    batch = {"features": inputs["img_feat"], "locations": inputs["img_pos_feat"],
             "region_mask": region_mask.long(), "input_ids": inputs["input_ids"],
             "attention_mask": text_mask.long()}
    hidden, pooled = run_uc2(model, batch)
    # the reference moves each row's real positions to its front
    real, theirs = torch.cat([text_mask, region_mask], 1), inputs["attn_masks"].bool()
    for i, state in enumerate(hidden):
        assert_close(state[real], outputs["hidden"][i][theirs])
    assert_close(model.mlm_logits(hidden[-1][real]), outputs["mlm_scores"][theirs])
    assert_close(pooled, outputs["pooled"])
    assert_close(model.itm_logits(hidden[-1]), outputs["itm_logits"])
    assert_stored(model, tensors)


@files("_convert.pt")
def test_uc2_conversion(golden):
    """IGLUE's conversion mixes up two LayerNorms, ours does not; they agree in all else."""
    config, width = uc2_config(golden), golden["config"]["hidden_size"]
    # the reference's region head, which its conversion leaves random: any values will do
    part, theirs = "cls.imagePredictions.", dict(golden["converted_state_dict"])
    for name, shape in {"transform.dense.weight": (width, width), "transform.dense.bias": width,
                        "transform.LayerNorm.weight": width, "transform.LayerNorm.bias": width,
                        "decoder_dict.0.weight": (5, width), "decoder_dict.0.bias": 5}.items():
        theirs[part + name] = torch.zeros(shape)
    faithful = uc2.from_pretrained(theirs, config, "pretraining", "converted").eval()
    assert_states(faithful, uc2_batch(golden["inputs"]), golden["outputs"])

    content, _ = uc2_original.convert(golden["original_state_dict"], config, "original")
    ours = content["model"]
    assert ours.keys() == theirs.keys()
    different = {name for name in ours
                 if not name.startswith(part) and not torch.equal(ours[name], theirs[name])}
    assert different == {f"bert.embeddings.{norm}.{kind}" for norm in ("LayerNorm", "v_LayerNorm")
                         for kind in ("weight", "bias")}
    image_norm = ours["bert.embeddings.v_LayerNorm.weight"]
    assert torch.equal(theirs["bert.embeddings.LayerNorm.weight"], image_norm)


# ---- Optimizer traces: the references' training loops, step by step, with train.py's parameter groups,
# rates and optimizer

PLAIN = SimpleNamespace(freeze=(), lr_decay=None, only=None, embedding_lr=None)


@files("_classification.pt")
def test_cclm_training_trace(golden):
    model, trace = cclm_pretrained(golden, "xvnli", "res_finetune"), golden["train"]
    fill(model, golden["extra_state_dict"])
    total, warmup = map(int, re.search(r"T=(\d+), W=(\d+)", trace["sched"]).groups())
    recipe = train.Recipe(epochs=1, batch_size=1, lr=1.0, warmup=warmup / total,
                          weight_decay=trace["group_weight_decay"].max().item())
    optimizer = train.make_optimizer(model, PLAIN, recipe, 1)
    # the reference's groups of our parameters: their rates, and whether weights decay
    names = {id(model.get_parameter(ours)): theirs
             for ours, theirs in model.checkpoint_names().items()}
    rates, decay = trace["lrs_per_step_per_group"], trace["group_weight_decay"]
    for ours in optimizer.param_groups:
        [group] = {trace["param_group_index"][names[id(p)]] for p in ours["params"]}
        assert (ours["weight_decay"] > 0) == (decay[group] > 0)
        ours["peak_lr"] = rates[1, group].item() / train.lr_factor(1, total, recipe.warmup)
        ours["reference"] = group
    losses = []
    for step in range(len(rates)):
        train.set_rates(optimizer, train.lr_factor(step, total, recipe.warmup), recipe)
        for ours in optimizer.param_groups:
            assert ours["lr"] == pytest.approx(rates[step, ours["reference"]].item(), abs=1e-12)
        loss = model(label_batch(golden))
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    losses.append(model(label_batch(golden)).item())
    # torch's AdamW decays weights before the update, the reference after it
    assert torch.allclose(torch.tensor(losses), trace["losses"], rtol=0, atol=5e-4)
    ours = {theirs: model.get_parameter(name) for name, theirs in model.checkpoint_names().items()}
    for theirs, final in trace["params_after_5_steps"].items():
        error = (ours[theirs] - final).abs()
        assert error.max() < 2e-3 and error.mean() < 1e-4, theirs


@files("_train_*.pt")
def test_uc2_training_trace(golden):
    meta, loop, outputs = golden["meta"], golden["train"], golden["outputs"]
    task, initial = UC2_TASKS[golden["meta"]["task"]], golden["initial_state_dict"]
    sizes = uc2.read_sizes(initial, uc2_config(golden), "golden")
    model = uc2.UC2(sizes, task, dropout=0.0)
    fill(model, initial)
    names = model.checkpoint_names()
    assert set(names.values()) == initial.keys()
    for ours, theirs in names.items():
        assert model.decays(ours) != golden["no_weight_decay"][theirs], theirs

    recipe = train.Recipe(
        epochs=1, batch_size=1, lr=float(meta["learning_rate"]), eps=float(meta["adam_eps"]),
        weight_decay=float(meta["weight_decay"]), warmup=float(meta["warmup_proportion"]),
        clip=float(meta["clip_grad_norm"]), betas=tuple(map(float, meta["adam_betas"].split())))
    optimizer = train.make_optimizer(model, PLAIN, recipe, 1)
    total, accumulation = loop["schedule_total_steps"], loop["gradient_accumulation_steps"]
    losses, norms, rates = [], [], []
    for i in list(range(loop["micro_batches_per_epoch"])) * loop["num_epochs"]:
        loss = model(uc2_batch(golden["micro_batches"][i]))
        losses.append(loss.item())
        (loss / accumulation).backward()
        if len(losses) % accumulation == 0:
            factor = train.lr_factor(len(norms), total, recipe.warmup)
            train.set_rates(optimizer, factor, recipe)
            rates.append(optimizer.param_groups[0]["lr"])
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            norms.append(norm.item())
            optimizer.step()
            optimizer.zero_grad()
    first = 2 * accumulation  # the first update has learning rate 0
    assert_close(torch.tensor(losses[:first]), outputs["micro_losses"][:first])
    assert rates == pytest.approx(outputs["lr_per_optimizer_step"].tolist(), abs=1e-12)
    assert torch.allclose(torch.tensor(losses), outputs["micro_losses"], rtol=1e-4, atol=3e-5)
    assert torch.allclose(torch.tensor(norms), outputs["grad_norm_before_clip"], rtol=2e-3)
    for name, theirs in names.items():
        if not theirs.endswith("key.bias"):  # rounding noise, which Adam amplifies
            error = (model.get_parameter(name) - golden["final_state_dict"][theirs]).abs().max()
            assert error <= 3e-5, theirs


# ---- Data

@files("_preproc.pt")
def test_text_clean_up(golden):
    for example in golden["text_preproc"].values():
        for name, expected in example.items():
            if name != "raw":
                kind, words = re.fullmatch(r"pre_(question|caption)_(\d+)", name).groups()
                clean = {"question": data.clean_question, "caption": data.clean_caption}[kind]
                assert clean(example["raw"], int(words)) == expected, (name, example["raw"])


@pytest.fixture
def tokenizer(golden, tmp_path):
    file = tmp_path / "golden.model"
    file.write_bytes(golden["tokenizer"]["spm_model_bytes"].numpy().tobytes())
    return data.Tokenizer(file)


@files("_preproc.pt")
def test_left_and_right(golden, tokenizer):
    records, expected = [], []
    for i, side in enumerate(golden["left_right"].values()):
        answers = dict.fromkeys(side["answers"].split("\n"), 1.0)
        records.append(data.Record(str(i), str(i), side["question"], answers))
        expected.append(not side["contains_left_or_right"])
    examples = data.Examples("golden", records, NO_LIMITS, tokenizer, training=True)
    assert examples.may_flip.tolist() == expected


@files("_preproc.pt")
def test_tokenizer(golden, tokenizer):
    golden = golden["tokenizer"]
    assert golden["specials"] == {
        "cls": data.BOS, "pad": data.PAD, "sep": data.EOS, "unk": data.UNK, "mask": tokenizer.mask,
        "vocab_size": tokenizer.vocabulary, "spm_size": tokenizer.vocabulary - 2}
    compared = 0
    for name, expected in golden.items():
        limit = re.fullmatch(r"longest|(?:longest_truncate|max_length)_(\d+)", name)
        if limit:
            rows = tokenizer(golden["texts"].values(), limit[1] and int(limit[1]))
            input_ids, mask = data.pad([rows[i] for i in range(len(rows))])
            # ours is padded to the longest text, "max_length" to the limit
            more = expected["input_ids"].shape[1] - input_ids.shape[1]
            assert more == 0 or name.startswith("max_length") and more > 0
            assert torch.equal(pad(input_ids, (0, more), value=data.PAD), expected["input_ids"])
            assert torch.equal(pad(mask, (0, more)), expected["attention_mask"])
            compared += 1
    assert compared == len(golden) - 3  # all but the model, the texts and the specials


@files("_preproc.pt")
def test_image_transform(golden):
    golden = golden["image"]
    image = Image.fromarray(golden["image_uint8_hwc"].numpy())
    name = next(name for name in golden if name.startswith("test_transform_"))
    size = int(name.removeprefix("test_transform_"))
    pixels = normalize(data.to_tensor(data.resize(image, size))[None])[0]
    error = (pixels - golden[name]) * torch.tensor(IMAGE_STD).view(3, 1, 1)
    assert error.abs().max() <= 2 / 255  # ours is rounded to a byte first
    white = normalize(torch.full((1, 3, 1, 1), 255, dtype=torch.uint8))[0, :, 0, 0]
    assert_close(white * torch.tensor(IMAGE_STD) + torch.tensor(IMAGE_MEAN), torch.ones(3))


@files("_inputs.pt")
def test_locations(golden):
    for image in golden["images"].values():
        size = np.array([[image["img_w"], image["img_h"]]])
        [found] = data.locations(image["boxes_xyxy"].numpy()[None], size)
        assert np.allclose(found, image["uc2_locations"], rtol=1e-6, atol=1e-7)
        assert torch.equal(image["features"], image["uc2_features"])
        assert len(image["boxes_xyxy"]) == image["uc2_num_boxes"]  # no global region


@files("_inputs.pt")
@pytest.mark.parametrize("task", ["xgqa", "xvnli"])
def test_uc2_rows(golden, task):
    """Tokens, truncated and padded, and targets; the "text" of a record is its row of token ids."""
    gqa, records = golden["gqa_dataset"], []
    if task == "xgqa":
        rows, labels = list(gqa["rows"].values()), [str(i) for i in range(gqa["num_labels"])]
        known = list(gqa["labels"].values())
        for row in rows:
            source, name = row["source_index"], str(row["question_id"])
            answers = {str(known[source]): 1.0} if known[source] >= 0 else {}
            records.append(data.Record(name, str(source), str(source), answers))
    else:
        rows, labels = list(golden["xvnli_dataset"]["rows"].values()), uc2.LABELS
        for i, label in enumerate(golden["xvnli_dataset"]["gold_labels"].values()):
            records.append(data.Record(str(i), str(i), str(i), label=label))
    tokenizer, limit = data.Tokenizer.__new__(data.Tokenizer), gqa["max_seq_length"]
    encoded = list(gqa["encoded"].values())
    tokenizer.model = SimpleNamespace(encode=lambda texts: [
        [token - 1 if token != data.UNK else 0 for token in encoded[int(text)][1:-1].tolist()]
        for text in texts])
    limits = SimpleNamespace(**vars(NO_LIMITS) | {"train_tokens": limit})
    examples = data.Examples("golden", records, limits, tokenizer, training=True)
    input_ids, mask = data.pad(list(examples.tokens))
    class_of = {name: i for i, name in enumerate(labels)}
    targets = data.class_targets(examples, class_of)(range(len(records)), None)["targets"]
    more = (0, limit - input_ids.shape[1])  # ours is padded to the longest of the batch
    for ours, theirs in ((pad(input_ids, more, value=data.PAD), "input_ids"),
                         (pad(mask, more), "input_mask"), (targets, "target")):
        expected = torch.stack([row[theirs] for row in rows])
        assert torch.equal(ours.double(), expected.double()), theirs


# ---- Evaluation: retrieval through eval.py, from pictures and token rows to recalls

class GoldenPictures:
    def __init__(self, tensors):
        self.tensors = tensors
        self.keys = [str(i) for i in range(len(next(iter(tensors.values()))))]

    def __len__(self):
        return len(self.keys)

    def batch(self, rows):
        return {name: tensor[rows] for name, tensor in self.tensors.items()}


def golden_retrieval(model, pictures, input_ids, mask, image_of_text, **options):
    """-> (results, [(images best first, rank of its own)] of the texts, the same of the images)."""
    rows = [row[:length].tolist() for row, length in zip(input_ids, mask.sum(1))]
    records = [SimpleNamespace(id=str(i)) for i in range(len(rows))]
    examples = {"en": SimpleNamespace(tokens=rows, records=records)}
    chosen = evaluation.EvaluationSet("xflickrco", examples, GoldenPictures(pictures),
                                      {"en": image_of_text.tolist()}, [])
    results, predictions = evaluation.evaluate(model, chosen, torch.device("cpu"), **options)
    found = []
    for kind, candidates in (("text", "images"), ("image", "texts")):
        entries = [entry for entry in predictions["en"] if kind in entry]
        found.append([(list(map(int, entry[candidates])), entry["rank"]) for entry in entries])
    return results["en"], *found


@files("_retrieval_eval.pt")
def test_uc2_retrieval(golden):
    inputs, outputs = golden["inputs"], golden["outputs"]
    model = uc2.from_finetuned(golden["state_dict"], uc2_config(golden), "xflickrco", "golden")
    missing = golden["config"]["v_feature_size"] - inputs["features_first12"].shape[-1]
    pictures = {"features": pad(inputs["features_first12"], (0, missing)),
                "locations": inputs["locations"], "region_mask": inputs["image_mask"]}
    input_ids, mask = inputs["input_ids"], inputs["input_mask"]
    memory, texts = model.eval().memory(pictures), model.encode_texts(input_ids, mask)
    for i, scores in enumerate(outputs["score_matrix_caption_by_image"].T):
        assert_close(model.match_scores(texts, mask, select(memory, slice(i, i + 1))), scores)
    results, by_text, by_image = golden_retrieval(model, pictures, input_ids, mask,
                                                  golden["caption_image_index"])
    for kind, ranks in (("image", by_text), ("text", by_image)):
        recalls = outputs[f"{kind}_retrieval_r1_r5_r10_medr_meanr"]
        for recall, k in zip(recalls, (1, 5, 10)):
            # the reference rounds fractions
            assert results[f"{kind}_recall_at_{k}"] == pytest.approx(recall.item(), abs=1e-3)
        mean = sum(1 + rank for _, rank in ranks) / len(ranks)
        assert mean == pytest.approx(recalls[4].item(), abs=1e-3)
    assert [images for images, _ in by_text] == outputs["top_images_per_caption"].tolist()


@files("_retrieval.pt", but=("_volta_retrieval.pt", "_train_retrieval.pt"))
def test_cclm_reranking(golden):
    """The k_test candidates of every text and image in the order of their scores, and the recalls.

    What is not scored stands in arbitrary order behind: a recall beyond k_test is only compared
    where all are within it.
    """
    model, reference = cclm_pretrained(golden, "xflickrco", "res_pretrain"), golden["eval"]
    k, mask = reference["k_test"], reference["attention_mask"]
    image_states = model.encode_images({"images": reference["images"]})
    text_states = model.encode_texts(reference["input_ids"], mask)
    cosine = model.image_features(image_states) @ model.text_features(text_states).T
    assert_close(cosine, reference["cosine_i2t"])
    results, by_text, by_image = golden_retrieval(
        model, {"images": reference["images"]}, reference["input_ids"], mask, reference["txt2img"],
        candidates=k)
    for scores, found in ((reference["score_t2i"], by_text), (reference["score_i2t"], by_image)):
        assert ((scores > -100).sum(1) == k).all()
        expected = scores.argsort(1, descending=True)[:, :k]
        assert [order[:k] for order, _ in found] == expected.tolist()
    for ours, theirs in (("text", "txt"), ("image", "img")):
        for at in (1, 5, 10):
            if at <= k or at >= max(cosine.shape):
                expected = reference["metrics"][f"{theirs}_r{at}"].item()
                assert results[f"{ours}_recall_at_{at}"] == pytest.approx(expected)
    for image, row in enumerate(reference["score_i2t"]):
        scored = (row > -100).nonzero()[:, 0]
        memory = model.image_memory(image_states[image, None])
        assert_close(model.match_scores(text_states[scored], mask[scored], memory), row[scored])
