"""Adapters that connect a stream handler to a web framework, one module each.

An adapter converts requests and responses. All decisions are made by the handler.
"""
