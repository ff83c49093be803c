"""How fast this repository is, beside transformers and TRL: `python -m bench`, from its root. See speed.py."""
