"""Base models in and out: the streaming loader, shards, families, the `BaseLayer` view and fingerprints.

Importing this package imports neither torch nor transformers; import the file that you need.
"""
