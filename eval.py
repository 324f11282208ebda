"""Evaluation: recall@K with ties at their expected value, test of a run or of plain CLIP, tables and pictures.

    python eval.py runs/x                                       a run, on the data set it was trained for
    python eval.py runs/x --dataset ucm --data-root ucm_precomp  ... or on another one
    python eval.py ViT-B/32 --dataset ucm --data-root ucm_precomp  plain CLIP, zero-shot
    python eval.py --table runs/*                               finished runs side by side, mean and spread over seeds

Retrieval protocol: i2t, each of N pictures ranks all M captions, and the best of its own counts; t2i, each caption
ranks the N pictures. R@K is the percentage ranked in the top K, mR the mean of the six. Many captions of these
data sets are identical and tie exactly, so a tie counts as its expected value under random order: a collapsed model
scores chance, and not 100 or whatever the sort happens to do.

Shapes: N pictures, M captions, Q queries, G gallery items, D joint width.
"""
import argparse
import hashlib
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import adapters
import clip
import data

RECALLS = [f"{way}_R@{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)]
REID = ["R1", "R5", "R10", "mAP", "mINP"]
COLUMNS = {     # of a table, by the headline figure: name in the metrics -> head of the column
    "mR": dict(zip([*RECALLS, "mR"], ["i2t R@1", "R@5", "R@10", "t2i R@1", "R@5", "R@10", "mR"])),
    "R1": dict(zip(REID, REID))}


# ---------------------------------------------------------------------------------------------- metrics

class Product:
    """The similarities of features, queries (Q, D) @ gallery (G, D).T, worked out for the rows asked for: stands for
    the matrix (Q, G) where that is too large. Equal gallery items score equally to the bit, which one product over
    all of them does not promise."""

    def __init__(self, queries, gallery):
        self.queries, self.gallery, self.shape = queries, gallery, (len(queries), len(gallery))
        self.distinct, self.place = gallery.unique(dim=0, return_inverse=True)

    def __getitem__(self, rows):
        return (self.queries[rows] @ self.distinct.T)[:, self.place]          # (B, G)

    @property
    def T(self):
        return Product(self.gallery, self.queries)


def count_ties(similarity, query_ids, gallery_ids, size=2 ** 24):
    """Where each query's own items, those of its id, stand in the gallery -> (above, tied, own_above, own_tied).

    Each is (Q, P) float64, P being the most own items a query has: how many gallery items score strictly more than
    this own item, how many the same (itself included), and how many of these are own ones. The worst own item comes
    first; a query with fewer than P has zeros in front. Works on about `size` scores of similarity (Q, G) at a time.
    Raises ValueError for NaN, shapes that do not fit, or a query without an item of its own.
    """
    if tuple(similarity.shape) != (*query_ids.shape, *gallery_ids.shape) or 0 in similarity.shape:
        raise ValueError(f"similarity {tuple(similarity.shape)} does not fit {tuple(query_ids.shape)} queries and a "
                         f"gallery of {tuple(gallery_ids.shape)}")
    P, counts = int(gallery_ids.unique(return_counts=True)[1].max()), []
    for rows in torch.arange(len(query_ids)).split(max(1, size // len(gallery_ids))):
        scores, own = similarity[rows], query_ids[rows, None] == gallery_ids  # (B, G)
        if not torch.isfinite(scores).all():
            raise ValueError("similarities hold NaN or infinite values: the features are broken, not just bad")
        if not own.any(dim=1).all():
            lost = int(rows[~own.any(dim=1)][0])
            raise ValueError(f"query {lost} (id {int(query_ids[lost])}) has no match in the gallery")
        own = np.sort(scores.masked_fill(~own, -math.inf).numpy())[:, -P:]    # ascending, (B, P)
        ranked, own = torch.from_numpy(np.sort(scores.numpy())), torch.from_numpy(own.copy())
        for among in (ranked, own):
            below, upto = torch.searchsorted(among, own), torch.searchsorted(among, own, right=True)
            counts += [(among.shape[1] - upto) * own.isfinite(), (upto - below) * own.isfinite()]
    return [torch.cat(counts[n::4]).double() for n in (0, 1, 2, 3)]


def expected_hits(above, tied, own_tied, k):
    """Probability that the top K holds an own item, (Q,), from the counts of each query's best own item.

    With g items above it and t tied, p of them own, it is 1 - C(t-p, K-g) / C(t, K-g): the chance that K-g draws out of
    the tied ones meet an own one.
    """
    miss = torch.ones_like(above)
    for i in range(k):      # C(t-p, d) / C(t, d) = product over i < d of (t-p-i) / (t-i)
        draw = (tied - own_tied - i).clamp(min=0) / (tied - i).clamp(min=1)
        miss = torch.where(i < k - above, miss * draw, miss)
    return 1 - miss


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


def expected_penalty(above, tied, own_tied):
    """Expected 1 / rank of the last own item, (Q,), from the counts of each query's worst own item.

    The last of p own items among t tied is at place m of them with probability C(m-1, p-1) / C(t, p), m = p..t.
    """
    place, weight, total = tied, own_tied / tied, torch.zeros_like(tied)
    while weight.any():     # from m = t down to p
        total = total + weight / (above + place)
        weight = weight * (place - own_tied) / (place - 1).clamp(min=1)
        place = place - 1
    return total


def retrieval_metrics(similarity, image_of_caption):
    """Recalls of image-text retrieval in percent, ties at their expected value (see the head of this file).

    similarity (N, M): pictures x captions, a matrix or a Product. image_of_caption (M,): the picture each caption is
    about. Returns {"i2t_R@1", "i2t_R@5", "i2t_R@10", "t2i_R@1", "t2i_R@5", "t2i_R@10", "mR"}. Two pictures, captions 0
    and 1 about the first: [[.9, .1, .3], [.2, .3, .4]] -> i2t R@1 100, t2i R@1 66.7 (caption 1 prefers the second).
    Raises ValueError for NaN, shapes that do not fit, or a picture without caption.
    """
    similarity = as_matrix(similarity)
    images, captions = torch.arange(similarity.shape[0]), torch.as_tensor(image_of_caption)
    recalls = []
    for way in ((similarity, images, captions), (similarity.T, captions, images)):
        above, tied, _, own_tied = (count[:, -1] for count in count_ties(*way))
        recalls += [100 * expected_hits(above, tied, own_tied, k).mean().item() for k in (1, 5, 10)]
    return {**dict(zip(RECALLS, recalls)), "mR": sum(recalls) / 6}


def reid_metrics(similarity, query_ids, gallery_ids):
    """Metrics of re-identification in percent, means over queries, ties at their expected value.

    similarity (Q, G): captions x pictures, a matrix or a Product; ids (Q,) and (G,). An item of the query's id is
    relevant. Returns {"R1", "R5", "R10", "mAP", "mINP"}: with relevant items at ranks r_1 < ... < r_P, Rank-k is
    [r_1 <= k], AP the mean of j / r_j (Market-1501), INP is P / r_P (arXiv 2001.04193). No camera filter.
    Raises ValueError for NaN, shapes that do not fit, or a query without an item of its id.
    """
    counts = count_ties(as_matrix(similarity), torch.as_tensor(query_ids), torch.as_tensor(gallery_ids))
    above, tied, _, own_tied = (count[:, -1] for count in counts)
    metrics = {f"R{k}": expected_hits(above, tied, own_tied, k) for k in (1, 5, 10)}
    metrics["mAP"] = expected_precision(*counts)
    owned = (counts[1] > 0).sum(dim=1)                                        # P of each query
    above, tied, _, own_tied = (count.gather(1, count.shape[1] - owned[:, None])[:, 0] for count in counts)
    metrics["mINP"] = owned * expected_penalty(above, tied, own_tied)
    return {name: 100 * value.mean().item() for name, value in metrics.items()}


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

@torch.no_grad()
def encode_images(model, images, batch_size=128):
    """uint8 (N, 3, H, W) array -> unit features (N, D), float32 on the CPU."""
    device = model.logit_scale.device
    features = []
    for i in tqdm(range(0, len(images), batch_size), "encoding pictures", leave=False, disable=None):
        batch = torch.from_numpy(np.array(images[i:i + batch_size])).to(device)
        features.append(model.encode_image(clip.normalize(batch)).float().cpu())
    return torch.cat(features)


@torch.no_grad()
def encode_texts(model, tokens, batch_size=256):
    """Token ids (M, L) -> unit features (M, D), float32 on the CPU. Each distinct caption is encoded once."""
    device = model.logit_scale.device
    distinct, place = tokens.unique(dim=0, return_inverse=True)
    by_length = distinct.count_nonzero(dim=1).argsort(stable=True)            # short with short: less padding
    features = torch.empty(len(distinct), model.config.embed_dim)
    for rows in tqdm(by_length.split(batch_size), "encoding captions", leave=False, disable=None):
        features[rows] = model.encode_text(distinct[rows].to(device)).float().cpu()
    return features[place]


def evaluate(model, tokenizer, pairs, images, precision="fp32"):
    """Metrics of one model on one split: pairs from a reader of data.py, images its uint8 array (N, 3, H, W)."""
    model.eval()
    tokens = tokenizer(pairs.captions, model.config.context_length)
    with torch.autocast(model.logit_scale.device.type, torch.bfloat16, enabled=precision == "bf16"):
        image_features, text_features = encode_images(model, images), encode_texts(model, tokens)
    return split_metrics(Product(image_features, text_features), pairs)


# ---------------------------------------------------------------------------------------------- runs

def fingerprint(model):
    """16 hex digits that tell one set of CLIP weights from another: a method fits the CLIP it was trained on only."""
    digest = hashlib.sha256()
    for name, value in sorted(model.openai_state_dict().items()):
        digest.update(name.encode() + value.detach().float().flatten()[:1024].cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def load_checkpoint(path):
    """The dict of a checkpoint of ours; path is the file, or a run's folder, whose best.pt is meant."""
    path = Path(path) / "best.pt" if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; a run of train.py leaves a folder with best.pt")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:      # torch raises half a dozen kinds for a damaged or foreign file
        raise ValueError(f"{path} is no checkpoint of train.py, or damaged: {str(error).splitlines()[0]}") from None
    if not isinstance(checkpoint, dict) or "settings" not in checkpoint:
        raise ValueError(f"{path} is not a checkpoint of train.py: it has no settings in it")
    return checkpoint


def load_run(path, device="cpu"):
    """Model with its method and tokenizer as a run of train.py left them -> (model, tokenizer, settings)."""
    checkpoint = load_checkpoint(path)
    settings = checkpoint["settings"]
    source = path if "state_dict" in checkpoint else settings["model"]
    model = clip.load_clip(source, settings["image_size"], activation=settings["activation"])
    if "state_dict" not in checkpoint and fingerprint(model) != checkpoint["fingerprint"]:
        raise ValueError(f"{path} was trained on other weights than those now in {settings['model']}")
    if checkpoint["trained"]:
        adapters.add_method(model, settings["method"], **settings["sizes"])
        adapters.load_trainable(model, checkpoint["trained"])
    return model.to(device).eval(), clip.Tokenizer(merges=checkpoint["merges"]), settings


# ---------------------------------------------------------------------------------------------- what is printed

def label(settings):
    """What a run is called in a table: what was trained, and by which loss."""
    what = {"method": settings["method"], "backbone": "full fine-tuning", "all": "from scratch"}[settings["train"]]
    if settings["train"] != "method" and settings["method"] != "none":
        what += f" with {settings['method']}"
    return f"{what}, {settings['loss']}{', same masked' * settings['mask_same']}"


def markdown(rows):
    """Markdown table of rows of strings, the first being the head; the columns line up in a terminal too."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [[cell.rjust(width) if n else cell.ljust(width) for n, (cell, width) in enumerate(zip(row, widths))]
             for row in rows]
    lines = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([lines[0], "|:--" + "|--:" * (len(widths) - 1) + "|", *lines[1:]])


def table(rows):
    """Markdown table of results. rows: (label, trained parameters or None, share in percent, metrics)."""
    columns = COLUMNS[headline(rows[0][3])[0]]
    lines = [["", "trained", "share", *columns.values()]]
    for name, trained, share, metrics in rows:
        size = ["", ""] if trained is None else [f"{trained:,}".replace(",", " "), f"{share:.2f} %"]
        lines.append([name, *size, *(f"{metrics[column]:.2f}" for column in columns)])
    return markdown(lines)


def summarize(folders):
    """Markdown table over finished runs: those that differ in their seed alone are one row, mR as mean +- std."""
    groups = {}
    for folder in folders:
        path = Path(folder) / "metrics.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there: {folder} is no finished run of train.py")
        run = json.loads(path.read_text())
        same = {k: v for k, v in run["settings"].items() if k not in ("seed", "out", "resume", "cache")}
        groups.setdefault(json.dumps(same, sort_keys=True), []).append(run)
    columns = COLUMNS[headline(next(iter(groups.values()))[0]["rows"][-1][3])[0]]
    lines = [["", "trained", "share", *columns.values(), "seeds", "minutes", "GB"]]
    for runs in groups.values():
        _, trained, share, metrics = runs[0]["rows"][-1]
        values = {name: np.array([run["rows"][-1][3][name] for run in runs]) for name in columns}
        cells = {name: f"{value.mean():.2f}" for name, value in values.items()}
        if len(runs) > 1:
            name, _ = headline(metrics)
            cells[name] += f" ± {values[name].std(ddof=1):.2f}"
        lines.append([label(runs[0]["settings"]), f"{trained:,}".replace(",", " "), f"{share:.2f} %", *cells.values(),
                      str(len(runs)), f"{np.mean([run['minutes'] for run in runs]):.1f}",
                      f"{max(run['memory_gb'] for run in runs):.1f}"])
    return markdown(lines)


def plot_curve(history, path, size=(720, 360)):
    """Training curve as a PNG: loss and validation mR over epochs, each on its own axis.

    history: dicts with epoch, loss and val_mR. Drawn at twice the size and reduced, for smooth lines.
    """
    W, H = 2 * size[0], 2 * size[1]
    image = Image.new("RGB", (W, H), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(26)
    left, right, top, bottom = 130, W - 130, 70, H - 90
    last = max(row["epoch"] for row in history)
    for y in (bottom - (bottom - top) * n / 4 for n in range(5)):
        draw.line([(left, y), (right, y)], fill="#e4e4e4", width=2)
    for key, label, colour, anchor, edge in (("loss", "loss", "#c0392b", "rm", left - 12),
                                             ("val_mR", "validation mR", "#1f5fa8", "lm", right + 12)):
        values = [(row["epoch"], row[key]) for row in history if row.get(key) is not None]
        low, high = min(0.0, *(v for _, v in values)), max(v for _, v in values) or 1.0
        points = [(left + (right - left) * e / max(last, 1), bottom - (bottom - top) * (v - low) / (high - low))
                  for e, v in values]
        for n in range(5):
            y, value = bottom - (bottom - top) * n / 4, low + (high - low) * n / 4
            draw.text((edge, y), f"{value:.3g}", colour, font, anchor=anchor)
        draw.line(points, fill=colour, width=5, joint="curve")
        for x, y in points:
            draw.ellipse([x - 6, y - 6, x + 6, y + 6], fill=colour)
        draw.text((left if anchor == "rm" else right, 36), label, colour, font, anchor="lm" if anchor == "rm" else "rm")
    for n in range(6):
        x = left + (right - left) * n / 5
        draw.text((x, bottom + 30), f"{last * n / 5:.3g}", "#444444", font, anchor="mm")
    draw.text(((left + right) / 2, H - 24), "epoch", "#444444", font, anchor="mm")
    image.resize(size, Image.LANCZOS).save(path)


def main():
    """Test one run or plain CLIP, or print a table of runs."""
    parser = argparse.ArgumentParser(description="Test of a run, or of plain CLIP.")
    parser.add_argument("run", nargs="?",
                        help="folder of a run; or plain CLIP: a name such as ViT-B/32, or a weight file")
    parser.add_argument("--table", nargs="+", metavar="RUN", help="print one table of these finished runs instead")
    parser.add_argument("--dataset", choices=data.DATASETS, help="default: the run's own")
    parser.add_argument("--data-root", help="folder of the data set; default: the run's own")
    parser.add_argument("--split", default="test", choices=("train", "val", "test"), help="default: test")
    parser.add_argument("--cache", default="runs/cache", help="folder of decoded pictures")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if (args.run is None) == (args.table is None):
        parser.error("give one run to test, or --table with finished runs")
    try:
        if args.table:
            print(summarize(args.table))
            return
        if (Path(args.run) / "best.pt").is_file() or args.run.endswith("best.pt"):
            model, tokenizer, settings = load_run(args.run, args.device)
            name, trained = label(settings), settings["trained_parameters"]
        else:
            model, tokenizer = clip.load_clip(args.run, device=args.device), clip.Tokenizer(args.run)
            settings, name, trained = {"precision": "fp32"}, "zero-shot", 0
        dataset = args.dataset or settings.get("dataset")
        if dataset is None:
            raise ValueError(f"{args.run} is no run of train.py, so --dataset must say what to test on: "
                             f"{', '.join(data.DATASETS)}")
        root = args.data_root or (settings["data_root"] if dataset == settings.get("dataset") else None)
        pairs = data.read(dataset, root, args.split)
        images = data.load_images(pairs.images, model.config.image_size, args.cache)
        start = time.time()
        metrics = evaluate(model, tokenizer, pairs, images, settings["precision"])
    except (ValueError, OSError) as error:
        print(f"eval.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{dataset} {args.split}: {len(pairs.images)} pictures, {len(pairs.captions)} captions, encoded in "
          f"{time.time() - start:.1f} s")
    share = 100 * trained / sum(p.numel() for p in model.parameters())
    print(table([("chance", None, None, chance(pairs)), (name, trained, share, metrics)]))


if __name__ == "__main__":
    main()
