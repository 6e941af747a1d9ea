"""Integrations of a stream handler with web frameworks, one module each.

An integration converts requests and responses. The handler makes all decisions.
"""
