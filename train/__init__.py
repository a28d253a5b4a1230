"""The experiment: `python -m train.xfactor`."""
