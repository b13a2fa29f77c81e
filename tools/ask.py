"""Ask trained models about an image.

    python -m tools.ask RUN [RUN ...] --image FILE --question "What colour is the circle?"

The five likeliest answers of each xGQA run, with their likelihoods: CCLM's are probabilities of the
generated answer, UC2's sigmoids of a score per answer, which need not sum to 1. --image is a file,
or the id of one of the run's test images; UC2, which sees region features, needs an id.
"""

import os

import torch

import data
import eval as evaluation
from data import InputError


@torch.inference_mode()
def ask(run, image, question, device, folder=None):
    """-> [(answer, likelihood)], the five likeliest."""
    model, tokenizer, labels, args, recipe = evaluation.load_run(run, device, None, folder)
    if args.task != "xgqa":
        raise InputError(f"{run}: a run on {args.task}; only runs on xgqa answer questions")
    model.eval()
    if args.model == "cclm" and os.path.isfile(image):
        pixels = data.to_tensor(data.resize(data.read_image(image), recipe.image_size))
        batch = {"images": pixels[None]}
    else:
        batch = evaluation.make_pictures(args, recipe, "test", [image]).batch([0])
    # the image once, then the question
    memory = model.memory({name: tensor.to(device) for name, tensor in batch.items()})
    # cleaned and cut as the test's questions are
    records = [data.Record("1", "1", question)]
    tokens = data.Examples("--question", records, recipe, tokenizer).tokens
    states, mask = evaluation.encode(model, tokens, device)
    if args.model == "uc2":
        likelihoods = model.label_logits(states, mask, memory)[0].sigmoid()
    else:
        # -log p of every label, not of all at once: their logits would fill the memory
        fused, losses = model.fuse(states, mask, memory), []
        for answers in model.answer_ids.split(64):
            rows = torch.zeros_like(answers[:, 0])  # all answer the one question
            losses.append(model.decoder.answer_losses(fused, mask, answers, rows))
        likelihoods = (-torch.cat(losses)).exp()
    values, order = likelihoods.topk(5)
    return [(labels[i], value) for i, value in zip(order.tolist(), values.tolist())]


def main(argv=None):
    parser = evaluation.Parser(description="Ask trained models about an image.")
    parser.add_argument("runs", nargs="+", help="folders of xGQA runs")
    parser.add_argument("--image", required=True, help="a file, or the id of a test image")
    parser.add_argument("--question", required=True, help="in any language")
    parser.add_argument("--data", help="folder where the data of the runs are now")
    given = parser.parse_args(argv)
    device = evaluation.accelerator()
    for run in given.runs:
        print(run)
        for answer, value in ask(run, given.image, given.question, device, given.data):
            print(f"  {value:6.1%}  {answer}")


if __name__ == "__main__":
    evaluation.command(main)
