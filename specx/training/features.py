"""What a frozen target gives for a window, kept on disk for trainings that see the same windows again.

Windows follow from data, length and seed, so that these are trainings that differ in other things: a kind's switches,
its sizes, the learning rate. One file a window, named by everything that its content depends on.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Compute = Callable[..., tuple[Tensor, ...]]
_SAMPLED = 1024  # numbers of every weight that a target is recognised by


def directly(compute: Compute, tokens: Tensor, *shared: Tensor) -> tuple[Tensor, ...]:
    """Compute and keep nothing; see `FeatureCache.__call__`."""
    return compute(tokens, *shared)


def check_writable(folder: Path) -> None:
    """Try to write into a folder, and leave no trace.

    Raises:
        ValueError: If that cannot be done.
    """
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    trial = folder / f"trial-{os.getpid()}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial.touch()
        trial.unlink()
    except OSError as error:
        why = error.strerror or error
        raise ValueError(
            f"--feature-cache {folder} cannot be written ({why}): give a folder of your own, or leave it away"
        ) from error
    finally:
        for each in made:
            with contextlib.suppress(OSError):
                each.rmdir()


def fingerprint(model: nn.Module) -> str:
    """Return a hash of a model: its config, and of every weight name, shape, dtype and first numbers."""
    found = hashlib.sha256()
    config: Any = getattr(model, "config", None)
    found.update(config.to_json_string(use_diff=False).encode() if config is not None else b"")
    for name, weight in model.named_parameters():
        found.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        first = weight.detach().flatten()[:_SAMPLED].float().cpu()
        found.update(first.numpy().tobytes())
    return found.hexdigest()


class FeatureCache:
    """Tensors by window, in a folder that several trainings and processes may share.

    Args:
        folder: Made when the first window is written.
        size: Bytes that its files may have in all. At the bound nothing more is written, and nothing deleted: windows
            come in the same order every time, and the oldest are those that are asked for next.
        about: What the tensors depend on besides tokens and positions.
        processes: How many share what is left of `size`.

    Attributes:
        found, written: Windows so far.
    """

    def __init__(self, folder: Path, size: int, about: dict[str, Any], processes: int = 1) -> None:
        self.folder, self.found, self.written = folder, 0, 0
        self._about = json.dumps(about, sort_keys=True).encode()
        held = sum(each.stat().st_size for each in folder.glob("*.safetensors")) if folder.is_dir() else 0
        self._left = max(0, size - held) // processes

    def __call__(self, compute: Compute, tokens: Tensor, *shared: Tensor) -> tuple[Tensor, ...]:
        """Return compute(tokens, *shared), read from disk where all of it is there.

        Args:
            compute: Gives tensors [B, ...] that depend, row by row, on nothing but these rows and `shared`.
            tokens: int64 [B, T].
            shared: The same for all rows, as positions are.
        """
        common = hashlib.sha256(self._about)
        for each in shared:
            common.update(each.cpu().numpy().tobytes())
        files = [self._file(common, row) for row in tokens.cpu()]
        rows = [_read(file, tokens.device) for file in files]
        known = [row for row in rows if row is not None]
        if len(known) == len(rows):
            self.found += len(rows)
            return tuple(torch.stack(parts) for parts in zip(*known, strict=True))
        # all of them: what a row gives may differ in its last digits with how many are computed at once
        computed = compute(tokens, *shared)
        for number, (file, row) in enumerate(zip(files, rows, strict=True)):
            if row is None:
                self._write(file, [each[number] for each in computed])
        return computed

    def _file(self, common: Any, row: Tensor) -> Path:
        found = common.copy()
        found.update(row.numpy().tobytes())
        return self.folder / f"{found.hexdigest()}.safetensors"

    def _write(self, file: Path, row: list[Tensor]) -> None:
        """Write a window; it appears whole or not at all."""
        need = sum(each.nbytes for each in row) + 4096
        if need > self._left:
            return
        partial = file.with_suffix(f".{os.getpid()}.partial")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file({str(place): each.detach().cpu().contiguous() for place, each in enumerate(row)}, partial)
            self._left -= partial.stat().st_size
            os.replace(partial, file)
        except (OSError, SafetensorError):  # a full disk: training goes on without
            self._left = 0
            partial.unlink(missing_ok=True)
            return
        self.written += 1


def _read(file: Path, device: torch.device) -> list[Tensor] | None:
    try:
        found = load_file(file, device=str(device))
    except (OSError, SafetensorError):
        return None
    return [found[str(place)] for place in range(len(found))]
