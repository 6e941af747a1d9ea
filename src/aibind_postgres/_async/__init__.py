"""All input and output, in the flavour it is written in. `scripts/unasync.py` makes the synchronous one of it."""
