"""Evaluation: metrics with ties at their expected value, tests of runs and of plain CLIP, search, tables, pictures.

    python eval.py runs/x                                          a run, on the data set it was trained for
    python eval.py runs/x --dataset ucm --data-root ucm_precomp    ... or on another one
    python eval.py ViT-B/32 --dataset ucm --data-root ucm_precomp  plain CLIP, zero-shot
    python eval.py --table runs/*                                  finished runs side by side, mean and spread
    python eval.py runs/x --query "two boats in a harbour"         search in the run's data set
    python eval.py runs/x --query-image boat.jpg --gallery photos  a picture's neighbours in a folder
    python eval.py runs/x --sheet 8                                random test captions and what they find

Retrieval: i2t, each of N pictures ranks all M captions, and the best of its own counts; t2i, each caption ranks the
N pictures. R@K is the percentage ranked in the top K, mR the mean of the six. Re-identification: each caption ranks
the pictures, and all pictures of its person are right; Rank-K, mAP, mINP. Many captions of these data sets are
identical and tie exactly, so a tie counts as its expected value under random order: a collapsed model scores chance,
and not 100 or whatever the sort happens to do.

Shapes: N pictures, M captions, Q queries, G gallery items, B rows of a chunk, P own items of a query, D joint width.
"""
import argparse
import hashlib
import itertools
import json
import math
import os
import random
import statistics
import sys
import textwrap
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

import adapters
import clip
import data

KS = (1, 5, 10)
RECALLS = [f"{way}_R@{k}" for way in ("i2t", "t2i") for k in KS]
DEVICES = ["cpu", *["cuda"] * torch.cuda.is_available(), *(f"cuda:{n}" for n in range(torch.cuda.device_count()))]
TABLE_PNG, SHEET_PNG = "runs/table.png", "runs/sheet.png"
SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".bmp", ".gif")      # of pictures in a gallery


# ---------------------------------------------------------------------------------------------- metrics

class Product:
    """Stands for the similarities queries (Q, D) @ gallery (G, D).T without holding them: rows are worked out as they
    are asked for. Equal gallery items are multiplied once, so that they tie to the bit."""

    def __init__(self, queries, gallery):
        self.queries, self.gallery, self.shape = queries, gallery, (len(queries), len(gallery))
        self.distinct, self.place = gallery.unique(dim=0, return_inverse=True)

    def __getitem__(self, rows):
        return (self.queries[rows] @ self.distinct.T)[:, self.place]          # (B, G)

    @property
    def T(self):
        return Product(self.gallery, self.queries)


def own_items(query_ids, gallery_ids):
    """Where in the gallery the items of each query's id are -> (places (Q, P), padded, and which of them are real)."""
    order = gallery_ids.argsort(stable=True)
    first, end = (torch.searchsorted(gallery_ids[order], query_ids, right=right) for right in (False, True))
    place = first[:, None] + torch.arange(int((end - first).max()))
    return order[place.clamp(max=len(order) - 1)], place < end[:, None]


