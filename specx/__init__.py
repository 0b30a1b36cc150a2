"""specx: long-context speculative decoding for Hugging Face LLMs.

Letters of tensor shapes, everywhere in this package: B batch, T tree nodes including the root (or new tokens), L
committed prefix, N keys, H query heads, G key/value heads, D head dim, V vocabulary, C chunks.
"""

from importlib import import_module, metadata
from pathlib import Path
from typing import Any

# In a checkout the sub-packages adapters, data and eval sit beside this folder; in a wheel they are inside it.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file():
    __path__.append(str(_checkout))

_LAZY = {
    "load": "specx.api",
    "retrofit": "specx.adapters.retrofit",
    "SpeculativeModel": "specx.api",
    "Generation": "specx.decoding",
}

__all__ = ["Generation", "SpeculativeModel", "__version__", "load", "retrofit"]


def __getattr__(name: str) -> Any:
    """Import torch only when something needs it."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    if name == "__version__":
        try:
            return metadata.version("specx")
        except metadata.PackageNotFoundError:
            return "0+checkout"
    raise AttributeError(f"module 'specx' has no attribute {name!r}")
