"""losses.py against loops in plain Python, worked values, and closed forms."""
import math

import pytest
import torch

import losses


def features(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosines(x, y):
    """Python lists of cosine similarities, one scalar product at a time."""
    return [[(a @ b / (a.norm() * b.norm())).item() for b in y] for a in x]


def hinge_by_loops(x, y, margin, same):
    s, total = cosines(x, y), 0.0
    for anchor in range(len(x)):
        hardest_y = hardest_x = 0.0
        for other in range(len(x)):
            if other != anchor and not same[anchor][other]:
                hardest_y = max(hardest_y, margin + s[anchor][other] - s[anchor][anchor])
                hardest_x = max(hardest_x, margin + s[other][anchor] - s[anchor][anchor])
        total += hardest_y + hardest_x
    return total


def softmax_by_loops(x, y, scale, same):
    s, B, total = cosines(x, y), len(x), 0.0
    for i in range(B):
        row = sum(math.exp(scale * s[i][j]) for j in range(B) if j == i or not same[i][j])
        column = sum(math.exp(scale * s[j][i]) for j in range(B) if j == i or not same[j][i])
        total += math.log(row) + math.log(column) - 2 * scale * s[i][i]
    return total / (2 * B)


NONE = torch.zeros(6, 6, dtype=torch.bool)
SOME = torch.eye(6, dtype=torch.bool)     # as train.py makes it: every pair shares its image with itself
SOME[0, 3] = SOME[3, 0] = SOME[1, 2] = SOME[2, 1] = True


@pytest.mark.parametrize("same", [NONE, SOME])
@pytest.mark.parametrize("margin", [0.2, 0.7])
def test_hmmc_is_the_sum_of_three_hardest_hinges(same, margin):
    v, t, v2, t2 = (features(6, 8, seed=n) for n in range(4))
    v2, t2 = v + 0.5 * v2, t + 0.5 * t2     # second views resemble the first
    loss, parts = losses.hmmc_loss(v, t, v2, t2, margin, same)
    expected = {"image-text": hinge_by_loops(v, t, margin, same),
                "image-image": hinge_by_loops(v, v2, margin, same),
                "text-text": hinge_by_loops(t, t2, margin, same)}
    assert {name: value.item() for name, value in parts.items()} == pytest.approx(expected, abs=1e-9)
    assert loss.item() == pytest.approx(sum(expected.values()), abs=1e-9)


def test_hmmc_of_a_worked_example():
    # cosines of v and t: [[1, .6], [0, .8]]; margin .5: rows .1 and 0, columns 0 and .3, together .4
    # v with itself: 0; t with itself has .6 off the diagonal: four times .1
    v, t = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    _, parts = losses.hmmc_loss(v, t, v, t, margin=0.5)
    assert [value.item() for value in parts.values()] == pytest.approx([0.4, 0.0, 0.4], abs=1e-6)


def test_values_at_equal_similarities():
    x, ids, classifier = torch.ones(64, 3), torch.arange(64), lambda f: torch.ones(64, 70)
    assert losses.hmmc_loss(x, x, x, x)[0].item() == pytest.approx(6 * 64 * 0.2, rel=1e-6)
    assert losses.contrastive_loss(x, x, 10.0).item() == pytest.approx(math.log(64), rel=1e-6)
    assert losses.hmmc_softmax_loss(x, x, x, x, 10.0)[0].item() == pytest.approx(2 * math.log(64), rel=1e-6)
    assert losses.sdm_loss(x, x, ids, 50.0).item() == pytest.approx(27.948, abs=1e-3)
    assert losses.id_loss(x, x, ids, classifier).item() == pytest.approx(math.log(70), rel=1e-6)


@pytest.mark.parametrize("same", [NONE, SOME])
def test_contrastive_against_loops(same):
    v, t = features(6, 8), features(6, 8, seed=1)
    expected = softmax_by_loops(v, t, 7.0, same)
    assert losses.contrastive_loss(v, t, 7.0, same).item() == pytest.approx(expected, abs=1e-9)


def test_hmmc_softmax_weighs_its_three_terms():
    v, t, v2, t2 = (features(6, 8, seed=n) for n in range(4))
    loss, parts = losses.hmmc_softmax_loss(v, t, v2, t2, 7.0, SOME)
    expected = [softmax_by_loops(v, t, 7.0, SOME), softmax_by_loops(v, v2, 7.0, SOME) / 2,
                softmax_by_loops(t, t2, 7.0, SOME) / 2]
    assert [part.item() for part in parts.values()] == pytest.approx(expected, abs=1e-9)
    assert loss.item() == pytest.approx(sum(expected), abs=1e-9)


@pytest.mark.parametrize("stored", [math.log(100), 4.6052])        # the bound, and what OpenAI's weights hold
def test_the_temperature_has_a_gradient_at_its_bound(stored):
    v, t = features(6, 8).float(), features(6, 8, seed=1).float()
    logit_scale = torch.nn.Parameter(torch.tensor(stored))
    losses.contrastive_loss(v, t, logit_scale.exp()).backward()
    assert logit_scale.grad > 0     # the pairs are random, so a step lowers the scale


@pytest.mark.parametrize("scale, sdm, contrastive", [
    (1, 11.434421017, 0.852711066), (10, 2.252247266, 0.210132150), (50, 0.824817983, 0.012318331)])
def test_sdm_and_contrastive_values(scale, sdm, contrastive):
    v = torch.tensor([[1, 0], [.8, .6], [0, 1]], dtype=torch.float64)
    t = torch.tensor([[1, .2], [.6, .8], [.1, 1]], dtype=torch.float64)
    assert losses.sdm_loss(v, t, torch.tensor([0, 0, 1]), scale).item() == pytest.approx(sdm, abs=1e-8)
    assert losses.contrastive_loss(v, t, scale).item() == pytest.approx(contrastive, abs=1e-8)


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
        loss, _ = losses.hmmc_loss(v, t, v, t)
    exact, _ = losses.hmmc_loss(v.double(), t.double(), v.double(), t.double())
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), rel=1e-5)
