"""One view of every file that may hold arrays: its keys with shapes and dtypes, and rows of a key on demand.

Opening a container reads names and shapes but no array data where the format allows it, and never runs code from the file.
Start at `base.open_container`; each other module reads one family of formats.
"""
