"""Sources for streams with the wire format `ai_sdk`, from the streams of model libraries. One module for each library.

The modules import no library: they read the objects that the caller's library yields.
"""
