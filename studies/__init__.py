"""The research behind minirlhf, repeated at toy scale: `python -m studies NAME`. See studies/__main__.py."""
