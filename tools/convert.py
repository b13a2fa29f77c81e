"""Region features of other formats -> the folder of numpy files that `data.Regions` reads.

    python -m tools.convert SOURCE... DST [--boxes N]

Sources, whose images all go into the one folder DST:
    H5 files as IGLUE's (a group per image with features, boxes, img_w, img_h; needs h5py)
    TSV files of LXMERT and VOLTA (10 or 13 columns) and of bottom-up attention (6 columns)
    folders of <image>.npy and <image>_info.npy

One image is held at a time. Of each the first N regions are kept (36, as UC2 was trained with):
147,456 bytes of features of width 2,048, for GQA's training images 10.6 GB. The folder appears
under its name when it is complete.

Letters: V regions of an image, F feature width, N images.
"""

import base64
import glob
import os
import shutil
from collections import namedtuple

import numpy as np
from tqdm import tqdm

import data
import eval as evaluation
from data import InputError, reading

# features [V,F]; boxes [V,4] x1,y1,x2,y2; width and height of the image in pixels; where it stands
Detections = namedtuple("Detections", "key features boxes width height where")


# --------------------------------------------------------------------------------------------------
# Sources


def read_source(path):
    """Iterate over the Detections of a source, whatever its format."""
    if os.path.isdir(path):
        return read_npy_pairs(path)
    with reading(path), open(path, "rb") as file:
        beginning = file.read(8)
    return read_h5(path) if beginning == b"\x89HDF\r\n\x1a\n" else read_tsv(path)


def read_h5(path):
    try:
        import h5py
    except ImportError:
        raise InputError(f"{path}: H5 files need the package h5py (pip install h5py)") from None
    # without a lock: network disks have none, and another program may be reading the file
    with reading(path), h5py.File(path, "r", locking=False) as file:
        for key, group in file.items():
            with reading(f"{path}, image {key}"):
                names = ("features", "boxes", "img_w", "img_h")
                features, boxes, width, height = [np.asarray(group[name]) for name in names]
            yield Detections(key, features, boxes, width, height, f"{path}, image {key}")


# number of columns -> columns of image id, width, height, number of boxes, boxes, features
TSV_COLUMNS = {6: (0, 1, 2, 3, 4, 5), 10: (0, 2, 1, 7, 8, 9), 13: (0, 2, 1, 7, 8, 9)}


def read_tsv(path):
    """One image a line, no header, arrays of float32 in base64."""
    with reading(path), open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            with reading(where):
                columns = line.rstrip(b"\r\n").split(b"\t")
                if len(columns) not in TSV_COLUMNS:
                    raise ValueError(f"{len(columns)} columns, expected 6, 10 or 13: not a TSV "
                                     "file of features, a compressed or a truncated one")
                key, width, height, count, boxes, features = [
                    columns[i] for i in TSV_COLUMNS[len(columns)]]
                count = int(count)
                boxes = np.frombuffer(base64.b64decode(boxes), "<f4").reshape(count, 4)
                features = np.frombuffer(base64.b64decode(features), "<f4").reshape(count, -1)
                key = key.decode()
            yield Detections(key, features, boxes, width, height, f"{where}, image {key}")


def read_npy_pairs(folder):
    """<stem>.npy has the features, <stem>_info.npy a pickled dict of boxes and image size."""
    paths = sorted(glob.glob(os.path.join(glob.escape(folder), "*_info.npy")))
    if not paths:
        raise InputError(f"{folder}: no <image>_info.npy in it (an LMDB is not read: convert the "
                         "H5 or TSV file that it was made from)")
    for path in paths:
        stem = path.removesuffix("_info.npy")
        with reading(path), open(path, "rb") as file:
            # the header of a numpy file, then a pickle, which numpy would execute
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            info = data.ArrayUnpickler(file, encoding="latin-1").load().item()
            boxes, width, height = info["bbox"], info["image_width"], info["image_height"]
        features = data.map_array(f"{stem}.npy")
        yield Detections(os.path.basename(stem), features, boxes, width, height, f"{stem}.npy")


# --------------------------------------------------------------------------------------------------
# Checks


def are_shares(boxes, width, height):
    """Whether boxes [V,4] have been divided by the image's width and height already."""
    return boxes.max() <= 1.01 and max(width, height) > 2


def check_boxes(boxes, width, height):
    """ValueError unless all boxes [V,4] are upright, in pixels and, to a pixel, in the image."""
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


