"""The benchmark: Viaduct and its peers side by side on the same two cores, in one run.

`python -m bench --help` from the root of the repository. Theory of operation: the head of interleave.py.
"""
