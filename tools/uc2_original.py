"""UC2's original file, `model_step_200000.pt`, under the names of IGLUE's, which `uc2.py` reads.

    python -m tools.uc2_original model_step_200000.pt OUT.pt
    python train.py --model uc2 --task xgqa --suf --checkpoint OUT.pt

The file of UC2's authors is what IGLUE's was converted from. It differs in more than names: both
LayerNorms of the embeddings are in their places, the pooler ends in tanh and the layers' LayerNorms
have eps 1e-12, which the config beside the tensors says ({"variant": "original"}). Every tensor is
taken, or named as unused.
"""

import torch

import data
import eval as evaluation
import uc2
from model import load, read_checkpoint, rename

# original -> uc2.py's name, from which `uc2.official_name` makes IGLUE's
NAMES = {
    r"^roberta\.encoder\.layer\.": "layers.",
    r"^roberta\.embeddings\.": "bert.embeddings.",
    r"^roberta\.img_embeddings\.img_linear": "region_embeddings.feature",
    r"^roberta\.img_embeddings\.img_layer_norm": "region_embeddings.feature_norm",
    r"^roberta\.img_embeddings\.pos_linear": "region_embeddings.location",
    r"^roberta\.img_embeddings\.pos_layer_norm": "region_embeddings.location_norm",
    r"^roberta\.img_embeddings\.LayerNorm": "region_embeddings.norm",
    r"^roberta\.pooler\.dense": "pooler",
    r"^cls\.(bias|dense)": r"mlm_head.\1",
    r"^cls\.layer_norm": "mlm_head.norm",
    r"^itm_output": "itm_head",
    r"^region_classifier\.net": "region_classes",
}
# heads of pre-training that IGLUE's file has not, the embedding of hidden regions, and second names
# of the word embeddings and of cls.bias
UNUSED = ("vis_cls.", "feat_regress.", "roberta.img_embeddings.mask_embedding.", "cls.decoder.")


def convert(tensors, config, source):
    """-> (what torch.save writes: {"model", "config"}, names of the tensors that are not taken).

    Raises ValueError, one line, for any other file, or KeyError for one that lacks a tensor.
    """
    if "roberta.pooler.dense.weight" not in tensors:
        raise ValueError(f"{source}: not UC2's original file; IGLUE's needs no conversion")
    renamed, unused = {}, []
    for name, tensor in tensors.items():
        if name.startswith(UNUSED):
            unused.append(name)
        else:
            renamed[uc2.official_name(rename(name, NAMES.items()))] = tensor

    # IGLUE's second names of the same tensors
    config = config | {"variant": "original"}
    with torch.device("meta"):
        whole = uc2.UC2(uc2.read_sizes(renamed, config, source), "pretraining")
    for alias, first in whole.aliases().items():
        renamed[alias] = renamed[first]
    # nothing is copied into a model without memory, but every name and shape is checked
    load(whole, renamed, source)
    return {"model": renamed, "config": config}, unused


def main():
    parser = evaluation.Parser(description="UC2's original file under IGLUE's names.")
    parser.add_argument("original")
    parser.add_argument("out")
    args = parser.parse_args()
    with data.reading("not converted"):
        content, unused = convert(*read_checkpoint(args.original), args.original)
    data.write(args.out, lambda file: torch.save(content, file))
    print("not taken:", *unused)


if __name__ == "__main__":
    evaluation.command(main)
