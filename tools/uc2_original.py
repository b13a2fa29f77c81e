"""UC2's original file, `model_step_200000.pt`, under the names of IGLUE's, which `uc2.py` reads.

    python -m tools.uc2_original model_step_200000.pt OUT.pt
    python train.py --model uc2 --task xgqa --suf --checkpoint OUT.pt

The file of UC2's authors is what IGLUE's was converted from. It differs in more than names: both
LayerNorms of the embeddings are in their places, the pooler ends in tanh and the layers' LayerNorms
have eps 1e-12, which the config beside the tensors says ({"variant": "original"}). Every tensor is
taken, or named as unused.
"""

import argparse
import sys

import torch

import data
import uc2
from model import load, read_checkpoint, rename

# (original, IGLUE's name), but for the layers, which `uc2.official_name` counts as IGLUE does
NAMES = [
    (r"^roberta\.encoder\.layer\.", "layers."),
    (r"^roberta\.embeddings\.", "bert.embeddings."),
    (r"^roberta\.img_embeddings\.img_linear\.", "bert.embeddings.image_embeddings."),
    (r"^roberta\.img_embeddings\.img_layer_norm\.", "bert.embeddings.image_layer_norm."),
    (r"^roberta\.img_embeddings\.pos_linear\.", "bert.embeddings.image_location_embeddings."),
    (r"^roberta\.img_embeddings\.pos_layer_norm\.", "bert.embeddings.image_location_layer_norm."),
    (r"^roberta\.img_embeddings\.LayerNorm\.", "bert.embeddings.v_LayerNorm."),
    (r"^roberta\.pooler\.", "bert.t_pooler."),
    (r"^cls\.(bias|decoder\.weight)$", r"cls.predictions.\1"),
    (r"^cls\.dense\.", "cls.predictions.transform.dense."),
    (r"^cls\.layer_norm\.", "cls.predictions.transform.LayerNorm."),
    (r"^itm_output\.", "cls.bi_seq_relationship."),
    (r"^region_classifier\.net\.0\.", "cls.imagePredictions.transform.dense."),
    (r"^region_classifier\.net\.2\.", "cls.imagePredictions.transform.LayerNorm."),
    (r"^region_classifier\.net\.3\.", "cls.imagePredictions.decoder_dict.0."),
]
# heads of pre-training that IGLUE's file has not, the embedding of hidden regions, and a second
# name of cls.bias
UNUSED = ("vis_cls.", "feat_regress.", "roberta.img_embeddings.mask_embedding.", "cls.decoder.bias")


def convert(tensors, config, source):
    """-> (what torch.save writes: {"model", "config"}, names of the tensors that are not taken).

    Raises ValueError, one line, for any other file.
    """
    if "roberta.pooler.dense.weight" not in tensors:
        raise ValueError(f"{source}: not UC2's original file (no tensor "
                         "'roberta.pooler.dense.weight')")
    renamed, unused = {}, []
    for name, tensor in tensors.items():
        if name.startswith(UNUSED):
            unused.append(name)
        else:
            renamed[uc2.official_name(rename(name, NAMES))] = tensor

    # IGLUE's second names of the same tensors
    source = f"{source}, renamed as IGLUE's"
    sizes = uc2.read_sizes(renamed, config | {"variant": "original"}, source)
    with torch.device("meta"):
        whole = uc2.UC2(sizes, "pretraining")
    for alias, first in whole.aliases().items():
        if first in renamed:
            renamed[alias] = renamed[first]
    # nothing is copied into a model without memory, but every name and shape is checked
    load(whole, renamed, source)
    return {"model": renamed, "config": whole.config()}, unused


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original", metavar="model_step_200000.pt")
    parser.add_argument("out", metavar="OUT.pt")
    args = parser.parse_args()
    try:
        tensors, config = read_checkpoint(args.original)
        content, unused = convert(tensors, config, args.original)
        data.write(args.out, lambda file: torch.save(content, file))
    except (ValueError, data.InputError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{args.out}: {len(tensors) - len(unused)} tensors; not taken: {', '.join(unused)}")


if __name__ == "__main__":
    main()
