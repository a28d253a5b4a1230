import sys

sys.exit(f"To download OpenAI's weights: python -m {__package__}.official --help")