def checked(found):
    """Detections -> (key, features [V,F] float16, boxes [V,4] pixels, (w, h), whether the boxes
    were shares of width and height). InputError for what no model should see.
    """
    with reading(found.where):
        key = data.image_key(found.key)
        size = int(found.width), int(found.height)
        boxes = np.array(found.boxes, dtype=np.float32)
        with np.errstate(over="ignore"):  # infinite then, and refused
            features = np.array(found.features, dtype=np.float16)
        if features.ndim != 2 or not features.size or boxes.shape != (len(features), 4):
            raise ValueError(f"features {list(features.shape)} and boxes {list(boxes.shape)}, "
                             "expected a row of each per region")
        if not data.all_finite(features):
            raise ValueError("a feature is not finite, or beyond 65,504, the largest float16")
        shares = are_shares(boxes, *size)
        if shares:
            boxes *= [*size, *size]
        check_boxes(boxes, *size)
        return key, features, boxes, size, shares


# --------------------------------------------------------------------------------------------------
# Writing


def convert(sources, folder, most=36):
    """Write the region features of all sources to a new folder: `most` regions of each image.

    -> lines that tell what was done.
    InputError, naming the image, for what no model should see and for an image that occurs twice.
    """
    if os.path.lexists(folder):
        raise InputError(f"{folder}: already exists; delete it or name another folder")
    partial = f"{os.path.abspath(folder)}.partial"
    try:
        data.make_folder(partial)
        with data.writing(folder):
            lines = write_regions(sources, partial, most)
            os.rename(partial, folder)
            return [*lines, f"written: {folder}"]
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_header(file, shape, kind):
    """At the beginning of a numpy file. As long for any number of rows: it can be overwritten."""
    file.seek(0)
    header = {"descr": np.dtype(kind).str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def write_regions(sources, folder, most):
    rows, sizes, counts = {}, [], []  # by image: its row; size; regions that are kept
    found_most, scaled, dim = 0, 0, None
    with (open(os.path.join(folder, "features.npy"), "wb") as features_file,
          open(os.path.join(folder, "boxes.npy"), "wb") as boxes_file):
        for source in sources:
            for found in tqdm(read_source(source), source, unit=" images", disable=None):
                key, features, boxes, size, shares = checked(found)
                if dim is None:
                    dim = features.shape[1]
                    write_header(features_file, (0, most, dim), np.float16)
                    write_header(boxes_file, (0, most, 4), np.float32)
                if features.shape[1] != dim:
                    raise InputError(f"{found.where}: features of width {features.shape[1]:,}, "
                                     f"those before have {dim:,}")
                if key in rows:
                    raise InputError(f"{found.where}: image {key} was there before")
                rows[key] = len(rows)
                sizes.append(size)
                counts.append(min(len(features), most))
                found_most = max(found_most, len(features))
                scaled += shares
                # cut to `most` regions, or padded with zeros
                for array, file in ((features, features_file), (boxes, boxes_file)):
                    padded = np.zeros((most, array.shape[1]), array.dtype)
                    padded[: counts[-1]] = array[:most]
                    file.write(padded.tobytes())
        if not rows:
            raise InputError(f"{', '.join(sources)}: no images")
        write_header(features_file, (len(rows), most, dim), np.float16)
        write_header(boxes_file, (len(rows), most, 4), np.float32)
    np.save(os.path.join(folder, "sizes.npy"), np.array(sizes, dtype=np.int32))
    if min(counts) < most:
        np.save(os.path.join(folder, "counts.npy"), np.array(counts))
    with open(os.path.join(folder, "ids.txt"), "w", encoding="utf-8") as file:
        file.writelines(f"{key}\n" for key in rows)
    # last: with it, the folder is complete
    meta = {"format": 1, "count": len(rows), "boxes": most, "dim": dim, "dtype": "float16"}
    names = ", ".join(os.path.basename(os.path.normpath(source)) for source in sources)
    data.write_json(os.path.join(folder, "meta.json"), meta | {"source": names, "complete": True})

    lines = [f"{len(rows):,} images, up to {max(counts)} regions of width {dim:,} each"]
    if scaled:
        lines.append(f"boxes of {scaled:,} images were shares of width and height: turned into "
                     "pixels")
    if found_most > most:
        lines.append(f"images have up to {found_most} regions; --boxes {found_most} keeps all")
    return lines


def main(argv=None):
    parser = evaluation.Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("sources", nargs="+", help="H5 or TSV files, folders of npy files")
    parser.add_argument("folder", help="new folder to write")
    parser.add_argument("--boxes", type=int, default=36, metavar="N", help="regions of each image "
                        "that are kept (default: 36)")
    args = parser.parse_args(argv)
    if args.boxes < 1:
        parser.error("--boxes must be positive")
    print(*convert(args.sources, args.folder, args.boxes), sep="\n")


if __name__ == "__main__":
    evaluation.command(main)
