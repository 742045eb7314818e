"""Positions in a split to gathered rows, checked block by block; reading ahead; what becomes of records that are damaged."""
