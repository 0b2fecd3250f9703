"""Rows out of files of every kind, and out of the hub: one file a kind."""
