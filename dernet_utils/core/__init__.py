"""Errors, profiles, the run's folders, the machine, and the words that all of the package shares.

Imports no other wing. `errors`, `files` and `vocabulary` import nothing of ours.
"""
