"""Integrations with web frameworks and monitoring systems, one module each.

An integration with a framework converts requests and responses. The handler makes all decisions.
"""
