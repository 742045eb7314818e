"""Bytes of files and object stores: atomic writes, batched reads without the interpreter lock, a local cache of remote blocks.

Nothing here knows what a record is.
"""
