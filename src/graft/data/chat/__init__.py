"""Conversations to text: templates in a sandbox with a budget, and where in the text each answer stands."""