def count_ties(similarity, query_ids, gallery_ids, size=2 ** 22):
    """Where each query's own items, those of its id, stand in the gallery -> (above, tied, own_above, own_tied).

    Each is (Q, P) float64, P being the most own items a query has: how many gallery items score strictly more than
    this own item, how many the same (itself included), and how many of these are own ones. The worst own item comes
    first, the best last; a query with fewer than P has zeros in front. similarity: (Q, G), a matrix or a Product, of
    which about `size` scores are in work at a time. ids: (Q,) and (G,).
    Raises ValueError for NaN, shapes that do not fit, or a query without an item of its own.
    """
    query_ids, gallery_ids = (torch.as_tensor(ids).long().cpu() for ids in (query_ids, gallery_ids))
    if tuple(similarity.shape) != (*query_ids.shape, *gallery_ids.shape) or 0 in similarity.shape:
        raise ValueError(f"similarity {tuple(similarity.shape)} does not fit {tuple(query_ids.shape)} queries and a "
                         f"gallery of {tuple(gallery_ids.shape)}")
    place, real = own_items(query_ids, gallery_ids)
    if not real.any(dim=1).all():
        lost = int((~real.any(dim=1)).nonzero()[0])
        raise ValueError(f"query {lost} (id {int(query_ids[lost])}) has no match in the gallery")
    counts = torch.zeros(2, 2, *place.shape, dtype=torch.float64)
    for start in range(0, len(query_ids), step := max(1, size // len(gallery_ids))):
        rows = slice(start, start + step)
        scores = similarity[rows].contiguous()                                # (B, G)
        if not torch.isfinite(scores.sum()):
            raise ValueError("similarities hold NaN or infinite values: the features are broken, not just bad")
        own = scores.gather(1, place[rows]).masked_fill(~real[rows], -math.inf).sort(dim=1)[0]      # ascending
        for n, among in enumerate((torch.from_numpy(np.sort(scores.numpy())), own)):
            below, upto = torch.searchsorted(among, own), torch.searchsorted(among, own, right=True)
            counts[n, :, rows] = torch.stack([among.shape[1] - upto, upto - below]) * own.isfinite()
    (above, tied), (own_above, own_tied) = counts
    return above, tied, own_above, own_tied


def places(tied, own_tied):
    """Yield (i, probability that exactly i of the tied items come before the first own one), i = 0, 1, ...

    With p own ones among t in random order it is C(t-1-i, p-1) / C(t, p), and the same for i coming after the last.
    """
    i, probability = 0, own_tied / tied
    while probability.any():
        yield i, probability
        probability = probability * (tied - own_tied - i) / (tied - 1 - i).clamp(min=1)
        i += 1


def hit_rates(counts):
    """Percentage of queries with an own item in the top 1, 5, 10 -> [R@1, R@5, R@10], from what `count_ties` gives."""
    above, tied, _, own_tied = (count[:, -1] for count in counts)             # of the best own item
    hits = torch.zeros(len(KS), dtype=torch.float64)
    for i, probability in itertools.islice(places(tied, own_tied), max(KS)):
        hits += torch.stack([(probability * (above + i < k)).mean() for k in KS])
    return (100 * hits).tolist()


def expected_precision(above, tied, own_above, own_tied):
    """Expected average precision, (Q,): the mean over own items of j / r, the j-th of them being at rank r.

    An own item stands at rank r = g + i, i = 1..t alike, and there j = c + 1 + (i-1) (p-1) / (t-1) is expected, with c
    own items above. As j is linear in r, the mean over i needs only that of 1 / r, from harmonic numbers.
    """
    steps = torch.arange(1, int((above + tied).max()) + 1, dtype=torch.float64)
    harmonic = torch.cat([torch.zeros(1, dtype=torch.float64), (1 / steps).cumsum(0)])
    inverse_rank = (harmonic[(above + tied).long()] - harmonic[above.long()]) / tied.clamp(min=1)
    slope = (own_tied - 1) / (tied - 1).clamp(min=1)
    precision = slope + (own_above + 1 - slope * (above + 1)) * inverse_rank  # (Q, P)
    return precision.where(tied > 0, 0).sum(dim=1) / (tied > 0).sum(dim=1)


def retrieval_metrics(similarity, image_of_caption):
    """Recalls of image-text retrieval in percent, ties at their expected value (see the head of this file).

    similarity (N, M): pictures x captions, a matrix or a Product. image_of_caption (M,): the picture each caption is
    about. Returns {"i2t_R@1", "i2t_R@5", "i2t_R@10", "t2i_R@1", "t2i_R@5", "t2i_R@10", "mR"}. Two pictures, captions 0
    and 1 about the first: [[.9, .1, .3], [.2, .3, .4]] -> i2t R@1 100, t2i R@1 66.7 (caption 1 prefers the second).
    Raises ValueError for NaN, shapes that do not fit, or a picture without caption.
    """
    similarity, captions = as_matrix(similarity), image_of_caption
    images, recalls = range(similarity.shape[0]), []
    for way in ((similarity, images, captions), (similarity.T, captions, images)):
        recalls += hit_rates(count_ties(*way))
    return {**dict(zip(RECALLS, recalls)), "mR": sum(recalls) / 6}


def reid_metrics(similarity, query_ids, gallery_ids):
    """Metrics of re-identification in percent, means over queries, ties at their expected value.

    similarity (Q, G): captions x pictures, a matrix or a Product; ids (Q,) and (G,). An item of the query's id is
    relevant. Returns {"R1", "R5", "R10", "mAP", "mINP"}: with relevant items at ranks r_1 < ... < r_P, Rank-k is
    [r_1 <= k], AP the mean of j / r_j (Market-1501), INP is P / r_P (arXiv 2001.04193). No camera filter.
    Raises ValueError for NaN, shapes that do not fit, or a query without an item of its id.
    """
    counts = count_ties(as_matrix(similarity), query_ids, gallery_ids)
    metrics = dict(zip(("R1", "R5", "R10"), hit_rates(counts)))
    metrics["mAP"] = 100 * expected_precision(*counts).mean().item()
    P = (counts[1] > 0).sum(dim=1)
    above, tied, _, own_tied = (count.gather(1, count.shape[1] - P[:, None])[:, 0] for count in counts)     # the worst
    inverse_rank = sum(probability / (above + tied - i) for i, probability in places(tied, own_tied))
    return {**metrics, "mINP": 100 * (P * inverse_rank).mean().item()}


def as_matrix(similarity):
    """Nested lists, an array or a tensor as float32 on the CPU; a Product as it is."""
    return similarity if isinstance(similarity, Product) else torch.as_tensor(similarity).float().cpu()


def split_metrics(similarity, pairs):
    """Metrics of one split, similarity (N, M) of its pictures and captions: re-identification's if there are ids."""
    if pairs.ids is None:
        return retrieval_metrics(similarity, pairs.image_of_caption)
    ids = torch.tensor(pairs.ids)
    return reid_metrics(similarity.T, ids[pairs.image_of_caption], ids)


def chance(pairs):
    """What a model scores for which everything is equally similar."""
    return split_metrics(torch.zeros(1, 1).expand(len(pairs.images), len(pairs.captions)), pairs)


def headline(metrics):
    """The one figure that stands for the others, (name, value): it chooses the best epoch and orders the tables."""
    name = "mR" if "mR" in metrics else "R1"
    return name, metrics[name]


# ---------------------------------------------------------------------------------------------- encoding

def autocast(model, precision):
    """bf16 products where a run was made with them; "fp32" changes nothing."""
    return torch.autocast(model.logit_scale.device.type, torch.bfloat16, enabled=precision == "bf16")


@torch.no_grad()
def encode_batches(encode, batches, what):
    """Rows `encode` gives for each batch of row numbers, all together (N, D), float32 on the CPU."""
    features, count = None, sum(map(len, batches))
    for rows in tqdm(batches, f"encoding {what}", leave=False, disable=None):
        batch = encode(rows).float().cpu()
        if features is None:    # allocated once: small results between large freed blocks fragment the memory
            features = torch.empty(count, batch.shape[1])
        features[rows] = batch
    return features


def encode_images(model, images, batch_size=128):
    """uint8 (N, 3, H, W) array -> unit features (N, D), float32 on the CPU."""
    device, batches = model.logit_scale.device, torch.arange(len(images)).split(batch_size)
    return encode_batches(lambda rows: model.encode_image(clip.normalize(
        torch.from_numpy(images[rows.numpy()]).to(device))), batches, "pictures")


def encode_texts(model, tokens, batch_size=256):
    """Token ids (M, L) -> unit features (M, D), float32 on the CPU. Each distinct caption is encoded once."""
    device = model.logit_scale.device
    distinct, place = tokens.unique(dim=0, return_inverse=True)
    by_length = distinct.count_nonzero(dim=1).argsort(stable=True)            # short with short: less padding
    return encode_batches(lambda rows: model.encode_text(distinct[rows].to(device)), by_length.split(batch_size),
                          "captions")[place]


def evaluate(model, tokenizer, pairs, images, precision="fp32"):
    """Metrics of one model on one split: pairs from a reader of data.py, images its uint8 array (N, 3, H, W)."""
    model.eval()
    tokens = tokenizer(pairs.captions, model.config.context_length)
    with autocast(model, precision):
        image_features, text_features = encode_images(model, images), encode_texts(model, tokens)
    return split_metrics(Product(image_features, text_features), pairs)


# ---------------------------------------------------------------------------------------------- runs

def fingerprint(model):
    """16 hex digits that tell one set of weights from another, CLIP's and a method's: a method fits the CLIP it was
    trained on only, and features fit the model they were made with."""
    digest = hashlib.sha256()
    for name, value in sorted({**model.openai_state_dict(), **adapters.trainable_state(model)}.items()):
        digest.update(name.encode() + value.detach().float().flatten()[:1024].cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def is_run(name):
    """Whether a name, file or folder is a run of train.py; otherwise it is for load_clip."""
    with clip.loading(name):
        return name not in clip.URLS and "settings" in clip.read_file(name)


def load_checkpoint(path):
    """The dict of a checkpoint of ours; path is the file, or a run's folder, whose best.pt is meant."""
    path = Path(path) / "best.pt" if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; a run of train.py leaves a folder with best.pt")
    if not is_run(path):
        raise ValueError(f"{path} is no checkpoint of train.py, it has no settings; a CLIP is for load_clip")
    with clip.loading(path):
        return torch.load(path, map_location="cpu", weights_only=True)


def load_run(path, device="cpu"):
    """Model with its method and tokenizer as a run of train.py left them -> (model, tokenizer, settings).

    Raises FileNotFoundError, or ValueError for a damaged file, another kind of file, or another CLIP than the run's.
    """
    checkpoint = load_checkpoint(path)
    settings = checkpoint["settings"]
    lacks = [key for key in ("trained", "merges", "fingerprint", "epoch") if key not in checkpoint]
    if lacks:
        raise ValueError(f"{path} lacks {', '.join(lacks)}: a run's best.pt is needed, not last.pt")
    source = path if "state_dict" in checkpoint else settings["model"]
    model = clip.load_clip(source, settings["image_size"], activation=settings["activation"])
    settings |= {"epoch": checkpoint["epoch"], "fingerprint": fingerprint(model)}   # the latter without the method
    if "state_dict" not in checkpoint and settings["fingerprint"] != checkpoint["fingerprint"]:
        raise ValueError(f"{path} was trained on other weights than those now in {settings['model']}")
    adapters.add_method(model, settings["method"], **settings["sizes"])
    adapters.load_trainable(model, checkpoint["trained"])
    return model.to(device).eval(), clip.Tokenizer(merges=checkpoint["merges"]), settings


# ---------------------------------------------------------------------------------------------- tables

# arXiv 2308.12509, tables I-III: test mR with OpenAI's ViT-B/32 on each of these
PAPER_DATA = ("rsicd", "rsitmd", "ucm")
PAPER_MR = {
    "zero-shot": (15.04, 23.89, 33.08), "full fine-tuning": (30.39, 45.33, 52.43),
    "linear-probe": (24.46, 36.25, 51.30), "coop": (17.29, 30.51, 44.95), "vpt": (21.72, 34.14, 49.77),
    "vl-prompt": (19.61, 32.40, 47.50), "adapter": (24.84, 32.37, 52.74), "clip-adapter": (21.65, 32.38, 44.82),
    "convpass": (21.38, 32.55, 52.91), "adaptformer": (28.10, 34.51, 53.69),
    "cross-modal-adapter": (27.96, 38.06, 53.35), "uniadapter": (28.84, 39.23, 54.59),
    "mrs, hmmc": (31.12, 44.47, 55.71)}
# settings that do not make a run another experiment, or that follow from the others
INCIDENTAL = ("seed", "out", "init", "resume", "device", "data_root", "sizes", "trained_parameters")


def label(settings):
    """What a run is called in a table: what was trained, and by which loss."""
    method, what = settings["method"], settings["method"]
    if settings["model"] in ("tiny", "small"):
        what = "from scratch"
    elif settings["train"] != "method":
        added = {"backbone": f" with fixed {method}", "all": f" and {method} at once"}[settings["train"]]
        what = "full fine-tuning" + added * (method != "none")
    return f"{what}, {settings['loss']}{', same masked' * settings['mask_same']}"


def table(rows, heads=()):
    """Markdown table of results, its columns lined up for a terminal too.

    rows: (label, trained parameters or None, share in percent, metrics) and, if wanted, the spread of the headline
    figure or None, and a string for each further column; heads: the names of those columns.
    """
    names = [name.replace("_", " ") if name.endswith("R@1") else name.split("_")[-1] for name in rows[0][3]]
    lines = [["", "trained", "share", *names, *heads]]
    for label, trained, share, metrics, *rest in rows:
        spread, *cells = rest or [None]
        size = ["", ""] if trained is None else [f"{trained:,}".replace(",", " "), f"{share:.2f} %"]
        figures = {name: f"{value:.2f}" for name, value in metrics.items()}
        if spread is not None:
            figures[headline(metrics)[0]] += f" ± {spread:.2f}"
        lines.append([label, *size, *figures.values(), *cells])
    width = [max(map(len, column)) for column in zip(*lines)]
    lines = [[line[0].ljust(width[0]), *map(str.rjust, line[1:], width[1:])] for line in lines]
    lines = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([lines[0], "|:--" + "|--:" * (len(width) - 1) + "|", *lines[1:]])


def read_runs(folders):
    """The metrics.json of finished runs by what they were tested on, {heading: [run]}; other folders are named on
    stderr. Raises ValueError if there is no finished run among them."""
    found = {}
    for folder in folders:
        try:
            run = json.loads((Path(folder) / "metrics.json").read_text())
            settings = run["settings"]
            place = Path(settings["data_root"] or "").name
            found.setdefault(f"{settings['dataset']} {run['split']} {place}".strip(), []).append(run)
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"eval.py: {folder} is left out, it is no finished run: {error}", file=sys.stderr)
    if not found:
        raise ValueError(f"no finished run of train.py among {', '.join(map(str, folders))}")
    return found


Result = namedtuple("Result", "label trained share metrics spread runs")


def average(runs):
    """Results of runs on one data set, those that differ by seed alone as one: chance first, then from the worst on.

    A Result is a row of `table` with the mean metrics, the spread (standard deviation of the headline figure over
    seeds, None for one seed) and its runs. Those of the same label get the settings in which they differ.
    """
    groups, results = {}, []
    for run in runs:
        settings = {name: value for name, value in run["settings"].items() if name not in INCIDENTAL}
        settings["init"] = bool(run["settings"].get("init"))        # from which run may differ from seed to seed
        plain = {name: settings[name] for name in ("model", "image_size", "activation")}
        for row in run["rows"]:
            key = settings if row[1] else plain if row[1] == 0 else {}
            seeds = groups.setdefault((row[0], json.dumps(key, sort_keys=True)), {})
            seeds[run["settings"]["seed"]] = row, run           # of one seed that was run twice, the last
    for (name, key), seeds in groups.items():
        rows, runs = zip(*seeds.values())
        _, trained, share, metrics = rows[0]
        twins = [json.loads(other) for twin, other in groups if twin == name]
        differs = [f"{k} {v}" for k, v in json.loads(key).items() if any(twin.get(k) != v for twin in twins)]
        mean = {figure: statistics.fmean(row[3][figure] for row in rows) for figure in metrics}
        several = trained and len(rows) > 1
        spread = statistics.stdev(headline(row[3])[1] for row in rows) if several else None
        results.append(Result(", ".join([name, *differs]), trained, share, mean, spread, runs))
    return sorted(results, key=lambda result: (result.trained is not None, headline(result.metrics)[1]))


def summarize(results, dataset):
    """Markdown table of results of `average`; on the paper's data sets its figures are the last column."""
    rows, heads = [], ["seeds", "minutes", "GB"] + ["published mR, ViT-B/32"] * (dataset in PAPER_DATA)
    for result in results:
        cells = [""] * len(heads)
        if result.trained:
            cells[:3] = (f"{len(result.runs)}", f"{statistics.fmean(run['minutes'] for run in result.runs):.1f}",
                         f"{max(run['memory_gb'] for run in result.runs):.1f}")
        known = [mR for name, mR in PAPER_MR.items() if f"{result.label},".startswith(f"{name},")
                 and "same masked" not in result.label]         # the paper has no mask
        if known and dataset in PAPER_DATA:
            cells[3] = f"{known[0][PAPER_DATA.index(dataset)]:.2f}"
        rows.append([*result[:5], *cells])
    return table(rows, heads)


# ---------------------------------------------------------------------------------------------- pictures

INK, PALE, RED, BLUE, GREEN = "#333333", "#dddddd", "#c0392b", "#1f5fa8", "#1a7f37"


def chart(size, title, bottom, left, right=None):
    """White canvas with axes, which run from their first tick {position: text} to the last, at twice the size, to be
    reduced in the end for smooth lines -> (image, draw, font, place); place(x, y) gives the pixel of a position."""
    W, H, x0, x1, y0, y1 = 2 * size[0], 2 * size[1], min(bottom), max(bottom), min(left), max(left)
    image, font = Image.new("RGB", (W, H), "white"), ImageFont.load_default(26)
    draw = ImageDraw.Draw(image)

    def place(x, y):
        return 130 + (x - x0) / (x1 - x0) * (W - 260), H - 110 - (y - y0) / (y1 - y0) * (H - 190)
    for y, text in left.items():
        draw.line([place(x0, y), place(x1, y)], PALE, 2)
        draw.text((118, place(x0, y)[1]), text, INK, font, anchor="rm")
    for y, text in (right or {}).items():
        draw.text((W - 118, place(x1, y)[1]), text, INK, font, anchor="lm")
    for x, text in bottom.items():
        draw.text((place(x, y0)[0], H - 80), text, INK, font, anchor="mm")
    draw.text((W / 2, H - 30), title, INK, font, anchor="mm")
    return image, draw, font, place


def round_up(value):
    """The end of an axis whose quarters are short numbers: the next of 1, 2, 4, 8, 10, 20 ... or 0.8, 0.4 ..."""
    unit = 10 ** math.floor(math.log10(value)) if value > 0 else 1
    return next(unit * step for step in (1, 2, 4, 8, 10) if unit * step >= value)


def plot_curve(history, path, size=(720, 360)):
    """Training curve as a PNG: the loss, and the validation figure that chooses the epoch, each on its axis from 0.

    history: dicts with epoch, loss and, where there is a validation split, its metrics, their names after val_.
    """
    last = history[-1]["epoch"]
    step = math.ceil(last / 10)
    curves = [("loss", RED, 130, "lm")]
    if any(name.startswith("val_") for name in history[-1]):
        metrics = {name.removeprefix("val_"): value for name, value in history[-1].items()}
        curves.append((f"val_{headline(metrics)[0]}", BLUE, 2 * size[0] - 130, "rm"))
    high = {key: round_up(max(row[key] for row in history)) for key, *_ in curves}
    ticks = [{n / 4: f"{high[key] * n / 4:.3g}" for n in range(5)} for key in high]
    image, draw, font, place = chart(size, "epoch", {n: str(n) for n in range(0, last + step, step)}, *ticks)
    for key, colour, x, anchor in curves:
        points = [place(row["epoch"], row[key] / high[key]) for row in history]
        draw.line(points, colour, 5, joint="curve")
        for point in points:
            draw.circle(point, 6, colour)
        draw.text((x, 36), key.replace("val_", "validation "), colour, font, anchor=anchor)
    image.resize(size, Image.LANCZOS).save(path)


def free_box(draw, font, text, x, y, taken):
    """The box nearest to a point in which a text covers nothing that is taken."""
    for radius, angle in itertools.product(range(24, 400, 8), range(0, 360, 15)):
        across, down = radius * math.cos(math.radians(angle)), radius * math.sin(math.radians(angle))
        box = draw.textbbox((x + across, y + down), text, font, anchor="rm" if 90 < angle < 270 else "lm")
        if all(box[0] > b[2] or b[0] > box[2] or box[1] > b[3] or b[1] > box[3] for b in taken):
            break
    return box


def plot_table(results, path, title, size=(900, 540)):
    """Headline figure over trained parameters as a PNG: a point and its spread over seeds for each trained result of
    `average`, and a line across for zero-shot and for full fine-tuning."""
    results = [result for result in results if result.trained is not None]
    powers = [math.floor(math.log10(result.trained)) for result in results if result.trained]
    values = [headline(result.metrics)[1] + sign * (result.spread or 0) for result in results for sign in (-1, 1)]
    low, high = 5 * math.floor(min(values) / 5), 5 * math.floor(max(values) / 5 + 1)
    endings = {result.label.rpartition(", ")[2] for result in results if result.trained}
    common = endings.pop() if len(endings) == 1 else ""         # the loss, if it is that of all: said once
    title = ", ".join(filter(None, [title, common]))
    image, draw, font, place = chart(
        size, title, {n: f"{10 ** n:,}".replace(",", " ") for n in range(min(powers), max(powers) + 2)},
        {y: str(y) for y in range(low, high + 1, 5 if high - low <= 40 else 10)})
    (left, bottom), (right, top) = place(min(powers), low), place(max(powers) + 1, high)
    W, H = 2 * size[0], 2 * size[1]
    taken, points = [(0, 0, W, 0), (W, 0, W, H), (0, 0, left - 12, H), (0, bottom + 8, W, H)], []     # the margins
    for result in results:
        x, y = place(math.log10(result.trained or 10 ** min(powers)), headline(result.metrics)[1])
        reach = (result.spread or 0) * (bottom - top) / (high - low)
        if f"{result.label},".startswith(("zero-shot,", "full fine-tuning,")):
            draw.line([(left, y), (right, y)], RED, 3)
            taken.append((left, y - 2, right, y + 2))
        if result.trained:
            draw.line([(x, y - reach), (x, y + reach)], BLUE, 4)
            draw.circle((x, y), 9, BLUE)
        taken.append((x - 9, y - max(reach, 9), x + 9, y + max(reach, 9)))
        points.append((result.label.removesuffix(f", {common}"), x, y))
    for text, x, y in points:
        box = free_box(draw, font, text, x, y, taken)
        draw.line([(x, y), (min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3]))], BLUE, 1)
        draw.text(box[:2], text, INK, font, anchor="lt")
        taken.append(box)
    image.resize(size, Image.LANCZOS).save(path)


