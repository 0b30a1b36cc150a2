"""`--draft lookup`: no draft model. What is drafted stands in the context, see `specx.lookup`."""

from collections.abc import Sequence

from specx.config import CacheConfig
from specx.draft import DraftModel


class LookupModel(DraftModel):
    """The draft of who has none: it knows no positions and holds no keys."""

    name = "lookup"
    draft_context = 1 << 30
    context_source = "it has no model and no limit"
    max_positions: int | None = None
    taps: Sequence[int] = ()
    about: Sequence[str] = ("it drafts what followed earlier occurrences of the newest tokens",)

    def start(self, capacity: int, tree_rows: int, tokens: int, config: CacheConfig) -> None:
        """Start nothing; see `draft.DraftModel`."""
