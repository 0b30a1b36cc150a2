"""What to read: named texts, local files, and the models that ship with the package."""
