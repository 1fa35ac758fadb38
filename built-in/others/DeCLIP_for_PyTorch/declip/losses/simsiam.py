"""SimSiam's loss: each view of an image predicts what the other one is projected to.

Chen and He, Exploring Simple Siamese Representation Learning, arXiv:2011.10566, equations 1 to 4.

Shape letters: V the two views, B images, P projections.
"""

from torch import Tensor
from torch.nn import functional as F

from declip.losses import wide


def simsiam_loss(predicted_VBP: Tensor, projected_VBP: Tensor) -> Tensor:
    """Minus the mean cosine of predictions and the other view's projections; -1 at the best.

    Projections get no gradient.
    """
    predicted_1BP, predicted_2BP = F.normalize(wide(predicted_VBP), dim=-1)
    projected_1BP, projected_2BP = F.normalize(wide(projected_VBP.detach()), dim=-1)
    cosines_B = (predicted_1BP * projected_2BP + predicted_2BP * projected_1BP).sum(dim=-1)
    loss: Tensor = -0.5 * cosines_B.mean()
    return loss
