import sys

sys.exit("model has no commands. To sample from it: python -m train.sample")
