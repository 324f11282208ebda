"""Data: readers of data sets, the image cache, augmentation, batches, and drawn toy data sets (worlds).

A reader gives `Pairs`: image paths, captions, and which image each caption is about. All that follows is the
same for every data set. Shapes: N images, M captions, B batch, L tokens, H x W pixels.

    python data.py ucm --data-root ucm_precomp      what each split holds, which images are missing or damaged
"""
import argparse
import csv
import hashlib
import json
import os
import posixpath
import random
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

import clip

# Pillow warns of images above 89 million pixels, but reads them; above 179 million it raises an error
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


# -------------------------------------------------------------------------------- readers

@dataclass
class Pairs:
    """One split of a data set: caption `captions[m]` is about the image `images[image_of_caption[m]]`."""
    images: list                # N paths
    captions: list              # M strings
    image_of_caption: list      # M indices into images
    ids: list = None            # N person ids, for re-identification only


class NoSplit(ValueError):
    """The data set is there, but it has no such split."""


SPLITS = {"train": "train", "training": "train", "restval": "train",    # restval: COCO's second training part
          "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test", "testing": "test"}


def check(condition, message):
    """ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def read_lines(path):
    """The lines of a UTF-8 text file, also from Windows: with a byte order mark and CR LF."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[:error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line} is not UTF-8 text; convert the file first") from None
    # split, because splitlines() would cut at U+2028 too
    return [line.strip(" \r") for line in text.removesuffix("\n").split("\n")]


def pair_up(rows):
    """Rows (image path, caption, person id or None) -> Pairs; equal paths are one image."""
    id_of_image = {path: person for path, _, person in rows}        # in order of first appearance
    number = {path: n for n, path in enumerate(id_of_image)}
    ids = list(id_of_image.values())
    return Pairs(list(id_of_image), [caption.strip() for _, caption, _ in rows],
                 [number[path] for path, _, _ in rows], None if None in ids else ids)


def image_folder(root, names):
    """Where the images lie: root, or a folder in it whose name ends in images or imgs, in any case."""
    beside = [path for path in root.glob("*") if path.name.lower().endswith(("images", "imgs"))]
    beside.sort(key=lambda path: (len(path.name), path.name))       # `images` before `old_images`
    for folder in [root, *beside]:
        if any(os.path.isfile(folder / name) for name in names[:100]):
            return folder
    return beside[0] if beside else root


def choose_split(file, entries, split):
    """One split of entries (file and line, split as written, image name, captions, id or None) -> Pairs."""
    known, rows = {}, []
    for where, written, name, captions, person in entries:
        check(isinstance(name, str) and name.strip(), f"{where}: {name!r:.80} is no name of an image file")
        check(isinstance(captions, list) and captions and all(isinstance(text, str) for text in captions),
              f"{where}: the captions {captions!r:.80} are no list of one or more texts")
        meant = SPLITS.get(str(written).strip().lower())
        check(meant, f"{where}: the split {written!r:.80} is none of {', '.join(SPLITS)}")
        name = posixpath.normpath(name.strip().replace("\\", "/"))      # from Windows; ./a.png is a.png
        before = known.setdefault(name, (meant, person))
        check(before == (meant, person), f"{where}: {name} has the split and person {(meant, person)}, "
              f"but {before} in another place")
        if meant == split:
            rows += [(name, caption, person) for caption in captions]
    if not rows:
        raise NoSplit(f"{file} has no split {split!r}, only {sorted({meant for meant, _ in known.values()})}")
    folder = image_folder(file.parent, list(known))
    return pair_up([(str(folder / name), caption, person) for name, caption, person in rows])


