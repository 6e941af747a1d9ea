"""All input and output. `scripts/unasync.py` converts this package to the synchronous flavour."""
