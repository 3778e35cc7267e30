"""Weight matrices in the form that the few rows of a decoding step are quickest multiplied with.

    entry = Matrix.of([weight_OI], weights=None, pack=True)
    y_BO = entry(x_BI)

A step multiplies every weight with as many rows as completions are under way, from one to some hundred: too few to hide
how the weights are read. What is quick depends on the type and the processor alone.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_palm.models.hardware import multiplies
from lit_palm.models.kernels import thin_linear
from lit_palm.models.packed import multiplies_quickly, pack, packed_product, packs
from lit_palm.models.products import Panels, native

__all__ = ["Matrix", "PanelMatrix", "Weights"]

Weights = Literal["bf16", "int8"]

ROWS = 256
"""Rows of a weight that are transposed at a time."""


class Matrix:
    """x [B, I] -> x @ weight.T [B, O], with a weight [O, I] as it is."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        """The product, in the type of x."""
        return thin_linear(x, self.weight)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual [B, O] + x @ weight.T."""
        return residual + self(x)

    def num_bytes(self, rows: int) -> int:
        """What a product with so many rows reads of the weight."""
        return self.weight.numel() * self.weight.element_size()

    def settle(self) -> None:
        """Make all copies now, of kinds that `torch.compile` sees through."""

    def release(self) -> None:
        """Keep none of the weights that it was made of where copies of them do."""

    @staticmethod
    def of(parts: Sequence[Tensor], weights: Weights | None, pack: bool) -> list[Matrix]:
        """Matrices whose products with the parts of x, side by side, are to be added up: one for them all, or for each.

        Args:
            parts: weights [O, I_i] of one type.
            weights: type to convert to; None: their own.
            pack: make a copy that is quicker to multiply with, where there is one.

        Raises:
            ValueError: a package is missing.
        """
        first = parts[0].detach()
        if weights == "int8":
            return [Int8Matrix(torch.cat([*parts], 1) if len(parts) > 1 else first)]
        dtype = torch.bfloat16 if weights == "bf16" else first.dtype
        if not multiplies(first, dtype):
            return [HalfMatrix(_beside(parts).to(dtype))]
        if pack and first.is_cpu and native(dtype) and sum(part.shape[1] for part in parts) % 2 == 0:
            return [PanelMatrix(parts, dtype)]
        if pack and first.is_cpu and dtype in (torch.float32, torch.bfloat16) and packs(dtype):
            wide = dtype is torch.float32 and not multiplies_quickly()
            return [FloatMatrix(parts) if wide else PackedMatrix(parts, dtype)]
        if dtype != first.dtype:
            return [CastMatrix(_beside(parts).to(dtype))]
        return [Matrix(part.detach()) for part in parts]


def _beside(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.detach() for part in parts], 1) if len(parts) > 1 else parts[0].detach()


class CastMatrix(Matrix):
    """A weight of fewer bits than x, on a device that multiplies such."""

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight).to(x.dtype)


