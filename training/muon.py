"""The Muon optimiser, for many matrices of few shapes at once.

Source: Keller Jordan, "Muon: an optimizer for hidden layers in neural networks", 2024: the step is
the momentum with all of its singular values brought near 1, by five steps of a polynomial in the
matrix and its transpose. Beside torch's own it takes matrices of one shape together, which is a
tenth of the launches.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5


class Muon(torch.optim.Optimizer):
    """Steps matrices; the rate is that of a square one, a tall one's is larger."""

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step along the gradients. Closures are not supported; nothing is returned."""
        assert closure is None
        for group in self.param_groups:
            alike = defaultdict[torch.Size, list[Tensor]](list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[parameter.shape].append(parameter)
            for parameters in alike.values():
                self._step(parameters, group)

    def _step(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        momenta = [self.state[parameter]["momentum"] for parameter in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])  # Nesterov's
        updates = orthogonalize(torch.stack(ahead)).unbind()
        rows, columns = parameters[0].shape
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        rate = group["lr"] * max(1.0, rows / columns) ** 0.5
        torch._foreach_add_(parameters, updates, alpha=-rate)


def orthogonalize(matrices: Tensor) -> Tensor:  # (N, rows, columns), as is the result
    """The matrices with singular values near 1, between about 0.7 and 1.2."""
    x = matrices.bfloat16() if matrices.is_cuda else matrices  # on a CPU it is the slower one
    is_tall = x.shape[1] > x.shape[2]
    if is_tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        square = x @ x.mT
        polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x.mT if is_tall else x).to(matrices.dtype)
