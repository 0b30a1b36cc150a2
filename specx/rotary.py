"""Moving stored keys to other positions: only the difference must be turned (RoFormer, arXiv 2104.09864)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from specx.hf import HFModel


@dataclass(frozen=True, slots=True)
class Rotation:
    """How a model rotates its keys.

    Attributes:
        inv_freq: Angle of each pair a position, float32 [R / 2]; the first R of D dims rotate.
        interleaved: Pairs are neighbours (2i, 2i + 1); else (i, i + R / 2).
    """

    inv_freq: Tensor
    interleaved: bool

    def move(self, keys: Tensor, delta: Tensor) -> Tensor:
        """Return keys [..., K, D] of the same dtype, each moved by its `delta` positions, int64 [K].

        The angles are float32 at any distance; a delta of 0 returns the very same key.
        """
        angles = delta.to(torch.float32)[:, None] * self.inv_freq.to(delta.device)
        cos, sin = angles.cos(), angles.sin()
        turning = 2 * angles.shape[-1]
        wide = keys[..., :turning].to(torch.promote_types(keys.dtype, torch.float32))
        first, second = (wide[..., 0::2], wide[..., 1::2]) if self.interleaved else wide.chunk(2, -1)
        parts = (first * cos - second * sin, second * cos + first * sin)
        turned = torch.stack(parts, -1).flatten(-2) if self.interleaved else torch.cat(parts, -1)
        return torch.cat([turned.to(keys.dtype), keys[..., turning:]], -1)


def find_rotation(model: HFModel, positions: int) -> Rotation | None:
    """Find the rotation that moves the model's keys, by trying: None if no known one does.

    A token that sees only itself has hidden states that do not depend on its position, so in every layer its key at p
    moved by d must be its key at p + d. Learned positions, tables that change with the length and layers that rotate
    differently fail here.

    Args:
        positions: The check covers positions below this.
    """
    places = sorted({0, 1, positions // 3, positions - 1})
    keys = _keys(model, places) if _tables(model) else None
    if keys is None:
        return None
    # Of each layer's own largest key: others may have keys a hundred times larger. Far angles are rounded in float32.
    allowed = (3e-2 if keys.element_size() == 2 else 1e-3) + positions * torch.finfo(torch.float32).eps
    bound = allowed * keys.float().abs().amax((1, 2, 3, 4), keepdim=True)
    at = torch.tensor(places, device=keys.device)
    for inv_freq in _tables(model):
        for interleaved in (False, True) if 2 * len(inv_freq) <= keys.shape[-1] else ():
            found = Rotation(inv_freq, interleaved)
            moved = [found.move(keys[..., [i], :].expand_as(keys), at - at[i]) for i in (0, -1)]
            if all(bool(((each - keys).abs() <= bound).all()) for each in moved):
                return found
    return None


def _keys(model: HFModel, places: list[int]) -> Tensor | None:
    """Return one token's keys at each of `places`, alone there: [layers, 1, G, places, D]; None: of several shapes."""
    token = torch.tensor([min(7, model.vocab_size - 1)], device=model.device)
    cache, found = model.new_cache(1), []
    for place in places:  # one forward each: some tables change with the highest position in it
        model.forward(token, torch.full_like(token, place), cache)
        blocks = cache.rows(0, 1)
        if len(blocks) != 1:
            return None
        found.append(blocks[0][0].clone())
        cache.rollback()
    return torch.cat(found, dim=3)


def _tables(model: HFModel) -> list[Tensor]:
    return [
        each.detach().float().clone()  # some forwards overwrite theirs
        for name, each in model.model.named_buffers()
        if name.endswith("inv_freq") and "original" not in name and each.dim() == 1
    ]
