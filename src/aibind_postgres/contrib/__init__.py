"""The HTTP surface in web frameworks, a module for each. They carry requests and answers over, and decide nothing."""
