"""Run prompts through a language model, and store its hidden states and attention graphs as records."""
