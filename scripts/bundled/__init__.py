"""How the bundled pair of models is made; `scripts/train_bundled.py` is the command line."""
