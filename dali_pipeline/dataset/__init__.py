"""An opened data set, and what can be chosen from it: splits, folds, subsets, and mixes with weights."""
