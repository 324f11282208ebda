"""Lets plain `pytest` find the project's files, and keeps tiny models on one thread, where they are fastest."""
import dataclasses
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
torch.set_num_threads(1)
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")       # on the CPU; on a GPU: CUDA_VISIBLE_DEVICES=0 pytest

import clip

# the tests' own size: two blocks in each tower, widths 192 and 128 (different, so that a mix-up fails)
clip.SIZES["tiny"] = clip.CLIPConfig(64, 32, 16, 192, 2, 32, 0, 128, 2)


def tiny_clip(seed=0, **changes):
    """A random CLIP with the tests' own sizes and 600 token ids, in eval mode; changes are fields of CLIPConfig."""
    torch.manual_seed(seed)
    config = dataclasses.replace(clip.SIZES["tiny"], vocab_size=600)
    return clip.CLIP(dataclasses.replace(config, **changes)).eval()


COLOURS = {"red": (200, 40, 40), "green": (40, 160, 60), "blue": (50, 80, 200), "yellow": (230, 210, 60),
           "white": (235, 235, 235), "black": (30, 30, 30)}


def two_colours(number, size):
    """Image `number` of a small world: one colour over another, with noise -> (image, "red", "green")."""
    rng = np.random.default_rng(number)
    above, below = rng.choice(list(COLOURS), 2, replace=False)
    pixels = np.empty((*size, 3))
    pixels[:size[0] // 2], pixels[size[0] // 2:] = COLOURS[above], COLOURS[below]
    pixels += rng.normal(0, 8, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), above, below


def write_pairs(root, train=25, test=12, size=(32, 32)):
    """A small data set in the layout of UCM, RSICD and RSITMD: five captions an image, 80 % of train for training."""
    (root / "images").mkdir(parents=True)
    for split, numbers in (("train", range(train)), ("test", range(train, train + test))):
        names, captions = [], []
        for number in numbers:
            image, above, below = two_colours(number, size)
            image.save(root / f"images/{number}.png")
            names += [f"{number}.png"] if split == "train" else [f"{number}.png"] * 5
            captions += [f"{above} above {below}", f"a {below} ground under {above}", f"much {above}",
                         f"image {number} is {below}", f"{below} is below number {number}"]
        (root / f"{split}_filename.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
        (root / f"{split}_caps.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
    return root


def write_people(root, people=20, size=(96, 48)):
    """A small data set in the layout of RSTPReid: two images a person, two captions an image."""
    (root / "imgs").mkdir(parents=True)
    entries = []
    for number in range(2 * people):
        image, above, below = two_colours(number // 2, size)
        image.save(root / f"imgs/{number}.png")
        person = number // 2
        split = "train" if person < 0.7 * people else "val" if person < 0.8 * people else "test"
        entries.append({"id": person, "img_path": f"{number}.png", "split": split,
                        "captions": [f"a {above} shirt and {below} trousers", f"person {person} in {above}"]})
    (root / "data_captions.json").write_text(json.dumps(entries), encoding="utf-8")
    return root
