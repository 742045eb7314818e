"""Readers, one module per format of `convert`, and shared code: zip files, tensors, pickles that never run code."""
