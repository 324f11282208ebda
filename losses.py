"""The losses: contrastive (CLIP), HMMC (arXiv 2308.12509), SDM and ID (for arXiv 2401.02173).

Pure functions on features. Rows are pairs: row i of the image features belongs to row i of the text features.
Each function can be copied with the few lines that it calls; torch is all it needs. Similarities are cosines.
Half-precision features are taken to float32 before they are compared.

No loss clamps the scale (1 / temperature). In float32 exp(log 100) is 100.0000076, more than 100, so a clamp
at 100 inside a loss would have gradient 0 there for ever: a scale at its bound could never fall again.
Instead train.py clips the parameter (the log of the scale) after each optimiser step: it keeps its gradient.

Shapes: B pairs in the batch, D width of the joint space.
"""
import torch
import torch.nn.functional as F


# ---------------------------------------------------------------- helpers

def cosine(x, y):
    """All cosine similarities, (B, D) and (B, D) -> (B, B), in float32 (in float64 if the features are)."""
    if x.dtype != torch.float64:
        x, y = x.float(), y.float()
    device_type = x.device.type
    if not torch.amp.is_autocast_available(device_type):
        device_type = "cpu"     # torch 2.4 has none on MPS and raises; to turn off the CPU's changes nothing
    with torch.autocast(device_type, enabled=False):        # a product in bf16 would round small margins away
        return F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).T


def summed(parts):
    """{name: loss} -> (their sum, the same dict detached for the log)."""
    return sum(parts.values()), {name: part.detach() for name, part in parts.items()}


# ---------------------------------------------------------------- CLIP, arXiv 2103.00020

def contrastive_loss(image, text, scale, same=None):
    """Softmax over the batch in both directions, C = 1/2 [CE(scale s, i) + CE(scale s^T, i)], a mean over B.

    s are the cosines; the target of row i is i. image, text (B, D).
    scale: 1 / temperature, a number or a tensor with gradient; not clamped (see above).
    same (B, B) bool, optional: pairs off the diagonal where it is True are left out of the softmax.
    Equal similarities give log B.
    """
    logits = scale * cosine(image, text)                                      # (B, B)
    target = torch.arange(len(logits), device=logits.device)
    if same is not None:
        diagonal = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
        logits = logits.masked_fill(same & ~diagonal, float("-inf"))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


# ---------------------------------------------------------------- PE-RSITR, arXiv 2308.12509

def hardest_hinge(x, y, margin, same=None):
    """Hinge on the hardest negative, both directions, a SUM over the batch (VSE++, arXiv 1707.05612).

        H(X, Y) =  sum_i max_{j != i} [margin + s(x_i, y_j) - s(x_i, y_i)]+      (anchor x_i)
                 + sum_j max_{i != j} [margin + s(x_i, y_j) - s(x_j, y_j)]+      (anchor y_j)
    x, y (B, D). same (B, B) bool, optional: pairs that are no negatives. Equal similarities give 2 B margin.
    """
    s = cosine(x, y)                                                          # (B, B)
    positive = s.diag()                                                       # (B,)
    excluded = torch.eye(len(s), dtype=torch.bool, device=s.device)
    if same is not None:
        excluded = excluded | same
    hinge_x = (margin + s - positive[:, None]).clamp(min=0).masked_fill(excluded, 0)    # row i: anchor x_i
    hinge_y = (margin + s - positive[None, :]).clamp(min=0).masked_fill(excluded, 0)    # column j: anchor y_j
    return hinge_x.amax(dim=1).sum() + hinge_y.amax(dim=0).sum()


def hmmc_loss(image, text, image2, text2, margin=0.2, same=None):
    """Hybrid multi-modal contrastive loss, L = H(V, T) + H(V, V') + H(T, T') -> (loss, parts).

    image, text (B, D): features V, T. image2, text2 (B, D): V', T', the same pairs encoded a second time with
    dropout on the tokens. margin is in units of the cosine. The loss is a SUM over the batch: 6 B margin at
    equal similarities (B > 1), 0 when every positive beats every negative by the margin.
    same (B, B) bool, optional: pairs that share image, person or caption, and so are no negatives.
    parts: the three detached terms "image-text", "image-image", "text-text".
    """
    # differs from PE-RSITR: the mask `same` is ours; without it this is the paper's loss
    return summed({"image-text": hardest_hinge(image, text, margin, same),
                   "image-image": hardest_hinge(image, image2, margin, same),
                   "text-text": hardest_hinge(text, text2, margin, same)})


def hmmc_softmax_loss(image, text, image2, text2, scale, same=None, weights=(1.0, 0.5, 0.5)):
    """The three terms of HMMC as softmax losses, L = w1 C(V, T) + w2 C(V, V') + w3 C(T, T') -> (loss, parts).

    Features and `same` as in `hmmc_loss`, scale as in `contrastive_loss`; the parts are weighted.
    Equal similarities give (w1 + w2 + w3) log B.
    """
    # differs from PE-RSITR: a softmax over all negatives, not the hardest alone; a mean over B; our weights
    return summed({"image-text": weights[0] * contrastive_loss(image, text, scale, same),
                   "image-image": weights[1] * contrastive_loss(image, image2, scale, same),
                   "text-text": weights[2] * contrastive_loss(text, text2, scale, same)})


# ---------------------------------------------------------------- people, for arXiv 2401.02173

def sdm_loss(image, text, person_ids, scale):
    """Similarity distribution matching (IRRA, arXiv 2303.12501): KL(p || q), both directions, means over B.

        p_ij = softmax_j(scale s_ij),    q_ij = [same person] / (rows of the batch that are this person)
        L = 1/B sum_ij p_ij log(p_ij / (q_ij + 1e-8)), once with images as rows plus once with texts as rows
    image, text (B, D). person_ids (B,) int. scale is used as given.
    Equal similarities and B different persons give 2 [(1 - 1/B) log 1e8 - log B], 27.948 for B = 64.
    """
    logits = scale * cosine(image, text)                                      # (B, B)
    same_person = (person_ids[:, None] == person_ids[None, :]).to(logits.dtype)
    q = same_person / same_person.sum(dim=1, keepdim=True)
    log_q = (q + 1e-8).log()        # for both directions: q is symmetric, rows of one person have one sum
    loss = 0
    for rows in (logits, logits.T):
        log_p = rows.log_softmax(dim=1)
        loss = loss + (log_p.exp() * (log_p - log_q)).sum(dim=1).mean()
    return loss


def id_loss(image, text, person_ids, classifier):
    """Cross-entropy of one classifier over the n training persons; the mean of images and texts.

    image, text (B, D): features BEFORE they are normalised. person_ids (B,) in 0..n-1.
    classifier: (B, D) -> (B, n), the same for both; its logits are taken to float32. Equal logits give log n.
    """
    image_loss = F.cross_entropy(classifier(image).float(), person_ids)
    text_loss = F.cross_entropy(classifier(text).float(), person_ids)
    return (image_loss + text_loss) / 2
