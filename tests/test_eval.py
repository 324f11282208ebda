"""eval.py: metrics against literal examples, a brute-force expectation over tie orders, and closed forms; tables of
hand-made runs against literal numbers; search, pictures and faulty files with a tiny CLIP."""
import itertools
import json
import math
import os
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

import adapters
import clip
import data
import eval


def recalls_by_permutation(similarity, image_of_caption, ks=(1, 5, 10)):
    """Expected recalls, the slow way: each row is ranked in every order of its tied items."""
    def expected_hit(scores, own, k):
        hits, orders = 0, 0
        for order in itertools.permutations(range(len(scores))):
            ranked = sorted(order, key=lambda j: -scores[j])        # stable: ties stay in this permutation's order
            hits += any(own[j] for j in ranked[:k])
            orders += 1
        return hits / orders
    N, M = len(similarity), len(similarity[0])
    i2t = [[expected_hit(similarity[n], [image_of_caption[m] == n for m in range(M)], k) for n in range(N)] for k in ks]
    t2i = [[expected_hit([similarity[n][m] for n in range(N)], [image_of_caption[m] == n for n in range(N)], k)
            for m in range(M)] for k in ks]
    return [100 * sum(row) / len(row) for row in i2t + t2i]


def test_the_example_of_the_docstring():
    metrics = eval.retrieval_metrics([[.9, .1, .3], [.2, .3, .4]], [0, 0, 1])
    assert metrics["i2t_R@1"] == 100
    assert metrics["t2i_R@1"] == pytest.approx(200 / 3)
    assert metrics["mR"] == pytest.approx((100 * 5 + 200 / 3) / 6)


@pytest.mark.parametrize("seed", range(6))
def test_ties_count_as_their_expected_value(seed):
    rng = random.Random(seed)
    similarity = [[rng.choice([0.1, 0.2, 0.3]) for _ in range(6)] for _ in range(3)]
    image_of_caption = [0, 0, 1, 1, 2, 2]
    metrics = eval.retrieval_metrics(similarity, image_of_caption)
    expected = recalls_by_permutation(similarity, image_of_caption)
    assert [metrics[name] for name in eval.RECALLS] == pytest.approx(expected)


def test_a_collapsed_model_scores_chance():
    N, captions = 40, 5
    metrics = eval.retrieval_metrics(torch.ones(N, N * captions), torch.arange(N).repeat_interleave(captions))
    for k in (1, 5, 10):
        assert metrics[f"t2i_R@{k}"] == pytest.approx(100 * k / N)
        no_hit = math.comb(N * captions - captions, k) / math.comb(N * captions, k)
        assert metrics[f"i2t_R@{k}"] == pytest.approx(100 * (1 - no_hit))


def test_recalls_without_ties_are_those_of_sorting():
    similarity = torch.rand(30, 150, generator=torch.Generator().manual_seed(0))
    image_of_caption = torch.arange(150) % 30
    metrics = eval.retrieval_metrics(similarity, image_of_caption)
    for k in (1, 5, 10):
        i2t = sum(bool((image_of_caption[row.argsort(descending=True)[:k]] == n).any())
                  for n, row in enumerate(similarity))
        t2i = sum(int(image_of_caption[m]) in column.argsort(descending=True)[:k].tolist()
                  for m, column in enumerate(similarity.T))
        assert (metrics[f"i2t_R@{k}"], metrics[f"t2i_R@{k}"]) == pytest.approx((100 * i2t / 30, 100 * t2i / 150))


def test_the_order_of_the_gallery_does_not_matter():
    similarity = (torch.rand(20, 60, generator=torch.Generator().manual_seed(1)) * 5).round()
    image_of_caption, order = torch.arange(60) % 20, torch.randperm(60, generator=torch.Generator().manual_seed(2))
    assert eval.retrieval_metrics(similarity[:, order], image_of_caption[order]) == pytest.approx(
        eval.retrieval_metrics(similarity, image_of_caption))


def test_chunks_do_not_change_the_result():
    similarity = (torch.rand(50, 50, generator=torch.Generator().manual_seed(3)) * 9).round()
    ids = torch.arange(50) % 20
    whole, chunks = eval.count_ties(similarity, ids, ids), eval.count_ties(similarity, ids, ids, size=7 * 50)
    assert all(torch.equal(a, b) for a, b in zip(whole, chunks))


def test_nan_is_an_error():
    with pytest.raises(ValueError, match="NaN"):
        eval.retrieval_metrics([[float("nan"), 0.1], [0.2, 0.3]], [0, 1])


def test_nan_in_features_is_an_error():
    with pytest.raises(ValueError, match="NaN"):
        eval.retrieval_metrics(eval.Product(torch.ones(2, 2), torch.tensor([[1, float("nan")], [1, 0]])), [0, 1])


def test_a_picture_without_caption_is_an_error():
    with pytest.raises(ValueError, match="query 1"):
        eval.retrieval_metrics([[0.3, 0.1], [0.2, 0.3]], [0, 0])


def test_shapes_that_do_not_fit_are_an_error():
    with pytest.raises(ValueError, match="does not fit"):
        eval.retrieval_metrics([[0.3, 0.1], [0.2, 0.3]], [0, 1, 1])


# ---------------------------------------------------------------- re-identification

# three captions, five pictures; the relevant ones are at ranks (1, 3), (2, 5) and 2
EXAMPLE = ([[.9, .8, .7, .6, .5], [.1, .9, .2, .8, .3], [.5, .4, .3, .2, .1]], [1, 1, 2], [1, 2, 1, 2, 3])


