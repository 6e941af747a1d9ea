"""Convert the streams of model libraries into sources of the wire formats `ai_sdk` and `ag_ui`.

The modules do not import the libraries. They read the objects that the library of the caller yields.
"""
