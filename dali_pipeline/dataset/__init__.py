"""A data set that is opened, and what can be chosen of it: splits, folds, subsets, mixes with weights."""
