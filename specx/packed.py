"""Linear layers with their weights laid out in advance, for bfloat16 on a CPU.

For a few rows, oneDNN spends half of a bfloat16 product on bringing the weight into the layout that it computes with,
at every call. A copy that already has that layout is used while the model runs for us, and only then.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

COPY_BYTES = 1 << 30  # what a copy may take unless it is asked for
_ROWS = 256  # above, the work outweighs the layout, and that for one row is the wrong one


def steady_rows(rows: int, room: int, dtype: torch.dtype, device: torch.device) -> int:
    """Return how many rows, at most `room`, a forward of `rows` should run, the last ones for nothing.

    For every number of rows that is new to it, oneDNN compiles each bfloat16 product: 0.5 ms, many times a small one.
    """
    if device.type != "cpu" or dtype != torch.bfloat16 or not 8 < rows <= _ROWS:
        return rows
    more = -(-rows // 16) * 16
    return more if more <= room else rows


class PackedLinears:
    """The linear layers of a model in oneDNN's layout. Made anew for a layer whose weight was changed since.

    Args:
        model: Any module.
        wanted: True packs whatever can be; None only up to `COPY_BYTES`, for it is a second copy; False nothing.
    """

    def __init__(self, model: nn.Module, wanted: bool | None = None) -> None:
        layers: list[Any] = [module for module in model.modules() if _packable(module)] if wanted is not False else []
        self.nbytes = sum({each.weight.data_ptr(): each.weight.nbytes for each in layers}.values())
        if wanted is None and self.nbytes > COPY_BYTES:
            layers, self.nbytes = [], 0
        self._layers = [_PackedLinear(each) for each in layers]

    def __len__(self) -> int:
        return len(self._layers)

    @contextmanager
    def enabled(self) -> Iterator[None]:
        """Let the model compute with the packed weights inside, but for layers that somebody has wrapped."""
        ours = [layer for layer in self._layers if "forward" not in layer.module.__dict__]
        try:
            for layer in ours:
                layer.module.__dict__["forward"] = layer.forward
            yield
        finally:
            for layer in ours:
                layer.module.__dict__.pop("forward", None)


class _PackedLinear:
    def __init__(self, module: Any) -> None:
        self.module = module
        self._seen: tuple[int, int] | None = None
        self._packed: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (nn.Linear's own name for it)
        """Return what `nn.Linear.forward` gives for [..., in]."""
        weight = self.module.weight
        if input.dtype != weight.dtype or input.shape[:-1].numel() > _ROWS:
            return F.linear(input, weight, self.module.bias)
        state = weight.data_ptr(), weight._version
        if state != self._seen:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)
            self._seen = state
        return torch.ops.mkldnn._linear_pointwise(input, self._packed, self.module.bias, "none", [], "")


def _packable(module: nn.Module) -> bool:
    """Tell whether a module is a plain linear layer whose product is slow: bfloat16 on a CPU, with oneDNN."""
    if type(module) is not nn.Linear or "forward" in module.__dict__:  # somebody else's, such as an offloading hook
        return False
    weight = module.weight
    has_ops = hasattr(torch.ops.mkldnn, "_reorder_linear_weight") and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    plain = type(weight.data) is Tensor and weight.layout == torch.strided
    return has_ops and plain and weight.device.type == "cpu" and weight.dtype == torch.bfloat16
