"""Run prompts, or questions that it answers, through a language model; store hidden states and attention as records."""
