"""Bytes, wherever they lie: files that are written whole or not at all, batched reads past the interpreter lock, object stores,
the local cache of their blocks. Nothing here knows what a record is."""