def reid_by_permutation(scores, own):
    """Expected R1, R5, R10, AP, INP of one query, the slow way: ranked in every order of the tied items."""
    values = []
    for order in itertools.permutations(range(len(scores))):
        ranked = [own[j] for j in sorted(order, key=lambda j: -scores[j])]
        ranks = [r for r, relevant in enumerate(ranked, 1) if relevant]
        values.append([ranks[0] <= k for k in (1, 5, 10)]
                      + [sum(j / r for j, r in enumerate(ranks, 1)) / len(ranks), len(ranks) / ranks[-1]])
    return [100 * sum(column) / len(values) for column in zip(*values)]


def test_the_worked_example_of_re_identification():
    metrics = eval.reid_metrics(*EXAMPLE)
    assert metrics == pytest.approx({"R1": 100 / 3, "R5": 100, "R10": 100, "mAP": 55.277778, "mINP": 52.222222})


@pytest.mark.parametrize("seed", range(8))
def test_ties_in_re_identification_count_as_their_expected_value(seed):
    rng = random.Random(seed)
    gallery_ids = [0, 1, 1, 2, 2, 2, rng.choice([0, 1, 2])]
    query_ids = [0, 1, 2]
    similarity = [[rng.choice([0.1, 0.2, 0.3]) for _ in gallery_ids] for _ in query_ids]
    rows = [reid_by_permutation(row, [g == q for g in gallery_ids]) for row, q in zip(similarity, query_ids)]
    expected = [sum(column) / 3 for column in zip(*rows)]
    assert list(eval.reid_metrics(similarity, query_ids, gallery_ids).values()) == pytest.approx(expected)


def test_re_identification_without_ties_is_a_double_loop():
    generator = torch.Generator().manual_seed(4)
    similarity, gallery_ids = torch.rand(40, 90, generator=generator), torch.randint(0, 12, (90,), generator=generator)
    query_ids = gallery_ids[:40]
    sums = dict.fromkeys(("R1", "R5", "R10", "mAP", "mINP"), 0.0)
    for row, q in zip(similarity.tolist(), query_ids.tolist()):
        ranked = sorted(range(90), key=lambda j: -row[j])
        found, precision = 0, 0.0
        for r, j in enumerate(ranked, 1):
            if gallery_ids[j] == q:
                found, last, precision = found + 1, r, precision + (found + 1) / r
                if found == 1:
                    for k in (1, 5, 10):
                        sums[f"R{k}"] += r <= k
        sums["mAP"] += precision / found
        sums["mINP"] += found / last
    expected = {name: 100 * value / 40 for name, value in sums.items()}
    assert eval.reid_metrics(similarity, query_ids, gallery_ids) == pytest.approx(expected)


def test_a_caption_without_a_picture_of_its_person_is_an_error():
    with pytest.raises(ValueError, match=r"query 1 \(id 7\) has no match"):
        eval.reid_metrics([[0.3, 0.1], [0.2, 0.3]], [0, 7], [0, 1])


def test_the_order_of_the_gallery_does_not_matter_for_re_identification():
    generator = torch.Generator().manual_seed(5)
    similarity = (torch.rand(10, 30, generator=generator) * 5).round()
    gallery_ids, order = torch.arange(30) % 6, torch.randperm(30, generator=generator)
    assert eval.reid_metrics(similarity[:, order], torch.arange(10) % 6, gallery_ids[order]) == pytest.approx(
        eval.reid_metrics(similarity, torch.arange(10) % 6, gallery_ids))


def test_a_collapsed_model_scores_chance_in_re_identification():
    pairs = data.Pairs(["a", "b", "c", "d", "e"], ["text"] * 3, [0, 1, 4], ids=[7, 7, 8, 9, 7])
    expected = reid_by_permutation([0.0] * 5, [True, True, False, False, True])
    assert list(eval.chance(pairs).values()) == pytest.approx(expected)


def test_chance_of_a_split_without_ids_is_that_of_recalls():
    pairs = data.Pairs(["a", "b", "c", "d"], ["text"] * 8, [0, 0, 1, 1, 2, 2, 3, 3])
    metrics = eval.chance(pairs)
    assert (metrics["t2i_R@1"], metrics["t2i_R@5"]) == pytest.approx((25, 100))
    assert metrics["i2t_R@1"] == pytest.approx(25)


# ---------------------------------------------------------------- features

def test_a_product_of_features_scores_as_the_matrix():
    generator = torch.Generator().manual_seed(6)
    queries, gallery = torch.randn(20, 8, generator=generator), torch.randn(30, 8, generator=generator)
    ids, gallery_ids = torch.arange(20) % 10, torch.arange(30) % 10
    assert eval.reid_metrics(eval.Product(queries, gallery), ids, gallery_ids) == pytest.approx(
        eval.reid_metrics(queries @ gallery.T, ids, gallery_ids))
    captions = torch.arange(30) % 20
    assert eval.retrieval_metrics(eval.Product(queries, gallery), captions) == pytest.approx(
        eval.retrieval_metrics(queries @ gallery.T, captions))


@pytest.mark.parametrize("width", [100, 128, 512])
def test_equal_features_tie_to_the_bit(width):
    generator = torch.Generator().manual_seed(7)
    for queries, gallery in itertools.product((1, 2, 3, 7), (7, 15, 31, 63)):       # where a plain product does not
        one = torch.randn(1, width, generator=generator).expand(gallery, width).contiguous()
        scores = eval.Product(torch.randn(queries, width, generator=generator), one)[torch.arange(queries)]
        assert bool((scores == scores[:, :1]).all())