def read_precomp(root, split):
    """UCM, RSICD and RSITMD as the remote-sensing papers pass them on -> Pairs; split: train, val or test.

    root holds `train_caps.txt`, `train_filename.txt` (captions 5k..5k+4 are about image k), `test_caps.txt`,
    `test_filename.txt` (caption k is about image k, each image in five lines) and the folder of images. train
    and val are the official split of the train files: shuffled with random.seed(2), the first 80 % train.
    """
    # the train file of names has a line for each image, the test file one for each caption
    part, captions_per_name = ("test", 1) if split == "test" else ("train", 5)
    names_file, captions_file = Path(root) / f"{part}_filename.txt", Path(root) / f"{part}_caps.txt"
    if part == "test" and not names_file.exists() and not captions_file.exists():
        raise NoSplit(f"{root} has no {names_file.name} and no {captions_file.name}")
    names, captions = read_lines(names_file), read_lines(captions_file)
    check(len(captions) == captions_per_name * len(names), f"{captions_file} has {len(captions)} lines and "
          f"{names_file.name} {len(names)}: {captions_per_name} caption(s) for each name are expected")
    order = list(range(len(names)))             # line order[n] of the names belongs to splits[n]
    splits = ["test"] * len(names)
    if part == "train":
        random.Random(2).shuffle(order)
        train_images = int(0.8 * len(names))
        splits = ["train"] * train_images + ["val"] * (len(names) - train_images)
    entries = []
    for k, its_split in zip(order, splits):
        first = captions_per_name * k
        its_captions = captions[first:first + captions_per_name]
        entries.append((f"{names_file}:{k + 1}", its_split, names[k], its_captions, None))
    return choose_split(names_file, entries, split)


def read_json(file, split, people=False):
    """One split of a JSON list, or of Karpathy's {"images": list} -> Pairs; people: with their ids."""
    try:
        content = json.loads("\n".join(read_lines(file)))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is not readable JSON: {error}") from None
    content = content.get("images") if isinstance(content, dict) else content
    check(isinstance(content, list), f"{file} is no list of entries and has none under 'images'")
    entries = []
    for n, item in enumerate(content):
        where, person = f"{file}, entry {n}", None
        check(isinstance(item, dict), f"{where}: {item!r:.80} is no dictionary")
        captions, sentences = item.get("captions"), item.get("sentences")
        if isinstance(sentences, list):
            captions = [text.get("raw") if isinstance(text, dict) else text for text in sentences]
        name = item.get("filename") or item.get("file_path") or item.get("img_path")
        if item.get("filepath") and isinstance(name, str):      # not file_path: COCO's folder of the image
            name = f"{item['filepath']}/{name}"
        if people:
            check(str(item.get("id")).isdecimal(), f"{where}: the id {item.get('id')!r:.80} is no number")
            person = int(item["id"])
        entries.append((where, item.get("split"), name, captions, person))
    return choose_split(file, entries, split)


def read_karpathy_json(path, split):
    """Karpathy's `dataset*.json` or its folder (images[].filename, .split, .sentences[].raw) -> Pairs."""
    files = sorted(Path(path).glob("dataset*.json")) if Path(path).is_dir() else [Path(path)]
    if len(files) != 1:
        raise FileNotFoundError(f"{path} holds {len(files)} files dataset*.json, one is expected")
    return read_json(files[0], split)


def read_reid(root, split):
    """CUHK-PEDES, ICFG-PEDES or RSTPReid, told apart by the annotation file in root -> Pairs with ids.

    Training ids become 0..n-1 in sorted order; others stay. ICFG-PEDES has no val split (NoSplit).
    """
    names = ["reid_raw.json", "ICFG-PEDES.json", "ICFG_PEDES.json", "data_captions.json"]
    files = [Path(root) / name for name in names if (Path(root) / name).is_file()]
    if not files:
        raise FileNotFoundError(f"{root} holds none of {', '.join(names)}")
    pairs = read_json(files[0], split, people=True)
    if split == "train":
        label = {person: n for n, person in enumerate(sorted(set(pairs.ids)))}
        pairs.ids = [label[person] for person in pairs.ids]
    return pairs


