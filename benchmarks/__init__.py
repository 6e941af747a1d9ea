"""Where this package stands, measured beside what people use instead: `python -m benchmarks`."""