def test_the_matrix_of_a_product_is_never_whole(monkeypatch):
    asked, rows_of = [], eval.Product.__getitem__
    monkeypatch.setattr(eval.Product, "__getitem__", lambda self, rows: asked.append(rows) or rows_of(self, rows))
    ids = torch.arange(100)
    eval.count_ties(eval.Product(torch.randn(100, 4), torch.randn(100, 4)), ids, ids, size=1000)
    assert asked == [slice(n, n + 10) for n in range(0, 100, 10)]


class Stub:
    """A model whose picture feature is its first two pixels, whose text feature is two token ids."""
    logit_scale = torch.zeros(())
    config = type("Config", (), {"context_length": 4, "image_size": 2})

    def __init__(self):
        self.seen = []

    def eval(self):
        return self

    def encode_image(self, images):
        return images[:, 0, 0, :2] - clip.normalize(torch.zeros(1, 3, 2, 2, dtype=torch.uint8))[:, 0, 0, :2]

    def encode_text(self, tokens):
        self.seen += tokens.tolist()
        return tokens[:, :2].float()


def test_each_distinct_caption_is_encoded_once():
    model, tokens = Stub(), torch.tensor([[1, 5, 9], [1, 9, 0], [1, 5, 9], [2, 9, 0]])
    assert eval.encode_texts(model, tokens).tolist() == [[1, 5], [1, 9], [1, 5], [2, 9]]
    assert len(model.seen) == 3


@pytest.mark.parametrize("ids", [None, [4, 4]])
def test_evaluate_gives_the_metrics_of_its_kind_of_data(ids):
    images = np.zeros((2, 3, 2, 2), np.uint8)
    images[0, 0, 0], images[1, 0, 0] = (200, 0), (0, 200)       # the first picture is like "x", the second like "y"

    def tokenizer(captions, length):
        return torch.tensor([{"x": [9, 1, 0, 0], "y": [1, 9, 0, 0]}[caption] for caption in captions])
    metrics = eval.evaluate(Stub(), tokenizer, data.Pairs(["a", "b"], ["y", "x", "x"], [0, 1, 0], ids), images)
    if ids:
        assert metrics == {"R1": 100, "R5": 100, "R10": 100, "mAP": 100, "mINP": 100}
    else:       # a ranks both x first, one of them its own; b ranks y first, not its own; both x rank a first
        assert (metrics["i2t_R@1"], metrics["t2i_R@1"]) == pytest.approx((25, 100 / 3))


def test_the_headline_figure():
    assert eval.headline({"mR": 3.0, "i2t_R@1": 5.0}) == ("mR", 3.0)
    assert eval.headline({"R1": 4.0, "mAP": 5.0}) == ("R1", 4.0)


# ---------------------------------------------------------------- tables

def recalls(*values):
    return dict(zip([*eval.RECALLS, "mR"], values))


def write_run(folder, mR, **changes):
    """A finished run's metrics.json with given figures; changes are of its settings, or minutes and memory_gb."""
    settings = {"dataset": "ucm", "data_root": "x/ucm_precomp", "model": "ViT-B/32", "image_size": 224,
                "activation": "quick_gelu",
                "method": "mrs", "train": "method", "loss": "hmmc", "mask_same": False, "lr": 0.0002, "seed": 0,
                "out": str(folder), "sizes": {"bottleneck": 64}, **changes}
    run = {"minutes": settings.pop("minutes", 1.0), "memory_gb": settings.pop("memory_gb", 1.0), "split": "test",
           "settings": settings}
    run["rows"] = [["chance", None, None, recalls(1, 2, 3, 4, 5, 6, 2.5)],
                   ["zero-shot", 0, 0.0, recalls(7, 8, 9, 10, 11, 12, 20.0)],
                   [eval.label(settings), 161088, 0.1065, recalls(20, 30, 40, 50, 60, 70, mR)]]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(run))
    return folder


def summary(*folders):
    """The one table of runs, a dict of cells for each row; its label has the key ""."""
    (runs,) = eval.read_runs(folders).values()
    text = eval.summarize(eval.average(runs), runs[0]["settings"]["dataset"])
    head, _, *lines = ([cell.strip() for cell in line[1:-1].split("|")] for line in text.splitlines())
    return [dict(zip(head, line)) for line in lines]


def test_a_table_of_recalls():
    assert eval.table([("chance", None, None, recalls(1, 2, 3, 4, 5, 6, 3.5)),
                       ("mrs, hmmc", 161088, 0.10649, recalls(10, 20, 30, 40, 50, 60.126, 35.5))]) == """\
|           | trained |  share | i2t R@1 |   R@5 |  R@10 | t2i R@1 |   R@5 |  R@10 |    mR |
|:--|--:|--:|--:|--:|--:|--:|--:|--:|--:|
| chance    |         |        |    1.00 |  2.00 |  3.00 |    4.00 |  5.00 |  6.00 |  3.50 |
| mrs, hmmc | 161 088 | 0.11 % |   10.00 | 20.00 | 30.00 |   40.00 | 50.00 | 60.13 | 35.50 |"""


def test_a_table_of_re_identification():
    assert eval.table([("prompts, sdm", 61440, 0.041, {"R1": 1, "R5": 2, "R10": 3, "mAP": 4, "mINP": 5})]) == """\
|              | trained |  share |   R1 |   R5 |  R10 |  mAP | mINP |
|:--|--:|--:|--:|--:|--:|--:|--:|
| prompts, sdm |  61 440 | 0.04 % | 1.00 | 2.00 | 3.00 | 4.00 | 5.00 |"""


