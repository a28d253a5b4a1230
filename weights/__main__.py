import sys

sys.exit(f"To download or check weights: python -m {__package__}.official --help")
