"""Layouts: which keys of which files become a record's sequence, graphs, fields, label and id.

A `Recipe` says it, from flags, from a YAML file, or from a detector that recognises the layout of a public project. The
generic reader follows a recipe over any container of `ingest/containers`. What a layout is called, where its labels lie and
which files belong together is decided here; how bytes become arrays is decided in the containers.
"""
