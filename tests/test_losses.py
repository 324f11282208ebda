"""losses.py against loops in plain Python, worked values, and closed forms."""
import math

import pytest
import torch

import losses


def features(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosines(x, y):
    """Python lists of cosine similarities, one scalar product at a time."""
    def dot(a, b):
        return sum(p * q for p, q in zip(a, b))
    x, y = x.tolist(), y.tolist()
    return [[dot(a, b) / math.sqrt(dot(a, a) * dot(b, b)) for b in y] for a in x]


def hinge_by_loops(x, y, margin, same):
    s, B, total = cosines(x, y), len(x), 0.0
    for i in range(B):
        total += max([max(0.0, margin + s[i][j] - s[i][i]) for j in range(B) if j != i and not same[i][j]], default=0.0)
    for j in range(B):
        total += max([max(0.0, margin + s[i][j] - s[j][j]) for i in range(B) if i != j and not same[i][j]], default=0.0)
    return total


def softmax_by_loops(x, y, scale, same):
    s, B, total = cosines(x, y), len(x), 0.0
    for i in range(B):
        row = sum(math.exp(scale * s[i][j]) for j in range(B) if j == i or not same[i][j])
        col = sum(math.exp(scale * s[j][i]) for j in range(B) if j == i or not same[j][i])
        total += math.log(row) + math.log(col) - 2 * scale * s[i][i]
    return total / (2 * B)


NONE = torch.zeros(6, 6, dtype=torch.bool)
SOME = torch.eye(6, dtype=torch.bool)     # as train.py makes it: every pair shares its picture with itself
SOME[0, 3] = SOME[3, 0] = SOME[1, 2] = SOME[2, 1] = True


@pytest.mark.parametrize("same", [NONE, SOME])
@pytest.mark.parametrize("margin", [0.2, 0.7])
def test_hmmc_is_the_sum_of_three_hardest_hinges(same, margin):
    v, t, v2, t2 = (features(6, 8, seed=n) for n in range(4))
    v2, t2 = v + 0.5 * v2, t + 0.5 * t2     # second views resemble the first
    loss, parts = losses.hmmc_loss(v, t, v2, t2, margin, same)
    expected = {"image-text": hinge_by_loops(v, t, margin, same), "image-image": hinge_by_loops(v, v2, margin, same),
                "text-text": hinge_by_loops(t, t2, margin, same)}
    assert {name: value.item() for name, value in parts.items()} == pytest.approx(expected, abs=1e-9)
    assert loss.item() == pytest.approx(sum(expected.values()), abs=1e-9)


def test_hmmc_without_a_mask_counts_every_other_pair():
    v, t = features(6, 8), features(6, 8, seed=1)
    assert losses.hmmc_loss(v, t, v, t)[0].item() == pytest.approx(losses.hmmc_loss(v, t, v, t, same=NONE)[0].item())


def test_hmmc_of_a_worked_example():
    # cosines of v and t: [[1, .6], [0, .8]]; rows: [.2+.6-1]+ = 0, [.2+0-.8]+ = 0; columns: 0, [.2+.6-.8]+ = 0
    v, t = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    loss, parts = losses.hmmc_loss(v, t, v, t, margin=0.5)
    # margin .5: rows .1 and 0, columns 0 and .3 -> .4; v with itself: 0; t with itself .6: four times .1
    assert parts["image-text"].item() == pytest.approx(0.4, abs=1e-6)
    assert parts["image-image"].item() == 0
    assert parts["text-text"].item() == pytest.approx(0.4, abs=1e-6)


def test_values_at_equal_similarities():
    x = torch.ones(5, 3)
    assert losses.hmmc_loss(x, x, x, x)[0].item() == pytest.approx(6 * 5 * 0.2, rel=1e-6)
    assert losses.hmmc_softmax_loss(x, x, x, x, 10.0)[0].item() == pytest.approx(2 * math.log(5), rel=1e-6)
    assert losses.contrastive_loss(x, x, 10.0).item() == pytest.approx(math.log(5), rel=1e-6)
    x = torch.ones(64, 3)
    assert losses.sdm_loss(x, x, torch.arange(64), 50.0).item() == pytest.approx(27.948, abs=1e-3)


@pytest.mark.parametrize("same", [NONE, SOME])
def test_contrastive_against_loops(same):
    v, t = features(6, 8), features(6, 8, seed=1)
    assert losses.contrastive_loss(v, t, 7.0, same).item() == pytest.approx(softmax_by_loops(v, t, 7.0, same), abs=1e-9)


def test_hmmc_softmax_weighs_its_three_terms():
    v, t, v2, t2 = (features(6, 8, seed=n) for n in range(4))
    loss, parts = losses.hmmc_softmax_loss(v, t, v2, t2, 7.0, SOME)
    expected = [softmax_by_loops(v, t, 7.0, SOME), 0.5 * softmax_by_loops(v, v2, 7.0, SOME),
                0.5 * softmax_by_loops(t, t2, 7.0, SOME)]
    assert [part.item() for part in parts.values()] == pytest.approx(expected, abs=1e-9)
    assert loss.item() == pytest.approx(sum(expected), abs=1e-9)


def test_temperature_is_clamped_at_100():
    v, t = features(6, 8), features(6, 8, seed=1)
    assert losses.contrastive_loss(v, t, torch.tensor(1e4)).item() == losses.contrastive_loss(v, t, 100.0).item()
    assert losses.contrastive_loss(v, t, 100.0).item() != losses.contrastive_loss(v, t, 99.0).item()


def test_identical_captions_are_negatives_only_without_the_mask():
    v, t = features(4, 8), features(4, 8, seed=1)
    t[1] = t[0]
    same = torch.zeros(4, 4, dtype=torch.bool)
    same[0, 1] = same[1, 0] = True
    # text 1 ties with text 0 for image 0: at least the margin is lost on it unless it is masked
    assert losses.hmmc_loss(v, t, v, t)[1]["text-text"] >= 4 * 0.2 - 1e-9
    assert losses.hmmc_loss(v, t, v, t, same=same)[1]["text-text"] == hinge_by_loops(t, t, 0.2, same)


@pytest.mark.parametrize("scale, sdm, itc", [(1, 11.434421017, 0.852711066), (10, 2.252247266, 0.210132150),
                                             (50, 0.824817983, 0.012318331)])
def test_sdm_and_contrastive_values(scale, sdm, itc):
    v = torch.tensor([[1, 0], [.8, .6], [0, 1]], dtype=torch.float64)
    t = torch.tensor([[1, .2], [.6, .8], [.1, 1]], dtype=torch.float64)
    assert losses.sdm_loss(v, t, torch.tensor([0, 0, 1]), scale).item() == pytest.approx(sdm, abs=1e-8)
    assert losses.contrastive_loss(v, t, scale).item() == pytest.approx(itc, abs=1e-8)


def test_id_loss_is_the_mean_of_two_cross_entropies():
    v, t, ids = features(5, 8).float(), features(5, 8, seed=1).float(), torch.tensor([0, 2, 1, 2, 0])
    classifier = torch.nn.Linear(8, 3)
    expected = 0.0
    for x in (v, t):
        for row, label in zip(classifier(x).tolist(), ids.tolist()):
            expected += (math.log(sum(math.exp(z) for z in row)) - row[label]) / 10
    assert losses.id_loss(v, t, ids, classifier).item() == pytest.approx(expected, abs=1e-5)


def test_gradients_reach_both_views():
    views = [features(4, 8, seed=n).requires_grad_() for n in range(4)]
    losses.hmmc_loss(*views, margin=2.0)[0].backward()
    assert all(view.grad.abs().sum() > 0 for view in views)


def test_half_precision_features_are_compared_in_float32():
    v, t = features(6, 64).bfloat16(), features(6, 64, seed=1).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = losses.hmmc_loss(v, t, v, t)[0]
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(losses.hmmc_loss(v.double(), t.double(), v.double(), t.double())[0].item(), rel=1e-5)


# ---------------------------------------------------------------- several processes, of which this is one

def test_a_gathered_row_counts_for_its_process_and_elsewhere_as_it_is(monkeypatch):
    def all_gather(parts, x):
        assert all(part.is_contiguous() for part in (*parts, x))
        for part in parts:
            part.copy_(x)
    monkeypatch.setattr(losses, "world", lambda: 3)
    monkeypatch.setattr(losses, "rank", lambda: 1)
    monkeypatch.setattr(losses.dist, "all_gather", all_gather)
    x = torch.randn(4, 2).T.requires_grad_()            # not contiguous
    whole = losses.gather(x)
    assert whole.shape == (6, 4) and torch.equal(whole[2:4], x)
    (2 * whole + losses.gather(x)).sum().backward()
    x.sum().backward()
    assert torch.equal(x.grad, torch.full((2, 4), 3.0 * (2 + 1) + 1))