def draw_sheet(rows, path, columns=5, side=176):
    """Contact sheet as a PNG. rows: (heading, [(picture file, line beneath it, colour of its frame)])."""
    font, width, step = ImageFont.load_default(16), columns * (side + 16) + 16, side + 40
    heights = [56 + math.ceil(len(found) / columns) * step for _, found in rows]
    sheet = Image.new("RGB", (width, sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    for (heading, found), top in zip(rows, itertools.accumulate(heights, initial=0)):
        draw.text((16, top + 8), textwrap.fill(heading, 110, max_lines=2, placeholder=" ..."), INK, font)
        for n, (file, line, colour) in enumerate(found):
            x, y = 16 + n % columns * (side + 16), top + 56 + n // columns * step
            draw.rectangle((x - 5, y - 5, x + side + 4, y + side + 4), colour)
            with Image.open(file) as image:
                sheet.paste(ImageOps.pad(image.convert("RGB"), (side, side), color="white"), (x, y))
            draw.text((x, y + side + 8), line, INK, font)
    sheet.save(path)


# ---------------------------------------------------------------------------------------------- search

def find_pictures(folder):
    """The picture files under a folder, at any depth; FileNotFoundError if there is none."""
    found = sorted(os.path.join(place, name) for place, _, names in os.walk(folder) for name in names
                   if name.lower().endswith(SUFFIXES))
    if not found:
        raise FileNotFoundError(f"{folder} holds no picture ({', '.join(SUFFIXES)}), or is not there")
    return found


def encode_files(model, paths, file, chunk=2048):
    """Unit features of picture files -> (paths, features (N, D)), kept in `file` for the next time.

    Only pictures that are new or changed since, by size and time, are decoded and encoded; `file` is written after
    each `chunk` of them, so that a break loses no more. What cannot be read is left out; ValueError if nothing can.
    """
    stats = [os.path.isfile(path) and os.stat(path) for path in paths]        # decode says what is missing
    path_of = {f"{stat and (stat.st_size, stat.st_mtime_ns)} {os.path.abspath(path)}": path
               for path, stat in zip(paths, stats)}
    saved = {"keys": "", "features": torch.empty(0)}
    if file.is_file():
        with clip.loading(file):
            saved = torch.load(file, weights_only=True)
    row = {key: n for n, key in enumerate(saved["keys"].split("\0"))}
    done, new = [key for key in path_of if key in row], [key for key in path_of if key not in row]
    features = saved["features"][[row[key] for key in done]]
    for i in tqdm(range(0, len(new), chunk), "new pictures", leave=False, disable=None):
        with ThreadPoolExecutor() as pool:
            images = list(pool.map(lambda key: data.decode(path_of[key], model.config.image_size), new[i:i + chunk]))
        for reason in (image for image in images if isinstance(image, str)):
            print(f"eval.py: left out: {reason}", file=sys.stderr)
        images = {key: image for key, image in zip(new[i:i + chunk], images) if not isinstance(image, str)}
        if images:
            features = torch.cat([features, encode_images(model, np.stack([*images.values()]))])
            done += images
            with data.made_whole(file) as draft:
                torch.save({"keys": "\0".join(done), "features": features}, draft)
    if not done:
        raise ValueError(f"none of the {len(paths)} pictures can be read")
    return [path_of[key] for key in done], features


def right_pictures(pairs, text):
    """Files of the pictures that have this very caption, and of their persons where there are ids."""
    own = {n for caption, n in zip(pairs.captions, pairs.image_of_caption) if caption == text}
    if pairs.ids is not None:
        persons = {pairs.ids[n] for n in own}
        own = {n for n, person in enumerate(pairs.ids) if person in persons}
    return {pairs.images[n] for n in own}


def search(args, model, tokenizer, settings):
    """Print the pictures of a folder or a split that are nearest to the queries, and draw them as a sheet.

    Right and wrong are known for a query that is a caption of the split.
    """
    pairs = None if args.gallery else read_pairs(args, settings)[1]
    paths = find_pictures(args.gallery) if args.gallery else pairs.images
    place = os.path.abspath(args.gallery or paths[0])       # a split's first picture is no other split's
    key = repr((place, fingerprint(model), model.config, settings["precision"]))
    file = Path(args.cache) / f"features-{hashlib.sha256(key.encode()).hexdigest()[:20]}.pt"
    queries, sheet = [args.query], []
    if args.sheet:
        captions = sorted(set(pairs.captions))
        queries = random.Random(0).sample(captions, min(args.sheet, len(captions)))
    with autocast(model, settings["precision"]):
        if args.query_image:
            queries, sheet = [args.query_image], [("query", [(args.query_image, "", BLUE)])]
            with Image.open(args.query_image) as image:
                features = encode_images(model, clip.preprocess(image, model.config.image_size)[None].numpy())
        else:
            features = encode_texts(model, tokenizer(queries, model.config.context_length))
        paths, gallery = encode_files(model, paths, file)
    top = min(len(paths), args.top if not args.sheet else 5)
    for query, feature in zip(queries, features):
        right, found = right_pictures(pairs, query) if pairs else set(), []
        print(query)
        for rank, (score, row) in enumerate(zip(*(gallery @ feature).topk(top)), 1):
            path = paths[row]
            mark, colour = (("right", GREEN) if path in right else ("wrong", RED)) if right else ("", PALE)
            print(f"{rank:4d}  {score:.4f}  {path}  {mark}")
            found.append((path, f"{rank}   {score:.3f}   {mark}", colour))
        sheet.append((query, found))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    draw_sheet(sheet, args.out)
    print(f"written: {args.out}")


# ---------------------------------------------------------------------------------------------- the command line

def parse(argv=None):
    """Settings from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", help="a run's folder or best.pt; plain CLIP: ViT-B/32 ..., or a weight file")
    task = parser.add_argument_group("instead of a test").add_mutually_exclusive_group()
    task.add_argument("--table", nargs="+", metavar="RUN", help="finished runs, for a table and a picture by data set")
    task.add_argument("--query", metavar="TEXT", help="the pictures nearest to a sentence; right and wrong are marked "
                                                      "if it is a caption of the data set")
    task.add_argument("--query-image", metavar="FILE", help="the pictures nearest to a picture")
    task.add_argument("--sheet", type=int, metavar="N", help="N random captions, and the pictures nearest to each")
    where = parser.add_argument_group("where")
    where.add_argument("--dataset", choices=data.DATASETS, help="by default the run's own")
    where.add_argument("--data-root", metavar="DIR", help="its folder; by default the run's own")
    where.add_argument("--split", default="test", choices=("train", "val", "test"), help="(default: %(default)s)")
    where.add_argument("--gallery", metavar="DIR", help="search the pictures of this folder, at any depth, instead")
    where.add_argument("--cache", default="runs/cache", metavar="DIR",
                       help="keeps decoded pictures, and features for the next search (default: %(default)s)")
    how = parser.add_argument_group("how")
    how.add_argument("--top", type=int, default=10, help="pictures shown (default: %(default)s; with --sheet: 5)")
    how.add_argument("--out", metavar="PNG", help=f"the picture drawn (default: {TABLE_PNG} or {SHEET_PNG})")
    how.add_argument("--activation", choices=("quick_gelu", "gelu"), help="of a weight file that does not say; most of "
                                                                          "open_clip's: gelu")
    how.add_argument("--skip-bad", action="store_true", help="test without the pictures that cannot be read")
    how.add_argument("--device", default="cuda" if "cuda" in DEVICES else "cpu", choices=DEVICES,
                     help="(default: %(default)s)")
    args = parser.parse_args(argv)
    if (args.run is None) == (args.table is None):
        parser.error("give one run, or --table with finished runs")
    if args.gallery and not (args.query or args.query_image):
        parser.error("--gallery is searched with --query or --query-image")
    if args.top < 1 or args.sheet is not None and args.sheet < 1:
        parser.error("--top and --sheet are 1 or more")
    args.out = Path(args.out or (TABLE_PNG if args.table else SHEET_PNG))
    return args


def read_pairs(args, settings):
    """The split of the flags' data set, or of the run's own -> (name of the data set, pairs)."""
    dataset = args.dataset or settings.get("dataset")
    root = args.data_root or (settings["data_root"] if dataset == settings.get("dataset") else None)
    return dataset, data.read(dataset, root, args.split)


def show_tables(args):
    """Print a table of finished runs for each data set, and draw its picture."""
    found = read_runs(args.table)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for heading, runs in found.items():
        results = average(runs)
        out = args.out if len(found) == 1 else args.out.with_stem(f"{args.out.stem}-{heading.replace(' ', '-')}")
        print(f"### {heading}\n\n{summarize(results, runs[0]['settings']['dataset'])}\n")
        plot_table(results, out, f"{heading}: {headline(results[0].metrics)[0]} over trained parameters")
        print(f"written: {out}", file=sys.stderr)


def test(args, model, tokenizer, settings):
    """Print the metrics of a model on a split beside chance."""
    dataset, pairs = read_pairs(args, settings)
    found, images, notes = data.load({args.split: pairs}, model.config.image_size, args.cache, args.skip_bad)
    pairs, images = found[args.split], images[args.split]
    print("\n".join(notes), end="\n" * bool(notes))
    start = time.time()
    metrics = evaluate(model, tokenizer, pairs, images, settings["precision"])
    print(f"{dataset} {args.split}: {len(pairs.images)} pictures, {len(pairs.captions)} captions, encoded in "
          f"{time.time() - start:.1f} s")
    trained = settings.get("trained_parameters", 0)
    share = 100 * trained / sum(p.numel() for p in model.parameters())
    name = label(settings) if "train" in settings else "zero-shot"
    print(table([("chance", None, None, chance(pairs)), (name, trained, share, metrics)]))


def main(argv=None):
    """A test, a table or a search; mistakes end in one line and exit code 2."""
    args = parse(argv)
    try:
        if args.table:
            return show_tables(args)
        if is_run(args.run):
            model, tokenizer, settings = load_run(args.run, args.device)
        elif not (args.dataset or args.gallery):
            raise ValueError(f"{args.run} is no run of train.py, so --dataset or --gallery must say which pictures")
        else:
            model = clip.load_clip(args.run, device=args.device, activation=args.activation)
            tokenizer, settings = clip.Tokenizer(args.run), {"precision": "fp32"}
        command = test if (args.query, args.query_image, args.sheet) == (None, None, None) else search
        command(args, model, tokenizer, settings)
    except (ValueError, OSError, torch.cuda.OutOfMemoryError) as error:
        print(f"eval.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; what a search has encoded is kept", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