def read_folder(root, split):
    """One's own images: `captions.tsv` in lines image<TAB>caption or image<TAB>caption<TAB>split -> Pairs.

    An image may stand in several lines. Those without a split are sorted, shuffled with random.seed(2) and
    dealt out: a tenth, at least one, to val and test each, the rest to train; of one or two images all go to
    train. A first line that names the columns is left out; fields may be quoted as by spreadsheets.
    """
    file, rows = Path(root) / "captions.tsv", []
    header = ("image", "img", "image_path", "file", "filename", "file_name", "filepath", "file_path", "path")
    for n, line in enumerate(read_lines(file), 1):
        try:
            fields = next(csv.reader([line], delimiter="\t", strict=True))
        except csv.Error as error:      # such as a quotation mark that is not closed in its line
            raise ValueError(f"{file}:{n}: {error}; quotes inside quotes are doubled: {line!r:.80}") from None
        is_header = n == 1 and fields and fields[0].lower() in header
        if line.strip() and not is_header:
            check(len(fields) in (2, 3), f"{file}:{n} is not image<TAB>caption[<TAB>split]: {line!r:.80}")
            name, caption, written = fields if len(fields) == 3 else [*fields, ""]
            rows.append((f"{file}:{n}", name, caption, written))
    split_of = {name: written for _, name, _, written in rows if written}   # also for the image's other lines
    free = sorted({name for _, name, _, _ in rows} - set(split_of))
    random.Random(2).shuffle(free)
    tenth = max(1, len(free) // 10) if len(free) > 2 else 0
    dealt = ["val"] * tenth + ["test"] * tenth + ["train"] * (len(free) - 2 * tenth)
    split_of |= dict(zip(free, dealt))
    entries = [(where, written or split_of[name], name, [caption], None)
               for where, name, caption, written in rows]
    return choose_split(file, entries, split)


# -------------------------------------------------------------------------------- images

def some(items):
    """The first twenty items in words, and how many more there are."""
    more = f"; and {len(items) - 20} more" if len(items) > 20 else ""
    return "; ".join(list(items)[:20]) + more


def decode(path, size):
    """The preprocessed pixels of an image file, uint8 (3, H, W), or the ValueError that says why there are
    none: it is returned, not raised."""
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)    # differs from OpenAI: it reads turned photos sideways
            return clip.preprocess(upright, size).numpy()
    except Exception as error:      # a damaged file can raise almost anything in Pillow
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return ValueError(f"{path}: {' '.join(reason.split())}")


def is_blank(pixels):
    """Whether an image (3, H, W) has next to no content, as when 16 bits or floats in 0..1 become 8 bits:
    pixels that are all equal, all 0 or 1, or nearly all at 255."""
    return bool((pixels == pixels[:, :1, :1]).all() or pixels.max() <= 1 or (pixels == 255).mean() > 0.97)


def decode_all(paths, size):
    """Yield (path, what `decode` returns) for image files, in their order, decoded by threads."""
    with ThreadPoolExecutor() as pool:
        results = pool.map(decode, paths, [size] * len(paths))
        yield from zip(paths, tqdm(results, "reading images", len(paths), leave=False, disable=None))