class PackedMatrix(Matrix):
    """A weight for a processor in oneDNN's own layout, a copy that is made when it is first of use.

    Here 0.25 to 0.65 times the time of `F.linear` with AVX-512, in float32 and in bfloat16, from one row to 64.
    """

    def __init__(self, parts: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> None:
        self.parts, self.dtype = [part.detach() for part in parts], dtype

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype is self.dtype:
            return packed_product(x, self.packed)
        return packed_product(x.to(self.dtype), self.packed).to(x.dtype)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        return packed_product(x, self.packed, residual) if x.dtype is self.dtype else residual + self(x)

    def num_bytes(self, rows: int) -> int:
        return sum(part.numel() for part in self.parts) * self.dtype.itemsize

    def release(self) -> None:
        assert self.packed is not None
        self.parts = [part.to("meta") for part in self.parts]  # shapes are all that is asked for

    @cached_property
    def packed(self) -> Tensor:
        """The copy."""
        return pack(_beside(self.parts).to(self.dtype))


class PanelMatrix(PackedMatrix):
    """The same in the layout of our own product, for processors that have one.

    Here .63 to .80 times the time of oneDNN's from one row to 16, .86 for 64, in bfloat16; .63 to .92 in float32.
    """

    def __call__(self, x: Tensor) -> Tensor:
        return self.panels.product(x)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.panels.product(x, residual)

    def part(self, x: Tensor, first: int, last: int) -> Tensor:
        """Columns [first, last) of the product."""
        return self.panels.product(x, columns=(first, last))

    @property
    def packed(self) -> Any:  # type: ignore[override]
        return self.panels

    @cached_property
    def panels(self) -> Panels:
        """The copy."""
        return Panels(_beside(self.parts), self.dtype)


class FloatMatrix(PackedMatrix):
    """A float32 weight for a processor without AVX-512, in a second copy for a single row.

    For it the weight is transposed and cut into parts of the inputs, as many as there are threads or a few more, each
    of which is read in order: a product of one row and one matrix keeps to a single thread there. On a processor with
    AVX2 0.4 to 0.9 times the time of `F.linear` for one row, 0.3 to 0.8 for several.
    """

    single: Tensor | None = None

    def release(self) -> None:
        """The second copy is made of them when a single row comes."""

    def __call__(self, x: Tensor) -> Tensor:
        return self._single(x).sum(0) if len(x) == 1 else super().__call__(x)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        return self._single(x).sum(0).add_(residual) if len(x) == 1 else super().add(x, residual)

    def _single(self, x: Tensor) -> Tensor:
        """Products of one row's parts with those of the weight, [parts, 1, O]."""
        if self.single is None:
            inputs, outputs = sum(part.shape[1] for part in self.parts), len(self.parts[0])
            # numpy asks for large pages, which spares a tenth of the time to read them
            transposed = torch.from_numpy(numpy.empty((inputs, outputs), numpy.float32))
            first = 0
            for part in self.parts:
                last = first + part.shape[1]
                for row in range(0, outputs, ROWS):  # both sides of a piece stay in the cache: half the time
                    transposed[first:last, row : row + ROWS] = part[row : row + ROWS].t()
                first = last
            parts = 2 ** (torch.get_num_threads() - 1).bit_length()  # widths are multiples of powers of two
            self.single = transposed.view(math.gcd(inputs, parts), -1, outputs)
        return torch.bmm(x.view(len(self.single), 1, -1), self.single)


class NarrowMatrix(Matrix, ABC):
    """A weight of fewer bits, on a processor that multiplies float32 numbers quickest.

    A few rows are bound by reading the weight, so that the narrow one is read; more by multiplying: a float32 form of
    it is made when they come.
    """

    few: int
    """Rows up to which it is read as it is."""
    width: ClassVar[int]
    """Bytes of a number."""
    wide: Matrix | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return self.narrow(x) if len(x) <= self.few else self.widened()(x)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        return residual + self.narrow(x) if len(x) <= self.few else self.widened().add(x, residual)

    def num_bytes(self, rows: int) -> int:
        return self.weight.numel() * (self.width if rows <= self.few else 4)

    def settle(self) -> None:
        self.widened(pack=False)

    @abstractmethod
    def narrow(self, x: Tensor) -> Tensor:
        """The product with few rows."""

    def as_float(self) -> Tensor:
        """The weight in float32."""
        return self.weight.float()

    def widened(self, pack: bool = True) -> Matrix:
        """The float32 form."""
        if self.wide is None:
            (self.wide,) = Matrix.of([self.as_float()], None, pack)
        return self.wide


class HalfMatrix(NarrowMatrix):
    """A weight of 16 bits; of a single row the numbers are rounded to them too."""

    few, width = 1, 2

    def narrow(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight).to(x.dtype)


class Int8Matrix(NarrowMatrix):
    """A weight of 8 bits with a scale for each output, through `torchao`; few rows are rounded to bfloat16."""

    width = 1

    def __init__(self, weight: Tensor) -> None:
        try:
            from torchao.quantization import Int8WeightOnlyConfig, quantize_
        except ImportError as error:
            raise ValueError("engine.weights is int8: it needs torchao, `pip install lit-palm[int8]`") from error
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        quantize_(layer, Int8WeightOnlyConfig(version=2))
        super().__init__(layer.weight)
        made: Any = layer.weight
        # with AVX-512 torch's kernel gives garbage, or ends the process, at some widths that 64 does not divide
        self.few = 16 if weight.shape[1] % 64 == 0 else 0
        self.numbers, self.scales = made.qdata, made.scale.flatten().bfloat16()

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) if x.is_cpu else F.linear(x, self.weight)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        return super().add(x, residual) if x.is_cpu else residual + self(x)

    def narrow(self, x: Tensor) -> Tensor:
        product: Tensor = torch.ops.aten._weight_int8pack_mm(x.bfloat16(), self.numbers, self.scales)
        return product.to(x.dtype)

    def as_float(self) -> Tensor:
        made: Any = self.weight
        return made.dequantize().float()  # type: ignore[no-any-return]
