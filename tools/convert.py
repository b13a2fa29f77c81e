"""Region features of other formats -> the folder of numpy files that `data.Regions` reads.

    python -m tools.convert SOURCE... DST [--boxes N]

Sources, whose images all go into the one folder DST:
    .h5, .hdf5: IGLUE's files (a group per image with features, boxes, img_w, img_h; needs h5py)
    TSV files of LXMERT and VOLTA (10 or 13 columns) and of bottom-up attention (6 columns)
    folders of <image>.npy and <image>_info.npy

One image is held at a time. Of each the first N regions are kept (36, as UC2 was trained with):
147,456 bytes of features of width 2,048, for GQA's training images 10.6 GB. The folder appears
under its name when it is complete.

Letters: V regions of an image, F feature width.
"""

import base64
import glob
import os
import shutil

import numpy as np
from tqdm import tqdm

import data
import eval as evaluation
from data import InputError, reading

HEADER = 128  # bytes of a numpy file before its array, however many images there are

# --------------------------------------------------------------------------------------------------
# Sources: each iterates over (where it stands, image id, features [V,F], boxes [V,4] x1,y1,x2,y2,
# width, height of the image in pixels)


def read_source(path):
    """Iterate over the images of a source, whatever its format."""
    if os.path.isdir(path):
        return read_npy_pairs(path)
    if path.endswith((".h5", ".hdf5")):
        return read_h5(path)
    return read_tsv(path)


def read_h5(path):
    try:
        import h5py
    except ImportError:
        raise InputError(f"{path}: H5 files need the package h5py (pip install h5py)") from None
    # without a lock: network disks have none, and another program may be reading the file
    with reading(path), h5py.File(path, "r", locking=False) as file:
        for key, group in file.items():
            where, names = f"{path}, image {key}", ("features", "boxes", "img_w", "img_h")
            with reading(where):
                arrays = [np.asarray(group[name]) for name in names]
            yield where, key, *arrays


def read_tsv(path):
    """One image a line, no header, arrays of float32 in base64."""
    with reading(path), open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            with reading(where):
                columns = line.split(b"\t")
                if len(columns) == 6:
                    key, width, height, _, boxes, features = columns
                elif len(columns) in (10, 13):
                    key, height, width = columns[:3]
                    boxes, features = columns[8:10]
                else:
                    raise ValueError(f"{len(columns)} columns, expected 6, 10 or 13: not a TSV "
                                     "file of features, a compressed or a truncated one")
                boxes = np.frombuffer(base64.b64decode(boxes), "<f4").reshape(-1, 4)  # [V,4]
                features = np.frombuffer(base64.b64decode(features), "<f4")
                features = features.reshape(len(boxes), -1)  # [V,F]
            yield where, key.decode(), features, boxes, width, height


def read_npy_pairs(folder):
    """<image>.npy has the features, <image>_info.npy a pickled dict of boxes and image size."""
    names = sorted(glob.glob("*_info.npy", root_dir=folder))
    if not names:
        raise InputError(f"{folder}: no <image>_info.npy in it (an LMDB is not read: convert the "
                         "H5 or TSV file that it was made from)")
    for name in names:
        key, path = name.removesuffix("_info.npy"), os.path.join(folder, name)
        with reading(path), open(path, "rb") as file:
            # the header of a numpy file, then a pickle, which numpy would execute
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            info = data.ArrayUnpickler(file, encoding="latin-1").load().item()
            boxes, width, height = info["bbox"], info["image_width"], info["image_height"]
        features = data.map_array(folder, f"{key}.npy")
        yield path, key, features, boxes, width, height


# --------------------------------------------------------------------------------------------------
# Checks


def are_shares(boxes, width, height):
    """Whether boxes [V,4] have been divided by the image's width and height already."""
    return boxes.max() <= 1.01 and max(width, height) > 2