def test_runs_that_differ_by_seed_are_one_row_with_mean_and_spread(tmp_path):
    rows = summary(*(write_run(tmp_path / str(seed), mR, seed=seed) for seed, mR in enumerate((50.0, 52.0, 57.0))))
    assert [row[""] for row in rows] == ["chance", "zero-shot", "mrs, hmmc"]
    assert (rows[2]["mR"], rows[2]["seeds"]) == ("53.00 ± 3.61", "3")       # of 2 degrees of freedom; 2.94 of 3


def test_one_seed_run_twice_counts_once(tmp_path):
    rows = summary(*(write_run(tmp_path / str(n), mR) for n, mR in enumerate((50.0, 52.0))))
    assert (rows[2]["mR"], rows[2]["seeds"]) == ("52.00", "1")


def test_a_run_from_another_and_one_from_the_start_are_two_experiments(tmp_path):
    rows = summary(write_run(tmp_path / "a", 40.0, init=None, seed=0), write_run(tmp_path / "b", 50.0, init="x", seed=1),
                   write_run(tmp_path / "c", 52.0, init="y", seed=2))
    assert [(row[""], row["seeds"]) for row in rows[2:]] == [("mrs, hmmc, init False", "1"), ("mrs, hmmc, init True", "2")]


def test_one_run_has_no_spread(tmp_path):
    assert summary(write_run(tmp_path, 50.0))[2]["mR"] == "50.00"


def test_minutes_are_the_mean_and_memory_is_the_most(tmp_path):
    row = summary(write_run(tmp_path / "a", 30.0, seed=0, minutes=2.0, memory_gb=3.0),
                  write_run(tmp_path / "b", 30.0, seed=1, minutes=4.0, memory_gb=1.0))[2]
    assert (row["minutes"], row["GB"]) == ("3.0", "3.0")


def test_runs_of_other_settings_are_rows_of_their_own_that_say_what_differs(tmp_path):
    rows = summary(write_run(tmp_path / "a", 40.0), write_run(tmp_path / "b", 45.0, lr=0.001))
    assert [(row[""], row["mR"]) for row in rows[2:]] == [("mrs, hmmc, lr 0.0002", "40.00"),
                                                          ("mrs, hmmc, lr 0.001", "45.00")]


def test_the_folder_and_the_device_make_no_other_experiment(tmp_path):
    rows = summary(write_run(tmp_path / "a", 1.0, device="cpu", init="stage1-0"),
                   write_run(tmp_path / "b", 2.0, seed=1, device="cuda", init="stage1-1"))
    assert len(rows) == 3


def test_a_masked_loss_has_no_published_figure(tmp_path):
    rows = summary(write_run(tmp_path / "a", 40.0), write_run(tmp_path / "b", 45.0, mask_same=True))
    assert [row["published mR, ViT-B/32"] for row in rows[2:]] == ["55.71", ""]


def test_each_clip_has_its_zero_shot_row(tmp_path):
    rows = summary(write_run(tmp_path / "a", 30.0), write_run(tmp_path / "b", 31.0, model="ViT-L/14"))
    assert [row[""] for row in rows[1:3]] == ["zero-shot, model ViT-B/32", "zero-shot, model ViT-L/14"]
    rows = summary(tmp_path / "a", write_run(tmp_path / "b", 31.0, image_size=336))
    assert [row[""] for row in rows[1:3]] == ["zero-shot, image_size 224", "zero-shot, image_size 336"]
    rows = summary(tmp_path / "a", write_run(tmp_path / "b", 31.0, activation="gelu"))
    assert {row[""] for row in rows[1:3]} == {"zero-shot, activation quick_gelu", "zero-shot, activation gelu"}


def test_rows_are_sorted_by_the_headline_figure_below_chance(tmp_path):
    rows = summary(write_run(tmp_path / "a", 50.0), write_run(tmp_path / "b", 1.0, method="coop"),
                   write_run(tmp_path / "c", 30.0, method="vpt"))
    assert [row[""] for row in rows] == ["chance", "coop, hmmc", "zero-shot", "vpt, hmmc", "mrs, hmmc"]


@pytest.mark.parametrize("dataset, figures", [("rsicd", ["15.04", "24.84", "31.12", "30.39"]),
                                              ("rsitmd", ["23.89", "32.37", "44.47", "45.33"]),
                                              ("ucm", ["33.08", "52.74", "55.71", "52.43"])])
def test_published_figures_stand_beside_the_methods_of_the_paper(tmp_path, dataset, figures):
    rows = summary(write_run(tmp_path / "a", 30.0, dataset=dataset, method="adapter", loss="contrastive"),
                   write_run(tmp_path / "b", 40.0, dataset=dataset),
                   write_run(tmp_path / "c", 50.0, dataset=dataset, method="none", train="backbone"),
                   write_run(tmp_path / "d", 60.0, dataset=dataset, method="lora"),
                   write_run(tmp_path / "e", 70.0, dataset=dataset, method="prompts", train="backbone"),
                   write_run(tmp_path / "f", 80.0, dataset=dataset, loss="hmmc-softmax"))
    assert list(rows[0])[-1] == "published mR, ViT-B/32"
    assert [row["published mR, ViT-B/32"] for row in rows] == ["", *figures, "", "", ""]


def test_other_data_have_no_published_figures(tmp_path):
    assert list(summary(write_run(tmp_path, 30.0, dataset="toy-aerial"))[0])[-1] == "GB"


def test_folders_that_are_no_finished_runs_are_left_out_and_named(tmp_path, capsys):
    (tmp_path / "cache").mkdir()
    (tmp_path / "half").mkdir()
    (tmp_path / "half/metrics.json").write_text("{")
    found = eval.read_runs([tmp_path / "cache", write_run(tmp_path / "run", 1.0), tmp_path / "half"])
    assert [len(runs) for runs in found.values()] == [1]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "cache" in lines[0] and "half" in lines[1]


