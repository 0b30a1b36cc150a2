"""Tiny checkpoints on disk, made once a session: what `specx` is given by people who have real ones.

A pytest plugin, not a module of helpers: a test file that wants it says `pytest_plugins = ["disk"]`.
"""
