"""The speed of this repository, compared with transformers and TRL: `python -m bench`, from its root. See speed.py."""