def test_no_finished_run_at_all_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no finished run"):
        eval.read_runs([tmp_path])


def test_each_data_set_has_its_table_and_its_picture(tmp_path, capsys):
    runs = [write_run(tmp_path / name, 30.0, dataset=name, data_root=None) for name in ("ucm", "rsicd")]
    eval.main(["--table", *map(str, runs), "--out", str(tmp_path / "new/t.png")])
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if line.startswith("#")] == ["### ucm test", "### rsicd test"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["t-rsicd-test.png", "t-ucm-test.png"]


# ---------------------------------------------------------------- pictures

def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def is_colour(image, colour):
    """Where a picture (H, W, 3) is about one of eval's colours."""
    return abs(image - [int(colour[i:i + 2], 16) for i in (1, 3, 5)]).max(axis=2) < 40


def test_the_table_picture_has_its_lines_and_points_at_their_height(tmp_path):
    runs = [write_run(tmp_path / str(seed), mR, seed=seed) for seed, mR in enumerate((40.0, 44.0))]
    (runs,) = eval.read_runs(runs).values()
    eval.plot_table(eval.average(runs), tmp_path / "t.png", "title")
    image = pixels(tmp_path / "t.png")          # 900 x 540; the axis, 40 to 485 from the top, is 20 to 45 here
    assert image.shape == (540, 900, 3) and (image[0, 0] == 255).all()
    red = np.flatnonzero(is_colour(image, eval.RED)[:, 400:800].mean(axis=1) > 0.9)
    assert abs(red - 485).max() <= 1            # zero-shot, 20.0
    rows, _ = np.nonzero(is_colour(image, eval.BLUE))
    middle, spread = 485 - 445 * (42 - 20) / 25, 445 * 8 ** 0.5 / 25
    assert abs(rows.min() - (middle - spread)) <= 2 and abs(rows.max() - (middle + spread)) <= 2


def test_no_label_leaves_the_picture(tmp_path):
    results = [eval.Result(f"method {n} of a long name, hmmc", 10_100 + n, 1.0, {"mR": 20 + n / 10}, None, [])
               for n in range(9)]
    eval.plot_table(results, tmp_path / "t.png", "title")
    image = pixels(tmp_path / "t.png")
    assert all((edge == 255).all() for edge in (image[:, :8], image[:, -8:], image[:8], image[-4:]))


def test_no_labels_overlap():
    draw, font, taken = ImageDraw.Draw(Image.new("RGB", (1800, 1000))), ImageFont.load_default(26), []
    for n in range(18):
        taken.append(eval.free_box(draw, font, f"method {n}", 900 + n, 500, taken))
    for a, b in itertools.combinations(taken, 2):
        assert a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1]


@pytest.mark.parametrize("name", ["mR", "R1"])
def test_the_curve_of_either_headline_figure_peaks_where_it_does(tmp_path, name):
    values = [10.0, 40.0, 20.0, 0.0]
    history = [{"epoch": n, "loss": 1.0, f"val_{name}": value, "val_other": 99.0} for n, value in enumerate(values, 1)]
    eval.plot_curve(history, tmp_path / "curve.png")
    rows, columns = np.nonzero(is_colour(pixels(tmp_path / "curve.png"), eval.BLUE)[40:])
    peak = columns[rows == rows.min()]
    assert abs(peak.mean() - (65 + 590 * 2 / 4)) < 3       # 720 wide, the axis from 65 to 655 is epoch 0 to 4


def test_the_curve_of_one_epoch_is_a_point(tmp_path):
    eval.plot_curve([{"epoch": 1, "loss": 0.0, "val_mR": 12.0}], tmp_path / "curve.png")
    image = pixels(tmp_path / "curve.png")
    rows, columns = np.nonzero(is_colour(image, eval.BLUE)[40:])
    assert abs(columns.mean() - 655) < 1 and abs(40 + rows.mean() - (305 - 265 * 12 / 20)) < 1      # at the right
    assert is_colour(image, eval.RED)[300:310, 650:660].any()      # a loss of 0 is at the bottom


def test_an_axis_ends_at_a_short_number():
    values = (0.0, 0.3, 1.0, 3.83, 4.1, 8.5, 57.9, 100.0)
    assert [eval.round_up(value) for value in values] == pytest.approx([1, 0.4, 1, 4, 8, 10, 80, 100])


def test_a_sheet_frames_pictures_in_their_colour(tmp_path):
    Image.new("L", (40, 20), 128).save(tmp_path / "a.png")
    cells = [(tmp_path / "a.png", "1", eval.GREEN), (tmp_path / "a.png", "2", eval.RED)]
    eval.draw_sheet([("first", cells), ("second", cells * 3)], tmp_path / "sheet.png")
    image = pixels(tmp_path / "sheet.png")
    assert image.shape[0] == 2 * 56 + 3 * (176 + 40)    # the second row of six takes two lines
    assert is_colour(image, eval.GREEN)[54, 100] and is_colour(image, eval.RED)[54, 292]
    assert abs(image[56 + 88, 16 + 88] - 128).max() < 3 and (image[56 + 10, 16 + 88] == 255).all()      # padded


