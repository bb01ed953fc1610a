"""An OpenAI-compatible server for runs."""
