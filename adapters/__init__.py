"""Plugs for `specx.draft.Draft`: the drafts that people already have."""
