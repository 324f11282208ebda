"""The losses: contrastive (CLIP), HMMC (first paper), SDM and ID (second paper). Pure functions on features.
At the end, what a loss of the whole batch needs where that is spread over processes or too large for one forward.

Rows are pairs: row i of the image features belongs to row i of the text features. Nothing here needs more than
torch, and each function can be copied alone with the few lines of helpers above it. Half-precision features are
taken to float32 before anything is computed; similarities are cosines.

Shapes: B pairs in the batch, D width of the joint space.
"""
import torch
import torch.distributed as dist
import torch.nn.functional as F


def cosine(x, y):
    """All cosine similarities, (B, D) and (B, D) -> (B, B), in float32 or better."""
    x, y = (z if z.dtype == torch.float64 else z.float() for z in (x, y))
    with torch.autocast(x.device.type, enabled=False):      # a bf16 product would round away small margins
        return F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).T


def summed(parts):
    """The sum of the parts, and the parts detached."""
    return sum(parts.values()), {name: part.detach() for name, part in parts.items()}


# ---------------------------------------------------------------- CLIP, arXiv 2103.00020

def contrastive_loss(image, text, scale, same=None):
    """Softmax over the batch in both directions, C = 1/2 [CE(scale s, i) + CE(scale s^T, i)], a mean over B.

    scale: 1 / temperature, a number or tensor, clamped at 100 as CLIP does. ln B at equal similarities.
    same (B, B) bool, optional: off-diagonal pairs left out of the softmax.
    """
    logits = torch.as_tensor(scale).clamp(max=100) * cosine(image, text)
    target = torch.arange(len(logits), device=logits.device)
    if same is not None:
        own = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
        logits = logits.masked_fill(same & ~own, float("-inf"))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


# ---------------------------------------------------------------- PE-RSITR, arXiv 2308.12509

def hardest_hinge(x, y, margin, same=None):
    """Hinge on the hardest wrong partner, both directions, summed over the batch (VSE++, arXiv 1707.05612).

    H(X, Y) = sum_i max_{j != i} [margin + s(x_i, y_j) - s(x_i, y_i)]+  +  the same with rows and columns swapped.
    """
    s = cosine(x, y)
    own = s.diag()
    wrong = ~torch.eye(len(s), dtype=torch.bool, device=s.device)
    if same is not None:
        wrong = wrong & ~same
    row = (margin + s - own[:, None]).clamp(min=0) * wrong      # anchor x_i, wrong y_j
    col = (margin + s - own[None, :]).clamp(min=0) * wrong      # anchor y_j, wrong x_i
    return row.amax(dim=1).sum() + col.amax(dim=0).sum()


def hmmc_loss(image, text, image2, text2, margin=0.2, same=None):
    """Hybrid multi-modal contrastive loss, L = H(V, T) + H(V, V') + H(T, T') -> (loss, parts).

    image, text (B, D): features V, T. image2, text2 (B, D): V', T', the same pairs encoded a second time with
    dropout on the tokens. margin is in cosine units. The loss is a SUM over the batch: 6 B margin when all
    similarities are equal (B > 1), 0 when every pair beats every wrong one by the margin.
    same (B, B) bool, optional: pairs that share their image or their caption text and so are no negatives.
    differs from PE-RSITR: the mask is ours; without `same` this is its loss.
    parts: the three detached terms "image-text", "image-image", "text-text", as in the sum.
    """
    return summed({"image-text": hardest_hinge(image, text, margin, same),
                   "image-image": hardest_hinge(image, image2, margin, same),
                   "text-text": hardest_hinge(text, text2, margin, same)})


