"""Traces of a language model's own run: prompts, hooks on its blocks, hidden states and attention graphs to records."""
