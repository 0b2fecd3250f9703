"""Adapters: the methods, where they go, their files, and how they are folded into the base."""
