"""How the embedded checkpoint was made: `python -m train.pretrain`."""