# ---------------------------------------------------------------- runs and faulty files

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a drawn data set, a tiny CLIP with random weights as if trained on it, and an adapter for that."""
    folder = tmp_path_factory.mktemp("world")
    data.write_world(folder / "aerial", data.draw_aerial, images=16, test=6, seed=5, size=40)
    torch.manual_seed(0)
    tokenizer = clip.Tokenizer.train(data.read("precomp", folder / "aerial", "train").captions, 100)
    model = clip.CLIP(clip.CLIPConfig(32, 32, 16, 128, 2, 32, tokenizer.vocab_size, 128, 2))
    settings = dict(dataset="precomp", data_root=str(folder / "aerial"), model="from scratch", image_size=32,
                    activation="quick_gelu", method="none", train="all", loss="contrastive", mask_same=False, sizes={},
                    precision="fp32", trained_parameters=1)
    shared = dict(merges=tokenizer.merges, activation="quick_gelu", fingerprint=eval.fingerprint(model), epoch=3)
    (folder / "clip").mkdir()
    saved = dict(shared, settings=settings, trained={}, state_dict=model.openai_state_dict())
    torch.save(saved, folder / "clip/best.pt")
    adapters.add_method(model, "mrs", bottleneck=8)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    settings = dict(settings, model=str(folder / "clip"), method="mrs", train="method", sizes={"bottleneck": 8})
    (folder / "mrs").mkdir()
    torch.save(dict(shared, settings=settings, trained=adapters.trainable_state(model)), folder / "mrs/best.pt")
    return folder


def test_a_run_loads_as_it_was_saved(world):
    plain, (model, tokenizer, settings) = clip.load_clip(world / "clip"), eval.load_run(world / "mrs")
    saved = torch.load(world / "mrs/best.pt", weights_only=True)
    assert settings == saved["settings"] | {"fingerprint": eval.fingerprint(plain), "epoch": 3}
    adapters.add_method(plain, "mrs", bottleneck=8)
    adapters.load_trainable(plain, saved["trained"])
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(model.encode_image(images), plain.eval().encode_image(images))
    assert tokenizer.merges == saved["merges"]


def test_the_fingerprint_tells_weights_and_methods_apart(world):
    prints = [eval.fingerprint(clip.load_clip(world / "clip")), eval.fingerprint(eval.load_run(world / "mrs")[0])]
    model = eval.load_run(world / "mrs")[0]
    with torch.no_grad():
        model.text.ln_final.bias[0] += 1e-3
    prints.append(eval.fingerprint(model))
    assert len(set(prints)) == 3


def faulty(world, tmp_path, fault):
    """A best.pt with one thing wrong with it."""
    path, saved = tmp_path / "best.pt", torch.load(world / "mrs/best.pt", weights_only=True)
    if fault == "truncated":
        path.write_bytes((world / "mrs/best.pt").read_bytes()[:-3000])
        return path
    if fault == "a CLIP":
        saved = clip.load_clip(world / "clip").state_dict()
    if fault == "another CLIP":
        saved["fingerprint"] = "0" * 16
    if fault == "last.pt":
        saved = {"settings": saved["settings"], "learned": {}}
    if fault == "another method":
        saved["settings"]["method"] = "perceptron"
    if fault == "code in it":
        saved["settings"]["run"] = print
    torch.save(saved, path)
    return path


@pytest.mark.parametrize("fault, words", [
    ("truncated", "cannot be loaded"), ("a CLIP", "no checkpoint of train.py"),
    ("another CLIP", "trained on other weights than those now in"), ("last.pt", "lacks trained, merges, fingerprint"),
    ("another method", "no method 'perceptron'"),
    ("code in it", "which weights do not need, and nothing was run")])
def test_a_faulty_run_is_one_line_that_names_the_fault(world, tmp_path, fault, words):
    with pytest.raises(ValueError) as error:
        eval.load_run(faulty(world, tmp_path, fault))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_missing_run_names_the_file():
    with pytest.raises(FileNotFoundError, match="nowhere/best.pt|nowhere is not there"):
        eval.load_run("nowhere")


# ---------------------------------------------------------------- search

@pytest.fixture
def gallery(tmp_path, world):
    """Six drawn pictures in two folders, one file that is no picture, one that only claims to be one."""
    folder = tmp_path / "gallery"
    (folder / "more").mkdir(parents=True)
    for n, path in enumerate(sorted((world / "aerial/images").iterdir())[:6]):
        shutil.copy(path, folder / ("more" if n % 2 else ".") / path.name)
    (folder / "notes.txt").write_text("no picture")
    (folder / "broken.JPG").write_bytes(b"no picture either")
    return folder


def test_pictures_are_found_at_any_depth(gallery):
    found = {os.path.relpath(path, gallery) for path in eval.find_pictures(gallery)}
    assert found == {"000001.png", "000003.png", "000005.png", "broken.JPG",
                     "more/000002.png", "more/000004.png", "more/000006.png"}


def test_a_folder_without_pictures_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no picture"):
        eval.find_pictures(tmp_path)


def encoded(model, gallery, file, monkeypatch, **options):
    """paths and features of encode_files, and how many pictures it encoded."""
    count, encode = [], eval.encode_images
    with monkeypatch.context() as patch:
        patch.setattr(eval, "encode_images", lambda model, images: count.append(len(images)) or encode(model, images))
        paths, features = eval.encode_files(model, eval.find_pictures(gallery), file, **options)
    return paths, features, sum(count)


def test_features_of_files_are_those_of_their_pictures(world, gallery, tmp_path, monkeypatch, capsys):
    model = clip.load_clip(world / "clip")
    paths, features, _ = encoded(model, gallery, tmp_path / "cache/f.pt", monkeypatch, chunk=4)
    assert len(paths) == len(features) == 6 and not any("broken" in path for path in paths)
    for path, feature in zip(paths, features):
        image = clip.normalize(clip.preprocess(Image.open(path), 32)[None])
        assert torch.allclose(feature, model.encode_image(image)[0], atol=1e-6)
    (line,) = capsys.readouterr().err.splitlines()
    assert "left out" in line and "broken.JPG: cannot identify" in line


def test_only_new_and_changed_pictures_are_encoded_again(world, gallery, tmp_path, monkeypatch):
    model, file = clip.load_clip(world / "clip"), tmp_path / "f.pt"
    first, features, count = encoded(model, gallery, file, monkeypatch)
    assert count == 6
    again, same, count = encoded(model, gallery, file, monkeypatch)
    assert count == 0 and again == first and torch.equal(same, features)
    (gallery / "000001.png").unlink()
    shutil.copy(gallery / "000003.png", gallery / "new.png")
    Image.new("RGB", (40, 40), "red").save(gallery / "000005.png")
    paths, features, count = encoded(model, gallery, file, monkeypatch)
    assert count == 2 and {os.path.basename(path) for path in paths} == {
        "000002.png", "000003.png", "000004.png", "000005.png", "000006.png", "new.png"}
    by_name = {os.path.basename(path): feature for path, feature in zip(paths, features)}
    assert torch.allclose(by_name["new.png"], by_name["000003.png"], atol=1e-6)
    red = clip.normalize(clip.preprocess(Image.new("RGB", (40, 40), "red"), 32)[None])
    assert torch.allclose(by_name["000005.png"], model.encode_image(red)[0], atol=1e-6)


def test_a_break_keeps_what_was_encoded(world, gallery, tmp_path, monkeypatch):
    model, file, calls, encode = clip.load_clip(world / "clip"), tmp_path / "f.pt", [], eval.encode_images
    (gallery / "broken.JPG").unlink()

    def broken(model, images):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(model, images)
    with monkeypatch.context() as patch:
        patch.setattr(eval, "encode_images", broken)
        with pytest.raises(KeyboardInterrupt):
            eval.encode_files(model, eval.find_pictures(gallery), file, chunk=2)
    assert encoded(model, gallery, file, monkeypatch)[2] == 2       # of six, four were kept


def test_a_folder_of_broken_pictures_is_an_error(world, gallery, tmp_path):
    with pytest.raises(ValueError, match="none of the 1 pictures can be read"):
        eval.encode_files(clip.load_clip(world / "clip"), [str(gallery / "broken.JPG")], tmp_path / "f.pt")


def found(text):
    """The printed ranks of a search: [(rank, score, name of the file, right or wrong or nothing)]."""
    lines = [line.split() for line in text.splitlines() if line[:4].strip().isdigit()]
    return [(int(line[0]), float(line[1]), os.path.basename(line[2]), *line[3:]) for line in lines]


def run_search(world, tmp_path, capsys, *flags):
    eval.main([str(world / "mrs"), "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "sheet.png"),
               "--device", "cpu", *map(str, flags)])
    assert Image.open(tmp_path / "sheet.png").width == 5 * 192 + 16
    return found(capsys.readouterr().out)


def test_a_search_ranks_by_the_similarity_of_features(world, tmp_path, capsys):
    ranks = run_search(world, tmp_path, capsys, "--query", "two red boats", "--top", 4)
    model, tokenizer, _ = eval.load_run(world / "mrs")
    paths = data.read("precomp", world / "aerial", "test").images
    images = torch.stack([clip.preprocess(Image.open(path), 32) for path in paths])
    scores = model.encode_image(clip.normalize(images)) @ model.encode_text(tokenizer(["two red boats"], 32))[0]
    expected = sorted(zip(scores.tolist(), map(os.path.basename, paths)), reverse=True)[:4]
    assert [row[0] for row in ranks] == [1, 2, 3, 4]
    assert [row[1] for row in ranks] == pytest.approx([score for score, _ in expected], abs=1e-4)
    assert [row[2:] for row in ranks] == [(name,) for _, name in expected]


def test_a_caption_of_the_split_shows_right_and_wrong(world, tmp_path, capsys):
    pairs = data.read("precomp", world / "aerial", "test")
    text = next(caption for caption in pairs.captions if pairs.captions.count(caption) == 1)
    own = os.path.basename(pairs.images[pairs.image_of_caption[pairs.captions.index(text)]])
    ranks = run_search(world, tmp_path, capsys, "--query", text)
    assert {row[2]: row[3] for row in ranks} == {os.path.basename(path): "right" if os.path.basename(path) == own
                                                 else "wrong" for path in pairs.images}


def test_all_pictures_of_a_person_are_right():
    pairs = data.Pairs(["a", "b", "c", "d"], ["x", "y", "x"], [0, 1, 2], [5, 6, 7, 5])
    assert eval.right_pictures(pairs, "x") == {"a", "c", "d"}
    assert eval.right_pictures(data.Pairs(pairs.images, pairs.captions, [0, 1, 2]), "x") == {"a", "c"}


def test_a_picture_finds_itself_in_a_gallery(world, gallery, tmp_path, capsys):
    ranks = run_search(world, tmp_path, capsys, "--query-image", gallery / "more/000004.png", "--gallery", gallery)
    assert len(ranks) == 6 and ranks[0] == (1, 1.0, "000004.png")


def test_a_sheet_shows_the_same_random_captions_each_time(world, tmp_path, capsys):
    first, again = (run_search(world, tmp_path, capsys, "--sheet", 3, "--split", "train") for _ in range(2))
    assert first == again and [row[0] for row in first] == [1, 2, 3, 4, 5] * 3
    assert {row[3] for row in first} <= {"right", "wrong"}


def test_features_of_another_model_are_not_reused(world, tmp_path, capsys):
    for run in ("mrs", "clip"):
        eval.main([str(world / run), "--query", "a boat", "--cache", str(tmp_path / "cache"),
                   "--out", str(tmp_path / "sheet.png"), "--device", "cpu"])
    first, second = (found(part) for part in capsys.readouterr().out.split("written")[:2])
    assert len(list((tmp_path / "cache").iterdir())) == 2 and first != second


def test_features_of_another_activation_are_not_reused(world, gallery, tmp_path, capsys):
    torch.save(eval.load_checkpoint(world / "clip")["state_dict"], tmp_path / "clip.pt")
    tokenizer = eval.load_run(world / "clip")[1]
    for activation in ("quick_gelu", "gelu"):
        model = clip.load_clip(tmp_path / "clip.pt", activation=activation)
        args = eval.parse([str(tmp_path / "clip.pt"), "--query", "a boat", "--gallery", str(gallery), "--cache",
                           str(tmp_path / "cache"), "--out", str(tmp_path / "sheet.png")])
        eval.search(args, model, tokenizer, {"precision": "fp32"})
    first, second = (found(part) for part in capsys.readouterr().out.split("written")[:2])
    assert len(list((tmp_path / "cache").iterdir())) == 2 and first != second


def test_a_search_leaves_out_what_is_not_there(world, gallery, tmp_path, capsys):
    (tmp_path / "links").mkdir()
    (tmp_path / "links/a.png").symlink_to(gallery / "more/000004.png")
    (tmp_path / "links/gone.png").symlink_to(tmp_path / "nothing.png")
    ranks = run_search(world, tmp_path, capsys, "--query", "a boat", "--gallery", tmp_path / "links")
    assert [row[2] for row in ranks] == ["a.png"]


# ---------------------------------------------------------------- the command line

def test_each_mistake_is_one_line_and_nothing_is_written(world, gallery, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setattr(sys, "argv", ["eval.py"])
    run = world / "mrs"
    for flags, words in (([], "give one run"), ([run, "--table", run], "give one run"),
                         ([run, "--query", "x", "--sheet", "2"], "not allowed with"),
                         ([run, "--gallery", gallery], "--gallery is searched with"),
                         ([run, "--query", "x", "--top", "0"], "are 1 or more"),
                         ([run, "--sheet", "0"], "are 1 or more"),
                         (["nothing.pt"], "nothing.pt"), ([run, "--device", "tpu"], "invalid choice: 'tpu'"),
                         ([world / "aerial"], "best.pt"),
                         (["--table", world / "aerial"], "no finished run"),
                         ([world / "clip", "--dataset", "ucm"], "--data-root"),
                         ([run, "--query-image", gallery / "broken.JPG"], "broken.JPG"),
                         ([run, "--query", "x", "--gallery", "nowhere"], "nowhere holds no picture"),
                         ([faulty(world, tmp_path, "truncated")], "cannot be loaded")):
        with pytest.raises(SystemExit) as stop:
            eval.main([str(flag) for flag in flags])
        error = capsys.readouterr().err.splitlines()[-1]
        assert stop.value.code == 2 and error.startswith("eval.py: error:") and words in error, (flags, error)
        assert list((tmp_path / "empty").iterdir()) == []


def test_a_test_leaves_out_what_training_leaves_out(world, tmp_path, capsys):
    shutil.copytree(world / "aerial", tmp_path / "aerial")
    pairs = data.read("precomp", tmp_path / "aerial", "test")
    Path(pairs.images[0]).write_bytes(b"no picture")
    lines = (tmp_path / "aerial/test_caps.txt").read_text().split("\n")
    lines[7] = ""
    (tmp_path / "aerial/test_caps.txt").write_text("\n".join(lines))
    flags = [str(world / "mrs"), "--data-root", str(tmp_path / "aerial"), "--cache", str(tmp_path), "--device", "cpu"]
    with pytest.raises(SystemExit):
        eval.main(flags)
    assert f"{pairs.images[0]}: " in capsys.readouterr().err
    eval.main([*flags, "--skip-bad"])
    text = capsys.readouterr().out
    assert "1 empty captions are left out: test_caps.txt:8" in text and "1 bad pictures are left out" in text
    assert "precomp test: 5 pictures, 24 captions" in text


def test_the_activation_of_plain_clip_can_be_said(world, tmp_path, capsys, monkeypatch):
    torch.save(clip.load_clip(world / "clip").openai_state_dict(), tmp_path / "plain.pt")
    tokenizer = clip.Tokenizer(world / "clip")
    monkeypatch.setattr(clip, "Tokenizer", lambda path: tokenizer)
    used = []
    monkeypatch.setattr(eval, "evaluate", lambda model, *rest: used.append(model.config.activation) or recalls(*range(7)))
    for flags in ([], ["--activation", "gelu"]):
        eval.main([str(tmp_path / "plain.pt"), "--dataset", "precomp", "--data-root", str(world / "aerial"),
                   "--cache", str(tmp_path), "--device", "cpu", *flags])
    assert used == ["quick_gelu", "gelu"]


def test_plain_clip_needs_a_data_set(world, tmp_path, capsys):
    torch.save(clip.load_clip(world / "clip").openai_state_dict(), tmp_path / "plain.pt")
    with pytest.raises(SystemExit):
        eval.main([str(tmp_path / "plain.pt")])
    assert "--dataset" in capsys.readouterr().err


def test_help_shows_the_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        eval.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for default in ("runs/cache", "10", "test", eval.TABLE_PNG):
        assert f"(default: {default}" in text
