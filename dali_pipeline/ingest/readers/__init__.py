"""One module per format that `convert` reads, and what formats share: zip files, tensors, pickles that are never run."""
