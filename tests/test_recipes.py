"""recipes.py: what a checkpoint's recipe may hold, and what is said not to be the paper's."""

from dataclasses import asdict, fields
from types import SimpleNamespace

import pytest
from conftest import ROOT

import recipes
from files import InputError
from model import read_checkpoint

WRONG = [
    *(("epochs", value) for value in (True, 0, -1, 2.0, "2", None, 10**30)),
    *(("batch_size", value) for value in (True, 0, [8])),
    *(("lr", value) for value in (True, 0, -1e-3, "1e-3", [1, 2], None, float("nan"), float("inf"), 10**400)),
    *(("vision_lr", value) for value in (False, 0.0, [1])),
    *(("weight_decay", value) for value in (True, "x", -0.1, float("inf"))),
    *(("warmup", value) for value in (True, "x", 50, -0.1)),
    *(("betas", value) for value in ([1, 2, 3], ["a", "b"], [], [0.9, 1.0], [0.9, True], 0.9, "ab")),
    *(("eps", value) for value in ([1], 0, True)),
    *(("clip", value) for value in ([1], 0.0, True, "x")),
    *((name, value) for name in ("dropout", "drop_path") for value in (3.0, 1, [1], True, -0.1)),
    *(("image_size", value) for value in (10**6, 10**30, 0, -5, 32.0, True)),
    *(("augment", value) for value in (7, 0, "yes", None)),
    *(("few_shot_epochs", value) for value in ("x", 0, True)),
    *(("few_shot_lrs", value) for value in (["a"], 5, [], [1e-3, True], [0.0], [1e-3] * 1000, "x")),
    *(("micro_batch", value) for value in (None, True, 0)),
    *(("clean", value) for value in ([1], 5, "nope", None)),
    *(("train_words", value) for value in ([1], 0, True)), ("test_words", -1),
    *((name, value) for name in ("train_tokens", "test_tokens") for value in (1, True, 2.5)),
    ("suf_k", 0), ("embedding_lr", "x"), ("speed", 1)]


def own_recipe(recipe, **flags):
    """What comes of a checkpoint's recipe: `recipes.recipe_of`."""
    args = SimpleNamespace(**{"model": "cclm", "task": "xgqa", "checkpoint": "own.pt", "suf": None, "few_shot": None}
                           | flags)
    return recipes.recipe_of(args, {"recipe": {"xgqa": recipe}})


@pytest.mark.parametrize("name, value", WRONG, ids=lambda part: str(part)[:20])
def test_a_checkpoint_brings_a_wrong_recipe(name, value):
    with pytest.raises(InputError, match=f"^own.pt: the recipe it brings.*{name}.*") as error:
        own_recipe({name: value})
    assert name == "speed" or ", expected " in str(error.value)


@pytest.mark.parametrize("name, value", [
    ("lr", 1), ("vision_lr", None), ("weight_decay", 0), ("warmup", 0.0), ("betas", [0, 0.999]), ("clip", None),
    ("dropout", 0), ("augment", False), ("few_shot_lrs", (1e-3,)), ("clean", ""), ("test_tokens", 3)])
def test_a_checkpoint_brings_a_right_recipe(name, value):
    assert getattr(own_recipe({name: value})[0], name) == (tuple(value) if isinstance(value, list) else value)


def test_recipes_in_use_are_right():
    assert list(recipes.CHECKS) == [field.name for field in fields(recipes.Recipe)]
    for recipe in recipes.RECIPES.values():
        recipes.check_fields(asdict(recipe), recipes.CHECKS, "the paper's")
    for model, task in recipes.RECIPES:
        args = SimpleNamespace(model=model, task=task, checkpoint="shipped", suf=True, few_shot=None)
        recipes.recipe_of(args, read_checkpoint(ROOT / "miniature" / f"{model}.pt")[1])


def test_what_is_not_as_in_the_paper_is_told_where_it_applies():
    own = {"suf_k": 1, "few_shot_lrs": [1e-3], "few_shot_epochs": 2, "image_size": 32, "epochs": 2}
    for flags, names in (({}, ["image_size", "epochs"]), ({"suf": True}, ["suf_k", "image_size", "epochs"]),
                         ({"suf": 2}, ["image_size", "epochs"]), ({"model": "uc2"}, ["epochs"]),
                         ({"few_shot": "de"}, ["few_shot_lrs", "few_shot_epochs", "image_size", "epochs"])):
        recipe, changed = own_recipe(own, **flags)
        assert [line.split()[0] for line in changed] == names and recipe.suf_k == 1


def test_what_is_not_as_in_the_paper_is_told_rightly():
    """None is "as lr" for rates alone; a list of the paper's numbers is the paper's tuple."""
    assert own_recipe({"vision_lr": None})[1] == ["vision_lr as lr (checkpoint; paper 2e-05)"]
    assert own_recipe({"test_tokens": 40})[1] == ["test_tokens 40 (checkpoint; paper none)"]
    assert own_recipe({"clip": None}, model="uc2")[1] == ["clip none (checkpoint; paper 1)"]
    assert own_recipe({"betas": [0.9, 0.98]})[1] == []
    assert own_recipe({"betas": [0.9, 0.99]})[1] == ["betas (0.9, 0.99) (checkpoint; paper (0.9, 0.98))"]


@pytest.mark.parametrize("flags, name", [
    ([], "standard"), (["--suf"], "suf"), (["--suf", "2", "--order", "random"], "suf2-random"),
    (["--suf", "--freeze", "vision", "embeddings"], "suf-frozen-embeddings-frozen-vision"),
    (["--lr-decay", "0.5"], "decay0.5"), (["--train-top", "6"], "top6"),
    (["--train-top", "6", "--freeze"], "top6-trained-embeddings"),
    (["--train-top", "6", "--freeze", "vision"], "top6-frozen-vision-trained-embeddings")])
def test_strategies_have_names_of_their_own(flags, name):
    args = recipes.parse_args(["--model", "cclm", "--task", "xgqa", *flags], None)
    assert recipes.strategy_name(args) == name


@pytest.mark.parametrize("flags", [["--vision-lr", "1e-5"], ["--embedding-lr", "1e-5"], ["--eval-every-epoch"],
                                   ["--save-epochs"], ["--image-cache", "cache"], ["--suf"], ["--model", "uc2"]])
def test_what_few_shot_training_would_ignore_is_refused(flags, capsys):
    with pytest.raises(SystemExit, match="2"):
        recipes.parse_args(["--few-shot", "de", "--shots", "48", "--init", "run", *flags], None)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and ("few-shot" in error or "--init RUN brings" in error)
