"""Data: lists of pictures and captions, the picture cache, augmentation, batches, and the drawn worlds.

A reader gives one plain structure, `Pairs`: picture paths, captions, and which picture each caption is about.
Everything after it is the same for every data set. Pictures are decoded and resized once, into a uint8 array on
disk that later epochs and runs map into memory; augmentation and normalisation run on whole batches, on the device.

    python data.py ucm --data-root ucm_precomp      what each split holds, and all that is missing

Shapes: N pictures, M captions, B batch, H x W pixels.
"""
import argparse
import contextlib
import hashlib
import json
import math
import os
import random
import sys
import tempfile
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm

import clip


# ---------------------------------------------------------------------------------------------- readers

@dataclass
class Pairs:
    """One split of a data set: caption `captions[m]` is about the picture `images[image_of_caption[m]]`."""
    images: list                # N paths
    captions: list              # M strings
    image_of_caption: list      # M indices into images
    ids: list = None            # N person ids, for re-identification
    sources: list = None        # M places where the captions stand, such as "train_caps.txt:17"


class NoSplit(ValueError):
    """The data set is there, but it has no such split."""


def read_lines(path):
    """The lines of a UTF-8 text file; FileNotFoundError, or ValueError with the line that is not UTF-8."""
    if not path.is_file():
        there = ", ".join(sorted(p.name for p in path.parent.glob("*"))[:8])
        raise FileNotFoundError(f"{path} is not there; {path.parent} "
                                + (f"holds {there}" if there else "does not exist or is empty"))
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")       # splitlines() would cut at U+2028 and \f too
    except UnicodeDecodeError as error:
        line = error.object[:error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line} is not UTF-8 text; convert the file first") from None
    return [line.strip(" \r") for line in (lines if lines[-1] else lines[:-1])]


def picture_path(folder, name, source):
    """Path of a picture from a list; ValueError if it has no name, or one that leads out of the folder by '..'."""
    if os.path.normpath(name).split(os.sep)[0] in (".", ".."):
        raise ValueError(f"{source}: the picture {name!r} is not named, or lies outside {folder}")
    return str(folder / name)           # an absolute name stays as it is


def image_folder(root):
    """The folder of pictures beside the caption files: `images`, the first `*_images`, or the root itself."""
    found = [p for p in [root / "images", *sorted(root.glob("*_images"))] if p.is_dir()]
    return found[0] if found else root


def pair_up(rows, person=None):
    """Rows (path of a picture, caption, where it stands) -> Pairs; equal paths are one picture. person: id by path."""
    for _, caption, source in rows:
        if not isinstance(caption, str):
            raise ValueError(f"{source}: the caption {caption!r} is no text")
    place = {path: n for n, path in enumerate(dict.fromkeys(path for path, _, _ in rows))}
    return Pairs(list(place), [caption.strip() for _, caption, _ in rows], [place[path] for path, _, _ in rows],
                 person and [person[path] for path in place], [source for _, _, source in rows])