def check_image(features, boxes, width, height):
    """ValueError unless features [V,F] are finite, and boxes [V,4] upright, in pixels and, to a
    pixel, in the image.
    """
    if not np.isfinite(features).all():
        raise ValueError("a feature is not finite, or beyond 65,504, the largest float16")
    if are_shares(boxes, width, height):
        raise ValueError("its boxes are shares of width and height, not pixels: every box would be "
                         "taken for a dot; convert the features again")
    x1, y1, x2, y2 = boxes.T
    upright = (x1 <= x2) & (y1 <= y2)
    inside = (x1 >= -1) & (y1 >= -1) & (x2 <= width + 1) & (y2 <= height + 1)
    sound = upright & inside  # False also for what is no number
    if not sound.all():
        box = boxes[sound.argmin()].tolist()
        raise ValueError(f"{box} is not a box x1, y1, x2, y2 in an image of {width} x {height}")


def checked(features, boxes, size):
    """-> features [V,F] float16, boxes [V,4] in pixels, whether these were shares before.

    ValueError for what no model should see.
    """
    boxes = np.array(boxes, dtype=np.float32)
    with np.errstate(over="ignore"):  # infinite then, and refused
        features = np.array(features, dtype=np.float16)
    # a row per region in both
    if features.ndim != 2 or not features.size or boxes.shape != (len(features), 4):
        raise ValueError(f"features {features.shape} and boxes {boxes.shape}, expected a row of "
                         "each per region")
    shares = are_shares(boxes, *size)
    if shares:
        boxes *= [*size, *size]
    check_image(features, boxes, *size)
    return features, boxes, shares


# --------------------------------------------------------------------------------------------------
# Writing


def convert(sources, folder, most=36):
    """Write the region features of all sources to a new folder: `most` regions of each image.

    InputError, naming the image, for what no model should see and for an image that occurs twice.
    """
    if os.path.lexists(folder):
        raise InputError(f"{folder}: already exists; delete it or name another folder")
    partial = f"{os.path.abspath(folder)}.partial"
    try:
        data.make_folder(partial)
        with data.writing(folder):
            write_regions(sources, partial, most)
            os.rename(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_regions(sources, folder, most):
    """The files of data.Regions. Features are too many to be held at once; the rest is not."""
    sizes = {}  # image id -> width, height
    counts, all_boxes, dim, scaled = [], [], None, 0
    with open(os.path.join(folder, "features.npy"), "wb") as file:
        # the header tells how many images there are: it is written last
        file.seek(HEADER)
        for source in sources:
            images = tqdm(read_source(source), source, disable=None)
            for where, key, features, boxes, width, height in images:
                with reading(where):
                    key = data.image_key(key)
                    size = int(width), int(height)
                    features, boxes, shares = checked(features, boxes, size)
                    width = features.shape[1]
                    dim = dim or width
                    if width != dim:
                        raise ValueError(f"features of width {width}, those before have {dim}")
                    if key in sizes:
                        raise ValueError(f"image {key} was there before")
                sizes[key] = size
                scaled += shares
                counts.append(min(len(features), most))
                # cut to `most` regions, or padded with zeros
                padding = (0, most - counts[-1]), (0, 0)
                all_boxes.append(np.pad(boxes[:most], padding))
                file.write(np.pad(features[:most], padding).tobytes())
        if not sizes:
            raise InputError(f"{source}: no images")
        file.seek(0)
        header = {"descr": "<f2", "fortran_order": False, "shape": (len(sizes), most, dim)}
        np.lib.format.write_array_header_1_0(file, header)

    if scaled:
        print(f"boxes of {scaled:,} images were shares of width and height: turned into pixels")
    arrays = {"boxes": all_boxes, "sizes": list(sizes.values()), "counts": counts}
    for name, array in arrays.items():
        np.save(os.path.join(folder, name), array)
    with open(os.path.join(folder, "ids.txt"), "w", encoding="utf-8") as file:
        file.writelines(f"{key}\n" for key in sizes)


def main(argv=None):
    parser = evaluation.Parser(description="Region features -> a folder that UC2 reads.")
    parser.add_argument("sources", nargs="+", help="H5 or TSV files, folders of npy files")
    parser.add_argument("folder", help="new folder to write")
    parser.add_argument("--boxes", type=int, default=36, help="regions of each image (default: 36)")
    args = parser.parse_args(argv)
    if args.boxes < 1:
        parser.error("--boxes must be positive")
    convert(args.sources, args.folder, args.boxes)
    print(f"written: {args.folder}")


if __name__ == "__main__":
    evaluation.command(main)
