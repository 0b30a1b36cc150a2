"""The two sources of a tree, a draft model and the context, seen as one draft."""

from collections.abc import Sequence

import torch
from torch import Tensor

from specx.acceptance import Walk
from specx.branches import Branches, Calibration, bucket_in
from specx.draft import Draft, ReadsTarget
from specx.hf import Output
from specx.lookup import Lookup
from specx.tree import DraftTree, Plan


class Sources:
    """What proposes trees in one request, and what both sources learn from the steps.

    Args:
        draft: The draft model's part; None: there is none.
        lookup: The context's part; None: it is not used.
        device: Of the trees that have no draft's nodes.

    Attributes:
        foreseen: What the draft, if the last tree is its, would have guessed of tokens that waited; see `draft.Draft`.
    """

    def __init__(self, draft: Draft | None, lookup: Lookup | None, device: torch.device) -> None:
        self.draft, self.lookup, self.device = draft, lookup, device
        self._reader = draft if isinstance(draft, ReadsTarget) else None
        self.scale = Calibration()
        self._root, self._tree = -1, DraftTree.single(-1)
        self._offer: Branches | None = None
        self.foreseen: Sequence[int] = ()

    @property
    def cached(self) -> int:
        """Committed tokens in the draft's own cache."""
        if self._reader:
            return self._reader.kv_rows
        return self.draft.cached if self.draft else 0

    @property
    def waiting(self) -> int:
        """Accepted tokens that the draft has not seen, root included."""
        return self.draft.waiting if self.draft else 0

    def prefill(self, ids: Tensor, keep: Tensor | None, root: int) -> None:
        """Take the prompt, int64 [L], and the first token that the target chose; see `draft.Draft.prefill`."""
        self._root = root
        if self.lookup:
            self.lookup.extend([*ids.tolist(), root])
        if self.draft:
            self.draft.prefill(ids, keep)
            self.draft.begin(root)

    def offer(self, nodes: int, depth: int, copying: int = 1) -> Branches | None:
        """Return what the context offers for the next tree of `nodes` nodes, none deeper than `depth`.

        `copying`: nodes, where that is more, while a passage is being copied.
        """
        self._offer = self.lookup.branches(nodes - 1, depth, copying - 1) if self.lookup else None
        return self._offer

    def propose(self, plan: Plan) -> DraftTree:
        """Return the next tree."""
        self.foreseen = ()
        if self.draft and plan.draft and plan.nodes > 1:
            tree = self.draft.propose(plan)
            self.foreseen = self.draft.foreseen
        elif plan.branches and plan.nodes > 1:
            tree = DraftTree.of_branches(self._root, plan.branches.best(plan.nodes - 1), self.device)
        else:
            tree = DraftTree.single(self._root, self.device)
        self._tree = tree
        return tree

    def accept(self, walk: Walk, step: Output) -> None:
        """Take over a verified step of the tree proposed last."""
        self._learn(walk)
        if self.draft:
            self.draft.accept(walk, step)
        if self.lookup:
            if self._offer:
                self.lookup.learn(self._offer, walk.tokens)
            self.lookup.extend(walk.tokens)
        self._root, self._offer = walk.tokens[-1], None

    def _learn(self, walk: Walk) -> None:
        """Count, for each of the draft's nodes whose parent the walk reached, whether the walk took it."""
        if self._tree.origins is None:
            return
        _, parents, _, origins, *_ = self._tree.lists()
        reached = set(walk.path)
        for node, parent in enumerate(parents):
            if parent in reached:
                bucket = bucket_in(origins[node])
                if bucket is not None:
                    self.scale.count(bucket, node in reached)
