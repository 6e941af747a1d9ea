"""The migrations: one for each file of `sql/`."""
