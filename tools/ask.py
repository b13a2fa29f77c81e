"""Ask trained models about an image.

    python -m tools.ask RUN [RUN ...] --image ID --question "What colour is the circle?"

The five likeliest answers of each xGQA run, with their likelihoods: CCLM's are probabilities of the
generated answer, UC2's sigmoids of a score per answer, which need not sum to 1. ID is one of the
run's test images, the name of its file without .jpg. A single question needs no GPU.
"""

import torch

import data
import eval as evaluation
from data import InputError


@torch.inference_mode()
def main(argv=None):
    parser = evaluation.Parser(description="Ask trained models about an image.")
    parser.add_argument("runs", nargs="+", help="folders of xGQA runs")
    parser.add_argument("--image", required=True, help="id of a test image")
    parser.add_argument("--question", required=True, help="in any language")
    given = parser.parse_args(argv)

    for run in given.runs:
        print(run)
        model, tokenizer, labels, args, recipe = evaluation.load_run(run, "cpu")
        if args.task != "xgqa":
            raise InputError(f"{run}: a run on {args.task}; only runs on xgqa answer questions")
        model.eval()
        # the image
        pictures = evaluation.make_pictures(args, recipe, "test", [given.image])
        memory = model.memory(pictures.batch([0]))
        # the question, cleaned and cut as those of the test
        record = data.Record("1", "1", given.question)
        examples = data.Examples("--question", [record], recipe, tokenizer)
        states, mask = evaluation.encode(model, examples.tokens, "cpu")
        # every answer
        if args.model == "uc2":
            likelihoods = model.label_logits(states, mask, memory)[0].sigmoid()
        else:
            # -log p, not of all at once: their logits would fill the memory
            fused, losses = model.fuse(states, mask, memory), []
            for answers in model.answer_ids.split(64):
                rows = torch.zeros_like(answers[:, 0])  # all answer the one question
                losses.append(model.decoder.answer_losses(fused, mask, answers, rows))
            likelihoods = (-torch.cat(losses)).exp()
        for value, label in zip(*likelihoods.topk(5)):
            print(f"  {value:6.1%}  {labels[label]}")


if __name__ == "__main__":
    evaluation.command(main)