def read_images(paths, size, cache):
    """Image files -> (array, bad). array: uint8 (N, 3, H, W) of the N good ones in the order of paths, mapped
    from a file in the folder `cache`; None if all are bad. bad: {path: reason}."""
    H, W = (size, size) if isinstance(size, int) else size
    states = [(os.path.abspath(path), os.stat(path)) for path in paths if os.path.isfile(path)]
    marks = ["version 2", size]     # another one whenever `decode` gives other pixels
    marks += [(path, state.st_size, state.st_mtime_ns) for path, state in states]
    file = Path(cache) / (hashlib.sha256(repr(marks).encode()).hexdigest()[:20] + ".uint8")
    bad = {}
    # a file is used again if it has all images; if some were bad all are decoded again, to have the reasons
    if not file.is_file() or file.stat().st_size != len(paths) * 3 * H * W:
        os.makedirs(cache, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:      # a half-made file never has the name
            draft = Path(folder) / "draft"
            with open(draft, "wb") as out:
                for path, result in decode_all(paths, size):
                    if isinstance(result, ValueError):
                        bad[path] = str(result)
                    else:
                        out.write(result)
            os.replace(draft, file)
    if len(bad) == len(paths):
        return None, bad
    return np.memmap(file, np.uint8, "r").reshape(-1, 3, H, W), bad


def without(pairs, bad):
    """Pairs without empty captions, captions of bad images (paths), and images left with no caption."""
    ids, rows = pairs.ids or [None] * len(pairs.images), []
    for n, caption in zip(pairs.image_of_caption, pairs.captions):
        if caption.strip() and pairs.images[n] not in bad:
            rows.append((pairs.images[n], caption, ids[n]))
    return pair_up(rows)


def load(pairs, size, cache="runs/cache", skip_bad=False):
    """Decode the images of all splits: {split: Pairs} -> (the same, {split: uint8 (N, 3, H, W)}, notes).

    Empty captions are left out, and images without any other. Bad images raise one ValueError for all splits;
    skip_bad leaves them out with their captions. notes: in words, what was left out, which images are blank.
    """
    pairs, images, notes, bad = dict(pairs), {}, [], {}
    for split, part in pairs.items():
        empty = sum(not caption.strip() for caption in part.captions)
        if empty:       # differs from PE-RSITR: it trains on the 20 empty captions of RSITMD
            notes.append(f"{split}: {empty} empty captions are left out")
        part = without(part, bad={})        # without empty captions; image n is then row n of the array
        images[split], bad_here = read_images(part.images, size, cache)
        caption_of = {part.images[n]: caption for n, caption in zip(part.image_of_caption, part.captions)}
        bad |= {path: f"{reason} (caption {caption_of[path]!r:.60})" for path, reason in bad_here.items()}
        pairs[split] = without(part, bad_here)
    if bad:
        check(skip_bad, f"{len(bad)} images cannot be used: {some(bad.values())}; "
              "--skip-bad leaves them out with their captions")
        notes.append(f"{len(bad)} bad images are left out with their captions: {some(bad.values())}")
    for split, part in pairs.items():
        check(part.images, f"the split {split} has no image that can be used")
        blank = [path for path, pixels in zip(part.images, images[split]) if is_blank(pixels)]
        if blank:
            notes.append(f"{split}: {len(blank)} images are blank, of one colour or nearly: {some(blank)}")
    return pairs, images, notes


# -------------------------------------------------------------------------------- augmentation

AUGMENTATIONS = ("none", "crop", "aerial", "people")


def erase(images):
    """Half of the images (B, 3, H, W) lose a box of 2 to 40 % of their area to CLIP's mean colour."""
    B, _, H, W = images.shape
    area = 0.02 + 0.38 * torch.rand(B, 1, 1)
    aspect = 0.3 * 11 ** torch.rand(B, 1, 1)        # height / width, 0.3 to 3.3, uniform in its logarithm
    aspect = aspect.clamp(area * H / W, H / W / area)   # so w <= W, h <= H; differs from IRRA: it draws again
    h, w = (area * H * W * aspect).sqrt().round(), (area * H * W / aspect).sqrt().round()
    top, left = (torch.rand(B, 1, 1) * (H - h + 1)).floor(), (torch.rand(B, 1, 1) * (W - w + 1)).floor()
    y, x = torch.arange(H)[:, None], torch.arange(W)        # box: (B, H, W)
    box = (y >= top) & (y < top + h) & (x >= left) & (x < left + w) & (torch.rand(B, 1, 1) < 0.5)
    # differs from IRRA: it fills with MEAN after normalising; here MEAN is filled before, and becomes 0
    mean = 255 * torch.tensor(clip.MEAN).view(3, 1, 1)
    return torch.where(box[:, None].to(images.device), mean.to(images), images)


def augment(images, kind):
    """Random changes of a batch (B, 3, H, W) of float pixels, drawn from torch's CPU generator.

    "crop": a window of 60 to 100 % of the area; "aerial": that, mirrored and turned by a multiple of 90
    degrees (the ground has no up); "people": mirrored, moved by up to 10 pixels with black beyond the edge,
    half of them erased in part. All but erasing is one affine map; mirrors, shifts and the turns of square
    images are exact.
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
        shift = (shift * 10.5).round() * 2 / torch.tensor([W, H])       # -10 to 10 pixels; a side is 2 long
    if kind in ("aerial", "people"):
        flip = torch.randint(0, 2, (B,)) * 2.0 - 1
    if kind == "aerial":
        turn = torch.randint(0, 4, (B,)) * torch.pi / 2
    # the result shows at (x, y) what the image has at theta (x, y, 1), theta = zoom rotation mirror | shift;
    # cos and sin are rounded, as in floats cos(pi / 2) is not quite 0
    cos, sin = (zoom * turn.cos()).round(decimals=6), (zoom * turn.sin()).round(decimals=6)
    theta = torch.stack([cos * flip, -sin, shift[:, 0], sin * flip, cos, shift[:, 1]], dim=1).view(B, 2, 3)
    grid = F.affine_grid(theta.to(images), images.shape, align_corners=False)
    edge = "zeros" if kind == "people" else "reflection"
    images = F.grid_sample(images, grid, padding_mode=edge, align_corners=False)
    return erase(images) if kind == "people" else images


# -------------------------------------------------------------------------------- batches

def batches(pairs, over, batch_size, epochs, seed, processes=1):
    """The batches of all epochs in a row, int64 arrays of caption numbers; every epoch has equally many.

    over "captions": every caption once an epoch (the papers'). "images": every image once, with any caption.
    Pairs that the processes cannot share are dropped, and a last batch of one pair: it has no negatives.
    """
    plan = []
    for epoch in range(epochs):
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(len(pairs.captions))
        if over == "images":
            _, places = np.unique(np.asarray(pairs.image_of_caption)[order], return_index=True)
            order = rng.permutation(order[places])      # of each image the first caption in the random order
        for start in range(0, len(order), batch_size):
            batch = order[start:start + batch_size]
            batch = batch[:len(batch) // processes * processes]
            if len(batch) >= 2:         # differs from the papers, whose last batch may be one pair
                plan.append(batch)
    return plan


# -------------------------------------------------------------------------------- the drawn worlds
# Coloured parts are stamped on a ground and photographed: things from the side (toy-ground) and from above
# (toy-aerial), people from the front (toy-portraits) and from front or back in haze (toy-people).

DYES = {"red": (205, 45, 45), "orange": (240, 140, 40), "yellow": (245, 215, 60), "green": (50, 140, 60),
        "blue": (50, 95, 200), "purple": (130, 65, 165), "white": (245, 245, 245), "black": (40, 40, 45)}
PAINTS = DYES | {"glass": (120, 170, 200), "pale": (240, 205, 180), "tan": (170, 115, 75)}
LANDS = {"green grass": (115, 170, 85), "brown field": (160, 122, 84), "yellow sand": (230, 208, 145),
         "white snow": (228, 234, 242), "grey concrete": (165, 165, 162), "blue water": (75, 140, 195)}
PLACES = [["at the left", "in the middle", "at the right"], ["at the top", "in the middle", "at the bottom"]]

# A shape is parts, painted in turn: (paint, form, numbers) in tenths of its radius, x to the right, y down.
# poly: x, y of each corner; box, oval: x, y of the middle, half width, half height. body, shade and light are
# tones of the thing's colour.
FORMS = {"box": np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]),
         "oval": np.stack([np.cos(np.arange(16) * np.pi / 8), np.sin(np.arange(16) * np.pi / 8)], axis=1)}
SIDE = {
    "plane": [("shade", "poly", -9, 0, -10, -6, -7, -6, -4, -1), ("body", "oval", 0, 0, 10, 2),
              ("glass", "box", 0, -0.5, 6, 0.5), ("shade", "poly", -1, 1, 3, 1, -2, 5, -5, 5)],
    "car": [("body", "box", 0, 1, 9, 2), ("glass", "poly", -7, -1, -4, -5, 3, -5, 6, -1),
            ("black", "oval", -5, 3, 2, 2), ("black", "oval", 5, 3, 2, 2)],
    "house": [("light", "box", 0, 3, 7, 4), ("body", "poly", -9, 0, 0, -8, 9, 0), ("tan", "box", 0, 5, 1, 2)],
    "tree": [("tan", "box", 0, 5, 1, 5), ("shade", "oval", 3, -1, 5, 4), ("body", "oval", -1, -3, 6, 6)],
    "tank": [("body", "box", 0, 0, 8, 5), ("body", "oval", 0, 5, 8, 2), ("light", "oval", 0, -4, 8, 2)],
    "boat": [("white", "poly", -6, 2, 1, -9, 8, 2), ("body", "poly", -9, 3, 9, 3, 6, 8, -6, 8)]}
ABOVE = {
    "plane": [("shade", "poly", -5, 0, -10, 5, -8, 0, -10, -5), ("body", "oval", 0, 0, 10, 1.5),
              ("body", "poly", 4, 0, -1, 10, -4, 10, -1, 0, -4, -10, -1, -10)],
    "car": [("body", "box", 0, 0, 8, 4), ("glass", "box", 3, 0, 1, 3), ("glass", "box", -5, 0, 1, 3)],
    "house": [("body", "box", 0, -3, 8, 3), ("shade", "box", 0, 3, 8, 3), ("black", "box", 4, -3, 1, 1)],
    "tree": [("shade", "oval", 2, 2, 6, 6), ("body", "oval", -1, -1, 7, 7), ("light", "oval", -2, -3, 3, 3)],
    "tank": [("body", "oval", 0, 0, 8, 8), ("shade", "oval", 0, 0, 6, 6), ("body", "oval", 0, 0, 5, 5)],
    "boat": [("body", "poly", -8, -3, 3, -4, 9, 0, 3, 4, -8, 3), ("white", "box", -2, 0, 3, 2)]}
CLOTHES = {     # in the order of painting somebody seen from the front
    "backpack": [("body", "box", 0, -4.3, 3, 2.7)], "hair": [("body", "oval", 0, -8.2, 1.6, 1.7)],
    "skin": [("body", "poly", -2, 0, 2, 0, 2.4, 9, 1, 9, 0, 2, -1, 9, -2.4, 9),
             ("body", "oval", 0, -8, 1.1, 1.4), ("body", "poly", -0.5, -7, 0.5, -7, 3.4, 0, -3.4, 0)],
    "shoes": [("body", "box", -2, 9.2, 1, 0.6), ("body", "box", 2, 9.2, 1, 0.6)],
    "trousers": [("body", "poly", -2, 0, 2, 0, 2.6, 8.5, 0.7, 8.5, 0, 2, -0.7, 8.5, -2.6, 8.5)],
    "coat": [("shade", "poly", -1, -6.4, 1, -6.4, 3.6, -1, -3.6, -1), ("body", "box", 0, -2.5, 2.2, 3.9)],
    "hat": [("body", "box", 0, -8.8, 2.1, 0.3), ("body", "oval", 0, -9.1, 1.4, 1)],
    "handbag": [("body", "box", 3.3, 1.5, 1.2, 1.5)]}
BACK = ["handbag", "skin", "shoes", "trousers", "coat", "hair", "backpack", "hat"]


def photograph(rng, size, ground, wall, horizon, stamps, haze):
    """Draw stamps on a ground and, above the horizon, a wall -> image of size (H, W), in some light and haze.

    A stamp is (shape, colour, x, y, radius, turn, flip): x is a share of W, y and radius of H; turn is an
    angle in radians; flip is 1, or -1 to mirror.
    """
    H, W = 3 * size[0], 3 * size[1]         # drawn larger and then reduced: smooth edges
    image = Image.new("RGB", (W, H), ground)
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, -1, W, horizon * H - 1), fill=wall)      # outside of the image if horizon is 0
    for shape, colour, x, y, r, turn, flip in stamps:
        body = np.array(colour) * rng.normal(1, 0.07)
        tones = PAINTS | {"body": body, "shade": 0.7 * body, "light": 0.5 * body + 120}
        across, down = (flip * np.cos(turn), flip * np.sin(turn)), (-np.sin(turn), np.cos(turn))
        for paint, form, *numbers in shape:
            points = np.array(numbers, float).reshape(-1, 2)
            if form in FORMS:
                points = points[0] + points[1] * FORMS[form]
            points = points @ np.array([across, down]) * r * H / 10 + (x * W, y * H)
            fill = np.clip(tones[paint], 0, 255).astype(int)
            draw.polygon(points.ravel().tolist(), fill=tuple(fill.tolist()))
    image = image.reduce(3)
    patches = Image.fromarray(rng.normal(size=(6, 6)).astype(np.float32)).resize(image.size, Image.BICUBIC)
    warm, bright = rng.normal(1, (0.05, 0.1))
    pixels = np.asarray(image) / 255 * (1 + 0.05 * np.asarray(patches)[..., None])
    pixels = (1 - haze) * pixels * (bright * warm, bright, bright / warm) + 0.75 * haze
    return Image.fromarray((255 * (pixels + rng.normal(0, 0.03, pixels.shape))).clip(0, 255).astype(np.uint8))


def draw_scene(rng, view, size=80):
    """Two groups of things on a land, seen from the "side" or from "above" -> (image, five captions)."""
    land, axis = rng.choice(list(LANDS)), rng.integers(2)       # axis 0: groups side by side; 1: one above
    stamps, plain, coloured, places = [], [], [], []            # plain: "two cars", coloured: "two red cars"
    for place in rng.permutation(3)[:2]:
        noun = "boat" if land == "blue water" else rng.choice(["plane", "car", "house", "tree", "tank"])
        colour = rng.choice([dye for dye in DYES if dye not in land])
        count = rng.integers(1, 4)
        number = ["a {}", "two {}s", "three {}s"][count - 1]
        plain.append(number.format(noun))
        coloured.append(number.format(f"{colour} {noun}").replace("a orange", "an orange"))
        places.append(PLACES[axis][place])
        for n in range(count):
            spot = [0.2 + 0.3 * place, 0.5 + 0.3 * (n - (count - 1) / 2)]       # along the axis, across it
            x, y = rng.uniform(-0.04, 0.04, 2) + (spot if axis == 0 else spot[::-1])
            r, turn, flip = rng.uniform(0.11, 0.13), rng.normal(0, 0.15), rng.choice([-1, 1])
            if view == "above":
                turn = rng.uniform(0, 2 * np.pi)
                shadow = [("shade", *part[1:]) for part in ABOVE[noun]]         # in a dark tone of the land
                stamps.append((shadow, LANDS[land], x + 0.025, y + 0.025, r, turn, flip))
            stamps.append(((SIDE if view == "side" else ABOVE)[noun], DYES[colour], x, y, r, turn, flip))
    horizon = rng.uniform(0.08, 0.18) if view == "side" else 0
    image = photograph(rng, (size, size), LANDS[land], (190, 215, 240), horizon, stamps, rng.uniform(0, 0.3))
    captions = [f"{coloured[0]} {places[0]} and {coloured[1]} {places[1]}",
                f"{coloured[1]} and {coloured[0]} on the {land}",
                f"the {land} with {plain[0]} {places[0]} and {coloured[1]}",
                f"{plain[1]} {places[1]} of the {land} and {plain[0]} {places[0]}",
                f"a photo of {plain[1]} {places[1]} and {coloured[0]}"]
    return image, [captions[n] for n in rng.permutation(5)]


def draw_person(rng, person_rng, view):
    """Somebody for a "portrait" or a "camera" -> (image, captions). person_rng: draws the clothes, and is the
    same for all images of a person."""
    person = dict(zip(CLOTHES, person_rng.choice(list(DYES), len(CLOTHES))))
    person["skin"] = person_rng.choice(["pale", "tan"])
    order, haze, count = list(CLOTHES), 0, 5
    if view == "camera":
        order, haze, count = [order, BACK][rng.integers(2)], rng.uniform(0.5, 0.75), 2
    x, y, r = rng.uniform((0.45, 0.47, 0.40), (0.55, 0.53, 0.46))
    turn, flip = rng.normal(0, 0.03), rng.choice([-1, 1])
    stamps = [(CLOTHES[part], PAINTS[person[part]], x, y, r, turn, flip) for part in order]
    wall, floor = rng.integers(80, 220, (2, 3)).tolist()
    image = photograph(rng, (96, 48), tuple(floor), tuple(wall), rng.uniform(0.5, 0.9), stamps, haze)
    captions = []
    for _ in range(count):      # each tells four parts in any order, as people describe people
        parts = [part for part in rng.permutation(order) if part != "skin"]
        told = [f"{person[part]} {part}" for part in parts]
        told = [words if words.endswith(("s", "hair")) else f"a {words}" for words in told]
        text = f"a person with {', '.join(told[:3])} and {told[3]}"
        captions.append(text.replace("a orange", "an orange"))
    return image, captions


def draw_world(root, view, train, val, test, seed):
    """Draw so many images of a view for each split; image i depends on (seed, i) alone.

    The annotations are RSTPReid's list, which Karpathy's reader takes too. "camera": six images of a person.
    """
    (root / "images").mkdir(parents=True)
    entries = []
    for i, split in enumerate(["train"] * train + ["val"] * val + ["test"] * test):
        rng, name = np.random.default_rng((seed, i)), f"{i:06d}.bmp"        # bmp: fast to write and read
        person = i // 6 if view == "camera" else i
        if view in ("side", "above"):
            image, captions = draw_scene(rng, view)
        else:
            image, captions = draw_person(rng, np.random.default_rng((seed, person, 1)), view)
        image.save(root / "images" / name)
        entries.append({"id": person, "img_path": name, "captions": captions, "split": split})
    file = "data_captions.json" if view == "camera" else "dataset.json"
    (root / file).write_text(json.dumps(entries), encoding="utf-8")


# -------------------------------------------------------------------------------- data sets by name

WORLDS = {      # drawn on first use: view, images for train, val and test, seed (each its own)
    "toy-ground": ("side", 4480, 1120, 400, 0), "toy-aerial": ("above", 1280, 320, 400, 1),
    "toy-people": ("camera", 2100, 300, 600, 2), "toy-portraits": ("portrait", 2880, 720, 400, 3)}
REID_SETS = ("CUHK-PEDES", "ICFG-PEDES", "RSTPReid")
READERS = {
    "toy-ground": read_karpathy_json, "toy-aerial": read_karpathy_json, "toy-people": read_reid,
    "toy-portraits": read_karpathy_json, "ucm": read_precomp, "rsicd": read_precomp, "rsitmd": read_precomp,
    "precomp": read_precomp, "karpathy": read_karpathy_json, "folder": read_folder, "CUHK-PEDES": read_reid,
    "ICFG-PEDES": read_reid, "RSTPReid": read_reid,
}
DATASETS = tuple(READERS)


def read(dataset, root, split):
    """One split of a data set by name -> Pairs. root: its folder; toy worlds have runs/NAME-world."""
    if dataset in WORLDS:
        root = Path(root or f"runs/{dataset}-world")
        if not root.is_dir():
            root.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=root.parent) as folder:        # no half world has the name
                draw_world(Path(folder) / "draft", *WORLDS[dataset])
                os.replace(Path(folder) / "draft", root)
    check(root, f"--dataset {dataset} needs --data-root, the folder it lies in")
    return READERS[dataset](root, split)


def read_splits(dataset, root):
    """({split: Pairs}, notes) of a data set: train, val and test, with a note for each that it lacks."""
    pairs, notes = {"train": read(dataset, root, "train")}, []
    lacks = {"val": "the last epoch is taken", "test": "the figures are of val, which chose the epoch"}
    for split, note in lacks.items():
        try:
            pairs[split] = read(dataset, root, split)
        except NoSplit:
            notes.append(f"no {split} split: {note}")
    check(len(pairs) > 1, f"{root} has neither a val nor a test split to measure anything on; add one")
    return pairs, notes


def main():
    """Print what each split holds and what is wrong with its files; what cannot be used, with exit code 2."""
    parser = argparse.ArgumentParser(description="What each split of a data set holds, and what is wrong.")
    parser.add_argument("dataset", choices=DATASETS)
    parser.add_argument("--data-root", help="its folder")
    args = parser.parse_args()
    try:
        splits, notes = read_splits(args.dataset, args.data_root)
        for split, pairs in splits.items():
            ids = f", {len(set(pairs.ids))} ids" if pairs.ids else ""
            print(f"{split:5} {len(pairs.images):6d} images {len(pairs.captions):6d} captions, "
                  f"{len(set(pairs.captions)):6d} of them distinct{ids}")
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:  # mapped files on Windows
            notes += load(splits, (32, 32), cache)[2]
    except (ValueError, OSError) as error:
        parser.exit(2, f"data.py: error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\nstopped\n")
    for note in notes:
        print(note)


if __name__ == "__main__":
    main()
