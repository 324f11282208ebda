"""eval.py: recalls against literal examples, a brute-force expectation over tie orders, and closed forms."""
import itertools
import math
import random

import pytest
import torch

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
        i2t = sum(bool((image_of_caption[row.argsort(descending=True)[:k]] == n).any()) for n, row in enumerate(similarity))
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


def test_a_picture_without_caption_is_an_error():
    with pytest.raises(ValueError, match="query 1"):
        eval.retrieval_metrics([[0.3, 0.1], [0.2, 0.3]], [0, 0])


def test_shapes_that_do_not_fit_are_an_error():
    with pytest.raises(ValueError, match="does not fit"):
        eval.retrieval_metrics([[0.3, 0.1], [0.2, 0.3]], [0, 1, 1])


def test_each_distinct_caption_is_encoded_once():
    class Model:
        logit_scale, seen = torch.zeros(()), []
        config = type("Config", (), {"embed_dim": 2})

        def encode_text(self, tokens):
            self.seen += tokens.tolist()
            return tokens[:, :2].float()
    tokens = torch.tensor([[1, 5, 9], [1, 9, 0], [1, 5, 9], [2, 9, 0]])
    features = eval.encode_texts(Model(), tokens)
    assert features.tolist() == [[1, 5], [1, 9], [1, 5], [2, 9]]
    assert len(Model.seen) == 3


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
