"""The optimizers, AdamW and Muon.

Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon) replaces the momentum U S V^T of a weight matrix by
U V^T, so that the step is equally large in all directions, even where gradients are small. `torch.optim.Muon` does not
take convolutions, updates one matrix at a time, and cannot skip an update without a host-device sync; hence this one.
Tests compare it with torch's on linear layers.
"""

import torch
from torch import Tensor, nn

from .config import TrainConfig

MOMENTUM = 0.95
OUTER = ("conv_in.", "conv_out.", "class_embedding.")  # not hidden layers: AdamW, as Muon's author advises


def orthogonalize(matrices: Tensor) -> Tensor:
    """Map each matrix U S V^T to about U V^T, with singular values of 0.7 to 1.2.

    Newton-Schulz iteration, which needs only matrix products: X <- a X + (b A + c A^2) X with A = X X^T. `matrices`:
    `[N, rows, columns]`, any float dtype; the result has the same shape and dtype.
    """
    a, b, c = 3.4445, -4.7750, 2.0315  # of the odd polynomial that moves singular values to about 1
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices  # A is then the smaller of the two products
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # singular values in [0, 1], where it converges
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.AdamW):
    """Muon for the weights of hidden linear and convolutional layers, fused AdamW for all other parameters.

    A kernel `[out, in, 3, 3]` counts as a matrix `[out, in * 9]`. Updates are scaled to the size of AdamW's (Liu et al.
    2025, https://arxiv.org/abs/2502.16982, eq. 4), so that both groups share one learning rate and weight decay.

    Args:
        matrices: parameters of two dimensions or more, for Muon.
        others: the other parameters, for AdamW.
        lr, betas, eps, weight_decay: those of AdamW; Muon uses `lr` and `weight_decay` only.

    Attributes:
        found_inf: `[]` or `[1]`, set by the caller: if not 0, `step` skips the update of weights and momentum.
    """

    def __init__(self, matrices: list[nn.Parameter], others: list[nn.Parameter], **adamw):
        super().__init__([{"params": matrices, "muon": True}, {"params": others, "muon": False}], fused=True, **adamw)

    @torch.no_grad()
    def step(self, closure=None):
        group = self.param_groups[0]
        if parameters := [p for p in group["params"] if p.grad is not None]:
            self.muon_step(parameters, group["lr"], group["weight_decay"])
        return super().step(closure)

    def muon_step(self, parameters: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        """Update parameters with Muon, in few operations: on a GPU, small models are limited by their launches."""
        zero = torch.zeros((), device=parameters[0].device)
        for p in parameters:
            if "momentum" not in self.state[p]:
                self.state[p].update(momentum=torch.zeros_like(p), step=zero.clone())
        steps = [self.state[p]["step"] for p in parameters]
        finite = getattr(self, "found_inf", zero).reshape(()) == 0
        applied = finite.float()
        torch._foreach_add_(steps, applied)  # all at once, as the optimizers of torch do
        torch._foreach_mul_(parameters, 1 - lr * weight_decay * applied)

        same_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}  # to batch their matrix products
        for p in parameters:
            same_shape.setdefault(p.shape, []).append(p)
        moved, updates = [], []
        for group in same_shape.values():
            grad = torch.stack([p.grad.float() for p in group])
            momentum = torch.stack([self.state[p]["momentum"] for p in group])
            grad = torch.where(finite, grad, momentum)  # 0 * NaN would be NaN
            momentum = momentum.lerp(grad, 1 - MOMENTUM)
            update = orthogonalize(grad.lerp(momentum, MOMENTUM).flatten(2)).view_as(grad)  # Nesterov's momentum
            for p, m in zip(group, momentum):
                self.state[p]["momentum"] = m
                p.grad = None  # so that AdamW, below, skips it
            moved += group
            updates += (update * (lr * 0.2 * max(grad.flatten(2).shape[1:]) ** 0.5 * applied)).contiguous().unbind()
        torch._foreach_sub_(moved, updates)


def build_optimizer(unet: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """The optimizer that `config` asks for, over all parameters of the U-Net; it reads `found_inf`, see `Muon`."""
    adamw = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
    }
    if config.optimizer == "adamw":
        return torch.optim.AdamW(unet.parameters(), fused=True, **adamw)  # fused: one pass over all weights
    matrices, others = [], []
    for name, p in unet.named_parameters():
        (matrices if p.dim() > 1 and not name.startswith(OUTER) else others).append(p)
    return Muon(matrices, others, **adamw)
