"""A linear layer and its LoRA in the passes over memory that the layer alone would take.

    y = W x + s B A x = [W, s B] [x, A x]

`peft` adds the update to the layer's result: for a layer that is wider than its input several passes over much memory,
forward and backward. Here the r numbers A x are r more of what the product sums over, so that the update costs r / I of
a product of I inputs, and the same matrix gives both gradients: that of the input, and that of A x. A layer that is
narrower than its input has it the other way round, since then its own result is what is small.

    dy [W, s B] = [dx, d(A x)]                      dx += d(A x) A
    [dy, d(A x)] [W; A] = dx                        d(A x) = s dy B

On processors with a product of their own (`lit_palm.models.products`); elsewhere, and with DoRA, layers are peft's.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lit_palm.models.half import product_type
from lit_palm.models.layers import WITHOUT_GRADIENTS as MANY
from lit_palm.models.layers import Linear, QuickLinear
from lit_palm.models.products import multiply, quick

__all__ = ["AdaptedLinear"]


class AdaptedLinear(lora.Linear):
    """peft's layer with a forward pass of its own."""

    @staticmethod
    def take_over(network: nn.Module) -> None:
        """Make all of peft's linear layers of a network such."""
        for module in network.modules():
            if type(module) is lora.Linear:
                module.__class__ = AdaptedLinear

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        role = None if args or options else self.role
        if role is None or not self.takes(x, role):
            result: Tensor = super().forward(x, *args, **options)
            return result
        return self.product(x, role, slice(None))

    def part(self, x: Tensor, outputs: slice) -> Tensor | None:
        """Some of what `forward` gives; None where it would have to be computed whole."""
        role, base = self.role, self.base_layer
        if not self.active and isinstance(base, Linear):
            return base.part(x, outputs)
        return self.product(x, role, outputs) if role is not None and self.takes(x, role) else None

    @property
    def role(self) -> str | None:
        """The one adapter that is active, if it is a plain one that is not in the matrix."""
        active = self.active
        plain = len(active) == 1 and active[0] not in self.lora_variant and not self.lora_bias[active[0]]
        return active[0] if plain and not self.merged else None

    @property
    def active(self) -> list[str]:
        """The adapters that are added to what the matrix gives."""
        return [] if self.disable_adapters else [role for role in self.active_adapters if role in self.lora_A]

    def pair(self, role: str) -> tuple[Tensor, Tensor]:
        """A [r, I] and B [O, r] of an adapter."""
        a, b = self.lora_A[role].weight, self.lora_B[role].weight
        assert isinstance(a, Tensor) and isinstance(b, Tensor)
        return a, b

    def takes(self, x: Tensor, role: str) -> bool:
        """Whether its product with x [..., I] is made here."""
        base, dtype = self.base_layer, product_type(x)
        rows, autocast = x.shape[:-1].numel(), torch.is_autocast_enabled(x.device.type)
        a, b = self.pair(role)
        return (
            type(base) in (nn.Linear, QuickLinear, Linear)
            and isinstance(base, nn.Linear)
            and not (base._forward_hooks or base._forward_pre_hooks)
            and (type(base) is Linear or (dtype is torch.float32 and (torch.is_grad_enabled() or rows >= MANY)))
            and (dtype is torch.float32 or len(a) % 2 == 0)
            # without autocast peft adds an update of float32 numbers in float32
            and all(type(t) in (Tensor, nn.Parameter) and (autocast or t.dtype is dtype) for t in (a, b))
            and quick(x, base.weight, dtype)
        )

    def product(self, x: Tensor, role: str, outputs: slice) -> Tensor:
        """[..., O] of x [..., I]."""
        shape = x.shape[:-1]
        base, dropout, width = self.base_layer, self.lora_dropout[role], x.shape[-1]
        assert isinstance(base, nn.Linear)
        x = x.to(product_type(x)).reshape(-1, width)
        read = dropout(x) if isinstance(dropout, nn.Dropout) and dropout.training else None
        a, b = self.pair(role)
        result: Tensor = _Adapted.apply(x, read, base.weight[outputs], a, b[outputs], self.scaling[role])
        result = result.view(*shape, -1)
        return result if base.bias is None else result + base.bias[outputs].to(result.dtype)


class _Adapted(torch.autograd.Function):
    """x [N, I], what A reads instead [N, I] or None, W [O, I], A [r, I], B [O, r], s -> [N, O]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, read: Tensor | None, w: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        inner = (x if read is None else read) @ a.to(x.dtype).t()
        ctx.save_for_backward(x, read, w, a, b, inner)
        ctx.scale = scale
        if len(w) >= w.shape[1]:
            return multiply(torch.cat((x, inner), 1), _beside(w, b, scale).t(), x.dtype)
        return multiply(x, w.t(), x.dtype).addmm_(inner, (b * scale).to(x.dtype).t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad.device.type, enabled=False):  # products are of the type that they were forward
            return _gradients(ctx, grad.contiguous())


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, read, w, a, b, inner = ctx.saved_tensors
    dtype, scale = x.dtype, ctx.scale
    wanted, (outputs, inputs) = ctx.needs_input_grad[0], w.shape
    through = read is None and wanted  # what A x passes on goes to x
    grad_x = grad_read = grad_a = grad_b = None
    if wanted and outputs >= inputs:
        grad_x, grad_inner = multiply(grad, _beside(w, b, scale), dtype).split((inputs, len(a)), 1)
        grad_x = grad_x.addmm(grad_inner, a.to(dtype)) if through else grad_x
    else:
        grad_inner = grad @ (b * scale).to(dtype)
        if through:
            grad_x = multiply(torch.cat((grad, grad_inner), 1), torch.cat((w, a.to(w.dtype))), dtype)
        elif wanted:
            grad_x = multiply(grad, w, dtype)
    if ctx.needs_input_grad[1]:
        grad_read = grad_inner @ a.to(dtype)
    if ctx.needs_input_grad[3]:
        grad_a = multiply(grad_inner.t(), x if read is None else read, torch.float32).to(a.dtype)
    if ctx.needs_input_grad[4]:
        grad_b = (multiply(inner.t(), grad, torch.float32).t() * scale).to(b.dtype)
    return grad_x, grad_read, None, grad_a, grad_b, None


def _beside(w: Tensor, b: Tensor, scale: float) -> Tensor:
    """[W, s B]."""
    return torch.cat((w, (b * scale).to(w.dtype)), 1)