def read_precomp(root, split, seed=2):
    """Caption files of UCM, RSICD and RSITMD as the remote-sensing papers pass them on -> Pairs.

    root holds `train_caps.txt`, `train_filename.txt` (each picture once; captions 5k..5k+4 are its own),
    `test_caps.txt`, `test_filename.txt` (line by line) and the folder of pictures. split: train, val or test.
    train and val are the official split of the train files: shuffled with random.seed(2), the first 80 % train.
    Raises NoSplit without test files, FileNotFoundError, or ValueError for lists that do not fit each other.
    """
    if split not in ("train", "val", "test"):
        raise ValueError(f"split {split!r} is not one of train, val, test")
    root, part = Path(root), "test" if split == "test" else "train"
    per_line = 1 if part == "test" else 5
    names_file, captions_file = root / f"{part}_filename.txt", root / f"{part}_caps.txt"
    if (root / "train_caps.txt").exists() and not names_file.exists() and not captions_file.exists():
        raise NoSplit(f"{root} has no {names_file.name} and no {captions_file.name}")
    names, captions = read_lines(names_file), read_lines(captions_file)
    if len(captions) != per_line * len(names):
        raise ValueError(f"{captions_file} has {len(captions)} lines and {names_file.name} {len(names)}: "
                         f"{'as many' if per_line == 1 else 'five captions for each picture'} are expected")
    folder, line_of = image_folder(root), {}
    paths = [picture_path(folder, name, f"{names_file}:{n}") for n, name in enumerate(names, 1)]
    rows = [(paths[m // per_line], caption, f"{captions_file.name}:{m + 1}") for m, caption in enumerate(captions)]
    if split == "test":
        return pair_up(rows)
    for n, name in enumerate(names, 1):
        if line_of.setdefault(name, n) < n:
            raise ValueError(f"{names_file}:{n} repeats {name} of line {line_of[name]}")
    fives = [rows[m:m + 5] for m in range(0, len(rows), 5)]
    random.Random(seed).shuffle(fives)
    cut = int(0.8 * len(fives))
    return pair_up([row for five in (fives[:cut] if split == "train" else fives[cut:]) for row in five])


def read_entries(path, split, *keys):
    """The entries of one split in a JSON list, or in Karpathy's `images`, as pairs (where it stands, entry).

    keys: what each entry has, the last one a list. Raises FileNotFoundError, ValueError for another layout, or NoSplit.
    """
    try:
        entries = json.loads("\n".join(read_lines(path)))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from None
    entries = entries.get("images") if isinstance(entries, dict) else entries
    if not isinstance(entries, list) or not all(isinstance(e, dict) and set(keys) <= set(e) for e in entries):
        raise ValueError(f"{path} is no list of entries that have {', '.join(keys)} each")
    for n, entry in enumerate(entries):
        if not isinstance(entry["split"], str) or not isinstance(entry[keys[-1]], list):
            raise ValueError(f"{path}, entry {n}: its split is to be a text and its {keys[-1]} a list")
    splits = [entry["split"].lower().replace("restval", "train") for entry in entries]      # restval is COCO's
    if split not in splits:
        raise NoSplit(f"{path} has no picture of split {split!r}; there are {dict(Counter(splits))}")
    return [(f"{path.name}, entry {n}", entry) for n, entry in enumerate(entries) if splits[n] == split]


def read_karpathy_json(path, split, images=None):
    """`dataset_*.json` in Karpathy's layout (images[].filename, .split, .sentences[].raw) -> Pairs.

    path: the file, or a folder with exactly one `dataset*.json`. images: the folder of pictures, by default the one
    beside the file. split: train, val or test.
    """
    path = Path(path)
    if path.is_dir():
        found = sorted(path.glob("dataset*.json"))
        if len(found) != 1:
            raise FileNotFoundError(f"{path} holds {len(found)} files dataset*.json, one is expected")
        path = found[0]
    folder, rows = Path(images) if images else image_folder(path.parent), []
    for source, entry in read_entries(path, split, "filename", "split", "sentences"):
        image = picture_path(folder, os.path.join(entry.get("filepath", ""), entry["filename"]), source)
        if not all(isinstance(sentence, dict) and "raw" in sentence for sentence in entry["sentences"]):
            raise ValueError(f"{path}, {source}: each of its sentences is to have a 'raw'")
        rows += [(image, sentence["raw"], source) for sentence in entry["sentences"]]
    return pair_up(rows)


REID_SETS = {   # annotation files, and where they come from
    "CUHK-PEDES": (["reid_raw.json"], "github.com/ShuangLI59/Person-Search-with-Natural-Language-Description"),
    "ICFG-PEDES": (["ICFG-PEDES.json", "ICFG_PEDES.json"], "github.com/zifyloo/SSAN"),
    "RSTPReid": (["data_captions.json"], "github.com/NjtechCVLab/RSTPReid-Dataset")}


def read_reid(root, split, dataset=None):
    """CUHK-PEDES, ICFG-PEDES or RSTPReid, by default told apart by the annotation file in root -> Pairs with ids.

    Training ids are mapped to 0..n-1 in sorted order; those of val and test stay as they are. Pictures lie under
    `imgs/`. ICFG-PEDES has no val split (NoSplit), and its split is in the JSON: its folders train/ and test/ differ.
    """
    root, sets = Path(root), [dataset] if dataset else list(REID_SETS)
    found = [root / name for key in sets for name in REID_SETS[key][0] if (root / name).is_file()]
    if not found:
        wanted = "; ".join(f"{' or '.join(REID_SETS[key][0])} of {key}, from {REID_SETS[key][1]}" for key in sets)
        hint = "; caption_all.json lacks the split" if (root / "caption_all.json").exists() else ""
        raise FileNotFoundError(f"{root} does not hold {wanted}{hint}")
    rows, person = [], {}
    for source, entry in read_entries(found[0], split, "id", "split", "captions"):
        image = picture_path(root / "imgs", entry.get("file_path") or entry.get("img_path", ""), source)
        if not str(entry["id"]).isdecimal():
            raise ValueError(f"{found[0]}, {source}: the id {entry['id']!r} is no number")
        person[image] = int(entry["id"])
        rows += [(image, caption, source) for caption in entry["captions"]]
    pairs = pair_up(rows, person)
    if split == "train":
        label = {old: new for new, old in enumerate(sorted(set(pairs.ids)))}
        pairs.ids = [label[old] for old in pairs.ids]
    return pairs


def read_folder(root, split):
    """One's own pictures: `captions.tsv` in lines `picture<TAB>caption` or `picture<TAB>caption<TAB>split` -> Pairs.

    A picture, named from root, may stand in several lines. Pictures without a split are sorted, shuffled with
    random.seed(2) and dealt out: a tenth, at least one, to val and to test each, the others to train. One or two
    pictures are all train. Raises NoSplit, or ValueError with the line.
    """
    file, rows, split_of = Path(root) / "captions.tsv", [], {}
    for n, line in enumerate(read_lines(file), 1):
        name, *fields = line.split("\t")
        if len(fields) not in (1, 2) or fields[1:] not in ([], ["train"], ["val"], ["test"]):
            raise ValueError(f"{file}:{n} is not picture<TAB>caption, with or without <TAB>train, val or test")
        image = picture_path(file.parent, name, f"{file}:{n}")
        if fields[1:] and split_of.setdefault(image, fields[1:]) != fields[1:]:
            raise ValueError(f"{file}:{n}: {name} has stood in another split, or in none, before")
        split_of.setdefault(image, [])
        rows.append((image, fields[0], f"{file.name}:{n}"))
    free = sorted(image for image in split_of if not split_of[image])
    random.Random(2).shuffle(free)
    tenth = max(1, len(free) // 10) if len(free) > 2 else 0
    for n, image in enumerate(free):
        split_of[image] = ["val" if n < tenth else "test" if n < 2 * tenth else "train"]
    rows = [row for row in rows if split_of[row[0]] == [split]]
    if not rows:
        raise NoSplit(f"{file} has no picture of split {split!r}")
    return pair_up(rows)


# ---------------------------------------------------------------------------------------------- pictures

def some(items, limit=20):
    """The first items in words, and how many more there are."""
    items = list(items)
    return "; ".join(items[:limit]) + (f"; and {len(items) - limit} more" if len(items) > limit else "")


class BadPictures(ValueError):
    """Pictures that cannot be used; `reasons` says why, by path."""
    def __init__(self, reasons):
        super().__init__(f"{len(reasons)} pictures cannot be used: {some(reasons.values())}")
        self.reasons = reasons


def decode(path, size):
    """The preprocessed pixels of a picture, uint8 (3, H, W), or in words what is wrong with it.

    Of a moving picture it is the first frame; grey of 16 bits is cut off at 255, as OpenAI's pipeline does.
    """
    if not os.path.isfile(path):
        return f"{path} is missing"
    try:
        with Image.open(path) as image:
            return clip.preprocess(image, size).numpy()
    except Exception as error:          # a damaged file can raise almost anything in Pillow
        return f"{path}: {getattr(error, 'strerror', None) or error}"


@contextlib.contextmanager
def made_whole(path):
    """A draft of a file or folder, which gets its name only when it is whole: a part is never taken for the whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(".partial", f"{path.name}.", path.parent) as folder:
        draft = Path(folder) / path.name
        yield draft
        if draft.is_file() or not any(path.glob("*")):      # a folder may have been made by another process meanwhile
            os.replace(draft, path)


def load_images(paths, size, cache="runs/cache"):
    """Decoded and preprocessed pictures, uint8 (N, 3, H, W), mapped from a file that is made on first use.

    size: pixels or (H, W), as in `clip.preprocess`. The file in the folder `cache` holds the bare pixels and is named
    by the paths, their sizes and times of change, so that an edited picture makes a new one; one that was cut off is
    made again. Raises BadPictures, which names all of them, or OSError where the cache cannot be written.
    """
    marks = [(os.path.abspath(p), os.stat(p).st_size, os.stat(p).st_mtime_ns) for p in paths if os.path.isfile(p)]
    file = Path(cache) / f"{hashlib.sha256(repr((size, marks)).encode()).hexdigest()[:20]}.uint8"
    shape = (len(paths), 3, *((size, size) if isinstance(size, int) else size))
    if not file.is_file() or file.stat().st_size != math.prod(shape):
        bad = {}
        try:
            # closing: cancels what is not decoded yet, after Ctrl-C or on a full disk
            with (made_whole(file) as draft, open(draft, "wb") as out, ThreadPoolExecutor(os.cpu_count()) as pool,
                  contextlib.closing(pool.map(decode, paths, [size] * len(paths))) as pictures):
                pictures = tqdm(pictures, "reading pictures", len(paths), leave=False, disable=None)
                for path, pixels in zip(paths, pictures):
                    if isinstance(pixels, str):
                        bad[path] = pixels
                    else:
                        out.write(pixels)
                if bad:
                    raise BadPictures(bad)
        except OSError as error:
            raise OSError(f"cannot write {file}: {error.strerror or error}; make room there") from None
    return np.memmap(file, np.uint8, "r", shape=shape)


def without(pairs, rows):
    """Pairs without the captions `rows` (a set of indices), and without the pictures that are left with no caption."""
    paths = [pairs.images[n] for n in pairs.image_of_caption]
    found = zip(paths, pairs.captions, pairs.sources or paths)
    return pair_up([row for m, row in enumerate(found) if m not in rows],
                   pairs.ids and dict(zip(pairs.images, pairs.ids)))


def load(pairs, size, cache="runs/cache", skip_bad=False):
    """Decode the pictures of all splits: {split: Pairs} -> ({split: Pairs}, {split: uint8 (N, 3, H, W)}, notes).

    Empty captions are left out, and so are pictures that have no other. Bad pictures raise one ValueError that names
    those of all splits; skip_bad leaves them out with their captions, at the price of decoding their split anew at
    each start. A split without a picture is a ValueError. notes: what was left out, in words.
    """
    pairs, images, notes, bad = dict(pairs), {}, [], {}
    for split, part in pairs.items():
        empty = [m for m, caption in enumerate(part.captions) if not caption.strip()]
        if empty:       # differs from PE-RSITR: it trains on the 20 empty captions of RSITMD
            places = [part.sources[m] if part.sources else f"caption {m}" for m in empty]
            notes.append(f"{split}: {len(empty)} empty captions are left out: {some(places, 5)}")
            pairs[split] = part = without(part, set(empty))
        if not part.images:
            raise ValueError(f"the split {split} has no picture that can be used")
        try:
            images[split] = load_images(part.images, size, cache)
        except BadPictures as error:
            bad |= error.reasons
    if not bad:
        return pairs, images, notes
    if not skip_bad:
        raise ValueError(f"{BadPictures(bad)}; --skip-bad leaves them out with their captions")
    for split, part in pairs.items():
        pairs[split] = without(part, {m for m, n in enumerate(part.image_of_caption) if part.images[n] in bad})
    notes.append(f"{len(bad)} bad pictures are left out with their captions: {some(bad.values(), 5)}")
    pairs, images, _ = load(pairs, size, cache)
    return pairs, images, notes


def erase(images):
    """Half of the pictures (B, 3, H, W) lose a box of 2 to 40 % of their area to CLIP's mean colour."""
    B, _, H, W = images.shape
    area, aspect = 0.02 + 0.38 * torch.rand(B, 1, 1), 0.3 * 11 ** torch.rand(B, 1, 1)       # aspect: height / width
    aspect = aspect.clamp(area * H / W, H / W / area)   # differs from IRRA: a box too long is made squarer, not redrawn
    h, w = (area * H * W * aspect).sqrt().round(), (area * H * W / aspect).sqrt().round()
    top, left = (torch.rand(B, 1, 1) * (H - h + 1)).floor(), (torch.rand(B, 1, 1) * (W - w + 1)).floor()
    y, x = torch.arange(H)[:, None], torch.arange(W)
    box = (y >= top) & (y < top + h) & (x >= left) & (x < left + w) & (torch.rand(B, 1, 1) < 0.5)   # (B, H, W)
    mean = 255 * torch.tensor(clip.MEAN).view(3, 1, 1)  # differs from IRRA: the box is 0 once normalised, there MEAN
    return torch.where(box[:, None].to(images.device), mean.to(images), images)


def augment(images, kind):
    """Random changes of a batch (B, 3, H, W) of float pixels, drawn from torch's CPU generator.

    "none"; "crop": a window of 60 to 100 % of the area; "aerial": that, turned by a multiple of 90 degrees and mirrored
    (the ground has no up); "people": mirrored, moved by up to 10 pixels with black beyond the edge, half of them erased
    in part. All but erasing is one affine map a picture: mirrors, whole-pixel shifts and, of squares, turns are exact;
    crops are bilinear.
    """
    if kind == "none":
        return images
    B, _, H, W = images.shape
    zoom, turn, flip = torch.ones(B), torch.zeros(B), torch.ones(B)
    shift = torch.rand(B, 2) * 2 - 1
    if kind in ("crop", "aerial"):
        zoom = (0.6 + 0.4 * torch.rand(B)).sqrt()
        shift = shift * (1 - zoom)[:, None]
    if kind == "people":
        shift = (shift * 10.5).round() * 2 / torch.tensor([W, H])   # the coordinates run from -1 to 1
    if kind in ("aerial", "people"):
        flip = torch.randint(0, 2, (B,)) * 2.0 - 1
    if kind == "aerial":
        turn = torch.randint(0, 4, (B,)) * math.pi / 2
    cos, sin = (zoom * turn.cos()).round(decimals=6), (zoom * turn.sin()).round(decimals=6)
    theta = torch.stack([cos * flip, -sin, shift[:, 0], sin * flip, cos, shift[:, 1]], dim=1).view(B, 2, 3)
    grid = F.affine_grid(theta.to(images), images.shape, align_corners=False)
    edge = "zeros" if kind == "people" else "reflection"
    images = F.grid_sample(images, grid, padding_mode=edge, align_corners=False)
    return erase(images) if kind == "people" else images


# ---------------------------------------------------------------------------------------------- batches

def epoch_order(pairs, over, seed, epoch):
    """The captions of one epoch in random order, int64: a pure function of seed and epoch, so a run can resume.

    over "captions": every caption once (the papers' epoch). "images": every picture once, with one of its captions.
    """
    rng = np.random.default_rng([seed, epoch])
    if over == "captions":
        return rng.permutation(len(pairs.captions))
    image_of_caption = np.asarray(pairs.image_of_caption)
    shuffled = rng.permutation(len(image_of_caption))
    _, first = np.unique(image_of_caption[shuffled], return_index=True)     # one random caption of each picture
    return rng.permutation(shuffled[first])


def batches(images, tokens, image_of_caption, order, batch_size, start=0, rank=0, world=1):
    """Yield (images uint8 (B, 3, H, W), tokens (B, L), captions (B,)) along `order`, from batch number `start` on.

    The next two are read in a thread while the caller works on this one; the last may be smaller. Process `rank` of
    `world` gets its contiguous part of each batch. All get equally many: what `world` does not divide is dropped.
    """
    image_of_caption, chunks = np.asarray(image_of_caption), []
    for i in range(start * batch_size, len(order) - world + 1, batch_size):
        size = min(batch_size, len(order) - i) // world
        chunks.append(order[i + rank * size:i + (rank + 1) * size])

    def fetch(chunk):
        rows = torch.from_numpy(chunk)
        return torch.from_numpy(images[image_of_caption[chunk]]), tokens[rows], rows
    with ThreadPoolExecutor(1) as pool:
        waiting = [pool.submit(fetch, chunk) for chunk in chunks[:2]]
        for n in range(len(chunks)):
            batch = waiting.pop(0).result()
            if n + 2 < len(chunks):
                waiting.append(pool.submit(fetch, chunks[n + 2]))
            yield batch


# ---------------------------------------------------------------------------------------------- the drawn worlds

# what makes a world harder or easier; radii are shares of the picture's side, half a slot (0.1) at most
TWO_GROUPS, STRIP = 0.6, 0.5  # share of scenes with two groups of objects; with a road, a river or a bridge
GROUND_RADIUS, AERIAL_RADIUS = (0.09, 0.10), (0.075, 0.095)
HAZE, LIGHT, NOISE = 0.35, 0.10, 0.03  # the most haze; spreads of the light and of the noise
DUST = (0.5, 0.75)             # haze between people and a surveillance camera
JITTER = 0.07                  # spread of a paint's brightness around the colour it is called by
TILT = 0.25                    # spread of the slope, in radians, at which things stand on the ground
SCALE = 3                      # drawn so many times larger and then reduced: smooth edges

COLOURS = {"red": (205, 45, 45), "orange": (240, 140, 40), "yellow": (240, 215, 60), "green": (60, 145, 65),
           "blue": (50, 95, 200), "purple": (130, 65, 165), "pink": (240, 150, 185), "white": (245, 245, 245),
           "black": (40, 40, 45), "grey": (140, 140, 145), "brown": (125, 80, 45), "glass": (120, 170, 200),
           "blond": (230, 195, 100), "pale": (240, 205, 180), "tan": (190, 135, 95)}
LANDS = {  # colour; from above: depth of its patches, of its grain and of its stripes, stripes to a picture
    "green grass": ((105, 160, 80), 0.14, 0.10, 0, 0), "brown field": ((165, 125, 85), 0.06, 0.05, 0.14, 14),
    "yellow sand": ((228, 205, 140), 0.1, 0.04, 0.05, 7), "white snow": ((225, 232, 240), 0.07, 0.02, 0, 0),
    "grey concrete": ((160, 160, 158), 0.05, 0.05, 0.09, 4),
    "blue water": ((75, 135, 190), 0.09, 0.03, 0.09, 10)}
STRIPS = {"road": (85, 85, 90), "river": (70, 130, 190), "bridge": (150, 110, 80)}
# a picture is a grid of 5 x 5 slots with one object at most in each; a place is its slots (column, row), the first
# always taken, lest "left" be "top left" as well; two groups have places that share no slot
PLACES = {name: [(int(column), int(row)) for column in columns for row in rows] for name, columns, rows in (
    ("left", "01", "213"), ("right", "43", "213"), ("top", "213", "01"), ("bottom", "213", "43"),
    ("middle", "2", "213"), ("top left", "01", "01"), ("top right", "43", "01"), ("bottom left", "01", "43"),
    ("bottom right", "43", "43"))}
# noun: what it does, the length of its shadow in radii, its colours, its shape from the side, its shape from above
# a shape is parts in turn, 'paint x y x y ...' in tenths of its radius, x to the right, y down: two points
# are a box, more a polygon, 'oval' has its middle and its half axes; body is the object's own paint
OBJECTS = {
    "plane": (" parked", 0.3, "white red blue yellow grey orange",
        "shade -9 0 -10 -6 -7 -6 -4 -1, body oval 0 0 10 2, glass -6 -1 6 0, shade -1 1 3 1 -2 5 -5 5",
        "shade -5 0 -10 5 -8 0 -10 -5, body oval 0 0 10 1.5, body 4 0 -1 10 -4 10 -1 0 -4 -10 -1 -10"),
    "car": (" parked", 0.15, "red white black blue yellow green",
        "body -9 -1 9 3, glass -7 -1 -4 -5 3 -5 6 -1, body 0 -5 1 0, black oval -5 3 2 2, black oval 5 3 2 2",
        "body -8 -4 8 4, glass 2 -3 5 -4 5 4 2 3, glass -6 -3 -4 -3 -4 3 -6 3"),
    "house": ("", 0.4, "red brown grey blue white orange",
        "light -7 -1 7 7, body -10 -1 0 -8 10 -1, brown -1 2 1 7, glass -5 1 -3 4, glass 3 1 5 4",
        "body -8 -6 8 0, shade -8 0 8 6, black 3 -4 5 -2"),
    "tree": ("", 0.4, "green orange yellow red pink",
        "brown -1 1 1 10, shade oval -4 -1 4 4, shade oval 4 -1 4 4, body oval 0 -3 6 6",
        "body oval 0 0 7 7, shade oval 5 3 4 4, body oval -1 6 4 4, body oval -6 -2 4 4, body oval 2 -6 4 4"),
    "tank": ("", 0.4, "white grey brown red green yellow",
        "body -8 -4 8 5, body oval 0 5 8 2, shade 4 -4 8 5.5, shade oval 0 -4 8 2, light oval 0 -4 7 1.5",
        "shade oval 0 0 8 8, body oval 0 0 7 7, light oval -1 -1 3 3"),
    "court": ("", 0, "green blue red orange purple pink",
        "white -6 -5 6 -5 10 6 -10 6, body -5 -4 5 -4 8 5 -8 5, grey -8 -2 8 1, white -8 -3 8 -2",
        "white -9 -5.5 9 5.5, body -7.5 -4 7.5 4, white -0.5 -5 0.5 5, white -4 -0.5 4 0.5"),
    "roundabout": ("", 0, "grey black brown",
        "body oval 0 3 10 5, green oval 0 3 5 2, black -1 -4 1 3, blue oval 0 -5 4 4, white oval 0 -5 2 2",
        "body -10 -2 10 2, body -2 -10 2 10, body oval 0 0 6 6, green oval 0 0 3 3"),
    "boat": (" floating", 0.15, "red white yellow green orange purple",
        "black -0.5 -10 0.5 3, white 1 -9 8 2 1 2, white -1 -8 -1 2 -6 2, body -9 3 9 3 6 8 -6 8",
        "body -8 -3 3 -4 9 0 3 4 -8 3, brown -6 -2 2 -2 6 0 2 2 -6 2, white -2 -3 1 3"),
    "ship": (" floating", 0.25, "red black grey green orange brown",
        "white -8 -4 -4 1, black -7 -7 -5 -4, orange -3 -2 1 1, white 2 -2 5 1, body -10 1 10 0 8 5 -9 5",
        "body -10 -2 6 -3 10 0 6 3 -10 2, white -9 -2 -6 2, orange -4 -2 -1 2, white 0 -2 4 2")}
# forms of captions for one or two groups; few: "two boats", all: "two red boats", do: "are floating"; 2: of the second
ONE = ("{all} {do} {at} of the {land}", "{at} of the {land} there {be} {all}", "a picture of {all} {at}",
       "there {be} {all} on the {land}", "the {land} has {few} {at}", "{few} {do} {at} of the picture")
TWO = ("{all} {be} {at} and {all2} {at2}", "{few} {do} {beside} {all2}", "the {land} has {few} and {few2}",
       "there {be2} {all2} on the {land} with {few}", "{few2} {do2} {at2} and {few} {at}",
       "a picture of {all} {at} and {few2}", "{at2} of the {land} there {be2} {all2}")
CROSSED = ("a {strip} crosses the {land} with {few}", "{all} {at} and a {strip} on the {land}")

NUMBERS = ("no", "a", "two", "three", "four", "five")
CIRCLE = np.stack([np.cos(np.arange(16) * np.pi / 8), np.sin(np.arange(16) * np.pi / 8)], axis=1)
Group = namedtuple("Group", "count colour noun place spots")  # spots: (count, 3), x, y and radius


def pick(rng, items):
    """One of the items, drawn from a numpy generator."""
    return list(items)[rng.integers(len(items))]


def paints(rng, colour):
    """The paints for one object: all colours, and its own, a name or a triple, as body, shade and light."""
    body = np.array(COLOURS[colour] if isinstance(colour, str) else colour)
    body = body * rng.normal(1, JITTER) + rng.normal(0, 5, 3)
    own = {"body": body, "shade": 0.7 * body, "light": 0.5 * body + 120}
    return COLOURS | {paint: tuple(value.clip(0, 255).astype(int).tolist()) for paint, value in own.items()}


def stamp(draw, shape, x, y, r, table, turn=0.0, flip=1):
    """Draw a shape around (x, y) with radius r, in pixels, turned by an angle; flip=-1 mirrors it."""
    axes = r / 10 * np.array([(flip * np.cos(turn), flip * np.sin(turn)), (-np.sin(turn), np.cos(turn))])
    for part in shape.split(", "):
        paint, *numbers = part.replace(" oval", "").split()
        points = np.array(numbers, float).reshape(-1, 2)
        if "oval" in part:
            points = points[0] + points[1] * CIRCLE
        elif len(points) == 2:
            points = np.stack([points[[0, 1, 1, 0], 0], points[[0, 0, 1, 1], 1]], axis=1)
        draw.polygon((points @ axes + (x, y)).ravel().tolist(), fill=table[paint])


def make_scene(rng, radius, level):
    """What there is to see: a land, a strip across it (kind, x, y, turn) or None, one or two groups.

    From the side a strip is level and behind the objects; from above it is turned and keeps clear of them.
    """
    land = pick(rng, LANDS)
    nouns = [noun for noun in OBJECTS if (noun in ("boat", "ship")) == (land == "blue water")]
    groups, places = [], list(PLACES)
    for noun in rng.permutation(nouns)[:1 + (rng.random() < TWO_GROUPS)].tolist():
        place = pick(rng, places)
        colour = pick(rng, [colour for colour in OBJECTS[noun][2].split() if colour not in land])
        count = rng.integers(1, min(5, len(PLACES[place])) + 1)
        first, *others = PLACES[place]
        slots = np.array([first, *rng.permutation(others)[:count - 1]])  # (count, 2)
        r = rng.uniform(*radius, count)
        x, y = 0.2 * slots.T + rng.uniform(r, 0.2 - r, (2, count))
        groups.append(Group(int(count), colour, noun, place, np.stack([x, y, r], axis=1)))
        places = [other for other in places if not set(PLACES[other]) & set(PLACES[place])]
    kind = "bridge" if "water" in land else pick(rng, ("road", "river"))
    x, y, r = np.concatenate([group.spots for group in groups]).T
    tries = rng.uniform((0.2, 0.4, 0), (0.8, 0.85, 0 if level else np.pi), (50 * (rng.random() < STRIP), 3))
    clear = [(kind, u, v, turn) for u, v, turn in tries
             if level or (abs((x - u) * np.sin(turn) - (y - v) * np.cos(turn)) > r + 0.05).all()]
    return land, clear[0] if clear else None, groups


def describe(rng, land, strip, groups):
    """Five captions of a scene, each of another form: some tell colours, some places, some the land."""
    words = {"land": land, "strip": strip and strip[0]}
    for i, group in zip(("", "2"), groups):
        number, be = NUMBERS[group.count], "is" if group.count == 1 else "are"
        noun = group.noun if group.count == 1 else group.noun + "s"
        words |= {f"few{i}": f"{number} {noun}", f"be{i}": be, f"do{i}": be + OBJECTS[group.noun][0],
                  f"all{i}": f"{number} {group.colour} {noun}".replace("a orange", "an orange"),
                  f"at{i}": ("in the " if group.place == "middle" else "at the ") + group.place}
    dx, dy = groups[-1].spots.mean(axis=0)[:2] - groups[0].spots.mean(axis=0)[:2]
    words["beside"] = (("below" if dy < 0 else "above") if abs(dy) > abs(dx) else
                       f"to the {'right' if dx < 0 else 'left'} of")
    forms = (ONE if len(groups) == 1 else TWO) + (CROSSED if strip else ())
    return [forms[i].format(**words) for i in rng.permutation(len(forms))[:5]]


def draw_strip(draw, side, kind, x, y, turn):
    """Draw a road, a river or a bridge through (x, y) from edge to edge; the river bends."""
    along = np.linspace(-1.5, 1.5, 61)
    line = np.stack([along, 0.02 * np.sin(9 * along) * (kind == "river")], axis=1)
    line = side * (line @ [(np.cos(turn), np.sin(turn)), (-np.sin(turn), np.cos(turn))] + (x, y))
    line = list(map(tuple, line.tolist()))
    draw.line(line, fill=STRIPS[kind], width=side // 11)
    if kind == "bridge":  # its deck
        draw.line(line, fill=(235, 230, 225), width=side // 30)
    if kind == "road":  # its dashes
        for i in range(0, 60, 2):
            draw.line(line[i:i + 2], fill=(235, 230, 225), width=side // 60)


def photograph(rng, image, haze):
    """A drawing reduced to its size, in warm or cold, bright or dim light, with haze and a camera's noise."""
    warm, bright = rng.normal(1, (LIGHT / 2, LIGHT))
    pixels = np.asarray(image.reduce(SCALE)) / 255 * (bright * warm, bright, bright / warm)
    pixels = (1 - haze) * pixels + 0.75 * haze + rng.normal(0, NOISE, pixels.shape)
    return Image.fromarray((255 * pixels).clip(0, 255).astype(np.uint8))


def draw_ground(rng, size=80):
    """A scene from the side, on plain ground: (picture, five captions)."""
    side = size * SCALE
    land, strip, groups = make_scene(rng, GROUND_RADIUS, level=True)
    sky = pick(rng, ((190, 220, 245), (215, 225, 235), (245, 220, 200), (150, 195, 240)))
    image = Image.new("RGB", (side, side), paints(rng, sky)["body"])
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, rng.uniform(0.05, 0.2) * side, side, side), fill=paints(rng, LANDS[land][0])["body"])
    if strip:
        draw_strip(draw, side, *strip)
    for group in groups:
        for x, y, r in group.spots * side:
            table, flip = paints(rng, group.colour), pick(rng, (-1, 1))
            stamp(draw, OBJECTS[group.noun][3], x, y, r, table, rng.normal(0, TILT), flip)
    return photograph(rng, image, rng.uniform(0, HAZE)), describe(rng, land, strip, groups)


def land_from_above(rng, land, side):
    """Textured ground: patches, grain, and stripes, which are furrows, ripples, joints or waves."""
    colour, patches, grain, stripes, number = LANDS[land]
    noise = [Image.fromarray(rng.normal(size=(n, n)).astype(np.float32)) for n in (6, side // SCALE)]
    coarse = np.asarray(noise[0].resize((side, side), Image.BICUBIC))
    fine = np.asarray(noise[1].resize((side, side), Image.NEAREST))
    turn, (y, x) = rng.uniform(0, np.pi), np.mgrid[:side, :side] / side
    wave = np.sin(2 * np.pi * number * (x * np.cos(turn) + y * np.sin(turn)) + 0.7 * coarse)
    light = 1 + patches * coarse + grain * fine + stripes * wave
    return Image.fromarray((light[..., None] * paints(rng, colour)["body"]).clip(0, 255).astype(np.uint8))


def draw_aerial(rng, size=80):
    """A scene from above, turned objects and their shadows on textured land: (picture, five captions)."""
    side = size * SCALE
    land, strip, groups = make_scene(rng, AERIAL_RADIUS, level=False)
    image = land_from_above(rng, land, side)
    draw = ImageDraw.Draw(image)
    if strip:
        draw_strip(draw, side, *strip)
    sun = rng.uniform(0, 2 * np.pi)
    shadow = dict.fromkeys(paints(rng, "black"), tuple(int(0.55 * c) for c in LANDS[land][0]))
    for group in groups:
        _, length, _, _, shape = OBJECTS[group.noun]
        spread = pick(rng, (0, 2 * np.pi))  # all turned alike, or each its own way
        turns = rng.uniform(0, 2 * np.pi) + rng.uniform(0, spread, group.count)
        for (x, y, r), turn in zip(group.spots * side, turns):
            stamp(draw, shape, x + length * r * np.cos(sun), y + length * r * np.sin(sun), r, shadow, turn)
            stamp(draw, shape, x, y, r, paints(rng, group.colour), turn)
    return photograph(rng, image, rng.uniform(0, HAZE)), describe(rng, land, strip, groups)


DYES = "red orange yellow green blue purple pink white black grey brown"
# what is seen of a person, in the order of painting from the front: its verb in captions (none: not told), its
# colours, and the shape of each kind of it, as above
WORN = {
    "bag": ("carrying", DYES, {"backpack": "body -3 -7 3 -1.5", "handbag": "black 2.8 -0.4 3.2 1, body 1.8 1 4.2 3",
                               "suitcase": "black 2.8 -0.4 3.2 3, body 1.8 3 4.2 9"}),
    "skin": ("", "pale tan", {"skin": "body -1.9 0 1.9 0 2.4 9 1 9 0 2 -1 9 -2.4 9, body -0.5 -7 0.5 -7 3.4 0 -3.4 0"}),
    "shoes": ("with", DYES, {"shoes": "body oval -2 9.2 1.2 0.7, body oval 2 9.2 1.2 0.7"}),
    "bottom": ("in", DYES, {"trousers": "body -1.9 -0.5 1.9 -0.5 2.6 8.5 0.7 8.5 0 2 -0.7 8.5 -2.6 8.5",
                            "shorts": "body -1.9 -0.5 1.9 -0.5 2.4 4 0.3 4 0 2 -0.3 4 -2.4 4",
                            "skirt": "body -1.7 -0.5 1.7 -0.5 2.9 5 -2.9 5"}),
    "top": ("wearing", DYES, {"coat": "shade -1 -6.4 1 -6.4 3.6 -0.6 -3.6 -0.6, body -2.2 -6.4 2.2 2.5",
                              "shirt": "shade -1 -6.4 1 -6.4 3.6 -3 -3.6 -3, body -2.2 -6.4 2.2 0"}),
    "hair": ("with", "black brown blond grey", {"hair": "body oval 0 -8.2 1.5 1.7"}),
    "face": ("", "pale tan", {"skin": "body oval 0 -7.8 1.1 1.3"}),
    "hat": ("with", DYES, {"hat": "body -2.1 -9 2.1 -8.4, body oval 0 -9 1.4 1"})}
FROM_BEHIND = ("skin", "shoes", "bottom", "top", "hair", "bag", "hat")


def random_person(rng):
    """What somebody looks like, {part: "colour kind"}, the same in all pictures; hardly two people are alike."""
    person = {part: f"{pick(rng, colours.split())} {pick(rng, kinds)}" for part, (_, colours, kinds) in WORN.items()}
    return person | {"face": person["skin"]} | {part: f"no {part}" for part in ("bag", "hat") if rng.random() < 0.3}


def describe_person(rng, person):
    """One caption: four of six parts in any order, as people describe people."""
    parts = [(WORN[part][0], person[part]) for part in rng.permutation([part for part in WORN if WORN[part][0]])[:4]]
    *most, last = [verb + (" " if words.startswith("no ") or words.endswith(("s", "hair")) else " a ") + words
                   for verb, words in parts]
    return f"{pick(rng, ('a', 'the', 'this'))} person {', '.join(most)} and {last}".replace(" a orange", " an orange")


def draw_person(rng, person, size, parts, haze):
    """Somebody in a new place and light, their parts painted one after the other; size is (H, W)."""
    height, width = size[0] * SCALE, size[1] * SCALE
    wall, floor = (paints(rng, rng.uniform(80, 220, 3))["body"] for _ in range(2))
    image = Image.new("RGB", (width, height), wall)
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, rng.uniform(0.5, 0.9) * height, width, height), fill=floor)
    x, y, r = rng.uniform((0.45, 0.47, 0.40), (0.55, 0.53, 0.46)) * (width, height, height)
    turn, flip = rng.normal(0, 0.03), pick(rng, (-1, 1))
    for part in parts:
        colour, kind = person[part].split()
        if colour != "no":
            stamp(draw, WORN[part][2][kind], x, y, r, paints(rng, colour), turn, flip)
    return photograph(rng, image, haze)


def draw_portrait(rng, size=(96, 48)):
    """Somebody from the front, in clear air, as a CLIP has seen people: (picture, five captions)."""
    person = random_person(rng)
    return draw_person(rng, person, size, WORN, 0), [describe_person(rng, person) for _ in range(5)]


def draw_view(rng, person, size=(96, 48)):
    """Somebody as a surveillance camera has them, from front or back, in haze: (picture, two captions)."""
    image = draw_person(rng, person, size, pick(rng, (tuple(WORN), FROM_BEHIND)), rng.uniform(*DUST))
    return image, [describe_person(rng, person) for _ in range(2)]


def write_world(root, draw, images, test, seed, size=80):
    """Draw `images` scenes, the last `test` of them for testing, in the authors' precomp layout.

    A name stands once in train_filename.txt, but once for each of its five captions in test_filename.txt. Picture i
    depends on (seed, i) alone. Give each world its own seed: from one seed, scenes repeat from world to world.
    """
    with made_whole(root) as draft:
        (draft / "images").mkdir(parents=True)
        names, captions = {"train": [], "test": []}, {"train": [], "test": []}
        for i in range(images):
            image, five = draw(np.random.default_rng((seed, i)), size)
            name, split = f"{i + 1:06d}.png", "test" if i >= images - test else "train"
            image.save(draft / "images" / name, compress_level=1)
            names[split] += [name] * (5 if split == "test" else 1)
            captions[split] += five
        for split in names:
            (draft / f"{split}_filename.txt").write_text("\n".join(names[split]) + "\n")
            (draft / f"{split}_caps.txt").write_text("\n".join(captions[split]) + "\n")


def write_people(root, people, views, seed, size=(96, 48)):
    """Draw views of people, 70 % of them for train, 10 % val, 20 % test, in RSTPReid's layout."""
    with made_whole(root) as draft:
        (draft / "imgs").mkdir(parents=True)
        entries = []
        for i in range(people):
            rng = np.random.default_rng((seed, i))
            person, split = random_person(rng), "train" if i < 0.7 * people else "val" if i < 0.8 * people else "test"
            for view in range(views):
                image, captions = draw_view(rng, person, size)
                entries.append({"id": i, "img_path": f"{i:04d}_{view}.png", "captions": captions, "split": split})
                image.save(draft / "imgs" / entries[-1]["img_path"], compress_level=1)
        (draft / "data_captions.json").write_text(json.dumps(entries))


# ---------------------------------------------------------------------------------------------- data sets by name

DATASETS = ("toy-aerial", "toy-ground", "toy-people", "toy-portraits", "ucm", "rsicd", "rsitmd", "precomp",
            "karpathy", "folder", *REID_SETS)
WORLDS = {  # how each is drawn on first use
    "toy-ground": lambda root: write_world(root, draw_ground, images=6000, test=400, seed=0),
    "toy-aerial": lambda root: write_world(root, draw_aerial, images=2000, test=400, seed=1),
    "toy-people": lambda root: write_people(root, people=500, views=6, seed=2),
    "toy-portraits": lambda root: write_world(root, draw_portrait, images=4000, test=400, seed=3, size=(96, 48))}


def read(dataset, root, split):
    """One split of a data set by name -> Pairs. root is its folder; the toy worlds are drawn there on first use."""
    if dataset in WORLDS:
        root = root or f"runs/{dataset}-world"
        if not any(Path(root).glob("*")):
            WORLDS[dataset](root)
    if not root:
        raise ValueError(f"--dataset {dataset} needs --data-root, the folder it lies in")
    if dataset in REID_SETS:
        return read_reid(root, split, dataset)
    readers = {"karpathy": read_karpathy_json, "folder": read_folder, "toy-people": read_reid}
    return readers.get(dataset, read_precomp)(root, split)


def main():
    """Print what each split holds, then all that is missing, with exit code 2; a missing split is no error."""
    parser = argparse.ArgumentParser(description="What each split of a data set holds, and what is missing.")
    parser.add_argument("dataset", choices=DATASETS)
    parser.add_argument("--data-root", help="its folder")
    args, wrong = parser.parse_args(), []
    for split in ("train", "val", "test"):
        try:
            pairs = read(args.dataset, args.data_root, split)
        except NoSplit as error:
            print(f"{split:5} no such split: {error}")
        except (ValueError, OSError) as error:
            wrong.append(str(error))
        else:
            print(f"{split:5} {len(pairs.images):6d} pictures {len(pairs.captions):6d} captions, "
                  f"{len(set(pairs.captions)):6d} of them distinct, {pairs.captions.count('')} empty"
                  + (f", {len(set(pairs.ids))} ids" if pairs.ids else ""))
            folders = Counter(os.path.dirname(path) for path in pairs.images if not os.path.isfile(path))
            wrong += [f"{split}: {count} pictures are missing in {folder}" for folder, count in folders.items()]
    for line in dict.fromkeys(wrong):
        print(f"data.py: error: {line}", file=sys.stderr)
    sys.exit(2 if wrong else 0)


if __name__ == "__main__":
    main()