def hmmc_softmax_loss(image, text, image2, text2, scale, same=None, weights=(1.0, 0.5, 0.5)):
    """The three terms of HMMC as softmax contrastive losses, L = w1 C(V, T) + w2 C(V, V') + w3 C(T, T').

    differs from PE-RSITR: a softmax over all negatives, not the hardest alone; a mean over the batch; our weights.
    sum(weights) ln B when all similarities are equal.
    Arguments as in `hmmc_loss`; scale as in `contrastive_loss`. Returns (loss, weighted parts).
    """
    return summed({"image-text": weights[0] * contrastive_loss(image, text, scale, same),
                   "image-image": weights[1] * contrastive_loss(image, image2, scale, same),
                   "text-text": weights[2] * contrastive_loss(text, text2, scale, same)})


# ---------------------------------------------------------------- person re-identification, arXiv 2401.02173

def sdm_loss(image, text, person_ids, scale):
    """Similarity distribution matching (IRRA, arXiv 2303.12501): KL(p || q), both directions, a mean over B each.

    p_ij = softmax_j(scale s_ij); q_ij = [same person] / how many of the batch are that person.
    person_ids (B,) int. L = 1/B sum_ij p_ij log(p_ij / (q_ij + 1e-8)), with images as rows plus with texts as rows.
    scale is not clamped.
    """
    logits = torch.as_tensor(scale) * cosine(image, text)
    same = (person_ids[:, None] == person_ids[None, :]).to(logits.dtype)
    log_q = (same / same.sum(dim=1, keepdim=True) + 1e-8).log()     # one for both directions: rows share the ids

    def kl(logits):
        log_p = logits.log_softmax(dim=1)
        return (log_p.exp() * (log_p - log_q)).sum(dim=1).mean()
    return kl(logits) + kl(logits.T)


def id_loss(image, text, person_ids, classifier):
    """Cross-entropy of one classifier over the training identities, shared by both modalities; their mean.

    image, text (B, D): features BEFORE they are normalised. person_ids (B,) in 0..n-1. classifier: (B, D) -> (B, n).
    """
    loss = F.cross_entropy(classifier(image).float(), person_ids)
    return (loss + F.cross_entropy(classifier(text).float(), person_ids)) / 2


# ---------------------------------------------------------------- a batch that one device or one forward cannot hold

def world():
    """How many processes share a batch; alone it is 1."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    """Number of this process among them, 0 the one that writes; alone it is 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def gather(x):
    """Rows of this process (B, ...), as many in each -> rows of all (world B, ...), with gradients.

    Each process computes the loss of the whole batch, but has the graph of its own rows only. The gradients of the
    parameters are averaged over processes afterwards, so those through the rows count `world` times.
    """
    if world() == 1:
        return x
    own = x.detach().contiguous()
    parts = [torch.empty_like(own) for _ in range(world())]
    dist.all_gather(parts, own)
    if x.requires_grad:
        parts[rank()] = x.view_as(x)    # a view: the hook is on this use of x alone
        parts[rank()].register_hook(lambda grad: grad * world())
    return torch.cat(parts)


def average_gradients(parameters):
    """The mean of each gradient over the processes, left in place."""
    for parameter in parameters:
        if world() > 1 and parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= world()


def backward(encode_piece, loss_of, pieces, seed_piece):
    """Loss of a batch from features, its gradients left in the parameters -> (loss, parts).

    With more than one piece, no more than one is in memory at a time, and the gradient is still that of the whole
    batch (GradCache, arXiv 2101.06983): features without graph first, then the gradient of the loss for each feature,
    then every piece again, with the same dropout, to pass that gradient on.
    """
    if len(pieces) == 1:
        loss, parts = loss_of(encode_piece(pieces[0]))
        loss.backward()
        return loss.detach(), parts
    features = []
    for n, piece in enumerate(pieces):
        seed_piece(n)
        with torch.no_grad():
            features.append([x.requires_grad_() for x in encode_piece(piece)])
    loss, parts = loss_of([torch.cat(rows) for rows in zip(*features)])
    loss.backward()
    for n, piece in enumerate(pieces):
        seed_piece(n)
        learned = [(x, known.grad) for x, known in zip(encode_piece(piece), features[n]) if x.requires_grad]
        torch.autograd.backward(*zip(*learned))     # what a frozen tower gave has no graph
    return loss.detach(), parts
